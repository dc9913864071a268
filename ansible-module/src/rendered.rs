//! From the agent's answers to Ansible's return values.
//!
//! Purpose: one place that knows under which name a fact of the contract is
//! returned, and in which sentence a person reads what happened.
//!
//! Invariants: what is not known is not there, rather than null, except inside
//! the contract's own messages. A diff is returned only when one was asked for.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use vmsnap_client::json::{ToJson, milliseconds, word};
use vmsnap_client::quantity::{format_duration, format_size};
use vmsnap_proto::v1;

/// Return values of one VM.
pub type Values = Map<String, Value>;

/// What became of a step.
#[derive(Clone, Debug, Default)]
pub struct StepTaken {
    /// How long it took, when it came to its end.
    pub took: Option<prost_types::Duration>,
    /// What came of it.
    pub note: String,
}

/// Adds what a plan says. Its preview stands in for a result, so it goes in
/// first and what a run achieved comes over it.
pub fn add_plan(values: &mut Values, plan: &v1::Plan, taken: &BTreeMap<u32, StepTaken>) {
    put(values, "plan_hash", plan.hash.to_json());
    if !plan.snapshot_name.is_empty() {
        put(values, "snapshot_name", plan.snapshot_name.to_json());
    }
    put(values, "decisions", plan.decisions.to_json());
    let steps = plan.steps.iter().map(|step| {
        let mut value = step.to_json();
        let taken = taken.get(&step.index).cloned().unwrap_or_default();
        value["took_ms"] = taken.took.to_json();
        value["note"] = Value::from(taken.note);
        value
    });
    put(values, "steps", steps.collect());
    if let Some(preview) = &plan.preview {
        add_result(values, preview);
    }
}

/// Adds what a run achieved.
pub fn add_result(values: &mut Values, result: &v1::WorkflowResult) {
    if let Some(snapshot) = &result.snapshot {
        put(values, "snapshot_name", snapshot.name.to_json());
    }
    put(values, "snapshot", result.snapshot.to_json());
    put(values, "vm", result.vm.to_json());
    put(values, "guest", result.guest.to_json());
    put(values, "storage", result.storage.to_json());
    // Pool and volumes are read together with the snapshots, so either means both.
    if !result.snapshots.is_empty() || result.vm.is_some() {
        put(values, "snapshots", result.snapshots.to_json());
    }
    put(
        values,
        "consistency",
        word::<v1::Consistency>(result.consistency).into(),
    );
    put(values, "stop_ms", result.stopped.to_json());
    put(values, "freeze_ms", result.frozen.to_json());
    put(
        values,
        "vm_state",
        word::<v1::VmState>(result.vm_state).into(),
    );
    put(values, "guard_deadline", result.guard_deadline.to_json());
    if !result.merged.is_empty() {
        put(values, "merged", result.merged.to_json());
    }
    if !result.verdicts.is_empty() {
        put(values, "removed", verdicts(&result.verdicts, true));
        put(values, "kept", verdicts(&result.verdicts, false));
    }
    if result.resized_to_bytes > 0 {
        put(values, "resized_to", result.resized_to_bytes.to_json());
    }
    if !result.safety_snapshot.is_empty() {
        put(values, "safety_snapshot", result.safety_snapshot.to_json());
    }
}

fn verdicts(all: &[v1::Verdict], removed: bool) -> Value {
    all.iter()
        .filter(|verdict| verdict.removed == removed)
        .map(|verdict| {
            json!({
                "name": verdict.name,
                "what": verdict.what,
                "rule": verdict.rule,
                "size_bytes": verdict.size_bytes,
            })
        })
        .collect()
}

/// Adds Ansible's diff: what a field was and what it becomes, on each side only
/// where it exists there.
pub fn add_diff(values: &mut Values, vm_name: &str, changes: &[v1::FieldChange]) {
    let mut before = Map::new();
    let mut after = Map::new();
    for change in changes {
        if let Some(value) = &change.before {
            before.insert(change.field.clone(), value.to_json());
        }
        if let Some(value) = &change.after {
            after.insert(change.field.clone(), value.to_json());
        }
    }
    values.insert(
        "diff".to_owned(),
        json!({
            "before": before,
            "after": after,
            "before_header": vm_name,
            "after_header": vm_name,
        }),
    );
}

