//! Making snapshots: what is asked meets what is found.

use vmsnap_agent::planning::{
    Facts, Plan, Reason,
    facts::{Health, Kind, Memory, Source},
    health, plan,
    request::{Action, Commit, Create, IfExists, Revert},
};

use super::{create, image, names, path, quiet, request, running, snapshot, with_chain};

fn asked(create: Create) -> Action {
    Action::Create(create)
}

fn decided(plan: &Plan, subject: &str) -> String {
    let found = plan.decisions.iter().find(|one| one.subject == subject);
    found.expect(subject).choice.clone()
}

#[test]
fn a_disk_is_left_out_only_where_the_loss_of_revert_is_accepted() {
    let without = Create {
        exclude_disks: vec!["vda".into()],
        ..create("a")
    };
    let fault = request(asked(without)).check().unwrap_err();
    assert_eq!(fault.reason, Reason::BadRequest);
    assert_eq!(fault.violations[0].field, "create.exclude_disks");
}

#[test]
fn a_name_of_digits_is_refused_inside_an_image_only() {
    let inside = Create {
        kind: Some(Kind::Internal),
        ..create("20260101")
    };
    let fault = plan(&request(asked(inside)), &quiet()).unwrap_err();
    assert_eq!(fault.reason, Reason::BadRequest);
    assert_eq!(fault.violations[0].field, "snapshot_name");
    plan(&request(asked(create("20260101"))), &quiet()).unwrap();
    // Nobody chose it: the VM has internal ones already.
    let mut facts = quiet();
    let one = snapshot("s0", None, Kind::Internal, &path("web1.qcow2"));
    facts.snapshots.push(one);
    let fault = plan(&request(asked(create("1"))), &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::BadRequest);
}

#[test]
fn every_disk_and_drive_has_its_line_among_the_decisions() {
    let mut facts = running();
    let model = facts.vm.disks[0].clone();
    for (target, device, source, readonly) in [
        ("vdb", "disk", Source::File, true),
        ("sda", "cdrom", Source::File, true),
        ("sdb", "cdrom", Source::Empty, true),
    ] {
        let mut disk = model.clone();
        disk.target = target.into();
        disk.path = path(&format!("{target}.img"));
        disk.device = device.into();
        disk.source = source;
        disk.readonly = readonly;
        facts.vm.disks.push(disk);
    }
    for target in ["vdb", "sda"] {
        let folder = facts.folders.values_mut().next().unwrap();
        folder.names.insert(format!("{target}.img"));
    }
    let plan = plan(&request(asked(create("a"))), &facts).unwrap();
    assert!(decided(&plan, "disk vda").contains("web1.vda.a.qcow2"));
    for subject in ["disk vdb", "drive sda", "drive sdb"] {
        assert_eq!(decided(&plan, subject), "left out");
    }
}

fn uefi(mut facts: Facts, format: &str) -> Facts {
    facts.vm.firmware.uefi = true;
    facts.vm.firmware.nvram = Some(path("web1.fd"));
    facts.vm.firmware.nvram_format = format.into();
    let folder = facts.folders.values_mut().next().unwrap();
    folder.names.insert("web1.fd".into());
    facts
}

#[test]
fn uefi_variables_are_copied_where_libvirt_does_not_keep_them() {
    for (kind, format, copied) in [
        (Kind::External, "raw", true),
        (Kind::External, "qcow2", true),
        (Kind::Internal, "raw", true),
        (Kind::Internal, "qcow2", false),
    ] {
        let wanted = Create {
            kind: Some(kind),
            ..create("a")
        };
        let plan = plan(&request(asked(wanted)), &uefi(quiet(), format)).unwrap();
        let steps = names(&plan);
        assert_eq!(steps.contains(&"copy-nvram"), copied, "{kind:?}, {format}");
    }
    // The first start makes them: there is nothing yet.
    let mut facts = uefi(quiet(), "raw");
    facts
        .folders
        .values_mut()
        .next()
        .unwrap()
        .names
        .remove("web1.fd");
    let plan = plan(&request(asked(create("a"))), &facts).unwrap();
    assert_eq!(names(&plan), ["create-snapshot", "record-snapshot"]);
    assert_eq!(decided(&plan, "uefi variables"), "nothing to copy");
}

#[test]
fn a_revert_says_that_it_leaves_uefi_variables_which_nobody_kept() {
    let warns = |facts: &Facts| {
        let plan = plan(&request(Action::Revert(Revert::to("s0"))), facts).unwrap();
        plan.warnings.iter().any(|it| it.code == "NVRAM_STAYS")
    };
    let mut facts = with_chain(uefi(running(), "qcow2"), 1);
    facts.snapshots[0].record = None;
    assert!(warns(&facts));
    facts.snapshots[0].memory = Memory::External(path("m.mem"));
    assert!(!warns(&facts), "QEMU writes them back");
    facts.snapshots[0] = snapshot("s0", None, Kind::Internal, &path("web1.s0"));
    facts.snapshots[0].record = None;
    assert!(!warns(&facts), "they are in the image");
    facts.vm.firmware.nvram_format = "raw".into();
    assert!(warns(&facts));
}

