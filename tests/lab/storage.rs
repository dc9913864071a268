//! Small file systems, read-only folders and block devices, which only root can
//! make.
//!
//! Invariant: each is gone when dropped, also while a guest has a file on it open.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::Result;

use crate::{
    command::{privileged, succeed},
    domain::Lab,
};

/// A mounted folder; unmounted when dropped.
#[derive(Debug)]
pub struct Mount {
    /// Where it is mounted.
    pub folder: PathBuf,
    /// The folder was made for it.
    own: bool,
}

impl Lab {
    /// A file system of so many MiB.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub fn small(&self, mib: u32) -> Result<Mount> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = self
            .folder
            .join(format!("small-{}-{number}", std::process::id()));
        fs::create_dir(&folder)?;
        let mount = Mount { folder, own: true };
        let options = format!("size={mib}m,mode=0777");
        let shown = mount.folder.display().to_string();
        succeed(&mut privileged([
            "mount", "-t", "tmpfs", "-o", &options, "tmpfs", &shown,
        ]))?;
        Ok(mount)
    }

    /// Makes a folder read-only for everybody, as a read-only mount of itself.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub fn read_only(&self, folder: &Path) -> Result<Mount> {
        let shown = folder.display().to_string();
        succeed(&mut privileged(["mount", "--bind", &shown, &shown]))?;
        let mount = Mount {
            folder: folder.to_owned(),
            own: false,
        };
        let words = ["mount", "-o", "remount,bind,ro", &shown];
        succeed(&mut privileged(words))?;
        Ok(mount)
    }

    /// A block device over a file.
    ///
    /// # Errors
    /// When there is no loop device to be had.
    pub fn block_device(&self, file: &Path) -> Result<BlockDevice> {
        let shown = file.display().to_string();
        let made = succeed(&mut privileged(["losetup", "-f", "--show", &shown]))?;
        let device = BlockDevice(made.trim().to_owned());
        let owner = format!("{}:{}", self.user.uid, self.user.gid);
        succeed(&mut privileged(["chown", &owner, &device.0]))?;
        Ok(device)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let folder = self.folder.display().to_string();
        let _ = succeed(&mut privileged(["umount", "-l", &folder]));
        if self.own {
            let _ = fs::remove_dir(&self.folder);
        }
    }
}

/// A block device over a file; gone when dropped.
#[derive(Debug)]
pub struct BlockDevice(String);

impl BlockDevice {
    /// Its path.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        let _ = succeed(&mut privileged(["chown", "root:root", &self.0]));
        let _ = succeed(&mut privileged(["losetup", "-d", &self.0]));
    }
}
