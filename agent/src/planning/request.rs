//! What is asked for, typed and checked at the door.
//!
//! Invariant: a [`Request`] that passed [`Request::check`] is well-formed;
//! whether it can be met is the plan's question, not this module's.

use std::time::Duration;

use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use super::{
    facts::{Consistency, Kind},
    names,
    reason::{Fault, Violation},
};

/// Longest description that is stored, in bytes.
pub const MAX_DESCRIPTION: usize = 4096;
/// How long freezing may take unless said otherwise.
pub const FREEZE_TIMEOUT: Duration = Duration::from_secs(10);
/// The shortest time in which a guarded change has to be confirmed.
pub const SHORTEST_GUARD: Duration = Duration::from_secs(1);
/// The longest.
pub const LONGEST_GUARD: Duration = Duration::from_secs(30 * 86_400);
/// How long to wait for a guest unless said otherwise.
pub const WAIT_TIMEOUT: Duration = Duration::from_secs(300);
/// The pool that is meant when none is named.
pub const DEFAULT_POOL: &str = "default";

/// One request: one action on one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Name of the VM.
    pub vm: String,
    /// What to do.
    pub action: Action,
    /// Start the VM first when it is off.
    pub start_if_stopped: bool,
    /// Pool for storage facts, left-overs and resizing.
    pub pool: String,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Take a snapshot.
    Create(Create),
    /// Go back to a snapshot.
    Revert(Revert),
    /// Keep the present state and drop restore points.
    Commit(Commit),
    /// Report.
    List(List),
    /// Remove snapshots, left-overs, orphans.
    Cleanup(Cleanup),
    /// Confirm a guarded change.
    Confirm {
        /// The guarded snapshot, or empty for the only one.
        name: String,
    },
}

impl Action {
    /// All stable words.
    pub const NAMES: [&str; 6] = ["create", "revert", "commit", "list", "cleanup", "confirm"];

    /// Stable word for logs, tables and file names.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::Revert(_) => "revert",
            Self::Commit(_) => "commit",
            Self::List(_) => "list",
            Self::Cleanup(_) => "cleanup",
            Self::Confirm { .. } => "confirm",
        }
    }

    /// Whether this action never changes anything.
    #[must_use]
    pub fn reads_only(&self) -> bool {
        matches!(self, Self::List(_))
    }
}

/// What to do when a snapshot of that name is there already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IfExists {
    /// Leave it, change nothing, say how old it is.
    #[default]
    Ok,
    /// Refuse.
    Fail,
    /// Delete it first.
    Replace,
}

/// What to wait for at the end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitFor {
    /// Nothing.
    #[default]
    None,
    /// The guest agent answers.
    Agent,
    /// The guest has an address.
    Address,
    /// An ssh server greets there, seen from the hypervisor.
    Ssh,
}

/// Options of create.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Create {
    /// Name; empty makes one from the time.
    pub name: String,
    /// For people.
    pub description: String,
    /// Save memory too.
    pub memory: bool,
    /// Demanded kind; `None` decides.
    pub kind: Option<Kind>,
    /// Demanded consistency; `None` decides.
    pub consistency: Option<Consistency>,
    /// What to do when the name is taken.
    pub if_exists: IfExists,
    /// An existing snapshot that is older is refused.
    pub max_age: Option<Duration>,
    /// Targets of disks to leave out.
    pub exclude_disks: Vec<String>,
    /// Accept that the snapshot cannot be reverted to.
    pub accept_no_revert: bool,
    /// No policy removes it.
    pub protected: bool,
    /// Revert by itself unless confirmed within this time.
    pub revert_unless_confirmed: Option<Duration>,
    /// Refuse when the guest would stand still for longer.
    pub max_stop: Option<Duration>,
    /// Give up freezing after this time.
    pub freeze_timeout: Duration,
    /// What to wait for at the end.
    pub wait_for: WaitFor,
    /// How long to wait for it.
    pub wait_timeout: Duration,
}

impl Default for Create {
    fn default() -> Self {
        Self {
            name: String::new(),
            description: String::new(),
            memory: false,
            kind: None,
            consistency: None,
            if_exists: IfExists::Ok,
            max_age: None,
            exclude_disks: Vec::new(),
            accept_no_revert: false,
            protected: false,
            revert_unless_confirmed: None,
            max_stop: None,
            freeze_timeout: FREEZE_TIMEOUT,
            wait_for: WaitFor::None,
            wait_timeout: WAIT_TIMEOUT,
        }
    }
}

/// The state that a revert ends in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateAfter {
    /// As saved when memory was saved; else running if the VM runs now or ran
    /// then; else stopped.
    #[default]
    Auto,
    /// Running.
    Running,
    /// Paused.
    Paused,
    /// Off.
    Stopped,
}

