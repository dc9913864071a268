//! Waiting on a condition, with a limit.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// How often a condition is looked at.
const PACE: Duration = Duration::from_millis(50);

/// Waits until `condition` holds.
///
/// # Errors
/// When it does not within `limit`; `what` names the condition.
pub fn eventually(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let got = eventually_some(limit, what, || Ok(condition().then_some(())));
    got.map(drop)
}

/// Waits until `attempt` gives something. An error of an attempt counts as
/// "not yet", and the last one is told when the limit is reached.
///
/// # Errors
/// When nothing comes within `limit`.
pub fn eventually_some<T>(
    limit: Duration,
    what: &str,
    mut attempt: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
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
        thread::sleep(PACE);
    }
}
