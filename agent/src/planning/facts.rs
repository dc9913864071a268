//! One reading of a VM and what surrounds it.
//!
//! Invariants: facts are plain data, gathered by `observe`, never changed by a
//! plan. Sizes are bytes. A list that was not looked for is `None`, not empty.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{guard::Guard, issues::Learned};

/// Everything a plan may depend on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// When they were read.
    pub now: Timestamp,
    /// The hypervisor.
    pub host: Host,
    /// The VM.
    pub vm: Vm,
    /// Its snapshots, parents before children.
    pub snapshots: Vec<Snapshot>,
    /// The pool that was named, and its volumes.
    pub storage: Storage,
    /// Folders of the VM's files and of the pool, by path.
    pub folders: BTreeMap<String, Folder>,
    /// Who else refers to a file: path to users. `None` when nobody looked.
    pub users: Option<BTreeMap<String, Vec<FileUser>>>,
    /// Files that this agent's journal says it made, or had libvirt make.
    #[serde(default)]
    pub ours: BTreeSet<String>,
    /// The open guard on this VM.
    #[serde(default)]
    pub guard: Option<Guard>,
    /// What this host taught.
    #[serde(default)]
    pub learned: Vec<Learned>,
}

/// The hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// libvirt's version as `major * 1_000_000 + minor * 1_000 + release`.
    pub libvirt: u64,
    /// QEMU's version in the same form.
    pub qemu: u64,
    /// Deepest chain that the configuration allows.
    pub max_chain: u32,
    /// The configuration says that no other host uses the storage.
    pub storage_exclusive: bool,
    /// IANA name of the host's time zone; empty when it has none, which is UTC.
    #[serde(default)]
    pub time_zone: String,
}

impl Host {
    /// libvirt 9.10 was the first that reverts external snapshots.
    #[must_use]
    pub fn reverts_external(&self) -> bool {
        self.libvirt >= 9_010_000
    }

    /// libvirt 9.0 was the first that deletes external snapshots.
    #[must_use]
    pub fn deletes_external(&self) -> bool {
        self.libvirt >= 9_000_000
    }
}

/// State of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// vCPUs run.
    Running,
    /// vCPUs stand still.
    Paused,
    /// Off.
    Stopped,
    /// On its way off.
    Stopping,
    /// The guest crashed.
    Crashed,
    /// Suspended by the guest's own power management.
    PmSuspended,
}

impl VmState {
    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Stopping => "stopping",
            Self::Crashed => "crashed",
            Self::PmSuspended => "suspended by the guest",
        }
    }
}

/// The VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// Name.
    pub name: String,
    /// UUID.
    pub uuid: String,
    /// State.
    pub state: VmState,
    /// libvirt's reason for it.
    pub reason: String,
    /// Defined, rather than gone when it stops.
    pub persistent: bool,
    /// Starts with the host.
    pub autostart: bool,
    /// Number of vCPUs.
    pub vcpu_count: u32,
    /// Each vCPU; empty when the VM is off.
    pub vcpus: Vec<Vcpu>,
    /// Present memory.
    pub memory: u64,
    /// Memory at most.
    pub max_memory: u64,
    /// Memory tuning.
    pub memtune: Memtune,
    /// Machine type.
    pub machine: String,
    /// Architecture.
    pub arch: String,
    /// Firmware.
    pub firmware: Firmware,
    /// libvirt keeps its memory on disk, to be loaded at the next start.
    pub managed_save: bool,
    /// Its disks and drives.
    pub disks: Vec<Disk>,
    /// The guest agent.
    pub agent: Agent,
    /// Whether its file systems are frozen now; `None` when nobody can tell.
    pub frozen: Option<bool>,
    /// Open block jobs.
    pub block_jobs: Vec<BlockJob>,
    /// Devices that keep memory from being saved, for people.
    pub not_migratable: Vec<String>,
    /// Disks whose definition names another image than the one in use:
    /// target, defined, in use.
    pub differing: Vec<(String, String, String)>,
    /// What its next start takes.
    #[serde(default)]
    pub definition: Definition,
}

/// What of a VM's definition a revert can take back, and what a start needs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// Bytes of memory at most.
    pub memory: u64,
    /// vCPUs at most.
    pub vcpus: u32,
    /// vCPUs that are plugged in when it starts.
    pub vcpus_at_start: u32,
    /// Machine type.
    pub machine: String,
    /// File of the UEFI variables.
    pub nvram: Option<String>,
    /// It has a channel for a guest agent.
    pub agent: bool,
    /// Disks and drives.
    pub disks: Vec<DefinedDisk>,
    /// Files beside disks that a start reads: what each is, and its path.
    pub boot: Vec<(String, String)>,
}

