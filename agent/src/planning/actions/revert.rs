//! revert: goes back to a snapshot, and ends in the state that was asked for.
//!
//! Everything is checked first, because a revert that fails inside libvirt has
//! already killed the guest.

use crate::planning::{
    actions::{checks, create},
    facts::{Facts, Kind, Memory, Snapshot, VmState},
    names,
    plan::Draft,
    reason::{Fault, Reason},
    request::{Create, Request, Revert, StateAfter, WaitFor},
    step::Step,
    tree,
};

/// Drafts the plan.
///
/// # Errors
/// The refusal.
pub fn draft(request: &Request, revert: &Revert, facts: &Facts) -> Result<Draft, Fault> {
    let mut draft = Draft {
        snapshot: revert.name.clone(),
        ..Draft::default()
    };
    let snapshot = checks::find(facts, &revert.name)?;
    checks::whole(snapshot)?;
    checks::young_enough(facts, snapshot, revert.max_age)?;
    revertible(snapshot, revert.safety_snapshot, facts)?;
    checks::no_block_job(facts)?;
    checks::not_shared(facts, written(snapshot, facts))?;
    costs(snapshot, revert.force, facts, &mut draft)?;
    if facts.vm.managed_save {
        if !revert.force {
            return Err(Fault::new(
                Reason::ManagedSavePresent,
                format!(
                    "VM '{}' has a managed save, memory that the next start would load over the \
                     reverted disks; set force to drop it",
                    facts.vm.name
                ),
            ));
        }
        draft.push(Step::DropManagedSave);
        draft.warn(
            "MANAGED_SAVE_DROPPED",
            "the VM's saved memory is dropped, because force is set",
            "",
        );
    }
    if revert.safety_snapshot {
        safety(facts, &mut draft)?;
    }
    let after = state_after(request, revert, snapshot, facts, &mut draft);
    compare_definition(snapshot, facts, &mut draft);

    let saved = snapshot.memory != Memory::None;
    let definition = draft.push(Step::KeepDefinition);
    draft.push(Step::Revert {
        name: snapshot.name.clone(),
        // Without memory, starting is a step of its own: libvirt deletes the old
        // overlay before it tries to start.
        running: saved && after == VmState::Running && snapshot.state != VmState::Running,
        paused: saved && after == VmState::Paused && snapshot.state != VmState::Paused,
        force: revert.force,
        definition,
    });
    let copy = snapshot
        .record
        .as_ref()
        .and_then(|record| record.nvram_copy.clone());
    match (copy, &facts.vm.firmware.nvram) {
        (Some(_), Some(_)) if saved => draft.decide(
            "uefi variables",
            "from memory",
            "QEMU writes the saved flash back into their file when it loads the memory",
        ),
        (Some(from), Some(to)) => {
            let to = to.clone();
            draft.push(Step::RestoreNvram { from, to });
        }
        _ => {}
    }
    match (saved, after) {
        (true, VmState::Stopped) => {
            draft.push(Step::Stop);
        }
        (false, VmState::Running) => {
            draft.push(Step::Start { paused: false });
        }
        (false, VmState::Paused) => {
            draft.push(Step::Start { paused: true });
        }
        _ => {}
    }
    if after == VmState::Running {
        checks::wait_for(revert.wait_for, revert.wait_timeout, &mut draft);
        if saved && revert.sync_clock && facts.vm.agent.defined {
            draft.push(Step::SyncClock);
        }
    } else if revert.wait_for != WaitFor::None {
        draft.warn(
            "NOT_WAITED",
            format!(
                "the VM ends {}, so there is no guest to wait for",
                after.name()
            ),
            "set state_after to running",
        );
    }
    draft.change(
        "state",
        Some(facts.vm.state.name().into()),
        Some(after.name().into()),
    );
    draft.change(
        "current_snapshot",
        facts.current().map(|current| current.name.clone()),
        Some(snapshot.name.clone()),
    );
    for disk in &snapshot.disks {
        let now = facts
            .vm
            .disks
            .iter()
            .find(|vm| vm.target == disk.target)
            .map(|vm| vm.path.clone());
        if disk.kind.is_some() {
            draft.change(
                format!("disk.{}", disk.target),
                now,
                Some(format!("as in snapshot {}", snapshot.name)),
            );
        }
    }
    if !saved && snapshot.state != VmState::Stopped {
        draft.warn(
            "GUEST_RESTARTS",
            format!(
                "snapshot '{}' holds no memory: the guest starts from its disks",
                snapshot.name
            ),
            "",
        );
    }
    Ok(draft)
}

