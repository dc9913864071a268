//! A connection to an agent, and every call of the contract on it.
//!
//! Invariants: plain TCP goes to loopback only, everything else is mutual TLS; a
//! connection that went silent is found by HTTP/2 pings; every call but the streams has a deadline. Lists are
//! read to their last page.

use std::{path::PathBuf, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::timeout};
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::{
    Request, Status, Streaming,
    transport::{Channel, Endpoint as Transport, Uri},
};
use vmsnap_proto::v1::{
    self, audit_service_client::AuditServiceClient,
    inventory_service_client::InventoryServiceClient,
    known_issue_service_client::KnownIssueServiceClient,
    workflow_service_client::WorkflowServiceClient,
};

use crate::{
    endpoint::Endpoint,
    error::{CONNECTING, Error},
    run::{RunOptions, RunStream},
    tls::{self, TlsFiles},
};

/// A page of 10,000 snapshots passes 4 MiB, the limit that tonic begins with.
const LARGEST_MESSAGE: usize = 64 << 20;

/// What is asked for in one page of a list.
const PAGE: u32 = 1_000;

/// How a connection is made and kept.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// How long a call that is no stream may take.
    pub call_timeout: Duration,
    /// How often an otherwise silent connection is pinged.
    pub keepalive_interval: Duration,
    /// How long a ping may stay unanswered before the connection counts as lost.
    pub keepalive_timeout: Duration,
    /// What the caller calls itself, such as `vmsnap/0.1.0`.
    pub user_agent: &'static str,
    /// The files of mutual TLS, as far as they are named.
    pub tls: TlsFiles,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        ConnectOptions {
            connect_timeout: Duration::from_secs(10),
            call_timeout: Duration::from_secs(120),
            keepalive_interval: Duration::from_secs(15),
            keepalive_timeout: Duration::from_secs(10),
            user_agent: concat!("vmsnap-client/", env!("CARGO_PKG_VERSION")),
            tls: TlsFiles::default(),
        }
    }
}

/// A connection to an agent. Cheap to clone; clones share the connection, which
/// comes back by itself after it broke.
#[derive(Debug, Clone)]
pub struct Client {
    endpoint: Arc<Endpoint>,
    channel: Channel,
    call_timeout: Duration,
}

impl Client {
    /// Connects, and fails when nobody is there.
    ///
    /// # Errors
    /// Everything of [`Error::is_no_agent`], and what is wrong with the files of
    /// TLS; nothing is retried.
    pub async fn connect(endpoint: &Endpoint, options: &ConnectOptions) -> Result<Self, Error> {
        let secure = endpoint.wants_tls(options.tls.are_named());
        let trust = if secure {
            let missing = options.tls.missing();
            if !missing.is_empty() {
                return Err(Error::TlsNeeded {
                    endpoint: endpoint.clone(),
                    missing,
                });
            }
            Some(options.tls.read()?)
        } else {
            None
        };
        let unreachable =
            |source: tonic::transport::Error| Error::connecting(endpoint, Box::new(source));
        let transport = Transport::from_shared(uri(endpoint, secure))
            .and_then(|transport| transport.user_agent(options.user_agent))
            .map_err(unreachable)?
            .connect_timeout(options.connect_timeout)
            .http2_keep_alive_interval(options.keepalive_interval)
            .keep_alive_timeout(options.keepalive_timeout)
            // A run may be silent for longer than a proxy or a firewall has patience.
            .keep_alive_while_idle(true);
        let connecting = async {
            match endpoint {
                Endpoint::Unix(path) => {
                    transport
                        .connect_with_connector(socket_connector(path.clone()))
                        .await
                }
                Endpoint::Tcp { host, port, .. } => match trust {
                    Some(trust) => {
                        let (host, port) = (host.clone(), *port);
                        // A host that parsed is a name or an address.
                        let name = ServerName::try_from(host.clone()).ok();
                        let connector = tower::service_fn(move |_: Uri| {
                            let (host, name, trust) = (host.clone(), name.clone(), trust.clone());
                            async move {
                                let name = name.ok_or_else(|| {
                                    tls::Obstacle::Tls(std::io::Error::other("no name of a host"))
                                })?;
                                tls::tls(&host, port, name, trust).await.map(TokioIo::new)
                            }
                        });
                        transport.connect_with_connector(connector).await
                    }
                    None => {
                        let (host, port) = (host.clone(), *port);
                        let connector = tower::service_fn(move |_: Uri| {
                            let host = host.clone();
                            async move { tls::tcp(&host, port).await.map(TokioIo::new) }
                        });
                        transport.connect_with_connector(connector).await
                    }
                },
            }
        };
        let channel = timeout(options.connect_timeout, connecting)
            .await
            .map_err(|_| Error::TimedOut {
                what: CONNECTING,
                endpoint: endpoint.clone(),
                after: options.connect_timeout,
            })?
            .map_err(unreachable)?;
        Ok(Client {
            endpoint: Arc::new(endpoint.clone()),
            channel,
            call_timeout: options.call_timeout,
        })
    }

