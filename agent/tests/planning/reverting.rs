//! What a revert looks at before it touches the VM, and what it says.

use vmsnap_agent::planning::{
    Facts, Fault, Plan, Reason,
    facts::{Agent, DefinedDisk, Health, Kind, Memory, Source, VmState},
    plan,
    request::{Action, Cleanup, Commit, Create, List, Orphans, Revert, StateAfter, WaitFor},
};

use super::{create, image, names, path, quiet, request, running, snapshot, with_chain};

fn revert(facts: &Facts, change: impl FnOnce(&mut Revert)) -> Result<Plan, Fault> {
    let mut revert = Revert::to("s0");
    change(&mut revert);
    plan(&request(Action::Revert(revert)), facts)
}

fn warned(plan: &Plan, code: &str) -> bool {
    plan.warnings.iter().any(|warning| warning.code == code)
}

fn changed(plan: &Plan, field: &str) -> Option<(Option<String>, Option<String>)> {
    plan.diff
        .iter()
        .find(|change| change.field == field)
        .map(|change| (change.before.clone(), change.after.clone()))
}

fn with_names(mut facts: Facts, names: &[&str]) -> Facts {
    for folder in facts.folders.values_mut() {
        folder
            .names
            .extend(names.iter().map(|name| (*name).to_owned()));
    }
    facts
}

/// One snapshot with memory, while the VM runs.
fn warm() -> Facts {
    let mut facts = with_chain(running(), 1);
    facts.snapshots[0].memory = Memory::External(path("m.mem"));
    facts.snapshots[0].definition.agent = true;
    facts
}

#[test]
fn uefi_variables_are_put_back_only_while_the_vm_is_off() {
    let none = Memory::None;
    let saved = || Memory::External(path("m.mem"));
    for (memory, after, before) in [
        (none, StateAfter::Running, Some("start")),
        (saved(), StateAfter::Running, None),
        (saved(), StateAfter::Paused, None),
        // Loaded, but never run: QEMU has written nothing back.
        (saved(), StateAfter::Stopped, Some("")),
    ] {
        let mut facts = with_names(with_chain(running(), 1), &["web1.s0.nvram", "web1.fd"]);
        facts.vm.firmware.uefi = true;
        facts.vm.firmware.nvram = Some(path("web1.fd"));
        facts.vm.firmware.nvram_format = "raw".into();
        facts.snapshots[0].memory = memory;
        facts.snapshots[0].record.as_mut().unwrap().nvram_copy = Some(path("web1.s0.nvram"));
        let steps = names(&revert(&facts, |it| it.state_after = after).unwrap());
        let at = |name: &str| steps.iter().position(|step| *step == name);
        assert_eq!(at("restore-nvram").is_some(), before.is_some(), "{steps:?}");
        if let Some(restored) = at("restore-nvram") {
            assert!(at("revert") < Some(restored) && at("stop") < Some(restored));
            assert!(at("start").is_none_or(|start| restored < start));
            assert_eq!(
                at("check-snapshot"),
                Some(0),
                "looked at before anything else"
            );
        }
    }
}

#[test]
fn uefi_variables_that_cannot_come_back_are_said_or_refused() {
    let mut facts = with_chain(running(), 1);
    facts.vm.firmware.uefi = true;
    facts.vm.firmware.nvram = Some(path("web1.fd"));
    facts.vm.firmware.nvram_format = "raw".into();
    assert!(warned(&revert(&facts, |_| ()).unwrap(), "NVRAM_STAYS"));
    facts.snapshots[0].record.as_mut().unwrap().nvram_copy = Some(path("gone.nvram"));
    let fault = revert(&facts, |_| ()).unwrap_err();
    assert_eq!(fault.reason, Reason::SnapshotNotWhole);
    // Inside a qcow2 file they are part of an internal snapshot.
    let mut facts = quiet();
    facts.vm.firmware.nvram = Some(path("web1.fd"));
    facts.snapshots = vec![snapshot("s0", None, Kind::Internal, &path("web1.qcow2"))];
    for (format, stays) in [("qcow2", false), ("raw", true)] {
        facts.vm.firmware.nvram_format = format.into();
        let plan = revert(&facts, |_| ()).unwrap();
        assert_eq!(warned(&plan, "NVRAM_STAYS"), stays, "{format}");
    }
}

