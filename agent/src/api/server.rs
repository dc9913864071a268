//! Where callers reach the agent: a Unix socket, TCP with mutual TLS, and plaintext
//! TCP on loopback when the configuration asks for it.
//!
//! Invariants: a socket file that another agent still serves is never taken
//! over; one that was left behind by a dead agent is, and nothing but a socket ever
//! is; every call passes the gate.

use std::{
    io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _, chown},
    path::Path,
    time::Duration,
};

use tokio::{
    net::{TcpListener, UnixListener, UnixStream},
    runtime::Handle,
    sync::watch,
};
use tonic::transport::Server;
use vmsnap_proto::v1::{
    audit_service_server::AuditServiceServer, inventory_service_server::InventoryServiceServer,
    known_issue_service_server::KnownIssueServiceServer,
    workflow_service_server::WorkflowServiceServer,
};

use super::{audit, errors, inventory, known_issues, workflow};
use crate::{
    config::{Config, Limits},
    trust::{Auditor, Door, Gate, Listener, Most, Places, host_groups},
    workflows::Workflows,
};

/// Streams of one connection, calls included. What one caller may have is
/// bounded apart from this; here a connection's memory is.
const STREAMS_MOST: u32 = 512;
/// Bytes that one connection may send ahead of being read.
const WINDOW: u32 = 512 * 1024;
/// And one stream of it.
const STREAM_WINDOW: u32 = 64 * 1024;
/// Bytes of a call's headers.
const HEADERS_MOST: u32 = 16 * 1024;
/// HTTP/2 pings find out about peers that are gone without a word.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Sockets that are open before anything else starts, so that a taken address
/// is found at once.
#[derive(Debug)]
pub struct Endpoints {
    unix: Option<UnixListener>,
    tcp: Option<TcpListener>,
    tls: Option<TcpListener>,
    limits: Limits,
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
    /// The address for mutual TLS, with the port that was given out.
    pub tls: Option<SocketAddr>,
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
        let tcp = match handed.tcp {
            Some(handed) => Some(
                handed
                    .set_nonblocking(true)
                    .and_then(|()| TcpListener::from_std(handed))
                    .map_err(|error| format!("the TCP socket that was handed over: {error}"))?,
            ),
            None => bind("listen.tcp", config.tcp()).await?,
        };
        Ok(Self {
            unix,
            tcp,
            tls: bind("listen.tls", config.tls()).await?,
            limits: config.limits.clone(),
        })
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
            tls: self.tls.as_ref().and_then(|tls| tls.local_addr().ok()),
        }
    }

    /// Serves until `stop` says true (or its sender is gone), then lets open
    /// streams end. Who comes over the network is served by `network`.
    ///
    /// # Errors
    /// When a listener fails.
    pub async fn serve(
        self,
        workflows: Workflows,
        auditor: Auditor,
        network: &Handle,
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
        health
            .set_serving::<AuditServiceServer<audit::Service>>()
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
        let limits = &self.limits;
        let places = |what, key, all: u32, peer: u32| {
            let most = Most {
                all: all as usize,
                peer: peer as usize,
            };
            Places::new(what, key, most)
        };
        let trust = workflows.trust().clone();
        let gate = Gate::new(
            trust.clone(),
            auditor.clone(),
            places(
                "calls",
                "limits.max_calls",
                limits.max_calls,
                limits.max_calls_per_peer,
            ),
            places(
                "streams",
                "limits.max_streams",
                limits.max_streams,
                limits.max_streams_per_peer,
            ),
            places(
                "calls of health and reflection",
                "limits.max_streams",
                limits.max_streams,
                limits.max_streams_per_peer,
            ),
            workflows.readers().clone(),
            errors::status,
        );
        let router = || {
            Server::builder()
                .http2_keepalive_interval(Some(KEEPALIVE))
                .http2_keepalive_timeout(Some(KEEPALIVE))
                .max_concurrent_streams(STREAMS_MOST)
                .initial_connection_window_size(WINDOW)
                .initial_stream_window_size(STREAM_WINDOW)
                .http2_max_header_list_size(HEADERS_MOST)
                .layer(gate.layer())
                .add_service(health_service.clone())
                .add_optional_service(reflection.clone())
                .add_optional_service(older_reflection.clone())
                .add_service(WorkflowServiceServer::new(workflow::Service(
                    workflows.clone(),
                )))
                .add_service(InventoryServiceServer::new(inventory::Service(
                    workflows.clone(),
                )))
                .add_service(KnownIssueServiceServer::new(known_issues::Service(
                    workflows.clone(),
                )))
                .add_service(AuditServiceServer::new(audit::Service(workflows.clone())))
        };
        let listeners = [
            self.unix.map(Listener::Unix),
            self.tcp.map(Listener::Plain),
            self.tls.map(Listener::Tls),
        ];
        let door = Door::new(trust, auditor, self.limits.max_connections as usize);
        let mut serving = tokio::task::JoinSet::new();
        for listener in listeners.into_iter().flatten() {
            let (door, router, stopped) = (door.clone(), router(), stopped());
            // The network has threads of its own: what comes from there neither delays
            // runs nor who is on the host.
            let of = match listener {
                Listener::Tls(_) => network.clone(),
                Listener::Unix(_) | Listener::Plain(_) => Handle::current(),
            };
            let serve = async move {
                let connections = door.open(listener);
                router
                    .serve_with_incoming_shutdown(connections, stopped)
                    .await
            };
            serving.spawn_on(serve, &of);
        }
        let mut result = Ok(());
        while let Some(ended) = serving.join_next().await {
            // A task of ours neither panics nor is cancelled but with the agent.
            result = result.and(ended.unwrap_or(Ok(())));
            if result.is_err() {
                break;
            }
        }
        watching.abort();
        result
    }
}

