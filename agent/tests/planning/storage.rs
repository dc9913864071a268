//! Space, shared files, and file systems that other hosts may use.

use std::collections::BTreeMap;

use vmsnap_agent::planning::{
    Facts, Reason,
    facts::{FileUser, Memory, Orphan, Source, Volume},
    plan,
    request::{Action, Cleanup, Commit, Orphans, Revert},
};

use super::{FOLDER, create, names, path, quiet, request, running, with_chain};

fn on_a_network(mut facts: Facts) -> Facts {
    facts.folders.get_mut(FOLDER).unwrap().network = true;
    facts.storage.volumes.push(Volume {
        name: "web1-old.qcow2".into(),
        path: path("web1-old.qcow2"),
        format: "qcow2".into(),
        capacity: 1,
        allocation: 1,
        backing: None,
        used_by: Vec::new(),
    });
    facts.storage.orphans = Some(vec![Orphan {
        path: path("web1.vda.gone.qcow2"),
        size: 1,
        ours: true,
    }]);
    facts
}

#[test]
fn what_other_hosts_may_use_is_written_and_deleted_only_if_the_storage_is_ours_alone() {
    let named = Action::Cleanup(Cleanup {
        name: "s0".into(),
        ..Cleanup::default()
    });
    let merge = Action::Commit(Commit {
        all: true,
        ..Commit::default()
    });
    let resize = Action::Commit(Commit {
        resize_to: Some(128 << 20),
        ..Commit::default()
    });
    let mut facts = on_a_network(with_chain(running(), 1));
    for action in [&named, &merge, &resize] {
        let fault = plan(&request(action.clone()), &facts).unwrap_err();
        assert_eq!(fault.reason, Reason::StorageShared, "{action:?}");
        assert!(fault.message.contains("storage.exclusive"), "{fault}");
    }
    let sweep = Action::Cleanup(Cleanup {
        orphans: Orphans::Delete,
        ..Cleanup::default()
    });
    let kept = plan(&request(sweep.clone()), &facts).unwrap();
    assert!(kept.steps.is_empty(), "{:?}", names(&kept));
    assert_eq!(kept.verdicts.len(), 2);
    for verdict in &kept.verdicts {
        assert!(
            !verdict.removed && verdict.rule.contains("network"),
            "{verdict:?}"
        );
    }
    // New files and going back are nobody else's.
    plan(&request(Action::Create(create("new"))), &facts).unwrap();
    plan(&request(Action::Revert(Revert::to("s0"))), &facts).unwrap();

    facts.host.storage_exclusive = true;
    for action in [named, merge, resize] {
        plan(&request(action), &facts).unwrap();
    }
    let gone = plan(&request(sweep), &facts).unwrap();
    assert_eq!(names(&gone), ["delete-volume", "delete-file"]);
}

#[test]
fn an_orphan_that_came_into_use_stays() {
    let mut facts = on_a_network(quiet());
    facts.folders.get_mut(FOLDER).unwrap().network = false;
    let user = FileUser {
        vm: "other".into(),
        snapshot: None,
    };
    facts.users = Some(BTreeMap::from([(path("web1.vda.gone.qcow2"), vec![user])]));
    let sweep = Action::Cleanup(Cleanup {
        leftovers: Some(Vec::new()),
        orphans: Orphans::Delete,
        ..Cleanup::default()
    });
    let kept = plan(&request(sweep), &facts).unwrap();
    assert!(kept.steps.is_empty());
    assert!(kept.verdicts[0].rule.contains("other"));
}

