//! The hypervisor's errors as faults: which reason each class has.
//!
//! Invariant: the sentence says operation, subject, class and libvirt's own
//! words once; nothing of it is Debug output.

use vmsnap_hypervisor::{Error, ErrorKind, What};

use crate::planning::{Fault, Reason};

/// An error as a sentence, with the words of whoever refused.
#[must_use]
pub fn sentence(error: &Error) -> String {
    let mut text = format!(
        "cannot {} {}: {}",
        error.operation(),
        error.subject(),
        error.kind()
    );
    if !error.detail().is_empty() {
        text.push_str(" (");
        text.push_str(error.detail());
        text.push(')');
    }
    text
}

/// The reason of an error.
#[must_use]
pub fn reason(error: &Error) -> Reason {
    match error.kind() {
        ErrorKind::NotFound(What::Domain) => Reason::VmNotFound,
        ErrorKind::NotFound(What::Snapshot) => Reason::SnapshotNotFound,
        ErrorKind::NotFound(What::ImageSnapshot) | ErrorKind::MissingFile => {
            Reason::SnapshotNotWhole
        }
        ErrorKind::NotFound(What::Pool | What::Volume) => Reason::PoolNotFound,
        ErrorKind::NotFound(What::Disk) => Reason::DiskUnknown,
        ErrorKind::Unreachable | ErrorKind::ConnectionLost => Reason::HypervisorUnreachable,
        ErrorKind::Overdue { .. } => Reason::HypervisorOverdue,
        ErrorKind::NoSpace => Reason::NoSpace,
        ErrorKind::Busy => Reason::VmBusy,
        ErrorKind::BlockJobActive | ErrorKind::BlockJobNotReady => Reason::BlockJobActive,
        ErrorKind::AgentUnavailable | ErrorKind::AgentTimeout => Reason::GuestAgentUnavailable,
        ErrorKind::AgentFailed => Reason::GuestAgentFailed,
        ErrorKind::GuestFrozen => Reason::GuestFrozen,
        ErrorKind::InvalidState => Reason::DomainState,
        ErrorKind::NotMigratable => Reason::MemoryNotSavable,
        ErrorKind::Denied => Reason::StorageNotWritable,
        ErrorKind::Aborted => Reason::Cancelled,
        ErrorKind::AlreadyExists
        | ErrorKind::Unsupported
        | ErrorKind::InvalidArgument
        | ErrorKind::ImageLocked
        | ErrorKind::Risky
        | ErrorKind::Malformed
        | ErrorKind::Other => Reason::HypervisorFailed,
        // A panic is our own, and so is a class that this match does not know.
        _ => Reason::Internal,
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        let fault =
            Self::new(reason(&error), sentence(&error)).with("operation", error.operation());
        match error.code() {
            Some(code) => fault.with("libvirt_code", code),
            None => fault,
        }
    }
}
