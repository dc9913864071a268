//! What can go wrong, by what a caller can do about it.
//!
//! Invariants: an [`Error`] says operation and subject, its source says libvirt's own words, and
//! neither repeats the other. The class is taken from libvirt's code *and* domain *and*, where libvirt
//! puts several things under one code, its message: a lost connection for example comes as code 1 or 38
//! and is recognised by the domain 7 (RPC) alone.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virt::sys;

/// The thing that a look-up did not find.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// A domain.
    Domain,
    /// A snapshot in libvirt's list.
    Snapshot,
    /// An internal snapshot inside an image file.
    ImageSnapshot,
    /// A storage pool.
    Pool,
    /// A storage volume.
    Volume,
    /// A disk of a domain.
    Disk,
}

/// The class of an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The named thing does not exist.
    NotFound(What),
    /// The name or the file is taken.
    AlreadyExists,
    /// No connection: the call was never sent.
    Unreachable,
    /// The connection broke while the call was in flight: whether it took effect is unknown.
    ConnectionLost,
    /// The call was sent and its deadline passed: it goes on, its outcome is unknown.
    Overdue {
        /// The deadline that passed.
        after: Duration,
    },
    /// A file system or pool is full.
    NoSpace,
    /// Somebody else holds what the call needs: the call had no effect.
    Busy,
    /// An open block job is in the way.
    BlockJobActive,
    /// The block job cannot pivot yet.
    BlockJobNotReady,
    /// The guest has no agent, or it is not connected or does not synchronise: nothing was asked of it.
    AgentUnavailable,
    /// The guest agent got the command and did not answer in time: it may still carry it out.
    AgentTimeout,
    /// The guest agent answered with a failure.
    AgentFailed,
    /// The guest agent refuses because the guest's file systems are frozen.
    GuestFrozen,
    /// The domain, pool or volume is not in a state that allows the call.
    InvalidState,
    /// A device of the domain keeps its memory from being saved.
    NotMigratable,
    /// This host, driver or configuration cannot do it.
    Unsupported,
    /// An argument or an XML document was refused.
    InvalidArgument,
    /// Access was refused.
    Denied,
    /// A file that is needed is not there.
    MissingFile,
    /// Another process holds the image's lock.
    ImageLocked,
    /// libvirt asks for force before it reverts.
    Risky,
    /// Somebody cancelled the operation.
    Aborted,
    /// What was read could not be understood.
    Malformed,
    /// The call panicked inside the binding.
    CallPanicked,
    /// None of the above; the detail says more.
    Other,
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotFound(What::Domain) => "no such domain",
            Self::NotFound(What::Snapshot) => "no such snapshot",
            Self::NotFound(What::ImageSnapshot) => "the image holds no such internal snapshot",
            Self::NotFound(What::Pool) => "no such storage pool",
            Self::NotFound(What::Volume) => "no such volume",
            Self::NotFound(What::Disk) => "no such disk",
            Self::AlreadyExists => "it exists already",
            Self::Unreachable => "libvirt cannot be reached",
            Self::ConnectionLost => "the connection to libvirt broke before it answered",
            Self::Overdue { after } => {
                return write!(
                    f,
                    "no answer from libvirt within {:.1} s",
                    after.as_secs_f64()
                );
            }
            Self::NoSpace => "no space left",
            Self::Busy => "another operation is in the way",
            Self::BlockJobActive => "a block job is open",
            Self::BlockJobNotReady => "the block job is not ready yet",
            Self::AgentUnavailable => "the guest agent is not available",
            Self::AgentTimeout => "the guest agent did not answer in time",
            Self::AgentFailed => "the guest agent reported a failure",
            Self::GuestFrozen => "the guest's file systems are frozen",
            Self::InvalidState => "the present state does not allow it",
            Self::NotMigratable => "a device keeps the memory from being saved",
            Self::Unsupported => "it is not supported here",
            Self::InvalidArgument => "an argument was refused",
            Self::Denied => "access was denied",
            Self::MissingFile => "a file is missing",
            Self::ImageLocked => "the image is in use",
            Self::Risky => "libvirt asks for force",
            Self::Aborted => "it was cancelled",
            Self::Malformed => "what was read could not be understood",
            Self::CallPanicked => "the call panicked",
            Self::Other => "it failed",
        })
    }
}

/// An error of this crate: what was tried on what, its class, and the words of whoever refused it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(Box<Inner>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Inner {
    operation: &'static str,
    subject: String,
    fault: Fault,
}

