//! A run that goes on, and how it is watched.
//!
//! Invariants: a record is in the journal before any watcher sees it; watchers
//! read from a shared list at their own pace, so none of them can slow the run;
//! progress may be missed, records never.

use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use tokio::sync::{broadcast, watch};
use vmsnap_engine::{Cancel, Log, LogError};
use vmsnap_hypervisor::failpoint;

use crate::{
    flow::{Record, Snapshots},
    journal::{Caller, Journal, Stamped},
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
    /// Hash of the plan that its first caller demanded; empty for any.
    pub demanded: OnceLock<String>,
    /// Stops it.
    pub cancel: Cancel,
    /// Why it was stopped, when it was not by a caller.
    stop_reason: Mutex<Option<Fault>>,
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
        Arc::new(Self {
            id,
            request_id,
            request,
            caller,
            demanded: OnceLock::new(),
            cancel: Cancel::default(),
            stop_reason: Mutex::new(None),
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

    /// Stops the run, with the reason that its outcome will give.
    pub fn stop(&self, fault: Fault) {
        let mut reason = self
            .stop_reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        reason.get_or_insert(fault);
        self.cancel.request();
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
            .map_err(|error| LogError(error.to_string()))?;
        if !self.live.request.action.reads_only() {
            failpoint::killed_at("journal.record");
        }
        let sequence = stamped.sequence;
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
