//! Merges that were cut off and left no mark.
//!
//! libvirt marks an unfinished delete only where the snapshot has a parent, and
//! a block job that somebody else began and gave up leaves no mark at all. What
//! stays is this: an image that has to stand still was written after its snapshot
//! was made, and part of what stands on it is in it.
//!
//! Invariants: reads only; what cannot be read tells nothing; an image that was
//! compared once is compared again only when it was written again.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use vmsnap_hypervisor::overlap;

use crate::planning::facts::{Disk, Kind, Snapshot};

/// How far the last write into an image may lie behind the second in which its
/// snapshot was made.
const SLACK: Duration = Duration::from_secs(2);

/// A lower and an upper image.
type Pair = (String, String);

/// What was found out before: by lower and upper image, as of the last write into
/// the lower one. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Compared(Arc<Mutex<HashMap<Pair, (SystemTime, bool)>>>);

impl Compared {
    /// Images that hold a snapshot's data and part of what stands on them: the
    /// image, and which of those above it. `finished` tells when merges of this
    /// agent last wrote into images, in nanoseconds: those are no question.
    pub(super) async fn find(
        &self,
        snapshots: &[Snapshot],
        disks: &[Disk],
        finished: &BTreeMap<String, i64>,
    ) -> BTreeMap<String, Vec<String>> {
        let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for disk in disks.iter().filter(|disk| !disk.only_read()) {
            for (at, image) in disk.chain.iter().enumerate().skip(1) {
                let Some(written) = written_since(&image.path, &disk.target, snapshots) else {
                    continue;
                };
                if finished.get(&image.path) == Some(&nanoseconds(written)) {
                    continue;
                }
                for above in &disk.chain[..at] {
                    if self.shares(&above.path, &image.path, written).await {
                        found
                            .entry(image.path.clone())
                            .or_default()
                            .push(above.path.clone());
                    }
                }
            }
        }
        found
    }

    async fn shares(&self, upper: &str, lower: &str, written: SystemTime) -> bool {
        let key = (lower.to_owned(), upper.to_owned());
        let known = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&key)
            .copied();
        if let Some((_, shares)) = known.filter(|(as_of, _)| *as_of == written) {
            return shares;
        }
        let Ok(shares) = overlap::shares_data(Path::new(upper), Path::new(lower)).await else {
            return false;
        };
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key, (written, shares));
        shares
    }
}

/// A time as the journal keeps it.
pub(crate) fn nanoseconds(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// When an image that holds an external snapshot's data was last written, if
/// that was after the snapshot was made.
fn written_since(path: &str, target: &str, snapshots: &[Snapshot]) -> Option<SystemTime> {
    let made = snapshots
        .iter()
        .filter(|snapshot| {
            snapshot.disks.iter().any(|disk| {
                disk.target == target
                    && disk.kind == Some(Kind::External)
                    && disk.data.as_deref() == Some(path)
            })
        })
        .map(|snapshot| {
            let seconds = u64::try_from(snapshot.created.as_second()).unwrap_or(0);
            UNIX_EPOCH + Duration::from_secs(seconds)
        })
        .min()?;
    let written = std::fs::metadata(path).ok()?.modified().ok()?;
    (written > made + SLACK).then_some(written)
}
