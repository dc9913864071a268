//! What the catalogue's conditions look at: host, VM, plan, disks, drives,
//! places and snapshots, each with its properties by name.
//!
//! Invariants: pure; a property is always there, whatever was found, so that a
//! mistyped name in the catalogue is seen by any test that reads it; what
//! depends on a plan is open without one.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    condition::{Subject, Value},
    learned,
};
use crate::planning::{
    actions::create::INTERNAL_STOP_MS_PER_GIB,
    facts::{Disk, Facts, Firmware, Health, Kind, Memory, Snapshot, Source, folder_of},
    files, names,
    request::{Action, Request, WaitFor},
    step::{NewDisk, NewMemory, Step},
    tree,
};

const GIB: u64 = 1024 * 1024 * 1024;

/// Properties by name.
pub type Properties = BTreeMap<&'static str, Value>;

/// A plan in the making, as far as the catalogue cares.
#[derive(Debug, Clone, Copy)]
pub struct Planned<'a> {
    /// What is asked.
    pub request: &'a Request,
    /// The steps.
    pub steps: &'a [Step],
}

/// All that conditions may look at.
#[derive(Debug)]
pub struct Scene {
    /// Whether there is a plan.
    pub planned: bool,
    subjects: BTreeMap<Subject, Vec<Properties>>,
}

impl Scene {
    /// What is found, with what is planned on it.
    #[must_use]
    pub fn of(facts: &Facts, planned: Option<Planned<'_>>) -> Self {
        let plan = planned.map(|planned| Deeds::of(&planned, facts));
        let plan = plan.as_ref();
        let disks = facts
            .writable_disks()
            .map(|disk| self::disk(disk, facts, plan));
        let drives = facts
            .vm
            .disks
            .iter()
            .filter(|disk| !matches!(&*disk.device, "disk" | "lun") && disk.source != Source::Empty)
            .map(|disk| {
                Properties::from([
                    ("target", text(&disk.target)),
                    ("medium", text(&disk.path)),
                    ("source", text(source(disk.source))),
                ])
            });
        let snapshots = facts
            .snapshots
            .iter()
            .map(|snapshot| self::snapshot(snapshot, facts, plan));
        Self {
            planned: planned.is_some(),
            subjects: BTreeMap::from([
                (Subject::Host, vec![host(facts)]),
                (Subject::Vm, vec![vm(facts)]),
                (
                    Subject::Plan,
                    vec![planned.map_or_else(open_plan, |planned| self::plan(&planned, plan))],
                ),
                (Subject::Disk, disks.collect()),
                (Subject::Drive, drives.collect()),
                (Subject::Place, places(facts, plan)),
                (Subject::Snapshot, snapshots.collect()),
            ]),
        }
    }

    /// All of a kind.
    #[must_use]
    pub fn subjects(&self, subject: Subject) -> &[Properties] {
        self.subjects.get(&subject).map_or(&[], Vec::as_slice)
    }
}

/// Folders into which a plan writes data.
#[must_use]
pub fn written<'a>(planned: Planned<'a>, facts: &'a Facts) -> BTreeSet<&'a str> {
    Deeds::of(&planned, facts).written
}

/// What a plan does to which things.
struct Deeds<'a> {
    words: Vec<&'static str>,
    covered: BTreeSet<&'a str>,
    resized: BTreeSet<&'a str>,
    deleted: BTreeSet<&'a str>,
    target: Option<&'a str>,
    written: BTreeSet<&'a str>,
}

impl<'a> Deeds<'a> {
    fn of(planned: &Planned<'a>, facts: &'a Facts) -> Self {
        let mut deeds = Self {
            words: Vec::new(),
            covered: BTreeSet::new(),
            resized: BTreeSet::new(),
            deleted: BTreeSet::new(),
            target: None,
            written: BTreeSet::new(),
        };
        if planned.request.action.reads_only() {
            deeds.words.push("list");
        }
        for step in planned.steps {
            deeds.add(step, facts);
        }
        deeds
    }

