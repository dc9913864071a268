//! Sockets that systemd opened for the agent (`LISTEN_FDS`), so that callers
//! wait during a restart instead of being refused.
//!
//! Invariants: what was handed over is used in place of what the configuration
//! names for it; what cannot be used is refused and never left unserved.

use std::{
    net::TcpListener,
    os::{fd::AsFd, unix::net::UnixListener},
};

use listenfd::ListenFd;

/// Sockets that were handed over.
#[derive(Debug, Default)]
pub struct Activated {
    /// For callers on this host.
    pub unix: Option<UnixListener>,
    /// For callers over TCP.
    pub tcp: Option<TcpListener>,
    /// For metrics: the one that the socket unit names `metrics`.
    pub metrics: Option<Metrics>,
}

/// A socket for metrics.
#[derive(Debug)]
pub enum Metrics {
    /// A Unix socket.
    Unix(UnixListener),
    /// TCP.
    Tcp(TcpListener),
}

/// Takes what was handed over.
///
/// # Errors
/// A sentence that says what cannot be used.
pub fn take() -> Result<Activated, String> {
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let names: Vec<&str> = names.split(':').collect();
    let mut handed = ListenFd::from_env();
    let mut taken = Activated::default();
    for at in 0..handed.len() {
        let wrong = |why: &str| {
            Err(format!(
                "socket {at} that the service manager handed over {why}"
            ))
        };
        let for_metrics = names.get(at) == Some(&"metrics");
        if let Ok(Some(socket)) = handed.take_unix_listener(at) {
            keep_from_children(&socket)?;
            if for_metrics {
                taken.metrics = Some(Metrics::Unix(socket));
            } else if taken.unix.replace(socket).is_some() {
                return wrong("is a second Unix socket; one is served");
            }
        } else if let Ok(Some(socket)) = handed.take_tcp_listener(at) {
            keep_from_children(&socket)?;
            let address = socket.local_addr().map_err(|error| error.to_string())?;
            if for_metrics {
                taken.metrics = Some(Metrics::Tcp(socket));
            } else if !address.ip().is_loopback() {
                return wrong(&format!(
                    "listens on {address}, which is not a loopback address; plaintext is served \
                     on loopback only"
                ));
            } else if taken.tcp.replace(socket).is_some() {
                return wrong("is a second TCP socket; one is served");
            }
        } else {
            return wrong("is neither a listening Unix nor a listening TCP socket");
        }
    }
    Ok(taken)
}

/// systemd hands sockets over so that programs that are run would get them too.
fn keep_from_children(socket: &impl AsFd) -> Result<(), String> {
    rustix::io::fcntl_setfd(socket, rustix::io::FdFlags::CLOEXEC)
        .map_err(|error| format!("a socket that was handed over: {error}"))
}
