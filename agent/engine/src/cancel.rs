//! A request to stop, seen between steps and inside long ones.
//!
//! Invariant: cancelling never drops a future around an effect; it only sets
//! this flag, and whoever does the work looks at it where stopping is safe.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Shared by a run and by everybody who may stop it.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks the run to stop. Idempotent.
    pub fn request(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether somebody asked.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}
