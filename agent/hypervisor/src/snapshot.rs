//! Snapshots: libvirt's list of them, and making, reverting to and deleting
//! them.
//!
//! Never listed in libvirt's topological order, which fails while one is being
//! made.
//!
//! # What is remembered
//! Names are cheap to list, XML is not: 4,000 take libvirt more than a second.
//! And it changes after the snapshot was made: a delete gives children another
//! parent and disks another image, a revert adds overlays, a delete that failed
//! leaves a mark, and anybody may redefine it, creation time and all. So neither
//! name nor creation time tells that the XML is still the same. But libvirt keeps
//! each snapshot in a file of its own and replaces the file with each change,
//! after the change. Hence:
//! - [`Hypervisor::snapshots`] always asks. All that is decided rests on it.
//! - [`Hypervisor::known_snapshots`], for lists, asks only for those whose file
//!   is not provably what it was before the last asking. Where there is no such
//!   file to be seen (another host's libvirt, another place), it always asks.
//! - Which one is current is always asked, once a domain.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, Weak},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use virt::{domain::Domain, sys};

use crate::{
    connection::{Hypervisor, Inner, lock},
    counters,
    definition::DomainDefinition,
    error::{Error, ErrorKind, Fault, What},
    snapshot_xml,
    stamp::Stamp,
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
    /// The definition that a revert brings back.
    pub definition: Option<DomainDefinition>,
    /// The domain as it ran, where that is kept beside its definition: what a
    /// revert to saved memory starts.
    pub live: Option<DomainDefinition>,
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

/// A snapshot is asked for again after this, whatever its file says: libvirt
/// may have failed to write it.
const TRUSTED: Duration = Duration::from_secs(600);
/// Snapshots that are remembered.
const REMEMBERED: usize = 20_000;

/// Snapshots by domain and name.
#[derive(Debug, Default)]
pub(crate) struct Cache(Mutex<HashMap<String, Domains>>);

type Domains = HashMap<String, Known>;

/// What was read of a snapshot.
#[derive(Debug, Clone)]
struct Known {
    /// The XML: understanding it costs more than comparing it.
    xml: Arc<str>,
    info: Arc<SnapshotInfo>,
    /// libvirt's file from before the XML was asked for, and until when it is
    /// trusted.
    file: Option<(Stamp, Instant)>,
}

impl Cache {
    fn of(&self, domain: &str) -> Domains {
        lock(&self.0).get(domain).cloned().unwrap_or_default()
    }

    fn keep(&self, domain: &str, known: Domains) {
        let mut all = lock(&self.0);
        all.insert(domain.to_owned(), known);
        if all.values().map(HashMap::len).sum::<usize>() > REMEMBERED {
            all.clear();
        }
    }

    /// Forgets a domain: what libvirt did to it may be in its memory only.
    fn forget(&self, domain: &str) {
        lock(&self.0).remove(domain);
    }
}

/// Where libvirt keeps its snapshots' files, when it is this host's own.
fn folder_of_files(uri: &str) -> Option<PathBuf> {
    match uri {
        "qemu:///system" => Some("/var/lib/libvirt/qemu/snapshot".into()),
        "qemu:///session" => {
            let configuration = std::env::var_os("XDG_CONFIG_HOME")
                .filter(|path| !path.is_empty())
                .map(PathBuf::from)
                .or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".config")))?;
            Some(configuration.join("libvirt/qemu/snapshot"))
        }
        _ => None,
    }
}

/// The file that libvirt keeps of a snapshot.
fn file_of(folder: &Path, domain: &str, snapshot: &str) -> Option<PathBuf> {
    let plain = |name: &str| !name.contains('/') && name != "." && name != "..";
    (plain(domain) && plain(snapshot)).then(|| folder.join(domain).join(format!("{snapshot}.xml")))
}

/// Whether a file is the one of this snapshot, and not of a namesake on another
/// libvirt.
fn is_of(file: &Path, info: &SnapshotInfo) -> bool {
    let time = format!("<creationTime>{}</creationTime>", info.creation_time);
    fs::read_to_string(file).is_ok_and(|text| text.contains(&time))
}

