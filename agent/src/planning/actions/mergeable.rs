//! What a delete merges: whether libvirt can, what has to go before where it
//! cannot, and which merges the agent drives itself.
//!
//! Invariants: nothing is let through that this libvirt cannot do or that crashes
//! it; a refusal names what would help, in an order that works.

use std::collections::BTreeMap;

use crate::planning::{
    facts::{Disk, Facts, Health, Kind, Snapshot, SnapshotDisk, VmState, folder_of},
    files, lineage, names,
    reason::{Fault, Reason},
    tree,
};

/// At how many bytes per second the agent drives the merge of a snapshot itself,
/// 0 for as fast as it goes; `None` where libvirt's own delete merges.
///
/// libvirt's delete takes no limit, and it cannot merge across an overlay that no
/// snapshot knows. Both can be done for the newest snapshot of the present state
/// while the VM is on: all that stands on its data is the present state's alone.
///
/// # Errors
/// When an overlay is in the way and it is not the newest, or the VM is off.
pub fn drives(
    snapshot: &Snapshot,
    children: &[&Snapshot],
    bandwidth: Option<u64>,
    facts: &Facts,
) -> Result<Option<u64>, Fault> {
    // What libvirt began and did not finish it finishes itself.
    if matches!(snapshot.health, Health::Torn(_)) || !tree::is_on_active_path(facts, &snapshot.name)
    {
        return Ok(None);
    }
    let unknown = unknown_overlays(snapshot, children, facts);
    if let Some(first) = unknown.first() {
        let problem = format!(
            "on the data of snapshot '{}' lies the overlay '{first}', which no snapshot knows, and \
             libvirt cannot merge across it",
            snapshot.name
        );
        if !children.is_empty() {
            return Err(in_the_way(snapshot, children, facts, problem));
        }
        if facts.vm.state == VmState::Stopped {
            return Err(Fault::new(
                Reason::DomainNotRunning,
                format!(
                    "{problem}; start VM '{}', or set start_if_stopped",
                    facts.vm.name
                ),
            )
            .with("snapshot", &snapshot.name)
            .with("path", first)
            .with("state_needed", VmState::Running.name()));
        }
    }
    let drivable = snapshot.current
        && children.is_empty()
        && facts.vm.state != VmState::Stopped
        && covered(snapshot).next().is_some()
        && covered(snapshot).all(|disk| {
            facts
                .vm
                .disks
                .iter()
                .find(|vm| vm.target == disk.target)
                .filter(|vm| vm.writable())
                .is_some_and(|vm| place(vm, disk.data.as_deref()).is_some_and(|at| at > 0))
        });
    Ok(match bandwidth {
        _ if !drivable => None,
        None if unknown.is_empty() => None,
        limit => Some(limit.unwrap_or(0)),
    })
}

/// Images that nobody needs once the agent has merged all that stands on a
/// snapshot's data: those of a revert to it, and those that the agent made.
pub fn merged_by_hand(snapshot: &Snapshot, facts: &Facts) -> Vec<String> {
    covered(snapshot)
        .filter_map(|disk| {
            let vm = facts.vm.disks.iter().find(|vm| vm.target == disk.target)?;
            vm.chain.get(..place(vm, disk.data.as_deref())?)
        })
        .flatten()
        .map(|image| &image.path)
        .filter(|path| {
            facts.ours.contains(*path)
                || snapshot
                    .revert_overlays
                    .iter()
                    .any(|(_, overlay)| overlay == *path)
        })
        .cloned()
        .collect()
}

/// Disks of which a snapshot keeps something.
pub fn covered(snapshot: &Snapshot) -> impl Iterator<Item = &SnapshotDisk> {
    snapshot.disks.iter().filter(|disk| disk.kind.is_some())
}

/// Where an image is in a disk's chain.
fn place(vm: &Disk, image: Option<&str>) -> Option<usize> {
    vm.chain
        .iter()
        .position(|one| Some(one.path.as_str()) == image)
}

