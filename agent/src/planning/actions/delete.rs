//! Deleting snapshots: the one place that knows in which order they can go and
//! which files that writes and removes. Commit and cleanup both use it.
//!
//! Deleting an external snapshot merges: the data written since goes down into
//! the file that held the snapshot, and the overlay is removed.
//!
//! Invariants: no file that another VM's chain uses is written or removed;
//! nothing is drafted that this libvirt cannot do or that crashes it.

use std::collections::BTreeMap;

use crate::planning::{
    actions::checks,
    facts::{Facts, Health, Kind, Memory, Snapshot, SnapshotDisk, VmState, folder_of},
    files, names,
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
            let upper = vm.chain.remove(lower - 1);
            let lower = &mut vm.chain[lower - 1];
            lower.actual_size = lower.actual_size.saturating_add(upper.actual_size);
            lower.virtual_size = upper.virtual_size;
            if vm.path == upper.path {
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
        mergeable(snapshot, &children, facts)?;
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
        lower_writable(snapshot, facts)?;
        merge_fits(snapshot, facts)?;
    }
    if snapshot.kind == Kind::Internal && !metadata_only {
        internal_deletable(snapshot, facts)?;
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
        bandwidth: bandwidth.filter(|_| takes_limit(snapshot, &children, facts)),
        files,
        rule: rule.to_owned(),
        size: snapshot.size,
    })
}

