//! Steps as data, and what each achieved.
//!
//! Invariants: names and fields are stored in the journal, so they are an
//! interface: a field is only ever added. A step says what is meant;
//! `perform` knows how it is done and undone.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmsnap_engine::Hold;

use super::{
    facts::Consistency, guard::GuardState, outcome::GuestReport, reason::Fault, request::WaitFor,
};

/// Where the memory of a new snapshot goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NewMemory {
    /// Nowhere.
    None,
    /// Into the image.
    Internal,
    /// Into a file.
    File(String),
}

/// How a new snapshot treats one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NewDisk {
    /// Left out.
    Leave,
    /// Inside the image.
    Internal,
    /// An overlay in a new file.
    Overlay(String),
}

/// A snapshot to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewSnapshot {
    /// Name.
    pub name: String,
    /// Description.
    pub description: String,
    /// Memory.
    pub memory: NewMemory,
    /// Every disk and drive, by target.
    pub disks: Vec<(String, NewDisk)>,
    /// libvirt itself stops the guest during the call.
    pub stops_guest: bool,
}

/// What is recorded of a new snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToRecord {
    /// Name.
    pub name: String,
    /// Consistency if no freeze had to be given up.
    pub consistency: Consistency,
    /// No policy removes it.
    pub protected: bool,
    /// Taken before a revert.
    pub safety: bool,
    /// Disks were left out.
    pub not_revertible: bool,
    /// Its memory file, whose size and checksum are kept.
    pub memory_file: Option<String>,
    /// Copy of the UEFI variables.
    pub nvram_copy: Option<String>,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    /// Drops the memory that libvirt saved for the next start.
    DropManagedSave,
    /// Starts the VM.
    Start {
        /// With its vCPUs standing still.
        paused: bool,
    },
    /// Switches the VM off.
    Stop,
    /// Waits for the guest.
    WaitFor {
        /// For what.
        what: WaitFor,
        /// How long, in milliseconds.
        timeout_ms: u64,
        /// Later steps need it: fail rather than report.
        required: bool,
    },
    /// Freezes file systems through the guest agent.
    Freeze {
        /// How long it may take, in milliseconds.
        timeout_ms: u64,
        /// Go on without when it cannot be done.
        fall_back: bool,
    },
    /// Thaws what [`Step::Freeze`] froze.
    Thaw,
    /// Suspends the vCPUs.
    Suspend {
        /// Index of a freeze that makes it unnecessary when it worked.
        unless_frozen: Option<usize>,
    },
    /// Resumes what [`Step::Suspend`] suspended.
    Resume,
    /// Copies the UEFI variables.
    CopyNvram {
        /// From the VM's file.
        from: String,
        /// To a new file.
        to: String,
    },
    /// Makes a snapshot.
    CreateSnapshot(Box<NewSnapshot>),
    /// Records what was made.
    RecordSnapshot(Box<ToRecord>),
    /// Looks whether the files of a snapshot are what they were, before anything
    /// is done to the VM.
    CheckSnapshot {
        /// Name.
        name: String,
        /// The copy of the UEFI variables that will be put back, and their file.
        nvram: Option<(String, String)>,
        /// Its memory is not loaded, and need not be whole.
        #[serde(default)]
        disks_only: bool,
    },
    /// Sets libvirt's record of the current snapshot right: which overlays are
    /// those of the present state, that the next revert deletes.
    MendRecord {
        /// Name of the snapshot.
        name: String,
        /// Target and overlay of each disk.
        overlays: Vec<(String, String)>,
    },
    /// Keeps the VM's definition in the journal.
    KeepDefinition,
    /// Reverts to a snapshot.
    Revert {
        /// Name.
        name: String,
        /// Ask libvirt to have it running afterwards.
        running: bool,
        /// Ask libvirt to have it paused afterwards.
        paused: bool,
        /// Allow what libvirt asks force for.
        force: bool,
        /// Index of the step that kept the definition.
        definition: usize,
    },
    /// Goes back to the disks of an external snapshot alone, without its memory.
    RevertDisks {
        /// Name.
        name: String,
        /// Targets of the disks that go back.
        disks: Vec<String>,
        /// Index of the step that kept the definition.
        definition: usize,
    },
    /// Puts the UEFI variables of a snapshot back.
    RestoreNvram {
        /// Copy beside the snapshot.
        from: String,
        /// The VM's file.
        to: String,
    },
    /// Arms a guard: without a confirmation the agent reverts by itself.
    ArmGuard {
        /// The snapshot that is gone back to.
        snapshot: String,
        /// How long it may take to confirm, in milliseconds.
        within_ms: u64,
        /// Index of the step that made the snapshot.
        created_by: usize,
    },
    /// Ends an open guard.
    EndGuard {
        /// Its snapshot.
        snapshot: String,
        /// How it ends.
        state: GuardState,
    },
    /// Sets the guest's clock.
    SyncClock,
    /// Deletes a snapshot through libvirt, which merges its data where others
    /// need it.
    DeleteSnapshot {
        /// Name.
        name: String,
        /// Only libvirt's record of it: its data is gone already.
        metadata_only: bool,
        /// Disks whose merge is watched.
        disks: Vec<String>,
        /// The VM is off, so libvirt boots a paused helper for the merge.
        boots_helper: bool,
        /// Bytes per second at most: the agent drives the merge of the active
        /// images itself. `None` is libvirt's own delete, which takes no limit.
        bandwidth: Option<u64>,
        /// Files that are gone afterwards.
        files: Vec<String>,
        /// Why it goes, for the record.
        rule: String,
        /// Bytes that belong to it.
        size: u64,
    },
    /// Changes the virtual size of a disk.
    Resize {
        /// Target.
        disk: String,
        /// New size in bytes.
        bytes: u64,
        /// The new size is smaller.
        shrink: bool,
        /// The VM runs: QEMU does it.
        online: bool,
    },
    /// Deletes a volume.
    DeleteVolume {
        /// Pool.
        pool: String,
        /// Name.
        name: String,
        /// Path, to look again right before.
        path: String,
        /// Bytes that it takes.
        size: u64,
    },
    /// Deletes an orphaned file that this agent made.
    DeleteFile {
        /// Path.
        path: String,
        /// Bytes that it takes.
        size: u64,
    },
}

