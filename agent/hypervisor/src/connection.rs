//! Connections: one for each lane, opened when a call needs it, and one for
//! events, kept open by a thread of its own that also tells whether libvirt is
//! there.
//!
//! Invariants: the event loop is registered before the first connection is
//! opened; a connection that broke, or on which a call is late, is never used
//! for another call; a handle is dropped where a panic of the binding is caught.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, Once, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::{broadcast, watch};
use virt::{connect::Connect, domain::Domain};

use crate::{
    counters,
    error::{Error, ErrorKind, Fault},
    events::{self, DomainEvent},
    lanes::{Asks, Bulk, Call, LANES, Lane, Lanes, OverdueCall},
    options::Options,
};

/// How many events wait for a slow subscriber.
const EVENTS: usize = 1024;
/// Pause between two tries to connect, growing to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// How long libvirt may be away before somebody has to act.
const ALARM: Duration = Duration::from_secs(60);

/// Whether libvirt is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkStatus {
    /// It answers.
    Up,
    /// It does not.
    Down {
        /// libvirt's words.
        why: String,
        /// Since when.
        since: SystemTime,
    },
}

/// The hypervisor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostInfo {
    /// libvirt's version as `major * 1_000_000 + minor * 1_000 + release`.
    pub libvirt_version: u64,
    /// Hypervisor type, such as `QEMU`.
    pub hypervisor: String,
    /// Its version in the same form.
    pub hypervisor_version: u64,
    /// Host name.
    pub hostname: String,
    /// Canonical connection URI.
    pub uri: String,
}

/// A handle to the hypervisor; cheap to clone.
#[derive(Clone)]
pub struct Hypervisor(pub(crate) Arc<Inner>);

impl fmt::Debug for Hypervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hypervisor")
            .field("uri", &self.0.options.uri)
            .finish_non_exhaustive()
    }
}

type Slots = Arc<[Mutex<Option<Connect>>; LANES]>;

