//! What holds for every plan, whatever was asked and whatever is found.

mod creating;
mod fuzz;
mod issues;
mod merging;
mod retention;
mod reverting;
mod storage;

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use proptest::{collection::vec, prelude::*, sample::select};
use vmsnap_agent::planning::{
    Facts, Plan, Reason, Request, Step,
    facts::{
        Agent, Consistency, DefinedDisk, Definition, Disk, FileUser, Firmware, Folder, Health,
        Host, Image, Kind, Memory, Memtune, Snapshot, SnapshotDisk, SnapshotRecord, Source,
        Storage, Vm, VmState, Volume,
    },
    guard::{Guard, GuardState},
    plan,
    request::{
        Action, Children, Cleanup, Commit, Create, IfExists, List, Orphans, Revert, StateAfter,
        WaitFor,
    },
};
use vmsnap_engine::{Hold, Step as _};

const FOLDER: &str = "/images";

fn path(name: &str) -> String {
    format!("{FOLDER}/{name}")
}

fn image(path: &str) -> Image {
    Image {
        path: path.into(),
        format: "qcow2".into(),
        virtual_size: 64 << 20,
        actual_size: 1 << 20,
        internal: Vec::new(),
        numbers: Vec::new(),
        compat: "1.1".into(),
    }
}

fn definition(disk: &str) -> Definition {
    Definition {
        memory: 128 << 20,
        vcpus: 1,
        vcpus_at_start: 1,
        machine: "pc-q35-10.0".into(),
        nvram: None,
        agent: false,
        disks: vec![DefinedDisk {
            target: "vda".into(),
            device: "disk".into(),
            source: Source::File,
            path: Some(disk.into()),
            readonly: false,
            encrypted: false,
        }],
        boot: Vec::new(),
    }
}

/// A VM with one disk, off, without snapshots.
fn quiet() -> Facts {
    Facts {
        now: "2026-03-01T12:00:00Z".parse().unwrap(),
        host: Host {
            libvirt: 11_003_000,
            qemu: 10_000_002,
            max_chain: 32,
            storage_exclusive: false,
            time_zone: String::new(),
        },
        vm: Vm {
            name: "web1".into(),
            uuid: "0b1c".into(),
            state: VmState::Stopped,
            reason: "shut down".into(),
            persistent: true,
            autostart: false,
            vcpu_count: 1,
            vcpus: Vec::new(),
            memory: 128 << 20,
            max_memory: 128 << 20,
            memtune: Memtune::default(),
            machine: "pc-q35-10.0".into(),
            arch: "x86_64".into(),
            firmware: Firmware::default(),
            managed_save: false,
            disks: vec![Disk {
                also: Vec::new(),
                target: "vda".into(),
                bus: "virtio".into(),
                device: "disk".into(),
                source: Source::File,
                path: path("web1.qcow2"),
                format: "qcow2".into(),
                readonly: false,
                shareable: false,
                encrypted: false,
                transient: false,
                virtual_size: 64 << 20,
                chain: vec![image(&path("web1.qcow2"))],
                chain_problem: None,
                merging_into: None,
            }],
            agent: Agent::default(),
            frozen: None,
            block_jobs: Vec::new(),
            not_migratable: Vec::new(),
            differing: Vec::new(),
            definition: definition(&path("web1.qcow2")),
        },
        snapshots: Vec::new(),
        storage: Storage::default(),
        folders: BTreeMap::from([(
            FOLDER.to_owned(),
            Folder {
                names: BTreeSet::from(["web1.qcow2".to_owned()]),
                free: 10 << 30,
                capacity: 20 << 30,
                device: 1,
                network: false,
                writable: true,
                denied: false,
                pool: Some("default".into()),
            },
        )]),
        users: Some(BTreeMap::new()),
        ours: BTreeSet::new(),
        guard: None,
        learned: Vec::new(),
    }
}

fn running() -> Facts {
    let mut facts = quiet();
    facts.vm.state = VmState::Running;
    facts.vm.agent = Agent {
        defined: true,
        connected: true,
        responding: true,
    };
    facts
}

