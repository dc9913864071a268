//! Following a run to its end, through broken connections.
//!
//! Purpose: a run belongs to the agent, so losing the connection loses nothing
//! but the view. A [`RunStream`] comes back by itself: with the workflow's id it
//! watches from the event after the last one; without it, it runs the same
//! request id again, which joins.
//!
//! Invariants: no numbered event is given twice, and none is left out; a request
//! that may have reached the agent is never sent again under another id; the
//! outcome is the last event; the time without a connection is bounded.

use std::{error::Error as _, time::Duration};

use prost_types::Duration as WireDuration;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Request, Status, Streaming};
use vmsnap_proto::v1::{self, workflow_event::Kind};

use crate::{
    client::Client,
    error::{Error, distrust, is_transport},
    failure::Failure,
};

/// How long a stream tries to come back unless the caller says otherwise: long
/// enough for an agent's restart.
pub const REATTACH_WITHIN: Duration = Duration::from_secs(120);

const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);

/// How long the status behind a failed run's outcome is waited for.
const STATUS_PATIENCE: Duration = Duration::from_secs(2);

/// The agent's reason when its journal cannot be written.
const JOURNAL_UNAVAILABLE: &str = "JOURNAL_UNAVAILABLE";

/// How a workflow is run.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// Joins the run of the same id; made here when empty, so that coming back
    /// joins as well.
    pub request_id: String,
    /// Run only if the plan has this hash; any plan when empty.
    pub plan_hash: String,
    /// The agent cancels the run when it takes longer.
    pub timeout: Option<Duration>,
    /// Join a finished run of this request id too.
    pub join_finished: bool,
    /// How long the stream tries to come back after a broken connection.
    pub reattach_within: Duration,
}

impl Default for RunOptions {
    fn default() -> Self {
        RunOptions {
            request_id: String::new(),
            plan_hash: String::new(),
            timeout: None,
            join_finished: false,
            reattach_within: REATTACH_WITHIN,
        }
    }
}

/// What happened to the connection below a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Connection {
    /// It broke, or could not be made again; tries go on.
    Lost {
        /// Why, on one line.
        because: String,
    },
    /// It is back, and no event was lost.
    Restored,
}

/// What a run came to.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The run's id.
    pub workflow_id: String,
    /// How it ended.
    pub state: v1::WorkflowState,
    /// What it achieved; empty fields when it failed.
    pub result: v1::WorkflowResult,
    /// Why it did not succeed.
    pub failure: Option<Failure>,
    /// The plan that it followed, when its event was seen.
    pub plan: Option<v1::Plan>,
    /// Warnings of the plan and of the run, in their order, each once.
    pub warnings: Vec<v1::Warning>,
    /// How many numbered events were seen.
    pub events: u64,
    /// How often the connection had to be made again.
    pub reattachments: u32,
}

impl Finished {
    /// Whether the run did what was asked.
    #[must_use]
    pub fn succeeded(&self) -> bool {
        self.state == v1::WorkflowState::Succeeded
    }
}

type Listener = Box<dyn FnMut(&Connection) + Send>;

/// The events of one run. See the module for what it promises.
///
/// [`RunStream::next`] may be dropped and called again, as `select!` does.
pub struct RunStream {
    client: Client,
    start: Option<v1::RunWorkflowRequest>,
    source: Option<Source>,
    tried_once: bool,
    workflow_id: Option<String>,
    last_sequence: u64,
    reattach_within: Duration,
    outage: Option<Outage>,
    outcome: Option<v1::EventOutcome>,
    plan: Option<v1::Plan>,
    warnings: Vec<v1::Warning>,
    events: u64,
    reattachments: u32,
    closing: Option<Failure>,
    listener: Option<Listener>,
}

enum Source {
    Run(Streaming<v1::RunWorkflowResponse>),
    Watch(Streaming<v1::WatchWorkflowResponse>),
}

/// A time without a connection.
struct Outage {
    since: Instant,
    backoff: Duration,
    next_try: Instant,
}

impl RunStream {
    pub(crate) fn run(client: Client, spec: v1::WorkflowSpec, options: RunOptions) -> Self {
        let request_id = if options.request_id.is_empty() {
            uuid::Uuid::now_v7().to_string()
        } else {
            options.request_id
        };
        let request = v1::RunWorkflowRequest {
            spec: Some(spec),
            request_id,
            plan_hash: options.plan_hash,
            timeout: options.timeout.map(to_wire),
            join_finished: options.join_finished,
        };
        Self::new(client, Some(request), None, 0, options.reattach_within)
    }

    pub(crate) fn watch(
        client: Client,
        workflow_id: &str,
        from_sequence: u64,
        reattach_within: Duration,
    ) -> Self {
        let last = from_sequence.saturating_sub(1);
        Self::new(
            client,
            None,
            Some(workflow_id.to_owned()),
            last,
            reattach_within,
        )
    }

