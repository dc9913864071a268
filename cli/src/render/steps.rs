//! The events of a run, a line each.

use std::{collections::HashMap, fmt::Write as _};

use vmsnap_client::quantity::format_size;
use vmsnap_proto::v1::{self, workflow_event::Kind};

use super::{Clock, took, words};
use crate::terminal::{Style, clean};

/// Turns events into lines; remembers the titles that later events refer to.
#[derive(Debug)]
pub struct Steps {
    style: Style,
    clock: Clock,
    titles: HashMap<u32, String>,
    /// Tenths of a transfer that were shown, by step and disk.
    shown: HashMap<(u32, String), u64>,
}

/// What is transferred, for a bar or a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    pub title: String,
    pub done: u64,
    pub total: u64,
}

impl Steps {
    pub fn new(style: Style, clock: Clock) -> Self {
        Steps {
            style,
            clock,
            titles: HashMap::new(),
            shown: HashMap::new(),
        }
    }

    /// The lines of an event; empty when there is nothing to say. Steps are told
    /// when they end, and when they begin too if `starts` is wanted.
    pub fn lines(&mut self, event: &v1::WorkflowEvent, starts: bool) -> String {
        let style = self.style;
        let mut text = String::new();
        match event.kind.as_ref() {
            Some(Kind::Planned(planned)) => self.planned(planned, &mut text),
            Some(Kind::StepStarted(started)) => {
                self.titles.insert(started.index, started.title.clone());
                if starts {
                    let _ = writeln!(text, "  {} {}", style.pick("·", "."), clean(&started.title));
                }
            }
            Some(Kind::StepProgress(progress)) if starts => self.tenth(progress, &mut text),
            Some(Kind::StepFinished(finished)) => {
                let title = self.title(finished.index);
                let note = match finished.note.as_str() {
                    "" => String::new(),
                    note => format!(": {}", clean(note)),
                };
                let time = took(finished.took.as_ref());
                let _ = writeln!(text, "  {} {title} ({time}){note}", style.good());
            }
            Some(Kind::StepFailed(failed)) => {
                let title = self.title(failed.index);
                let failure = failed.failure.clone().unwrap_or_default();
                let because = vmsnap_client::Failure::from(&failure).to_string();
                let time = took(failed.took.as_ref());
                let _ = writeln!(
                    text,
                    "  {} {title} ({time}): {}",
                    style.bad(),
                    clean(&because)
                );
            }
            Some(Kind::HoldTaken(taken)) => {
                let _ = writeln!(
                    text,
                    "    the guest is {}",
                    words::<v1::HoldKind>(taken.kind)
                );
            }
            Some(Kind::HoldReleased(released)) => {
                let was = words::<v1::HoldKind>(released.kind);
                let _ = writeln!(
                    text,
                    "    the guest was {was} for {}",
                    took(released.held.as_ref())
                );
            }
            Some(Kind::Warning(warning)) => text.push_str(&super::plan::warning(warning, style)),
            Some(Kind::Undo(undo)) => {
                let title = match clean(&undo.title) {
                    title if title.is_empty() => self.title(undo.index).into(),
                    title => title,
                };
                let note = match undo.note.as_str() {
                    "" => String::new(),
                    note => format!(": {}", clean(note)),
                };
                let _ = match undo.succeeded {
                    None if !starts => Ok(()),
                    None => writeln!(text, "  {} undoing: {title}", style.back()),
                    Some(true) => writeln!(text, "  {} undone: {title}{note}", style.back()),
                    Some(false) => {
                        writeln!(text, "  {} could not undo: {title}{note}", style.bad())
                    }
                };
            }
            Some(Kind::Queued(queued)) => {
                let _ = writeln!(
                    text,
                    "waits for run {} on the same VM",
                    queued.behind_workflow_id
                );
            }
            Some(Kind::Outcome(outcome)) => {
                let mark = if outcome.state() == v1::WorkflowState::Succeeded {
                    style.good()
                } else {
                    style.bad()
                };
                let _ = writeln!(text, "{mark} {}", words::<v1::WorkflowState>(outcome.state));
            }
            Some(Kind::StepProgress(_) | Kind::Heartbeat(_)) | None => {}
        }
        text
    }

    /// The lines of an event with its sequence and time in front, for a log.
    pub fn logged(&mut self, event: &v1::WorkflowEvent) -> String {
        let lines = self.lines(event, true);
        let time = self.clock.time(event.time.as_ref());
        let mut text = String::new();
        for line in lines.lines() {
            let _ = writeln!(text, "{:>4}  {time}  {line}", event.sequence);
        }
        text
    }

    /// What a progress event tells, with its step's title and disk.
    pub fn progress(&self, progress: &v1::EventStepProgress) -> Progress {
        let title = self.title(progress.index);
        let title = match progress.disk.as_str() {
            "" => title,
            disk => format!("{title} [{}]", clean(disk)),
        };
        Progress {
            title,
            done: progress.done_bytes,
            total: progress.total_bytes,
        }
    }

    /// The title of a step; its number when it was never told.
    pub fn title(&self, index: u32) -> String {
        self.titles.get(&index).map_or_else(
            || format!("step {}", index + 1),
            |title| clean(title).into_owned(),
        )
    }

    fn planned(&mut self, planned: &v1::EventPlanned, text: &mut String) {
        let Some(plan) = &planned.plan else { return };
        for step in &plan.steps {
            self.titles.insert(step.index, step.title.clone());
        }
        let _ = match plan.steps.len() {
            0 => writeln!(text, "plan: nothing to do"),
            1 => writeln!(text, "plan: 1 step"),
            count => writeln!(text, "plan: {count} steps"),
        };
        for warning in &plan.warnings {
            text.push_str(&super::plan::warning(warning, self.style));
        }
    }

