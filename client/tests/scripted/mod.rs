//! An agent whose one run follows a script, and whose events a test lets out.
#![allow(dead_code, reason = "each test uses its own part")]

use std::{
    collections::HashMap,
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex},
};

use tokio::{net::UnixListener, sync::watch};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, UnixListenerStream},
};
use tonic::{Request, Response, Status, transport::Server};
use tonic_types::{ErrorDetails, StatusExt as _};
use vmsnap_proto::{
    ERROR_DOMAIN,
    v1::{
        self,
        workflow_event::Kind,
        workflow_service_server::{WorkflowService, WorkflowServiceServer},
    },
};

/// The id of the run.
pub const ID: &str = "0199-run";

/// One run whose events are let out by the test.
#[derive(Clone)]
pub struct Scripted {
    pub events: Arc<Vec<v1::WorkflowEvent>>,
    pub closing: Option<Status>,
    pub refusal: Option<Status>,
    pub released: watch::Sender<usize>,
    pub runs: Arc<Mutex<Vec<v1::RunWorkflowRequest>>>,
    pub watches: Arc<Mutex<Vec<v1::WatchWorkflowRequest>>>,
}

impl Scripted {
    pub fn new(kinds: Vec<(u64, Kind)>) -> Self {
        let events = kinds.into_iter().map(|(sequence, kind)| v1::WorkflowEvent {
            workflow_id: ID.to_owned(),
            sequence,
            time: None,
            kind: Some(kind),
        });
        Scripted {
            events: Arc::new(events.collect()),
            closing: None,
            refusal: None,
            released: watch::Sender::new(0),
            runs: Arc::default(),
            watches: Arc::default(),
        }
    }

    /// Serves on a socket until the runtime ends.
    pub fn serve(&self, socket: &Path) {
        let listener = UnixListener::bind(socket).unwrap();
        tokio::spawn(
            Server::builder()
                .add_service(WorkflowServiceServer::new(self.clone()))
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
    }

    /// Lets out the first events, this many.
    pub fn release(&self, count: usize) {
        self.released.send_replace(count);
    }

    fn stream<T: Send + 'static>(
        &self,
        from: u64,
        closing: Option<Status>,
        wrap: fn(v1::WorkflowEvent) -> T,
    ) -> BoxStream<T> {
        let (sender, receiver) = tokio::sync::mpsc::channel(8);
        let events = Arc::clone(&self.events);
        let mut released = self.released.subscribe();
        tokio::spawn(async move {
            for (at, event) in events
                .iter()
                .enumerate()
                .filter(|(_, event)| event.sequence >= from)
            {
                if released.wait_for(|count| *count > at).await.is_err() {
                    return;
                }
                if sender.send(Ok(wrap(event.clone()))).await.is_err() {
                    return;
                }
            }
            if let Some(status) = closing {
                let _ = sender.send(Err(status)).await;
            }
        });
        Box::pin(ReceiverStream::new(receiver))
    }
}

type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl WorkflowService for Scripted {
    type RunWorkflowStream = BoxStream<v1::RunWorkflowResponse>;
    type WatchWorkflowStream = BoxStream<v1::WatchWorkflowResponse>;

    async fn run_workflow(
        &self,
        request: Request<v1::RunWorkflowRequest>,
    ) -> Result<Response<Self::RunWorkflowStream>, Status> {
        self.runs.lock().unwrap().push(request.into_inner());
        if let Some(refusal) = &self.refusal {
            return Err(refusal.clone());
        }
        let wrap = |event| v1::RunWorkflowResponse { event: Some(event) };
        Ok(Response::new(self.stream(0, self.closing.clone(), wrap)))
    }

    async fn watch_workflow(
        &self,
        request: Request<v1::WatchWorkflowRequest>,
    ) -> Result<Response<Self::WatchWorkflowStream>, Status> {
        let request = request.into_inner();
        let from = request.from_sequence;
        self.watches.lock().unwrap().push(request);
        let wrap = |event| v1::WatchWorkflowResponse { event: Some(event) };
        Ok(Response::new(self.stream(from, None, wrap)))
    }

    async fn plan_workflow(
        &self,
        _: Request<v1::PlanWorkflowRequest>,
    ) -> Result<Response<v1::PlanWorkflowResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn cancel_workflow(
        &self,
        _: Request<v1::CancelWorkflowRequest>,
    ) -> Result<Response<v1::CancelWorkflowResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn confirm_workflow(
        &self,
        _: Request<v1::ConfirmWorkflowRequest>,
    ) -> Result<Response<v1::ConfirmWorkflowResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn resolve_workflow(
        &self,
        _: Request<v1::ResolveWorkflowRequest>,
    ) -> Result<Response<v1::ResolveWorkflowResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list_guards(
        &self,
        _: Request<v1::ListGuardsRequest>,
    ) -> Result<Response<v1::ListGuardsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_workflow(
        &self,
        _: Request<v1::GetWorkflowRequest>,
    ) -> Result<Response<v1::GetWorkflowResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list_workflows(
        &self,
        _: Request<v1::ListWorkflowsRequest>,
    ) -> Result<Response<v1::ListWorkflowsResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// A step that begins.
pub fn step(index: u32) -> Kind {
    Kind::StepStarted(v1::EventStepStarted {
        index,
        ..Default::default()
    })
}

/// The end.
pub fn outcome(state: v1::WorkflowState, failure: Option<v1::Failure>) -> Kind {
    Kind::Outcome(v1::EventOutcome {
        state: state.into(),
        result: None,
        failure,
    })
}

/// A missing snapshot, as an agent says it.
pub fn refusal() -> Status {
    let mut details = ErrorDetails::new();
    details
        .set_error_info("SNAPSHOT_NOT_FOUND", ERROR_DOMAIN, HashMap::new())
        .add_help_link("what it means", "docs/errors/SNAPSHOT_NOT_FOUND.md");
    Status::with_error_details(
        tonic::Code::NotFound,
        "SNAPSHOT_NOT_FOUND: no such snapshot",
        details,
    )
}
