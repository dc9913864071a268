//! What comes over the wire as what planning understands.
//!
//! Invariant: only the form is checked here (a missing spec, an unknown enum
//! value, a negative duration); meaning is [`Request::check`]'s and the plan's.

use std::time::Duration;

use vmsnap_proto::v1;

use crate::planning::{
    facts::{Consistency, Kind},
    reason::{Fault, Violation},
    request::{
        Action, Children, Cleanup, Commit, Create, DEFAULT_POOL, FREEZE_TIMEOUT, IfExists, List,
        Orphans, Policy, Request, Revert, StateAfter, WAIT_TIMEOUT, WaitFor,
    },
};

/// The longest `google.protobuf.Duration`, as its definition has it.
const LONGEST: Duration = Duration::from_secs(315_576_000_000);

/// Gathers what is malformed.
#[derive(Default)]
struct Problems(Vec<Violation>);

impl Problems {
    fn note(&mut self, field: &str, problem: impl Into<String>) {
        self.0.push(Violation {
            field: field.to_owned(),
            problem: problem.into(),
        });
    }

    fn duration(&mut self, field: &str, value: Option<prost_types::Duration>) -> Option<Duration> {
        match duration(value?) {
            Ok(duration) => Some(duration),
            Err(problem) => {
                self.note(field, problem);
                None
            }
        }
    }

    fn one_of<W: TryFrom<i32>, T>(
        &mut self,
        field: &str,
        value: i32,
        known: impl FnOnce(W) -> T,
    ) -> Option<T> {
        match W::try_from(value) {
            Ok(value) => Some(known(value)),
            Err(_) => {
                self.note(
                    field,
                    format!("{value} is no value that this agent knows; is the caller newer?"),
                );
                None
            }
        }
    }
}

/// A time from the wire: from 0 on, and one that a clock can add to the present.
///
/// # Errors
/// A sentence that names the value and what would be right.
pub fn duration(value: prost_types::Duration) -> Result<Duration, String> {
    let shown = || format!("{} s and {} ns", value.seconds, value.nanos);
    // By hand: the conversion of prost-types negates, and the smallest number
    // has no opposite.
    let (Ok(seconds), Ok(nanos)) = (u64::try_from(value.seconds), u32::try_from(value.nanos))
    else {
        return Err(format!(
            "{} is negative; a time from 0 on is needed",
            shown()
        ));
    };
    let duration = Duration::new(seconds, nanos);
    if duration > LONGEST {
        return Err(format!(
            "{} is longer than 10000 years; less is needed",
            shown()
        ));
    }
    Ok(duration)
}

/// A request from the wire.
///
/// # Errors
/// A fault that names each malformed field.
pub fn request(spec: Option<v1::WorkflowSpec>) -> Result<Request, Fault> {
    let Some(spec) = spec else {
        return Err(Fault::bad_field("spec", "is missing"));
    };
    let mut problems = Problems::default();
    let action = problems
        .one_of::<v1::Action, _>("action", spec.action, |action| action)
        .unwrap_or_default();
    belongs(action, &spec, &mut problems);
    let name = spec.snapshot_name.clone();
    let action = match action {
        v1::Action::Unspecified => {
            if problems.0.is_empty() {
                problems.note(
                    "action",
                    "is missing; use create, revert, commit, list, cleanup or confirm",
                );
            }
            None
        }
        v1::Action::Create => Some(Action::Create(create(
            name,
            spec.create.unwrap_or_default(),
            &mut problems,
        ))),
        v1::Action::Revert => Some(Action::Revert(revert(
            name,
            spec.revert.unwrap_or_default(),
            &mut problems,
        ))),
        v1::Action::Commit => {
            let options = spec.commit.unwrap_or_default();
            Some(Action::Commit(Commit {
                name,
                all: options.all,
                resize_to: options.resize_bytes,
                resize_disk: options.resize_disk,
                allow_shrink: options.allow_shrink,
                bandwidth: bandwidth(options.bandwidth_bytes_per_second),
            }))
        }
        v1::Action::List => Some(Action::List(List { name })),
        v1::Action::Cleanup => Some(Action::Cleanup(cleanup(
            name,
            spec.cleanup.unwrap_or_default(),
            &mut problems,
        ))),
        v1::Action::Confirm => Some(Action::Confirm { name }),
    };
    let (Some(action), true) = (action, problems.0.is_empty()) else {
        return Err(Fault::bad_fields(problems.0));
    };
    let request = Request {
        vm: spec.vm_name,
        action,
        start_if_stopped: spec.start_if_stopped,
        pool: if spec.pool.is_empty() {
            DEFAULT_POOL.to_owned()
        } else {
            spec.pool
        },
    };
    request.check()?;
    Ok(request)
}

