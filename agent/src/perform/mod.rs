//! What a step means on the hypervisor: the only place that knows both.
//!
//! Invariants: every undo accepts that its step never happened and that it was
//! undone before; a guest that was found running is left running, one that was
//! found paused stays paused; nothing is deleted before it was looked at again.

mod conclude;
mod create;
mod delete;
mod guard;
mod guest;
mod hold;
mod merge;
mod owner;
mod revert;
mod storage;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tracing::Instrument as _;
use vmsnap_engine::{Cancel, Hold, Perform};
use vmsnap_hypervisor::{Bulk, DomainState, Hypervisor};

use crate::{
    flow::Snapshots,
    journal::Journal,
    observe::Observer,
    planning::{Done, Facts, Fault, Outcome, Plan, Reason, Step, Warning, files, issues},
    workflows::{Live, Progress},
};

/// Does and undoes the steps of one run.
#[derive(Debug)]
pub struct Performer {
    hypervisor: Hypervisor,
    journal: Journal,
    observer: Observer,
    live: Arc<Live>,
    plan: Plan,
    /// As read before the run; `None` in recovery.
    facts: Option<Facts>,
    notices: Mutex<Vec<Warning>>,
    held_since: Mutex<HashMap<Hold, Instant>>,
    /// How long a guest is asked to let go before it is given up.
    patience: Duration,
    /// It was given up: it is asked once more at most.
    gave_up: AtomicBool,
    /// Until when undoing waits for a call that was given up and is still with
    /// libvirt; known once it had to.
    settles_until: OnceLock<Instant>,
    /// Nobody knows how far the call came that a step failed with.
    cut_off: AtomicBool,
    /// The guest was frozen by somebody else when it was to be frozen.
    frozen_by_others: AtomicBool,
    /// libvirt said that the name of the new snapshot is taken: what has it was made
    /// by somebody else since the plan was made.
    name_taken: AtomicBool,
    /// A revert that failed went through all the same: the present state is gone
    /// but for what the run kept of it.
    went_through: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Performer {
    /// For one run, whose guest has `patience` to let go.
    #[must_use]
    pub fn new(
        hypervisor: Hypervisor,
        journal: Journal,
        observer: Observer,
        live: Arc<Live>,
        plan: Plan,
        facts: Option<Facts>,
        patience: Duration,
    ) -> Self {
        Self {
            hypervisor,
            journal,
            observer,
            live,
            plan,
            facts,
            notices: Mutex::default(),
            held_since: Mutex::default(),
            patience,
            gave_up: AtomicBool::new(false),
            settles_until: OnceLock::new(),
            cut_off: AtomicBool::new(false),
            frozen_by_others: AtomicBool::new(false),
            name_taken: AtomicBool::new(false),
            went_through: AtomicBool::new(false),
        }
    }

    fn vm(&self) -> &str {
        &self.plan.request.vm
    }

    fn went_through(&self) {
        self.went_through.store(true, Ordering::Relaxed);
    }

    /// Whether what the run made has to stay although the run failed.
    fn keeps_what_it_made(&self) -> bool {
        self.went_through.load(Ordering::Relaxed)
    }

    /// Whether a start comes after a revert.
    fn reverts(&self) -> bool {
        let mut steps = self.plan.steps.iter();
        steps.any(|step| matches!(step, Step::Revert { .. } | Step::RevertDisks { .. }))
    }

    fn notice(&self, code: &str, message: impl Into<String>, advice: impl Into<String>) {
        lock(&self.notices).push(Warning::new(code, message, advice));
    }

    fn progress(&self, index: usize, disk: &str, done: u64, total: u64) {
        self.live.report(Progress {
            index,
            done,
            total,
            disk: disk.to_owned(),
        });
    }
}

/// Pause before an undo is tried again that libvirt was not there for.
const AGAIN: Duration = Duration::from_millis(500);

fn plain(note: impl Into<String>) -> Done {
    Done::Plain { note: note.into() }
}

impl Performer {
    async fn take(
        &self,
        index: usize,
        step: &Step,
        done: &[Option<Done>],
        cancel: &Cancel,
    ) -> Result<Done, Fault> {
        match step {
            Step::DropManagedSave => {
                self.hypervisor.managed_save_remove(self.vm()).await?;
                Ok(plain("the saved memory is gone"))
            }
            Step::Start { paused } => self.start(*paused).await.map_err(|fault| {
                if self.reverts() {
                    let message = format!(
                        "{}; the revert is done, and the VM did not start",
                        fault.message
                    );
                    Fault { message, ..fault }
                } else {
                    fault
                }
            }),
            Step::Stop => {
                self.hypervisor.destroy(self.vm()).await?;
                Ok(plain(""))
            }
            Step::WaitFor {
                what,
                timeout_ms,
                required,
            } => {
                self.wait_for(index, *what, *timeout_ms, *required, cancel)
                    .await
            }
            Step::Freeze {
                timeout_ms,
                fall_back,
            } => self.freeze(*timeout_ms, *fall_back).await,
            Step::Thaw => self.thaw().await,
            Step::Suspend { unless_frozen } => self.suspend(*unless_frozen, done).await,
            Step::Resume => self.resume(done).await,
            Step::CopyNvram { from, to } => self.copy_nvram(from, to).await,
            Step::CreateSnapshot(new) => self.create(index, new, cancel).await,
            Step::RecordSnapshot(record) => self.record(record, done).await,
            Step::CheckSnapshot {
                name,
                nvram,
                disks_only,
            } => self.check_snapshot(name, nvram.as_ref(), !disks_only).await,
            Step::MendRecord { name, overlays } => self.mend_record(name, overlays).await,
            Step::KeepDefinition => self.keep_definition().await,
            Step::Revert {
                name,
                running,
                paused,
                force,
                ..
            } => {
                // Memory may be much to load.
                let _place = self.bulk(index, cancel).await?;
                self.revert(name, *running, *paused, *force).await
            }
            Step::RevertDisks {
                name,
                disks,
                definition,
            } => self.revert_disks(name, disks, *definition, done).await,
            Step::RestoreNvram { from, to } => self.restore_nvram(from, to).await,
            Step::ArmGuard {
                snapshot,
                within_ms,
                created_by,
            } => self.arm(snapshot, *within_ms, *created_by, done).await,
            Step::EndGuard { snapshot, state } => self.end_guard(snapshot, *state).await,
            Step::SyncClock => self.sync_clock(done).await,
            Step::DeleteSnapshot {
                name,
                metadata_only,
                disks,
                bandwidth,
                files,
                ..
            } => {
                let merge = delete::Merge {
                    name,
                    metadata_only: *metadata_only,
                    disks,
                    bandwidth: *bandwidth,
                    files,
                };
                self.delete(index, merge, cancel).await
            }
            Step::Resize {
                disk,
                bytes,
                shrink,
                online,
            } => self.resize(disk, *bytes, *shrink, *online).await,
            Step::DeleteVolume {
                pool, name, path, ..
            } => self.delete_volume(pool, name, path).await,
            Step::DeleteFile { path, .. } => self.delete_file(path).await,
        }
    }