#[test]
fn memory_of_another_qemu_and_another_machine_type_are_warned_of() {
    let mut facts = warm();
    assert!(!warned(&revert(&facts, |_| ()).unwrap(), "QEMU_CHANGED"));
    facts.host.qemu = 11_000_000;
    facts.vm.definition.machine = "pc-q35-11.0".into();
    let plan = revert(&facts, |_| ()).unwrap();
    let warning = plan
        .warnings
        .iter()
        .find(|it| it.code == "QEMU_CHANGED")
        .unwrap();
    assert!(warning.message.contains("10.0.2") && warning.message.contains("11.0.0"));
    assert!(warned(&plan, "MACHINE_DIFFERS"));
    assert_eq!(
        changed(&plan, "definition.machine"),
        Some((Some("pc-q35-11.0".into()), Some("pc-q35-10.0".into())))
    );
    // Disks alone can be read by any version.
    facts.snapshots[0].memory = Memory::None;
    assert!(!warned(&revert(&facts, |_| ()).unwrap(), "QEMU_CHANGED"));
}

#[test]
fn the_diff_shows_what_of_the_stored_definition_is_taken_back() {
    let mut facts = with_chain(running(), 1);
    assert!(
        !revert(&facts, |_| ())
            .unwrap()
            .diff
            .iter()
            .any(|change| change.field.starts_with("definition."))
    );
    let disk = |target: &str, device: &str, path: Option<&str>| DefinedDisk {
        target: target.into(),
        device: device.into(),
        source: if path.is_some() {
            Source::File
        } else {
            Source::Empty
        },
        path: path.map(super::path),
        readonly: device == "cdrom",
        encrypted: false,
    };
    facts = with_names(facts, &["back.qcow2", "old.iso", "new.iso", "s0.qcow2"]);
    let then = &mut facts.snapshots[0].definition.disks;
    then.push(disk("vdb", "disk", Some("back.qcow2")));
    then.push(disk("sda", "cdrom", Some("old.iso")));
    then.push(disk("sdb", "cdrom", None));
    let mut back = facts.snapshots[0].disks[0].clone();
    back.target = "vdb".into();
    back.data = Some(path("back.qcow2"));
    facts.snapshots[0].disks.push(back);
    facts.snapshots[0].media = vec![("sda".into(), path("old.iso"))];
    let now = &mut facts.vm.definition;
    now.memory = 256 << 20;
    now.vcpus = 4;
    now.vcpus_at_start = 2;
    now.disks.push(disk("sda", "cdrom", Some("new.iso")));
    now.disks.push(disk("sdb", "cdrom", None));
    now.disks.push(disk("vdc", "disk", Some("new.qcow2")));
    let plan = revert(&facts, |_| ()).unwrap();
    let said: Vec<&str> = plan
        .diff
        .iter()
        .map(|change| change.field.as_str())
        .filter(|field| field.starts_with("definition."))
        .collect();
    assert_eq!(
        said,
        [
            "definition.memory",
            "definition.vcpus",
            "definition.vcpus_at_start",
            "definition.disk.sda",
            "definition.disk.vdb",
            "definition.disk.vdc",
        ]
    );
    assert_eq!(
        changed(&plan, "definition.vcpus_at_start"),
        Some((Some("2".into()), Some("1".into())))
    );
    assert_eq!(
        changed(&plan, "definition.disk.vdc"),
        Some((Some(path("new.qcow2")), None))
    );
    assert!(warned(&plan, "DISK_TAKEN_BACK") && warned(&plan, "DISK_PUT_BACK"));
}

/// A VM that is off and defined with the image in which the data of `s0` lies.
fn redefined() -> Facts {
    let mut facts = with_chain(quiet(), 2);
    facts.vm.disks[0].path = path("web1.qcow2");
    facts.vm.disks[0].chain = vec![image(&path("web1.qcow2"))];
    facts
}

