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
            ("found", &issue.found),
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
                0 => "recorded by hand".to_owned(),
                1 => "seen once".to_owned(),
                times => format!("seen {times} times"),
            };
            let last = clock.time(issue.last_seen.as_ref());
            let last = if last.is_empty() {
                last
            } else {
                format!(", last at {last}")
            };
            let _ = writeln!(
                text,
                "  learned here for {}, {seen}{last}",
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
    fn an_issue_of_a_vm_says_what_it_was_found_on() {
        let issue = v1::KnownIssue {
            id: "RAW_DISK".to_owned(),
            title: "A disk is raw".to_owned(),
            applies_when: "a writable disk is raw".to_owned(),
            found: "disk vdb is raw".to_owned(),
            ..Default::default()
        };
        assert_eq!(
            issues(&[issue], &Clock::fixed(0)),
            "\
RAW_DISK: A disk is raw
  found: disk vdb is raw
  when: a writable disk is raw
"
        );
    }

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
  learned here for NO_SPACE, seen 2 times
"
        );
    }
}