async fn bind(key: &str, address: Option<SocketAddr>) -> Result<Option<TcpListener>, String> {
    let Some(address) = address else {
        return Ok(None);
    };
    let bound = TcpListener::bind(address).await;
    bound
        .map(Some)
        .map_err(|error| format!("{key} '{address}': {error}"))
}

/// Reflection, or none when the built-in descriptors cannot be read.
fn reflected<S, E: std::fmt::Display>(built: Result<S, E>) -> Option<S> {
    built
        .inspect_err(
            |error| tracing::error!(%error, "reflection is off: its descriptors cannot be read"),
        )
        .ok()
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
/// When another process serves it, something else than a socket is there, or it
/// cannot be made.
pub async fn open_socket(path: &Path, group: Option<u32>, mode: u32) -> io::Result<UnixListener> {
    if let Ok(there) = std::fs::metadata(path) {
        if !there.file_type().is_socket() {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "what is there is no socket, and stays; move it away, or choose another path",
            ));
        }
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
    let id = host_groups().get(name).copied().ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("the host has no group '{name}'"),
        )
    })?;
    Ok(Some(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_socket_that_nobody_serves_is_replaced_and_no_other_file() {
        let folder = std::env::temp_dir().join(format!("vmsnap-o-{}", uuid::Uuid::now_v7()));
        let socket = folder.join("s");
        drop(open_socket(&socket, None, 0o600).await.unwrap());
        assert!(socket.exists());
        let served = open_socket(&socket, None, 0o600).await.unwrap();
        let taken = open_socket(&socket, None, 0o600).await.unwrap_err();
        assert!(taken.to_string().contains("another agent"), "{taken}");
        drop(served);
        let precious = folder.join("precious");
        std::fs::write(&precious, "x").unwrap();
        let link = folder.join("link");
        std::os::unix::fs::symlink(&precious, &link).unwrap();
        for path in [&precious, &link, &folder] {
            let refused = open_socket(path, None, 0o600).await.unwrap_err();
            assert!(refused.to_string().contains("no socket"), "{refused}");
        }
        assert_eq!(std::fs::read_to_string(&link).unwrap(), "x");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