fn snapshot(name: &str, parent: Option<&str>, kind: Kind, data: &str) -> Snapshot {
    Snapshot {
        name: name.into(),
        parent: parent.map(str::to_owned),
        description: String::new(),
        created: "2026-02-01T00:00:00Z".parse().unwrap(),
        state: VmState::Running,
        kind,
        memory: Memory::None,
        disks: vec![SnapshotDisk {
            target: "vda".into(),
            kind: Some(kind),
            overlay: (kind == Kind::External).then(|| path(&format!("web1.{name}"))),
            data: Some(data.to_owned()),
        }],
        revert_overlays: Vec::new(),
        chain_untold: false,
        current: false,
        health: Health::Whole,
        size: 1 << 20,
        record: Some(SnapshotRecord {
            workflow: "run".into(),
            consistency: Consistency::Filesystem,
            protected: false,
            safety: false,
            not_revertible: false,
            memory_size: None,
            memory_sha256: None,
            nvram_copy: None,
            libvirt: 11_003_000,
            qemu: 10_000_002,
            created: 0,
        }),
        definition: definition(data),
        media: Vec::new(),
        mistaken_for: None,
        guard: None,
    }
}

/// Adds a chain of external snapshots `s0`, `s1`, …; the last is current.
fn with_chain(mut facts: Facts, depth: usize) -> Facts {
    let mut data = path("web1.qcow2");
    for at in 0..depth {
        let name = format!("s{at}");
        let parent = at.checked_sub(1).map(|before| format!("s{before}"));
        let mut one = snapshot(&name, parent.as_deref(), Kind::External, &data);
        one.current = at + 1 == depth;
        data = path(&format!("web1.{name}"));
        facts.vm.disks[0].path.clone_from(&data);
        facts.vm.disks[0].chain.insert(0, image(&data));
        facts.snapshots.push(one);
    }
    facts
}

fn request(action: Action) -> Request {
    Request {
        vm: "web1".into(),
        action,
        start_if_stopped: false,
        pool: "default".into(),
    }
}

fn create(name: &str) -> Create {
    Create {
        name: name.into(),
        ..Create::default()
    }
}

fn names(plan: &Plan) -> Vec<&'static str> {
    plan.steps.iter().map(|step| step.name()).collect()
}

// --- what is asked and what is found, at random -------------------------------

fn actions() -> impl Strategy<Value = Action> {
    let name = || select(vec!["", "s0", "s1", "s2", "new", "S0", "a b"]).prop_map(str::to_owned);
    let creates = (
        name(),
        any::<bool>(),
        select(vec![None, Some(Kind::Internal), Some(Kind::External)]),
        select(vec![
            None,
            Some(Consistency::Filesystem),
            Some(Consistency::Suspend),
            Some(Consistency::Crash),
        ]),
        select(vec![IfExists::Ok, IfExists::Fail, IfExists::Replace]),
        any::<bool>(),
    )
        .prop_map(|(name, memory, kind, consistency, if_exists, waits)| {
            Action::Create(Create {
                name,
                memory,
                kind,
                consistency,
                if_exists,
                wait_for: if waits { WaitFor::Agent } else { WaitFor::None },
                ..Create::default()
            })
        });
    let reverts = (
        name(),
        select(vec![
            StateAfter::Auto,
            StateAfter::Running,
            StateAfter::Paused,
            StateAfter::Stopped,
        ]),
        any::<[bool; 3]>(),
    )
        .prop_map(|(name, state_after, flags)| {
            Action::Revert(Revert {
                state_after,
                safety_snapshot: flags[0],
                force: flags[1],
                disks_only: flags[2],
                ..Revert::to(name)
            })
        });
    let commits = (
        name(),
        any::<bool>(),
        select(vec![
            None,
            Some(32 << 20),
            Some(64 << 20),
            Some(128 << 20),
            Some(1000),
        ]),
        any::<bool>(),
    )
        .prop_map(|(name, all, resize_to, allow_shrink)| {
            Action::Commit(Commit {
                name,
                all,
                resize_to,
                allow_shrink,
                ..Commit::default()
            })
        });
    let cleanups = (
        name(),
        select(vec![Children::Keep, Children::Delete, Children::Only]),
        select(vec![Orphans::Ignore, Orphans::Report, Orphans::Delete]),
    )
        .prop_map(|(name, children, orphans)| {
            Action::Cleanup(Cleanup {
                name,
                children,
                orphans,
                ..Cleanup::default()
            })
        });
    let policies = retention::policies().prop_map(|policy| {
        Action::Cleanup(Cleanup {
            policy,
            ..Cleanup::default()
        })
    });
    prop_oneof![
        creates,
        reverts,
        commits,
        cleanups,
        policies,
        name().prop_map(|name| Action::List(List { name })),
    ]
}

