//! Snapshots: libvirt's list of them, and making, reverting to and deleting
//! them.
//!
//! Invariants: never listed in libvirt's topological order, which fails while
//! one is being made; XML is read once for each name and creation time, except
//! for what changes afterwards.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use serde::{Deserialize, Serialize};
use virt::{domain::Domain, sys};

use crate::{
    connection::{Hypervisor, lock},
    definition::DomainDefinition,
    error::{Error, Fault},
    snapshot_xml,
};

/// Where the memory of a new snapshot goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotMemory {
    /// Nowhere.
    None,
    /// Into the image.
    Internal,
    /// Into a file.
    External {
        /// The file; libvirt overwrites an existing one.
        file: String,
        /// While the guest runs.
        live: bool,
    },
}

/// How a new snapshot treats a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotDiskMode {
    /// Left out.
    No,
    /// Inside the image.
    Internal,
    /// An overlay.
    External {
        /// The new file.
        file: String,
        /// Its format.
        format: String,
    },
}

/// A disk of a new snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotDiskSpec {
    /// Target.
    pub target: String,
    /// How it is treated. A disk that is not listed would be external.
    pub mode: SnapshotDiskMode,
}

/// A new snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotSpec {
    /// Name.
    pub name: String,
    /// Description.
    pub description: String,
    /// Memory.
    pub memory: SnapshotMemory,
    /// Every disk and drive.
    pub disks: Vec<SnapshotDiskSpec>,
}

/// How a snapshot treated a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotMode {
    /// Left out.
    No,
    /// Inside the image.
    Internal,
    /// An overlay.
    External,
}

/// Where the memory of a snapshot is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotMemoryInfo {
    /// Nowhere.
    None,
    /// In the image.
    Internal,
    /// In a file.
    External {
        /// The file.
        file: String,
    },
}

/// A disk of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotDiskInfo {
    /// Target.
    pub target: String,
    /// How it was treated.
    pub mode: SnapshotMode,
    /// The overlay.
    pub file: Option<String>,
    /// Its format.
    pub format: Option<String>,
    /// libvirt began to delete the snapshot on this disk and did not finish.
    pub delete_in_progress: bool,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Name.
    pub name: String,
    /// Parent.
    pub parent: Option<String>,
    /// Description.
    pub description: Option<String>,
    /// Seconds since the epoch.
    pub creation_time: i64,
    /// libvirt's word: `running`, `paused`, `shutoff`, `disk-snapshot`.
    pub state: String,
    /// Memory.
    pub memory: SnapshotMemoryInfo,
    /// Disks.
    pub disks: Vec<SnapshotDiskInfo>,
    /// Overlays that reverts to it put on its data.
    pub revert_disks: Vec<SnapshotDiskInfo>,
    /// The domain's present state descends from it.
    pub is_current: bool,
    /// The domain as it was.
    pub definition: Option<DomainDefinition>,
}

/// How to revert.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RevertFlags {
    /// Have it running afterwards.
    pub running: bool,
    /// Have it paused afterwards.
    pub paused: bool,
    /// Allow what libvirt asks force for.
    pub force: bool,
    /// Make the UEFI variables anew from their template.
    pub reset_nvram: bool,
}

/// How to delete.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeleteFlags {
    /// With all that descends from it; libvirt refuses that for external ones.
    pub children: bool,
    /// Only what descends from it.
    pub children_only: bool,
    /// Only libvirt's record of it; files stay.
    pub metadata_only: bool,
}

/// Snapshots by domain and name, with the XML that they were read from: reading
/// it costs libvirt little, understanding it costs us more.
#[derive(Debug, Default)]
pub(crate) struct Cache(Mutex<HashMap<(String, String), Read>>);

/// The XML, and what was understood of it.
type Read = (String, Arc<SnapshotInfo>);

impl Cache {
    fn get(&self, domain: &str, name: &str, xml: &str) -> Result<Arc<SnapshotInfo>, Fault> {
        let key = (domain.to_owned(), name.to_owned());
        if let Some((known, info)) = lock(&self.0).get(&key)
            && known == xml
        {
            return Ok(info.clone());
        }
        let info = Arc::new(snapshot_xml::parse(xml)?);
        let mut all = lock(&self.0);
        if all.len() > 20_000 {
            all.clear();
        }
        all.insert(key, (xml.to_owned(), info.clone()));
        Ok(info)
    }
}

