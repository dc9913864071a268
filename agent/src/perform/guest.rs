//! Waiting for a guest, asking it who it is, and setting its clock.
//!
//! Invariants: agent, address and ssh come in that order under one deadline; a
//! guest that does not come in time is reported with how far it came, and is
//! not a failure of the work before it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use vmsnap_engine::Cancel;
use vmsnap_hypervisor::{DomainState, Xml};

use super::Performer;
use crate::{
    faults::sentence,
    planning::{Done, Fault, Reason, outcome::GuestReport, request::WaitFor},
};

/// How long one question to the guest agent may take.
const ANSWER: Duration = Duration::from_secs(3);
/// Pause between two tries.
const AGAIN: Duration = Duration::from_millis(200);
/// How long one try to reach ssh may take.
const GREETED: Duration = Duration::from_secs(2);
/// What we say to an ssh server.
const GREETING: &[u8] = b"SSH-2.0-vmsnap\r\n";
/// How much an ssh server may say before its own greeting.
const PREAMBLE: usize = 4096;
/// How long a guest agent may take to connect after the guest's memory was loaded;
/// 0.1 to 0.4 s were measured.
const CONNECTS: Duration = Duration::from_secs(5);
/// A guest's clock may be off by this much before it counts as behind.
const CLOCK_SLACK_MS: i64 = 500;

/// How far a guest has come.
#[derive(Default)]
struct Seen {
    report: GuestReport,
    reached: Reached,
}

/// What of a guest is there.
#[derive(Default, Clone, Copy, PartialEq)]
enum Reached {
    #[default]
    Nothing,
    Agent,
    Address,
    /// The VM is off, so that nothing more will come.
    Off,
    /// The VM has no channel for a guest agent, so that nothing ever comes.
    NoChannel,
}

impl Reached {
    /// For people.
    fn words(self) -> &'static str {
        match self {
            Self::Nothing => "nothing yet: the guest agent did not answer",
            Self::Agent => "the guest agent, but no address",
            Self::Address => "an address, but no ssh server greeted there",
            Self::Off => "nothing more: the VM went off",
            Self::NoChannel => "nothing: the VM has no channel for a guest agent",
        }
    }
}

/// How waiting ended before its deadline.
enum End {
    There,
    Never,
    Cancelled,
}

impl Performer {
    pub(super) async fn wait_for(
        &self,
        index: usize,
        what: WaitFor,
        timeout_ms: u64,
        required: bool,
        cancel: &Cancel,
    ) -> Result<Done, Fault> {
        let since = Instant::now();
        let mut seen = Seen::default();
        let limit = Duration::from_millis(timeout_ms);
        // One deadline over everything, also over a question in the middle.
        let end = tokio::time::timeout(limit, self.until_there(what, &mut seen, cancel)).await;
        let Seen {
            mut report,
            reached,
        } = seen;
        report.ready_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        match end {
            Ok(End::There) => {
                return Ok(Done::Guest {
                    report: Box::new(report),
                });
            }
            Ok(End::Cancelled) => return Err(vmsnap_engine::Perform::cancelled(self, index)),
            Ok(End::Never) | Err(_) => {}
        }
        let fault = Fault::new(
            Reason::WaitTimeout,
            format!(
                "waited {} s of {} s for {} of VM '{}' and reached {}; what was done before stays",
                report.ready_ms / 1000,
                timeout_ms / 1000,
                match what {
                    WaitFor::None => "nothing",
                    WaitFor::Agent => "the guest agent",
                    WaitFor::Address => "an address",
                    WaitFor::Ssh => "ssh",
                },
                self.vm(),
                reached.words()
            ),
        )
        .with("vm", self.vm())
        .with("reached", reached.words());
        if required {
            return Err(fault);
        }
        Ok(Done::Late {
            fault: Box::new(fault),
            report: Box::new(report),
        })
    }

