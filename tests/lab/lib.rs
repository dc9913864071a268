//! The lab: a private libvirt daemon, real guests, and everything that a test
//! needs to see for itself what became of them.
//!
//! Invariants
//! - Everything of a lab lives below one short folder that belongs to an
//!   unprivileged user; nothing outside it is touched.
//! - What the lab says about a guest comes from `virsh`, `qemu-img` and the
//!   guest itself, never from the product's own code: a witness must be
//!   independent of what it testifies about.
//! - Nothing waits blindly: every wait has a condition and a limit.
//! - Whatever ends a lab (its command, a signal, a panic), its guests, daemons
//!   and folder go.

pub mod agent;
pub mod ansible;
pub mod blank;
pub mod cli;
pub mod closed;
pub mod command;
pub mod contract;
pub mod domain;
pub mod guest;
pub mod herd;
pub mod http;
pub mod image;
pub mod network;
pub mod owner;
pub mod paths;
pub mod pattern;
pub mod pki;
pub mod ports;
pub mod python;
pub mod reaper;
pub mod storage;
pub mod wait;

pub use agent::Agent;
pub use blank::{Blank, BlankSpec};
pub use cli::Cli;
pub use closed::Closed;
pub use domain::{Domain, Lab};
pub use guest::Guest;
pub use herd::Herd;
pub use network::Network;
pub use owner::OwnedLab;
pub use pki::Pki;
pub use storage::{BlockDevice, Mount, SmallPool, fill};
pub use wait::{eventually, eventually_some};
