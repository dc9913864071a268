//! What a run achieved.
//!
//! Invariant: stored in the journal, so a field is only ever added.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    facts::{Consistency, Snapshot, Storage, Vm, VmState},
    plan::FieldChange,
};

/// The guest as it came back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestReport {
    /// Host name.
    pub hostname: String,
    /// Operating system, for people.
    pub os: String,
    /// Interfaces: name, hardware address, addresses.
    pub interfaces: Vec<(String, String, Vec<String>)>,
    /// Milliseconds from the VM's running to what was waited for.
    pub ready_ms: u64,
    /// Milliseconds that the clock was behind.
    pub skew_ms: Option<i64>,
    /// Whether the clock was set.
    pub clock_set: bool,
}

impl GuestReport {
    /// Addresses by which others may reach the guest.
    #[must_use]
    pub fn addresses(&self) -> Vec<String> {
        let reachable = |address: &str| {
            address
                .parse::<std::net::IpAddr>()
                .is_ok_and(|ip| match ip {
                    std::net::IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
                    std::net::IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
                })
        };
        self.interfaces
            .iter()
            .flat_map(|(_, _, addresses)| addresses)
            .filter(|address| reachable(address))
            .cloned()
            .collect()
    }
}

/// What a verdict on a file of no VM is about, an orphan.
pub const FILE: &str = "file";

/// Something that went or stayed, and the rule that said so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Name or path.
    pub name: String,
    /// `snapshot`, `volume` or [`FILE`].
    pub what: String,
    /// Whether it goes.
    pub removed: bool,
    /// The rule.
    pub rule: String,
    /// Bytes.
    pub size: u64,
}

/// What a run achieved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Whether anything changed.
    pub changed: bool,
    /// The snapshot that was made, reverted to or found.
    pub snapshot: Option<Snapshot>,
    /// The VM at the end.
    pub vm: Option<Vm>,
    /// Its snapshots at the end.
    pub snapshots: Vec<Snapshot>,
    /// Pool and volumes at the end.
    pub storage: Option<Storage>,
    /// The guest, when it was waited for.
    pub guest: Option<GuestReport>,
    /// Consistency that create achieved.
    pub consistency: Option<Consistency>,
    /// Milliseconds that the vCPUs stood still.
    pub stopped_ms: Option<u64>,
    /// Milliseconds that file systems were frozen.
    pub frozen_ms: Option<u64>,
    /// What went and what stayed.
    pub verdicts: Vec<Verdict>,
    /// Before and after.
    pub diff: Vec<FieldChange>,
    /// Snapshots merged and dropped, in that order.
    pub merged: Vec<String>,
    /// Virtual size after a resize.
    pub resized_to: Option<u64>,
    /// State at the end.
    pub vm_state: Option<VmState>,
    /// Until when a guarded change must be confirmed.
    pub guard: Option<Timestamp>,
    /// Name of a safety snapshot.
    pub safety_snapshot: Option<String>,
}
