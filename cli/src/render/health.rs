//! What is wrong at an agent.

use std::fmt::Write as _;

use vmsnap_proto::v1;

use super::Clock;
use crate::terminal::{Style, clean};

/// Every problem with its age and what to do about it, the most urgent first.
pub fn problems(health: &v1::GetHealthResponse, clock: &Clock, style: Style) -> String {
    let mut text = String::new();
    for problem in &health.problems {
        let mark = if problem.urgent {
            style.pick("✗", "x")
        } else {
            "!"
        };
        let _ = write!(text, "{mark} {}", clean(&problem.message));
        let age = clock.age(problem.since.as_ref());
        if !age.is_empty() {
            let _ = write!(
                text,
                " (since {}, {age} ago)",
                clock.time(problem.since.as_ref())
            );
        }
        let _ = writeln!(text, "\n    {}", clean(&problem.remedy));
    }
    if health.problems.is_empty() {
        text.push_str("all is well");
    }
    match health.open_workflows {
        0 => {}
        1 => text.push_str("\n1 run is open"),
        open => {
            let _ = write!(text, "\n{open} runs are open");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_shown_with_its_age_and_the_way_out() {
        let health = v1::GetHealthResponse {
            problems: vec![
                v1::HealthProblem {
                    kind: v1::HealthProblemKind::RunStuck as i32,
                    urgent: true,
                    since: Some(prost_types::Timestamp {
                        seconds: 1_700_000_000,
                        nanos: 0,
                    }),
                    vm_name: "web1".into(),
                    workflow_id: "r1".into(),
                    message: "run r1 could not\u{7} undo".into(),
                    remedy: "vmsnap resolve r1".into(),
                },
                v1::HealthProblem {
                    message: "libvirt has had a call".into(),
                    remedy: "look at the VM".into(),
                    ..Default::default()
                },
            ],
            open_workflows: 2,
        };
        let shown = problems(&health, &Clock::fixed(1_700_000_090), Style::ascii());
        assert_eq!(
            shown,
            "x run r1 could not  undo (since 2023-11-14 22:13:20, 1m30s ago)\n    vmsnap resolve \
             r1\n! libvirt has had a call\n    look at the VM\n\n2 runs are open"
        );
        let well = problems(
            &v1::GetHealthResponse::default(),
            &Clock::fixed(0),
            Style::ascii(),
        );
        assert_eq!(well, "all is well");
    }
}
