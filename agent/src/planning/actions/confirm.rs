//! confirm: keeps a guarded change.

use crate::planning::{facts::Facts, plan::Draft};

/// Drafts the plan: without a pending guard there is nothing to do, and it says
/// so.
#[must_use]
pub fn draft(name: &str, facts: &Facts) -> Draft {
    let mut draft = Draft {
        snapshot: name.to_owned(),
        ..Draft::default()
    };
    let pending = facts
        .snapshots
        .iter()
        .any(|snapshot| snapshot.guard.is_some() && (name.is_empty() || snapshot.name == name));
    if !pending {
        draft.warn(
            "NO_GUARD_PENDING",
            format!("no change of VM '{}' waits to be confirmed", facts.vm.name),
            "",
        );
    }
    draft
}