impl Step {
    /// For a person.
    #[must_use]
    pub fn title(&self) -> String {
        match self {
            Self::DropManagedSave => "drop the managed save".into(),
            Self::Start { paused: false } => "start the VM".into(),
            Self::Start { paused: true } => "start the VM with its vCPUs standing still".into(),
            Self::Stop => "switch the VM off".into(),
            Self::WaitFor { what, .. } => match what {
                WaitFor::None => "wait for nothing".into(),
                WaitFor::Agent => "wait for the guest agent".into(),
                WaitFor::Address => "wait for an address of the guest".into(),
                WaitFor::Ssh => "wait for ssh in the guest".into(),
            },
            Self::Freeze { .. } => "freeze the file systems".into(),
            Self::Thaw => "thaw the file systems".into(),
            Self::Suspend {
                unless_frozen: None,
            } => "suspend the VM".into(),
            Self::Suspend { .. } => "suspend the VM if it could not be frozen".into(),
            Self::Resume => "resume the VM".into(),
            Self::CopyNvram { .. } => "copy the UEFI variables".into(),
            Self::CreateSnapshot(new) => format!("create snapshot {}", new.name),
            Self::RecordSnapshot(record) => format!("record snapshot {}", record.name),
            Self::CheckSnapshot { name, .. } => format!("check the files of snapshot {name}"),
            Self::MendRecord { name, .. } => format!("set the record of snapshot {name} right"),
            Self::KeepDefinition => "keep the definition".into(),
            Self::Revert { name, .. } => format!("revert to snapshot {name}"),
            Self::RevertDisks { name, .. } => {
                format!("revert to the disks of snapshot {name}, without its memory")
            }
            Self::RestoreNvram { .. } => "put the UEFI variables back".into(),
            Self::ArmGuard { snapshot, .. } => {
                format!("revert to {snapshot} unless the change is confirmed")
            }
            Self::EndGuard { snapshot, state } => {
                format!("end the guard of {snapshot}: {}", state.name())
            }
            Self::SyncClock => "set the guest's clock".into(),
            Self::DeleteSnapshot {
                name,
                metadata_only: true,
                ..
            } => format!("forget snapshot {name}, whose data is gone"),
            Self::DeleteSnapshot { name, .. } => format!("delete snapshot {name}"),
            Self::Resize { disk, bytes, .. } => format!("resize {disk} to {bytes} bytes"),
            Self::DeleteVolume { pool, name, .. } => format!("delete volume {name} of pool {pool}"),
            Self::DeleteFile { path, .. } => format!("delete the orphan {path}"),
        }
    }

