//! What the Ansible module and the command line share: reaching an agent,
//! running and watching workflows on it, reading quantities, and writing the
//! contract's messages as JSON.
//!
//! Invariants: no libvirt is linked here, and nothing heavy either, because the
//! Ansible module travels to the host with every task.

mod client;
mod endpoint;
mod error;
mod failure;
pub mod json;
pub mod quantity;
mod run;
mod tls;

pub use client::{Client, ConnectOptions};
pub use endpoint::{DEFAULT_SOCKET, ENDPOINT_VARIABLE, Endpoint, EndpointError, EndpointFault};
pub use error::{Error, Hindrance};
pub use failure::{Failure, Violation};
pub use run::{Connection, Finished, REATTACH_WITHIN, RunOptions, RunStream, from_wire, to_wire};
pub use tls::{CA_VARIABLE, CERT_VARIABLE, Distrust, KEY_VARIABLE, TlsFiles};
