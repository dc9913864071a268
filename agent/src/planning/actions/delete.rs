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
    facts::{Facts, Health, Kind, Memory, Snapshot, VmState, folder_of},
    names,
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
    for snapshot in snapshots {
        let step = one(&snapshot.name, rule, bandwidth, &seen)?;
        add(step, snapshot, rule, draft);
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
                    add(step, snapshot, rule, draft);
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

fn add(step: Step, snapshot: &Snapshot, rule: &str, draft: &mut Draft) {
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
    let gone = facts.snapshots.remove(at);
    let merged = gone.kind != Kind::Internal
        && !matches!(gone.health, Health::MergedAway(_) | Health::MetadataOnly);
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
    let metadata_only = matches!(
        snapshot.health,
        Health::MergedAway(_) | Health::MetadataOnly
    );
    let external = snapshot.kind != Kind::Internal;
    let children = tree::children(facts, &snapshot.name);
    let mut files = own_files(snapshot);
    if metadata_only {
        // libvirt leaves them; ours go, unless somebody stands on them.
        let ours = snapshot.record.is_some();
        files.retain(|file| ours && checks::not_shared(facts, [file.as_str()]).is_ok());
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
        bandwidth,
        files,
        rule: rule.to_owned(),
        size: snapshot.size,
    })
}

/// Files that belong to a snapshot beside its disks' data.
fn own_files(snapshot: &Snapshot) -> Vec<String> {
    let mut files: Vec<String> = snapshot
        .disks
        .iter()
        .filter_map(|disk| disk.overlay.clone())
        .collect();
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
    if children.len() > 1 {
        let names: Vec<&str> = children.iter().map(|child| child.name.as_str()).collect();
        return Err(Fault::new(
            Reason::SnapshotBranches,
            format!(
                "snapshot '{}' has {} children ({}), and libvirt cannot merge into several; \
                 delete all but one of them first, each after its own children",
                snapshot.name,
                names.len(),
                names.join(", ")
            ),
        )
        .with("snapshot", &snapshot.name)
        .with("branches", names.join(",")));
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
        let names: Vec<&str> = children.iter().map(|child| child.name.as_str()).collect();
        return Err(Fault::new(
            Reason::SnapshotBranches,
            format!(
                "the present state stands on snapshot '{}' beside {}, and libvirt cannot merge \
                 under both; delete {} first, each after its own children",
                snapshot.name,
                names.join(", "),
                names.join(", ")
            ),
        )
        .with("snapshot", &snapshot.name)
        .with("branches", names.join(",")));
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
                 merge it; delete '{}' first while the VM is off",
                snapshot.name, parent.name, parent.name
            ),
        ));
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
        ));
    }
    // Deleting a snapshot while another branch stands on its files crashes libvirt
    // 11.3 where that snapshot and its child were both made while the VM was off;
    // of a VM that is off nothing is risked.
    let off_twice = snapshot.made_off && children.iter().any(|child| child.made_off);
    if off_twice || facts.vm.state == VmState::Stopped {
        let path = tree::active_path(facts);
        let side = facts.snapshots.iter().find(|other| {
            other.name != snapshot.name
                && !path.iter().any(|on| on.name == other.name)
                && tree::descendants_leaf_first(facts, &snapshot.name)
                    .iter()
                    .any(|below| below.name == other.name)
        });
        if let Some(side) = side {
            return Err(Fault::new(
                Reason::SnapshotBranches,
                format!(
                    "snapshot '{}' is on another branch of VM '{}' that stands on '{}', and {}; \
                     libvirt crashes on that: {}delete '{}' first",
                    side.name,
                    facts.vm.name,
                    snapshot.name,
                    if off_twice {
                        "that and its child were made while the VM was off"
                    } else {
                        "the VM is off"
                    },
                    if off_twice {
                        ""
                    } else {
                        "start the VM first, or "
                    },
                    side.name
                ),
            )
            .with("snapshot", &snapshot.name)
            .with("branches", &side.name));
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
            ));
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
        // What its internal snapshots hold is never written over.
        let room = if lower.internal.is_empty() {
            lower
                .virtual_size
                .max(above.virtual_size)
                .saturating_sub(lower.actual_size)
        } else {
            u64::MAX
        };
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