    /// A line each tenth, so that a log of a long merge stays short.
    fn tenth(&mut self, progress: &v1::EventStepProgress, text: &mut String) {
        let Some(tenths) = progress
            .done_bytes
            .saturating_mul(10)
            .checked_div(progress.total_bytes)
        else {
            return;
        };
        let shown = self
            .shown
            .entry((progress.index, progress.disk.clone()))
            .or_insert(0);
        if tenths <= *shown {
            return;
        }
        *shown = tenths;
        let (done, total) = (
            format_size(progress.done_bytes),
            format_size(progress.total_bytes),
        );
        let title = self.progress(progress).title;
        let _ = writeln!(
            text,
            "    {title}: {done} of {total} ({}%)",
            (tenths * 10).min(100)
        );
    }
}

#[cfg(test)]
mod tests {
    use prost_types::{Duration, Timestamp};

    use super::*;

    fn event(sequence: u64, kind: Kind) -> v1::WorkflowEvent {
        v1::WorkflowEvent {
            workflow_id: "w".to_owned(),
            sequence,
            time: Some(Timestamp {
                seconds: 1_800_000_000 + i64::try_from(sequence).unwrap(),
                nanos: 0,
            }),
            kind: Some(kind),
        }
    }

    fn milliseconds(value: i32) -> Option<Duration> {
        Some(Duration {
            seconds: 0,
            nanos: value * 1_000_000,
        })
    }

    fn started(index: u32, title: &str) -> Kind {
        Kind::StepStarted(v1::EventStepStarted {
            index,
            title: title.to_owned(),
            ..Default::default()
        })
    }

    fn finished(index: u32, took: i32, note: &str) -> Kind {
        Kind::StepFinished(v1::EventStepFinished {
            index,
            took: milliseconds(took),
            note: note.to_owned(),
        })
    }

    fn progress(done: u64) -> Kind {
        Kind::StepProgress(v1::EventStepProgress {
            index: 1,
            done_bytes: done << 20,
            total_bytes: 100 << 20,
            disk: "vda".to_owned(),
        })
    }

    fn a_failing_run() -> Vec<v1::WorkflowEvent> {
        let failure = Some(v1::Failure {
            code: 8,
            reason: "NO_SPACE".to_owned(),
            message: "pool default has 1 MiB free".to_owned(),
            ..Default::default()
        });
        let hold = v1::HoldKind::Frozen.into();
        let undo = |succeeded| {
            Kind::Undo(v1::EventUndo {
                index: 0,
                title: "thaw the file systems".to_owned(),
                succeeded,
                note: String::new(),
            })
        };
        [
            started(0, "freeze the file systems"),
            Kind::HoldTaken(v1::EventHoldTaken { kind: hold }),
            finished(0, 12, ""),
            started(1, "create snapshot before"),
            progress(5),
            progress(31),
            progress(35),
            progress(100),
            Kind::StepFailed(v1::EventStepFailed {
                index: 1,
                took: milliseconds(700),
                failure,
            }),
            undo(None),
            Kind::HoldReleased(v1::EventHoldReleased {
                kind: hold,
                held: milliseconds(85),
            }),
            undo(Some(true)),
            Kind::Heartbeat(v1::EventHeartbeat {}),
            Kind::Outcome(v1::EventOutcome {
                state: v1::WorkflowState::Failed.into(),
                ..Default::default()
            }),
        ]
        .into_iter()
        .zip(1..)
        .map(|(kind, sequence)| event(sequence, kind))
        .collect()
    }

    #[test]
    fn a_run_is_told_step_by_step_with_holds_progress_and_undo() {
        let mut steps = Steps::new(Style::unicode(), Clock::fixed(0));
        let text: String = a_failing_run()
            .iter()
            .map(|event| steps.lines(event, true))
            .collect();
        assert_eq!(
            text,
            "  \
  · freeze the file systems
    the guest is frozen
  ✓ freeze the file systems (12ms)
  · create snapshot before
    create snapshot before [vda]: 31 MiB of 100 MiB (30%)
    create snapshot before [vda]: 100 MiB of 100 MiB (100%)
  ✗ create snapshot before (700ms): NO_SPACE: pool default has 1 MiB free
  ↩ undoing: thaw the file systems
    the guest was frozen for 85ms
  ↩ undone: thaw the file systems
✗ failed
"
        );
    }

    #[test]
    fn a_terminal_is_told_the_end_of_steps_only() {
        let mut steps = Steps::new(Style::ascii(), Clock::fixed(0));
        let text: String = a_failing_run()
            .iter()
            .map(|event| steps.lines(event, false))
            .collect();
        assert_eq!(
            text,
            "    the guest is frozen
  + freeze the file systems (12ms)
  x create snapshot before (700ms): NO_SPACE: pool default has 1 MiB free
    the guest was frozen for 85ms
  < undone: thaw the file systems
x failed
"
        );
    }

    #[test]
    fn a_logged_event_has_its_sequence_and_time_in_front() {
        let mut steps = Steps::new(Style::ascii(), Clock::fixed(0));
        let text: String = a_failing_run()
            .iter()
            .take(3)
            .map(|event| steps.logged(event))
            .collect();
        assert_eq!(
            text,
            "   1  2027-01-15 08:00:01    . freeze the file systems
   2  2027-01-15 08:00:02      the guest is frozen
   3  2027-01-15 08:00:03    + freeze the file systems (12ms)
"
        );
    }
}