/// A warning as Ansible prints it.
pub fn warning(warning: &v1::Warning) -> String {
    let mut text = warning.message.clone();
    if !warning.advice.is_empty() {
        text = format!("{text}; {}", warning.advice);
    }
    if !warning.code.is_empty() {
        text = format!("{text} ({})", warning.code);
    }
    text
}

fn put(values: &mut Values, name: &str, value: Value) {
    if !value.is_null() {
        values.insert(name.to_owned(), value);
    }
}

/// What a run did to a VM, in a sentence.
pub fn done(spec: &v1::WorkflowSpec, result: &v1::WorkflowResult) -> String {
    let vm = &spec.vm_name;
    let name = result
        .snapshot
        .as_ref()
        .map_or(&spec.snapshot_name, |found| &found.name);
    let mut text = match (spec.action(), result.changed) {
        (v1::Action::List, _) => {
            format!("{vm} has {}", counted(result.snapshots.len(), "snapshot"))
        }
        (v1::Action::Create, true) => format!("created snapshot {name} of {vm}"),
        (v1::Action::Create, false) => format!("snapshot {name} of {vm} is there already"),
        (v1::Action::Revert, true) => format!("{vm} is back at snapshot {name}"),
        (v1::Action::Revert, false) => format!("{vm} was taken back to snapshot {name} already"),
        (v1::Action::Commit, true) => match result.merged.as_slice() {
            [] => format!("changed the storage of {vm}"),
            merged => format!("merged {} of {vm}", merged.join(", ")),
        },
        (v1::Action::Commit, false) => format!("nothing to merge or to resize for {vm}"),
        (v1::Action::Cleanup, true) => {
            let gone: Vec<&str> = result
                .verdicts
                .iter()
                .filter(|verdict| verdict.removed)
                .map(|verdict| verdict.name.as_str())
                .collect();
            match gone.as_slice() {
                [] => format!("cleaned up {vm}"),
                gone => format!("removed {} of {vm}", gone.join(", ")),
            }
        }
        (v1::Action::Cleanup, false) => format!("nothing to clean up for {vm}"),
        (_, true) => format!("changed {vm}"),
        (_, false) => format!("nothing to do for {vm}"),
    };
    if result.resized_to_bytes > 0 && result.changed {
        text.push_str(&format!(
            "; its disk has {}",
            format_size(result.resized_to_bytes)
        ));
    }
    if let Some(stopped) = result.stopped.filter(|stopped| milliseconds(stopped) > 0) {
        text.push_str(&format!(
            "; it stood still for {} ms",
            milliseconds(&stopped)
        ));
    }
    if let Some(frozen) = result.frozen.filter(|frozen| milliseconds(frozen) > 0) {
        text.push_str(&format!(
            "; its file systems were frozen for {} ms",
            milliseconds(&frozen)
        ));
    }
    if let Some(ready) = result.guest.as_ref().and_then(|guest| guest.ready)
        && let Some(ready) = vmsnap_client::from_wire(ready)
    {
        text.push_str(&format!(
            "; the guest was ready after {}",
            format_duration(ready)
        ));
    }
    text
}

/// What a run would do, in a sentence.
pub fn planned(spec: &v1::WorkflowSpec, plan: &v1::Plan) -> String {
    let vm = &spec.vm_name;
    let changing: Vec<&str> = plan
        .steps
        .iter()
        .filter(|step| step.changes)
        .map(|step| step.title.as_str())
        .collect();
    match (plan.changes, &plan.preview) {
        (false, Some(preview)) => done(spec, preview),
        (false, None) => format!("nothing would change on {vm}"),
        (true, _) if changing.is_empty() => format!("{vm} would change"),
        (true, _) => format!("would change {vm}: {}", changing.join(", then ")),
    }
}

