//! Packages of Debian, Ubuntu and their kin.
//!
//! Invariants: what is missing is told before anything changes, and on a terminal
//! the user is asked; nothing is ever removed; a libvirt or QEMU that serves
//! guests is not replaced; a package that brings a daemon does not get to start
//! it.

use std::{
    collections::BTreeMap,
    fs,
    io::{IsTerminal as _, Write as _},
    path::Path,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    python,
    run::{command, output, say, step},
    sources,
    system::{Release, privileged, serving},
    target,
};

/// Packages for building and for what tests and demo call.
const PLAIN: &[&str] = &[
    "ca-certificates",
    "dropbear-bin",
    "e2fsprogs",
    "gcc",
    "iproute2",
    "kmod",
    "libc6-dev",
    "openssh-client",
    "passt",
    "pkg-config",
    "procps",
    "util-linux",
    // Rules and dashboard are tried in it.
    "prometheus",
    // rpmbuild.
    "rpm",
    // systemd-analyze and systemd-sysusers; it does not become the init system.
    "systemd",
    // systemd-nspawn, in which the units are tried.
    "systemd-container",
    "xz-utils",
    "zstd",
];
/// The hypervisor, from backports where the release's own is too old. Without
/// the package that sets a system daemon up: only the programs are needed.
const HYPERVISOR: &[&str] = &[
    "libvirt-clients",
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "libvirt-dev",
    "qemu-system-x86",
    "qemu-utils",
];
/// What newer releases split from the daemon's package and older ones do not know.
const SPLIT: &[&str] = &["libvirt-daemon-driver-storage"];
/// The package whose version is libvirt's.
const LIBVIRT: &str = "libvirt-daemon-driver-qemu";
/// libvirt 9.10 was the first that reverts external snapshots.
const OLDEST: (u32, u32) = (9, 10);
/// The file that package scripts ask whether a service may be started.
const POLICY: &str = "/usr/sbin/policy-rc.d";

/// Installs what is missing.
///
/// # Errors
/// When something cannot be installed, with what to do by hand.
pub fn install(yes: bool) -> Result<()> {
    let mut plain = PLAIN.to_vec();
    // A Python from elsewhere brings these modules itself.
    if !python::is_made() && !python::can_be_made() {
        plain.push("python3-venv");
    }
    let present = installed(&[&plain, HYPERVISOR, SPLIT].concat());
    let missing = |packages: &[&'static str]| -> Vec<&'static str> {
        packages
            .iter()
            .copied()
            .filter(|package| !present.contains_key(*package))
            .collect()
    };
    let too_old = present
        .get(LIBVIRT)
        .filter(|version| numbers(version) < OLDEST);
    let plain = missing(&plain);
    let mut hypervisor = if too_old.is_some() {
        HYPERVISOR.to_vec()
    } else {
        missing(HYPERVISOR)
    };
    let split = missing(SPLIT);
    // With a daemon's package yet to come, only the lists of then can tell.
    if !hypervisor.is_empty() || split.iter().any(|name| known(name)) {
        hypervisor.extend(split);
    }
    if plain.is_empty() && hypervisor.is_empty() {
        return Ok(());
    }
    if let Some(version) = too_old {
        let serving = serving();
        if !serving.is_empty() {
            bail!(
                "the installed libvirt {version} cannot revert external snapshots, and it is not \
                 replaced while it serves guests ({}); upgrade it yourself, or use another machine",
                serving.join(", ")
            );
        }
    }
    let release = Release::read();
    let suite = release.backports().filter(|_| !hypervisor.is_empty());
    say(&format!(
        "on {} these packages are missing or too old and will be installed:",
        release.name()
    ));
    for names in [&hypervisor, &plain]
        .into_iter()
        .filter(|names| !names.is_empty())
    {
        say(&format!("  {}", names.join(" ")));
    }
    if let Some(version) = too_old {
        say(&format!(
            "  in place of libvirt {version}, which cannot revert external snapshots"
        ));
    }
    if let Some(suite) = &suite {
        say(&format!("  libvirt and QEMU from {suite}-backports"));
    }
    if !yes && std::io::stdin().is_terminal() && !agreed()? {
        bail!("nothing was installed");
    }
    if let Some(suite) = &suite {
        offer_backports(suite)?;
    }
    // A source of somebody else's may be out of order; what counts is whether the
    // packages can be had.
    if let Err(error) = step("package lists", privileged(&["apt-get", "update", "-q"])?) {
        say(&format!("{error:#}; going on with what is known"));
    }
    let preferences = match &suite {
        Some(suite) => Some(prefer_backports(suite)?),
        None => None,
    };
    hypervisor.retain(|name| !SPLIT.contains(name) || known(name));
    let _quiet = Quiet::begin()?;
    get(&hypervisor, preferences.as_deref())?;
    get(&plain, None)
}

/// Whether apt knows a package.
fn known(package: &str) -> bool {
    output(command("apt-cache", ["show", package])).is_some()
}

/// Adds the backports of a suite to apt's sources, unless one has them.
fn offer_backports(suite: &str) -> Result<()> {
    if sources::archive_of(&format!("{suite}-backports")).is_some() {
        return Ok(());
    }
    let file = target().join("xtask/backports.sources");
    fs::write(&file, sources::backports(suite)?)
        .with_context(|| format!("cannot write {}", file.display()))?;
    let file = file.to_string_lossy();
    step(
        &format!("package source {}", sources::OURS),
        privileged(&["install", "-m", "644", &file, sources::OURS])?,
    )
}

/// Writes apt's preferences for this one installation, and returns the option
/// that makes apt read them: the user's own, and the hypervisor's sources from
/// backports. Making the whole suite the target would also pull in its systemd.
fn prefer_backports(suite: &str) -> Result<String> {
    let file = target().join("xtask/preferences");
    let own = fs::read_to_string("/etc/apt/preferences").unwrap_or_default();
    fs::write(&file, preferences(&own, suite))
        .with_context(|| format!("cannot write {}", file.display()))?;
    Ok(format!("Dir::Etc::Preferences={}", file.display()))
}

fn preferences(own: &str, suite: &str) -> String {
    format!(
        "{own}\n\nPackage: src:libvirt src:qemu src:seabios\nPin: release n={suite}-backports\n\
         Pin-Priority: 990\n"
    )
}

/// Installs packages after looking at all that apt would change.
fn get(packages: &[&str], preferences: Option<&str>) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let mut words = vec![
        "install",
        "-q",
        "-y",
        "--no-install-recommends",
        "--no-remove",
    ];
    if let Some(preferences) = preferences {
        words.extend(["-o", preferences]);
    }
    words.extend(packages);
    let mut dry = command("apt-get", ["-s"]);
    dry.args(&words).env("LC_ALL", "C");
    let dry = dry.output().context("apt-get cannot be run")?;
    if !dry.status.success() {
        bail!(
            "apt cannot install {}: {}",
            packages.join(" "),
            String::from_utf8_lossy(&dry.stderr).trim()
        );
    }
    let replaced = replaced(&String::from_utf8_lossy(&dry.stdout));
    let serving = if replaced.is_empty() {
        Vec::new()
    } else {
        serving()
    };
    if !serving.is_empty() {
        bail!(
            "installing {} would replace {}, which serves guests here: {}; upgrade it yourself, \
             or use another machine",
            packages.join(" "),
            replaced.join(", "),
            serving.join(", ")
        );
    }
    let mut install = vec!["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"];
    install.extend(words);
    step("packages", privileged(&install)?)
}

