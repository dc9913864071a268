//! The journal: runs, their records, what was recorded of snapshots, merges
//! that are not finished, files that this agent made, learned fixes, and the audit
//! trail. SQLite, on a thread of its own.
//!
//! Invariants
//! - [`Journal::append`] returns only when the record is on disk (WAL with
//!   `synchronous=FULL`).
//! - A database with a schema newer than this program knows, or one that is
//!   damaged, is an error with a way on, never silently replaced.
//! - It takes no more room than it was given: old runs go while the agent runs,
//!   and what they took is given back. What is known of snapshots, files, merges
//!   and guards does not hang on runs.
//! - A run begins only where there is room for its records, so that a full disk
//!   is met before the first effect and hardly ever between two.
//! - Times are milliseconds since the epoch.
//! - Whether writing works is known at all times: the last failure stands until
//!   something was written.

mod audit;
mod schema;
mod store;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, oneshot, watch};

use crate::{
    flow::Record,
    planning::{Fault, Outcome, Request, facts::SnapshotRecord, guard::Guard, issues::Learned},
};

pub use audit::{AuditFilter, AuditResult, AuditRow};
pub use store::RunFilter;

/// Who asked for a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// `uid:1000`, a certificate's name, `loopback`, or `agent` for itself.
    pub identity: String,
    /// `unix`, `tcp`, `tls` or `self`.
    pub transport: String,
    /// Address, where there is one.
    pub address: String,
}

impl Caller {
    /// What tells callers apart for limits: the same name by another door is another
    /// caller.
    #[must_use]
    pub fn key(&self) -> String {
        format!("{} {}", self.transport, self.identity)
    }
}

/// Status of a run, as listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunStatus {
    /// Waits behind another run.
    Queued,
    /// Takes its steps.
    Running,
    /// Undoes what it did.
    Undoing,
    /// Done.
    Succeeded,
    /// Failed and undone.
    Failed,
    /// Stopped and undone.
    Cancelled,
    /// Undoing failed.
    Stuck,
    /// Refused before anything was touched.
    Refused,
}

impl RunStatus {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Queued,
        Self::Running,
        Self::Undoing,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
        Self::Stuck,
        Self::Refused,
    ];

    /// As stored.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Undoing => "undoing",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Stuck => "stuck",
            Self::Refused => "refused",
        }
    }

    /// Whether the run is over.
    #[must_use]
    pub fn is_over(self) -> bool {
        !matches!(self, Self::Queued | Self::Running | Self::Undoing)
    }
}

/// A run as a whole.
#[derive(Debug, Clone, PartialEq)]
pub struct RunRow {
    /// Id.
    pub id: String,
    /// The caller's own id for it.
    pub request_id: String,
    /// What was asked.
    pub request: Request,
    /// Who asked.
    pub caller: Caller,
    /// Status.
    pub status: RunStatus,
    /// When it was accepted.
    pub started: Timestamp,
    /// When it ended.
    pub finished: Option<Timestamp>,
    /// Hash of its plan; empty before there is one.
    pub plan_hash: String,
    /// What it achieved.
    pub outcome: Option<Outcome>,
    /// Why it failed.
    pub fault: Option<Fault>,
    /// Number of its last record.
    pub last_sequence: u64,
}

impl RunRow {
    /// A run that was just accepted: running, with neither plan nor record.
    #[must_use]
    pub fn accepted(
        id: String,
        request_id: String,
        request: Request,
        caller: Caller,
        started: Timestamp,
    ) -> Self {
        Self {
            id,
            request_id,
            request,
            caller,
            status: RunStatus::Running,
            started,
            finished: None,
            plan_hash: String::new(),
            outcome: None,
            fault: None,
            last_sequence: 0,
        }
    }
}

/// A record with its number and time.
#[derive(Debug, Clone)]
pub struct Stamped {
    /// From 1, without gaps.
    pub sequence: u64,
    /// When it was written.
    pub time: Timestamp,
    /// The record.
    pub record: Record,
}

