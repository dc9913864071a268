//! What can go wrong between a caller and an agent.
//!
//! Invariant: a message says what was tried and on which endpoint; what could
//! help is [`Error::advice`], so that a program may show both or only one.

use std::{error::Error as _, io, path::PathBuf, time::Duration};

use tonic::{Code, Status};

use crate::{
    endpoint::{Endpoint, EndpointError},
    failure::Failure,
    tls::{Distrust, Obstacle},
};

/// What kept a caller from what he wanted, as he has to look for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hindrance {
    /// What was written cannot be meant: an address, a file, an option.
    Settings,
    /// No way leads to the machine.
    NoRoute,
    /// The machine is there, and no agent that answers.
    NoAgent,
    /// One side does not trust the other's certificate.
    NotTrusted,
    /// The agent, or the socket's permissions, do not let this caller.
    NotAllowed,
    /// The agent answered with another error.
    Failed,
}

impl Hindrance {
    /// As a program reads it: the `reason` of what no agent said.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Settings => "INVALID_ARGUMENTS",
            Self::NoRoute => "NO_ROUTE",
            Self::NoAgent => "AGENT_UNREACHABLE",
            Self::NotTrusted => "NOT_TRUSTED",
            Self::NotAllowed => "NOT_ALLOWED",
            Self::Failed => "FAILED",
        }
    }
}