prop_compose! {
    fn situations()(
        state in select(vec![VmState::Running, VmState::Paused, VmState::Stopped, VmState::Crashed]),
        kinds in vec(select(vec![Kind::External, Kind::External, Kind::Internal]), 0..4),
        parents in vec(0usize..4, 4),
        current in 0usize..4,
        agent in 0u8..4,
        managed_save in prop::bool::weighted(0.1),
        frozen in prop::option::weighted(0.3, any::<bool>()),
        shared in prop::bool::weighted(0.3),
        old_host in prop::bool::weighted(0.1),
        free in select(vec![0u64, 1 << 20, 1 << 40]),
        health in select(vec![Health::Whole, Health::Whole, Health::DataMissing("x".into()), Health::MergedAway("x".into())]),
    ) -> Facts {
        let mut facts = quiet();
        facts.vm.state = state;
        facts.vm.agent = Agent { defined: agent > 0, connected: agent > 1, responding: agent > 2 && state == VmState::Running };
        facts.vm.managed_save = managed_save && state == VmState::Stopped;
        facts.vm.frozen = frozen;
        if old_host { facts.host.libvirt = 8_000_000; }
        let uniform = kinds.first().copied();
        let mut data = path("web1.qcow2");
        for (at, kind) in kinds.iter().enumerate() {
            // Mixed trees only now and then.
            let kind = if current == 3 { *kind } else { uniform.unwrap_or(*kind) };
            let parent = (at > 0).then(|| format!("s{}", parents[at] % at));
            let mut one = snapshot(&format!("s{at}"), parent.as_deref(), kind, &data);
            one.current = at == current % kinds.len();
            if at == 1 { one.health = health.clone(); }
            if kind == Kind::External {
                data = path(&format!("web1.s{at}"));
                facts.vm.disks[0].chain.insert(0, image(&data));
            }
            facts.snapshots.push(one);
        }
        facts.vm.disks[0].path = data;
        if shared {
            let user = FileUser { vm: "clone".into(), snapshot: None };
            facts.users = Some(BTreeMap::from([(path("web1.qcow2"), vec![user])]));
        }
        facts.folders.get_mut(FOLDER).unwrap().free = free;
        facts.storage.volumes.push(Volume {
            name: "web1-old.qcow2".into(),
            path: path("web1-old.qcow2"),
            format: "qcow2".into(),
            capacity: 1,
            allocation: 1,
            backing: None,
            used_by: Vec::new(),
        });
        facts
    }
}

