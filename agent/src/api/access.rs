//! What handlers ask before they do anything: may this caller, and does he see it?
//!
//! Invariant: what a caller may not see is answered with the words for what is not
//! there, made from what he sees alone.

use tonic::{Request, Status};

use super::{errors, veil};
use crate::{
    journal::RunRow,
    planning::{Fault, Reason},
    trust::{Access, Deed, Role, Tenure},
    workflows::Workflows,
};

/// The access that the gate gave a call.
///
/// # Errors
/// When a call came past the gate.
pub fn of<T>(request: &Request<T>) -> Result<Access, Status> {
    given(request)
}

/// The right to a stream that the gate gave a call which answers with one.
///
/// # Errors
/// As [`of`].
pub fn tenure<T>(request: &Request<T>) -> Result<Tenure, Status> {
    given(request)
}

fn given<T, G: Clone + Send + Sync + 'static>(request: &Request<T>) -> Result<G, Status> {
    request.extensions().get::<G>().cloned().ok_or_else(|| {
        errors::status(&Fault::new(
            Reason::Internal,
            "the call did not pass the gate",
        ))
    })
}

/// Whether the caller has a role over a VM.
///
/// # Errors
/// As for a VM that is not there, or [`Reason::NotAllowed`].
pub async fn over(
    workflows: &Workflows,
    access: &Access,
    method: &'static str,
    role: Role,
    vm: &str,
) -> Result<(), Status> {
    let allowed = || access.allows(method, role, vm);
    once_seen(workflows, access, method, "", vm, allowed).await
}

/// Whether the caller may do this to a VM.
///
/// # Errors
/// As for a VM that is not there, or [`Reason::NotAllowed`].
pub async fn deed(
    workflows: &Workflows,
    access: &Access,
    method: &'static str,
    deed: Deed,
    vm: &str,
) -> Result<(), Status> {
    let allowed = || access.allows_deed(method, deed, vm);
    once_seen(workflows, access, method, deed.action(), vm, allowed).await
}

/// Whether the caller may see the plan of this to a VM.
///
/// # Errors
/// As for a VM that is not there, or [`Reason::NotAllowed`].
pub async fn plan(
    workflows: &Workflows,
    access: &Access,
    method: &'static str,
    deed: Deed,
    vm: &str,
) -> Result<(), Status> {
    let allowed = || access.allows_plan(method, deed, vm);
    once_seen(workflows, access, method, deed.action(), vm, allowed).await
}

/// What is allowed of a VM that the caller sees: of one that he does not, no role is
/// spoken of.
async fn once_seen(
    workflows: &Workflows,
    access: &Access,
    method: &'static str,
    action: &str,
    vm: &str,
    allowed: impl FnOnce() -> Result<(), Fault>,
) -> Result<(), Status> {
    seen(workflows, access, method, action, vm).await?;
    allowed().map_err(|fault| errors::status(&fault))
}

/// Whether the caller would see a VM of this name.
///
/// # Errors
/// As for a VM that is not there.
pub async fn seen(
    workflows: &Workflows,
    access: &Access,
    method: &'static str,
    action: &str,
    vm: &str,
) -> Result<(), Status> {
    let sight = access.sight();
    if sight.sees(vm) {
        return Ok(());
    }
    access.hidden(method, action, vm, Reason::VmNotFound);
    let names = veil::seen_names(workflows, &sight).await;
    let fault = match names {
        Ok(names) => crate::observe::no_such_vm(vm, names.iter().map(String::as_str)),
        Err(fault) => fault,
    };
    Err(errors::status(&fault))
}

/// Longest id that is looked up, in bytes.
pub const ID_MOST: usize = 128;

/// Whether a text is not longer than so many bytes.
///
/// # Errors
/// As for a malformed field.
pub fn bounded(field: &str, value: &str, most: usize) -> Result<(), Status> {
    if value.len() > most {
        return Err(errors::status(&Fault::bad_field(
            field,
            format!("has {} bytes; {most} at most", value.len()),
        )));
    }
    Ok(())
}

/// A run that the caller may see, and over whose VM he has a role.
///
/// # Errors
/// As for a run that is not there, or [`Reason::NotAllowed`].
pub async fn run(
    workflows: &Workflows,
    access: &Access,
    method: &'static str,
    role: Role,
    id: &str,
) -> Result<RunRow, Status> {
    bounded("workflow_id", id, ID_MOST)?;
    let run = workflows
        .run(id)
        .await
        .map_err(|fault| errors::status(&fault))?;
    if !access.sight().sees(&run.request.vm) {
        access.hidden(method, "", &run.request.vm, Reason::WorkflowNotFound);
        return Err(errors::status(&crate::workflows::no_such_run(id)));
    }
    access
        .allows(method, role, &run.request.vm)
        .map_err(|fault| errors::status(&fault))?;
    Ok(run)
}
