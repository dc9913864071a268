//! Making a snapshot, recording it, and removing what is left of one that
//! failed.
//!
//! Invariants: files are noted in the journal before libvirt may make them, and
//! looked for right before: libvirt overwrites an existing memory file without a
//! word. A guest that libvirt stopped for the call runs again afterwards.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};
use tokio::sync::broadcast;
use vmsnap_engine::Cancel;
use vmsnap_hypervisor::{
    DomainEvent, DomainState, ErrorKind, Lifecycle, SnapshotDiskMode, SnapshotDiskSpec,
    SnapshotInfo, SnapshotMemory, SnapshotMemoryInfo, SnapshotSpec, flush,
};

use super::Performer;
use crate::{
    faults,
    observe::{DiskImage, Reading},
    planning::{
        Done, Fault, Reason, Step,
        facts::{Consistency, FileUser, SnapshotRecord, folder_of},
        files,
        step::{NewDisk, NewMemory, NewSnapshot, ToRecord},
    },
};

/// How often progress of a memory capture is read.
const POLL: Duration = Duration::from_millis(200);
/// What QEMU says when it still has an image open that a killed libvirtd left in it
/// in the middle of an earlier snapshot. libvirt takes the next name with each try
/// (seen with 11.3), and has touched nothing by then.
const NODE_LEFT: &str = "Duplicate nodes with node-name";
/// How many such images are passed by: one for each disk and layer of one cut-off call.
const NODES_LEFT: u32 = 8;

impl Performer {
    pub(super) async fn create(
        &self,
        index: usize,
        new: &NewSnapshot,
        cancel: &Cancel,
    ) -> Result<Done, Fault> {
        let _place = match new.memory {
            NewMemory::None => None,
            NewMemory::File(_) | NewMemory::Internal => Some(self.bulk(index, cancel).await?),
        };
        let made = new_files(new);
        for path in &made {
            if tokio::fs::symlink_metadata(path).await.is_ok() {
                return Err(Fault::new(
                    Reason::FileExists,
                    format!("'{path}' appeared since the plan was made; nothing was touched"),
                )
                .with("path", path));
            }
        }
        let spec = self.spec(new);
        let mut events = self.hypervisor.events();
        let mut again = NODES_LEFT;
        let (result, flushed) = loop {
            self.journal.note_files(&self.live.id, made.clone()).await?;
            let flushing = match &new.memory {
                NewMemory::File(path) => Some(flush::Flush::start(path)),
                _ => None,
            };
            let result = self.take_snapshot(index, new, &spec, cancel).await;
            let flushed = flushing.map(flush::Flush::finish);
            match &result {
                Err(error) if again > 0 && faults::sentence(error).contains(NODE_LEFT) => {
                    again -= 1;
                    self.remove_unused(&made).await?;
                }
                _ => break (result, flushed),
            }
        };
        if let Err(error) = result {
            if *error.kind() == ErrorKind::AlreadyExists {
                self.name_taken.store(true, Ordering::Relaxed);
            }
            return Err(self.explain(error, new).await);
        }
        if let Some(report) = flushed
            && !report.opened
        {
            self.notice(
                "MEMORY_NOT_FLUSHED",
                "the memory file could not be flushed while the guest ran, so it stood still longer",
                "",
            );
        }
        let found = self
            .hypervisor
            .snapshots(self.vm())
            .await?
            .into_iter()
            .find(|snapshot| snapshot.name == new.name)
            .ok_or_else(|| {
                Fault::new(
                    Reason::HypervisorFailed,
                    format!("libvirt made snapshot '{}' but does not list it", new.name),
                )
            })?;
        let stopped_ms = if new.stops_guest {
            stood_still(&mut events, self.vm())
        } else {
            None
        };
        if matches!(new.memory, NewMemory::File(_)) && !new.stops_guest {
            self.hypervisor.activate_disks(self.vm()).await?;
        }
        Ok(Done::Created {
            created: found.creation_time,
            stopped_ms,
            note: match stopped_ms {
                Some(stopped) => format!("the guest stood still for {stopped} ms"),
                None => String::new(),
            },
        })
    }

