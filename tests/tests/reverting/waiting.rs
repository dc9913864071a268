//! The guest after the revert: waited for in bounded time, and its clock set.

use std::{
    net::TcpStream,
    process::Child,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::Value;
use vmsnap_tests::{
    Agent, Cli, Guest, Lab,
    command::{end, privileged, succeed},
    eventually, eventually_some,
};

use super::{revert, seconds_now};

/// Makes an address of the guest's reach its ssh server, until dropped: the network
/// of the lab's guests has no way in but a port of the host.
struct Way {
    address: String,
    forwarder: Child,
}

const FORWARD: &str = "
import socket, sys, threading
server = socket.create_server((sys.argv[1], 22))
def copy(a, b):
    while data := a.recv(4096):
        b.sendall(data)
    b.close()
def serve(near):
    try:
        far = socket.create_connection(('127.0.0.1', int(sys.argv[2])))
    except OSError:
        return near.close()
    threading.Thread(target=copy, args=(near, far), daemon=True).start()
    copy(far, near)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
";

impl Way {
    /// An address for this test alone, from the range for tests of networks.
    fn address() -> String {
        let id = std::process::id();
        format!("198.18.{}.{}", id / 250 % 250, id % 250 + 1)
    }

    fn open(guest: &Guest) -> Result<Self> {
        let address = Self::address();
        succeed(&mut privileged([
            "ip", "addr", "add", &address, "dev", "lo",
        ]))?;
        let port = guest.ssh_port.to_string();
        let forwarder = privileged(["python3", "-c", FORWARD, &address, &port]).spawn()?;
        let this = Self { address, forwarder };
        eventually(Duration::from_secs(20), "forwarder", || {
            TcpStream::connect((this.address.as_str(), 22)).is_ok()
        })?;
        Ok(this)
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        end(&mut self.forwarder, Duration::from_secs(5));
        let _ = succeed(&mut privileged([
            "ip",
            "addr",
            "del",
            &self.address,
            "dev",
            "lo",
        ]));
    }
}

/// A revert that waits in vain: what it says, and how long it took.
fn waits_in_vain(
    agent: &Agent,
    guest: &Guest,
    snapshot: &str,
    what: &str,
) -> Result<(Cli, Duration)> {
    let words = [
        "revert",
        &guest.name,
        snapshot,
        "--wait-for",
        what,
        "--wait-timeout",
        "6s",
    ];
    let cli = agent.vmsnap(&words)?;
    let waited = cli
        .all("step_finished")
        .filter_map(|event| event["took_ms"].as_u64())
        .max()
        .unwrap_or_default();
    assert_eq!(
        cli.failure()?["reason"],
        "WAIT_TIMEOUT",
        "{what}: {}",
        cli.said
    );
    // The revert is done, and told beside the failure.
    let outcome = cli.outcome()?;
    assert_eq!(outcome["state"], "failed");
    assert_eq!(outcome["result"]["vm_state"], "running");
    assert_eq!(outcome["result"]["changed"], true);
    assert_eq!(
        cli.all("undo").count(),
        0,
        "a revert that is done is not undone"
    );
    assert_eq!(guest.state()?, "running");
    Ok((cli, Duration::from_millis(waited)))
}

fn seconds_in(guest: &Guest) -> Result<i64> {
    Ok(guest.exec("date +%s")?.trim().parse()?)
}

#[test]
fn a_guest_that_goes_on_from_memory_is_waited_for_told_of_and_has_its_clock_set() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    let address = Way::address();
    guest.exec(&format!("ip addr add {address}/32 dev eth0"))?;
    // Its state was saved when the lab was started, and its clock stood still since.
    guest.exec(&format!("date -s @{}", seconds_now()?))?;
    agent
        .vmsnap(&["create", name, "warm", "--memory"])?
        .result()?;
    let made = Instant::now();
    let way = Way::open(&guest)?;
    eventually(Duration::from_secs(10), "some age", || {
        made.elapsed() > Duration::from_secs(3)
    })?;
    let done = revert(&agent, &guest, "warm", &["--wait-for", "ssh"])?;
    let report = &done.result()?["guest"];
    assert_eq!(report["hostname"], name);
    assert!(report["os"].to_string().contains("Linux"), "{report}");
    let addresses = report["addresses"].as_array().context("addresses")?;
    assert!(
        addresses.contains(&Value::from(address.as_str())),
        "{report}"
    );
    assert!(!addresses.contains(&Value::from("127.0.0.1")), "{report}");
    assert!(report["ready_ms"].as_u64().context("ready_ms")? < 30_000);
    let skew = report["clock_skew_ms"].as_i64().context("skew")?;
    assert!((2_500..60_000).contains(&skew), "{skew}");
    assert_eq!(report["clock_set"], true);
    assert!((seconds_in(&guest)? - seconds_now()?).abs() <= 2);
    guest.lives()?;

    // Left alone when that is asked for.
    let left = revert(
        &agent,
        &guest,
        "warm",
        &["--wait-for", "address", "--no-sync-clock"],
    )?;
    assert!(left.result()?["guest"]["clock_skew_ms"].is_null());
    assert!(seconds_now()? - seconds_in(&guest)? >= 3);

    // Without anybody to greet there, the wait ends by its own deadline.
    drop(way);
    guest.exec("ip -4 addr flush dev eth0; ip -6 addr flush dev eth0")?;
    guest.exec(&format!("ip addr add {address}/32 dev eth0"))?;
    agent
        .vmsnap(&["create", name, "alone", "--memory"])?
        .result()?;
    let (cli, waited) = waits_in_vain(&agent, &guest, "alone", "ssh")?;
    let failure = cli.failure()?;
    assert!(
        failure["metadata"]["reached"]
            .to_string()
            .contains("an address"),
        "{failure}"
    );
    assert!(waited < Duration::from_secs(20), "{waited:?}");
    let found = &cli.outcome()?["result"]["guest"];
    assert_eq!(found["addresses"], serde_json::json!([address]));
    guest.lives()
}

