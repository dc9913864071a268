//! Where callers reach the agent: a Unix socket, and plaintext TCP on loopback
//! when the configuration asks for it.
//!
//! Invariants: a socket file that another agent still serves is never taken
//! over; one that was left behind by a dead agent is.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    os::unix::fs::{PermissionsExt as _, chown},
    path::Path,
    time::Duration,
};

use tokio::{
    net::{TcpListener, UnixListener, UnixStream},
    sync::watch,
};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::transport::Server;
use vmsnap_proto::v1::{
    inventory_service_server::InventoryServiceServer,
    known_issue_service_server::KnownIssueServiceServer,
    workflow_service_server::WorkflowServiceServer,
};

use super::{inventory, known_issues, workflow};
use crate::{config::Config, workflows::Workflows};

/// The largest message that is taken, in bytes.
const MESSAGE_MOST: usize = 256 * 1024;
/// HTTP/2 pings find out about peers that are gone without a word.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Sockets that are open before anything else starts, so that a taken address
/// is found at once.
#[derive(Debug)]
pub struct Endpoints {
    unix: Option<UnixListener>,
    tcp: Option<TcpListener>,
}

/// Sockets that the service manager opened, used in place of the configured ones.
#[derive(Debug, Default)]
pub struct Handed {
    /// For callers on this host.
    pub unix: Option<std::os::unix::net::UnixListener>,
    /// For callers on loopback.
    pub tcp: Option<std::net::TcpListener>,
}

/// Where the agent can be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bound {
    /// The Unix socket.
    pub socket: Option<String>,
    /// The TCP address, with the port that was given out.
    pub tcp: Option<SocketAddr>,
}

impl Endpoints {
    /// Opens what the configuration names.
    ///
    /// # Errors
    /// A sentence that names the address and the reason.
    pub async fn open(config: &Config, handed: Handed) -> Result<Self, String> {
        let socket = &config.listen.socket;
        let unix = if let Some(handed) = handed.unix {
            Some(
                handed
                    .set_nonblocking(true)
                    .and_then(|()| UnixListener::from_std(handed))
                    .map_err(|error| format!("the socket that was handed over: {error}"))?,
            )
        } else if socket.as_os_str().is_empty() {
            None
        } else {
            let wrong = |error| format!("listen.socket '{}': {error}", socket.display());
            let group = group_id_of(&config.listen.socket_group).map_err(wrong)?;
            let mode = config.socket_mode().unwrap_or(0o660);
            Some(open_socket(socket, group, mode).await.map_err(wrong)?)
        };
        let tcp = match (handed.tcp, config.tcp()) {
            (Some(handed), _) => Some(
                handed
                    .set_nonblocking(true)
                    .and_then(|()| TcpListener::from_std(handed))
                    .map_err(|error| format!("the TCP socket that was handed over: {error}"))?,
            ),
            (None, None) => None,
            (None, Some(address)) => Some(
                TcpListener::bind(address)
                    .await
                    .map_err(|error| format!("listen.tcp '{address}': {error}"))?,
            ),
        };
        Ok(Self { unix, tcp })
    }

    /// Where they are.
    #[must_use]
    pub fn bound(&self) -> Bound {
        Bound {
            socket: self
                .unix
                .as_ref()
                .and_then(|unix| unix.local_addr().ok())
                .and_then(|address| address.as_pathname().map(|path| path.display().to_string())),
            tcp: self.tcp.as_ref().and_then(|tcp| tcp.local_addr().ok()),
        }
    }