/// A merge that was begun and not seen to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BegunMerge {
    /// The snapshot that is being deleted.
    pub snapshot: String,
    /// libvirt's creation time of it, in seconds.
    pub created: i64,
    /// Target of the disk.
    pub disk: String,
}

/// A file that this agent made or was about to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotedFile {
    /// Path.
    pub path: String,
    /// Name of the VM that it was made for; empty when that is not known.
    pub vm: String,
}

/// Bytes that have to be free for a run to begin: the records of a long one.
pub const ROOM: u64 = 1 << 20;

/// Which runs stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// Those that ended before go; `None` for none.
    pub before: Option<Timestamp>,
    /// So many of the newest stay, whatever their age.
    pub keep: u32,
    /// From so many bytes on, the oldest go whatever their age, those that only read
    /// first.
    pub bytes: u64,
}

/// What pruning did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Runs that went.
    pub runs: u64,
    /// There may be more to do: pruning stops now and then to let others write.
    pub more: bool,
}

/// Why the journal cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum JournalError {
    /// It was written by a newer agent.
    #[error(
        "the journal {path} has schema {found} and this agent knows {known}; run the agent that \
         wrote it, or a newer one"
    )]
    TooNew {
        /// Where.
        path: String,
        /// Its schema.
        found: i64,
        /// Newest known.
        known: i64,
    },
    /// SQLite says that it is damaged, or it is no database.
    #[error(
        "the journal {path} is damaged ({what}); move it aside (with its -wal and -shm files) and \
         start again: runs before now cannot be read back then, and guests that were held have to \
         be looked at"
    )]
    Damaged {
        /// Where.
        path: String,
        /// SQLite's words.
        what: String,
    },
    /// A row cannot be understood.
    #[error(
        "the journal's row {row} cannot be read ({what}): run the agent that wrote it, or move the \
         journal aside (with its -wal and -shm files) and look at guests that were held"
    )]
    Unreadable {
        /// Which.
        row: String,
        /// Why.
        what: String,
    },
    /// Its disk is full.
    #[error(
        "the journal {path} has no room: {need} bytes are needed and {free} are free; make room"
    )]
    Full {
        /// Where.
        path: String,
        /// Bytes that are needed.
        need: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// Reading or writing failed.
    #[error("the journal {path} cannot be used: {what}")]
    Io {
        /// Where.
        path: String,
        /// SQLite's words.
        what: String,
    },
    /// The journal's thread is gone.
    #[error("the journal is closed")]
    Closed,
}

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// So long after something was written it is taken for granted that writing works.
const PROVEN: Duration = Duration::from_secs(60);

/// That reading or writing failed, and nothing was written since.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failing {
    /// Since when.
    pub since: Timestamp,
    /// The last failure's words.
    pub why: String,
}

/// What the last calls told of the file.
#[derive(Debug)]
struct Condition {
    failing: Option<Failing>,
    written: Instant,
}

/// Bytes of the journal's files, and what is free around them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Of the database and its log.
    pub bytes: u64,
    /// Free in its file system for the agent.
    pub free: u64,
}

/// A cheap handle to the journal.
#[derive(Debug, Clone)]
pub struct Journal {
    jobs: mpsc::Sender<Job>,
    path: Arc<PathBuf>,
    /// Told when a guard was kept.
    guards: Arc<Notify>,
    /// Told when the audit trail may have grown.
    audits: Arc<watch::Sender<()>>,
    condition: Arc<Mutex<Condition>>,
    /// Disconnected once the file is closed.
    closed: Arc<Mutex<mpsc::Receiver<()>>>,
}

/// Waits for a journal's end; keeps none open.
#[derive(Debug)]
pub struct Closing(Arc<Mutex<mpsc::Receiver<()>>>);

impl Closing {
    /// Waits until the file is closed, once all handles are gone, but not for ever:
    /// what is left in the log then is read by whoever opens it next.
    pub fn wait(self, most: Duration) {
        let closed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = closed.recv_timeout(most);
    }
}

