//! What a failed revert left behind, and putting definition and files in agreement
//! again.
//!
//! Invariants: the VM is never started before its definition names images that
//! exist and that no restore point needs: starting on a frozen base would write
//! into every snapshot above it. What went through stays.

use std::{path::Path, sync::atomic::Ordering, time::Duration};

use vmsnap_hypervisor::{DomainState, DomainSummary, ErrorKind, Hypervisor, What, Xml, image};

use super::{Kept, Performer, overlays_beside, owner};
use crate::planning::{Done, Fault, Reason, Step, facts::VmState, guard::GuardState};

/// How often a VM that is going down is looked at before it is taken as it is.
const SETTLE: u32 = 40;
/// How often a VM that may have been told to end is looked at before it is taken for
/// untouched.
const ENDING: u32 = 12;
/// Pause between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// What a failed revert left of the VM.
enum Left {
    /// libvirt refused before it touched anything.
    Untouched,
    /// The VM is on, with what the snapshot holds.
    WentThrough,
    /// The VM is on with its own images: an earlier try put it back.
    PutBack,
    /// The VM is off, or has to be.
    Off,
}

impl Performer {
    /// The revert failed: whatever libvirt left behind, the VM ends with a
    /// definition that is safe to start, in the state that it was in.
    pub(in crate::perform) async fn undo_revert(
        &self,
        name: &str,
        definition: usize,
        done: &[Option<Done>],
    ) -> Result<String, Fault> {
        let Some(kept) = Kept::of(definition, done) else {
            return Ok("the revert never began".into());
        };
        match self.left(&kept).await? {
            Left::Untouched => {
                let stored = self.hypervisor.domain_xml(self.vm(), Xml::Inactive).await?;
                if self.observer.disks_of_xml(&stored)? != self.observer.disks_of_xml(kept.xml)? {
                    self.hypervisor.define(kept.xml).await?;
                }
                self.remove_overlays(&kept).await?;
                return Ok("libvirt gave up before it touched the VM".into());
            }
            Left::PutBack => {
                self.records_again(&kept).await?;
                return Ok("the VM is back, and so are libvirt's records".into());
            }
            Left::WentThrough => return self.stay_reverted(name).await,
            Left::Off => self.hypervisor.destroy(self.vm()).await?,
        }
        if self.is_reverted(&kept).await? {
            // As the steps that were to follow would have had it.
            for step in &self.plan.steps {
                if let Step::RestoreNvram { from, to } = step {
                    self.restore_nvram(from, to).await?;
                }
            }
            if matches!(self.plan.vm_state, VmState::Running | VmState::Paused) {
                self.start(self.plan.vm_state == VmState::Paused).await?;
            }
            return self.stay_reverted(name).await;
        }
        let mut note = self.define_again(&kept).await?;
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
        // Last, because a VM that runs matters more than a record.
        self.records_again(&kept).await?;
        Ok(note)
    }

    /// What was there before is gone, so what was kept of it has to stay.
    async fn stay_reverted(&self, name: &str) -> Result<String, Fault> {
        self.went_through();
        self.notice(
            "REVERT_WENT_THROUGH",
            format!(
                "the VM is in snapshot '{name}' now: libvirt failed only after it had reverted"
            ),
            "",
        );
        // What this snapshot guarded is taken back.
        self.end_guard(name, GuardState::Reverted).await?;
        let record = self.hypervisor.snapshot_xml(self.vm(), name).await?;
        self.redefine(&record, name, true).await?;
        // It may have been cut off before the record named the new overlays.
        self.mend_if_needed().await?;
        Ok(format!("the VM is in snapshot '{name}' now"))
    }

