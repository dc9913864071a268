//! From what Ansible hands over to a value of an option's kind.
//!
//! Purpose: a YAML task hands over native values, a `key=value` task and an
//! ad-hoc call hand over text; both mean the same. What could mean two things
//! is refused rather than guessed.
//!
//! Invariants: the same meaning gives the same [`Setting`], however written;
//! nothing here reads the environment.

use std::time::Duration;

use serde_json::Value;
use vmsnap_client::quantity;

use crate::argument::{Argument, Kind};

/// Ansible's own words for yes and no.
const YES: &[&str] = &["yes", "y", "on", "true", "t", "1"];
const NO: &[&str] = &["no", "n", "off", "false", "f", "0"];

/// Longest text that may be a slip for a word of ours, in bytes.
const LONGEST_SLIP: usize = 255;

/// A value of an option, of the option's kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Setting {
    /// Of [`Kind::Text`].
    Text(String),
    /// Of [`Kind::Flag`].
    Flag(bool),
    /// Of [`Kind::Number`].
    Number(u64),
    /// Of [`Kind::Duration`].
    Duration(Duration),
    /// Of [`Kind::Size`] and [`Kind::Rate`], in bytes and bytes a second.
    Bytes(u64),
    /// Of [`Kind::List`].
    List(Vec<String>),
}

/// Reads a value for an option; the error says what is wrong with it, without
/// naming the option.
pub fn coerce(argument: &Argument, value: &Value) -> Result<Setting, String> {
    let setting = match argument.kind {
        Kind::Text => Setting::Text(text(value)?),
        Kind::Flag => Setting::Flag(flag(value)?),
        Kind::Number => Setting::Number(number(value)?),
        Kind::Duration => {
            let written = quantity_text(value, "a duration such as 90s, 30m or 2h")?;
            Setting::Duration(quantity::parse_duration(&written).map_err(|e| e.to_string())?)
        }
        Kind::Size => {
            let written = quantity_text(value, "a size such as 20G or 512MiB")?;
            Setting::Bytes(quantity::parse_size(&written).map_err(|e| e.to_string())?)
        }
        Kind::Rate => {
            let written = quantity_text(value, "a size a second such as 100M")?;
            Setting::Bytes(quantity::parse_rate(&written).map_err(|e| e.to_string())?)
        }
        Kind::List => Setting::List(list(value)?),
    };
    if let Setting::Text(chosen) = &setting
        && !argument.choices.is_empty()
        && !argument.choices.contains(&chosen.as_str())
    {
        return Err(not_a_choice(chosen, argument.choices));
    }
    Ok(setting)
}

fn not_a_choice(chosen: &str, choices: &[&str]) -> String {
    let known = choices.join(", ");
    match nearest(chosen, choices.iter().copied()) {
        Some(near) => format!("\"{chosen}\" is none of {known}; did you mean \"{near}\"?"),
        None => format!("\"{chosen}\" is none of {known}"),
    }
}

/// The candidate most like `word`, if one is close enough to be a slip.
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // Comparing takes time by the length of the word, and a long one is no slip.
    if word.len() > LONGEST_SLIP {
        return None;
    }
    let word = word.to_lowercase();
    candidates
        .map(|candidate| (strsim::jaro_winkler(&word, candidate), candidate))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// What a value is, for a person.
fn what(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(flag) => format!("the boolean {flag}"),
        Value::Number(number) => format!("the number {number}"),
        Value::String(text) => format!("\"{text}\""),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a dictionary".to_owned(),
    }
}

/// A name written without quotes may have become a number or a boolean in
/// YAML on its way here; 1.10 is then already lost, so it is refused.
fn text(value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) if number.is_u64() || number.is_i64() => Ok(number.to_string()),
        Value::Bool(_) | Value::Number(_) => Err(format!("{} is not text; quote it", what(value))),
        _ => Err(format!("{} is not text", what(value))),
    }
}

fn flag(value: &Value) -> Result<bool, String> {
    let word = match value {
        Value::Bool(flag) => return Ok(*flag),
        Value::Number(number) if number.as_f64() == Some(1.0) => return Ok(true),
        Value::Number(number) if number.as_f64() == Some(0.0) => return Ok(false),
        Value::String(word) => word.trim().to_lowercase(),
        _ => return Err(format!("{} is neither true nor false", what(value))),
    };
    if YES.contains(&word.as_str()) {
        Ok(true)
    } else if NO.contains(&word.as_str()) {
        Ok(false)
    } else {
        Err(format!("{} is neither true nor false", what(value)))
    }
}

fn number(value: &Value) -> Result<u64, String> {
    let read = match value {
        Value::Number(number) => number.as_u64().or_else(|| {
            // Jinja arithmetic gives 3.0 where 3 is meant.
            number
                .as_f64()
                .filter(|f| f.fract() == 0.0 && (0.0..=9e15).contains(f))
                .map(|f| f as u64)
        }),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    read.ok_or_else(|| format!("{} is not a whole number from 0 on", what(value)))
}

fn quantity_text(value: &Value, wanted: &str) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        _ => Err(format!("{} is not {wanted}", what(value))),
    }
}

