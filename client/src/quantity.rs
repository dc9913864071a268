//! Sizes, rates and durations as people write them: `20G`, `100M/s`, `1h30m`.
//!
//! Purpose: one reading of quantities for every face of the product, so that
//! a playbook and a command line mean the same by the same text.
//!
//! Invariants: units of size are binary, as in libvirt's tools for `K` to `E`.
//! `KB`, which is 1000 to some tools and 1024 to others, is refused rather than
//! guessed. No reading loses precision silently: what is no whole number of
//! bytes (or of nanoseconds) is refused. What a format function wrote, the
//! parser reads.

use std::{fmt, time::Duration};

/// A quantity that could not be read. The message names the value and what
/// would be right; naming the field is the caller's part.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// The text was empty.
    #[error("empty {what}: expected {what} such as {example}", example = .what.example())]
    Empty {
        /// What was to be read.
        what: Quantity,
    },
    /// There was no number where one belongs.
    #[error("{what} {value:?} has no number where one belongs: expected {what} such as {example}", example = .what.example())]
    NoNumber {
        /// What was to be read.
        what: Quantity,
        /// The whole text.
        value: String,
    },
    /// The unit is none of the known ones.
    #[error("{what} {value:?} has the unknown unit {unit:?}: {units}", units = .what.units())]
    UnknownUnit {
        /// What was to be read.
        what: Quantity,
        /// The whole text.
        value: String,
        /// The unit as written.
        unit: String,
    },
    /// A unit that is decimal to some and binary to others.
    #[error(
        "size {value:?} is ambiguous: {unit} is 1000-based to some tools and 1024-based to others; write {instead} for the binary unit"
    )]
    Ambiguous {
        /// The whole text.
        value: String,
        /// The unit as written.
        unit: String,
        /// The unit that is not ambiguous.
        instead: String,
    },
    /// The number has a fraction below the smallest unit.
    #[error("{what} {value:?} is not a whole number of {smallest}", smallest = .what.smallest())]
    NotWhole {
        /// What was to be read.
        what: Quantity,
        /// The whole text.
        value: String,
    },
    /// The number does not fit.
    #[error("{what} {value:?} is too large")]
    TooLarge {
        /// What was to be read.
        what: Quantity,
        /// The whole text.
        value: String,
    },
}

/// What a text was to be read as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantity {
    /// Bytes.
    Size,
    /// Time.
    Duration,
}

impl Quantity {
    fn example(self) -> &'static str {
        match self {
            Quantity::Size => "20G, 512MiB or a number of bytes",
            Quantity::Duration => "30m, 1h30m or a number of seconds",
        }
    }

    fn units(self) -> &'static str {
        match self {
            Quantity::Size => {
                "use K, M, G, T, P or E (binary, also written KiB, MiB, ...), or plain bytes"
            }
            Quantity::Duration => "use ms, s, m, h, d or w, or plain seconds",
        }
    }

    fn smallest(self) -> &'static str {
        match self {
            Quantity::Size => "bytes",
            Quantity::Duration => "nanoseconds",
        }
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Quantity::Size => "size",
            Quantity::Duration => "duration",
        })
    }
}

const SIZE_LETTERS: [char; 6] = ['K', 'M', 'G', 'T', 'P', 'E'];

/// Reads a size into bytes: `20G`, `512MiB`, `1.5T`, `4096`, `4096B`. Units are
/// binary and case does not matter.
///
/// # Errors
/// See [`QuantityError`].
pub fn parse_size(text: &str) -> Result<u64, QuantityError> {
    let what = Quantity::Size;
    let value = text.trim();
    if value.is_empty() {
        return Err(QuantityError::Empty { what });
    }
    let (number, unit) = take_number(value).ok_or_else(|| no_number(what, value))?;
    let unit = unit.trim();
    let factor = size_factor(value, unit)?;
    let bytes = number
        .scaled(factor)
        .map_err(|fault| fault.of(what, value))?;
    u64::try_from(bytes).map_err(|_| too_large(what, value))
}

/// Reads a rate into bytes per second: as [`parse_size`], with an optional `/s`
/// at the end.
///
/// # Errors
/// See [`QuantityError`].
pub fn parse_rate(text: &str) -> Result<u64, QuantityError> {
    let value = text.trim();
    parse_size(value.strip_suffix("/s").unwrap_or(value))
}

