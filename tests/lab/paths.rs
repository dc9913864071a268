//! Where things are: the checkout, what was built, and what set-up left.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The checkout's own folder.
#[must_use]
pub fn checkout() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Cargo's target folder.
#[must_use]
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => checkout().join(folder),
        None => checkout().join("target"),
    }
}

/// What set-up and the lab keep between runs.
#[must_use]
pub fn kept() -> PathBuf {
    target().join("xtask")
}

/// A program of the Python environment that set-up made.
#[must_use]
pub fn python_tool(name: &str) -> PathBuf {
    kept().join("venv/bin").join(name)
}

/// Where the packaged collection is installed for tests.
#[must_use]
pub fn collections() -> PathBuf {
    kept().join("collections")
}

/// A binary of this workspace, built beside the program that runs now.
///
/// # Errors
/// When it has not been built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe().context("cannot find the program that runs")?;
    let mut folder = me.parent().unwrap_or(Path::new("/")).to_path_buf();
    if folder.ends_with("deps") {
        folder.pop();
    }
    let path = folder.join(name);
    anyhow::ensure!(
        path.is_file(),
        "{} is not built: run cargo build --workspace",
        path.display()
    );
    Ok(path)
}

/// Looks a program up on `PATH` and in the folders for system programs, which
/// an ordinary user's `PATH` may lack.
#[must_use]
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
}
