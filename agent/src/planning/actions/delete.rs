//! Deleting snapshots: the one place that knows in which order they can go and
//! which files that writes and removes. Commit and cleanup both use it.
//!
//! Deleting an external snapshot merges: the data written since goes down into
//! the file that held the snapshot, and the overlay is removed.
//!
//! Invariants: no file that another VM's chain uses is written or removed;
//! nothing is drafted that this libvirt cannot do or that crashes it.

use crate::planning::{
    actions::{checks, mergeable},
    facts::{Facts, Health, Image, Kind, Memory, Snapshot, SnapshotDisk, VmState},
    files,
    outcome::Verdict,
    plan::Draft,
    reason::{Fault, Reason},
    step::Step,
    tree,
};

/// Drafts the deletion of one snapshot that was named.
///
/// # Errors
/// The refusal.
pub fn named(
    name: &str,
    rule: &str,
    bandwidth: Option<u64>,
    facts: &Facts,
    draft: &mut Draft,
) -> Result<(), Fault> {
    let snapshot = checks::find(facts, name)?;
    in_order(&[snapshot], rule, bandwidth, facts, draft)
}

/// Drafts the deletion of several snapshots, in the order given.
///
/// # Errors
/// The refusal.
pub fn in_order(
    snapshots: &[&Snapshot],
    rule: &str,
    bandwidth: Option<u64>,
    facts: &Facts,
    draft: &mut Draft,
) -> Result<(), Fault> {
    let mut seen = facts.clone();
    // A merge that was cut off is finished before anything else is merged.
    let torn = |one: &&&Snapshot| {
        matches!(one.health, Health::Torn(_)) && tree::is_on_active_path(facts, &one.name)
    };
    let first = snapshots.iter().filter(torn);
    let then = snapshots.iter().filter(|one| !torn(one));
    for snapshot in first.chain(then) {
        let step = one(&snapshot.name, rule, bandwidth, &seen)?;
        add(step, snapshot, rule, bandwidth, &seen, draft);
        forget(&mut seen, &snapshot.name);
    }
    Ok(())
}

/// A snapshot that was to go and stays, and why.
#[derive(Debug)]
pub struct Stays<'a> {
    /// The snapshot.
    pub snapshot: &'a Snapshot,
    /// Why it cannot go.
    pub because: Fault,
}

/// Drafts the deletion of those of several snapshots that can be deleted, each
/// with its rule, in an order that works; returns those that stay. A snapshot
/// is tried again after others went, because it may have been held by them.
pub fn as_many_as_possible<'a>(
    snapshots: &[(&'a Snapshot, String)],
    bandwidth: Option<u64>,
    facts: &Facts,
    draft: &mut Draft,
) -> Vec<Stays<'a>> {
    let mut seen = facts.clone();
    // Parents come before children in the facts: the last ones are leaves.
    let mut left: Vec<&(&Snapshot, String)> = snapshots.iter().rev().collect();
    loop {
        let mut stay = Vec::new();
        let mut reasons = Vec::new();
        let before = left.len();
        for &entry in &left {
            let (snapshot, rule) = entry;
            match one(&snapshot.name, rule, bandwidth, &seen) {
                Ok(step) => {
                    add(step, snapshot, rule, bandwidth, &seen, draft);
                    forget(&mut seen, &snapshot.name);
                }
                Err(because) => {
                    stay.push(entry);
                    reasons.push(Stays { snapshot, because });
                }
            }
        }
        if stay.is_empty() || stay.len() == before {
            return reasons;
        }
        left = stay;
    }
}

fn add(
    step: Step,
    snapshot: &Snapshot,
    rule: &str,
    limit: Option<u64>,
    facts: &Facts,
    draft: &mut Draft,
) {
    if let (
        Some(limit),
        Step::DeleteSnapshot {
            bandwidth: None,
            metadata_only: false,
            disks,
            ..
        },
    ) = (limit, &step)
        && !disks.is_empty()
        && tree::is_on_active_path(facts, &snapshot.name)
    {
        draft.warn(
            "LIMIT_NOT_KEPT",
            format!(
                "libvirt merges snapshot '{}' without the limit of {limit} bytes per second: one \
                 can be kept only for the newest snapshot of the present state, while the VM is on",
                snapshot.name
            ),
            "",
        );
    }
    if matches!(
        step,
        Step::DeleteSnapshot {
            metadata_only: true,
            ..
        }
    ) {
        let left: Vec<&str> = overlays_of(snapshot)
            .map(String::as_str)
            .filter(|path| files::exists(facts, path) == Some(true))
            .collect();
        if !left.is_empty() {
            draft.warn(
                "OVERLAY_STAYS",
                format!(
                    "libvirt only takes snapshot '{}' off its list; {} stays, because nobody can \
                     tell whether all that it holds was merged",
                    snapshot.name,
                    left.join(", ")
                ),
                "where nothing in it is missed, a cleanup with orphans: delete removes it if this \
                 agent made it",
            );
        }
    }
    draft.push(step);
    draft.change(
        format!("snapshot.{}", snapshot.name),
        Some(snapshot.kind.name().into()),
        None,
    );
    draft.verdicts.push(Verdict {
        name: snapshot.name.clone(),
        what: "snapshot".into(),
        removed: true,
        rule: rule.into(),
        size: snapshot.size,
    });
}

