//! The engine's types, filled in for snapshot workflows.

use vmsnap_engine::{Flow, Hold, Step as _};

use crate::planning::{Done, Fault, Outcome, Plan, Step, Warning};

/// Snapshot workflows.
#[derive(Debug, Clone, Copy)]
pub struct Snapshots;

impl Flow for Snapshots {
    type Plan = Plan;
    type Step = Step;
    type Done = Done;
    type Fault = Fault;
    type Outcome = Outcome;
    type Notice = Warning;

    fn steps(plan: &Plan) -> &[Step] {
        &plan.steps
    }

    fn took(step: &Step, done: &Done) -> Option<Hold> {
        match done {
            Done::NotHeld { .. } => None,
            _ => step.takes(),
        }
    }

    fn held_ms(done: &Done) -> Option<u64> {
        match done {
            Done::Created { stopped_ms, .. } => *stopped_ms,
            _ => None,
        }
    }
}

/// A record of a snapshot workflow.
pub type Record = vmsnap_engine::Record<Snapshots>;
/// The folded state of a snapshot workflow.
pub type RunState = vmsnap_engine::RunState<Snapshots>;
