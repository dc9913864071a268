//! Guarded changes that nobody confirmed: the agent itself goes back.
//!
//! Invariants: a guard is acted on only at its deadline and only when the VM is
//! as it was when it was armed; what cannot be done or is not certain is held for
//! a person, never tried in a loop and never dropped; an open merge is waited
//! for.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio_stream::StreamExt as _;
use tracing::Instrument as _;

use super::{Event, Submission, Workflows};
use crate::{
    flow::Record,
    journal::Caller,
    planning::{
        Fault, Reason, Request,
        guard::{Guard, GuardState},
        request::{Action, DEFAULT_POOL, Revert},
    },
};

/// How soon a guard is looked at again that something is in the way of.
const AGAIN: Duration = Duration::from_secs(5);

/// What became of a guard whose time was up.
enum Acted {
    /// It is ended, or held.
    Settled,
    /// Something is in the way that will pass.
    Later,
}

impl Workflows {
    /// Waits for deadlines, for ever. Guards that a former life of the agent left
    /// long overdue are held: after a long outage nobody knows what is wanted.
    pub async fn keep_guards(self) {
        let started = Timestamp::now();
        loop {
            let next = match self.due(started).await {
                Ok(next) => next,
                Err(fault) => {
                    tracing::error!(%fault, "guarded changes cannot be looked at");
                    Some(AGAIN)
                }
            };
            let wait = async {
                match next {
                    Some(wait) => tokio::time::sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = wait => {}
                () = self.0.journal.guards_changed() => {}
            }
        }
    }

    /// Acts on guards whose time is up; how long until the next one.
    async fn due(&self, started: Timestamp) -> Result<Option<Duration>, Fault> {
        let mut next: Option<Duration> = None;
        for guard in self.0.journal.open_guards().await? {
            if guard.state != GuardState::Pending {
                continue;
            }
            let now = Timestamp::now();
            let wait = if guard.deadline > now {
                Duration::try_from(now.duration_until(guard.deadline)).unwrap_or_default()
            } else {
                // Every line on it names the run that armed it, and its VM.
                let span = tracing::error_span!(
                    "guard",
                    run = %guard.run,
                    vm = %guard.vm,
                    snapshot = %guard.snapshot,
                );
                match self.act(&guard, started).instrument(span).await? {
                    Acted::Settled => continue,
                    Acted::Later => AGAIN,
                }
            };
            next = Some(next.map_or(wait, |before| before.min(wait)));
        }
        Ok(next)
    }

    async fn act(&self, guard: &Guard, started: Timestamp) -> Result<Acted, Fault> {
        let grace = SignedDuration::from_secs(
            i64::try_from(self.0.config.guards.grace).unwrap_or(i64::MAX),
        );
        let latest = guard.deadline.checked_add(grace).unwrap_or(Timestamp::MAX);
        if started > latest {
            let why = format!(
                "the agent was not running when the time was up at {}, and came back more than {} \
                 s later",
                guard.deadline, self.0.config.guards.grace
            );
            return self.hold(guard, why).await;
        }
        match self.unchanged(guard).await {
            Ok(None) => {}
            Ok(Some(why)) => return self.hold(guard, why).await,
            Err(fault) if fault.reason == Reason::HypervisorUnreachable => {
                return Ok(Acted::Later);
            }
            Err(fault) => return self.hold(guard, fault.message).await,
        }
        tracing::warn!("nobody confirmed: reverting");
        match self.take_back(guard).await {
            Ok(()) => Ok(Acted::Settled),
            // A merge ends some time, the agent is started again, libvirt comes back,
            // somebody makes room for the journal.
            Err(fault)
                if matches!(
                    fault.reason,
                    Reason::BlockJobActive
                        | Reason::ShuttingDown
                        | Reason::LimitReached
                        | Reason::HypervisorUnreachable
                        | Reason::JournalUnavailable
                ) =>
            {
                tracing::warn!(%fault, "the revert of a guarded change waits");
                Ok(Acted::Later)
            }
            Err(fault) => {
                let why = format!("reverting failed: {}: {}", fault.reason, fault.message);
                self.hold(guard, why).await
            }
        }
    }

    /// Why the VM is not as it was when the guard was armed, if so.
    async fn unchanged(&self, guard: &Guard) -> Result<Option<String>, Fault> {
        let vm = match self.0.observer.vm(&guard.vm).await {
            Err(fault) if fault.reason == Reason::VmNotFound => {
                return Ok(Some("the VM is gone".into()));
            }
            other => other?,
        };
        if vm.uuid != guard.vm_uuid {
            return Ok(Some("another VM has that name now".into()));
        }
        // An open merge changes the definition when it ends: the plan waits for it.
        if !vm.block_jobs.is_empty() {
            return Ok(None);
        }
        let now = self.0.observer.fingerprint(&guard.vm).await?;
        Ok((now != guard.fingerprint).then(|| {
            "the VM's definition or its snapshots were changed since the guard was armed".into()
        }))
    }

    async fn take_back(&self, guard: &Guard) -> Result<(), Fault> {
        let request = Request {
            vm: guard.vm.clone(),
            action: Action::Revert(Revert {
                safety_snapshot: true,
                ..Revert::to(&guard.snapshot)
            }),
            start_if_stopped: false,
            pool: DEFAULT_POOL.to_owned(),
        };
        let caller = Caller {
            identity: "agent".into(),
            transport: "self".into(),
            address: String::new(),
        };
        let run = self.submit(request, Submission::default(), caller).await?;
        self.ended(&run).await
    }

    /// Waits until a run is over.
    ///
    /// # Errors
    /// What it failed with, or that it cannot be watched.
    pub async fn ended(&self, run: &str) -> Result<(), Fault> {
        let mut events = self.watch(run, 1).await?;
        while let Some(event) = events.next().await {
            match event {
                Event::Record(record) => {
                    if let Record::Closed { fault, .. } = &record.record {
                        return fault.clone().map_or(Ok(()), Err);
                    }
                }
                Event::LeftOpen(why) => return Err(*why),
                Event::Progress(..) | Event::Heartbeat(_) => {}
            }
        }
        Err(Fault::new(
            Reason::Internal,
            format!("run {run} was left open"),
        ))
    }

    async fn hold(&self, guard: &Guard, why: String) -> Result<Acted, Fault> {
        tracing::error!(
            deadline = %guard.deadline,
            why = %why,
            "a guarded change was not confirmed and is held: confirm it, or revert"
        );
        self.0
            .journal
            .put_guard(Guard {
                state: GuardState::Held,
                note: why,
                ..guard.clone()
            })
            .await?;
        Ok(Acted::Settled)
    }
}