/// What can go wrong between a caller and an agent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The endpoint could not be read.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// Nothing is at the socket's path.
    #[error("no agent there: {} does not exist", .path.display())]
    NoSuchSocket {
        /// The socket's path.
        path: PathBuf,
    },
    /// The socket is there, and this user may not open it.
    #[error("permission denied on the agent's socket {}", .path.display())]
    PermissionDenied {
        /// The socket's path.
        path: PathBuf,
    },
    /// The address is there, and nobody listens on it.
    #[error("no agent there: {endpoint} refused the connection")]
    Refused {
        /// What was to be connected to.
        endpoint: Endpoint,
    },
    /// No connection, or no answer, in time.
    #[error("{what} at {endpoint} timed out after {}", crate::quantity::format_duration(*.after))]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// Whom it was waited for.
        endpoint: Endpoint,
        /// How long it was waited for.
        after: Duration,
    },
    /// TLS is needed, and not all of its files are named.
    #[error("agent {endpoint} is spoken to with mutual TLS only, and {} not given", are(.missing))]
    TlsNeeded {
        /// What was to be connected to.
        endpoint: Endpoint,
        /// The options that are missing.
        missing: Vec<&'static str>,
    },
    /// A file of TLS cannot be used.
    #[error("{field}: {} {problem}", .path.display())]
    TlsFile {
        /// The option that names it.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// No way leads to the machine.
    #[error("no route to {endpoint}")]
    NoRoute {
        /// What was to be connected to.
        endpoint: Endpoint,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// One side does not trust the other.
    #[error("no trust between this caller and {endpoint}: {distrust}")]
    NotTrusted {
        /// What was to be connected to.
        endpoint: Endpoint,
        /// Who does not trust whom, and why.
        distrust: Distrust,
    },
    /// No connection for another reason.
    #[error("cannot connect to {endpoint}")]
    Unreachable {
        /// What was to be connected to.
        endpoint: Endpoint,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Something answers there, and it is no agent of this contract.
    #[error("what answers at {endpoint} is not a vmsnap agent, or an older one")]
    NotAnAgent {
        /// What was connected to.
        endpoint: Endpoint,
    },
    /// The connection broke and did not come back in time. A run that was
    /// accepted goes on at the agent all the same.
    #[error("lost the connection to {endpoint}{}", workflow_suffix(.workflow_id.as_deref()))]
    Lost {
        /// What was connected to.
        endpoint: Endpoint,
        /// The run that was followed, when its id was known already.
        workflow_id: Option<String>,
        /// The last try's error.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The agent answered with an error, or a run failed before it began.
    #[error("{0}")]
    Failed(Box<Failure>),
}

/// What is waited for first.
pub(crate) const CONNECTING: &str = "connecting to the agent";

fn workflow_suffix(id: Option<&str>) -> String {
    id.map(|id| format!(" while following workflow {id}"))
        .unwrap_or_default()
}

fn are(missing: &[&str]) -> String {
    let verb = if missing.len() == 1 { "is" } else { "are" };
    format!("{} {verb}", missing.join(", "))
}

impl Error {
    /// What kind of hindrance this is.
    #[must_use]
    pub fn hindrance(&self) -> Hindrance {
        match self {
            Error::Endpoint(_) | Error::TlsNeeded { .. } | Error::TlsFile { .. } => {
                Hindrance::Settings
            }
            Error::NoRoute { .. } => Hindrance::NoRoute,
            Error::NoSuchSocket { .. }
            | Error::Refused { .. }
            | Error::TimedOut { .. }
            | Error::Unreachable { .. }
            | Error::NotAnAgent { .. }
            | Error::Lost { .. } => Hindrance::NoAgent,
            Error::NotTrusted { .. } => Hindrance::NotTrusted,
            Error::PermissionDenied { .. } => Hindrance::NotAllowed,
            Error::Failed(failure) if failure.reason == Hindrance::NotAllowed.reason() => {
                Hindrance::NotAllowed
            }
            Error::Failed(_) => Hindrance::Failed,
        }
    }

    /// Whether no agent could be reached at all, as against an agent that
    /// answered with an error.
    #[must_use]
    pub fn is_no_agent(&self) -> bool {
        match self {
            Error::NoSuchSocket { .. }
            | Error::PermissionDenied { .. }
            | Error::Refused { .. }
            | Error::TimedOut { .. }
            | Error::NoRoute { .. }
            | Error::NotTrusted { .. }
            | Error::Unreachable { .. }
            | Error::NotAnAgent { .. }
            | Error::Lost { .. } => true,
            Error::Endpoint(_)
            | Error::TlsNeeded { .. }
            | Error::TlsFile { .. }
            | Error::Failed(_) => false,
        }
    }

    /// The agent's own failure, when it is one.
    #[must_use]
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Error::Failed(failure) => Some(failure),
            _ => None,
        }
    }

    /// The message with its causes, on one line.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = self.source();
        while let Some(cause) = source {
            // A status shows itself with its causes' Debug text; they come next.
            let cause_text = cause
                .downcast_ref::<Status>()
                .map_or_else(|| cause.to_string(), |status| status.message().to_owned());
            // Layers below repeat each other; once is enough.
            if !cause_text.is_empty() && !text.ends_with(&cause_text) {
                text.push_str(": ");
                text.push_str(&cause_text);
            }
            source = cause.source();
        }
        text
    }

    /// What to look at or to do, for a person.
    #[must_use]
    pub fn advice(&self) -> Option<String> {
        match self {
            Error::NoSuchSocket { .. } | Error::Refused { endpoint: Endpoint::Unix(_) } => Some(
                "is vmsnap-agent running (`vmsnap-agent serve`), and is this the socket of its configuration?".to_owned(),
            ),
            Error::Refused { endpoint: Endpoint::Tcp { .. } } => Some(
                "is vmsnap-agent running there, and does its configuration listen on this address?".to_owned(),
            ),
            Error::PermissionDenied { .. } => Some(
                "run as root, or as a member of the group that owns the socket".to_owned(),
            ),
            Error::TlsNeeded { .. } => Some(
                "give ca_path, client_cert and client_key (or VMSNAP_CA_PATH, VMSNAP_CLIENT_CERT and VMSNAP_CLIENT_KEY), or run this on the hypervisor itself; `vmsnap cert` makes certificates for those who have none".to_owned(),
            ),
            Error::NoRoute { .. } => Some(
                "check the name, the address and the network; nothing answered from there".to_owned(),
            ),
            Error::TimedOut { what: CONNECTING, .. } => Some(
                "check the address and the firewalls between here and there".to_owned(),
            ),
            Error::NotTrusted { distrust, .. } => Some(distrust.advice().to_owned()),
            Error::TlsFile { .. } => Some("PEM files are needed, as `vmsnap cert` makes them".to_owned()),
            Error::Failed(failure) if failure.reason == Hindrance::NotAllowed.reason() => Some(
                "ask who keeps the agent's roles (trust.roles in its configuration) for the right".to_owned(),
            ),
            Error::Lost { workflow_id: Some(id), .. } => Some(format!(
                "the run belongs to the agent and goes on without its callers; follow it with `vmsnap watch {id}`"
            )),
            Error::NotAnAgent { .. } => Some("compare `vmsnap version` on both sides".to_owned()),
            Error::Failed(_)
            | Error::Endpoint(_)
            | Error::TimedOut { .. }
            | Error::Unreachable { .. }
            | Error::Lost { workflow_id: None, .. } => None,
        }
    }

    /// The error of a connection that did not come up.
    pub(crate) fn connecting(
        endpoint: &Endpoint,
        source: Box<dyn std::error::Error + Send + Sync>,
    ) -> Self {
        use io::ErrorKind as Kind;

        if let Some(distrust) = distrust(&*source) {
            return Error::NotTrusted {
                endpoint: endpoint.clone(),
                distrust,
            };
        }
        let kind = match find::<Obstacle>(&*source) {
            Some(Obstacle::Name(_)) => Some(Kind::HostUnreachable),
            Some(Obstacle::Connect(error) | Obstacle::Tls(error)) => Some(error.kind()),
            None => find::<io::Error>(&*source).map(io::Error::kind),
        };
        match (kind, endpoint) {
            (
                Some(
                    Kind::HostUnreachable
                    | Kind::NetworkUnreachable
                    | Kind::AddrNotAvailable
                    | Kind::NetworkDown,
                ),
                _,
            ) => Error::NoRoute {
                endpoint: endpoint.clone(),
                source,
            },
            (Some(io::ErrorKind::NotFound), Endpoint::Unix(path)) => {
                Error::NoSuchSocket { path: path.clone() }
            }
            (Some(io::ErrorKind::PermissionDenied), Endpoint::Unix(path)) => {
                Error::PermissionDenied { path: path.clone() }
            }
            (Some(io::ErrorKind::ConnectionRefused), _) => Error::Refused {
                endpoint: endpoint.clone(),
            },
            _ => Error::Unreachable {
                endpoint: endpoint.clone(),
                source,
            },
        }
    }

    /// The error of a call that ended with a status.
    pub(crate) fn answered(endpoint: &Endpoint, status: Status) -> Self {
        let failure = Failure::from(&status);
        if failure.is_from_agent() {
            return Error::Failed(Box::new(failure));
        }
        if status.code() == Code::Unimplemented {
            return Error::NotAnAgent {
                endpoint: endpoint.clone(),
            };
        }
        if is_transport(&status) {
            return match Error::connecting(endpoint, Box::new(status)) {
                // The call had a connection before, so "cannot connect" would mislead.
                Error::Unreachable { endpoint, source } => Error::Lost {
                    endpoint,
                    workflow_id: None,
                    source,
                },
                known => known,
            };
        }
        Error::Failed(Box::new(failure))
    }
}

