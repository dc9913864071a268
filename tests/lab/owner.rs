//! Starting a lab, and taking it down again.

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    command::{User, end},
    domain::Lab,
    guest,
    image::Image,
    paths,
    wait::eventually_some,
};

/// A lab that this process started; taken down when dropped.
#[derive(Debug)]
pub struct OwnedLab {
    /// The lab.
    pub lab: Lab,
    daemons: Vec<Child>,
}

impl OwnedLab {
    /// Starts private daemons and boots `guests` Linux guests.
    ///
    /// # Errors
    /// When something is missing or does not come up.
    pub fn start(guests: u32) -> Result<Self> {
        let image = Image::build().context("the guest's image cannot be built")?;
        let folder = fresh_folder()?;
        let mut names = Vec::new();
        for number in 0..guests {
            // Free now; passt takes it in a moment.
            let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
            names.push((format!("guest{number}"), port));
        }
        let lab = Lab {
            user: User::of_lab()?,
            guests: names,
            folder,
        };
        let mut owned = Self {
            lab,
            daemons: Vec::new(),
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
            let program = paths::program(daemon)
                .with_context(|| format!("{daemon} is missing: cargo xtask setup installs it"))?;
            let log = fs::File::create(lab.folder.join(format!("{daemon}.log")))?;
            let child = lab
                .command(program)
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log)
                .spawn()
                .with_context(|| format!("{daemon} cannot be started"))?;
            self.daemons.push(child);
        }
        eventually_some(
            Duration::from_secs(60),
            "answer of the private libvirt daemon",
            || lab.virsh(["version"]).map(Some),
        )?;
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

    /// A command with the lab's folder in its environment.
    pub fn with(&self, program: &str, arguments: &[String]) -> Command {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env(crate::domain::LAB, &self.lab.folder);
        command
    }
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
        let _ = fs::remove_dir_all(&self.lab.folder);
    }
}

/// A new short folder: sockets' paths have 107 bytes at most.
fn fresh_folder() -> Result<PathBuf> {
    for number in 0..1000 {
        let path = Path::new("/tmp").join(format!("vmsnap-{}-{number}", std::process::id()));
        match fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).context("no folder for the lab"),
        }
    }
    anyhow::bail!("/tmp is full of labs")
}
