//! Which deletes are planned, which are refused with what has to go first, and
//! what the files tell of each snapshot.

use vmsnap_agent::planning::{
    Facts, Plan, Reason, Step,
    facts::{Health, Kind, Snapshot},
    health, plan,
    request::{Action, Cleanup, Commit},
};

use super::{image, path, quiet, request, running, snapshot, with_chain};

fn cleanup(name: &str, bandwidth: Option<u64>) -> Action {
    Action::Cleanup(Cleanup {
        name: name.into(),
        bandwidth,
        ..Cleanup::default()
    })
}

fn commit_all(bandwidth: Option<u64>) -> Action {
    Action::Commit(Commit {
        all: true,
        bandwidth,
        ..Commit::default()
    })
}

/// Names and limits of the deletes of a plan; `None` is libvirt's own merge.
fn deletes(plan: &Plan) -> Vec<(&str, Option<u64>)> {
    plan.steps
        .iter()
        .filter_map(|step| match step {
            Step::DeleteSnapshot {
                name, bandwidth, ..
            } => Some((name.as_str(), *bandwidth)),
            _ => None,
        })
        .collect()
}

fn warns(plan: &Plan, code: &str) -> bool {
    plan.warnings.iter().any(|warning| warning.code == code)
}

/// `s0` … and a branch `f0` on `s0`, on which the present state does not stand.
fn with_branch(facts: Facts) -> Facts {
    let mut facts = with_chain(facts, 2);
    let mut side = snapshot("f0", Some("s0"), Kind::External, &path("web1.reverted"));
    side.current = false;
    facts.snapshots.push(side);
    let end = snapshot("f1", Some("f0"), Kind::External, &path("web1.f0"));
    facts.snapshots.push(end);
    facts
}

#[test]
fn a_limit_is_kept_for_the_newest_of_the_present_state_while_the_vm_is_on() {
    let facts = with_chain(running(), 3);
    let limited = plan(&request(commit_all(Some(7))), &facts).unwrap();
    let each = [("s2", Some(7)), ("s1", Some(7)), ("s0", Some(7))];
    assert_eq!(deletes(&limited), each, "each is the newest in its turn");
    assert!(!warns(&limited, "LIMIT_NOT_KEPT"));
    let middle = plan(&request(cleanup("s1", Some(7))), &facts).unwrap();
    assert_eq!(deletes(&middle), [("s1", None)]);
    assert!(warns(&middle, "LIMIT_NOT_KEPT"));
    let off = plan(&request(commit_all(Some(7))), &with_chain(quiet(), 1)).unwrap();
    assert_eq!(deletes(&off), [("s0", None)]);
    assert!(warns(&off, "LIMIT_NOT_KEPT"));
    let unlimited = plan(&request(commit_all(None)), &facts).unwrap();
    assert!(deletes(&unlimited).iter().all(|(_, limit)| limit.is_none()));
    assert!(!warns(&unlimited, "LIMIT_NOT_KEPT"));
}

#[test]
fn across_an_overlay_that_no_snapshot_knows_the_agent_merges_or_says_what_has_to_go_first() {
    // The newest snapshots were taken off libvirt's list: what they made is there.
    let known = |mut facts: Facts| {
        facts
            .snapshots
            .retain(|one| one.name != "s1" && one.name != "s2");
        facts.snapshots[0].current = true;
        facts
    };
    let facts = known(with_chain(running(), 3));
    let merged = plan(&request(cleanup("s0", None)), &facts).unwrap();
    assert_eq!(deletes(&merged), [("s0", Some(0))]);
    let fault = plan(
        &request(cleanup("s0", None)),
        &known(with_chain(quiet(), 3)),
    )
    .unwrap_err();
    assert_eq!(fault.reason, Reason::DomainNotRunning);
    assert_eq!(fault.metadata["state_needed"], "running");
    // One in the middle was.
    let mut facts = with_chain(running(), 3);
    facts.snapshots.remove(1);
    facts.snapshots[1].parent = Some("s0".into());
    let fault = plan(&request(cleanup("s0", None)), &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::SnapshotBranches);
    assert_eq!(fault.metadata["order"], "s2");
    let all = plan(&request(commit_all(None)), &facts).unwrap();
    assert_eq!(deletes(&all), [("s2", None), ("s0", Some(0))]);
}

#[test]
fn a_delete_that_cannot_be_names_all_that_has_to_go_first_from_the_ends_on() {
    for (name, order) in [("f0", "f1"), ("s0", "f1,f0")] {
        let fault = plan(&request(cleanup(name, None)), &with_branch(running())).unwrap_err();
        assert_eq!(fault.reason, Reason::SnapshotBranches, "{name}");
        assert_eq!(fault.metadata["order"], order, "{name}");
    }
    // The present state has no child of its own there: all children are in its way.
    let mut facts = with_branch(running());
    facts.snapshots[1].current = false;
    facts.snapshots[0].current = true;
    let fault = plan(&request(cleanup("s0", None)), &facts).unwrap_err();
    assert_eq!(fault.metadata["order"], "s1,f1,f0");
}

