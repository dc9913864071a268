//! Deleting snapshots, which merges overlays, with progress in bytes.
//!
//! Invariants: libvirt merges and pivots itself, so that chain and metadata never
//! disagree; a snapshot that is not listed any more counts as deleted; a paused helper that libvirt booted for a
//! VM that was off never stays.

use std::{collections::BTreeMap, path::Path, time::Duration};

use vmsnap_hypervisor::{DeleteFlags, DomainState, ErrorKind, image};

use super::Performer;
use crate::{
    faults,
    planning::{
        Done, Fault,
        facts::{VmState, folder_of},
        files, tree,
    },
};

/// How often progress of a merge is read.
const POLL: Duration = Duration::from_millis(250);
/// How soon a merge is looked for: libvirt's delete takes no limit, so that one
/// is set on the job as soon as it is seen.
const FIRST: Duration = Duration::from_millis(15);

impl Performer {
    pub(super) async fn delete(
        &self,
        index: usize,
        name: &str,
        metadata_only: bool,
        disks: &[String],
        bandwidth: Option<u64>,
        files: &[String],
    ) -> Result<Done, Fault> {
        let flags = DeleteFlags {
            metadata_only,
            ..DeleteFlags::default()
        };
        let mut merged: BTreeMap<&str, u64> = BTreeMap::new();
        let mut limited: Vec<&str> = Vec::new();
        let expected = self.to_merge(name, disks).await;
        let mut pause = FIRST;
        let result = {
            let deleting = self.hypervisor.delete_snapshot(self.vm(), name, flags);
            tokio::pin!(deleting);
            loop {
                tokio::select! {
                    result = &mut deleting => break result,
                    () = tokio::time::sleep(pause) => {
                        pause = (pause * 5 / 4).min(POLL);
                        for disk in disks {
                            let Ok(Some(job)) = self.hypervisor.block_job(self.vm(), disk).await else {
                                continue;
                            };
                            if let Some(bytes) = bandwidth
                                && !limited.contains(&disk.as_str())
                                && self.hypervisor.block_job_speed(self.vm(), disk, bytes).await.is_ok()
                            {
                                limited.push(disk);
                            }
                            pause = POLL;
                            merged.insert(disk, job.cur);
                            self.progress(index, disk, job.cur, job.end);
                        }
                    }
                }
            }
        };
        if let Err(error) = result {
            let listed = self
                .hypervisor
                .snapshots(self.vm())
                .await?
                .iter()
                .any(|snapshot| snapshot.name == name);
            if listed {
                return Err(self.merge_failed(error, name, &expected));
            }
        }
        // A merge may be over before it was looked at.
        for (disk, bytes) in &expected {
            let seen = merged.entry(disk).or_default();
            *seen = (*seen).max(*bytes);
            self.progress(index, disk, *seen, *seen);
        }
        self.journal
            .forget_snapshot(&self.plan.vm_uuid, name)
            .await?;
        // libvirt removes overlays and memory; copies of UEFI variables are ours.
        self.remove_unused(files).await?;
        self.forget_gone().await?;
        if self.has_siblings(name) {
            self.mend_if_needed().await?;
        }
        Ok(Done::Deleted {
            merged_bytes: merged.values().sum(),
        })
    }

    /// libvirt's error; for a lack of space with where and how much.
    fn merge_failed(
        &self,
        error: vmsnap_hypervisor::Error,
        name: &str,
        expected: &[(&str, u64)],
    ) -> Fault {
        if *error.kind() == ErrorKind::NoSpace
            && let Some(facts) = &self.facts
            && let Some(snapshot) = facts.snapshot(name)
        {
            for (target, need) in expected {
                let written = snapshot.disks.iter().find(|disk| disk.target == **target);
                let Some(data) = written.and_then(|disk| disk.data.as_deref()) else {
                    continue;
                };
                let folder = folder_of(data);
                if let Some(now) = crate::observe::folder(folder).filter(|now| now.free < *need) {
                    let mut full = files::no_space(facts, folder, *need, now.free);
                    full.message = format!("{}; {}", full.message, faults::sentence(&error));
                    return full;
                }
            }
        }
        error.into()
    }

    /// Whether other snapshots have the same parent: then libvirt forgets which
    /// overlay of the parent the present state is on.
    fn has_siblings(&self, name: &str) -> bool {
        self.facts.as_ref().is_some_and(|facts| {
            let parent = facts.snapshot(name).and_then(|one| one.parent.as_deref());
            parent.is_some_and(|parent| tree::children(facts, parent).len() > 1)
        })
    }

    /// Bytes that the overlay over a snapshot's data takes now, by disk: what its
    /// deletion merges. Disks on whose chain the data does not lie merge nothing.
    async fn to_merge<'a>(&self, name: &str, disks: &'a [String]) -> Vec<(&'a str, u64)> {
        let Some(snapshot) = self.facts.as_ref().and_then(|facts| facts.snapshot(name)) else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for disk in disks {
            let data = snapshot
                .disks
                .iter()
                .find(|one| one.target == *disk)
                .and_then(|one| one.data.as_ref());
            let (Some(data), Ok(Some(active))) =
                (data, self.observer.disk_image(self.vm(), disk).await)
            else {
                continue;
            };
            let Ok(chain) = image::chain(Path::new(&active.path), active.format.as_deref()).await
            else {
                continue;
            };
            let at = chain.iter().position(|image| image.path == *data);
            if let Some(above) = at.and_then(|at| at.checked_sub(1)) {
                found.push((disk.as_str(), chain[above].actual_size));
            }
        }
        found
    }

    /// A delete that failed leaves chain and metadata as they were; only the
    /// helper of a VM that was off has to go.
    pub(super) async fn undo_delete(&self, boots_helper: bool) -> Result<String, Fault> {
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
