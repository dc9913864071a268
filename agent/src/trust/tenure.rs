//! How long a stream goes on: for as long as its caller has the right to it.
//!
//! Invariants: roles that change are held against every open stream at once, and a
//! certificate that runs out ends those of its connections; what ends a stream is a
//! denial like any other, sent and written down. The run that is watched goes on.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::sync::watch;

use super::{access::Access, audit::Auditor, peer::Peer, reload::Trust, rights::Right};
use crate::planning::Fault;

/// How long is waited at most before the clock is looked at again, which may be set.
const LOOK: Duration = Duration::from_secs(30);

/// The VM that a stream is about; with a stream's answer, for the gate.
#[derive(Debug, Clone)]
pub struct Over(pub String);

/// A caller's right to an open stream.
#[derive(Debug, Clone)]
pub struct Tenure {
    trust: Arc<Trust>,
    auditor: Auditor,
    peer: Peer,
    right: Option<&'static Right>,
    news: watch::Receiver<()>,
}

impl Tenure {
    /// From now on. Without a right, which is the case with what is open to all,
    /// only the certificate counts.
    #[must_use]
    pub fn new(
        trust: Arc<Trust>,
        auditor: Auditor,
        peer: Peer,
        right: Option<&'static Right>,
    ) -> Self {
        let news = trust.news();
        Self {
            trust,
            auditor,
            peer,
            right,
            news,
        }
    }

    /// What the caller may see and do now.
    #[must_use]
    pub fn access(&self) -> Access {
        self.trust.roles().access(&self.peer, &self.auditor)
    }

    /// The same, when roles were read anew since this was asked last.
    pub fn renewed(&mut self) -> Option<Access> {
        // Whoever keeps roles is there for as long as the agent.
        let changed = self.news.has_changed().unwrap_or(false);
        changed.then(|| {
            self.news.mark_unchanged();
            self.access()
        })
    }

    /// Waits until the caller has no right any more to a stream about this VM, and
    /// tells why.
    pub async fn ended(mut self, over: Option<Over>) -> Fault {
        let mut fault = self.denied(over.as_ref()).await;
        if over.is_some() {
            fault.message.push_str("; the run itself goes on");
        }
        fault
    }

    async fn denied(&mut self, over: Option<&Over>) -> Fault {
        let vm = over.map(|over| over.0.as_str());
        let method = self.right.map_or("Watch", |right| right.method);
        loop {
            tokio::select! {
                () = run_out(&self.peer) => return self.access().expired(method),
                changed = self.news.changed() => if changed.is_err() {
                    std::future::pending::<()>().await;
                }
            }
            if let Some(right) = self.right
                && let Err(fault) = self.access().keeps(right, vm)
            {
                return fault;
            }
        }
    }
}

/// Waits for the end of a certificate, for ever where there is none.
async fn run_out(peer: &Peer) {
    while !peer.has_expired(Timestamp::now()) {
        match peer.left(Timestamp::now()) {
            Some(left) => tokio::time::sleep(left.min(LOOK)).await,
            None => std::future::pending().await,
        }
    }
}
