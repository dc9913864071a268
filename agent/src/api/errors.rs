//! Faults as `google.rpc.Status`: one exhaustive map.
//!
//! Invariants: every reason has one code, chosen by who must act; details carry
//! what a program needs; a fault of the agent itself shows nothing but its text.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use vmsnap_proto::{ERROR_DOMAIN, v1};

use crate::planning::{
    Fault, Reason,
    issues::{ADVICE, KNOWN_FIX, KNOWN_ISSUE},
};

/// Where the page of each reason is, in the documentation that comes with the agent.
pub const PAGES: &str = "docs/errors/";
/// The page of the known issues.
pub const KNOWN_ISSUES: &str = "docs/known-issues.md";

/// The code of a reason.
#[must_use]
pub fn code(reason: Reason) -> Code {
    use Reason as R;
    match reason {
        R::BadRequest | R::RequestTooLarge => Code::InvalidArgument,
        R::VmNotFound
        | R::SnapshotNotFound
        | R::PoolNotFound
        | R::WorkflowNotFound
        | R::IssueNotFound
        | R::DiskUnknown => Code::NotFound,
        R::SnapshotExists | R::SnapshotConflict | R::FileExists | R::RequestIdReused => {
            Code::AlreadyExists
        }
        R::SnapshotTooOld
        | R::SnapshotNotWhole
        | R::SnapshotNotRevertible
        | R::SnapshotProtected
        | R::SnapshotGuarded
        | R::SnapshotBranches
        | R::CurrentUnknown
        | R::KindsMixed
        | R::KindUnsupported
        | R::DiskUnsupported
        | R::MemoryNotSavable
        | R::ConsistencyNotMet
        | R::StopTooLong
        | R::DomainNotRunning
        | R::DomainState
        | R::GuestFrozen
        | R::ManagedSavePresent
        | R::BlockJobActive
        | R::DefinitionDiffers
        | R::FileShared
        | R::MediaNotCovered
        | R::ShrinkRefused
        | R::StorageNotWritable
        | R::StorageShared
        | R::ChainTooDeep
        | R::PlanChanged
        | R::WorkflowState
        | R::GuestAgentUnavailable
        | R::GuestAgentFailed => Code::FailedPrecondition,
        R::NoSpace | R::LimitReached => Code::ResourceExhausted,
        R::VmBusy | R::Interrupted => Code::Aborted,
        R::WaitTimeout | R::TimedOut | R::HypervisorOverdue => Code::DeadlineExceeded,
        R::Cancelled => Code::Cancelled,
        R::HypervisorUnreachable | R::JournalUnavailable | R::ShuttingDown => Code::Unavailable,
        R::NotAllowed => Code::PermissionDenied,
        R::HypervisorFailed => Code::Unknown,
        R::Internal => Code::Internal,
    }
}

/// A fault as a status with its details.
#[must_use]
pub fn status(fault: &Fault) -> Status {
    let code = code(fault.reason);
    let reason = fault.reason.as_str();
    let mut details = ErrorDetails::new();
    details.set_error_info(
        reason,
        ERROR_DOMAIN,
        fault
            .metadata
            .clone()
            .into_iter()
            .collect::<std::collections::HashMap<_, _>>(),
    );
    details.add_help_link(
        "what this means and what to do",
        format!("{PAGES}{reason}.md"),
    );
    if let Some(issue) = fault.metadata.get(KNOWN_ISSUE) {
        let advice = fault.metadata.get(ADVICE).map_or("", String::as_str);
        details.add_help_link(format!("known issue {issue}: {advice}"), KNOWN_ISSUES);
    }
    for fix in fixes(fault) {
        details.add_help_link(format!("what worked here before: {fix}"), KNOWN_ISSUES);
    }
    let subject = || {
        ["snapshot", "vm", "path", "disk", "pool", "workflow_id"]
            .iter()
            .find_map(|key| fault.metadata.get(*key).map(|value| (*key, value.clone())))
            .unwrap_or_default()
    };
    match code {
        Code::InvalidArgument => {
            for violation in &fault.violations {
                details.add_bad_request_violation(&violation.field, &violation.problem);
            }
        }
        Code::NotFound | Code::AlreadyExists => {
            let (kind, name) = subject();
            details.set_resource_info(kind, name, "", &fault.message);
        }
        Code::FailedPrecondition => {
            let (_, name) = subject();
            details.add_precondition_failure_violation(reason, name, &fault.message);
        }
        Code::ResourceExhausted => {
            let (_, name) = subject();
            details.add_quota_failure_violation(name, &fault.message);
        }
        Code::Aborted | Code::Unavailable => {
            details.set_retry_info(Some(Duration::from_secs(5)));
        }
        _ => {}
    }
    Status::with_error_details(code, fault.to_string(), details)
}

