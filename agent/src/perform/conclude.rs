//! What a run became, read once its steps are done.

use super::Performer;
use crate::planning::{
    Done, Fault, Outcome, Plan, Step,
    facts::{Consistency, Vm},
    outcome::GuestReport,
    plan::FieldChange,
    request::Action,
};

impl Performer {
    pub(super) async fn outcome(
        &self,
        plan: &Plan,
        done: &[Option<Done>],
    ) -> (Option<Outcome>, Option<Fault>) {
        let facts = if plan.steps.is_empty() {
            self.facts.clone()
        } else {
            None
        };
        let facts = match facts {
            Some(facts) => facts,
            None => match self.observer.facts(&plan.request).await {
                Ok(facts) => facts,
                Err(fault) => return (None, Some(fault)),
            },
        };
        let mut outcome = Outcome {
            changed: plan.changes(),
            snapshot: facts.snapshot(&plan.snapshot).cloned(),
            consistency: plan.consistency,
            verdicts: plan.verdicts.clone(),
            diff: plan.diff.clone(),
            vm_state: Some(facts.vm.state),
            safety_snapshot: plan.safety_snapshot.clone(),
            vm: Some(facts.vm.clone()),
            snapshots: facts.snapshots,
            storage: Some(facts.storage),
            ..Outcome::default()
        };
        // A revert always changes something, whatever its plan looks like.
        outcome.changed |= matches!(plan.request.action, Action::Revert(_));
        if matches!(plan.request.action, Action::Revert(_)) {
            self.sizes_taken_back(&facts.vm, &mut outcome);
        }
        let late = self.gather(plan, done, &mut outcome);
        (Some(outcome), late)
    }

    /// A revert brings back the sizes that disks had then; of internal snapshots
    /// nobody knows them beforehand.
    fn sizes_taken_back(&self, now: &Vm, outcome: &mut Outcome) {
        let before = self.facts.iter().flat_map(|facts| &facts.vm.disks);
        for disk in before {
            let after = now.disks.iter().find(|after| after.target == disk.target);
            if let Some(after) = after.filter(|after| {
                ![0, disk.virtual_size].contains(&after.virtual_size) && disk.virtual_size > 0
            }) {
                outcome.diff.push(FieldChange {
                    field: format!("disk.{}.virtual_size", disk.target),
                    before: Some(disk.virtual_size.to_string()),
                    after: Some(after.virtual_size.to_string()),
                });
            }
        }
    }

    /// Adds what the steps achieved.
    fn gather(&self, plan: &Plan, done: &[Option<Done>], outcome: &mut Outcome) -> Option<Fault> {
        let mut late = None;
        let mut guest: Option<GuestReport> = None;
        let mut clock = None;
        for (step, done) in plan.steps.iter().zip(done) {
            match (step, done) {
                (Step::Freeze { .. }, Some(Done::NotHeld { .. })) => {
                    outcome.consistency = Some(Consistency::Suspend);
                }
                (Step::Thaw, Some(Done::Released { held_ms })) => {
                    outcome.frozen_ms = Some(*held_ms);
                }
                (Step::Resume, Some(Done::Released { held_ms })) => {
                    outcome.stopped_ms = Some(*held_ms);
                }
                (_, Some(Done::Created { stopped_ms, .. })) if stopped_ms.is_some() => {
                    outcome.stopped_ms = *stopped_ms;
                }
                (_, Some(Done::Guest { report })) => guest = Some((**report).clone()),
                (_, Some(Done::Late { fault, report })) => {
                    guest = Some((**report).clone());
                    late = Some((**fault).clone());
                }
                (_, Some(Done::Clock { skew_ms, set, .. })) => clock = Some((*skew_ms, *set)),
                (Step::DeleteSnapshot { name, .. }, Some(Done::Deleted { .. })) => {
                    outcome.merged.push(name.clone());
                }
                (_, Some(Done::Guarded { deadline })) => outcome.guard = Some(*deadline),
                (_, Some(Done::Resized { bytes })) => outcome.resized_to = Some(*bytes),
                _ => {}
            }
        }
        if let Some((skew, set)) = clock {
            let guest = guest.get_or_insert_with(GuestReport::default);
            guest.skew_ms = skew;
            guest.clock_set = set;
        }
        outcome.guest = guest;
        if let Some(record) = outcome
            .snapshot
            .as_ref()
            .and_then(|snapshot| snapshot.record.as_ref())
            && matches!(plan.request.action, Action::Create(_))
        {
            outcome.consistency = Some(record.consistency);
        }
        late
    }
}
