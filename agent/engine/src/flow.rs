//! What the engine has to be told about a workflow: its types, how a step is
//! done and undone, and where records go.

use std::{fmt, future::Future};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Cancel, Record};

/// How a guest is kept still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hold {
    /// File systems are frozen through the guest agent.
    Frozen,
    /// vCPUs are stopped.
    Suspended,
}

/// A step as data, with what the engine must know of it.
pub trait Step: Clone + fmt::Debug + Send + Sync + Serialize + DeserializeOwned + 'static {
    /// Stable name; stored, so it is an interface.
    fn name(&self) -> &'static str;
    /// The hold that is open once this step has begun. A step that also
    /// releases it is a call in which the guest stands still for a while.
    fn takes(&self) -> Option<Hold>;
    /// The hold that is over once this step is done.
    fn releases(&self) -> Option<Hold>;
    /// Whether there is no way back behind this step.
    fn point_of_no_return(&self) -> bool;
    /// Whether this step is owed once `behind`, a point of no return before it,
    /// is done: it is then taken however the run ends, as the guest would
    /// otherwise be left halfway. Such a step may be taken twice.
    fn owed_after(&self, behind: &Self) -> bool;
}

/// The types of one kind of workflow.
pub trait Flow: Clone + fmt::Debug + Send + Sync + 'static {
    /// The reviewed list of steps, with whatever else belongs to it.
    type Plan: Clone + fmt::Debug + Send + Sync + Serialize + DeserializeOwned + 'static;
    /// One step.
    type Step: Step;
    /// What a step achieved.
    type Done: Clone + fmt::Debug + Send + Sync + Serialize + DeserializeOwned + 'static;
    /// Why a step failed.
    type Fault: Clone + fmt::Debug + Send + Sync + Serialize + DeserializeOwned + 'static;
    /// What a whole run achieved.
    type Outcome: Clone + fmt::Debug + Send + Sync + Serialize + DeserializeOwned + 'static;
    /// Something to know that is never fatal.
    type Notice: Clone + fmt::Debug + Send + Sync + Serialize + DeserializeOwned + 'static;

    /// The steps of a plan, in order.
    fn steps(plan: &Self::Plan) -> &[Self::Step];

    /// The hold that a finished step really took: a step may find out that it
    /// need not, or cannot, and go on without.
    #[must_use]
    fn took(step: &Self::Step, done: &Self::Done) -> Option<Hold> {
        let _ = done;
        step.takes()
    }

    /// Milliseconds for which a step that takes and releases a hold by itself
    /// kept the guest still, where it was measured.
    #[must_use]
    fn held_ms(done: &Self::Done) -> Option<u64> {
        let _ = done;
        None
    }
}

/// Does and undoes the steps of one run.
pub trait Perform<F: Flow>: Send + Sync {
    /// Does one step. `done` holds what the steps before it achieved.
    fn perform(
        &self,
        index: usize,
        step: &F::Step,
        done: &[Option<F::Done>],
        cancel: &Cancel,
    ) -> impl Future<Output = Result<F::Done, F::Fault>> + Send;

    /// Undoes one started step. Must accept that the step never happened, and
    /// that it was undone before. `done[index]` is `None` when its result is not
    /// known. Returns what came of it, for a person.
    fn undo(
        &self,
        index: usize,
        step: &F::Step,
        done: &[Option<F::Done>],
    ) -> impl Future<Output = Result<String, F::Fault>> + Send;

    /// Reads what the run became, once all its steps are done. A fault beside
    /// an outcome says that the work is done but something that was asked for
    /// did not come true, such as a guest that did not answer in time.
    fn conclude(
        &self,
        plan: &F::Plan,
        done: &[Option<F::Done>],
    ) -> impl Future<Output = (Option<F::Outcome>, Option<F::Fault>)> + Send;

    /// Notices gathered by the last call, to be written into the log.
    fn notices(&self) -> Vec<F::Notice>;

    /// The fault of a run that was cancelled before step `index`.
    fn cancelled(&self, index: usize) -> F::Fault;
}

/// Why a record could not be written.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the journal cannot be written: {0}")]
pub struct LogError(pub String);

/// Where the records of one run go: to disk first, then to watchers.
pub trait Log<F: Flow>: Send + Sync {
    /// Appends one record; returns only when it is on disk.
    ///
    /// # Errors
    /// When it is not on disk. The caller then must not have the effect.
    fn append(&self, record: Record<F>) -> impl Future<Output = Result<(), LogError>> + Send;
}
