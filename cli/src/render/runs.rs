//! Runs: a table of them, and all of one.

use std::fmt::Write as _;

use vmsnap_client::Failure;
use vmsnap_proto::v1;

use super::{Clock, Columns, or_dash, words};
use crate::terminal::{Style, clean};

/// One line a run.
pub fn table(runs: &[v1::Workflow], clock: &Clock) -> String {
    let mut columns = Columns::new(
        &[
            "RUN", "STARTED", "VM", "ACTION", "SNAPSHOT", "STATE", "TOOK", "BY", "REASON",
        ],
        &[6],
    );
    for run in runs {
        let spec = run.spec.clone().unwrap_or_default();
        let name = match spec.snapshot_name.as_str() {
            // A name that the agent made is known from the result.
            "" => run
                .result
                .as_ref()
                .and_then(|result| result.snapshot.as_ref()),
            _ => None,
        }
        .map_or(spec.snapshot_name.as_str(), |snapshot| {
            snapshot.name.as_str()
        });
        columns.row([
            run.id.clone(),
            clock.time(run.started.as_ref()),
            clean(&spec.vm_name).into_owned(),
            words::<v1::Action>(spec.action),
            clean(or_dash(name)).into_owned(),
            words::<v1::WorkflowState>(run.state),
            clock.span(run.started.as_ref(), run.finished.as_ref()),
            run.caller
                .as_ref()
                .map(|caller| clean(&caller.identity).into_owned())
                .unwrap_or_default(),
            run.failure
                .as_ref()
                .map(|failure| failure.reason.clone())
                .unwrap_or_default(),
        ]);
    }
    columns.text()
}

/// Open guards, a line each with what ends it; nothing where there are none.
pub fn guards(guards: &[v1::Guard], clock: &Clock) -> String {
    let mut text = String::new();
    for guard in guards {
        let (vm, snapshot) = (clean(&guard.vm_name), clean(&guard.snapshot_name));
        let deadline = clock.time(guard.deadline.as_ref());
        let _ = match guard.state() {
            v1::GuardState::Held => writeln!(
                text,
                "! {vm}: the change that {snapshot} guards was not confirmed until {deadline} and \
                 is held: {}; vmsnap confirm {vm} {snapshot}, or vmsnap revert {vm} {snapshot}",
                clean(&guard.note)
            ),
            _ => writeln!(
                text,
                "! {vm}: goes back to {snapshot} at {deadline} unless confirmed: \
                 vmsnap confirm {vm} {snapshot}"
            ),
        };
    }
    text
}

/// Everything that is known of a run but its events.
pub fn details(run: &v1::Workflow, clock: &Clock, style: Style) -> String {
    let spec = run.spec.clone().unwrap_or_default();
    let mut text = String::new();
    let mut line = |label: &str, value: &str| {
        if !value.is_empty() {
            let _ = writeln!(text, "{label:<14}{}", clean(value));
        }
    };
    line("run", &run.id);
    line("request id", &run.request_id);
    line("vm", &spec.vm_name);
    line("action", &words::<v1::Action>(spec.action));
    line("snapshot", &spec.snapshot_name);
    line("state", &words::<v1::WorkflowState>(run.state));
    line("started", &clock.time(run.started.as_ref()));
    line("finished", &clock.time(run.finished.as_ref()));
    line(
        "took",
        &clock.span(run.started.as_ref(), run.finished.as_ref()),
    );
    if let Some(caller) = &run.caller {
        let by = format!(
            "{} over {} {}",
            caller.identity, caller.transport, caller.address
        );
        line("by", by.trim_end());
    }
    line("plan", &run.plan_hash);
    line("events", &run.last_sequence.to_string());
    for warning in &run.warnings {
        text.push_str(&super::plan::warning(warning, style));
    }
    if let Some(result) = &run.result {
        for verdict in &result.verdicts {
            text.push_str(&super::result::verdict(verdict, "removed", "kept"));
        }
        if !result.diff.is_empty() {
            text.push_str("changed:\n");
            text.push_str(&super::plan::diff(&result.diff));
        }
    }
    if let Some(failed) = &run.failure {
        text.push_str(&super::failure::failure(&Failure::from(failed), style));
    }
    text
}

#[cfg(test)]
mod tests {
    use prost_types::Timestamp;

    use super::*;

    fn at(seconds: i64) -> Option<Timestamp> {
        Some(Timestamp {
            seconds: 1_800_000_000 + seconds,
            nanos: 0,
        })
    }

    fn run(id: &str, name: &str, state: v1::WorkflowState) -> v1::Workflow {
        v1::Workflow {
            id: id.to_owned(),
            spec: Some(v1::WorkflowSpec {
                vm_name: "web1".to_owned(),
                action: v1::Action::Create.into(),
                snapshot_name: name.to_owned(),
                ..Default::default()
            }),
            state: state.into(),
            started: at(0),
            finished: at(3),
            caller: Some(v1::Caller {
                identity: "uid:0".to_owned(),
                transport: "unix".to_owned(),
                address: String::new(),
            }),
            ..Default::default()
        }
    }

    #[test]
    fn runs_are_listed_with_their_state_time_and_reason() {
        let made = v1::Workflow {
            result: Some(v1::WorkflowResult {
                snapshot: Some(v1::Snapshot {
                    name: "20270115T080000Z".to_owned(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..run("02", "", v1::WorkflowState::Succeeded)
        };
        let failed = v1::Workflow {
            failure: Some(v1::Failure {
                reason: "NO_SPACE".to_owned(),
                ..Default::default()
            }),
            ..run("01", "before", v1::WorkflowState::Failed)
        };
        let running = v1::Workflow {
            finished: None,
            ..run("03", "now", v1::WorkflowState::Running)
        };
        assert_eq!(
            table(&[running, made, failed], &Clock::fixed(1_800_000_090)),
            "\
RUN  STARTED              VM    ACTION  SNAPSHOT          STATE       TOOK  BY     REASON
03   2027-01-15 08:00:00  web1  create  now               running    1m30s  uid:0
02   2027-01-15 08:00:00  web1  create  20270115T080000Z  succeeded     3s  uid:0
01   2027-01-15 08:00:00  web1  create  before            failed        3s  uid:0  NO_SPACE
"
        );
    }

    #[test]
    fn a_run_is_shown_with_its_failure() {
        let failed = v1::Workflow {
            failure: Some(v1::Failure {
                reason: "NO_SPACE".to_owned(),
                message: "the pool is full".to_owned(),
                ..Default::default()
            }),
            last_sequence: 9,
            ..run("01", "before", v1::WorkflowState::Failed)
        };
        assert_eq!(
            details(&failed, &Clock::fixed(0), Style::ascii()),
            "\
run           01
vm            web1
action        create
snapshot      before
state         failed
started       2027-01-15 08:00:00
finished      2027-01-15 08:00:03
took          3s
by            uid:0 over unix
events        9
x NO_SPACE: the pool is full
"
        );
    }
}
