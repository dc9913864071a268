//! Who refers to which file, over all VMs: running, defined, or in a snapshot.
//!
//! Invariants
//! - A backing file is as much in use as the image on top of it, also below one
//!   that cannot be read.
//! - Each image is read once a reading, however many snapshots stand on it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use vmsnap_hypervisor::{DiskSource, DomainDefinition, SnapshotInfo, SnapshotMemoryInfo, image};

use super::{Observer, Reading, each, identity};
use crate::planning::{Fault, Reason, facts::FileUser};

type Users = BTreeMap<String, BTreeSet<FileUser>>;

/// Chains that were walked: the paths from an image, as opened in a format, down.
#[derive(Debug, Clone, Default)]
struct Chains(Arc<Mutex<HashMap<Opened, Below>>>);

/// A path, and the format in which it is opened.
type Opened = (String, Option<String>);

/// A chain, and where in it an image is.
type Below = (Arc<[String]>, usize);

impl Chains {
    async fn of(&self, path: &str, format: Option<&str>) -> Vec<String> {
        let opened = (path.to_owned(), format.map(str::to_owned));
        if let Some((chain, at)) = self.lock().get(&opened) {
            return chain[*at..].to_vec();
        }
        // What is below an image that is gone or unreadable is not known.
        let (images, _) = image::reach(Path::new(path), format).await;
        let formats = std::iter::once(opened.1.clone())
            .chain(images.iter().map(|image| image.backing_format.clone()));
        let keys: Vec<Opened> = images
            .iter()
            .map(|image| image.path.clone())
            .zip(formats)
            .collect();
        let chain: Arc<[String]> = images.into_iter().map(|image| image.path).collect();
        let mut all = self.lock();
        // The name that was asked for, should QEMU have another for it.
        all.insert(opened, (chain.clone(), 0));
        for (at, key) in keys.into_iter().enumerate() {
            all.entry(key).or_insert_with(|| (chain.clone(), at));
        }
        chain.to_vec()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Opened, Below>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one VM or snapshot refers to.
struct Referring<'a> {
    observer: &'a Observer,
    user: FileUser,
    chains: &'a Chains,
    users: &'a mut Users,
}

impl Referring<'_> {
    fn file(&mut self, path: &str) {
        let users = self.users.entry(path.to_owned()).or_default();
        if !users.contains(&self.user) {
            users.insert(self.user.clone());
        }
    }

    /// A file and all that it stands on.
    async fn chain(&mut self, path: &str, format: Option<&str>) {
        if !path.starts_with('/') {
            return;
        }
        self.file(path);
        for below in self.chains.of(path, format).await {
            self.file(&below);
        }
    }

    async fn definition(&mut self, definition: &DomainDefinition) -> Result<(), Fault> {
        for disk in &definition.disks {
            let format = disk.format.as_deref();
            match (&disk.path, disk.source) {
                (Some(volume), DiskSource::Volume) => {
                    if let Some(path) = self.observer.volume(volume).await? {
                        self.chain(&path, format).await;
                    }
                }
                (Some(path), _) => self.chain(path, format).await,
                (None, _) => {}
            }
            for image in &disk.backing {
                self.file(&image.path);
            }
            if let Some(mirror) = &disk.mirror {
                self.chain(&mirror.path, None).await;
            }
        }
        let nvram = definition.nvram.as_ref();
        for path in [
            nvram.and_then(|nvram| nvram.path.as_ref()),
            definition.kernel.as_ref(),
            definition.initrd.as_ref(),
        ]
        .into_iter()
        .flatten()
        {
            self.file(path);
        }
        Ok(())
    }

    async fn snapshot(&mut self, snapshot: &SnapshotInfo) -> Result<(), Fault> {
        for disk in snapshot.disks.iter().chain(&snapshot.revert_disks) {
            if let Some(file) = &disk.file {
                self.chain(file, disk.format.as_deref()).await;
            }
        }
        if let SnapshotMemoryInfo::External { file } = &snapshot.memory {
            self.file(file);
        }
        if let Some(definition) = &snapshot.definition {
            self.definition(definition).await?;
        }
        Ok(())
    }
}

impl Observer {
    /// All files that any VM refers to.
    ///
    /// # Errors
    /// When libvirt does not answer.
    async fn users(&self, reading: Reading) -> Result<BTreeMap<String, Vec<FileUser>>, Fault> {
        let chains = Chains::default();
        let domains = self.hypervisor.domain_names().await?;
        let found = each(domains, |(name, uuid)| {
            let (observer, chains) = (self.clone(), chains.clone());
            async move {
                let mut users = Users::new();
                match observer
                    .users_of(&name, &uuid, reading, &chains, &mut users)
                    .await
                {
                    // Gone since it was listed.
                    Err(fault) if fault.reason == Reason::VmNotFound => Ok(Users::new()),
                    Err(fault) => Err(fault),
                    Ok(()) => Ok(users),
                }
            }
        })
        .await?;
        let mut all = Users::new();
        for users in found {
            for (path, users) in users {
                all.entry(path).or_default().extend(users);
            }
        }
        Ok(all
            .into_iter()
            .map(|(path, users)| (path, users.into_iter().collect()))
            .collect())
    }

    /// All files that any VM refers to; those of `paths` also where a VM knows
    /// them by another path.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn users_of_files(
        &self,
        paths: Vec<String>,
        reading: Reading,
    ) -> Result<BTreeMap<String, Vec<FileUser>>, Fault> {
        let mut users = self.users(reading).await?;
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

    /// The path of what a definition names as `pool/volume`. A pool that is not
    /// active tells none, but where it lies.
    async fn volume(&self, named: &str) -> Result<Option<String>, Fault> {
        let Some((pool, volume)) = named.rsplit_once('/') else {
            return Ok(None);
        };
        if let Some(path) = self.hypervisor.volume_path(pool, volume).await? {
            return Ok(Some(path));
        }
        let folder = self.hypervisor.pool(pool).await?.and_then(|it| it.path);
        Ok(folder.map(|folder| format!("{folder}/{volume}")))
    }

    /// Adds what one VM refers to.
    async fn users_of(
        &self,
        name: &str,
        uuid: &str,
        reading: Reading,
        chains: &Chains,
        users: &mut Users,
    ) -> Result<(), Fault> {
        let mut referring = Referring {
            observer: self,
            user: FileUser {
                vm: name.to_owned(),
                snapshot: None,
            },
            chains,
            users,
        };
        for definition in self.hypervisor.definitions(name).await? {
            referring.definition(&definition).await?;
        }
        for snapshot in self.listed(name, reading).await? {
            referring.user.snapshot = Some(snapshot.name.clone());
            referring.snapshot(&snapshot).await?;
        }
        for (snapshot, record) in self.journal.snapshot_records(uuid).await? {
            if let Some(copy) = &record.nvram_copy {
                referring.user.snapshot = Some(snapshot);
                referring.file(copy);
            }
        }
        Ok(())
    }
}
