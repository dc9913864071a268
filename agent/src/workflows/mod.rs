//! Runs: who may begin, who waits, who watches, and what is left of them after a
//! restart.
//!
//! Invariants
//! - One run at a time changes a VM; the next waits and is told for whom.
//! - A run belongs to the agent: it is a task of its own, callers only watch.
//! - An equal request id joins the run it belongs to while it goes on, and when
//!   it is over if that is asked for; without an id, an equal request joins only a
//!   run that goes on.
//! - Interrupted runs are recovered before anybody is served.
//! - A run whose records cannot be written stays open and keeps the turn on its VM
//!   until it could be undone and closed.

mod guards;
mod live;
mod recovery;
mod standing;
mod stuck;
mod watch;

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use tokio::{
    runtime::Handle,
    sync::{Notify, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore},
};
use tracing::Instrument as _;
use vmsnap_engine::{Closing, Log as _, Run};
use vmsnap_hypervisor::{Hypervisor, failpoint};

use crate::{
    config::Config,
    flow::{Record, RunState},
    journal::{Caller, Journal, JournalError, Retention, RunFilter, RunRow, RunStatus},
    observe::Observer,
    planning::{self, Fault, Plan, Reason, Request},
    trust::{Sight, Trust, Turns},
};

pub use live::{Live, LiveLog, Progress};
pub use watch::Event;

/// How a run is to be begun.
#[derive(Debug, Clone, Default)]
pub struct Submission {
    /// The caller's own id for it; empty for none.
    pub request_id: String,
    /// An equal id joins a run that is over too, not only one that goes on.
    pub join_finished: bool,
    /// Run only if the plan has this hash; empty for any.
    pub plan_hash: String,
    /// Stop it when it takes longer.
    pub timeout: Option<Duration>,
    /// Which VMs the caller sees: for him the runs of others are not there, and
    /// neither are their request ids.
    pub sight: Sight,
    /// Only while the guard that this run armed waits: the agent's own revert, which
    /// may get its turn after somebody confirmed.
    pub guard: Option<String>,
}

/// The turn on one VM.
#[derive(Debug, Default)]
struct Turn {
    lock: Arc<tokio::sync::Mutex<()>>,
    holder: Mutex<Option<String>>,
}

#[derive(Debug)]
struct Inner {
    hypervisor: Hypervisor,
    journal: Journal,
    trust: Arc<Trust>,
    observer: Observer,
    config: Config,
    live: Mutex<HashMap<String, Arc<Live>>>,
    turns: Mutex<HashMap<String, Arc<Turn>>>,
    stopping: AtomicBool,
    places: Arc<Semaphore>,
    readers: Turns,
    /// Runs its runs, whoever asked for them.
    runtime: Handle,
    /// Told when a run ended.
    ended: Notify,
    /// Stuck runs whose guests may be held, each with the step that would hold it.
    maybe_held: Mutex<BTreeSet<(String, usize)>>,
    kept: Mutex<standing::Kept>,
}

