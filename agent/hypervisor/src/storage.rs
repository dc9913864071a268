//! Pools and volumes.
//!
//! Invariants
//! - Sizes are bytes.
//! - A pool that does not exist is `None`, because a host without pools is a host
//!   like any other.
//! - Other runs and people add and take away pools and volumes all the time: what
//!   is gone since it was listed or looked up is passed over, never an error of the
//!   one who only looked.

use virt::{connect::Connect, storage_pool::StoragePool, storage_vol::StorageVol, sys};

use crate::{
    connection::Hypervisor,
    definition::{child, child_text, document},
    error::{Error, ErrorKind, Fault},
    lanes::Lane,
};

/// A pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolInfo {
    /// Name.
    pub name: String,
    /// In use by libvirt.
    pub active: bool,
    /// Type.
    pub kind: String,
    /// Path of its target.
    pub path: Option<String>,
    /// Size.
    pub capacity: u64,
    /// In use.
    pub allocation: u64,
    /// Free.
    pub available: u64,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Its pool.
    pub pool: String,
    /// Name.
    pub name: String,
    /// Path.
    pub path: String,
    /// Format.
    pub format: Option<String>,
    /// Size that a guest would see.
    pub capacity: u64,
    /// Bytes that it takes.
    pub allocation: u64,
    /// Its backing file.
    pub backing_path: Option<String>,
}

fn subject(pool: &str) -> String {
    format!("pool {pool}")
}

/// The scope that a hang of a pool's call belongs to: pools share no lock with
/// domains.
fn scope(pool: &str) -> String {
    format!("pool:{pool}")
}

fn pool_info(pool: &StoragePool) -> Result<PoolInfo, Fault> {
    let info = pool.info()?;
    let xml = pool.xml_desc(0)?;
    let document = document(&xml)?;
    let root = document.root_element();
    Ok(PoolInfo {
        name: pool.name()?,
        active: pool.is_active()?,
        kind: root.attribute("type").unwrap_or_default().to_owned(),
        path: child(root, "target")
            .and_then(|target| child_text(target, "path"))
            .map(str::to_owned),
        capacity: info.capacity,
        allocation: info.allocation,
        available: info.available,
    })
}

/// A volume as libvirt describes it, or in outline where it cannot.
fn volume_info(pool: &str, volume: &StorageVol) -> Result<VolumeInfo, Fault> {
    match described(pool, volume) {
        Err(fault) if fault.kind == ErrorKind::Unsupported => outline(pool, volume),
        found => found,
    }
}

fn described(pool: &str, volume: &StorageVol) -> Result<VolumeInfo, Fault> {
    let xml = volume.xml_desc(0)?;
    let document = document(&xml)?;
    let root = document.root_element();
    let format = |node| {
        child(node, "format")
            .and_then(|format| format.attribute("type"))
            .map(str::to_owned)
    };
    // libvirt writes sizes of volumes in bytes.
    let bytes = |tag| {
        child_text(root, tag)
            .and_then(|text| text.parse().ok())
            .unwrap_or(0)
    };
    Ok(VolumeInfo {
        pool: pool.to_owned(),
        name: volume.name()?,
        path: volume.path()?,
        format: child(root, "target").and_then(format),
        capacity: bytes("capacity"),
        allocation: bytes("allocation"),
        backing_path: child(root, "backingStore")
            .and_then(|store| child_text(store, "path"))
            .map(str::to_owned),
    })
}

/// A volume that libvirt cannot describe, such as an encrypted one (libvirt looks its
/// secret up, also for its size) where its driver for secrets is not installed. Its
/// format, what the guest sees of it and its base are not known.
fn outline(pool: &str, volume: &StorageVol) -> Result<VolumeInfo, Fault> {
    use std::os::unix::fs::MetadataExt as _;
    let path = volume.path()?;
    Ok(VolumeInfo {
        pool: pool.to_owned(),
        name: volume.name()?,
        format: None,
        capacity: 0,
        allocation: std::fs::metadata(&path).map_or(0, |file| file.blocks() * 512),
        backing_path: None,
        path,
    })
}

/// `None` for what is not there, or was taken away while it was looked at.
fn optional<T>(result: Result<T, impl Into<Fault>>) -> Result<Option<T>, Fault> {
    match result.map_err(Into::into) {
        Ok(found) => Ok(Some(found)),
        Err(fault) => match fault.kind {
            // A driver without storage has no pools, and a pool that is not active
            // gives no volumes out.
            ErrorKind::NotFound(_) | ErrorKind::Unsupported | ErrorKind::InvalidState => Ok(None),
            _ => Err(fault),
        },
    }
}

