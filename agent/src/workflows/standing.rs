//! What stands now: for health, metrics and the service manager.
//!
//! Invariant: an answer comes within [`PATIENCE`] whatever the journal does, and
//! libvirt is not asked for it.

use std::time::Duration;

use jiff::Timestamp;
use vmsnap_engine::Hold;
use vmsnap_hypervisor::LinkStatus;

use super::{Workflows, folded, live::Live, lock};
use crate::{
    flow::RunState,
    journal::{JournalError, RunRow, Stamped},
    operate::health::{Held, OpenRun, OverdueCall, Standing, StuckRun},
    planning::guard::Guard,
};

/// How long the journal may take to answer before what it said last is used.
const PATIENCE: Duration = Duration::from_secs(2);
/// Stuck runs that are named one by one.
const NAMED: u32 = 50;

/// What the journal said last.
#[derive(Debug, Default, Clone)]
pub(super) struct Kept {
    stuck: Vec<StuckRun>,
    stuck_in_all: u64,
    guards: Vec<Guard>,
}

impl Workflows {
    /// What stands now.
    pub async fn standing(&self) -> Standing {
        let mut standing = Standing {
            now: Timestamp::now(),
            stopping: self.is_stopping(),
            open: lock(&self.0.live).values().map(|live| open(live)).collect(),
            in_flight: self.0.hypervisor.in_flight(),
            overdue: self
                .0
                .hypervisor
                .overdue_calls()
                .into_iter()
                .map(|call| OverdueCall {
                    operation: call.operation,
                    subject: call.subject,
                    seconds: call.since.elapsed().as_secs(),
                })
                .collect(),
            down: match &*self.0.hypervisor.status().borrow() {
                LinkStatus::Up => None,
                LinkStatus::Down { why, since } => Some((
                    Timestamp::try_from(*since).unwrap_or(Timestamp::UNIX_EPOCH),
                    why.clone(),
                )),
            },
            journal: self.0.journal.size(),
            failing: self.0.journal.failing(),
            trust: self.0.trust.report(),
            ..Standing::default()
        };
        standing.open.sort_by(|a, b| a.id.cmp(&b.id));
        match tokio::time::timeout(PATIENCE, self.read_kept()).await {
            Ok(Ok(kept)) => *lock(&self.0.kept) = kept,
            // The journal itself tells that it fails.
            Ok(Err(error)) => tracing::debug!(%error, "what stands cannot be read"),
            Err(_) => standing.silent = true,
        }
        let kept = lock(&self.0.kept).clone();
        standing.stuck = kept.stuck;
        standing.stuck_in_all = kept.stuck_in_all;
        standing.guards = kept.guards;
        standing
    }

    /// Whether no new runs are taken because the agent stops.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.0.stopping.load(std::sync::atomic::Ordering::Acquire)
    }

    async fn read_kept(&self) -> Result<Kept, JournalError> {
        let journal = &self.0.journal;
        let (runs, stuck_in_all) = journal.stuck_runs(NAMED).await?;
        let mut stuck = Vec::with_capacity(runs.len());
        for run in runs {
            // One that cannot be read back is stuck all the same.
            let records = journal.records(&run.id, 1).await.unwrap_or_default();
            // What was let go since is not in its records.
            let maybe = lock(&self.0.maybe_held).clone();
            let held = |step: usize| maybe.contains(&(run.id.clone(), step));
            let holds = stuck_holds(&records, held);
            stuck.push(stuck_run(run, holds));
        }
        Ok(Kept {
            stuck,
            stuck_in_all,
            guards: journal.open_guards().await?,
        })
    }
}

fn open(live: &Live) -> OpenRun {
    let records = live.records_from(1);
    let state = folded(live);
    OpenRun {
        id: live.id.clone(),
        vm: live.request.vm.clone(),
        action: live.request.action.name(),
        started: live.started,
        holds: holds(&state, records.iter().map(AsRef::as_ref), |_| true),
    }
}

fn stuck_holds(records: &[Stamped], held: impl Fn(usize) -> bool) -> Vec<Held> {
    let state = RunState::fold(records.iter().map(|record| &record.record)).unwrap_or_default();
    holds(&state, records.iter(), held)
}

fn stuck_run(run: RunRow, holds: Vec<Held>) -> StuckRun {
    StuckRun {
        holds,
        vm: run.request.vm,
        action: run.request.action.name(),
        since: run.finished.unwrap_or(run.started),
        why: run.fault.map(|fault| fault.message).unwrap_or_default(),
        id: run.id,
    }
}

/// Open holds of the steps that are `held`, each since its step began.
fn holds<'a>(
    state: &RunState,
    records: impl Iterator<Item = &'a Stamped> + Clone,
    held: impl Fn(usize) -> bool,
) -> Vec<Held> {
    state
        .open_holds()
        .into_iter()
        .filter(|(step, _)| held(*step))
        .filter_map(|(step, hold): (usize, Hold)| {
            let begun = records.clone().find(|record| {
                matches!(record.record, crate::flow::Record::StepStarted { index } if index == step)
            })?;
            Some(Held {
                hold,
                since: begun.time,
            })
        })
        .collect()
}