    fn add(&mut self, step: &'a Step, facts: &'a Facts) {
        match step {
            Step::Start { .. } => self.words.push("start"),
            Step::Stop => self.words.push("stop"),
            Step::CreateSnapshot(new) => {
                self.words.push("create");
                self.words.push(match &new.memory {
                    NewMemory::None => "create-disks",
                    NewMemory::Internal | NewMemory::File(_) => "create-memory",
                });
                if let NewMemory::File(file) = &new.memory {
                    self.written.insert(folder_of(file));
                }
                for (target, mode) in &new.disks {
                    match mode {
                        NewDisk::Leave => continue,
                        NewDisk::Internal => {
                            self.words.push("create-internal");
                            let disk = facts.vm.disks.iter().find(|disk| disk.target == *target);
                            self.written.extend(disk.map(|disk| folder_of(&disk.path)));
                        }
                        NewDisk::Overlay(path) => {
                            self.words.push("create-external");
                            self.written.insert(folder_of(path));
                        }
                    }
                    self.covered.insert(target);
                }
            }
            Step::CopyNvram { to, .. } => {
                self.written.insert(folder_of(to));
            }
            Step::Revert { name, .. } | Step::RevertDisks { name, .. } => {
                let target = facts.snapshot(name);
                let memory = target.map(|target| &target.memory);
                self.words.push("revert");
                self.words.push(match (step, memory) {
                    (Step::Revert { .. }, Some(Memory::Internal | Memory::External(_))) => {
                        "revert-memory"
                    }
                    _ => "revert-disks",
                });
                self.target = Some(name);
                self.written.extend(target.into_iter().flat_map(data));
            }
            Step::DeleteSnapshot { name, disks, .. } => {
                self.words.push("delete");
                self.deleted.insert(name);
                if !disks.is_empty() {
                    self.words.push("merge");
                    self.written
                        .extend(facts.snapshot(name).into_iter().flat_map(data));
                }
            }
            Step::Resize { disk, shrink, .. } => {
                self.words.push(if *shrink { "shrink" } else { "grow" });
                self.resized.insert(disk);
                if !shrink {
                    let disk = facts.vm.disks.iter().find(|one| one.target == *disk);
                    self.written.extend(disk.map(|disk| folder_of(&disk.path)));
                }
            }
            _ => {}
        }
    }
}

/// Folders in which a snapshot's data lies.
fn data(snapshot: &Snapshot) -> impl Iterator<Item = &str> {
    snapshot
        .disks
        .iter()
        .filter_map(|disk| disk.data.as_deref())
        .map(folder_of)
}

fn text(text: impl Into<String>) -> Value {
    Value::Text(text.into())
}

fn planned(plan: Option<&Deeds<'_>>, holds: impl FnOnce(&Deeds<'_>) -> bool) -> Value {
    plan.map_or(Value::Open, |plan| Value::Flag(holds(plan)))
}

fn host(facts: &Facts) -> Properties {
    Properties::from([
        ("libvirt", Value::Version(facts.host.libvirt)),
        ("qemu", Value::Version(facts.host.qemu)),
        (
            "storage_exclusive",
            Value::Flag(facts.host.storage_exclusive),
        ),
        ("max_chain", Value::Number(facts.host.max_chain.into())),
    ])
}

/// Disks whose definition names older data than the VM has.
fn redefined(facts: &Facts) -> String {
    let differing = facts.vm.differing.iter().map(|(target, defined, used)| {
        format!("{target} is defined as '{defined}' and runs on '{used}'")
    });
    let frozen = facts.frozen_images().map(|(disk, snapshot)| {
        format!(
            "{} is defined as '{}', where the data of snapshot {} lies",
            disk.target, disk.path, snapshot.name
        )
    });
    let next = facts.frozen_at_next_start().map(|(disk, snapshot)| {
        format!(
            "{} is defined as '{}', where the data of snapshot {} lies",
            disk.target,
            disk.path.as_deref().unwrap_or_default(),
            snapshot.name
        )
    });
    differing
        .chain(frozen)
        .chain(next)
        .collect::<Vec<_>>()
        .join(", ")
}