    async fn take_back(
        &self,
        index: usize,
        step: &Step,
        done: &[Option<Done>],
    ) -> Result<String, Fault> {
        match step {
            Step::Freeze { .. } => self.ensure_thawed().await,
            Step::Suspend { .. } => self.undo_suspend(index, done).await,
            Step::CreateSnapshot(_) | Step::RecordSnapshot(_) | Step::CopyNvram { .. }
                if self.keeps_what_it_made() =>
            {
                Ok("it is kept: the VM does not stand on it any more".into())
            }
            Step::CopyNvram { to, .. } => self.remove_unused(std::slice::from_ref(to)).await,
            Step::CreateSnapshot(new) => self.undo_create(new).await,
            Step::RecordSnapshot(record) => {
                self.journal
                    .forget_snapshot(&self.plan.vm_uuid, &record.name)
                    .await?;
                Ok("the record is forgotten".into())
            }
            Step::Revert {
                name, definition, ..
            }
            | Step::RevertDisks {
                name, definition, ..
            } => self.undo_revert(name, *definition, done).await,
            Step::DeleteSnapshot {
                boots_helper,
                bandwidth,
                disks,
                ..
            } => {
                self.undo_delete(*boots_helper, bandwidth.is_some(), disks)
                    .await
            }
            Step::ArmGuard { .. } => self.disarm().await,
            Step::EndGuard { snapshot, .. } => self.arm_again(snapshot, done).await,
            _ => Ok("nothing to undo".into()),
        }
    }

    /// A place among the calls that copy much, unless the run is stopped before there
    /// is one: nothing was done by then.
    async fn bulk(&self, index: usize, cancel: &Cancel) -> Result<Bulk, Fault> {
        let place = self.hypervisor.bulk();
        tokio::pin!(place);
        loop {
            tokio::select! {
                place = &mut place => return Ok(place),
                () = tokio::time::sleep(AGAIN) => {
                    if cancel.is_requested() {
                        return Err(Perform::cancelled(self, index));
                    }
                }
            }
        }
    }

    /// Waits until no call on the VM is late any more; false when there is no more
    /// time for that.
    async fn settles(&self) -> bool {
        let until = *self
            .settles_until
            .get_or_init(|| Instant::now() + self.patience);
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        // What is frozen can be let go before the call comes back.
        let freezes = |step: &Step| matches!(step, Step::Freeze { .. });
        if self.plan.steps.iter().any(freezes)
            && let Err(error) = self.thaw_once().await
        {
            tracing::debug!(%error, "the guest cannot be thawed yet");
        }
        let _ = tokio::time::timeout(left, self.hypervisor.settled(self.vm())).await;
        // There may be no late call, but many others in the way.
        tokio::time::sleep(AGAIN.min(left)).await;
        true
    }

