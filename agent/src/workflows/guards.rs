//! Guarded changes that nobody confirmed: the agent itself goes back.
//!
//! Invariants: a guard is acted on only at its deadline and only when the VM is
//! as it was when it was armed; what cannot be done or is not certain is held for
//! a person, never tried in a loop and never dropped; an open merge is waited
//! for. Whatever ended a guard first has decided: a change that was confirmed is
//! neither taken back nor held any more. No guard waits for the revert of another.

use std::{collections::HashMap, time::Duration};

use jiff::{SignedDuration, Timestamp};
use tokio::task::{Id, JoinSet};
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
/// How often the clock is looked at: it may be set, and the machine may sleep, and
/// a timer knows of neither.
const LOOK: Duration = Duration::from_secs(30);
/// Looks that are further apart than this tell that it was so.
const GAP: SignedDuration = SignedDuration::from_secs(90);

/// What became of a guard whose time was up.
enum Acted {
    /// It is ended, or held.
    Settled,
    /// Something is in the way that will pass.
    Later,
}

/// Since when the clock went on as it should: before, nobody looked after guards.
struct Awake {
    since: Timestamp,
    last: Timestamp,
}

impl Awake {
    fn from(now: Timestamp) -> Self {
        Self {
            since: now,
            last: now,
        }
    }

    /// The clock says `now`.
    fn look(&mut self, now: Timestamp) {
        if now.duration_since(self.last) > GAP {
            tracing::warn!(
                last = %self.last,
                now = %now,
                "the clock was set forward, or the machine slept"
            );
            self.since = now;
        }
        self.last = now;
    }
}

/// Until when to wait for a deadline before the clock is looked at again; nothing
/// when it is past.
fn until(deadline: Timestamp, now: Timestamp) -> Option<Duration> {
    let left = Duration::try_from(deadline.duration_since(now)).ok()?;
    (!left.is_zero()).then(|| left.min(LOOK))
}

impl Workflows {
    /// Waits for deadlines, for ever. Guards that a former life of the agent left
    /// long overdue are held: after a long outage nobody knows what is wanted.
    pub async fn keep_guards(self) {
        let mut awake = Awake::from(Timestamp::now());
        let mut acting: JoinSet<()> = JoinSet::new();
        let mut whose: HashMap<Id, String> = HashMap::new();
        loop {
            awake.look(Timestamp::now());
            let next = match self.0.journal.open_guards().await {
                Ok(guards) => {
                    let mut next: Option<Duration> = None;
                    for guard in guards {
                        if guard.state != GuardState::Pending
                            || whose.values().any(|run| *run == guard.run)
                        {
                            continue;
                        }
                        if let Some(wait) = until(guard.deadline, Timestamp::now()) {
                            next = Some(next.map_or(wait, |before| before.min(wait)));
                            continue;
                        }
                        let run = guard.run.clone();
                        let task = acting.spawn(self.clone().act_on(guard, awake.since));
                        whose.insert(task.id(), run);
                    }
                    next
                }
                Err(error) => {
                    tracing::error!(%error, "guarded changes cannot be looked at");
                    Some(AGAIN)
                }
            };
            tokio::select! {
                () = tokio::time::sleep(next.unwrap_or(LOOK)) => {}
                () = self.0.journal.guards_changed() => {}
                Some(ended) = acting.join_next_with_id() => {
                    let id = match ended {
                        Ok((id, ())) => id,
                        Err(error) => error.id(),
                    };
                    whose.remove(&id);
                }
            }
        }
    }

    /// Acts on a guard whose time is up. When something is in the way it ends only
    /// once it is time to look again.
    async fn act_on(self, guard: Guard, awake: Timestamp) {
        // Every line on it names the run that armed it, and its VM.
        let span = tracing::error_span!(
            "guard",
            run = %guard.run,
            vm = %guard.vm,
            snapshot = %guard.snapshot,
        );
        let acting = async {
            match self.act(&guard, awake).await {
                Ok(Acted::Settled) => {}
                Ok(Acted::Later) => tokio::time::sleep(AGAIN).await,
                Err(fault) => {
                    tracing::error!(%fault, "a guarded change cannot be acted on");
                    tokio::time::sleep(AGAIN).await;
                }
            }
        };
        acting.instrument(span).await;
    }

