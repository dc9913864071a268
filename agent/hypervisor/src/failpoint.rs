//! Places at which a test breaks the agent: in builds with debug assertions alone.
//!
//! Invariants: without debug assertions every function here does nothing and the variable is not read;
//! with them, nothing happens unless `FAILPOINTS` names the place (the syntax is that of the crate
//! `fail`, such as `effect.resume=1*off->1*return(after)->off`).
//!
//! | place | value | what happens |
//! |---|---|---|
//! | `journal.record` | | the agent is killed as soon as a record of a changing run is on disk |
//! | | `wait FILE` | the run goes on after that record once the file is there |
//! | `journal.begin` | | the same, as soon as a new run is on disk and before anybody drives it |
//! | `effect.OPERATION` | `before` | the call fails and was never made |
//! | | `after` | the call is made, and its answer is lost |
//! | | `late MILLIS` | the call is made so much later |
//! | | `kill PID MILLIS` | that process is killed so long after the call began |
//!
//! An operation's name is that of the call's errors, with `_` for blanks.

use std::time::Duration;

use crate::error::{ErrorKind, Fault};

/// Reads `FAILPOINTS`; the places stay set as long as the returned value lives.
///
/// # Panics
/// When the variable's syntax is wrong; only in builds with debug assertions.
#[must_use]
pub fn from_environment() -> impl Sized {
    #[cfg(debug_assertions)]
    let scenario = fail::FailScenario::setup();
    #[cfg(not(debug_assertions))]
    let scenario = ();
    scenario
}

/// What a test wants to happen at a place, and nothing where none does.
#[must_use]
pub fn at(place: &str) -> Option<String> {
    #[cfg(debug_assertions)]
    fail::fail_point!(place, |value: Option<String>| Some(
        value.unwrap_or_default()
    ));
    let _ = place;
    None
}

/// Ends this process as `kill -9` does, or waits for a file, if a test wants that at
/// this place.
pub async fn reached(place: &str) {
    let Some(wanted) = at(place) else {
        return;
    };
    tracing::warn!(place, wanted, "failpoint reached");
    let Some(file) = wanted.strip_prefix("wait ") else {
        return kill(std::process::id());
    };
    while !std::path::Path::new(file).exists() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn kill(pid: u32) {
    if let Ok(pid) = libc::pid_t::try_from(pid) {
        // SAFETY: the call takes no pointer.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
}

/// Makes the effect `operation`, or what a test wants instead.
pub(crate) fn effect<T>(
    operation: &str,
    work: impl FnOnce() -> Result<T, Fault>,
) -> Result<T, Fault> {
    if !cfg!(debug_assertions) {
        return work();
    }
    let Some(wanted) = at(&format!("effect.{}", operation.replace(' ', "_"))) else {
        return work();
    };
    tracing::warn!(operation, wanted, "failpoint reached");
    let mut words = wanted.split(' ');
    let verb = words.next().unwrap_or_default();
    let mut number = || {
        words
            .next()
            .and_then(|word| word.parse::<u32>().ok())
            .unwrap_or(0)
    };
    match verb {
        "before" => Err(Fault::new(
            ErrorKind::Other,
            "a test's failpoint before the call",
        )),
        "after" => {
            work()?;
            Err(Fault::new(
                ErrorKind::ConnectionLost,
                "a test's failpoint after the call",
            ))
        }
        "late" => {
            std::thread::sleep(Duration::from_millis(number().into()));
            work()
        }
        "kill" => {
            let (pid, after) = (number(), Duration::from_millis(number().into()));
            std::thread::spawn(move || {
                std::thread::sleep(after);
                kill(pid);
            });
            work()
        }
        other => Err(Fault::new(
            ErrorKind::InvalidArgument,
            format!("failpoint value '{other}': before, after, late MILLIS or kill PID MILLIS"),
        )),
    }
}