fn vm(facts: &Facts) -> Properties {
    let vm = &facts.vm;
    let agent = vm.agent;
    let (agent, detail) = match (agent.defined, agent.connected, agent.responding) {
        (false, ..) => ("absent", "is not there"),
        (true, false, _) => ("silent", "is not connected"),
        (true, true, false) => ("silent", "does not answer"),
        (true, true, true) => ("answers", "answers"),
    };
    let path = tree::active_path(facts);
    let side = facts
        .snapshots
        .iter()
        .any(|snapshot| !path.iter().any(|on| on.name == snapshot.name));
    let stop = vm.memory.saturating_mul(INTERNAL_STOP_MS_PER_GIB) / GIB / 1000;
    let redefined = redefined(facts);
    Properties::from([
        ("name", text(&vm.name)),
        ("machine", text(&vm.definition.machine)),
        ("state", text(vm.state.name())),
        ("reason", text(&vm.reason)),
        ("transient", Value::Flag(!vm.persistent)),
        ("managed_save", Value::Flag(vm.managed_save)),
        ("nvram", text(nvram(&vm.firmware))),
        ("vtpm", Value::Flag(vm.firmware.vtpm)),
        ("agent", text(agent)),
        ("agent_state", text(detail)),
        ("frozen", Value::Flag(vm.frozen == Some(true))),
        ("block_job", Value::Flag(!vm.block_jobs.is_empty())),
        ("redefined", Value::Flag(!redefined.is_empty())),
        ("redefined_disks", text(&redefined)),
        ("memory_savable", Value::Flag(vm.not_migratable.is_empty())),
        ("devices", text(vm.not_migratable.join(", "))),
        ("memory_gib", Value::Number(vm.memory / GIB)),
        ("stop_seconds", Value::Number(stop)),
        ("kinds", text(kinds(&facts.snapshots))),
        ("has_current", Value::Flag(facts.current().is_some())),
        ("side_branches", Value::Flag(side)),
    ])
}

fn kinds(snapshots: &[Snapshot]) -> &'static str {
    let has = |kind| snapshots.iter().any(|snapshot| snapshot.kind == kind);
    match (has(Kind::Internal), has(Kind::External), has(Kind::Mixed)) {
        (_, _, true) | (true, true, _) => Kind::Mixed.name(),
        (true, false, false) => Kind::Internal.name(),
        (false, true, false) => Kind::External.name(),
        (false, false, false) => "none",
    }
}

fn nvram(firmware: &Firmware) -> &str {
    match &firmware.nvram {
        Some(_) => &firmware.nvram_format,
        None => "none",
    }
}

fn plan(planned: &Planned<'_>, deeds: Option<&Deeds<'_>>) -> Properties {
    let (consistency, wait_for) = match &planned.request.action {
        Action::Create(create) => (create.consistency, create.wait_for),
        Action::Revert(revert) => (None, revert.wait_for),
        _ => (None, WaitFor::None),
    };
    let waits = planned
        .steps
        .iter()
        .any(|step| matches!(step, Step::WaitFor { .. }));
    let achieves = planned.steps.iter().find_map(|step| match step {
        Step::RecordSnapshot(record) => Some(record.consistency.name()),
        _ => None,
    });
    let sets_clock = planned.steps.contains(&Step::SyncClock);
    Properties::from([
        (
            "does",
            Value::Words(deeds.map(|deeds| deeds.words.clone()).unwrap_or_default()),
        ),
        (
            "consistency",
            text(consistency.map_or("auto", |asked| asked.name())),
        ),
        (
            "waits_for_guest",
            Value::Flag(waits && wait_for != WaitFor::None),
        ),
        ("sets_clock", Value::Flag(sets_clock)),
        ("achieves", text(achieves.unwrap_or("nothing"))),
    ])
}

fn open_plan() -> Properties {
    [
        "does",
        "consistency",
        "waits_for_guest",
        "sets_clock",
        "achieves",
    ]
    .map(|key| (key, Value::Open))
    .into()
}

fn source(source: Source) -> &'static str {
    match source {
        Source::File => "file",
        Source::Block => "block",
        Source::Network => "network",
        Source::Volume => "volume",
        Source::Empty => "empty",
        Source::Other => "other",
    }
}

