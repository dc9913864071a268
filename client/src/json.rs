//! The contract's messages as JSON, for return values and `--json`.
//!
//! Purpose: one shape for every face of the product. Keys are the contract's
//! field names in snake case; enum values are lower-case words without their
//! prefix (`running`, `data_missing`), and `null` where nothing was said;
//! times are RFC 3339 in UTC; durations are whole milliseconds under a key that
//! ends in `_ms`; what is optional and absent is `null`; numbers are numbers.
//!
//! Invariant: every field of every message has its place. The conversions take
//! the messages apart whole, so that a field added to the contract does not
//! compile until somebody decides how it is shown.

use std::collections::{BTreeMap, HashMap};

use prost_types::{Duration, Timestamp};
use serde_json::{Map, Value};
use vmsnap_proto::v1;

/// A message, or a part of one, that has a JSON form.
pub trait ToJson {
    /// The JSON form; never fails.
    fn to_json(&self) -> Value;
}

impl ToJson for String {
    fn to_json(&self) -> Value {
        Value::String(self.clone())
    }
}

impl ToJson for bool {
    fn to_json(&self) -> Value {
        Value::Bool(*self)
    }
}

impl ToJson for u32 {
    fn to_json(&self) -> Value {
        Value::from(*self)
    }
}

impl ToJson for u64 {
    fn to_json(&self) -> Value {
        Value::from(*self)
    }
}

impl ToJson for Timestamp {
    fn to_json(&self) -> Value {
        // RFC 3339 in UTC is what prost's own Display writes.
        Value::String(self.to_string())
    }
}

impl ToJson for Duration {
    fn to_json(&self) -> Value {
        Value::from(milliseconds(self))
    }
}

impl<T: ToJson> ToJson for Option<T> {
    fn to_json(&self) -> Value {
        self.as_ref().map_or(Value::Null, ToJson::to_json)
    }
}

impl<T: ToJson> ToJson for Vec<T> {
    fn to_json(&self) -> Value {
        Value::Array(self.iter().map(ToJson::to_json).collect())
    }
}

impl<T: ToJson> ToJson for [T] {
    fn to_json(&self) -> Value {
        Value::Array(self.iter().map(ToJson::to_json).collect())
    }
}

impl<T: ToJson> ToJson for HashMap<String, T> {
    fn to_json(&self) -> Value {
        // A hash map has no order of its own; output that is compared needs one.
        let sorted: BTreeMap<_, _> = self.iter().collect();
        Value::Object(
            sorted
                .into_iter()
                .map(|(key, value)| (key.clone(), value.to_json()))
                .collect(),
        )
    }
}

/// A duration of the wire in whole milliseconds, rounded towards zero.
#[must_use]
pub fn milliseconds(duration: &Duration) -> i64 {
    duration
        .seconds
        .saturating_mul(1_000)
        .saturating_add(i64::from(duration.nanos) / 1_000_000)
}

/// An enum of the contract with its words for JSON and for people.
pub trait Word: TryFrom<i32> + Copy + Sized + 'static {
    /// What the names of the values begin with, such as `VM_STATE_`.
    const PREFIX: &'static str;

    /// The value's name in the contract, such as `VM_STATE_RUNNING`.
    fn name(self) -> &'static str;

    /// The value with that name in the contract.
    fn from_name(name: &str) -> Option<Self>;

    /// The lower-case word, such as `running`; `unspecified` for zero.
    fn word(self) -> String {
        let name = self.name();
        name.strip_prefix(Self::PREFIX)
            .unwrap_or(name)
            .to_ascii_lowercase()
    }

    /// The value of a word as [`Word::word`] writes it; a hyphen may stand for
    /// an underscore. `unspecified` is nobody's word to say.
    fn from_word(word: &str) -> Option<Self> {
        let name = word.replace('-', "_").to_ascii_uppercase();
        (name != "UNSPECIFIED")
            .then(|| Self::from_name(&format!("{}{name}", Self::PREFIX)))
            .flatten()
    }
}