/// A disk or drive in a definition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DefinedDisk {
    /// Target.
    pub target: String,
    /// `disk`, `cdrom`, `floppy`, `lun`.
    pub device: String,
    /// What it lies on.
    pub source: Source,
    /// Path, or what names the source; `None` is an empty drive.
    pub path: Option<String>,
    /// Cannot be written by the guest.
    pub readonly: bool,
    /// An image of it is encrypted.
    #[serde(default)]
    pub encrypted: bool,
}

impl DefinedDisk {
    /// Whether the guest only reads it: a CD, or what is marked read-only.
    #[must_use]
    pub fn only_read(&self) -> bool {
        self.readonly || self.device == "cdrom"
    }
}

impl Definition {
    /// Finds a disk.
    #[must_use]
    pub fn disk(&self, target: &str) -> Option<&DefinedDisk> {
        self.disks.iter().find(|disk| disk.target == target)
    }
}

/// One vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vcpu {
    /// Number.
    pub number: u32,
    /// `running`, `blocked`, `offline`.
    pub state: String,
    /// Host CPU.
    pub cpu: Option<u32>,
    /// Nanoseconds of CPU time.
    pub time_ns: u64,
}

/// Memory limits; `None` is unlimited.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memtune {
    /// Hard limit.
    pub hard: Option<u64>,
    /// Soft limit.
    pub soft: Option<u64>,
    /// Limit of memory and swap.
    pub swap_hard: Option<u64>,
    /// Guaranteed minimum.
    pub min_guarantee: Option<u64>,
}

/// What the VM starts from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Firmware {
    /// UEFI rather than BIOS.
    pub uefi: bool,
    /// File of the UEFI variables.
    pub nvram: Option<String>,
    /// Its format.
    pub nvram_format: String,
    /// A software TPM with state of its own.
    pub vtpm: bool,
}

/// What a disk's data lies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A file.
    File,
    /// A block device.
    Block,
    /// A network disk.
    Network,
    /// A volume of a pool.
    Volume,
    /// Nothing: an empty drive.
    Empty,
    /// Something else.
    Other,
}

/// A disk or drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Target in the guest.
    pub target: String,
    /// Bus.
    pub bus: String,
    /// `disk`, `cdrom`, `floppy`, `lun`.
    pub device: String,
    /// What it lies on.
    pub source: Source,
    /// Path of the active image, or what names the source.
    pub path: String,
    /// Other paths of the active image by which a snapshot knows it: through a link,
    /// or a second name.
    #[serde(default)]
    pub also: Vec<String>,
    /// Format of the active image.
    pub format: String,
    /// Cannot be written by the guest.
    pub readonly: bool,
    /// Several VMs may write it.
    pub shareable: bool,
    /// An image of its chain is encrypted.
    #[serde(default)]
    pub encrypted: bool,
    /// What is written to it is thrown away when the VM stops.
    #[serde(default)]
    pub transient: bool,
    /// Size that the guest sees.
    pub virtual_size: u64,
    /// From the active image down to the oldest base.
    pub chain: Vec<Image>,
    /// Why the chain could not be read.
    pub chain_problem: Option<String>,
    /// The image that an open merge of the active one writes into.
    pub merging_into: Option<String>,
}

impl Disk {
    /// Whether the guest can change it, so that a snapshot has to cover it.
    #[must_use]
    pub fn writable(&self) -> bool {
        !self.only_read() && self.source != Source::Empty
    }

    /// Whether the guest only reads it: a CD, or what is marked read-only.
    #[must_use]
    pub fn only_read(&self) -> bool {
        self.readonly || self.device == "cdrom"
    }

    /// Whether a path is that of the active image, by whatever name.
    #[must_use]
    pub fn lies_on(&self, path: &str) -> bool {
        self.path == path || self.also.iter().any(|also| also == path)
    }
}

/// One image of a chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Path.
    pub path: String,
    /// Format.
    pub format: String,
    /// Size that a guest would see.
    pub virtual_size: u64,
    /// Bytes that it takes.
    pub actual_size: u64,
    /// Internal snapshots in it.
    pub internal: Vec<String>,
    /// Their numbers, in the same order.
    #[serde(default)]
    pub numbers: Vec<String>,
    /// qcow2 compatibility level, such as `1.1`.
    pub compat: String,
}

/// The guest agent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    /// A channel is defined.
    pub defined: bool,
    /// The guest has it open.
    pub connected: bool,
    /// It answered a ping.
    pub responding: bool,
}

/// An open block job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockJob {
    /// Disk.
    pub disk: String,
    /// Kind, for people.
    pub kind: String,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// How the data of a snapshot is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Inside the image.
    Internal,
    /// In overlay files.
    External,
    /// Both.
    Mixed,
}

impl Kind {
    /// For people and for the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Internal => "internal",
            Self::External => "external",
            Self::Mixed => "mixed",
        }
    }
}