fn belongs(action: v1::Action, spec: &v1::WorkflowSpec, problems: &mut Problems) {
    for (field, of, given) in [
        ("create", v1::Action::Create, spec.create.is_some()),
        ("revert", v1::Action::Revert, spec.revert.is_some()),
        ("commit", v1::Action::Commit, spec.commit.is_some()),
        ("cleanup", v1::Action::Cleanup, spec.cleanup.is_some()),
    ] {
        if given && action != of && action != v1::Action::Unspecified {
            problems.note(
                field,
                format!("these options do not belong to this action; they are for {field}"),
            );
        }
    }
}

fn bandwidth(value: u64) -> Option<u64> {
    (value > 0).then_some(value)
}

fn wait_for(field: &str, value: i32, problems: &mut Problems) -> WaitFor {
    problems
        .one_of(field, value, |value| match value {
            v1::WaitFor::Unspecified | v1::WaitFor::None => WaitFor::None,
            v1::WaitFor::Agent => WaitFor::Agent,
            v1::WaitFor::Address => WaitFor::Address,
            v1::WaitFor::Ssh => WaitFor::Ssh,
        })
        .unwrap_or_default()
}

fn create(name: String, options: v1::CreateOptions, problems: &mut Problems) -> Create {
    let kind = problems
        .one_of("create.kind", options.kind, |kind| match kind {
            v1::SnapshotKind::Unspecified => None,
            v1::SnapshotKind::Internal => Some(Kind::Internal),
            v1::SnapshotKind::External => Some(Kind::External),
            v1::SnapshotKind::Mixed => Some(Kind::Mixed),
        })
        .flatten();
    let consistency = problems
        .one_of(
            "create.consistency",
            options.consistency,
            |value| match value {
                v1::Consistency::Unspecified => None,
                v1::Consistency::Memory => Some(Consistency::Memory),
                v1::Consistency::Filesystem => Some(Consistency::Filesystem),
                v1::Consistency::Suspend => Some(Consistency::Suspend),
                v1::Consistency::Crash => Some(Consistency::Crash),
                v1::Consistency::Stopped => Some(Consistency::Stopped),
            },
        )
        .flatten();
    let if_exists = problems
        .one_of("create.if_exists", options.if_exists, |value| match value {
            v1::IfExists::Unspecified | v1::IfExists::Ok => IfExists::Ok,
            v1::IfExists::Fail => IfExists::Fail,
            v1::IfExists::Replace => IfExists::Replace,
        })
        .unwrap_or_default();
    Create {
        name,
        description: options.description,
        memory: options.memory,
        kind,
        consistency,
        if_exists,
        max_age: problems.duration("create.max_age", options.max_age),
        exclude_disks: options.exclude_disks,
        accept_no_revert: options.accept_no_revert,
        protected: options.protected,
        revert_unless_confirmed: problems.duration(
            "create.revert_unless_confirmed",
            options.revert_unless_confirmed,
        ),
        max_stop: problems.duration("create.max_stop", options.max_stop),
        freeze_timeout: problems
            .duration("create.freeze_timeout", options.freeze_timeout)
            .unwrap_or(FREEZE_TIMEOUT),
        wait_for: wait_for("create.wait_for", options.wait_for, problems),
        wait_timeout: problems
            .duration("create.wait_timeout", options.wait_timeout)
            .unwrap_or(WAIT_TIMEOUT),
    }
}

fn revert(name: String, options: v1::RevertOptions, problems: &mut Problems) -> Revert {
    let state_after = problems
        .one_of(
            "revert.state_after",
            options.state_after,
            |value| match value {
                v1::StateAfter::Unspecified | v1::StateAfter::Auto => StateAfter::Auto,
                v1::StateAfter::Running => StateAfter::Running,
                v1::StateAfter::Paused => StateAfter::Paused,
                v1::StateAfter::Stopped => StateAfter::Stopped,
            },
        )
        .unwrap_or_default();
    Revert {
        name,
        state_after,
        safety_snapshot: options.safety_snapshot,
        wait_for: wait_for("revert.wait_for", options.wait_for, problems),
        wait_timeout: problems
            .duration("revert.wait_timeout", options.wait_timeout)
            .unwrap_or(WAIT_TIMEOUT),
        sync_clock: options.sync_clock.unwrap_or(true),
        force: options.force,
        max_age: problems.duration("revert.max_age", options.max_age),
        disks_only: options.disks_only,
    }
}