/// The word of an enum field; `None` for unspecified, and for a value that only
/// a newer peer knows.
#[must_use]
pub fn word<E: Word>(value: i32) -> Option<String> {
    if value == 0 {
        return None;
    }
    E::try_from(value).ok().map(Word::word)
}

/// An enum field as JSON: its word, `null` for unspecified, the number itself
/// when only a newer peer knows it.
fn enum_value<E: Word>(value: i32) -> Value {
    match word::<E>(value) {
        Some(word) => Value::String(word),
        None if value == 0 => Value::Null,
        None => Value::from(value),
    }
}

macro_rules! words {
    ($($enumeration:ident $prefix:literal),* $(,)?) => {$(
        impl Word for v1::$enumeration {
            const PREFIX: &'static str = $prefix;

            fn name(self) -> &'static str {
                self.as_str_name()
            }

            fn from_name(name: &str) -> Option<Self> {
                Self::from_str_name(name)
            }
        }
    )*};
}

words! {
    Action "ACTION_",
    Children "CHILDREN_",
    Consistency "CONSISTENCY_",
    HoldKind "HOLD_KIND_",
    IfExists "IF_EXISTS_",
    Orphans "ORPHANS_",
    SnapshotHealth "SNAPSHOT_HEALTH_",
    SnapshotKind "SNAPSHOT_KIND_",
    StateAfter "STATE_AFTER_",
    VmState "VM_STATE_",
    WaitFor "WAIT_FOR_",
    WorkflowState "WORKFLOW_STATE_",
    GuardState "GUARD_STATE_",
    AuditResult "AUDIT_RESULT_",
    HealthProblemKind "HEALTH_PROBLEM_KIND_",
}

/// The word of a `google.rpc.Code`, such as `not_found`.
#[must_use]
pub fn code_word(code: i32) -> &'static str {
    match code {
        0 => "ok",
        1 => "cancelled",
        3 => "invalid_argument",
        4 => "deadline_exceeded",
        5 => "not_found",
        6 => "already_exists",
        7 => "permission_denied",
        8 => "resource_exhausted",
        9 => "failed_precondition",
        10 => "aborted",
        11 => "out_of_range",
        12 => "unimplemented",
        13 => "internal",
        14 => "unavailable",
        15 => "data_loss",
        16 => "unauthenticated",
        _ => "unknown",
    }
}

macro_rules! key {
    ($field:ident) => {
        stringify!($field)
    };
    ($field:ident $key:literal) => {
        $key
    };
}

macro_rules! value {
    ($field:ident) => {
        ToJson::to_json($field)
    };
    ($field:ident $enumeration:ident) => {
        enum_value::<v1::$enumeration>(*$field)
    };
}

