//! Starting a lab, and taking it down again.
//!
//! Invariants: the daemons form process groups of their own, so that a Ctrl-C
//! reaches only this process, which then takes things down in order; guests are
//! ended even when their daemon is gone; what a lab left whose owner was killed
//! goes when the next one starts.

use std::{
    fs,
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::{
    command::{self, User, end},
    domain::Lab,
    guest,
    image::Image,
    paths,
    ports::quiet_port,
    wait::{eventually, eventually_some},
};

use rustix::process::Signal;

/// A lab that this process started; taken down when dropped.
#[derive(Debug)]
pub struct OwnedLab {
    /// The lab.
    pub lab: Lab,
    daemons: Vec<Child>,
    /// Locked as long as this process lives.
    _owner: fs::File,
}

impl OwnedLab {
    /// Starts private daemons and boots `guests` Linux guests.
    ///
    /// # Errors
    /// When something is missing or does not come up.
    pub fn start(guests: u32) -> Result<Self> {
        let image = Image::build().context("the guest's image cannot be built")?;
        sweep();
        let (folder, owner) = fresh_folder()?;
        let mut names = Vec::new();
        for number in 0..guests {
            // passt takes it whenever the guest runs.
            names.push((format!("guest{number}"), quiet_port()?));
        }
        let lab = Lab {
            user: User::of_lab()?,
            guests: names,
            folder,
        };
        let mut owned = Self {
            lab,
            daemons: Vec::new(),
            _owner: owner,
        };
        owned.up(&image)?;
        Ok(owned)
    }

    fn up(&mut self, image: &Image) -> Result<()> {
        let lab = self.lab.clone();
        fs::set_permissions(&lab.folder, fs::Permissions::from_mode(0o755))?;
        lab.own(&lab.folder)?;
        for (name, mode) in [
            ("run", 0o700),
            ("config", 0o700),
            ("cache", 0o700),
            ("data", 0o700),
            ("img", 0o755),
        ] {
            let path = lab.folder.join(name);
            fs::create_dir(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
            lab.own(&path)?;
        }
        for daemon in ["virtlogd", "libvirtd"] {
            self.daemons.push(daemon_of(&lab, daemon)?);
        }
        answers(&lab)?;
        let images = lab.images();
        lab.virsh([
            "pool-define-as".as_ref(),
            "default".as_ref(),
            "dir".as_ref(),
            "--target".as_ref(),
            images.as_os_str(),
        ])?;
        lab.virsh(["pool-start", "default"])?;
        lab.write(&lab.folder.join("lab.json"), &serde_json::to_string(&lab)?)?;
        guest::boot(&lab, image)
    }

    /// Process id of its libvirtd.
    #[must_use]
    pub fn libvirtd(&self) -> Option<u32> {
        self.daemons.last().map(Child::id)
    }

    /// Whether its libvirtd ended.
    pub fn libvirtd_ended(&mut self) -> bool {
        let daemon = self.daemons.last_mut();
        daemon.is_none_or(|daemon| matches!(daemon.try_wait(), Ok(Some(_))))
    }

    /// Starts its libvirtd again after it ended, and waits until it answers. One
    /// that crashes while it comes up is started again, as a service manager would:
    /// libvirt 11.3 does where it was killed at the beginning of a merge.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_libvirtd(&mut self) -> Result<()> {
        for _ in 0..5 {
            let started = daemon_of(&self.lab, "libvirtd")?;
            if let Some(last) = self.daemons.last_mut() {
                *last = started;
            }
            let up = eventually(Duration::from_secs(60), "libvirtd, up or ended", || {
                self.libvirtd_ended() || self.lab.virsh(["version"]).is_ok()
            });
            // It may crash a moment after it answers.
            thread::sleep(Duration::from_millis(300));
            if up.is_ok() && !self.libvirtd_ended() {
                break;
            }
        }
        answers(&self.lab)
    }

    /// A command with the lab's folder in its environment.
    pub fn with(&self, program: &str, arguments: &[String]) -> Command {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env(crate::domain::LAB, &self.lab.folder);
        command
    }
}

fn daemon_of(lab: &Lab, daemon: &str) -> Result<Child> {
    let program = paths::program(daemon)
        .with_context(|| format!("{daemon} is missing: cargo xtask setup installs it"))?;
    let log = fs::File::options()
        .create(true)
        .append(true)
        .open(lab.folder.join(format!("{daemon}.log")))?;
    lab.command(program)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .spawn()
        .with_context(|| format!("{daemon} cannot be started"))
}

fn answers(lab: &Lab) -> Result<()> {
    eventually_some(
        Duration::from_secs(60),
        "answer of the private libvirt daemon",
        || lab.virsh(["version"]).map(drop).map(Some),
    )
}

impl Drop for OwnedLab {
    fn drop(&mut self) {
        let list = self.lab.virsh(["list", "--name"]).unwrap_or_default();
        for name in list.lines().map(str::trim).filter(|name| !name.is_empty()) {
            let _ = self.lab.virsh(["destroy", name]);
        }
        for mut daemon in self.daemons.drain(..).rev() {
            end(&mut daemon, Duration::from_secs(10));
        }
        end_all(&self.lab.folder);
        remove(&self.lab.folder);
    }
}

const PREFIX: &str = "vmsnap-lab-";
const OWNER: &str = "owner";

/// How long what a lab started may take to end before it is killed.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks for it.
const PAUSE: Duration = Duration::from_millis(20);

/// A new short folder (sockets' paths have 107 bytes at most) and the file that
/// this process holds locked in it.
fn fresh_folder() -> Result<(PathBuf, fs::File)> {
    for number in 0..1000 {
        let path = Path::new("/tmp").join(format!("{PREFIX}{}-{number}", std::process::id()));
        match fs::create_dir(&path) {
            Ok(()) => {
                let owner = fs::File::create(path.join(OWNER))?;
                owner.lock().context("the lab's folder cannot be locked")?;
                // Between making and locking it, another start may have swept it.
                if path.is_dir() {
                    return Ok((path, owner));
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).context("no folder for the lab"),
        }
    }
    anyhow::bail!("/tmp is full of labs")
}

/// Takes down labs whose owner was killed: their file is not locked any more.
/// Those of other users are theirs.
fn sweep() {
    let Ok(entries) = fs::read_dir("/tmp") else {
        return;
    };
    for folder in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let ours = folder
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(PREFIX));
        let Some(owner) = fs::File::open(folder.join(OWNER)).ok().filter(|_| ours) else {
            continue;
        };
        if owner.try_lock().is_ok() {
            end_all(&folder);
            remove(&folder);
        }
    }
}

