//! Whether what libvirt lists can still be brought back.
//!
//! libvirt's metadata, the VM's chains and the images' own headers are three
//! things; a merge behind libvirt's back changes only the second. This module
//! holds them against each other.
//!
//! Invariants: pure; says *whole* only when each file that a revert would read
//! is there and nothing newer was written into it.

use std::collections::{BTreeMap, BTreeSet};

use super::facts::{Disk, Health, Kind, Memory, Snapshot, file_name};

/// What is known of the files around.
#[derive(Debug, Default)]
pub struct Files<'a> {
    /// Internal snapshots by image path; an image that is missing is absent.
    pub images: BTreeMap<&'a str, &'a [String]>,
    /// Paths that were looked for and are not there.
    pub missing: BTreeSet<&'a str>,
    /// Images below an image that is not in the VM's own chain, uppermost first.
    pub below: BTreeMap<&'a str, &'a [String]>,
    /// Images whose own chain cannot be read: why.
    pub broken: BTreeMap<&'a str, &'a str>,
    /// Disks on which an unfinished delete is marked: snapshot and target.
    pub deleting: BTreeSet<(&'a str, &'a str)>,
    /// Files that this agent made, or had libvirt make.
    pub ours: BTreeSet<&'a str>,
}

/// The health of one snapshot, given all of them.
#[must_use]
pub fn of(snapshot: &Snapshot, all: &[Snapshot], disks: &[Disk], files: &Files<'_>) -> Health {
    if snapshot.disks.iter().all(|disk| disk.kind.is_none()) {
        return Health::MetadataOnly;
    }
    for disk in &snapshot.disks {
        if files
            .deleting
            .contains(&(snapshot.name.as_str(), disk.target.as_str()))
        {
            return Health::Torn(format!(
                "deleting it was interrupted while disk {} was being merged",
                disk.target
            ));
        }
        let Some(data) = disk.data.as_deref() else {
            continue;
        };
        match disk.kind {
            None => {}
            Some(_) if files.missing.contains(data) => {
                return Health::DataMissing(format!(
                    "'{data}', which holds the data of disk {}, is missing",
                    disk.target
                ));
            }
            Some(Kind::Internal) => {
                if let Some(internal) = files.images.get(data)
                    && !internal.contains(&snapshot.name)
                {
                    return Health::DataMissing(format!(
                        "the image '{data}' of disk {} holds no internal snapshot of that name",
                        disk.target
                    ));
                }
            }
            Some(Kind::External | Kind::Mixed) => {
                if let Some(why) = files.broken.get(data) {
                    return Health::DataMissing(format!(
                        "the chain of '{data}' of disk {} cannot be read: {why}",
                        disk.target
                    ));
                }
                if let Some(problem) = written_below(&disk.target, data, all, disks, files) {
                    return Health::MergedAway(problem);
                }
            }
        }
    }
    if let Memory::External(file) = &snapshot.memory
        && files.missing.contains(file.as_str())
    {
        return Health::DataMissing(format!("the memory file '{file}' is missing"));
    }
    // With memory, QEMU brings the variables back itself.
    if let (Memory::None, Some(copy)) = (
        &snapshot.memory,
        snapshot
            .record
            .as_ref()
            .and_then(|record| record.nvram_copy.as_deref()),
    ) && files.missing.contains(copy)
    {
        return Health::DataMissing(format!(
            "'{copy}', the copy of the UEFI variables, is missing"
        ));
    }
    Health::Whole
}

/// Why newer data must be expected in `data` or in an image that it stands on.
/// Of the lower ones only the active image and those that hold a snapshot's data
/// are meant: what is under them, such as a golden image, nobody merges into.
fn written_below(
    target: &str,
    data: &str,
    all: &[Snapshot],
    disks: &[Disk],
    files: &Files<'_>,
) -> Option<String> {
    let disk = disks.iter().find(|disk| disk.target == target)?;
    if disk.only_read() {
        // A medium that was put back is not written.
        return None;
    }
    let in_chain = disk.chain.iter().position(|image| image.path == data);
    let below: Vec<&str> = match in_chain {
        Some(at) => disk.chain[at + 1..]
            .iter()
            .map(|image| image.path.as_str())
            .collect(),
        None => files
            .below
            .get(data)
            .into_iter()
            .copied()
            .flatten()
            .map(String::as_str)
            .collect(),
    };
    let holds_data = |image: &str| {
        all.iter()
            .flat_map(|other| &other.disks)
            .any(|disk| disk.target == target && disk.data.as_deref() == Some(image))
    };
    std::iter::once(data)
        .chain(
            below
                .into_iter()
                .filter(|image| *image == disk.path || holds_data(image)),
        )
        .find_map(|image| merged_away(target, image, all, disks, files))
}

