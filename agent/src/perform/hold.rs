//! Taking and releasing holds: suspend and resume, freeze and thaw.
//!
//! Invariants: a guest is resumed only if this run suspended it; after a freeze
//! whose end is not known, its status is asked until it is definitely thawed.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use vmsnap_engine::Hold;
use vmsnap_hypervisor::{DomainState, DomainSummary, ErrorKind, FreezeStatus, Xml};

use super::{Performer, lock, plain};
use crate::{
    faults::sentence,
    planning::{Done, Fault, Reason, Step, facts::VmState},
};

/// How long a guest waits to be asked at all, when many others are asked.
const UNTIL_ASKED: Duration = Duration::from_secs(300);
/// Pause between two questions.
const ASK_AGAIN: Duration = Duration::from_millis(250);

impl Performer {
    fn hold_begins(&self, hold: Hold) {
        lock(&self.held_since).insert(hold, Instant::now());
    }

    /// Milliseconds since the hold began; zero when it did not begin here.
    fn hold_ends(&self, hold: Hold) -> u64 {
        lock(&self.held_since).remove(&hold).map_or(0, |since| {
            u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
        })
    }

    pub(super) async fn freeze(&self, timeout_ms: u64, fall_back: bool) -> Result<Done, Fault> {
        self.hold_begins(Hold::Frozen);
        let timeout = Duration::from_millis(timeout_ms);
        let problem = match self.hypervisor.freeze(self.vm(), timeout).await {
            Ok(0) => Fault::new(
                Reason::ConsistencyNotMet,
                "the guest agent froze no file system: none is mounted that can be frozen",
            ),
            Ok(count) => {
                return Ok(Done::Held {
                    note: format!("{count} file systems are frozen"),
                });
            }
            Err(error) => Fault::new(
                match error.kind() {
                    ErrorKind::AgentFailed => Reason::GuestAgentFailed,
                    _ => crate::faults::reason(&error),
                },
                sentence(&error),
            ),
        };
        if problem.reason == Reason::GuestFrozen {
            // The agent in the guest refused, because it was frozen by then: whoever did
            // that relies on it.
            self.frozen_by_others.store(true, Ordering::Relaxed);
            self.hold_ends(Hold::Frozen);
            return Err(problem);
        }
        // The freeze may still land, or have landed in part.
        self.ensure_thawed().await?;
        self.hold_ends(Hold::Frozen);
        if fall_back {
            self.notice(
                "FREEZE_GAVE_UP",
                format!(
                    "the guest could not be frozen and is suspended instead: {}",
                    problem.message
                ),
                "use consistency: filesystem to fail instead",
            );
            return Ok(Done::NotHeld {
                note: problem.message,
            });
        }
        Err(problem)
    }

    pub(super) async fn thaw(&self) -> Result<Done, Fault> {
        let frozen = lock(&self.held_since).contains_key(&Hold::Frozen);
        if frozen {
            self.ensure_thawed().await?;
        }
        let held_ms = self.hold_ends(Hold::Frozen);
        if frozen {
            Ok(Done::Released { held_ms })
        } else {
            Ok(plain("the guest was not frozen"))
        }
    }