/// The packages of libvirt and QEMU that a dry run would replace: lines such as
/// `Inst NAME [OLD] (NEW ...)`, where a new package has no `[OLD]`.
fn replaced(dry_run: &str) -> Vec<String> {
    dry_run
        .lines()
        .filter_map(|line| {
            let mut words = line.strip_prefix("Inst ")?.split(' ');
            let (name, old) = (words.next()?, words.next()?);
            let old = old.strip_prefix('[')?.trim_end_matches(']');
            let part = name.starts_with("libvirt") || name.starts_with("qemu");
            // qemu-utils and the guest agent run beside no guest.
            let aside = ["qemu-utils", "qemu-guest-agent", "libvirt-dev"].contains(&name);
            (part && !aside).then(|| format!("{name} {old}"))
        })
        .collect()
}

/// While it lives, packages that are installed do not start their services:
/// the private daemons need the programs only.
struct Quiet(bool);

impl Quiet {
    fn begin() -> Result<Self> {
        // Somebody's own policy stays. Without an init system too, because then
        // the scripts of /etc/init.d are called.
        if Path::new(POLICY).exists() {
            return Ok(Self(false));
        }
        let file = target().join("xtask/policy-rc.d");
        fs::write(
            &file,
            "#!/bin/sh\ncase \"$1\" in libvirt*|virt*|qemu*|dropbear*|prometheus*) exit 101 ;; esac\nexit 0\n",
        )
        .with_context(|| format!("cannot write {}", file.display()))?;
        let file = file.to_string_lossy();
        step(
            "no services while packages are installed",
            privileged(&["install", "-m", "755", &file, POLICY])?,
        )?;
        Ok(Self(true))
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        if self.0
            && let Err(error) =
                privileged(&["rm", "-f", POLICY]).and_then(|rm| step("services as before", rm))
        {
            say(&format!("{error:#}; remove {POLICY} yourself"));
        }
    }
}

/// Versions of those packages that are installed.
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

fn agreed() -> Result<bool> {
    let mut out = std::io::stdout();
    write!(out, "Go ahead? [y/N] ")?;
    out.flush()?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    Ok(matches!(line.trim(), "y" | "Y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_hypervisor_is_preferred_from_backports_and_own_preferences_stay() {
        let text = preferences("Package: x\nPin: version 1\nPin-Priority: 1", "bookworm");
        assert_eq!(
            text.split("\n\n").collect::<Vec<_>>(),
            [
                "Package: x\nPin: version 1\nPin-Priority: 1",
                "Package: src:libvirt src:qemu src:seabios\nPin: release n=bookworm-backports\nPin-Priority: 990\n"
            ]
        );
    }

    #[test]
    fn versions_of_packages_compare_by_their_upstream_numbers() {
        assert_eq!(numbers("11.3.0-2~bpo12+1"), (11, 3));
        assert_eq!(numbers("1:10.0.2+ds-2"), (10, 0));
        assert!(numbers("9.0.0-4+deb12u2") < OLDEST);
        assert!(numbers("10.0.0-2ubuntu8.6") >= OLDEST);
    }

    #[test]
    fn a_dry_run_tells_which_parts_of_the_hypervisor_it_would_replace() {
        let text = "Reading package lists...\n\
            Inst libvirt0 [9.0.0-4] (11.3.0-2 Debian Backports:bookworm-backports [amd64])\n\
            Inst qemu-utils [1:7.2] (1:10.0.2 Debian Backports:bookworm-backports [amd64])\n\
            Inst qemu-system-x86 (1:10.0.2 Debian Backports:bookworm-backports [amd64])\n\
            Inst libssl3 [3.0.16] (3.0.17 Debian:12 [amd64])\n\
            Conf libvirt0 (11.3.0-2 Debian Backports:bookworm-backports [amd64])\n";
        assert_eq!(replaced(text), ["libvirt0 9.0.0-4"]);
    }
}