pub(crate) struct Inner {
    pub options: Options,
    lanes: Lanes,
    slots: Slots,
    status: watch::Sender<LinkStatus>,
    /// Since when libvirt is not there.
    down: Arc<Mutex<Option<Instant>>>,
    events: broadcast::Sender<DomainEvent>,
    /// Snapshot XML by domain, name and creation time.
    pub snapshot_cache: crate::snapshot::Cache,
    keeper: Mutex<Option<std::sync::mpsc::Sender<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Closing the channel tells the keeper to end.
        lock(&self.keeper).take();
        for slot in self.slots.iter() {
            discard_aside(lock(slot).take());
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Drops a connection where a panic of the binding does no harm.
fn discard(connection: Option<Connect>) {
    if catch_unwind(AssertUnwindSafe(|| drop(connection))).is_err() {
        tracing::debug!("closing a broken connection failed");
    }
}

/// Drops a connection on a thread of its own: closing waits for a hung daemon.
fn discard_aside(connection: Option<Connect>) {
    if connection.is_none() {
        return;
    }
    let dropping = thread::Builder::new().spawn(move || discard(connection));
    if dropping.is_err() {
        tracing::warn!("no thread to close a connection");
    }
}

/// Drops the connection in a slot; whoever opens the next one does not wait for that.
fn empty(slot: &Mutex<Option<Connect>>) {
    let old = lock(slot).take();
    discard(old);
}

/// Starts libvirt's event loop on a thread of its own, once a process.
fn start_event_loop() {
    static START: Once = Once::new();
    START.call_once(|| {
        virt::error::clear_error_callback();
        if let Err(error) = virt::event::event_register_default_impl() {
            tracing::error!(%error, "libvirt's event loop cannot be registered");
            return;
        }
        let looping = thread::Builder::new()
            .name("libvirt-events".into())
            .spawn(|| {
                loop {
                    if virt::event::event_run_default_impl().is_err() {
                        thread::sleep(Duration::from_millis(100));
                    }
                }
            });
        if let Err(error) = looping {
            tracing::error!(%error, "libvirt's event loop has no thread");
        }
    });
}

fn open(options: &Options) -> Result<Connect, Fault> {
    let connection = Connect::open(Some(&options.uri))?;
    let interval = i32::try_from(options.keepalive_interval).unwrap_or(i32::MAX);
    // The test driver has no wire to keep alive.
    let _ = connection.set_keep_alive(interval, options.keepalive_count);
    Ok(connection)
}

impl Hypervisor {
    /// Connects, and starts to keep the connection.
    ///
    /// # Errors
    /// When libvirt cannot be reached at the URI within the connect deadline.
    pub async fn connect(options: Options) -> Result<Self, Error> {
        start_event_loop();
        let slots: Slots = Arc::default();
        let lanes = {
            let slots = slots.clone();
            Lanes::new(options.queue_deadline, move |lane| {
                // The late call keeps its own reference to the old connection.
                discard_aside(lock(&slots[lane.index()]).take());
            })
        };
        let hypervisor = Self(Arc::new(Inner {
            lanes,
            slots,
            status: watch::Sender::new(LinkStatus::Down {
                why: "not connected yet".into(),
                since: SystemTime::now(),
            }),
            down: Arc::new(Mutex::new(Some(Instant::now()))),
            events: broadcast::Sender::new(EVENTS),
            snapshot_cache: crate::snapshot::Cache::default(),
            keeper: Mutex::new(None),
            options,
        }));
        let uri = hypervisor.0.options.uri.clone();
        let call = Call {
            operation: "connect to",
            subject: uri,
            scope: None,
            deadline: hypervisor.0.options.connect_deadline,
            changes: false,
            asks: Asks::Nothing,
        };
        hypervisor
            .0
            .lanes
            .run(Lane::Read, call, {
                let inner = hypervisor.0.clone();
                move || inner.connection(Lane::Read).map(|_| ())
            })
            .await?;
        hypervisor.keep();
        // Events are registered by the keeper; whoever connects relies on them.
        let mut status = hypervisor.0.status.subscribe();
        let up = status.wait_for(|status| *status == LinkStatus::Up);
        let _ = tokio::time::timeout(hypervisor.0.options.connect_deadline, up).await;
        Ok(hypervisor)
    }

    /// Starts the thread that keeps the events' connection.
    fn keep(&self) {
        let (keeper, ended) = std::sync::mpsc::channel::<()>();
        *lock(&self.0.keeper) = Some(keeper);
        let (options, status, down, events, slots) = (
            self.0.options.clone(),
            self.0.status.clone(),
            self.0.down.clone(),
            self.0.events.clone(),
            self.0.slots.clone(),
        );
        let kept = thread::Builder::new()
            .name("libvirt-keeper".into())
            .spawn(move || {
                let mut pause = BACKOFF.0;
                let mut outage: Option<Outage> = None;
                loop {
                    let why = match open(&options) {
                        Ok(connection) => {
                            let (closed, told) = std::sync::mpsc::channel::<String>();
                            events::register(&connection, &events, closed);
                            *lock(&down) = None;
                            status.send_replace(LinkStatus::Up);
                            tracing::debug!("libvirt's events are registered");
                            if let Some(outage) = outage.take() {
                                outage.over();
                            }
                            pause = BACKOFF.0;
                            let why = loop {
                                match told.recv_timeout(Duration::from_millis(500)) {
                                    Ok(why) => break why,
                                    Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                                        break "the connection ended".to_owned();
                                    }
                                    Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
                                }
                                if ended.try_recv()
                                    == Err(std::sync::mpsc::TryRecvError::Disconnected)
                                {
                                    discard(Some(connection));
                                    return;
                                }
                            };
                            // Told before the old connections are closed, which may wait.
                            lock(&down).get_or_insert_with(Instant::now);
                            let since = outage.get_or_insert_with(Outage::begin).since;
                            let words = why.clone();
                            status.send_replace(LinkStatus::Down { why: words, since });
                            discard_aside(Some(connection));
                            // The others' sockets are to the same dead daemon.
                            for slot in slots.iter() {
                                discard_aside(lock(slot).take());
                            }
                            why
                        }
                        Err(fault) => fault.detail,
                    };
                    let since = outage.get_or_insert_with(Outage::begin).goes_on(&why);
                    status.send_replace(LinkStatus::Down { why, since });
                    if ended.recv_timeout(pause)
                        == Err(std::sync::mpsc::RecvTimeoutError::Disconnected)
                    {
                        return;
                    }
                    pause = (pause * 2).min(BACKOFF.1);
                }
            });
        if let Err(error) = kept {
            tracing::error!(%error, "nobody keeps the connection to libvirt");
        }
    }

    /// Events from now on; a subscriber that is too slow loses old ones.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<DomainEvent> {
        self.0.events.subscribe()
    }

