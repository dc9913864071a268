//! The contract's messages as text for a person.
//!
//! Invariant: everything here is a pure function of its arguments; the time and
//! the terminal's abilities are arguments too, so that golden texts can hold it.

pub mod audit;
pub mod failure;
pub mod health;
pub mod issues;
pub mod plan;
pub mod result;
pub mod runs;
pub mod steps;
pub mod storage;
pub mod tree;
pub mod vm;

use std::time::Duration;

use comfy_table::{Cell, CellAlignment, Table, presets::NOTHING};
use jiff::{Timestamp, tz::TimeZone};
use prost_types::{Duration as WireDuration, Timestamp as WireTimestamp};
use vmsnap_client::{
    json::{Word, word},
    quantity::format_duration,
};

/// The moment and the zone in which times are shown.
#[derive(Debug, Clone)]
pub struct Clock {
    now: Timestamp,
    zone: TimeZone,
}

impl Clock {
    /// This moment, in the zone of this machine.
    pub fn system() -> Self {
        Clock {
            now: Timestamp::now(),
            zone: TimeZone::system(),
        }
    }

    /// A moment of a test, in UTC.
    #[cfg(test)]
    pub fn fixed(seconds: i64) -> Self {
        Clock {
            now: Timestamp::from_second(seconds).unwrap_or_default(),
            zone: TimeZone::UTC,
        }
    }

    /// How long ago something was, such as `2d4h`; empty when unknown.
    pub fn age(&self, time: Option<&WireTimestamp>) -> String {
        let Some(time) = time.and_then(moment) else {
            return String::new();
        };
        let seconds = self.now.as_second().saturating_sub(time.as_second());
        format_duration(Duration::from_secs(
            u64::try_from(seconds).unwrap_or_default(),
        ))
    }

    /// The time of day with the date; empty when unknown.
    pub fn time(&self, time: Option<&WireTimestamp>) -> String {
        let Some(time) = time.and_then(moment) else {
            return String::new();
        };
        time.to_zoned_datetime(self.zone.clone())
            .strftime("%Y-%m-%d %H:%M:%S")
            .to_string()
    }

    /// How long it took; up to now when it has not ended.
    pub fn span(&self, from: Option<&WireTimestamp>, to: Option<&WireTimestamp>) -> String {
        let Some(from) = from.and_then(moment) else {
            return String::new();
        };
        let to = to.and_then(moment).unwrap_or(self.now);
        format_duration(Duration::try_from(to.duration_since(from)).unwrap_or_default())
    }
}

fn moment(time: &WireTimestamp) -> Option<Timestamp> {
    Timestamp::new(time.seconds, time.nanos).ok()
}

/// A duration of the wire for a person; what is negative is none.
pub fn took(duration: Option<&WireDuration>) -> String {
    format_duration(
        duration
            .and_then(|it| vmsnap_client::from_wire(*it))
            .unwrap_or_default(),
    )
}

/// The word of an enum field, with spaces; `-` for unspecified.
pub fn words<E: Word>(value: i32) -> String {
    word::<E>(value).map_or_else(|| "-".to_owned(), |word| word.replace('_', " "))
}

/// `-` for what is empty, so that a column never looks broken.
pub fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

/// Several names on one line.
pub fn list<S: AsRef<str>>(names: &[S]) -> String {
    names
        .iter()
        .map(AsRef::as_ref)
        .collect::<Vec<_>>()
        .join(", ")
}

/// A table without lines, whose columns are two spaces apart.
pub struct Columns {
    table: Table,
    right: &'static [usize],
}

impl Columns {
    /// With a header, and the columns that are aligned to the right.
    pub fn new(header: &[&str], right: &'static [usize]) -> Self {
        let mut columns = Columns {
            table: Table::new(),
            right,
        };
        columns.table.load_style(NOTHING);
        let header: Vec<Cell> = columns.cells(header.iter().map(|text| (*text).to_owned()));
        columns.table.set_header(header);
        columns
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells = self.cells(cells);
        self.table.add_row(cells);
    }

    fn cells(&self, texts: impl IntoIterator<Item = String>) -> Vec<Cell> {
        let cell = |(at, text): (usize, String)| {
            let alignment = if self.right.contains(&at) {
                CellAlignment::Right
            } else {
                CellAlignment::Left
            };
            Cell::new(text).set_alignment(alignment)
        };
        texts.into_iter().enumerate().map(cell).collect()
    }

    /// The table, each line ended, none with spaces at its end.
    pub fn text(mut self) -> String {
        for column in self.table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        let mut text = String::new();
        for line in self.table.lines() {
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}
