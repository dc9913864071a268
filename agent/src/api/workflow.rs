//! `WorkflowService`.

use std::{pin::Pin, sync::Arc, time::Duration};

use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};
use vmsnap_proto::v1::{self, workflow_service_server::WorkflowService};

use super::{
    access::{self, ID_MOST, bounded},
    errors, paging, reply, spec,
    veil::{Veil, Veiled},
};
use crate::{
    flow::Record,
    journal::{RunFilter, RunStatus},
    planning::{Fault, names, request::Action},
    trust::{Deed, Did, Over, Role},
    workflows::{Event, Submission, Workflows},
};

const PAGE: u32 = 100;
const PAGE_MOST: u32 = 1_000;
/// Longest note of a resolution, in bytes.
const NOTE_MOST: usize = 4_096;

/// The service over the runs.
#[derive(Debug, Clone)]
pub struct Service(pub Workflows);

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn failed(fault: Fault) -> Status {
    errors::status(&fault)
}

/// A stream about a VM, which ends with the caller's right to that.
fn about<T>(
    vm: Over,
    stream: impl Stream<Item = Result<T, Status>> + Send + 'static,
) -> Response<Events<T>> {
    let mut response = Response::new(Box::pin(stream) as Events<T>);
    response.extensions_mut().insert(vm);
    response
}

/// A name that refers to something, or is empty where all are meant: what libvirt
/// cannot have as a name is the caller's slip, and is named as one.
pub fn named(field: &str, name: &str) -> Result<(), Status> {
    names::check_reference(name).map_err(|problem| failed(Fault::bad_field(field, problem)))
}

/// Page size within bounds.
pub fn page(asked: u32, default: u32, most: u32) -> u32 {
    if asked == 0 { default } else { asked.min(most) }
}

#[tonic::async_trait]
impl WorkflowService for Service {
    async fn plan_workflow(
        &self,
        request: Request<v1::PlanWorkflowRequest>,
    ) -> Result<Response<v1::PlanWorkflowResponse>, Status> {
        let caller = access::of(&request)?;
        let asked = spec::request(request.into_inner().spec).map_err(failed)?;
        let deed = Deed::of(&asked);
        access::plan(&self.0, &caller, "PlanWorkflow", deed, &asked.vm).await?;
        let veil = Veil::of(&self.0, &caller).await?;
        let planned = self.0.plan(&asked).await;
        let (plan, facts) = planned.map_err(|fault| veil.status(&fault))?;
        let (plan, facts) = (veil.plan(plan)?, veil.facts(facts));
        Ok(Response::new(v1::PlanWorkflowResponse {
            plan: Some(reply::plan(&plan, Some(&facts))),
        }))
    }

    type RunWorkflowStream = Events<v1::RunWorkflowResponse>;