    /// Whether libvirt is there, and how that changes.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<LinkStatus> {
        self.0.status.subscribe()
    }

    /// Calls past their deadline that libvirt has not answered yet.
    #[must_use]
    pub fn overdue(&self) -> usize {
        self.0.lanes.late()
    }

    /// The same, one by one, the oldest first.
    #[must_use]
    pub fn overdue_calls(&self) -> Vec<OverdueCall> {
        self.0.lanes.late_calls()
    }

    /// Calls that libvirt has now, those past their deadline included.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.0.lanes.in_flight()
    }

    /// Waits until no call on this domain is past its deadline any more.
    pub async fn settled(&self, domain: &str) {
        self.0.lanes.settled(domain).await;
    }

    /// Waits for a place among the calls that copy a whole memory or disk. Whoever
    /// makes such a call takes one before, while no guest is held, and keeps it until
    /// the call is over.
    ///
    /// Dropping the future gives the wait up.
    pub async fn bulk(&self) -> Bulk {
        self.0.lanes.bulk().await
    }

    /// Versions, name and address of the host.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn host(&self) -> Result<HostInfo, Error> {
        self.read("read the versions of", "the host", None, |connection| {
            Ok(HostInfo {
                libvirt_version: u64::from(connection.lib_version()?),
                hypervisor: connection.driver_type()?,
                hypervisor_version: u64::from(connection.hyp_version()?),
                hostname: connection.hostname()?,
                uri: connection.uri()?,
            })
        })
        .await
    }

    /// A reading call; repeated once when the connection broke under it.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        operation: &'static str,
        subject: impl Into<String>,
        scope: Option<&str>,
        work: impl Fn(&Connect) -> Result<T, Fault> + Send + Sync + 'static,
    ) -> Result<T, Error> {
        let subject = subject.into();
        let work = Arc::new(work);
        let mut again = true;
        loop {
            let (work, inner) = (work.clone(), self.0.clone());
            let call = Call {
                operation,
                subject: subject.clone(),
                scope: scope.map(str::to_owned),
                deadline: self.0.options.read_deadline,
                changes: false,
                asks: Asks::Nothing,
            };
            let result = self
                .call(Lane::Read, call, move || {
                    inner.with(Lane::Read, |connection| work(connection))
                })
                .await;
            match result {
                Err(error) if again && *error.kind() == ErrorKind::ConnectionLost => again = false,
                result => return result,
            }
        }
    }

    /// Makes a call, unless libvirt has been away for so long that it would only
    /// wait.
    async fn call<T: Send + 'static>(
        &self,
        lane: Lane,
        call: Call,
        work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Error> {
        let away = |call: &Call| call.error(Fault::new(ErrorKind::Unreachable, self.why_down()));
        if self.0.is_away() {
            return Err(away(&call));
        }
        let asked = call.clone();
        let result = tokio::select! {
            result = self.0.lanes.run(lane, call, work) => result,
            // What it does is known to change nothing: nobody has to wait for the end.
            () = self.is_gone(), if !asked.changes => return Err(away(&asked)),
        };
        match result {
            // It found no place among those that wait for a daemon that is gone, or
            // was one of those: only an effect may have come to something.
            Err(error)
                if self.0.is_down()
                    && (*error.kind() == ErrorKind::Busy
                        || (!asked.changes
                            && matches!(error.kind(), ErrorKind::Overdue { .. }))) =>
            {
                Err(away(&asked))
            }
            result => result,
        }
    }

    /// Waits until libvirt has been away for longer than a restart takes.
    async fn is_gone(&self) {
        let mut status = self.0.status.subscribe();
        loop {
            // The sender is in the handle itself.
            let _ = status.wait_for(|status| *status != LinkStatus::Up).await;
            if self.0.is_away() {
                return;
            }
            tokio::time::sleep(BACKOFF.0).await;
        }
    }

    fn why_down(&self) -> String {
        match &*self.0.status.borrow() {
            LinkStatus::Up => String::new(),
            LinkStatus::Down { why, .. } => why.clone(),
        }
    }

    /// Waits until libvirt is there.
    pub async fn is_there(&self) {
        let mut status = self.0.status.subscribe();
        // The sender is in the handle itself.
        let _ = status.wait_for(|status| *status == LinkStatus::Up).await;
    }

    /// A call that is made once.
    pub(crate) async fn once<T: Send + 'static>(
        &self,
        lane: Lane,
        operation: &'static str,
        subject: impl Into<String>,
        scope: &str,
        deadline: Duration,
        work: impl FnOnce(&Connect) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Error> {
        let inner = self.0.clone();
        let call = Call {
            operation,
            subject: subject.into(),
            scope: Some(scope.to_owned()),
            deadline,
            changes: lane != Lane::Read,
            asks: Asks::Nothing,
        };
        self.call(lane, call, move || inner.with(lane, work)).await
    }

    /// A call that asks the guest agent of a domain.
    pub(crate) async fn ask_guest<T: Send + 'static>(
        &self,
        asking: Asking,
        operation: &'static str,
        name: &str,
        deadline: Duration,
        work: impl FnOnce(&Domain) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Error> {
        let (inner, wanted) = (self.0.clone(), name.to_owned());
        let (lane, asks) = match asking {
            Asking::ToRelease | Asking::AfterRelease => (Lane::Release, Asks::Quick),
            Asking::ToHold => (Lane::Guest, Asks::Long),
            Asking::ToRead | Asking::ToChange => (Lane::Guest, Asks::Quick),
        };
        let call = Call {
            operation,
            subject: subject(name),
            scope: Some(name.to_owned()),
            deadline,
            changes: asking != Asking::ToRead,
            asks,
        };
        self.call(lane, call, move || {
            inner.with(lane, |connection| {
                work(&connection.lookup_domain_by_name(&wanted)?)
            })
        })
        .await
    }

    /// A reading call on one domain.
    pub(crate) async fn read_domain<T: Send + 'static>(
        &self,
        operation: &'static str,
        name: &str,
        work: impl Fn(&Domain) -> Result<T, Fault> + Send + Sync + 'static,
    ) -> Result<T, Error> {
        let wanted = name.to_owned();
        self.read(operation, subject(name), Some(name), move |connection| {
            work(&connection.lookup_domain_by_name(&wanted)?)
        })
        .await
    }

    /// A changing call on one domain that moves no bulk data.
    pub(crate) async fn effect<T: Send + 'static>(
        &self,
        operation: &'static str,
        name: &str,
        work: impl FnOnce(&Domain) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Error> {
        let deadline = self.0.options.effect_deadline;
        self.on_domain(Lane::Effect, operation, name, deadline, work)
            .await
    }

    /// A changing call on one domain that may copy much.
    pub(crate) async fn transfer<T: Send + 'static>(
        &self,
        operation: &'static str,
        name: &str,
        work: impl FnOnce(&Domain) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Error> {
        let deadline = self.0.options.transfer_deadline;
        self.on_domain(Lane::Effect, operation, name, deadline, work)
            .await
    }

    /// A call that lets go of a guest.
    pub(crate) async fn release<T: Send + 'static>(
        &self,
        operation: &'static str,
        name: &str,
        work: impl FnOnce(&Domain) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Error> {
        let deadline = self.0.options.release_deadline;
        self.on_domain(Lane::Release, operation, name, deadline, work)
            .await
    }

    pub(crate) async fn on_domain<T: Send + 'static>(
        &self,
        lane: Lane,
        operation: &'static str,
        name: &str,
        deadline: Duration,
        work: impl FnOnce(&Domain) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Error> {
        let wanted = name.to_owned();
        self.once(
            lane,
            operation,
            subject(name),
            name,
            deadline,
            move |connection| work(&connection.lookup_domain_by_name(&wanted)?),
        )
        .await
    }
}

