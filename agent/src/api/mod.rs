//! The gRPC face: wire types in and out, rich errors, and what is hidden from
//! whom. Nothing is decided here but whether a caller may.
//!
//! Invariants: handlers translate and pass on; wire types stop in this folder;
//! whatever names a VM or a run is asked of the caller's access first.

mod access;
mod audit;
mod errors;
mod inventory;
mod known_issues;
mod paging;
mod reply;
mod server;
pub mod spec;
mod veil;
mod workflow;

pub use server::{Bound, Endpoints, Handed, group_id_of, open_socket};