    /// What undoes it, for a person; empty when nothing has to be undone.
    #[must_use]
    pub fn undo_title(&self) -> &'static str {
        match self {
            Self::Freeze { .. } => "thaw the file systems",
            Self::Suspend { .. } => "resume the VM",
            Self::CopyNvram { .. } => "delete the copy",
            Self::CreateSnapshot(_) => "remove what was made of the snapshot",
            Self::RecordSnapshot(_) => "forget the record",
            Self::ArmGuard { .. } => "disarm the guard",
            Self::EndGuard { .. } => "arm the guard again",
            Self::Revert { .. } | Self::RevertDisks { .. } => {
                "put definition and files in agreement"
            }
            _ => "",
        }
    }

    /// Whether it changes anything that outlives the run.
    #[must_use]
    pub fn changes(&self) -> bool {
        !matches!(
            self,
            Self::WaitFor { .. } | Self::KeepDefinition | Self::CheckSnapshot { .. }
        )
    }
}

impl vmsnap_engine::Step for Step {
    fn name(&self) -> &'static str {
        match self {
            Self::DropManagedSave => "drop-managed-save",
            Self::Start { .. } => "start",
            Self::Stop => "stop",
            Self::WaitFor { .. } => "wait-for",
            Self::Freeze { .. } => "freeze",
            Self::Thaw => "thaw",
            Self::Suspend { .. } => "suspend",
            Self::Resume => "resume",
            Self::CopyNvram { .. } => "copy-nvram",
            Self::CreateSnapshot(_) => "create-snapshot",
            Self::RecordSnapshot(_) => "record-snapshot",
            Self::CheckSnapshot { .. } => "check-snapshot",
            Self::MendRecord { .. } => "mend-record",
            Self::KeepDefinition => "keep-definition",
            Self::Revert { .. } => "revert",
            Self::RevertDisks { .. } => "revert-disks",
            Self::RestoreNvram { .. } => "restore-nvram",
            Self::ArmGuard { .. } => "arm-guard",
            Self::EndGuard { .. } => "end-guard",
            Self::SyncClock => "sync-clock",
            Self::DeleteSnapshot { .. } => "delete-snapshot",
            Self::Resize { .. } => "resize",
            Self::DeleteVolume { .. } => "delete-volume",
            Self::DeleteFile { .. } => "delete-file",
        }
    }

    fn takes(&self) -> Option<Hold> {
        match self {
            Self::Freeze { .. } => Some(Hold::Frozen),
            Self::Suspend { .. }
            | Self::DeleteSnapshot {
                boots_helper: true, ..
            } => Some(Hold::Suspended),
            Self::CreateSnapshot(new) if new.stops_guest => Some(Hold::Suspended),
            _ => None,
        }
    }

    fn releases(&self) -> Option<Hold> {
        match self {
            Self::Thaw => Some(Hold::Frozen),
            Self::Resume
            | Self::DeleteSnapshot {
                boots_helper: true, ..
            } => Some(Hold::Suspended),
            Self::CreateSnapshot(new) if new.stops_guest => Some(Hold::Suspended),
            _ => None,
        }
    }

    fn point_of_no_return(&self) -> bool {
        matches!(
            self,
            Self::DropManagedSave
                | Self::Revert { .. }
                | Self::RevertDisks { .. }
                | Self::DeleteSnapshot { .. }
                | Self::Resize { .. }
                | Self::DeleteVolume { .. }
                | Self::DeleteFile { .. }
        )
    }

    fn owed_after(&self, behind: &Self) -> bool {
        // A reverted VM gets its state, and its variables before it; what it was guarded
        // against is taken back, and must not be once more.
        matches!(behind, Self::Revert { .. } | Self::RevertDisks { .. })
            && matches!(
                self,
                Self::Start { .. } | Self::Stop | Self::RestoreNvram { .. } | Self::EndGuard { .. }
            )
    }
}