    async fn run_workflow(
        &self,
        request: Request<v1::RunWorkflowRequest>,
    ) -> Result<Response<Self::RunWorkflowStream>, Status> {
        let (caller, tenure) = (access::of(&request)?, access::tenure(&request)?);
        let message = request.into_inner();
        bounded("request_id", &message.request_id, ID_MOST)?;
        bounded("plan_hash", &message.plan_hash, ID_MOST)?;
        let timeout = message
            .timeout
            .map(spec::duration)
            .transpose()
            .map_err(|problem| failed(Fault::bad_field("timeout", problem)))?;
        let asked = spec::request(message.spec).map_err(failed)?;
        let deed = Deed::of(&asked);
        access::deed(&self.0, &caller, "RunWorkflow", deed, &asked.vm).await?;
        let vm = Over(asked.vm.clone());
        let veil = Veil::of(&self.0, &caller).await?;
        let how = Submission {
            request_id: message.request_id,
            join_finished: message.join_finished,
            plan_hash: message.plan_hash,
            timeout,
            sight: caller.sight(),
            guard: None,
        };
        let submitted = self.0.submit(asked, how, caller.caller().clone()).await;
        let id = submitted.map_err(|fault| veil.status(&fault))?;
        let events = self.0.watch(&id, 1).await.map_err(failed)?;
        let mut titles = reply::Titles::default();
        let mut ended: Option<Status> = None;
        let mut events = Veiled::new(events, self.0.clone(), tenure, veil);
        // After the outcome of a run that failed, its error ends the stream.
        let stream = tokio_stream::wrappers::ReceiverStream::new({
            let (send, receive) = tokio::sync::mpsc::channel(16);
            tokio::spawn(async move {
                while let Some(event) = events.next().await {
                    let event = match event {
                        Ok(event) => event,
                        Err(status) => {
                            let _ = send.send(Err(status)).await;
                            return;
                        }
                    };
                    if let Event::Record(record) = &event
                        && let Record::Closed {
                            fault: Some(fault), ..
                        } = &record.record
                    {
                        ended = Some(errors::status(fault));
                    }
                    let message = reply::event(&id, &event, &mut titles)
                        .map(|event| v1::RunWorkflowResponse { event: Some(event) });
                    if send.send(message).await.is_err() {
                        return;
                    }
                }
                if let Some(status) = ended {
                    // The caller may be gone; the run is over all the same.
                    let _ = send.send(Err(status)).await;
                }
            });
            receive
        });
        Ok(about(vm, stream))
    }

    type WatchWorkflowStream = Events<v1::WatchWorkflowResponse>;

    async fn watch_workflow(
        &self,
        request: Request<v1::WatchWorkflowRequest>,
    ) -> Result<Response<Self::WatchWorkflowStream>, Status> {
        let (caller, tenure) = (access::of(&request)?, access::tenure(&request)?);
        let message = request.into_inner();
        let id = message.workflow_id;
        let run = access::run(&self.0, &caller, "WatchWorkflow", Role::Viewer, &id).await?;
        let veil = Veil::of(&self.0, &caller).await?;
        let events = self
            .0
            .watch(&id, message.from_sequence)
            .await
            .map_err(failed)?;
        let mut titles = reply::Titles::default();
        if message.from_sequence > 1 {
            // The plan was sent before; its titles are needed all the same.
            for record in self
                .0
                .journal()
                .records(&id, 1)
                .await
                .map_err(|error| failed(error.into()))?
            {
                titles.learn(&record.record);
            }
        }
        let events = Veiled::new(events, self.0.clone(), tenure, veil);
        let stream = events.map(move |event| {
            reply::event(&id, &event?, &mut titles)
                .map(|event| v1::WatchWorkflowResponse { event: Some(event) })
        });
        Ok(about(Over(run.request.vm), stream))
    }

    async fn cancel_workflow(
        &self,
        request: Request<v1::CancelWorkflowRequest>,
    ) -> Result<Response<v1::CancelWorkflowResponse>, Status> {
        const METHOD: &str = "CancelWorkflow";
        let caller = access::of(&request)?;
        let id = request.into_inner().workflow_id;
        let run = access::run(&self.0, &caller, METHOD, Role::Operator, &id).await?;
        let by = caller.caller();
        let own = run.caller.identity == by.identity && run.caller.transport == by.transport;
        if !own {
            access::run(&self.0, &caller, METHOD, Role::Admin, &id).await?;
        }
        let veil = Veil::of(&self.0, &caller).await?;
        let cancelled = self.0.cancel(&id, by).await;
        let did = Did {
            method: METHOD,
            vm: &run.request.vm,
            workflow: &id,
            note: "",
        };
        let audited = caller.auditor().did(by, did, cancelled.as_ref().err());
        audited.await.map_err(failed)?;
        cancelled.map_err(failed)?;
        // The present step ends by itself or stops where it can; the answer
        // waits for that, but not for ever.
        let mut events = self.0.watch(&id, 1).await.map_err(failed)?;
        let over = tokio::time::timeout(Duration::from_secs(20), async {
            while events.next().await.is_some() {}
        })
        .await
        .is_ok();
        let run = self.0.run(&id).await.map_err(failed)?;
        let note = match (over, run.status) {
            (false, _) => {
                "the present step cannot be stopped in the middle; the run stops after it"
            }
            (true, RunStatus::Succeeded) => {
                "the last step was done before the run could be stopped"
            }
            (true, _) => "",
        };
        let run = veil.run(run)?;
        Ok(Response::new(v1::CancelWorkflowResponse {
            workflow: Some(reply::workflow(&run, Vec::new())),
            note: note.to_owned(),
        }))
    }