/// Options of revert.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revert {
    /// Name of the snapshot.
    pub name: String,
    /// State to end in.
    pub state_after: StateAfter,
    /// Keep the present state as a snapshot first.
    pub safety_snapshot: bool,
    /// What to wait for at the end.
    pub wait_for: WaitFor,
    /// How long to wait for it.
    pub wait_timeout: Duration,
    /// Set the guest's clock where memory was saved.
    pub sync_clock: bool,
    /// What libvirt itself asks force for, dropping a managed save, and letting
    /// external snapshots go that stand on the image of an internal one.
    pub force: bool,
    /// A snapshot that is older is refused.
    pub max_age: Option<Duration>,
    /// Go back to the disks alone, also where the snapshot holds memory.
    #[serde(default)]
    pub disks_only: bool,
}

impl Revert {
    /// The defaults, to the snapshot `name`.
    pub fn to(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            state_after: StateAfter::Auto,
            safety_snapshot: false,
            wait_for: WaitFor::None,
            wait_timeout: WAIT_TIMEOUT,
            sync_clock: true,
            force: false,
            max_age: None,
            disks_only: false,
        }
    }
}

/// Options of commit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Drop this restore point and those after it; empty merges nothing.
    pub name: String,
    /// Merge the whole chain of this VM.
    pub all: bool,
    /// New virtual size in bytes.
    pub resize_to: Option<u64>,
    /// Target of the disk to resize; empty decides.
    pub resize_disk: String,
    /// Allow a smaller size.
    pub allow_shrink: bool,
    /// Bytes per second; `None` is unlimited.
    pub bandwidth: Option<u64>,
}

/// Options of list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct List {
    /// Only this snapshot; empty lists all.
    pub name: String,
}

/// What to do with the children of a snapshot that goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Children {
    /// They stay.
    #[default]
    Keep,
    /// They go too.
    Delete,
    /// Only they go.
    Only,
}

/// What to do with files that no VM refers to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Orphans {
    /// Do not look.
    Ignore,
    /// Tell of them.
    #[default]
    Report,
    /// Delete those that this agent made.
    Delete,
}

/// A retention policy. Keep rules unite; `older_than` and `name_pattern` narrow.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Keep this many of the newest.
    pub keep_last: Option<u32>,
    /// Keep what is younger.
    pub keep_within: Option<Duration>,
    /// Keep the newest of each of so many hours.
    pub keep_hourly: Option<u32>,
    /// Keep the newest of each of so many days.
    pub keep_daily: Option<u32>,
    /// Keep the newest of each of so many weeks, beginning on Monday.
    pub keep_weekly: Option<u32>,
    /// Keep the newest of each of so many months.
    pub keep_monthly: Option<u32>,
    /// Only what is older may go.
    pub older_than: Option<Duration>,
    /// Only what matches may go.
    pub name_pattern: String,
    /// Snapshots that this agent did not make may go too.
    pub include_foreign: bool,
    /// IANA zone in which hours, days, weeks and months begin; empty is the host's.
    pub time_zone: String,
}

