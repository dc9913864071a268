//! A VM's snapshots as facts: libvirt's list, held against files and journal.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use jiff::Timestamp;
use vmsnap_hypervisor::{
    DiskSource, SnapshotDiskInfo, SnapshotInfo, SnapshotMemoryInfo, SnapshotMode, Xml, image,
};

use super::{Observer, Reading, each, identity, vm};
use crate::{
    journal::BegunMerge,
    planning::{
        Fault, Reason,
        facts::{
            Disk, Health, Kind, Memory, Snapshot, SnapshotDisk, SnapshotRecord, Vm, VmState,
            held_by,
        },
        health,
    },
};

impl Observer {
    /// Names and UUIDs of the VMs that have snapshots, by name.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn vms_with_snapshots(&self) -> Result<Vec<(String, String)>, Fault> {
        let mut all = self.hypervisor.domains_with_snapshots().await?;
        all.sort();
        Ok(all)
    }

    /// Name and UUID of one VM.
    ///
    /// # Errors
    /// When there is no such VM, or libvirt does not answer.
    pub async fn vm_to_list(&self, name: &str) -> Result<(String, String), Fault> {
        match self.hypervisor.domain(name).await.map_err(Fault::from) {
            Ok(domain) => Ok((domain.name, domain.uuid)),
            Err(fault) if fault.reason == Reason::VmNotFound => Err(self.no_such_vm(name).await),
            Err(fault) => Err(fault),
        }
    }

    /// Snapshots of these VMs for a list, in their order, each VM's parents before
    /// children. Asks libvirt for nothing that the list does not show, and the
    /// guests for nothing at all. One that is gone has none.
    ///
    /// # Errors
    /// When libvirt or the journal does not answer.
    pub async fn list_snapshots(
        &self,
        vms: &[(String, String)],
    ) -> Result<Vec<(String, Vec<Snapshot>)>, Fault> {
        each(vms.to_vec(), |(name, uuid)| {
            let observer = self.clone();
            async move {
                let snapshots = match observer.list_snapshots_of(&name, &uuid).await {
                    Err(fault) if fault.reason == Reason::VmNotFound => Vec::new(),
                    other => other?,
                };
                Ok((name, snapshots))
            }
        })
        .await
    }

    async fn list_snapshots_of(&self, name: &str, uuid: &str) -> Result<Vec<Snapshot>, Fault> {
        let listed = self.listed(name, Reading::Known).await?;
        if listed.is_empty() {
            return Ok(Vec::new());
        }
        let definition = self.hypervisor.definition(name, Xml::Live).await?;
        let mut disks = Vec::with_capacity(definition.disks.len());
        for disk in &definition.disks {
            disks.push(vm::disk(disk).await);
        }
        self.as_facts(name, uuid, &mut disks, &listed).await
    }

    /// libvirt's list of a VM's snapshots.
    pub(super) async fn listed(
        &self,
        name: &str,
        reading: Reading,
    ) -> Result<Vec<SnapshotInfo>, Fault> {
        Ok(match reading {
            Reading::Fresh => self.hypervisor.snapshots(name).await?,
            Reading::Known => self.hypervisor.known_snapshots(name).await?,
        })
    }

    /// Snapshots of a VM, parents before children. Notes by which other paths they
    /// know its active images.
    ///
    /// # Errors
    /// When libvirt or the journal does not answer.
    pub async fn snapshots(&self, vm: &mut Vm) -> Result<Vec<Snapshot>, Fault> {
        let listed = self.listed(&vm.name, Reading::Fresh).await?;
        self.as_facts(&vm.name, &vm.uuid, &mut vm.disks, &listed)
            .await
    }

    async fn as_facts(
        &self,
        name: &str,
        uuid: &str,
        active: &mut [Disk],
        listed: &[SnapshotInfo],
    ) -> Result<Vec<Snapshot>, Fault> {
        if listed.is_empty() {
            return Ok(Vec::new());
        }
        let records: BTreeMap<String, SnapshotRecord> = self
            .journal
            .snapshot_records(uuid)
            .await?
            .into_iter()
            .collect();
        let ours = self.ours(name).await?;
        // Those of a snapshot that is gone, or of an earlier one of the same name,
        // say nothing any more.
        let begun: Vec<BegunMerge> = self
            .journal
            .begun_merges(uuid)
            .await?
            .into_iter()
            .filter(|merge| {
                listed
                    .iter()
                    .any(|info| info.name == merge.snapshot && info.creation_time == merge.created)
            })
            .collect();
        let guard = self.journal.open_guard(uuid).await?;
        let files = look(active, listed, &records).await;
        for disk in active.iter_mut() {
            disk.also = files.other_names(&disk.path).await;
        }
        let active = &*active;
        let mut all: Vec<Snapshot> = listed
            .iter()
            .map(|info| fact(info, records.get(&info.name), active))
            .collect();
        sort(&mut all);
        let finished = self.journal.finished_merges().await?;
        let half = self.compared.find(&all, active, &finished).await;
        let known = health::Files {
            images: files
                .images
                .iter()
                .map(|(path, names)| (path.as_str(), names.as_slice()))
                .collect(),
            below: files
                .below
                .iter()
                .map(|(path, images)| (path.as_str(), images.as_slice()))
                .collect(),
            broken: files
                .broken
                .iter()
                .map(|(path, why)| (path.as_str(), why.as_str()))
                .collect(),
            missing: files.missing.iter().map(String::as_str).collect(),
            ours: ours.iter().map(String::as_str).collect(),
            half: half
                .iter()
                .map(|(image, from)| (image.as_str(), from.as_slice()))
                .collect(),
            begun: begun
                .iter()
                .map(|merge| (merge.snapshot.as_str(), merge.disk.as_str()))
                .collect(),
            deleting: listed
                .iter()
                .flat_map(|info| {
                    info.disks
                        .iter()
                        .filter(|disk| disk.delete_in_progress)
                        .map(|disk| (info.name.as_str(), disk.target.as_str()))
                })
                .collect(),
        };
        let healths: Vec<Health> = all
            .iter()
            .map(|snapshot| health::of(snapshot, &all, active, &known))
            .collect();
        for (snapshot, health) in all.iter_mut().zip(healths) {
            snapshot.health = health;
            snapshot.guard = guard
                .as_ref()
                .filter(|guard| {
                    guard.snapshot == snapshot.name && guard.created == snapshot.created.as_second()
                })
                .map(|guard| guard.deadline);
            snapshot.size = files.size_of(snapshot);
            snapshot.mistaken_for = files.mistaken_for(snapshot);
        }
        Ok(all)
    }

    /// The first disk of a VM, in one of its definitions, on an image that has to
    /// stand still: its target, the image, and the snapshot whose data lies there.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn frozen_image(
        &self,
        vm: &str,
        which: Xml,
    ) -> Result<Option<(String, String, String)>, Fault> {
        let definition = self.hypervisor.definition(vm, which).await?;
        let listed = self.hypervisor.snapshots(vm).await?;
        let all: Vec<Snapshot> = listed.iter().map(|info| fact(info, None, &[])).collect();
        Ok(vm::definition(&definition)
            .disks
            .into_iter()
            .filter(|disk| !disk.only_read())
            .find_map(|disk| {
                let path = disk.path?;
                let held = held_by(&all, &path).or_else(|| {
                    let mut data = all.iter().flat_map(|one| &one.disks);
                    let same = |data: &&String| identity::same(data, &path);
                    let data = data.find_map(|disk| disk.data.as_ref().filter(same))?;
                    held_by(&all, data)
                });
                let snapshot = held?.name.clone();
                Some((disk.target, path, snapshot))
            }))
    }
}

