//! list: reports, and changes nothing.

use crate::planning::{
    actions::checks,
    facts::{Facts, VmState},
    plan::Draft,
    reason::Fault,
    request::{List, Request},
    step::Step,
};

/// Drafts the plan: no step, unless the VM is to be started.
///
/// # Errors
/// When a snapshot is named that is not there.
pub fn draft(request: &Request, list: &List, facts: &Facts) -> Result<Draft, Fault> {
    let mut draft = Draft {
        snapshot: list.name.clone(),
        ..Draft::default()
    };
    if !list.name.is_empty() {
        checks::find(facts, &list.name)?;
    }
    if request.start_if_stopped && facts.vm.state == VmState::Stopped {
        checks::no_managed_save(facts)?;
        draft.push(Step::Start { paused: false });
        draft.change("state", Some("stopped".into()), Some("running".into()));
    }
    Ok(draft)
}
