//! Building the collection's tarball.
//!
//! Invariant: the tarball that is published holds a module that runs on hosts
//! with glibc 2.17; the one for the tests holds this host's own build.

use std::{fs, os::unix::fs::PermissionsExt as _};

use anyhow::{Context as _, Result};

use crate::{
    checkout, python_tool,
    run::{command, say, step},
    setup, target,
};

/// The oldest glibc that the module runs with.
const GLIBC: &str = "x86_64-unknown-linux-gnu.2.17";

/// Builds it; a native one is also installed where the tests look for it.
///
/// # Errors
/// When a step fails.
pub fn run(native: bool) -> Result<()> {
    let built = if native {
        target().join("debug/vm-snapshot")
    } else {
        setup::python_list("package-requirements.txt")?;
        let mut zig = command(
            python_tool("cargo-zigbuild"),
            [
                "zigbuild",
                "--locked",
                "--profile",
                "module",
                "--package",
                "vmsnap-ansible-module",
                "--target",
                GLIBC,
            ],
        );
        let path = std::env::var_os("PATH").unwrap_or_default();
        let own = python_tool("");
        let paths = std::iter::once(own).chain(std::env::split_paths(&path));
        zig.env("PATH", std::env::join_paths(paths)?);
        step("module for old hosts", zig)?;
        target().join("x86_64-unknown-linux-gnu/module/vm-snapshot")
    };
    let place = checkout().join("collection/plugins/bin/vm-snapshot-x86_64");
    if let Some(folder) = place.parent() {
        fs::create_dir_all(folder)?;
    }
    // A new file, so that a module that runs now keeps its own.
    let fresh = place.with_extension("new");
    fs::copy(&built, &fresh).with_context(|| format!("{} is not built", built.display()))?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755))?;
    if native {
        // Debug information would travel with every task.
        let mut strip = command("strip", ["--strip-debug"]);
        strip.arg(&fresh);
        step("strip", strip)?;
    }
    fs::rename(&fresh, &place)?;
    let folder = target().join("package");
    fs::create_dir_all(&folder)?;
    let galaxy = |words: &[&str]| {
        let mut galaxy = command(python_tool("ansible-galaxy"), ["collection"]);
        galaxy
            .args(words)
            .env("ANSIBLE_HOME", target().join("xtask/ansible-home"))
            .env("ANSIBLE_NOCOLOR", "1");
        galaxy
    };
    let mut build = galaxy(&["build", "--force", "--output-path"]);
    build.arg(&folder).arg(checkout().join("collection"));
    step("collection", build)?;
    let version = env!("CARGO_PKG_VERSION");
    let tarball = folder.join(format!("vmsnap-libvirt-{version}.tar.gz"));
    if native {
        let mut install = galaxy(&["install", "--force", "--offline"]);
        install
            .arg(&tarball)
            .arg("-p")
            .arg(target().join("xtask/collections"));
        step("installation of the collection", install)?;
    } else {
        say(&format!("the collection is in {}", tarball.display()));
    }
    Ok(())
}
