//! The log of a run, and what follows from it: run, undo, recover.
//!
//! Purpose: take the steps of a plan in order so that, whatever breaks in the
//! middle, every started step is finished or undone and somebody can read what
//! happened. This crate knows no libvirt, no gRPC and no SQL; the workflow it
//! drives is described by [`Flow`], done by [`Perform`] and written by [`Log`].
//!
//! Terms
//! - **record**: one line of a run's log. Records are numbered from 1 without
//!   gaps, and they are also what watchers see.
//! - **intent**: the record that a step (or an undo) begins. It is on disk
//!   before the effect, so an effect without a record cannot exist.
//! - **hold**: a guest that we keep suspended or frozen. It is taken by one step
//!   and released by a later one.
//! - **point of no return**: a step behind which there is no way back. Before
//!   it a failed run is undone; after it only open holds are released.
//!
//! Invariants
//! - A run's status is a pure fold over its records ([`RunState`]); a record
//!   that cannot follow the ones before it is an error, not a guess.
//! - Undo covers every *started* step, in reverse, known result or not; it must
//!   accept that the step never happened.
//! - A hold is released on every path, on both sides of a point of no return.
//! - If the log cannot be written, the effect does not happen.

mod cancel;
mod flow;
mod record;
mod run;
mod state;

pub use cancel::Cancel;
pub use flow::{Flow, Hold, Log, LogError, Perform, Step};
pub use record::{Closing, Record};
pub use run::{Run, UNDO_ATTEMPTS};
pub use state::{Illegal, Phase, RunState, StepState};
