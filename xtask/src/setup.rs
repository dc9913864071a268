//! Installing what is missing: packages of the distribution, the accounts of
//! root's runs, Rust's own tools, Python programs, the test runner.
//!
//! Invariants: says what it will install; a second run finds everything and
//! takes well below a second; runs side by side wait for each other.

use std::{
    fs::{self, File},
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    apt, python,
    run::{cargo, command, find, output, say, step},
    system, target,
};

/// Programs that are needed where packages are the user's to install, and what
/// Fedora and its kin call the packages.
const PROGRAMS: &[(&str, &str)] = &[
    ("gcc", "gcc"),
    ("pkg-config", "pkgconf-pkg-config"),
    ("libvirtd", "libvirt-daemon"),
    ("virtlogd", "libvirt-daemon-log"),
    ("virsh", "libvirt-client"),
    ("qemu-system-x86_64", "qemu-system-x86-core"),
    ("qemu-img", "qemu-img"),
    ("qemu-ga", "qemu-guest-agent"),
    ("busybox", "busybox"),
    ("dropbear", "dropbear"),
    ("passt", "passt"),
    ("mkfs.ext4", "e2fsprogs"),
    ("depmod", "kmod"),
    ("ssh", "openssh-clients"),
    ("sshd", "openssh-server"),
    ("systemd-analyze", "systemd"),
    ("systemd-nspawn", "systemd-container"),
    ("dpkg-deb", "dpkg"),
    ("rpmbuild", "rpm-build"),
    ("promtool", "golang-github-prometheus"),
];

/// Sets everything up.
///
/// # Errors
/// When something cannot be installed, with what to do by hand.
pub fn run(yes: bool) -> Result<()> {
    let _alone = alone()?;
    let lacking = if find("dpkg-query") && find("apt-get") {
        apt::install(yes)?;
        Vec::new()
    } else {
        elsewhere()
    };
    if !lacking.is_empty() {
        say(&format!(
            "packages of {} are yours to install: {}; going on with the rest",
            system::Release::read().name(),
            lacking.join(" ")
        ));
    }
    system::accounts()?;
    components()?;
    python::install(python::TOOLS)?;
    nextest()?;
    if !lacking.is_empty() {
        bail!("install these packages first: {}", lacking.join(" "));
    }
    Ok(())
}

/// Waits until no other run changes what set-up keeps, and holds it until the
/// result is dropped.
///
/// # Errors
/// When the lock cannot be had.
pub fn alone() -> Result<File> {
    let folder = target().join("xtask");
    fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make folder {}", folder.display()))?;
    let path = folder.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
    if file.try_lock().is_err() {
        say("waiting for another run in this checkout");
        file.lock()
            .with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(file)
}

/// The packages that a distribution without apt still needs.
fn elsewhere() -> Vec<&'static str> {
    let mut lacking: Vec<&str> = PROGRAMS
        .iter()
        .filter(|(program, _)| !find(program))
        .map(|(_, package)| *package)
        .collect();
    if output(command("pkg-config", ["--exists", "libvirt"])).is_none() {
        lacking.push("libvirt-devel");
    }
    // Drivers are loaded by the daemon and come in packages of their own.
    for driver in ["qemu", "storage"] {
        let file = format!("libvirt/connection-driver/libvirt_driver_{driver}.so");
        if !["/usr/lib64", "/usr/lib"]
            .iter()
            .any(|folder| Path::new(folder).join(&file).exists())
        {
            lacking.push(if driver == "qemu" {
                "libvirt-daemon-driver-qemu"
            } else {
                "libvirt-daemon-driver-storage-core"
            });
        }
    }
    lacking
}

/// The parts of Rust that a minimal installation leaves out.
fn components() -> Result<()> {
    let missing: Vec<&str> = [("fmt", "rustfmt"), ("clippy", "clippy")]
        .into_iter()
        .filter(|(verb, _)| output(cargo([verb, "--version"])).is_none())
        .map(|(_, component)| component)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !find("rustup") {
        bail!("install these parts of Rust: {}", missing.join(", "));
    }
    let mut add = command("rustup", ["component", "add"]);
    add.args(&missing);
    step(&format!("parts of Rust: {}", missing.join(", ")), add)
}

/// The test runner: the installed one, else one from a wheel, else built.
///
/// # Errors
/// When it cannot be had.
pub fn nextest() -> Result<Command> {
    if output(cargo(["nextest", "--version"])).is_some() {
        return Ok(cargo(["nextest"]));
    }
    let own = python::tool("cargo-nextest");
    if !own.is_file() && (python::install(python::RUNNER).is_err() || !own.is_file()) {
        say("there is no wheel of cargo-nextest for this machine; it is built");
        let mut build = cargo(["install", "--locked", "cargo-nextest", "--root"]);
        build.arg(target().join("xtask/venv"));
        step("test runner", build)?;
    }
    Ok(command(own, ["nextest"]))
}
