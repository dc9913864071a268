//! Going back to a snapshot, and putting definition and files in agreement when
//! that failed.
//!
//! Invariants: what can be checked is checked before libvirt is asked, because
//! it kills the guest first; after a failed revert the VM is never started
//! before its definition names images that exist and that no restore point
//! needs: starting on a frozen base would write into every snapshot above it.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use vmsnap_hypervisor::{DomainState, RevertFlags, Xml, image};

use super::{Performer, create};
use crate::planning::{
    Done, Fault, Reason,
    facts::{Kind, Memory, Snapshot, VmState, folder_of},
    names::file_part,
};

impl Performer {
    pub(super) async fn keep_definition(&self) -> Result<Done, Fault> {
        let xml = self.hypervisor.domain_xml(self.vm(), Xml::Inactive).await?;
        Ok(Done::Definition { xml })
    }

    pub(super) async fn revert(
        &self,
        name: &str,
        running: bool,
        paused: bool,
        force: bool,
    ) -> Result<Done, Fault> {
        let snapshot = self.snapshot(name)?;
        check_memory(&snapshot).await?;
        if snapshot.kind != Kind::Internal {
            self.pace().await?;
        }
        let flags = RevertFlags {
            running,
            paused,
            force,
            reset_nvram: false,
        };
        let began = since_epoch().as_secs();
        self.hypervisor.revert(self.vm(), name, flags).await?;
        self.note_overlays(began).await?;
        Ok(super::plain(""))
    }

    /// libvirt put a fresh overlay on each disk: that is this run's doing, and
    /// whoever cleans up later has to know. The overlays that it replaced are
    /// gone.
    async fn note_overlays(&self, began: u64) -> Result<(), Fault> {
        let before = self.known_files();
        let fresh: Vec<String> = self
            .observer
            .disk_images(self.vm())
            .await?
            .into_iter()
            .map(|image| image.path)
            .filter(|path| !before.contains(path))
            // Not a disk that the snapshot's definition brought back.
            .filter(|path| second_in(path).is_some_and(|second| second >= began))
            .collect();
        self.journal.note_files(&self.live.id, fresh).await?;
        self.forget_gone().await
    }

    fn snapshot(&self, name: &str) -> Result<Snapshot, Fault> {
        self.facts
            .as_ref()
            .and_then(|facts| facts.snapshot(name))
            .cloned()
            .ok_or_else(|| {
                Fault::new(
                    Reason::Internal,
                    format!("snapshot '{name}' is not among the facts"),
                )
            })
    }

    /// libvirt names the new overlay by the second, and refuses if that file is
    /// there: waits until the present second is past the last one used.
    async fn pace(&self) -> Result<(), Fault> {
        let last = self
            .observer
            .disk_images(self.vm())
            .await?
            .iter()
            .filter_map(|image| second_in(&image.path))
            .max()
            .unwrap_or(0);
        let now = since_epoch();
        // Far in the future means that it is no time at all.
        if last >= now.as_secs() && last < now.as_secs() + 5 {
            let until = Duration::from_secs(last + 1).saturating_sub(now);
            tokio::time::sleep(until + Duration::from_millis(20)).await;
        }
        Ok(())
    }

    pub(super) async fn restore_nvram(&self, from: &str, to: &str) -> Result<Done, Fault> {
        // The copy replaces the file whole, so that no mixture can be left.
        let fresh = format!("{to}.vmsnap-new");
        let _ = tokio::fs::remove_file(&fresh).await;
        create::copy(from, &fresh).await?;
        self.observer.same_owner(to, &fresh)?;
        tokio::fs::rename(&fresh, to).await.map_err(|error| {
            Fault::new(
                Reason::StorageNotWritable,
                format!("the UEFI variables cannot be put back into '{to}': {error}"),
            )
            .with("path", to)
        })?;
        Ok(super::plain(format!("'{to}' is as it was then")))
    }

