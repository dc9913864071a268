//! revert: goes back to a snapshot, and ends in the state that was asked for.
//!
//! Everything is checked first, because a revert that fails inside libvirt has
//! already killed the guest.

use crate::planning::{
    actions::{checks, create},
    facts::{DefinedDisk, Facts, Health, Kind, Memory, Snapshot, Source, VmState, folder_of},
    files::{Files, OVERLAY_BYTES, exists},
    guard::{self, GuardState},
    lineage, names,
    plan::Draft,
    reason::{Fault, Reason},
    request::{Create, Request, Revert, StateAfter},
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
    // First, because it explains why a snapshot may seem to be merged away.
    checks::definition_agrees(facts)?;
    // Whoever waits for an open merge is told of it, not of what it tears.
    checks::no_block_job(facts)?;
    let saved = snapshot.memory != Memory::None && !revert.disks_only;
    if saved || !matches!(snapshot.health, Health::MemoryMissing(_)) {
        checks::whole(snapshot)?;
    }
    checks::young_enough(facts, snapshot, revert.max_age)?;
    revertible(snapshot, facts)?;
    let alone = disks_alone(snapshot, revert)?;
    checks::not_used(facts, written(snapshot, facts))?;
    costs(snapshot, revert.force, facts, &mut draft)?;
    checks::not_half_loaded(facts)?;
    if !facts.vm.persistent && !saved {
        return Err(Fault::new(
            Reason::DomainState,
            format!(
                "VM '{}' has no definition that stays, and no memory of snapshot '{}' is loaded: \
                 it would be gone when it is switched off for the revert; define it first",
                facts.vm.name, snapshot.name
            ),
        )
        .with("state", facts.vm.state.name()));
    }
    let after = state_after(request, revert, snapshot, saved, facts, &mut draft);
    startable(snapshot, saved || after != VmState::Stopped, facts)?;
    let uefi = uefi(snapshot, saved, after, facts, &mut draft)?;

    if (saved && matches!(snapshot.memory, Memory::External(_))) || uefi.is_some() {
        draft.push(Step::CheckSnapshot {
            name: snapshot.name.clone(),
            nvram: uefi.clone(),
            disks_only: alone.is_some(),
        });
    }
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
    } else if snapshot.kind != Kind::Internal
        && let Some((current, overlays)) = mend(snapshot, facts)?
    {
        draft.decide(
            "record",
            "mended",
            "libvirt does not know the overlay of the present state, and would delete another",
        );
        draft.push(Step::MendRecord {
            name: current,
            overlays,
        });
    }
    compare_definition(snapshot, facts, &mut draft);

    // A guest that has to end off is loaded, but need not run. Only where its UEFI
    // variables come from the loaded flash it does: QEMU writes them when it runs.
    let from_flash = snapshot.definition.nvram.is_some() && uefi.is_none();
    let stays_still = after == VmState::Paused || (after == VmState::Stopped && !from_flash);
    let definition = draft.push(Step::KeepDefinition);
    let name = snapshot.name.clone();
    draft.push(match alone {
        Some(disks) => Step::RevertDisks {
            name,
            disks,
            definition,
        },
        None => Step::Revert {
            name,
            // Without memory, starting is a step of its own: libvirt deletes the old
            // overlay before it tries to start.
            running: saved && after == VmState::Running && snapshot.state != VmState::Running,
            paused: saved && stays_still && snapshot.state != VmState::Paused,
            force: revert.force,
            definition,
        },
    });
    if let Some(step) = guard::end(facts, &snapshot.name, GuardState::Reverted) {
        draft.push(step);
    }
    if saved && after == VmState::Stopped {
        draft.push(Step::Stop);
    }
    if let Some((from, to)) = uefi {
        draft.push(Step::RestoreNvram { from, to });
    }
    match (saved, after) {
        (false, VmState::Running) => {
            draft.push(Step::Start { paused: false });
        }
        (false, VmState::Paused) => {
            draft.push(Step::Start { paused: true });
        }
        _ => {}
    }
    checks::wait_for(revert.wait_for, revert.wait_timeout, after, &mut draft);
    if saved && revert.sync_clock {
        clock(snapshot, after, facts, &mut draft);
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
        let why = if snapshot.memory == Memory::None {
            "holds no memory"
        } else {
            "keeps its memory to itself, because disks_only is set"
        };
        draft.warn(
            "GUEST_RESTARTS",
            format!(
                "snapshot '{}' {why}: the guest starts from its disks",
                snapshot.name
            ),
            "",
        );
    }
    Ok(draft)
}

