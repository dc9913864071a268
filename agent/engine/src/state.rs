//! A run's status as a pure fold over its records.

use crate::{Closing, Flow, Hold, Record, Step};

/// Where a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Accepted; no plan yet.
    Accepted,
    /// Taking its steps.
    Running,
    /// Undoing what it started.
    Undoing,
    /// Over.
    Closed(Closing),
    /// Was stuck; somebody recorded what they did about it.
    Resolved,
}

/// Where a step is.
#[derive(Debug, Clone, PartialEq)]
pub enum StepState<D> {
    /// Not begun.
    Pending,
    /// Begun; its effect may or may not have happened.
    Started,
    /// Done.
    Finished(D),
    /// Failed; its effect may or may not have happened.
    Failed,
    /// Undone.
    Undone,
    /// Undoing it failed.
    UndoFailed,
}

/// A record that cannot follow the ones before it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("record {sequence} ({record}) cannot follow: {because}")]
pub struct Illegal {
    /// Its number, from 1.
    pub sequence: u64,
    /// Its kind.
    pub record: &'static str,
    /// Why not.
    pub because: String,
}

/// What follows from the records seen so far.
#[derive(Debug, Clone)]
pub struct RunState<F: Flow> {
    /// Where the run is.
    pub phase: Phase,
    /// The plan, once there is one.
    pub plan: Option<Box<F::Plan>>,
    /// One entry for each step of the plan.
    pub steps: Vec<StepState<F::Done>>,
    /// Number of the last record; 0 before the first.
    pub sequence: u64,
    /// The first fault that a step gave.
    pub fault: Option<F::Fault>,
}

impl<F: Flow> Default for RunState<F> {
    fn default() -> Self {
        Self {
            phase: Phase::Accepted,
            plan: None,
            steps: Vec::new(),
            sequence: 0,
            fault: None,
        }
    }
}