    /// Serves until `stop` says true (or its sender is gone), then lets open
    /// streams end.
    ///
    /// # Errors
    /// When a listener fails.
    pub async fn serve(
        self,
        workflows: Workflows,
        stop: watch::Receiver<bool>,
    ) -> Result<(), tonic::transport::Error> {
        let stopped = || {
            let mut stop = stop.clone();
            async move {
                // A sender that is gone means a stop too.
                let _ = stop.wait_for(|stop| *stop).await;
            }
        };
        let (health, health_service) = tonic_health::server::health_reporter();
        health
            .set_serving::<WorkflowServiceServer<workflow::Service>>()
            .await;
        health
            .set_serving::<InventoryServiceServer<inventory::Service>>()
            .await;
        health
            .set_serving::<KnownIssueServiceServer<known_issues::Service>>()
            .await;
        let watching = tokio::spawn(report_health(workflows.clone(), health));
        let descriptors = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(vmsnap_proto::DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        // Older tools know only the older form.
        let reflection = reflected(descriptors().build_v1());
        let older_reflection = reflected(descriptors().build_v1alpha());
        let router = || {
            Server::builder()
                .http2_keepalive_interval(Some(KEEPALIVE))
                .http2_keepalive_timeout(Some(KEEPALIVE))
                .add_service(health_service.clone())
                .add_optional_service(reflection.clone())
                .add_optional_service(older_reflection.clone())
                .add_service(
                    WorkflowServiceServer::new(workflow::Service(workflows.clone()))
                        .max_decoding_message_size(MESSAGE_MOST),
                )
                .add_service(
                    InventoryServiceServer::new(inventory::Service(workflows.clone()))
                        .max_decoding_message_size(MESSAGE_MOST),
                )
                .add_service(
                    KnownIssueServiceServer::new(known_issues::Service(workflows.clone()))
                        .max_decoding_message_size(MESSAGE_MOST),
                )
        };
        let over_unix = self.unix.map(|unix| {
            router().serve_with_incoming_shutdown(UnixListenerStream::new(unix), stopped())
        });
        let over_tcp = self.tcp.map(|tcp| {
            router().serve_with_incoming_shutdown(TcpListenerStream::new(tcp), stopped())
        });
        let result = tokio::try_join!(optional(over_unix), optional(over_tcp));
        watching.abort();
        result.map(|_| ())
    }
}

/// Reflection, or none when the built-in descriptors cannot be read.
fn reflected<S, E: std::fmt::Display>(built: Result<S, E>) -> Option<S> {
    built
        .inspect_err(
            |error| tracing::error!(%error, "reflection is off: its descriptors cannot be read"),
        )
        .ok()
}

async fn optional<F: Future<Output = Result<(), tonic::transport::Error>>>(
    serving: Option<F>,
) -> Result<(), tonic::transport::Error> {
    match serving {
        Some(serving) => serving.await,
        None => Ok(()),
    }
}

/// How often health is looked at when libvirt comes and goes not.
const HEALTH: Duration = Duration::from_secs(5);

/// Health follows the link to libvirt and the journal: without either nothing can
/// be done for anybody.
async fn report_health(workflows: Workflows, health: tonic_health::server::HealthReporter) {
    let mut link = workflows.observer().link();
    loop {
        let serves = workflows.observer().is_reachable() && workflows.journal().failing().is_none();
        let status = if serves {
            tonic_health::ServingStatus::Serving
        } else {
            tonic_health::ServingStatus::NotServing
        };
        health.set_service_status("", status).await;
        if let Ok(Err(_)) = tokio::time::timeout(HEALTH, link.changed()).await {
            return;
        }
    }
}

/// Opens a Unix socket that a group may use.
///
/// # Errors
/// When another process serves it, or it cannot be made.
pub async fn open_socket(path: &Path, group: Option<u32>, mode: u32) -> io::Result<UnixListener> {
    if path.exists() {
        if UnixStream::connect(path).await.is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another agent answers there; stop it first, or choose another socket",
            ));
        }
        std::fs::remove_file(path)?;
    } else if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let listener = UnixListener::bind(path)?;
    if group.is_some() {
        chown(path, None, group)?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

/// The id of a group, by number or from the host's group file; none without a name.
///
/// # Errors
/// When the host has no such group.
pub fn group_id_of(name: &str) -> io::Result<Option<u32>> {
    if name.is_empty() {
        return Ok(None);
    }
    if let Ok(id) = name.parse() {
        return Ok(Some(id));
    }
    std::fs::read_to_string("/etc/group")?
        .lines()
        .find_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
        })
        .map(Some)
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("the host has no group '{name}'"),
            )
        })
}