fn cleanup(name: String, options: v1::CleanupOptions, problems: &mut Problems) -> Cleanup {
    let children = problems
        .one_of("cleanup.children", options.children, |value| match value {
            v1::Children::Unspecified | v1::Children::Keep => Children::Keep,
            v1::Children::Delete => Children::Delete,
            v1::Children::Only => Children::Only,
        })
        .unwrap_or_default();
    let orphans = problems
        .one_of("cleanup.orphans", options.orphans, |value| match value {
            v1::Orphans::Unspecified | v1::Orphans::Report => Orphans::Report,
            v1::Orphans::Ignore => Orphans::Ignore,
            v1::Orphans::Delete => Orphans::Delete,
        })
        .unwrap_or_default();
    Cleanup {
        name,
        children,
        policy: Policy {
            keep_last: options.keep_last,
            keep_within: problems.duration("cleanup.keep_within", options.keep_within),
            keep_hourly: options.keep_hourly,
            keep_daily: options.keep_daily,
            keep_weekly: options.keep_weekly,
            keep_monthly: options.keep_monthly,
            older_than: problems.duration("cleanup.older_than", options.older_than),
            name_pattern: options.name_pattern,
            include_foreign: options.include_foreign,
            time_zone: options.time_zone,
        },
        leftovers: options.leftovers_set.then_some(options.leftovers),
        orphans,
        bandwidth: bandwidth(options.bandwidth_bytes_per_second),
    }
}