/// Ends whatever a lab started: daemons, guests, passt, its command. They are known by
/// the lab's folder, which each of them names. Pid files do not tell them all: in the
/// moment in which libvirt starts a guest, the file names a process that is no QEMU yet.
///
/// An interrupt is no reason to leave earlier.
fn end_all(folder: &Path) {
    let begun = Instant::now();
    // Looked up each time: a daemon on its way out may still start a guest.
    loop {
        let (left, waited) = (of_lab(folder), begun.elapsed());
        if left.is_empty() || waited > PATIENCE * 2 {
            break;
        }
        let signal = if waited > PATIENCE {
            Signal::KILL
        } else {
            Signal::TERM
        };
        left.iter().for_each(|pid| command::signal(*pid, signal));
        thread::sleep(PAUSE);
    }
}

/// The processes that a lab started, but for this one.
fn of_lab(folder: &Path) -> Vec<u32> {
    let folder = folder.as_os_str().as_bytes();
    let named = |file: PathBuf| names(&fs::read(file).unwrap_or_default(), folder);
    let numbers = fs::read_dir("/proc").into_iter().flatten();
    numbers
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid: &u32| *pid != std::process::id())
        .filter(|pid| {
            let place = Path::new("/proc").join(pid.to_string());
            // Only what the lab started has it in its environment. passt lets nobody
            // read its own; its arguments are for all to read, as those of a reader of
            // the lab's logs are, who is left alone.
            named(place.join("environ"))
                || fs::read_to_string(place.join("comm"))
                    .is_ok_and(|name| name.starts_with("passt") || name.starts_with("qemu"))
                    && named(place.join("cmdline"))
        })
        .collect()
}

/// Whether bytes hold the path of a folder: not one that is only a beginning of it,
/// as that of lab 1 is of that of lab 10.
fn names(bytes: &[u8], folder: &[u8]) -> bool {
    let ends = |rest: &[u8]| !rest.first().is_some_and(u8::is_ascii_digit);
    bytes
        .windows(folder.len())
        .zip(folder.len()..)
        .any(|(part, end)| part == folder && ends(&bytes[end..]))
}

/// Removes a lab's folder, with a file system that a test may have left mounted
/// in it.
fn remove(folder: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for place in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
        if Path::new(place).starts_with(folder) {
            let _ = command::succeed(&mut command::privileged(["umount", "-l", place]));
        }
    }
    let _ = fs::remove_dir_all(folder);
}
