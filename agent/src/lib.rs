//! The vmsnap agent.

pub mod flow;
pub mod journal;
pub mod planning;
