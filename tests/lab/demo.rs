//! The demo.

use std::sync::{Arc, atomic::AtomicBool};

use anyhow::Result;

/// Runs it.
///
/// # Errors
/// When a step of it fails.
pub fn run(_interrupt: &Arc<AtomicBool>) -> Result<u8> {
    Ok(0)
}