    /// Asks until it is there: the agent, then an address, then ssh.
    async fn until_there(&self, what: WaitFor, seen: &mut Seen, cancel: &Cancel) -> End {
        let definition = self.hypervisor.definition(self.vm(), Xml::Live).await;
        if definition.is_ok_and(|definition| definition.guest_agent().is_none()) {
            seen.reached = Reached::NoChannel;
            return End::Never;
        }
        loop {
            match self.hypervisor.agent_ping(self.vm(), ANSWER).await {
                Ok(()) => {
                    // The deadline may end this at any await: what was seen before stays.
                    if seen.reached == Reached::Nothing {
                        seen.reached = Reached::Agent;
                    }
                    seen.report = self.ask_guest(seen.report.clone()).await;
                    let addresses = seen.report.addresses();
                    if !addresses.is_empty() {
                        seen.reached = Reached::Address;
                    }
                    let there = match what {
                        WaitFor::None | WaitFor::Agent => true,
                        WaitFor::Address => !addresses.is_empty(),
                        WaitFor::Ssh => greeted(&addresses).await,
                    };
                    if there {
                        return End::There;
                    }
                }
                Err(_) => {
                    if let Ok(domain) = self.hypervisor.domain(self.vm()).await
                        && matches!(domain.state, DomainState::Shutoff | DomainState::Crashed)
                    {
                        seen.reached = Reached::Off;
                        return End::Never;
                    }
                }
            }
            if cancel.is_requested() {
                return End::Cancelled;
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// What the guest tells of itself; what it does not tell stays as it was.
    async fn ask_guest(&self, mut report: GuestReport) -> GuestReport {
        if let Ok(info) = self.hypervisor.guest_info(self.vm()).await {
            report.hostname = info.hostname.unwrap_or_default();
            report.os = info.os_name.unwrap_or_default();
            report.interfaces = info
                .interfaces
                .into_iter()
                .map(|interface| {
                    (
                        interface.name,
                        interface.mac.unwrap_or_default(),
                        interface.addresses,
                    )
                })
                .collect();
        }
        report
    }

    /// Sets the guest's clock, and looks whether that worked: the agent also sets
    /// the hardware clock, and calls it a failure when only that cannot be set.
    pub(super) async fn sync_clock(&self, done: &[Option<Done>]) -> Result<Done, Fault> {
        let gave_up = done
            .iter()
            .flatten()
            .any(|done| matches!(done, Done::Late { .. }));
        let patience = if gave_up { Duration::ZERO } else { CONNECTS };
        let skew_ms = match self.skew(patience).await {
            Ok(skew) => skew,
            Err(error) => {
                let note = format!(
                    "the guest's clock is not known, and behind by about the age of the snapshot: \
                     {}",
                    sentence(&error)
                );
                self.notice("CLOCK_BEHIND", note.clone(), "set the clock in the guest");
                return Ok(Done::Clock {
                    skew_ms: None,
                    set: false,
                    note,
                });
            }
        };
        if skew_ms.abs() <= CLOCK_SLACK_MS {
            return Ok(Done::Clock {
                skew_ms: Some(skew_ms),
                set: false,
                note: "the guest's clock is right".into(),
            });
        }
        let told = self
            .hypervisor
            .set_guest_time(self.vm(), SystemTime::now())
            .await;
        let now = self.skew(Duration::ZERO).await;
        let set = now.as_ref().is_ok_and(|skew| skew.abs() <= CLOCK_SLACK_MS);
        let words = match (&told, &now) {
            (Err(error), _) | (Ok(()), Err(error)) => sentence(error),
            (Ok(()), Ok(skew)) => format!("it is {skew} ms behind again"),
        };
        let note = match (&told, set) {
            (Ok(()), true) => format!("the guest's clock was {skew_ms} ms behind and is right now"),
            (Err(_), true) => format!(
                "the guest's clock was {skew_ms} ms behind and is right now, but not its hardware \
                 clock: {words}"
            ),
            (_, false) => {
                format!("the guest's clock is {skew_ms} ms behind and cannot be set: {words}")
            }
        };
        if !set {
            self.notice("CLOCK_BEHIND", note.clone(), "set the clock in the guest");
        }
        Ok(Done::Clock {
            skew_ms: Some(skew_ms),
            set,
            note,
        })
    }

    /// Milliseconds by which the guest's clock is behind. An agent that was loaded
    /// with the guest's memory connects a moment later.
    async fn skew(&self, patience: Duration) -> Result<i64, vmsnap_hypervisor::Error> {
        let deadline = Instant::now() + patience;
        loop {
            match self.hypervisor.guest_time(self.vm()).await {
                Ok(guest) => {
                    return Ok(millis_since_epoch(SystemTime::now()) - millis_since_epoch(guest));
                }
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        }
    }
}

fn millis_since_epoch(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// Whether an ssh server greets on one of the addresses. It may wait for us to
/// greet first: dropbear's connection is not even accepted before.
async fn greeted(addresses: &[String]) -> bool {
    for address in addresses {
        let greeting = async {
            let ip: std::net::IpAddr = address.parse().ok()?;
            let mut stream = TcpStream::connect((ip, 22)).await.ok()?;
            stream.write_all(GREETING).await.ok()?;
            let mut said = Vec::new();
            // Other lines may come before (RFC 4253, section 4.2).
            while said.len() < PREAMBLE && !greets(&said) {
                if stream.read_buf(&mut said).await.ok()? == 0 {
                    break;
                }
            }
            greets(&said).then_some(())
        };
        if let Ok(Some(())) = tokio::time::timeout(GREETED, greeting).await {
            return true;
        }
    }
    false
}

/// Whether a line begins as an ssh server's does.
fn greets(said: &[u8]) -> bool {
    said.split(|byte| *byte == b'\n')
        .any(|line| line.starts_with(b"SSH-"))
}

#[cfg(test)]
mod tests {
    use super::greets;

    #[test]
    fn an_ssh_server_is_known_by_a_line_of_its_own() {
        assert!(greets(b"SSH-2.0-dropbear"));
        assert!(greets(b"welcome\r\nSSH-2.0-OpenSSH_9.2\r\n"));
        assert!(!greets(b"") && !greets(b"SS") && !greets(b"220 SSH-like ftp"));
    }
}