    /// What this is connected to.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The connection itself, for services that are not of the contract, such as
    /// health.
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Runs a workflow, or joins the run of the same request id. Nothing is sent
    /// before the stream is asked for its first event.
    #[must_use]
    pub fn run(&self, spec: v1::WorkflowSpec, options: RunOptions) -> RunStream {
        RunStream::run(self.clone(), spec, options)
    }

    /// The events of a run from a sequence on, past ones first; 0 and 1 are the
    /// beginning.
    #[must_use]
    pub fn watch(
        &self,
        workflow_id: &str,
        from_sequence: u64,
        reattach_within: Duration,
    ) -> RunStream {
        RunStream::watch(self.clone(), workflow_id, from_sequence, reattach_within)
    }

    /// What a run would do. Changes nothing.
    ///
    /// # Errors
    /// The refusal, if the run would be refused, and everything that a call has.
    pub async fn plan(&self, spec: v1::WorkflowSpec) -> Result<v1::Plan, Error> {
        let request = self.request(v1::PlanWorkflowRequest { spec: Some(spec) });
        let answer = self
            .answer(self.workflows_service().plan_workflow(request))
            .await?;
        Ok(answer.plan.unwrap_or_default())
    }

    /// Stops a run between steps and has undone what it did.
    ///
    /// # Errors
    /// Everything that a call has.
    pub async fn cancel(&self, workflow_id: &str) -> Result<v1::CancelWorkflowResponse, Error> {
        let request = self.request(v1::CancelWorkflowRequest {
            workflow_id: workflow_id.to_owned(),
        });
        self.answer(self.workflows_service().cancel_workflow(request))
            .await
    }

    /// Confirms a guarded change; the name may be empty when only one guard is
    /// pending on the VM.
    ///
    /// # Errors
    /// Everything that a call has.
    pub async fn confirm(
        &self,
        vm_name: &str,
        snapshot_name: &str,
    ) -> Result<v1::ConfirmWorkflowResponse, Error> {
        let request = self.request(v1::ConfirmWorkflowRequest {
            vm_name: vm_name.to_owned(),
            snapshot_name: snapshot_name.to_owned(),
        });
        self.answer(self.workflows_service().confirm_workflow(request))
            .await
    }

    /// Guarded changes that are pending or held; those of all VMs without a name.
    ///
    /// # Errors
    /// Everything that a call has.
    pub async fn guards(&self, vm_name: &str) -> Result<Vec<v1::Guard>, Error> {
        let request = self.request(v1::ListGuardsRequest {
            vm_name: vm_name.to_owned(),
        });
        let answer = self
            .answer(self.workflows_service().list_guards(request))
            .await?;
        Ok(answer.guards)
    }

    /// Records what an operator did about a run that is stuck, and closes it.
    ///
    /// # Errors
    /// Everything that a call has.
    pub async fn resolve(&self, workflow_id: &str, note: &str) -> Result<v1::Workflow, Error> {
        let request = self.request(v1::ResolveWorkflowRequest {
            workflow_id: workflow_id.to_owned(),
            note: note.to_owned(),
        });
        let answer = self
            .answer(self.workflows_service().resolve_workflow(request))
            .await?;
        Ok(answer.workflow.unwrap_or_default())
    }

    /// One run as it stands.
    ///
    /// # Errors
    /// Everything that a call has.
    pub async fn workflow(&self, workflow_id: &str) -> Result<v1::Workflow, Error> {
        let request = self.request(v1::GetWorkflowRequest {
            workflow_id: workflow_id.to_owned(),
        });
        let answer = self
            .answer(self.workflows_service().get_workflow(request))
            .await?;
        Ok(answer.workflow.unwrap_or_default())
    }