/// Why newer data must be expected in `data`, if so: it is the active image of
/// the VM, or the image above it in the VM's chain is none that a snapshot or a
/// revert put there. libvirt forgets the overlay of a revert once a snapshot was
/// made on it; then that snapshot, a child, names it as its data.
///
/// Where all later snapshots were merged into such an overlay, no metadata names
/// it any more: the current snapshot's own (any one's, when none is current) is
/// then known by this agent's journal, or by the name that libvirt gives it.
fn merged_away(
    target: &str,
    data: &str,
    all: &[Snapshot],
    disks: &[Disk],
    files: &Files<'_>,
) -> Option<String> {
    let disk = disks.iter().find(|disk| disk.target == target)?;
    if disk.path == data {
        return Some(format!(
            "disk {target} of the VM is on '{data}' itself, which should have stood still"
        ));
    }
    let at = disk.chain.iter().position(|image| image.path == data)?;
    let above = &disk.chain.get(at.checked_sub(1)?)?.path;
    let expected = all
        .iter()
        .filter(|other| {
            other
                .disks
                .iter()
                .any(|disk| disk.target == target && disk.data.as_deref() == Some(data))
        })
        .any(|other| {
            other
                .disks
                .iter()
                .any(|disk| disk.target == target && disk.overlay.as_ref() == Some(above))
                || other
                    .revert_overlays
                    .iter()
                    .any(|(disk, overlay)| disk == target && overlay == above)
                || all
                    .iter()
                    .filter(|child| child.parent.as_ref() == Some(&other.name))
                    .flat_map(|child| &child.disks)
                    .any(|disk| disk.target == target && disk.data.as_ref() == Some(above))
                || ((other.current || !all.iter().any(|one| one.current))
                    && *above == disk.path
                    && own_is_elsewhere(other, target, all, &files.missing)
                    && (files.ours.contains(above.as_str())
                        || is_revert_overlay(above, data, other.created.as_second())))
        });
    if expected {
        None
    } else {
        Some(format!(
            "the overlay of disk {target} over '{data}' was merged; '{above}' stands on it now"
        ))
    }
}

/// Whether the overlay that libvirt names for a disk of a snapshot is not that of
/// the present state: the data of a child lies in it, or it went with that child.
/// Else it was merged.
fn own_is_elsewhere(
    snapshot: &Snapshot,
    target: &str,
    all: &[Snapshot],
    missing: &BTreeSet<&str>,
) -> bool {
    let own = snapshot
        .disks
        .iter()
        .find(|disk| disk.target == target)
        .and_then(|disk| disk.overlay.as_deref());
    let Some(own) = own else {
        return false;
    };
    missing.contains(own)
        || all
            .iter()
            .filter(|child| child.parent.as_ref() == Some(&snapshot.name))
            .flat_map(|child| &child.disks)
            .any(|disk| disk.target == target && disk.data.as_deref() == Some(own))
}

/// Whether libvirt would have named `overlay` so when it reverted onto `data`
/// after `created`, in seconds: the name up to the last dot, and the second.
fn is_revert_overlay(overlay: &str, data: &str, created: i64) -> bool {
    let stem = match file_name(data).rfind('.') {
        Some(at) if at > 0 => &data[..data.len() - file_name(data).len() + at],
        _ => data,
    };
    overlay
        .strip_prefix(stem)
        .and_then(|rest| rest.strip_prefix('.'))
        .filter(|second| second.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|second| second.parse::<i64>().ok())
        .is_some_and(|second| second >= created)
}
