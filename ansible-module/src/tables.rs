//! The options of both modules.
//!
//! Purpose: the one truth about what a task may say. The documentation stubs
//! of the collection are held against these tables by a test.
//!
//! Invariants: names are unique across names and aliases; an option without
//! actions is for all of them.

use crate::argument::{Argument, Fallback, Kind};

/// The actions of `vm_snapshot`, as a playbook writes them.
pub const ACTIONS: &[&str] = &["create", "revert", "commit", "list", "cleanup", "confirm"];

const CREATE: &[&str] = &["create"];
const REVERT: &[&str] = &["revert"];
const COMMIT: &[&str] = &["commit"];
const CLEANUP: &[&str] = &["cleanup"];
const CREATE_REVERT: &[&str] = &["create", "revert"];
const COMMIT_CLEANUP: &[&str] = &["commit", "cleanup"];
const STORAGE: &[&str] = &["commit", "cleanup", "list"];

const AGENT: Argument = Argument::new(
    "agent",
    Kind::Text,
    "where the agent listens: unix:///path or host:port",
);

const CA_PATH: Argument = Argument::new(
    "ca_path",
    Kind::Text,
    "the CA that signed the agent's certificate",
);

const CLIENT_CERT: Argument = Argument::new(
    "client_cert",
    Kind::Text,
    "the certificate that says who calls",
);

const CLIENT_KEY: Argument = Argument::new("client_key", Kind::Text, "the key of client_cert");

