//! Guests that a stuck run may have left frozen.
//!
//! Invariants: such a guest is asked until it says something definite, also by the
//! next life of the agent, and thawed if it is still frozen; the run stays stuck
//! until a person resolves it, and from then on its guest is left alone.

use std::time::Duration;

use tracing::Instrument as _;
use vmsnap_engine::Hold;

use super::{Live, Workflows, lock};
use crate::{
    flow::RunState,
    journal::{RunFilter, RunStatus},
    perform::Performer,
    planning::Fault,
};

/// Pause between two rounds of questions.
const AGAIN: Duration = Duration::from_secs(5);
/// The most stuck runs that are looked at after a start.
const MOST: u32 = 1_000;

impl Workflows {
    /// Asks the guests of stuck runs, for ever.
    pub async fn keep_stuck(self) {
        loop {
            let runs: Vec<String> = lock(&self.0.maybe_frozen).iter().cloned().collect();
            for run in runs {
                match self.let_go(&run).await {
                    Ok(None) => {}
                    Ok(Some(_)) => {
                        lock(&self.0.maybe_frozen).remove(&run);
                    }
                    Err(fault) => {
                        tracing::debug!(run = %run, %fault, "the guest of a stuck run does not answer");
                    }
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Says that runs are stuck that a former life of the agent left so, and takes
    /// care of their guests.
    pub(super) async fn find_stuck(&self) -> Result<(), Fault> {
        let stuck = self
            .runs(RunFilter {
                statuses: vec![RunStatus::Stuck],
                limit: MOST,
                ..RunFilter::default()
            })
            .await?;
        for run in stuck {
            tracing::error!(
                run = %run.id,
                vm = %run.request.vm,
                "a run is stuck: look at the VM, then say what was done with 'vmsnap resolve'"
            );
            self.is_stuck(&run.id).await?;
        }
        Ok(())
    }

    /// Takes care of the guest of a run that is stuck.
    pub(super) async fn is_stuck(&self, run: &str) -> Result<(), Fault> {
        let state = self.read_state(run).await?;
        if state
            .open_holds()
            .iter()
            .any(|(_, hold)| *hold == Hold::Frozen)
        {
            lock(&self.0.maybe_frozen).insert(run.to_owned());
        }
        Ok(())
    }

    async fn read_state(&self, run: &str) -> Result<RunState, Fault> {
        let mut state = RunState::default();
        for record in self.0.journal.records(run, 1).await? {
            if state.apply(&record.record).is_err() {
                break;
            }
        }
        Ok(state)
    }

    /// What made it certain that the guest is not frozen any more by this run.
    async fn let_go(&self, id: &str) -> Result<Option<&'static str>, Fault> {
        let run = self.run(id).await?;
        let plan = self.read_state(id).await?.plan;
        let (RunStatus::Stuck, Some(plan)) = (run.status, plan) else {
            return Ok(Some("the run was resolved"));
        };
        let live = Live::new(run.id, run.request_id, run.request, run.caller, Vec::new());
        let span = live.span();
        let performer = self.performer(&live, *plan, None);
        let note = performer.thawed_by_now().instrument(span.clone()).await?;
        if let Some(note) = note {
            span.in_scope(|| tracing::warn!(note, "the guest of a stuck run was let go"));
        }
        Ok(note)
    }

    /// Does the steps of a run.
    pub(super) fn performer(
        &self,
        live: &std::sync::Arc<Live>,
        plan: crate::planning::Plan,
        facts: Option<crate::planning::Facts>,
    ) -> Performer {
        Performer::new(
            self.0.hypervisor.clone(),
            self.0.journal.clone(),
            self.0.observer.clone(),
            live.clone(),
            plan,
            facts,
            Duration::from_secs(self.0.config.limits.stuck_after),
        )
    }
}
