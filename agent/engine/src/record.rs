//! The records of a run. They are stored: names here are an interface, and a
//! field is only ever added.

use serde::{Deserialize, Serialize};

use crate::{Flow, Hold};

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Closing {
    /// All steps were done.
    Succeeded,
    /// Refused before anything was touched.
    Refused,
    /// A step failed; what was started is undone.
    Failed,
    /// Somebody stopped it; what was started is undone.
    Cancelled,
    /// Undoing failed: somebody has to look.
    Stuck,
}

/// One line of a run's log.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(bound = "", tag = "record", rename_all = "snake_case")]
pub enum Record<F: Flow> {
    /// The run waits behind another one on the same VM.
    Queued {
        /// The run in front.
        behind: String,
    },
    /// The plan, with all its steps. Always the first record but `Queued`.
    Planned {
        /// The plan.
        plan: Box<F::Plan>,
    },
    /// Something to know.
    Notice {
        /// What.
        notice: F::Notice,
    },
    /// Intent: step `index` begins.
    StepStarted {
        /// Index into the plan's steps.
        index: usize,
    },
    /// Step `index` is done.
    StepFinished {
        /// Index into the plan's steps.
        index: usize,
        /// Milliseconds it took.
        took_ms: u64,
        /// What it achieved.
        done: F::Done,
    },
    /// Step `index` failed; whether its effect happened is not known.
    StepFailed {
        /// Index into the plan's steps.
        index: usize,
        /// Milliseconds it took.
        took_ms: u64,
        /// Why.
        fault: F::Fault,
    },
    /// A hold was taken.
    HoldTaken {
        /// Which.
        hold: Hold,
    },
    /// A hold was released.
    HoldReleased {
        /// Which.
        hold: Hold,
        /// Milliseconds it was held; absent when it began in a former life of
        /// the agent.
        held_ms: Option<u64>,
    },
    /// Intent: the undoing of step `index` begins.
    UndoStarted {
        /// Index into the plan's steps.
        index: usize,
    },
    /// The undoing of step `index` ended.
    UndoFinished {
        /// Index into the plan's steps.
        index: usize,
        /// What came of it, or why it failed.
        outcome: Result<String, F::Fault>,
    },
    /// The agent found this run open when it started.
    Recovering,
    /// The end; exactly one a run.
    Closed {
        /// How.
        closing: Closing,
        /// What was achieved, for a run that succeeded.
        outcome: Option<Box<F::Outcome>>,
        /// Why it did not succeed.
        fault: Option<F::Fault>,
    },
    /// Somebody recorded what they did about a stuck run.
    Resolved {
        /// Who.
        by: String,
        /// What was done.
        note: String,
    },
}
