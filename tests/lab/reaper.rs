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
    Pid, WaitId, WaitIdOptions, WaitOptions, getpid, getsid, set_child_subreaper, waitid, waitpid,
};

/// Pause where there is nothing that could be waited for here.
const PAUSE: Duration = Duration::from_millis(20);

/// Has whatever is left behind below this process come to it, from now on.
///
/// # Errors
/// When the kernel refuses.
pub fn adopt() -> Result<()> {
    set_child_subreaper(Some(getpid())).context("processes left behind cannot be adopted")?;
    let session = getsid(None).context("no session")?;
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
fn reap(session: Pid) -> usize {
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
fn ended_elsewhere(child: Pid, session: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
    // The name before the state may hold anything, also parentheses. Behind it: state,
    // parent, process group, session.
    let fields = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace());
    let mut fields = fields.into_iter().flatten();
    let ended = fields.next() == Some("Z");
    let its = fields.nth(2).and_then(|number| number.parse().ok());
    ended && its.is_some_and(|number: i32| number != session.as_raw_nonzero().get())
}