/// What a guest agent is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asking {
    /// To tell something.
    ToRead,
    /// To change something.
    ToChange,
    /// To hold the guest.
    ToHold,
    /// To let go of it.
    ToRelease,
    /// Whether it let go.
    AfterRelease,
}

/// A time without libvirt, told once when it begins and once more when it lasts,
/// not at every try.
struct Outage {
    since: SystemTime,
    tries: u64,
    alarmed: bool,
}

impl Outage {
    fn begin() -> Self {
        Self {
            since: SystemTime::now(),
            tries: 0,
            alarmed: false,
        }
    }

    fn lasted(&self) -> Duration {
        self.since.elapsed().unwrap_or_default()
    }

    /// Tells of it if that is due; since when it lasts.
    fn goes_on(&mut self, why: &str) -> SystemTime {
        self.tries += 1;
        let seconds = self.lasted().as_secs();
        if self.tries == 1 {
            tracing::warn!(why, "the connection to libvirt is down");
        } else if !self.alarmed && self.lasted() >= ALARM {
            self.alarmed = true;
            tracing::error!(
                why,
                seconds,
                "libvirt is still not reachable: look whether its daemon runs"
            );
        } else {
            tracing::debug!(why, seconds, "libvirt is not reachable");
        }
        self.since
    }

