//! What holds for every run, wherever it breaks.

use std::sync::Mutex;

use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use vmsnap_engine::{
    Cancel, Closing, Flow, Hold, Log, LogError, Perform, Record, Run, RunState, Step,
};

#[derive(Debug, Clone)]
struct Small;

#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
enum Act {
    Take,
    Release,
    Work,
    Pivot,
    Owed,
}

impl Step for Act {
    fn name(&self) -> &'static str {
        "act"
    }
    fn takes(&self) -> Option<Hold> {
        (*self == Act::Take).then_some(Hold::Suspended)
    }
    fn releases(&self) -> Option<Hold> {
        (*self == Act::Release).then_some(Hold::Suspended)
    }
    fn point_of_no_return(&self) -> bool {
        *self == Act::Pivot
    }
    fn owed_after(&self, _: &Self) -> bool {
        *self == Act::Owed
    }
}

impl Flow for Small {
    type Plan = Vec<Act>;
    type Step = Act;
    type Done = ();
    type Fault = String;
    type Outcome = ();
    type Notice = String;
    fn steps(plan: &Vec<Act>) -> &[Act] {
        plan
    }
}

/// Counts effects; fails the step and the undo it is told to fail.
#[derive(Default)]
struct World {
    fail_at: Option<usize>,
    fail_undo_of: Option<usize>,
    cancel_in: Option<usize>,
    effects: Mutex<Vec<usize>>,
    undone: Mutex<Vec<usize>>,
    suspended: Mutex<bool>,
}

impl Perform<Small> for World {
    async fn perform(
        &self,
        index: usize,
        step: &Act,
        _: &[Option<()>],
        cancel: &Cancel,
    ) -> Result<(), String> {
        if *step == Act::Take {
            *self.suspended.lock().unwrap() = true;
        }
        if self.cancel_in == Some(index) {
            cancel.request();
        }
        if self.fail_at == Some(index) {
            return Err("told to fail".into());
        }
        if *step == Act::Release {
            *self.suspended.lock().unwrap() = false;
        }
        self.effects.lock().unwrap().push(index);
        Ok(())
    }
    async fn undo(&self, index: usize, step: &Act, _: &[Option<()>]) -> Result<String, String> {
        if self.fail_undo_of == Some(index) {
            return Err("cannot be undone".into());
        }
        if *step == Act::Take {
            *self.suspended.lock().unwrap() = false;
        }
        self.undone.lock().unwrap().push(index);
        Ok(String::new())
    }
    async fn conclude(&self, _: &Vec<Act>, _: &[Option<()>]) -> (Option<()>, Option<String>) {
        (Some(()), None)
    }
    fn notices(&self) -> Vec<String> {
        Vec::new()
    }
    fn cancelled(&self, _: usize) -> String {
        "cancelled".into()
    }
}

#[derive(Default)]
struct Lines {
    records: Mutex<Vec<Record<Small>>>,
    full_after: Option<usize>,
}

impl Log<Small> for Lines {
    async fn append(&self, record: Record<Small>) -> Result<(), LogError> {
        let mut records = self.records.lock().unwrap();
        if self.full_after.is_some_and(|full| records.len() >= full) {
            return Err(LogError("the disk is full".into()));
        }
        records.push(record);
        Ok(())
    }
}

fn run(plan: &[Act], world: &World, lines: &Lines) -> Result<Closing, LogError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(
        Run::new(RunState::default(), world, lines, Cancel::default()).execute(plan.to_vec()),
    )
}

fn plans() -> impl Strategy<Value = Vec<Act>> {
    prop::collection::vec(
        prop_oneof![3 => Just(Act::Work), 1 => Just(Act::Pivot)],
        0..4,
    )
    .prop_flat_map(|middle| {
        (Just(middle), any::<bool>()).prop_map(|(middle, hold)| {
            let mut plan = vec![Act::Work];
            if hold {
                plan.push(Act::Take);
            }
            plan.extend(middle);
            if hold {
                plan.push(Act::Release);
            }
            plan
        })
    })
}

