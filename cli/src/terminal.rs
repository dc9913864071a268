//! Where output goes, and what the terminal can show.
//!
//! Invariants: standard output is data, standard error is talk; text from
//! elsewhere (names, descriptions, messages) never reaches a terminal with its
//! control characters; a reader that went away is no error.

use std::{
    borrow::Cow,
    env,
    io::{self, IsTerminal as _, Write as _},
};

use serde_json::Value;

/// What the terminal can show.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    unicode: bool,
    colour: bool,
}

impl Style {
    /// As the environment says; colours only when standard error is a terminal.
    pub fn from_environment() -> Self {
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
            .into_iter()
            .filter_map(|name| env::var(name).ok())
            .find(|value| !value.is_empty())
            .unwrap_or_default()
            .to_ascii_lowercase();
        let dumb = env::var("TERM").is_ok_and(|term| term == "dumb");
        let refused = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Style {
            unicode: locale.contains("utf-8") || locale.contains("utf8"),
            colour: io::stderr().is_terminal() && !dumb && !refused,
        }
    }

    /// Characters of ASCII only, without colours, for tests and old terminals.
    #[cfg(test)]
    pub fn ascii() -> Self {
        Style {
            unicode: false,
            colour: false,
        }
    }

    /// All characters, without colours.
    #[cfg(test)]
    pub fn unicode() -> Self {
        Style {
            unicode: true,
            colour: false,
        }
    }

    /// The better of two texts that the terminal can show.
    pub fn pick(self, unicode: &'static str, ascii: &'static str) -> &'static str {
        if self.unicode { unicode } else { ascii }
    }

    pub fn good(self) -> String {
        self.paint("32", self.pick("✓", "+"))
    }

    pub fn bad(self) -> String {
        self.paint("31", self.pick("✗", "x"))
    }

    pub fn back(self) -> String {
        self.paint("33", self.pick("↩", "<"))
    }

    pub fn alert(self) -> String {
        self.paint("33", "!")
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\u{1b}[{code}m{text}\u{1b}[0m")
        } else {
            text.to_owned()
        }
    }
}

/// Text from elsewhere without what a terminal would act upon.
pub fn clean(text: &str) -> Cow<'_, str> {
    if text.chars().any(char::is_control) {
        Cow::Owned(
            text.chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect(),
        )
    } else {
        Cow::Borrowed(text)
    }
}

/// Writes text to standard output and ends the line.
///
/// # Errors
/// What writing has.
pub fn data(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.trim_end_matches('\n').as_bytes())?;
    out.write_all(b"\n")?;
    out.flush()
}

/// Writes one JSON document on one line to standard output.
///
/// # Errors
/// What writing has.
pub fn json(value: &Value) -> io::Result<()> {
    data(&value.to_string())
}

/// Says something on standard error; that nobody listens is no error.
pub fn talk(text: &str) {
    let mut err = io::stderr().lock();
    let _ = err.write_all(text.trim_end_matches('\n').as_bytes());
    let _ = err.write_all(b"\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_from_elsewhere_do_not_reach_the_terminal() {
        assert_eq!(clean("a\u{1b}[31mb\nc"), "a [31mb c");
        assert!(matches!(clean("übung"), Cow::Borrowed(_)));
    }
}
