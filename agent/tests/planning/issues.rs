//! Known issues: each entry of the catalogue meets the facts that it is about
//! and misses those that it is not about, and what a host learned is told where
//! it matters.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use vmsnap_agent::planning::{
    Facts, Fault, Reason, Warning,
    facts::{Consistency, Disk, FileUser, Health, Kind, Memory, Source, VmState},
    issues::{self, FULL_BEFORE, Learned},
    plan,
    request::{Action, Cleanup, Commit, Create, List, Revert, WaitFor},
};

use super::{
    FOLDER, actions, create, path, quiet, request, running, situations, snapshot, with_chain,
};

type Change = fn(&mut Facts);

/// Facts that an entry is about, what may be planned on them, and changes after
/// each of which it is about them no more.
struct Case {
    facts: Facts,
    action: Option<Action>,
    misses: Vec<Change>,
}

fn case(facts: Facts, action: Option<Action>, misses: Vec<Change>) -> Case {
    Case {
        facts,
        action,
        misses,
    }
}

fn with(mut facts: Facts, change: impl FnOnce(&mut Facts)) -> Facts {
    change(&mut facts);
    facts
}

fn disk(facts: &mut Facts) -> &mut Disk {
    &mut facts.vm.disks[0]
}

fn internal() -> Action {
    Action::Create(Create {
        kind: Some(Kind::Internal),
        ..create("new")
    })
}

fn external() -> Action {
    Action::Create(create("new"))
}

fn revert() -> Action {
    Action::Revert(Revert::to("s0"))
}

fn cleanup(name: &str) -> Action {
    Action::Cleanup(Cleanup {
        name: name.into(),
        ..Cleanup::default()
    })
}

fn resize() -> Action {
    Action::Commit(Commit {
        resize_to: Some(128 << 20),
        ..Commit::default()
    })
}

fn list() -> Action {
    Action::List(List::default())
}

/// One snapshot of the present disk, inside it.
fn with_internal(mut facts: Facts, name: &str) -> Facts {
    let mut one = snapshot(name, None, Kind::Internal, &path("web1.qcow2"));
    one.current = true;
    disk(&mut facts).chain[0].internal = vec![name.to_owned()];
    facts.snapshots = vec![one];
    facts
}

/// An external snapshot with memory in a file.
fn with_memory(facts: Facts) -> Facts {
    with(with_chain(facts, 1), |facts| {
        facts.snapshots[0].memory = Memory::External(path("web1.s0.mem"));
        let record = facts.snapshots[0].record.as_mut().unwrap();
        record.memory_sha256 = Some("00".into());
    })
}

/// An internal snapshot below an external one.
fn mixed() -> Facts {
    let mut facts = with_chain(running(), 1);
    facts.snapshots[0].current = false;
    let mut inner = snapshot("i1", Some("s0"), Kind::Internal, &path("web1.s0"));
    inner.current = true;
    facts.snapshots.push(inner);
    facts
}

