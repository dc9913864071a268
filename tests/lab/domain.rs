//! A lab that is up, and what virsh, qemu-img and the guest say of a domain in
//! it.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    command::{User, command, succeed},
    wait::eventually_some,
};

/// The environment variable that names the lab's folder.
pub const LAB: &str = "VMSNAP_LAB";
/// How long the guest may take to answer.
const ANSWER: Duration = Duration::from_secs(30);

/// A lab that is up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Lab {
    /// Its folder.
    pub folder: PathBuf,
    /// Whom its processes run as.
    pub user: User,
    /// Names of its Linux guests with the local port of their ssh server.
    pub guests: Vec<(String, u16)>,
}

impl Lab {
    /// The lab that `vmsnap-lab up` started.
    ///
    /// # Errors
    /// When there is none.
    pub fn from_env() -> Result<Self> {
        let folder = std::env::var_os(LAB).with_context(|| {
            format!("{LAB} is not set: run the tests with `cargo xtask test`, which starts a lab")
        })?;
        let text = fs::read_to_string(Path::new(&folder).join("lab.json"))?;
        Ok(serde_json::from_str(&text)?)
    }

    /// The folder of the default pool, where disks lie.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.folder.join("img")
    }

    /// A command that runs as the lab's user, in the lab's environment.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = command::<&str>(program, []);
        self.user.apply(&mut command);
        for (name, folder) in [
            ("HOME", ""),
            ("XDG_RUNTIME_DIR", "run"),
            ("XDG_CONFIG_HOME", "config"),
            ("XDG_CACHE_HOME", "cache"),
            ("XDG_DATA_HOME", "data"),
        ] {
            command.env(name, self.folder.join(folder));
        }
        // A client of a session would start a daemon of its own beside the lab's,
        // or after it.
        command.env("LIBVIRT_AUTOSTART", "0");
        command.current_dir(&self.folder);
        command
    }

    /// What virsh says.
    ///
    /// # Errors
    /// When it fails, with its words.
    pub fn virsh<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<String> {
        succeed(
            self.command("virsh")
                .args(["-q", "-c", "qemu:///session"])
                .args(arguments),
        )
    }

    /// What qemu-img says.
    ///
    /// # Errors
    /// When it fails, with its words.
    pub fn qemu_img<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<String> {
        succeed(self.command("qemu-img").args(arguments))
    }

    /// A domain, whether it exists or not.
    #[must_use]
    pub fn domain(&self, name: &str) -> Domain {
        Domain {
            lab: self.clone(),
            name: name.to_owned(),
        }
    }

    /// Writes a file that belongs to the lab's user.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path, text: &str) -> Result<()> {
        fs::write(path, text)?;
        self.own(path)
    }

    /// Gives a file to the lab's user.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn own(&self, path: &Path) -> Result<()> {
        if User::current() != self.user {
            std::os::unix::fs::lchown(path, Some(self.user.uid), Some(self.user.gid))?;
        }
        Ok(())
    }
}

/// A domain, seen by its witnesses.
#[derive(Debug, Clone)]
pub struct Domain {
    /// Its lab.
    pub lab: Lab,
    /// Its name.
    pub name: String,
}

impl Domain {
    /// virsh on this domain: `virsh COMMAND NAME ARGUMENTS`.
    ///
    /// # Errors
    /// When it fails, with its words.
    pub fn virsh(&self, verb: &str, arguments: &[&str]) -> Result<String> {
        let mut words = vec![verb, &self.name];
        words.extend(arguments);
        self.lab.virsh(words)
    }

    /// `running`, `paused`, `shut off`.
    ///
    /// # Errors
    /// When virsh fails.
    pub fn state(&self) -> Result<String> {
        Ok(self.virsh("domstate", &[])?.trim().to_owned())
    }

    /// The image that a disk uses.
    ///
    /// # Errors
    /// When there is no such disk.
    pub fn disk(&self, target: &str) -> Result<String> {
        let list = self.virsh("domblklist", &[])?;
        list.lines()
            .map(str::trim)
            .find_map(|line| line.strip_prefix(target)?.strip_prefix(' '))
            .map(|path| path.trim().to_owned())
            .with_context(|| format!("{} has no disk {target}", self.name))
    }

