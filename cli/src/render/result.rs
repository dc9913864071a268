//! What a run came to.

use std::fmt::Write as _;

use vmsnap_client::{Finished, quantity::format_size};
use vmsnap_proto::v1;

use super::{Clock, list, took, words};
use crate::terminal::clean;

/// What a run that succeeded did, for the VM and action that were asked for.
pub fn summary(finished: &Finished, spec: &v1::WorkflowSpec, clock: &Clock) -> String {
    let result = &finished.result;
    let vm = clean(&spec.vm_name);
    let mut text = String::new();
    match spec.action() {
        v1::Action::Create => created(result, &vm, &mut text),
        v1::Action::Revert => reverted(result, spec, &vm, &mut text),
        v1::Action::Commit => committed(result, &vm, &mut text),
        v1::Action::Cleanup if !result.changed => {
            let _ = writeln!(text, "{vm}: nothing to clean up");
        }
        _ => {}
    }
    for each in &result.verdicts {
        text.push_str(&verdict(each, "removed", "kept"));
    }
    if !result.safety_snapshot.is_empty() {
        let _ = writeln!(
            text,
            "the state before is kept as {}",
            clean(&result.safety_snapshot)
        );
    }
    if let Some(deadline) = &result.guard_deadline {
        let name = result
            .snapshot
            .as_ref()
            .map(|snapshot| snapshot.name.as_str())
            .unwrap_or_default();
        let _ = writeln!(
            text,
            "reverts at {} unless confirmed: vmsnap confirm {vm} {}",
            clock.time(Some(deadline)),
            clean(name)
        );
    }
    text
}

fn created(result: &v1::WorkflowResult, vm: &str, text: &mut String) {
    let snapshot = result.snapshot.clone().unwrap_or_default();
    let name = clean(&snapshot.name);
    if !result.changed {
        let _ = writeln!(
            text,
            "{vm}: snapshot {name} was there already; nothing changed"
        );
        return;
    }
    let mut facts = vec![words::<v1::SnapshotKind>(snapshot.kind)];
    facts.push(format!(
        "{} consistency",
        words::<v1::Consistency>(result.consistency)
    ));
    for (what, held) in [("stopped", &result.stopped), ("frozen", &result.frozen)] {
        if held
            .as_ref()
            .is_some_and(|held| held.seconds > 0 || held.nanos > 0)
        {
            facts.push(format!("guest {what} for {}", took(held.as_ref())));
        }
    }
    let _ = writeln!(text, "{vm}: created snapshot {name} ({})", facts.join(", "));
}

fn reverted(result: &v1::WorkflowResult, spec: &v1::WorkflowSpec, vm: &str, text: &mut String) {
    let state = words::<v1::VmState>(result.vm_state);
    let _ = writeln!(
        text,
        "{vm}: reverted to {}, now {state}",
        clean(&spec.snapshot_name)
    );
    let Some(guest) = &result.guest else { return };
    let mut facts = Vec::new();
    if !guest.hostname.is_empty() {
        facts.push(clean(&guest.hostname).into_owned());
    }
    if !guest.addresses.is_empty() {
        facts.push(clean(&list(&guest.addresses)).into_owned());
    }
    if guest.ready.is_some() {
        facts.push(format!("ready after {}", took(guest.ready.as_ref())));
    }
    if guest.clock_set {
        facts.push(format!(
            "clock set, it was {} behind",
            took(guest.clock_skew.as_ref())
        ));
    }
    if !facts.is_empty() {
        let _ = writeln!(text, "guest: {}", facts.join(", "));
    }
}

fn committed(result: &v1::WorkflowResult, vm: &str, text: &mut String) {
    if !result.merged.is_empty() {
        let _ = writeln!(text, "{vm}: merged {}", clean(&list(&result.merged)));
    }
    if result.resized_to_bytes > 0 {
        let _ = writeln!(
            text,
            "{vm}: the disk has {} now",
            format_size(result.resized_to_bytes)
        );
    }
    if text.is_empty() {
        let said = if result.changed {
            "committed"
        } else {
            "nothing to merge"
        };
        let _ = writeln!(text, "{vm}: {said}");
    }
}

/// What went or stayed, and the rule that said so.
pub fn verdict(verdict: &v1::Verdict, removed: &str, kept: &str) -> String {
    let done = if verdict.removed { removed } else { kept };
    let mut text = format!("{done} {} {}", clean(&verdict.what), clean(&verdict.name));
    if verdict.size_bytes > 0 {
        let _ = write!(text, " ({})", format_size(verdict.size_bytes));
    }
    if !verdict.rule.is_empty() {
        let _ = write!(text, ": {}", clean(&verdict.rule));
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use prost_types::Duration;

    use super::*;

    fn finished(result: v1::WorkflowResult) -> Finished {
        Finished {
            workflow_id: "w".to_owned(),
            state: v1::WorkflowState::Succeeded,
            result,
            failure: None,
            plan: None,
            warnings: Vec::new(),
            events: 0,
            reattachments: 0,
        }
    }

    fn asked(action: v1::Action, name: &str) -> v1::WorkflowSpec {
        v1::WorkflowSpec {
            vm_name: "web1".to_owned(),
            action: action.into(),
            snapshot_name: name.to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn a_new_snapshot_says_how_long_the_guest_was_held() {
        let result = v1::WorkflowResult {
            changed: true,
            snapshot: Some(v1::Snapshot {
                name: "before".to_owned(),
                kind: v1::SnapshotKind::External.into(),
                ..Default::default()
            }),
            consistency: v1::Consistency::Filesystem.into(),
            stopped: Some(Duration::default()),
            frozen: Some(Duration {
                seconds: 0,
                nanos: 85_000_000,
            }),
            ..Default::default()
        };
        assert_eq!(
            summary(
                &finished(result),
                &asked(v1::Action::Create, "before"),
                &Clock::fixed(0)
            ),
            "web1: created snapshot before (external, filesystem consistency, guest frozen for 85ms)\n"
        );
    }

    #[test]
    fn a_cleanup_says_what_went_what_stayed_and_why() {
        let verdict = |name: &str, removed, rule: &str| v1::Verdict {
            name: name.to_owned(),
            what: "snapshot".to_owned(),
            removed,
            rule: rule.to_owned(),
            size_bytes: 1 << 20,
        };
        let result = v1::WorkflowResult {
            changed: true,
            verdicts: vec![verdict("a", true, ""), verdict("b", false, "keep_last 1")],
            ..Default::default()
        };
        assert_eq!(
            summary(
                &finished(result),
                &asked(v1::Action::Cleanup, ""),
                &Clock::fixed(0)
            ),
            "removed snapshot a (1 MiB)\nkept snapshot b (1 MiB): keep_last 1\n"
        );
    }

    #[test]
    fn a_revert_says_where_the_guest_is() {
        let result = v1::WorkflowResult {
            changed: true,
            vm_state: v1::VmState::Running.into(),
            guest: Some(v1::Guest {
                hostname: "web1".to_owned(),
                addresses: vec!["192.0.2.7".to_owned()],
                ready: Some(Duration {
                    seconds: 12,
                    nanos: 0,
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(
            summary(
                &finished(result),
                &asked(v1::Action::Revert, "before"),
                &Clock::fixed(0)
            ),
            "web1: reverted to before, now running\nguest: web1, 192.0.2.7, ready after 12s\n"
        );
    }
}
