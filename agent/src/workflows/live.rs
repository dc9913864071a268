//! A run that goes on, and how it is watched.
//!
//! Invariants: a record is in the journal before any watcher sees it; watchers
//! read from a shared list at their own pace, so none of them can slow the run;
//! progress may be missed, records never. A run that nobody can go on with for
//! now is left open, and its watchers are told why.

use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use jiff::Timestamp;
use tokio::sync::{broadcast, watch};
use vmsnap_engine::{Cancel, Closing, Log, LogError};
use vmsnap_hypervisor::failpoint;

use crate::{
    flow::{Record, Snapshots},
    journal::{Caller, Journal, Stamped},
    operate::metrics,
    planning::{Fault, Reason, Request, issues},
};

/// Bytes of a step that goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Index of the step.
    pub index: usize,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// Disk, or empty for memory.
    pub disk: String,
}

/// A run that goes on.
#[derive(Debug)]
pub struct Live {
    /// Id.
    pub id: String,
    /// The caller's own id for it.
    pub request_id: String,
    /// What was asked.
    pub request: Request,
    /// Who asked, for those who are told who is in the way.
    pub caller: Caller,
    /// When it began.
    pub started: Timestamp,
    /// Hash of the plan that its first caller demanded; empty for any.
    pub demanded: OnceLock<String>,
    /// Stops it.
    pub cancel: Cancel,
    /// Why it was stopped, when it was not by a caller.
    stop_reason: Mutex<Option<Fault>>,
    /// Why its last record could not be written.
    unwritten: Mutex<Option<Fault>>,
    /// Why it does not go on for now.
    left_open: OnceLock<Fault>,
    records: RwLock<Vec<Arc<Stamped>>>,
    written: watch::Sender<u64>,
    progress: broadcast::Sender<Progress>,
}

impl Live {
    /// A run with the records that it has.
    #[must_use]
    pub fn new(
        id: String,
        request_id: String,
        request: Request,
        caller: Caller,
        records: Vec<Stamped>,
    ) -> Arc<Self> {
        let last = records.last().map_or(0, |record| record.sequence);
        let started = records
            .first()
            .map_or_else(Timestamp::now, |record| record.time);
        Arc::new(Self {
            id,
            request_id,
            request,
            caller,
            started,
            demanded: OnceLock::new(),
            cancel: Cancel::default(),
            stop_reason: Mutex::new(None),
            unwritten: Mutex::default(),
            left_open: OnceLock::new(),
            records: RwLock::new(records.into_iter().map(Arc::new).collect()),
            written: watch::Sender::new(last),
            progress: broadcast::Sender::new(64),
        })
    }

    /// Records from a number on.
    #[must_use]
    pub fn records_from(&self, from: u64) -> Vec<Arc<Stamped>> {
        let records = self.records.read().unwrap_or_else(PoisonError::into_inner);
        records
            .iter()
            .filter(|record| record.sequence >= from)
            .cloned()
            .collect()
    }

    /// Tells the number of the last record, whenever it grows.
    #[must_use]
    pub fn written(&self) -> watch::Receiver<u64> {
        self.written.subscribe()
    }

    /// Progress from now on.
    #[must_use]
    pub fn progress(&self) -> broadcast::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Tells watchers of progress; nobody has to listen.
    pub fn report(&self, progress: Progress) {
        let _ = self.progress.send(progress);
    }

    /// Number of the last record.
    #[must_use]
    pub fn last(&self) -> u64 {
        *self.written.borrow()
    }

    /// Leaves the run open: watchers get what there is, and then this.
    pub fn leave_open(&self, why: Fault) {
        let why = why
            .with("workflow_id", &self.id)
            .with("sequence", self.last());
        let _ = self.left_open.set(why);
        // Those who wait for a record look again.
        self.written.send_modify(|_| {});
    }

    /// Why the run does not go on for now.
    #[must_use]
    pub fn left_open(&self) -> Option<&Fault> {
        self.left_open.get()
    }