/// Overlays between the data of a snapshot and what libvirt expects to stand on
/// it: the data of its child, or the active image.
fn unknown_overlays<'a>(
    snapshot: &Snapshot,
    children: &[&Snapshot],
    facts: &'a Facts,
) -> Vec<&'a str> {
    let mut unknown = Vec::new();
    for disk in covered(snapshot) {
        let Some(vm) = facts.vm.disks.iter().find(|vm| vm.target == disk.target) else {
            continue;
        };
        let Some(data) = place(vm, disk.data.as_deref()) else {
            continue;
        };
        let upper = match children.first() {
            Some(child) => child
                .disks
                .iter()
                .find(|of| of.target == disk.target)
                .and_then(|of| place(vm, of.data.as_deref()))
                .map_or(0, |at| at + 1),
            None => 1,
        };
        let between = vm.chain.get(upper..data).unwrap_or_default();
        unknown.extend(between.iter().map(|image| image.path.as_str()));
    }
    unknown
}

/// Refuses what libvirt cannot merge, or what would be lost with it.
///
/// # Errors
/// The refusal, with what has to go first.
pub fn check(snapshot: &Snapshot, children: &[&Snapshot], facts: &Facts) -> Result<(), Fault> {
    if !facts.host.deletes_external() {
        return Err(Fault::new(
            Reason::KindUnsupported,
            "this host's libvirt cannot delete external snapshots; 9.0 or newer can".to_owned(),
        ));
    }
    off_path_indeed(snapshot, facts)?;
    all_attached(snapshot, facts)?;
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
    // libvirt 11.3 looks at the records of all other branches that stand on the
    // snapshot, and crashes on some; of a VM that is off nothing is risked.
    let path = tree::active_path(facts);
    let side: Vec<&Snapshot> = tree::descendants_leaf_first(facts, &snapshot.name)
        .into_iter()
        .filter(|below| !path.iter().any(|on| on.name == below.name))
        .collect();
    let untold = side.iter().find(|below| below.chain_untold);
    if untold.is_some() || facts.vm.state == VmState::Stopped {
        let side: Vec<&str> = side.iter().map(|below| below.name.as_str()).collect();
        if !side.is_empty() {
            let (because, or) = match untold {
                Some(untold) => (
                    format!(
                        "libvirt's record of snapshot '{}' does not say what its images stand on",
                        untold.name
                    ),
                    "",
                ),
                None => ("the VM is off".to_owned(), "start the VM first, or "),
            };
            return Err(Fault::new(
                Reason::SnapshotBranches,
                format!(
                    "other branches of VM '{}' stand on snapshot '{}', and {because}; libvirt \
                     crashes on that: {or}delete {} first{}",
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

/// Refuses a snapshot from which the present state does not descend by libvirt's
/// tree, and does by the images, as where snapshots were defined again without
/// `--current` or with that of another one. libvirt (11.3) believes its tree: it
/// merges nothing, takes the snapshot off its list, and deletes the image that
/// holds its data where another snapshot made that.
fn off_path_indeed(snapshot: &Snapshot, facts: &Facts) -> Result<(), Fault> {
    if tree::is_on_active_path(facts, &snapshot.name) {
        return Ok(());
    }
    let in_use = covered(snapshot).find_map(|disk| {
        let vm = facts.vm.disks.iter().filter(|vm| vm.writable());
        let mut chains = vm.flat_map(|vm| &vm.chain);
        let held =
            |path: &String| Some(path) == disk.data.as_ref() || Some(path) == disk.overlay.as_ref();
        chains.find(|image| held(&image.path))
    });
    let Some(image) = in_use else {
        return Ok(());
    };
    // Its own overlay may be what another one is made of, which has to go before.
    let above = facts.snapshots.iter().find(|other| {
        other.name != snapshot.name
            && covered(other)
                .any(|of| of.data.is_some() && covered(snapshot).any(|own| own.overlay == of.data))
    });
    let (help, order) = match (lineage::to_make_current(facts), above) {
        (Some(help), _) => (help, None),
        (None, Some(above)) => (format!("delete '{}' first", above.name), Some(&above.name)),
        (None, None) => (
            "commit what stands on it first, or copy the disk into one image while the VM is off \
             (qemu-img convert)"
                .to_owned(),
            None,
        ),
    };
    let current = match facts.current() {
        Some(current) => format!("takes '{}' for the current snapshot", current.name),
        None => "knows no current snapshot".to_owned(),
    };
    let fault = Fault::new(
        Reason::CurrentUnknown,
        format!(
            "libvirt {current} of VM '{}', and would delete '{}' as one beside the present state, \
             whose chain has '{}', an image of it: data would be lost; {help}",
            facts.vm.name, snapshot.name, image.path
        ),
    )
    .with("snapshot", &snapshot.name)
    .with("path", &image.path);
    Err(match order {
        Some(order) => fault.with("order", order),
        None => fault,
    })
}

/// libvirt looks in the VM for each disk that is to be merged, and deletes nothing
/// where one was detached since. Beside the present state it merges nothing.
fn all_attached(snapshot: &Snapshot, facts: &Facts) -> Result<(), Fault> {
    if !tree::is_on_active_path(facts, &snapshot.name) {
        return Ok(());
    }
    let attached = |target: &str| facts.vm.disks.iter().any(|vm| vm.target == target);
    let Some(gone) = covered(snapshot).find(|disk| !attached(&disk.target)) else {
        return Ok(());
    };
    let (vm, target, name) = (&facts.vm.name, &gone.target, &snapshot.name);
    // Where the disk's newest data lies, as far as snapshots know.
    let newest = tree::active_path(facts)
        .into_iter()
        .find_map(|one| one.present_overlay(target))
        .or(gone.overlay.as_deref())
        .filter(|path| files::exists(facts, path) != Some(false));
    let help = match newest {
        Some(path) => format!(
            "attach it again for that with 'virsh attach-disk {vm} {path} {target} --subdriver \
             qcow2 --persistent', and detach it afterwards"
        ),
        None => format!(
            "its overlay is not there any more: bring it back and attach it, or take the snapshot \
             off libvirt's list with 'virsh snapshot-delete {vm} {name} --metadata', which merges \
             nothing"
        ),
    };
    let fault = Fault::new(
        Reason::DiskUnknown,
        format!(
            "snapshot '{name}' covers disk {target}, which VM '{vm}' does not have any more, and \
             libvirt deletes it only where all its disks are attached; {help}"
        ),
    )
    .with("snapshot", name)
    .with("disk", target);
    Err(match newest {
        Some(path) => fault.with("path", path),
        None => fault,
    })
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

/// Refuses an internal snapshot that cannot be deleted in the VM's present state.
///
/// # Errors
/// The refusal.
pub fn internal_deletable(snapshot: &Snapshot, facts: &Facts) -> Result<(), Fault> {
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
///
/// # Errors
/// [`Reason::StorageNotWritable`], naming the image.
pub fn lower_writable(snapshot: &Snapshot, facts: &Facts) -> Result<(), Fault> {
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
///
/// # Errors
/// [`Reason::NoSpace`].
pub fn merge_fits(snapshot: &Snapshot, facts: &Facts) -> Result<(), Fault> {
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
        let newest = snapshot.current && tree::children(facts, &snapshot.name).is_empty();
        let merged = &vm.chain[if newest { 0 } else { at - 1 }..at];
        let bytes = merged
            .iter()
            .fold(0_u64, |sum, image| sum.saturating_add(image.actual_size));
        let (need, image) = needs.entry(folder_of(data)).or_insert((0, data));
        *need = need.saturating_add(bytes.min(room));
        *image = data;
    }
    let by_folder = needs.iter().map(|(path, (need, _))| (*path, *need));
    if let Some(short) = files::short(facts, by_folder) {
        let fault = files::no_space(facts, short.path, short.need, short.free);
        return Err(match needs.get(short.path) {
            Some((_, image)) => fault.with("image", image),
            None => fault,
        });
    }
    Ok(())
}
