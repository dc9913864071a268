//! Why something is refused or failed: one reason, one meaning, one page
//! (`docs/errors/REASON.md`).
//!
//! Invariants: a reason's text never changes its meaning; messages are whole
//! sentences without a source's own text repeated; nothing shows Debug output.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $text:literal,)*) => {
        /// A stable reason code.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum Reason {
            $($(#[$doc])* #[serde(rename = $text)] $variant,)*
        }

        impl Reason {
            /// All reasons, for the documentation and its test.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant,)*];

            /// The code as it is sent and stored.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Reason::$variant => $text,)*
                }
            }
        }
    };
}

reasons! {
    /// A field of the request is malformed or does not belong to the action.
    BadRequest = "BAD_REQUEST",
    /// The request is larger than what is taken.
    RequestTooLarge = "REQUEST_TOO_LARGE",
    /// No VM of that name.
    VmNotFound = "VM_NOT_FOUND",
    /// No snapshot of that name.
    SnapshotNotFound = "SNAPSHOT_NOT_FOUND",
    /// A snapshot of that name is there, and `if_exists` is `fail`.
    SnapshotExists = "SNAPSHOT_EXISTS",
    /// A snapshot of that name is there, but it is not what is asked for.
    SnapshotConflict = "SNAPSHOT_CONFLICT",
    /// The snapshot is older than `max_age`.
    SnapshotTooOld = "SNAPSHOT_TOO_OLD",
    /// The data of the snapshot is gone, torn or merged away.
    SnapshotNotWhole = "SNAPSHOT_NOT_WHOLE",
    /// The snapshot was made such that it cannot be reverted to.
    SnapshotNotRevertible = "SNAPSHOT_NOT_REVERTIBLE",
    /// The snapshot is protected.
    SnapshotProtected = "SNAPSHOT_PROTECTED",
    /// A guarded change of the VM is pending.
    SnapshotGuarded = "SNAPSHOT_GUARDED",
    /// Other snapshots branch off below and would lose or change their data.
    SnapshotBranches = "SNAPSHOT_BRANCHES",
    /// libvirt does not know which snapshot the present state stands on.
    CurrentUnknown = "CURRENT_SNAPSHOT_UNKNOWN",
    /// Internal and external snapshots would be mixed on one VM, or are.
    KindsMixed = "KINDS_MIXED",
    /// This host cannot revert to or delete that kind of snapshot.
    KindUnsupported = "KIND_UNSUPPORTED",
    /// A disk cannot hold a snapshot of that kind.
    DiskUnsupported = "DISK_UNSUPPORTED",
    /// A disk of that name does not exist or it is not clear which is meant.
    DiskUnknown = "DISK_UNKNOWN",
    /// Memory cannot be saved: a device forbids it.
    MemoryNotSavable = "MEMORY_NOT_SAVABLE",
    /// The consistency that was demanded cannot be had.
    ConsistencyNotMet = "CONSISTENCY_NOT_MET",
    /// The guest would stand still for longer than `max_stop`.
    StopTooLong = "STOP_TOO_LONG",
    /// The VM has to run for this.
    DomainNotRunning = "DOMAIN_NOT_RUNNING",
    /// The VM is in a state in which this cannot be done.
    DomainState = "DOMAIN_STATE",
    /// The guest's file systems are frozen by somebody else.
    GuestFrozen = "GUEST_FROZEN",
    /// A managed save holds memory that belongs to the present disks.
    ManagedSavePresent = "MANAGED_SAVE_PRESENT",
    /// A block job is open on a disk.
    BlockJobActive = "BLOCK_JOB_ACTIVE",
    /// The definition names another image than the one in which the VM's present
    /// data lies.
    DefinitionDiffers = "DEFINITION_DIFFERS",
    /// Another VM's chain uses a file that would be written or deleted.
    FileShared = "FILE_SHARED",
    /// A file that would be made is there already.
    FileExists = "FILE_EXISTS",
    /// A drive's medium would make a later revert fail.
    MediaNotCovered = "MEDIA_NOT_COVERED",
    /// Not enough free space.
    NoSpace = "NO_SPACE",
    /// Shrinking was not allowed, or the VM runs.
    ShrinkRefused = "SHRINK_REFUSED",
    /// The pool does not exist or is not active.
    PoolNotFound = "POOL_NOT_FOUND",
    /// The image cannot be written: permission, owner or read-only mount.
    StorageNotWritable = "STORAGE_NOT_WRITABLE",
    /// Storage that other hosts may use, and nobody said that it is ours alone.
    StorageShared = "STORAGE_SHARED",
    /// The chain is too deep.
    ChainTooDeep = "CHAIN_TOO_DEEP",
    /// Another run is changing this VM.
    VmBusy = "VM_BUSY",
    /// The plan is not the one that was demanded.
    PlanChanged = "PLAN_CHANGED",
    /// What was waited for did not come in time; the work itself is done.
    WaitTimeout = "WAIT_TIMEOUT",
    /// Somebody cancelled the run.
    Cancelled = "CANCELLED",
    /// The run took longer than its time limit.
    TimedOut = "TIMED_OUT",
    /// The agent stopped in the middle and undid the run when it came back.
    Interrupted = "INTERRUPTED",
    /// No run of that id.
    WorkflowNotFound = "WORKFLOW_NOT_FOUND",
    /// The run is not in a state in which this can be done to it.
    WorkflowState = "WORKFLOW_STATE",
    /// The request id belongs to a run of something else.
    RequestIdReused = "REQUEST_ID_REUSED",
    /// The guest agent did not answer.
    GuestAgentUnavailable = "GUEST_AGENT_UNAVAILABLE",
    /// The guest agent refused, with its own words.
    GuestAgentFailed = "GUEST_AGENT_FAILED",
    /// A call to libvirt went past its deadline.
    HypervisorOverdue = "HYPERVISOR_OVERDUE",
    /// libvirt refused, with its own words.
    HypervisorFailed = "HYPERVISOR_FAILED",
    /// libvirt cannot be reached.
    HypervisorUnreachable = "HYPERVISOR_UNREACHABLE",
    /// The journal cannot be written.
    JournalUnavailable = "JOURNAL_UNAVAILABLE",
    /// Too many runs or streams.
    LimitReached = "LIMIT_REACHED",
    /// The agent is stopping.
    ShuttingDown = "SHUTTING_DOWN",
    /// The caller may not do this.
    NotAllowed = "NOT_ALLOWED",
    /// No known issue of that id.
    IssueNotFound = "ISSUE_NOT_FOUND",
    /// A fault in the agent itself.
    Internal = "INTERNAL",
}

