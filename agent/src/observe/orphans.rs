//! Files that belong to a VM and that nobody refers to.
//!
//! They are found by looking: a file that this agent noted before it made it for
//! this VM, an image that stands, directly or through others, on one of the VM's,
//! or a file in which libvirt kept the VM's memory. A name proves nothing.
//!
//! Invariants: reads only; what any chain of any VM names is no orphan;
//! a file is *ours* only where the journal says that it was made for this VM. An
//! overlay that was made for another VM may hold that one's present state: a
//! transient VM is not listed while it is off.

use std::{collections::BTreeSet, os::unix::fs::MetadataExt as _, path::Path};

use vmsnap_hypervisor::{image, saved};

use super::Observer;
use crate::planning::facts::{Facts, Orphan};

impl Observer {
    /// The orphans of a VM, by path.
    pub(super) async fn orphans(&self, facts: &Facts) -> Vec<Orphan> {
        let Some(users) = &facts.users else {
            return Vec::new();
        };
        let own = own_images(facts);
        let mut orphans = Vec::new();
        for (path, folder) in &facts.folders {
            for name in &folder.names {
                let file = format!("{}/{name}", path.trim_end_matches('/'));
                if users.contains_key(&file) {
                    continue;
                }
                let Ok(metadata) = tokio::fs::symlink_metadata(&file).await else {
                    continue;
                };
                if !metadata.is_file() {
                    continue;
                }
                let ours = facts.ours.contains(&file);
                if ours
                    || stands_on(&file, &own).await
                    || holds_memory_of(&file, &facts.vm.uuid).await
                {
                    orphans.push(Orphan {
                        size: metadata.blocks() * 512,
                        path: file,
                        ours,
                    });
                }
            }
        }
        orphans.sort_by(|a, b| a.path.cmp(&b.path));
        orphans
    }
}

/// Images of the VM, present or in a snapshot.
fn own_images(facts: &Facts) -> BTreeSet<&str> {
    let chains = facts.vm.disks.iter().flat_map(|disk| &disk.chain);
    let snapshots = facts.snapshots.iter().flat_map(|one| &one.disks);
    chains
        .map(|image| image.path.as_str())
        .chain(snapshots.flat_map(|disk| disk.data.as_deref()))
        .collect()
}

/// Whether an image stands on one of the VM's, directly or through others.
async fn stands_on(file: &str, own: &BTreeSet<&str>) -> bool {
    let (chain, _) = image::reach(Path::new(file), None).await;
    chain
        .iter()
        .skip(1)
        .any(|image| own.contains(image.path.as_str()))
}

/// Whether libvirt kept memory of a VM in a file.
async fn holds_memory_of(file: &str, uuid: &str) -> bool {
    let file = file.to_owned();
    let owner = tokio::task::spawn_blocking(move || saved::owner(Path::new(&file))).await;
    owner.is_ok_and(|owner| owner.is_ok_and(|owner| owner.as_deref() == Some(uuid)))
}