/// How whole the data is with respect to what ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Consistency {
    /// Memory was saved too.
    Memory,
    /// File systems were frozen.
    Filesystem,
    /// vCPUs stood still.
    Suspend,
    /// As after a power cut.
    Crash,
    /// The VM was off.
    Stopped,
}

impl Consistency {
    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Filesystem => "filesystem",
            Self::Suspend => "suspend",
            Self::Crash => "crash",
            Self::Stopped => "stopped",
        }
    }
}

/// Whether what libvirt lists can still be brought back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// All is there.
    Whole,
    /// Something is missing: what.
    DataMissing(String),
    /// Only its memory is missing, its disks are whole: where it was.
    MemoryMissing(String),
    /// An unfinished merge wrote into it: where.
    Torn(String),
    /// It was merged behind libvirt's back: where.
    MergedAway(String),
    /// No data was ever kept for any disk.
    MetadataOnly,
}

/// What a snapshot keeps of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotDisk {
    /// Target.
    pub target: String,
    /// Kind; `None` when the disk was left out.
    pub kind: Option<Kind>,
    /// External: the overlay that it made.
    pub overlay: Option<String>,
    /// File in which the data of the snapshot lies.
    pub data: Option<String>,
}

/// Memory of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Memory {
    /// Not saved.
    None,
    /// In the image.
    Internal,
    /// In a file.
    External(String),
}

/// What this agent recorded when it made a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// The run that made it.
    pub workflow: String,
    /// As achieved.
    pub consistency: Consistency,
    /// No policy removes it.
    pub protected: bool,
    /// Taken before a revert, to be able to go back from it.
    pub safety: bool,
    /// Made with disks left out.
    pub not_revertible: bool,
    /// Size of the memory file.
    pub memory_size: Option<u64>,
    /// SHA-256 of the memory file.
    pub memory_sha256: Option<String>,
    /// Copy of the UEFI variables beside it.
    pub nvram_copy: Option<String>,
    /// libvirt's version then.
    pub libvirt: u64,
    /// QEMU's version then.
    pub qemu: u64,
    /// libvirt's creation time, in seconds: tells it from a later one of the
    /// same name.
    pub created: i64,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Name.
    pub name: String,
    /// Parent.
    pub parent: Option<String>,
    /// Description.
    pub description: String,
    /// When it was made.
    pub created: Timestamp,
    /// State of the VM in it: `running`, `paused`, `stopped`.
    pub state: VmState,
    /// Kind.
    pub kind: Kind,
    /// Memory.
    pub memory: Memory,
    /// What it keeps of each disk.
    pub disks: Vec<SnapshotDisk>,
    /// Overlays that libvirt put on its data when it was reverted to.
    pub revert_overlays: Vec<(String, String)>,
    /// libvirt's record of it has an image that stands on another without saying
    /// so. libvirt 11.3 crashes when it deletes a snapshot and another branch above
    /// it has such a record: it reads the chain from the image, only one image
    /// deep, and goes on with nothing where there are more.
    #[serde(default)]
    pub chain_untold: bool,
    /// The VM's present state descends from it.
    pub current: bool,
    /// Whether it can be brought back.
    pub health: Health,
    /// Bytes on disk that belong to it.
    pub size: u64,
    /// What this agent recorded.
    pub record: Option<SnapshotRecord>,
    /// The definition that it brings back.
    #[serde(default)]
    pub definition: Definition,
    /// Drives with media and read-only disks in it, as defined or as they ran:
    /// target and path.
    pub media: Vec<(String, String)>,
    /// Another internal snapshot in the same image whose number is this one's
    /// name: QEMU looks for a number first, and would go back to that one.
    #[serde(default)]
    pub mistaken_for: Option<String>,
    /// Until when a guarded change on it must be confirmed.
    pub guard: Option<Timestamp>,
}

/// A pool and its volumes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Storage {
    /// The pool; `None` when the host has none of that name.
    pub pool: Option<Pool>,
    /// Its volumes.
    pub volumes: Vec<Volume>,
    /// Files that nobody refers to; `None` when nobody looked.
    pub orphans: Option<Vec<Orphan>>,
}

/// A pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// Name.
    pub name: String,
    /// In use by libvirt.
    pub active: bool,
    /// Type.
    pub kind: String,
    /// Path.
    pub path: String,
    /// Size.
    pub capacity: u64,
    /// In use.
    pub allocation: u64,
    /// Free.
    pub available: u64,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Name.
    pub name: String,
    /// Path.
    pub path: String,
    /// Format.
    pub format: String,
    /// Size that a guest would see.
    pub capacity: u64,
    /// Bytes that it takes.
    pub allocation: u64,
    /// Its backing file.
    pub backing: Option<String>,
    /// VMs whose chains name it, where somebody looked.
    #[serde(default)]
    pub used_by: Vec<String>,
}

