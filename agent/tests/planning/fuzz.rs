//! Requests at random, from the wire to the plan.

use proptest::{collection::vec, prelude::*};
use prost::Message as _;
use vmsnap_agent::{api::spec, planning::plan};
use vmsnap_fuzz::{
    Class,
    inputs::{damaged, numbers, texts},
};
use vmsnap_proto::v1;

use super::situations;

fn durations() -> impl Strategy<Value = Option<prost_types::Duration>> {
    prop::option::of((numbers(), any::<i32>(), any::<bool>()).prop_map(
        |(seconds, nanos, whole)| {
            let nanos = if whole { 0 } else { nanos };
            prost_types::Duration { seconds, nanos }
        },
    ))
}

fn values() -> impl Strategy<Value = i32> {
    prop_oneof![9 => 0..7_i32, 1 => any::<i32>()]
}

fn counts() -> impl Strategy<Value = Option<u32>> {
    prop::option::weighted(0.3, prop_oneof![0..5_u32, any::<u32>()])
}

fn names() -> impl Strategy<Value = String> {
    prop_oneof![3 => "s[0-3]|new|web1|default||v[dx][ab]", 1 => texts()]
}

fn creates() -> impl Strategy<Value = v1::CreateOptions> {
    let one = (names(), any::<[bool; 3]>(), values(), values(), values());
    let two = (
        durations(),
        vec(names(), 0..3),
        durations(),
        durations(),
        durations(),
    );
    (one, two, values(), durations()).prop_map(|(one, two, wait_for, wait_timeout)| {
        let (description, flags, kind, consistency, if_exists) = one;
        let (max_age, exclude_disks, revert_unless_confirmed, max_stop, freeze_timeout) = two;
        v1::CreateOptions {
            description,
            memory: flags[0],
            kind,
            consistency,
            if_exists,
            max_age,
            exclude_disks,
            accept_no_revert: flags[1],
            protected: flags[2],
            revert_unless_confirmed,
            max_stop,
            freeze_timeout,
            wait_for,
            wait_timeout,
        }
    })
}

fn reverts() -> impl Strategy<Value = v1::RevertOptions> {
    (
        values(),
        any::<[bool; 4]>(),
        values(),
        durations(),
        durations(),
    )
        .prop_map(
            |(state_after, flags, wait_for, wait_timeout, max_age)| v1::RevertOptions {
                state_after,
                safety_snapshot: flags[0],
                wait_for,
                wait_timeout,
                sync_clock: Some(flags[1]),
                force: flags[2],
                max_age,
                disks_only: flags[3],
            },
        )
}

fn commits() -> impl Strategy<Value = v1::CommitOptions> {
    (
        any::<[bool; 2]>(),
        any::<Option<u64>>(),
        names(),
        any::<u64>(),
    )
        .prop_map(
            |(flags, resize_bytes, resize_disk, bandwidth_bytes_per_second)| v1::CommitOptions {
                all: flags[0],
                resize_bytes,
                resize_disk,
                allow_shrink: flags[1],
                bandwidth_bytes_per_second,
            },
        )
}

fn cleanups() -> impl Strategy<Value = v1::CleanupOptions> {
    let keeps = (counts(), counts(), counts(), counts(), counts());
    let times = (durations(), durations(), names(), names());
    let rest = (
        any::<[bool; 2]>(),
        vec(names(), 0..3),
        values(),
        values(),
        any::<u64>(),
    );
    (keeps, times, rest).prop_map(|(keeps, times, rest)| {
        let (flags, leftovers, children, orphans, bandwidth_bytes_per_second) = rest;
        v1::CleanupOptions {
            children,
            keep_last: keeps.0,
            keep_within: times.0,
            keep_hourly: keeps.1,
            keep_daily: keeps.2,
            keep_weekly: keeps.3,
            keep_monthly: keeps.4,
            older_than: times.1,
            name_pattern: times.2,
            include_foreign: flags[0],
            leftovers,
            leftovers_set: flags[1],
            orphans,
            bandwidth_bytes_per_second,
            time_zone: times.3,
        }
    })
}

fn specs() -> impl Strategy<Value = v1::WorkflowSpec> {
    let options = (
        prop::option::weighted(0.5, creates().boxed()),
        prop::option::weighted(0.5, reverts().boxed()),
        prop::option::weighted(0.5, commits().boxed()),
        prop::option::weighted(0.5, cleanups().boxed()),
    );
    let named = (names(), values(), names(), any::<bool>(), names());
    (named, options, any::<bool>()).prop_map(|(named, options, own)| {
        let (vm_name, action, snapshot_name, start_if_stopped, pool) = named;
        let (create, revert, commit, cleanup) = options;
        // Mostly the options that belong to the action.
        let keep = |number: i32| !own || action == number;
        v1::WorkflowSpec {
            vm_name,
            action,
            snapshot_name,
            start_if_stopped,
            pool,
            create: create.filter(|_| keep(v1::Action::Create as i32)),
            revert: revert.filter(|_| keep(v1::Action::Revert as i32)),
            commit: commit.filter(|_| keep(v1::Action::Commit as i32)),
            cleanup: cleanup.filter(|_| keep(v1::Action::Cleanup as i32)),
        }
    })
}

/// From bytes to a plan, and what holds on the way.
fn planned(bytes: &[u8], facts: &super::Facts) -> Result<(), TestCaseError> {
    let Ok(message) = v1::WorkflowSpec::decode(bytes) else {
        return Ok(());
    };
    let request = match spec::request(Some(message)) {
        Ok(request) => request,
        Err(fault) => {
            prop_assert!(!fault.violations.is_empty(), "{}", fault.message);
            return Ok(());
        }
    };
    prop_assert_eq!(request.check(), Ok(()));
    // What was accepted is kept, and goes back over the wire, as it is.
    let kept = serde_json::to_string(&request).unwrap();
    prop_assert_eq!(
        &serde_json::from_str::<super::Request>(&kept).unwrap(),
        &request
    );
    let again = spec::request(Some(spec::spec(&request)));
    prop_assert_eq!(again.as_ref(), Ok(&request));
    match plan(&request, facts) {
        Ok(plan) => prop_assert!(!plan.hash.is_empty()),
        Err(fault) => prop_assert!(!fault.message.is_empty()),
    }
    Ok(())
}

#[test]
fn any_request_is_planned_or_refused_with_its_fields() {
    Class::new("requests, values", 150)
        .check(&(specs().boxed(), situations().boxed()), |(spec, facts)| {
            planned(&spec.encode_to_vec(), &facts)
        });
}

#[test]
fn any_bytes_as_a_request_are_planned_or_refused() {
    let bytes = prop_oneof![
        3 => specs().boxed().prop_flat_map(|spec| damaged(spec.encode_to_vec())),
        1 => vec(any::<u8>(), 0..400),
        1 => (specs().boxed(), vec(any::<u8>(), 0..60)).prop_map(|(spec, unknown)| {
            // Field 1000 is none of this version's.
            let mut bytes = spec.encode_to_vec();
            prost::encoding::encode_key(1000, prost::encoding::WireType::LengthDelimited, &mut bytes);
            prost::encoding::encode_varint(unknown.len() as u64, &mut bytes);
            bytes.extend(unknown);
            bytes
        }),
    ];
    Class::new("requests, bytes", 80)
        .check(&(bytes.boxed(), situations().boxed()), |(bytes, facts)| {
            planned(&bytes, &facts)
        });
}