    async fn confirm_workflow(
        &self,
        request: Request<v1::ConfirmWorkflowRequest>,
    ) -> Result<Response<v1::ConfirmWorkflowResponse>, Status> {
        let caller = access::of(&request)?;
        let message = request.into_inner();
        let asked = crate::planning::Request {
            vm: message.vm_name,
            action: Action::Confirm {
                name: message.snapshot_name,
            },
            start_if_stopped: false,
            pool: crate::planning::request::DEFAULT_POOL.to_owned(),
        };
        asked.check().map_err(failed)?;
        access::over(
            &self.0,
            &caller,
            "ConfirmWorkflow",
            Deed::of(&asked).needs(),
            &asked.vm,
        )
        .await?;
        let veil = Veil::of(&self.0, &caller).await?;
        let how = Submission {
            sight: caller.sight(),
            ..Submission::default()
        };
        let submitted = self.0.submit(asked, how, caller.caller().clone()).await;
        let run = submitted.map_err(|fault| veil.status(&fault))?;
        let ended = self.0.ended(&run).await;
        ended.map_err(|fault| veil.status(&fault))?;
        let changed = self
            .0
            .run(&run)
            .await
            .map_err(failed)?
            .outcome
            .is_some_and(|outcome| outcome.changed);
        let records = self
            .0
            .journal()
            .records(&run, 1)
            .await
            .map_err(|error| failed(error.into()))?;
        let warnings = records
            .iter()
            .find_map(|record| match &record.record {
                Record::Planned { plan } => {
                    Some(plan.warnings.iter().map(reply::warning).collect())
                }
                _ => None,
            })
            .unwrap_or_default();
        Ok(Response::new(v1::ConfirmWorkflowResponse {
            changed,
            warnings,
        }))
    }

    async fn list_guards(
        &self,
        request: Request<v1::ListGuardsRequest>,
    ) -> Result<Response<v1::ListGuardsResponse>, Status> {
        let caller = access::of(&request)?;
        let sight = caller.sight();
        let vm = request.into_inner().vm_name;
        named("vm_name", &vm)?;
        let open = self
            .0
            .journal()
            .open_guards()
            .await
            .map_err(|error| failed(error.into()))?;
        Ok(Response::new(v1::ListGuardsResponse {
            guards: open
                .iter()
                .filter(|guard| sight.sees(&guard.vm))
                .filter(|guard| vm.is_empty() || guard.vm == vm)
                .map(reply::guard)
                .collect(),
        }))
    }

    async fn resolve_workflow(
        &self,
        request: Request<v1::ResolveWorkflowRequest>,
    ) -> Result<Response<v1::ResolveWorkflowResponse>, Status> {
        const METHOD: &str = "ResolveWorkflow";
        let caller = access::of(&request)?;
        let message = request.into_inner();
        bounded("note", &message.note, NOTE_MOST)?;
        if message.note.trim().is_empty() {
            return Err(failed(Fault::bad_field(
                "note",
                "is empty; say what was done about the run",
            )));
        }
        let id = &message.workflow_id;
        let run = access::run(&self.0, &caller, METHOD, Role::Admin, id).await?;
        let veil = Veil::of(&self.0, &caller).await?;
        let by = caller.caller();
        let resolved = self.0.resolve(id, &message.note, by).await;
        let did = Did {
            method: METHOD,
            vm: &run.request.vm,
            workflow: id,
            note: &message.note,
        };
        let audited = caller.auditor().did(by, did, resolved.as_ref().err());
        audited.await.map_err(failed)?;
        resolved.map_err(failed)?;
        let run = veil.run(self.0.run(id).await.map_err(failed)?)?;
        Ok(Response::new(v1::ResolveWorkflowResponse {
            workflow: Some(reply::workflow(&run, Vec::new())),
        }))
    }

