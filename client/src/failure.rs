//! Why a call or a run failed, whichever way the agent said it.
//!
//! Purpose: an agent answers a failed call with a `google.rpc.Status` and rich
//! details, and says in a run's outcome why that run failed. Both become one
//! type here, so that a caller explains them in one place.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    time::Duration,
};

use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use vmsnap_proto::{ERROR_DOMAIN, v1};

use crate::json::code_word;

/// Metadata key of the names that one may choose from, separated by commas.
const VALID_NAMES: &str = "valid_names";

/// Metadata key of the valid name that is nearest to the one given.
const NEAREST: &str = "nearest";

/// What metadata keys of fixes that worked before begin with.
const KNOWN_FIX: &str = "known_fix";

/// Why a call or a run failed.
///
/// Its `Display` is the agent's message with the reason in front.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The gRPC code.
    pub code: Code,
    /// Stable reason such as `SNAPSHOT_NOT_FOUND`; empty when what failed was
    /// not the agent's own doing.
    pub reason: String,
    /// A sentence for a person.
    pub message: String,
    /// Names and figures that belong to the reason.
    pub metadata: BTreeMap<String, String>,
    /// Fixes that worked on this host before: those for the error's own pool,
    /// folder or VM first.
    pub known_fixes: Vec<String>,
    /// What is wrong with which field of the request.
    pub violations: Vec<Violation>,
    /// When trying again makes sense.
    pub retry_after: Option<Duration>,
    /// The reason's page in the documentation.
    pub page: Option<String>,
}

/// A field of a request that was not as it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The field's path in the request.
    pub subject: String,
    /// What is wrong with it.
    pub description: String,
}

impl Failure {
    /// The names that would have been valid, as the agent listed them.
    #[must_use]
    pub fn valid_names(&self) -> Vec<&str> {
        self.metadata
            .get(VALID_NAMES)
            .map(|names| {
                names
                    .split(',')
                    .map(str::trim)
                    .filter(|name| !name.is_empty())
                    .collect()
            })
            .unwrap_or_default()
    }

    /// The valid name nearest to the one that was not found.
    #[must_use]
    pub fn nearest_name(&self) -> Option<&str> {
        self.metadata
            .get(NEAREST)
            .map(String::as_str)
            .filter(|name| !name.is_empty())
    }

    /// Whether an agent said this, rather than something on the way to it.
    #[must_use]
    pub fn is_from_agent(&self) -> bool {
        !self.reason.is_empty()
    }

    /// Takes over what only the other knows: the details that travel with a
    /// status but not in an outcome.
    pub(crate) fn enrich(&mut self, other: Failure) {
        if self.reason != other.reason {
            return;
        }
        self.page = self.page.take().or(other.page);
        self.retry_after = self.retry_after.or(other.retry_after);
        if self.violations.is_empty() {
            self.violations = other.violations;
        }
        if self.known_fixes.is_empty() {
            self.known_fixes = other.known_fixes;
        }
        for (key, value) in other.metadata {
            self.metadata.entry(key).or_insert(value);
        }
    }