    /// File names of a disk's chain, the active image first.
    ///
    /// # Errors
    /// When qemu-img fails.
    pub fn chain(&self, target: &str) -> Result<Vec<String>> {
        let path = self.disk(target)?;
        let text = self
            .lab
            .qemu_img(["info", "-U", "--backing-chain", "--output=json", &path])?;
        let images: Vec<Value> = serde_json::from_str(&text)?;
        Ok(images
            .iter()
            .filter_map(|image| {
                Some(
                    Path::new(image["filename"].as_str()?)
                        .file_name()?
                        .to_string_lossy()
                        .into_owned(),
                )
            })
            .collect())
    }

    /// Names of all snapshots.
    ///
    /// # Errors
    /// When virsh fails.
    pub fn snapshots(&self) -> Result<Vec<String>> {
        let list = self.virsh("snapshot-list", &["--name"])?;
        Ok(list
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .map(str::to_owned)
            .collect())
    }

    /// A snapshot's parent; empty for a root.
    ///
    /// # Errors
    /// When virsh fails.
    pub fn parent(&self, snapshot: &str) -> Result<String> {
        let xml = self.virsh("snapshot-dumpxml", &[snapshot])?;
        let document = roxmltree::Document::parse(&xml)?;
        let root = document.root_element();
        let parent = root.children().find(|node| node.has_tag_name("parent"));
        let name =
            parent.and_then(|parent| parent.children().find(|node| node.has_tag_name("name")));
        Ok(name
            .and_then(|name| name.text())
            .unwrap_or_default()
            .to_owned())
    }

    /// Id of the QEMU process of a domain that is on.
    ///
    /// # Errors
    /// When it is off.
    pub fn pid(&self) -> Result<u32> {
        let file = format!("run/libvirt/qemu/run/{}.pid", self.name);
        let text = fs::read_to_string(self.lab.folder.join(file))
            .with_context(|| format!("{} has no QEMU", self.name))?;
        Ok(text.trim().parse()?)
    }

    /// The file in which a snapshot's data of a disk lies.
    ///
    /// # Errors
    /// When virsh fails or the snapshot knows no such disk.
    pub fn data(&self, snapshot: &str, target: &str) -> Result<PathBuf> {
        let xml = self.virsh("snapshot-dumpxml", &[snapshot])?;
        let document = roxmltree::Document::parse(&xml)?;
        data_of(&document, target)
            .with_context(|| format!("snapshot {snapshot} of {} has no {target}", self.name))
    }

    /// Definitions of snapshots, each with its name, by one virsh.
    ///
    /// # Errors
    /// When virsh fails, as it does where there is no such snapshot.
    pub fn definitions(&self, snapshots: &BTreeSet<String>) -> Result<Vec<(String, String)>> {
        const END: &str = "</domainsnapshot>";
        if snapshots.is_empty() {
            return Ok(Vec::new());
        }
        let words: Vec<String> = snapshots
            .iter()
            .map(|name| format!("snapshot-dumpxml {} {name}", self.name))
            .collect();
        let said = self.lab.virsh([words.join("; ")])?;
        let all: Vec<String> = said
            .split_inclusive(END)
            .map(|xml| xml.trim().to_owned())
            .filter(|xml| xml.ends_with(END))
            .collect();
        ensure!(all.len() == snapshots.len(), "virsh says {said}");
        Ok(snapshots.iter().cloned().zip(all).collect())
    }

    /// Checks the active image of a disk while nobody writes it.
    ///
    /// # Errors
    /// When qemu-img finds it damaged.
    pub fn check(&self, target: &str) -> Result<()> {
        let path = self.disk(target)?;
        let locked = self.state()? != "shut off";
        let mut words = vec!["check", "-q"];
        if locked {
            // Leaks of an image in use are only what is not flushed yet.
            words.push("-U");
        }
        words.push(&path);
        match self.lab.qemu_img(words) {
            Err(error) if locked && format!("{error:#}").contains("status 3") => Ok(()),
            other => other.map(drop),
        }
    }