    /// Whether a VM that is off was reverted all the same: what it had is gone, it
    /// is defined on images that are its own, and libvirt takes the snapshot for the
    /// current one. Empty images on what the old ones stood on would be a third
    /// state that nobody asked for.
    async fn is_reverted(&self, kept: &Kept<'_>) -> Result<bool, Fault> {
        let defined = self.hypervisor.domain_xml(self.vm(), Xml::Inactive).await?;
        let there = |path: &str| std::fs::metadata(path).is_ok();
        // A medium that is gone tells nothing: it may have been gone before.
        let before = self.observer.written_disks_of_xml(kept.xml)?;
        let now = self.observer.written_disks_of_xml(&defined)?;
        Ok(before.iter().any(|(_, disk)| !there(&disk.path))
            && now.iter().all(|(_, disk)| there(&disk.path))
            && self.current_snapshot().await?.as_ref() == Some(&self.plan.snapshot)
            && self
                .observer
                .frozen_image(self.vm(), Xml::Inactive)
                .await?
                .is_none())
    }

    /// What the failed revert left, once the VM has settled.
    async fn left(&self, kept: &Kept<'_>) -> Result<Left, Fault> {
        let domain = self.settled(kept).await?;
        let on = matches!(domain.state, DomainState::Running | DomainState::Paused);
        if !on || domain.reason.is_migrating() {
            return Ok(Left::Off);
        }
        if domain.id == kept.id {
            return Ok(Left::Untouched);
        }
        if self
            .observer
            .frozen_image(self.vm(), Xml::Live)
            .await?
            .is_some()
        {
            // Half of a revert: the images of a restore point are open.
            return Ok(Left::Off);
        }
        // A revert to an external snapshot always ends on other images.
        let external = kept
            .records
            .iter()
            .filter(|(name, _)| *name == self.plan.snapshot)
            .any(|(_, record)| {
                Hypervisor::overlays_of_record(record).is_ok_and(|found| !found.is_empty())
            });
        let live = self.hypervisor.domain_xml(self.vm(), Xml::Live).await?;
        let same = self.observer.disks_of_xml(&live)? == self.observer.disks_of_xml(kept.xml)?;
        Ok(if external && same {
            Left::PutBack
        } else {
            Left::WentThrough
        })
    }