impl Journal {
    /// Opens the journal, and makes it when it is not there.
    ///
    /// # Errors
    /// When it cannot be read or written, is damaged, or was written by a newer
    /// agent.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let mut connection = schema::open(path)?;
        let (jobs, inbox) = mpsc::channel::<Job>();
        let (open, closed) = mpsc::channel::<()>();
        thread::Builder::new()
            .name("journal".into())
            .spawn(move || {
                while let Ok(job) = inbox.recv() {
                    job(&mut connection);
                }
                // Puts all into the one file and removes the log.
                drop(connection);
                drop(open);
            })
            .map_err(|error| JournalError::Io {
                path: path.display().to_string(),
                what: error.to_string(),
            })?;
        Ok(Self {
            jobs,
            path: Arc::new(path.to_owned()),
            guards: Arc::default(),
            audits: Arc::new(watch::Sender::new(())),
            closed: Arc::new(Mutex::new(closed)),
            condition: Arc::new(Mutex::new(Condition {
                failing: None,
                written: Instant::now(),
            })),
        })
    }

    /// Tells of its end.
    #[must_use]
    pub fn closing(&self) -> Closing {
        Closing(self.closed.clone())
    }

    /// Looks whether a journal could be opened, and changes nothing.
    ///
    /// # Errors
    /// As [`Journal::open`].
    pub fn probe(path: &Path) -> Result<(), JournalError> {
        schema::probe(path)
    }

    async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, store::Error> + Send + 'static,
    ) -> Result<T, JournalError> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            // A caller that is gone does not want the answer.
            let _ = reply.send(work(connection));
        });
        self.jobs.send(job).map_err(|_| JournalError::Closed)?;
        let result = answer.await.map_err(|_| JournalError::Closed)?;
        result.map_err(|error| {
            let of_the_file = error.is_of_the_file();
            let error = error.at(&self.path);
            if of_the_file {
                self.failed(&error);
            }
            error
        })
    }

    /// A call that writes: when it succeeds, writing works.
    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, store::Error> + Send + 'static,
    ) -> Result<T, JournalError> {
        let done = self.call(work).await?;
        let mut condition = self.condition();
        condition.written = Instant::now();
        if let Some(failing) = condition.failing.take() {
            drop(condition);
            tracing::info!(since = %failing.since, "the journal can be written again");
        }
        Ok(done)
    }

    fn condition(&self) -> MutexGuard<'_, Condition> {
        self.condition
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, error: &JournalError) {
        let why = error.to_string();
        let mut condition = self.condition();
        match &mut condition.failing {
            Some(failing) => failing.why = why,
            none => {
                tracing::error!(%error, "the journal cannot be used: no run can go on");
                *none = Some(Failing {
                    since: Timestamp::now(),
                    why,
                });
            }
        }
    }

    /// Whether reading or writing failed, and nothing was written since.
    #[must_use]
    pub fn failing(&self) -> Option<Failing> {
        self.condition().failing.clone()
    }

    /// Proves that the journal's thread is alive, that there is room for a run and,
    /// when nothing else was written for a minute or writing failed, that it can
    /// write.
    ///
    /// # Errors
    /// When it cannot.
    pub async fn beat(&self) -> Result<(), JournalError> {
        let proven = {
            let condition = self.condition();
            condition.failing.is_none() && condition.written.elapsed() < PROVEN
        };
        let path = self.path.clone();
        let beat = move |db: &mut Connection| match schema::lacks_room(&path) {
            Some(full) => Err(store::Error::Journal(full)),
            None if proven => store::look(db),
            None => store::beat(db),
        };
        if proven {
            self.call(beat).await
        } else {
            self.write(beat).await
        }
    }

    /// How much room the journal takes, and how much is left; `None` when its
    /// files cannot be looked at.
    #[must_use]
    pub fn size(&self) -> Option<Size> {
        let mut log = self.path.as_os_str().to_owned();
        log.push("-wal");
        let file = std::fs::metadata(&*self.path).ok()?.len();
        let log = std::fs::metadata(log).map_or(0, |log| log.len());
        let space = rustix::fs::statvfs(&*self.path).ok()?;
        Some(Size {
            bytes: file.saturating_add(log),
            free: space.f_bavail.saturating_mul(space.f_frsize),
        })
    }

    /// The newest stuck runs, and how many there are in all.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn stuck_runs(&self, limit: u32) -> Result<(Vec<RunRow>, u64), JournalError> {
        self.call(move |db| Ok((store::stuck_runs(db, limit)?, store::count_stuck(db)?)))
            .await
    }

    /// Notes a new run.
    ///
    /// # Errors
    /// When it is not on disk, or there is no room for its records.
    pub async fn begin(&self, run: RunRow) -> Result<(), JournalError> {
        let path = self.path.clone();
        self.write(move |db| {
            if let Some(full) = schema::lacks_room(&path) {
                return Err(store::Error::Journal(full));
            }
            store::begin(db, &run)
        })
        .await?;
        self.audits.send_replace(());
        Ok(())
    }

    /// Whether a run could go on writing: there is room, and what is written gets
    /// to the disk.
    ///
    /// # Errors
    /// Why not.
    pub async fn takes_records_of(&self, run: &str) -> Result<(), JournalError> {
        let (path, run) = (self.path.clone(), run.to_owned());
        self.write(move |db| match schema::lacks_room(&path) {
            Some(full) => Err(store::Error::Journal(full)),
            None => store::touch(db, &run),
        })
        .await
    }

    /// Appends a record and returns it with its number and time.
    ///
    /// # Errors
    /// When it is not on disk.
    pub async fn append(&self, run: &str, record: Record) -> Result<Stamped, JournalError> {
        let run = run.to_owned();
        let closes = matches!(record, Record::Closed { .. });
        let stamped = self
            .write(move |db| store::append(db, &run, record))
            .await?;
        if closes {
            self.audits.send_replace(());
        }
        Ok(stamped)
    }

    /// Reads one run.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn run(&self, id: &str) -> Result<Option<RunRow>, JournalError> {
        let id = id.to_owned();
        self.call(move |db| store::run(db, &id)).await
    }

    /// The runs of a request id, newest first.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn by_request_id(&self, id: &str) -> Result<Vec<RunRow>, JournalError> {
        let id = id.to_owned();
        self.call(move |db| store::by_request_id(db, &id)).await
    }

    /// Runs, newest first.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn runs(&self, filter: RunFilter) -> Result<Vec<RunRow>, JournalError> {
        self.call(move |db| store::runs(db, &filter)).await
    }

    /// Runs that are not over: after a start, those that were interrupted.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn open_runs(&self) -> Result<Vec<RunRow>, JournalError> {
        match self.open_runs_and_others().await? {
            (runs, None) => Ok(runs),
            (_, Some(error)) => Err(error),
        }
    }

    /// The same, and the first of those that cannot be read, which keeps nobody from
    /// reading the others.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn open_runs_and_others(
        &self,
    ) -> Result<(Vec<RunRow>, Option<JournalError>), JournalError> {
        let found = self.call(store::open_runs).await?;
        let mut runs = Vec::with_capacity(found.len());
        let mut unreadable = None;
        for run in found {
            match run.map_err(|error| error.at(&self.path)) {
                Ok(run) => runs.push(run),
                Err(error) => {
                    tracing::error!(%error, "an open run cannot be read, and is left open");
                    unreadable.get_or_insert(error);
                }
            }
        }
        Ok((runs, unreadable))
    }

    /// The records of a run, from a number on.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn records(&self, run: &str, from: u64) -> Result<Vec<Stamped>, JournalError> {
        let run = run.to_owned();
        self.call(move |db| store::records(db, &run, from)).await
    }

    /// Records what is known of a snapshot.
    ///
    /// # Errors
    /// When it is not on disk.
    pub async fn record_snapshot(
        &self,
        vm_uuid: &str,
        name: &str,
        record: SnapshotRecord,
    ) -> Result<(), JournalError> {
        let (vm, name) = (vm_uuid.to_owned(), name.to_owned());
        self.call(move |db| store::record_snapshot(db, &vm, &name, &record))
            .await
    }

    /// Forgets what was recorded of a snapshot.
    ///
    /// # Errors
    /// When it is not on disk.
    pub async fn forget_snapshot(&self, vm_uuid: &str, name: &str) -> Result<(), JournalError> {
        let (vm, name) = (vm_uuid.to_owned(), name.to_owned());
        self.call(move |db| store::forget_snapshot(db, &vm, &name))
            .await
    }

    /// What was recorded of a VM's snapshots, by name.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn snapshot_records(
        &self,
        vm_uuid: &str,
    ) -> Result<Vec<(String, SnapshotRecord)>, JournalError> {
        let vm = vm_uuid.to_owned();
        self.call(move |db| store::snapshot_records(db, &vm)).await
    }

    /// Notes that deleting a snapshot is about to merge into the files that hold
    /// its data of some disks. `created` is libvirt's creation time of it, in
    /// seconds, which tells it from a later one of the same name.
    ///
    /// # Errors
    /// When it is not on disk.
    pub async fn note_merge(
        &self,
        vm_uuid: &str,
        snapshot: &str,
        created: i64,
        disks: Vec<String>,
    ) -> Result<(), JournalError> {
        let (vm, snapshot) = (vm_uuid.to_owned(), snapshot.to_owned());
        self.call(move |db| store::note_merge(db, &vm, &snapshot, created, &disks))
            .await
    }

    /// Forgets the merges of a snapshot: they never began.
    ///
    /// # Errors
    /// When it is not on disk.
    pub async fn forget_merge(&self, vm_uuid: &str, snapshot: &str) -> Result<(), JournalError> {
        let (vm, snapshot) = (vm_uuid.to_owned(), snapshot.to_owned());
        self.call(move |db| store::forget_merge(db, &vm, &snapshot))
            .await
    }

    /// Notes that the merges of a snapshot are finished, and when they last wrote
    /// into which images, in nanoseconds since the epoch.
    ///
    /// # Errors
    /// When it is not on disk.
    pub async fn finish_merge(
        &self,
        vm_uuid: &str,
        snapshot: &str,
        written: Vec<(String, i64)>,
    ) -> Result<(), JournalError> {
        let (vm, snapshot) = (vm_uuid.to_owned(), snapshot.to_owned());
        self.call(move |db| store::finish_merge(db, &vm, &snapshot, &written))
            .await
    }

    /// When merges last wrote into images, in nanoseconds since the epoch.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn finished_merges(&self) -> Result<BTreeMap<String, i64>, JournalError> {
        self.call(store::finished_merges).await
    }

    /// Merges of a VM that were begun and not seen to end.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn begun_merges(&self, vm_uuid: &str) -> Result<Vec<BegunMerge>, JournalError> {
        let vm = vm_uuid.to_owned();
        self.call(move |db| store::begun_merges(db, &vm)).await
    }

    /// Keeps a guard as it is now.
    ///
    /// # Errors
    /// When it is not on disk.
    pub async fn put_guard(&self, guard: Guard) -> Result<(), JournalError> {
        self.write(move |db| store::put_guard(db, &guard)).await?;
        self.guards.notify_one();
        Ok(())
    }

    /// Has the guard that a run armed wait for a person, with the reason why, if it
    /// still waits for its deadline. Says whether it did.
    ///
    /// # Errors
    /// When it is not on disk.
    pub async fn hold_guard(&self, run: &str, why: &str) -> Result<bool, JournalError> {
        let (run, why) = (run.to_owned(), why.to_owned());
        let held = self
            .write(move |db| store::hold_guard(db, &run, why))
            .await?;
        self.guards.notify_one();
        Ok(held)
    }

    /// Forgets the guard that a run armed.
    ///
    /// # Errors
    /// When it is not on disk.
    pub async fn remove_guard(&self, run: &str) -> Result<(), JournalError> {
        let run = run.to_owned();
        self.call(move |db| store::remove_guard(db, &run)).await
    }

    /// The open guard on a VM.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn open_guard(&self, vm_uuid: &str) -> Result<Option<Guard>, JournalError> {
        let all = self.open_guards().await?;
        Ok(all.into_iter().find(|guard| guard.vm_uuid == vm_uuid))
    }

    /// All open guards, the most urgent first.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn open_guards(&self) -> Result<Vec<Guard>, JournalError> {
        self.call(store::open_guards).await
    }

    /// Waits until a guard was armed or changed.
    pub async fn guards_changed(&self) {
        self.guards.notified().await;
    }

    /// Notes files before they are made.
    ///
    /// # Errors
    /// When it is not on disk.
    pub async fn note_files(&self, run: &str, paths: Vec<String>) -> Result<(), JournalError> {
        let run = run.to_owned();
        self.call(move |db| store::note_files(db, &run, &paths))
            .await
    }

    /// All files that this agent noted.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn noted_files(&self) -> Result<Vec<NotedFile>, JournalError> {
        self.call(store::noted_files).await
    }

    /// Forgets files that are gone.
    ///
    /// # Errors
    /// When it is not on disk.
    pub async fn forget_files(&self, paths: Vec<String>) -> Result<(), JournalError> {
        self.call(move |db| store::forget_files(db, &paths)).await
    }

    /// Learns that a fault was seen, or the fix for it.
    ///
    /// # Errors
    /// When it is not on disk.
    pub async fn learn(
        &self,
        reason: &str,
        subject: &str,
        fix: Option<&str>,
    ) -> Result<Learned, JournalError> {
        let (reason, subject) = (reason.to_owned(), subject.to_owned());
        let fix = fix.map(str::to_owned);
        self.call(move |db| store::learn(db, &reason, &subject, fix.as_deref()))
            .await
    }

    /// All that was learned, last seen first.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn learned(&self) -> Result<Vec<Learned>, JournalError> {
        self.call(store::learned).await
    }

    /// Forgets what was learned; false when there is no such id.
    ///
    /// # Errors
    /// When it is not on disk.
    pub async fn forget_learned(&self, id: &str) -> Result<bool, JournalError> {
        let id = id.to_owned();
        self.call(move |db| store::forget_learned(db, &id)).await
    }

    /// Adds entries to the audit trail.
    ///
    /// # Errors
    /// When they are not on disk.
    pub async fn audit(&self, rows: Vec<AuditRow>) -> Result<(), JournalError> {
        self.write(move |db| audit::add(db, &rows)).await?;
        self.audits.send_replace(());
        Ok(())
    }

    /// Reads entries of the audit trail.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn audited(&self, filter: AuditFilter) -> Result<Vec<AuditRow>, JournalError> {
        self.call(move |db| audit::read(db, &filter)).await
    }

    /// Tells whenever the audit trail may have grown.
    #[must_use]
    pub fn audit_grows(&self) -> watch::Receiver<()> {
        self.audits.subscribe()
    }

    /// Removes entries of the audit trail of before a time, and all but the newest
    /// `keep`.
    ///
    /// # Errors
    /// When it is not on disk.
    pub async fn prune_audit(&self, before: Timestamp, keep: u32) -> Result<u64, JournalError> {
        self.write(move |db| audit::prune(db, before, keep)).await
    }

    /// Removes runs that are not to stay, the oldest first, and gives their room
    /// back. Runs that are open or stuck stay, and those whose guard is open.
    ///
    /// # Errors
    /// When it is not on disk.
    pub async fn prune(&self, stay: Retention) -> Result<Pruned, JournalError> {
        self.call(move |db| store::prune(db, stay)).await
    }
}

#[cfg(test)]
mod tests;
