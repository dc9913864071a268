//! The guest through its agent: ping, freeze and thaw, who it is, its clock.
//!
//! Invariants: libvirt's own time limit for the agent is set before each call
//! that could hang in the guest, and our deadline lies beyond it; thawing and
//! asking for the status use the lane of releases, everything else one of its own,
//! so that nobody but other questions to guests waits for a guest.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use virt::{domain::Domain, sys};

use crate::{
    connection::{Asking, Hypervisor},
    error::{Error, ErrorKind, Fault},
};

/// How long an agent that is well takes at most to answer a simple question.
const ANSWER: Duration = Duration::from_secs(5);

/// Whether file systems are frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FreezeStatus {
    /// None is.
    Thawed,
    /// They are.
    Frozen,
}

/// A network interface of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestInterface {
    /// Name.
    pub name: String,
    /// Hardware address.
    pub mac: Option<String>,
    /// Addresses, without prefix length.
    pub addresses: Vec<String>,
}

/// What the guest tells of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestInfo {
    /// Host name.
    pub hostname: Option<String>,
    /// Operating system, for people.
    pub os_name: Option<String>,
    /// Interfaces.
    pub interfaces: Vec<GuestInterface>,
}

fn whole_seconds(time: Duration) -> i32 {
    i32::try_from(time.as_millis().div_ceil(1000)).unwrap_or(i32::MAX)
}

/// Sends one command to the agent and returns what is under `return`.
fn ask(domain: &Domain, command: &Value, answer: Duration) -> Result<Value, Fault> {
    let reply = domain.qemu_agent_command(&command.to_string(), whole_seconds(answer), 0)?;
    let mut reply: Value = serde_json::from_str(&reply).map_err(Fault::malformed)?;
    Ok(reply["return"].take())
}

fn limit(domain: &Domain, answer: Duration) -> Result<(), Fault> {
    // SAFETY: the handle is alive.
    let set =
        unsafe { sys::virDomainAgentSetResponseTimeout(domain.as_ptr(), whole_seconds(answer), 0) };
    if set < 0 { Err(Fault::last()) } else { Ok(()) }
}

fn count(result: i32) -> Result<u32, Fault> {
    u32::try_from(result).map_err(|_| Fault::last())
}

impl Hypervisor {
    /// Whether the agent answers within `answer`.
    ///
    /// # Errors
    /// When it does not, or there is none.
    pub async fn agent_ping(&self, name: &str, answer: Duration) -> Result<(), Error> {
        let deadline = Self::agent_deadline(answer);
        self.ask_guest(
            Asking::ToRead,
            "ping the guest agent of",
            name,
            deadline,
            move |domain| ask(domain, &json!({"execute": "guest-ping"}), answer).map(|_| ()),
        )
        .await
    }

    /// Freezes all file systems; returns how many. None means that nothing is
    /// protected. On an error they may be frozen all the same, or become so.
    ///
    /// # Errors
    /// When the agent is not there, refuses, or does not answer within `answer`.
    pub async fn freeze(&self, name: &str, answer: Duration) -> Result<u32, Error> {
        let deadline = Self::agent_deadline(answer);
        self.ask_guest(Asking::ToHold, "freeze", name, deadline, move |domain| {
            limit(domain, answer)?;
            // SAFETY: the handle is alive; no mount points means all.
            count(unsafe { sys::virDomainFSFreeze(domain.as_ptr(), std::ptr::null_mut(), 0, 0) })
        })
        .await
    }

    /// Thaws all file systems; returns how many were frozen.
    ///
    /// # Errors
    /// When the agent is not there or does not answer.
    pub async fn thaw(&self, name: &str) -> Result<u32, Error> {
        self.ask_guest(
            Asking::ToRelease,
            "thaw",
            name,
            Self::agent_deadline(ANSWER),
            |domain| {
                limit(domain, ANSWER)?;
                // SAFETY: the handle is alive; no mount points means all.
                count(unsafe { sys::virDomainFSThaw(domain.as_ptr(), std::ptr::null_mut(), 0, 0) })
            },
        )
        .await
    }

