//! Why a task failed, as return values.
//!
//! Purpose: `msg` is what a person reads in the play's output, so it is a whole
//! sentence with the reason code, the valid names and what to do; `error` is
//! what a play decides by.

use serde_json::{Value, json};
use vmsnap_client::{Error, Failure};

use crate::rendered::Values;

/// Reason of a failure that no agent had a part in: it could not be reached.
pub const NO_AGENT: &str = "AGENT_UNREACHABLE";
/// Reason when the arguments are wrong.
pub const ARGUMENTS: &str = "INVALID_ARGUMENTS";
/// Reason when the module was told to stop.
pub const INTERRUPTED: &str = "INTERRUPTED";

/// Adds an error of the client.
pub fn add_error(values: &mut Values, error: &Error) {
    match error {
        Error::Failed(failure) => {
            add_failure(values, failure);
            if let (Some(advice), Some(Value::String(told))) = (error.advice(), values.get("msg")) {
                let told = format!("{told}; {advice}");
                values.insert("msg".to_owned(), Value::String(told));
            }
        }
        other => {
            let mut message = other.chain();
            if let Some(advice) = other.advice() {
                message = format!("{message}; {advice}");
            }
            add_plain(values, other.hindrance().reason(), &message);
        }
    }
}

/// Adds a failure that the agent told.
pub fn add_failure(values: &mut Values, failure: &Failure) {
    add(values, &sentence(failure), failure.to_json());
}

/// Adds a failure that has nothing but a sentence and a reason.
pub fn add_plain(values: &mut Values, reason: &str, message: &str) {
    add(
        values,
        message,
        json!({ "reason": reason, "message": message }),
    );
}

fn add(values: &mut Values, message: &str, error: Value) {
    values.insert("failed".to_owned(), Value::Bool(true));
    values.insert("msg".to_owned(), Value::from(message));
    values.insert("error".to_owned(), error);
}

/// The agent's message, and beside it what is not in it already.
fn sentence(failure: &Failure) -> String {
    let mut text = failure.message.clone();
    let mut more = |part: String| {
        if text.is_empty() {
            text = part;
        } else {
            let joint = if text.ends_with(['?', '.']) {
                " "
            } else {
                "; "
            };
            text = format!("{text}{joint}{part}");
        }
    };
    for violation in &failure.violations {
        if !failure.message.contains(&violation.description) {
            more(format!("{}: {}", violation.subject, violation.description));
        }
    }
    let valid = failure.valid_names();
    if !valid.is_empty() && !valid.iter().all(|name| failure.message.contains(name)) {
        more(format!("the valid names are {}", valid.join(", ")));
    }
    if let Some(nearest) = failure.nearest_name()
        && !failure.message.contains("did you mean")
    {
        more(format!("did you mean \"{nearest}\"?"));
    }
    if let Some(fix) = failure.known_fixes.first() {
        more(format!("what worked here before: {fix}"));
    }
    let code = if failure.reason.is_empty() {
        vmsnap_client::json::code_word(failure.code as i32)
    } else {
        &failure.reason
    };
    format!("{text} ({code})")
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmsnap_proto::v1;

    #[test]
    fn a_missing_name_is_told_with_the_valid_ones_the_nearest_and_the_code() {
        let failure = Failure::from(&v1::Failure {
            code: 5,
            reason: "SNAPSHOT_NOT_FOUND".into(),
            message: "web01 has no snapshot \"befor\"".into(),
            metadata: [("valid_names", "before, nightly"), ("nearest", "before")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            known_fixes: vec!["list first".into()],
        });
        let mut values = Values::new();
        add_failure(&mut values, &failure);
        assert_eq!(
            values["msg"],
            "web01 has no snapshot \"befor\"; the valid names are before, nightly; did you mean \
             \"before\"? what worked here before: list first (SNAPSHOT_NOT_FOUND)"
        );
        assert_eq!(values["failed"], true);
        assert_eq!(values["error"]["reason"], "SNAPSHOT_NOT_FOUND");
        assert_eq!(values["error"]["code"], "not_found");
        assert_eq!(values["error"]["metadata"]["nearest"], "before");
    }

    #[test]
    fn what_the_message_says_already_is_not_said_twice() {
        let failure = Failure::from(&v1::Failure {
            code: 5,
            reason: "SNAPSHOT_NOT_FOUND".into(),
            message: "no snapshot \"a\": there are before, nightly".into(),
            metadata: [("valid_names".to_owned(), "before, nightly".to_owned())].into(),
            ..Default::default()
        });
        assert_eq!(
            sentence(&failure),
            "no snapshot \"a\": there are before, nightly (SNAPSHOT_NOT_FOUND)"
        );
    }
}