impl Hypervisor {
    /// A pool by name.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn pool(&self, pool: &str) -> Result<Option<PoolInfo>, Error> {
        let name = pool.to_owned();
        self.read(
            "look at",
            subject(pool),
            Some(&scope(pool)),
            move |connection| match optional(connection.lookup_storage_pool_by_name(&name))? {
                Some(pool) => optional(pool_info(&pool)),
                None => Ok(None),
            },
        )
        .await
    }

    /// All pools.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn pools(&self) -> Result<Vec<PoolInfo>, Error> {
        self.read(
            "list the pools of",
            "the host",
            None,
            |connection: &Connect| {
                let pools = optional(connection.list_all_storage_pools(0))?.unwrap_or_default();
                pools
                    .iter()
                    .filter_map(|pool| optional(pool_info(pool)).transpose())
                    .collect()
            },
        )
        .await
    }

    /// Volumes of a pool: none where it is gone or not active.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn volumes(&self, pool: &str) -> Result<Vec<VolumeInfo>, Error> {
        let name = pool.to_owned();
        self.read(
            "list the volumes of",
            subject(pool),
            Some(&scope(pool)),
            move |connection| {
                let Some(pool) = optional(connection.lookup_storage_pool_by_name(&name))? else {
                    return Ok(Vec::new());
                };
                let listed = optional(pool.list_all_volumes(0))?.unwrap_or_default();
                listed
                    .iter()
                    .filter_map(|volume| optional(volume_info(&name, volume)).transpose())
                    .collect()
            },
        )
        .await
    }

    /// The volume at a path, if any active pool has it.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn volume_by_path(&self, path: &str) -> Result<Option<VolumeInfo>, Error> {
        let path = path.to_owned();
        self.read(
            "look for a volume at",
            path.clone(),
            None,
            move |connection| {
                let Some(volume) = optional(connection.lookup_storage_vol_by_path(&path))? else {
                    return Ok(None);
                };
                let Some(pool) = optional(volume.lookup_storage_pool())? else {
                    return Ok(None);
                };
                optional(volume_info(&pool.name()?, &volume))
            },
        )
        .await
    }

    /// The path of a volume, if the pool is there, is active and has it.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn volume_path(&self, pool: &str, volume: &str) -> Result<Option<String>, Error> {
        let (pool_name, name) = (pool.to_owned(), volume.to_owned());
        self.read(
            "look for a volume of",
            subject(pool),
            Some(&scope(pool)),
            move |connection| {
                let Some(pool) = optional(connection.lookup_storage_pool_by_name(&pool_name))?
                else {
                    return Ok(None);
                };
                match optional(pool.lookup_storage_vol_by_name(&name))? {
                    Some(volume) => optional(volume.path()),
                    None => Ok(None),
                }
            },
        )
        .await
    }

    /// Makes libvirt look at a pool anew: it does not see files that it did not
    /// make as volumes, overlays among them.
    ///
    /// # Errors
    /// When a long job holds the pool, or libvirt does not answer.
    pub async fn pool_refresh(&self, pool: &str) -> Result<(), Error> {
        let name = pool.to_owned();
        let deadline = self.0.options.read_deadline;
        self.once(
            Lane::Effect,
            "refresh",
            subject(pool),
            &scope(pool),
            deadline,
            move |connection| {
                connection.lookup_storage_pool_by_name(&name)?.refresh(0)?;
                Ok(())
            },
        )
        .await
    }

    /// Changes the size of a volume that nobody has open.
    ///
    /// # Errors
    /// When it is in use, would shrink without `shrink`, or libvirt refuses.
    pub async fn volume_resize(
        &self,
        pool: &str,
        volume: &str,
        bytes: u64,
        shrink: bool,
    ) -> Result<(), Error> {
        let (pool_name, name) = (pool.to_owned(), volume.to_owned());
        let flags = if shrink {
            sys::VIR_STORAGE_VOL_RESIZE_SHRINK
        } else {
            0
        };
        let deadline = self.0.options.transfer_deadline;
        self.once(
            Lane::Effect,
            "resize",
            format!("volume {volume} of pool {pool}"),
            &scope(pool),
            deadline,
            move |connection| {
                let pool = connection.lookup_storage_pool_by_name(&pool_name)?;
                Ok(pool
                    .lookup_storage_vol_by_name(&name)?
                    .resize(bytes, flags)?)
            },
        )
        .await
    }

    /// Deletes a volume. libvirt deletes one in use too: callers look before.
    ///
    /// # Errors
    /// When it is not there, or libvirt refuses.
    pub async fn volume_delete(&self, pool: &str, volume: &str) -> Result<(), Error> {
        let (pool_name, name) = (pool.to_owned(), volume.to_owned());
        let deadline = self.0.options.effect_deadline;
        self.once(
            Lane::Effect,
            "delete",
            format!("volume {volume} of pool {pool}"),
            &scope(pool),
            deadline,
            move |connection| {
                let pool = connection.lookup_storage_pool_by_name(&pool_name)?;
                Ok(pool.lookup_storage_vol_by_name(&name)?.delete(0)?)
            },
        )
        .await
    }
}
