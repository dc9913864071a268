//! How the agent's lines look, and where they go.
//!
//! Invariants: errors are for whoever has to act now, warnings for whoever looks
//! later, the rest is the normal course; under systemd a line carries its level as
//! the journal reads it and no time of its own, because the journal has one.

use std::{
    fmt,
    os::{fd::AsFd, unix::fs::MetadataExt as _},
};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{Format, Full, Json, JsonFields, Writer},
    },
    registry::LookupSpan,
};

use crate::config::{Config, LogFormat};

/// Sends lines to standard error, as configured.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn to_stderr(config: &Config) -> Result<(), String> {
    let filter = config
        .log_filter()
        .map_err(|problem| format!("log.level: {problem}"))?;
    let journal = is_the_journal(std::env::var("JOURNAL_STREAM").ok().as_deref());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false);
    let set = match (config.log.format, journal) {
        (LogFormat::Text, false) => builder.try_init(),
        (LogFormat::Json, false) => builder.json().flatten_event(true).try_init(),
        (LogFormat::Text, true) => builder.event_format(ForJournal::text()).try_init(),
        (LogFormat::Json, true) => builder
            .fmt_fields(JsonFields::new())
            .event_format(ForJournal::json())
            .try_init(),
    };
    set.map_err(|error| format!("log: {error}"))
}

/// Whether standard error is the stream that systemd says leads to its journal:
/// the variable is inherited by those whose output was sent elsewhere.
fn is_the_journal(stream: Option<&str>) -> bool {
    let Some((device, inode)) = stream.and_then(|stream| stream.split_once(':')) else {
        return false;
    };
    let stderr = std::io::stderr();
    let Ok(own) = stderr
        .as_fd()
        .try_clone_to_owned()
        .and_then(|fd| std::fs::File::from(fd).metadata())
    else {
        return false;
    };
    device.parse() == Ok(own.dev()) && inode.parse() == Ok(own.ino())
}

/// The level as the journal reads it at a line's beginning.
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        _ => "<7>",
    }
}

/// Lines for the journal: its own level, and no time.
#[derive(Debug)]
struct ForJournal<F>(F);

impl ForJournal<Format<Full, ()>> {
    fn text() -> Self {
        Self(Format::default().without_time().with_level(false))
    }
}

impl ForJournal<Format<Json, ()>> {
    fn json() -> Self {
        Self(Format::default().json().flatten_event(true).without_time())
    }
}

impl<S, N, F> FormatEvent<S, N> for ForJournal<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        writer.write_str(priority(*event.metadata().level()))?;
        self.0.format_event(context, writer, event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_very_stream_that_systemd_names_is_the_journal() {
        assert!(!is_the_journal(None));
        assert!(!is_the_journal(Some("")));
        assert!(!is_the_journal(Some("1:x")));
        let file = std::fs::File::from(std::io::stderr().as_fd().try_clone_to_owned().unwrap());
        let own = file.metadata().unwrap();
        assert!(is_the_journal(Some(&format!(
            "{}:{}",
            own.dev(),
            own.ino()
        ))));
        assert!(!is_the_journal(Some(&format!(
            "{}:{}",
            own.dev(),
            own.ino() + 1
        ))));
    }

    /// What a subscriber writes of one line within a run and a step.
    fn written<S: Subscriber + Send + Sync>(make: impl FnOnce(Buffer) -> S) -> String {
        let buffer = Buffer::default();
        tracing::subscriber::with_default(make(buffer.clone()), || {
            let run = tracing::error_span!("run", run = "r1", vm = "web1");
            let _run = run.enter();
            let step = tracing::error_span!("step", step = "suspend the VM");
            let _step = step.enter();
            tracing::warn!(seconds = 3, "it takes long");
        });
        let bytes = buffer.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[derive(Debug, Clone, Default)]
    struct Buffer(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

    impl std::io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_for_the_journal_has_its_level_in_front_its_run_and_step_and_no_time() {
        let text = written(|buffer| {
            tracing_subscriber::fmt()
                .with_ansi(false)
                .with_writer(move || buffer.clone())
                .event_format(ForJournal::text())
                .finish()
        });
        assert_eq!(
            text,
            "<4>run{run=\"r1\" vm=\"web1\"}:step{step=\"suspend the VM\"}: \
             vmsnap_agent::logs::tests: it takes long seconds=3\n"
        );
        let text = written(|buffer| {
            tracing_subscriber::fmt()
                .with_writer(move || buffer.clone())
                .fmt_fields(JsonFields::new())
                .event_format(ForJournal::json())
                .finish()
        });
        let line: serde_json::Value =
            serde_json::from_str(text.strip_prefix("<4>").unwrap()).unwrap();
        assert_eq!(line["message"], "it takes long");
        assert_eq!(line["level"], "WARN");
        assert_eq!(line["spans"][0]["run"], "r1");
        assert_eq!(line["spans"][0]["vm"], "web1");
        assert_eq!(line["spans"][1]["step"], "suspend the VM");
        assert!(line.get("timestamp").is_none(), "{text}");
    }

    #[test]
    fn a_level_is_what_the_journal_calls_it() {
        assert_eq!(priority(Level::ERROR), "<3>");
        assert_eq!(priority(Level::WARN), "<4>");
        assert_eq!(priority(Level::INFO), "<6>");
        assert_eq!(priority(Level::DEBUG), "<7>");
    }
}
