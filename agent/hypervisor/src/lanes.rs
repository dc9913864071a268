//! Where libvirt's blocking calls run: threads behind lanes, each call under a deadline.
//!
//! libvirtd serves five requests of a connection and twenty in all at a time, and beyond that even an
//! idle connection gets no answer. Hence the bounds:
//! - a lane has four calls in flight, that of the guests five. All lanes together have seventeen: eight
//!   reads and effects, four releases, and five that wait for an answer out of a guest;
//! - one domain (or pool) has two reads, two effects, two questions to its guest and one release in
//!   flight, so that a hung one cannot fill a lane;
//! - calls that copy a whole memory or disk may take hours: two of them have places at a time, and the
//!   others wait for those before they ask for one in a lane. So no guest stands still while others are
//!   merged;
//! - what is asked of agents that did not answer last time has two places in the guests' lane and two in
//!   the releases', and freezes of the others have two, too: hooks in the guest take their time. So
//!   neither holding a guest nor letting it go waits for the agents of others, however many hang;
//! - a call past its deadline is *late*: its caller gets an answer, the thread goes on, the lane goes on
//!   over a new connection, and further calls on that domain, releases apart, are refused as busy until
//!   the late one came back. It stays counted among those in flight until then.
//!
//! libvirt keeps its last error per thread: the closure that makes a call also reads the error. The
//! binding can panic when a handle is dropped: a panic ends at the thread's edge and is an error.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tracing::{Instrument as _, Span, debug, warn};

use crate::counters;
use crate::error::{Error, ErrorKind, Fault};
use crate::failpoint;

const PER_LANE: usize = 4;
/// Reads and effects in flight.
const IN_FLIGHT: usize = 8;
/// Calls in flight that wait for an answer out of a guest.
const GUESTS: usize = 5;
/// Places in a lane for what is asked of agents that did not answer last time.
const PATIENT: usize = 2;
/// Places for calls that copy much.
const BULK: usize = 2;
/// Places for freezes of agents that answered.
const FREEZES: usize = 2;
/// A guest agent that was asked for so long and gave no answer counts as silent.
const SILENT: Duration = Duration::from_secs(1);
/// An idle thread ends after this.
const IDLE: Duration = Duration::from_secs(30);
/// A late call may be about to come back: that long the next one on the same domain waits for it.
const SETTLE: Duration = Duration::from_secs(2);

/// Which connection a call uses and whom it may wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    Read,
    Effect,
    Release,
    /// Waits for an answer out of a guest, and holds nobody that could be let go.
    Guest,
}

/// Number of lanes.
pub(crate) const LANES: usize = 4;

impl Lane {
    pub fn index(self) -> usize {
        self as usize
    }
}

/// What a call is, for its limits and its error.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub operation: &'static str,
    pub subject: String,
    /// The domain or pool that a hang of this call would belong to.
    pub scope: Option<String>,
    pub deadline: Duration,
    /// It changes something.
    pub changes: bool,
    /// It asks the domain's guest agent.
    pub asks: Asks,
}

/// What a call wants of a guest agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asks {
    /// Nothing.
    Nothing,
    /// What an agent that is well answers at once.
    Quick,
    /// What may take its time: a freeze runs the guest's own hooks.
    Long,
}

