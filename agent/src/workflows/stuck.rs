//! Guests that a stuck run may have left frozen or paused.
//!
//! Invariants: such a guest is asked until it says something definite, also by the
//! next life of the agent, and let go if it is still held: what was done to it may
//! come true long after it was given up. Once that is certain of a hold, it is left
//! alone, because somebody else may take one. The run stays stuck until a person
//! resolves it, and from then on its guest is left alone.

use std::time::Duration;

use tracing::Instrument as _;

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
            let held: Vec<(String, usize)> = lock(&self.0.maybe_held).iter().cloned().collect();
            // What was taken last is let go first: who stands still cannot be thawed.
            for (run, step) in held.into_iter().rev() {
                match self.let_go(&run, step).await {
                    Ok(()) => {
                        lock(&self.0.maybe_held).remove(&(run, step));
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
            // What cannot be read does not keep others from being let go.
            if let Err(fault) = self.is_stuck(&run.id).await {
                tracing::error!(run = %run.id, %fault, "it is not known what this run holds");
            }
        }
        Ok(())
    }

    /// Takes care of the guest of a run that is stuck.
    pub(super) async fn is_stuck(&self, run: &str) -> Result<(), Fault> {
        let state = self.read_state(run).await?;
        let open = state.open_holds().into_iter();
        lock(&self.0.maybe_held).extend(open.map(|(step, _)| (run.to_owned(), step)));
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

    /// Lets go of a guest that a step of a run may hold.
    ///
    /// # Errors
    /// When it is not certain yet that it does not.
    async fn let_go(&self, id: &str, step: usize) -> Result<(), Fault> {
        let run = self.run(id).await?;
        let state = self.read_state(id).await?;
        let done = state.done();
        let (RunStatus::Stuck, Some(plan)) = (run.status, state.plan) else {
            // Somebody resolved it.
            return Ok(());
        };
        let live = Live::new(run.id, run.request_id, run.request, run.caller, Vec::new());
        let span = live.span();
        let performer = self.performer(&live, *plan, None);
        let note = performer
            .let_go(step, &done)
            .instrument(span.clone())
            .await?;
        span.in_scope(|| tracing::warn!(note, "a stuck run holds its guest no more"));
        Ok(())
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
