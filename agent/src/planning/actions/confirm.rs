//! confirm: keeps a guarded change.

use crate::planning::{
    facts::Facts,
    guard::{self, GuardState},
    names,
    plan::Draft,
};

/// Drafts the plan: without a pending guard there is nothing to do, and it says
/// so. An empty name means the only guard.
#[must_use]
pub fn draft(name: &str, facts: &Facts) -> Draft {
    let mut draft = Draft {
        snapshot: name.to_owned(),
        ..Draft::default()
    };
    let found = facts
        .guard
        .as_ref()
        .filter(|guard| name.is_empty() || guard.snapshot == name);
    let Some(found) = found else {
        let mut message = format!("no change of VM '{}' waits to be confirmed", facts.vm.name);
        if let Some(guard) = &facts.guard {
            message = format!(
                "snapshot '{name}' guards no change of VM '{}'; '{}' does",
                facts.vm.name, guard.snapshot
            );
            if names::nearest(name, [guard.snapshot.as_str()]).is_some() {
                message.push_str(": did you mean that?");
            }
        }
        draft.warn("NO_GUARD_PENDING", message, "");
        return draft;
    };
    draft.snapshot.clone_from(&found.snapshot);
    draft.change(
        format!("guard.{}", found.snapshot),
        Some(found.state.name().into()),
        Some(GuardState::Confirmed.name().into()),
    );
    if let Some(step) = guard::end(facts, &found.snapshot, GuardState::Confirmed) {
        draft.push(step);
    }
    draft
}
