//! A VM's snapshots as facts: libvirt's list, held against files and journal.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use vmsnap_hypervisor::{SnapshotDiskInfo, SnapshotInfo, SnapshotMemoryInfo, SnapshotMode, image};

use super::Observer;
use crate::{
    journal::BegunMerge,
    planning::{
        Fault,
        facts::{Health, Kind, Memory, Snapshot, SnapshotDisk, SnapshotRecord, Vm, VmState},
        health,
    },
};

impl Observer {
    /// Snapshots of all VMs, or of one: by VM, parents before children.
    ///
    /// # Errors
    /// When libvirt or the journal does not answer.
    pub async fn all_snapshots(
        &self,
        only: Option<&str>,
    ) -> Result<Vec<(String, Vec<Snapshot>)>, Fault> {
        let names: Vec<String> = match only {
            Some(name) => vec![name.to_owned()],
            None => self
                .vms()
                .await?
                .into_iter()
                .filter(|vm| vm.snapshots > 0)
                .map(|vm| vm.name)
                .collect(),
        };
        let mut all = Vec::with_capacity(names.len());
        for name in names {
            let vm = match self.vm(&name).await {
                Ok(vm) => vm,
                // Gone since it was listed.
                Err(fault)
                    if only.is_none() && fault.reason == crate::planning::Reason::VmNotFound =>
                {
                    continue;
                }
                Err(fault) => return Err(fault),
            };
            let snapshots = self.snapshots(&vm).await?;
            all.push((name, snapshots));
        }
        Ok(all)
    }

    /// Snapshots of a VM, parents before children.
    ///
    /// # Errors
    /// When libvirt or the journal does not answer.
    pub async fn snapshots(&self, vm: &Vm) -> Result<Vec<Snapshot>, Fault> {
        let listed = self.hypervisor.snapshots(&vm.name).await?;
        if listed.is_empty() {
            return Ok(Vec::new());
        }
        let records: BTreeMap<String, SnapshotRecord> = self
            .journal
            .snapshot_records(&vm.uuid)
            .await?
            .into_iter()
            .collect();
        let ours = self.ours(&vm.name).await?;
        let files = self.look(vm, &listed, &records).await;
        // Those of a snapshot that is gone, or of an earlier one of the same name,
        // say nothing any more.
        let begun: Vec<BegunMerge> = self
            .journal
            .begun_merges(&vm.uuid)
            .await?
            .into_iter()
            .filter(|merge| {
                listed
                    .iter()
                    .any(|info| info.name == merge.snapshot && info.creation_time == merge.created)
            })
            .collect();
        let mut all: Vec<Snapshot> = listed
            .iter()
            .map(|info| fact(info, records.get(&info.name)))
            .collect();
        sort(&mut all);
        let finished = self.journal.finished_merges().await?;
        let half = self.compared.find(&all, &vm.disks, &finished).await;
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
            deleting: listed
                .iter()
                .flat_map(|info| {
                    info.disks
                        .iter()
                        .filter(|disk| disk.delete_in_progress)
                        .map(|disk| (info.name.as_str(), disk.target.as_str()))
                })
                .collect(),
            half: half
                .iter()
                .map(|(image, from)| (image.as_str(), from.as_slice()))
                .collect(),
            begun: begun
                .iter()
                .map(|merge| (merge.snapshot.as_str(), merge.disk.as_str()))
                .collect(),
        };
        let healths: Vec<Health> = all
            .iter()
            .map(|snapshot| health::of(snapshot, &all, &vm.disks, &known))
            .collect();
        for (snapshot, health) in all.iter_mut().zip(healths) {
            snapshot.health = health;
            snapshot.size = files.size_of(snapshot);
            snapshot.mistaken_for = files.mistaken_for(snapshot);
        }
        Ok(all)
    }

    /// Looks at the files that the snapshots need.
    async fn look(
        &self,
        vm: &Vm,
        listed: &[SnapshotInfo],
        records: &BTreeMap<String, SnapshotRecord>,
    ) -> Looked {
        let mut looked = Looked::default();
        for image in vm.disks.iter().flat_map(|disk| &disk.chain) {
            looked
                .images
                .insert(image.path.clone(), image.internal.clone());
            looked
                .numbers
                .insert(image.path.clone(), image.numbers.clone());
            looked.sizes.insert(image.path.clone(), image.actual_size);
        }
        let mut paths: BTreeSet<String> = BTreeSet::new();
        for info in listed {
            for disk in info.disks.iter().chain(&info.revert_disks) {
                paths.extend(disk.file.clone());
            }
            if let Some(definition) = &info.definition {
                paths.extend(definition.disks.iter().filter_map(|disk| disk.path.clone()));
            }
            if let SnapshotMemoryInfo::External { file } = &info.memory {
                paths.insert(file.clone());
            }
        }
        paths.extend(
            records
                .values()
                .filter_map(|record| record.nvram_copy.clone()),
        );
        for path in paths {
            if looked.images.contains_key(&path) || !path.starts_with('/') {
                continue;
            }
            match tokio::fs::metadata(&path).await {
                Err(_) => {
                    looked.missing.insert(path);
                }
                Ok(metadata) => {
                    use std::os::unix::fs::MetadataExt as _;
                    looked.sizes.insert(path.clone(), metadata.blocks() * 512);
                    let internal = listed.iter().any(|info| {
                        info.disks
                            .iter()
                            .any(|disk| disk.mode == SnapshotMode::Internal)
                    });
                    if internal && let Ok(image) = image::info(path.as_ref()).await {
                        let (numbers, names) = image
                            .snapshots
                            .into_iter()
                            .map(|one| (one.id, one.name))
                            .unzip();
                        looked.numbers.insert(path.clone(), numbers);
                        looked.images.insert(path, names);
                    }
                }
            }
        }
        let in_chain = |path: &str| {
            vm.disks
                .iter()
                .any(|disk| disk.chain.iter().any(|image| image.path == path))
        };
        // Side branches stand on images of their own.
        let data: BTreeSet<&String> = listed
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
                    .filter_map(|disk| disk.path.as_ref())
            })
            .filter(|path| !in_chain(path) && !looked.missing.contains(*path))
            .collect();
        for path in data {
            match image::chain(path.as_ref()).await {
                Ok(chain) => {
                    let below = chain.into_iter().skip(1).map(|image| image.path).collect();
                    looked.below.insert(path.clone(), below);
                }
                Err(error) => {
                    looked
                        .broken
                        .insert(path.clone(), crate::faults::sentence(&error));
                }
            }
        }
        looked
    }
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
}

