//! A folder in which nobody but root may make or remove a file, until dropped.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::Result;

/// A closed folder.
#[derive(Debug)]
pub struct Closed(PathBuf);

impl Closed {
    /// Closes a folder.
    ///
    /// # Errors
    /// When it is not there.
    pub fn new(folder: &Path) -> Result<Self> {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o555))?;
        Ok(Self(folder.to_owned()))
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        let _ = fs::set_permissions(&self.0, fs::Permissions::from_mode(0o755));
    }
}
