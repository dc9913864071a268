//! Running the agent: what is wrong now, what is measured, and the talk with the
//! service manager.
//!
//! Invariants: nothing here changes a VM; a reader never waits for libvirt.

pub mod activation;
pub mod health;
pub mod metrics;
pub mod notify;
pub mod readings;
pub mod scrape;