impl<F: Flow> RunState<F> {
    /// Folds a whole log.
    ///
    /// # Errors
    /// [`Illegal`] for the first record that cannot follow.
    pub fn fold<'a>(records: impl IntoIterator<Item = &'a Record<F>>) -> Result<Self, Illegal> {
        let mut state = Self::default();
        for record in records {
            state.apply(record)?;
        }
        Ok(state)
    }

    /// Whether the run is over.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!(self.phase, Phase::Closed(_) | Phase::Resolved)
    }

    /// What each step achieved; `None` where it is not known to be done.
    #[must_use]
    pub fn done(&self) -> Vec<Option<F::Done>> {
        self.steps
            .iter()
            .map(|step| match step {
                StepState::Finished(done) => Some(done.clone()),
                _ => None,
            })
            .collect()
    }

    /// Holds whose taking began and whose release is not known to have
    /// happened, with the step that took each, in the order of taking.
    #[must_use]
    pub fn open_holds(&self) -> Vec<(usize, Hold)> {
        let Some(plan) = &self.plan else {
            return Vec::new();
        };
        let mut open: Vec<(usize, Hold)> = Vec::new();
        for (index, (step, state)) in F::steps(plan).iter().zip(&self.steps).enumerate() {
            let took = match state {
                StepState::Pending | StepState::Undone => None,
                StepState::Finished(done) => F::took(step, done),
                StepState::Started | StepState::Failed | StepState::UndoFailed => step.takes(),
            };
            if let Some(hold) = took {
                open.push((index, hold));
            }
            if let Some(hold) = step.releases()
                && matches!(state, StepState::Finished(_))
                && let Some(at) = open.iter().rposition(|(_, open)| *open == hold)
            {
                open.remove(at);
            }
        }
        open
    }

    /// The steps that must be undone now, in the order of undoing: every
    /// started one back to the last point of no return that is done, and
    /// before that only those with an open hold.
    #[must_use]
    pub fn to_undo(&self) -> Vec<usize> {
        let Some(plan) = &self.plan else {
            return Vec::new();
        };
        let steps = F::steps(plan);
        let behind = self.behind(steps);
        let owed = self.owed();
        let open = self.open_holds();
        (0..steps.len())
            .rev()
            .filter(|index| {
                if matches!(self.steps[*index], StepState::Pending | StepState::Undone) {
                    return false;
                }
                let only_holds =
                    steps[*index].takes().is_some() && steps[*index].releases().is_none();
                open.iter().any(|(held, _)| held == index)
                    || (!only_holds
                        && !owed.contains(index)
                        && behind.is_none_or(|behind| *index > behind))
            })
            .collect()
    }

    /// The last point of no return that is done.
    fn behind(&self, steps: &[F::Step]) -> Option<usize> {
        (0..steps.len()).rev().find(|index| {
            steps[*index].point_of_no_return()
                && matches!(self.steps[*index], StepState::Finished(_))
        })
    }

    /// Whether a step was taken and failed, and nothing was done about it yet.
    #[must_use]
    pub fn has_failed(&self, index: usize) -> bool {
        matches!(self.steps.get(index), Some(StepState::Failed))
    }

    /// The steps that a run which does not go on still has to take, in order,
    /// because what came before them cannot be undone.
    #[must_use]
    pub fn owed(&self) -> Vec<usize> {
        let Some(plan) = &self.plan else {
            return Vec::new();
        };
        let steps = F::steps(plan);
        let Some(behind) = self.behind(steps) else {
            return Vec::new();
        };
        (behind + 1..steps.len())
            .filter(|index| {
                let open = matches!(
                    self.steps[*index],
                    StepState::Pending | StepState::Started | StepState::Failed
                );
                open && steps[*index].owed_after(&steps[behind])
            })
            .collect()
    }

    /// Applies one record.
    ///
    /// # Errors
    /// [`Illegal`] when it cannot follow what came before.
    pub fn apply(&mut self, record: &Record<F>) -> Result<(), Illegal> {
        let sequence = self.sequence + 1;
        let illegal = |record: &'static str, because: &str| Illegal {
            sequence,
            record,
            because: because.to_owned(),
        };
        if self.is_closed() && !matches!(record, Record::Resolved { .. }) {
            return Err(illegal(name(record), "the run is closed"));
        }
        match record {
            Record::Queued { .. } => {
                if self.plan.is_some() {
                    return Err(illegal("queued", "the run has a plan already"));
                }
            }
            Record::Planned { plan } => {
                if self.plan.is_some() {
                    return Err(illegal("planned", "the run has a plan already"));
                }
                self.steps = F::steps(plan).iter().map(|_| StepState::Pending).collect();
                self.plan = Some(plan.clone());
                self.phase = Phase::Running;
            }
            Record::Notice { .. } | Record::HoldTaken { .. } | Record::HoldReleased { .. } => {}
            Record::Recovering => self.phase = Phase::Undoing,
            Record::StepStarted { index } => {
                let before = index
                    .checked_sub(1)
                    .and_then(|before| self.steps.get(before));
                if before.is_some_and(|before| !matches!(before, StepState::Finished(_))) {
                    return Err(illegal("step_started", "the step before it is not done"));
                }
                match self.steps.get_mut(*index) {
                    Some(step @ StepState::Pending) => *step = StepState::Started,
                    Some(_) => return Err(illegal("step_started", "the step was begun before")),
                    None => return Err(illegal("step_started", "the plan has no such step")),
                }
            }
            Record::StepFinished { index, done, .. } => match self.steps.get_mut(*index) {
                Some(step @ StepState::Started) => *step = StepState::Finished(done.clone()),
                _ => return Err(illegal("step_finished", "the step is not going on")),
            },
            Record::StepFailed { index, fault, .. } => match self.steps.get_mut(*index) {
                Some(step @ StepState::Started) => {
                    *step = StepState::Failed;
                    self.fault.get_or_insert_with(|| fault.clone());
                }
                _ => return Err(illegal("step_failed", "the step is not going on")),
            },
            Record::UndoStarted { index } => match self.steps.get(*index) {
                Some(StepState::Pending) if self.owed().contains(index) => {
                    self.phase = Phase::Undoing;
                }
                Some(StepState::Pending) | None => {
                    return Err(illegal("undo_started", "the step was never begun"));
                }
                Some(_) => self.phase = Phase::Undoing,
            },
            Record::UndoFinished { index, outcome } => {
                let owed = self.owed().contains(index);
                match self.steps.get_mut(*index) {
                    Some(StepState::Pending) if !owed => {
                        return Err(illegal("undo_finished", "the step was never begun"));
                    }
                    None => return Err(illegal("undo_finished", "the plan has no such step")),
                    Some(step) => {
                        *step = match outcome {
                            Ok(_) => StepState::Undone,
                            Err(_) => StepState::UndoFailed,
                        }
                    }
                }
            }
            Record::Closed { closing, fault, .. } => {
                if let Some(fault) = fault {
                    self.fault.get_or_insert_with(|| fault.clone());
                }
                self.phase = Phase::Closed(*closing);
            }
            Record::Resolved { .. } => {
                if self.phase != Phase::Closed(Closing::Stuck) {
                    return Err(illegal("resolved", "the run is not stuck"));
                }
                self.phase = Phase::Resolved;
            }
        }
        self.sequence = sequence;
        Ok(())
    }
}

fn name<F: Flow>(record: &Record<F>) -> &'static str {
    match record {
        Record::Queued { .. } => "queued",
        Record::Planned { .. } => "planned",
        Record::Notice { .. } => "notice",
        Record::StepStarted { .. } => "step_started",
        Record::StepFinished { .. } => "step_finished",
        Record::StepFailed { .. } => "step_failed",
        Record::HoldTaken { .. } => "hold_taken",
        Record::HoldReleased { .. } => "hold_released",
        Record::UndoStarted { .. } => "undo_started",
        Record::UndoFinished { .. } => "undo_finished",
        Record::Recovering => "recovering",
        Record::Closed { .. } => "closed",
        Record::Resolved { .. } => "resolved",
    }
}