/// Files that a revert writes or removes: the image that holds an internal
/// snapshot, the present overlay for an external one.
fn written<'a>(snapshot: &'a Snapshot, facts: &'a Facts) -> Vec<&'a str> {
    let mut paths = Vec::new();
    for disk in snapshot.disks.iter().filter(|disk| disk.kind.is_some()) {
        let data = disk.data.as_deref();
        if disk.kind == Some(Kind::Internal) {
            paths.extend(data);
        }
        let vm = facts.vm.disks.iter().find(|vm| vm.target == disk.target);
        paths.extend(vm.map(|vm| vm.path.as_str()).filter(|path| {
            // An image that was there before any snapshot is only left behind.
            Some(*path) != data
                && facts
                    .snapshots
                    .iter()
                    .flat_map(|one| one.disks.iter().flat_map(|disk| &disk.overlay))
                    .chain(
                        facts
                            .snapshots
                            .iter()
                            .flat_map(|one| one.revert_overlays.iter().map(|(_, path)| path)),
                    )
                    .any(|overlay| overlay == path)
        }));
    }
    paths
}

/// What goes beside the present state. The image of an internal snapshot is
/// written from then on, also where external snapshots stand on it.
fn costs(snapshot: &Snapshot, force: bool, facts: &Facts, draft: &mut Draft) -> Result<(), Fault> {
    let mut lost: Vec<&str> = Vec::new();
    for disk in &snapshot.disks {
        if disk.kind != Some(Kind::Internal) {
            continue;
        }
        let on_it = facts.snapshots.iter().filter(|other| {
            other.disks.iter().any(|of| {
                of.target == disk.target
                    && matches!(of.kind, Some(Kind::External | Kind::Mixed))
                    && of.data == disk.data
            })
        });
        for other in on_it {
            let below = tree::descendants_leaf_first(facts, &other.name);
            for name in below
                .into_iter()
                .chain([other])
                .map(|one| one.name.as_str())
            {
                if !lost.contains(&name) && name != snapshot.name {
                    lost.push(name);
                }
            }
        }
    }
    if lost.is_empty() {
        return Ok(());
    }
    let message = format!(
        "internal snapshot '{}' lies in an image on which {} stand; a revert goes on writing into \
         that image, and they can never be brought back then",
        snapshot.name,
        lost.join(", ")
    );
    if !force {
        return Err(Fault::new(
            Reason::KindsMixed,
            format!(
                "{message}; copy out what is still needed with 'qemu-img convert', and set force \
                 to let them go"
            ),
        )
        .with("snapshot", &snapshot.name)
        .with("lost", lost.join(",")));
    }
    draft.warn(
        "SNAPSHOTS_LOST",
        message,
        "remove them with cleanup afterwards",
    );
    Ok(())
}

/// Refuses a snapshot that a revert could not bring back, whatever the VM looks
/// like now.
///
/// # Errors
/// [`Reason::SnapshotNotRevertible`].
pub fn ever(snapshot: &Snapshot) -> Result<(), Fault> {
    if snapshot
        .record
        .as_ref()
        .is_some_and(|record| record.not_revertible)
    {
        return Err(Fault::new(
            Reason::SnapshotNotRevertible,
            format!(
                "snapshot '{}' was made with disks left out and accept_no_revert; a revert would \
                 throw those disks back further than anybody asked",
                snapshot.name
            ),
        )
        .with("snapshot", &snapshot.name));
    }
    if let Some(other) = &snapshot.mistaken_for {
        return Err(Fault::new(
            Reason::SnapshotNotRevertible,
            format!(
                "QEMU takes '{}' for the number of an internal snapshot, and that is the number of \
                 '{other}': a revert would go to '{other}' instead; while the VM is off, read it \
                 out with 'qemu-img convert -l snapshot.name={}'",
                snapshot.name, snapshot.name
            ),
        )
        .with("snapshot", &snapshot.name));
    }
    if snapshot.kind == Kind::Internal {
        return Ok(());
    }
    let comma = snapshot.disks.iter().find_map(|disk| {
        let data = disk.data.as_deref()?;
        names::overlay_stem(data)
            .contains(',')
            .then_some((&disk.target, data))
    });
    if let Some((target, path)) = comma {
        return Err(Fault::new(
            Reason::SnapshotNotRevertible,
            format!(
                "disk {target} lies in '{path}' in snapshot '{}', and after a revert the VM \
                 could not start: libvirt writes the comma in that path twice where it makes \
                 the new overlay",
                snapshot.name
            ),
        )
        .with("snapshot", &snapshot.name)
        .with("disk", target));
    }
    Ok(())
}