/// The refusal without its context; closures that run on the call threads return it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub kind: ErrorKind,
    /// libvirt's error code and domain, when libvirt said it.
    pub libvirt: Option<(u32, u32)>,
    pub detail: String,
}

impl Error {
    pub(crate) fn new(operation: &'static str, subject: impl Into<String>, fault: Fault) -> Self {
        Self(Box::new(Inner {
            operation,
            subject: subject.into(),
            fault,
        }))
    }

    /// What was tried, as words that follow "cannot".
    pub fn operation(&self) -> &'static str {
        self.0.operation
    }

    /// What it was tried on, for example `domain web`.
    pub fn subject(&self) -> &str {
        &self.0.subject
    }

    /// The class.
    pub fn kind(&self) -> &ErrorKind {
        &self.0.fault.kind
    }

    /// libvirt's (or the tool's) own words; may be empty.
    pub fn detail(&self) -> &str {
        &self.0.fault.detail
    }

    /// libvirt's error code (`virErrorNumber`), when libvirt said it.
    pub fn code(&self) -> Option<u32> {
        self.0.fault.libvirt.map(|(code, _)| code)
    }

    /// libvirt's error domain (`virErrorDomain`), when libvirt said it.
    pub fn domain(&self) -> Option<u32> {
        self.0.fault.libvirt.map(|(_, domain)| domain)
    }

    /// Whether the call may have taken effect although it failed: look before doing it again.
    pub fn outcome_unknown(&self) -> bool {
        matches!(
            self.kind(),
            ErrorKind::ConnectionLost
                | ErrorKind::Overdue { .. }
                | ErrorKind::AgentTimeout
                | ErrorKind::CallPanicked
        )
    }

    /// Whether the thing asked for does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self.kind(), ErrorKind::NotFound(_))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}", self.0.operation)?;
        if !self.0.subject.is_empty() {
            write!(f, " {}", self.0.subject)?;
        }
        write!(f, ": {}", self.0.fault.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        (!self.0.fault.detail.is_empty()).then_some(&self.0.fault as _)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)?;
        match self.libvirt {
            Some((code, domain)) => write!(f, " (libvirt error {code}, domain {domain})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Fault {}

impl Fault {
    pub fn new(kind: ErrorKind, detail: impl Into<String>) -> Self {
        Self {
            kind,
            libvirt: None,
            detail: detail.into(),
        }
    }

    pub fn malformed(detail: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Malformed, detail.to_string())
    }

    /// The last libvirt error of *this* thread; libvirt keeps it per thread.
    pub fn last() -> Self {
        virt::error::Error::last_error().into()
    }
}

impl From<virt::error::Error> for Fault {
    fn from(error: virt::error::Error) -> Self {
        let (code, domain) = (error.code().to_raw(), error.domain().to_raw());
        Self {
            kind: classify(code, domain, error.message()),
            libvirt: Some((code, domain)),
            detail: error.message().to_owned(),
        }
    }
}

/// The class of a libvirt error.
///
/// The rules, with the messages they rest on, were observed on libvirt 11.3; each is held by a test.
pub(crate) fn classify(code: u32, domain: u32, message: &str) -> ErrorKind {
    let says = |needle: &str| message.contains(needle);
    if domain == sys::VIR_FROM_RPC {
        return classify_rpc(code, message);
    }
    if says("No space left on device") || says("Disk quota exceeded") {
        return ErrorKind::NoSpace;
    }
    if says("cannot acquire state change lock") {
        return ErrorKind::Busy;
    }
    if says("Failed to get \"write\" lock") || says("Failed to get shared \"write\" lock") {
        return ErrorKind::ImageLocked;
    }
    if says("not ready for pivot yet") {
        return ErrorKind::BlockJobNotReady;
    }
    if says("active block job") && !says("does not have an active block job") {
        return ErrorKind::BlockJobActive;
    }
    if says("cannot migrate domain") || says("Migration is disabled") {
        return ErrorKind::NotMigratable;
    }
    match code {
        sys::VIR_ERR_NO_DOMAIN => ErrorKind::NotFound(What::Domain),
        sys::VIR_ERR_NO_DOMAIN_SNAPSHOT => ErrorKind::NotFound(What::Snapshot),
        sys::VIR_ERR_NO_STORAGE_POOL => ErrorKind::NotFound(What::Pool),
        sys::VIR_ERR_NO_STORAGE_VOL => ErrorKind::NotFound(What::Volume),
        sys::VIR_ERR_STORAGE_VOL_EXIST | sys::VIR_ERR_DOM_EXIST => ErrorKind::AlreadyExists,
        sys::VIR_ERR_OPERATION_TIMEOUT | sys::VIR_ERR_RESOURCE_BUSY => ErrorKind::Busy,
        sys::VIR_ERR_BLOCK_COPY_ACTIVE => ErrorKind::BlockJobActive,
        sys::VIR_ERR_AGENT_UNRESPONSIVE => ErrorKind::AgentUnavailable,
        sys::VIR_ERR_AGENT_COMMAND_TIMEOUT => ErrorKind::AgentTimeout,
        sys::VIR_ERR_AGENT_COMMAND_FAILED if says("in frozen state") => ErrorKind::GuestFrozen,
        sys::VIR_ERR_AGENT_COMMAND_FAILED => ErrorKind::AgentFailed,
        sys::VIR_ERR_ARGUMENT_UNSUPPORTED if says("guest agent is not configured") => {
            ErrorKind::AgentUnavailable
        }
        sys::VIR_ERR_SNAPSHOT_REVERT_RISKY => ErrorKind::Risky,
        sys::VIR_ERR_OPERATION_ABORTED => ErrorKind::Aborted,
        sys::VIR_ERR_OPERATION_DENIED
        | sys::VIR_ERR_ACCESS_DENIED
        | sys::VIR_ERR_AUTH_FAILED
        | sys::VIR_ERR_AUTH_UNAVAILABLE
        | sys::VIR_ERR_AUTH_CANCELLED => ErrorKind::Denied,
        // One of libvirt's own drivers is not installed, and the hypervisor's is there.
        sys::VIR_ERR_NO_CONNECT if says("available for secret://") => ErrorKind::Unsupported,
        sys::VIR_ERR_NO_CONNECT => ErrorKind::Unreachable,
        sys::VIR_ERR_OPERATION_INVALID => ErrorKind::InvalidState,
        sys::VIR_ERR_CONFIG_UNSUPPORTED if says("already exists") => ErrorKind::AlreadyExists,
        sys::VIR_ERR_CONFIG_UNSUPPORTED if says("no disk named") => ErrorKind::NotFound(What::Disk),
        sys::VIR_ERR_CONFIG_UNSUPPORTED
        | sys::VIR_ERR_NO_SUPPORT
        | sys::VIR_ERR_OPERATION_UNSUPPORTED
        | sys::VIR_ERR_ARGUMENT_UNSUPPORTED => ErrorKind::Unsupported,
        sys::VIR_ERR_INVALID_ARG if says("unsupported flags") => ErrorKind::Unsupported,
        sys::VIR_ERR_INVALID_ARG
        | sys::VIR_ERR_XML_ERROR
        | sys::VIR_ERR_XML_DETAIL
        | sys::VIR_ERR_XML_INVALID_SCHEMA => ErrorKind::InvalidArgument,
        _ => classify_words(message),
    }
}

/// Codes 1, 9 and 38 carry nearly anything; only the words tell.
fn classify_words(message: &str) -> ErrorKind {
    let says = |needle: &str| message.contains(needle);
    if says("does not have internal snapshot") {
        ErrorKind::NotFound(What::ImageSnapshot)
    } else if says("already exists") {
        ErrorKind::AlreadyExists
    } else if says("No such file or directory")
        || says("missing existing file")
        || says("Cannot access storage file")
        || says("Cannot access backing file")
    {
        // "Cannot access ... (as uid:..., gid:...): Permission denied" is the one that is not missing.
        if says("Permission denied") {
            ErrorKind::Denied
        } else {
            ErrorKind::MissingFile
        }
    } else if says("Permission denied")
        || says("Operation not permitted")
        || says("Read-only file system")
    {
        ErrorKind::Denied
    } else if says("not running") || says("not paused") || says("is not active") {
        ErrorKind::InvalidState
    } else {
        ErrorKind::Other
    }
}

fn classify_rpc(code: u32, message: &str) -> ErrorKind {
    let says = |needle: &str| message.contains(needle);
    if matches!(
        code,
        sys::VIR_ERR_AUTH_FAILED | sys::VIR_ERR_AUTH_UNAVAILABLE | sys::VIR_ERR_AUTH_CANCELLED
    ) || says("Permission denied")
    {
        ErrorKind::Denied
    } else if says("Failed to connect socket")
        || says("client socket is closed")
        || says("Cannot find")
    {
        // Nothing went over the wire: opening failed, or the socket was known to be dead.
        ErrorKind::Unreachable
    } else {
        ErrorKind::ConnectionLost
    }
}

#[cfg(test)]
#[path = "error_tests.rs"]
mod tests;
