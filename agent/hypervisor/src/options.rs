//! How a [`Hypervisor`](crate::Hypervisor) is reached and how long its calls may take.

use std::time::Duration;

/// Where libvirt is, and every limit that the agent puts around a call to it.
///
/// libvirt itself bounds hardly any call, so none is made without one of these limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// libvirt connection URI, for example `qemu:///system`.
    pub uri: String,
    /// Opening the connections when the agent starts.
    pub connect_deadline: Duration,
    /// A call that only reads.
    pub read_deadline: Duration,
    /// A call that changes something and moves no bulk data.
    pub effect_deadline: Duration,
    /// A call that may copy a whole memory or disk: snapshot, revert, merge, resize.
    pub transfer_deadline: Duration,
    /// A call that lets go of a guest: resume, thaw, abort a job.
    pub release_deadline: Duration,
    /// How long a call waits for its turn before it is refused as busy.
    pub queue_deadline: Duration,
    /// How long a call waits for a connection that was lost a moment ago to come back.
    ///
    /// A restarted libvirtd accepts connections again after some seconds.
    pub reconnect_grace: Duration,
    /// Seconds between keepalive probes; with [`keepalive_count`](Self::keepalive_count) unanswered
    /// probes the connection counts as lost. Without it nothing tells a hung daemon from a slow one.
    pub keepalive_interval: u32,
    /// Number of unanswered keepalive probes that end a connection.
    pub keepalive_count: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            uri: "qemu:///system".to_owned(),
            connect_deadline: Duration::from_secs(15),
            read_deadline: Duration::from_secs(30),
            effect_deadline: Duration::from_secs(120),
            transfer_deadline: Duration::from_secs(12 * 3600),
            release_deadline: Duration::from_secs(30),
            queue_deadline: Duration::from_secs(30),
            reconnect_grace: Duration::from_secs(8),
            // Before the shortest of the deadlines: a hung daemon is told from a slow call.
            keepalive_interval: 3,
            keepalive_count: 4,
        }
    }
}

impl Options {
    /// The defaults, for the libvirt at `uri`.
    pub fn for_uri(uri: impl Into<String>) -> Self {
        Self {
            uri: uri.into(),
            ..Self::default()
        }
    }
}