impl Looked {
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

fn fact(info: &SnapshotInfo, record: Option<&SnapshotRecord>) -> Snapshot {
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
        current: info.is_current,
        health: Health::Whole,
        size: 0,
        record: record
            .filter(|record| record.created == info.creation_time)
            .cloned(),
        machine: definition
            .and_then(|definition| definition.machine.clone())
            .unwrap_or_default(),
        vm_memory: definition
            .and_then(|definition| definition.memory_kib)
            .map_or(0, |kib| kib.saturating_mul(1024)),
        vm_vcpus: definition
            .and_then(|definition| definition.vcpus)
            .unwrap_or(0),
        media: definition
            .into_iter()
            .flat_map(|definition| &definition.disks)
            .filter(|disk| disk.only_read())
            .filter_map(|disk| Some((disk.target.clone(), disk.path.clone()?)))
            .collect(),
        mistaken_for: None,
        guard: None,
    }
}

/// Parents before children, older before newer; what hangs on a missing or
/// circular parent comes last.
fn sort(all: &mut Vec<Snapshot>) {
    all.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
    let mut rest: Vec<Snapshot> = std::mem::take(all);
    while !rest.is_empty() {
        let (ready, later): (Vec<_>, Vec<_>) = rest.into_iter().partition(|one| {
            one.parent
                .as_ref()
                .is_none_or(|parent| all.iter().any(|before| before.name == *parent))
        });
        if ready.is_empty() {
            all.extend(later);
            return;
        }
        all.extend(ready);
        rest = later;
    }
}
