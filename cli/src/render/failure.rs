//! Why something failed, and what can be done about it.

use std::fmt::Write as _;

use vmsnap_client::{Error, Failure};

use crate::terminal::{Style, clean};

/// The reason with everything that helps: what would have been valid, what
/// worked before, where to read on.
pub fn failure(failure: &Failure, style: Style) -> String {
    let mut text = format!("{} {}\n", style.bad(), clean(&failure.to_string()));
    for violation in &failure.violations {
        let _ = writeln!(
            text,
            "  {}: {}",
            clean(&violation.subject),
            clean(&violation.description)
        );
    }
    let mut line = |label: &str, value: &str| {
        // What the message says already is not said again.
        if !value.is_empty() && !failure.message.contains(value) {
            let _ = writeln!(text, "  {}: {}", label.replace('_', " "), clean(value));
        }
    };
    let mut names = failure.valid_names();
    if let Some(nearest) = failure.nearest_name() {
        line("did you mean", nearest);
        // A long list helps less than its first names.
        names.retain(|name| *name != nearest);
    }
    let more = names.len().saturating_sub(20);
    names.truncate(20);
    let mut listed = names.join(", ");
    if more > 0 {
        let _ = write!(listed, " and {more} more");
    }
    line("valid names", &listed);
    for (key, value) in &failure.metadata {
        if !matches!(key.as_str(), "valid_names" | "nearest") {
            line(key, value);
        }
    }
    for fix in &failure.known_fixes {
        line("worked here before", fix);
    }
    if let Some(delay) = failure.retry_after {
        line(
            "try again after",
            &vmsnap_client::quantity::format_duration(delay),
        );
    }
    line("read on", failure.page.as_deref().unwrap_or_default());
    text
}

/// An error of any kind, with its causes and advice.
pub fn error(error: &Error, style: Style) -> String {
    if let Some(failed) = error.failure() {
        return failure(failed, style);
    }
    let mut text = format!("{} {}\n", style.bad(), clean(&error.chain()));
    if let Some(advice) = error.advice() {
        let _ = writeln!(text, "  advice: {}", clean(&advice));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vmsnap_client::Violation;

    use super::*;

    fn not_found() -> Failure {
        let v1 = vmsnap_proto::v1::Failure {
            code: 5,
            reason: "SNAPSHOT_NOT_FOUND".to_owned(),
            message: "web1 has no snapshot 'befor'".to_owned(),
            metadata: [
                ("valid_names", "before,after"),
                ("nearest", "before"),
                ("vm", "web1"),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
            known_fixes: vec!["list first".to_owned()],
        };
        Failure {
            page: Some("docs/errors/SNAPSHOT_NOT_FOUND.md".to_owned()),
            ..Failure::from(&v1)
        }
    }

    #[test]
    fn a_missing_name_comes_with_the_nearest_the_others_and_the_page() {
        assert_eq!(
            failure(&not_found(), Style::ascii()),
            "\
x SNAPSHOT_NOT_FOUND: web1 has no snapshot 'befor'
  did you mean: before
  valid names: after
  worked here before: list first
  read on: docs/errors/SNAPSHOT_NOT_FOUND.md
"
        );
    }

    #[test]
    fn wrong_fields_are_listed_and_a_delay_is_said() {
        let violation = Violation {
            subject: "spec.vm_name".to_owned(),
            description: "empty".to_owned(),
        };
        let failed = Failure {
            message: "malformed".to_owned(),
            reason: "BAD_REQUEST".to_owned(),
            metadata: std::collections::BTreeMap::new(),
            known_fixes: Vec::new(),
            page: None,
            violations: vec![violation],
            retry_after: Some(Duration::from_secs(5)),
            ..not_found()
        };
        assert_eq!(
            failure(&failed, Style::ascii()),
            "x BAD_REQUEST: malformed\n  spec.vm_name: empty\n  try again after: 5s\n"
        );
    }

    #[test]
    fn a_missing_agent_comes_with_advice() {
        let missing = Error::NoSuchSocket {
            path: "/run/vmsnap/agent.sock".into(),
        };
        assert_eq!(
            error(&missing, Style::ascii()),
            "\
x no agent there: /run/vmsnap/agent.sock does not exist
  advice: is vmsnap-agent running (`vmsnap-agent serve`), and is this the socket of its configuration?
"
        );
    }
}