fn revertible(snapshot: &Snapshot, safety_snapshot: bool, facts: &Facts) -> Result<(), Fault> {
    ever(snapshot)?;
    if snapshot.kind != Kind::Internal && !facts.host.reverts_external() {
        return Err(Fault::new(
            Reason::KindUnsupported,
            format!(
                "snapshot '{}' is external, and this host's libvirt cannot revert to that; 9.10 or \
                 newer can",
                snapshot.name
            ),
        ));
    }
    // Without a current snapshot libvirt 11.3 crashes in the middle of the revert.
    if snapshot.kind != Kind::Internal && facts.current().is_none() && !safety_snapshot {
        return Err(Fault::new(
            Reason::CurrentUnknown,
            format!(
                "libvirt does not know which snapshot the present state of VM '{}' stands on, and \
                 crashes when it reverts to an external one then; set safety_snapshot, which \
                 keeps the present state as a snapshot and makes that the current one",
                facts.vm.name
            ),
        )
        .with("snapshot", &snapshot.name));
    }
    // libvirt puts a fresh overlay on every disk, also on one that the snapshot
    // left out: that one would fall back to a state that nobody asked for.
    if snapshot.kind != Kind::Internal {
        for disk in facts.writable_disks() {
            let covered = snapshot
                .disks
                .iter()
                .any(|of| of.target == disk.target && of.kind.is_some());
            let known = snapshot.disks.iter().any(|of| of.target == disk.target);
            if known && !covered {
                return Err(Fault::new(
                    Reason::SnapshotNotRevertible,
                    format!(
                        "snapshot '{}' does not cover disk {}, which a revert would throw back \
                         further than anybody asked",
                        snapshot.name, disk.target
                    ),
                )
                .with("snapshot", &snapshot.name)
                .with("disk", &disk.target));
            }
        }
        for (target, path) in &snapshot.media {
            if let Some(problem) = checks::no_overlay_on(facts, path) {
                return Err(Fault::new(
                    Reason::MediaNotCovered,
                    format!(
                        "{target} holds '{path}' in snapshot '{}'; the revert must put an overlay \
                         on it, but {problem}",
                        snapshot.name
                    ),
                )
                .with("disk", target)
                .with("medium", path));
            }
        }
    }
    Ok(())
}

fn safety(facts: &Facts, draft: &mut Draft) -> Result<(), Fault> {
    let name = create::free_name(facts, "safety");
    let create = Create {
        name: name.clone(),
        description: "taken before a revert".into(),
        ..Create::default()
    };
    checks::changeable(facts)?;
    create::snapshot(&create, facts.vm.state, false, true, facts, draft)?;
    draft.safety_snapshot = Some(name);
    Ok(())
}

/// The state to end in, and why.
fn state_after(
    request: &Request,
    revert: &Revert,
    snapshot: &Snapshot,
    facts: &Facts,
    draft: &mut Draft,
) -> VmState {
    let (state, because) = match revert.state_after {
        StateAfter::Running => (VmState::Running, "asked for"),
        StateAfter::Paused => (VmState::Paused, "asked for"),
        StateAfter::Stopped => (VmState::Stopped, "asked for"),
        StateAfter::Auto if snapshot.memory != Memory::None => match snapshot.state {
            VmState::Paused => (VmState::Paused, "memory was saved of a paused guest"),
            _ => (VmState::Running, "memory was saved of a running guest"),
        },
        StateAfter::Auto if facts.vm.state != VmState::Stopped => {
            (VmState::Running, "the VM is on now")
        }
        StateAfter::Auto if snapshot.state != VmState::Stopped => {
            (VmState::Running, "the VM was on when the snapshot was made")
        }
        StateAfter::Auto if request.start_if_stopped => {
            (VmState::Running, "start_if_stopped is set")
        }
        StateAfter::Auto => (VmState::Stopped, "the VM is off, and was off then"),
    };
    draft.decide("state after", state.name(), because);
    state
}

/// What of the VM's definition the revert takes back.
fn compare_definition(snapshot: &Snapshot, facts: &Facts, draft: &mut Draft) {
    if snapshot.vm_memory > 0 {
        draft.change(
            "definition.memory",
            Some(facts.vm.max_memory.to_string()),
            Some(snapshot.vm_memory.to_string()),
        );
    }
    if snapshot.vm_vcpus > 0 {
        draft.change(
            "definition.vcpus",
            Some(facts.vm.vcpu_count.to_string()),
            Some(snapshot.vm_vcpus.to_string()),
        );
    }
    if !snapshot.machine.is_empty() && snapshot.machine != facts.vm.machine {
        draft.change(
            "definition.machine",
            Some(facts.vm.machine.clone()),
            Some(snapshot.machine.clone()),
        );
    }
    for disk in facts.writable_disks() {
        if !snapshot.disks.iter().any(|of| of.target == disk.target) {
            draft.change(
                format!("definition.disk.{}", disk.target),
                Some(disk.path.clone()),
                None,
            );
            draft.warn(
                "DISK_TAKEN_BACK",
                format!(
                    "disk {} was added after the snapshot; the revert takes it out of the VM, its \
                     file '{}' stays",
                    disk.target, disk.path
                ),
                "",
            );
        }
    }
}