fn list(domain: &Domain, cache: &Cache) -> Result<Vec<SnapshotInfo>, Fault> {
    let uuid = domain.uuid_string()?;
    let mut all = Vec::new();
    for snapshot in domain.list_all_snapshots(0)? {
        let name = snapshot.name()?;
        let xml = match snapshot.xml_desc(0) {
            Ok(xml) => xml,
            Err(error) => {
                let fault = Fault::from(error);
                // Gone since it was listed.
                if fault.kind == crate::ErrorKind::NotFound(crate::What::Snapshot) {
                    continue;
                }
                return Err(fault);
            }
        };
        let mut info = (*cache.get(&uuid, &name, &xml)?).clone();
        info.is_current = snapshot.is_current(0)?;
        all.push(info);
    }
    Ok(all)
}

impl Hypervisor {
    /// All snapshots of a domain, in no order.
    ///
    /// # Errors
    /// When libvirt does not answer, or its XML cannot be understood.
    pub async fn snapshots(&self, name: &str) -> Result<Vec<SnapshotInfo>, Error> {
        let inner = Arc::downgrade(&self.0);
        self.read_domain("list the snapshots of", name, move |domain| {
            match inner.upgrade() {
                Some(inner) => list(domain, &inner.snapshot_cache),
                None => list(domain, &Cache::default()),
            }
        })
        .await
    }

    /// Makes a snapshot. Disks are all taken or none.
    ///
    /// # Errors
    /// When libvirt refuses or fails; it then removes what it made, but for what
    /// an internal one left in the image.
    pub async fn create_snapshot(&self, name: &str, spec: &SnapshotSpec) -> Result<(), Error> {
        let xml = snapshot_xml::write(spec);
        let internal = spec
            .disks
            .iter()
            .any(|disk| disk.mode == SnapshotDiskMode::Internal);
        let flags = match &spec.memory {
            SnapshotMemory::None if internal => 0,
            SnapshotMemory::None => {
                sys::VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | sys::VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
            }
            SnapshotMemory::Internal => 0,
            SnapshotMemory::External { live: true, .. } => {
                sys::VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | sys::VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
            }
            SnapshotMemory::External { live: false, .. } => sys::VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC,
        };
        self.transfer("take a snapshot of", name, move |domain| {
            domain.create_snapshot_xml(&xml, flags)?;
            Ok(())
        })
        .await
    }

    /// Reverts to a snapshot. libvirt switches a running domain off first.
    ///
    /// # Errors
    /// When libvirt refuses or fails: the domain may then be off, with a
    /// definition that must be compared with its files before it is started.
    pub async fn revert(&self, name: &str, snapshot: &str, how: RevertFlags) -> Result<(), Error> {
        let mut flags = 0;
        for (set, flag) in [
            (how.running, sys::VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING),
            (how.paused, sys::VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED),
            (how.force, sys::VIR_DOMAIN_SNAPSHOT_REVERT_FORCE),
            (how.reset_nvram, sys::VIR_DOMAIN_SNAPSHOT_REVERT_RESET_NVRAM),
        ] {
            if set {
                flags |= flag;
            }
        }
        let snapshot = snapshot.to_owned();
        self.transfer("revert", name, move |domain| {
            Ok(Domain::lookup_snapshot_by_name(domain, &snapshot, 0)?.revert(flags)?)
        })
        .await
    }

    /// Deletes a snapshot; data that others need is merged.
    ///
    /// # Errors
    /// When libvirt refuses or fails.
    pub async fn delete_snapshot(
        &self,
        name: &str,
        snapshot: &str,
        how: DeleteFlags,
    ) -> Result<(), Error> {
        let mut flags = 0;
        for (set, flag) in [
            (how.children, sys::VIR_DOMAIN_SNAPSHOT_DELETE_CHILDREN),
            (
                how.children_only,
                sys::VIR_DOMAIN_SNAPSHOT_DELETE_CHILDREN_ONLY,
            ),
            (
                how.metadata_only,
                sys::VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY,
            ),
        ] {
            if set {
                flags |= flag;
            }
        }
        let snapshot = snapshot.to_owned();
        self.transfer("delete a snapshot of", name, move |domain| {
            Ok(Domain::lookup_snapshot_by_name(domain, &snapshot, 0)?.delete(flags)?)
        })
        .await
    }
}