fn list(
    domain: &Domain,
    cache: &Cache,
    folder: Option<&Path>,
    trusting: bool,
) -> Result<Vec<SnapshotInfo>, Fault> {
    let (uuid, domain_name) = (domain.uuid_string()?, domain.name()?);
    let listed = domain.list_all_snapshots(0)?;
    if listed.is_empty() {
        cache.forget(&uuid);
        return Ok(Vec::new());
    }
    let mut before = cache.of(&uuid);
    let mut known = Domains::new();
    for snapshot in listed {
        let name = snapshot.name()?;
        let file = folder.and_then(|folder| file_of(folder, &domain_name, &name));
        // Read before the XML is: a change between the two is seen next time.
        let stamp = file
            .as_ref()
            .and_then(|file| Stamp::of(&fs::metadata(file).ok()?));
        let earlier = before.remove(&name);
        if trusting
            && let Some(earlier) = &earlier
            && let Some((then, until)) = earlier.file
            && stamp == Some(then)
            && Instant::now() < until
        {
            known.insert(name, earlier.clone());
            continue;
        }
        counters::add(&counters::SNAPSHOT_XML);
        let xml = match snapshot.xml_desc(0) {
            Ok(xml) => xml,
            Err(error) => {
                let fault = Fault::from(error);
                // Gone since it was listed.
                if fault.kind == ErrorKind::NotFound(What::Snapshot) {
                    continue;
                }
                return Err(fault);
            }
        };
        let mut entry = match earlier {
            Some(earlier) if *earlier.xml == *xml => earlier,
            _ => Known {
                info: Arc::new(snapshot_xml::parse(&xml)?),
                xml: xml.into(),
                file: None,
            },
        };
        entry.file = match (file, stamp) {
            (Some(file), Some(stamp)) if is_of(&file, &entry.info) => {
                Some((stamp, Instant::now() + TRUSTED))
            }
            _ => None,
        };
        known.insert(name, entry);
    }
    let current = match domain.current_snapshot(0).map_err(Fault::from) {
        Ok(current) => Some(current.name()?),
        Err(fault) if fault.kind == ErrorKind::NotFound(What::Snapshot) => None,
        Err(fault) => return Err(fault),
    };
    let all = known
        .iter()
        .map(|(name, known)| SnapshotInfo {
            is_current: current.as_ref() == Some(name),
            ..(*known.info).clone()
        })
        .collect();
    cache.keep(&uuid, known);
    Ok(all)
}

/// Makes a domain's snapshots be asked for again once a change of them ended,
/// however it ended.
struct Changing<'a>(Weak<Inner>, &'a Domain);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        if let Some(inner) = self.0.upgrade()
            && let Ok(uuid) = self.1.uuid_string()
        {
            inner.snapshot_cache.forget(&uuid);
        }
    }
}

impl Hypervisor {
    /// All snapshots of a domain, in no order, as they are now.
    ///
    /// # Errors
    /// When libvirt does not answer, or its XML cannot be understood.
    pub async fn snapshots(&self, name: &str) -> Result<Vec<SnapshotInfo>, Error> {
        self.listed(name, false).await
    }

    /// The same for lists: those whose file at libvirt is what it was are not
    /// asked for again.
    ///
    /// # Errors
    /// When libvirt does not answer, or its XML cannot be understood.
    pub async fn known_snapshots(&self, name: &str) -> Result<Vec<SnapshotInfo>, Error> {
        self.listed(name, true).await
    }