#[test]
fn a_merge_that_was_cut_off_is_finished_before_anything_else_is_merged() {
    let mut facts = with_chain(running(), 3);
    facts.snapshots[1].health = Health::Torn("cut off".into());
    let merged = plan(&request(commit_all(Some(7))), &facts).unwrap();
    assert_eq!(
        deletes(&merged),
        [("s1", None), ("s2", Some(7)), ("s0", Some(7))]
    );
    // All of it is merged already: the VM lies on the image itself.
    facts.snapshots[2].health = Health::Torn("cut off".into());
    facts.vm.disks[0].chain.remove(0);
    facts.vm.disks[0].path = path("web1.s1");
    let left = plan(&request(cleanup("s2", None)), &facts).unwrap();
    assert!(matches!(
        &left.steps[..],
        [Step::DeleteSnapshot {
            metadata_only: true,
            ..
        }]
    ));
}

#[test]
fn an_image_that_cannot_be_written_is_named_before_anything_is_touched() {
    let mut facts = with_chain(running(), 1);
    for folder in facts.folders.values_mut() {
        folder.writable = false;
    }
    let fault = plan(&request(cleanup("s0", None)), &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::StorageNotWritable);
    assert_eq!(fault.metadata["path"], path("web1.qcow2"));
}

/// Health of each snapshot of a chain, after `change` of what is known of files.
fn judged<'a>(
    facts: &'a Facts,
    change: impl FnOnce(&mut health::Files<'a>),
) -> Vec<(&'a str, &'static str)> {
    let mut files = health::Files::default();
    change(&mut files);
    let name = |health: &Health| match health {
        Health::Whole => "whole",
        Health::DataMissing(_) => "data missing",
        Health::MemoryMissing(_) => "memory missing",
        Health::Torn(_) => "torn",
        Health::MergedAway(_) => "merged away",
        Health::MetadataOnly => "metadata only",
    };
    facts
        .snapshots
        .iter()
        .map(|one| {
            let health = health::of(one, &facts.snapshots, &facts.vm.disks, &files);
            (one.name.as_str(), name(&health))
        })
        .collect()
}

#[test]
fn a_cut_off_merge_is_told_by_libvirts_mark_on_the_parent_by_the_journal_or_by_its_traces() {
    let (base, overlay, active) = (path("web1.qcow2"), [path("web1.s0")], [path("web1.s2")]);
    let facts = with_chain(running(), 3);
    let only = |torn: &str| -> Vec<(&str, &'static str)> {
        ["s0", "s1", "s2"]
            .into_iter()
            .map(|name| (name, if name == torn { "torn" } else { "whole" }))
            .collect()
    };
    assert_eq!(judged(&facts, |_| {}), only(""));
    // libvirt marks the one whose overlay is written: the parent.
    let marked = judged(&facts, |files| {
        files.deleting.insert(("s0", "vda"));
    });
    assert_eq!(marked, only("s1"));
    let noted = judged(&facts, |files| {
        files.begun.insert(("s0", "vda"));
    });
    assert_eq!(noted, only("s0"));
    // Who reads through what was merged sees nothing new.
    let traced = judged(&facts, |files| {
        files.half.insert(&base, &overlay);
    });
    assert_eq!(traced, only("s0"));
    let traced = judged(&facts, |files| {
        files.half.insert(&base, &active);
    });
    assert!(traced.iter().all(|(_, health)| *health == "torn"));
}

#[test]
fn an_open_merge_of_the_active_image_tears_all_that_stand_on_its_target() {
    let mut facts = with_chain(running(), 3);
    facts.vm.disks[0].merging_into = Some(path("web1.s0"));
    assert_eq!(
        judged(&facts, |_| {}),
        [("s0", "whole"), ("s1", "torn"), ("s2", "torn")]
    );
}

#[test]
fn a_merge_behind_libvirts_back_spoils_only_who_does_not_read_through_it() {
    // What was written between s1 and s2 went down into the data of s1.
    let mut facts = with_chain(running(), 3);
    facts.vm.disks[0].chain.remove(1);
    let below = vec![path("web1.s0"), path("web1.qcow2")];
    let data = path("web1.s1");
    let mut files = health::Files::default();
    files.below.insert(&data, &below);
    let of = |one: &Snapshot| health::of(one, &facts.snapshots, &facts.vm.disks, &files);
    assert_eq!(of(&facts.snapshots[0]), Health::Whole);
    assert!(matches!(of(&facts.snapshots[1]), Health::MergedAway(_)));
    assert_eq!(of(&facts.snapshots[2]), Health::Whole);
}

#[test]
fn the_overlay_of_a_revert_is_expected_also_when_a_later_snapshot_froze_it() {
    let mut facts = with_chain(running(), 1);
    let reverted = path("web1.1795703407");
    let later = snapshot("later", Some("s0"), Kind::External, &reverted);
    facts.snapshots[0].current = false;
    facts.snapshots.push(Snapshot {
        current: true,
        ..later
    });
    let disk = &mut facts.vm.disks[0];
    disk.path = path("web1.later");
    disk.chain = vec![
        image(&path("web1.later")),
        image(&reverted),
        image(&path("web1.qcow2")),
    ];
    assert_eq!(
        judged(&facts, |_| {}),
        [("s0", "whole"), ("later", "whole")]
    );
    // Another image there tells of a merge.
    facts.vm.disks[0].chain[1] = image(&path("web1.other"));
    assert_eq!(judged(&facts, |_| {})[0], ("s0", "merged away"));
}
