//! Going back to the disks of a snapshot alone: libvirt's revert without the memory,
//! which libvirt loads in any revert.
//!
//! Invariants: what libvirt finds afterwards is what its own revert would have left;
//! what was there before goes last, so that until then all of it can be taken back.

use std::path::Path;

use vmsnap_hypervisor::{Hypervisor, image};

use super::{Kept, Performer, owner, since_epoch};
use crate::{
    observe::DiskImage,
    planning::{Done, Fault, Reason, names},
};

impl Performer {
    /// Fresh overlays on the data of the snapshot, its definition with them, and the
    /// records as libvirt would have them.
    pub(in crate::perform) async fn revert_disks(
        &self,
        name: &str,
        targets: &[String],
        definition: usize,
        done: &[Option<Done>],
    ) -> Result<Done, Fault> {
        self.still_alone_above(&self.snapshot(name)?).await?;
        let lost = |what: &str| Fault::new(Reason::Internal, format!("{what} was not kept"));
        let kept = Kept::of(definition, done).ok_or_else(|| lost("the definition"))?;
        let record = kept.record(name).ok_or_else(|| lost("the record"))?;
        let then = Hypervisor::definition_on(record, &[])?;
        let mut images = self.observer.written_disks_of_xml(&then)?;
        images.retain(|(target, _)| targets.contains(target));
        for target in targets {
            let image = images.iter().find(|(disk, _)| disk == target);
            if image.is_none_or(|(_, image)| !Path::new(&image.path).is_file()) {
                return Err(Fault::new(
                    Reason::SnapshotNotRevertible,
                    format!(
                        "disk {target} lies on no regular file in snapshot '{name}', and no \
                         overlay is put on anything else"
                    ),
                )
                .with("snapshot", name)
                .with("disk", target));
            }
        }
        let overlays = free_names(&images);
        let fresh: Vec<String> = overlays.iter().map(|(_, path)| path.clone()).collect();
        // All that can be refused is, before the guest is touched.
        let fresh_definition = Hypervisor::definition_on(record, &overlays)?;
        let beside = self
            .hypervisor
            .snapshots(self.vm())
            .await?
            .iter()
            .any(|other| other.parent.as_deref() == Some(name));
        let fresh_record = Hypervisor::with_overlays(record, &overlays, beside)?;
        let (mut left_behind, mut without) = (Vec::new(), None);
        if let Some(former) = kept.current
            && let Some(record) = kept.record(former)
        {
            left_behind = Hypervisor::overlays_of_record(record)?;
            let changed = Hypervisor::with_overlays(record, &[], true)?;
            without = (former != name && changed != record).then_some((former, changed));
        }
        // What disks lie on that the snapshot does not know stays.
        let present = self.observer.disks_of_xml(kept.xml)?;
        left_behind.retain(|path| {
            let mut of = present.iter().filter(|(_, image)| image.path == *path);
            of.any(|(target, _)| targets.contains(target))
        });

        self.journal.note_files(&self.live.id, fresh).await?;
        for ((_, image), (_, overlay)) in images.iter().zip(&overlays) {
            self.make_overlay(image, overlay).await?;
        }
        // Defined first: libvirt may refuse an old definition, and whoever starts the
        // VM from here on starts it on the new overlays.
        self.hypervisor.define(&fresh_definition).await?;
        self.hypervisor.destroy(self.vm()).await?;
        self.redefine(&fresh_record, name, true).await?;
        if let Some((former, record)) = without {
            self.redefine(&record, former, false).await?;
        }
        // The revert is done, whatever stays of the state before it.
        if let Err(fault) = self.remove_files(&left_behind, kept.current).await {
            let advice = match kept.current {
                Some(former) if former != name => {
                    format!("it goes with snapshot '{former}', when that is removed")
                }
                _ => "vmsnap cleanup removes it".into(),
            };
            self.notice("FILES_LEFT", fault.message, advice);
        }
        Ok(crate::perform::plain(""))
    }

    /// Makes the overlay of one disk; a file that is there is never written over.
    async fn make_overlay(&self, image: &DiskImage, overlay: &str) -> Result<(), Fault> {
        let made = std::fs::File::options()
            .write(true)
            .create_new(true)
            .open(overlay);
        if let Err(error) = made {
            self.journal.forget_files(vec![overlay.to_owned()]).await?;
            let reason = match error.kind() {
                std::io::ErrorKind::AlreadyExists => Reason::FileExists,
                _ => Reason::StorageNotWritable,
            };
            let message = format!("the overlay '{overlay}' cannot be made: {error}");
            return Err(Fault::new(reason, message).with("path", overlay));
        }
        let format = image.format.as_deref().unwrap_or("raw");
        image::create_overlay(Path::new(overlay), Path::new(&image.path), format).await?;
        owner::of_below(&image.path, overlay)
    }
}

/// Names for the overlays as libvirt would give them, of the first second from now
/// on of which no file is there.
fn free_names(images: &[(String, DiskImage)]) -> Vec<(String, String)> {
    let mut second = since_epoch().as_secs();
    loop {
        let overlays: Vec<(String, String)> = images
            .iter()
            .map(|(target, image)| {
                let stem = names::overlay_stem(&image.path);
                (target.clone(), format!("{stem}.{second}"))
            })
            .collect();
        let taken = |path: &str| std::fs::symlink_metadata(path).is_ok();
        if !overlays.iter().any(|(_, path)| taken(path)) {
            return overlays;
        }
        second += 1;
    }
}