fn counted(number: usize, what: &str) -> String {
    match number {
        0 => format!("no {what}s"),
        1 => format!("one {what}"),
        _ => format!("{number} {what}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(action: v1::Action) -> v1::WorkflowSpec {
        v1::WorkflowSpec {
            vm_name: "web01".into(),
            action: action.into(),
            snapshot_name: "before".into(),
            ..Default::default()
        }
    }

    fn ms(milliseconds: i32) -> Option<prost_types::Duration> {
        Some(prost_types::Duration {
            seconds: 0,
            nanos: milliseconds * 1_000_000,
        })
    }

    #[test]
    fn a_result_is_returned_under_the_documented_names_and_without_what_is_not_known() {
        let result = v1::WorkflowResult {
            changed: true,
            snapshot: Some(v1::Snapshot {
                name: "before".into(),
                ..Default::default()
            }),
            consistency: v1::Consistency::Filesystem.into(),
            frozen: ms(85),
            verdicts: vec![v1::Verdict {
                name: "web01-old.qcow2".into(),
                what: "volume".into(),
                removed: true,
                rule: "leftovers".into(),
                size_bytes: 7,
            }],
            vm_state: v1::VmState::Running.into(),
            ..Default::default()
        };
        let mut values = Values::new();
        add_result(&mut values, &result);
        assert_eq!(values["snapshot_name"], "before");
        assert_eq!(values["consistency"], "filesystem");
        assert_eq!(values["freeze_ms"], 85);
        assert_eq!(values["vm_state"], "running");
        assert_eq!(values["removed"][0]["name"], "web01-old.qcow2");
        assert_eq!(values["kept"], json!([]));
        for absent in [
            "stop_ms",
            "vm",
            "guest",
            "storage",
            "merged",
            "resized_to",
            "snapshots",
        ] {
            assert!(!values.contains_key(absent), "{absent}");
        }
    }

    #[test]
    fn a_step_that_did_not_run_has_no_time() {
        let plan = v1::Plan {
            steps: vec![
                v1::PlannedStep {
                    index: 0,
                    name: "freeze".into(),
                    ..Default::default()
                },
                v1::PlannedStep {
                    index: 1,
                    name: "thaw".into(),
                    ..Default::default()
                },
            ],
            ..Default::default()
        };
        let taken = BTreeMap::from([(
            0,
            StepTaken {
                took: ms(12),
                note: "one".into(),
            },
        )]);
        let mut values = Values::new();
        add_plan(&mut values, &plan, &taken);
        assert_eq!(values["steps"][0]["took_ms"], 12);
        assert_eq!(values["steps"][0]["note"], "one");
        assert_eq!(values["steps"][1]["took_ms"], Value::Null);
    }

    #[test]
    fn a_diff_has_a_field_only_on_the_sides_where_it_exists() {
        let mut values = Values::new();
        let change = v1::FieldChange {
            field: "snapshots".into(),
            before: None,
            after: Some("before".into()),
        };
        add_diff(&mut values, "web01", &[change]);
        assert_eq!(values["diff"]["before"], json!({}));
        assert_eq!(values["diff"]["after"], json!({"snapshots": "before"}));
    }

    #[test]
    fn a_run_is_told_in_a_sentence() {
        let mut result = v1::WorkflowResult {
            changed: true,
            stopped: ms(85),
            ..Default::default()
        };
        assert_eq!(
            done(&spec(v1::Action::Create), &result),
            "created snapshot before of web01; it stood still for 85 ms"
        );
        result.stopped = None;
        result.merged = vec!["b".into(), "a".into()];
        assert_eq!(
            done(&spec(v1::Action::Commit), &result),
            "merged b, a of web01"
        );
        result.changed = false;
        assert_eq!(
            done(&spec(v1::Action::Cleanup), &result),
            "nothing to clean up for web01"
        );
    }

    #[test]
    fn a_plan_is_told_by_its_changing_steps() {
        let step = |title: &str, changes| v1::PlannedStep {
            title: title.into(),
            changes,
            ..Default::default()
        };
        let plan = v1::Plan {
            changes: true,
            steps: vec![
                step("look", false),
                step("freeze", true),
                step("snapshot", true),
            ],
            ..Default::default()
        };
        assert_eq!(
            planned(&spec(v1::Action::Create), &plan),
            "would change web01: freeze, then snapshot"
        );
    }
}
