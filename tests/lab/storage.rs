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
        self.tmpfs(&format!("size={mib}m"))
    }

    fn tmpfs(&self, options: &str) -> Result<Mount> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = self
            .folder
            .join(format!("small-{}-{number}", std::process::id()));
        fs::create_dir(&folder)?;
        let mount = Mount { folder, own: true };
        let options = format!("{options},mode=0777");
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

/// Fills what is free in a folder with a file `filler`.
///
/// # Errors
/// When the file cannot be made.
pub fn fill(folder: &Path) -> Result<PathBuf> {
    use std::io::Write as _;
    let path = folder.join("filler");
    let mut filler = fs::File::create(&path)?;
    // Large pieces first: whoever waits for room does not win a race against them.
    for piece in [1 << 20, 1 << 16, 1 << 12] {
        while filler.write_all(&vec![1; piece]).is_ok() {}
    }
    Ok(path)
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

/// A small pool; gone with all that lies in it when dropped. Domains whose disks
/// lie there have to be dropped before.
#[derive(Debug)]
pub struct SmallPool {
    lab: Lab,
    mount: Mount,
    /// The pool's name.
    pub name: String,
    /// Its folder.
    pub folder: PathBuf,
}

impl Lab {
    /// Makes a small pool. `options` are tmpfs's own, such as `size=6m`.
    ///
    /// # Errors
    /// When it cannot be mounted, which only root may, or libvirt refuses.
    pub fn small_pool(&self, options: &str) -> Result<SmallPool> {
        let mount = self.tmpfs(options)?;
        let pool = SmallPool {
            lab: self.clone(),
            name: mount
                .folder
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default(),
            folder: mount.folder.clone(),
            mount,
        };
        let shown = pool.folder.display().to_string();
        self.virsh(["pool-define-as", &pool.name, "dir", "--target", &shown])?;
        self.virsh(["pool-start", &pool.name])?;
        Ok(pool)
    }
}

impl SmallPool {
    /// Fills what is free with a file `filler`.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn fill(&self) -> Result<()> {
        fill(&self.mount.folder).map(drop)
    }
}

impl Drop for SmallPool {
    fn drop(&mut self) {
        for word in ["pool-destroy", "pool-undefine"] {
            let _ = self.lab.virsh([word, &self.name]);
        }
    }
}