/// `Message { field, field as "key", field: Enumeration }`.
macro_rules! messages {
    ($($message:ident { $($field:ident $(: $enumeration:ident)? $(as $key:literal)?),* $(,)? })*) => {$(
        impl ToJson for v1::$message {
            fn to_json(&self) -> Value {
                // No `..` here: see the module's invariant.
                let v1::$message { $($field),* } = self;
                let fields: Vec<(&str, Value)> =
                    vec![$((key!($field $($key)?), value!($field $($enumeration)?))),*];
                Value::Object(fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
            }
        }
    )*};
}

messages! {
    // vm.proto
    VmSummary {
        name, uuid, state: VmState, state_reason, vcpus, memory_bytes, snapshot_count, workflow_id,
    }
    Vcpu { number, state, host_cpu, cpu_time as "cpu_time_ms" }
    MemoryTuning { hard_limit_bytes, soft_limit_bytes, swap_hard_limit_bytes, min_guarantee_bytes }
    Image { path, format, virtual_bytes, actual_bytes, internal_snapshots }
    Disk {
        target, bus, device, source_type, source, format, readonly, virtual_bytes, chain,
    }
    GuestAgent { defined, connected, responding }
    Firmware { kind, nvram_path, nvram_format }
    BlockJob { disk, kind, done_bytes, total_bytes }
    Vm {
        name, uuid, state: VmState, state_reason, persistent, autostart, vcpus, vcpu_count,
        memory_bytes, max_memory_bytes, memory_tuning, machine, arch, firmware, has_managed_save,
        disks, guest_agent, block_jobs, not_migratable_devices,
    }
    GuestInterface { name, mac, addresses }
    Guest {
        hostname, os, interfaces, addresses, ready as "ready_ms", clock_skew as "clock_skew_ms",
        clock_set,
    }

    // snapshot.proto
    SnapshotDisk { target, kind: SnapshotKind, overlay, data }
    Snapshot {
        vm_name, name, parent, children, description, kind: SnapshotKind, memory,
        consistency: Consistency, state, created, current, health: SnapshotHealth, health_detail,
        revertible, not_revertible_because, size_bytes, disks, memory_file, ours, protected,
        workflow_id, guard_deadline,
    }

    // storage.proto
    Pool {
        name, active, r#type as "type", path, capacity_bytes, allocation_bytes, available_bytes,
    }
    Volume { name, path, format, capacity_bytes, allocation_bytes, backing_path, used_by }
    Orphan { path, size_bytes, ours }
    Storage { pool, volumes, orphans }

    // known_issue.proto
    KnownIssue {
        id, title, applies_when, what_happens, what_to_do, learned, reason, subject, last_seen,
        times_seen, found,
    }

    // inventory.proto
    GetHostResponse {
        hostname, agent_version, libvirt_version, hypervisor, hypervisor_version, uri,
        can_revert_external, can_delete_external,
    }
    HealthProblem {
        kind: HealthProblemKind, urgent, since, vm_name, workflow_id, message, remedy,
    }
    GetHealthResponse { problems, open_workflows }

    // workflow.proto
    CreateOptions {
        description, memory, kind: SnapshotKind, consistency: Consistency, if_exists: IfExists,
        max_age as "max_age_ms", exclude_disks, accept_no_revert, protected,
        revert_unless_confirmed as "revert_unless_confirmed_ms", max_stop as "max_stop_ms",
        freeze_timeout as "freeze_timeout_ms", wait_for: WaitFor, wait_timeout as "wait_timeout_ms",
    }
    RevertOptions {
        state_after: StateAfter, safety_snapshot, wait_for: WaitFor,
        wait_timeout as "wait_timeout_ms", sync_clock, force, max_age as "max_age_ms", disks_only,
    }
    CommitOptions { all, resize_bytes, resize_disk, allow_shrink, bandwidth_bytes_per_second }
    CleanupOptions {
        children: Children, keep_last, keep_within as "keep_within_ms", keep_hourly, keep_daily,
        keep_weekly, keep_monthly, older_than as "older_than_ms", name_pattern, include_foreign,
        leftovers, leftovers_set, orphans: Orphans, bandwidth_bytes_per_second, time_zone,
    }
    WorkflowSpec {
        vm_name, action: Action, snapshot_name, start_if_stopped, pool, create, revert, commit,
        cleanup,
    }
    Warning { code, message, advice }
    PlannedStep { index, name, title, changes, undo, point_of_no_return }
    Decision { subject, choice, because }
    FieldChange { field, before, after }
    Plan {
        hash, steps, changes, warnings, decisions, diff, snapshot_name, preview,
    }
    Verdict { name, what, removed, rule, size_bytes }
    WorkflowResult {
        changed, snapshot, vm, snapshots, storage, guest, consistency: Consistency,
        stopped as "stopped_ms", frozen as "frozen_ms", verdicts, diff, merged, resized_to_bytes,
        vm_state: VmState, guard_deadline, safety_snapshot,
    }
    Caller { identity, transport, address }
    Workflow {
        id, request_id, spec, state: WorkflowState, started, finished, caller, plan_hash, result,
        failure, last_sequence, warnings,
    }
    EventPlanned { plan }
    EventStepStarted { index, name, title }
    EventStepProgress { index, done_bytes, total_bytes, disk }
    EventStepFinished { index, took as "took_ms", note }
    EventStepFailed { index, took as "took_ms", failure }
    EventHoldTaken { kind: HoldKind }
    EventHoldReleased { kind: HoldKind, held as "held_ms" }
    EventUndo { index, title, succeeded, note }
    EventHeartbeat {}
    EventQueued { behind_workflow_id }
    EventOutcome { state: WorkflowState, result, failure }

    // audit.proto
    AuditEntry {
        sequence, time, caller, method, action, vm_name, snapshot_name, workflow_id, plan_hash,
        result: AuditResult, reason, note, times,
    }

    // Answers that a caller may want whole.
    ConfirmWorkflowResponse { changed, warnings }
    Guard { vm_name, snapshot_name, armed, deadline, state: GuardState, note, workflow_id }
    CancelWorkflowResponse { workflow, note }
    ResolveWorkflowResponse { workflow }
}

impl ToJson for v1::Failure {
    fn to_json(&self) -> Value {
        let v1::Failure {
            code,
            reason,
            message,
            metadata,
            known_fixes,
        } = self;
        let mut object = Map::new();
        object.insert("reason".to_owned(), reason.to_json());
        object.insert("code".to_owned(), Value::from(code_word(*code)));
        object.insert("message".to_owned(), message.to_json());
        object.insert("metadata".to_owned(), metadata.to_json());
        object.insert("known_fixes".to_owned(), known_fixes.to_json());
        Value::Object(object)
    }
}

/// The name of an event's kind, such as `step_started`; `None` when only a newer
/// agent knows it.
#[must_use]
pub fn event_name(event: &v1::WorkflowEvent) -> Option<&'static str> {
    use v1::workflow_event::Kind;
    Some(match event.kind.as_ref()? {
        Kind::Planned(_) => "planned",
        Kind::StepStarted(_) => "step_started",
        Kind::StepProgress(_) => "step_progress",
        Kind::StepFinished(_) => "step_finished",
        Kind::StepFailed(_) => "step_failed",
        Kind::HoldTaken(_) => "hold_taken",
        Kind::HoldReleased(_) => "hold_released",
        Kind::Warning(_) => "warning",
        Kind::Undo(_) => "undo",
        Kind::Heartbeat(_) => "heartbeat",
        Kind::Queued(_) => "queued",
        Kind::Outcome(_) => "outcome",
    })
}