fn the_case(id: &str) -> Case {
    match id {
        "AGENT_SILENT" => case(
            with(running(), |facts| facts.vm.agent.responding = false),
            Some(external()),
            vec![
                |facts| facts.vm.agent.responding = true,
                |facts| facts.vm.agent = super::Agent::default(),
                |facts| facts.vm.state = VmState::Stopped,
            ],
        ),
        "BASE_SHARED" => case(
            with(quiet(), |facts| {
                let user = FileUser {
                    vm: "clone".into(),
                    snapshot: None,
                };
                facts.users = Some(BTreeMap::from([(path("web1.qcow2"), vec![user])]));
            }),
            None,
            vec![|facts| {
                let user = FileUser {
                    vm: "web1".into(),
                    snapshot: Some("s".into()),
                };
                facts.users = Some(BTreeMap::from([(path("web1.qcow2"), vec![user])]));
            }],
        ),
        "BLOCK_DEVICE_DISK" => case(
            with(quiet(), |facts| disk(facts).source = Source::Block),
            None,
            vec![
                |facts| disk(facts).source = Source::File,
                // Read-only disks are in nobody's way.
                |facts| disk(facts).readonly = true,
            ],
        ),
        "CHAIN_DEEP" => case(
            with(with_chain(running(), 5), |facts| facts.host.max_chain = 8),
            Some(external()),
            vec![|facts| facts.host.max_chain = 9],
        ),
        "CLOCK_NOT_SET" => case(
            with(with_memory(running()), |facts| {
                facts.vm.agent = super::Agent::default();
            }),
            Some(revert()),
            vec![|facts| facts.vm.agent.defined = true, |facts| {
                facts.snapshots[0].memory = Memory::None
            }],
        ),
        "CURRENT_SNAPSHOT_UNKNOWN" => case(
            with(with_chain(running(), 1), |facts| {
                facts.snapshots[0].current = false;
            }),
            Some(list()),
            vec![
                |facts| facts.snapshots[0].current = true,
                |facts| facts.snapshots[0].kind = Kind::Internal,
                |facts| facts.snapshots.clear(),
            ],
        ),
        "DEFINITION_DIFFERS" => case(
            with(running(), |facts| {
                let names = ("vda".into(), path("web1.qcow2"), path("web1.s0"));
                facts.vm.differing = vec![names];
            }),
            Some(list()),
            vec![|facts| facts.vm.differing.clear()],
        ),
        "EXTERNAL_NOT_SUPPORTED" => case(
            with(quiet(), |facts| facts.host.libvirt = 9_009_999),
            None,
            vec![|facts| facts.host.libvirt = 9_010_000],
        ),
        "FOREIGN_NAME" => case(
            with_internal(running(), "a b"),
            None,
            vec![|facts| facts.vm.state = VmState::Stopped, |facts| {
                facts.host.qemu = 5_002_000
            }],
        ),
        "FROZEN_BY_OTHERS" => case(
            with(running(), |facts| facts.vm.frozen = Some(true)),
            Some(external()),
            vec![|facts| facts.vm.frozen = Some(false), |facts| {
                facts.vm.frozen = None
            }],
        ),
        "INTERNAL_ORPHAN" => case(
            with(quiet(), |facts| {
                disk(facts).chain[0].internal = vec!["lost".into()];
            }),
            Some(internal()),
            vec![|facts| disk(facts).chain[0].internal.clear(), |facts| {
                let listed = snapshot("lost", None, Kind::Internal, &path("web1.qcow2"));
                facts.snapshots = vec![listed];
            }],
        ),
        "KINDS_MIXED" => case(
            mixed(),
            Some(list()),
            vec![
                |facts| facts.snapshots.truncate(1),
                // Then the stronger one says it.
                |facts| facts.host.libvirt = 10_010_000,
            ],
        ),
        "LIBVIRT_LOSES_BASE" => case(
            with(mixed(), |facts| facts.host.libvirt = 10_010_000),
            Some(cleanup("i1")),
            vec![
                |facts| facts.host.libvirt = 11_003_000,
                |facts| facts.host.libvirt = 8_000_000,
                |facts| facts.snapshots[1].kind = Kind::External,
            ],
        ),
        "LONG_STOP" => case(
            with(running(), |facts| facts.vm.memory = 4 << 30),
            Some(internal()),
            vec![|facts| facts.vm.memory = (4 << 30) - 1, |facts| {
                facts.vm.state = VmState::Stopped
            }],
        ),
        "MACHINE_DIFFERS" => case(
            with(with_chain(quiet(), 1), |facts| {
                facts.snapshots[0].definition.machine = "pc-q35-9.2".into();
            }),
            Some(revert()),
            vec![
                |facts| facts.vm.definition.machine = "pc-q35-9.2".into(),
                |facts| facts.snapshots[0].definition.machine.clear(),
            ],
        ),
        "MANAGED_SAVE" => case(
            with(quiet(), |facts| facts.vm.managed_save = true),
            Some(list()),
            vec![|facts| facts.vm.managed_save = false],
        ),
        "MEDIA_IN_DRIVE" => case(
            with(running(), |facts| {
                let mut drive = facts.vm.disks[0].clone();
                drive.target = "sda".into();
                drive.device = "cdrom".into();
                drive.path = path("seed.iso");
                drive.readonly = true;
                facts.vm.disks.push(drive);
                let folder = facts.folders.get_mut(super::FOLDER).unwrap();
                folder.names.insert("seed.iso".into());
            }),
            Some(external()),
            vec![|facts| facts.vm.disks[1].source = Source::Empty],
        ),
        "MEMORY_NOT_CHECKED" => case(
            with(with_memory(running()), |facts| {
                facts.snapshots[0].record = None;
            }),
            Some(revert()),
            vec![|facts| facts.snapshots[0].memory = Memory::None, |facts| {
                *facts = with_memory(running())
            }],
        ),
        "MEMORY_NOT_SAVABLE" => case(
            with(running(), |facts| {
                facts.vm.not_migratable = vec!["passed-through pci device".into()];
            }),
            Some(external()),
            vec![|facts| facts.vm.not_migratable.clear()],
        ),
        "NETWORK_STORAGE" => case(
            with(running(), |facts| {
                facts.folders.get_mut(FOLDER).unwrap().network = true;
            }),
            Some(external()),
            vec![|facts| facts.host.storage_exclusive = true, |facts| {
                facts.folders.get_mut(FOLDER).unwrap().network = false
            }],
        ),
        "NVRAM_NOT_COVERED" => case(
            uefi(running(), "raw"),
            None,
            vec![
                |facts| facts.vm.firmware.nvram_format = "qcow2".into(),
                |facts| facts.vm.firmware.nvram = None,
                |facts| facts.vm.state = VmState::Stopped,
            ],
        ),
        "NVRAM_STAYS" => case(
            uefi(with_chain(quiet(), 1), "raw"),
            Some(revert()),
            vec![
                |facts| {
                    let record = facts.snapshots[0].record.as_mut().unwrap();
                    record.nvram_copy = Some(path("web1.s0.nvram"));
                },
                |facts| facts.vm.firmware.nvram = None,
                |facts| facts.snapshots[0].memory = Memory::External(path("web1.s0.mem")),
            ],
        ),
        "OFFLINE_BRANCHES" => case(
            with(with_chain(quiet(), 2), |facts| {
                facts.snapshots[0].current = true;
                facts.snapshots[1].current = false;
            }),
            None,
            vec![|facts| facts.vm.state = VmState::Running, |facts| {
                facts.snapshots[0].current = false;
                facts.snapshots[1].current = true;
            }],
        ),
        "OLD_QCOW2" => case(
            with(quiet(), |facts| disk(facts).chain[0].compat = "0.10".into()),
            Some(internal()),
            vec![|facts| disk(facts).chain[0].compat = "1.1".into()],
        ),
        "PAUSED_BY_IO_ERROR" => case(
            with(running(), |facts| {
                facts.vm.state = VmState::Paused;
                facts.vm.reason = "I/O error".into();
            }),
            Some(external()),
            vec![|facts| facts.vm.reason = "by a user".into()],
        ),
        "PAUSED_MEMORY" => case(
            with(running(), |facts| facts.vm.state = VmState::Paused),
            Some(Action::Create(Create {
                memory: true,
                ..create("new")
            })),
            vec![|facts| facts.vm.state = VmState::Running],
        ),
        "POOL_NEARLY_FULL" => case(
            with(running(), |facts| {
                facts.folders.get_mut(FOLDER).unwrap().free = (2 << 30) - 1;
            }),
            Some(external()),
            vec![
                |facts| facts.folders.get_mut(FOLDER).unwrap().free = 2 << 30,
                |facts| facts.folders.get_mut(FOLDER).unwrap().capacity = 0,
            ],
        ),
        "QEMU_CHANGED" => case(
            with(with_memory(running()), |facts| {
                facts.host.qemu = 10_001_000;
            }),
            Some(revert()),
            vec![|facts| facts.host.qemu = 10_000_002, |facts| {
                facts.snapshots[0].memory = Memory::None
            }],
        ),
        "RAW_DISK" => case(
            with(quiet(), |facts| disk(facts).format = "raw".into()),
            None,
            vec![|facts| disk(facts).readonly = true],
        ),
        "ENCRYPTED_DISK" => case(
            with(quiet(), |facts| disk(facts).encrypted = true),
            None,
            vec![|facts| disk(facts).encrypted = false],
        ),
        "SHAREABLE_DISK" => case(
            with(quiet(), |facts| disk(facts).shareable = true),
            None,
            vec![|facts| disk(facts).shareable = false],
        ),
        "SIZE_COMES_BACK" => case(
            with_chain(running(), 1),
            Some(resize()),
            vec![|facts| facts.snapshots.clear()],
        ),
        "SNAPSHOT_NOT_WHOLE" => case(
            with(with_chain(quiet(), 1), |facts| {
                facts.snapshots[0].health = Health::Torn("x".into());
            }),
            None,
            vec![|facts| facts.snapshots[0].health = Health::Whole],
        ),
        "TRANSIENT_VM" => case(
            with(running(), |facts| facts.vm.persistent = false),
            Some(external()),
            vec![|facts| facts.vm.persistent = true],
        ),
        "UEFI_INTERNAL" => case(
            with(uefi(quiet(), "raw"), |facts| facts.host.libvirt = 9_002_000),
            Some(internal()),
            vec![
                |facts| facts.host.libvirt = 9_001_000,
                |facts| facts.host.libvirt = 10_010_000,
                |facts| facts.vm.firmware.nvram = None,
            ],
        ),
        "VTPM_NOT_COVERED" => case(
            with(running(), |facts| facts.vm.firmware.vtpm = true),
            Some(external()),
            vec![|facts| facts.vm.firmware.vtpm = false],
        ),
        "WAIT_WITHOUT_AGENT" => case(
            with(running(), |facts| facts.vm.agent = super::Agent::default()),
            Some(Action::Create(Create {
                wait_for: WaitFor::Ssh,
                ..create("new")
            })),
            vec![|facts| facts.vm.agent.defined = true],
        ),
        other => panic!("no test has facts for the entry {other}"),
    }
}

