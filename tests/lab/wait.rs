//! Waiting on a condition, with a limit.

use std::{
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};

/// Set when this process was told to stop: every wait then ends with an error,
/// and what it owns is taken down on the way out.
pub static INTERRUPT: LazyLock<Arc<AtomicBool>> = LazyLock::new(Default::default);

/// Pause before a condition is looked at for the second time; each pause is twice the
/// one before, up to the longest.
const FIRST: Duration = Duration::from_millis(5);
const LONGEST: Duration = Duration::from_millis(50);

/// Waits until `condition` holds.
///
/// # Errors
/// When it does not within `limit`, or on an interrupt; `what` names the condition.
pub fn eventually(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let got = eventually_some(limit, what, || Ok(condition().then_some(())));
    got.map(drop)
}

/// Waits until `attempt` gives something. An error of an attempt counts as
/// "not yet", and the last one is told when the limit is reached.
///
/// # Errors
/// When nothing comes within `limit`, or on an interrupt.
pub fn eventually_some<T>(
    limit: Duration,
    what: &str,
    mut attempt: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    let mut pause = FIRST;
    loop {
        let problem = match attempt() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if start.elapsed() >= limit {
            let seconds = limit.as_secs_f32();
            return match problem {
                Some(error) => Err(error.context(format!("no {what} within {seconds} s"))),
                None => bail!("no {what} within {seconds} s"),
            };
        }
        ensure!(!interrupted(), "interrupted while waiting for {what}");
        thread::sleep(pause);
        pause = (pause * 2).min(LONGEST);
    }
}

/// Whether this process was told to stop.
#[must_use]
pub fn interrupted() -> bool {
    INTERRUPT.load(Ordering::Relaxed)
}
