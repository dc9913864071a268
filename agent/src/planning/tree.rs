//! The tree of a VM's snapshots: who descends from whom, and in which order
//! they can go.
//!
//! Invariant: works on any list of parents that libvirt could give, also on one
//! with a missing or circular parent, and always ends.

use std::collections::BTreeSet;

use super::facts::{Facts, Snapshot};

/// Children of a snapshot.
#[must_use]
pub fn children<'a>(facts: &'a Facts, name: &str) -> Vec<&'a Snapshot> {
    facts
        .snapshots
        .iter()
        .filter(|snapshot| snapshot.parent.as_deref() == Some(name))
        .collect()
}

/// All that descends from a snapshot, each after its own descendants: an order
/// in which they can be deleted.
#[must_use]
pub fn descendants_leaf_first<'a>(facts: &'a Facts, name: &str) -> Vec<&'a Snapshot> {
    fn walk<'a>(
        facts: &'a Facts,
        name: &str,
        seen: &mut BTreeSet<&'a str>,
        out: &mut Vec<&'a Snapshot>,
    ) {
        for child in children(facts, name) {
            if seen.insert(&child.name) {
                walk(facts, &child.name, seen, out);
                out.push(child);
            }
        }
    }
    let mut out = Vec::new();
    let mut seen = BTreeSet::new();
    if let Some(start) = facts.snapshot(name) {
        seen.insert(start.name.as_str());
    }
    walk(facts, name, &mut seen, &mut out);
    out
}

/// From the snapshot that the present state descends from up to its root.
#[must_use]
pub fn active_path(facts: &Facts) -> Vec<&Snapshot> {
    let mut path: Vec<&Snapshot> = Vec::new();
    let mut next = facts.current();
    while let Some(snapshot) = next {
        if path.iter().any(|seen| seen.name == snapshot.name) {
            break;
        }
        path.push(snapshot);
        next = snapshot
            .parent
            .as_deref()
            .and_then(|parent| facts.snapshot(parent));
    }
    path
}

/// Whether the present state descends from a snapshot.
#[must_use]
pub fn is_on_active_path(facts: &Facts, name: &str) -> bool {
    active_path(facts)
        .iter()
        .any(|snapshot| snapshot.name == name)
}