fn uefi(mut facts: Facts, format: &str) -> Facts {
    facts.vm.firmware.uefi = true;
    facts.vm.firmware.nvram = Some(path("web1_VARS.fd"));
    facts.vm.firmware.nvram_format = format.into();
    facts
}

fn warned(action: &Action, facts: &Facts) -> Vec<Warning> {
    plan(&request(action.clone()), facts).unwrap().warnings
}

fn applies(id: &str, facts: &Facts) -> Option<String> {
    issues::applying(facts)
        .into_iter()
        .find(|found| found.issue.id == id)
        .map(|found| found.on)
}

fn has(warnings: &[Warning], code: &str) -> bool {
    warnings.iter().any(|warning| warning.code == code)
}

/// What entries without conditions explain: reason, words that mean it, others.
fn explained(id: &str) -> Option<(Reason, &'static str, &'static str)> {
    match id {
        "FOREIGN_NAME" => Some((
            Reason::HypervisorFailed,
            "unable to execute QEMU command 'snapshot-delete': Invalid job ID 'x'",
            "Invalid argument",
        )),
        "IMAGE_NOT_WRITABLE" => Some((
            Reason::StorageNotWritable,
            "Could not open '/x': Permission denied",
            "mounted read-only",
        )),
        "INTERNAL_ORPHAN" => Some((
            Reason::HypervisorFailed,
            "Snapshot 'a' already exists in one or more devices",
            "external snapshot file already exists",
        )),
        "LIBVIRT_BUSY" => Some((
            Reason::VmBusy,
            "cannot acquire state change lock (held by monitor=remoteDispatch)",
            "another run changes it",
        )),
        _ => None,
    }
}

