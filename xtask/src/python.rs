//! The Python programs: a virtual environment in the target folder.
//!
//! Invariant: what is installed is exactly what the lists beside this package
//! pin; a list that is installed already costs nothing.

use std::{env, ffi::OsString, fs, path::PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::{
    checkout,
    run::{command, output, step},
    target,
};

/// What tests and demo call.
pub const TOOLS: &str = "python-requirements.txt";
/// What builds for old hosts.
pub const PACKAGING: &str = "package-requirements.txt";
/// The test runner.
pub const RUNNER: &str = "runner-requirements.txt";
/// The oldest Python that the pinned ansible-core runs on.
const OLDEST: &str = "(3, 11)";

/// A program of the environment.
pub fn tool(name: &str) -> PathBuf {
    folder().join("bin").join(name)
}

fn folder() -> PathBuf {
    target().join("xtask/venv")
}

/// `PATH` with the environment's programs first.
///
/// # Errors
/// When the target folder's name has a colon.
pub fn path() -> Result<OsString> {
    let others = env::var_os("PATH").unwrap_or_default();
    env::join_paths(std::iter::once(folder().join("bin")).chain(env::split_paths(&others)))
        .context("the target folder cannot be part of PATH")
}

/// Whether the environment is there and its Python still is.
pub fn is_made() -> bool {
    output(command(tool("python3"), ["-c", "import pip"])).is_some()
}

/// Whether a Python is found that can make the environment.
pub fn can_be_made() -> bool {
    interpreter().is_some()
}

/// The first Python that is new enough and has what makes an environment.
fn interpreter() -> Option<&'static str> {
    let probe = format!("import sys, ensurepip, venv; sys.exit(sys.version_info < {OLDEST})");
    ["python3", "python3.13", "python3.12", "python3.11"]
        .into_iter()
        .find(|name| output(command(name, ["-c", &probe])).is_some())
}

/// Installs a list, unless it was installed before.
///
/// # Errors
/// When it cannot be had.
pub fn install(list: &str) -> Result<()> {
    let file = checkout().join("xtask").join(list);
    let wanted =
        fs::read_to_string(&file).with_context(|| format!("{} cannot be read", file.display()))?;
    let stamp = folder().join(list);
    let made = is_made();
    if made && fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    if !made {
        let Some(python) = interpreter() else {
            bail!("no Python 3.11 or newer with its modules venv and ensurepip was found");
        };
        let make = command(
            python,
            [
                "-m".as_ref(),
                "venv".as_ref(),
                "--clear".as_ref(),
                folder().as_os_str(),
            ],
        );
        step("Python environment", make)?;
    }
    let mut pip = command(
        tool("python3"),
        [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "-r",
        ],
    );
    pip.arg(&file);
    step(&format!("Python programs of {list}"), pip)?;
    fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))
}