/// The facts as they will be once a snapshot was deleted: its children hang on
/// its parent, and what the overlay above its data held lies in that data.
fn forget(facts: &mut Facts, name: &str) {
    let Some(at) = facts.snapshots.iter().position(|one| one.name == name) else {
        return;
    };
    let on_path = tree::is_on_active_path(facts, name);
    let metadata_only = is_metadata_only(&facts.snapshots[at], facts);
    // All that stands on its data goes down into it.
    let newest = facts.snapshots[at].current && tree::children(facts, name).is_empty();
    let gone = facts.snapshots.remove(at);
    let merged = gone.kind != Kind::Internal && !metadata_only;
    for disk in gone.disks.iter().filter(|_| merged) {
        let Some(data) = &disk.data else { continue };
        // What the children hold lies one image lower from now on.
        for child in facts
            .snapshots
            .iter_mut()
            .filter(|one| one.parent.as_deref() == Some(name))
        {
            for of in child.disks.iter_mut().filter(|of| of.target == disk.target) {
                of.data = Some(data.clone());
            }
        }
        let Some(vm) = facts
            .vm
            .disks
            .iter_mut()
            .find(|vm| on_path && vm.target == disk.target)
        else {
            continue;
        };
        if let Some(lower) = vm.chain.iter().position(|image| image.path == *data)
            && lower > 0
        {
            let first = if newest { 0 } else { lower - 1 };
            let upper: Vec<Image> = vm.chain.drain(first..lower).collect();
            let lower = &mut vm.chain[first];
            for image in upper.iter().rev() {
                lower.actual_size = lower.actual_size.saturating_add(image.actual_size);
                lower.virtual_size = image.virtual_size;
            }
            if first == 0 {
                vm.path.clone_from(data);
            }
        }
    }
    for child in facts
        .snapshots
        .iter_mut()
        .filter(|one| one.parent.as_deref() == Some(name))
    {
        child.parent.clone_from(&gone.parent);
    }
    if gone.current
        && let Some(parent) = gone.parent.as_deref()
        && let Some(parent) = facts.snapshots.iter_mut().find(|one| one.name == parent)
    {
        parent.current = true;
    }
}

/// Checks and drafts the deletion of one snapshot.
fn one(name: &str, rule: &str, bandwidth: Option<u64>, facts: &Facts) -> Result<Step, Fault> {
    // Merged into the wrong image, or thrown away with the overlay that is not
    // named any more, data would be lost.
    checks::definition_agrees(facts)?;
    let snapshot = checks::find(facts, name)?;
    if let Some(deadline) = snapshot.guard {
        return Err(Fault::new(
            Reason::SnapshotGuarded,
            format!(
                "snapshot '{}' guards a change that must be confirmed until {deadline}; confirm \
                 it first",
                snapshot.name
            ),
        )
        .with("snapshot", &snapshot.name));
    }
    let metadata_only = is_metadata_only(snapshot, facts);
    let external = snapshot.kind != Kind::Internal;
    let children = tree::children(facts, &snapshot.name);
    let mut files = own_files(snapshot);
    let mut driven = None;
    if metadata_only {
        // libvirt leaves them. Ours go, unless somebody stands on them; not so
        // overlays, which may hold what was never merged: they become orphans.
        let ours = snapshot.record.is_some();
        files.retain(|file| {
            ours && overlays_of(snapshot).all(|overlay| overlay != file)
                && checks::not_shared(facts, [file.as_str()]).is_ok()
        });
    }
    if !metadata_only && external {
        files.extend(left_behind(snapshot, &children, facts));
        mergeable::check(snapshot, &children, facts)?;
        driven = mergeable::drives(snapshot, &children, bandwidth, facts)?;
        if driven.is_some() {
            files.extend(mergeable::merged_by_hand(snapshot, facts));
        }
        // What the snapshot left out, such as a medium that others read too, is
        // not written.
        let written = snapshot
            .disks
            .iter()
            .filter(|disk| disk.kind.is_some())
            .filter_map(|disk| disk.data.as_deref());
        checks::not_shared(
            facts,
            written
                .chain(files.iter().map(String::as_str))
                .collect::<Vec<_>>(),
        )?;
        mergeable::lower_writable(snapshot, facts)?;
        mergeable::merge_fits(snapshot, facts)?;
    }
    if snapshot.kind == Kind::Internal && !metadata_only {
        mergeable::internal_deletable(snapshot, facts)?;
        checks::not_shared(
            facts,
            snapshot
                .disks
                .iter()
                .filter(|disk| disk.kind.is_some())
                .filter_map(|disk| disk.data.as_deref()),
        )?;
    }
    let merges = external
        && !metadata_only
        && (tree::is_on_active_path(facts, &snapshot.name) || !children.is_empty());
    Ok(Step::DeleteSnapshot {
        name: snapshot.name.clone(),
        metadata_only,
        disks: if external && !metadata_only {
            snapshot
                .disks
                .iter()
                .filter(|disk| disk.kind.is_some())
                .map(|disk| disk.target.clone())
                .collect()
        } else {
            Vec::new()
        },
        boots_helper: merges && facts.vm.state == VmState::Stopped,
        bandwidth: driven,
        files,
        rule: rule.to_owned(),
        size: snapshot.size,
    })
}