    /// The call itself, with the progress of a memory capture.
    async fn take_snapshot(
        &self,
        index: usize,
        new: &NewSnapshot,
        spec: &SnapshotSpec,
        cancel: &Cancel,
    ) -> Result<(), vmsnap_hypervisor::Error> {
        let creating = self.hypervisor.create_snapshot(self.vm(), spec);
        tokio::pin!(creating);
        let mut aborted = false;
        loop {
            tokio::select! {
                result = &mut creating => return result,
                () = tokio::time::sleep(POLL) => {
                    if !captures(new).await {
                        continue;
                    }
                    if let Ok(Some(job)) = self.hypervisor.job(self.vm()).await {
                        self.progress(index, "", job.processed, job.total);
                    }
                    if cancel.is_requested() && !aborted {
                        // A late abort has no effect and the snapshot is
                        // made all the same; undo then removes it.
                        aborted = self.hypervisor.abort_job(self.vm()).await.is_ok();
                    }
                }
            }
        }
    }

    fn spec(&self, new: &NewSnapshot) -> SnapshotSpec {
        SnapshotSpec {
            name: new.name.clone(),
            description: new.description.clone(),
            memory: match &new.memory {
                NewMemory::None => SnapshotMemory::None,
                NewMemory::Internal => SnapshotMemory::Internal,
                NewMemory::File(file) => SnapshotMemory::External {
                    file: file.clone(),
                    live: new.stops_guest,
                },
            },
            disks: new
                .disks
                .iter()
                .map(|(target, mode)| SnapshotDiskSpec {
                    target: target.clone(),
                    mode: match mode {
                        NewDisk::Leave => SnapshotDiskMode::No,
                        NewDisk::Internal => SnapshotDiskMode::Internal,
                        NewDisk::Overlay(file) => SnapshotDiskMode::External {
                            file: file.clone(),
                            format: "qcow2".into(),
                        },
                    },
                })
                .collect(),
        }
    }

    /// libvirt's error with what a caller needs: for a lack of space, where and
    /// how much. An internal snapshot that finds no space says only "Input/output
    /// error", so the folder is looked at for that too.
    async fn explain(&self, error: vmsnap_hypervisor::Error, new: &NewSnapshot) -> Fault {
        let fault = Fault::from(error.clone());
        let paths = match new_files(new) {
            paths if paths.is_empty() => self
                .facts
                .iter()
                .flat_map(|facts| facts.writable_disks().map(|disk| disk.path.clone()))
                .collect(),
            paths => paths,
        };
        let memory = self.facts.as_ref().map_or(0, |facts| facts.vm.memory);
        let need = match new.memory {
            NewMemory::None => files::OVERLAY_BYTES,
            _ => memory.saturating_add(files::OVERLAY_BYTES),
        };
        let full = *error.kind() == ErrorKind::NoSpace
            || (new.memory == NewMemory::Internal && error.detail().contains("Input/output error"));
        if !full {
            return fault;
        }
        for path in paths {
            let folder = folder_of(&path);
            let Some(now) = crate::observe::folder(folder) else {
                continue;
            };
            // libvirt may have removed what did not fit, so that it seems to fit now.
            if (now.free < need || *error.kind() == ErrorKind::NoSpace)
                && let Some(facts) = &self.facts
            {
                let mut full = files::no_space(facts, folder, need, now.free);
                full.message = format!("{}; {}", full.message, faults::sentence(&error));
                if new.memory == NewMemory::Internal {
                    self.notice(
                        "IMAGE_GREW",
                        format!("'{path}' stays as large as the failed snapshot made it"),
                        "free space, and let the next internal snapshot reuse it",
                    );
                }
                return full;
            }
        }
        fault
    }