#[test]
fn nothing_starts_or_changes_a_vm_whose_definition_names_a_frozen_image() {
    let actions = [
        Action::Create(create("new")),
        Action::Revert(Revert::to("s0")),
        Action::Commit(Commit {
            all: true,
            ..Commit::default()
        }),
        Action::Commit(Commit {
            resize_to: Some(128 << 20),
            ..Commit::default()
        }),
        Action::Cleanup(Cleanup {
            name: "s1".into(),
            ..Cleanup::default()
        }),
    ];
    for action in actions {
        let fault = plan(&request(action), &redefined()).unwrap_err();
        assert_eq!(fault.reason, Reason::DefinitionDiffers, "{}", fault.message);
        assert_eq!(fault.metadata["defined"], path("web1.qcow2"));
        assert_eq!(fault.metadata["newest"], path("web1.s1"));
        assert!(
            fault.message.contains(&path("web1.s1")),
            "{}",
            fault.message
        );
    }
    let reads = [
        Action::List(List::default()),
        Action::Cleanup(Cleanup {
            orphans: Orphans::Report,
            ..Cleanup::default()
        }),
    ];
    for action in reads {
        let mut request = request(action);
        assert!(plan(&request, &redefined()).is_ok());
        request.start_if_stopped = true;
        let fault = plan(&request, &redefined()).unwrap_err();
        assert_eq!(fault.reason, Reason::DefinitionDiffers);
    }
    // While it runs, its own image is what it has.
    let mut runs = with_chain(running(), 1);
    runs.vm.differing = vec![("vda".into(), path("web1.qcow2"), path("web1.s0"))];
    let fault = revert(&runs, |_| ()).unwrap_err();
    assert_eq!(fault.reason, Reason::DefinitionDiffers);
    assert_eq!(fault.metadata["in_use"], path("web1.s0"));
}

#[test]
fn files_are_checked_before_a_managed_save_is_dropped_or_a_safety_snapshot_made() {
    let mut facts = with_chain(quiet(), 1);
    facts.snapshots[0].memory = Memory::External(path("m.mem"));
    facts.vm.managed_save = true;
    let fault = revert(&facts, |it| it.safety_snapshot = true).unwrap_err();
    assert_eq!(fault.reason, Reason::ManagedSavePresent);
    let plan = revert(&facts, |it| {
        it.safety_snapshot = true;
        it.force = true;
    })
    .unwrap();
    assert_eq!(
        names(&plan)[..5],
        [
            "check-snapshot",
            "drop-managed-save",
            "create-snapshot",
            "record-snapshot",
            "keep-definition",
        ]
    );
    assert!(warned(&plan, "MANAGED_SAVE_DROPPED"));
}

#[test]
fn files_that_a_start_needs_are_looked_for_before_the_guest_is_killed() {
    let mut facts = with_chain(running(), 1);
    facts.snapshots[0].definition.boot = vec![("kernel".into(), path("vmlinuz"))];
    let fault = revert(&facts, |_| ()).unwrap_err();
    assert_eq!(fault.reason, Reason::SnapshotNotWhole);
    assert_eq!(fault.metadata["path"], path("vmlinuz"));
    // Nothing needs it for a VM that stays off.
    assert!(revert(&facts, |it| it.state_after = StateAfter::Stopped).is_ok());
    assert!(revert(&with_names(facts, &["vmlinuz"]), |_| ()).is_ok());

    let mut facts = running();
    facts.snapshots = vec![snapshot("s0", None, Kind::Internal, &path("web1.qcow2"))];
    facts.snapshots[0].media = vec![("sda".into(), path("gone.iso"))];
    let fault = revert(&facts, |_| ()).unwrap_err();
    assert_eq!(fault.reason, Reason::MediaNotCovered);
}

#[test]
fn an_overlay_must_be_possible_on_every_disk_before_the_guest_is_killed() {
    let refused = |change: &dyn Fn(&mut Facts)| {
        let mut facts = with_names(with_chain(running(), 1), &["cd.iso"]);
        change(&mut facts);
        revert(&facts, |_| ()).unwrap_err().reason
    };
    let folder = |facts: &mut Facts,
                  change: &dyn Fn(&mut vmsnap_agent::planning::facts::Folder)| {
        facts.folders.values_mut().for_each(change);
    };
    assert_eq!(
        refused(&|facts| folder(facts, &|it| it.denied = true)),
        Reason::StorageNotWritable
    );
    assert_eq!(
        refused(&|facts| folder(facts, &|it| it.writable = false)),
        Reason::StorageNotWritable
    );
    assert_eq!(
        refused(&|facts| folder(facts, &|it| it.free = 1)),
        Reason::NoSpace
    );
    assert_eq!(
        refused(&|facts| facts.snapshots[0].definition.disks[0].source = Source::Block),
        Reason::SnapshotNotRevertible
    );
    assert_eq!(
        refused(&|facts| facts.snapshots[0].disks[0].kind = None),
        Reason::SnapshotNotRevertible
    );
}

