//! Which cells a scenario has, and which of them are run.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};

use crate::{Lab, command::Output};

use super::{
    scenarios::{COLUMNS, Fault, Scenario},
    stage::on_domain,
};

/// Which cells are run.
#[derive(Debug, Clone)]
pub struct Choice {
    /// One cell in so many, apart from those of holds and points of no return;
    /// 1 is all.
    pub one_in: usize,
    /// Which of them.
    pub seed: usize,
    /// Only scenarios whose name holds this.
    pub only: String,
}

impl Choice {
    /// Which of the cells that were learnt of the scenario in this row are run.
    pub(super) fn of(
        &self,
        row: usize,
        scenario: &Scenario,
        cells: Vec<(Fault, bool)>,
    ) -> Vec<Fault> {
        let mut chosen = Vec::new();
        let mut killed = false;
        for (at, (fault, always)) in cells.into_iter().enumerate() {
            let daemon = fault.kills_libvirtd();
            // In the short forms libvirtd is killed once an action, in what is
            // neither a hold nor on a guest.
            let operation = match &fault {
                Fault::Effect(_, operation, _) => operation.as_str(),
                Fault::Record(_) => "",
            };
            let reads = operation == "refresh";
            let hold = matches!(operation, "freeze" | "suspend" | "resume" | "thaw");
            let short = self.one_in > 1 && (killed || hold || scenario.guest);
            if reads || daemon && short {
                continue;
            }
            killed |= daemon;
            if always || (at + row) % self.one_in == self.seed % self.one_in {
                chosen.push(fault);
            }
        }
        chosen
    }
}

/// The cells of a scenario, each with whether a hold or a point of no return
/// belongs to it.
pub(super) fn learn(lab: &Lab, scenario: &Scenario) -> Result<Vec<(Fault, bool)>> {
    on_domain(lab, scenario, |stage| {
        let before = stage.agent.log().len();
        let made = stage.agent.vmsnap(&stage.command())?;
        made.result()?;
        let wrong = stage.judged(&Output {
            status: made.status,
            stdout: Vec::new(),
            stderr: Vec::new(),
        });
        let mut cells = Vec::new();
        let mut held = false;
        let mut last = 0;
        for event in &made.events {
            let number = event["sequence"].as_u64().unwrap_or_default();
            if number <= last {
                continue;
            }
            last = number;
            let kind = event["event"].as_str().unwrap_or_default();
            let step = event["name"].as_str().unwrap_or_default();
            let title = event["title"].as_str().unwrap_or_default();
            let edge = matches!(
                step,
                "freeze" | "suspend" | "revert" | "revert-disks" | "delete-snapshot" | "resize"
            ) || title.contains("delete")
                || title.contains("merge");
            held |= kind == "hold_taken";
            cells.push((Fault::Record(number), held || edge));
            held &= kind != "hold_released";
        }
        ensure!(
            last as usize == cells.len(),
            "the caller saw {} of {last} records",
            cells.len()
        );
        let log = stage.agent.log();
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        // The next request's effects come after this run's.
        let log = &log[before..];
        let log = log.split("run ends").next().unwrap_or(log);
        for line in log.lines().filter(|line| line.contains("effect begins")) {
            let operation = line
                .split("operation=\"")
                .nth(1)
                .and_then(|rest| rest.split('"').next());
            let operation = operation.context("the operation in the agent's log")?;
            let nth = counts.entry(operation.to_owned()).or_default();
            let edge = operation == "revert" || operation == "delete a snapshot of";
            for how in &COLUMNS[1..] {
                let always = edge && *how == "fails after";
                cells.push((Fault::Effect(how, operation.to_owned(), *nth), always));
            }
            *nth += 1;
        }
        let wrong = wrong?;
        ensure!(wrong.is_empty(), "without a fault: {}", wrong.join("; "));
        Ok(cells)
    })
}