/// The disks that go back alone, without the memory of the snapshot: libvirt loads
/// it in any revert, so that is done without libvirt's.
fn disks_alone(snapshot: &Snapshot, revert: &Revert) -> Result<Option<Vec<String>>, Fault> {
    if !revert.disks_only || snapshot.memory == Memory::None {
        return Ok(None);
    }
    if snapshot.kind == Kind::Internal {
        return Err(Fault::new(
            Reason::SnapshotNotRevertible,
            format!(
                "internal snapshot '{}' keeps memory and disks in one, and disks_only takes \
                 external ones; to have its disks alone, switch the VM off and copy them out with \
                 'qemu-img convert -l snapshot.name={}'",
                snapshot.name, snapshot.name
            ),
        )
        .with("snapshot", &snapshot.name));
    }
    let disks: Vec<String> = snapshot
        .definition
        .disks
        .iter()
        .filter(|disk| disk.path.is_some() && !disk.only_read())
        .map(|disk| disk.target.clone())
        .collect();
    if disks.is_empty() {
        return Err(Fault::new(
            Reason::SnapshotNotRevertible,
            format!(
                "libvirt's record of snapshot '{}' holds no definition with disks to go back to",
                snapshot.name
            ),
        )
        .with("snapshot", &snapshot.name));
    }
    Ok(Some(disks))
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
    let held = snapshot
        .disks
        .iter()
        .filter_map(|disk| Some((disk.target.as_str(), disk.data.as_deref()?)));
    if let Some([one, other]) = checks::same_overlay(held) {
        return Err(Fault::new(
            Reason::SnapshotNotRevertible,
            format!(
                "in snapshot '{}' disks {} and {} lie in files whose names differ only in their \
                 endings ('{}', '{}'): libvirt's revert would call both new overlays the same, and \
                 fail with the VM off",
                snapshot.name, one.0, other.0, one.1, other.1
            ),
        )
        .with("snapshot", &snapshot.name)
        .with("disk", other.0));
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

fn revertible(snapshot: &Snapshot, facts: &Facts) -> Result<(), Fault> {
    ever(snapshot)?;
    if snapshot.kind == Kind::Internal {
        return Ok(());
    }
    if !facts.host.reverts_external() {
        return Err(Fault::new(
            Reason::KindUnsupported,
            format!(
                "snapshot '{}' is external, and this host's libvirt cannot revert to that; 9.10 or \
                 newer can",
                snapshot.name
            ),
        ));
    }
    for disk in &snapshot.definition.disks {
        overlay_can_be_put_on(disk, snapshot, facts)?;
    }
    let mut files = Files::new(facts);
    for disk in &snapshot.definition.disks {
        if let (Some(path), Source::File) = (&disk.path, disk.source) {
            files.need(folder_of(path), OVERLAY_BYTES);
        }
    }
    files.check_space()
}

/// libvirt puts a fresh overlay on every disk and every medium, also on what the
/// snapshot left out, and only after it has killed the guest.
fn overlay_can_be_put_on(
    disk: &DefinedDisk,
    snapshot: &Snapshot,
    facts: &Facts,
) -> Result<(), Fault> {
    let Some(path) = &disk.path else {
        return Ok(());
    };
    if disk.only_read() {
        return snapshot
            .media
            .iter()
            .filter(|(target, _)| *target == disk.target)
            .try_for_each(|(_, medium)| {
                medium_fits(&disk.target, medium, disk.source, snapshot, facts)
            });
    }
    let refused = |why: String| {
        Err(Fault::new(
            Reason::SnapshotNotRevertible,
            format!("snapshot '{}' {why}", snapshot.name),
        )
        .with("snapshot", &snapshot.name)
        .with("disk", &disk.target))
    };
    let covered = snapshot
        .disks
        .iter()
        .any(|of| of.target == disk.target && of.kind.is_some());
    if !covered {
        return refused(format!(
            "does not cover disk {}, which a revert would throw back further than anybody asked",
            disk.target
        ));
    }
    if disk.source != Source::File {
        return refused(format!(
            "keeps disk {} on '{path}', which is no file: libvirt cannot put an overlay on that",
            disk.target
        ));
    }
    match checks::no_new_file_in(facts, folder_of(path)) {
        Some(problem) => Err(Fault::new(
            Reason::StorageNotWritable,
            format!(
                "a revert to snapshot '{}' makes an overlay in '{}' for disk {}, but {problem}",
                snapshot.name,
                folder_of(path),
                disk.target
            ),
        )
        .with("path", folder_of(path))),
        None => Ok(()),
    }
}

fn medium_fits(
    target: &str,
    medium: &str,
    source: Source,
    snapshot: &Snapshot,
    facts: &Facts,
) -> Result<(), Fault> {
    let problem = if source == Source::File {
        checks::no_overlay_on(facts, medium)
    } else {
        Some("it is not a file")
    };
    match problem {
        Some(problem) => Err(Fault::new(
            Reason::MediaNotCovered,
            format!(
                "{target} holds '{medium}' in snapshot '{}'; the revert must put an overlay on it, \
                 but {problem}",
                snapshot.name
            ),
        )
        .with("disk", target)
        .with("medium", medium)),
        None => Ok(()),
    }
}

/// Checks the files beside the snapshot's own that QEMU opens when it starts:
/// it is started only after the old one was killed.
fn startable(snapshot: &Snapshot, starts: bool, facts: &Facts) -> Result<(), Fault> {
    if !starts {
        return Ok(());
    }
    let gone = |path: &str| path.starts_with('/') && exists(facts, path) == Some(false);
    let definition = &snapshot.definition;
    if let Some((what, path)) = definition.boot.iter().find(|(_, path)| gone(path)) {
        return Err(Fault::new(
            Reason::SnapshotNotWhole,
            format!(
                "snapshot '{}' starts the VM with the {what} '{path}', which is not there",
                snapshot.name
            ),
        )
        .with("snapshot", &snapshot.name)
        .with("health", "data missing")
        .with("path", path));
    }
    if let Some((target, medium)) = snapshot.media.iter().find(|(_, medium)| gone(medium)) {
        return Err(Fault::new(
            Reason::MediaNotCovered,
            format!(
                "{target} holds '{medium}' in snapshot '{}', but it is not there",
                snapshot.name
            ),
        )
        .with("disk", target)
        .with("medium", medium));
    }
    // Those that the snapshot covers are part of its health.
    let covered = |target: &str| {
        snapshot
            .disks
            .iter()
            .any(|disk| disk.target == target && disk.kind.is_some())
    };
    let disk = definition
        .disks
        .iter()
        .filter(|disk| !covered(&disk.target))
        .find_map(|disk| Some((&disk.target, disk.path.as_ref().filter(|path| gone(path))?)));
    if let Some((target, path)) = disk {
        return Err(Fault::new(
            Reason::SnapshotNotWhole,
            format!(
                "disk {target} is on '{path}' in snapshot '{}', but that is not there",
                snapshot.name
            ),
        )
        .with("snapshot", &snapshot.name)
        .with("health", "data missing")
        .with("path", path));
    }
    Ok(())
}

/// How the UEFI variables come back: the copy that a step of its own puts into
/// their file, and that file.
fn uefi(
    snapshot: &Snapshot,
    saved: bool,
    after: VmState,
    facts: &Facts,
    draft: &mut Draft,
) -> Result<Option<(String, String)>, Fault> {
    let Some(to) = snapshot
        .definition
        .nvram
        .as_ref()
        .or(facts.vm.firmware.nvram.as_ref())
    else {
        return Ok(None);
    };
    if snapshot.kind == Kind::Internal && facts.vm.firmware.nvram_format == "qcow2" {
        draft.decide(
            "uefi variables",
            "from the image",
            "they are part of the snapshot",
        );
        return Ok(None);
    }
    if saved && after != VmState::Stopped {
        draft.decide(
            "uefi variables",
            "from memory",
            "QEMU writes the saved flash back into their file when the guest goes on",
        );
        return Ok(None);
    }
    let copy = snapshot
        .record
        .as_ref()
        .and_then(|record| record.nvram_copy.as_ref());
    let Some(from) = copy else {
        return Ok(None);
    };
    if exists(facts, from) == Some(false) {
        return Err(Fault::new(
            Reason::SnapshotNotWhole,
            format!(
                "'{from}', the copy of the UEFI variables of snapshot '{}', is missing",
                snapshot.name
            ),
        )
        .with("snapshot", &snapshot.name)
        .with("health", "data missing")
        .with("path", from));
    }
    if let Some(problem) = checks::no_new_file_in(facts, folder_of(to)) {
        return Err(Fault::new(
            Reason::StorageNotWritable,
            format!("the UEFI variables cannot be put back into '{to}': {problem}"),
        )
        .with("path", to));
    }
    draft.decide(
        "uefi variables",
        "from the copy",
        "QEMU does not bring them back itself",
    );
    Ok(Some((from.clone(), to.clone())))
}

/// The guest goes on with the clock that it had.
fn clock(snapshot: &Snapshot, after: VmState, facts: &Facts, draft: &mut Draft) {
    match after {
        VmState::Running if snapshot.definition.agent => {
            draft.push(Step::SyncClock);
        }
        VmState::Paused if snapshot.definition.agent => draft.warn(
            "CLOCK_BEHIND",
            format!(
                "the guest ends paused, so its clock cannot be set: it will be behind by {}, the \
                 age of the snapshot, and by the pause",
                checks::for_people(checks::age(facts, snapshot))
            ),
            "set the clock in the guest when it runs again",
        ),
        _ => {}
    }
}

/// What has to be set right in libvirt's record before the revert.
fn mend(snapshot: &Snapshot, facts: &Facts) -> Result<Option<lineage::Overlays>, Fault> {
    lineage::to_mend(facts).map_err(|fault| match fault.reason {
        Reason::CurrentUnknown => fault.with("snapshot", &snapshot.name),
        _ => fault,
    })
}

fn safety(facts: &Facts, draft: &mut Draft) -> Result<(), Fault> {
    let name = create::free_name(facts, "safety");
    let create = Create {
        name: name.clone(),
        description: "taken before a revert".into(),
        ..Create::default()
    };
    // An earlier step drops the managed save, if there is one.
    let mut without = facts.clone();
    without.vm.managed_save = false;
    checks::changeable(&without)?;
    create::snapshot(&create, facts.vm.state, false, true, facts, draft)?;
    draft.safety_snapshot = Some(name);
    Ok(())
}

/// The state to end in, and why.
fn state_after(
    request: &Request,
    revert: &Revert,
    snapshot: &Snapshot,
    saved: bool,
    facts: &Facts,
    draft: &mut Draft,
) -> VmState {
    let (state, because) = match revert.state_after {
        StateAfter::Running => (VmState::Running, "asked for"),
        StateAfter::Paused => (VmState::Paused, "asked for"),
        StateAfter::Stopped => (VmState::Stopped, "asked for"),
        StateAfter::Auto if saved => match snapshot.state {
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
    let (then, now) = (&snapshot.definition, &facts.vm.definition);
    // A record without a definition cannot be compared.
    if then.memory == 0 {
        return;
    }
    for (field, now, then) in [
        ("memory", now.memory, then.memory),
        ("vcpus", now.vcpus.into(), then.vcpus.into()),
        (
            "vcpus_at_start",
            now.vcpus_at_start.into(),
            then.vcpus_at_start.into(),
        ),
    ] {
        draft.change(
            format!("definition.{field}"),
            Some(now.to_string()),
            Some(then.to_string()),
        );
    }
    if then.machine != now.machine {
        draft.change(
            "definition.machine",
            Some(now.machine.clone()),
            Some(then.machine.clone()),
        );
    }
    compare_disks(snapshot, facts, draft);
}

fn compare_disks(snapshot: &Snapshot, facts: &Facts, draft: &mut Draft) {
    let (then, now) = (&snapshot.definition, &facts.vm.definition);
    let mut targets: Vec<&str> = now
        .disks
        .iter()
        .map(|disk| disk.target.as_str())
        // Added to the running VM only.
        .chain(facts.vm.disks.iter().map(|disk| disk.target.as_str()))
        .chain(then.disks.iter().map(|disk| disk.target.as_str()))
        .collect();
    targets.sort_unstable();
    targets.dedup();
    for target in targets {
        let in_use = facts.vm.disks.iter().find(|disk| disk.target == target);
        let path_now = match (now.disk(target), in_use) {
            (Some(disk), _) => Some(disk.path.clone().unwrap_or_default()),
            (None, Some(disk)) => Some(disk.path.clone()),
            (None, None) => None,
        };
        let path_then = then
            .disk(target)
            .map(|disk| disk.path.clone().unwrap_or_default());
        let field = format!("definition.disk.{target}");
        match (&path_now, &path_then) {
            (Some(now), None) => {
                draft.warn(
                    "DISK_TAKEN_BACK",
                    format!(
                        "disk {target} was added after the snapshot; the revert takes it out of \
                         the VM, its file '{now}' stays"
                    ),
                    "",
                );
                draft.change(field, path_now.clone(), None);
            }
            (None, Some(then)) => {
                draft.warn(
                    "DISK_PUT_BACK",
                    format!(
                        "disk {target} was taken out of the VM after the snapshot; the revert puts \
                         it in again, with '{then}'"
                    ),
                    "",
                );
                draft.change(field, None, path_then.clone());
            }
            // A disk that the snapshot covers is on another overlay in any case.
            (Some(now), Some(then)) => {
                let covered = snapshot
                    .disks
                    .iter()
                    .any(|disk| disk.target == target && disk.kind.is_some());
                if !covered && !stands_on(now, then, target, facts) {
                    draft.change(field, path_now.clone(), path_then.clone());
                }
            }
            (None, None) => {}
        }
    }
}

/// Whether an image is another one, or an overlay that a revert put on it.
fn stands_on(image: &str, other: &str, target: &str, facts: &Facts) -> bool {
    let disk = facts.vm.disks.iter().find(|disk| disk.target == target);
    image == other
        || disk.is_some_and(|disk| {
            disk.path == image && disk.chain.iter().any(|below| below.path == other)
        })
}
