//! Runs that stayed open: what a former life of the agent left, and what could not be
//! closed because the journal could not be written.
//!
//! Invariants: what was held is let go first, whether or not that can be written; the
//! runs of one VM come one after the other, and no VM waits for another; nobody changes
//! a VM before its run is closed; what cannot be read keeps no other run from that.

use std::{collections::BTreeMap, sync::atomic::Ordering, time::Duration};

use tokio::task::JoinSet;
use tracing::Instrument as _;
use vmsnap_engine::{Closing, Run};

use super::{Live, LiveLog, Workflows, folded, lock, refuse};
use crate::{
    flow::Record,
    journal::{JournalError, RunRow},
    planning::{Fault, Reason},
};

/// How soon a run that was left open is tried again at first, and at last.
const LEFT_OPEN: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

impl Workflows {
    /// Finishes or undoes what a former life of the agent left open, the runs of
    /// different VMs at once: a guest that does not answer keeps no other one held.
    /// Where the journal cannot be written, what was held is let go all the same, and
    /// the run is closed later; nobody changes its VM before.
    ///
    /// # Errors
    /// When the journal cannot be read. What can be read was recovered all the same.
    pub async fn recover(&self) -> Result<usize, Fault> {
        let (open, unreadable) = self.0.journal.open_runs_and_others().await?;
        let count = open.len();
        let mut of_vms: BTreeMap<String, Vec<RunRow>> = BTreeMap::new();
        for run in open {
            let of_vm = of_vms.entry(run.request.vm.clone()).or_default();
            of_vm.push(run);
        }
        let mut recovering = JoinSet::new();
        for runs in of_vms.into_values() {
            let workflows = self.clone();
            recovering.spawn(async move {
                for run in runs {
                    workflows.recover_or_leave_open(run).await;
                }
            });
        }
        while let Some(recovered) = recovering.join_next().await {
            if let Err(error) = recovered {
                tracing::error!(%error, "recovering a run ended early");
            }
        }
        self.find_stuck().await?;
        match unreadable {
            None => Ok(count),
            Some(error) => Err(error.into()),
        }
    }

    async fn recover_or_leave_open(&self, run: RunRow) {
        let interrupted = Fault::new(
            Reason::Interrupted,
            "the agent stopped in the middle of this run and undid it when it came back",
        );
        let Err(why) = self.recover_one(run.clone(), interrupted.clone()).await else {
            return;
        };
        tracing::error!(run = %run.id, vm = %run.request.vm, %why, "an interrupted run stays open");
        let records = self.0.journal.records(&run.id, 1).await;
        // Without them it is shown as it is: open, and why.
        let records = records.unwrap_or_default();
        let live = Live::new(run.id, run.request_id, run.request, run.caller, records);
        // Nobody is served yet: the turn is free.
        let turn = self.take_turn(&live);
        lock(&self.0.live).insert(live.id.clone(), live.clone());
        let workflows = self.clone();
        self.0.runtime.spawn(async move {
            let _turn = turn;
            workflows.close_later(&live, why, interrupted).await;
            lock(&workflows.0.live).remove(&live.id);
        });
    }

    /// Closes a run whose records cannot be read: somebody has to look at its VM.
    async fn not_to_be_recovered(&self, run: &RunRow, error: JournalError) -> Result<(), Fault> {
        let fault = Fault::from(error);
        let message = format!(
            "{}; so it is not known what this run did to VM '{}' before the agent stopped: look \
             whether it runs, is thawed and has no block job, and resolve the run",
            fault.message, run.request.vm
        );
        tracing::error!(
            run = %run.id,
            vm = %run.request.vm,
            %message,
            "a run is stuck: look at the VM, then say what was done with 'vmsnap resolve'"
        );
        let closed = Record::Closed {
            closing: Closing::Stuck,
            outcome: None,
            fault: Some(Fault { message, ..fault }),
        };
        self.0.journal.append(&run.id, closed).await?;
        Ok(())
    }

    async fn recover_one(&self, run: RunRow, fault: Fault) -> Result<(), Fault> {
        let records = match self.0.journal.records(&run.id, 1).await {
            Err(error @ JournalError::Unreadable { .. }) => {
                return self.not_to_be_recovered(&run, error).await;
            }
            records => records?,
        };
        let live = Live::new(
            run.id.clone(),
            run.request_id,
            run.request,
            run.caller,
            records,
        );
        let log = LiveLog {
            live: live.clone(),
            journal: self.0.journal.clone(),
        };
        let state = folded(&live);
        let recovering = async {
            tracing::info!("an interrupted run is recovered");
            match state.plan.clone() {
                None => refuse(&log, fault).await,
                Some(plan) => {
                    let performer = self.performer(&live, *plan, None);
                    Run::new(state, &performer, &log, live.cancel.clone())
                        .recover(fault)
                        .await
                }
            }
        };
        let span = live.span();
        match recovering.instrument(span.clone()).await {
            Ok(closing) => {
                span.in_scope(|| live.told_end(closing));
                if closing == Closing::Stuck {
                    self.is_stuck(&live.id).await?;
                }
                Ok(())
            }
            Err(error) => Err(live
                .unwritten()
                .unwrap_or_else(|| Fault::new(Reason::JournalUnavailable, error.to_string()))),
        }
    }

    /// Tells the watchers of a run why it does not go on, and undoes and closes it
    /// with `fault` as soon as the journal can be written. Its turn has to be held
    /// until then.
    pub(super) async fn close_later(&self, live: &Live, why: Fault, fault: Fault) {
        live.leave_open(Fault {
            message: format!(
                "{}; run {} is undone and closed once the journal can be written",
                why.message, live.id
            ),
            ..why
        });
        let mut pause = LEFT_OPEN.0;
        loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LEFT_OPEN.1);
            // What is left open now is recovered at the next start.
            if self.0.stopping.load(Ordering::Acquire) {
                return;
            }
            match self.try_to_close(live, &fault).await {
                Ok(()) => return,
                Err(still) => {
                    tracing::debug!(run = %live.id, %still, "the run cannot be closed yet");
                }
            }
        }
    }

    async fn try_to_close(&self, live: &Live, fault: &Fault) -> Result<(), Fault> {
        self.0.journal.takes_records_of(&live.id).await?;
        let run = self.run(&live.id).await?;
        if run.status.is_over() {
            return Ok(());
        }
        self.recover_one(run, fault.clone()).await
    }
}