    /// A QEMU that is only just coming up or going down settles first. One that is
    /// still loading memory may have been given up: that is not waited for long. One
    /// that libvirt told to end before it was cut off itself looks for a while as if
    /// nothing had happened.
    async fn settled(&self, kept: &Kept<'_>) -> Result<DomainSummary, Fault> {
        // In recovery nobody knows how far the call came.
        let cut_off = self.facts.is_none() || self.cut_off.load(Ordering::Relaxed);
        let mut tries = 0;
        loop {
            let domain = self.as_it_is_now().await?;
            let patience = match domain.state {
                DomainState::Shutdown => SETTLE,
                _ if domain.reason.is_migrating() => SETTLE / 10,
                DomainState::Running | DomainState::Paused if cut_off && domain.id == kept.id => {
                    ENDING
                }
                _ => 0,
            };
            if tries >= patience {
                return Ok(domain);
            }
            tries += 1;
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Defines the VM as it was before. An image that libvirt has deleted by then
    /// held what was written since the last snapshot: an empty one takes its
    /// place, on what the old one stood on.
    async fn define_again(&self, kept: &Kept<'_>) -> Result<String, Fault> {
        let mut anew = Vec::new();
        let written = self.observer.written_disks_of_xml(kept.xml)?;
        for (target, disk) in self.observer.disks_of_xml(kept.xml)? {
            let path = disk.path;
            if tokio::fs::metadata(&path).await.is_ok() {
                continue;
            }
            let below = kept.backing.iter().find(|(disk, ..)| *disk == target);
            let Some((_, below, format)) = below else {
                if written.iter().all(|(disk, _)| *disk != target) {
                    // A medium that somebody took away.
                    continue;
                }
                return Err(Fault::new(
                    Reason::SnapshotNotWhole,
                    format!(
                        "disk {target} of VM '{}' is defined as '{path}', which is gone, and it is \
                         not known what it stood on; the VM is left off",
                        self.vm()
                    ),
                )
                .with("path", path));
            };
            image::create_overlay(Path::new(&path), Path::new(below), format).await?;
            owner::of_below(below, &path)?;
            anew.push(format!("disk {target} goes on from '{below}'"));
        }
        self.hypervisor.define(kept.xml).await?;
        if anew.is_empty() {
            return Ok("the definition from before the revert is back".into());
        }
        self.notice(
            "STATE_LOST",
            format!(
                "libvirt had already deleted what was written since the last snapshot: {}",
                anew.join(", ")
            ),
            "",
        );
        Ok(anew.join("; "))
    }

    /// Gives libvirt its records of the snapshots back, and removes the overlays
    /// that it made for nothing.
    async fn records_again(&self, kept: &Kept<'_>) -> Result<(), Fault> {
        let in_use: Vec<String> = self
            .observer
            .disks_of_xml(kept.xml)?
            .into_iter()
            .map(|(_, disk)| disk.path)
            .collect();
        let mut for_nothing = Vec::new();
        let mut records = Vec::new();
        for (name, record) in kept.records {
            let parent = Hypervisor::parent_of_record(record)?;
            records.push((name, parent, record, self.record_now(name).await?));
        }
        // libvirt takes no record whose parent it does not know.
        if let [(_, parent, ..), (name, ..)] = &records[..]
            && parent.as_ref() == Some(*name)
        {
            records.reverse();
        }
        for (name, _, record, now) in records {
            let before = Hypervisor::overlays_of_record(record)?;
            for overlay in Hypervisor::overlays_of_record(now.as_deref().unwrap_or(record))? {
                if !in_use.contains(&overlay) && !before.contains(&overlay) {
                    for_nothing.push(overlay);
                }
            }
            if now.is_none()
                && let Err(fault) = self.nothing_descends_from(name).await
            {
                self.remove_overlays(kept).await?;
                return Err(fault);
            }
            self.redefine(record, name, kept.current == Some(name))
                .await?;
        }
        self.remove_unused(&for_nothing).await?;
        self.remove_overlays(kept).await
    }

    /// libvirt's record of a snapshot. None when it has forgotten the snapshot, which
    /// libvirt 11.3 does when it cannot write a record that replaces the one before;
    /// the file with that is still there.
    async fn record_now(&self, name: &str) -> Result<Option<String>, Fault> {
        match self.hypervisor.snapshot_xml(self.vm(), name).await {
            Ok(record) => Ok(Some(record)),
            Err(error) if *error.kind() == ErrorKind::NotFound(What::Snapshot) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Leaves libvirt's memory alone where it has forgotten a snapshot from which
    /// others descend: libvirt 11.3 crashes when that is recorded anew.
    async fn nothing_descends_from(&self, name: &str) -> Result<(), Fault> {
        let all = self.hypervisor.snapshots(self.vm()).await?;
        if all.iter().all(|one| one.parent.as_deref() != Some(name)) {
            return Ok(());
        }
        Err(Fault::new(
            Reason::HypervisorFailed,
            format!(
                "libvirt could not write its record of snapshot '{name}' and has forgotten it; its \
                 file is still there: give libvirt room or the right to write in its folder of \
                 snapshots, and start libvirt's daemon anew, which reads it again; guests go on \
                 meanwhile"
            ),
        )
        .with("snapshot", name))
    }

    /// Removes the overlays that libvirt had made before it was cut off: no record
    /// names them yet. They are the run's when they were not there before, stand on
    /// the image that the revert was to go on from, and nobody uses them.
    async fn remove_overlays(&self, kept: &Kept<'_>) -> Result<(), Fault> {
        let mut made = Vec::new();
        for (image, before) in kept.overlays {
            for path in overlays_beside(image) {
                if before.contains(&path) {
                    continue;
                }
                match image::info(Path::new(&path), Some("qcow2")).await {
                    Ok(info) if info.backing_path.as_ref() == Some(image) => made.push(path),
                    // Cut off in the middle of being made.
                    _ if std::fs::metadata(&path).is_ok_and(|file| file.len() == 0) => {
                        made.push(path);
                    }
                    _ => {}
                }
            }
        }
        self.remove_unused(&made).await?;
        Ok(())
    }
}
