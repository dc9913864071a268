//! Deleting snapshots, which merges overlays, with progress in bytes.
//!
//! Invariants: libvirt merges and pivots itself, so that chain and metadata never
//! disagree; a snapshot that is not listed any more counts as deleted; what a
//! merge is about to write into is in the journal before, and stays there unless
//! the merge was finished or wrote nothing; a paused helper that libvirt booted
//! for a VM that was off never stays.

use std::{
    collections::BTreeMap,
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::{Duration, SystemTime},
};

use vmsnap_engine::Cancel;
use vmsnap_hypervisor::{DeleteFlags, DomainState, image};

use super::Performer;
use crate::planning::{
    Done, Fault, Reason,
    facts::{Kind, VmState, folder_of},
    files, tree,
};

/// How often progress of a merge is read.
const POLL: Duration = Duration::from_millis(250);
/// How soon a merge is looked for: it may be over soon.
const FIRST: Duration = Duration::from_millis(15);

/// What a delete step says.
pub(super) struct Merge<'a> {
    /// The snapshot.
    pub name: &'a str,
    /// Only libvirt's entry goes.
    pub metadata_only: bool,
    /// Targets of the disks that may be merged.
    pub disks: &'a [String],
    /// The merge is driven here, at so many bytes per second at most.
    pub bandwidth: Option<u64>,
    /// Files of ours that go with it.
    pub files: &'a [String],
}

impl Performer {
    pub(super) async fn delete(
        &self,
        index: usize,
        merge: Merge<'_>,
        cancel: &Cancel,
    ) -> Result<Done, Fault> {
        let name = merge.name;
        // A merge that is driven here makes short calls alone.
        let _place = match merge.bandwidth {
            None if !merge.metadata_only => Some(self.bulk(index, cancel).await?),
            _ => None,
        };
        let lower = if merge.metadata_only {
            Vec::new()
        } else {
            self.note_lower(name, merge.disks).await?
        };
        let mut merging = match self.still_alone(&merge, &lower).await {
            Ok(()) => self.merge(index, &merge, &lower, cancel).await,
            Err(fault) => Err(fault),
        };
        if let Err(fault) = &merging
            && self.wakes_disks(fault).await?
        {
            merging = self.merge(index, &merge, &lower, cancel).await;
        }
        let mut merged = match merging {
            Ok(merged) => merged,
            Err(fault) => {
                // A call that is late may still write.
                let untouched = fault.reason != Reason::HypervisorOverdue
                    && lower.iter().all(|lower| stamp(&lower.path) == lower.stamp);
                if untouched {
                    self.journal.forget_merge(&self.plan.vm_uuid, name).await?;
                }
                let fault = self.with_place(fault, &lower);
                return Err(match self.gives_up(cancel) {
                    Some(stopped) => given_up(stopped, &fault, name, untouched),
                    None => fault,
                });
            }
        };
        // A merge may be over before it was looked at.
        for lower in &lower {
            let seen = merged.entry(lower.disk).or_default();
            *seen = (*seen).max(lower.above);
            self.progress(index, lower.disk, *seen, *seen);
        }
        let merged_bytes = merged.values().sum();
        let written = lower
            .iter()
            .filter_map(|lower| Some((lower.path.clone(), stamp(&lower.path)?.0)))
            .map(|(path, time)| (path, crate::observe::nanoseconds(time)))
            .collect();
        self.journal
            .finish_merge(&self.plan.vm_uuid, name, written)
            .await?;
        self.journal
            .forget_snapshot(&self.plan.vm_uuid, name)
            .await?;
        // libvirt removes overlays and memory; copies of UEFI variables are ours.
        self.remove_unused(merge.files).await?;
        self.forget_gone().await?;
        if self.has_siblings(name) {
            self.mend_if_needed().await?;
        }
        Ok(Done::Deleted { merged_bytes })
    }