    pub(super) async fn record(
        &self,
        record: &ToRecord,
        done: &[Option<Done>],
    ) -> Result<Done, Fault> {
        let created = done.iter().flatten().find_map(|done| match done {
            Done::Created { created, .. } => Some(*created),
            _ => None,
        });
        let frozen = self.plan.steps.iter().zip(done).find_map(|(step, done)| {
            matches!(step, Step::Freeze { .. }).then(|| matches!(done, Some(Done::Held { .. })))
        });
        let consistency = match (record.consistency, frozen) {
            (Consistency::Filesystem, Some(false)) => Consistency::Suspend,
            (planned, _) => planned,
        };
        let (size, sum) = match &record.memory_file {
            None => (None, None),
            Some(file) => match checksum(file).await {
                Ok((size, sum)) => (Some(size), Some(sum)),
                Err(error) => {
                    self.notice(
                        "MEMORY_NOT_CHECKED",
                        format!("the memory file '{file}' cannot be read by the agent: {error}"),
                        "a revert cannot tell beforehand whether it is damaged",
                    );
                    (None, None)
                }
            },
        };
        let host = self.observer.host().await?.1;
        let kept = SnapshotRecord {
            workflow: self.live.id.clone(),
            consistency,
            protected: record.protected,
            safety: record.safety,
            not_revertible: record.not_revertible,
            memory_size: size,
            memory_sha256: sum,
            nvram_copy: record.nvram_copy.clone(),
            libvirt: host.libvirt,
            qemu: host.qemu,
            created: created.unwrap_or_default(),
        };
        self.journal
            .record_snapshot(&self.plan.vm_uuid, &record.name, kept)
            .await?;
        Ok(super::plain(format!("consistency: {}", consistency.name())))
    }

