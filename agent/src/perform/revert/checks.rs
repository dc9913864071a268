//! Files that a revert needs, looked at before libvirt is asked: it kills the guest
//! first.

use std::path::Path;

use vmsnap_hypervisor::saved;

use crate::{
    perform::create,
    planning::{
        Fault, Reason,
        facts::{Memory, Snapshot},
        health::WITHOUT_MEMORY,
    },
};

/// Compares the memory file with what was recorded, or at least with what libvirt
/// writes: it notices a damaged one only after it has killed the guest.
pub(super) async fn memory(snapshot: &Snapshot, whole: bool) -> Result<(), Fault> {
    let Memory::External(file) = &snapshot.memory else {
        return Ok(());
    };
    let damaged = |what: String| {
        Fault::new(
            Reason::SnapshotNotWhole,
            format!(
                "the memory file '{file}' of snapshot '{}' {what}; the VM was left as it is; \
                 {WITHOUT_MEMORY}",
                snapshot.name
            ),
        )
        .with("snapshot", &snapshot.name)
        .with("path", file)
    };
    let recorded = snapshot
        .record
        .as_ref()
        .and_then(|record| Some((record.memory_size?, record.memory_sha256.as_ref()?)));
    let path = file.clone();
    let head = tokio::task::spawn_blocking(move || {
        let size = std::fs::metadata(&path)?.len();
        saved::problem(Path::new(&path)).map(|problem| (size, problem))
    })
    .await
    .map_err(std::io::Error::other)
    .and_then(|read| read);
    match (head, recorded) {
        (Ok((now, _)), Some((size, _))) if now != size => {
            return Err(damaged(format!("has {now} bytes and had {size}")));
        }
        (Ok((_, Some(problem))), _) => return Err(damaged(problem)),
        (Ok(_), _) => {}
        // Not known either when it was made: libvirt may have rights that we lack.
        (Err(error), None) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            return Ok(());
        }
        (Err(error), _) => return Err(damaged(format!("cannot be read: {error}"))),
    }
    if let (true, Some((_, sum))) = (whole, recorded) {
        let (_, now) = create::checksum(file)
            .await
            .map_err(|error| damaged(format!("cannot be read: {error}")))?;
        if now != *sum {
            return Err(damaged("is damaged: its checksum differs".into()));
        }
    }
    Ok(())
}

/// QEMU refuses flash of another size than the firmware expects.
pub(super) async fn nvram(snapshot: &Snapshot, copy: &str, file: &str) -> Result<(), Fault> {
    let sizes = tokio::join!(tokio::fs::metadata(copy), tokio::fs::metadata(file));
    let problem = match sizes {
        (Err(error), _) => format!("cannot be read: {error}"),
        (Ok(copy), Ok(file)) if copy.len() != file.len() => {
            format!(
                "has {} bytes and '{}' bytes are needed",
                copy.len(),
                file.len()
            )
        }
        _ => return Ok(()),
    };
    Err(Fault::new(
        Reason::SnapshotNotWhole,
        format!(
            "'{copy}', the copy of the UEFI variables of snapshot '{}', {problem}; the VM was left \
             as it is",
            snapshot.name
        ),
    )
    .with("snapshot", &snapshot.name)
    .with("path", copy))
}