/// What an error's chain tells of trust.
pub(crate) fn distrust(error: &(dyn std::error::Error + 'static)) -> Option<Distrust> {
    match find::<Obstacle>(error)? {
        Obstacle::Tls(error) => Distrust::of(error),
        Obstacle::Name(_) | Obstacle::Connect(_) => None,
    }
}

/// Whether a status tells of the way to the agent rather than of the agent.
///
/// An agent's own errors carry an `ErrorInfo`. What tonic makes of a broken
/// connection has none, and one of these codes: `UNKNOWN` is what an answer
/// that ends without its trailers becomes.
pub(crate) fn is_transport(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled
    ) && !Failure::from(status).is_from_agent()
}

fn find<'a, E: std::error::Error + 'static>(
    error: &'a (dyn std::error::Error + 'static),
) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<E>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_is_reset_is_told_in_words_without_the_insides_of_its_cause() {
        let endpoint = Endpoint::parse("unix:///run/vmsnap/agent.sock").unwrap();
        let reset = io::Error::from(io::ErrorKind::ConnectionReset);
        let error = Error::answered(&endpoint, Status::from_error(Box::new(reset)));
        assert!(matches!(error, Error::Lost { .. }), "{error:?}");
        assert_eq!(
            error.chain(),
            "lost the connection to unix:///run/vmsnap/agent.sock: connection reset"
        );
    }
}