    /// Lets go of a guest that a run which was given up may still hold by a step;
    /// says what makes it certain that it does not.
    ///
    /// # Errors
    /// When that is not certain, or the guest cannot be let go.
    pub async fn let_go(&self, index: usize, done: &[Option<Done>]) -> Result<String, Fault> {
        match self.hypervisor.domain(self.vm()).await {
            Ok(domain) if domain.uuid != self.plan.vm_uuid => {
                return Ok("another VM has that name now".into());
            }
            Err(error) if error.is_not_found() => return Ok("the VM is gone".into()),
            Ok(_) | Err(_) => {}
        }
        match self.plan.steps.get(index) {
            Some(Step::Freeze { .. }) => Ok(self.thaw_once().await??.to_owned()),
            Some(Step::Suspend { .. }) => self.undo_suspend(index, done).await,
            Some(Step::CreateSnapshot(new)) => {
                let resumed = self.ends_own_stop(new).await?;
                Ok(resumed.unwrap_or("the VM does not stand still").to_owned())
            }
            // By now it may be somebody's pause, and a helper that is switched off is lost
            // to him.
            Some(Step::DeleteSnapshot { .. }) => {
                let state = self.hypervisor.domain(self.vm()).await?.state;
                if state != DomainState::Paused {
                    return Ok("no helper is left".into());
                }
                Err(Fault::new(
                    Reason::DomainState,
                    "the VM stands still, which may be libvirt's helper for a merge",
                ))
            }
            _ => Ok("this step holds nothing".into()),
        }
    }

    /// Says where there is no space, how much is free and how much is needed, where
    /// libvirt did not: what is learned from it is learned of that place.
    fn placed(&self, fault: Fault, step: &Step) -> Fault {
        let (Reason::NoSpace, Some(facts)) = (fault.reason, &self.facts) else {
            return fault;
        };
        let written = issues::written(&self.plan.request, facts, std::slice::from_ref(step));
        let known = fault.metadata.get("path").cloned();
        let Some(path) = known.or_else(|| written.first().map(|path| (*path).to_owned())) else {
            return fault;
        };
        let mut fault = files::at(fault, facts, &path);
        let mut told = String::new();
        if !fault.metadata.contains_key("need_bytes") {
            // libvirt gave up before it knew how much it would have been.
            fault = fault.with("need_bytes", files::OVERLAY_BYTES);
        }
        if !fault.metadata.contains_key("free_bytes")
            && let Some(folder) = crate::observe::folder(&path)
        {
            let place = files::place(facts, &path);
            told = format!("; {place} has {} bytes free", folder.free);
            fault = fault.with("free_bytes", folder.free);
        }
        fault.message.push_str(&told);
        fault
    }
}

/// Every line within a step names it. A level that no filter keeps out.
fn span(step: &Step) -> tracing::Span {
    tracing::error_span!("step", step = step.title())
}

impl Perform<Snapshots> for Performer {
    async fn perform(
        &self,
        index: usize,
        step: &Step,
        done: &[Option<Done>],
        cancel: &Cancel,
    ) -> Result<Done, Fault> {
        let taking = async {
            tracing::debug!("step begins");
            let taken = self.take(index, step, done, cancel).await;
            taken.map_err(|fault| {
                tracing::info!(%fault, "step failed");
                let unknown = matches!(
                    fault.reason,
                    Reason::HypervisorUnreachable | Reason::HypervisorOverdue
                );
                self.cut_off.store(unknown, Ordering::Relaxed);
                self.placed(fault, step)
            })
        };
        taking.instrument(span(step)).await
    }

    /// Undoes a step. Without libvirt nothing can be undone, so it is waited for:
    /// a run that is given up because libvirt is being restarted leaves a guest as
    /// no run may leave it. A call that was given up may still come to something, so
    /// that is waited for, too, as long as a guest has to let go.
    async fn undo(
        &self,
        index: usize,
        step: &Step,
        done: &[Option<Done>],
    ) -> Result<String, Fault> {
        let undoing = async {
            tracing::info!("undoing");
            loop {
                match self.take_back(index, step, done).await {
                    Ok(undone) => return Ok(undone),
                    Err(fault) if fault.reason == Reason::HypervisorUnreachable => {
                        tracing::error!(%fault, "undoing waits for libvirt");
                        tokio::time::sleep(AGAIN).await;
                        self.hypervisor.is_there().await;
                    }
                    Err(fault)
                        if matches!(fault.reason, Reason::VmBusy | Reason::HypervisorOverdue)
                            && self.settles().await =>
                    {
                        tracing::warn!(%fault, "undoing waited for a call that is late");
                    }
                    Err(fault) => {
                        tracing::warn!(%fault, "undoing failed");
                        return Err(fault);
                    }
                }
            }
        };
        undoing.instrument(span(step)).await
    }

    async fn conclude(
        &self,
        plan: &Plan,
        done: &[Option<Done>],
    ) -> (Option<Outcome>, Option<Fault>) {
        self.outcome(plan, done).await
    }

    fn notices(&self) -> Vec<Warning> {
        std::mem::take(&mut lock(&self.notices))
    }

    fn cancelled(&self, index: usize) -> Fault {
        self.live.stopped_because().unwrap_or_else(|| {
            Fault::new(
                Reason::Cancelled,
                format!("the run was cancelled before step {}", index + 1),
            )
        })
    }
}
