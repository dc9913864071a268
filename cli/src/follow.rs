//! Following a run on a terminal, in a log or as JSON lines.
//!
//! Invariants: the run belongs to the agent, so Ctrl-C leaves it alone and says
//! how to come back to it; a bar is shown on a terminal only, and everything
//! that a bar tells is told in lines elsewhere.

use std::{
    io::{self, IsTerminal as _},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use vmsnap_client::{Connection, Finished, RunStream, json::ToJson as _};
use vmsnap_proto::v1::{self, workflow_event::Kind};

use crate::{
    commands::Trouble,
    render::{Clock, steps::Steps},
    terminal::{Style, clean, data, json, talk},
};

/// How a run is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Show {
    /// One JSON document an event, to standard output.
    Json,
    /// Steps as they end, to standard error, with a bar on a terminal.
    Steps,
    /// Events with sequence and time, to standard output.
    Log,
}

/// Why following ended.
#[derive(Debug)]
pub enum Ended {
    /// The run is over.
    Finished(Box<Finished>),
    /// Ctrl-C, or the last event that was wanted; the run may go on.
    Left,
}

/// Follows a run to its outcome, or to the event `until`.
///
/// # Errors
/// Those of the stream, and those of writing.
pub async fn follow(
    stream: RunStream,
    show: Show,
    style: Style,
    until: Option<u64>,
    leave: impl Fn(Option<&str>, Option<&str>) -> String,
) -> Result<Ended, Trouble> {
    let mut stream = stream.on_connection(|connection| match connection {
        Connection::Lost { because } => talk(&format!(
            "connection lost, trying again: {}",
            clean(because)
        )),
        Connection::Restored => talk("connected again; no event was lost"),
    });
    let mut view = View::new(show, style);
    loop {
        let next = tokio::select! {
            next = stream.next() => next,
            pressed = tokio::signal::ctrl_c() => {
                // Without a handler the key still ends the program, in its own way.
                if pressed.is_err() {
                    continue;
                }
                view.clear();
                talk(&leave(stream.workflow_id(), stream.request_id()));
                return Ok(Ended::Left);
            }
        };
        let event = match next {
            Ok(event) => event,
            Err(error) => {
                view.clear();
                return Err(error.into());
            }
        };
        let Some(event) = event else { break };
        view.show(&event)?;
        if until.is_some_and(|last| event.sequence >= last) && stream.finished().is_none() {
            return Ok(Ended::Left);
        }
    }
    view.clear();
    stream
        .finished()
        .map(|finished| Ended::Finished(Box::new(finished)))
        .ok_or_else(|| {
            // A stream ends after its outcome or with an error; this is neither.
            Trouble::Output(io::Error::other(
                "the run's stream ended without an outcome",
            ))
        })
}

struct View {
    show: Show,
    style: Style,
    steps: Steps,
    terminal: bool,
    bar: Option<ProgressBar>,
}

impl View {
    fn new(show: Show, style: Style) -> Self {
        let dumb = std::env::var("TERM").is_ok_and(|term| term == "dumb");
        View {
            show,
            style,
            steps: Steps::new(style, Clock::system()),
            terminal: show == Show::Steps && io::stderr().is_terminal() && !dumb,
            bar: None,
        }
    }

    fn show(&mut self, event: &v1::WorkflowEvent) -> io::Result<()> {
        match self.show {
            Show::Json => return json(&event.to_json()),
            Show::Log => {
                let text = self.steps.logged(event);
                return if text.is_empty() { Ok(()) } else { data(&text) };
            }
            Show::Steps => {}
        }
        let text = self.steps.lines(event, !self.terminal);
        if !text.is_empty() {
            match &self.bar {
                Some(bar) => bar.suspend(|| talk(&text)),
                None => talk(&text),
            }
        }
        if self.terminal {
            self.move_bar(event);
        }
        Ok(())
    }

    fn move_bar(&mut self, event: &v1::WorkflowEvent) {
        match event.kind.as_ref() {
            Some(Kind::StepStarted(started)) => {
                self.clear();
                self.bar = Some(self.spinner(&self.steps.title(started.index)));
            }
            Some(Kind::Undo(undo)) if undo.succeeded.is_none() => {
                self.clear();
                self.bar = Some(self.spinner(&format!("undoing: {}", clean(&undo.title))));
            }
            Some(Kind::StepProgress(progress)) => {
                let progress = self.steps.progress(progress);
                let bar = match self.bar.take() {
                    Some(bar) if bar.length().is_some() => bar,
                    other => {
                        if let Some(spinner) = other {
                            spinner.finish_and_clear();
                        }
                        self.bytes()
                    }
                };
                bar.set_message(progress.title);
                bar.set_length(progress.total);
                bar.set_position(progress.done);
                self.bar = Some(bar);
            }
            Some(
                Kind::StepFinished(_) | Kind::StepFailed(_) | Kind::Undo(_) | Kind::Outcome(_),
            ) => self.clear(),
            _ => {}
        }
    }

    fn spinner(&self, title: &str) -> ProgressBar {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("  {spinner} {msg} {elapsed}") {
            bar.set_style(style.tick_chars(self.style.pick("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏ ", "|/-\\ ")));
        }
        bar.set_message(title.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    }

    fn bytes(&self) -> ProgressBar {
        let bar = ProgressBar::new(0);
        let template = "  {msg} [{bar:30}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars(self.style.pick("█▉▊▋▌▍▎▏ ", "#>-")));
        }
        bar
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
