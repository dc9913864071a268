//! A plan: what would be done, why so, and what it would change.

use std::fmt::Write as _;

use vmsnap_proto::v1;

use super::Clock;
use crate::terminal::{Style, clean};

/// Steps, decisions, warnings and the diff of a plan.
pub fn plan(plan: &v1::Plan, clock: &Clock, style: Style) -> String {
    let mut text = String::new();
    if plan.changes {
        let _ = writeln!(text, "would do:");
    } else {
        let _ = writeln!(text, "nothing to change");
    }
    for step in &plan.steps {
        let _ = writeln!(
            text,
            "  {}. {}{}",
            step.index + 1,
            clean(&step.title),
            consequences(step)
        );
    }
    if !plan.decisions.is_empty() {
        let _ = writeln!(text, "because:");
        for decision in &plan.decisions {
            let (subject, choice) = (clean(&decision.subject), clean(&decision.choice));
            let _ = writeln!(text, "  {subject}: {choice} ({})", clean(&decision.because));
        }
    }
    if !plan.diff.is_empty() {
        let _ = writeln!(text, "would change:");
        text.push_str(&diff(&plan.diff));
    }
    for warning in &plan.warnings {
        text.push_str(&self::warning(warning, style));
    }
    if let Some(preview) = &plan.preview {
        for verdict in &preview.verdicts {
            text.push_str(&super::result::verdict(
                verdict,
                "would remove",
                "would keep",
            ));
        }
        if let Some(deadline) = &preview.guard_deadline {
            let _ = writeln!(
                text,
                "would revert at {} unless confirmed",
                clock.time(Some(deadline))
            );
        }
    }
    if !plan.hash.is_empty() {
        let _ = writeln!(
            text,
            "plan {} (run exactly this with --plan-hash)",
            plan.hash
        );
    }
    text
}

fn consequences(step: &v1::PlannedStep) -> String {
    if step.point_of_no_return {
        " [no way back from here]".to_owned()
    } else if !step.undo.is_empty() {
        format!(" [undo: {}]", clean(&step.undo))
    } else {
        String::new()
    }
}

/// A warning with its advice.
pub fn warning(warning: &v1::Warning, style: Style) -> String {
    let mut text = format!(
        "{} {}: {}\n",
        style.alert(),
        warning.code,
        clean(&warning.message)
    );
    if !warning.advice.is_empty() {
        let _ = writeln!(text, "  advice: {}", clean(&warning.advice));
    }
    text
}

/// A line a changed field.
pub fn diff(changes: &[v1::FieldChange]) -> String {
    let mut text = String::new();
    for change in changes {
        let field = clean(&change.field);
        let _ = match (
            change.before.as_deref().map(clean),
            change.after.as_deref().map(clean),
        ) {
            (Some(before), Some(after)) => writeln!(text, "  ~ {field}: {before} -> {after}"),
            (None, Some(after)) => writeln!(text, "  + {field}: {after}"),
            (Some(before), None) => writeln!(text, "  - {field}: {before}"),
            (None, None) => writeln!(text, "    {field}"),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_shows_steps_with_their_undo_decisions_changes_and_warnings() {
        let step = |index, title: &str, undo: &str, point_of_no_return| v1::PlannedStep {
            index,
            title: title.to_owned(),
            undo: undo.to_owned(),
            point_of_no_return,
            changes: true,
            ..Default::default()
        };
        let change = |field: &str, before: Option<&str>, after: Option<&str>| v1::FieldChange {
            field: field.to_owned(),
            before: before.map(str::to_owned),
            after: after.map(str::to_owned),
        };
        let example = v1::Plan {
            hash: "4f2a".to_owned(),
            changes: true,
            steps: vec![
                step(0, "freeze the file systems", "thaw the file systems", false),
                step(
                    1,
                    "create snapshot before",
                    "remove what was made of the snapshot",
                    false,
                ),
                step(2, "delete snapshot old", "", true),
            ],
            decisions: vec![v1::Decision {
                subject: "consistency".to_owned(),
                choice: "filesystem".to_owned(),
                because: "the guest agent answers".to_owned(),
            }],
            diff: vec![
                change("snapshots.before", None, Some("external")),
                change("snapshots.old", Some("external"), None),
                change("current", Some("old"), Some("before")),
            ],
            warnings: vec![v1::Warning {
                code: "MEMORY_NOT_SAVED".to_owned(),
                message: "a revert restarts the guest".to_owned(),
                advice: "add --memory".to_owned(),
            }],
            ..Default::default()
        };
        assert_eq!(
            plan(&example, &Clock::fixed(0), Style::ascii()),
            "\
would do:
  1. freeze the file systems [undo: thaw the file systems]
  2. create snapshot before [undo: remove what was made of the snapshot]
  3. delete snapshot old [no way back from here]
because:
  consistency: filesystem (the guest agent answers)
would change:
  + snapshots.before: external
  - snapshots.old: external
  ~ current: old -> before
! MEMORY_NOT_SAVED: a revert restarts the guest
  advice: add --memory
plan 4f2a (run exactly this with --plan-hash)
"
        );
    }

    #[test]
    fn a_plan_for_a_state_already_reached_says_so() {
        let text = plan(&v1::Plan::default(), &Clock::fixed(0), Style::ascii());
        assert_eq!(text, "nothing to change\n");
    }
}
