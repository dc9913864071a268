//! What the Ansible module and the command line share: reaching an agent,
//! running and watching workflows on it, reading quantities, and writing the
//! contract's messages as JSON.
//!
//! Invariants: no libvirt is linked here, and nothing heavy either, because the
//! Ansible module travels to the host with every task.

pub mod json;
pub mod quantity;
