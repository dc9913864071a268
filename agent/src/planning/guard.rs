//! Guarded changes: a snapshot to which the agent itself goes back unless
//! somebody confirms in time.
//!
//! Invariants: stored in the journal, so a field is only ever added; a VM has at
//! most one open guard; while one is open, nothing changes the VM but what ends
//! the guard.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    facts::Facts,
    plan::Draft,
    reason::{Fault, Reason},
    request::{Action, Request},
    step::Step,
};

/// Where a guard stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuardState {
    /// Waits for its deadline.
    Pending,
    /// Past its deadline, and somebody has to say what is to be done.
    Held,
    /// The change is kept.
    Confirmed,
    /// The change was taken back.
    Reverted,
}

impl GuardState {
    /// As stored and for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Held => "held",
            Self::Confirmed => "confirmed",
            Self::Reverted => "reverted",
        }
    }

    /// Whether it still keeps others from changing the VM.
    #[must_use]
    pub fn is_open(self) -> bool {
        matches!(self, Self::Pending | Self::Held)
    }
}

/// A guarded change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guard {
    /// The run that armed it.
    pub run: String,
    /// UUID of the VM.
    pub vm_uuid: String,
    /// Name of the VM.
    pub vm: String,
    /// The snapshot that is gone back to.
    pub snapshot: String,
    /// libvirt's creation time of it, in seconds: tells it from a later one of
    /// the same name.
    pub created: i64,
    /// When it was armed.
    pub armed: Timestamp,
    /// Until when it has to be confirmed.
    pub deadline: Timestamp,
    /// What the VM's definition and snapshots looked like when it was armed.
    pub fingerprint: String,
    /// Where it stands.
    pub state: GuardState,
    /// Why it is held; empty otherwise.
    pub note: String,
}

/// Refuses a plan that changes a VM with an open guard, unless it ends the guard.
///
/// # Errors
/// [`Reason::SnapshotGuarded`].
pub fn allows(request: &Request, facts: &Facts, draft: &Draft) -> Result<(), Fault> {
    let Some(guard) = &facts.guard else {
        return Ok(());
    };
    if !draft.steps.iter().any(Step::changes) || ends(&request.action, guard) {
        return Ok(());
    }
    Err(Fault::new(
        Reason::SnapshotGuarded,
        format!(
            "a change of VM '{}' is guarded by snapshot '{}' until {} ({}); confirm it, commit \
             that snapshot, or revert to it first",
            guard.vm,
            guard.snapshot,
            guard.deadline,
            guard.state.name()
        ),
    )
    .with("snapshot", &guard.snapshot)
    .with("deadline", guard.deadline))
}

/// Whether an action is one of the three that end a guard.
fn ends(action: &Action, guard: &Guard) -> bool {
    match action {
        Action::Confirm { .. } => true,
        Action::Commit(commit) => commit.name == guard.snapshot,
        Action::Revert(revert) => revert.name == guard.snapshot,
        _ => false,
    }
}

/// The step that ends the open guard on a snapshot, if there is one.
#[must_use]
pub fn end(facts: &Facts, snapshot: &str, state: GuardState) -> Option<Step> {
    facts
        .guard
        .as_ref()
        .filter(|guard| guard.snapshot == snapshot)
        .map(|guard| Step::EndGuard {
            snapshot: guard.snapshot.clone(),
            state,
        })
}