    /// Thaws and asks until the guest says that it is thawed. The time for that
    /// begins when the guest could be asked at all.
    pub(super) async fn ensure_thawed(&self) -> Result<String, Fault> {
        if self.frozen_by_others.load(Ordering::Relaxed) {
            return Ok("the guest was frozen by somebody else, and not by this run".into());
        }
        let give_up = Instant::now() + UNTIL_ASKED;
        let mut deadline = self.gave_up.load(Ordering::Relaxed).then(Instant::now);
        loop {
            let last: Fault = match self.thaw_once().await {
                Ok(Ok(note)) => return Ok(note.into()),
                Ok(Err(fault)) => {
                    deadline.get_or_insert_with(|| Instant::now() + self.patience);
                    fault
                }
                Err(error) => match error.kind() {
                    ErrorKind::Unreachable | ErrorKind::ConnectionLost => return Err(error.into()),
                    ErrorKind::Busy => error.into(),
                    _ => {
                        deadline.get_or_insert_with(|| Instant::now() + self.patience);
                        error.into()
                    }
                },
            };
            if Instant::now() >= deadline.unwrap_or(give_up) {
                self.gave_up.store(true, Ordering::Relaxed);
                return Err(Fault::new(
                    Reason::GuestAgentUnavailable,
                    format!(
                        "VM '{}' may be frozen and its guest agent gave no definite answer for \
                         {} s: {}; look at the guest, thaw it with 'virsh domfsthaw {}', or reset \
                         it",
                        self.vm(),
                        self.patience.as_secs(),
                        last.message,
                        self.vm()
                    ),
                )
                .with("vm", self.vm()));
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    /// Thaws and asks once: what makes it certain that nothing is frozen, or that
    /// it still is.
    pub(super) async fn thaw_once(
        &self,
    ) -> Result<Result<&'static str, Fault>, vmsnap_hypervisor::Error> {
        match self.hypervisor.domain(self.vm()).await {
            Ok(domain) if matches!(domain.state, DomainState::Shutoff | DomainState::Crashed) => {
                return Ok(Ok("the VM is off, so nothing is frozen"));
            }
            Err(error) if error.is_not_found() => {
                return Ok(Ok("the VM is gone, so nothing is frozen"));
            }
            // Reading waits for a freeze that is late; thawing must not.
            Err(error) if !matches!(error.kind(), ErrorKind::Busy | ErrorKind::Overdue { .. }) => {
                return Err(error);
            }
            Ok(_) | Err(_) => {}
        }
        match self.hypervisor.thaw(self.vm()).await {
            Ok(_) => {}
            Err(error) if *error.kind() == ErrorKind::Unsupported => {
                return Ok(Ok("the VM has no guest agent, so nothing is frozen"));
            }
            Err(error) => return Err(error),
        }
        Ok(match self.hypervisor.freeze_status(self.vm()).await? {
            FreezeStatus::Thawed => Ok("the guest is thawed"),
            FreezeStatus::Frozen => Err(Fault::new(
                Reason::GuestFrozen,
                "the guest says that it is still frozen",
            )),
        })
    }

    pub(super) async fn suspend(
        &self,
        unless_frozen: Option<usize>,
        done: &[Option<Done>],
    ) -> Result<Done, Fault> {
        let frozen = unless_frozen
            .and_then(|index| done.get(index)?.as_ref())
            .is_some_and(|freeze| matches!(freeze, Done::Held { .. }));
        if frozen {
            return Ok(Done::NotHeld {
                note: "the guest is frozen, so it need not stand still".into(),
            });
        }
        let state = self.hypervisor.domain(self.vm()).await?.state;
        if state != DomainState::Running {
            return Ok(Done::NotHeld {
                note: "the VM does not run, so it stands still already".into(),
            });
        }
        self.hold_begins(Hold::Suspended);
        self.hypervisor.suspend(self.vm()).await?;
        Ok(Done::Held {
            note: "the vCPUs stand still".into(),
        })
    }

    pub(super) async fn resume(&self, done: &[Option<Done>]) -> Result<Done, Fault> {
        let suspended = self.plan.steps.iter().zip(done).any(|(step, done)| {
            matches!(step, Step::Suspend { .. }) && matches!(done, Some(Done::Held { .. }))
        });
        if !suspended {
            return Ok(plain("the VM was not suspended"));
        }
        self.run_again().await?;
        Ok(Done::Released {
            held_ms: self.hold_ends(Hold::Suspended),
        })
    }

    pub(super) async fn undo_suspend(
        &self,
        index: usize,
        done: &[Option<Done>],
    ) -> Result<String, Fault> {
        let known = done.get(index).and_then(Option::as_ref);
        if matches!(known, Some(Done::NotHeld { .. })) {
            return Ok("the VM was not suspended".into());
        }
        // The step is planned only for a VM that runs.
        let domain = self.as_it_is_now().await?;
        let reason = domain.reason;
        if domain.state == DomainState::Paused && (reason.is_user() || reason.is_unknown()) {
            self.run_again().await?;
            self.hold_ends(Hold::Suspended);
            return Ok("the VM runs again".into());
        }
        Ok(format!(
            "the VM is {}, which is not ours",
            domain.state.name()
        ))
    }

    /// The VM as QEMU has it. A libvirtd that has just come back tells what it had
    /// written down until it has asked QEMU, and then that the VM is paused after
    /// all; it answers a question about jobs only after that (measured on 11.3).
    pub(super) async fn as_it_is_now(&self) -> Result<DomainSummary, Fault> {
        let domain = self.hypervisor.domain(self.vm()).await?;
        if domain.state != DomainState::Running || self.hypervisor.job(self.vm()).await.is_err() {
            return Ok(domain);
        }
        Ok(self.hypervisor.domain(self.vm()).await?)
    }

    /// Resumes, and makes sure that the VM runs.
    pub(super) async fn run_again(&self) -> Result<(), Fault> {
        if let Err(error) = self.hypervisor.resume(self.vm()).await {
            let domain = self.hypervisor.domain(self.vm()).await?;
            if domain.state != DomainState::Running {
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Starts the VM, unless that would write into a restore point.
    pub(super) async fn start(&self, paused: bool) -> Result<Done, Fault> {
        let frozen = self.observer.frozen_image(self.vm(), Xml::Inactive).await?;
        if let Some((disk, image, snapshot)) = frozen {
            return Err(Fault::new(
                Reason::DefinitionDiffers,
                format!(
                    "VM '{}' is not started: its disk {disk} is defined as '{image}', in which the \
                     data of snapshot '{snapshot}' lies",
                    self.vm()
                ),
            )
            .with("disk", disk)
            .with("defined", image)
            .with("snapshot", snapshot));
        }
        if let Err(error) = self.hypervisor.start(self.vm(), paused).await {
            let state = self.hypervisor.domain(self.vm()).await?.state;
            let wanted = if paused {
                DomainState::Paused
            } else {
                DomainState::Running
            };
            if state != wanted {
                return Err(error.into());
            }
        }
        Ok(plain(if paused {
            "the VM is started and stands still"
        } else {
            "the VM runs"
        }))
    }

    /// Whether the VM ran before the run paused it: it did when the run was
    /// planned, or the run itself started it.
    pub(super) fn ran_before(&self) -> bool {
        self.plan.vm_state == VmState::Running
            || self
                .plan
                .steps
                .iter()
                .any(|step| matches!(step, Step::Start { paused: false }))
    }
}
