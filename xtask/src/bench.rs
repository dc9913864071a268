//! Measuring what every use pays before any work is done, and what a list of
//! many snapshots costs.
//!
//! An Ansible task copies the module to its host and starts it: so its size and
//! its start are the floor of every task's time. Lists are measured in a lab,
//! side by side with virsh: absolute times are this host's, the ratio is not.

use std::{
    fs,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::{
    run::{cargo, command, say, step},
    target,
};

/// How often each program is started.
const STARTS: usize = 101;

/// Builds the programs as they are handed out and measures them, and lists.
///
/// # Errors
/// When they cannot be built or started, or a list is wrong.
pub fn run() -> Result<()> {
    let mut build = cargo(["build", "--locked", "--profile", "module"]);
    build.args([
        "--package",
        "vmsnap-ansible-module",
        "--package",
        "vmsnap-cli",
    ]);
    step("module and command line", build)?;
    say(&format!(
        "{:<12} {:>10} {:>12} {:>12}",
        "program", "size", "median", "95 of 100"
    ));
    // The module refuses to run without its arguments file: nothing but its start.
    for (program, words) in [("vm-snapshot", &[][..]), ("vmsnap", &["--version"])] {
        let path = target().join("module").join(program);
        let size = fs::metadata(&path)
            .with_context(|| format!("{} was not built", path.display()))?
            .len();
        let mut times = Vec::with_capacity(STARTS);
        for _ in 0..STARTS {
            let since = Instant::now();
            command(&path, words)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .with_context(|| format!("{} cannot be started", path.display()))?;
            times.push(since.elapsed());
        }
        times.sort_unstable();
        say(&format!(
            "{program:<12} {:>7} KiB {:>9} us {:>9} us",
            size.div_ceil(1024),
            part(&times, 50).as_micros(),
            part(&times, 95).as_micros()
        ));
    }
    lists()
}

/// Lists many snapshots with the agent and with virsh.
fn lists() -> Result<()> {
    step(
        "agent and lab",
        cargo(["build", "--locked", "--release", "--workspace"]),
    )?;
    step(
        "lists of many snapshots",
        command(target().join("release/vmsnap-lab"), ["bench"]),
    )
}

/// The time that this many of a hundred do not exceed.
fn part(sorted: &[Duration], hundredths: usize) -> Duration {
    sorted[(sorted.len() - 1) * hundredths / 100]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_and_the_tail_are_read_from_sorted_times() {
        let times: Vec<Duration> = (0..=100).map(Duration::from_millis).collect();
        assert_eq!(part(&times, 50), Duration::from_millis(50));
        assert_eq!(part(&times, 95), Duration::from_millis(95));
    }
}