fn list(value: &Value) -> Result<Vec<String>, String> {
    match value {
        Value::Array(items) => items
            .iter()
            .map(|item| text(item).map(|text| text.trim().to_owned()))
            .map(|item| match item {
                Ok(text) if text.is_empty() => Err("an entry of the list is empty".to_owned()),
                other => other,
            })
            .collect(),
        // A template that was not a whole expression arrives as a list written out.
        Value::String(text) if text.trim_start().starts_with('[') => {
            match serde_json::from_str::<Value>(text) {
                Ok(inner @ Value::Array(_)) => list(&inner),
                _ => Err(format!("{} is a list written as text", what(value))),
            }
        }
        Value::String(text) => Ok(text
            .split(',')
            .map(str::trim)
            .filter(|part| !part.is_empty())
            .map(str::to_owned)
            .collect()),
        _ => Ok(vec![text(value)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(kind: Kind, value: Value) -> Result<Setting, String> {
        coerce(&Argument::new("option", kind, ""), &value)
    }

    #[test]
    fn ansibles_words_for_yes_and_no_are_understood() {
        for yes in [
            json!(true),
            json!("yes"),
            json!("On"),
            json!("TRUE"),
            json!("1"),
            json!(1),
        ] {
            assert_eq!(read(Kind::Flag, yes), Ok(Setting::Flag(true)));
        }
        for no in [
            json!(false),
            json!("no"),
            json!("off"),
            json!("f"),
            json!(0),
            json!(0.0),
        ] {
            assert_eq!(read(Kind::Flag, no), Ok(Setting::Flag(false)));
        }
        for neither in [json!("maybe"), json!(2), json!([]), json!("")] {
            assert!(
                read(Kind::Flag, neither)
                    .unwrap_err()
                    .ends_with("is neither true nor false")
            );
        }
    }

    #[test]
    fn sizes_come_as_numbers_or_with_a_unit() {
        let twenty = Setting::Bytes(20 << 30);
        assert_eq!(read(Kind::Size, json!("20G")), Ok(twenty.clone()));
        assert_eq!(read(Kind::Size, json!(20_u64 << 30)), Ok(twenty.clone()));
        assert_eq!(read(Kind::Size, json!("21474836480")), Ok(twenty));
        assert!(read(Kind::Size, json!("20 apples")).is_err());
        assert!(
            read(Kind::Size, json!(true))
                .unwrap_err()
                .contains("the boolean true")
        );
    }

    #[test]
    fn a_rate_is_a_size_with_or_without_its_second() {
        assert_eq!(
            read(Kind::Rate, json!("100M")),
            Ok(Setting::Bytes(100 << 20))
        );
        assert_eq!(
            read(Kind::Rate, json!("100M/s")),
            Ok(Setting::Bytes(100 << 20))
        );
    }

    #[test]
    fn durations_come_as_seconds_or_with_a_unit() {
        assert_eq!(
            read(Kind::Duration, json!(90)),
            Ok(Setting::Duration(Duration::from_secs(90)))
        );
        assert_eq!(
            read(Kind::Duration, json!("30m")),
            Ok(Setting::Duration(Duration::from_secs(1800)))
        );
        assert!(read(Kind::Duration, json!("")).is_err());
    }

    #[test]
    fn lists_come_as_lists_or_as_text_with_commas() {
        let both = Ok(Setting::List(vec!["vda".into(), "vdb".into()]));
        assert_eq!(read(Kind::List, json!(["vda", "vdb"])), both);
        assert_eq!(read(Kind::List, json!("vda, vdb")), both);
        assert_eq!(read(Kind::List, json!("[\"vda\", \"vdb\"]")), both);
        assert_eq!(read(Kind::List, json!("")), Ok(Setting::List(vec![])));
        assert!(read(Kind::List, json!("['vda']")).is_err());
        assert!(read(Kind::List, json!(["vda", {}])).is_err());
    }

    #[test]
    fn a_name_that_yaml_made_a_fraction_or_a_boolean_is_refused_rather_than_guessed() {
        assert_eq!(
            read(Kind::Text, json!(2024)),
            Ok(Setting::Text("2024".into()))
        );
        for lost in [json!(1.1), json!(true)] {
            assert!(
                read(Kind::Text, lost)
                    .unwrap_err()
                    .ends_with("is not text; quote it")
            );
        }
    }

    #[test]
    fn a_very_long_word_is_no_slip_and_takes_no_time() {
        let since = std::time::Instant::now();
        let long = "snapshot_name".repeat(1_000_000);
        assert_eq!(nearest(&long, ["snapshot_name"; 50].into_iter()), None);
        assert!(since.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn a_value_that_is_no_choice_names_the_choices_and_the_nearest() {
        let kind = Argument::new("kind", Kind::Text, "").one_of(&["auto", "internal", "external"]);
        assert_eq!(
            coerce(&kind, &json!("externl")).unwrap_err(),
            "\"externl\" is none of auto, internal, external; did you mean \"external\"?"
        );
        assert!(
            coerce(&kind, &json!("zzz"))
                .unwrap_err()
                .ends_with("external")
        );
    }
}