/// What a step achieved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "done", rename_all = "snake_case")]
pub enum Done {
    /// Done; nothing more to say than the note.
    Plain {
        /// For a person.
        note: String,
    },
    /// A hold was taken.
    Held {
        /// For a person.
        note: String,
    },
    /// A hold was not needed, or could not be taken and was not demanded.
    NotHeld {
        /// Why.
        note: String,
    },
    /// A hold was released.
    Released {
        /// Milliseconds that the guest was held, as measured.
        held_ms: u64,
    },
    /// A snapshot was made.
    Created {
        /// libvirt's creation time in seconds.
        created: i64,
        /// Milliseconds that the vCPUs stood still, when they did.
        stopped_ms: Option<u64>,
        /// For a person.
        note: String,
    },
    /// A definition was kept, and what it takes to make it true again.
    Definition {
        /// The inactive XML.
        xml: String,
        /// libvirt's number of the run of the VM; `None` when it was off.
        #[serde(default)]
        id: Option<u32>,
        /// What each disk's image stands on: target, backing image and its format.
        #[serde(default)]
        backing: Vec<(String, String, String)>,
        /// libvirt's records of the snapshots that a revert changes: name and
        /// XML.
        #[serde(default)]
        records: Vec<(String, String)>,
        /// The snapshot that the present state descends from.
        #[serde(default)]
        current: Option<String>,
        /// For each image on which a revert puts an overlay, the overlays named by
        /// the second that lay beside it before; without them none is taken for
        /// the run's own.
        #[serde(default)]
        overlays: Vec<(String, Vec<String>)>,
    },
    /// The guest is there.
    Guest {
        /// What it told.
        report: Box<GuestReport>,
    },
    /// The guest did not come in time.
    Late {
        /// How far it came.
        fault: Box<Fault>,
        /// What it told so far.
        report: Box<GuestReport>,
    },
    /// The clock was looked at.
    Clock {
        /// Milliseconds that it was behind; `None` when unknown.
        skew_ms: Option<i64>,
        /// Whether it was set.
        set: bool,
        /// For a person.
        note: String,
    },
    /// A guard was armed.
    Guarded {
        /// Until when the change has to be confirmed.
        deadline: Timestamp,
    },
    /// A snapshot was deleted.
    Deleted {
        /// Bytes merged.
        merged_bytes: u64,
    },
    /// A disk has its new size.
    Resized {
        /// Bytes.
        bytes: u64,
    },
}

impl Done {
    /// For a person; empty when the title says all.
    #[must_use]
    pub fn note(&self) -> String {
        match self {
            Self::Plain { note }
            | Self::Held { note }
            | Self::NotHeld { note }
            | Self::Created { note, .. }
            | Self::Clock { note, .. } => note.clone(),
            Self::Released { held_ms } => format!("held for {held_ms} ms"),
            Self::Definition { .. } => String::new(),
            Self::Guest { report } => format!("ready after {} ms", report.ready_ms),
            Self::Late { fault, .. } => fault.message.clone(),
            Self::Guarded { deadline } => format!("to be confirmed until {deadline}"),
            Self::Deleted { merged_bytes: 0 } => String::new(),
            Self::Deleted { merged_bytes } => format!("{merged_bytes} bytes merged"),
            Self::Resized { bytes } => format!("the disk has {bytes} bytes"),
        }
    }
}
