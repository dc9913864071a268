//! The hypervisor as facts: one reading of a VM and what surrounds it.
//!
//! Invariants: reads only; sizes are bytes; what could not be read is absent or
//! says why, and is never guessed.

mod figures;
mod folders;
mod half_merged;
mod identity;
mod orphans;
mod snapshots;
mod users;
mod vm;

pub(crate) use half_merged::nanoseconds;

use std::collections::{BTreeMap, BTreeSet};

use jiff::{Timestamp, tz::TimeZone};
use tokio::task::JoinSet;
use tracing::Instrument as _;
use vmsnap_hypervisor::{DiskDefinition, Hypervisor, LinkStatus, Xml};

use crate::{
    config::Config,
    journal::Journal,
    planning::{
        Fault, Reason, Request,
        facts::{
            Facts, Folder, Host, Kind, Memory, Pool, Snapshot, Storage, Vm, VmState, Volume,
            folder_of,
        },
        names,
        request::{Action, IfExists, Orphans},
    },
};

/// Reads facts. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Observer {
    hypervisor: Hypervisor,
    journal: Journal,
    max_chain: u32,
    storage_exclusive: bool,
    compared: half_merged::Compared,
    /// libvirt runs as the agent's own user, or the agent as root: what the agent
    /// may not do, libvirt may not either.
    same_rights: bool,
}

/// A VM in a list.
#[derive(Debug, Clone)]
pub struct VmLine {
    /// Name.
    pub name: String,
    /// UUID.
    pub uuid: String,
    /// State.
    pub state: VmState,
    /// libvirt's reason for it.
    pub reason: String,
    /// vCPUs.
    pub vcpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Number of snapshots.
    pub snapshots: u32,
    /// The run that is changing it.
    pub busy_with: Option<String>,
}

/// How well libvirt has to be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// For a decision: everything anew.
    Fresh,
    /// For a list: what is provably as it was is not asked for again.
    Known,
}

/// VMs that are read at a time: as many as libvirt serves on a connection.
const AT_A_TIME: usize = 4;

/// Does something for each item, some at a time; in the items' order.
async fn each<T, R, F>(
    items: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> F,
) -> Result<Vec<R>, Fault>
where
    R: Send + 'static,
    F: Future<Output = Result<R, Fault>> + Send + 'static,
{
    let mut items = items.into_iter().enumerate();
    // Dropped on an error, and what is still under way with it.
    let mut running = JoinSet::new();
    let mut done = BTreeMap::new();
    loop {
        while running.len() < AT_A_TIME
            && let Some((at, item)) = items.next()
        {
            let work = work(item);
            running.spawn(async move { (at, work.await) }.in_current_span());
        }
        match running.join_next().await {
            None => return Ok(done.into_values().collect()),
            Some(Ok((at, result))) => {
                done.insert(at, result?);
            }
            Some(Err(error)) => {
                return Err(Fault::new(
                    Reason::Internal,
                    format!("reading a VM ended early: {error}"),
                ));
            }
        }
    }
}

/// The image of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskImage {
    /// Path.
    pub path: String,
    /// The format in which the VM opens it; what the image says of itself may
    /// be written by the guest.
    pub format: Option<String>,
}

fn image_of(disk: DiskDefinition) -> Option<DiskImage> {
    Some(DiskImage {
        path: disk.path?,
        format: disk.format,
    })
}

/// Host facts that are only shown.
#[derive(Debug, Clone)]
pub struct HostLine {
    /// Host name.
    pub hostname: String,
    /// Hypervisor type.
    pub hypervisor: String,
    /// libvirt's URI.
    pub uri: String,
}

/// Reads one folder.
#[must_use]
pub fn folder(path: &str) -> Option<Folder> {
    folders::read(path, None)
}

impl Observer {
    /// Over a hypervisor and a journal.
    #[must_use]
    pub fn new(hypervisor: Hypervisor, journal: Journal, config: &Config) -> Self {
        Self {
            hypervisor,
            journal,
            max_chain: config.limits.max_chain,
            storage_exclusive: config.storage.exclusive,
            compared: half_merged::Compared::default(),
            same_rights: config.libvirt.uri.contains("/session")
                || rustix::process::geteuid().is_root(),
        }
    }

    /// Whether libvirt answers, and a way to wait for that to change.
    #[must_use]
    pub fn link(&self) -> tokio::sync::watch::Receiver<LinkStatus> {
        self.hypervisor.status()
    }

    /// Whether libvirt answers.
    #[must_use]
    pub fn is_reachable(&self) -> bool {
        matches!(*self.hypervisor.status().borrow(), LinkStatus::Up)
    }

