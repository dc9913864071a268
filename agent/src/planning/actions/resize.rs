//! Changing the virtual size of a disk.
//!
//! Invariants: sizes are bytes against the present virtual size; a running
//! guest's disk never shrinks; a stopped one only when that was allowed.

use crate::planning::{
    actions::{checks, create::unknown_disk},
    facts::{Disk, Facts, Source, VmState, file_name},
    plan::Draft,
    reason::{Fault, Reason},
    request::Commit,
    step::Step,
};

/// QEMU counts disks in sectors of this size.
const SECTOR: u64 = 512;

/// Drafts the resize, or nothing if the disk has that size.
///
/// # Errors
/// The refusal.
pub fn draft(commit: &Commit, bytes: u64, facts: &Facts, draft: &mut Draft) -> Result<(), Fault> {
    let disk = choose(&commit.resize_disk, facts, draft)?;
    if !bytes.is_multiple_of(SECTOR) {
        return Err(Fault::bad_field(
            "commit.resize_bytes",
            format!("{bytes} is not a multiple of {SECTOR}, the size of a sector"),
        ));
    }
    if disk.virtual_size == 0 {
        return Err(Fault::new(
            Reason::DiskUnsupported,
            format!("the present size of disk {} cannot be read", disk.target),
        )
        .with("disk", &disk.target));
    }
    if bytes == disk.virtual_size {
        draft.decide(
            "resize",
            "nothing",
            format!("disk {} has {bytes} bytes already", disk.target),
        );
        return Ok(());
    }
    let shrink = bytes < disk.virtual_size;
    let online = facts.vm.state != VmState::Stopped;
    if shrink && (online || !commit.allow_shrink) {
        let help = if online {
            "stop the VM first and set allow_shrink; what lies beyond is lost"
        } else {
            "set allow_shrink if what lies beyond may be lost"
        };
        return Err(Fault::new(
            Reason::ShrinkRefused,
            format!(
                "disk {} of VM '{}' has {} bytes and would shrink to {bytes}; {help}",
                disk.target, facts.vm.name, disk.virtual_size
            ),
        )
        .with("disk", &disk.target)
        .with("present_bytes", disk.virtual_size)
        .with("asked_bytes", bytes));
    }
    checks::not_shared(facts, [disk.path.as_str()])?;
    if disk.source != Source::File && disk.format != "qcow2" {
        return Err(Fault::new(
            Reason::DiskUnsupported,
            format!(
                "disk {} of VM '{}' is '{}' itself, which has the size that it has: resize that \
                 where it comes from, such as with lvextend",
                disk.target, facts.vm.name, disk.path
            ),
        )
        .with("disk", &disk.target)
        .with("source", &disk.path));
    }
    // Those that the same plan drops before are not in the way.
    let dropped = |name: &str| {
        draft
            .steps
            .iter()
            .any(|step| matches!(step, Step::DeleteSnapshot { name: gone, .. } if gone == name))
    };
    let internal: Vec<&str> = disk
        .chain
        .first()
        .map(|image| image.internal.iter().map(String::as_str).collect())
        .unwrap_or_else(Vec::new)
        .into_iter()
        .filter(|name| !dropped(name))
        .collect();
    if !internal.is_empty() && disk.chain[0].compat == "0.10" {
        return Err(Fault::new(
            Reason::DiskUnsupported,
            format!(
                "the image of disk {} holds internal snapshots ({}) in the old format qcow2 \
                 0.10, which cannot be resized with them; remove them, or amend it to 1.1",
                disk.target,
                internal.join(", ")
            ),
        )
        .with("disk", &disk.target));
    }
    draft.push(Step::Resize {
        disk: disk.target.clone(),
        bytes,
        shrink,
        online,
    });
    draft.change(
        format!("disk.{}.virtual_size", disk.target),
        Some(disk.virtual_size.to_string()),
        Some(bytes.to_string()),
    );
    Ok(())
}

/// The disk that is meant: the named one; the one whose volume is
/// `{vm_name}.qcow2`; the only writable one.
fn choose<'a>(wanted: &str, facts: &'a Facts, draft: &mut Draft) -> Result<&'a Disk, Fault> {
    if !wanted.is_empty() {
        return facts
            .writable_disks()
            .find(|disk| disk.target == wanted)
            .ok_or_else(|| unknown_disk(facts, "resize_disk", wanted));
    }
    let volume = format!("{}.qcow2", facts.vm.name);
    let disks: Vec<&Disk> = facts.writable_disks().collect();
    let named = disks.iter().find(|disk| {
        disk.chain
            .iter()
            .any(|image| file_name(&image.path) == volume)
    });
    if let Some(disk) = named {
        draft.decide(
            "resize disk",
            &disk.target,
            format!("its volume is {volume}"),
        );
        return Ok(disk);
    }
    match disks.as_slice() {
        [only] => {
            draft.decide("resize disk", &only.target, "it is the only writable disk");
            Ok(only)
        }
        _ => {
            let targets: Vec<&str> = disks.iter().map(|disk| disk.target.as_str()).collect();
            Err(Fault::new(
                Reason::DiskUnknown,
                format!(
                    "VM '{}' has the disks {} and none of them is {volume}; say which with \
                     resize_disk",
                    facts.vm.name,
                    targets.join(", ")
                ),
            )
            .with("valid_names", targets.join(",")))
        }
    }
}