#[test]
fn every_entry_meets_the_facts_that_it_is_about_and_misses_those_that_it_is_not() {
    let mut only_explain = 0;
    for issue in issues::catalogue() {
        let id = issue.id.as_str();
        if let Some((reason, says, other)) = explained(id) {
            assert!(
                issue.explains(&Fault::new(reason, format!("cannot: {says}"))),
                "{id}"
            );
            assert!(!issue.explains(&Fault::new(reason, other)), "{id}");
            assert!(!issue.explains(&Fault::new(Reason::Internal, says)), "{id}");
            if !issue.has_conditions() {
                only_explain += 1;
                continue;
            }
        }
        let case = the_case(id);
        let on = applies(id, &case.facts).unwrap_or_else(|| panic!("{id} does not apply"));
        assert!(!on.contains(['{', '}']) && !on.is_empty(), "{id}: {on}");
        assert_eq!(issue.warns(), case.action.is_some(), "{id}");
        if let Some(action) = &case.action {
            let warnings = warned(action, &case.facts);
            let own: Vec<&Warning> = warnings.iter().filter(|it| it.code == id).collect();
            assert_eq!(own.len(), 1, "{id}: {warnings:?}");
            assert_eq!(own[0].advice, issue.what_to_do);
            assert!(
                !own[0].message.contains(['{', '}']),
                "{id}: {}",
                own[0].message
            );
        }
        for (at, miss) in case.misses.iter().enumerate() {
            let mut facts = case.facts.clone();
            miss(&mut facts);
            assert_eq!(applies(id, &facts), None, "{id}, miss {at}");
            if let Some(action) = &case.action
                && let Ok(plan) = plan(&request(action.clone()), &facts)
            {
                assert!(!has(&plan.warnings, id), "{id}, miss {at}");
            }
        }
    }
    assert_eq!(only_explain, 2);
}