#[test]
fn a_guest_that_does_not_come_back_in_time_says_how_far_it_came_and_the_revert_stays() -> Result<()>
{
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    // An agent that may not set the clock, in a guest without a network.
    guest.exec(
        "ip -4 addr flush dev eth0; ip -6 addr flush dev eth0; \
         port=$(ls /dev/vport*); \
         setsid sh -c \"sleep 0.5; killall qemu-ga; sleep 0.5; \
         exec qemu-ga -m virtio-serial -p $port -t /run -b guest-set-time\" > /dev/null 2>&1 &",
    )?;
    eventually(Duration::from_secs(20), "the other agent", || {
        guest
            .virsh("qemu-agent-command", &["{\"execute\":\"guest-info\"}"])
            .is_ok_and(|said| said.contains(r#""enabled":false,"name":"guest-set-time""#))
    })?;
    agent
        .vmsnap(&["create", name, "cut", "--memory"])?
        .result()?;
    let (cli, waited) = waits_in_vain(&agent, &guest, "cut", "address")?;
    let failure = cli.failure()?;
    assert!(
        failure["metadata"]["reached"]
            .to_string()
            .contains("no address"),
        "{failure}"
    );
    assert!(waited < Duration::from_secs(20), "{waited:?}");
    // The clock is another matter: it is behind, and that is said.
    let report = &cli.outcome()?["result"]["guest"];
    assert!(
        report["clock_skew_ms"].as_i64().context("skew")? > 500,
        "{report}"
    );
    assert_eq!(report["clock_set"], false);
    assert!(cli.warned("CLOCK_BEHIND"));
    let warning = cli
        .all("warning")
        .find(|event| event["code"] == "CLOCK_BEHIND");
    let message = warning.context("the warning")?["message"].to_string();
    assert!(
        message.contains("cannot be set") && message.contains("ms behind"),
        "{message}"
    );

    guest.exec("setsid sh -c 'sleep 0.5; killall qemu-ga' > /dev/null 2>&1 &")?;
    eventually_some(
        Duration::from_secs(20),
        "silence of the guest agent",
        || {
            let xml = guest.virsh("dumpxml", &[])?;
            Ok(xml.contains("state='disconnected'").then_some(()))
        },
    )?;
    agent
        .vmsnap(&["create", name, "mute", "--memory"])?
        .result()?;
    let (cli, waited) = waits_in_vain(&agent, &guest, "mute", "agent")?;
    let failure = cli.failure()?;
    assert!(
        failure["metadata"]["reached"]
            .to_string()
            .contains("nothing yet"),
        "{failure}"
    );
    assert!(waited < Duration::from_secs(20), "{waited:?}");
    // Nobody knows the clock then, and that is said too.
    assert!(cli.warned("CLOCK_BEHIND"));
    assert_eq!(guest.snapshots()?, ["cut", "mute"]);
    Ok(())
}
