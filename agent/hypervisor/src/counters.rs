//! How often the costly things were done, for those who measure.

use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) static SNAPSHOT_XML: AtomicU64 = AtomicU64::new(0);
pub(crate) static HEADERS: AtomicU64 = AtomicU64::new(0);
pub(crate) static QEMU_IMG: AtomicU64 = AtomicU64::new(0);
pub(crate) static RECONNECTS: AtomicU64 = AtomicU64::new(0);
pub(crate) static OVERDUE: AtomicU64 = AtomicU64::new(0);

/// Counts since the process began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counters {
    /// Snapshots whose XML libvirt was asked for.
    pub snapshot_xml: u64,
    /// Images that were looked into without QEMU.
    pub headers: u64,
    /// Runs of `qemu-img`.
    pub qemu_img: u64,
    /// Times that libvirt came back after its connection was lost.
    pub reconnects: u64,
    /// Calls that passed their deadline.
    pub overdue: u64,
}

pub(crate) fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// The counts so far.
#[must_use]
pub fn counters() -> Counters {
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    Counters {
        snapshot_xml: read(&SNAPSHOT_XML),
        headers: read(&HEADERS),
        qemu_img: read(&QEMU_IMG),
        reconnects: read(&RECONNECTS),
        overdue: read(&OVERDUE),
    }
}