impl fmt::Display for Reason {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.as_str())
    }
}

/// One malformed field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Violation {
    /// Path of the field, as on the wire: `create.max_age`.
    pub field: String,
    /// What is wrong with which value, and what would be right.
    pub problem: String,
}

/// Why something was refused or failed, ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The reason.
    pub reason: Reason,
    /// A whole sentence for a person.
    pub message: String,
    /// What a program may want: names, paths, bytes.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// Malformed fields, for [`Reason::BadRequest`].
    #[serde(default)]
    pub violations: Vec<Violation>,
}

impl Fault {
    /// A fault without metadata.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            metadata: BTreeMap::new(),
            violations: Vec::new(),
        }
    }

    /// Adds one entry for programs.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl fmt::Display) -> Self {
        self.metadata.insert(key.to_owned(), value.to_string());
        self
    }

    /// A malformed field.
    pub fn bad_field(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::bad_fields(vec![Violation {
            field: field.into(),
            problem: problem.into(),
        }])
    }

    /// Several malformed fields.
    #[must_use]
    pub fn bad_fields(violations: Vec<Violation>) -> Self {
        let message = violations
            .iter()
            .map(|violation| format!("{}: {}", violation.field, violation.problem))
            .collect::<Vec<_>>()
            .join("; ");
        Self {
            reason: Reason::BadRequest,
            message,
            metadata: BTreeMap::new(),
            violations,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}: {}", self.reason, self.message)
    }
}

impl std::error::Error for Fault {}
