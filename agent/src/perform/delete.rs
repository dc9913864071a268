//! Deleting snapshots and merging overlays, with progress in bytes.
//!
//! Invariants: a merge pivots only when it is ready; a snapshot that is not
//! listed any more counts as deleted; a paused helper that libvirt booted for a
//! VM that was off never stays.

use std::{collections::BTreeMap, time::Duration};

use vmsnap_engine::Cancel;
use vmsnap_hypervisor::{CommitSpec, DeleteFlags, DomainState};

use super::Performer;
use crate::planning::{Done, Fault, Reason, facts::VmState};

/// How often progress of a merge is read.
const POLL: Duration = Duration::from_millis(250);
/// How long an active merge may take from "all copied" to "ready".
const READY: Duration = Duration::from_secs(60);

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
        let result = {
            let deleting = self.hypervisor.delete_snapshot(self.vm(), name, flags);
            tokio::pin!(deleting);
            loop {
                tokio::select! {
                    result = &mut deleting => break result,
                    () = tokio::time::sleep(POLL) => {
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
                return Err(error.into());
            }
        }
        self.journal
            .forget_snapshot(&self.plan.vm_uuid, name)
            .await?;
        // libvirt removes overlays and memory; copies of UEFI variables are ours.
        self.remove_unused(files).await?;
        Ok(Done::Deleted {
            merged_bytes: merged.values().sum(),
        })
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

    pub(super) async fn merge_active(
        &self,
        index: usize,
        disk: &str,
        top: &str,
        base: &str,
        bandwidth: Option<u64>,
        cancel: &Cancel,
    ) -> Result<Done, Fault> {
        let spec = CommitSpec {
            disk: disk.to_owned(),
            top: None,
            base: Some(base.to_owned()),
            bandwidth,
            active: true,
            delete: true,
        };
        self.hypervisor.block_commit(self.vm(), &spec).await?;
        let mut copied = None;
        let mut bytes = 0;
        loop {
            tokio::time::sleep(POLL).await;
            if cancel.is_requested() {
                self.hypervisor.block_job_abort(self.vm(), disk, false).await?;
                return Err(Fault::new(
                    Reason::Cancelled,
                    format!("the merge of disk {disk} was aborted; the chain is as it was"),
                ));
            }
            let Some(job) = self.hypervisor.block_job(self.vm(), disk).await? else {
                return Err(Fault::new(
                    Reason::HypervisorFailed,
                    format!(
                        "the merge of '{top}' into '{base}' ended before it was ready; was the VM \
                         stopped?"
                    ),
                )
                .with("disk", disk));
            };
            bytes = job.cur;
            self.progress(index, disk, job.cur, job.end);
            if job.end == 0 || job.cur < job.end {
                copied = None;
                continue;
            }
            match self.hypervisor.block_job_abort(self.vm(), disk, true).await {
                Ok(()) => break,
                Err(error) if *error.kind() == vmsnap_hypervisor::ErrorKind::BlockJobNotReady => {
                    let since = *copied.get_or_insert_with(std::time::Instant::now);
                    if since.elapsed() > READY {
                        self.hypervisor.block_job_abort(self.vm(), disk, false).await?;
                        return Err(error.into());
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Done::Deleted {
            merged_bytes: bytes,
        })
    }

    /// Aborts a merge that did not pivot.
    pub(super) async fn undo_merge(&self, disk: &str) -> Result<String, Fault> {
        if self.hypervisor.block_job(self.vm(), disk).await?.is_none() {
            return Ok("no merge is open".into());
        }
        self.hypervisor.block_job_abort(self.vm(), disk, false).await?;
        Ok("the open merge is aborted; the chain is as it was".into())
    }
}