#[test]
fn every_entry_is_told_apart_and_whole() {
    let mut ids = BTreeSet::new();
    for issue in issues::catalogue() {
        assert!(ids.insert(issue.id.as_str()), "{} is there twice", issue.id);
        assert!(
            issue
                .id
                .chars()
                .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'),
            "{}",
            issue.id
        );
        for text in [
            &issue.title,
            &issue.applies_when,
            &issue.what_happens,
            &issue.what_to_do,
        ] {
            assert!(
                !text.trim().is_empty() && !text.contains('|'),
                "{}",
                issue.id
            );
        }
    }
    assert!(ids.len() > 30);
    let sorted: Vec<&str> = ids.iter().copied().collect();
    let found: Vec<&str> = issues::catalogue()
        .iter()
        .map(|it| it.id.as_str())
        .collect();
    assert_eq!(found, sorted, "entries are in the order of their ids");
}

#[test]
fn a_sound_vm_is_warned_of_no_known_issue_whatever_is_done() {
    let facts = with_chain(running(), 2);
    for action in [
        external(),
        Action::Create(Create {
            memory: true,
            ..create("new")
        }),
        Action::Revert(Revert {
            safety_snapshot: true,
            wait_for: WaitFor::Agent,
            ..Revert::to("s0")
        }),
        Action::Commit(Commit {
            all: true,
            resize_to: Some(128 << 20),
            ..Commit::default()
        }),
        cleanup("s1"),
        list(),
    ] {
        for warning in warned(&action, &facts) {
            assert!(
                !issues::catalogue()
                    .iter()
                    .any(|issue| issue.id == warning.code),
                "{}: {warning:?}",
                action.name()
            );
        }
    }
}

#[test]
fn network_storage_is_warned_of_before_a_snapshot_of_either_kind() {
    let facts = with(running(), |facts| {
        facts.folders.get_mut(FOLDER).unwrap().network = true;
    });
    for action in [internal(), external()] {
        assert!(has(&warned(&action, &facts), "NETWORK_STORAGE"));
    }
}

#[test]
fn a_demand_for_a_crash_consistent_snapshot_needs_no_word_about_the_agent() {
    let facts = with(running(), |facts| facts.vm.agent.responding = false);
    let action = Action::Create(Create {
        consistency: Some(Consistency::Crash),
        ..create("new")
    });
    assert!(!has(&warned(&action, &facts), "AGENT_SILENT"));
}

