//! Faults as `google.rpc.Status`: one exhaustive map.
//!
//! Invariants: every reason has one code, chosen by who must act; details carry
//! what a program needs; a fault of the agent itself shows nothing but its text.
//! Whatever a fault says, its status fits the headers that every client takes: a
//! status travels in these, and one that does not fit is lost with its reason.

use std::{borrow::Cow, time::Duration};

use tonic::{Code, Status, codegen::http::HeaderMap};
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

/// What the headers of a status may take, in bytes, as HTTP/2 counts them (RFC 9113,
/// 6.5.2): gRPC's C core takes 8 KiB unless it is told otherwise, hyper 16 KiB. Other
/// headers come with them.
const HEADERS: usize = 7 << 10;
/// A fault with no more text than this fits in any case.
const SMALL: usize = 1 << 10;
/// To how many bytes each text is cut, until all of them fit.
const CUTS: [usize; 4] = [1_400, 700, 300, 100];
/// Malformed fields, and fixes that worked, of what is cut.
const FIELDS: usize = 8;
const FIXES: usize = 3;

/// A fault as a status with its details. What does not fit is cut; in an event
/// ([`failure`]) there is room for it.
#[must_use]
pub fn status(fault: &Fault) -> Status {
    let mut status = whole(fault);
    let violations = fault.violations.iter();
    let texts = violations.map(|it| it.field.len() + it.problem.len());
    let values = fault
        .metadata
        .iter()
        .map(|(key, value)| key.len() + value.len());
    if fault.message.len() + texts.chain(values).sum::<usize>() <= SMALL {
        return status;
    }
    for most in CUTS {
        if fits(&status) {
            break;
        }
        status = whole(&cut(fault, most));
    }
    status
}

/// Whether a status arrives.
fn fits(status: &Status) -> bool {
    let mut headers = HeaderMap::new();
    let written = status.add_header(&mut headers);
    let sizes = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 32);
    written.is_ok() && sizes.sum::<usize>() <= HEADERS
}

/// A fault whose texts have so many bytes at most.
fn cut(fault: &Fault, most: usize) -> Fault {
    let mut fixes = 0;
    let mut fault = fault.clone();
    fault.metadata.retain(|key, value| {
        *value = shortened(value, most).into_owned();
        fixes += usize::from(key.starts_with(KNOWN_FIX));
        !key.starts_with(KNOWN_FIX) || fixes <= FIXES
    });
    fault.message = shortened(&fault.message, most).into_owned();
    fault.violations.truncate(FIELDS);
    for violation in &mut fault.violations {
        // A few fields take together what one text does.
        violation.field = shortened(&violation.field, most / FIELDS).into_owned();
        violation.problem = shortened(&violation.problem, most / FIELDS * 2).into_owned();
    }
    fault
}

/// A text with so many bytes at most; of a list of names whole ones.
fn shortened(text: &str, most: usize) -> Cow<'_, str> {
    if text.len() <= most {
        return Cow::Borrowed(text);
    }
    let end = (0..=most).rev().find(|end| text.is_char_boundary(*end));
    let start = &text[..end.unwrap_or(0)];
    match start.rsplit_once(',') {
        Some((names, _)) if !start.contains(' ') => Cow::Borrowed(names),
        _ => Cow::Owned(format!("{start}\u{2026}")),
    }
}

fn whole(fault: &Fault) -> Status {
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
    use crate::planning::reason::Violation;

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
    fn whatever_a_fault_says_it_fits_the_headers_that_any_client_takes() {
        let names: Vec<String> = (0..1_000).map(|n| format!("nightly-{n:04}")).collect();
        let many = Fault::new(
            Reason::SnapshotNotFound,
            format!("VM 'a' has no snapshot 'b'; it has {}", names.join(", ")),
        )
        .with("nearest", "nightly-0001")
        .with("valid_names", names.join(","));
        let fields = vec![("x".repeat(9_000), "'\u{fc}' ".repeat(9_000)); 500];
        let fields = fields
            .into_iter()
            .map(|(field, problem)| Violation { field, problem });
        let paths = (0..300).fold(
            Fault::new(Reason::FileShared, "\u{1f40e}".repeat(5_000)),
            |fault, n| fault.with(&format!("known_fix_{n}"), "y".repeat(4_096)),
        );
        for fault in [many, Fault::bad_fields(fields.collect()), paths] {
            let status = status(&fault);
            let mut headers = tonic::codegen::http::HeaderMap::new();
            status.add_header(&mut headers).unwrap();
            let size: usize = headers
                .iter()
                .map(|(name, value)| name.as_str().len() + value.len() + 32)
                .sum();
            assert!(size <= 8 << 10, "{size} bytes of {}", fault.reason);
            let details = status.get_error_details();
            let info = details.error_info().unwrap();
            assert_eq!(info.reason, fault.reason.as_str());
            assert!(details.help().unwrap().links[0].url.ends_with(".md"));
            match fault.reason {
                // Whole names only, and the one that was probably meant in any case.
                Reason::SnapshotNotFound => {
                    assert_eq!(info.metadata["nearest"], "nightly-0001");
                    let told: Vec<&str> = info.metadata["valid_names"].split(',').collect();
                    assert!(told.len() > 20, "{told:?}");
                    assert_eq!(told, names[..told.len()]);
                    assert!(status.message().contains("nightly-0020"));
                    assert!(status.message().ends_with('\u{2026}'));
                }
                Reason::BadRequest => {
                    assert!(!details.bad_request().unwrap().field_violations.is_empty());
                }
                _ => {}
            }
            // In an event there is room for all of it.
            assert_eq!(failure(&fault).message, fault.message);
        }
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
