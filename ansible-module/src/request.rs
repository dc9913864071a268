//! From a task to what is asked of the agent.
//!
//! Purpose: one place that knows which option fills which field of the
//! contract. Nothing is decided here: what may not be done, the agent says.
//!
//! Invariants: an option that was not given leaves its field unset wherever
//! the agent has the default, so that both cannot drift apart.

use vmsnap_client::json::Word;
use vmsnap_proto::v1;

use crate::task::Task;

/// What `vm_snapshot` asks of the agent for one VM.
pub fn spec(task: &Task, vm_name: &str) -> v1::WorkflowSpec {
    let action = task
        .text("action")
        .and_then(v1::Action::from_word)
        .unwrap_or_default();
    let mut spec = v1::WorkflowSpec {
        vm_name: vm_name.to_owned(),
        action: action.into(),
        snapshot_name: owned(task, "snapshot_name"),
        start_if_stopped: task.flag("start_if_stopped"),
        pool: owned(task, "pool"),
        ..Default::default()
    };
    match action {
        v1::Action::Create => spec.create = Some(create(task)),
        v1::Action::Revert => spec.revert = Some(revert(task)),
        v1::Action::Commit => spec.commit = Some(commit(task)),
        v1::Action::Cleanup => spec.cleanup = Some(cleanup(task)),
        v1::Action::List | v1::Action::Confirm | v1::Action::Unspecified => {}
    }
    spec
}

fn create(task: &Task) -> v1::CreateOptions {
    v1::CreateOptions {
        description: owned(task, "description"),
        memory: task.flag("memory"),
        kind: word::<v1::SnapshotKind>(task, "kind"),
        consistency: word::<v1::Consistency>(task, "consistency"),
        if_exists: word::<v1::IfExists>(task, "if_exists"),
        max_age: given_time(task, "max_age"),
        exclude_disks: task.list("exclude_disks").unwrap_or_default().to_vec(),
        accept_no_revert: task.flag("accept_no_revert"),
        protected: task.flag("protected"),
        revert_unless_confirmed: given_time(task, "revert_unless_confirmed"),
        max_stop: given_time(task, "max_stop"),
        freeze_timeout: given_time(task, "freeze_timeout"),
        wait_for: word::<v1::WaitFor>(task, "wait_for"),
        wait_timeout: given_time(task, "wait_timeout"),
    }
}

fn revert(task: &Task) -> v1::RevertOptions {
    v1::RevertOptions {
        state_after: word::<v1::StateAfter>(task, "state_after"),
        safety_snapshot: task.flag("safety_snapshot"),
        wait_for: word::<v1::WaitFor>(task, "wait_for"),
        wait_timeout: given_time(task, "wait_timeout"),
        sync_clock: Some(task.flag("sync_clock")),
        force: task.flag("force"),
        max_age: given_time(task, "max_age"),
        disks_only: task.flag("disks_only"),
    }
}

fn commit(task: &Task) -> v1::CommitOptions {
    v1::CommitOptions {
        all: task.flag("all"),
        resize_bytes: task.bytes("resize_to"),
        resize_disk: owned(task, "resize_disk"),
        allow_shrink: task.flag("allow_shrink"),
        bandwidth_bytes_per_second: task.bytes("bandwidth").unwrap_or_default(),
    }
}

fn cleanup(task: &Task) -> v1::CleanupOptions {
    v1::CleanupOptions {
        children: word::<v1::Children>(task, "children"),
        keep_last: count(task, "keep_last"),
        keep_within: given_time(task, "keep_within"),
        keep_hourly: count(task, "keep_hourly"),
        keep_daily: count(task, "keep_daily"),
        keep_weekly: count(task, "keep_weekly"),
        keep_monthly: count(task, "keep_monthly"),
        older_than: given_time(task, "older_than"),
        name_pattern: owned(task, "name_pattern"),
        include_foreign: task.flag("include_foreign"),
        leftovers: task.list("leftovers").unwrap_or_default().to_vec(),
        leftovers_set: task.list("leftovers").is_some(),
        orphans: word::<v1::Orphans>(task, "orphans"),
        bandwidth_bytes_per_second: task.bytes("bandwidth").unwrap_or_default(),
        time_zone: owned(task, "time_zone"),
    }
}

fn owned(task: &Task, name: &str) -> String {
    task.text(name).unwrap_or_default().to_owned()
}

/// `auto` is not a value of every enum of the contract: where it is none,
/// unspecified says the same.
fn word<E: Word + Default + Into<i32>>(task: &Task, name: &str) -> i32 {
    task.text(name)
        .and_then(E::from_word)
        .unwrap_or_default()
        .into()
}

/// More than four thousand million of anything is all of it.
fn count(task: &Task, name: &str) -> Option<u32> {
    task.number(name)
        .map(|number| u32::try_from(number).unwrap_or(u32::MAX))
}

fn given_time(task: &Task, name: &str) -> Option<prost_types::Duration> {
    task.given(name)?;
    task.duration(name).map(vmsnap_client::to_wire)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::VM_SNAPSHOT;
    use crate::task::ArgumentsFile;
    use serde_json::{Value, json};

    fn asked(options: Value) -> v1::WorkflowSpec {
        let task = ArgumentsFile::of(options).against(VM_SNAPSHOT).unwrap();
        spec(&task, "web01")
    }

    #[test]
    fn options_reach_the_fields_of_their_action() {
        let spec = asked(json!({
            "vm_name": "web01", "action": "create", "snapshot_name": "before", "memory": "yes",
            "consistency": "suspend", "max_stop": "2s", "exclude_disks": "vdb", "wait_for": "ssh",
        }));
        assert_eq!(spec.action(), v1::Action::Create);
        let create = spec.create.unwrap();
        assert!(create.memory);
        assert_eq!(create.consistency(), v1::Consistency::Suspend);
        assert_eq!(create.wait_for(), v1::WaitFor::Ssh);
        assert_eq!(create.if_exists(), v1::IfExists::Ok);
        assert_eq!(create.max_stop.unwrap().seconds, 2);
        assert_eq!(create.exclude_disks, ["vdb"]);
        assert!(spec.revert.is_none() && spec.commit.is_none() && spec.cleanup.is_none());
    }

    #[test]
    fn auto_and_what_was_not_given_are_left_to_the_agent() {
        let spec = asked(json!({"vm_name": "web01", "action": "create"}));
        let create = spec.create.unwrap();
        assert_eq!(create.kind(), v1::SnapshotKind::Unspecified);
        assert_eq!(create.consistency(), v1::Consistency::Unspecified);
        assert_eq!((create.freeze_timeout, create.wait_timeout), (None, None));
    }

    #[test]
    fn an_empty_list_of_leftovers_differs_from_none_given() {
        let given = |options| asked(options).cleanup.unwrap();
        let none = given(json!({"vm_name": "web01", "action": "cleanup"}));
        let empty = given(json!({"vm_name": "web01", "action": "cleanup", "leftovers": []}));
        assert!(!none.leftovers_set);
        assert!(empty.leftovers_set && empty.leftovers.is_empty());
    }

    #[test]
    fn a_new_size_is_in_bytes() {
        let spec = asked(json!({"vm_name": "web01", "action": "commit", "resize_to": "20G"}));
        assert_eq!(spec.commit.unwrap().resize_bytes, Some(20 << 30));
    }
}
