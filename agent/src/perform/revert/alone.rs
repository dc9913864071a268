//! Going back to the disks of a snapshot alone: libvirt's revert without the memory,
//! which libvirt loads in any revert.
//!
//! Invariants: what libvirt finds afterwards is what its own revert would have left;
//! what was there before goes last, so that until then all of it can be taken back.

use std::path::Path;

use vmsnap_hypervisor::{Hypervisor, image};

use super::{Kept, Performer, since_epoch};
use crate::planning::{Done, Fault, Reason, names};

impl Performer {
    /// Does what libvirt's revert does, but for the memory, which libvirt loads in any
    /// case: fresh overlays on the data of the snapshot, its definition with them,
    /// and the records as libvirt would have them. What was there before goes last,
    /// so that until then all of it can be taken back.
    pub(in crate::perform) async fn revert_disks(
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
        Ok(crate::perform::plain(""))
    }
}
