//! What of the VM's stored definition a revert takes back, for the diff.

use crate::planning::{
    facts::{Facts, Snapshot},
    plan::Draft,
};

/// What of the VM's definition the revert takes back. Whether it `deletes` all overlays
/// of the present state: libvirt's own does, also of disks that it takes out.
pub(super) fn compare(snapshot: &Snapshot, deletes: bool, facts: &Facts, draft: &mut Draft) {
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
    compare_disks(snapshot, deletes, facts, draft);
}

fn compare_disks(snapshot: &Snapshot, deletes: bool, facts: &Facts, draft: &mut Draft) {
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
                let overlay = facts
                    .current()
                    .and_then(|current| current.present_overlay(target));
                let (file, advice) = if deletes && overlay == Some(now) {
                    (
                        format!("libvirt deletes its overlay '{now}', what that stands on stays"),
                        "set safety_snapshot to keep what was written to it since the last snapshot",
                    )
                } else {
                    (format!("its file '{now}' stays"), "")
                };
                draft.warn(
                    "DISK_TAKEN_BACK",
                    format!(
                        "disk {target} was added after the snapshot; the revert takes it out of \
                         the VM, {file}"
                    ),
                    advice,
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
