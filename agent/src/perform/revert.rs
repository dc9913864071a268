//! Going back to a snapshot.
//!
//! Invariants: what can be checked is checked before libvirt is asked, because it
//! kills the guest first; the definition and the records that a revert changes are
//! in the journal before.

mod alone;
mod checks;
mod undo;

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use vmsnap_hypervisor::{DomainState, Hypervisor, RevertFlags, Xml, image};

use super::{Performer, create, owner};
use crate::{
    faults::sentence,
    planning::{
        Done, Fault, Reason,
        actions::revert as planned,
        facts::{Kind, Memory, Snapshot, folder_of},
        health::WITHOUT_MEMORY,
        lineage,
    },
};

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
            checks::memory(&snapshot, true).await?;
        }
        if let Some((copy, file)) = nvram {
            checks::nvram(&snapshot, copy, file).await?;
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
        checks::memory(&snapshot, false).await?;
        self.still_alone_above(&snapshot).await?;
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

    /// Whether somebody came to use what the revert writes or removes.
    async fn still_alone_above(&self, snapshot: &Snapshot) -> Result<(), Fault> {
        let Some(facts) = &self.facts else {
            return Ok(());
        };
        let written = planned::written(snapshot, facts);
        self.came_into_use(written.into_iter().map(str::to_owned).collect())
            .await
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
        let owned = owner::same(like, &fresh);
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