    fn new(
        client: Client,
        start: Option<v1::RunWorkflowRequest>,
        workflow_id: Option<String>,
        last_sequence: u64,
        reattach_within: Duration,
    ) -> Self {
        RunStream {
            client,
            start,
            source: None,
            tried_once: false,
            workflow_id,
            last_sequence,
            reattach_within,
            outage: None,
            outcome: None,
            plan: None,
            warnings: Vec::new(),
            events: 0,
            reattachments: 0,
            closing: None,
            listener: None,
        }
    }

    /// Has a listener told when the connection breaks and when it is back.
    #[must_use]
    pub fn on_connection(mut self, listener: impl FnMut(&Connection) + Send + 'static) -> Self {
        self.listener = Some(Box::new(listener));
        self
    }

    /// The run's id, known from the first event on.
    #[must_use]
    pub fn workflow_id(&self) -> Option<&str> {
        self.workflow_id.as_deref()
    }

    /// The request id under which the run can be joined; `None` for a watch.
    #[must_use]
    pub fn request_id(&self) -> Option<&str> {
        self.start
            .as_ref()
            .map(|request| request.request_id.as_str())
    }

    /// The next event; `None` after the outcome. Heartbeats are not given.
    ///
    /// # Errors
    /// [`Error::Failed`] when the agent refuses the call, [`Error::Lost`] when
    /// the connection did not come back in time, and what connecting has.
    pub async fn next(&mut self) -> Result<Option<v1::WorkflowEvent>, Error> {
        loop {
            if self.outcome.is_some() {
                self.drain().await;
                return Ok(None);
            }
            let Some(source) = &mut self.source else {
                self.attach().await?;
                continue;
            };
            let message = match source {
                Source::Run(stream) => stream.message().await.map(|m| m.and_then(|m| m.event)),
                Source::Watch(stream) => stream.message().await.map(|m| m.and_then(|m| m.event)),
            };
            match message {
                Ok(Some(event)) => {
                    if let Some(event) = self.accept(event) {
                        return Ok(Some(event));
                    }
                }
                // An end without an outcome is a cut, whatever it looks like.
                Ok(None) => {
                    self.lost(Status::unavailable("the stream ended before the outcome"))?
                }
                Err(status) => self.lost(status)?,
            }
        }
    }

    /// Follows the run to its end, showing every event.
    ///
    /// # Errors
    /// As [`RunStream::next`]; a run that failed is no error here.
    pub async fn to_end(
        mut self,
        mut show: impl FnMut(&v1::WorkflowEvent),
    ) -> Result<Finished, Error> {
        while let Some(event) = self.next().await? {
            show(&event);
        }
        self.finished()
            .ok_or_else(|| self.lost_for_good(&Status::unavailable("no outcome")))
    }

    /// What the run came to; `None` before its outcome was seen. The failure is
    /// complete once [`RunStream::next`] has given `None`.
    #[must_use]
    pub fn finished(&self) -> Option<Finished> {
        let outcome = self.outcome.as_ref()?;
        let failure = outcome.failure.as_ref().map(|failure| {
            let mut failure = Failure::from(failure);
            if let Some(closing) = &self.closing {
                failure.enrich(closing.clone());
            }
            failure
        });
        Some(Finished {
            workflow_id: self.workflow_id.clone().unwrap_or_default(),
            state: outcome.state(),
            result: outcome.result.clone().unwrap_or_default(),
            failure: failure.or_else(|| self.closing.clone()),
            plan: self.plan.clone(),
            warnings: self.warnings.clone(),
            events: self.events,
            reattachments: self.reattachments,
        })
    }

    /// Notes what an event says, and drops what was given already.
    fn accept(&mut self, event: v1::WorkflowEvent) -> Option<v1::WorkflowEvent> {
        if self.outage.take().is_some() {
            self.reattachments += 1;
            self.tell(&Connection::Restored);
        }
        if self.workflow_id.is_none() && !event.workflow_id.is_empty() {
            self.workflow_id = Some(event.workflow_id.clone());
        }
        match &event.kind {
            Some(Kind::Heartbeat(_)) => return None,
            // Not numbered: these carry the last number.
            Some(Kind::StepProgress(_)) => return Some(event),
            _ => {}
        }
        if event.sequence <= self.last_sequence {
            return None;
        }
        self.last_sequence = event.sequence;
        self.events += 1;
        match &event.kind {
            Some(Kind::Planned(planned)) => {
                self.plan.clone_from(&planned.plan);
                for warning in planned.plan.iter().flat_map(|plan| &plan.warnings) {
                    self.warn(warning);
                }
            }
            Some(Kind::Warning(warning)) => self.warn(warning),
            Some(Kind::Outcome(outcome)) => self.outcome = Some(outcome.clone()),
            _ => {}
        }
        Some(event)
    }

