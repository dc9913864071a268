//! Takes in the processes that daemons of a lab leave behind, and lets them go as
//! soon as they end.
//!
//! QEMU detaches itself from libvirtd, so that the host's first process has to wait
//! for it. libvirt takes a QEMU for ended only then. systemd waits at once; what is
//! the first process of a container may do so seconds later, or never, and every
//! stop and every revert of a VM lasts as much longer.
//!
//! Invariant: a child that this process started itself is never waited for here.
//! Those that detached themselves have sessions of their own.

use std::{fs, thread, time::Duration};

use anyhow::{Context as _, Result};
use rustix::process::{
    Pid, WaitId, WaitIdOptions, WaitOptions, getpid, set_child_subreaper, waitid, waitpid,
};

/// Pause where there is nothing that could be waited for here.
const PAUSE: Duration = Duration::from_millis(20);

/// Has whatever is left behind below this process come to it, from now on.
///
/// # Errors
/// When the kernel refuses.
pub fn adopt() -> Result<()> {
    set_child_subreaper(Some(getpid())).context("processes left behind cannot be adopted")?;
    let session = Process::read("self").context("no session")?.session;
    thread::spawn(move || {
        loop {
            // Looks only: whose child it is decides who waits for it.
            let ended = waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
            if ended.is_err() || reap(session) == 0 {
                thread::sleep(PAUSE);
            }
        }
    });
    Ok(())
}

/// Waits for those that ended in a session that is not ours; how many there were.
fn reap(session: i32) -> usize {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok())
        .flat_map(|children| {
            let numbers = children.split_whitespace();
            let ids: Vec<i32> = numbers.filter_map(|number| number.parse().ok()).collect();
            ids
        })
        .filter_map(Pid::from_raw)
        .filter(|child| ended_elsewhere(*child, session))
        .filter(|child| matches!(waitpid(Some(*child), WaitOptions::NOHANG), Ok(Some(_))))
        .count()
}

/// Whether a process ended, and in another session.
fn ended_elsewhere(child: Pid, session: i32) -> bool {
    Process::read(&child.to_string())
        .is_some_and(|process| process.ended && process.session != session)
}

/// What the kernel says of a process.
struct Process {
    /// It ended, and nobody waited for it yet.
    ended: bool,
    /// Its session; 0 where that was begun outside of this PID namespace, as a
    /// container's may be. The C library's `getsid` has the same 0, which rustix does
    /// not take for a process.
    session: i32,
}

impl Process {
    /// Reads `/proc/NAME/stat`; none where there is no such process.
    fn read(name: &str) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{name}/stat")).ok()?)
    }

    fn parse(stat: &str) -> Option<Self> {
        // The name before the state may hold anything, also parentheses. Behind it:
        // state, parent, process group, session.
        let (_, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_whitespace();
        let ended = fields.next()? == "Z";
        let session = fields.nth(2)?.parse().ok()?;
        Some(Self { ended, session })
    }
}