#[test]
fn only_the_snapshot_that_is_reverted_to_or_deleted_is_warned_of() {
    let mut facts = with_chain(running(), 2);
    facts.snapshots[1].definition.machine = "pc-q35-9.2".into();
    assert!(!has(&warned(&revert(), &facts), "MACHINE_DIFFERS"));
    let other = Action::Revert(Revert::to("s1"));
    assert!(has(&warned(&other, &facts), "MACHINE_DIFFERS"));
    // Which of them a revert will be to is not known without a plan.
    let on = applies("MACHINE_DIFFERS", &facts).unwrap();
    assert!(on.contains("snapshot s1 "), "{on}");
}

#[test]
fn a_snapshot_that_is_merged_away_first_brings_no_old_size_back() {
    let facts = with_chain(running(), 2);
    let commit = |name: &str| {
        Action::Commit(Commit {
            name: name.into(),
            resize_to: Some(128 << 20),
            ..Commit::default()
        })
    };
    let warnings = warned(&commit("s1"), &facts);
    let back = warnings
        .iter()
        .find(|it| it.code == "SIZE_COMES_BACK")
        .unwrap();
    assert!(
        back.message.contains("a revert to s0 brings"),
        "{}",
        back.message
    );
    assert!(!has(&warned(&commit("s0"), &facts), "SIZE_COMES_BACK"));
}

// --- what this host taught ----------------------------------------------------

fn learned(reason: Reason, subject: &str, fix: &str, seen: u32) -> Learned {
    Learned {
        id: format!("id-{subject}-{fix}"),
        reason: reason.to_string(),
        subject: subject.into(),
        fix: fix.into(),
        seen,
        last: "2026-02-28T08:00:00Z".parse().unwrap(),
    }
}

#[test]
fn a_pool_that_was_full_is_warned_of_with_what_worked_until_it_is_forgotten() {
    let mut facts = running();
    facts.learned = vec![learned(Reason::NoSpace, "default", "", 2)];
    let warnings = warned(&external(), &facts);
    let full = warnings.iter().find(|it| it.code == FULL_BEFORE).unwrap();
    for part in [
        "pool 'default'",
        "2 times, last at 2026-02-28 08:00 UTC",
        "10737418240 of",
    ] {
        assert!(full.message.contains(part), "{part}: {}", full.message);
    }
    assert!(
        full.advice.contains("vmsnap issues forget id-default-"),
        "{}",
        full.advice
    );
    facts.learned[0].fix = "grow it".into();
    let warnings = warned(&external(), &facts);
    let full = warnings.iter().find(|it| it.code == FULL_BEFORE).unwrap();
    assert!(
        full.advice.starts_with("what worked here before: grow it"),
        "{}",
        full.advice
    );

    // A folder outside any pool is known by its path.
    facts.learned[0].subject = FOLDER.into();
    assert!(has(&warned(&external(), &facts), FULL_BEFORE));
    for other in ["elsewhere", "", "/", "web1"] {
        facts.learned[0].subject = other.into();
        assert!(!has(&warned(&external(), &facts), FULL_BEFORE), "{other}");
    }
    facts.learned.clear();
    assert!(!has(&warned(&external(), &facts), FULL_BEFORE));
}

#[test]
fn a_place_that_was_full_is_warned_of_once_and_only_before_something_is_written_there() {
    let mut facts = with_chain(running(), 1);
    facts.learned = vec![learned(Reason::NoSpace, "default", "", 1)];
    facts.folders.get_mut(FOLDER).unwrap().free = 1 << 30;
    for action in [external(), revert(), resize(), cleanup("s0")] {
        let codes: Vec<String> = warned(&action, &facts)
            .into_iter()
            .map(|warning| warning.code)
            .filter(|code| code == FULL_BEFORE || code == "POOL_NEARLY_FULL")
            .collect();
        assert_eq!(codes, [FULL_BEFORE], "{}", action.name());
    }
    assert!(!has(&warned(&list(), &facts), FULL_BEFORE));
    assert!(!has(&warned(&cleanup("none"), &facts), FULL_BEFORE));
    // A fix that was only recorded was never needed here.
    facts.learned[0].seen = 0;
    assert!(!has(&warned(&external(), &facts), FULL_BEFORE));
    // Another error of the pool is not about space.
    facts.learned[0] = learned(Reason::StorageNotWritable, "default", "", 1);
    assert!(!has(&warned(&external(), &facts), FULL_BEFORE));
}

