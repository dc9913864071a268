//! The machine: its distribution, its accounts, what serves guests on it.
//!
//! Invariant: only [`privileged`] changes the system.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use anyhow::{Result, bail};

use crate::run::{command, find, output, say, shown, step};

/// The accounts that root's runs need: name, home and what it is for.
const ACCOUNTS: &[(&str, &str, &str)] = &[
    // libvirt sends root to the system daemon whatever the session, and passt
    // refuses root.
    (
        "vmsnap-lab",
        "/nonexistent",
        "the tests' private daemons run under it",
    ),
    // As its package makes it, which is never installed: it would start a server.
    (
        "sshd",
        "/run/sshd",
        "the tests' ssh server drops its rights to it",
    ),
];

/// `/etc/os-release`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Release(BTreeMap<String, String>);

impl Release {
    /// Reads this machine's.
    pub fn read() -> Self {
        let text = fs::read_to_string("/etc/os-release")
            .or_else(|_| fs::read_to_string("/usr/lib/os-release"))
            .unwrap_or_default();
        Self::parse(&text)
    }

    fn parse(text: &str) -> Self {
        Self(
            text.lines()
                .filter_map(|line| line.split_once('='))
                .map(|(key, value)| {
                    (
                        key.trim().to_owned(),
                        value.trim().trim_matches(['"', '\'']).to_owned(),
                    )
                })
                .collect(),
        )
    }

    /// How it calls itself.
    pub fn name(&self) -> &str {
        self.0
            .get("PRETTY_NAME")
            .map_or("this system", String::as_str)
    }

    /// The suite whose backports hold a libvirt that reverts external snapshots,
    /// where the release's own does not.
    pub fn backports(&self) -> Option<String> {
        let field = |key| self.0.get(key).map(String::as_str);
        (field("ID") == Some("debian") && field("VERSION_CODENAME") == Some("bookworm"))
            .then(|| "bookworm".to_owned())
    }
}

/// Whether root calls.
pub fn root() -> bool {
    output(command("id", ["-u"])).is_some_and(|id| id.trim() == "0")
}

/// A command that changes the system: as root, or through sudo.
///
/// # Errors
/// When neither can be; the error says what to run.
pub fn privileged(words: &[&str]) -> Result<Command> {
    if root() {
        return Ok(command(words[0], &words[1..]));
    }
    if find("sudo") {
        return Ok(command("sudo", words));
    }
    bail!(
        "this needs root, and there is no sudo; run as root: {}",
        shown(&command(words[0], &words[1..]))
    )
}

/// What a newer libvirt or QEMU would be pulled from under: daemons, running
/// guests, and guests that are defined in the system daemon.
pub fn serving() -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(name) = fs::read_to_string(entry.path().join("comm")) else {
            continue;
        };
        if is_hypervisor(name.trim()) {
            found.push(format!(
                "process {} ({})",
                entry.file_name().to_string_lossy(),
                name.trim()
            ));
        }
    }
    // Unreadable for ordinary users on most systems: then the processes have to do.
    for entry in fs::read_dir("/etc/libvirt/qemu")
        .into_iter()
        .flatten()
        .flatten()
    {
        let path = entry.path();
        if path.extension().is_some_and(|it| it == "xml")
            && let Some(name) = path.file_stem()
        {
            found.push(format!("domain {}", name.to_string_lossy()));
        }
    }
    found
}

fn is_hypervisor(name: &str) -> bool {
    matches!(name, "libvirtd" | "virtqemud" | "qemu-kvm" | "kvm") || name.starts_with("qemu-system")
}

/// Makes the accounts that programs of root's need; a user's run under the
/// user's own.
///
/// # Errors
/// When one cannot be made.
pub fn accounts() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let shell = ["/usr/sbin/nologin", "/sbin/nologin"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .unwrap_or("/bin/false");
    for (name, home, purpose) in ACCOUNTS {
        if output(command("getent", ["passwd", name])).is_some() {
            continue;
        }
        say(&format!("the account {name} is made: {purpose}"));
        let mut make = command("useradd", ["--system", "--user-group", "--no-create-home"]);
        make.args(["--home-dir", home, "--shell", shell, name]);
        step("account", make)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debian_12_needs_its_backports() {
        let bookworm = Release::parse(
            "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\nVERSION_CODENAME=bookworm\n",
        );
        assert_eq!(bookworm.backports().as_deref(), Some("bookworm"));
        assert_eq!(bookworm.name(), "Debian GNU/Linux 12 (bookworm)");
        for other in [
            "ID=debian\nVERSION_CODENAME=trixie\n",
            "ID=ubuntu\nVERSION_CODENAME=noble\n",
            "ID=fedora\n",
            "",
        ] {
            assert_eq!(Release::parse(other).backports(), None, "{other}");
        }
    }

    #[test]
    fn daemons_and_guests_of_libvirt_are_known_by_their_names() {
        assert!(is_hypervisor("qemu-system-x86"));
        assert!(is_hypervisor("libvirtd"));
        assert!(!is_hypervisor("virtlogd"));
        assert!(!is_hypervisor("qemu-img"));
    }
}