/// The options of `vm_snapshot`.
pub const VM_SNAPSHOT: &[Argument] = &[
    Argument::new(
        "vm_name",
        Kind::List,
        "the VM, or a list of VMs that are handled independently",
    )
    .also_called(&["name"])
    .required(),
    Argument::new("action", Kind::Text, "what to do")
        .one_of(ACTIONS)
        .required(),
    Argument::new("snapshot_name", Kind::Text, "the snapshot"),
    Argument::new("description", Kind::Text, "a text kept with the snapshot").only_for(CREATE),
    Argument::new("memory", Kind::Flag, "save memory too")
        .or(Fallback::Flag(false))
        .only_for(CREATE),
    Argument::new("kind", Kind::Text, "where the data of the snapshot is kept")
        .one_of(&["auto", "internal", "external"])
        .or(Fallback::Text("auto"))
        .only_for(CREATE),
    Argument::new(
        "consistency",
        Kind::Text,
        "how the guest is made consistent",
    )
    .one_of(&["auto", "filesystem", "suspend", "crash"])
    .or(Fallback::Text("auto"))
    .only_for(CREATE),
    Argument::new(
        "if_exists",
        Kind::Text,
        "what to do when a snapshot of that name is there",
    )
    .one_of(&["ok", "fail", "replace"])
    .or(Fallback::Text("ok"))
    .only_for(CREATE),
    Argument::new(
        "max_age",
        Kind::Duration,
        "refuse a snapshot of that name that is older",
    )
    .only_for(CREATE_REVERT),
    Argument::new(
        "exclude_disks",
        Kind::List,
        "disks to leave out, by target name",
    )
    .only_for(CREATE),
    Argument::new(
        "accept_no_revert",
        Kind::Flag,
        "make a snapshot that cannot be reverted to",
    )
    .or(Fallback::Flag(false))
    .only_for(CREATE),
    Argument::new(
        "protected",
        Kind::Flag,
        "no retention policy removes the snapshot",
    )
    .or(Fallback::Flag(false))
    .only_for(CREATE),
    Argument::new(
        "revert_unless_confirmed",
        Kind::Duration,
        "the agent reverts by itself unless the change is confirmed within this time",
    )
    .only_for(CREATE),
    Argument::new(
        "max_stop",
        Kind::Duration,
        "refuse when the guest would stand still for longer",
    )
    .only_for(CREATE),
    Argument::new(
        "freeze_timeout",
        Kind::Duration,
        "give up freezing after this time",
    )
    .or(Fallback::Text("10s"))
    .only_for(CREATE),
    Argument::new(
        "start_if_stopped",
        Kind::Flag,
        "start the VM first when it is off",
    )
    .or(Fallback::Flag(false)),
    Argument::new(
        "state_after",
        Kind::Text,
        "the state of the VM after the revert",
    )
    .one_of(&["auto", "running", "paused", "stopped"])
    .or(Fallback::Text("auto"))
    .only_for(REVERT),
    Argument::new(
        "safety_snapshot",
        Kind::Flag,
        "keep the present state as a snapshot first",
    )
    .or(Fallback::Flag(false))
    .only_for(REVERT),
    Argument::new(
        "wait_for",
        Kind::Text,
        "what to wait for before the task is over",
    )
    .one_of(&["none", "agent", "address", "ssh"])
    .or(Fallback::Text("none"))
    .only_for(CREATE_REVERT),
    Argument::new("wait_timeout", Kind::Duration, "how long to wait for it")
        .or(Fallback::Text("300s"))
        .only_for(CREATE_REVERT),
    Argument::new(
        "sync_clock",
        Kind::Flag,
        "set the guest's clock where memory was saved",
    )
    .or(Fallback::Flag(true))
    .only_for(REVERT),
    Argument::new(
        "force",
        Kind::Flag,
        "do what libvirt asks force for, drop a managed save, and let snapshots go that stand on an internal one's image",
    )
    .or(Fallback::Flag(false))
    .only_for(REVERT),
    Argument::new(
        "disks_only",
        Kind::Flag,
        "go back to the disks alone, without the memory that was saved",
    )
    .or(Fallback::Flag(false))
    .only_for(REVERT),
    Argument::new("all", Kind::Flag, "merge the whole chain of the VM")
        .or(Fallback::Flag(false))
        .only_for(COMMIT),
    Argument::new("resize_to", Kind::Size, "the new virtual size of the disk").only_for(COMMIT),
    Argument::new(
        "resize_disk",
        Kind::Text,
        "the disk to resize, by target name",
    )
    .only_for(COMMIT),
    Argument::new("allow_shrink", Kind::Flag, "make a disk smaller")
        .or(Fallback::Flag(false))
        .only_for(COMMIT),
    Argument::new(
        "bandwidth",
        Kind::Rate,
        "most bytes a second that a merge copies",
    )
    .only_for(COMMIT_CLEANUP),
    Argument::new(
        "children",
        Kind::Text,
        "what becomes of the snapshot's children",
    )
    .one_of(&["keep", "delete", "only"])
    .or(Fallback::Text("keep"))
    .only_for(CLEANUP),
    Argument::new("keep_last", Kind::Number, "keep the newest so many").only_for(CLEANUP),
    Argument::new("keep_within", Kind::Duration, "keep those that are younger").only_for(CLEANUP),
    Argument::new("keep_hourly", Kind::Number, "keep one an hour, so many").only_for(CLEANUP),
    Argument::new("keep_daily", Kind::Number, "keep one a day, so many").only_for(CLEANUP),
    Argument::new("keep_weekly", Kind::Number, "keep one a week, so many").only_for(CLEANUP),
    Argument::new("keep_monthly", Kind::Number, "keep one a month, so many").only_for(CLEANUP),
    Argument::new(
        "older_than",
        Kind::Duration,
        "a policy removes only those that are older",
    )
    .only_for(CLEANUP),
    Argument::new(
        "name_pattern",
        Kind::Text,
        "a policy sees only names that match this glob",
    )
    .only_for(CLEANUP),
    Argument::new(
        "include_foreign",
        Kind::Flag,
        "a policy sees snapshots that others made",
    )
    .or(Fallback::Flag(false))
    .only_for(CLEANUP),
    Argument::new(
        "time_zone",
        Kind::Text,
        "the zone in which hours, days, weeks and months begin",
    )
    .only_for(CLEANUP),
    Argument::new(
        "leftovers",
        Kind::List,
        "volumes of the pool to delete when no VM refers to them",
    )
    .or(Fallback::List(&["{vm_name}-old.qcow2"]))
    .only_for(CLEANUP),
    Argument::new(
        "orphans",
        Kind::Text,
        "what to do with files that no VM refers to",
    )
    .one_of(&["ignore", "report", "delete"])
    .or(Fallback::Text("ignore"))
    .only_for(CLEANUP),
    Argument::new("pool", Kind::Text, "the storage pool")
        .or(Fallback::Text("default"))
        .only_for(STORAGE),
    Argument::new(
        "request_id",
        Kind::Text,
        "a name for this run; the same name joins the same run",
    ),
    Argument::new(
        "plan_hash",
        Kind::Text,
        "run only if the plan is still the one of this hash",
    ),
    Argument::new(
        "timeout",
        Kind::Duration,
        "cancel and undo the run when it takes longer",
    ),
    Argument::new("wait", Kind::Flag, "wait for the end of the run").or(Fallback::Flag(true)),
    AGENT,
    CA_PATH,
    CLIENT_CERT,
    CLIENT_KEY,
];

/// The options of `vm_snapshot_info`.
pub const VM_SNAPSHOT_INFO: &[Argument] = &[
    Argument::new(
        "vm_name",
        Kind::List,
        "the VM or VMs to read; all when not given",
    )
    .also_called(&["name"]),
    Argument::new("pool", Kind::Text, "the storage pool to read").or(Fallback::Text("default")),
    Argument::new(
        "workflow_id",
        Kind::Text,
        "one run to read, and nothing else",
    ),
    Argument::new(
        "workflows",
        Kind::Number,
        "how many of the newest runs to read",
    )
    .or(Fallback::Number(20)),
    Argument::new("timeout", Kind::Duration, "give up reading after this time")
        .or(Fallback::Text("60s")),
    AGENT,
    CA_PATH,
    CLIENT_CERT,
    CLIENT_KEY,
];