#[test]
fn a_medium_that_others_read_is_in_the_way_only_once_a_revert_put_an_overlay_on_it() {
    let user = FileUser {
        vm: "other".into(),
        snapshot: None,
    };
    let mut facts = with_chain(running(), 1);
    let mut drive = facts.vm.disks[0].clone();
    drive.target = "sda".into();
    drive.device = "cdrom".into();
    drive.readonly = true;
    drive.path = path("cd.iso");
    drive.chain.truncate(1);
    drive.chain[0].path = path("cd.iso");
    let mut medium = facts.snapshots[0].disks[0].clone();
    medium.target = "sda".into();
    medium.kind = None;
    medium.overlay = None;
    medium.data = Some(path("cd.iso"));
    facts.vm.disks.push(drive);
    facts.snapshots[0].disks.push(medium);
    facts.users = Some(BTreeMap::from([(path("cd.iso"), vec![user])]));
    let cleanup = request(Action::Cleanup(Cleanup {
        name: "s0".into(),
        ..Cleanup::default()
    }));
    plan(&cleanup, &facts).unwrap();
    let reverted = facts.snapshots[0].disks[0].kind;
    facts.snapshots[0].disks[1].kind = reverted;
    facts.snapshots[0].disks[1].overlay = Some(path("cd.17"));
    let mut overlay = facts.vm.disks[1].chain[0].clone();
    overlay.path = path("cd.17");
    facts.vm.disks[1].chain.insert(0, overlay);
    facts.vm.disks[1].path = path("cd.17");
    let fault = plan(&cleanup, &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::FileShared);
    // With the medium taken out, libvirt does not find what to merge.
    facts.users = Some(BTreeMap::new());
    facts.vm.disks[1].source = Source::Empty;
    facts.vm.disks[1].path.clear();
    facts.vm.disks[1].chain.clear();
    let fault = plan(&cleanup, &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::MediaNotCovered);
}

#[test]
fn a_merge_counts_every_disk_of_a_folder_and_what_internal_snapshots_keep() {
    let cleanup = request(Action::Cleanup(Cleanup {
        name: "s0".into(),
        ..Cleanup::default()
    }));
    let mut facts = with_chain(running(), 1);
    facts.vm.disks[0].chain[0].actual_size = 6 << 20;
    facts.folders.get_mut(FOLDER).unwrap().free = 8 << 20;
    plan(&cleanup, &facts).unwrap();
    let mut second = facts.vm.disks[0].clone();
    second.target = "vdb".into();
    let mut covered = facts.snapshots[0].disks[0].clone();
    covered.target = "vdb".into();
    let mut both = facts.clone();
    both.vm.disks.push(second);
    both.snapshots[0].disks.push(covered);
    let fault = plan(&cleanup, &both).unwrap_err();
    assert_eq!(fault.reason, Reason::NoSpace);
    assert_eq!(fault.metadata["need_bytes"], (12 << 20).to_string());
    // An image that is full takes no more room, unless snapshots in it keep all
    // that it holds.
    facts.vm.disks[0].chain[1].actual_size = 64 << 20;
    facts.folders.get_mut(FOLDER).unwrap().free = 1 << 20;
    plan(&cleanup, &facts).unwrap();
    facts.vm.disks[0].chain[1].internal = vec!["kept".into()];
    let fault = plan(&cleanup, &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::NoSpace);
}

#[test]
fn a_revert_needs_room_for_its_overlays_before_the_guest_is_switched_off() {
    let mut facts = with_chain(running(), 1);
    facts.folders.get_mut(FOLDER).unwrap().free = 1000;
    let revert = request(Action::Revert(Revert::to("s0")));
    let fault = plan(&revert, &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::NoSpace);
    facts.folders.get_mut(FOLDER).unwrap().free = 1 << 20;
    facts.snapshots[0].memory = Memory::External(path("m.mem"));
    plan(&revert, &facts).unwrap();
}

#[test]
fn a_block_device_has_the_size_that_it_has_unless_it_holds_an_image() {
    let resize = request(Action::Commit(Commit {
        resize_to: Some(128 << 20),
        ..Commit::default()
    }));
    let mut facts = running();
    facts.vm.disks[0].source = Source::Block;
    plan(&resize, &facts).unwrap();
    facts.vm.disks[0].format = "raw".into();
    let fault = plan(&resize, &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::DiskUnsupported);
    assert!(fault.message.contains("lvextend"), "{fault}");
}
