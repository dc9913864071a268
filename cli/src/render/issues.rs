//! Known issues.

use std::fmt::Write as _;

use vmsnap_proto::v1;

use super::Clock;
use crate::terminal::clean;

/// A paragraph an issue.
pub fn issues(issues: &[v1::KnownIssue], clock: &Clock) -> String {
    let mut text = String::new();
    for (at, issue) in issues.iter().enumerate() {
        if at > 0 {
            text.push('\n');
        }
        let _ = writeln!(text, "{}: {}", clean(&issue.id), clean(&issue.title));
        for (label, value) in [
            ("when", &issue.applies_when),
            ("what happens", &issue.what_happens),
            ("what to do", &issue.what_to_do),
            ("about", &issue.subject),
        ] {
            if !value.is_empty() {
                let _ = writeln!(text, "  {label}: {}", clean(value));
            }
        }
        if issue.learned {
            let seen = match issue.times_seen {
                1 => "once".to_owned(),
                times => format!("{times} times"),
            };
            let last = clock.time(issue.last_seen.as_ref());
            let last = if last.is_empty() {
                last
            } else {
                format!(", last at {last}")
            };
            let _ = writeln!(
                text,
                "  learned here from {}, seen {seen}{last}",
                clean(&issue.reason)
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_learned_issue_says_from_what_and_how_often() {
        let issue = v1::KnownIssue {
            id: "learned-7".to_owned(),
            title: "the pool was full".to_owned(),
            what_to_do: "empty /pool/old".to_owned(),
            learned: true,
            reason: "NO_SPACE".to_owned(),
            subject: "default".to_owned(),
            times_seen: 2,
            ..Default::default()
        };
        assert_eq!(
            issues(&[issue], &Clock::fixed(0)),
            "\
learned-7: the pool was full
  what to do: empty /pool/old
  about: default
  learned here from NO_SPACE, seen 2 times
"
        );
    }
}