    async fn get_workflow(
        &self,
        request: Request<v1::GetWorkflowRequest>,
    ) -> Result<Response<v1::GetWorkflowResponse>, Status> {
        let caller = access::of(&request)?;
        let id = request.into_inner().workflow_id;
        let run = access::run(&self.0, &caller, "GetWorkflow", Role::Viewer, &id).await?;
        let veil = Veil::of(&self.0, &caller).await?;
        let run = veil.run(run)?;
        let records = self
            .0
            .journal()
            .records(&id, 1)
            .await
            .map_err(|error| failed(error.into()))?
            .into_iter()
            .map(
                |record| match veil.event(Event::Record(Arc::new(record)))? {
                    Event::Record(record) => Ok(Some(record)),
                    _ => Ok(None),
                },
            )
            .collect::<Result<Vec<_>, Status>>()?;
        let warnings = records
            .iter()
            .flatten()
            .flat_map(|record| match &record.record {
                Record::Planned { plan } => plan.warnings.iter().map(reply::warning).collect(),
                Record::Notice { notice } => vec![reply::warning(notice)],
                _ => Vec::new(),
            })
            .collect();
        Ok(Response::new(v1::GetWorkflowResponse {
            workflow: Some(reply::workflow(&run, warnings)),
        }))
    }

    async fn list_workflows(
        &self,
        request: Request<v1::ListWorkflowsRequest>,
    ) -> Result<Response<v1::ListWorkflowsResponse>, Status> {
        let caller = access::of(&request)?;
        let (sight, veil) = (caller.sight(), Veil::of(&self.0, &caller).await?);
        let message = request.into_inner();
        named("vm_name", &message.vm_name)?;
        let limit = page(message.page_size, PAGE, PAGE_MOST);
        let statuses: Vec<RunStatus> = RunStatus::ALL
            .into_iter()
            .filter(|status| message.states.contains(&(reply::status(*status) as i32)))
            .collect();
        if message.states.len() > statuses.len() {
            return Err(failed(Fault::bad_field(
                "states",
                "holds a value that is no state of a run",
            )));
        }
        let actions: Vec<String> = message
            .actions()
            .map(|action| match action {
                v1::Action::Unspecified => "",
                v1::Action::Create => "create",
                v1::Action::Revert => "revert",
                v1::Action::Commit => "commit",
                v1::Action::List => "list",
                v1::Action::Cleanup => "cleanup",
                v1::Action::Confirm => "confirm",
            })
            .map(str::to_owned)
            .collect();
        let after = paging::Token::read(&message.page_token)?.map(|token| token.group);
        bounded("page_token", after.as_deref().unwrap_or_default(), ID_MOST)?;
        let mut filter = RunFilter {
            vm: (!message.vm_name.is_empty()).then_some(message.vm_name),
            statuses,
            actions,
            after,
            limit: limit + 1,
        };
        let mut page = paging::Page::new(limit as usize);
        // What is hidden is passed over, and the page filled from behind it.
        loop {
            let rows = self.0.runs(filter.clone()).await.map_err(failed)?;
            let last = rows.last().map(|run| run.id.clone());
            let more = rows.len() > limit as usize;
            for run in rows.into_iter().filter(|run| sight.sees(&run.request.vm)) {
                let token = paging::Token::new(&run.id, "", 0);
                page.add(token, reply::workflow(&veil.run(run)?, Vec::new()));
            }
            if page.is_full() || !more {
                break;
            }
            filter.after = last;
        }
        let (workflows, next_page_token) = page.end();
        Ok(Response::new(v1::ListWorkflowsResponse {
            workflows,
            next_page_token,
        }))
    }
}