    /// `reason`, `code`, `message`, `metadata`, `known_fixes`, `violations`,
    /// `retry_after_ms` and `page`, absent ones `null`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let violations: Vec<_> = self
            .violations
            .iter()
            .map(|violation| json!({"field": violation.subject, "description": violation.description}))
            .collect();
        json!({
            "reason": (!self.reason.is_empty()).then_some(&self.reason),
            "code": code_word(self.code as i32),
            "message": self.message,
            "metadata": self.metadata,
            "known_fixes": self.known_fixes,
            "violations": violations,
            "retry_after_ms": self.retry_after.map(|delay| u64::try_from(delay.as_millis()).unwrap_or(u64::MAX)),
            "page": self.page,
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lead = if self.reason.is_empty() {
            code_word(self.code as i32)
        } else {
            &self.reason
        };
        if self.message.is_empty() {
            f.write_str(lead)
        } else {
            write!(f, "{lead}: {}", self.message)
        }
    }
}

impl std::error::Error for Failure {}

impl From<&v1::Failure> for Failure {
    fn from(failure: &v1::Failure) -> Self {
        let (metadata, fixes) = without_fixes(&failure.metadata);
        Failure {
            code: Code::from_i32(failure.code),
            reason: failure.reason.clone(),
            message: failure.message.clone(),
            metadata,
            known_fixes: if failure.known_fixes.is_empty() {
                fixes
            } else {
                failure.known_fixes.clone()
            },
            violations: Vec::new(),
            retry_after: None,
            page: None,
        }
    }
}

impl From<&Status> for Failure {
    fn from(status: &Status) -> Self {
        let details = status.get_error_details();
        let info = details
            .error_info()
            .filter(|info| info.domain == ERROR_DOMAIN);
        let reason = info.map(|info| info.reason.clone()).unwrap_or_default();
        let (metadata, known_fixes) = info
            .map(|info| without_fixes(&info.metadata))
            .unwrap_or_default();
        let fields = details
            .bad_request()
            .map(|bad| bad.field_violations.as_slice())
            .unwrap_or_default();
        // A status has only its message for a caller that reads no details, so an agent puts the
        // reason in front of it; here the reason has a place of its own.
        let message = status.message();
        let message = message
            .strip_prefix(reason.as_str())
            .and_then(|rest| rest.strip_prefix(": "))
            .unwrap_or(message);
        Failure {
            code: status.code(),
            message: message.to_owned(),
            reason,
            metadata,
            known_fixes,
            violations: fields
                .iter()
                .map(|violation| Violation {
                    subject: violation.field.clone(),
                    description: violation.description.clone(),
                })
                .collect(),
            retry_after: details.retry_info().and_then(|retry| retry.retry_delay),
            page: details
                .help()
                .and_then(|help| help.links.first())
                .map(|link| link.url.clone()),
        }
    }
}

/// Metadata, and the fixes that travel in it, in the order of their keys.
fn without_fixes(metadata: &HashMap<String, String>) -> (BTreeMap<String, String>, Vec<String>) {
    let (fixes, metadata): (BTreeMap<_, _>, BTreeMap<_, _>) = metadata
        .clone()
        .into_iter()
        .partition(|(key, _)| key.starts_with(KNOWN_FIX));
    (metadata, fixes.into_values().collect())
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    fn not_found() -> Status {
        let mut details = ErrorDetails::new();
        details
            .set_error_info(
                "SNAPSHOT_NOT_FOUND",
                ERROR_DOMAIN,
                [
                    ("valid_names".to_owned(), "before, after".to_owned()),
                    ("nearest".to_owned(), "before".to_owned()),
                    ("known_fix_1".to_owned(), "list first".to_owned()),
                ],
            )
            .add_help_link("what it means", "https://example.org/SNAPSHOT_NOT_FOUND");
        Status::with_error_details(
            Code::NotFound,
            "SNAPSHOT_NOT_FOUND: no snapshot \"befor\" of web1",
            details,
        )
    }

    #[test]
    fn a_rich_status_becomes_a_failure_with_names_fixes_and_page() {
        let failure = Failure::from(&not_found());
        assert_eq!(
            failure.to_string(),
            "SNAPSHOT_NOT_FOUND: no snapshot \"befor\" of web1"
        );
        assert_eq!(failure.valid_names(), ["before", "after"]);
        assert_eq!(failure.nearest_name(), Some("before"));
        assert_eq!(failure.known_fixes, ["list first"]);
        assert_eq!(
            failure.page.as_deref(),
            Some("https://example.org/SNAPSHOT_NOT_FOUND")
        );
        assert_eq!(failure.to_json()["code"], "not_found");
    }

    #[test]
    fn a_bad_request_names_its_fields() {
        let mut details = ErrorDetails::new();
        details
            .set_error_info(
                "INVALID_ARGUMENT",
                ERROR_DOMAIN,
                std::collections::HashMap::new(),
            )
            .add_bad_request_violation("spec.vm_name", "must not be empty");
        let failure = Failure::from(&Status::with_error_details(
            Code::InvalidArgument,
            "vm_name",
            details,
        ));
        assert_eq!(
            failure.violations,
            [Violation {
                subject: "spec.vm_name".to_owned(),
                description: "must not be empty".to_owned()
            }]
        );
    }

    #[test]
    fn a_status_of_somebody_else_has_no_reason() {
        let mut details = ErrorDetails::new();
        details.set_error_info("X", "somebody.example", std::collections::HashMap::new());
        let failure = Failure::from(&Status::with_error_details(Code::Internal, "boom", details));
        assert!(!failure.is_from_agent());
        assert_eq!(failure.to_string(), "internal: boom");
    }

    #[test]
    fn an_outcome_takes_the_page_from_the_status_of_the_same_reason_only() {
        let mut outcome = Failure::from(&v1::Failure {
            code: 5,
            reason: "SNAPSHOT_NOT_FOUND".to_owned(),
            ..Default::default()
        });
        outcome.enrich(Failure::from(&Status::internal("other")));
        assert_eq!(outcome.page, None);
        outcome.enrich(Failure::from(&not_found()));
        assert!(outcome.page.is_some());
        assert_eq!(outcome.known_fixes, ["list first"]);
    }
}