impl Policy {
    /// Whether any rule is given.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.keep_last.is_some()
            || self.keep_within.is_some()
            || self.keep_hourly.is_some()
            || self.keep_daily.is_some()
            || self.keep_weekly.is_some()
            || self.keep_monthly.is_some()
            || self.older_than.is_some()
            || !self.name_pattern.is_empty()
    }

    /// Whether a rule goes by the calendar, so that the time zone matters.
    #[must_use]
    pub fn counts_periods(&self) -> bool {
        self.keep_hourly.is_some()
            || self.keep_daily.is_some()
            || self.keep_weekly.is_some()
            || self.keep_monthly.is_some()
    }

    /// The pattern that names have to match; `None` when none is given.
    ///
    /// # Errors
    /// When it is not a glob.
    pub fn pattern(&self) -> Result<Option<glob::Pattern>, Fault> {
        if self.name_pattern.is_empty() {
            return Ok(None);
        }
        glob::Pattern::new(&self.name_pattern)
            .map(Some)
            .map_err(|error| {
                Fault::bad_field(
                    "cleanup.name_pattern",
                    format!(
                        "'{}' is not a pattern: {} at character {}; use names with *, ? and [...]",
                        self.name_pattern.escape_debug(),
                        error.msg,
                        error.pos + 1
                    ),
                )
            })
    }

    /// The time zone in which hours, days, weeks and months begin: the one that
    /// is asked for, else the host's, by its IANA name.
    ///
    /// # Errors
    /// When there is no such zone.
    pub fn zone(&self, host: &str) -> Result<TimeZone, Fault> {
        let name = match (self.time_zone.as_str(), host) {
            ("", "") => return Ok(TimeZone::UTC),
            ("", host) => host,
            (asked, _) => asked,
        };
        TimeZone::get(name).map_err(|_| {
            Fault::bad_field(
                "cleanup.time_zone",
                format!(
                    "'{}' is not a known time zone; use an IANA name such as Europe/Prague",
                    name.escape_debug()
                ),
            )
        })
    }

    fn check(&self, note: &mut impl FnMut(&str, String)) {
        if self.include_foreign && !self.is_set() {
            note(
                "cleanup.include_foreign",
                "widens a policy, and none is given; add a rule such as keep_last".into(),
            );
        }
        if !self.time_zone.is_empty() && !self.is_set() {
            note(
                "cleanup.time_zone",
                format!(
                    "'{}' is given without a policy; add a rule such as keep_daily",
                    self.time_zone.escape_debug()
                ),
            );
        }
        for (field, count) in [
            ("cleanup.keep_last", self.keep_last),
            ("cleanup.keep_hourly", self.keep_hourly),
            ("cleanup.keep_daily", self.keep_daily),
            ("cleanup.keep_weekly", self.keep_weekly),
            ("cleanup.keep_monthly", self.keep_monthly),
        ] {
            if count == Some(0) {
                note(
                    field,
                    "is 0, which would keep nothing; give 1 or more, or leave it out".into(),
                );
            }
        }
        for (field, limit) in [
            ("cleanup.keep_within", self.keep_within),
            ("cleanup.older_than", self.older_than),
        ] {
            if limit.is_some_and(|limit| limit.is_zero()) {
                note(
                    field,
                    "is 0; give a duration such as 7d, or leave it out".into(),
                );
            }
        }
        for (field, text, fault) in [
            (
                "cleanup.name_pattern",
                &self.name_pattern,
                self.pattern().err(),
            ),
            ("cleanup.time_zone", &self.time_zone, self.zone("").err()),
        ] {
            match (names::check_reference(text), fault) {
                (Err(problem), _) => note(field, problem),
                (Ok(()), Some(fault)) => {
                    for violation in fault.violations {
                        note(&violation.field, violation.problem);
                    }
                }
                (Ok(()), None) => {}
            }
        }
    }
}

/// Options of cleanup.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cleanup {
    /// One snapshot; empty applies the policy, or only left-overs and orphans.
    pub name: String,
    /// What to do with its children.
    pub children: Children,
    /// The policy, when no snapshot is named.
    pub policy: Policy,
    /// Volumes to remove from the pool; `None` is the default list.
    pub leftovers: Option<Vec<String>>,
    /// What to do with orphaned files.
    pub orphans: Orphans,
    /// Bytes per second for merges; `None` is unlimited.
    pub bandwidth: Option<u64>,
}

impl Request {
    /// The snapshot that the request names; empty for none.
    #[must_use]
    pub fn snapshot_name(&self) -> &str {
        match &self.action {
            Action::Create(create) => &create.name,
            Action::Revert(revert) => &revert.name,
            Action::Commit(commit) => &commit.name,
            Action::List(list) => &list.name,
            Action::Cleanup(cleanup) => &cleanup.name,
            Action::Confirm { name } => name,
        }
    }

    /// Checks the form of every field.
    ///
    /// # Errors
    /// A [`Fault`] that names each bad field, its value and what would be right.
    pub fn check(&self) -> Result<(), Fault> {
        let mut bad = Vec::new();
        let mut note = |field: &str, problem: String| {
            bad.push(Violation {
                field: field.to_owned(),
                problem,
            });
        };
        if self.vm.is_empty() {
            note("vm_name", "is empty; the name of a VM is needed".into());
        } else if let Err(problem) = names::check_reference(&self.vm) {
            note("vm_name", problem);
        }
        if let Err(problem) = names::check_reference(&self.pool) {
            note("pool", problem);
        }
        match &self.action {
            Action::Create(create) => create.check(&mut note),
            Action::Revert(revert) => {
                if revert.name.is_empty() {
                    note(
                        "snapshot_name",
                        "is empty; revert needs the name of a snapshot".into(),
                    );
                }
                reference(&revert.name, &mut note);
                if revert.wait_for != WaitFor::None && revert.state_after == StateAfter::Stopped {
                    note(
                        "revert.wait_for",
                        "a stopped guest never answers; leave it out or let the VM run".into(),
                    );
                }
            }
            Action::Commit(commit) => {
                reference(&commit.name, &mut note);
                if commit.all && !commit.name.is_empty() {
                    note(
                        "commit.all",
                        format!(
                            "cannot be combined with snapshot_name '{}'; give one of them",
                            commit.name
                        ),
                    );
                }
                if commit.resize_to == Some(0) {
                    note(
                        "commit.resize_bytes",
                        "is 0; a size in bytes is needed".into(),
                    );
                }
                if let Err(problem) = names::check_reference(&commit.resize_disk) {
                    note("commit.resize_disk", problem);
                } else if commit.resize_to.is_none() && !commit.resize_disk.is_empty() {
                    note(
                        "commit.resize_disk",
                        format!("'{}' is given without a size", commit.resize_disk),
                    );
                }
            }
            Action::Cleanup(cleanup) => cleanup.check(&mut note),
            Action::List(_) | Action::Confirm { .. } => {
                reference(self.snapshot_name(), &mut note);
            }
        }
        if bad.is_empty() {
            Ok(())
        } else {
            Err(Fault::bad_fields(bad))
        }
    }
}

