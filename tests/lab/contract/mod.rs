//! The contract: whatever breaks in the middle of a run, the guest runs, is
//! thawed, its disks are whole, and the run can be read back.
//!
//! Each scenario runs once without faults, which tells how many records it writes
//! and which effects it makes; then once for every place at which it can break
//! (a *cell*). What is left is judged by virsh, qemu-img and qemu-io against a
//! model of what every snapshot holds.
//!
//! Invariant: a place that a run did not come to is a failed cell, not a passed
//! one.

mod cells;
mod judging;
mod report;
mod scenarios;
mod stage;

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::Result;

use crate::{Lab, OwnedLab};

use cells::learn;
use report::Judged;
use scenarios::{Fault, SCENARIOS, Scenario};
use stage::on_domain;

pub use cells::Choice;
pub use report::Report;

/// Runs the chosen cells, two at a time.
///
/// # Errors
/// When a lab for libvirtd's end cannot be started.
pub fn run_contract(lab: &Lab, choice: &Choice) -> Result<Report> {
    let report = Mutex::new(Report::default());
    let queue = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    let put = |row: usize, fault: Option<&Fault>, result: Result<Judged>| {
        let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
        report.add(row, fault, result);
    };
    let learner = || {
        loop {
            let row = next.fetch_add(1, Ordering::Relaxed);
            let Some(scenario) = SCENARIOS.get(row) else {
                break;
            };
            if !scenario.name.contains(&choice.only) {
                continue;
            }
            match learn(lab, scenario) {
                Ok(cells) => {
                    put(row, None, Ok((Vec::new(), None)));
                    let chosen = choice.of(row, scenario, cells);
                    let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
                    queue.extend(chosen.into_iter().map(|fault| (row, fault)));
                }
                Err(problem) => put(row, None, Err(problem)),
            }
        }
    };
    thread::scope(|scope| {
        scope.spawn(learner);
        scope.spawn(learner);
    });
    let mut cells = queue.into_inner().unwrap_or_else(PoisonError::into_inner);
    cells.sort_by_key(|(row, fault)| (*row, fault.kills_libvirtd()));
    let (daemon, cells): (Vec<_>, Vec<_>) = cells
        .into_iter()
        .partition(|(_, fault)| fault.kills_libvirtd());
    let next = AtomicUsize::new(0);
    let worker = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some((row, fault)) = cells.get(at) else {
                break;
            };
            put(*row, Some(fault), cell(lab, &SCENARIOS[*row], fault, None));
        }
    };
    let last = || -> Result<()> {
        if !daemon.is_empty() {
            let guests = daemon.iter().any(|(row, _)| SCENARIOS[*row].guest);
            let mut own = OwnedLab::start(u32::from(guests))?;
            let lab = own.lab.clone();
            for (row, fault) in &daemon {
                let result = cell(&lab, &SCENARIOS[*row], fault, Some(&mut own));
                put(*row, Some(fault), result);
            }
        }
        worker();
        Ok(())
    };
    thread::scope(|scope| {
        scope.spawn(worker);
        last()
    })?;
    Ok(report.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn cell(
    lab: &Lab,
    scenario: &Scenario,
    fault: &Fault,
    daemons: Option<&mut OwnedLab>,
) -> Result<Judged> {
    on_domain(lab, scenario, |mut stage| {
        let broken = stage.broken(fault, daemons);
        let judged = broken.and_then(|(output, recovery)| Ok((stage.judged(&output)?, recovery)));
        let (mut wrong, recovery) = match judged {
            Ok(judged) => judged,
            Err(problem) => (vec![format!("{problem:#}")], None),
        };
        if !wrong.is_empty() {
            let log = stage.agent.log();
            // The run that broke, and the one after it.
            let last = log.rfind("run begins").unwrap_or_default();
            let from = log[..last].rfind("run begins").unwrap_or(last);
            let tail: Vec<&str> = log[from..].lines().take(60).collect();
            wrong.push(format!("the agent said:\n{}", tail.join("\n")));
        }
        Ok((wrong, recovery))
    })
}