/// Looks at the files that the snapshots need.
async fn look(
    active: &[Disk],
    listed: &[SnapshotInfo],
    records: &BTreeMap<String, SnapshotRecord>,
) -> Looked {
    let mut looked = Looked::default();
    for image in active.iter().flat_map(|disk| &disk.chain) {
        looked
            .images
            .insert(image.path.clone(), image.internal.clone());
        looked
            .numbers
            .insert(image.path.clone(), image.numbers.clone());
        looked.sizes.insert(image.path.clone(), image.actual_size);
    }
    // Files with the format in which they are opened.
    let mut paths: BTreeMap<&str, Option<&str>> = BTreeMap::new();
    for info in listed {
        for disk in info.disks.iter().chain(&info.revert_disks) {
            if let Some(file) = &disk.file {
                paths.insert(file, disk.format.as_deref());
            }
        }
        for disk in info.definition.iter().flat_map(|it| &it.disks) {
            if let Some(path) = &disk.path {
                paths.insert(path, disk.format.as_deref());
            }
        }
        if let SnapshotMemoryInfo::External { file } = &info.memory {
            paths.insert(file, None);
        }
    }
    for copy in records.values().filter_map(|it| it.nvram_copy.as_ref()) {
        paths.insert(copy, None);
    }
    let internal = listed
        .iter()
        .flat_map(|info| &info.disks)
        .any(|disk| disk.mode == SnapshotMode::Internal);
    for (path, format) in paths {
        if looked.images.contains_key(path) || !path.starts_with('/') {
            continue;
        }
        match tokio::fs::metadata(path).await {
            Err(_) => {
                looked.missing.insert(path.to_owned());
            }
            Ok(metadata) => {
                use std::os::unix::fs::MetadataExt as _;
                looked
                    .sizes
                    .insert(path.to_owned(), metadata.blocks() * 512);
                let identity = (metadata.dev(), metadata.ino());
                looked.others.push((identity, path.to_owned()));
                if internal && let Ok(image) = image::info(path.as_ref(), format).await {
                    let (numbers, names) = image
                        .snapshots
                        .into_iter()
                        .map(|one| (one.id, one.name))
                        .unzip();
                    looked.numbers.insert(path.to_owned(), numbers);
                    looked.images.insert(path.to_owned(), names);
                }
            }
        }
    }
    let in_chain = |path: &str| {
        active
            .iter()
            .any(|disk| disk.chain.iter().any(|image| image.path == path))
    };
    // Side branches stand on images of their own.
    let data: BTreeMap<&str, Option<&str>> = listed
        .iter()
        .filter_map(|info| Some((info, info.definition.as_ref()?)))
        .flat_map(|(info, definition)| {
            info.disks
                .iter()
                .filter(|disk| disk.mode != SnapshotMode::No)
                .filter_map(|disk| {
                    definition
                        .disks
                        .iter()
                        .find(|one| one.target == disk.target)
                })
                .filter_map(|disk| Some((disk.path.as_deref()?, disk.format.as_deref())))
        })
        .filter(|(path, _)| !in_chain(path) && !looked.missing.contains(*path))
        .collect();
    for (path, format) in data {
        match image::chain(path.as_ref(), format).await {
            Ok(chain) => {
                let below = chain.into_iter().skip(1).map(|image| image.path).collect();
                looked.below.insert(path.to_owned(), below);
            }
            Err(error) => {
                looked
                    .broken
                    .insert(path.to_owned(), crate::faults::sentence(&error));
            }
        }
    }
    looked
}