    /// libvirt may have been stopped in the middle of its own pause.
    pub(super) async fn ends_own_stop(
        &self,
        new: &NewSnapshot,
    ) -> Result<Option<&'static str>, Fault> {
        if new.stops_guest && self.ran_before() {
            let domain = self.as_it_is_now().await?;
            if domain.state == DomainState::Paused && !domain.reason.is_io_error() {
                self.run_again().await?;
                return Ok(Some("the VM runs again"));
            }
        }
        Ok(None)
    }

    pub(super) async fn undo_create(&self, new: &NewSnapshot) -> Result<String, Fault> {
        let mut notes = Vec::new();
        notes.extend(self.ends_own_stop(new).await?.map(str::to_owned));
        let all = self.hypervisor.snapshots(self.vm()).await?;
        let listed = all.into_iter().find(|snapshot| snapshot.name == new.name);
        if listed.as_ref().map_or_else(
            || self.name_taken.load(Ordering::Relaxed),
            |found| !self.made(new, found),
        ) {
            notes.push("what has that name is not of this run, and stays".to_owned());
        } else if listed.is_some() {
            self.hypervisor
                .delete_snapshot(
                    self.vm(),
                    &new.name,
                    vmsnap_hypervisor::DeleteFlags::default(),
                )
                .await?;
            notes.push("the snapshot is deleted".to_owned());
        } else if new.memory == NewMemory::Internal
            || new.disks.iter().any(|(_, mode)| *mode == NewDisk::Internal)
        {
            notes.extend(self.drop_internal_orphan(&new.name).await?);
        }
        notes.push(self.remove_unused(&new_files(new)).await?);
        Ok(notes.join("; "))
    }

    /// Whether a snapshot with the name of a new one is that, and not what somebody
    /// else made since the plan was made. An external one tells by its files, which
    /// were not there before; an internal one only by libvirt's answer.
    fn made(&self, new: &NewSnapshot, found: &SnapshotInfo) -> bool {
        let files = new_files(new);
        if files.is_empty() {
            return !self.name_taken.load(Ordering::Relaxed);
        }
        let memory = match &found.memory {
            SnapshotMemoryInfo::External { file, .. } => Some(file),
            _ => None,
        };
        let overlays = found.disks.iter().filter_map(|disk| disk.file.as_ref());
        overlays.chain(memory).any(|file| files.contains(file))
    }

    /// An internal snapshot that an interrupted call left in an image blocks its
    /// name. It can be removed only while nobody has the image open.
    async fn drop_internal_orphan(&self, name: &str) -> Result<Option<String>, Fault> {
        let off = self.hypervisor.domain(self.vm()).await?.state == DomainState::Shutoff;
        for DiskImage { path, format } in self.observer.disk_images(self.vm()).await? {
            let read = vmsnap_hypervisor::image::info(Path::new(&path), format.as_deref());
            let Ok(image) = read.await else {
                continue;
            };
            if !image.snapshots.iter().any(|snapshot| snapshot.name == name) {
                continue;
            }
            if off {
                vmsnap_hypervisor::image::remove_snapshot(Path::new(&path), name).await?;
                return Ok(Some("what was left of it in the image is removed".into()));
            }
            self.notice(
                "INTERNAL_ORPHAN",
                format!("'{path}' holds an unfinished internal snapshot '{name}' that libvirt does not list"),
                format!("while the VM is off: qemu-img snapshot -d '{name}' '{path}'"),
            );
        }
        Ok(None)
    }

    /// Files of the VM and of its snapshots, as they were before the run.
    pub(super) fn known_files(&self) -> BTreeSet<String> {
        let Some(facts) = &self.facts else {
            return BTreeSet::new();
        };
        let chains = facts
            .vm
            .disks
            .iter()
            .flat_map(|disk| &disk.chain)
            .map(|image| image.path.clone());
        let held = facts
            .snapshots
            .iter()
            .flat_map(|snapshot| &snapshot.disks)
            .flat_map(|disk| disk.data.iter().chain(&disk.overlay).cloned());
        chains.chain(held).collect()
    }

    /// Forgets noted files that libvirt removed or merged, so that a file that
    /// somebody else puts there later is never taken for ours.
    pub(super) async fn forget_gone(&self) -> Result<(), Fault> {
        let mut known = self.known_files();
        if let Some(facts) = &self.facts {
            known.retain(|path| facts.ours.contains(path));
        }
        let mut gone = Vec::new();
        for path in known {
            let there = tokio::fs::symlink_metadata(&path).await;
            if there.is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
                gone.push(path);
            }
        }
        Ok(self.journal.forget_files(gone).await?)
    }

    /// Deletes files of ours that no chain of any VM names.
    pub(super) async fn remove_unused(&self, paths: &[String]) -> Result<String, Fault> {
        self.remove_files(paths, None).await
    }

    /// The same, also where a snapshot of this VM still names them as its own
    /// overlays.
    pub(super) async fn remove_files(
        &self,
        paths: &[String],
        overlays_of: Option<&str>,
    ) -> Result<String, Fault> {
        let mut there = Vec::new();
        for path in paths {
            if tokio::fs::symlink_metadata(path).await.is_ok() {
                there.push(path);
            }
        }
        let mut kept: Vec<&String> = Vec::new();
        let mut removed = Vec::new();
        if !there.is_empty() {
            let asked = there.iter().map(|path| (*path).clone()).collect();
            let users = self.observer.users_of_files(asked, Reading::Fresh).await?;
            for path in there {
                let spared = |user: &FileUser| {
                    overlays_of.is_some()
                        && user.snapshot.as_deref() == overlays_of
                        && user.vm == self.vm()
                };
                let mut users = users.get(path).into_iter().flatten();
                if users.any(|user| !spared(user)) {
                    kept.push(path);
                    continue;
                }
                match tokio::fs::remove_file(path).await {
                    Ok(()) => removed.push(path.clone()),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => {
                        return Err(Fault::new(
                            Reason::StorageNotWritable,
                            format!("'{path}' is left over and cannot be deleted: {error}"),
                        )
                        .with("path", path));
                    }
                }
            }
        }
        let gone = paths
            .iter()
            .filter(|path| !kept.contains(path))
            .cloned()
            .collect();
        self.journal.forget_files(gone).await?;
        Ok(if removed.is_empty() {
            "no file is left over".into()
        } else {
            format!("removed {}", removed.join(", "))
        })
    }

    pub(super) async fn copy_nvram(&self, from: &str, to: &str) -> Result<Done, Fault> {
        self.journal
            .note_files(&self.live.id, vec![to.to_owned()])
            .await?;
        copy(from, to).await?;
        Ok(super::plain(format!("copied to {to}")))
    }
}