    fn agent(&self, command: &Value) -> Result<Value> {
        let text = self.virsh("qemu-agent-command", &[&command.to_string()])?;
        let mut reply: Value = serde_json::from_str(&text)?;
        Ok(reply["return"].take())
    }

    /// Waits until the guest agent answers.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub fn answers(&self, limit: Duration) -> Result<()> {
        eventually_some(limit, "answer of the guest agent", || {
            self.agent(&json!({"execute": "guest-ping"})).map(Some)
        })
        .map(drop)
    }

    /// Whether file systems are frozen, by the agent's own word.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub fn frozen(&self) -> Result<bool> {
        let status = self.agent(&json!({"execute": "guest-fsfreeze-status"}))?;
        match status.as_str() {
            Some("frozen") => Ok(true),
            Some("thawed") => Ok(false),
            _ => bail!("the agent says neither frozen nor thawed"),
        }
    }

    /// Runs a shell line in the guest and returns what it wrote.
    ///
    /// # Errors
    /// When it fails or the agent does not answer.
    pub fn exec(&self, line: &str) -> Result<String> {
        let started = self.agent(&json!({"execute": "guest-exec", "arguments":
            {"path": "/bin/sh", "arg": ["-c", line], "capture-output": true}}))?;
        let pid = started["pid"].as_i64().context("guest-exec gives a pid")?;
        let ended = eventually_some(ANSWER, "end of the command in the guest", || {
            let status =
                self.agent(&json!({"execute": "guest-exec-status", "arguments": {"pid": pid}}))?;
            Ok((status["exited"] == true).then_some(status))
        })?;
        let text = |key: &str| {
            let bytes = base64::prelude::BASE64_STANDARD
                .decode(ended[key].as_str().unwrap_or_default())
                .unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        ensure!(
            ended["exitcode"] == 0,
            "`{line}` in the guest ended with {}: {}",
            ended["exitcode"],
            text("err-data")
        );
        Ok(text("out-data"))
    }

    /// The counter on the guest's disk.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn counter(&self) -> Result<u64> {
        Ok(self.exec("cat /data/counter")?.trim().parse()?)
    }

    /// The counter in the guest's memory: goes on over a revert to saved memory,
    /// begins anew with a boot.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn ticks(&self) -> Result<u64> {
        Ok(self.exec("cat /run/ticks")?.trim().parse()?)
    }

    /// Whether the guest runs and writes: its counter grows.
    ///
    /// # Errors
    /// When it does not within some seconds.
    pub fn lives(&self) -> Result<()> {
        let before = self.counter()?;
        eventually_some(ANSWER, "growth of the guest's counter", || {
            Ok((self.counter()? > before).then_some(()))
        })
    }

    /// The folder of this domain's disks: Linux guests have one of their own.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        let own = self.lab.images().join(&self.name);
        if own.is_dir() { own } else { self.lab.images() }
    }

    /// Files of this domain in its folder, sorted.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn files(&self) -> Result<Vec<String>> {
        let mut files: Vec<String> = fs::read_dir(self.folder())?
            .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
            .filter(|name| {
                name.strip_prefix(&self.name)
                    .is_some_and(|rest| rest.starts_with(['.', '-']))
            })
            .collect();
        files.sort();
        Ok(files)
    }
}

/// The file in which a snapshot's data of a disk lies, by the snapshot's definition.
#[must_use]
pub fn data_of(definition: &roxmltree::Document<'_>, target: &str) -> Option<PathBuf> {
    let child = |name| {
        let root = definition.root_element();
        root.children().find(|node| node.has_tag_name(name))
    };
    let domain = child("inactiveDomain").or_else(|| child("domain"));
    domain
        .into_iter()
        .flat_map(|domain| domain.descendants())
        .filter(|node| node.has_tag_name("disk"))
        .find(|disk| {
            disk.children()
                .any(|it| it.has_tag_name("target") && it.attribute("dev") == Some(target))
        })
        .and_then(|disk| disk.children().find(|it| it.has_tag_name("source")))
        .and_then(|source| source.attribute("file"))
        .map(PathBuf::from)
}
