//! Whether what libvirt lists can still be brought back.
//!
//! libvirt's metadata, the VM's chains and the images' own headers are three
//! things; a merge behind libvirt's back changes only the second, and one that
//! was cut off changes none of them. This module holds them against each other.
//!
//! The image that holds a snapshot's data stands still from then on, and only
//! images that a snapshot or a revert made stand directly on it. Another image
//! on it therefore tells of a merge into it, and the VM's own active image is
//! being written. Whoever reads through all that was merged still reads the same
//! as before; everybody else on that image reads something newer.
//!
//! Invariants: pure; says *whole* only when each file that a revert would read
//! is there and nothing newer is seen through it.

use std::collections::{BTreeMap, BTreeSet};

use super::facts::{Disk, Health, Kind, Memory, Snapshot, SnapshotDisk, file_name};

/// The way back that is left where memory cannot be loaded.
pub const WITHOUT_MEMORY: &str = "set disks_only to go back to its disks without its memory";

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
    /// Where libvirt marks an unfinished delete: snapshot and target. The mark
    /// stands on the parent, whose overlay is what is being merged into.
    pub deleting: BTreeSet<(&'a str, &'a str)>,
    /// Deletes that this agent began and did not see the end of: snapshot and
    /// target.
    pub begun: BTreeSet<(&'a str, &'a str)>,
    /// Images that were written after they should have stood still, and which of
    /// those above them they hold part of.
    pub half: BTreeMap<&'a str, &'a [String]>,
    /// Files that this agent made for the VM, or had libvirt make.
    pub ours: BTreeSet<&'a str>,
}