    /// Whether file systems are frozen.
    ///
    /// # Errors
    /// When the agent is not there or does not answer.
    pub async fn freeze_status(&self, name: &str) -> Result<FreezeStatus, Error> {
        let deadline = Self::agent_deadline(ANSWER);
        self.ask_guest(
            Asking::AfterRelease,
            "ask for the freeze status of",
            name,
            deadline,
            |domain| {
                let status = ask(domain, &json!({"execute": "guest-fsfreeze-status"}), ANSWER)?;
                match status.as_str() {
                    Some("thawed") => Ok(FreezeStatus::Thawed),
                    Some("frozen") => Ok(FreezeStatus::Frozen),
                    _ => Err(Fault::malformed(
                        "the agent's freeze status is neither frozen nor thawed",
                    )),
                }
            },
        )
        .await
    }

    /// Host name, operating system and addresses; what the guest does not tell
    /// is absent.
    ///
    /// # Errors
    /// When the agent is not there or does not answer.
    pub async fn guest_info(&self, name: &str) -> Result<GuestInfo, Error> {
        let deadline = Self::agent_deadline(ANSWER) * 3;
        self.ask_guest(
            Asking::ToRead,
            "ask the guest of",
            name,
            deadline,
            |domain| {
                let question = |what: &str| ask(domain, &json!({"execute": what}), ANSWER);
                let optional = |what: &str| match question(what) {
                    Ok(value) => Ok(value),
                    // Not every agent knows every question.
                    Err(fault) if fault.kind == ErrorKind::AgentFailed => Ok(Value::Null),
                    Err(fault) => Err(fault),
                };
                let text = |value: &Value| value.as_str().map(str::to_owned);
                let host = optional("guest-get-host-name")?;
                let os = optional("guest-get-osinfo")?;
                let interfaces = optional("guest-network-get-interfaces")?;
                Ok(GuestInfo {
                    hostname: text(&host["host-name"]),
                    os_name: text(&os["pretty-name"])
                        .or_else(|| text(&os["name"]))
                        .or_else(|| {
                            text(&os["kernel-release"]).map(|kernel| format!("Linux {kernel}"))
                        }),
                    interfaces: interfaces
                        .as_array()
                        .into_iter()
                        .flatten()
                        .filter_map(|interface| {
                            Some(GuestInterface {
                                name: text(&interface["name"])?,
                                mac: text(&interface["hardware-address"]),
                                addresses: interface["ip-addresses"]
                                    .as_array()
                                    .into_iter()
                                    .flatten()
                                    .filter_map(|address| text(&address["ip-address"]))
                                    .collect(),
                            })
                        })
                        .collect(),
                })
            },
        )
        .await
    }

    /// The guest's clock.
    ///
    /// # Errors
    /// When the agent is not there, does not answer, or cannot tell.
    pub async fn guest_time(&self, name: &str) -> Result<SystemTime, Error> {
        let deadline = Self::agent_deadline(ANSWER);
        self.ask_guest(
            Asking::ToRead,
            "read the clock of",
            name,
            deadline,
            |domain| {
                limit(domain, ANSWER)?;
                let (seconds, nanos) = domain.time(0)?;
                let since = Duration::new(
                    u64::try_from(seconds).map_err(Fault::malformed)?,
                    u32::try_from(nanos).map_err(Fault::malformed)?,
                );
                Ok(UNIX_EPOCH + since)
            },
        )
        .await
    }

    /// Sets the guest's clock.
    ///
    /// # Errors
    /// When the agent is not there, does not answer, or cannot.
    pub async fn set_guest_time(&self, name: &str, time: SystemTime) -> Result<(), Error> {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let deadline = Self::agent_deadline(ANSWER);
        self.ask_guest(
            Asking::ToChange,
            "set the clock of",
            name,
            deadline,
            move |domain| {
                limit(domain, ANSWER)?;
                let seconds = i64::try_from(since.as_secs()).map_err(Fault::malformed)?;
                let nanos = i32::try_from(since.subsec_nanos()).map_err(Fault::malformed)?;
                Ok(domain.set_time(seconds, nanos, 0)?)
            },
        )
        .await
    }
}
