//! A pool that is soon full: a file system in memory, small or with few files.

use std::{fs, path::PathBuf};

use anyhow::Result;

use crate::{
    command::{privileged, succeed},
    domain::Lab,
};

/// A small pool; gone with all that lies in it when dropped. Domains whose disks
/// lie there have to be dropped before.
#[derive(Debug)]
pub struct SmallPool {
    lab: Lab,
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
        let name = format!("small{}", std::process::id());
        let folder = self.folder.join(&name);
        fs::create_dir(&folder)?;
        let pool = SmallPool {
            lab: self.clone(),
            name,
            folder,
        };
        let shown = pool.folder.display().to_string();
        let options = format!("{options},mode=0777");
        succeed(&mut privileged([
            "mount", "-t", "tmpfs", "-o", &options, "tmpfs", &shown,
        ]))?;
        self.virsh(["pool-define-as", &pool.name, "dir", "--target", &shown])?;
        self.virsh(["pool-start", &pool.name])?;
        Ok(pool)
    }
}

impl SmallPool {
    /// Writes a file until nothing more fits.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn fill(&self) -> Result<()> {
        use std::io::Write as _;
        let mut filler = fs::File::create(self.folder.join("filler"))?;
        while filler.write_all(&[1; 4096]).is_ok() {}
        Ok(())
    }
}

impl Drop for SmallPool {
    fn drop(&mut self) {
        // A test that failed is told of its own failure, not of these.
        for word in ["pool-destroy", "pool-undefine"] {
            let _ = self.lab.virsh([word, &self.name]);
        }
        let shown = self.folder.display().to_string();
        let _ = succeed(&mut privileged(["umount", &shown]));
        let _ = fs::remove_dir(&self.folder);
    }
}
