//! revert: goes back to a snapshot, and ends in the state that was asked for.
//!
//! Everything is checked first, because a revert that fails inside libvirt has
//! already killed the guest.

mod definition;
mod possible;

use crate::planning::{
    actions::{checks, create},
    facts::{Facts, Health, Kind, Memory, Snapshot, VmState, folder_of},
    files::exists,
    guard::{self, GuardState},
    lineage,
    plan::Draft,
    reason::{Fault, Reason},
    request::{Create, Request, Revert, StateAfter},
    step::Step,
    tree,
};

pub use possible::ever;

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
    let alone = disks_alone(snapshot, revert)?;
    possible::revertible(snapshot, alone.is_some(), facts)?;
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
    let starts = saved || after != VmState::Stopped;
    possible::startable(snapshot, starts, alone.is_some(), facts)?;
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
    let deletes = alone.is_none() && !revert.safety_snapshot && snapshot.kind != Kind::Internal;
    definition::compare(snapshot, deletes, facts, &mut draft);

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
#[must_use]
pub fn written<'a>(snapshot: &'a Snapshot, facts: &'a Facts) -> Vec<&'a str> {
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
