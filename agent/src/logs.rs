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

    #[test]
    fn a_level_is_what_the_journal_calls_it() {
        assert_eq!(priority(Level::ERROR), "<3>");
        assert_eq!(priority(Level::WARN), "<4>");
        assert_eq!(priority(Level::INFO), "<6>");
        assert_eq!(priority(Level::DEBUG), "<7>");
    }
}
