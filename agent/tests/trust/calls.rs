//! Every call of the contract, as data: by its name, on a VM and a run.

use std::time::Duration;

use prost::Message;
use tonic::{Status, codegen::http::uri::PathAndQuery, transport::Channel};
use tonic_prost::ProstCodec;
use tonic_types::StatusExt as _;
use vmsnap_agent::trust::Deed;
use vmsnap_proto::v1;

/// What a call came to.
#[derive(Debug)]
pub struct Answer {
    /// All messages, as text.
    pub text: String,
    /// The error, if it ended with one.
    pub error: Option<Status>,
}

impl Answer {
    /// The reason of its error; empty when it ended well.
    pub fn reason(&self) -> String {
        let Some(error) = &self.error else {
            return String::new();
        };
        let details = error.get_error_details();
        details
            .error_info()
            .map(|info| info.reason.clone())
            .unwrap_or_else(|| format!("{:?}", error.code()))
    }

    /// The message of its error.
    pub fn message(&self) -> &str {
        self.error.as_ref().map_or("", Status::message)
    }
}

/// Asks, and reads what comes within a moment.
async fn ask<Q, A>(channel: &Channel, path: &str, message: Q) -> Answer
where
    Q: Message + Send + Sync + 'static,
    A: Message + Default + std::fmt::Debug + Send + Sync + 'static,
{
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.unwrap();
    let path: PathAndQuery = path.parse().unwrap();
    let codec = ProstCodec::<Q, A>::default();
    let mut text = String::new();
    let asked = grpc.server_streaming(tonic::Request::new(message), path, codec);
    let mut stream = match asked.await {
        Ok(answer) => answer.into_inner(),
        Err(error) => {
            return Answer {
                text,
                error: Some(error),
            };
        }
    };
    // A stream that goes on, such as the audit's, has said enough by then.
    let patience = Duration::from_secs(if path_never_ends::<A>() { 1 } else { 20 });
    let reading = async {
        loop {
            match stream.message().await {
                Ok(Some(message)) => text.push_str(&format!("{message:?}\n")),
                Ok(None) => return None,
                Err(error) => return Some(error),
            }
        }
    };
    let error = tokio::time::timeout(patience, reading)
        .await
        .unwrap_or(None);
    Answer { text, error }
}

fn path_never_ends<A: 'static>() -> bool {
    std::any::TypeId::of::<A>() == std::any::TypeId::of::<v1::WatchAuditResponse>()
}

/// What a run of a deed is asked with.
pub fn spec(deed: Deed, vm: &str) -> v1::WorkflowSpec {
    let mut spec = v1::WorkflowSpec {
        vm_name: vm.to_owned(),
        snapshot_name: "s".to_owned(),
        ..Default::default()
    };
    match deed {
        Deed::List => spec.set_action(v1::Action::List),
        Deed::ListStarting => {
            spec.set_action(v1::Action::List);
            spec.start_if_stopped = true;
        }
        Deed::Create => spec.set_action(v1::Action::Create),
        Deed::CreateReplacing => {
            spec.set_action(v1::Action::Create);
            spec.create = Some(v1::CreateOptions {
                if_exists: v1::IfExists::Replace as i32,
                ..Default::default()
            });
        }
        Deed::Revert => spec.set_action(v1::Action::Revert),
        Deed::RevertForcing => {
            spec.set_action(v1::Action::Revert);
            spec.revert = Some(v1::RevertOptions {
                force: true,
                ..Default::default()
            });
        }
        Deed::Confirm => spec.set_action(v1::Action::Confirm),
        Deed::Commit => spec.set_action(v1::Action::Commit),
        Deed::Cleanup => spec.set_action(v1::Action::Cleanup),
        Deed::CleanupBeyond => {
            spec.set_action(v1::Action::Cleanup);
            spec.snapshot_name = String::new();
            spec.cleanup = Some(v1::CleanupOptions {
                leftovers: vec!["another-old.qcow2".to_owned()],
                leftovers_set: true,
                ..Default::default()
            });
        }
    }
    spec
}