/// Reads a duration: `30m`, `1h30m`, `1.5s`, `250ms`, `2w`, or bare seconds
/// (`300`). Days have 24 hours.
///
/// # Errors
/// See [`QuantityError`].
pub fn parse_duration(text: &str) -> Result<Duration, QuantityError> {
    let what = Quantity::Duration;
    let value = text.trim();
    if value.is_empty() {
        return Err(QuantityError::Empty { what });
    }
    let mut rest = value;
    let mut total: u128 = 0;
    let mut first = true;
    while !rest.is_empty() {
        let (number, after) = take_number(rest).ok_or_else(|| no_number(what, value))?;
        let after = after.trim_start();
        let end = after
            .find(|c: char| !c.is_alphabetic())
            .unwrap_or(after.len());
        let (unit, tail) = after.split_at(end);
        let nanoseconds = match unit.to_ascii_lowercase().as_str() {
            "ms" => 1_000_000,
            // Only a number that stands alone may go without its unit: `1h30` is no text to guess at.
            "" if first && tail.is_empty() => 1_000_000_000,
            "s" => 1_000_000_000,
            "m" => 60 * 1_000_000_000,
            "h" => 3_600 * 1_000_000_000,
            "d" => 86_400 * 1_000_000_000,
            "w" => 604_800 * 1_000_000_000,
            _ => {
                return Err(QuantityError::UnknownUnit {
                    what,
                    value: value.to_owned(),
                    unit: unit.to_owned(),
                });
            }
        };
        let part = number
            .scaled(nanoseconds)
            .map_err(|fault| fault.of(what, value))?;
        total = total
            .checked_add(part)
            .ok_or_else(|| too_large(what, value))?;
        rest = tail.trim_start();
        first = false;
    }
    let seconds = u64::try_from(total / 1_000_000_000).map_err(|_| too_large(what, value))?;
    // The wire's duration counts seconds in an i64, at most 10,000 years.
    if seconds > 315_576_000_000 {
        return Err(too_large(what, value));
    }
    let nanoseconds = u32::try_from(total % 1_000_000_000).unwrap_or_default();
    Ok(Duration::new(seconds, nanoseconds))
}

/// Writes bytes for a person: `0 B`, `1.5 GiB`, with at most one decimal.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    let mut unit = 0;
    let mut divisor: u64 = 1;
    while unit < SIZE_LETTERS.len() && bytes / divisor >= 1024 {
        divisor = divisor.saturating_mul(1024);
        unit += 1;
    }
    if unit == 0 {
        return format!("{bytes} B");
    }
    // Tenths, rounded half up, in integers: floats would show 1024.0 KiB for a byte below a MiB.
    let mut tenths = (u128::from(bytes) * 20 / u128::from(divisor)).div_ceil(2);
    if tenths >= 10_240 && unit < SIZE_LETTERS.len() {
        tenths = 10;
        unit += 1;
    }
    let letter = SIZE_LETTERS[unit - 1];
    match tenths % 10 {
        0 => format!("{} {letter}iB", tenths / 10),
        rest => format!("{}.{rest} {letter}iB", tenths / 10),
    }
}

/// Writes a duration for a person: `85ms`, `1.4s`, `2m30s`, `3d4h`; two units at most.
#[must_use]
pub fn format_duration(duration: Duration) -> String {
    let milliseconds = duration.as_millis();
    if milliseconds < 1_000 {
        return format!("{milliseconds}ms");
    }
    let seconds = duration.as_secs();
    if seconds < 60 {
        return match (milliseconds % 1_000) / 100 {
            0 => format!("{seconds}s"),
            tenths => format!("{seconds}.{tenths}s"),
        };
    }
    let units: [(u64, &str); 5] = [
        (604_800, "w"),
        (86_400, "d"),
        (3_600, "h"),
        (60, "m"),
        (1, "s"),
    ];
    let largest = units
        .iter()
        .position(|(size, _)| seconds >= *size)
        .unwrap_or(units.len() - 1);
    let (size, name) = units[largest];
    let mut text = format!("{}{name}", seconds / size);
    if let Some((next, next_name)) = units.get(largest + 1) {
        let rest = (seconds % size) / next;
        if rest > 0 {
            text.push_str(&format!("{rest}{next_name}"));
        }
    }
    text
}

/// A decimal number as written: `digits` divided by ten to the power of `scale`.
struct Number {
    digits: u128,
    scale: u32,
}

enum Fault {
    NotWhole,
    TooLarge,
}

impl Fault {
    fn of(self, what: Quantity, value: &str) -> QuantityError {
        match self {
            Fault::NotWhole => QuantityError::NotWhole {
                what,
                value: value.to_owned(),
            },
            Fault::TooLarge => too_large(what, value),
        }
    }
}

impl Number {
    fn scaled(&self, factor: u128) -> Result<u128, Fault> {
        let product = self.digits.checked_mul(factor).ok_or(Fault::TooLarge)?;
        let divisor = 10_u128.checked_pow(self.scale).ok_or(Fault::TooLarge)?;
        if product % divisor == 0 {
            Ok(product / divisor)
        } else {
            Err(Fault::NotWhole)
        }
    }
}

/// Splits a decimal number off the front; `None` when the text does not begin with one.
fn take_number(text: &str) -> Option<(Number, &str)> {
    let mut digits: u128 = 0;
    let mut scale = 0;
    let mut seen_digit = false;
    let mut seen_point = false;
    let mut end = 0;
    for (at, character) in text.char_indices() {
        match character {
            '0'..='9' => {
                // More digits than fit are kept at the ceiling, so that the caller says "too large".
                let digit = u128::from(character as u32 - '0' as u32);
                digits = digits.saturating_mul(10).saturating_add(digit);
                scale += u32::from(seen_point);
                seen_digit = true;
            }
            '.' if !seen_point && seen_digit => seen_point = true,
            _ => break,
        }
        end = at + character.len_utf8();
    }
    (seen_digit && !text[..end].ends_with('.')).then(|| (Number { digits, scale }, &text[end..]))
}