    /// Runs, newest first, at most `limit`; the request's page fields are set here.
    ///
    /// # Errors
    /// Everything that a call has.
    pub async fn workflows(
        &self,
        mut filter: v1::ListWorkflowsRequest,
        limit: usize,
    ) -> Result<Vec<v1::Workflow>, Error> {
        let mut found = Vec::new();
        filter.page_token = String::new();
        while found.len() < limit {
            let missing = u32::try_from(limit - found.len()).unwrap_or(PAGE);
            filter.page_size = missing.min(PAGE);
            let request = self.request(filter.clone());
            let page = self
                .answer(self.workflows_service().list_workflows(request))
                .await?;
            found.extend(page.workflows);
            if page.next_page_token.is_empty() {
                break;
            }
            filter.page_token = page.next_page_token;
        }
        found.truncate(limit);
        Ok(found)
    }

    /// The hypervisor and the agent on it.
    ///
    /// # Errors
    /// Everything that a call has.
    pub async fn host(&self) -> Result<v1::GetHostResponse, Error> {
        let request = self.request(v1::GetHostRequest {});
        self.answer(self.inventory_service().get_host(request))
            .await
    }

    /// What is wrong at the agent now, the most urgent first.
    ///
    /// # Errors
    /// Everything that a call has.
    pub async fn health(&self) -> Result<v1::GetHealthResponse, Error> {
        let request = self.request(v1::GetHealthRequest {});
        self.answer(self.inventory_service().get_health(request))
            .await
    }