/// A request as it goes over the wire again, when a run is read back.
#[must_use]
pub fn spec(request: &Request) -> v1::WorkflowSpec {
    let duration = |value: Option<Duration>| {
        value.and_then(|value| prost_types::Duration::try_from(value).ok())
    };
    let wait = |value: WaitFor| match value {
        WaitFor::None => v1::WaitFor::None,
        WaitFor::Agent => v1::WaitFor::Agent,
        WaitFor::Address => v1::WaitFor::Address,
        WaitFor::Ssh => v1::WaitFor::Ssh,
    } as i32;
    let mut spec = v1::WorkflowSpec {
        vm_name: request.vm.clone(),
        snapshot_name: request.snapshot_name().to_owned(),
        start_if_stopped: request.start_if_stopped,
        pool: request.pool.clone(),
        ..v1::WorkflowSpec::default()
    };
    match &request.action {
        Action::Create(create) => {
            spec.set_action(v1::Action::Create);
            spec.create = Some(v1::CreateOptions {
                description: create.description.clone(),
                memory: create.memory,
                kind: create
                    .kind
                    .map_or(v1::SnapshotKind::Unspecified, super::reply::kind)
                    as i32,
                consistency: create
                    .consistency
                    .map_or(v1::Consistency::Unspecified, super::reply::consistency)
                    as i32,
                if_exists: match create.if_exists {
                    IfExists::Ok => v1::IfExists::Ok,
                    IfExists::Fail => v1::IfExists::Fail,
                    IfExists::Replace => v1::IfExists::Replace,
                } as i32,
                max_age: duration(create.max_age),
                exclude_disks: create.exclude_disks.clone(),
                accept_no_revert: create.accept_no_revert,
                protected: create.protected,
                revert_unless_confirmed: duration(create.revert_unless_confirmed),
                max_stop: duration(create.max_stop),
                freeze_timeout: duration(Some(create.freeze_timeout)),
                wait_for: wait(create.wait_for),
                wait_timeout: duration(Some(create.wait_timeout)),
            });
        }
        Action::Revert(revert) => {
            spec.set_action(v1::Action::Revert);
            spec.revert = Some(v1::RevertOptions {
                state_after: match revert.state_after {
                    StateAfter::Auto => v1::StateAfter::Auto,
                    StateAfter::Running => v1::StateAfter::Running,
                    StateAfter::Paused => v1::StateAfter::Paused,
                    StateAfter::Stopped => v1::StateAfter::Stopped,
                } as i32,
                safety_snapshot: revert.safety_snapshot,
                wait_for: wait(revert.wait_for),
                wait_timeout: duration(Some(revert.wait_timeout)),
                sync_clock: Some(revert.sync_clock),
                force: revert.force,
                max_age: duration(revert.max_age),
                disks_only: revert.disks_only,
            });
        }
        Action::Commit(commit) => {
            spec.set_action(v1::Action::Commit);
            spec.commit = Some(v1::CommitOptions {
                all: commit.all,
                resize_bytes: commit.resize_to,
                resize_disk: commit.resize_disk.clone(),
                allow_shrink: commit.allow_shrink,
                bandwidth_bytes_per_second: commit.bandwidth.unwrap_or(0),
            });
        }
        Action::List(_) => spec.set_action(v1::Action::List),
        Action::Confirm { .. } => spec.set_action(v1::Action::Confirm),
        Action::Cleanup(cleanup) => {
            spec.set_action(v1::Action::Cleanup);
            let policy = &cleanup.policy;
            spec.cleanup = Some(v1::CleanupOptions {
                children: match cleanup.children {
                    Children::Keep => v1::Children::Keep,
                    Children::Delete => v1::Children::Delete,
                    Children::Only => v1::Children::Only,
                } as i32,
                keep_last: policy.keep_last,
                keep_within: duration(policy.keep_within),
                keep_hourly: policy.keep_hourly,
                keep_daily: policy.keep_daily,
                keep_weekly: policy.keep_weekly,
                keep_monthly: policy.keep_monthly,
                older_than: duration(policy.older_than),
                name_pattern: policy.name_pattern.clone(),
                include_foreign: policy.include_foreign,
                leftovers: cleanup.leftovers.clone().unwrap_or_default(),
                leftovers_set: cleanup.leftovers.is_some(),
                orphans: match cleanup.orphans {
                    Orphans::Ignore => v1::Orphans::Ignore,
                    Orphans::Report => v1::Orphans::Report,
                    Orphans::Delete => v1::Orphans::Delete,
                } as i32,
                bandwidth_bytes_per_second: cleanup.bandwidth.unwrap_or(0),
                time_zone: policy.time_zone.clone(),
            });
        }
    }
    spec
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(action: v1::Action) -> v1::WorkflowSpec {
        v1::WorkflowSpec {
            vm_name: "web1".into(),
            action: action as i32,
            snapshot_name: "s1".into(),
            ..v1::WorkflowSpec::default()
        }
    }

    #[test]
    fn defaults_are_those_of_the_documentation() {
        let request = request(Some(wire(v1::Action::Revert))).unwrap();
        assert_eq!(request.action, Action::Revert(Revert::to("s1")));
        assert_eq!(request.pool, "default");
    }

    #[test]
    fn a_request_survives_the_way_over_the_wire() {
        for action in [
            v1::Action::Create,
            v1::Action::Revert,
            v1::Action::Commit,
            v1::Action::List,
            v1::Action::Cleanup,
            v1::Action::Confirm,
        ] {
            let first = request(Some(wire(action))).unwrap();
            assert_eq!(request(Some(spec(&first))).unwrap(), first);
        }
    }

    #[test]
    fn a_time_that_no_clock_can_add_is_named_and_so_is_the_smallest_number() {
        for (seconds, nanos) in [(i64::MAX, 0), (0, i32::MIN), (i64::MIN, i32::MIN)] {
            let mut spec = wire(v1::Action::Revert);
            spec.revert = Some(v1::RevertOptions {
                wait_timeout: Some(prost_types::Duration { seconds, nanos }),
                ..v1::RevertOptions::default()
            });
            let fault = request(Some(spec)).unwrap_err();
            assert_eq!(fault.violations[0].field, "revert.wait_timeout");
        }
    }

    #[test]
    fn options_of_another_action_an_unknown_value_and_a_negative_time_are_named() {
        let mut spec = wire(v1::Action::Create);
        spec.revert = Some(v1::RevertOptions::default());
        spec.create = Some(v1::CreateOptions {
            kind: 99,
            max_age: Some(prost_types::Duration {
                seconds: -5,
                nanos: 0,
            }),
            ..v1::CreateOptions::default()
        });
        let fault = request(Some(spec)).unwrap_err();
        let fields: Vec<&str> = fault
            .violations
            .iter()
            .map(|it| it.field.as_str())
            .collect();
        assert_eq!(fields, ["revert", "create.kind", "create.max_age"]);
    }

    #[test]
    fn a_missing_action_says_which_there_are() {
        let fault = request(Some(wire(v1::Action::Unspecified))).unwrap_err();
        assert!(fault.message.contains("create, revert, commit"), "{fault}");
    }
}
