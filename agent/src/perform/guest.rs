//! Waiting for a guest, asking it who it is, and setting its clock.
//!
//! Invariants: agent, address and ssh come in that order under one deadline; a
//! guest that does not come in time is reported with how far it came, and is
//! not a failure of the work before it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::{io::AsyncReadExt as _, net::TcpStream};
use vmsnap_engine::Cancel;

use super::Performer;
use crate::planning::{Done, Fault, Reason, outcome::GuestReport, request::WaitFor};

/// How long one question to the guest agent may take.
const ANSWER: Duration = Duration::from_secs(3);
/// Pause between two tries.
const AGAIN: Duration = Duration::from_millis(200);
/// How long one try to reach ssh may take.
const GREETING: Duration = Duration::from_secs(2);
/// A guest's clock may be off by this much before it counts as behind.
const CLOCK_SLACK_MS: i64 = 500;

impl Performer {
    pub(super) async fn wait_for(
        &self,
        what: WaitFor,
        timeout_ms: u64,
        required: bool,
        cancel: &Cancel,
    ) -> Result<Done, Fault> {
        let since = Instant::now();
        let deadline = since + Duration::from_millis(timeout_ms);
        let mut report = GuestReport::default();
        let mut reached = "nothing yet: the guest agent did not answer";
        loop {
            if self.hypervisor.agent_ping(self.vm(), ANSWER).await.is_ok() {
                reached = "the guest agent, but no address";
                report = self.ask_guest(report).await;
                let addresses = report.addresses();
                let there = match what {
                    WaitFor::None | WaitFor::Agent => true,
                    WaitFor::Address => !addresses.is_empty(),
                    WaitFor::Ssh => {
                        if !addresses.is_empty() {
                            reached = "an address, but no ssh server greeted there";
                        }
                        greeted(&addresses).await
                    }
                };
                if there {
                    report.ready_ms =
                        u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
                    return Ok(Done::Guest {
                        report: Box::new(report),
                    });
                }
            }
            if cancel.is_requested() {
                return Err(vmsnap_engine::Perform::cancelled(self, 0));
            }
            if Instant::now() >= deadline {
                let fault = Fault::new(
                    Reason::WaitTimeout,
                    format!(
                        "waited {} s for {} of VM '{}' and reached {reached}; what was done before \
                         stays",
                        timeout_ms / 1000,
                        match what {
                            WaitFor::None => "nothing",
                            WaitFor::Agent => "the guest agent",
                            WaitFor::Address => "an address",
                            WaitFor::Ssh => "ssh",
                        },
                        self.vm()
                    ),
                )
                .with("vm", self.vm())
                .with("reached", reached);
                if required {
                    return Err(fault);
                }
                report.ready_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
                return Ok(Done::Late {
                    fault: Box::new(fault),
                    report: Box::new(report),
                });
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

    pub(super) async fn sync_clock(&self) -> Result<Done, Fault> {
        let unknown = |note: String| Done::Clock {
            skew_ms: None,
            set: false,
            note,
        };
        let guest = match self.hypervisor.guest_time(self.vm()).await {
            Ok(time) => time,
            Err(error) => {
                return Ok(unknown(format!(
                    "the guest's clock is not known: {}",
                    crate::faults::sentence(&error)
                )));
            }
        };
        let skew_ms = millis_since_epoch(SystemTime::now()) - millis_since_epoch(guest);
        if skew_ms.abs() <= CLOCK_SLACK_MS {
            return Ok(Done::Clock {
                skew_ms: Some(skew_ms),
                set: false,
                note: "the guest's clock is right".into(),
            });
        }
        let set = self
            .hypervisor
            .set_guest_time(self.vm(), SystemTime::now())
            .await;
        let note = match &set {
            Ok(()) => format!("the guest's clock was {skew_ms} ms behind and is right now"),
            Err(error) => format!(
                "the guest's clock is {skew_ms} ms behind and cannot be set: {}",
                crate::faults::sentence(error)
            ),
        };
        if set.is_err() {
            self.notice("CLOCK_BEHIND", note.clone(), "set the clock in the guest");
        }
        Ok(Done::Clock {
            skew_ms: Some(skew_ms),
            set: set.is_ok(),
            note,
        })
    }
}

fn millis_since_epoch(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// Whether an ssh server greets on one of the addresses.
async fn greeted(addresses: &[String]) -> bool {
    for address in addresses {
        let greeting = async {
            let ip: std::net::IpAddr = address.parse().ok()?;
            let mut stream = TcpStream::connect((ip, 22)).await.ok()?;
            let mut start = [0_u8; 4];
            stream.read_exact(&mut start).await.ok()?;
            (start == *b"SSH-").then_some(())
        };
        if let Ok(Some(())) = tokio::time::timeout(GREETING, greeting).await {
            return true;
        }
    }
    false
}