/// A cheap handle to all runs.
#[derive(Debug, Clone)]
pub struct Workflows(Arc<Inner>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl From<JournalError> for Fault {
    fn from(error: JournalError) -> Self {
        let fault = Self::new(Reason::JournalUnavailable, error.to_string());
        match error {
            JournalError::Full { path, need, free } => fault
                .with("path", path)
                .with("need_bytes", need)
                .with("free_bytes", free),
            JournalError::TooNew { path, .. }
            | JournalError::Damaged { path, .. }
            | JournalError::Io { path, .. } => fault.with("path", path),
            JournalError::Unreadable { row, .. } => fault.with("row", row),
            JournalError::Closed => fault,
        }
    }
}

/// How often old runs are looked for when none ends.
const PRUNE: Duration = Duration::from_secs(3600);
/// How often the audit trail is shortened: a flood of denials grows it meanwhile.
const PRUNE_AUDIT: Duration = Duration::from_secs(60);
/// How long to wait with it after a run: others may end too.
const PRUNE_AFTER: Duration = Duration::from_secs(1);

impl Workflows {
    /// Nothing goes on yet. Has to be called inside the runtime that runs belong to.
    #[must_use]
    pub fn new(
        hypervisor: Hypervisor,
        journal: Journal,
        trust: Arc<Trust>,
        config: Config,
    ) -> Self {
        let observer = Observer::new(hypervisor.clone(), journal.clone(), &config);
        let places = Arc::new(Semaphore::new(config.limits.max_runs as usize));
        Self(Arc::new(Inner {
            hypervisor,
            journal,
            trust,
            observer,
            config,
            live: Mutex::default(),
            turns: Mutex::default(),
            stopping: AtomicBool::new(false),
            places,
            readers: Turns::default(),
            runtime: Handle::current(),
            ended: Notify::new(),
            maybe_held: Mutex::default(),
            kept: Mutex::default(),
        }))
    }

    /// Reads facts for others.
    #[must_use]
    pub fn observer(&self) -> &Observer {
        &self.0.observer
    }

    /// Whose turn it is to read.
    #[must_use]
    pub fn readers(&self) -> &Turns {
        &self.0.readers
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// The journal.
    #[must_use]
    pub fn journal(&self) -> &Journal {
        &self.0.journal
    }

    /// What callers are trusted by.
    #[must_use]
    pub fn trust(&self) -> &Arc<Trust> {
        &self.0.trust
    }

    /// Plans a request; changes nothing.
    ///
    /// # Errors
    /// The refusal.
    pub async fn plan(&self, request: &Request) -> Result<(Plan, planning::Facts), Fault> {
        let planned = async {
            request.check()?;
            let facts = self.0.observer.facts(request).await?;
            let plan = planning::plan(request, &facts)?;
            Ok((plan, facts))
        };
        match planned.await {
            Ok(planned) => Ok(planned),
            Err(fault) => Err(live::explained(fault, &request.vm, &self.0.journal).await),
        }
    }

    /// Begins a run, or joins the one that it belongs to. Returns its id.
    ///
    /// # Errors
    /// When the request is malformed, the id belongs to something else, the
    /// agent is stopping or full, or the journal cannot be written.
    pub async fn submit(
        &self,
        request: Request,
        how: Submission,
        caller: Caller,
    ) -> Result<String, Fault> {
        let vm = request.vm.clone();
        match self.accept(request, how, caller).await {
            Ok(id) => Ok(id),
            Err(fault) => Err(live::explained(fault, &vm, &self.0.journal).await),
        }
    }

    async fn accept(
        &self,
        request: Request,
        how: Submission,
        caller: Caller,
    ) -> Result<String, Fault> {
        request.check()?;
        let joined = going_on(&lock(&self.0.live), &request, &how)?;
        if let Some(id) = joined {
            return self.of_plan(id, &how.plan_hash).await;
        }
        if how.join_finished
            && !how.request_id.is_empty()
            && let Some(run) = self
                .0
                .journal
                .by_request_id(&how.request_id)
                .await?
                .into_iter()
                .find(|run| how.sight.sees(&run.request.vm))
        {
            let id = same(&how.request_id, &request, &run.id, &run.request)?;
            return self.of_plan(id, &how.plan_hash).await;
        }
        if self.0.stopping.load(Ordering::Acquire) {
            return Err(Fault::new(
                Reason::ShuttingDown,
                "the agent is stopping and takes no new runs; try again when it is back",
            ));
        }
        self.not_too_many_of(&caller)?;
        let Ok(place) = self.0.places.clone().try_acquire_owned() else {
            return Err(Fault::new(
                Reason::LimitReached,
                format!(
                    "{} runs are open, which is the limit; try again when some are over",
                    self.0.config.limits.max_runs
                ),
            )
            .with("limit", "limits.max_runs")
            .with("most", self.0.config.limits.max_runs));
        };
        let id = uuid::Uuid::now_v7().to_string();
        let request_id = if how.request_id.is_empty() {
            id.clone()
        } else {
            how.request_id.clone()
        };
        let live = Live::new(
            id.clone(),
            request_id.clone(),
            request.clone(),
            caller.clone(),
            Vec::new(),
        );
        let _ = live.demanded.set(how.plan_hash.clone());
        // Looked up and made known in one, so that two at once cannot both begin.
        let other = {
            let mut all = lock(&self.0.live);
            let other = going_on(&all, &request, &how)?;
            if other.is_none() {
                all.insert(id.clone(), live.clone());
            }
            other
        };
        if let Some(other) = other {
            return self.of_plan(other, &how.plan_hash).await;
        }
        let row = RunRow::accepted(id.clone(), request_id, request, caller, Timestamp::now());
        // From here on it goes on whether or not the caller does: one that is known and
        // that nobody drives would never end, and others would join it.
        let beginning = self.0.runtime.spawn({
            let workflows = self.clone();
            async move { workflows.begin(live, row, how, place).await }
        });
        let begun = beginning.await;
        begun.map_err(|_| Fault::new(Reason::ShuttingDown, "the agent is stopping"))??;
        Ok(id)
    }

    /// Notes a run that is known, and has it driven.
    async fn begin(
        self,
        live: Arc<Live>,
        row: RunRow,
        how: Submission,
        place: OwnedSemaphorePermit,
    ) -> Result<(), Fault> {
        if let Err(error) = self.0.journal.begin(row).await {
            lock(&self.0.live).remove(&live.id);
            let fault = Fault::from(error);
            // Somebody may have joined meanwhile.
            live.leave_open(fault.clone());
            return Err(fault);
        }
        failpoint::reached("journal.begin").await;
        let span = live.span();
        let runtime = self.0.runtime.clone();
        let driving = async move {
            let _place = place;
            self.drive(live, how).await;
        };
        runtime.spawn(driving.instrument(span));
        Ok(())
    }

    /// Refuses a caller who has as many runs open as one caller may. What the agent
    /// does by itself is not counted.
    fn not_too_many_of(&self, caller: &Caller) -> Result<(), Fault> {
        if caller.transport == "self" {
            return Ok(());
        }
        let most = self.0.config.limits.max_runs_per_peer as usize;
        let live = lock(&self.0.live);
        let own = live.values().filter(|run| run.caller.key() == caller.key());
        if own.count() < most {
            return Ok(());
        }
        let key = "limits.max_runs_per_peer";
        Err(Fault::new(
            Reason::LimitReached,
            format!(
                "{most} runs of this caller are open, and {key} is {most}; try again when some \
                 are over"
            ),
        )
        .with("limit", key)
        .with("most", most))
    }

    /// The run `id`, if its plan is the one that is demanded, or will be because
    /// it was begun with the same demand.
    async fn of_plan(&self, id: String, demanded: &str) -> Result<String, Fault> {
        if demanded.is_empty() {
            return Ok(id);
        }
        let same_demand = lock(&self.0.live)
            .get(&id)
            .is_some_and(|live| live.demanded.get().is_some_and(|hash| hash == demanded));
        let run = self.run(&id).await?;
        if same_demand || run.plan_hash == demanded {
            return Ok(id);
        }
        Err(Fault::new(
            Reason::PlanChanged,
            format!(
                "plan {demanded} was demanded, but the run {id}, which this request joins, has {}; \
                 look at that run, or give another request_id",
                if run.plan_hash.is_empty() {
                    "no plan yet".to_owned()
                } else {
                    format!("plan {}", run.plan_hash)
                }
            ),
        )
        .with("demanded", demanded)
        .with("found", &run.plan_hash)
        .with("workflow_id", &id))
    }

    async fn drive(&self, live: Arc<Live>, how: Submission) {
        tracing::info!("run begins");
        let timer = how.timeout.map(|timeout| {
            let live = live.clone();
            tokio::spawn(async move {
                tokio::time::sleep(timeout).await;
                live.stop(Fault::new(
                    Reason::TimedOut,
                    format!(
                        "the run took longer than its timeout of {}",
                        planning::actions::checks::for_people(timeout)
                    ),
                ));
            })
        });
        let log = LiveLog {
            live: live.clone(),
            journal: self.0.journal.clone(),
        };
        let mut turn = None;
        let closing = self.steps(&live, &log, &how, &mut turn).await;
        if let Some(timer) = timer {
            timer.abort();
        }
        match closing {
            Ok(closing) => {
                live.told_end(closing);
                if closing == Closing::Stuck
                    && let Err(fault) = self.is_stuck(&live.id).await
                {
                    tracing::error!(%fault, "the stuck run cannot be read");
                }
            }
            Err(error) => {
                tracing::error!(
                    %error,
                    "the journal failed: what the run held is let go, and the run is undone once \
                     the journal can be written"
                );
                let why = live.unwritten().unwrap_or_else(|| {
                    Fault::new(Reason::Internal, "the journal holds an impossible record")
                });
                let fault = Fault {
                    message: format!(
                        "{}; the run was stopped by that, and undone when the journal could be \
                         written again",
                        why.message
                    ),
                    ..why.clone()
                };
                self.close_later(&live, why, fault).await;
            }
        }
        lock(&self.0.live).remove(&live.id);
        self.0.ended.notify_one();
    }

    /// Removes old runs now and then, for ever.
    pub async fn keep_journal(self) {
        let keep = &self.0.config.journal;
        loop {
            let age = (keep.keep_days > 0).then(|| {
                jiff::SignedDuration::from_hours(i64::from(keep.keep_days).saturating_mul(24))
            });
            let stay = Retention {
                before: age.map(|age| Timestamp::now() - age),
                keep: keep.keep_runs,
                bytes: u64::from(keep.max_mib) << 20,
            };
            match self.0.journal.prune(stay).await {
                Ok(pruned) => {
                    if pruned.runs > 0 {
                        tracing::info!(
                            runs = pruned.runs,
                            "old runs were removed from the journal"
                        );
                    }
                    if pruned.more {
                        continue;
                    }
                }
                Err(error) => tracing::warn!(%error, "old runs stay in the journal"),
            }
            let _ = tokio::time::timeout(PRUNE, self.0.ended.notified()).await;
            tokio::time::sleep(PRUNE_AFTER).await;
        }
    }

    async fn steps(
        &self,
        live: &Arc<Live>,
        log: &LiveLog,
        how: &Submission,
        turn: &mut Option<HeldTurn>,
    ) -> Result<Closing, vmsnap_engine::LogError> {
        let request = &live.request;
        let reads = request.action.reads_only() && !request.start_if_stopped;
        let _reading = match reads {
            true => Some(self.0.readers.take(&live.caller.key()).await),
            false => None,
        };
        if !reads {
            match self.turn(live, log).await? {
                Ok(taken) => *turn = Some(taken),
                Err(fault) => return refuse(log, fault).await,
            }
        }
        let planned = match self.0.observer.facts(request).await {
            Ok(facts) => planning::plan(request, &facts).map(|plan| (plan, facts)),
            Err(fault) => Err(fault),
        };
        let (plan, facts) = match planned {
            Ok(planned) => planned,
            Err(fault) => return refuse(log, fault).await,
        };
        if let Some(run) = &how.guard
            && let Err(fault) = guards::still_waits(run, facts.guard.as_ref())
        {
            return refuse(log, fault).await;
        }
        if !how.plan_hash.is_empty() && how.plan_hash != plan.hash {
            let fault = Fault::new(
                Reason::PlanChanged,
                format!(
                    "plan {} was demanded and the facts now lead to {}; look at the new plan",
                    how.plan_hash, plan.hash
                ),
            )
            .with("demanded", &how.plan_hash)
            .with("found", &plan.hash);
            return refuse(log, fault).await;
        }
        let performer = self.performer(live, plan.clone(), Some(facts));
        let state = folded(live);
        Run::new(state, &performer, log, live.cancel.clone())
            .execute(plan)
            .await
    }

    /// Waits for the turn on the VM.
    async fn turn(
        &self,
        live: &Arc<Live>,
        log: &LiveLog,
    ) -> Result<Result<HeldTurn, Fault>, vmsnap_engine::LogError> {
        let turn = self.turn_on(&live.request.vm);
        let guard = match turn.lock.clone().try_lock_owned() {
            Ok(guard) => guard,
            Err(_) => {
                let behind = lock(&turn.holder).clone().unwrap_or_default();
                log.append(Record::Queued { behind }).await?;
                let waiting = turn.lock.clone().lock_owned();
                tokio::pin!(waiting);
                loop {
                    tokio::select! {
                        guard = &mut waiting => break guard,
                        () = tokio::time::sleep(Duration::from_millis(200)) => {
                            if live.cancel.is_requested() {
                                return Ok(Err(cancelled(live)));
                            }
                        }
                    }
                }
            }
        };
        Ok(Ok(HeldTurn::new(turn, guard, live)))
    }

    /// The turn on a VM, if nobody has it.
    fn take_turn(&self, live: &Live) -> Option<HeldTurn> {
        let turn = self.turn_on(&live.request.vm);
        let guard = turn.lock.clone().try_lock_owned().ok()?;
        Some(HeldTurn::new(turn, guard, live))
    }

    fn turn_on(&self, vm: &str) -> Arc<Turn> {
        let mut turns = lock(&self.0.turns);
        if turns.len() > 1_024 {
            // Of VMs that nobody waits for, and of names that no VM has.
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        }
        turns.entry(vm.to_owned()).or_default().clone()
    }

    /// Stops a run between its steps.
    ///
    /// # Errors
    /// When there is no such run, or it is over.
    pub async fn cancel(&self, id: &str, by: &Caller) -> Result<(), Fault> {
        let live = lock(&self.0.live).get(id).cloned();
        match live {
            Some(live) => {
                live.stop(Fault::new(
                    Reason::Cancelled,
                    format!("the run was cancelled by {}", by.identity),
                ));
                Ok(())
            }
            None => {
                let run = self.run(id).await?;
                Err(Fault::new(
                    Reason::WorkflowState,
                    format!(
                        "run {id} is over ({}) and cannot be cancelled",
                        run.status.name()
                    ),
                )
                .with("state", run.status.name()))
            }
        }
    }

    /// Records what somebody did about a stuck run.
    ///
    /// # Errors
    /// When there is no such run, or it is not stuck.
    pub async fn resolve(&self, id: &str, note: &str, by: &Caller) -> Result<(), Fault> {
        let run = self.run(id).await?;
        if run.status != RunStatus::Stuck {
            return Err(Fault::new(
                Reason::WorkflowState,
                format!("run {id} is {} and not stuck", run.status.name()),
            )
            .with("state", run.status.name()));
        }
        let resolved = Record::Resolved {
            by: by.identity.clone(),
            note: note.to_owned(),
        };
        self.0.journal.append(id, resolved).await?;
        lock(&self.0.maybe_held).retain(|(run, _)| run != id);
        Ok(())
    }

    /// Reads one run.
    ///
    /// # Errors
    /// When there is no such run.
    pub async fn run(&self, id: &str) -> Result<RunRow, Fault> {
        let run = self.0.journal.run(id).await?;
        run.ok_or_else(|| no_such_run(id))
    }

    /// Runs, newest first.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn runs(&self, filter: RunFilter) -> Result<Vec<RunRow>, Fault> {
        Ok(self.0.journal.runs(filter).await?)
    }

    /// The run that is changing a VM now.
    #[must_use]
    pub fn busy_with(&self, vm: &str) -> Option<String> {
        let turn = lock(&self.0.turns).get(vm).cloned()?;
        lock(&turn.holder).clone()
    }

    /// Removes what the audit trail need not keep any more.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub async fn prune_audit(&self) -> Result<(), Fault> {
        let journal = &self.0.config.journal;
        let before = match journal.keep_days {
            0 => Timestamp::MIN,
            days => {
                let hours = i64::from(days).saturating_mul(24);
                Timestamp::now() - jiff::SignedDuration::from_hours(hours)
            }
        };
        let gone = self
            .0
            .journal
            .prune_audit(before, journal.keep_audit)
            .await?;
        if gone > 0 {
            tracing::info!(
                entries = gone,
                "old entries were removed from the audit trail"
            );
        }
        Ok(())
    }

    /// Does that now and then, for ever.
    pub async fn keep_audit_short(self) {
        loop {
            if let Err(fault) = self.prune_audit().await {
                tracing::error!(%fault, "the audit trail cannot be shortened");
            }
            tokio::time::sleep(PRUNE_AUDIT).await;
        }
    }

    /// Takes no new runs, stops those that go on, and waits for them, but not
    /// for ever. Those that are still going on then are left open, which their
    /// watchers are told. Returns how many.
    pub async fn shut_down(&self) -> usize {
        self.0.stopping.store(true, Ordering::Release);
        let deadline =
            tokio::time::Instant::now() + Duration::from_secs(self.0.config.limits.shutdown);
        for live in lock(&self.0.live).values() {
            live.stop(Fault::new(
                Reason::ShuttingDown,
                "the agent was told to stop; what this run did was undone",
            ));
        }
        loop {
            let left: Vec<Arc<Live>> = lock(&self.0.live).values().cloned().collect();
            let goes_on = left.iter().any(|live| live.left_open().is_none());
            if !goes_on || tokio::time::Instant::now() >= deadline {
                for live in &left {
                    live.leave_open(Fault::new(
                        Reason::ShuttingDown,
                        format!(
                            "the agent stops while run {} goes on; it is undone or finished when \
                             the agent is back, and can be watched then from record {} on",
                            live.id,
                            live.last() + 1
                        ),
                    ));
                }
                return left.len();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// What is said of a run that is not there.
#[must_use]
pub fn no_such_run(id: &str) -> Fault {
    Fault::new(
        Reason::WorkflowNotFound,
        format!("there is no run '{}'", id.escape_debug()),
    )
    .with("workflow_id", id)
}

/// The turn on a VM, given back when dropped.
struct HeldTurn {
    turn: Arc<Turn>,
    _guard: OwnedMutexGuard<()>,
}

impl HeldTurn {
    fn new(turn: Arc<Turn>, guard: OwnedMutexGuard<()>, live: &Live) -> Self {
        *lock(&turn.holder) = Some(live.id.clone());
        Self {
            turn,
            _guard: guard,
        }
    }
}

impl Drop for HeldTurn {
    fn drop(&mut self) {
        *lock(&self.turn.holder) = None;
    }
}

/// The run that goes on and that a request belongs to: by its id, or without
/// one by what it asks.
fn going_on(
    live: &HashMap<String, Arc<Live>>,
    request: &Request,
    how: &Submission,
) -> Result<Option<String>, Fault> {
    let request_id = how.request_id.as_str();
    let seen = |run: &&Arc<Live>| how.sight.sees(&run.request.vm);
    let mut runs = live.values().filter(seen);
    if request_id.is_empty() {
        let equal = runs.find(|run| run.request == *request && !request.action.reads_only());
        return Ok(equal.map(|run| run.id.clone()));
    }
    runs.find(|run| run.request_id == request_id)
        .map(|run| same(request_id, request, &run.id, &run.request))
        .transpose()
}

/// The run `id`, if it is of the same request.
fn same(request_id: &str, request: &Request, id: &str, found: &Request) -> Result<String, Fault> {
    if found == request {
        return Ok(id.to_owned());
    }
    Err(Fault::new(
        Reason::RequestIdReused,
        format!(
            "request_id '{request_id}' belongs to run {id}, which is {} on VM '{}', not what is \
             asked now; use another id",
            found.action.name(),
            found.vm
        ),
    )
    .with("workflow_id", id))
}

fn folded(live: &Live) -> RunState {
    let records = live.records_from(1);
    let mut state = RunState::default();
    for record in &records {
        if let Err(illegal) = state.apply(&record.record) {
            tracing::error!(run = %live.id, %illegal, "the journal holds an impossible record");
            break;
        }
    }
    state
}

fn cancelled(live: &Live) -> Fault {
    live.stopped_because()
        .unwrap_or_else(|| Fault::new(Reason::Cancelled, "the run was cancelled"))
}

async fn refuse(log: &LiveLog, fault: Fault) -> Result<Closing, vmsnap_engine::LogError> {
    log.append(Record::Closed {
        closing: Closing::Refused,
        outcome: None,
        fault: Some(fault),
    })
    .await?;
    Ok(Closing::Refused)
}