    fn over(self) {
        counters::add(&counters::RECONNECTS);
        tracing::info!(
            seconds = self.lasted().as_secs(),
            "libvirt is reachable again"
        );
    }
}

/// A domain as it stands in errors.
pub(crate) fn subject(name: &str) -> String {
    format!("domain {name}")
}

impl Inner {
    fn is_down(&self) -> bool {
        lock(&self.down).is_some()
    }

    /// Whether libvirt is gone for longer than a restart takes.
    fn is_away(&self) -> bool {
        lock(&self.down).is_some_and(|since| since.elapsed() > self.options.reconnect_grace)
    }

    /// A lane's connection; opens it when there is none, and tries again for
    /// the grace time when libvirt is just being restarted.
    fn connection(&self, lane: Lane) -> Result<Connect, Fault> {
        if let Some(connection) = lock(&self.slots[lane.index()]).as_ref() {
            return Ok(connection.clone());
        }
        let until = Instant::now() + self.options.reconnect_grace;
        loop {
            match open(&self.options) {
                Ok(connection) => {
                    *lock(&self.slots[lane.index()]) = Some(connection.clone());
                    return Ok(connection);
                }
                Err(fault) if Instant::now() >= until || fault.kind == ErrorKind::Denied => {
                    return Err(Fault {
                        kind: match fault.kind {
                            ErrorKind::Denied => ErrorKind::Denied,
                            _ => ErrorKind::Unreachable,
                        },
                        ..fault
                    });
                }
                Err(_) => thread::sleep(BACKOFF.0),
            }
        }
    }

    /// Makes a call; a socket that was known to be dead before anything was
    /// sent is replaced, and the call made then.
    fn with<T>(
        &self,
        lane: Lane,
        work: impl FnOnce(&Connect) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let mut connection = self.connection(lane)?;
        if !connection.is_alive().unwrap_or(false) {
            empty(&self.slots[lane.index()]);
            discard(Some(connection));
            connection = self.connection(lane)?;
        }
        let result = work(&connection);
        if let Err(fault) = &result
            && matches!(
                fault.kind,
                ErrorKind::ConnectionLost | ErrorKind::Unreachable
            )
        {
            empty(&self.slots[lane.index()]);
        }
        discard(Some(connection));
        result
    }
}