proptest! {
    #[test]
    fn a_hold_is_released_wherever_a_run_breaks(plan in plans(), fail in 0usize..8, kind in 0..3) {
        let world = World {
            fail_at: (kind == 0).then_some(fail),
            cancel_in: (kind == 1).then_some(fail),
            ..World::default()
        };
        let lines = Lines { full_after: (kind == 2).then_some(fail), ..Lines::default() };
        let _ = run(&plan, &world, &lines);
        prop_assert!(!*world.suspended.lock().unwrap());
    }

    #[test]
    fn started_steps_are_undone_in_reverse_back_to_the_point_of_no_return(plan in plans(), fail in 0usize..8) {
        let world = World { fail_at: Some(fail), ..World::default() };
        let lines = Lines::default();
        let closing = run(&plan, &world, &lines).unwrap();
        let undone = world.undone.lock().unwrap().clone();
        prop_assert!(undone.windows(2).all(|pair| pair[0] > pair[1]));
        if fail < plan.len() {
            prop_assert_eq!(closing, Closing::Failed);
            let pivot = plan[..fail].iter().rposition(|act| *act == Act::Pivot);
            for index in 0..=fail {
                let releases = plan[index] == Act::Take;
                let due = releases || pivot.is_none_or(|pivot| index > pivot);
                prop_assert_eq!(undone.contains(&index), due, "step {} of {:?}", index, plan);
            }
        } else {
            prop_assert_eq!(closing, Closing::Succeeded);
        }
    }

    #[test]
    fn no_effect_happens_without_its_intent_on_disk(plan in plans(), full in 0usize..12) {
        let world = World::default();
        let lines = Lines { full_after: Some(full), ..Lines::default() };
        let _ = run(&plan, &world, &lines);
        let records = lines.records.lock().unwrap();
        for effect in world.effects.lock().unwrap().iter() {
            let intent = records.iter().any(
                |record| matches!(record, Record::StepStarted { index } if index == effect),
            );
            prop_assert!(intent);
        }
    }

    #[test]
    fn a_log_folds_to_a_closed_run_and_reads_back_from_json(plan in plans(), fail in 0usize..8) {
        let world = World { fail_at: Some(fail), ..World::default() };
        let lines = Lines::default();
        run(&plan, &world, &lines).unwrap();
        let text: Vec<String> = lines.records.lock().unwrap().iter().map(|record| serde_json::to_string(record).unwrap()).collect();
        let records: Vec<Record<Small>> = text.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        let state = RunState::fold(&records).unwrap();
        prop_assert!(state.is_closed());
        prop_assert!(state.open_holds().is_empty());
        prop_assert_eq!(state.sequence as usize, records.len());
    }

    #[test]
    fn a_run_cut_after_any_record_recovers_to_a_closed_one_without_holds(plan in plans(), cut in 1usize..20) {
        let lines = Lines::default();
        run(&plan, &World::default(), &lines).unwrap();
        let mut records = lines.records.lock().unwrap().clone();
        records.truncate(cut);
        let state = RunState::fold(&records).unwrap();
        prop_assume!(!state.is_closed());
        let world = World::default();
        *world.suspended.lock().unwrap() = !state.open_holds().is_empty();
        let rest = Lines { records: Mutex::new(records), full_after: None };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let closing = runtime.block_on(Run::new(state, &world, &rest, Cancel::default()).recover("the agent stopped".into())).unwrap();
        prop_assert_eq!(closing, Closing::Failed);
        prop_assert!(!*world.suspended.lock().unwrap());
        prop_assert!(RunState::fold(rest.records.lock().unwrap().iter()).unwrap().is_closed());
    }
}

#[test]
fn an_undo_that_keeps_failing_makes_the_run_stuck_until_somebody_resolves_it() {
    let world = World {
        fail_at: Some(1),
        fail_undo_of: Some(0),
        ..World::default()
    };
    let lines = Lines::default();
    let closing = run(&[Act::Work, Act::Work], &world, &lines).unwrap();
    assert_eq!(closing, Closing::Stuck);
    let mut records = lines.records.lock().unwrap().clone();
    records.push(Record::Resolved {
        by: "operator".into(),
        note: "looked".into(),
    });
    assert!(RunState::fold(&records).is_ok());
}

#[test]
fn a_record_after_the_end_is_illegal() {
    let lines = Lines::default();
    run(&[Act::Work], &World::default(), &lines).unwrap();
    let mut records = lines.records.lock().unwrap().clone();
    records.push(Record::StepStarted { index: 0 });
    let illegal = RunState::fold(&records).unwrap_err();
    assert_eq!(illegal.because, "the run is closed");
}

#[test]
fn a_step_that_is_owed_behind_a_point_of_no_return_is_taken_wherever_the_run_was_interrupted() {
    let plan = [Act::Pivot, Act::Work, Act::Owed];
    let whole = Lines::default();
    run(&plan, &World::default(), &whole).unwrap();
    let whole = whole.records.into_inner().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    for left in 1..whole.len() {
        let state = RunState::fold(&whole[..left]).unwrap();
        let pivoted = state.done()[0].is_some();
        let taken = state.done()[2].is_some();
        let world = World::default();
        let lines = Lines::default();
        let run = Run::new(state, &world, &lines, Cancel::default());
        let closing = runtime.block_on(run.recover("interrupted".into())).unwrap();
        assert_eq!(closing, Closing::Failed);
        let effects = world.effects.lock().unwrap().clone();
        let wanted: &[usize] = if pivoted && !taken { &[2] } else { &[] };
        assert_eq!(effects, wanted, "after {left} records");
        let mut records = whole[..left].to_vec();
        records.extend(lines.records.into_inner().unwrap());
        assert!(RunState::fold(&records).is_ok(), "after {left} records");
    }
}
