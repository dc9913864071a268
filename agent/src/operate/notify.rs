//! Telling systemd how the agent is: ready, alive, stopping, and in one line what
//! is going on.
//!
//! Invariants: without `NOTIFY_SOCKET` nothing is sent; *alive* is said only after
//! the runtime ran a task of its own and the journal answered; a hung libvirt
//! does not end the agent, because that would end its watch over held guests.

use std::{
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    },
    sync::Arc,
    time::Duration,
};

use super::health;
use crate::workflows::Workflows;

/// How often it is looked at what is wrong, at the least.
const LOOK: Duration = Duration::from_secs(15);
/// What a start or a stop that goes on asks for at a time.
const MORE: Duration = Duration::from_secs(60);

/// The service manager's socket; cheap to clone.
#[derive(Debug, Clone)]
pub struct Notifier {
    socket: Option<Arc<(UnixDatagram, SocketAddr)>>,
    watchdog: Option<Duration>,
}

/// Says over and over that a start goes on, until dropped.
#[derive(Debug)]
pub struct Starting(tokio::task::JoinHandle<()>);

impl Drop for Starting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Notifier {
    /// As the environment says.
    #[must_use]
    pub fn from_environment() -> Self {
        let get = |name: &str| std::env::var(name).ok();
        let own = std::process::id();
        let for_us = get("WATCHDOG_PID").is_none_or(|pid| pid.parse() == Ok(own));
        Self::new(
            get("NOTIFY_SOCKET").as_deref(),
            get("WATCHDOG_USEC").filter(|_| for_us).as_deref(),
        )
    }

    fn new(socket: Option<&str>, watchdog: Option<&str>) -> Self {
        let open = |address: &str| {
            let address = match address.strip_prefix('@') {
                Some(name) => SocketAddr::from_abstract_name(name)?,
                None => SocketAddr::from_pathname(address)?,
            };
            Ok::<_, std::io::Error>(Arc::new((UnixDatagram::unbound()?, address)))
        };
        Self {
            socket: socket
                .filter(|address| !address.is_empty())
                .and_then(|address| {
                    open(address)
                        .inspect_err(|error| {
                            tracing::warn!(%error, address, "the service manager cannot be told");
                        })
                        .ok()
                }),
            watchdog: watchdog
                .and_then(|micros| micros.parse().ok())
                .filter(|micros| *micros > 0)
                .map(Duration::from_micros),
        }
    }

    fn send(&self, lines: &str) {
        if let Some(socket) = &self.socket
            && let Err(error) = socket.0.send_to_addr(lines.as_bytes(), &socket.1)
        {
            tracing::debug!(%error, "the service manager was not told");
        }
    }

    /// Says that the start goes on, until what is returned is dropped.
    #[must_use]
    pub fn starting(&self) -> Starting {
        let notifier = self.clone();
        Starting(tokio::spawn(async move {
            loop {
                notifier.send(&format!(
                    "STATUS=starting: journal, libvirt, and runs that were \
                     interrupted\nEXTEND_TIMEOUT_USEC={}",
                    MORE.as_micros()
                ));
                tokio::time::sleep(MORE / 4).await;
            }
        }))
    }

    /// Says that callers are served.
    pub fn ready(&self) {
        self.send("READY=1\nSTATUS=serving");
    }

    /// Says that the agent stops, and how long that may take.
    pub fn stopping(&self, within: Duration) {
        self.send(&format!(
            "STOPPING=1\nSTATUS=stopping: open runs are undone\nEXTEND_TIMEOUT_USEC={}",
            (within + MORE).as_micros()
        ));
    }

    /// Says for ever that the agent is alive, as long as it is, and what is wrong.
    pub async fn keep(self, workflows: Workflows) {
        // Twice within the time that systemd waits.
        let every = self.watchdog.map_or(LOOK, |limit| LOOK.min(limit / 3));
        loop {
            // A failing journal is told and alarmed of; a silent one is dead.
            match tokio::time::timeout(every, workflows.journal().beat()).await {
                Ok(_) => self.send("WATCHDOG=1"),
                Err(_) => tracing::error!(
                    seconds = every.as_secs(),
                    "the journal does not answer: the agent is not reported alive"
                ),
            }
            let standing = workflows.standing().await;
            if !standing.stopping {
                let line = health::headline(&standing).replace('\n', " ");
                self.send(&format!("STATUS={line}"));
            }
            tokio::time::sleep(every).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_start_asks_for_time_and_readiness_comes_after_it() {
        let folder = std::env::temp_dir().join(format!("vmsnap-n-{}", uuid::Uuid::now_v7()));
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let heard = || {
            let mut text = [0; 512];
            let length = manager.recv(&mut text).unwrap();
            String::from_utf8(text[..length].to_vec()).unwrap()
        };
        let notifier = Notifier::new(path.to_str(), Some("3000000"));
        assert_eq!(notifier.watchdog, Some(Duration::from_secs(3)));
        let starting = notifier.starting();
        tokio::task::yield_now().await;
        assert!(heard().ends_with("EXTEND_TIMEOUT_USEC=60000000"));
        drop(starting);
        notifier.ready();
        assert_eq!(heard(), "READY=1\nSTATUS=serving");
        notifier.stopping(Duration::from_secs(1));
        assert!(heard().contains("STOPPING=1\n"));
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn an_abstract_socket_is_understood_and_none_is_no_fault() {
        let name = format!("vmsnap-test-{}", uuid::Uuid::now_v7());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        let notifier = Notifier::new(Some(&format!("@{name}")), None);
        notifier.ready();
        let mut text = [0; 64];
        assert!(manager.recv(&mut text).unwrap() > 0);
        Notifier::new(None, Some("0")).ready();
        assert_eq!(Notifier::new(None, Some("0")).watchdog, None);
    }
}
