//! Whether a file is as it was, without reading it.

use std::{
    fs::Metadata,
    os::unix::fs::MetadataExt as _,
    time::{Duration, SystemTime},
};

/// Time stamps advance in ticks: a file that was touched within this time may
/// be touched again without a change of them.
pub(crate) const TICK: Duration = Duration::from_millis(500);

/// All that changes when a file is written or replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    file: (u64, u64),
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// A file's stamp; `None` when it was touched so lately, or is said to be
    /// touched in the future, that the next change may leave it the same.
    pub fn of(metadata: &Metadata) -> Option<Self> {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .ok()?;
        let settled = |(seconds, nanoseconds): (i64, i64)| {
            let (seconds, nanoseconds) = (seconds.try_into().ok()?, nanoseconds.try_into().ok()?);
            let age = now.checked_sub(Duration::new(seconds, nanoseconds))?;
            (age > TICK).then_some(())
        };
        let modified = (metadata.mtime(), metadata.mtime_nsec());
        let changed = (metadata.ctime(), metadata.ctime_nsec());
        settled(modified)?;
        settled(changed)?;
        Some(Self {
            file: (metadata.dev(), metadata.ino()),
            length: metadata.len(),
            modified,
            changed,
        })
    }
}
