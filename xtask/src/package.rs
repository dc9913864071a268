//! Building what is handed out: the collection's tarball and the command line.
//!
//! Invariants: what is published runs on hosts with glibc 2.17, and that is
//! looked up in the files; the same source comes out as the same bytes; the collection
//! for the tests holds this host's own
//! build and lies elsewhere, so that the two are never taken for each other.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    checkout, packages, python,
    run::{command, output, say, step},
    setup, target,
};

/// The oldest glibc that what is published runs with.
const GLIBC: (u32, u32) = (2, 17);
/// The platform that is built for.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";
/// Where the collection's module links point to.
const MODULE: &str = "plugins/bin/vm-snapshot-x86_64";
/// What git and Ansible leave in the collection's folder, not part of it.
const LEFT_OVERS: &[&str] = &[".ansible", ".git", "output", "__pycache__", "bin"];

/// Builds what is published, into `target/package`.
///
/// # Errors
/// When a step fails, or a program needs a newer glibc.
pub fn publish() -> Result<()> {
    let _alone = setup::alone()?;
    python::install(python::PACKAGING)?;
    let (major, minor) = GLIBC;
    let mut zig = command(
        python::tool("cargo-zigbuild"),
        ["zigbuild", "--locked", "--profile", "module"],
    );
    zig.args([
        "--package",
        "vmsnap-ansible-module",
        "--package",
        "vmsnap-cli",
    ])
    .args(["--target", &format!("{PLATFORM}.{major}.{minor}")])
    .env("PATH", python::path()?);
    step("module and command line for old hosts", zig)?;
    let built = target().join(PLATFORM).join("module");
    let (module, cli) = (built.join("vm-snapshot"), built.join("vmsnap"));
    for program in [&module, &cli] {
        check_glibc(program)?;
    }
    let source = checkout().join("collection");
    place(&module, &source.join(MODULE))?;
    let folder = target().join("package");
    place(&cli, &folder.join(format!("vmsnap-{PLATFORM}")))?;
    let tarball = collection(&source, &module, &folder)?;
    say(&format!(
        "built: {} and the command line beside it",
        tarball.display()
    ));
    packages::publish()
}

/// Packages the collection with the module of `cargo build --workspace` and
/// installs it where tests and demo look for it.
///
/// # Errors
/// When a step fails.
pub fn install_native() -> Result<()> {
    let _alone = setup::alone()?;
    let folder = target().join("xtask/native");
    let module = folder.join("vm-snapshot");
    place(&target().join("debug/vm-snapshot"), &module)?;
    // Debug information would travel with every task.
    let mut strip = command("strip", ["--strip-debug"]);
    strip.arg(&module);
    step("strip", strip)?;
    let tarball = collection(&checkout().join("collection"), &module, &folder)?;
    let mut install = galaxy(&["install", "--force", "--offline"]);
    install.arg(&tarball).arg("-p").arg(collections());
    step("installation of the collection", install)
}

/// Builds the tarball from a copy of the collection with the given module.
fn collection(source: &Path, module: &Path, into: &Path) -> Result<PathBuf> {
    let copy = into.join("collection");
    if copy.exists() {
        fs::remove_dir_all(&copy).with_context(|| format!("cannot remove {}", copy.display()))?;
    }
    copy_tree(source, &copy)?;
    place(module, &copy.join(MODULE))?;
    let mut build = galaxy(&["build", "--force", "--output-path"]);
    build.arg(into).arg(&copy);
    step("collection", build)?;
    fs::remove_dir_all(&copy).with_context(|| format!("cannot remove {}", copy.display()))?;
    // One version for the workspace; Ansible reads its own file.
    let tarball = into.join(format!(
        "vmsnap-libvirt-{}.tar.gz",
        env!("CARGO_PKG_VERSION")
    ));
    if !tarball.is_file() {
        bail!(
            "{} was not built: the version in collection/galaxy.yml is not the workspace's",
            tarball.display()
        );
    }
    level(&tarball)?;
    Ok(tarball)
}

/// The time that is put for that of the build, in seconds since 1970:
/// `SOURCE_DATE_EPOCH`, or else the last commit's; none without either.
pub fn epoch() -> Option<String> {
    let of_commit = || output(command("git", ["log", "-1", "--format=%ct"]));
    let set = std::env::var("SOURCE_DATE_EPOCH").ok();
    Some(set.or_else(of_commit)?.trim().to_owned()).filter(|epoch| !epoch.is_empty())
}

