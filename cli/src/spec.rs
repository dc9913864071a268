//! From the command line to the contract's request.
//!
//! Invariant: what was not said is left for the agent to decide, except where
//! the help names a default.

use vmsnap_client::{RunOptions, to_wire};
use vmsnap_proto::v1;

use crate::args::{CleanupArgs, CommitArgs, CreateArgs, RevertArgs, RunArgs};

/// The options of a run that are about the run rather than about the VM.
pub fn run_options(run: &RunArgs) -> RunOptions {
    RunOptions {
        request_id: run.request_id.clone().unwrap_or_default(),
        plan_hash: run.plan_hash.clone().unwrap_or_default(),
        timeout: run.timeout,
        // Somebody who names a request wants its answer, whenever it came.
        join_finished: run.request_id.is_some(),
        ..RunOptions::default()
    }
}

fn spec(vm: &str, action: v1::Action, name: Option<&str>, run: &RunArgs) -> v1::WorkflowSpec {
    v1::WorkflowSpec {
        vm_name: vm.to_owned(),
        action: action.into(),
        snapshot_name: name.unwrap_or_default().to_owned(),
        start_if_stopped: run.start_if_stopped,
        pool: run.pool.clone(),
        ..Default::default()
    }
}

pub fn create(args: &CreateArgs) -> v1::WorkflowSpec {
    v1::WorkflowSpec {
        create: Some(v1::CreateOptions {
            description: args.description.clone(),
            memory: args.memory,
            kind: args.kind.into(),
            consistency: args.consistency.into(),
            if_exists: args.if_exists.into(),
            max_age: args.max_age.map(to_wire),
            exclude_disks: args.exclude_disks.clone(),
            accept_no_revert: args.accept_no_revert,
            protected: args.protected,
            revert_unless_confirmed: args.revert_unless_confirmed.map(to_wire),
            max_stop: args.max_stop.map(to_wire),
            freeze_timeout: Some(to_wire(args.freeze_timeout)),
            wait_for: args.wait.wait_for.into(),
            wait_timeout: Some(to_wire(args.wait.wait_timeout)),
        }),
        ..spec(
            &args.vm,
            v1::Action::Create,
            args.name.as_deref(),
            &args.run,
        )
    }
}

pub fn revert(args: &RevertArgs) -> v1::WorkflowSpec {
    v1::WorkflowSpec {
        revert: Some(v1::RevertOptions {
            state_after: args.state_after.into(),
            safety_snapshot: args.safety_snapshot,
            wait_for: args.wait.wait_for.into(),
            wait_timeout: Some(to_wire(args.wait.wait_timeout)),
            sync_clock: Some(!args.no_sync_clock),
            force: args.force,
            max_age: args.max_age.map(to_wire),
            disks_only: args.disks_only,
        }),
        ..spec(&args.vm, v1::Action::Revert, Some(&args.name), &args.run)
    }
}

pub fn commit(args: &CommitArgs) -> v1::WorkflowSpec {
    v1::WorkflowSpec {
        commit: Some(v1::CommitOptions {
            all: args.all,
            resize_bytes: args.resize_to,
            resize_disk: args.resize_disk.clone().unwrap_or_default(),
            allow_shrink: args.allow_shrink,
            bandwidth_bytes_per_second: args.bandwidth.unwrap_or_default(),
        }),
        ..spec(
            &args.vm,
            v1::Action::Commit,
            args.name.as_deref(),
            &args.run,
        )
    }
}

pub fn cleanup(args: &CleanupArgs) -> v1::WorkflowSpec {
    v1::WorkflowSpec {
        cleanup: Some(v1::CleanupOptions {
            children: args.children.unwrap_or_default().into(),
            keep_last: args.keep_last,
            keep_within: args.keep_within.map(to_wire),
            keep_hourly: args.keep_hourly,
            keep_daily: args.keep_daily,
            keep_weekly: args.keep_weekly,
            keep_monthly: args.keep_monthly,
            older_than: args.older_than.map(to_wire),
            name_pattern: args.name_pattern.clone().unwrap_or_default(),
            include_foreign: args.include_foreign,
            leftovers: args.leftovers.clone(),
            leftovers_set: args.no_leftovers || !args.leftovers.is_empty(),
            orphans: args.orphans.into(),
            bandwidth_bytes_per_second: args.bandwidth.unwrap_or_default(),
            time_zone: args.time_zone.clone().unwrap_or_default(),
        }),
        ..spec(
            &args.vm,
            v1::Action::Cleanup,
            args.name.as_deref(),
            &args.run,
        )
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn parse(words: &[&str]) -> Command {
        Cli::parse_from([&["vmsnap"], words].concat()).command
    }

    #[test]
    fn left_overs_are_said_to_be_set_only_when_they_were_named_or_refused() {
        for (words, set) in [
            (&["cleanup", "web1"][..], false),
            (&["cleanup", "web1", "--no-leftovers"], true),
            (&["cleanup", "web1", "--leftover", "a.qcow2"], true),
        ] {
            let Command::Cleanup(args) = parse(words) else {
                panic!("cleanup was asked for")
            };
            assert_eq!(cleanup(&args).cleanup.unwrap().leftovers_set, set);
        }
    }

    #[test]
    fn a_size_arrives_in_bytes_and_an_absent_one_is_absent() {
        let Command::Commit(args) = parse(&["commit", "web1", "--resize-to", "20G"]) else {
            panic!("commit was asked for")
        };
        assert_eq!(commit(&args).commit.unwrap().resize_bytes, Some(20 << 30));
        let Command::Commit(args) = parse(&["commit", "web1"]) else {
            panic!("commit was asked for")
        };
        assert_eq!(commit(&args).commit.unwrap().resize_bytes, None);
    }

    #[test]
    fn a_named_request_is_joined_even_when_it_has_finished() {
        let Command::Create(args) = parse(&["create", "web1", "--request-id", "r1"]) else {
            panic!("create was asked for")
        };
        assert!(run_options(&args.run).join_finished);
        let Command::Create(args) = parse(&["create", "web1"]) else {
            panic!("create was asked for")
        };
        assert!(!run_options(&args.run).join_finished);
    }
}