/// What was found out about files.
#[derive(Debug, Default)]
struct Looked {
    images: BTreeMap<String, Vec<String>>,
    numbers: BTreeMap<String, Vec<String>>,
    sizes: BTreeMap<String, u64>,
    missing: BTreeSet<String>,
    below: BTreeMap<String, Vec<String>>,
    broken: BTreeMap<String, String>,
    /// Files that are not in the VM's chains by their paths, and which they are.
    others: Vec<(identity::Identity, String)>,
}

impl Looked {
    /// Other paths by which snapshots know a file.
    async fn other_names(&self, path: &str) -> Vec<String> {
        use std::os::unix::fs::MetadataExt as _;
        let Ok(metadata) = tokio::fs::metadata(path).await else {
            return Vec::new();
        };
        let own = (metadata.dev(), metadata.ino());
        let same = self.others.iter().filter(|(of, _)| *of == own);
        same.map(|(_, path)| path.clone()).collect()
    }

    /// Another internal snapshot, in an image of this one, whose number is this
    /// one's name.
    fn mistaken_for(&self, snapshot: &Snapshot) -> Option<String> {
        snapshot
            .disks
            .iter()
            .filter(|disk| disk.kind == Some(Kind::Internal))
            .filter_map(|disk| disk.data.as_ref())
            .filter_map(|path| Some((self.numbers.get(path)?, self.images.get(path)?)))
            .find_map(|(numbers, names)| {
                let at = numbers.iter().position(|number| *number == snapshot.name)?;
                names.get(at).filter(|name| **name != snapshot.name)
            })
            .cloned()
    }

    fn size_of(&self, snapshot: &Snapshot) -> u64 {
        let memory = match &snapshot.memory {
            Memory::External(file) => Some(file),
            _ => None,
        };
        snapshot
            .disks
            .iter()
            .filter_map(|disk| disk.overlay.as_ref())
            .chain(memory)
            .filter_map(|path| self.sizes.get(path))
            .sum()
    }
}

fn mode_kind(mode: SnapshotMode) -> Option<Kind> {
    match mode {
        SnapshotMode::Internal => Some(Kind::Internal),
        SnapshotMode::External => Some(Kind::External),
        SnapshotMode::No => None,
    }
}