fn disk(disk: &Disk, facts: &Facts, plan: Option<&Deeds<'_>>) -> Properties {
    let active = disk.chain.first();
    // A name that libvirt lists is no orphan, wherever its data lies.
    let orphans: Vec<&str> = active
        .iter()
        .flat_map(|image| &image.internal)
        .map(String::as_str)
        .filter(|name| facts.snapshot(name).is_none())
        .collect();
    let users: BTreeSet<&str> = disk
        .chain
        .iter()
        .flat_map(|image| facts.other_users(&image.path))
        .map(|user| user.vm.as_str())
        .collect();
    let users: Vec<&str> = users.into_iter().collect();
    let depth = disk.chain.len() as u64;
    let most = u64::from(facts.host.max_chain.max(1));
    Properties::from([
        ("target", text(&disk.target)),
        ("path", text(&disk.path)),
        ("source", text(source(disk.source))),
        ("format", text(&disk.format)),
        (
            "compat",
            text(active.map_or("", |image| image.compat.as_str())),
        ),
        ("shareable", Value::Flag(disk.shareable)),
        ("encrypted", Value::Flag(disk.encrypted)),
        ("depth", Value::Number(depth)),
        ("depth_percent", Value::Number(depth * 100 / most)),
        ("shared", Value::Flag(!users.is_empty())),
        ("users", text(users.join(", "))),
        ("has_orphans", Value::Flag(!orphans.is_empty())),
        ("orphans", text(orphans.join(", "))),
        (
            "covered",
            planned(plan, |plan| plan.covered.contains(disk.target.as_str())),
        ),
        (
            "resized",
            planned(plan, |plan| plan.resized.contains(disk.target.as_str())),
        ),
    ])
}

fn places(facts: &Facts, plan: Option<&Deeds<'_>>) -> Vec<Properties> {
    let mut paths: BTreeSet<&str> = plan
        .iter()
        .flat_map(|plan| &plan.written)
        .copied()
        .collect();
    paths.extend(
        facts
            .writable_disks()
            .flat_map(|disk| disk.chain.iter().map(|image| folder_of(&image.path))),
    );
    paths
        .into_iter()
        .filter_map(|path| {
            let folder = facts.folders.get(path)?;
            let percent = match folder.capacity {
                0 => 100,
                capacity => folder.free.saturating_mul(100) / capacity,
            };
            let full_before = learned::full_before(path, facts).is_some();
            Some(Properties::from([
                ("name", text(files::place(facts, path))),
                ("path", text(path)),
                ("free", Value::Number(folder.free)),
                ("capacity", Value::Number(folder.capacity)),
                ("free_percent", Value::Number(percent)),
                ("network", Value::Flag(folder.network)),
                ("full_before", Value::Flag(full_before)),
                ("written", planned(plan, |plan| plan.written.contains(path))),
            ]))
        })
        .collect()
}

fn snapshot(snapshot: &Snapshot, facts: &Facts, plan: Option<&Deeds<'_>>) -> Properties {
    let memory = match snapshot.memory {
        Memory::None => "none",
        Memory::Internal => "internal",
        Memory::External(_) => "external",
    };
    let health = match snapshot.health {
        Health::Whole => "whole",
        Health::DataMissing(_) | Health::MemoryMissing(_) => "data missing",
        Health::Torn(_) => "torn",
        Health::MergedAway(_) => "merged away",
        Health::MetadataOnly => "metadata only",
    };
    let record = snapshot.record.as_ref();
    let has_memory = snapshot.memory != Memory::None;
    let qemu = record.map_or(facts.host.qemu, |record| record.qemu);
    let checked = !matches!(snapshot.memory, Memory::External(_))
        || record.is_some_and(|record| record.memory_sha256.is_some());
    // QEMU writes a flash that it saved with the memory back into its file.
    let nvram_kept = match nvram(&facts.vm.firmware) {
        "none" => true,
        "qcow2" if snapshot.kind == Kind::Internal => true,
        _ => has_memory || record.is_some_and(|record| record.nvram_copy.is_some()),
    };
    let machine = &snapshot.definition.machine;
    let machine_differs = !machine.is_empty() && *machine != facts.vm.definition.machine;
    let plain = names::is_job_id(&snapshot.name);
    Properties::from([
        ("name", text(&snapshot.name)),
        ("kind", text(snapshot.kind.name())),
        ("memory", text(memory)),
        ("health", text(health)),
        ("qemu", Value::Version(qemu)),
        (
            "qemu_differs",
            Value::Flag(has_memory && qemu != facts.host.qemu),
        ),
        ("machine", text(machine)),
        ("machine_differs", Value::Flag(machine_differs)),
        ("memory_checked", Value::Flag(checked)),
        ("nvram_kept", Value::Flag(nvram_kept)),
        ("plain_name", Value::Flag(plain)),
        (
            "target",
            planned(plan, |plan| plan.target == Some(&snapshot.name)),
        ),
        (
            "goes",
            planned(plan, |plan| plan.deleted.contains(snapshot.name.as_str())),
        ),
    ])
}
