//! list: reports, and changes nothing.

use crate::planning::{
    actions::checks,
    facts::Facts,
    plan::Draft,
    reason::Fault,
    request::{List, Request},
};

/// Drafts the plan: no step, unless the VM is to be started.
///
/// # Errors
/// When a snapshot is named that is not there, or the VM must not be started.
pub fn draft(request: &Request, list: &List, facts: &Facts) -> Result<Draft, Fault> {
    let mut draft = Draft {
        snapshot: list.name.clone(),
        ..Draft::default()
    };
    if !list.name.is_empty() {
        checks::find(facts, &list.name)?;
    }
    checks::start_first(request, facts, &mut draft)?;
    Ok(draft)
}