/// Copies a file to a new one, which must not exist. Nothing is left of a copy that
/// failed.
pub(super) async fn copy(from: &str, to: &str) -> Result<(), Fault> {
    let (source, target) = (from.to_owned(), to.to_owned());
    let copied = tokio::task::spawn_blocking(move || {
        let mut source = std::fs::File::open(source)?;
        let mut copy = std::fs::File::options()
            .write(true)
            .create_new(true)
            .open(&target)?;
        let copied = std::io::copy(&mut source, &mut copy).and_then(|_| copy.sync_all());
        if copied.is_err() {
            // The failure is told; what is left is found by undoing, too.
            let _ = std::fs::remove_file(&target);
        }
        copied
    })
    .await;
    let error = match copied {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => error,
        Err(error) => std::io::Error::other(error),
    };
    let message = format!("'{from}' cannot be copied to '{to}': {error}");
    Err(match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            let need = tokio::fs::metadata(from).await.map_or(0, |file| file.len());
            Fault::new(Reason::NoSpace, message)
                .with("path", folder_of(to))
                .with("need_bytes", need)
        }
        _ => Fault::new(Reason::StorageNotWritable, message).with("path", to),
    })
}

/// Size and SHA-256 of a file.
pub(super) async fn checksum(path: &str) -> std::io::Result<(u64, String)> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || {
        let mut file = std::fs::File::open(path)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        let mut size = 0_u64;
        loop {
            let read = std::io::Read::read(&mut file, &mut buffer)?;
            if read == 0 {
                break;
            }
            hash.update(&buffer[..read]);
            size += read as u64;
        }
        let digest = hash.finalize();
        Ok((
            size,
            digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        ))
    })
    .await
    .map_err(std::io::Error::other)?
}

/// Files that a new snapshot makes.
pub(super) fn new_files(new: &NewSnapshot) -> Vec<String> {
    let mut files: Vec<String> = new
        .disks
        .iter()
        .filter_map(|(_, mode)| match mode {
            NewDisk::Overlay(file) => Some(file.clone()),
            _ => None,
        })
        .collect();
    if let NewMemory::File(file) = &new.memory {
        files.push(file.clone());
    }
    files
}

/// Whether libvirt's job on the VM is the capture of this snapshot's memory. libvirt
/// makes the file once the job is ours; until then it would be somebody else's, who
/// would lose what it does (a backup, a dump).
async fn captures(new: &NewSnapshot) -> bool {
    match &new.memory {
        // Where it cannot be seen, the job is taken for ours.
        NewMemory::File(file) => tokio::fs::try_exists(file).await.unwrap_or(true),
        NewMemory::None | NewMemory::Internal => false,
    }
}

/// Milliseconds between libvirt's SUSPENDED and RESUMED events of a VM, as they
/// arrived; QEMU's own figure for a memory capture leaves out the flush.
fn stood_still(events: &mut broadcast::Receiver<DomainEvent>, vm: &str) -> Option<u64> {
    let mut since: Option<Instant> = None;
    let mut stood: Option<Duration> = None;
    loop {
        match events.try_recv() {
            Ok(event) if event.domain == vm => match event.lifecycle() {
                Some(Lifecycle::Suspended) => since = Some(event.at),
                Some(Lifecycle::Resumed) => {
                    if let Some(since) = since.take() {
                        stood = Some(stood.unwrap_or_default() + event.at.duration_since(since));
                    }
                }
                _ => {}
            },
            Ok(_) | Err(broadcast::error::TryRecvError::Lagged(_)) => {}
            Err(_) => {
                return stood.map(|stood| u64::try_from(stood.as_millis()).unwrap_or(u64::MAX));
            }
        }
    }
}
