//! Which overlays libvirt takes for those of the present state.
//!
//! A revert leaves the present state behind, and libvirt deletes its overlays:
//! those that its record of the *current* snapshot names. It names the overlay
//! of a revert there, but forgets it when a newer child of the snapshot is made
//! and does not learn it again when that child is deleted (seen on 11.3). Then
//! the record names an older overlay, in which the data of another child may
//! lie, and the next revert deletes that instead.
//!
//! Invariants: pure; nothing is drafted that lets libvirt delete an image in
//! which the data of a snapshot lies.

use super::{
    facts::{Disk, Facts, Kind, Snapshot, held_by},
    reason::{Fault, Reason},
};

/// A snapshot, and target and overlay of each disk.
pub type Overlays = (String, Vec<(String, String)>);

/// What libvirt's record of the current snapshot has to name. `None` when it does already, or when what it
/// names instead is nobody's data.
///
/// # Errors
/// [`Reason::CurrentUnknown`] when there is no current snapshot, which crashes
/// libvirt 11.3 in the middle of a revert, and none can be told;
/// [`Reason::SnapshotBranches`] when libvirt would delete an image in which the
/// data of a snapshot lies, and its record cannot be set right.
pub fn to_mend(facts: &Facts) -> Result<Option<Overlays>, Fault> {
    let Some(current) = facts.current() else {
        return match stands_on(facts) {
            Some(one) => Ok(Some((one.name.clone(), overlays(one, facts)))),
            None => Err(Fault::new(
                Reason::CurrentUnknown,
                format!(
                    "libvirt does not know which snapshot the present state of VM '{}' stands on, \
                     and crashes when it reverts to an external one then; set safety_snapshot, \
                     which keeps the present state as a snapshot and makes that the current one",
                    facts.vm.name
                ),
            )),
        };
    };
    if current.kind == Kind::Internal {
        return Ok(None);
    }
    let wrong: Vec<&Disk> = facts
        .vm
        .disks
        .iter()
        .filter(|disk| covers(current, disk))
        .filter(|disk| current.present_overlay(&disk.target) != Some(&disk.path))
        .collect();
    if wrong.is_empty() {
        return Ok(None);
    }
    if present_stands_on(current, facts) {
        return Ok(Some((current.name.clone(), overlays(current, facts))));
    }
    match wrong
        .iter()
        .find_map(|disk| endangered(current, disk, facts))
    {
        Some(fault) => Err(fault),
        None => Ok(None),
    }
}

/// The one external snapshot on whose data the present state directly lies, by the
/// images themselves.
#[must_use]
pub fn stands_on(facts: &Facts) -> Option<&Snapshot> {
    let mut all = facts
        .snapshots
        .iter()
        .filter(|snapshot| present_stands_on(snapshot, facts));
    all.next().filter(|_| all.next().is_none())
}

/// What would let libvirt know the snapshot that the present state stands on, where
/// it takes another for the current one, or none, and the images tell which it is.
#[must_use]
pub fn to_make_current(facts: &Facts) -> Option<String> {
    let name = &stands_on(facts).filter(|one| !one.current)?.name;
    Some(format!(
        "the present images lie on '{name}': make that the current one with 'virsh \
         snapshot-current {} {name}'",
        facts.vm.name
    ))
}

fn covers(snapshot: &Snapshot, disk: &Disk) -> bool {
    snapshot
        .disks
        .iter()
        .any(|of| of.target == disk.target && of.kind.is_some())
}

/// Whether a disk's active image lies directly on what the snapshot was made of.
fn lies_on(snapshot: &Snapshot, disk: &Disk) -> bool {
    let below = disk.chain.get(1).map(|image| image.path.as_str());
    let defined = snapshot
        .definition
        .disk(&disk.target)
        .and_then(|defined| defined.path.as_deref());
    below.is_some() && below == defined
}

/// Whether nothing lies between the data of an external snapshot and the present.
fn present_stands_on(snapshot: &Snapshot, facts: &Facts) -> bool {
    let mut covered = facts
        .vm
        .disks
        .iter()
        .filter(|disk| covers(snapshot, disk))
        .peekable();
    snapshot.kind == Kind::External
        && covered.peek().is_some()
        && covered.all(|disk| lies_on(snapshot, disk))
}

/// The overlays of the present state, on media too.
fn overlays(snapshot: &Snapshot, facts: &Facts) -> Vec<(String, String)> {
    facts
        .vm
        .disks
        .iter()
        .filter(|disk| lies_on(snapshot, disk))
        .map(|disk| (disk.target.clone(), disk.path.clone()))
        .collect()
}

/// The refusal, when what would be deleted for a disk holds a snapshot's data.
fn endangered(current: &Snapshot, disk: &Disk, facts: &Facts) -> Option<Fault> {
    let deleted = current.present_overlay(&disk.target)?;
    let other = held_by(&facts.snapshots, deleted)?;
    let help =
        to_make_current(facts).unwrap_or_else(|| format!("remove snapshot '{}' first", other.name));
    Some(
        Fault::new(
            Reason::SnapshotBranches,
            format!(
                "disk {} of VM '{}' is on '{}', but libvirt takes '{deleted}' for it, in which the \
                 data of snapshot '{}' lies, and would delete that; {help}",
                disk.target, facts.vm.name, disk.path, other.name
            ),
        )
        .with("snapshot", &current.name)
        .with("branches", &other.name)
        .with("disk", &disk.target),
    )
}