    async fn act(&self, guard: &Guard, awake: Timestamp) -> Result<Acted, Fault> {
        let grace = SignedDuration::from_secs(
            i64::try_from(self.0.config.guards.grace).unwrap_or(i64::MAX),
        );
        let latest = guard.deadline.checked_add(grace).unwrap_or(Timestamp::MAX);
        if awake > latest {
            let why = format!(
                "the agent was not running when the time was up at {}, or the clock was set, and it \
                 came back more than {} s later",
                guard.deadline, self.0.config.guards.grace
            );
            return self.hold(guard, why).await;
        }
        match self.unchanged(guard).await {
            Ok(None) => {}
            Ok(Some(why)) => return self.hold(guard, why).await,
            // Nothing was touched, and the change may be what keeps people out.
            Err(fault)
                if matches!(
                    fault.reason,
                    Reason::HypervisorUnreachable | Reason::HypervisorOverdue | Reason::VmBusy
                ) =>
            {
                tracing::warn!(%fault, "the VM of a guarded change cannot be looked at yet");
                return Ok(Acted::Later);
            }
            Err(fault) => return self.hold(guard, fault.message).await,
        }
        tracing::warn!("nobody confirmed: reverting");
        match self.take_back(guard).await {
            // It has ended the guard. Otherwise a person has to: it is not reverted twice.
            Ok(()) => {
                let why = "the VM was reverted, and the guard did not end with that";
                self.hold(guard, why.into()).await
            }
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
        let how = Submission {
            guard: Some(guard.run.clone()),
            ..Submission::default()
        };
        let run = self.submit(request, how, caller).await?;
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

    /// Holds a guard, unless somebody ended it meanwhile.
    async fn hold(&self, guard: &Guard, why: String) -> Result<Acted, Fault> {
        if self.0.journal.hold_guard(&guard.run, &why).await? {
            tracing::error!(
                deadline = %guard.deadline,
                why = %why,
                "a guarded change was not confirmed and is held: confirm it, or revert"
            );
        } else {
            tracing::debug!(why = %why, "the guard is ended");
        }
        Ok(Acted::Settled)
    }
}

/// Refuses the agent's own revert when the guard that it is for waits no more.
///
/// # Errors
/// [`Reason::WorkflowState`].
pub(super) fn still_waits(run: &str, now: Option<&Guard>) -> Result<(), Fault> {
    match now {
        Some(guard) if guard.run == run && guard.state == GuardState::Pending => Ok(()),
        _ => Err(Fault::new(
            Reason::WorkflowState,
            format!(
                "the change that run {run} guards was confirmed or taken back meanwhile; nothing \
                 was touched"
            ),
        )
        .with("guarded_by", run)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("a time")
    }

    #[test]
    fn the_clock_is_looked_at_again_long_before_a_late_deadline() {
        assert_eq!(until(at(1_000_000), at(0)), Some(LOOK));
        assert_eq!(until(at(12), at(10)), Some(Duration::from_secs(2)));
        assert_eq!(until(at(10), at(10)), None);
        assert_eq!(until(at(10), at(11)), None);
    }

    #[test]
    fn a_clock_that_was_set_forward_counts_as_an_outage_and_one_that_was_set_back_does_not() {
        let mut awake = Awake::from(at(1_000));
        awake.look(at(1_030));
        awake.look(at(1_060));
        assert_eq!(awake.since, at(1_000));
        awake.look(at(9_000));
        assert_eq!(awake.since, at(9_000));
        // Back, and on from there.
        awake.look(at(2_000));
        awake.look(at(2_030));
        assert_eq!(awake.since, at(9_000));
    }
}
