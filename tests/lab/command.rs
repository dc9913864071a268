//! Running programs: their output, a deadline, and the user they run as.
//!
//! Invariant: no call waits for ever, and a failure says which program with
//! which arguments said what.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    io::{Read, Write},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};
use serde::{Deserialize, Serialize};

/// The longest that a program may take unless told otherwise.
pub const DEADLINE: Duration = Duration::from_secs(180);

/// Who a lab's processes run as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl User {
    /// The account that a root caller's lab belongs to. libvirt gives root the
    /// system daemon whatever its environment says, and passt refuses root.
    pub const ACCOUNT: &'static str = "vmsnap-lab";

    /// Whoever runs this program.
    #[must_use]
    pub fn current() -> Self {
        Self {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        }
    }

    /// The user that a lab of this caller belongs to.
    ///
    /// # Errors
    /// When the caller is root and the lab's account does not exist.
    pub fn of_lab() -> Result<Self> {
        let me = Self::current();
        if me.uid != 0 {
            return Ok(me);
        }
        let accounts = std::fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")?;
        accounts
            .lines()
            .map(|line| line.split(':').collect::<Vec<_>>())
            .find(|fields| fields.first() == Some(&Self::ACCOUNT))
            .and_then(|fields| {
                Some(Self {
                    uid: fields.get(2)?.parse().ok()?,
                    gid: fields.get(3)?.parse().ok()?,
                })
            })
            .with_context(|| {
                format!(
                    "no account {}: run cargo xtask setup, which makes it",
                    Self::ACCOUNT
                )
            })
    }

    /// Makes a command run as this user, without supplementary groups.
    pub fn apply(self, command: &mut Command) {
        if Self::current() != self {
            command.uid(self.uid).gid(self.gid);
        }
    }
}

/// What a program left.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit status, or minus the signal that ended it.
    pub status: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    #[must_use]
    pub fn complaint(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim().to_owned()
    }
}

/// Runs a command to its end, whatever its status.
///
/// # Errors
/// When it cannot be started or does not end within `limit`; it is killed then.
pub fn run(command: &mut Command, input: Option<&[u8]>, limit: Duration) -> Result<Output> {
    let shown = show(command);
    command
        .stdin(if input.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start `{shown}`"))?;
    if let (Some(bytes), Some(mut pipe)) = (input, child.stdin.take()) {
        let bytes = bytes.to_vec();
        // On its own thread: a program that answers while it reads would wait
        // for its answers to be taken. It may end without reading all of it;
        // its status says more.
        std::thread::spawn(move || {
            let _ = pipe.write_all(&bytes);
        });
    }
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let status = wait(&mut child, limit).with_context(|| format!("`{shown}` does not end"))?;
    // A daemon that the program left behind may hold the pipes open.
    let patience = Duration::from_secs(2);
    Ok(Output {
        status,
        stdout: stdout.recv_timeout(patience).unwrap_or_default(),
        stderr: stderr.recv_timeout(patience).unwrap_or_default(),
    })
}

/// Runs a command that has to succeed, and gives its standard output.
///
/// # Errors
/// When it cannot be run, or fails: with what it said.
pub fn succeed(command: &mut Command) -> Result<String> {
    let shown = show(command);
    let output = run(command, None, DEADLINE)?;
    if output.status != 0 {
        let said = match output.complaint() {
            silent if silent.is_empty() => output.text().trim().to_owned(),
            said => said,
        };
        bail!("`{shown}` ended with status {}: {said}", output.status);
    }
    Ok(output.text())
}

/// A command as a person would type it.
#[must_use]
pub fn show(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        let argument = argument.to_string_lossy();
        if argument.chars().any(|c| " \"'{}<>$;&|".contains(c)) {
            let _ = write!(text, " '{argument}'");
        } else {
            let _ = write!(text, " {argument}");
        }
    }
    text
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    if let Some(mut pipe) = pipe {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = pipe.read_to_end(&mut bytes);
            let _ = sender.send(bytes);
        });
    }
    receiver
}

fn wait(child: &mut Child, limit: Duration) -> Result<i32> {
    use std::os::unix::process::ExitStatusExt;
    // One that was waited for already has no process any more.
    let ended = child.try_wait().context("cannot wait for it")?.is_some();
    if !ended && !ends(child, limit)? {
        let _ = child.kill();
        let _ = child.wait();
        bail!("killed after {} s", limit.as_secs());
    }
    let status = child.wait().context("cannot wait for it")?;
    Ok(status
        .code()
        .unwrap_or_else(|| -status.signal().unwrap_or(1)))
}

/// Whether a child ends within `limit`. The kernel says so the moment that it does:
/// a suite runs thousands of programs that last some hundredths of a second.
fn ends(child: &Child, limit: Duration) -> Result<bool> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let handle = pidfd_open(pid.context("no process id")?, PidfdFlags::empty())
        .context("cannot wait for it")?;
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).context("the limit is too long")?;
        match poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for it"),
        }
    }
}

/// Ends a child: politely, and after `patience` for good.
pub fn end(child: &mut Child, patience: Duration) {
    // Its number may be another's once it was waited for.
    if matches!(child.try_wait(), Ok(None)) {
        signal(child.id(), Signal::TERM);
    }
    if wait(child, patience).is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Sends a signal to one process; a process that is gone already is fine.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// A command with its arguments.
pub fn command<A: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = A>,
) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C.UTF-8");
    command
}

/// A command that only root may run: as it is for root, else through sudo, which
/// must not ask for a password.
#[must_use]
pub fn privileged<const N: usize>(words: [&str; N]) -> Command {
    if User::current().uid == 0 {
        command(words[0], &words[1..])
    } else {
        let mut sudo = command("sudo", ["-n"]);
        sudo.args(words);
        sudo
    }
}