    /// The hypervisor.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn host(&self) -> Result<(HostLine, Host), Fault> {
        let info = self.hypervisor.host().await?;
        let host = Host {
            libvirt: info.libvirt_version,
            qemu: info.hypervisor_version,
            max_chain: self.max_chain,
            storage_exclusive: self.storage_exclusive,
            time_zone: TimeZone::system()
                .iana_name()
                .unwrap_or_default()
                .to_owned(),
        };
        let line = HostLine {
            hostname: info.hostname,
            hypervisor: info.hypervisor,
            uri: info.uri,
        };
        Ok((line, host))
    }

    /// All VMs, by name.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn vms(&self) -> Result<Vec<VmLine>, Fault> {
        let mut all: Vec<VmLine> = self
            .hypervisor
            .list_domains()
            .await?
            .into_iter()
            .map(|domain| VmLine {
                state: vm::state(domain.state),
                reason: domain.reason.to_string(),
                vcpus: domain.vcpus,
                memory: domain.memory_kib * 1024,
                snapshots: domain.snapshot_count,
                name: domain.name,
                uuid: domain.uuid,
                busy_with: None,
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// All that a plan for this request may depend on.
    ///
    /// # Errors
    /// When there is no such VM, or libvirt or the journal does not answer.
    pub async fn facts(&self, request: &Request) -> Result<Facts, Fault> {
        let (_, host) = self.host().await?;
        let mut vm = self.named_vm(&request.vm).await?;
        let now = Timestamp::now();
        let snapshots = self.snapshots(&mut vm).await?;
        let mut storage = self.storage(&request.pool).await?;
        let folders = self.folders(&vm, &snapshots, &storage).await;
        let guard = self.journal.open_guard(&vm.uuid).await?;
        let users = match needs_users(&request.action, &snapshots, &host) {
            Some(reading) => {
                let looked_up = looked_up(&request.action, &vm, &snapshots, &storage, &folders);
                Some(self.users_of_files(looked_up, reading).await?)
            }
            None => None,
        };
        if let Some(users) = &users {
            for volume in &mut storage.volumes {
                let names: BTreeSet<String> = users
                    .get(&volume.path)
                    .into_iter()
                    .flatten()
                    .map(|user| user.vm.clone())
                    .collect();
                volume.used_by = names.into_iter().collect();
            }
        }
        let ours = self.ours(&vm.name).await?;
        let mut facts = Facts {
            now,
            host,
            vm,
            snapshots,
            storage,
            folders,
            users,
            ours,
            guard,
            learned: self.journal.learned().await?,
        };
        if let Action::Cleanup(cleanup) = &request.action
            && cleanup.orphans != Orphans::Ignore
        {
            facts.storage.orphans = Some(self.orphans(&facts).await);
        }
        Ok(facts)
    }

    /// Files that the journal says were made for a VM, or for one that it does not
    /// know any more.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub(super) async fn ours(&self, vm: &str) -> Result<BTreeSet<String>, Fault> {
        Ok(self
            .journal
            .noted_files()
            .await?
            .into_iter()
            .filter(|file| file.vm.is_empty() || file.vm == vm)
            .map(|file| file.path)
            .collect())
    }

    /// What tells whether somebody changed a VM's definition or its snapshots.
    ///
    /// # Errors
    /// When there is no such VM, or libvirt does not answer.
    pub async fn fingerprint(&self, vm: &str) -> Result<String, Fault> {
        use sha2::{Digest as _, Sha256};
        let mut hash = Sha256::new();
        // A transient VM has no definition beside its present one, which changes
        // by itself.
        if self.hypervisor.domain(vm).await?.persistent {
            hash.update(self.hypervisor.domain_xml(vm, Xml::Inactive).await?);
        }
        let mut snapshots: Vec<String> = self
            .hypervisor
            .snapshots(vm)
            .await?
            .into_iter()
            .map(|it| {
                let parent = it.parent.unwrap_or_default();
                format!("{}\n{parent}\n{}\n", it.name, it.creation_time)
            })
            .collect();
        snapshots.sort();
        for snapshot in snapshots {
            hash.update(snapshot);
        }
        Ok(hash
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect())
    }

    /// One VM; an error for a name that is not there names the nearest.
    ///
    /// # Errors
    /// When there is no such VM, or libvirt does not answer.
    pub async fn named_vm(&self, name: &str) -> Result<Vm, Fault> {
        match self.vm(name).await {
            Err(fault) if fault.reason == Reason::VmNotFound => Err(self.no_such_vm(name).await),
            other => other,
        }
    }

    async fn no_such_vm(&self, name: &str) -> Fault {
        match self.vms().await {
            Ok(all) => no_such_vm(name, all.iter().map(|vm| vm.name.as_str())),
            Err(fault) => fault,
        }
    }

    /// Pool and volumes, read anew: libvirt does not see overlays before.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn storage(&self, pool: &str) -> Result<Storage, Fault> {
        let Some(found) = self.hypervisor.pool(pool).await? else {
            return Ok(Storage::default());
        };
        if found.active
            && let Err(error) = self.hypervisor.pool_refresh(pool).await
        {
            tracing::warn!(pool, error = %crate::faults::sentence(&error), "the pool could not be refreshed");
        }
        // Its figures changed with the refresh.
        let found = self.hypervisor.pool(pool).await?.unwrap_or(found);
        let volumes = self.hypervisor.volumes(pool).await?;
        let mut volumes: Vec<Volume> = volumes
            .into_iter()
            .map(|volume| Volume {
                name: volume.name,
                path: volume.path,
                format: volume.format.unwrap_or_default(),
                capacity: volume.capacity,
                allocation: volume.allocation,
                backing: volume.backing_path,
                used_by: Vec::new(),
            })
            .collect();
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Storage {
            pool: Some(Pool {
                name: found.name,
                active: found.active,
                kind: found.kind,
                path: found.path.unwrap_or_default(),
                capacity: found.capacity,
                allocation: found.allocation,
                available: found.available,
            }),
            volumes,
            orphans: None,
        })
    }

    /// A pool's volumes and who uses each.
    ///
    /// # Errors
    /// When there is no such pool, or libvirt does not answer.
    pub async fn volumes(
        &self,
        pool: &str,
    ) -> Result<(Storage, BTreeMap<String, Vec<String>>), Fault> {
        let storage = self.storage(pool).await?;
        if storage.pool.is_none() {
            return Err(Fault::new(
                Reason::PoolNotFound,
                format!("this host has no storage pool '{}'", pool.escape_debug()),
            )
            .with("pool", pool));
        }
        let paths = storage.volumes.iter().map(|volume| volume.path.clone());
        let users = self
            .users_of_files(paths.collect(), Reading::Known)
            .await?
            .into_iter()
            .map(|(path, users)| {
                let names: BTreeSet<String> = users.into_iter().map(|user| user.vm).collect();
                (path, names.into_iter().collect())
            })
            .collect();
        Ok((storage, users))
    }

    async fn folders(
        &self,
        vm: &Vm,
        snapshots: &[Snapshot],
        storage: &Storage,
    ) -> BTreeMap<String, Folder> {
        let mut paths: BTreeSet<String> = BTreeSet::new();
        let mut add = |path: &str| {
            if path.starts_with('/') {
                paths.insert(folder_of(path).to_owned());
            }
        };
        for disk in &vm.disks {
            add(&disk.path);
            disk.chain.iter().for_each(|image| add(&image.path));
        }
        if let Some(nvram) = &vm.firmware.nvram {
            add(nvram);
        }
        for snapshot in snapshots {
            snapshot.media.iter().for_each(|(_, path)| add(path));
            snapshot
                .definition
                .disks
                .iter()
                .filter_map(|disk| disk.path.as_ref())
                .chain(snapshot.definition.boot.iter().map(|(_, path)| path))
                .chain(&snapshot.definition.nvram)
                .for_each(|path| add(path));
            files_of(snapshot).for_each(&mut add);
        }
        for volume in &storage.volumes {
            add(&volume.path);
        }
        // Only errors and warnings name the pool: one that hangs must not keep the VMs
        // of all others from being reverted.
        let pools: Vec<(String, String)> = self
            .hypervisor
            .pools()
            .await
            .unwrap_or_default()
            .into_iter()
            .filter(|pool| pool.active)
            .filter_map(|pool| Some((pool.path?, pool.name)))
            .collect();
        let same_rights = self.same_rights;
        let read = tokio::task::spawn_blocking(move || {
            paths
                .into_iter()
                .filter_map(|path| {
                    let pool = pools
                        .iter()
                        .find(|(folder, _)| *folder == path)
                        .map(|(_, name)| name.clone());
                    let mut folder = folders::read(&path, pool)?;
                    folder.denied &= same_rights;
                    Some((path, folder))
                })
                .collect()
        });
        read.await.unwrap_or_default()
    }

    /// The VM's active images: paths, and formats as the VM opens them.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn disk_images(&self, vm: &str) -> Result<Vec<DiskImage>, Fault> {
        let definition = self.hypervisor.definition(vm, Xml::Inactive).await?;
        Ok(definition.disks.into_iter().filter_map(image_of).collect())
    }

    /// One disk's active image.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn disk_image(&self, vm: &str, target: &str) -> Result<Option<DiskImage>, Fault> {
        let definition = self.hypervisor.definition(vm, Xml::Inactive).await?;
        Ok(definition
            .disks
            .into_iter()
            .find(|disk| disk.target == target)
            .and_then(image_of))
    }

    /// Disks with files in a definition's XML: target and image.
    ///
    /// # Errors
    /// When it cannot be understood.
    pub fn disks_of_xml(&self, xml: &str) -> Result<Vec<(String, DiskImage)>, Fault> {
        images_of_xml(xml, |_| true)
    }

    /// The same without those that the guest only reads.
    ///
    /// # Errors
    /// When it cannot be understood.
    pub fn written_disks_of_xml(&self, xml: &str) -> Result<Vec<(String, DiskImage)>, Fault> {
        images_of_xml(xml, |disk| !disk.only_read())
    }
}

