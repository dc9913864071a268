//! The gRPC face: wire types in and out, who is calling, rich errors. Nothing
//! is decided here.
//!
//! Invariant: handlers translate and pass on; wire types stop in this folder.

mod caller;
mod errors;
mod inventory;
mod known_issues;
mod paging;
mod reply;
mod server;
pub mod spec;
mod workflow;

pub use server::{Bound, Endpoints, Handed, group_id_of, open_socket};
