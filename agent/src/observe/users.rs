//! Who refers to which file, over all VMs: running, defined, or in a snapshot.
//!
//! Invariant: a backing file is as much in use as the image on top of it.

use std::{collections::BTreeMap, path::Path};

use vmsnap_hypervisor::{
    DiskSource, DomainDefinition, DomainSummary, SnapshotMemoryInfo, Xml, image,
};

use super::{Observer, identity};
use crate::planning::{Fault, Reason, facts::FileUser};

type Users = BTreeMap<String, Vec<FileUser>>;

fn add(users: &mut Users, path: &str, user: &FileUser) {
    let list = users.entry(path.to_owned()).or_default();
    if !list.contains(user) {
        list.push(user.clone());
    }
}

impl Observer {
    /// All files that any VM refers to.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn users(&self) -> Result<Users, Fault> {
        let mut users = Users::new();
        for domain in self.hypervisor.list_domains().await? {
            match self.users_of(&domain, &mut users).await {
                // Gone since it was listed.
                Err(fault) if fault.reason == crate::planning::Reason::VmNotFound => {}
                other => other?,
            }
        }
        Ok(users)
    }

    /// All files that any VM refers to; those of `paths` also where a VM knows
    /// them by another path.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn users_of_files(&self, paths: Vec<String>) -> Result<Users, Fault> {
        let mut users = self.users().await?;
        let united = tokio::task::spawn_blocking(move || {
            identity::unite(&mut users, paths);
            users
        });
        united.await.map_err(|error| {
            Fault::new(
                Reason::Internal,
                format!("files could not be compared: {error}"),
            )
        })
    }

    /// Adds what one VM refers to.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub(super) async fn users_of(
        &self,
        domain: &DomainSummary,
        users: &mut Users,
    ) -> Result<(), Fault> {
        let user = FileUser {
            vm: domain.name.clone(),
            snapshot: None,
        };
        let mut views = vec![Xml::Live];
        if domain.persistent {
            views.push(Xml::Inactive);
        }
        for view in views {
            let definition = self.hypervisor.definition(&domain.name, view).await?;
            self.definition(&definition, &user, users).await;
        }
        for snapshot in self.hypervisor.snapshots(&domain.name).await? {
            let user = FileUser {
                vm: domain.name.clone(),
                snapshot: Some(snapshot.name.clone()),
            };
            for disk in &snapshot.disks {
                if let Some(file) = &disk.file {
                    self.chain(file, &user, users).await;
                }
            }
            for disk in &snapshot.revert_disks {
                if let Some(file) = &disk.file {
                    self.chain(file, &user, users).await;
                }
            }
            if let SnapshotMemoryInfo::External { file } = &snapshot.memory {
                add(users, file, &user);
            }
            if let Some(definition) = &snapshot.definition {
                self.definition(definition, &user, users).await;
            }
        }
        for (name, record) in self.journal.snapshot_records(&domain.uuid).await? {
            if let Some(copy) = &record.nvram_copy {
                let user = FileUser {
                    vm: domain.name.clone(),
                    snapshot: Some(name),
                };
                add(users, copy, &user);
            }
        }
        Ok(())
    }

    async fn definition(&self, definition: &DomainDefinition, user: &FileUser, users: &mut Users) {
        for disk in &definition.disks {
            match (&disk.path, disk.source) {
                (Some(volume), DiskSource::Volume) => {
                    if let Some(path) = self.volume(volume).await {
                        self.chain(&path, user, users).await;
                    }
                }
                (Some(path), _) => self.chain(path, user, users).await,
                (None, _) => {}
            }
            for image in &disk.backing {
                add(users, &image.path, user);
            }
            if let Some(mirror) = &disk.mirror {
                self.chain(&mirror.path, user, users).await;
            }
        }
        if let Some(nvram) = definition
            .nvram
            .as_ref()
            .and_then(|nvram| nvram.path.as_ref())
        {
            add(users, nvram, user);
        }
        for path in [&definition.kernel, &definition.initrd]
            .into_iter()
            .flatten()
        {
            add(users, path, user);
        }
    }

    /// The path of what a definition names as `pool/volume`. A pool that is not
    /// active tells none, but where it lies.
    async fn volume(&self, named: &str) -> Option<String> {
        let (pool, volume) = named.rsplit_once('/')?;
        if let Ok(Some(path)) = self.hypervisor.volume_path(pool, volume).await {
            return Some(path);
        }
        let folder = self.hypervisor.pool(pool).await.ok()??.path?;
        Some(format!("{folder}/{volume}"))
    }

    /// A file and all that it stands on. A chain that was walked for this user
    /// before is not walked again.
    async fn chain(&self, path: &str, user: &FileUser, users: &mut Users) {
        if !path.starts_with('/') || users.get(path).is_some_and(|list| list.contains(user)) {
            return;
        }
        add(users, path, user);
        // An image that is gone or unreadable refers to nothing that is known.
        if let Ok(chain) = image::chain(Path::new(path)).await {
            for image in chain {
                add(users, &image.path, user);
            }
        }
    }
}
