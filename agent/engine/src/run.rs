//! Takes the steps of a plan, undoes them when one fails, takes what is owed
//! behind a point of no return, and closes the run.
//!
//! Invariants: a record is on disk before the effect it announces; once the
//! log fails, no new effect begins, but holds are still released, because a
//! guest that stands still is worse than a log with a gap.

use std::time::{Duration, Instant};

use crate::{Cancel, Closing, Flow, Hold, Log, LogError, Perform, Record, RunState, Step};

/// How often the undoing of one step is tried before the run is stuck.
pub const UNDO_ATTEMPTS: u32 = 3;

/// One run: its state, who does its steps and where its records go.
pub struct Run<'a, F: Flow, P, L> {
    state: RunState<F>,
    perform: &'a P,
    log: &'a L,
    cancel: Cancel,
    holds: Vec<(Hold, Instant)>,
}

/// Stops between the tries of an undo.
fn undo_pause(attempt: u32) -> Duration {
    Duration::from_millis(250 * u64::from(attempt))
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

impl<'a, F: Flow, P: Perform<F>, L: Log<F>> Run<'a, F, P, L> {
    /// Goes on from a state folded from the log: an empty one for a new run.
    pub fn new(state: RunState<F>, perform: &'a P, log: &'a L, cancel: Cancel) -> Self {
        Self {
            state,
            perform,
            log,
            cancel,
            holds: Vec::new(),
        }
    }

    /// Runs a plan to its end and closes the run.
    ///
    /// # Errors
    /// When the log cannot be written. Holds were released all the same; the
    /// run stays open in the log and is recovered when the agent starts again.
    pub async fn execute(mut self, plan: F::Plan) -> Result<Closing, LogError> {
        let steps = F::steps(&plan).to_vec();
        self.write(Record::Planned {
            plan: Box::new(plan.clone()),
        })
        .await?;
        for (index, step) in steps.iter().enumerate() {
            if self.cancel.is_requested() {
                let fault = self.perform.cancelled(index);
                return self.unwind(fault, Closing::Cancelled).await;
            }
            if let Err(lost) = self.write(Record::StepStarted { index }).await {
                return self.abandon(lost).await;
            }
            let since = Instant::now();
            if let Some(hold) = step.takes() {
                self.holds.push((hold, since));
            }
            let done = self.state.done();
            let outcome = self.perform.perform(index, step, &done, &self.cancel).await;
            let took_ms = millis(since);
            let written = match outcome {
                Ok(done) => self.finished(index, step, took_ms, done).await,
                Err(fault) => {
                    let record = Record::StepFailed {
                        index,
                        took_ms,
                        fault: fault.clone(),
                    };
                    match self.write(record).await {
                        Ok(()) => {
                            let closing = if self.cancel.is_requested() {
                                Closing::Cancelled
                            } else {
                                Closing::Failed
                            };
                            return self.unwind(fault, closing).await;
                        }
                        Err(lost) => Err(lost),
                    }
                }
            };
            if let Err(lost) = written {
                return self.abandon(lost).await;
            }
        }
        // All is done. If only the reading of what it became fails, undoing
        // finished work for that would be the greater harm.
        let done = self.state.done();
        let (outcome, fault) = self.perform.conclude(&plan, &done).await;
        self.write_notices().await?;
        let closing = match fault {
            None => Closing::Succeeded,
            Some(_) => Closing::Failed,
        };
        self.close(closing, outcome, fault).await
    }

    /// Undoes what an interrupted run had started, and closes it.
    ///
    /// # Errors
    /// When the log cannot be written; holds were released all the same.
    pub async fn recover(mut self, fault: F::Fault) -> Result<Closing, LogError> {
        if let Err(lost) = self.write(Record::Recovering).await {
            return self.abandon(lost).await;
        }
        self.unwind(fault, Closing::Failed).await
    }

    async fn finished(
        &mut self,
        index: usize,
        step: &F::Step,
        took_ms: u64,
        done: F::Done,
    ) -> Result<(), LogError> {
        let took = F::took(step, &done);
        let measured = F::held_ms(&done);
        let open = step.releases().is_some_and(|hold| {
            self.state
                .open_holds()
                .iter()
                .any(|(_, open)| *open == hold)
        });
        self.write(Record::StepFinished {
            index,
            took_ms,
            done,
        })
        .await?;
        match (took, step.releases()) {
            (Some(hold), None) => self.write(Record::HoldTaken { hold }).await?,
            (Some(hold), Some(_)) => {
                self.holds.retain(|(held, _)| *held != hold);
                if let Some(held_ms) = measured {
                    let held_ms = Some(held_ms);
                    self.write(Record::HoldReleased { hold, held_ms }).await?;
                }
            }
            (None, Some(hold)) if open => self.released(hold).await?,
            (None, _) => {
                if let Some(hold) = step.takes() {
                    self.holds.retain(|(held, _)| *held != hold);
                }
            }
        }
        self.write_notices().await
    }

    async fn released(&mut self, hold: Hold) -> Result<(), LogError> {
        let held_ms = self
            .holds
            .iter()
            .rposition(|(held, _)| *held == hold)
            .map(|at| millis(self.holds.remove(at).1));
        self.write(Record::HoldReleased { hold, held_ms }).await
    }

    async fn unwind(mut self, fault: F::Fault, closing: Closing) -> Result<Closing, LogError> {
        let Some(plan) = self.state.plan.clone() else {
            return self.close(closing, None, Some(fault)).await;
        };
        self.write_notices().await?;
        let mut stuck = false;
        for index in self.state.to_undo() {
            if let Err(lost) = self.write(Record::UndoStarted { index }).await {
                return self.abandon(lost).await;
            }
            let step = &F::steps(&plan)[index];
            let outcome = self.undo(index, step).await;
            let succeeded = outcome.is_ok();
            stuck |= !succeeded;
            let mut written = self.write(Record::UndoFinished { index, outcome }).await;
            if succeeded
                && written.is_ok()
                && let Some(hold) = step.takes()
            {
                written = self.released(hold).await;
            }
            if let Err(lost) = written {
                return self.abandon(lost).await;
            }
        }
        for index in self.state.owed() {
            if let Err(lost) = self.write(Record::UndoStarted { index }).await {
                return self.abandon(lost).await;
            }
            // What the run failed with says so already; anything else needs somebody.
            let known = self.state.has_failed(index);
            let outcome = self.settle(index, &F::steps(&plan)[index]).await;
            stuck |= outcome.is_err() && !known;
            let written = self.write(Record::UndoFinished { index, outcome }).await;
            if let Err(lost) = written {
                return self.abandon(lost).await;
            }
        }
        self.write_notices().await?;
        let closing = if stuck { Closing::Stuck } else { closing };
        self.close(closing, None, Some(fault)).await
    }

    async fn undo(&self, index: usize, step: &F::Step) -> Result<String, F::Fault> {
        let done = self.state.done();
        let mut attempt = 1;
        loop {
            match self.perform.undo(index, step, &done).await {
                Err(_) if attempt < UNDO_ATTEMPTS => {
                    tokio::time::sleep(undo_pause(attempt)).await;
                    attempt += 1;
                }
                outcome => return outcome,
            }
        }
    }

    /// Takes a step that is owed, although the run does not go on.
    async fn settle(&self, index: usize, step: &F::Step) -> Result<String, F::Fault> {
        let done = self.state.done();
        let mut attempt = 1;
        loop {
            match self
                .perform
                .perform(index, step, &done, &Cancel::default())
                .await
            {
                Err(_) if attempt < UNDO_ATTEMPTS => {
                    tokio::time::sleep(undo_pause(attempt)).await;
                    attempt += 1;
                }
                Err(fault) => return Err(fault),
                Ok(_) => {
                    return Ok("it was done, as what came before it cannot be undone".to_owned());
                }
            }
        }
    }

    /// The log is lost: releases what is held without it, and gives up.
    async fn abandon(self, lost: LogError) -> Result<Closing, LogError> {
        if let Some(plan) = &self.state.plan {
            for (index, _) in self.state.open_holds().into_iter().rev() {
                let step = &F::steps(plan)[index];
                if self.undo(index, step).await.is_err() {
                    tracing::error!(step = step.name(), "a hold may not be released");
                }
            }
        }
        Err(lost)
    }

    async fn close(
        &mut self,
        closing: Closing,
        outcome: Option<F::Outcome>,
        fault: Option<F::Fault>,
    ) -> Result<Closing, LogError> {
        self.write(Record::Closed {
            closing,
            outcome: outcome.map(Box::new),
            fault,
        })
        .await?;
        Ok(closing)
    }

    async fn write_notices(&mut self) -> Result<(), LogError> {
        for notice in self.perform.notices() {
            self.write(Record::Notice { notice }).await?;
        }
        Ok(())
    }

    async fn write(&mut self, record: Record<F>) -> Result<(), LogError> {
        self.log.append(record.clone()).await?;
        self.state
            .apply(&record)
            .map_err(|illegal| LogError(illegal.to_string()))
    }
}
