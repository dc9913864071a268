//! The pure middle: a request and one reading of the facts become a plan, or a
//! refusal with its reason.
//!
//! Invariants: no I/O, no libvirt, no wire types, no clock (the time is a
//! fact). The same request on the same facts gives the same plan. Every hold in
//! a plan has its release; a read-only action has no changing step; no plan
//! mixes kinds of snapshots on one VM.

pub mod actions;
pub mod facts;
pub mod files;
pub mod guard;
pub mod health;
pub mod issues;
pub mod lineage;
pub mod names;
pub mod outcome;
pub mod plan;
pub mod reason;
pub mod request;
pub mod retention;
pub mod step;
pub mod tree;

pub use facts::Facts;
pub use outcome::Outcome;
pub use plan::{Plan, Warning, plan};
pub use reason::{Fault, Reason};
pub use request::Request;
pub use step::{Done, Step};