/// An event is flat: what all events have, the kind's name under `event`, and
/// the kind's own fields beside them.
impl ToJson for v1::WorkflowEvent {
    fn to_json(&self) -> Value {
        use v1::workflow_event::Kind;
        let v1::WorkflowEvent {
            workflow_id,
            sequence,
            time,
            kind,
        } = self;
        let mut object = Map::new();
        object.insert("workflow_id".to_owned(), workflow_id.to_json());
        object.insert("sequence".to_owned(), sequence.to_json());
        object.insert("time".to_owned(), time.to_json());
        object.insert(
            "event".to_owned(),
            event_name(self).map_or(Value::Null, Value::from),
        );
        let own = kind.as_ref().map(|kind| match kind {
            Kind::Planned(event) => event.to_json(),
            Kind::StepStarted(event) => event.to_json(),
            Kind::StepProgress(event) => event.to_json(),
            Kind::StepFinished(event) => event.to_json(),
            Kind::StepFailed(event) => event.to_json(),
            Kind::HoldTaken(event) => event.to_json(),
            Kind::HoldReleased(event) => event.to_json(),
            Kind::Warning(event) => event.to_json(),
            Kind::Undo(event) => event.to_json(),
            Kind::Heartbeat(event) => event.to_json(),
            Kind::Queued(event) => event.to_json(),
            Kind::Outcome(event) => event.to_json(),
        });
        if let Some(Value::Object(own)) = own {
            object.extend(own);
        }
        Value::Object(object)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn enums_are_words_and_unspecified_is_null() {
        let snapshot = v1::Snapshot {
            name: "before".to_owned(),
            kind: v1::SnapshotKind::External.into(),
            health: v1::SnapshotHealth::DataMissing.into(),
            created: Some(Timestamp {
                seconds: 1_700_000_000,
                nanos: 0,
            }),
            ..Default::default()
        };
        let value = snapshot.to_json();
        assert_eq!(value["kind"], "external");
        assert_eq!(value["health"], "data_missing");
        assert_eq!(value["consistency"], Value::Null);
        assert_eq!(value["created"], "2023-11-14T22:13:20Z");
        assert_eq!(value["guard_deadline"], Value::Null);
        assert_eq!(value["size_bytes"], 0);
    }

    #[test]
    fn an_enum_value_of_a_newer_peer_stays_visible_as_its_number() {
        let vm = v1::VmSummary {
            state: 77,
            ..Default::default()
        };
        assert_eq!(vm.to_json()["state"], 77);
    }

    #[test]
    fn durations_are_milliseconds_under_a_key_that_says_so() {
        let guest = v1::Guest {
            ready: Some(Duration {
                seconds: 12,
                nanos: 345_678_901,
            }),
            ..Default::default()
        };
        let value = guest.to_json();
        assert_eq!(value["ready_ms"], 12_345);
        assert_eq!(value["clock_skew_ms"], Value::Null);
        assert!(value.get("ready").is_none());
    }

    #[test]
    fn an_absent_limit_is_null_and_a_pool_has_a_type() {
        assert_eq!(
            v1::MemoryTuning::default().to_json()["hard_limit_bytes"],
            Value::Null
        );
        let pool = v1::Pool {
            r#type: "dir".to_owned(),
            ..Default::default()
        };
        assert_eq!(pool.to_json()["type"], "dir");
    }

    #[test]
    fn an_event_is_flat_and_named() {
        let event = v1::WorkflowEvent {
            workflow_id: "w".to_owned(),
            sequence: 4,
            time: None,
            kind: Some(v1::workflow_event::Kind::HoldReleased(
                v1::EventHoldReleased {
                    kind: v1::HoldKind::Frozen.into(),
                    held: Some(Duration {
                        seconds: 0,
                        nanos: 85_000_000,
                    }),
                },
            )),
        };
        assert_eq!(
            event.to_json(),
            json!({"workflow_id": "w", "sequence": 4, "time": null, "event": "hold_released", "kind": "frozen", "held_ms": 85})
        );
    }

    #[test]
    fn metadata_of_a_failure_is_sorted_and_its_code_is_a_word() {
        let failure = v1::Failure {
            code: 5,
            reason: "SNAPSHOT_NOT_FOUND".to_owned(),
            metadata: HashMap::from([
                ("valid".to_owned(), "a,b".to_owned()),
                ("nearest".to_owned(), "a".to_owned()),
            ]),
            ..Default::default()
        };
        assert_eq!(
            failure.to_json().to_string(),
            r#"{"reason":"SNAPSHOT_NOT_FOUND","code":"not_found","message":"","metadata":{"nearest":"a","valid":"a,b"},"known_fixes":[]}"#
        );
    }

    #[test]
    fn words_are_read_back_and_unspecified_is_no_word() {
        assert_eq!(
            v1::Consistency::from_word("filesystem"),
            Some(v1::Consistency::Filesystem)
        );
        assert_eq!(
            v1::VmState::from_word("pm-suspended"),
            Some(v1::VmState::PmSuspended)
        );
        assert_eq!(v1::Consistency::from_word("unspecified"), None);
        assert_eq!(v1::Consistency::from_word("frozen"), None);
    }
}
