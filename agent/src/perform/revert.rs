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

use vmsnap_hypervisor::{
    DomainState, DomainSummary, ErrorKind, Hypervisor, RevertFlags, What, Xml, image, saved,
};

use super::{Performer, create};
use crate::{
    faults::sentence,
    planning::{
        Done, Fault, Reason, Step,
        facts::{Kind, Memory, Snapshot, VmState, folder_of},
        health::WITHOUT_MEMORY,
        lineage, names,
    },
};

/// How often a VM that is going down is looked at before it is taken as it is.
const SETTLE: u32 = 40;
/// Pause between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// What [`Done::Definition`] keeps.
struct Kept<'a> {
    xml: &'a str,
    id: Option<u32>,
    backing: &'a [(String, String, String)],
    records: &'a [(String, String)],
    current: Option<&'a str>,
    overlays: &'a [(String, Vec<String>)],
}

impl<'a> Kept<'a> {
    fn of(definition: usize, done: &'a [Option<Done>]) -> Option<Self> {
        let Some(Done::Definition {
            xml,
            id,
            backing,
            records,
            current,
            overlays,
        }) = done.get(definition)?.as_ref()
        else {
            return None;
        };
        Some(Self {
            xml,
            id: *id,
            backing,
            records,
            current: current.as_deref(),
            overlays,
        })
    }