/// Files that a plan writes in place or deletes.
fn touched(plan: &Plan, facts: &Facts) -> Vec<String> {
    let mut touched = Vec::new();
    for step in &plan.steps {
        match step {
            Step::DeleteSnapshot {
                name,
                files,
                metadata_only,
                ..
            } => {
                touched.extend(files.iter().cloned());
                if !metadata_only {
                    let one = facts.snapshot(name).unwrap();
                    touched.extend(one.disks.iter().filter_map(|disk| disk.data.clone()));
                }
            }
            Step::Resize { disk, .. } => {
                let disk = facts
                    .vm
                    .disks
                    .iter()
                    .find(|one| one.target == *disk)
                    .unwrap();
                touched.push(disk.path.clone());
            }
            Step::DeleteVolume { path, .. } | Step::DeleteFile { path, .. } => {
                touched.push(path.clone());
            }
            _ => {}
        }
    }
    touched
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn every_hold_in_a_plan_has_its_release(action in actions(), facts in situations(), start in any::<bool>()) {
        let mut asked = request(action);
        asked.start_if_stopped = start;
        if let Ok(plan) = plan(&asked, &facts) {
            let mut open: Vec<Hold> = Vec::new();
            for step in &plan.steps {
                open.extend(step.takes());
                if let Some(released) = step.releases() {
                    let at = open.iter().rposition(|hold| *hold == released);
                    prop_assert!(at.is_some(), "{} releases what nobody took", step.name());
                    open.remove(at.unwrap());
                }
                // Nothing but the snapshot itself is done while a guest is held.
                if !open.is_empty() {
                    prop_assert!(matches!(step.name(), "freeze" | "suspend" | "create-snapshot" | "copy-nvram" | "resume"), "{} in a hold", step.name());
                }
            }
            prop_assert!(open.is_empty(), "open at the end: {:?}", names(&plan));
        }
    }

    #[test]
    fn no_plan_mixes_kinds_on_one_vm(action in actions(), facts in situations()) {
        if let Ok(plan) = plan(&request(action), &facts) {
            let mut kinds: BTreeSet<&str> = BTreeSet::new();
            let deleted: BTreeSet<&str> = plan.steps.iter().filter_map(|step| match step {
                Step::DeleteSnapshot { name, .. } => Some(name.as_str()),
                _ => None,
            }).collect();
            let makes = plan.steps.iter().any(|step| matches!(step, Step::CreateSnapshot(_)));
            if makes {
                for step in &plan.steps {
                    if let Step::CreateSnapshot(new) = step {
                        for (_, mode) in &new.disks {
                            use vmsnap_agent::planning::step::NewDisk;
                            match mode {
                                NewDisk::Internal => { kinds.insert("internal"); }
                                NewDisk::Overlay(_) => { kinds.insert("external"); }
                                NewDisk::Leave => {}
                            }
                        }
                    }
                }
                for left in facts.snapshots.iter().filter(|one| !deleted.contains(one.name.as_str())) {
                    kinds.insert(left.kind.name());
                }
                prop_assert!(kinds.len() == 1, "{kinds:?}");
            }
        }
    }

    #[test]
    fn no_plan_writes_or_deletes_a_file_that_another_vm_uses(action in actions(), facts in situations()) {
        if let Ok(plan) = plan(&request(action), &facts) {
            for file in touched(&plan, &facts) {
                prop_assert!(facts.other_users(&file).is_empty(), "{file} in {:?}", names(&plan));
            }
        }
    }

    #[test]
    fn a_read_only_action_has_no_changing_step(name in "[a-z0-9]{0,3}", facts in situations()) {
        if let Ok(plan) = plan(&request(Action::List(List { name })), &facts) {
            prop_assert!(plan.steps.is_empty() && !plan.changes());
        }
    }

    #[test]
    fn a_plan_for_a_state_already_reached_is_empty(facts in situations()) {
        for existing in &facts.snapshots {
            let asked = request(Action::Create(create(&existing.name)));
            if let Ok(plan) = plan(&asked, &facts) {
                prop_assert!(!plan.changes(), "{:?}", names(&plan));
                prop_assert!(!plan.warnings.is_empty());
            }
        }
        for gone in [
            Action::Commit(Commit { name: "gone".into(), ..Commit::default() }),
            Action::Cleanup(Cleanup { name: "gone".into(), leftovers: Some(Vec::new()), ..Cleanup::default() }),
        ] {
            if let Ok(plan) = plan(&request(gone), &facts) {
                prop_assert!(!plan.changes(), "{:?}", names(&plan));
            }
        }
    }

    #[test]
    fn the_same_request_on_the_same_facts_has_the_same_hash_at_any_time(action in actions(), facts in situations(), later in 1i64..1_000_000) {
        // What a policy's limit of age lets go depends on the time, as it should.
        prop_assume!(!matches!(&action, Action::Cleanup(cleanup)
            if cleanup.policy.older_than.is_some() || cleanup.policy.keep_within.is_some()));
        let asked = request(action);
        let mut second = facts.clone();
        second.now = Timestamp::from_second(facts.now.as_second() + later).unwrap();
        if let (Ok(first), Ok(second)) = (plan(&asked, &facts), plan(&asked, &second)) {
            prop_assert_eq!(first.hash, second.hash);
        }
    }

    #[test]
    fn new_files_never_exist_before(action in actions(), facts in situations(), taken in vec(select(vec!["web1.vda.new.qcow2", "web1.new.mem", "web1.vda.new-2.qcow2"]), 0..3)) {
        let mut facts = facts;
        let folder = facts.folders.get_mut(FOLDER).unwrap();
        folder.names.extend(taken.iter().map(|name| (*name).to_owned()));
        let names = folder.names.clone();
        if let Ok(plan) = plan(&request(action), &facts) {
            for step in &plan.steps {
                if let Step::CreateSnapshot(new) = step {
                    for (_, mode) in &new.disks {
                        if let vmsnap_agent::planning::step::NewDisk::Overlay(file) = mode {
                            prop_assert!(!names.contains(file.rsplit('/').next().unwrap()));
                        }
                    }
                    if let vmsnap_agent::planning::step::NewMemory::File(file) = &new.memory {
                        prop_assert!(!names.contains(file.rsplit('/').next().unwrap()));
                    }
                }
            }
        }
    }
}