fn fact(info: &SnapshotInfo, record: Option<&SnapshotRecord>, active: &[Disk]) -> Snapshot {
    let data = |target: &str| {
        info.definition
            .as_ref()
            .and_then(|definition| definition.disks.iter().find(|disk| disk.target == target))
            .and_then(|disk| disk.path.clone())
    };
    let disks: Vec<SnapshotDisk> = info
        .disks
        .iter()
        .map(|disk: &SnapshotDiskInfo| SnapshotDisk {
            kind: mode_kind(disk.mode),
            overlay: match disk.mode {
                SnapshotMode::External => disk.file.clone(),
                _ => None,
            },
            data: data(&disk.target),
            target: disk.target.clone(),
        })
        .collect();
    let internal = disks.iter().any(|disk| disk.kind == Some(Kind::Internal))
        || info.memory == SnapshotMemoryInfo::Internal;
    let external = disks.iter().any(|disk| disk.kind == Some(Kind::External))
        || matches!(info.memory, SnapshotMemoryInfo::External { .. });
    let definition = info.definition.as_ref();
    Snapshot {
        name: info.name.clone(),
        parent: info.parent.clone(),
        description: info.description.clone().unwrap_or_default(),
        created: Timestamp::from_second(info.creation_time).unwrap_or(Timestamp::UNIX_EPOCH),
        state: match info.state.as_str() {
            "running" => VmState::Running,
            "paused" => VmState::Paused,
            "shutoff" => VmState::Stopped,
            // Without memory libvirt writes `disk-snapshot`; the record knows
            // whether the VM was off.
            _ if record.is_some_and(|it| {
                it.consistency == crate::planning::facts::Consistency::Stopped
            }) =>
            {
                VmState::Stopped
            }
            _ => VmState::Running,
        },
        kind: match (internal, external) {
            (true, true) => Kind::Mixed,
            (true, false) => Kind::Internal,
            _ => Kind::External,
        },
        memory: match &info.memory {
            SnapshotMemoryInfo::None => Memory::None,
            SnapshotMemoryInfo::Internal => Memory::Internal,
            SnapshotMemoryInfo::External { file } => Memory::External(file.clone()),
        },
        disks,
        revert_overlays: info
            .revert_disks
            .iter()
            .filter_map(|disk| Some((disk.target.clone(), disk.file.clone()?)))
            .collect(),
        chain_untold: chain_untold(info, active),
        current: info.is_current,
        health: Health::Whole,
        size: 0,
        record: record
            .filter(|record| record.created == info.creation_time)
            .cloned(),
        definition: definition.map(vm::definition).unwrap_or_default(),
        media: media(info),
        mistaken_for: None,
        guard: None,
    }
}

/// Whether libvirt's own copy of the VM in a snapshot, which is the live one where
/// there are two, has an image of which it does not say what it stands on, although
/// it stands on something.
fn chain_untold(info: &SnapshotInfo, active: &[Disk]) -> bool {
    let copy = info.live.as_ref().or(info.definition.as_ref());
    copy.into_iter().flat_map(|copy| &copy.disks).any(|disk| {
        let alone = active
            .iter()
            .filter_map(|disk| disk.chain.last())
            .any(|image| Some(&image.path) == disk.path.as_ref());
        matches!(disk.source, DiskSource::File | DiskSource::Block)
            && !disk.backing_told
            && disk.format.as_deref() != Some("raw")
            && !alone
    })
}

/// Drives with media and read-only disks in a snapshot. A revert to memory starts the VM as it ran, so
/// a medium that was put in while it ran counts too.
fn media(info: &SnapshotInfo) -> Vec<(String, String)> {
    let live = match info.memory {
        SnapshotMemoryInfo::None => None,
        _ => info.live.as_ref(),
    };
    let mut media: Vec<(String, String)> = Vec::new();
    for definition in info.definition.iter().chain(live) {
        for disk in vm::definition(definition).disks {
            if let (true, Some(path)) = (disk.only_read(), disk.path)
                && !media.iter().any(|(_, known)| *known == path)
            {
                media.push((disk.target, path));
            }
        }
    }
    media
}

/// Parents before children, older before newer; what hangs on a missing or
/// circular parent comes last.
fn sort(all: &mut Vec<Snapshot>) {
    all.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
    let mut rest: Vec<Snapshot> = std::mem::take(all);
    let mut placed: HashSet<String> = HashSet::new();
    while !rest.is_empty() {
        let before = placed.len();
        let mut later = Vec::new();
        for one in rest {
            if one.parent.as_ref().is_none_or(|it| placed.contains(it)) {
                placed.insert(one.name.clone());
                all.push(one);
            } else {
                later.push(one);
            }
        }
        if placed.len() == before {
            all.extend(later);
            return;
        }
        rest = later;
    }
}
