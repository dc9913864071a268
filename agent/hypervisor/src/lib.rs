//! All of libvirt, and all of `unsafe`, behind one asynchronous face.
//!
//! Purpose: [`Hypervisor`] is a cheap handle whose methods are libvirt's calls,
//! each on a thread of its own under a deadline of ours (see `lanes`). It
//! reconnects by itself and registers for events again.
//!
//! Invariants
//! - libvirt's and the binding's types stop here.
//! - No call is without a deadline; one that passes it is counted, not forgotten.
//! - Reads, effects and releases have a connection each, and so have events.
//! - A read that met a broken connection is repeated once; an effect never is,
//!   unless it is certain that it was not sent.

mod block;
mod connection;
mod counters;
mod definition;
mod domain;
mod error;
mod events;
pub mod failpoint;
pub mod flush;
mod guest;
pub mod image;
mod lanes;
mod options;
pub mod overlap;
mod peer;
mod qcow2;
pub mod saved;
mod snapshot;
mod snapshot_xml;
mod stamp;
mod storage;
#[cfg(test)]
mod xml_fuzz;

pub use block::{BlockJob, BlockJobKind};
pub use connection::{HostInfo, Hypervisor, LinkStatus};
pub use counters::{Counters, counters};
pub use definition::{
    BackingImage, ChannelDefinition, DiskDefinition, DiskSource, DomainDefinition, Mirror, Nvram,
    SharedMemory,
};
pub use domain::{DomainJob, DomainState, DomainSummary, MemTune, StateReason, VcpuInfo, Xml};
pub use error::{Error, ErrorKind, What};
pub use events::{DomainEvent, EventKind, Lifecycle};
pub use guest::{FreezeStatus, GuestInfo, GuestInterface};
pub use lanes::{Bulk, OverdueCall};
pub use options::Options;
pub use peer::peer_groups;
pub use snapshot::{
    DeleteFlags, RevertFlags, SnapshotDiskInfo, SnapshotDiskMode, SnapshotDiskSpec, SnapshotInfo,
    SnapshotMemory, SnapshotMemoryInfo, SnapshotMode, SnapshotSpec,
};
pub use storage::{PoolInfo, VolumeInfo};