    async fn merge<'a>(
        &self,
        index: usize,
        merge: &Merge<'a>,
        lower: &[Lower<'a>],
        cancel: &Cancel,
    ) -> Result<BTreeMap<&'a str, u64>, Fault> {
        match merge.bandwidth {
            Some(limit) => {
                self.delete_limited(index, merge.name, lower, limit, cancel)
                    .await
            }
            None => self.delete_by_libvirt(index, merge, cancel).await,
        }
    }

    /// Whether somebody came to use what is about to be merged into or removed.
    async fn still_alone(&self, merge: &Merge<'_>, lower: &[Lower<'_>]) -> Result<(), Fault> {
        if merge.metadata_only {
            return Ok(());
        }
        let inside = self
            .facts
            .iter()
            .filter_map(|facts| facts.snapshot(merge.name))
            .flat_map(|snapshot| &snapshot.disks)
            .filter(|disk| disk.kind == Some(Kind::Internal))
            .filter_map(|disk| disk.data.as_ref());
        let lower = lower.iter().map(|lower| &lower.path);
        let paths = lower.chain(inside).chain(merge.files).cloned();
        self.came_into_use(paths.collect()).await
    }

    /// After a memory capture of a paused guest that somebody else made, QEMU's
    /// block nodes are inactive, and no merge begins. Whether they were woken, so
    /// that it is worth another try.
    async fn wakes_disks(&self, fault: &Fault) -> Result<bool, Fault> {
        if !fault.message.contains("Inactive '")
            || self.hypervisor.domain(self.vm()).await?.state != DomainState::Paused
        {
            return Ok(false);
        }
        self.hypervisor.activate_disks(self.vm()).await?;
        Ok(true)
    }

    /// Adds what a caller needs: for a lack of space, where and how much; else the
    /// file that could not be written, which is the image of a chain that libvirt's
    /// words name, or what was to be merged into.
    fn with_place(&self, fault: Fault, lower: &[Lower<'_>]) -> Fault {
        let Some(facts) = &self.facts else {
            return fault;
        };
        match fault.reason {
            Reason::NoSpace => {
                for lower in lower {
                    let folder = folder_of(&lower.path);
                    if let Some(now) =
                        crate::observe::folder(folder).filter(|now| now.free < lower.above)
                    {
                        let mut full = files::no_space(facts, folder, lower.above, now.free);
                        full.message = format!("{}; {}", full.message, fault.message);
                        return full;
                    }
                }
                fault
            }
            Reason::StorageNotWritable => {
                let named = facts
                    .vm
                    .disks
                    .iter()
                    .flat_map(|disk| &disk.chain)
                    .map(|image| &image.path)
                    .filter(|path| fault.message.contains(&format!("'{path}'")))
                    .chain(lower.iter().map(|lower| &lower.path))
                    .next()
                    .cloned();
                match named {
                    Some(path) => fault.with("path", path),
                    None => fault,
                }
            }
            _ => fault,
        }
    }

    /// Whether other snapshots have the same parent: then libvirt forgets which
    /// overlay of the parent the present state is on.
    fn has_siblings(&self, name: &str) -> bool {
        self.facts.as_ref().is_some_and(|facts| {
            let parent = facts.snapshot(name).and_then(|one| one.parent.as_deref());
            parent.is_some_and(|parent| tree::children(facts, parent).len() > 1)
        })
    }

    /// Has libvirt merge and delete. Returns the bytes that were seen to be merged,
    /// by disk.
    async fn delete_by_libvirt<'a>(
        &self,
        index: usize,
        merge: &Merge<'a>,
        cancel: &Cancel,
    ) -> Result<BTreeMap<&'a str, u64>, Fault> {
        let (name, disks) = (merge.name, merge.disks);
        let flags = DeleteFlags {
            metadata_only: merge.metadata_only,
            ..DeleteFlags::default()
        };
        let mut merged: BTreeMap<&str, u64> = BTreeMap::new();
        let mut pause = FIRST;
        let deleting = self.hypervisor.delete_snapshot(self.vm(), name, flags);
        tokio::pin!(deleting);
        let result = loop {
            tokio::select! {
                result = &mut deleting => break result,
                () = tokio::time::sleep(pause) => {
                    pause = (pause * 5 / 4).min(POLL);
                    if self.gives_up(cancel).is_some()
                        && let Err(error) = self.hypervisor.give_up_merges(self.vm()).await
                    {
                        tracing::warn!(
                            run = %self.live.id,
                            vm = self.vm(),
                            %error,
                            "the merge could not be given up and goes on"
                        );
                    }
                    for disk in disks {
                        let Ok(Some(job)) = self.hypervisor.block_job(self.vm(), disk).await else {
                            continue;
                        };
                        pause = POLL;
                        merged.insert(disk, job.cur);
                        self.progress(index, disk, job.cur, job.end);
                    }
                }
            }
        };
        match result {
            Ok(()) => Ok(merged),
            Err(error) => {
                let listed = self.hypervisor.snapshots(self.vm()).await?;
                if listed.iter().any(|snapshot| snapshot.name == name) {
                    return Err(error.into());
                }
                Ok(merged)
            }
        }
    }

    /// Why a merge is given up before its pivot: somebody cancelled the run, or the
    /// agent is to stop. One that is only out of time is finished.
    pub(super) fn gives_up(&self, cancel: &Cancel) -> Option<Fault> {
        if !cancel.is_requested() {
            return None;
        }
        let because =
            |fault: &Fault| matches!(fault.reason, Reason::Cancelled | Reason::ShuttingDown);
        self.live.stopped_because().filter(because)
    }

    /// Merges the newest snapshot of the present state under a limit, then has
    /// libvirt forget it.
    async fn delete_limited<'a>(
        &self,
        index: usize,
        name: &str,
        lower: &[Lower<'a>],
        bandwidth: u64,
        cancel: &Cancel,
    ) -> Result<BTreeMap<&'a str, u64>, Fault> {
        let merged = self.merge_active(index, lower, bandwidth, cancel).await?;
        let flags = DeleteFlags {
            metadata_only: true,
            ..DeleteFlags::default()
        };
        self.hypervisor
            .delete_snapshot(self.vm(), name, flags)
            .await?;
        Ok(merged)
    }

    /// The images that deleting a snapshot merges into, noted in the journal:
    /// those that hold its data of the given disks. Disks on whose chain the data
    /// does not lie merge nothing.
    async fn note_lower<'a>(
        &self,
        name: &str,
        disks: &'a [String],
    ) -> Result<Vec<Lower<'a>>, Fault> {
        let listed = self.hypervisor.snapshots(self.vm()).await?;
        let Some(snapshot) = listed.into_iter().find(|one| one.name == name) else {
            return Ok(Vec::new());
        };
        let mut found = Vec::new();
        for disk in disks {
            let data = snapshot
                .definition
                .iter()
                .flat_map(|definition| &definition.disks)
                .find(|one| one.target == *disk)
                .and_then(|one| one.path.as_ref());
            let (Some(data), Ok(Some(active))) =
                (data, self.observer.disk_image(self.vm(), disk).await)
            else {
                continue;
            };
            let chain = image::chain(Path::new(&active.path), active.format.as_deref()).await;
            let Ok(chain) = chain else {
                continue;
            };
            let at = chain.iter().position(|image| image.path == *data);
            if let Some(above) = at.and_then(|at| at.checked_sub(1)) {
                found.push(Lower {
                    disk,
                    above: chain[above].actual_size,
                    stamp: stamp(data),
                    path: data.clone(),
                });
            }
        }
        if !found.is_empty() {
            let disks = found.iter().map(|lower| lower.disk.to_owned()).collect();
            self.journal
                .note_merge(&self.plan.vm_uuid, name, snapshot.creation_time, disks)
                .await?;
        }
        Ok(found)
    }

    /// A delete that failed leaves chain and metadata as they were; only a merge
    /// that was driven here has to be given up, and the helper of a VM that was off
    /// has to go.
    pub(super) async fn undo_delete(
        &self,
        boots_helper: bool,
        driven: bool,
        disks: &[String],
    ) -> Result<String, Fault> {
        if driven && self.abort_merges(disks.iter().map(String::as_str)).await? {
            return Ok("the open merge was given up; the chain is as it was".into());
        }
        if !boots_helper || self.plan.vm_state != VmState::Stopped {
            return Ok("chain and metadata are as libvirt left them".into());
        }
        let started = self
            .plan
            .steps
            .iter()
            .any(|step| matches!(step, crate::planning::Step::Start { .. }));
        let state = self.hypervisor.domain(self.vm()).await?.state;
        if state == DomainState::Paused && !started {
            self.hypervisor.destroy(self.vm()).await?;
            return Ok("the paused helper is gone; the VM is off, as before".into());
        }
        Ok("no helper is left".into())
    }
}

/// Says what the end of a merge that was given up left; another failure that came
/// before it stays what it is.
fn given_up(stopped: Fault, fault: &Fault, name: &str, untouched: bool) -> Fault {
    // QEMU's words for a job that was cancelled.
    if fault.reason != stopped.reason && !fault.message.contains("Operation canceled") {
        return fault.clone();
    }
    let left = if untouched {
        "the snapshot is as it was"
    } else {
        "the snapshot cannot be reverted to any more, and deleting it again finishes the merge"
    };
    let message = format!(
        "{}; the merge of snapshot '{name}' was given up before its end: the VM goes on as before, \
         and {left}",
        stopped.message
    );
    Fault { message, ..stopped }.with("snapshot", name)
}

/// An image that a merge writes into.
pub(super) struct Lower<'a> {
    /// Target of the disk.
    pub disk: &'a str,
    /// The image.
    pub path: String,
    /// Bytes that the image above it takes.
    pub above: u64,
    stamp: Option<(SystemTime, u64)>,
}

/// Tells whether a file was written: time of the last change, and blocks.
fn stamp(path: &str) -> Option<(SystemTime, u64)> {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.blocks()))
}