#[test]
fn a_vm_that_is_not_defined_is_warned_about() {
    let mut facts = running();
    facts.vm.persistent = false;
    let plan = plan(&request(asked(create("a"))), &facts).unwrap();
    assert!(plan.warnings.iter().any(|it| it.code == "TRANSIENT_VM"));
}

#[test]
fn what_is_replaced_decides_nothing_for_what_replaces_it() {
    for (found, wanted) in [
        (Kind::Internal, Kind::External),
        (Kind::External, Kind::Internal),
    ] {
        // An external one beside the present state, an internal one in its image.
        let data = path(match found {
            Kind::Internal => "web1.qcow2",
            _ => "before.qcow2",
        });
        let mut facts = running();
        facts.snapshots.push(snapshot("s0", None, found, &data));
        let again = |if_exists| Create {
            kind: Some(wanted),
            if_exists,
            ..create("s0")
        };
        let fault = plan(&request(asked(again(IfExists::Ok))), &facts).unwrap_err();
        assert_eq!(fault.reason, Reason::SnapshotConflict);
        plan(&request(asked(again(IfExists::Replace))), &facts).unwrap();
        // Another one that stays still decides.
        facts.snapshots.push(snapshot("s1", None, found, &data));
        let fault = plan(&request(asked(again(IfExists::Replace))), &facts).unwrap_err();
        assert_eq!(fault.reason, Reason::KindsMixed);
    }
}

#[test]
fn a_medium_that_was_put_back_after_a_revert_has_lost_nothing() {
    let mut drive = quiet().vm.disks[0].clone();
    drive.target = "sda".into();
    drive.device = "cdrom".into();
    drive.readonly = true;
    drive.path = path("cd.iso");
    drive.chain = vec![image(&path("cd.iso"))];
    let mut one = snapshot("s0", None, Kind::External, &path("cd.iso"));
    one.disks[0].target = "sda".into();
    one.disks[0].overlay = Some(path("cd.17"));
    let all = [one.clone()];
    let files = health::Files::default();
    assert_eq!(
        health::of(&one, &all, &[drive.clone()], &files),
        Health::Whole
    );
    // A disk that the guest writes would have.
    drive.device = "disk".into();
    drive.readonly = false;
    let health = health::of(&one, &all, &[drive], &files);
    assert!(matches!(health, Health::MergedAway(_)), "{health:?}");
}

#[test]
fn a_resize_counts_only_snapshots_that_are_left() {
    let mut facts = quiet();
    facts.vm.disks[0].chain[0].internal = vec!["s0".into()];
    facts.vm.disks[0].chain[0].compat = "0.10".into();
    let mut one = snapshot("s0", None, Kind::Internal, &path("web1.qcow2"));
    one.current = true;
    facts.snapshots.push(one);
    let commit = |all| {
        request(Action::Commit(Commit {
            all,
            resize_to: Some(128 << 20),
            ..Commit::default()
        }))
    };
    let fault = plan(&commit(false), &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::DiskUnsupported);
    let dropped = plan(&commit(true), &facts).unwrap();
    assert_eq!(names(&dropped), ["delete-snapshot", "resize"]);
    assert!(dropped.warnings.is_empty(), "{:?}", dropped.warnings);
}

#[test]
fn an_encrypted_disk_takes_no_snapshot_of_either_kind_and_is_never_reverted() {
    let mut facts = running();
    facts.vm.disks[0].encrypted = true;
    for kind in [None, Some(Kind::External), Some(Kind::Internal)] {
        let create = Create {
            kind,
            ..create("a")
        };
        let fault = plan(&request(asked(create)), &facts).unwrap_err();
        assert_eq!(fault.reason, Reason::DiskUnsupported);
        assert!(fault.message.contains("encrypted"), "{fault}");
        assert_eq!(fault.metadata["disk"], "vda");
    }
    let revert = request(Action::Revert(Revert::to("s0")));
    let mut facts = with_chain(running(), 1);
    plan(&revert, &facts).unwrap();
    facts.snapshots[0].definition.disks[0].encrypted = true;
    let fault = plan(&revert, &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::SnapshotNotRevertible);
    assert!(fault.message.contains("encrypted"), "{fault}");
}

#[test]
fn a_chain_at_its_limit_takes_no_further_image_and_one_in_place_of_another() {
    let mut facts = with_chain(running(), 3);
    facts.host.max_chain = 4;
    let asked = |name: &str, if_exists| {
        request(Action::Create(Create {
            if_exists,
            ..create(name)
        }))
    };
    let fault = plan(&asked("s3", IfExists::Fail), &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::ChainTooDeep);
    assert_eq!(fault.metadata["depth"], "4");
    let replacing = plan(&asked("s2", IfExists::Replace), &facts).unwrap();
    assert_eq!(names(&replacing)[0], "delete-snapshot");
    // One image goes for the one that comes, and no more.
    facts.host.max_chain = 3;
    let fault = plan(&asked("s2", IfExists::Replace), &facts).unwrap_err();
    assert_eq!(fault.metadata["depth"], "3");
}