/// A fault as it stands in an event or in a run that is read back.
#[must_use]
pub fn failure(fault: &Fault) -> v1::Failure {
    v1::Failure {
        code: code(fault.reason) as i32,
        reason: fault.reason.as_str().to_owned(),
        message: fault.message.clone(),
        metadata: fault.metadata.clone().into_iter().collect(),
        known_fixes: fixes(fault).cloned().collect(),
    }
}

/// Fixes that a fault carries, in their order.
fn fixes(fault: &Fault) -> impl Iterator<Item = &String> {
    fault
        .metadata
        .iter()
        .filter(|(key, _)| key.starts_with(KNOWN_FIX))
        .map(|(_, fix)| fix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_name_is_sent_with_the_valid_names_and_its_page() {
        let fault = Fault::new(Reason::SnapshotNotFound, "VM 'a' has no snapshot 'b'")
            .with("snapshot", "b")
            .with("valid_names", "c,d");
        let status = status(&fault);
        assert_eq!(status.code(), Code::NotFound);
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!(
            (info.reason.as_str(), info.domain.as_str()),
            ("SNAPSHOT_NOT_FOUND", "vmsnap")
        );
        assert_eq!(info.metadata["valid_names"], "c,d");
        assert_eq!(details.resource_info().unwrap().resource_name, "b");
        assert!(
            details.help().unwrap().links[0]
                .url
                .ends_with("/SNAPSHOT_NOT_FOUND.md")
        );
    }

    #[test]
    fn what_worked_here_before_is_sent_in_metadata_help_and_the_outcome() {
        let fault = Fault::new(Reason::NoSpace, "pool 'default' is full")
            .with("pool", "default")
            .with("known_fix_1", "grow the pool")
            .with("known_fix_2", "call the storage team");
        let status = status(&fault);
        let details = status.get_error_details();
        assert_eq!(
            details.error_info().unwrap().metadata["known_fix_1"],
            "grow the pool"
        );
        let links = &details.help().unwrap().links;
        // The reason's own page comes first: clients show that one.
        assert!(links[0].url.ends_with("/NO_SPACE.md"));
        assert!(links[1].description.ends_with("grow the pool"));
        assert!(links[2].description.ends_with("call the storage team"));
        assert_eq!(
            failure(&fault).known_fixes,
            ["grow the pool", "call the storage team"]
        );
    }

    #[test]
    fn every_reason_has_a_page_in_the_documentation_that_names_its_code() {
        let pages = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/errors");
        for reason in Reason::ALL {
            let page = format!("{pages}/{reason}.md");
            let text = std::fs::read_to_string(&page).unwrap_or_default();
            // `NotFound` is written NOT_FOUND, as in gRPC's own documentation.
            let mut code = String::new();
            for c in format!("{:?}", super::code(*reason)).chars() {
                if c.is_uppercase() && !code.is_empty() {
                    code.push('_');
                }
                code.push(c.to_ascii_uppercase());
            }
            assert!(
                text.contains(&format!("gRPC code `{code}`")),
                "{page}: {code}"
            );
        }
    }
}
