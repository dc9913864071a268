//! commit: keeps the present state and drops restore points.
//!
//! With a name, that snapshot and its descendants on the active path go, leaf
//! first, so that metadata and chain agree after each. With `all`, the whole path does. Without either nothing is merged.

use crate::planning::{
    actions::{checks, delete, resize},
    facts::{Facts, Kind, Snapshot},
    guard::{self, GuardState},
    lineage,
    plan::Draft,
    reason::{Fault, Reason},
    request::{Commit, Request},
    tree,
};

/// Drafts the plan.
///
/// # Errors
/// The refusal.
pub fn draft(request: &Request, commit: &Commit, facts: &Facts) -> Result<Draft, Fault> {
    let mut draft = Draft {
        snapshot: commit.name.clone(),
        ..Draft::default()
    };
    let merges = commit.all || !commit.name.is_empty();
    if merges || commit.resize_to.is_some() {
        checks::changeable(facts)?;
    }
    let state = checks::start_first(request, facts, &mut draft)?;
    let mut seen = facts.clone();
    seen.vm.state = state;
    // To commit the snapshot of a guarded change is to confirm the change.
    if let Some(step) = guard::end(facts, &commit.name, GuardState::Confirmed) {
        draft.push(step);
        for snapshot in &mut seen.snapshots {
            snapshot.guard = None;
        }
    }
    let facts = &seen;
    if merges {
        merge(commit, facts, &mut draft)?;
    } else {
        draft.decide(
            "merge",
            "nothing",
            "no snapshot was named and all is not set",
        );
    }
    if let Some(bytes) = commit.resize_to {
        resize::draft(commit, bytes, facts, &mut draft)?;
    }
    Ok(draft)
}

fn merge(commit: &Commit, facts: &Facts, draft: &mut Draft) -> Result<(), Fault> {
    let path = tree::active_path(facts);
    let drop: Vec<&Snapshot> =
        if commit.all {
            path.clone()
        } else if facts.snapshot(&commit.name).is_none() {
            let fault = checks::not_found(facts, &commit.name);
            draft.warn(
                "SNAPSHOT_NOT_FOUND",
                format!("{}; nothing is merged", fault.message),
                "",
            );
            return Ok(());
        } else {
            let Some(at) = path
                .iter()
                .position(|snapshot| snapshot.name == commit.name)
            else {
                current_known(facts)?;
                let path: Vec<&str> = path.iter().map(|snapshot| snapshot.name.as_str()).collect();
                return Err(Fault::new(
                Reason::SnapshotBranches,
                format!(
                    "the present state of VM '{}' does not descend from snapshot '{}', so nothing \
                     of it can be merged; it descends from {}: remove '{}' with cleanup instead",
                    facts.vm.name,
                    commit.name,
                    if path.is_empty() { "none".to_owned() } else { path.join(", ") },
                    commit.name
                ),
            )
            .with("snapshot", &commit.name)
            .with("active_path", path.join(",")));
            };
            path[..=at].to_vec()
        };
    if drop.is_empty() {
        current_known(facts)?;
        draft.decide("merge", "nothing", "the VM has no snapshots");
        return Ok(());
    }
    let side: Vec<&str> = drop
        .last()
        .map(|oldest| tree::descendants_leaf_first(facts, &oldest.name))
        .unwrap_or_default()
        .into_iter()
        .filter(|snapshot| !drop.iter().any(|dropped| dropped.name == snapshot.name))
        .map(|snapshot| snapshot.name.as_str())
        .collect();
    if !side.is_empty() {
        return Err(Fault::new(
            Reason::SnapshotBranches,
            format!(
                "other branches stand on what would be merged: {}; remove them with cleanup \
                 first, in this order",
                side.join(", ")
            ),
        )
        .with("branches", side.join(","))
        .with("order", side.join(",")));
    }
    for snapshot in drop.iter().filter(|snapshot| snapshot.name != commit.name) {
        let what = match &snapshot.record {
            Some(record) if record.protected => "is protected",
            Some(_) => continue,
            None => "was not made by this agent",
        };
        return Err(Fault::new(
            Reason::SnapshotProtected,
            format!(
                "snapshot '{}' {what} and would be dropped without being named; commit it by name \
                 first",
                snapshot.name
            ),
        )
        .with("snapshot", &snapshot.name));
    }
    draft.decide(
        "merge",
        drop.iter()
            .map(|snapshot| snapshot.name.as_str())
            .collect::<Vec<_>>()
            .join(", "),
        "from the newest restore point down, so that chain and metadata agree after each step",
    );
    if drop.iter().any(|snapshot| snapshot.kind == Kind::Internal) {
        draft.decide("way", "delete", "internal snapshots hold no chain to merge");
    }
    delete::in_order(&drop, "committed", commit.bandwidth, facts, draft)
}

/// Refuses where libvirt takes another snapshot for the current one than that on
/// which the present images lie, or none: what would be merged is not known then.
fn current_known(facts: &Facts) -> Result<(), Fault> {
    let help = match (lineage::to_make_current(facts), facts.current()) {
        (Some(help), _) => help,
        (None, None) if facts.snapshots.iter().any(|one| one.kind == Kind::External) => format!(
            "make the one on which it stands the current one with 'virsh snapshot-current {} NAME'",
            facts.vm.name
        ),
        (None, _) => return Ok(()),
    };
    let current = match facts.current() {
        Some(current) => format!("takes '{}' for the snapshot", current.name),
        None => "does not know the snapshot".to_owned(),
    };
    Err(Fault::new(
        Reason::CurrentUnknown,
        format!(
            "libvirt {current} that the present state of VM '{}' stands on, so that nothing can be \
             merged; {help}",
            facts.vm.name
        ),
    ))
}