/// A file that nobody refers to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orphan {
    /// Path.
    pub path: String,
    /// Bytes that it takes.
    pub size: u64,
    /// This agent's journal says that it made it.
    pub ours: bool,
}

/// A folder in which files of the VM lie.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Folder {
    /// Names in it.
    pub names: BTreeSet<String>,
    /// Free bytes for the hypervisor.
    pub free: u64,
    /// Size of the file system.
    pub capacity: u64,
    /// The file system: folders with the same number share its space. 0 when it is
    /// not known.
    #[serde(default)]
    pub device: u64,
    /// On a network file system.
    pub network: bool,
    /// Not mounted read-only.
    pub writable: bool,
    /// The agent itself may not make files in it. libvirt makes overlays, so for
    /// a new snapshot, which fails without harm, that says nothing certain; a
    /// revert that fails has already stopped the guest.
    pub denied: bool,
    /// The active pool that lies there.
    pub pool: Option<String>,
}

/// Who refers to a file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileUser {
    /// The VM.
    pub vm: String,
    /// The snapshot of that VM, when it is one that refers.
    pub snapshot: Option<String>,
}

impl Snapshot {
    /// The overlay of a disk that libvirt takes for that of the present state
    /// when this is the current snapshot: it is deleted on the next revert.
    #[must_use]
    pub fn present_overlay(&self, target: &str) -> Option<&str> {
        let reverted = self.revert_overlays.iter().find(|(disk, _)| disk == target);
        match reverted {
            Some((_, overlay)) => Some(overlay),
            // The record of a revert replaces the whole list.
            None if !self.revert_overlays.is_empty() => None,
            None => self
                .disks
                .iter()
                .find(|disk| disk.target == target)?
                .overlay
                .as_deref(),
        }
    }
}

impl Facts {
    /// Finds a snapshot.
    #[must_use]
    pub fn snapshot(&self, name: &str) -> Option<&Snapshot> {
        self.snapshots.iter().find(|snapshot| snapshot.name == name)
    }

    /// The snapshot that the present state descends from.
    #[must_use]
    pub fn current(&self) -> Option<&Snapshot> {
        self.snapshots.iter().find(|snapshot| snapshot.current)
    }

    /// Disks that a snapshot has to cover.
    pub fn writable_disks(&self) -> impl Iterator<Item = &Disk> {
        self.vm.disks.iter().filter(|disk| disk.writable())
    }

    /// Disks of a VM that is off whose definition names an image that has to
    /// stand still, because a snapshot's data lies in it: the disk and that
    /// snapshot. Starting the VM would write into the restore point.
    pub fn frozen_images(&self) -> impl Iterator<Item = (&Disk, &Snapshot)> {
        let off = self.vm.state == VmState::Stopped;
        self.writable_disks()
            .filter(move |_| off)
            .filter_map(|disk| {
                let mut paths = std::iter::once(&disk.path).chain(&disk.also);
                let held = paths.find_map(|path| held_by(&self.snapshots, path))?;
                Some((disk, held))
            })
    }

    /// The same of a VM that is on: disks of its next start under targets that it does
    /// not have now. Another image under the same target is among what differs.
    pub fn frozen_at_next_start(&self) -> impl Iterator<Item = (&DefinedDisk, &Snapshot)> {
        let on = self.vm.state != VmState::Stopped;
        self.vm
            .definition
            .disks
            .iter()
            .filter(move |disk| on && !disk.only_read())
            .filter_map(|disk| {
                let path = disk.path.as_deref()?;
                let known = self.vm.disks.iter().any(|now| now.target == disk.target);
                let held = held_by(&self.snapshots, path).filter(|_| !known)?;
                Some((disk, held))
            })
    }

    /// VMs other than this one that refer to a file.
    #[must_use]
    pub fn other_users(&self, path: &str) -> Vec<&FileUser> {
        self.users
            .iter()
            .filter_map(|users| users.get(path))
            .flatten()
            .filter(|user| user.vm != self.vm.name)
            .collect()
    }
}

/// The external snapshot whose data of a disk lies in an image, which therefore
/// has to stand still, under whatever target somebody attaches it.
#[must_use]
pub fn held_by<'a>(snapshots: &'a [Snapshot], image: &str) -> Option<&'a Snapshot> {
    snapshots.iter().find(|snapshot| {
        snapshot.disks.iter().any(|disk| {
            matches!(disk.kind, Some(Kind::External | Kind::Mixed))
                && disk.data.as_deref() == Some(image)
        })
    })
}

/// The folder of a path.
#[must_use]
pub fn folder_of(path: &str) -> &str {
    match path.rfind('/') {
        Some(0) => "/",
        Some(at) => &path[..at],
        None => "",
    }
}

/// The last part of a path.
#[must_use]
pub fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}