/// Packs a tarball anew, in order and without the time and the user of the build.
fn level(tarball: &Path) -> Result<()> {
    let Some(epoch) = epoch() else {
        return Ok(());
    };
    let folder = tarball.with_extension("unpacked");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    let mut unpack = command("tar", ["-xzf"]);
    unpack.arg(tarball).arg("-C").arg(&folder);
    step("files of the collection", unpack)?;
    let mut names: Vec<_> = fs::read_dir(&folder)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<Result<_, _>>()?;
    names.sort();
    let mut pack = command("tar", ["--sort=name", "--owner=0", "--group=0"]);
    pack.args(["--numeric-owner", "--format=ustar", "-I", "gzip -9n"])
        .arg(format!("--mtime=@{epoch}"))
        .arg("-C")
        .arg(&folder)
        .arg("-cf")
        .arg(tarball)
        .args(names);
    step("tarball of the collection", pack)?;
    fs::remove_dir_all(&folder)?;
    Ok(())
}

/// Where tests and demo look for the collection.
fn collections() -> PathBuf {
    target().join("xtask/collections")
}

fn galaxy(words: &[&str]) -> std::process::Command {
    let mut galaxy = command(python::tool("ansible-galaxy"), ["collection"]);
    galaxy
        .args(words)
        .env("ANSIBLE_COLLECTIONS_PATH", collections())
        .env("ANSIBLE_HOME", target().join("xtask/ansible-home"))
        .env("ANSIBLE_NOCOLOR", "1")
        .env("LC_ALL", "C.UTF-8");
    galaxy
}

/// Copies an executable to a new file, so that one that runs now keeps its own.
pub fn place(from: &Path, to: &Path) -> Result<()> {
    let fresh = to.with_extension("new");
    let put = || {
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::copy(from, &fresh)?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755))?;
        fs::rename(&fresh, to)
    };
    put().with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// Copies a folder; links stay links.
pub fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let copy = || -> std::io::Result<Vec<(PathBuf, PathBuf)>> {
        fs::create_dir_all(to)?;
        let mut folders = Vec::new();
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            if LEFT_OVERS.iter().any(|name| entry.file_name() == *name) {
                continue;
            }
            let (source, copy) = (entry.path(), to.join(entry.file_name()));
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push((source, copy));
            } else if kind.is_symlink() {
                symlink(fs::read_link(&source)?, &copy)?;
            } else {
                fs::copy(&source, &copy)?;
            }
        }
        Ok(folders)
    };
    let folders =
        copy().with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    folders
        .iter()
        .try_for_each(|(from, to)| copy_tree(from, to))
}

/// Refuses a program that needs a newer glibc than [`GLIBC`].
fn check_glibc(program: &Path) -> Result<()> {
    let bytes =
        fs::read(program).with_context(|| format!("{} was not built", program.display()))?;
    match newest_glibc(&bytes) {
        Some(newest) if newest > GLIBC => bail!(
            "{} needs glibc {}.{}, and {}.{} is promised",
            program.display(),
            newest.0,
            newest.1,
            GLIBC.0,
            GLIBC.1
        ),
        _ => Ok(()),
    }
}

/// The newest version of glibc's symbols that a program names.
fn newest_glibc(program: &[u8]) -> Option<(u32, u32)> {
    let newest = newest_symbol(program, b"GLIBC_")?;
    Some((*newest.first()?, *newest.get(1)?))
}

/// The newest version of a library's symbols that a program names, such as 2.17
/// in `GLIBC_2.17`.
pub fn newest_symbol(program: &[u8], mark: &[u8]) -> Option<Vec<u32>> {
    program
        .windows(mark.len())
        .enumerate()
        .filter(|(_, window)| *window == mark)
        .filter_map(|(at, _)| {
            let rest = &program[at + mark.len()..];
            let end = rest
                .iter()
                .position(|byte| !byte.is_ascii_digit() && *byte != b'.')?;
            let version = std::str::from_utf8(&rest[..end]).ok()?;
            let parts: Option<Vec<u32>> =
                version.split('.').map(|part| part.parse().ok()).collect();
            parts.filter(|parts| parts.len() > 1)
        })
        .max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_glibc_that_a_program_names_is_found() {
        let program = b"\0GLIBC_2.2.5\0GLIBC_2.17\0GLIBC_2.9\0GLIBC_PRIVATE\0GLIBC_";
        assert_eq!(newest_glibc(program), Some((2, 17)));
        assert_eq!(newest_glibc(b"static"), None);
    }
}
