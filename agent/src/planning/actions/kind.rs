//! Which kind of snapshot a VM gets, disk by disk, and why.
//!
//! | found | asked | memory | kind |
//! |---|---|---|---|
//! | internal ones | auto, internal | any | internal |
//! | external ones | auto, external | any | external |
//! | the one | the other | any | refused: kinds are never mixed |
//! | both | any | any | refused: they are mixed already |
//! | none | auto | any | external where this libvirt reverts and deletes it, else internal |
//! | none | internal | any | internal if every writable disk is qcow2, none is left out and no other VM uses their images |
//! | none | external | any | external if this libvirt reverts and deletes it |
//!
//! Invariant: what this module allows, this host can revert to and delete.

use crate::planning::{
    actions::checks,
    facts::{Disk, Facts, Firmware, Kind, Snapshot, Source, VmState},
    files, names,
    plan::Draft,
    reason::{Fault, Reason},
    step::Step,
};

/// Chooses the kind.
///
/// # Errors
/// When kinds would be mixed, or the host or a disk cannot do what is asked.
pub fn choose(
    asked: Option<Kind>,
    state: VmState,
    excluded: &[String],
    facts: &Facts,
    draft: &mut Draft,
) -> Result<Kind, Fault> {
    // What the same plan deletes before, with if_exists replace, mixes with nothing.
    let replaced = |snapshot: &Snapshot| {
        draft
            .steps
            .iter()
            .any(|step| matches!(step, Step::DeleteSnapshot { name, .. } if *name == snapshot.name))
    };
    let (going, left): (Vec<&Snapshot>, Vec<&Snapshot>) =
        facts.snapshots.iter().partition(|one| replaced(one));
    let first = |kind: Kind| left.iter().copied().find(|s| s.kind == kind);
    let (internal, external) = (first(Kind::Internal), first(Kind::External));
    let mixed = first(Kind::Mixed);
    if mixed.is_some() || (internal.is_some() && external.is_some()) {
        return Err(Fault::new(
            Reason::KindsMixed,
            format!(
                "VM '{}' has internal and external snapshots mixed ({}); a new one would make it \
                 worse: remove those of one kind first",
                facts.vm.name,
                left.iter()
                    .map(|s| format!("{}: {}", s.name, s.kind.name()))
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
        ));
    }
    let found = internal.or(external);
    let kind = match (asked, found) {
        (Some(asked), Some(found)) if asked != found.kind => {
            return Err(Fault::new(
                Reason::KindsMixed,
                format!(
                    "kind '{}' was asked for, but VM '{}' has {} snapshots ('{}'), and mixed kinds \
                     cannot be deleted later; leave kind out, or remove the others first",
                    asked.name(),
                    facts.vm.name,
                    found.kind.name(),
                    found.name
                ),
            )
            .with("asked", asked.name())
            .with("found", found.kind.name()));
        }
        (_, Some(found)) => {
            draft.decide(
                "kind",
                found.kind.name(),
                format!("the VM has {} snapshots already", found.kind.name()),
            );
            found.kind
        }
        (Some(asked), None) => {
            draft.decide("kind", asked.name(), "asked for");
            asked
        }
        (None, None) if facts.host.reverts_external() && facts.host.deletes_external() => {
            draft.decide(
                "kind",
                "external",
                "this libvirt can revert to and delete external snapshots",
            );
            Kind::External
        }
        (None, None) => {
            draft.decide(
                "kind",
                "internal",
                "this libvirt cannot revert to external snapshots",
            );
            Kind::Internal
        }
    };
    match kind {
        Kind::External => external_possible(excluded, &going, facts)?,
        Kind::Internal => internal_possible(state, excluded, facts)?,
        // Refused above.
        Kind::Mixed => {}
    }
    Ok(kind)
}

/// Refuses what external snapshots cannot do here; `going` are deleted before.
fn external_possible(excluded: &[String], going: &[&Snapshot], facts: &Facts) -> Result<(), Fault> {
    if !facts.host.reverts_external() || !facts.host.deletes_external() {
        return Err(Fault::new(
            Reason::KindUnsupported,
            format!(
                "this host's libvirt {} cannot revert to external snapshots; 9.10 or newer can, \
                 or use kind internal",
                version(facts.host.libvirt)
            ),
        ));
    }
    for disk in facts
        .writable_disks()
        .filter(|disk| !excluded.contains(&disk.target))
    {
        if disk.source != Source::File {
            let inside = if facts.writable_disks().all(holds_internal) {
                "use kind internal, "
            } else {
                ""
            };
            let elsewhere = match disk.source {
                Source::Volume => "name its file in the VM's definition instead of its volume",
                _ => "move it into a file",
            };
            return Err(Fault::new(
                Reason::DiskUnsupported,
                format!(
                    "disk {} of VM '{}' lies on {}, and libvirt cannot revert an external snapshot \
                     of that; {inside}{elsewhere}, or exclude it with accept_no_revert",
                    disk.target,
                    facts.vm.name,
                    source_name(disk.source, &disk.path)
                ),
            )
            .with("disk", &disk.target)
            .with("source", &disk.path));
        }
        if disk.transient {
            return Err(Fault::new(
                Reason::DiskUnsupported,
                format!(
                    "disk {} of VM '{}' is transient: what is written to it is thrown away when \
                     the VM stops, and libvirt cannot merge it; take <transient/> out of its \
                     definition, or exclude it with accept_no_revert",
                    disk.target, facts.vm.name
                ),
            )
            .with("disk", &disk.target));
        }
        if disk.shareable {
            return Err(Fault::new(
                Reason::DiskUnsupported,
                format!(
                    "disk {} of VM '{}' is shareable: an overlay would split what others write",
                    disk.target, facts.vm.name
                ),
            )
            .with("disk", &disk.target));
        }
        not_encrypted(disk, facts)?;
        readable(disk, facts)?;
        if names::overlay_stem(&disk.path).contains(',') {
            return Err(Fault::new(
                Reason::DiskUnsupported,
                format!(
                    "disk {} of VM '{}' lies in '{}', and after a revert the VM could not start: \
                     libvirt writes the comma in that path twice where it makes the new overlay; \
                     rename it without a comma, or exclude it with accept_no_revert",
                    disk.target, facts.vm.name, disk.path
                ),
            )
            .with("disk", &disk.target)
            .with("source", &disk.path));
        }
        let merged = going.iter().filter(|one| merges_into(one, disk)).count();
        let depth = disk.chain.len().saturating_sub(merged);
        if depth >= facts.host.max_chain as usize {
            return Err(Fault::new(
                Reason::ChainTooDeep,
                format!(
                    "the chain of disk {} has {depth} images and {} is the limit; commit or clean \
                     up older snapshots first",
                    disk.target, facts.host.max_chain
                ),
            )
            .with("disk", &disk.target)
            .with("depth", depth)
            .with("limit", facts.host.max_chain));
        }
    }
    Ok(())
}

/// Refuses a disk with an encrypted image, for either kind: measured with LUKS on
/// libvirt 11.3 and QEMU 10.0. libvirt puts a plain overlay on it, so that what the
/// guest writes from then on lies readable in a file, and forgets in the snapshot's
/// definition who decrypts: after a revert, and after a snapshot of a VM that is off,
/// the VM does not start any more. Saving its memory inside ends QEMU.
fn not_encrypted(disk: &Disk, facts: &Facts) -> Result<(), Fault> {
    if !disk.encrypted {
        return Ok(());
    }
    Err(Fault::new(
        Reason::DiskUnsupported,
        format!(
            "disk {} of VM '{}' is encrypted ('{}'): an overlay would hold in plain what the guest \
             writes, the VM could not start after a revert, and an internal snapshot ends QEMU; \
             encrypt inside the guest or below the file system, or exclude it with accept_no_revert \
             and kind external",
            disk.target, facts.vm.name, disk.path
        ),
    )
    .with("disk", &disk.target)
    .with("source", &disk.path))
}

/// Whether deleting a snapshot makes the chain of a disk shorter by one image.
fn merges_into(snapshot: &Snapshot, disk: &Disk) -> bool {
    snapshot.disks.iter().any(|covered| {
        covered.target == disk.target
            && covered.kind == Some(Kind::External)
            && disk
                .chain
                .iter()
                .any(|image| covered.data.as_ref() == Some(&image.path))
    })
}

/// Refuses a disk whose images cannot be read, and tells a file that was deleted
/// under a running VM from one that is merely not there.
fn readable(disk: &Disk, facts: &Facts) -> Result<(), Fault> {
    let Some(problem) = &disk.chain_problem else {
        return Ok(());
    };
    let (target, vm, path) = (&disk.target, &facts.vm.name, &disk.path);
    let gone = files::exists(facts, path) == Some(false);
    let message = if gone && facts.vm.state != VmState::Stopped {
        format!(
            "the file '{path}' of disk {target} was deleted under VM '{vm}', which still writes \
             into it: all that is lost when the VM stops; copy it into a new file while it runs \
             ('virsh blockcopy {vm} {target} FILE --wait --pivot')"
        )
    } else if gone {
        format!("the file '{path}' of disk {target} of VM '{vm}' is not there; bring it back")
    } else {
        format!("the chain of disk {target} of VM '{vm}' cannot be read: {problem}")
    };
    Err(Fault::new(Reason::DiskUnsupported, message)
        .with("disk", target)
        .with("source", path))
}

/// Whether an image can hold an internal snapshot.
fn holds_internal(disk: &Disk) -> bool {
    disk.format == "qcow2" && matches!(disk.source, Source::File | Source::Block)
}

/// Refuses a name by which QEMU would not find an internal snapshot again, or
/// find another one: an image may hold one that libvirt does not list. While the
/// VM is off, libvirt would make a second one of that name, and a revert go to
/// the first.
///
/// # Errors
/// [`Reason::BadRequest`], [`Reason::SnapshotConflict`].
pub fn internal_name(name: &str, facts: &Facts) -> Result<(), Fault> {
    if names::is_number(name) {
        return Err(Fault::bad_field(
            "snapshot_name",
            format!(
                "'{name}' has digits only, and QEMU takes that for the number of an internal \
                 snapshot: a revert could go to another one; put a letter into it, or use kind \
                 external"
            ),
        ));
    }
    let unlisted = facts.writable_disks().find(|disk| {
        let held = disk.chain.first().map(|image| &image.internal);
        facts.snapshot(name).is_none() && held.is_some_and(|held| held.iter().any(|it| it == name))
    });
    match unlisted {
        Some(disk) => Err(Fault::new(
            Reason::SnapshotConflict,
            format!(
                "the image '{0}' of disk {1} holds an internal snapshot '{name}' that libvirt does \
                 not list; choose another name, or remove it while the VM is off ('qemu-img \
                 snapshot -d {name} {0}')",
                disk.path, disk.target
            ),
        )
        .with("snapshot", name)
        .with("disk", &disk.target)),
        None => Ok(()),
    }
}

/// Refuses an internal snapshot in an image in which other VMs read: whoever goes
/// back to it, or deletes it, writes there.
fn nobody_elses(disk: &Disk, facts: &Facts) -> Result<(), Fault> {
    checks::not_used(facts, [disk.path.as_str()]).map_err(|fault| {
        let message = format!(
            "an internal snapshot of disk {} of VM '{}' could neither be reverted to nor deleted, \
             because other VMs use its image '{}': {}; use kind external, which leaves that image \
             as it is, or copy the disk into an image of its own (qemu-img convert)",
            disk.target,
            facts.vm.name,
            disk.path,
            fault.metadata.get("users").map_or("", String::as_str)
        );
        Fault { message, ..fault }
    })
}

fn internal_possible(state: VmState, excluded: &[String], facts: &Facts) -> Result<(), Fault> {
    for disk in facts.writable_disks() {
        if excluded.contains(&disk.target) {
            return Err(Fault::new(
                Reason::KindUnsupported,
                format!(
                    "exclude_disks names {}, but libvirt makes no internal snapshot that leaves a \
                     writable disk out; use kind external, or leave exclude_disks out",
                    disk.target
                ),
            )
            .with("disk", &disk.target));
        }
        not_encrypted(disk, facts)?;
        readable(disk, facts)?;
        if !holds_internal(disk) {
            return Err(Fault::new(
                Reason::DiskUnsupported,
                format!(
                    "disk {} of VM '{}' has format {} in {}; an internal snapshot needs qcow2 on \
                     every writable disk: use kind external, or convert the disk",
                    disk.target,
                    facts.vm.name,
                    disk.format,
                    source_name(disk.source, &disk.path)
                ),
            )
            .with("disk", &disk.target)
            .with("format", &disk.format));
        }
        nobody_elses(disk, facts)?;
    }
    let Firmware {
        uefi: true,
        nvram: Some(nvram),
        nvram_format,
        ..
    } = &facts.vm.firmware
    else {
        return Ok(());
    };
    if nvram_format != "qcow2" && state != VmState::Stopped {
        return Err(Fault::new(
            Reason::DiskUnsupported,
            format!(
                "the UEFI variables of VM '{}' are in '{nvram}' in format {nvram_format}; an \
                 internal snapshot of the running VM needs them in qcow2: use kind external, or \
                 convert them",
                facts.vm.name
            ),
        )
        .with("nvram", nvram)
        .with("format", nvram_format));
    }
    Ok(())
}

fn source_name(source: Source, path: &str) -> String {
    match source {
        Source::File => format!("the file '{path}'"),
        Source::Block => format!("the block device '{path}'"),
        Source::Network => format!("the network source '{path}'"),
        Source::Volume => format!("the volume '{path}'"),
        Source::Empty => "nothing".into(),
        Source::Other => format!("'{path}'"),
    }
}

/// A version number for people.
#[must_use]
pub fn version(number: u64) -> String {
    format!(
        "{}.{}.{}",
        number / 1_000_000,
        number / 1_000 % 1_000,
        number % 1_000
    )
}
