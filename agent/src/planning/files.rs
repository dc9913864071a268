//! Files that a plan makes: their names, and the space they need.
//!
//! Invariants: a name is never one that exists or that this plan gave out
//! before (libvirt overwrites an existing memory file and reuses an empty
//! overlay without a word); a plan that does not fit is refused with the pool or
//! folder, the need and what is free.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    facts::{Facts, file_name, folder_of},
    names::file_part,
    reason::{Fault, Reason},
};

/// Bytes that a fresh overlay takes: header, tables and one cluster of each.
pub const OVERLAY_BYTES: u64 = 256 * 1024;

/// Gives out names and counts the space that is needed.
#[derive(Debug)]
pub struct Files<'a> {
    facts: &'a Facts,
    given: BTreeSet<String>,
    needs: BTreeMap<String, u64>,
}

impl<'a> Files<'a> {
    /// Nothing given out yet.
    #[must_use]
    pub fn new(facts: &'a Facts) -> Self {
        Self {
            facts,
            given: BTreeSet::new(),
            needs: BTreeMap::new(),
        }
    }

    /// A new path beside `beside`, named after the VM, `part` and the snapshot.
    ///
    /// # Errors
    /// When the folder is not known, not writable, or full of such names.
    pub fn beside(
        &mut self,
        beside: &str,
        part: &str,
        snapshot: &str,
        extension: &str,
        bytes: u64,
    ) -> Result<String, Fault> {
        let path = folder_of(beside);
        let Some(folder) = self.facts.folders.get(path) else {
            return Err(Fault::new(
                Reason::StorageNotWritable,
                format!("the folder '{path}' of '{beside}' cannot be read by the agent"),
            )
            .with("path", path));
        };
        if !folder.writable {
            return Err(Fault::new(
                Reason::StorageNotWritable,
                format!("no new file can be made in '{path}': it is mounted read-only"),
            )
            .with("path", path));
        }
        let mut stem = file_part(&self.facts.vm.name);
        if !part.is_empty() {
            stem = format!("{stem}.{}", file_part(part));
        }
        let stem = format!("{stem}.{}", file_part(snapshot));
        let name = (1..=99)
            .map(|try_| match try_ {
                1 => format!("{stem}.{extension}"),
                _ => format!("{stem}-{try_}.{extension}"),
            })
            .find(|name| !folder.names.contains(name) && !self.given.contains(&join(path, name)));
        let Some(name) = name else {
            return Err(Fault::new(
                Reason::FileExists,
                format!("'{stem}.{extension}' and 98 more names like it exist in '{path}'"),
            )
            .with("path", join(path, &format!("{stem}.{extension}"))));
        };
        let full = join(path, &name);
        self.given.insert(full.clone());
        self.need(path, bytes);
        Ok(full)
    }

    /// Counts bytes that will be written below a folder.
    pub fn need(&mut self, folder: &str, bytes: u64) {
        let entry = self.needs.entry(folder.to_owned()).or_default();
        *entry = entry.saturating_add(bytes);
    }

    /// Checks that all fits.
    ///
    /// # Errors
    /// [`Reason::NoSpace`], naming pool or folder, need and free bytes.
    pub fn check_space(&self) -> Result<(), Fault> {
        let needs = self.needs.iter().map(|(path, need)| (path.as_str(), *need));
        match short(self.facts, needs) {
            Some(short) => Err(no_space(self.facts, short.path, short.need, short.free)),
            None => Ok(()),
        }
    }
}

/// A folder on whose file system there is too little space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Short<'a> {
    /// The folder; of several on that file system the one with the largest need.
    pub path: &'a str,
    /// Bytes needed in all folders on that file system.
    pub need: u64,
    /// Bytes free there.
    pub free: u64,
}

/// The first file system without the space for what folders on it need, each given
/// once with its bytes. Folders that are not known are left out.
pub fn short<'a>(facts: &Facts, needs: impl Iterator<Item = (&'a str, u64)>) -> Option<Short<'a>> {
    let mut found: Vec<(u64, u64, Short<'a>)> = Vec::new();
    for (path, own) in needs {
        let Some(folder) = facts.folders.get(path) else {
            continue;
        };
        let same =
            |(device, ..): &&mut (u64, u64, Short<'_>)| *device != 0 && *device == folder.device;
        let Some((_, largest, there)) = found.iter_mut().find(same) else {
            let short = Short {
                path,
                need: own,
                free: folder.free,
            };
            found.push((folder.device, own, short));
            continue;
        };
        there.need = there.need.saturating_add(own);
        if own > *largest {
            (*largest, there.path) = (own, path);
        }
    }
    found
        .into_iter()
        .map(|(.., there)| there)
        .find(|there| there.free < there.need)
}

/// A folder as people know it.
#[must_use]
pub fn place(facts: &Facts, path: &str) -> String {
    match facts
        .folders
        .get(path)
        .and_then(|folder| folder.pool.as_deref())
    {
        Some(pool) => format!("pool '{pool}' at '{path}'"),
        None => format!("'{path}'"),
    }
}

/// The refusal for too little space.
#[must_use]
pub fn no_space(facts: &Facts, path: &str, need: u64, free: u64) -> Fault {
    let fault = Fault::new(
        Reason::NoSpace,
        format!(
            "{} has {free} bytes free and {need} bytes are needed; free space there or enlarge it",
            place(facts, path)
        ),
    )
    .with("need_bytes", need)
    .with("free_bytes", free);
    at(fault, facts, path)
}

/// A fault with the folder that it is about, and the pool that lies there.
#[must_use]
pub fn at(fault: Fault, facts: &Facts, path: &str) -> Fault {
    let fault = fault.with("path", path);
    match facts
        .folders
        .get(path)
        .and_then(|folder| folder.pool.as_deref())
    {
        Some(pool) => fault.with("pool", pool),
        None => fault,
    }
}

fn join(folder: &str, name: &str) -> String {
    if folder == "/" {
        format!("/{name}")
    } else {
        format!("{folder}/{name}")
    }
}

/// Whether a path exists, as far as the facts know.
#[must_use]
pub fn exists(facts: &Facts, path: &str) -> Option<bool> {
    facts
        .folders
        .get(folder_of(path))
        .map(|folder| folder.names.contains(file_name(path)))
}
