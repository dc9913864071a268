//! Resizing disks, and deleting volumes and orphans.
//!
//! Invariant: right before a file is deleted, everybody's chains are looked at
//! again; before one is written, where the plan is not fresh any more.

use std::{collections::BTreeSet, path::Path, time::Duration};

use vmsnap_hypervisor::image;

use super::{Performer, plain};
use crate::{
    observe::{DiskImage, Reading},
    planning::{Done, Fault, Reason},
};

/// How long after a plan nobody is looked for again.
const FRESH: Duration = Duration::from_secs(1);

impl Performer {
    pub(super) async fn resize(
        &self,
        disk: &str,
        bytes: u64,
        shrink: bool,
        online: bool,
    ) -> Result<Done, Fault> {
        if online {
            self.still_grows(disk, bytes).await?;
            self.hypervisor.block_resize(self.vm(), disk, bytes).await?;
            return Ok(Done::Resized { bytes });
        }
        // Steps before may have merged: the path is looked up now.
        let DiskImage { path, format } = self
            .observer
            .disk_image(self.vm(), disk)
            .await?
            .ok_or_else(|| {
                Fault::new(
                    Reason::DiskUnknown,
                    format!("VM '{}' has no disk {disk} any more", self.vm()),
                )
                .with("disk", disk)
            })?;
        match self.hypervisor.volume_by_path(&path).await? {
            Some(volume) => {
                self.hypervisor
                    .volume_resize(&volume.pool, &volume.name, bytes, shrink)
                    .await?;
            }
            None => {
                let format = match format {
                    Some(format) => format,
                    None => image::info(Path::new(&path), None).await?.format,
                };
                image::resize(Path::new(&path), &format, bytes, shrink).await?;
            }
        }
        Ok(Done::Resized { bytes })
    }

    /// QEMU shrinks the disk of a running guest without a question: somebody may have
    /// made it larger since the plan was made.
    async fn still_grows(&self, disk: &str, bytes: u64) -> Result<(), Fault> {
        let Some(DiskImage { path, format }) = self.observer.disk_image(self.vm(), disk).await?
        else {
            return Ok(());
        };
        let now = image::info(Path::new(&path), format.as_deref()).await?;
        if now.virtual_size <= bytes {
            return Ok(());
        }
        Err(Fault::new(
            Reason::ShrinkRefused,
            format!(
                "disk {disk} of VM '{}' has {} bytes by now, more than the {bytes} that it was to \
                 have: a running guest's disk is not shrunk",
                self.vm(),
                now.virtual_size
            ),
        )
        .with("disk", disk)
        .with("present_bytes", now.virtual_size)
        .with("asked_bytes", bytes))
    }

    pub(super) async fn delete_volume(
        &self,
        pool: &str,
        name: &str,
        path: &str,
    ) -> Result<Done, Fault> {
        self.nobody_uses(path).await?;
        match self.hypervisor.volume_delete(pool, name).await {
            Ok(()) => Ok(plain("")),
            Err(error) if error.is_not_found() => Ok(plain("it is gone already")),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn delete_file(&self, path: &str) -> Result<Done, Fault> {
        self.nobody_uses(path).await?;
        match tokio::fs::remove_file(path).await {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(Fault::new(
                    Reason::StorageNotWritable,
                    format!("the orphan '{path}' cannot be deleted: {error}"),
                )
                .with("path", path));
            }
        }
        self.journal.forget_files(vec![path.to_owned()]).await?;
        Ok(plain(""))
    }

    /// Refuses what another VM came to use since the plan was made, where that is some
    /// time ago: steps before may have taken long, and somebody may have made a clone.
    pub(super) async fn came_into_use(&self, paths: Vec<String>) -> Result<(), Fault> {
        let Some(facts) = &self.facts else {
            return Ok(());
        };
        let age = jiff::Timestamp::now().duration_since(facts.now);
        if Duration::try_from(age).is_ok_and(|age| age < FRESH) {
            return Ok(());
        }
        let users = self
            .observer
            .users_of_files(paths.clone(), Reading::Known)
            .await?;
        for path in paths {
            let others: BTreeSet<&str> = users
                .get(&path)
                .into_iter()
                .flatten()
                .map(|user| user.vm.as_str())
                .filter(|vm| *vm != self.vm())
                .collect();
            if !others.is_empty() {
                let others: Vec<&str> = others.into_iter().collect();
                return Err(Fault::new(
                    Reason::FileShared,
                    format!(
                        "'{path}' came into use by {} since the plan was made, and is neither \
                         written nor deleted",
                        others.join(", ")
                    ),
                )
                .with("path", path)
                .with("users", others.join(",")));
            }
        }
        Ok(())
    }

    async fn nobody_uses(&self, path: &str) -> Result<(), Fault> {
        let users = self
            .observer
            .users_of_files(vec![path.to_owned()], Reading::Fresh)
            .await?;
        match users.get(path).filter(|users| !users.is_empty()) {
            None => Ok(()),
            Some(users) => {
                let names: Vec<&str> = users.iter().map(|user| user.vm.as_str()).collect();
                Err(Fault::new(
                    Reason::FileShared,
                    format!(
                        "'{path}' came into use by {} since the plan was made; it stays",
                        names.join(", ")
                    ),
                )
                .with("path", path)
                .with("users", names.join(",")))
            }
        }
    }
}