/// Asks for the health of a service of this name.
pub async fn call_health(channel: &Channel, service: &str) -> Answer {
    let request = tonic_health::pb::HealthCheckRequest {
        service: service.to_owned(),
    };
    let path = "/grpc.health.v1.Health/Check";
    ask::<_, tonic_health::pb::HealthCheckResponse>(channel, path, request).await
}

/// Runs a deed.
pub async fn run(channel: &Channel, deed: Deed, vm: &str, request_id: &str) -> Answer {
    let request = v1::RunWorkflowRequest {
        spec: Some(spec(deed, vm)),
        request_id: request_id.to_owned(),
        ..Default::default()
    };
    let path = "/vmsnap.v1.WorkflowService/RunWorkflow";
    ask::<_, v1::RunWorkflowResponse>(channel, path, request).await
}

/// Plans.
pub async fn plan(channel: &Channel, request: v1::PlanWorkflowRequest) -> Answer {
    let path = "/vmsnap.v1.WorkflowService/PlanWorkflow";
    ask::<_, v1::PlanWorkflowResponse>(channel, path, request).await
}

/// Makes a call on a VM, or on a run of it.
pub async fn call(channel: &Channel, service: &str, method: &str, vm: &str, id: &str) -> Answer {
    let path = format!("/vmsnap.v1.{service}/{method}");
    let (vm_name, workflow_id) = (vm.to_owned(), id.to_owned());
    macro_rules! ask {
        ($request:expr => $answer:ident) => {
            ask::<_, v1::$answer>(channel, &path, $request).await
        };
    }
    match method {
        "PlanWorkflow" => ask!(v1::PlanWorkflowRequest {
            spec: Some(spec(Deed::List, vm)),
        } => PlanWorkflowResponse),
        "RunWorkflow" => run(channel, Deed::List, vm, "").await,
        "WatchWorkflow" => ask!(v1::WatchWorkflowRequest {
            workflow_id,
            from_sequence: 0,
        } => WatchWorkflowResponse),
        "CancelWorkflow" => {
            ask!(v1::CancelWorkflowRequest { workflow_id } => CancelWorkflowResponse)
        }
        "ConfirmWorkflow" => ask!(v1::ConfirmWorkflowRequest {
            vm_name,
            snapshot_name: String::new(),
        } => ConfirmWorkflowResponse),
        "ResolveWorkflow" => ask!(v1::ResolveWorkflowRequest {
            workflow_id,
            note: "looked at".to_owned(),
        } => ResolveWorkflowResponse),
        "GetWorkflow" => ask!(v1::GetWorkflowRequest { workflow_id } => GetWorkflowResponse),
        "ListWorkflows" => ask!(v1::ListWorkflowsRequest::default() => ListWorkflowsResponse),
        "ListGuards" => ask!(v1::ListGuardsRequest::default() => ListGuardsResponse),
        "GetHost" => ask!(v1::GetHostRequest {} => GetHostResponse),
        "GetHealth" => ask!(v1::GetHealthRequest {} => GetHealthResponse),
        "ListVms" => ask!(v1::ListVmsRequest::default() => ListVmsResponse),
        "GetVm" => ask!(v1::GetVmRequest { vm_name } => GetVmResponse),
        "ListSnapshots" => ask!(v1::ListSnapshotsRequest::default() => ListSnapshotsResponse),
        "ListVolumes" => ask!(v1::ListVolumesRequest::default() => ListVolumesResponse),
        "ListKnownIssues" => {
            ask!(v1::ListKnownIssuesRequest::default() => ListKnownIssuesResponse)
        }
        "RecordFix" => ask!(v1::RecordFixRequest {
            reason: "NO_SPACE".to_owned(),
            subject: vm_name,
            fix: "grow it".to_owned(),
        } => RecordFixResponse),
        "ForgetFix" => ask!(v1::ForgetFixRequest { id: workflow_id } => ForgetFixResponse),
        "ListAudit" => ask!(v1::ListAuditRequest::default() => ListAuditResponse),
        "WatchAudit" => ask!(v1::WatchAuditRequest::default() => WatchAuditResponse),
        other => panic!("{service}.{other} is not tried with every role yet"),
    }
}
