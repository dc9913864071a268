//! Merging the active images of a running VM under a limit.
//!
//! libvirt's own snapshot delete takes no limit, and while it goes on none can be
//! set. So the newest snapshot of the present state is merged by block jobs that
//! have one from their first byte, and libvirt's entry goes right after the pivot.
//!
//! Invariants: all disks are ready before the first one pivots; what is merged
//! into is in the journal before, and stays there until the entry is gone; on
//! giving up, because the run was cancelled or something failed, the jobs are
//! aborted, which leaves the chain as it was; a run that is out of time lifts the
//! limit and finishes what it has begun.

use std::{collections::BTreeMap, time::Duration};

use vmsnap_engine::Cancel;
use vmsnap_hypervisor::{BlockJobKind, ErrorKind, Xml};

use super::{Performer, delete::Lower};
use crate::planning::{Fault, Reason, facts::folder_of, files};

/// How often a merge is looked at.
const POLL: Duration = Duration::from_millis(250);

impl Performer {
    /// Merges the active image of each disk into the one below it, and pivots.
    /// Returns the bytes that each merge moved.
    pub(super) async fn merge_active<'a>(
        &self,
        index: usize,
        lower: &[Lower<'a>],
        bandwidth: u64,
        cancel: &Cancel,
    ) -> Result<BTreeMap<&'a str, u64>, Fault> {
        let merged = self.copy_down(index, lower, bandwidth, cancel).await;
        let pivoted = match &merged {
            Ok(_) => self.pivot(lower).await,
            Err(fault) => Err(fault.clone()),
        };
        if let Err(fault) = pivoted {
            let aborted = self.abort_merges(lower.iter().map(|lower| lower.disk));
            if let Err(left) = aborted.await {
                // Undoing gives them up again.
                tracing::warn!(%left, "a merge may be open still");
            }
            return Err(fault);
        }
        merged
    }

    /// Copies one disk after the other, so that the limit holds for all together.
    async fn copy_down<'a>(
        &self,
        index: usize,
        lower: &[Lower<'a>],
        mut bandwidth: u64,
        cancel: &Cancel,
    ) -> Result<BTreeMap<&'a str, u64>, Fault> {
        let mut merged = BTreeMap::new();
        for (at, one) in lower.iter().enumerate() {
            self.hypervisor
                .block_commit(self.vm(), one.disk, &one.path, bandwidth)
                .await?;
            loop {
                let Some(job) = self.hypervisor.block_job(self.vm(), one.disk).await? else {
                    return Err(self.job_ended(one).await);
                };
                merged.insert(one.disk, job.cur);
                self.progress(index, one.disk, job.cur, job.end);
                if job.cur == job.end && self.is_ready(one.disk).await? {
                    break;
                }
                if let Some(stopped) = self.gives_up(cancel) {
                    return Err(stopped);
                }
                if bandwidth > 0 && cancel.is_requested() {
                    self.lift(bandwidth, &lower[..=at]).await?;
                    bandwidth = 0;
                }
                tokio::time::sleep(POLL).await;
            }
        }
        Ok(merged)
    }

    /// A merge that has begun is finished, and then soon: one that a busy guest
    /// outruns below its limit would never end.
    async fn lift(&self, bandwidth: u64, begun: &[Lower<'_>]) -> Result<(), Fault> {
        for lower in begun {
            self.hypervisor
                .block_job_speed(self.vm(), lower.disk, 0)
                .await?;
        }
        self.notice(
            "LIMIT_LIFTED",
            format!(
                "the run is out of time, and a merge that has begun is finished: its limit of \
                 {bandwidth} bytes per second was lifted"
            ),
            "",
        );
        Ok(())
    }

    async fn is_ready(&self, disk: &str) -> Result<bool, Fault> {
        let live = self.hypervisor.definition(self.vm(), Xml::Live).await?;
        let disk = live.disks.into_iter().find(|one| one.target == disk);
        Ok(disk
            .and_then(|disk| disk.mirror)
            .is_some_and(|mirror| mirror.merge && mirror.ready))
    }

    async fn job_ended(&self, lower: &Lower<'_>) -> Fault {
        let state = match self.hypervisor.domain(self.vm()).await {
            Ok(domain) => domain.reason.to_string(),
            Err(error) => return error.into(),
        };
        let message = format!(
            "the merge of disk {} of VM '{}' into '{}' ended before it was ready (the VM: {state})",
            lower.disk,
            self.vm(),
            lower.path
        );
        // QEMU does not say why it gave up: room tells.
        let folder = folder_of(&lower.path);
        if let (Some(facts), Some(now)) = (&self.facts, crate::observe::folder(folder))
            && now.free < lower.above
        {
            let mut full = files::no_space(facts, folder, lower.above, now.free);
            full.message = format!("{}; {message}", full.message);
            return full.with("disk", lower.disk).with("image", &lower.path);
        }
        Fault::new(Reason::HypervisorFailed, message)
            .with("disk", lower.disk)
            .with("path", &lower.path)
    }

    async fn pivot(&self, lower: &[Lower<'_>]) -> Result<(), Fault> {
        for lower in lower {
            let pivot = self
                .hypervisor
                .block_job_abort(self.vm(), lower.disk, true)
                .await;
            match pivot {
                Ok(()) => {}
                // The guest wrote meanwhile: once more alike, once more ready.
                Err(error) if *error.kind() == ErrorKind::BlockJobNotReady => {
                    tokio::time::sleep(POLL).await;
                    self.hypervisor
                        .block_job_abort(self.vm(), lower.disk, true)
                        .await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Gives up open merges of active images; the chain stays as it was. A disk that
    /// cannot be asked is no disk without a merge.
    pub(super) async fn abort_merges<'a>(
        &self,
        disks: impl Iterator<Item = &'a str>,
    ) -> Result<bool, Fault> {
        let mut any = false;
        for disk in disks {
            let job = match self.hypervisor.block_job(self.vm(), disk).await {
                Ok(Some(job)) => job,
                Ok(None) => continue,
                // A VM that is off or gone, or has no such disk, merges nothing.
                Err(error)
                    if error.is_not_found()
                        || matches!(
                            error.kind(),
                            ErrorKind::InvalidState | ErrorKind::InvalidArgument
                        ) =>
                {
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            if job.kind == BlockJobKind::ActiveCommit {
                self.hypervisor
                    .block_job_abort(self.vm(), disk, false)
                    .await?;
                any = true;
            }
        }
        Ok(any)
    }
}