    /// All VMs, by name.
    ///
    /// # Errors
    /// Everything that a call has.
    pub async fn vms(&self) -> Result<Vec<v1::VmSummary>, Error> {
        let mut found = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = self.request(v1::ListVmsRequest {
                page_size: PAGE,
                page_token,
            });
            let page = self
                .answer(self.inventory_service().list_vms(request))
                .await?;
            found.extend(page.vms);
            if page.next_page_token.is_empty() {
                return Ok(found);
            }
            page_token = page.next_page_token;
        }
    }

    /// One VM with everything that is known of it.
    ///
    /// # Errors
    /// Everything that a call has.
    pub async fn vm(&self, vm_name: &str) -> Result<v1::Vm, Error> {
        let request = self.request(v1::GetVmRequest {
            vm_name: vm_name.to_owned(),
        });
        let answer = self
            .answer(self.inventory_service().get_vm(request))
            .await?;
        Ok(answer.vm.unwrap_or_default())
    }

    /// The snapshots of a VM, parents before children; of all VMs when the name
    /// is empty.
    ///
    /// # Errors
    /// Everything that a call has.
    pub async fn snapshots(&self, vm_name: &str) -> Result<Vec<v1::Snapshot>, Error> {
        let mut found = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = self.request(v1::ListSnapshotsRequest {
                vm_name: vm_name.to_owned(),
                page_size: PAGE,
                page_token,
            });
            let page = self
                .answer(self.inventory_service().list_snapshots(request))
                .await?;
            found.extend(page.snapshots);
            if page.next_page_token.is_empty() {
                return Ok(found);
            }
            page_token = page.next_page_token;
        }
    }

    /// A pool and its volumes; `default` when the name is empty. Orphans are not
    /// looked for here.
    ///
    /// # Errors
    /// Everything that a call has.
    pub async fn volumes(&self, pool: &str) -> Result<v1::Storage, Error> {
        let mut storage = v1::Storage::default();
        let mut page_token = String::new();
        loop {
            let request = self.request(v1::ListVolumesRequest {
                pool: pool.to_owned(),
                page_size: PAGE,
                page_token,
            });
            let page = self
                .answer(self.inventory_service().list_volumes(request))
                .await?;
            storage.pool = page.pool.or(storage.pool);
            storage.volumes.extend(page.volumes);
            if page.next_page_token.is_empty() {
                return Ok(storage);
            }
            page_token = page.next_page_token;
        }
    }

    /// Known issues; only those that apply to a VM now when its name is given.
    ///
    /// # Errors
    /// Everything that a call has.
    pub async fn known_issues(&self, vm_name: &str) -> Result<Vec<v1::KnownIssue>, Error> {
        let mut found = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = self.request(v1::ListKnownIssuesRequest {
                page_size: PAGE,
                page_token,
                vm_name: vm_name.to_owned(),
            });
            let page = self
                .answer(self.issues_service().list_known_issues(request))
                .await?;
            found.extend(page.issues);
            if page.next_page_token.is_empty() {
                return Ok(found);
            }
            page_token = page.next_page_token;
        }
    }

    /// Attaches the fix that worked to a reason, for one pool or VM or (empty) all.
    ///
    /// # Errors
    /// Everything that a call has.
    pub async fn record_fix(
        &self,
        reason: &str,
        subject: &str,
        fix: &str,
    ) -> Result<v1::KnownIssue, Error> {
        let request = self.request(v1::RecordFixRequest {
            reason: reason.to_owned(),
            subject: subject.to_owned(),
            fix: fix.to_owned(),
        });
        let answer = self
            .answer(self.issues_service().record_fix(request))
            .await?;
        Ok(answer.issue.unwrap_or_default())
    }

    /// Forgets a learned fix.
    ///
    /// # Errors
    /// Everything that a call has.
    pub async fn forget_fix(&self, id: &str) -> Result<(), Error> {
        let request = self.request(v1::ForgetFixRequest { id: id.to_owned() });
        self.answer(self.issues_service().forget_fix(request))
            .await?;
        Ok(())
    }

    /// The newest entries of the audit trail, newest first, at most `limit`.
    ///
    /// # Errors
    /// Everything that a call has.
    pub async fn audit(
        &self,
        filter: v1::AuditFilter,
        limit: usize,
    ) -> Result<Vec<v1::AuditEntry>, Error> {
        let mut found = Vec::new();
        let mut page_token = String::new();
        while found.len() < limit {
            let missing = u32::try_from(limit - found.len()).unwrap_or(PAGE);
            let request = self.request(v1::ListAuditRequest {
                page_size: missing.min(PAGE),
                page_token,
                filter: Some(filter.clone()),
            });
            let page = self
                .answer(self.audit_service().list_audit(request))
                .await?;
            found.extend(page.entries);
            if page.next_page_token.is_empty() {
                break;
            }
            page_token = page.next_page_token;
        }
        found.truncate(limit);
        Ok(found)
    }

    /// Entries of the audit trail behind a sequence, and then new ones as they come.
    ///
    /// # Errors
    /// Everything that a call has.
    pub async fn watch_audit(
        &self,
        filter: v1::AuditFilter,
        after_sequence: u64,
    ) -> Result<Streaming<v1::WatchAuditResponse>, Error> {
        let request = Request::new(v1::WatchAuditRequest {
            filter: Some(filter),
            after_sequence,
        });
        self.answer(self.audit_service().watch_audit(request)).await
    }

    pub(crate) fn workflows_service(&self) -> WorkflowServiceClient<Channel> {
        WorkflowServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    fn inventory_service(&self) -> InventoryServiceClient<Channel> {
        InventoryServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    fn issues_service(&self) -> KnownIssueServiceClient<Channel> {
        KnownIssueServiceClient::new(self.channel.clone())
            .max_decoding_message_size(LARGEST_MESSAGE)
    }

    fn audit_service(&self) -> AuditServiceClient<Channel> {
        AuditServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// The agent learns of the deadline too, and stops reading in vain.
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.call_timeout);
        request
    }

    async fn answer<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, Error> {
        // The agent ends a call at its deadline with its own reason; this one is for an agent
        // that cannot even say so.
        let patience = self.call_timeout + Duration::from_secs(2);
        match timeout(patience, call).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) if timed_out(&status) => Err(self.overdue()),
            Ok(Err(status)) => Err(Error::answered(&self.endpoint, status)),
            Err(_) => Err(self.overdue()),
        }
    }

    fn overdue(&self) -> Error {
        Error::TimedOut {
            what: "the agent's answer",
            endpoint: Endpoint::clone(&self.endpoint),
            after: self.call_timeout,
        }
    }
}

/// Whether tonic, at either end, ended the call at its deadline. It says so with
/// `CANCELLED` or `DEADLINE_EXCEEDED` and a text, without the agent's details.
fn timed_out(status: &Status) -> bool {
    matches!(
        status.code(),
        tonic::Code::DeadlineExceeded | tonic::Code::Cancelled
    ) && !crate::failure::Failure::from(status).is_from_agent()
}

/// The `:authority` of requests. A socket has none of its own; `localhost` is
/// what other gRPC libraries send, and servers accept.
fn uri(endpoint: &Endpoint, secure: bool) -> String {
    let scheme = if secure { "https" } else { "http" };
    match endpoint {
        Endpoint::Unix(_) => "http://localhost".to_owned(),
        Endpoint::Tcp { host, port, .. } if host.contains(':') => {
            format!("{scheme}://[{host}]:{port}")
        }
        Endpoint::Tcp { host, port, .. } => format!("{scheme}://{host}:{port}"),
    }
}

fn socket_connector(
    path: PathBuf,
) -> impl tower::Service<Uri, Response = TokioIo<UnixStream>, Error = std::io::Error, Future: Send>
+ Send
+ 'static {
    tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { Ok(TokioIo::new(UnixStream::connect(path).await?)) }
    })
}