/// Targets and images of those disks of a definition that lie on files.
fn images_of_xml(
    xml: &str,
    wanted: impl Fn(&DiskDefinition) -> bool,
) -> Result<Vec<(String, DiskImage)>, Fault> {
    let definition = vmsnap_hypervisor::DomainDefinition::parse(xml)?;
    Ok(definition
        .disks
        .into_iter()
        .filter(|disk| disk.source == vmsnap_hypervisor::DiskSource::File && wanted(disk))
        .filter_map(|disk| Some((disk.target.clone(), image_of(disk)?)))
        .collect())
}

/// Files in which something of a snapshot lies.
fn files_of(snapshot: &Snapshot) -> impl Iterator<Item = &str> {
    let memory = match &snapshot.memory {
        Memory::External(file) => Some(file),
        _ => None,
    };
    let record = snapshot.record.as_ref();
    snapshot
        .disks
        .iter()
        .flat_map(|disk| [disk.data.as_ref(), disk.overlay.as_ref()])
        .flatten()
        .chain(memory)
        .chain(record.and_then(|record| record.nvram_copy.as_ref()))
        .map(String::as_str)
}

/// What is said of a VM that is not there, on a host that has these.
#[must_use]
pub fn no_such_vm<'a>(name: &str, there: impl Iterator<Item = &'a str> + Clone) -> Fault {
    let mut message = format!("there is no VM '{}' on this host", name.escape_debug());
    let nearest = names::nearest(name, there.clone());
    if let Some(nearest) = nearest {
        message.push_str(&format!("; did you mean '{nearest}'?"));
    } else if there.clone().next().is_none() {
        message.push_str("; it has none at all");
    }
    let fault = Fault::new(Reason::VmNotFound, message).with("vm", name);
    match nearest {
        Some(nearest) => fault.with("nearest", nearest),
        None => fault,
    }
}

