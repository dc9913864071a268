//! Watching a run: past records first, then new ones, progress and heartbeats.
//!
//! Invariants: each watcher has a task of its own and a bounded channel, so a
//! slow one waits alone; records come in order and without gaps; the stream
//! ends after the outcome, or with the reason why the run does not go on for now.

use std::{sync::Arc, time::Duration};

use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;

use super::{Live, Progress, Workflows, lock};
use crate::{flow::Record, journal::Stamped, planning::Fault};

/// How many events wait for a slow watcher.
const WAITING: usize = 32;

/// What a watcher sees.
#[derive(Debug, Clone)]
pub enum Event {
    /// A record.
    Record(Arc<Stamped>),
    /// Bytes of the step that goes on, after the record of this number.
    Progress(u64, Progress),
    /// Nothing happened for a while; the last record's number.
    Heartbeat(u64),
    /// The run does not go on for now, and why: the last event.
    LeftOpen(Box<Fault>),
}

impl Workflows {
    /// Watches a run from a record on.
    ///
    /// # Errors
    /// When there is no such run, or the journal cannot be read.
    pub async fn watch(&self, id: &str, from: u64) -> Result<ReceiverStream<Event>, Fault> {
        let (events, stream) = mpsc::channel(WAITING);
        let from = from.max(1);
        let live = lock(&self.0.live).get(id).cloned();
        match live {
            Some(live) => {
                let heartbeat = self.0.config.heartbeat();
                tokio::spawn(async move {
                    // A watcher that is gone is no error.
                    let _ = follow(&live, from, heartbeat, &events).await;
                });
            }
            None => {
                self.run(id).await?;
                let records = self.0.journal.records(id, from).await?;
                tokio::spawn(async move {
                    for record in records {
                        if events.send(Event::Record(Arc::new(record))).await.is_err() {
                            return;
                        }
                    }
                });
            }
        }
        Ok(ReceiverStream::new(stream))
    }
}

async fn follow(
    live: &Live,
    mut next: u64,
    heartbeat: Duration,
    events: &mpsc::Sender<Event>,
) -> Result<(), mpsc::error::SendError<Event>> {
    let mut written = live.written();
    let mut progress = live.progress();
    loop {
        written.mark_unchanged();
        // Reports that came before these records go before them: after the last
        // record nothing follows.
        while let Ok(report) = progress.try_recv() {
            let _ = events.try_send(Event::Progress(next - 1, report));
        }
        for record in live.records_from(next) {
            next = record.sequence + 1;
            let last = matches!(record.record, Record::Closed { .. });
            events.send(Event::Record(record)).await?;
            if last {
                return Ok(());
            }
        }
        if let Some(why) = live.left_open() {
            return events.send(Event::LeftOpen(Box::new(why.clone()))).await;
        }
        let seen = next - 1;
        tokio::select! {
            biased;
            changed = written.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
            }
            report = progress.recv() => match report {
                Ok(report) => {
                    // Dropped rather than waited for when the watcher is slow.
                    if let Err(mpsc::error::TrySendError::Closed(event)) =
                        events.try_send(Event::Progress(seen, report))
                    {
                        return Err(mpsc::error::SendError(event));
                    }
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return Ok(()),
            },
            () = tokio::time::sleep(heartbeat) => {
                events.send(Event::Heartbeat(seen)).await?;
            }
            () = events.closed() => return Ok(()),
        }
    }
}