// --- one decision each ----------------------------------------------------------

#[test]
fn a_running_guest_with_an_answering_agent_is_frozen_and_falls_back_to_suspending() {
    let plan = plan(&request(Action::Create(create("a"))), &running()).unwrap();
    assert_eq!(
        names(&plan),
        [
            "freeze",
            "suspend",
            "create-snapshot",
            "resume",
            "thaw",
            "record-snapshot"
        ]
    );
    assert_eq!(plan.consistency, Some(Consistency::Filesystem));
}

#[test]
fn a_running_guest_without_an_agent_is_suspended() {
    let mut facts = running();
    facts.vm.agent = Agent::default();
    let plan = plan(&request(Action::Create(create("a"))), &facts).unwrap();
    assert_eq!(
        names(&plan),
        ["suspend", "create-snapshot", "resume", "record-snapshot"]
    );
}

#[test]
fn a_paused_guest_needs_no_hold_and_is_never_resumed() {
    let mut facts = running();
    facts.vm.state = VmState::Paused;
    let plan = plan(&request(Action::Create(create("a"))), &facts).unwrap();
    assert_eq!(names(&plan), ["create-snapshot", "record-snapshot"]);
}

#[test]
fn a_demand_that_cannot_be_met_is_refused() {
    let mut facts = running();
    facts.vm.agent.responding = false;
    let mut wanted = create("a");
    wanted.consistency = Some(Consistency::Filesystem);
    let fault = plan(&request(Action::Create(wanted)), &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::ConsistencyNotMet);

    let mut wanted = create("a");
    wanted.memory = true;
    let fault = plan(&request(Action::Create(wanted.clone())), &quiet()).unwrap_err();
    assert_eq!(fault.reason, Reason::DomainNotRunning);

    let mut facts = running();
    facts.vm.not_migratable = vec!["shared memory device 'm'".into()];
    let fault = plan(&request(Action::Create(wanted)), &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::MemoryNotSavable);
}

#[test]
fn a_missing_name_is_refused_with_the_valid_names_and_the_nearest() {
    let facts = with_chain(running(), 2);
    let fault = plan(&request(Action::Revert(Revert::to("s9"))), &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::SnapshotNotFound);
    assert_eq!(fault.metadata["valid_names"], "s0,s1");
    assert_eq!(fault.metadata["nearest"], "s0");
}

