//! Resizing disks, and deleting volumes and orphans.
//!
//! Invariant: right before a file is deleted, everybody's chains are looked at
//! again.

use std::path::Path;

use vmsnap_hypervisor::image;

use super::{Performer, plain};
use crate::{
    observe::{DiskImage, Reading},
    planning::{Done, Fault, Reason},
};

impl Performer {
    pub(super) async fn resize(
        &self,
        disk: &str,
        bytes: u64,
        shrink: bool,
        online: bool,
    ) -> Result<Done, Fault> {
        if online {
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