fn size_factor(value: &str, unit: &str) -> Result<u128, QuantityError> {
    let unknown = || QuantityError::UnknownUnit {
        what: Quantity::Size,
        value: value.to_owned(),
        unit: unit.to_owned(),
    };
    let upper = unit.to_ascii_uppercase();
    if matches!(upper.as_str(), "" | "B") {
        return Ok(1);
    }
    let mut characters = upper.chars();
    let letter = characters.next().ok_or_else(unknown)?;
    let power = SIZE_LETTERS
        .iter()
        .position(|known| *known == letter)
        .ok_or_else(unknown)?;
    match characters.as_str() {
        "" | "IB" => Ok(1_u128 << (10 * (power + 1))),
        "B" => Err(QuantityError::Ambiguous {
            value: value.to_owned(),
            unit: unit.to_owned(),
            instead: format!("{letter}iB"),
        }),
        _ => Err(unknown()),
    }
}

fn no_number(what: Quantity, value: &str) -> QuantityError {
    QuantityError::NoNumber {
        what,
        value: value.to_owned(),
    }
}

fn too_large(what: Quantity, value: &str) -> QuantityError {
    QuantityError::TooLarge {
        what,
        value: value.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_binary_units_and_plain_bytes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("1K", 1024),
            ("1k", 1024),
            ("20G", 20 << 30),
            (" 20 GiB ", 20 << 30),
            ("512MiB", 512 << 20),
            ("512mib", 512 << 20),
            ("1.5G", 3 << 29),
            ("2T", 2 << 40),
            ("15E", 15 << 60),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn sizes_that_could_mean_two_things_or_nothing_are_refused_with_what_would_be_right() {
        for (text, message) in [
            (
                "",
                "empty size: expected size such as 20G, 512MiB or a number of bytes",
            ),
            (
                "G",
                "size \"G\" has no number where one belongs: expected size such as 20G, 512MiB or a number of bytes",
            ),
            (
                "-1G",
                "size \"-1G\" has no number where one belongs: expected size such as 20G, 512MiB or a number of bytes",
            ),
            (
                "20GB",
                "size \"20GB\" is ambiguous: GB is 1000-based to some tools and 1024-based to others; write GiB for the binary unit",
            ),
            (
                "20X",
                "size \"20X\" has the unknown unit \"X\": use K, M, G, T, P or E (binary, also written KiB, MiB, ...), or plain bytes",
            ),
            ("1.5", "size \"1.5\" is not a whole number of bytes"),
            ("16E", "size \"16E\" is too large"),
            (
                "99999999999999999999999999999999999999999999999",
                "size \"99999999999999999999999999999999999999999999999\" is too large",
            ),
        ] {
            assert_eq!(parse_size(text).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn rates_take_an_optional_per_second() {
        assert_eq!(parse_rate("100M/s"), Ok(100 << 20));
        assert_eq!(parse_rate("100MiB"), Ok(100 << 20));
        assert!(parse_rate("100M/h").is_err());
    }

    #[test]
    fn durations_are_read_in_units_in_compounds_and_in_bare_seconds() {
        for (text, milliseconds) in [
            ("0", 0),
            ("300", 300_000),
            ("300s", 300_000),
            ("1.5", 1_500),
            ("250ms", 250),
            ("30m", 1_800_000),
            ("1h30m", 5_400_000),
            ("1h 30m", 5_400_000),
            ("2d", 172_800_000),
            ("1w", 604_800_000),
            ("1.5H", 5_400_000),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(milliseconds)),
                "{text}"
            );
        }
    }

    #[test]
    fn durations_without_a_meaning_are_refused() {
        for (text, part) in [
            ("", "empty duration"),
            ("m", "no number"),
            ("1h30", "unknown unit \"\""),
            ("3y", "unknown unit \"y\""),
            ("1.0000000001s", "not a whole number of nanoseconds"),
            ("999999999999w", "too large"),
            ("-5s", "no number"),
        ] {
            let message = parse_duration(text).unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn sizes_are_written_with_one_decimal_at_most_and_never_as_1024_of_a_unit() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1 MiB"),
            (20 << 30, "20 GiB"),
            (197_120, "192.5 KiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(format_size(bytes), text);
        }
        assert_eq!(parse_size(&format_size(20 << 30)), Ok(20 << 30));
    }

    #[test]
    fn durations_are_written_in_two_units_at_most() {
        for (milliseconds, text) in [
            (0, "0ms"),
            (85, "85ms"),
            (1_000, "1s"),
            (1_449, "1.4s"),
            (59_999, "59.9s"),
            (150_000, "2m30s"),
            (3_600_000, "1h"),
            (273_600_000, "3d4h"),
            (700_000_000, "1w1d"),
        ] {
            assert_eq!(format_duration(Duration::from_millis(milliseconds)), text);
        }
        assert_eq!(parse_duration("2m30s"), Ok(Duration::from_secs(150)));
    }
}