fn reference(name: &str, note: &mut impl FnMut(&str, String)) {
    if let Err(problem) = names::check_reference(name) {
        note("snapshot_name", problem);
    }
}

impl Create {
    fn check(&self, note: &mut impl FnMut(&str, String)) {
        if !self.name.is_empty()
            && let Err(problem) = names::check_new_snapshot_name(&self.name)
        {
            note("snapshot_name", problem);
        }
        if self.description.len() > MAX_DESCRIPTION {
            note(
                "create.description",
                format!(
                    "has {} bytes; {MAX_DESCRIPTION} at most",
                    self.description.len()
                ),
            );
        }
        // Control characters have no form in XML 1.0.
        if let Some(c) = self
            .description
            .chars()
            .find(|c| c.is_control() && !matches!(c, '\n' | '\t' | '\r'))
        {
            note(
                "create.description",
                format!("has the control character U+{:04X}", u32::from(c)),
            );
        }
        if self.kind == Some(Kind::Mixed) {
            note(
                "create.kind",
                "is 'mixed'; use auto, internal or external".into(),
            );
        }
        if let Some(consistency @ (Consistency::Memory | Consistency::Stopped)) = self.consistency {
            note(
                "create.consistency",
                format!(
                    "is '{}'; use auto, filesystem, suspend or crash",
                    consistency.name()
                ),
            );
        }
        if self.memory && self.consistency == Some(Consistency::Filesystem) {
            note(
                "create.consistency",
                "'filesystem' cannot be combined with memory: a guest whose memory is saved \
                 while it is frozen comes back frozen; leave one of them out"
                    .into(),
            );
        }
        for disk in &self.exclude_disks {
            if let Err(problem) = names::check_reference(disk) {
                note("create.exclude_disks", problem);
            }
        }
        if !self.exclude_disks.is_empty() && !self.accept_no_revert {
            note(
                "create.exclude_disks",
                "needs accept_no_revert: a revert puts a fresh overlay on every disk, so a disk \
                 that was left out would fall back further than anybody asked"
                    .into(),
            );
        }
        if let Some(within) = self.revert_unless_confirmed {
            if within < SHORTEST_GUARD || within > LONGEST_GUARD {
                note(
                    "create.revert_unless_confirmed",
                    format!(
                        "is {} ms; a time from {} s to {} days is needed",
                        within.as_millis(),
                        SHORTEST_GUARD.as_secs(),
                        LONGEST_GUARD.as_secs() / 86_400
                    ),
                );
            }
            if self.accept_no_revert {
                note(
                    "create.revert_unless_confirmed",
                    "cannot be combined with accept_no_revert: the agent could not revert".into(),
                );
            }
        }
        if self.freeze_timeout.is_zero() {
            note(
                "create.freeze_timeout",
                "is 0; a time above 0 is needed".into(),
            );
        }
    }
}

impl Cleanup {
    fn check(&self, note: &mut impl FnMut(&str, String)) {
        reference(&self.name, note);
        if !self.name.is_empty() && self.policy.is_set() {
            note(
                "snapshot_name",
                format!(
                    "'{}' cannot be combined with a policy; give one of them",
                    self.name
                ),
            );
        }
        self.policy.check(note);
        if self.policy.is_set()
            && self
                .leftovers
                .as_ref()
                .is_some_and(|names| !names.is_empty())
        {
            note(
                "cleanup.leftovers",
                "cannot be combined with a policy; remove left-over volumes in a run of their own"
                    .into(),
            );
        }
        if self.name.is_empty() && self.children != Children::Keep {
            note(
                "cleanup.children",
                "needs snapshot_name, the snapshot whose children are meant".into(),
            );
        }
        for volume in self.leftovers.iter().flatten() {
            if volume.is_empty() || volume.contains('/') || names::check_reference(volume).is_err()
            {
                note(
                    "cleanup.leftovers",
                    format!(
                        "'{}' is not a volume name; use names in the pool, without '/'",
                        volume.escape_debug()
                    ),
                );
            }
        }
    }
}