#[test]
fn a_fault_shows_fixes_of_its_own_reason_and_subject_the_nearest_first() {
    let all = [
        learned(Reason::NoSpace, "", "call the storage team", 0),
        learned(Reason::NoSpace, "other", "wrong pool", 3),
        learned(Reason::NoSpace, "default", "grow the pool", 1),
        learned(Reason::VmBusy, "default", "wrong reason", 1),
        learned(Reason::NoSpace, "web1", "empty its trash", 1),
        learned(Reason::NoSpace, "/images", "", 1),
    ];
    let fault = Fault::new(Reason::NoSpace, "full")
        .with("pool", "default")
        .with("path", "/images");
    assert_eq!(
        issues::fixes(&fault, "web1", &all),
        ["grow the pool", "empty its trash", "call the storage team"]
    );
    let told = issues::explained(fault, "web2", &all);
    assert_eq!(told.metadata["known_fix_1"], "grow the pool");
    assert_eq!(told.metadata["known_fix_2"], "call the storage team");
    assert!(!told.metadata.contains_key("known_fix_3"));
    assert!(!told.metadata.contains_key("known_issue"));
}

#[test]
fn a_failure_that_the_catalogue_explains_carries_its_advice() {
    let fault = Fault::new(
        Reason::HypervisorFailed,
        "cannot delete snapshot 'a b': Invalid job ID 'internal-snapshot-delete-a b'",
    );
    let told = issues::explained(fault, "web1", &[]);
    assert_eq!(told.metadata["known_issue"], "FOREIGN_NAME");
    assert_eq!(told.metadata["advice"], "delete it while the VM is off");
}

#[test]
fn what_was_learned_is_about_a_vm_by_its_name_its_pools_its_folders_or_the_whole_host() {
    let facts = quiet();
    for (subject, about) in [
        ("", true),
        ("web1", true),
        ("default", true),
        (FOLDER, true),
        ("web2", false),
        ("other", false),
    ] {
        let one = learned(Reason::NoSpace, subject, "", 1);
        assert_eq!(issues::is_about(&one, &facts), about, "'{subject}'");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn nothing_is_warned_of_twice_and_every_sentence_is_filled(action in actions(), facts in situations(), full in any::<bool>()) {
        let mut facts = facts;
        if full {
            facts.learned = vec![learned(Reason::NoSpace, "default", "", 1)];
        }
        if let Ok(plan) = plan(&request(action), &facts) {
            let mut known = BTreeSet::new();
            for warning in &plan.warnings {
                prop_assert!(!warning.message.contains(['{', '}']), "{}", warning.message);
                let entry = issues::catalogue().iter().any(|issue| issue.id == warning.code);
                if entry || warning.code == FULL_BEFORE {
                    prop_assert!(known.insert(warning.code.clone()), "{} twice", warning.code);
                }
            }
            prop_assert!(!(known.contains(FULL_BEFORE) && known.contains("POOL_NEARLY_FULL")));
        }
        for found in issues::applying(&facts) {
            prop_assert!(!found.on.contains(['{', '}']), "{}", found.on);
        }
    }

    #[test]
    fn what_applies_to_a_plan_applies_to_the_vm_too(action in actions(), facts in situations()) {
        let applying: BTreeSet<&str> = issues::applying(&facts).iter().map(|found| found.issue.id.as_str()).collect();
        if let Ok(plan) = plan(&request(action), &facts) {
            for warning in &plan.warnings {
                if issues::catalogue().iter().any(|issue| issue.id == warning.code) {
                    prop_assert!(applying.contains(warning.code.as_str()), "{}", warning.code);
                }
            }
        }
    }
}