    /// Why the last record could not be written.
    #[must_use]
    pub fn unwritten(&self) -> Option<Fault> {
        self.unwritten
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Stops the run, with the reason that its outcome will give.
    pub fn stop(&self, fault: Fault) {
        let mut reason = self
            .stop_reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        reason.get_or_insert(fault);
        self.cancel.request();
    }

    /// What every line of it carries. A level that no filter keeps out.
    #[must_use]
    pub fn span(&self) -> tracing::Span {
        tracing::error_span!(
            parent: None,
            "run",
            run = %self.id,
            vm = %self.request.vm,
            action = self.request.action.name(),
            caller = %self.caller.identity.escape_debug(),
        )
    }

    /// Logs its end, louder the more somebody has to act.
    pub fn told_end(&self, closing: Closing) {
        let seconds = Timestamp::now().duration_since(self.started).as_secs_f64();
        let fault = self.records_from(1).iter().rev().find_map(|record| {
            let Record::Closed { fault, .. } = &record.record else {
                return None;
            };
            fault.as_ref().map(ToString::to_string)
        });
        let fault = fault.unwrap_or_default();
        match closing {
            Closing::Succeeded => tracing::info!(seconds, "run ends: succeeded"),
            Closing::Cancelled => tracing::info!(seconds, %fault, "run ends: cancelled and undone"),
            Closing::Refused => tracing::info!(%fault, "run ends: refused, nothing was touched"),
            Closing::Failed => tracing::warn!(seconds, %fault, "run ends: failed and undone"),
            Closing::Stuck => tracing::error!(
                seconds,
                %fault,
                "run ends: a run is stuck: look at the VM, then say what was done with 'vmsnap \
                 resolve'"
            ),
        }
    }

    /// Why it was stopped.
    #[must_use]
    pub fn stopped_because(&self) -> Option<Fault> {
        self.stop_reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Writes the records of a run into the journal, then shows them. What the fault
/// that a run ends with teaches is kept before anybody sees it, and the fault
/// gets what is known of it.
#[derive(Debug)]
pub struct LiveLog {
    /// The run.
    pub live: Arc<Live>,
    /// The journal.
    pub journal: Journal,
}

impl Log<Snapshots> for LiveLog {
    async fn append(&self, mut record: Record) -> Result<(), LogError> {
        if let Record::Closed { fault, .. } = &mut record
            && let Some(bare) = fault.take()
        {
            learn(&bare, &self.journal).await;
            *fault = Some(explained(bare, &self.live.request.vm, &self.journal).await);
        }
        let stamped = self
            .journal
            .append(&self.live.id, record)
            .await
            .map_err(|error| {
                let lost = LogError(error.to_string());
                let mut unwritten = self
                    .live
                    .unwritten
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                *unwritten = Some(error.into());
                lost
            })?;
        if !self.live.request.action.reads_only() {
            failpoint::killed_at("journal.record");
        }
        let sequence = stamped.sequence;
        metrics::of_record(&self.live, &stamped);
        self.live
            .records
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::new(stamped));
        self.live.written.send_replace(sequence);
        Ok(())
    }
}

/// What a fault teaches: a lack of space is remembered of its pool or folder.
async fn learn(fault: &Fault, journal: &Journal) {
    // Where the place is not known, it would be remembered of the whole host.
    let place = ["pool", "path"]
        .iter()
        .find_map(|key| fault.metadata.get(*key));
    let (Reason::NoSpace, Some(place)) = (fault.reason, place) else {
        return;
    };
    let learned = journal.learn(fault.reason.as_str(), place, None).await;
    if let Err(error) = learned {
        tracing::warn!(%error, "what this run taught could not be kept");
    }
}

/// A fault with the fixes that worked here and the known issue that explains it.
pub async fn explained(fault: Fault, vm: &str, journal: &Journal) -> Fault {
    match journal.learned().await {
        Ok(learned) => issues::explained(fault, vm, &learned),
        Err(error) => {
            tracing::warn!(%error, "what this host taught cannot be read");
            fault
        }
    }
}