/// The health of one snapshot, given all of them.
#[must_use]
pub fn of(snapshot: &Snapshot, all: &[Snapshot], disks: &[Disk], files: &Files<'_>) -> Health {
    if snapshot.disks.iter().all(|disk| disk.kind.is_none()) {
        return Health::MetadataOnly;
    }
    for covered in &snapshot.disks {
        let Some(data) = covered.data.as_deref() else {
            continue;
        };
        let target = covered.target.as_str();
        let known = Known {
            target,
            all,
            // Under another target by now, the disk is known by its images.
            disk: disks
                .iter()
                .find(|disk| !disk.only_read() && has(disk, data))
                .or_else(|| disks.iter().find(|disk| disk.target == target)),
            files,
        };
        match covered.kind {
            None => {}
            Some(_) if files.missing.contains(data) => {
                return Health::DataMissing(format!(
                    "'{data}', which holds the data of disk {target}, is missing"
                ));
            }
            Some(Kind::Internal) => {
                if let Some(internal) = files.images.get(data)
                    && !internal.contains(&snapshot.name)
                {
                    return Health::DataMissing(format!(
                        "the image '{data}' of disk {target} holds no internal snapshot of that \
                         name"
                    ));
                }
                // The image itself may go on being written: only what it stands
                // on has to stand still.
                let chain = known.chain(data);
                if let Some(problem) = known.newer(&chain, 1) {
                    return problem;
                }
            }
            Some(Kind::External | Kind::Mixed) => {
                if let Some(why) = files.broken.get(data) {
                    return Health::DataMissing(format!(
                        "the chain of '{data}' of disk {target} cannot be read: {why}"
                    ));
                }
                if known.half_merged(snapshot) {
                    return Health::Torn(format!(
                        "a merge into '{data}', which holds the data of disk {target}, was begun \
                         and is not finished"
                    ));
                }
                let chain = known.chain(data);
                if let Some(problem) = known.newer(&chain, 0) {
                    return problem;
                }
            }
        }
    }
    if let Memory::External(file) = &snapshot.memory
        && files.missing.contains(file.as_str())
    {
        return Health::MemoryMissing(format!("the memory file '{file}' is missing"));
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

/// Whether an image is among those of a disk.
fn has(disk: &Disk, image: &str) -> bool {
    disk.lies_on(image) || disk.chain.iter().any(|one| one.path == image)
}

/// What is known of one disk.
struct Known<'a> {
    target: &'a str,
    all: &'a [Snapshot],
    disk: Option<&'a Disk>,
    files: &'a Files<'a>,
}

impl<'a> Known<'a> {
    /// An image and all that it stands on, uppermost first.
    fn chain(&self, data: &'a str) -> Vec<&'a str> {
        let active = self.active();
        if let Some(at) = active.iter().position(|image| *image == data) {
            return active[at..].to_vec();
        }
        let below = self.files.below.get(data).copied().unwrap_or_default();
        std::iter::once(data)
            .chain(below.iter().map(String::as_str))
            .collect()
    }

    /// The VM's own chain.
    fn active(&self) -> Vec<&'a str> {
        self.disk
            .into_iter()
            .flat_map(|disk| &disk.chain)
            .map(|image| image.path.as_str())
            .collect()
    }

    /// What a snapshot holds of this disk in files of its own.
    fn external(&self, snapshot: &'a Snapshot) -> Option<&'a SnapshotDisk> {
        snapshot.disks.iter().find(|disk| {
            disk.target == self.target && matches!(disk.kind, Some(Kind::External | Kind::Mixed))
        })
    }

    /// The nearest ancestor that covers this disk too.
    fn parent(&self, snapshot: &Snapshot) -> Option<&'a Snapshot> {
        let mut name = snapshot.parent.as_deref()?;
        // A circle of parents has no more links than there are snapshots.
        for _ in self.all {
            let parent = self.all.iter().find(|one| one.name == name)?;
            if self.external(parent).is_some() {
                return Some(parent);
            }
            name = parent.parent.as_deref()?;
        }
        None
    }

    /// Whether a merge into the file that holds a snapshot's data was cut off.
    fn half_merged(&self, snapshot: &Snapshot) -> bool {
        if self
            .files
            .begun
            .contains(&(snapshot.name.as_str(), self.target))
        {
            return true;
        }
        let Some(parent) = self.parent(snapshot) else {
            return false;
        };
        if !self
            .files
            .deleting
            .contains(&(parent.name.as_str(), self.target))
        {
            return false;
        }
        // Only what the VM stood on can have been merged; where it stands
        // elsewhere by now, all children of the mark are in doubt.
        let active = self.active();
        let stands_on = |one: &Snapshot| {
            one.disks.iter().any(|disk| {
                disk.target == self.target
                    && disk
                        .data
                        .as_deref()
                        .is_some_and(|data| active.contains(&data))
            })
        };
        let siblings =
            |one: &&Snapshot| self.parent(one).is_some_and(|its| its.name == parent.name);
        stands_on(snapshot) || !self.all.iter().filter(siblings).any(stands_on)
    }

    /// Images that a snapshot or a revert put directly on the file that holds a
    /// snapshot's data.
    fn put_on(&self, data: &str) -> BTreeSet<&'a str> {
        let mut on = BTreeSet::new();
        for snapshot in self.all {
            let Some(of) = self.external(snapshot) else {
                continue;
            };
            if of.data.as_deref() == Some(data) {
                on.extend(of.overlay.as_deref());
                on.extend(
                    snapshot
                        .revert_overlays
                        .iter()
                        .filter(|(target, _)| target == self.target)
                        .map(|(_, overlay)| overlay.as_str()),
                );
            }
            // Made after a revert: what the revert put there holds its data.
            if self
                .parent(snapshot)
                .and_then(|parent| self.external(parent))
                .is_some_and(|parent| parent.data.as_deref() == Some(data))
            {
                on.extend(of.data.as_deref());
            }
        }
        on
    }

    /// Merges into `lower` that can be seen: the image that stands on it now,
    /// and what was between them where that is known.
    fn merges_into(&self, lower: &str) -> Vec<(&'a str, Option<BTreeSet<&'a str>>)> {
        let put_on = self.put_on(lower);
        if put_on.is_empty() {
            // It holds no snapshot's data; nobody expects it to stand still.
            return Vec::new();
        }
        let own = self
            .all
            .iter()
            .filter_map(|one| self.external(one)?.data.as_deref());
        let chains = std::iter::once(self.active()).chain(own.map(|data| self.chain(data)));
        let mut found: Vec<(&str, Option<BTreeSet<&str>>)> = Vec::new();
        for chain in chains {
            let Some(at) = chain.iter().position(|image| *image == lower) else {
                continue;
            };
            let Some(above) = at.checked_sub(1).map(|above| chain[above]) else {
                continue;
            };
            if put_on.contains(above)
                || found.iter().any(|(seen, _)| *seen == above)
                || (self.is_nameless(above, lower) && !self.is_put_on_any(above))
            {
                continue;
            }
            found.push((above, self.between(lower, above)));
        }
        found
    }

    /// Whether an image is the overlay of a revert that no metadata names any more,
    /// because all later snapshots were merged into it: this agent's journal knows
    /// it then, or the name that libvirt gives it. On the present one stood, if
    /// anything, the current snapshot, or any where none is current.
    fn is_nameless(&self, above: &str, lower: &str) -> bool {
        let present = self.disk.is_some_and(|disk| disk.path == above);
        let current = self.all.iter().any(|one| one.current);
        self.all.iter().any(|one| {
            let Some(of) = self.external(one) else {
                return false;
            };
            let named = is_revert_overlay(above, lower, one.created.as_second());
            of.data.as_deref() == Some(lower)
                && if present {
                    (one.current || !current)
                        && (named || self.files.ours.contains(above))
                        && self.own_is_elsewhere(one, of)
                } else {
                    named
                }
        })
    }

    /// Whether the overlay that libvirt names for a snapshot is not that of the
    /// present state: the data of a child lies in it, or it went with that child.
    /// Else it was merged.
    fn own_is_elsewhere(&self, snapshot: &Snapshot, of: &SnapshotDisk) -> bool {
        let Some(own) = of.overlay.as_deref() else {
            return false;
        };
        self.files.missing.contains(own)
            || self
                .all
                .iter()
                .filter(|child| child.parent.as_ref() == Some(&snapshot.name))
                .flat_map(|child| &child.disks)
                .any(|disk| disk.target == self.target && disk.data.as_deref() == Some(own))
    }

    /// Whether a snapshot or a revert put an image on some image that is known.
    fn is_put_on_any(&self, image: &str) -> bool {
        self.all
            .iter()
            .filter_map(|one| self.external(one)?.data.as_deref())
            .any(|data| self.put_on(data).contains(image))
    }

    /// Images that were between two of a chain, by what put them there.
    fn between(&self, lower: &str, upper: &str) -> Option<BTreeSet<&'a str>> {
        let mut ways: Vec<(&str, BTreeSet<&str>)> = self
            .put_on(lower)
            .into_iter()
            .map(|image| (image, BTreeSet::from([image])))
            .collect();
        while let Some((image, passed)) = ways.pop() {
            for next in self.put_on(image) {
                if next == upper {
                    return Some(passed);
                }
                let mut further = passed.clone();
                if further.insert(next) {
                    ways.push((next, further));
                }
            }
        }
        None
    }

    /// Why something newer is seen through one of the images from `from` on.
    fn newer(&self, chain: &[&str], from: usize) -> Option<Health> {
        // What is only read is not written, wherever the VM has it.
        if self.disk.is_some_and(Disk::only_read) {
            return None;
        }
        let target = self.target;
        for (at, image) in chain.iter().enumerate().skip(from) {
            if self.disk.is_some_and(|disk| disk.lies_on(image)) {
                return Some(Health::MergedAway(format!(
                    "disk {target} of the VM lies on '{image}' itself, which should have stood \
                     still"
                )));
            }
            if self
                .disk
                .is_some_and(|disk| disk.merging_into.as_deref() == Some(*image))
            {
                return Some(Health::Torn(format!(
                    "an open block job is merging disk {target} into '{image}'"
                )));
            }
            let unseen = |from: &&String| !chain[..at].contains(&from.as_str());
            let half = self.files.half.get(image).copied().unwrap_or_default();
            if let Some(from) = half.iter().find(unseen) {
                return Some(Health::Torn(format!(
                    "'{image}' was written after it should have stood still, and holds part of \
                     '{from}' on disk {target}: a merge was cut off"
                )));
            }
            let through = at.checked_sub(1).map(|above| chain[above]);
            for (above, merged) in self.merges_into(image) {
                let sees_all = through == Some(above)
                    || merged.is_some_and(|merged| {
                        merged.iter().all(|image| chain[..at].contains(image))
                    });
                if !sees_all {
                    return Some(Health::MergedAway(format!(
                        "the overlay of disk {target} over '{image}' was merged; '{above}' stands \
                         on it now"
                    )));
                }
            }
        }
        None
    }
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