/// Whether the merge of a snapshot can be driven under a limit: libvirt's own
/// delete takes none, so it has to be the newest of the present state, on a VM
/// that is on. What libvirt began and did not finish it has to finish itself.
fn takes_limit(snapshot: &Snapshot, children: &[&Snapshot], facts: &Facts) -> bool {
    let covered = || snapshot.disks.iter().filter(|disk| disk.kind.is_some());
    snapshot.kind != Kind::Internal
        && snapshot.health == Health::Whole
        && snapshot.current
        && children.is_empty()
        && facts.vm.state != VmState::Stopped
        && covered().next().is_some()
        && covered().all(|disk| {
            facts
                .vm
                .disks
                .iter()
                .find(|vm| vm.target == disk.target)
                .filter(|vm| vm.writable())
                .and_then(|vm| vm.chain.get(1))
                .is_some_and(|below| Some(&below.path) == disk.data.as_ref())
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
        Health::Whole | Health::DataMissing(_) => {
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

fn mergeable(snapshot: &Snapshot, children: &[&Snapshot], facts: &Facts) -> Result<(), Fault> {
    if !facts.host.deletes_external() {
        return Err(Fault::new(
            Reason::KindUnsupported,
            "this host's libvirt cannot delete external snapshots; 9.0 or newer can".to_owned(),
        ));
    }
    if !children.is_empty() && !tree::is_on_active_path(facts, &snapshot.name) {
        return Err(in_the_way(
            snapshot,
            children,
            facts,
            format!(
                "the present state of VM '{}' does not descend from snapshot '{}', and libvirt \
                 deletes such a snapshot only when it has no children",
                facts.vm.name, snapshot.name
            ),
        ));
    }
    if !children.is_empty() && !tree::is_on_active_path(facts, &snapshot.name) {
        let order: Vec<&str> = tree::descendants_leaf_first(facts, &snapshot.name)
            .into_iter()
            .map(|below| below.name.as_str())
            .collect();
        return Err(Fault::new(
            Reason::SnapshotBranches,
            format!(
                "snapshot '{}' is on a branch that the present state does not stand on, and \
                 libvirt deletes only from its end: delete {} first, in this order",
                snapshot.name,
                order.join(", ")
            ),
        )
        .with("snapshot", &snapshot.name)
        .with("branches", order.join(",")));
    }
    if snapshot.current && !children.is_empty() {
        return Err(in_the_way(
            snapshot,
            children,
            facts,
            format!(
                "the present state stands on snapshot '{}' beside {}, and libvirt cannot merge \
                 under both",
                snapshot.name,
                names_of(children)
            ),
        ));
    }
    if children.len() > 1 {
        // The one that the present state descends from may stay.
        let others: Vec<&Snapshot> = children
            .iter()
            .filter(|child| !tree::is_on_active_path(facts, &child.name))
            .copied()
            .collect();
        return Err(in_the_way(
            snapshot,
            &others,
            facts,
            format!(
                "snapshot '{}' has {} children ({}), and libvirt cannot merge into several",
                snapshot.name,
                children.len(),
                names_of(children)
            ),
        ));
    }
    if let Some(parent) = snapshot
        .parent
        .as_deref()
        .and_then(|name| facts.snapshot(name))
        && parent.kind == Kind::Internal
    {
        return Err(Fault::new(
            Reason::KindsMixed,
            format!(
                "external snapshot '{}' stands on the internal snapshot '{}', and libvirt cannot \
                 merge it; delete '{}' first, while the VM is off",
                snapshot.name, parent.name, parent.name
            ),
        )
        .with("snapshot", &snapshot.name)
        .with("order", &parent.name));
    }
    media_merge(snapshot, facts)?;
    if let Some(internal) = inner_internal(snapshot, facts) {
        return Err(Fault::new(
            Reason::KindsMixed,
            format!(
                "the overlay of snapshot '{}' holds the internal snapshot '{internal}', which \
                 would be lost with it; delete '{internal}' first",
                snapshot.name
            ),
        )
        .with("snapshot", &snapshot.name)
        .with("order", internal));
    }
    // Deleting a snapshot of a VM that is off while another branch stands on its
    // files crashes libvirt 11.3.
    if facts.vm.state == VmState::Stopped {
        let path = tree::active_path(facts);
        let side: Vec<&str> = tree::descendants_leaf_first(facts, &snapshot.name)
            .into_iter()
            .map(|below| below.name.as_str())
            .filter(|below| !path.iter().any(|on| on.name == *below))
            .collect();
        if !side.is_empty() {
            return Err(Fault::new(
                Reason::SnapshotBranches,
                format!(
                    "VM '{}' is off and other branches stand on snapshot '{}'; libvirt crashes on \
                     that: start the VM first, or delete {} first{}",
                    facts.vm.name,
                    snapshot.name,
                    side.join(", "),
                    in_this_order(&side)
                ),
            )
            .with("snapshot", &snapshot.name)
            .with("branches", side.join(","))
            .with("order", side.join(",")));
        }
    }
    Ok(())
}

/// After a revert a drive runs on an overlay of its medium, which libvirt merges
/// when the snapshot is deleted: it has to be in the drive still.
fn media_merge(snapshot: &Snapshot, facts: &Facts) -> Result<(), Fault> {
    if !tree::is_on_active_path(facts, &snapshot.name) {
        return Ok(());
    }
    for disk in snapshot.disks.iter().filter(|disk| disk.kind.is_some()) {
        let drive = facts
            .vm
            .disks
            .iter()
            .find(|drive| drive.target == disk.target && drive.only_read());
        if let (Some(drive), Some(data)) = (drive, &disk.data)
            && !drive.chain.iter().skip(1).any(|image| image.path == *data)
        {
            return Err(Fault::new(
                Reason::MediaNotCovered,
                format!(
                    "since the revert to snapshot '{}' the medium '{data}' was taken out of drive \
                     {}, or changed, and libvirt then cannot delete the snapshot; revert to it \
                     once more, and delete it before the medium is changed",
                    snapshot.name, disk.target
                ),
            )
            .with("snapshot", &snapshot.name)
            .with("disk", &disk.target)
            .with("medium", data));
        }
    }
    Ok(())
}

fn names_of(snapshots: &[&Snapshot]) -> String {
    let names: Vec<&str> = snapshots.iter().map(|one| one.name.as_str()).collect();
    names.join(", ")
}

fn in_this_order(names: &[&str]) -> &'static str {
    if names.len() > 1 {
        ", in this order"
    } else {
        ""
    }
}

/// The refusal to delete a snapshot on which others stand, with what has to go
/// before, in an order that works.
fn in_the_way(snapshot: &Snapshot, others: &[&Snapshot], facts: &Facts, problem: String) -> Fault {
    let order: Vec<&str> = others
        .iter()
        .flat_map(|other| {
            let mut names = tree::descendants_leaf_first(facts, &other.name);
            names.push(other);
            names
        })
        .map(|one| one.name.as_str())
        .collect();
    Fault::new(
        Reason::SnapshotBranches,
        format!(
            "{problem}; delete {} first{}",
            order.join(", "),
            in_this_order(&order)
        ),
    )
    .with("snapshot", &snapshot.name)
    .with("branches", names_of(others).replace(", ", ","))
    .with("order", order.join(","))
}

/// An internal snapshot that lies in an overlay of an external one.
fn inner_internal<'a>(snapshot: &Snapshot, facts: &'a Facts) -> Option<&'a str> {
    facts
        .snapshots
        .iter()
        .filter(|other| other.kind == Kind::Internal)
        .find(|other| {
            other.disks.iter().any(|disk| {
                snapshot
                    .disks
                    .iter()
                    .any(|own| own.overlay.is_some() && own.overlay == disk.data)
            })
        })
        .map(|other| other.name.as_str())
}

fn internal_deletable(snapshot: &Snapshot, facts: &Facts) -> Result<(), Fault> {
    if facts.vm.state == VmState::Stopped {
        return Ok(());
    }
    if !names::is_job_id(&snapshot.name) {
        return Err(Fault::new(
            Reason::DomainState,
            format!(
                "internal snapshot '{}' can be deleted only while VM '{}' is off: QEMU makes its \
                 name part of a job's id, in which only letters, digits, '-', '.' and '_' are \
                 allowed",
                snapshot.name.escape_debug(),
                facts.vm.name
            ),
        )
        .with("snapshot", &snapshot.name)
        .with("state", facts.vm.state.name()));
    }
    for disk in &snapshot.disks {
        let active = facts.vm.disks.iter().find(|vm| vm.target == disk.target);
        if let (Some(data), Some(active)) = (&disk.data, active)
            && active.path != *data
        {
            return Err(Fault::new(
                Reason::KindsMixed,
                format!(
                    "internal snapshot '{}' lies in '{data}', but disk {} runs on '{}' now; stop \
                     the VM to delete it",
                    snapshot.name, disk.target, active.path
                ),
            )
            .with("snapshot", &snapshot.name)
            .with("image", data)
            .with("state_needed", VmState::Stopped.name()));
        }
    }
    Ok(())
}

/// A merge writes into the image that holds the snapshot's data.
fn lower_writable(snapshot: &Snapshot, facts: &Facts) -> Result<(), Fault> {
    if !tree::is_on_active_path(facts, &snapshot.name) {
        return Ok(());
    }
    let written = snapshot
        .disks
        .iter()
        .filter(|disk| disk.kind.is_some())
        .filter_map(|disk| disk.data.as_deref());
    for data in written {
        if facts
            .folders
            .get(folder_of(data))
            .is_some_and(|folder| !folder.writable)
        {
            return Err(Fault::new(
                Reason::StorageNotWritable,
                format!(
                    "deleting snapshot '{}' would merge into '{data}', and its folder is mounted \
                     read-only",
                    snapshot.name
                ),
            )
            .with("snapshot", &snapshot.name)
            .with("path", data));
        }
    }
    Ok(())
}

/// A merge makes the lower image grow by what the overlay holds, at most to its
/// virtual size. The overlays of all disks are merged before the first is removed.
fn merge_fits(snapshot: &Snapshot, facts: &Facts) -> Result<(), Fault> {
    let mut needs: BTreeMap<&str, (u64, &str)> = BTreeMap::new();
    for disk in &snapshot.disks {
        let Some(vm) = facts.vm.disks.iter().find(|vm| vm.target == disk.target) else {
            continue;
        };
        let Some(data) = disk.data.as_deref() else {
            continue;
        };
        let Some(at) = vm.chain.iter().position(|image| image.path == data) else {
            continue;
        };
        let Some(above) = at.checked_sub(1).map(|above| &vm.chain[above]) else {
            continue;
        };
        let lower = &vm.chain[at];
        let room = lower
            .virtual_size
            .max(above.virtual_size)
            .saturating_sub(lower.actual_size);
        let (need, image) = needs.entry(folder_of(data)).or_insert((0, data));
        *need = need.saturating_add(above.actual_size.min(room));
        *image = data;
    }
    for (path, (need, image)) in needs {
        if let Some(folder) = facts.folders.get(path)
            && folder.free < need
        {
            return Err(
                crate::planning::files::no_space(facts, path, need, folder.free)
                    .with("image", image),
            );
        }
    }
    Ok(())
}
