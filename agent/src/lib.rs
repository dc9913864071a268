//! The vmsnap agent.

pub mod planning;
