//! What came of the cells: the matrix, the failures, the times of recovery.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Result;

use super::scenarios::{COLUMNS, Fault, SCENARIOS};

/// What is wrong after a cell, and how long the recovery took, if there was one.
pub(super) type Judged = (Vec<String>, Option<Duration>);

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    counts: BTreeMap<(usize, usize), (usize, usize)>,
    runs: usize,
    failures: Vec<String>,
    recoveries: Vec<Duration>,
}

impl Report {
    /// Counts a cell, or with no fault the run from which they were learnt: what is
    /// wrong after it, and how long the recovery took.
    pub(super) fn add(&mut self, row: usize, fault: Option<&Fault>, result: Result<Judged>) {
        self.runs += 1;
        let name = SCENARIOS[row].name;
        let place = fault.map_or("without a fault".to_owned(), |fault| {
            format!("{} at {}", fault.column(), fault.place())
        });
        let wrong = match result {
            Ok((wrong, recovery)) => {
                self.recoveries.extend(recovery);
                wrong.join("; ")
            }
            Err(problem) => format!("{problem:#}"),
        };
        if let Some(fault) = fault {
            let column = COLUMNS
                .iter()
                .position(|it| *it == fault.column())
                .unwrap_or_default();
            let count = self.counts.entry((row, column)).or_default();
            count.0 += 1;
            count.1 += usize::from(!wrong.is_empty());
        }
        if !wrong.is_empty() {
            self.failures.push(format!("{name}: {place}: {wrong}"));
        }
    }

    /// What failed, one a line.
    #[must_use]
    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    /// The matrix, the failures, the times of recovery and, as its last line,
    /// the counts.
    #[must_use]
    pub fn text(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::ASCII_MARKDOWN);
        table.set_header(std::iter::once("").chain(COLUMNS));
        for (row, scenario) in SCENARIOS.iter().enumerate() {
            let cell = |column| match self.counts.get(&(row, column)) {
                None => "-".to_owned(),
                Some((cells, 0)) => cells.to_string(),
                Some((cells, failed)) => format!("{cells}, {failed} FAILED"),
            };
            table.add_row(
                std::iter::once(scenario.name.to_owned()).chain((0..COLUMNS.len()).map(cell)),
            );
        }
        let mut lines = vec![table.to_string()];
        lines.extend(
            self.failures
                .iter()
                .map(|failure| format!("FAILED {failure}")),
        );
        let mut times = self.recoveries.clone();
        times.sort();
        if let (Some(middle), Some(longest)) = (times.get(times.len() / 2), times.last()) {
            lines.push(format!(
                "from the agent's start to the VM in its state again: median {} ms, longest {} ms, {} times",
                middle.as_millis(),
                longest.as_millis(),
                times.len()
            ));
        }
        let cells: usize = self.counts.values().map(|(cells, _)| cells).sum();
        lines.push(format!(
            "contract: {cells} cells, {} runs, {} failures",
            self.runs,
            self.failures.len()
        ));
        lines.join("\n")
    }
}