#[test]
fn libvirts_record_of_the_present_overlay_is_mended_or_the_revert_refused() {
    // `s0` was reverted to, `b` made there and deleted again: libvirt takes the
    // overlay of `s0`, in which the data of `a` lies, for the present one.
    let mut facts = with_chain(running(), 1);
    facts
        .snapshots
        .push(snapshot("a", Some("s0"), Kind::External, &path("web1.s0")));
    facts.vm.disks[0].path = path("web1.1795700000");
    facts.vm.disks[0].chain = vec![image(&path("web1.1795700000")), image(&path("web1.qcow2"))];
    let fine = revert(&facts, |it| it.safety_snapshot = true).unwrap();
    assert!(
        !names(&fine).contains(&"mend-record"),
        "a child of its own is named"
    );
    assert_eq!(
        names(&revert(&facts, |_| ()).unwrap()),
        ["mend-record", "keep-definition", "revert", "start"]
    );
    // Known to libvirt.
    let mut known = facts.clone();
    known.snapshots[0].revert_overlays = vec![("vda".into(), path("web1.1795700000"))];
    assert!(!names(&revert(&known, |_| ()).unwrap()).contains(&"mend-record"));
    // Nobody knows what the present state stands on, but its images do.
    let mut lost = facts.clone();
    lost.snapshots[0].current = false;
    assert!(names(&revert(&lost, |_| ()).unwrap()).contains(&"mend-record"));
    lost.vm.disks[0].chain.remove(1);
    let fault = revert(&lost, |_| ()).unwrap_err();
    assert_eq!(fault.reason, Reason::CurrentUnknown);
    assert!(revert(&lost, |it| it.safety_snapshot = true).is_ok());
    // Something stands between.
    facts.vm.disks[0].chain.insert(1, image(&path("between")));
    let fault = revert(&facts, |_| ()).unwrap_err();
    assert_eq!(fault.reason, Reason::SnapshotBranches);
    assert_eq!(fault.metadata["branches"], "a");
}

#[test]
fn a_guest_that_cannot_ever_answer_is_not_waited_for() {
    let wait = |it: &mut Revert| it.wait_for = WaitFor::Ssh;
    let facts = with_chain(running(), 1);
    assert!(names(&revert(&facts, wait).unwrap()).contains(&"wait-for"));
    let paused = revert(&facts, |it| {
        wait(it);
        it.state_after = StateAfter::Paused;
    })
    .unwrap();
    assert!(warned(&paused, "NOT_WAITED") && !names(&paused).contains(&"wait-for"));
    let off = Create {
        wait_for: WaitFor::Agent,
        ..create("new")
    };
    let plan = plan(&request(Action::Create(off)), &quiet()).unwrap();
    assert!(warned(&plan, "NOT_WAITED") && !names(&plan).contains(&"wait-for"));
}

#[test]
fn a_clock_that_nobody_can_set_is_warned_of_with_the_age() {
    let mut facts = warm();
    assert!(names(&revert(&facts, |_| ()).unwrap()).contains(&"sync-clock"));
    let paused = revert(&facts, |it| it.state_after = StateAfter::Paused).unwrap();
    let warning = paused
        .warnings
        .iter()
        .find(|it| it.code == "CLOCK_BEHIND")
        .unwrap();
    assert!(warning.message.contains("28 d"), "{}", warning.message);
    // Whether the snapshot's definition has the channel counts, not the present one.
    facts.snapshots[0].definition.agent = false;
    assert!(!names(&revert(&facts, |_| ()).unwrap()).contains(&"sync-clock"));
    facts.vm.agent = Agent::default();
    assert!(warned(&revert(&facts, |_| ()).unwrap(), "CLOCK_NOT_SET"));
    let quiet = revert(&facts, |it| it.sync_clock = false).unwrap();
    assert!(!warned(&quiet, "CLOCK_BEHIND"));
}