#[test]
fn a_commit_goes_from_the_newest_restore_point_down_to_the_named_one() {
    let facts = with_chain(running(), 3);
    let commit = Commit {
        name: "s1".into(),
        ..Commit::default()
    };
    let plan = plan(&request(Action::Commit(commit)), &facts).unwrap();
    let gone: Vec<String> = plan.steps.iter().map(Step::title).collect();
    assert_eq!(gone, ["delete snapshot s2", "delete snapshot s1"]);
}

#[test]
fn a_commit_without_a_name_merges_nothing() {
    let facts = with_chain(running(), 2);
    let plan = plan(&request(Action::Commit(Commit::default())), &facts).unwrap();
    assert!(plan.steps.is_empty());
}

#[test]
fn other_branches_on_what_would_be_merged_are_listed_and_the_commit_is_refused() {
    let mut facts = with_chain(running(), 2);
    facts.snapshots.push(snapshot(
        "side",
        Some("s0"),
        Kind::External,
        &path("web1.s0"),
    ));
    let all = Commit {
        all: true,
        ..Commit::default()
    };
    let fault = plan(&request(Action::Commit(all)), &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::SnapshotBranches);
    assert_eq!(fault.metadata["branches"], "side");
}

#[test]
fn a_protected_point_that_was_not_named_is_not_dropped() {
    let mut facts = with_chain(running(), 2);
    facts.snapshots[1].record.as_mut().unwrap().protected = true;
    let all = Commit {
        name: "s0".into(),
        ..Commit::default()
    };
    let fault = plan(&request(Action::Commit(all)), &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::SnapshotProtected);
}

#[test]
fn a_running_disk_never_shrinks_and_a_stopped_one_only_when_allowed() {
    let shrink = |allow_shrink| {
        request(Action::Commit(Commit {
            resize_to: Some(32 << 20),
            allow_shrink,
            ..Commit::default()
        }))
    };
    assert_eq!(
        plan(&shrink(true), &running()).unwrap_err().reason,
        Reason::ShrinkRefused
    );
    assert_eq!(
        plan(&shrink(false), &quiet()).unwrap_err().reason,
        Reason::ShrinkRefused
    );
    assert_eq!(names(&plan(&shrink(true), &quiet()).unwrap()), ["resize"]);
}

#[test]
fn too_little_space_names_pool_need_and_free() {
    let mut facts = running();
    facts.folders.get_mut(FOLDER).unwrap().free = 1000;
    let fault = plan(&request(Action::Create(create("a"))), &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::NoSpace);
    assert_eq!(fault.metadata["pool"], "default");
    assert_eq!(fault.metadata["free_bytes"], "1000");
    assert!(fault.metadata["need_bytes"].parse::<u64>().unwrap() > 1000);
}

#[test]
fn folders_of_one_file_system_share_its_space() {
    let mut facts = running();
    let disk = |target: &str, image: &str| {
        let mut disk = facts.vm.disks[0].clone();
        disk.target = target.into();
        disk.path = image.into();
        disk.chain[0].path = image.into();
        disk
    };
    let second = disk("vdb", "/second/data.qcow2");
    facts.vm.disks.push(second);
    let mut beside = facts.folders[FOLDER].clone();
    beside.pool = None;
    // What one overlay takes, and not what two do.
    beside.free = vmsnap_agent::planning::files::OVERLAY_BYTES * 3 / 2;
    facts.folders.insert("/second".into(), beside.clone());
    facts.folders.get_mut(FOLDER).unwrap().free = beside.free;
    let asked = request(Action::Create(Create {
        memory: false,
        ..create("a")
    }));
    let fault = plan(&asked, &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::NoSpace);
    let need = vmsnap_agent::planning::files::OVERLAY_BYTES * 2;
    assert_eq!(fault.metadata["need_bytes"], need.to_string());
    facts.folders.get_mut("/second").unwrap().device = 2;
    plan(&asked, &facts).unwrap();
}