    /// The revert failed: whatever libvirt left behind, the VM ends with a
    /// definition that is safe to start, in the state that it was in.
    pub(super) async fn undo_revert(
        &self,
        name: &str,
        definition: usize,
        done: &[Option<Done>],
    ) -> Result<String, Fault> {
        let Some(Done::Definition { xml }) = done.get(definition).and_then(Option::as_ref) else {
            return Ok("the revert never began".into());
        };
        let mut domain = self.hypervisor.domain(self.vm()).await?;
        // A new QEMU that is only just coming up or going down settles first.
        for _ in 0..40 {
            if !matches!(domain.state, DomainState::Shutdown) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
            domain = self.hypervisor.domain(self.vm()).await?;
        }
        if domain.state == DomainState::Running {
            return Ok("the VM runs; the revert did not touch it or went through".into());
        }
        if domain.state == DomainState::Paused && self.plan.vm_state == VmState::Paused {
            return Ok("the VM is paused, as before".into());
        }
        if domain.state == DomainState::Paused {
            // Half-started by the revert: its memory is not what anybody wants.
            self.hypervisor.destroy(self.vm()).await?;
        }
        let safe = self.safe_definition(xml, name).await?;
        self.hypervisor.define(&safe.xml).await?;
        let mut note = safe.note;
        match self.plan.vm_state {
            VmState::Running => {
                self.start(false).await?;
                note.push_str("; the VM was started again, from its disks");
                self.notice(
                    "GUEST_RESTARTED",
                    "the failed revert had already stopped the guest; it was started again from \
                     its disks",
                    "",
                );
            }
            VmState::Paused => {
                self.start(true).await?;
                note.push_str("; the VM was started again and stands still");
            }
            _ => {}
        }
        Ok(note)
    }

    /// The definition from before the revert, if all its images still exist;
    /// else the same with a fresh overlay over the snapshot's data.
    async fn safe_definition(&self, xml: &str, name: &str) -> Result<SafeDefinition, Fault> {
        let mut text = xml.to_owned();
        let mut notes = Vec::new();
        for (target, path) in self.observer.disks_of_xml(xml)? {
            if tokio::fs::metadata(&path).await.is_ok() {
                continue;
            }
            let data = self
                .observer
                .snapshot_data(self.vm(), name, &target)
                .await?;
            let Some(data) = data else {
                return Err(Fault::new(
                    Reason::SnapshotNotWhole,
                    format!(
                        "disk {target} of VM '{}' is defined as '{path}', which is gone, and \
                         snapshot '{name}' holds nothing for it; the VM is left off",
                        self.vm()
                    ),
                )
                .with("path", path));
            };
            let fresh = free_path(&data.path, self.vm(), &target).await;
            self.journal
                .note_files(&self.live.id, vec![fresh.clone()])
                .await?;
            let format = match data.format {
                Some(format) => format,
                None => image::info(Path::new(&data.path), None).await?.format,
            };
            image::create_overlay(Path::new(&fresh), Path::new(&data.path), &format).await?;
            self.observer.same_owner(&data.path, &fresh)?;
            text = text.replace(&escaped(&path), &escaped(&fresh));
            notes.push(format!(
                "disk {target} goes on from the snapshot in '{fresh}'"
            ));
        }
        let note = if notes.is_empty() {
            "the definition from before the revert is back".to_owned()
        } else {
            self.notice(
                "STATE_LOST",
                format!(
                    "libvirt had already deleted what was written since the last snapshot: {}",
                    notes.join(", ")
                ),
                "",
            );
            notes.join("; ")
        };
        Ok(SafeDefinition { xml: text, note })
    }
}

/// The second by which libvirt named an overlay that a revert made.
fn second_in(path: &str) -> Option<u64> {
    path.rsplit('.').next()?.parse().ok()
}

fn since_epoch() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

struct SafeDefinition {
    xml: String,
    note: String,
}

/// A path as libvirt writes it into XML.
fn escaped(path: &str) -> String {
    path.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('\'', "&apos;")
}

/// A path beside `data` that does not exist.
async fn free_path(data: &str, vm: &str, target: &str) -> String {
    let mut next = 1;
    loop {
        let path = format!(
            "{}/{}.{}.recovered-{next}.qcow2",
            folder_of(data),
            file_part(vm),
            file_part(target)
        );
        if tokio::fs::symlink_metadata(&path).await.is_err() {
            return path;
        }
        next += 1;
    }
}

/// Compares the memory file with what was recorded: libvirt itself notices a
/// damaged one only after it has killed the guest.
async fn check_memory(snapshot: &Snapshot) -> Result<(), Fault> {
    let (Memory::External(file), Some(record)) = (&snapshot.memory, &snapshot.record) else {
        return Ok(());
    };
    let (Some(size), Some(sum)) = (record.memory_size, &record.memory_sha256) else {
        return Ok(());
    };
    let damaged = |what: String| {
        Fault::new(
            Reason::SnapshotNotWhole,
            format!(
                "the memory file '{file}' of snapshot '{}' {what}; the VM was left as it is",
                snapshot.name
            ),
        )
        .with("snapshot", &snapshot.name)
        .with("path", file)
    };
    let (now_size, now_sum) = create::checksum(file)
        .await
        .map_err(|error| damaged(format!("cannot be read: {error}")))?;
    if now_size != size {
        return Err(damaged(format!("has {now_size} bytes and had {size}")));
    }
    if now_sum != *sum {
        return Err(damaged("is damaged: its checksum differs".into()));
    }
    Ok(())
}