    fn record(&self, name: &str) -> Option<&'a str> {
        let (_, record) = self.records.iter().find(|(of, _)| of == name)?;
        Some(record)
    }
}

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
    /// Looks at the files of a snapshot, which libvirt itself opens only after it
    /// has killed the guest.
    pub(super) async fn check_snapshot(
        &self,
        name: &str,
        nvram: Option<&(String, String)>,
        memory: bool,
    ) -> Result<Done, Fault> {
        let snapshot = self.snapshot(name)?;
        if memory {
            check_memory(&snapshot, true).await?;
        }
        if let Some((copy, file)) = nvram {
            check_nvram(&snapshot, copy, file).await?;
        }
        Ok(super::plain("they are whole"))
    }

    pub(super) async fn mend_record(
        &self,
        name: &str,
        overlays: &[(String, String)],
    ) -> Result<Done, Fault> {
        let record = self.hypervisor.snapshot_xml(self.vm(), name).await?;
        let mended = Hypervisor::with_overlays(&record, overlays, true)?;
        self.redefine(&mended, name, true).await?;
        Ok(super::plain("it names the overlays of the present state"))
    }

    pub(super) async fn keep_definition(&self) -> Result<Done, Fault> {
        let xml = self.hypervisor.domain_xml(self.vm(), Xml::Inactive).await?;
        let mut backing = Vec::new();
        for (target, disk) in self.observer.disks_of_xml(&xml)? {
            // An image that cannot be read is none that could be made again.
            let info = image::info(Path::new(&disk.path), disk.format.as_deref()).await;
            if let Ok(info) = info
                && let Some(below) = info.backing_path
            {
                let format = match info.backing_format {
                    Some(format) => format,
                    None => image::info(Path::new(&below), None).await?.format,
                };
                backing.push((target, below, format));
            }
        }
        let current = self.current_snapshot().await?;
        let mut records = Vec::new();
        let changed = [current.as_ref(), Some(&self.plan.snapshot)];
        for name in changed.into_iter().flatten() {
            if records.iter().all(|(known, _)| known != name) {
                let record = self.hypervisor.snapshot_xml(self.vm(), name).await?;
                records.push((name.clone(), record));
            }
        }
        let overlays = self
            .snapshot(&self.plan.snapshot)?
            .definition
            .disks
            .into_iter()
            .filter_map(|disk| disk.path)
            .map(|image| {
                let there = overlays_beside(&image);
                (image, there)
            })
            .collect();
        Ok(Done::Definition {
            xml,
            id: self.hypervisor.domain(self.vm()).await?.id,
            backing,
            records,
            current,
            overlays,
        })
    }

    pub(super) async fn revert(
        &self,
        name: &str,
        running: bool,
        paused: bool,
        force: bool,
    ) -> Result<Done, Fault> {
        let snapshot = self.snapshot(name)?;
        // The whole file was read by a step before; other steps may have taken long.
        check_memory(&snapshot, false).await?;
        if snapshot.kind != Kind::Internal {
            self.pace(&snapshot).await?;
        }
        let flags = RevertFlags {
            running,
            paused,
            force,
            reset_nvram: false,
        };
        let began = since_epoch().as_secs();
        let reverted = self.hypervisor.revert(self.vm(), name, flags).await;
        reverted.map_err(|error| {
            let mut fault = Fault::from(error);
            if matches!(snapshot.memory, Memory::External(_)) {
                let way = format!("; if its memory is what cannot be loaded, {WITHOUT_MEMORY}");
                fault.message.push_str(&way);
            }
            fault
        })?;
        // QEMU leaves the disks of loaded memory inactive until it is resumed: what
        // writes or merges before that fails, or ends QEMU.
        if matches!(snapshot.memory, Memory::External(_))
            && self.hypervisor.domain(self.vm()).await?.state == DomainState::Paused
        {
            self.hypervisor.activate_disks(self.vm()).await?;
        }
        self.note_overlays(began).await?;
        Ok(super::plain(""))
    }

    /// Does what libvirt's revert does, but for the memory, which libvirt loads in any
    /// case: fresh overlays on the data of the snapshot, its definition with them,
    /// and the records as libvirt would have them. What was there before goes last,
    /// so that until then all of it can be taken back.
    pub(super) async fn revert_disks(
        &self,
        name: &str,
        targets: &[String],
        definition: usize,
        done: &[Option<Done>],
    ) -> Result<Done, Fault> {
        let snapshot = self.snapshot(name)?;
        let lost = |what: &str| Fault::new(Reason::Internal, format!("{what} was not kept"));
        let kept = Kept::of(definition, done).ok_or_else(|| lost("the definition"))?;
        let record = kept.record(name).ok_or_else(|| lost("the record"))?;
        self.pace(&snapshot).await?;
        let second = since_epoch().as_secs();
        let then = Hypervisor::definition_on(record, &[])?;
        let mut images = self.observer.disks_of_xml(&then)?;
        images.retain(|(target, _)| targets.contains(target));
        let overlays: Vec<(String, String)> = images
            .iter()
            .map(|(target, image)| {
                let stem = names::overlay_stem(&image.path);
                (target.clone(), format!("{stem}.{second}"))
            })
            .collect();
        let fresh: Vec<String> = overlays.iter().map(|(_, path)| path.clone()).collect();
        self.journal
            .note_files(&self.live.id, fresh.clone())
            .await?;
        for ((_, image), overlay) in images.iter().zip(&fresh) {
            let format = image.format.as_deref().unwrap_or("raw");
            image::create_overlay(Path::new(overlay), Path::new(&image.path), format).await?;
            self.observer.same_owner(&image.path, overlay)?;
        }
        let fresh_definition = Hypervisor::definition_on(record, &overlays)?;

        // From here on the guest is off.
        self.hypervisor.destroy(self.vm()).await?;
        self.hypervisor.define(&fresh_definition).await?;
        let beside = self
            .hypervisor
            .snapshots(self.vm())
            .await?
            .iter()
            .any(|other| other.parent.as_deref() == Some(name));
        let fresh_record = Hypervisor::with_overlays(record, &overlays, beside)?;
        self.redefine(&fresh_record, name, true).await?;
        let mut left_behind = Vec::new();
        if let Some((former, record)) = kept
            .current
            .and_then(|former| Some((former, kept.record(former)?)))
        {
            left_behind = Hypervisor::overlays_of_record(record)?;
            let without = Hypervisor::with_overlays(record, &[], true)?;
            if former != name && without != record {
                self.redefine(&without, former, false).await?;
            }
        }
        let present = self.observer.disks_of_xml(kept.xml)?;
        left_behind.retain(|path| present.iter().any(|(_, image)| image.path == *path));
        // The revert is done, whatever stays of the state before it.
        if let Err(fault) = self.remove_files(&left_behind, kept.current).await {
            self.notice("FILES_LEFT", fault.message, "vmsnap cleanup removes them");
        }
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

    /// The snapshot that the present state descends from, by libvirt's record.
    async fn current_snapshot(&self) -> Result<Option<String>, Fault> {
        let all = self.hypervisor.snapshots(self.vm()).await?;
        Ok(all
            .into_iter()
            .find(|snapshot| snapshot.is_current)
            .map(|snapshot| snapshot.name))
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

    /// libvirt names the new overlay by the second, beside the image that it
    /// stands on, and refuses if that file is there: waits until no file of the
    /// present second or a later one is.
    async fn pace(&self, snapshot: &Snapshot) -> Result<(), Fault> {
        let now = since_epoch();
        let mut last = 0;
        for path in snapshot
            .definition
            .disks
            .iter()
            .filter_map(|it| it.path.as_ref())
        {
            let Some(folder) = crate::observe::folder(folder_of(path)) else {
                continue;
            };
            let seconds = folder
                .names
                .iter()
                .filter_map(|name| second_in(name))
                // Far in the future means that it is no time at all.
                .filter(|second| (now.as_secs()..now.as_secs() + 5).contains(second))
                .max();
            last = last.max(seconds.unwrap_or(0));
        }
        if last >= now.as_secs() {
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
        let like = if tokio::fs::metadata(to).await.is_ok() {
            to
        } else {
            from
        };
        let owned = self.observer.same_owner(like, &fresh);
        let put_back = match owned {
            Ok(()) => tokio::fs::rename(&fresh, to).await.map_err(|error| {
                Fault::new(
                    Reason::StorageNotWritable,
                    format!("the UEFI variables cannot be put back into '{to}': {error}"),
                )
                .with("path", to)
            }),
            Err(fault) => Err(fault),
        };
        if let Err(fault) = put_back {
            let _ = tokio::fs::remove_file(&fresh).await;
            return Err(fault);
        }
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
        let Some(kept) = Kept::of(definition, done) else {
            return Ok("the revert never began".into());
        };
        match self.left(&kept).await? {
            Left::Untouched => {
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
        let record = self.hypervisor.snapshot_xml(self.vm(), name).await?;
        self.redefine(&record, name, true).await?;
        Ok(format!("the VM is in snapshot '{name}' now"))
    }

    /// Whether a VM that is off was reverted all the same: what it had is gone, it
    /// is defined on images that are its own, and libvirt takes the snapshot for the
    /// current one. Empty images on what the old ones stood on would be a third
    /// state that nobody asked for.
    async fn is_reverted(&self, kept: &Kept<'_>) -> Result<bool, Fault> {
        let defined = self.hypervisor.domain_xml(self.vm(), Xml::Inactive).await?;
        let there = |path: &str| std::fs::metadata(path).is_ok();
        let before = self.observer.disks_of_xml(kept.xml)?;
        let now = self.observer.disks_of_xml(&defined)?;
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
        let domain = self.settled().await?;
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
    /// still loading memory may have been given up: that is not waited for long.
    async fn settled(&self) -> Result<DomainSummary, Fault> {
        let mut tries = 0;
        loop {
            let domain = self.hypervisor.domain(self.vm()).await?;
            let patience = match domain.state {
                DomainState::Shutdown => SETTLE,
                _ if domain.reason.is_migrating() => SETTLE / 10,
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
        for (target, disk) in self.observer.disks_of_xml(kept.xml)? {
            let path = disk.path;
            if tokio::fs::metadata(&path).await.is_ok() {
                continue;
            }
            let below = kept.backing.iter().find(|(disk, ..)| *disk == target);
            let Some((_, below, format)) = below else {
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
            self.observer.same_owner(below, &path)?;
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

    /// Replaces libvirt's record of a snapshot.
    async fn redefine(&self, record: &str, name: &str, current: bool) -> Result<(), Fault> {
        // Made current anew, the current one would lose its overlays of a revert.
        let becomes = current && self.current_snapshot().await?.as_deref() != Some(name);
        let set = self
            .hypervisor
            .redefine_snapshot(self.vm(), record, becomes)
            .await;
        set.map_err(|error| {
            let fault = Fault::from(error.clone());
            Fault {
                message: format!(
                    "libvirt's record of snapshot '{name}' could not be set right: {}",
                    sentence(&error)
                ),
                ..fault
            }
        })
    }

    /// Sets libvirt's record of the current snapshot right, after a step that may
    /// have spoiled it.
    pub(super) async fn mend_if_needed(&self) -> Result<(), Fault> {
        let facts = self.observer.facts(&self.plan.request).await?;
        // What cannot be mended is refused when it would do harm.
        if let Ok(Some((name, overlays))) = lineage::to_mend(&facts) {
            self.mend_record(&name, &overlays).await?;
        }
        Ok(())
    }
}

/// The files beside an image that have the name that libvirt gives the overlay of
/// a revert: the image's own with its ending replaced by a second.
fn overlays_beside(image: &str) -> Vec<String> {
    let Some(folder) = crate::observe::folder(folder_of(image)) else {
        return Vec::new();
    };
    let stem = |path: &str| path.rsplit_once('.').map(|(stem, _)| stem.to_owned());
    let own = image.rsplit('/').next().unwrap_or(image);
    let own = stem(own).unwrap_or_else(|| own.to_owned());
    folder
        .names
        .into_iter()
        .filter(|name| second_in(name).is_some() && stem(name).as_deref() == Some(&own))
        .map(|name| format!("{}/{name}", folder_of(image).trim_end_matches('/')))
        .collect()
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

/// Compares the memory file with what was recorded, or at least with what libvirt
/// writes: it notices a damaged one only after it has killed the guest.
async fn check_memory(snapshot: &Snapshot, whole: bool) -> Result<(), Fault> {
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
async fn check_nvram(snapshot: &Snapshot, copy: &str, file: &str) -> Result<(), Fault> {
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