/// Whether only libvirt's entry of a snapshot can go: there is nothing that it
/// could merge.
fn is_metadata_only(snapshot: &Snapshot, facts: &Facts) -> bool {
    match snapshot.health {
        Health::MergedAway(_) | Health::MetadataOnly => true,
        // libvirt knows how to finish what it began, unless all is merged already.
        Health::Torn(_) => snapshot.disks.iter().any(|disk| {
            let vm = facts.vm.disks.iter().find(|vm| vm.target == disk.target);
            disk.kind.is_some() && vm.is_some_and(|vm| Some(&vm.path) == disk.data.as_ref())
        }),
        Health::Whole | Health::DataMissing(_) | Health::MemoryMissing(_) => {
            snapshot.kind != Kind::Internal
                && tree::is_on_active_path(facts, &snapshot.name)
                && snapshot.disks.iter().any(|disk| off_chain(disk, facts))
        }
    }
}

/// Whether the present state does not stand on the data of a disk, although the
/// tree says that it descends from it: libvirt finds nothing to merge then.
fn off_chain(disk: &SnapshotDisk, facts: &Facts) -> bool {
    let vm = facts.vm.disks.iter().find(|vm| vm.target == disk.target);
    match (vm, &disk.data) {
        (Some(vm), Some(data)) if disk.kind.is_some() && !vm.chain.is_empty() => {
            vm.chain.iter().all(|image| image.path != *data)
        }
        _ => false,
    }
}

/// Overlays that a snapshot made.
pub fn overlays_of(snapshot: &Snapshot) -> impl Iterator<Item = &String> {
    snapshot
        .disks
        .iter()
        .filter_map(|disk| disk.overlay.as_ref())
}

/// Files that belong to a snapshot beside its disks' data.
fn own_files(snapshot: &Snapshot) -> Vec<String> {
    let mut files: Vec<String> = overlays_of(snapshot).cloned().collect();
    if let Memory::External(file) = &snapshot.memory {
        files.push(file.clone());
    }
    files.extend(
        snapshot
            .record
            .as_ref()
            .and_then(|record| record.nvram_copy.clone()),
    );
    files
}

/// Overlays that libvirt forgets. It put one on the data of a snapshot that was
/// reverted to, a later snapshot froze it, and another revert left that one on a
/// side branch: deleting it removes its own overlay alone. Only those that this
/// agent had made are meant, never a disk that was there before.
fn left_behind(snapshot: &Snapshot, children: &[&Snapshot], facts: &Facts) -> Vec<String> {
    if !children.is_empty() || tree::is_on_active_path(facts, &snapshot.name) {
        return Vec::new();
    }
    snapshot
        .disks
        .iter()
        .filter_map(|disk| disk.data.as_ref())
        .filter(|data| facts.ours.contains(*data))
        .filter(|data| {
            let in_use = facts
                .vm
                .disks
                .iter()
                .flat_map(|disk| &disk.chain)
                .any(|image| image.path == **data);
            let held = facts
                .snapshots
                .iter()
                .filter(|other| other.name != snapshot.name)
                .flat_map(|other| &other.disks)
                .any(|disk| disk.data.as_ref() == Some(*data));
            !in_use && !held
        })
        .cloned()
        .collect()
}