/// Paths whose users a plan may ask for.
fn looked_up(
    action: &Action,
    vm: &Vm,
    snapshots: &[Snapshot],
    storage: &Storage,
    folders: &BTreeMap<String, Folder>,
) -> Vec<String> {
    let mut paths: Vec<String> = storage
        .volumes
        .iter()
        .map(|volume| volume.path.clone())
        .collect();
    for disk in &vm.disks {
        paths.push(disk.path.clone());
        paths.extend(disk.chain.iter().map(|image| image.path.clone()));
    }
    paths.extend(snapshots.iter().flat_map(files_of).map(str::to_owned));
    if matches!(action, Action::Cleanup(cleanup) if cleanup.orphans != Orphans::Ignore) {
        for (folder, seen) in folders {
            paths.extend(seen.names.iter().map(|name| format!("{folder}/{name}")));
        }
    }
    paths
}

/// Whether a plan of this action may write or delete files that others use.
fn needs_users(action: &Action, snapshots: &[Snapshot], host: &Host) -> Option<Reading> {
    let needed = match action {
        Action::Commit(commit) => {
            commit.all || !commit.name.is_empty() || commit.resize_to.is_some()
        }
        Action::Cleanup(_) => true,
        // A list tells who uses each volume, and decides nothing.
        Action::List(_) => return Some(Reading::Known),
        Action::Create(create) if create.if_exists == IfExists::Replace => true,
        // An internal one in an image of others could neither go nor be gone back to.
        Action::Create(create) => {
            let internal = match create.kind {
                Some(kind) => kind == Kind::Internal,
                None => {
                    !host.reverts_external() || snapshots.iter().any(|it| it.kind == Kind::Internal)
                }
            };
            return internal.then_some(Reading::Known);
        }
        // It writes into the image of an internal snapshot, and libvirt removes
        // the present overlay for an external one.
        Action::Revert(_) => true,
        Action::Confirm { .. } => false,
    };
    needed.then_some(Reading::Fresh)
}
