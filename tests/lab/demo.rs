//! The demo.

use anyhow::Result;

/// Runs it.
///
/// # Errors
/// When a step of it fails.
pub fn run() -> Result<u8> {
    Ok(0)
}