impl Call {
    pub fn error(&self, fault: Fault) -> Error {
        Error::new(self.operation, self.subject.clone(), fault)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A call past its deadline that libvirt has not answered yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OverdueCall {
    /// What it does, such as `resume`.
    pub operation: &'static str,
    /// To what, such as `domain web1`.
    pub subject: String,
    /// When it was made.
    pub since: Instant,
}

/// Calls of all lanes that are late.
type Late = Mutex<Vec<OverdueCall>>;

/// The places that one domain or pool has in the lanes.
struct Gate {
    lanes: [Arc<Semaphore>; LANES],
    /// The guest agent did not answer last time.
    silent: AtomicBool,
    late: Mutex<Vec<(&'static str, Instant)>>,
    settled: Notify,
}

impl Gate {
    fn new() -> Self {
        let places = |n| Arc::new(Semaphore::new(n));
        Self {
            lanes: [places(2), places(2), places(1), places(2)],
            silent: AtomicBool::new(false),
            late: Mutex::default(),
            settled: Notify::new(),
        }
    }

    async fn wait_settled(&self) {
        loop {
            let notified = self.settled.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if lock(&self.late).is_empty() {
                return;
            }
            notified.await;
        }
    }

    fn late_words(&self) -> Option<String> {
        let late = lock(&self.late);
        let (operation, since) = late.first()?;
        Some(format!(
            "an earlier call ({operation}) has been with libvirt for {} s and has not come back",
            since.elapsed().as_secs()
        ))
    }
}

#[derive(PartialEq)]
enum Phase {
    InFlight,
    Late,
    Done,
}

/// One call between its thread and whoever watches its deadline.
struct Ticket {
    phase: Mutex<Phase>,
    call: OverdueCall,
    /// It asks the guest agent.
    asks: bool,
    gate: Option<Arc<Gate>>,
}

/// A place among the calls that copy much, for as long as it is kept.
#[derive(Debug)]
#[must_use]
pub struct Bulk {
    _place: Option<OwnedSemaphorePermit>,
}

/// Threads, bounds and late calls of all lanes.
pub(crate) struct Lanes {
    lanes: [Arc<Semaphore>; LANES],
    in_flight: Arc<Semaphore>,
    release_in_flight: Arc<Semaphore>,
    guest_in_flight: Arc<Semaphore>,
    patient: Arc<Semaphore>,
    freezes: Arc<Semaphore>,
    patient_release: Arc<Semaphore>,
    bulk: Arc<Semaphore>,
    gates: Mutex<HashMap<String, Arc<Gate>>>,
    late: Arc<Late>,
    queue_deadline: Duration,
    on_late: Arc<dyn Fn(Lane) + Send + Sync>,
    threads: Arc<Threads>,
}

impl Lanes {
    /// `on_late` is told of every lane on which a call became late.
    pub fn new(queue_deadline: Duration, on_late: impl Fn(Lane) + Send + Sync + 'static) -> Self {
        let places = |n| Arc::new(Semaphore::new(n));
        Self {
            lanes: [PER_LANE, PER_LANE, PER_LANE, GUESTS].map(places),
            in_flight: places(IN_FLIGHT),
            release_in_flight: places(PER_LANE),
            guest_in_flight: places(GUESTS),
            patient: places(PATIENT),
            freezes: places(FREEZES),
            patient_release: places(PATIENT),
            bulk: places(BULK),
            gates: Mutex::default(),
            late: Arc::default(),
            queue_deadline,
            on_late: Arc::new(on_late),
            threads: Arc::default(),
        }
    }

    /// Calls past their deadline that libvirt has not answered yet.
    pub fn late(&self) -> usize {
        lock(&self.late).len()
    }

    /// The same, one by one, the oldest first.
    pub fn late_calls(&self) -> Vec<OverdueCall> {
        let mut calls = lock(&self.late).clone();
        calls.sort_by_key(|call| call.since);
        calls
    }

    /// Calls that libvirt has now, late ones included.
    pub fn in_flight(&self) -> usize {
        let free = self.in_flight.available_permits()
            + self.release_in_flight.available_permits()
            + self.guest_in_flight.available_permits();
        (IN_FLIGHT + PER_LANE + GUESTS).saturating_sub(free)
    }

    /// Waits, however long that takes, for a place among the calls that copy much.
    ///
    /// Dropping the future gives the wait up.
    pub async fn bulk(&self) -> Bulk {
        Bulk {
            _place: acquire(&self.bulk).await.ok(),
        }
    }

    /// Waits until no call on `scope` is late.
    pub async fn settled(&self, scope: &str) {
        let gate = lock(&self.gates).get(scope).cloned();
        if let Some(gate) = gate {
            gate.wait_settled().await;
        }
    }

    /// Runs `work` on a thread of its own and waits for it no longer than the call's deadline.
    ///
    /// Dropping the future does not stop the call; it stays counted until it comes back.
    pub async fn run<T, F>(&self, lane: Lane, call: Call, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T, Fault> + Send + 'static,
    {
        let gate = call.scope.as_deref().map(|scope| self.gate(scope));
        let turn = async {
            if lane != Lane::Release
                && let Some(gate) = &gate
            {
                // Not an error yet: the late call may be about to come back.
                let _ = tokio::time::timeout(SETTLE, gate.wait_settled()).await;
                refuse_if_late(gate)?;
            }
            let place = match &gate {
                Some(gate) => Some(acquire(&gate.lanes[lane.index()]).await?),
                None => None,
            };
            if lane != Lane::Release
                && let Some(gate) = &gate
            {
                refuse_if_late(gate)?;
            }
            let silent = gate
                .as_ref()
                .is_some_and(|gate| gate.silent.load(Ordering::Relaxed));
            let patient = match (call.asks, lane) {
                (Asks::Nothing, _) => None,
                (Asks::Quick, _) if !silent => None,
                (Asks::Long, _) if !silent => Some(acquire(&self.freezes).await?),
                (_, Lane::Release) => Some(acquire(&self.patient_release).await?),
                _ => Some(acquire(&self.patient).await?),
            };
            let in_lane = acquire(&self.lanes[lane.index()]).await?;
            let in_all = acquire(match lane {
                Lane::Release => &self.release_in_flight,
                Lane::Guest => &self.guest_in_flight,
                Lane::Read | Lane::Effect => &self.in_flight,
            })
            .await?;
            Ok((in_lane, (place, patient, in_all)))
        };
        let (in_lane, held) = match tokio::time::timeout(self.queue_deadline, turn).await {
            Ok(turn) => turn.map_err(|fault| call.error(fault))?,
            Err(_) => {
                let detail = format!(
                    "no place for the call within {} s, {} late calls",
                    self.queue_deadline.as_secs(),
                    self.late()
                );
                return Err(call.error(Fault::new(ErrorKind::Busy, detail)));
            }
        };

        if call.changes {
            debug!(
                operation = call.operation,
                subject = call.subject,
                "effect begins"
            );
        }
        let ticket = Arc::new(Ticket {
            phase: Mutex::new(Phase::InFlight),
            call: OverdueCall {
                operation: call.operation,
                subject: call.subject.clone(),
                since: Instant::now(),
            },
            asks: call.asks != Asks::Nothing,
            gate,
        });
        let (answer, answered) = oneshot::channel();
        let effect = call.changes.then_some(call.operation);
        let work = move || match effect {
            Some(operation) => failpoint::effect(operation, work),
            None => work(),
        };
        let job = {
            let (ticket, late) = (ticket.clone(), self.late.clone());
            // The thread's lines belong to the run whose call it makes.
            let span = Span::current();
            Box::new(move || {
                let _within = span.enter();
                let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
                    Err(Fault::new(
                        ErrorKind::CallPanicked,
                        panic_words(panic.as_ref()),
                    ))
                });
                // The places are free before the caller goes on: its next call finds them.
                ticket.came_back(&late, held, result.as_ref().err());
                let _ = answer.send(result);
            })
        };
        if let Err(error) = self.threads.submit(job) {
            let detail = format!("no thread for the call: {error}");
            return Err(call.error(Fault::new(ErrorKind::Busy, detail)));
        }

        // A task of its own, so that a caller that goes away does not leave the deadline unwatched.
        let (late, on_late, deadline) = (self.late.clone(), self.on_late.clone(), call.deadline);
        let watching = async move {
            let mut answered = answered;
            let result = match tokio::time::timeout(deadline, &mut answered).await {
                Ok(result) => result,
                Err(_) if ticket.overrun(&late) => {
                    on_late(lane);
                    drop(in_lane);
                    return Err(Fault::new(ErrorKind::Overdue { after: deadline }, ""));
                }
                // It came back at the very moment of its deadline.
                Err(_) => answered.await,
            };
            drop(in_lane);
            result.unwrap_or_else(|_| {
                Err(Fault::new(
                    ErrorKind::Other,
                    "the call's thread ended early",
                ))
            })
        };
        let result = tokio::spawn(watching.instrument(Span::current()))
            .await
            .unwrap_or_else(|_| Err(Fault::new(ErrorKind::Other, "the runtime is shutting down")));
        result.map_err(|fault| call.error(fault))
    }

    fn gate(&self, scope: &str) -> Arc<Gate> {
        let mut gates = lock(&self.gates);
        if gates.len() > 1024 {
            // A gate that nobody holds has no call in flight, late ones included.
            gates.retain(|_, gate| Arc::strong_count(gate) > 1);
        }
        gates
            .entry(scope.to_owned())
            .or_insert_with(|| Arc::new(Gate::new()))
            .clone()
    }
}

async fn acquire(semaphore: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Fault> {
    // The semaphores are never closed; if one were, the agent is on its way out.
    let permit = semaphore.clone().acquire_owned().await;
    permit.map_err(|_| Fault::new(ErrorKind::Busy, "the lanes are closed"))
}

fn refuse_if_late(gate: &Gate) -> Result<(), Fault> {
    match gate.late_words() {
        Some(words) => Err(Fault::new(ErrorKind::Busy, words)),
        None => Ok(()),
    }
}

fn panic_words(panic: &(dyn std::any::Any + Send)) -> String {
    let words = panic.downcast_ref::<String>().map(String::as_str);
    let words = words.or_else(|| panic.downcast_ref::<&str>().copied());
    words.unwrap_or("no message").to_owned()
}

impl Ticket {
    /// The deadline passed. False when the call came back first.
    fn overrun(&self, late: &Late) -> bool {
        let mut phase = lock(&self.phase);
        if *phase != Phase::InFlight {
            return false;
        }
        *phase = Phase::Late;
        lock(late).push(self.call.clone());
        counters::add(&counters::OVERDUE);
        if let Some(gate) = &self.gate {
            lock(&gate.late).push((self.call.operation, self.call.since));
        }
        warn!(
            operation = self.call.operation,
            subject = self.call.subject,
            seconds = self.call.since.elapsed().as_secs(),
            "libvirt has not answered a call within its deadline"
        );
        true
    }

    /// The call ended: it is no longer late, and its places (`held`) are free.
    ///
    /// Both at once, under the locks of the late calls: whoever sees that nothing is late finds
    /// the places free, and whoever gets such a place finds nothing late.
    fn came_back(&self, late: &Late, held: impl Sized, fault: Option<&Fault>) {
        if let (true, Some(gate)) = (self.asks, &self.gate) {
            let silent = fault.is_some() && self.call.since.elapsed() >= SILENT;
            gate.silent.store(silent, Ordering::Relaxed);
        }
        let mut phase = lock(&self.phase);
        if std::mem::replace(&mut *phase, Phase::Done) != Phase::Late {
            return;
        }
        let mut all = lock(late);
        if let Some(at) = all.iter().position(|call| *call == self.call) {
            all.swap_remove(at);
        }
        if let Some(gate) = &self.gate {
            let mut calls = lock(&gate.late);
            if let Some(at) = calls
                .iter()
                .position(|call| *call == (self.call.operation, self.call.since))
            {
                calls.swap_remove(at);
            }
            drop(held);
            drop(calls);
            gate.settled.notify_waiters();
        } else {
            drop(held);
        }
        drop(all);
        warn!(
            operation = self.call.operation,
            subject = self.call.subject,
            seconds = self.call.since.elapsed().as_secs(),
            failed = fault.map(|fault| fault.to_string()),
            "a call past its deadline came back"
        );
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// Threads that grow with the work; what bounds them are the lanes' places.
#[derive(Default)]
struct Threads {
    state: Mutex<ThreadsState>,
    work: Condvar,
}

#[derive(Default)]
struct ThreadsState {
    queue: VecDeque<Job>,
    idle: usize,
    started: usize,
}

impl Threads {
    fn submit(self: &Arc<Self>, job: Job) -> std::io::Result<()> {
        let mut state = lock(&self.state);
        state.queue.push_back(job);
        if state.idle >= state.queue.len() {
            self.work.notify_one();
            return Ok(());
        }
        state.started += 1;
        let threads = self.clone();
        let spawned = std::thread::Builder::new()
            .name(format!("libvirt-call-{}", state.started))
            .spawn(move || threads.serve());
        if let Err(error) = spawned {
            state.queue.pop_back();
            return Err(error);
        }
        Ok(())
    }

    fn serve(&self) {
        let mut state = lock(&self.state);
        loop {
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                job();
                state = lock(&self.state);
                continue;
            }
            state.idle += 1;
            let (woken, wait) = self
                .work
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if wait.timed_out() && state.queue.is_empty() {
                debug!("an idle call thread ends");
                return;
            }
        }
    }
}

#[cfg(test)]
#[path = "lanes_tests.rs"]
mod tests;
