//! Figures for those who watch a host: room in pools, depth of chains.
//!
//! Invariant: what one pool or VM does not answer is left out, and does not keep
//! the others from being told.

use std::path::PathBuf;

use rustix::fs::statvfs;
use vmsnap_hypervisor::{Xml, image};

use super::{Observer, each};
use crate::{operate::readings::PoolRoom, planning::Fault};

/// Kinds of pools that are folders: their room is the file system's, which
/// libvirt looks at only when the pool is refreshed.
const FOLDERS: [&str; 3] = ["dir", "fs", "netfs"];

impl Observer {
    /// Room in the active pools, by name.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn pool_rooms(&self) -> Result<Vec<PoolRoom>, Fault> {
        let pools = self.hypervisor.pools().await?;
        // A network file system may hang: it keeps one thread, and nobody waits.
        let read = tokio::task::spawn_blocking(move || {
            let mut rooms: Vec<PoolRoom> = pools
                .into_iter()
                .filter(|pool| pool.active)
                .map(|pool| {
                    let space = pool
                        .path
                        .as_ref()
                        .filter(|_| FOLDERS.contains(&pool.kind.as_str()))
                        .and_then(|path| statvfs(path.as_str()).ok());
                    match space {
                        Some(space) => PoolRoom {
                            name: pool.name,
                            capacity: space.f_blocks.saturating_mul(space.f_frsize),
                            available: space.f_bavail.saturating_mul(space.f_frsize),
                        },
                        None => PoolRoom {
                            name: pool.name,
                            capacity: pool.capacity,
                            available: pool.available,
                        },
                    }
                })
                .collect();
            rooms.sort_by(|a, b| a.name.cmp(&b.name));
            rooms
        });
        Ok(read.await.unwrap_or_default())
    }

    /// VMs with the number of images in the deepest chain of their disks.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn chain_depths(&self) -> Result<Vec<(String, usize)>, Fault> {
        let names: Vec<String> = self.vms().await?.into_iter().map(|vm| vm.name).collect();
        let depths = each(names, |name| {
            let hypervisor = self.hypervisor.clone();
            async move {
                let Ok(definition) = hypervisor.definition(&name, Xml::Live).await else {
                    return Ok(None);
                };
                let mut deepest = None;
                for disk in definition.disks.iter().filter(|disk| !disk.readonly) {
                    let Some(path) = disk.path.clone().map(PathBuf::from) else {
                        continue;
                    };
                    if let Ok(chain) = image::chain(&path, disk.format.as_deref()).await {
                        deepest = deepest.max(Some(chain.len()));
                    }
                }
                Ok(deepest.map(|depth| (name, depth)))
            }
        })
        .await?;
        Ok(depths.into_iter().flatten().collect())
    }
}
