//! What a revert needs beside the snapshot's own data: images that can take an
//! overlay, and whatever QEMU opens when it starts.

use crate::planning::{
    actions::checks,
    facts::{DefinedDisk, Facts, Kind, Snapshot, Source, folder_of},
    files::{Files, OVERLAY_BYTES, exists},
    names,
    reason::{Fault, Reason},
};

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
    let mut covered = snapshot.definition.disks.iter();
    if let Some(disk) = covered.find(|disk| disk.encrypted && !disk.only_read()) {
        return Err(Fault::new(
            Reason::SnapshotNotRevertible,
            format!(
                "disk {} is encrypted in snapshot '{}', and after a revert the VM could not start: \
                 libvirt forgets who decrypts the image below the new overlay",
                disk.target, snapshot.name
            ),
        )
        .with("snapshot", &snapshot.name)
        .with("disk", &disk.target));
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

pub(super) fn revertible(snapshot: &Snapshot, alone: bool, facts: &Facts) -> Result<(), Fault> {
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
    let overlaid = |disk: &&DefinedDisk| !(alone && disk.only_read());
    for disk in snapshot.definition.disks.iter().filter(overlaid) {
        overlay_can_be_put_on(disk, snapshot, facts)?;
    }
    let mut files = Files::new(facts);
    for disk in snapshot.definition.disks.iter().filter(overlaid) {
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
pub(super) fn startable(
    snapshot: &Snapshot,
    starts: bool,
    alone: bool,
    facts: &Facts,
) -> Result<(), Fault> {
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
    // What was only put into a drive of the running VM is not what starts from disks.
    let starts_with = |target: &str, medium: &String| {
        !alone
            || definition
                .disk(target)
                .is_some_and(|disk| disk.path.as_ref() == Some(medium))
    };
    let missing = snapshot
        .media
        .iter()
        .find(|(target, medium)| gone(medium) && starts_with(target, medium));
    if let Some((target, medium)) = missing {
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
