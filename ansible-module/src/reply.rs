//! The one answer of a module.
//!
//! Purpose: Ansible reads stdout line by line and takes the one JSON object it
//! finds; over ssh stderr is mixed in. So there is exactly one line, it is the
//! last thing written, and nothing else is.
//!
//! Invariants: a process writes one answer at most, whoever comes first: the
//! work, a signal or a panic. The line is ASCII: Ansible splits with Python's
//! `str.splitlines`, for which a raw U+2028 or U+0085 inside a text ends the
//! line. `changed` and `failed` are always there, as real booleans.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Map, Value};

use crate::failed;

static ANSWERED: AtomicBool = AtomicBool::new(false);

/// Writes the answer, unless one was written already, and returns the exit
/// status that goes with it.
pub fn answer(answer: Map<String, Value>) -> ExitCode {
    let failed = answer.get("failed") == Some(&Value::Bool(true));
    write_once(&whole(answer));
    if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

/// The answer with what Ansible expects in every one.
fn whole(mut answer: Map<String, Value>) -> Value {
    for name in ["changed", "failed"] {
        if !answer.get(name).is_some_and(Value::is_boolean) {
            answer.insert(name.to_owned(), Value::Bool(false));
        }
    }
    Value::Object(answer)
}

/// The line that Ansible reads, with its end.
#[cfg(test)]
pub fn answer_line(answer: Map<String, Value>) -> String {
    line_of(&whole(answer))
}

/// Writes what is asked for by a person or a test rather than by Ansible.
pub fn line(value: &Value) -> ExitCode {
    write_once(value);
    ExitCode::SUCCESS
}

/// Makes a panic an answer too, and an exit status of 1.
pub fn answer_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let payload = panic.payload();
        let text = (payload.downcast_ref::<&str>().copied())
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("no more is known");
        let place = panic
            .location()
            .map(|at| format!(" at {}:{}", at.file(), at.line()));
        let message = format!(
            "the module itself failed{}: {text}",
            place.as_deref().unwrap_or_default()
        );
        let mut values = Map::new();
        failed::add_plain(&mut values, "INTERNAL", &message);
        answer(values);
        // The hook is the end in every profile, whether panics unwind or abort.
        std::process::exit(1);
    }));
}

/// Writes a line of JSON. A reader that has gone away is no error of ours:
/// Ansible closes the pipe of a task that ran out of time.
fn write_once(value: &Value) {
    if ANSWERED.swap(true, Ordering::SeqCst) {
        return;
    }
    let line = line_of(value);
    let mut stdout = std::io::stdout().lock();
    let _ = stdout
        .write_all(line.as_bytes())
        .and_then(|()| stdout.flush());
}

fn line_of(value: &Value) -> String {
    let mut line = ascii(&value.to_string());
    line.push('\n');
    line
}

/// The same JSON without a character outside ASCII. Those stand only inside
/// JSON texts, where an escape means the same.
fn ascii(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len() + 1);
    for character in json.chars() {
        if character.is_ascii() && character != '\u{7f}' {
            escaped.push(character);
        } else {
            for unit in character.encode_utf16(&mut [0; 2]) {
                let _ = write!(escaped, "\\u{unit:04x}");
            }
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn whatever_a_text_holds_the_line_is_ascii_and_means_the_same() {
        let value = json!({"ä\u{2028}": "\u{2029}\u{85}\u{0}\u{1b}\u{7f} schön 😀 \\u0041 \"\n"});
        let line = ascii(&value.to_string());
        assert!(
            line.bytes().all(|byte| (0x20..0x7f).contains(&byte)),
            "{line}"
        );
        assert!(line.contains("\\ud83d\\ude00"), "{line}");
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), value);
    }

    #[test]
    fn a_panic_is_an_answer_and_an_exit_status_of_one_and_silent_otherwise() {
        // The hook ends its process, so this test starts itself as another one.
        const INNER: &str = "VMSNAP_TEST_PANIC";
        if std::env::var_os(INNER).is_some() {
            answer_panics();
            panic!("wörld ended");
        }
        let name =
            "reply::tests::a_panic_is_an_answer_and_an_exit_status_of_one_and_silent_otherwise";
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture", "--test-threads=1"])
            .env(INNER, "1")
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(output.stderr, b"");
        let stdout = String::from_utf8(output.stdout).unwrap();
        // Before it stands what the test harness says.
        let line = stdout.lines().last().unwrap();
        assert!(line.is_ascii(), "{line}");
        let answer: Value = serde_json::from_str(&line[line.find('{').unwrap()..]).unwrap();
        assert_eq!(
            (&answer["failed"], &answer["changed"]),
            (&json!(true), &json!(false))
        );
        assert_eq!(answer["error"]["reason"], "INTERNAL");
        assert!(answer["msg"].as_str().unwrap().contains("wörld ended"));
    }
}