#[test]
fn a_vm_that_is_half_loaded_or_has_no_definition_is_left_alone() {
    let mut facts = with_chain(running(), 1);
    facts.vm.state = VmState::Paused;
    facts.vm.reason = "migrating".into();
    assert_eq!(
        revert(&facts, |_| ()).unwrap_err().reason,
        Reason::DomainState
    );
    let mut facts = with_chain(running(), 1);
    facts.vm.persistent = false;
    assert_eq!(
        revert(&facts, |_| ()).unwrap_err().reason,
        Reason::DomainState
    );
    let mut facts = warm();
    facts.vm.persistent = false;
    assert!(revert(&facts, |_| ()).is_ok());
}

#[test]
fn a_guest_that_ends_off_is_loaded_but_never_runs() {
    use vmsnap_agent::planning::Step;
    for (after, flags) in [
        (StateAfter::Running, (false, false)),
        (StateAfter::Paused, (false, true)),
        (StateAfter::Stopped, (false, true)),
    ] {
        let plan = revert(&warm(), |it| it.state_after = after).unwrap();
        let found = plan.steps.iter().find_map(|step| match step {
            Step::Revert {
                running, paused, ..
            } => Some((*running, *paused)),
            _ => None,
        });
        assert_eq!(found, Some(flags), "{after:?}");
    }
}

#[test]
fn disks_alone_are_gone_back_to_where_memory_is_lost() {
    let mut facts = warm();
    facts.host.qemu = 11_000_000;
    facts.snapshots[0].health = Health::MemoryMissing("'m.mem' is missing".into());
    let fault = revert(&facts, |_| ()).unwrap_err();
    assert_eq!(fault.reason, Reason::SnapshotNotWhole);
    assert!(fault.message.contains("disks_only"), "{fault}");
    let alone = |facts: &Facts, after| {
        revert(facts, |it| {
            it.disks_only = true;
            it.state_after = after;
        })
    };
    // Neither is memory looked at, nor the clock set, nor its QEMU warned of.
    let plan = alone(&facts, StateAfter::Auto).unwrap();
    assert_eq!(names(&plan), ["keep-definition", "revert-disks", "start"]);
    assert!(warned(&plan, "GUEST_RESTARTS") && !warned(&plan, "QEMU_CHANGED"));
    for (after, last) in [
        (StateAfter::Paused, "start"),
        (StateAfter::Stopped, "revert-disks"),
    ] {
        assert_eq!(names(&alone(&facts, after).unwrap()).last(), Some(&last));
    }
    // Nothing else that is missing is let pass by it.
    facts.snapshots[0].health = Health::DataMissing("gone".into());
    assert!(alone(&facts, StateAfter::Auto).is_err());
    // Variables come from the copy, as without memory.
    facts.snapshots[0].health = Health::Whole;
    let mut facts = with_names(facts, &["web1.s0.nvram", "web1.fd"]);
    facts.vm.firmware.nvram = Some(path("web1.fd"));
    facts.vm.firmware.nvram_format = "raw".into();
    facts.snapshots[0].record.as_mut().unwrap().nvram_copy = Some(path("web1.s0.nvram"));
    let plan = alone(&facts, StateAfter::Auto).unwrap();
    let steps = [
        "check-snapshot",
        "keep-definition",
        "revert-disks",
        "restore-nvram",
        "start",
    ];
    assert_eq!(names(&plan), steps);
    // Without memory it is a revert like any other.
    facts.snapshots[0].memory = Memory::None;
    let plan = alone(&facts, StateAfter::Auto).unwrap();
    assert!(names(&plan).contains(&"revert"));
    let mut facts = quiet();
    let mut inside = snapshot("s0", None, Kind::Internal, &path("web1.qcow2"));
    inside.memory = Memory::Internal;
    facts.snapshots = vec![inside];
    let fault = alone(&facts, StateAfter::Auto).unwrap_err();
    assert_eq!(fault.reason, Reason::SnapshotNotRevertible);
}