    async fn listed(&self, name: &str, trusting: bool) -> Result<Vec<SnapshotInfo>, Error> {
        let inner = Arc::downgrade(&self.0);
        let folder = folder_of_files(&self.0.options.uri);
        self.read_domain("list the snapshots of", name, move |domain| {
            let folder = folder.as_deref();
            match inner.upgrade() {
                Some(inner) => list(domain, &inner.snapshot_cache, folder, trusting),
                None => list(domain, &Cache::default(), folder, trusting),
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
        let inner = Arc::downgrade(&self.0);
        self.transfer("take a snapshot of", name, move |domain| {
            let _changing = Changing(inner, domain);
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
        let inner = Arc::downgrade(&self.0);
        self.transfer("revert", name, move |domain| {
            let _changing = Changing(inner, domain);
            Ok(Domain::lookup_snapshot_by_name(domain, &snapshot, 0)?.revert(flags)?)
        })
        .await
    }

    /// libvirt's whole record of a snapshot, passwords included: what
    /// [`Hypervisor::redefine_snapshot`] takes.
    ///
    /// # Errors
    /// When there is no such snapshot, or libvirt does not answer.
    pub async fn snapshot_xml(&self, name: &str, snapshot: &str) -> Result<String, Error> {
        let snapshot = snapshot.to_owned();
        self.read_domain("read a snapshot of", name, move |domain| {
            Ok(Domain::lookup_snapshot_by_name(domain, &snapshot, 0)?
                .xml_desc(sys::VIR_DOMAIN_SNAPSHOT_XML_SECURE)?)
        })
        .await
    }

    /// The record of a snapshot with other overlays (target and file) of the
    /// present state: those are what libvirt deletes on the next revert. It names
    /// them `beside` the snapshot's own where other snapshots descend from it, and
    /// instead of those otherwise, as libvirt 11.3 does in its own revert.
    ///
    /// # Errors
    /// When the record cannot be understood.
    pub fn with_overlays(
        xml: &str,
        overlays: &[(String, String)],
        beside: bool,
    ) -> Result<String, Error> {
        snapshot_xml::with_overlays(xml, overlays, beside)
            .map_err(|fault| Error::new("understand", "a snapshot's record", fault))
    }

    /// The definition that a revert to a snapshot brings back, from its record,
    /// with other images (target and qcow2 file) under its disks.
    ///
    /// # Errors
    /// When the record cannot be understood, or holds no such disk with a file.
    pub fn definition_on(xml: &str, images: &[(String, String)]) -> Result<String, Error> {
        snapshot_xml::definition_on(xml, images)
            .map_err(|fault| Error::new("understand", "a snapshot's record", fault))
    }

    /// Files of all overlays that a snapshot's record names.
    ///
    /// # Errors
    /// When the record cannot be understood.
    pub fn overlays_of_record(xml: &str) -> Result<Vec<String>, Error> {
        let snapshot = snapshot_xml::parse(xml)
            .map_err(|fault| Error::new("understand", "a snapshot's record", fault))?;
        Ok(snapshot
            .disks
            .into_iter()
            .chain(snapshot.revert_disks)
            .filter(|disk| disk.mode == SnapshotMode::External)
            .filter_map(|disk| disk.file)
            .collect())
    }

    /// Parent of the snapshot, by its record.
    ///
    /// # Errors
    /// When the record cannot be understood.
    pub fn parent_of_record(xml: &str) -> Result<Option<String>, Error> {
        let snapshot = snapshot_xml::parse(xml)
            .map_err(|fault| Error::new("understand", "a snapshot's record", fault))?;
        Ok(snapshot.parent)
    }

    /// Replaces libvirt's record of a snapshot, on disk too; no image is
    /// touched.
    ///
    /// # Errors
    /// When libvirt refuses the record or cannot write it.
    pub async fn redefine_snapshot(
        &self,
        name: &str,
        xml: &str,
        current: bool,
    ) -> Result<(), Error> {
        let xml = xml.to_owned();
        let mut flags = sys::VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE;
        if current {
            flags |= sys::VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT;
        }
        let inner = Arc::downgrade(&self.0);
        self.effect("record a snapshot of", name, move |domain| {
            let _changing = Changing(inner, domain);
            domain.create_snapshot_xml(&xml, flags)?;
            Ok(())
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
        let inner = Arc::downgrade(&self.0);
        self.transfer("delete a snapshot of", name, move |domain| {
            let _changing = Changing(inner, domain);
            Ok(Domain::lookup_snapshot_by_name(domain, &snapshot, 0)?.delete(flags)?)
        })
        .await
    }
}