#[test]
fn a_left_over_volume_in_use_stays_with_the_reason() {
    let mut facts = quiet();
    let volume = Volume {
        name: "web1-old.qcow2".into(),
        path: path("web1-old.qcow2"),
        format: "qcow2".into(),
        capacity: 1,
        allocation: 1,
        backing: None,
        used_by: Vec::new(),
    };
    facts.storage.volumes.push(volume);
    let cleanup = request(Action::Cleanup(Cleanup::default()));
    assert_eq!(names(&plan(&cleanup, &facts).unwrap()), ["delete-volume"]);
    let user = FileUser {
        vm: "other".into(),
        snapshot: Some("x".into()),
    };
    facts.users = Some(BTreeMap::from([(path("web1-old.qcow2"), vec![user])]));
    let kept = plan(&cleanup, &facts).unwrap();
    assert!(kept.steps.is_empty());
    assert!(kept.verdicts[0].rule.contains("other"));
}

#[test]
fn a_revert_without_memory_starts_the_guest_as_a_step_of_its_own() {
    let facts = with_chain(running(), 1);
    let plan = plan(&request(Action::Revert(Revert::to("s0"))), &facts).unwrap();
    assert_eq!(names(&plan), ["keep-definition", "revert", "start"]);
}

#[test]
fn a_snapshot_whose_data_is_gone_is_never_reverted_to() {
    let mut facts = with_chain(running(), 1);
    facts.snapshots[0].health = Health::MergedAway("merged".into());
    let fault = plan(&request(Action::Revert(Revert::to("s0"))), &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::SnapshotNotWhole);
}

#[test]
fn an_offline_delete_under_another_branch_is_refused_because_libvirt_crashes() {
    let mut facts = with_chain(quiet(), 1);
    facts
        .snapshots
        .push(snapshot("a", Some("s0"), Kind::External, &path("web1.s0")));
    // The present state is on the overlay of a revert.
    facts.vm.disks[0].path = path("web1.1795700000");
    let cleanup = request(Action::Cleanup(Cleanup {
        name: "s0".into(),
        ..Cleanup::default()
    }));
    let fault = plan(&cleanup, &facts).unwrap_err();
    assert_eq!(fault.reason, Reason::SnapshotBranches);
}

/// An open guard on snapshot `s0`.
fn guarded(mut facts: Facts) -> Facts {
    let deadline = "2026-03-01T13:00:00Z".parse().unwrap();
    facts.guard = Some(Guard {
        run: "run".into(),
        vm_uuid: facts.vm.uuid.clone(),
        vm: facts.vm.name.clone(),
        snapshot: "s0".into(),
        created: 0,
        armed: facts.now,
        deadline,
        fingerprint: String::new(),
        state: GuardState::Pending,
        note: String::new(),
    });
    if let Some(one) = facts.snapshots.iter_mut().find(|one| one.name == "s0") {
        one.guard = Some(deadline);
    }
    facts
}

proptest! {
    #[test]
    fn while_a_guard_is_open_nothing_changes_the_vm_but_what_ends_it(action in actions(), facts in situations(), start in any::<bool>()) {
        let facts = guarded(facts);
        let mut asked = request(action);
        asked.start_if_stopped = start;
        if let Ok(plan) = plan(&asked, &facts) && plan.changes() {
            let ends = matches!(&asked.action, Action::Commit(commit) if commit.name == "s0")
                || matches!(&asked.action, Action::Revert(revert) if revert.name == "s0");
            prop_assert!(ends, "{:?}", plan.steps);
            let ended = plan.steps.iter().any(|step| matches!(step, Step::EndGuard { .. }));
            prop_assert!(ended, "the guard stays open after {:?}", plan.steps);
        }
    }
}

#[test]
fn confirming_ends_the_only_guard_and_a_wrong_name_ends_nothing() {
    let facts = guarded(with_chain(running(), 1));
    let confirm = |name: &str| plan(&request(Action::Confirm { name: name.into() }), &facts);
    assert_eq!(names(&confirm("").unwrap()), ["end-guard"]);
    assert_eq!(names(&confirm("s0").unwrap()), ["end-guard"]);
    let wrong = confirm("s1").unwrap();
    assert!(!wrong.changes());
    assert_eq!(wrong.warnings[0].code, "NO_GUARD_PENDING");
}