    fn warn(&mut self, warning: &v1::Warning) {
        if !self.warnings.contains(warning) {
            self.warnings.push(warning.clone());
        }
    }

    /// Opens the stream, waiting first when the last try was just now.
    async fn attach(&mut self) -> Result<(), Error> {
        if let Some(outage) = &self.outage {
            sleep(outage.next_try.saturating_duration_since(Instant::now())).await;
        }
        let mut service = self.client.workflows_service();
        let opened = match (&self.workflow_id, &self.start) {
            (Some(id), _) => {
                let request = v1::WatchWorkflowRequest {
                    workflow_id: id.clone(),
                    from_sequence: self.last_sequence + 1,
                };
                let opening = service.watch_workflow(Request::new(request));
                opening
                    .await
                    .map(|answer| Source::Watch(answer.into_inner()))
            }
            (None, Some(start)) => {
                let mut request = start.clone();
                // The first try may have run and finished unseen; running again would do it twice.
                request.join_finished |= self.tried_once;
                self.tried_once = true;
                let opening = service.run_workflow(Request::new(request));
                opening.await.map(|answer| Source::Run(answer.into_inner()))
            }
            (None, None) => {
                return Err(self.lost_for_good(&Status::unavailable("no workflow to follow")));
            }
        };
        match opened {
            Ok(source) => {
                self.source = Some(source);
                Ok(())
            }
            Err(status) => self.lost(status),
        }
    }

    /// Decides what a broken stream means: try again, or give up with an error.
    fn lost(&mut self, status: Status) -> Result<(), Error> {
        self.source = None;
        if !self.may_come_back(&status) {
            return Err(Error::answered(self.client.endpoint(), status));
        }
        let now = Instant::now();
        let outage = self.outage.get_or_insert(Outage {
            since: now,
            backoff: FIRST_BACKOFF,
            next_try: now,
        });
        let next_try = now + outage.backoff;
        if next_try.duration_since(outage.since) > self.reattach_within {
            return Err(self.lost_for_good(&status));
        }
        outage.next_try = next_try;
        outage.backoff = (outage.backoff * 2).min(LONGEST_BACKOFF);
        let because = one_line(&status);
        self.tell(&Connection::Lost { because });
        Ok(())
    }

    /// A cut connection comes back, and so does an agent that was stopped while
    /// it followed a run for us. An agent that answers a first call with
    /// "unavailable" and a reason has refused it; one whose journal cannot be written
    /// needs somebody's help before the run goes on.
    fn may_come_back(&self, status: &Status) -> bool {
        // What was not trusted now will not be in a moment.
        if distrust(status).is_some() {
            return false;
        }
        is_transport(status)
            || (status.code() == Code::Unavailable
                && self.workflow_id.is_some()
                && Failure::from(status).reason != JOURNAL_UNAVAILABLE)
    }

    fn lost_for_good(&self, status: &Status) -> Error {
        Error::Lost {
            endpoint: self.client.endpoint().clone(),
            workflow_id: self.workflow_id.clone(),
            source: one_line(status).into(),
        }
    }

    /// Reads the status behind the outcome: it may know more than the outcome,
    /// such as the reason's page.
    async fn drain(&mut self) {
        let Some(mut source) = self.source.take() else {
            return;
        };
        let rest = async {
            loop {
                let message = match &mut source {
                    Source::Run(stream) => stream.message().await.map(|m| m.is_some()),
                    Source::Watch(stream) => stream.message().await.map(|m| m.is_some()),
                };
                match message {
                    Ok(true) => {}
                    Ok(false) => return None,
                    Err(status) => return Some(Failure::from(&status)),
                }
            }
        };
        self.closing = timeout(STATUS_PATIENCE, rest)
            .await
            .ok()
            .flatten()
            .filter(Failure::is_from_agent);
    }

    fn tell(&mut self, connection: &Connection) {
        if let Some(listener) = &mut self.listener {
            listener(connection);
        }
    }
}

/// A status with its innermost cause, which is what says "connection refused".
fn one_line(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = status.source();
    let mut innermost = None;
    while let Some(error) = cause {
        innermost = Some(error.to_string());
        cause = error.source();
    }
    if let Some(innermost) = innermost.filter(|innermost| !text.contains(innermost.as_str())) {
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&innermost);
    }
    text
}

/// A duration as the wire has it. What does not fit its seconds is the longest
/// that does.
#[must_use]
pub fn to_wire(duration: Duration) -> WireDuration {
    WireDuration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or_default(),
    }
}

/// A duration of the wire; `None` when it is negative, which none is.
#[must_use]
pub fn from_wire(duration: prost_types::Duration) -> Option<Duration> {
    let seconds = u64::try_from(duration.seconds).ok()?;
    Some(Duration::new(seconds, u32::try_from(duration.nanos).ok()?))
}
