//! libvirt that hangs, dies and comes back, in a lab of the test's own: its daemon
//! is stopped and killed. virsh, the guest's state and /proc are the witnesses.

use std::{
    fs,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use vmsnap_client::Failure;
use vmsnap_proto::v1::{self, inventory_service_client::InventoryServiceClient};
use vmsnap_tests::{
    Agent, BlankSpec, Closed, OwnedLab,
    command::{run, signal},
    eventually, eventually_some,
};

const SOON: Duration = Duration::from_secs(20);
/// A hung daemon is told from a busy one by then, and a call that was under way ended.
const TOLD: Duration = Duration::from_secs(45);

/// A call that has to fail, with what it was told and how long that took.
fn refused(agent: &Agent, words: &[&str]) -> Result<(Value, Duration)> {
    let since = Instant::now();
    let cli = agent.vmsnap(words)?;
    let took = since.elapsed();
    ensure!(cli.status != 0, "{words:?} succeeded");
    let last = cli.events.last().context("it said nothing")?;
    let failure = [&last["error"], &last["failure"]];
    let failure = failure.into_iter().find(|it| !it.is_null());
    Ok((failure.context("no failure")?.clone(), took))
}

/// Waits until the standard health service says this.
fn eventually_is(agent: &Agent, serving: bool) -> Result<()> {
    let tcp = agent.tcp()?;
    let wanted = if serving {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    };
    let runtime = tokio::runtime::Runtime::new()?;
    eventually_some(TOLD, &format!("health {}", wanted.as_str_name()), || {
        let said = runtime.block_on(async {
            let channel = tonic::transport::Endpoint::from_shared(format!("http://{tcp}"))?
                .connect()
                .await?;
            let request = HealthCheckRequest::default();
            let answer = HealthClient::new(channel).check(request).await?;
            anyhow::Ok(answer.into_inner().status())
        })?;
        Ok((said == wanted).then_some(()))
    })
}

/// A process that is stopped, until it is continued or this is dropped: a lab whose
/// daemon hangs cannot be taken down.
struct Stopped(u32);

impl Stopped {
    fn new(pid: u32) -> Self {
        signal(pid, Signal::STOP);
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        signal(self.0, Signal::CONT);
    }
}

fn count(folder: &Path) -> Result<usize> {
    Ok(fs::read_dir(folder)?.count())
}

/// Threads and open files of a process.
fn sizes(pid: u32) -> Result<(usize, usize)> {
    let folder = Path::new("/proc").join(pid.to_string());
    Ok((count(&folder.join("task"))?, count(&folder.join("fd"))?))
}

#[test]
fn a_hung_libvirtd_is_told_in_time_and_recovered_from_without_a_restart() -> Result<()> {
    let mut owned = OwnedLab::start(0)?;
    let lab = owned.lab.clone();
    // All thousand are let in, so that each meets libvirt.
    let mut agent = lab.agent("[limits]\nmax_calls = 1100\nmax_calls_per_peer = 1100\n")?;
    // A hung daemon is told from a slow one within five seconds, not fifteen.
    agent.reconfigure("[libvirt]\n", "[libvirt]\nread_timeout = 6\n")?;
    agent.stop();
    agent.start()?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    let files = domain.files()?;
    agent.vmsnap(&["create", name, "before"])?.result()?;
    eventually_is(&agent, true)?;
    let registered = agent.log().matches("events are registered").count();
    let libvirtd = owned.libvirtd().context("its pid")?;
    let pid = agent.pid().context("its pid")?;

    // Hung while idle, and then under a thousand callers.
    let stopped = Stopped::new(libvirtd);
    let (threads, open) = sizes(pid)?;
    let tcp = agent.tcp()?;
    let runtime = tokio::runtime::Runtime::new()?;
    let since = Instant::now();
    let asking = runtime.spawn(async move {
        let mut calls = Vec::new();
        for _ in 0..5 {
            let channel = tonic::transport::Endpoint::from_shared(format!("http://{tcp}"))?
                .connect()
                .await?;
            for _ in 0..200 {
                let mut inventory = InventoryServiceClient::new(channel.clone());
                calls.push(tokio::spawn(async move {
                    inventory.list_vms(v1::ListVmsRequest::default()).await
                }));
            }
        }
        let mut codes = Vec::new();
        for call in calls {
            let status = call.await?.err().context("a call that succeeded")?;
            codes.push((status.code(), Failure::from(&status).reason));
        }
        anyhow::Ok(codes)
    });
    let mut most = (threads, open);
    while !asking.is_finished() {
        ensure!(since.elapsed() < 2 * TOLD, "callers wait for ever");
        let now = sizes(pid)?;
        most = (most.0.max(now.0), most.1.max(now.1));
        std::thread::sleep(Duration::from_millis(100));
    }
    for (code, reason) in runtime.block_on(asking)?? {
        assert_eq!(
            (code, reason.as_str()),
            (Code::Unavailable, "HYPERVISOR_UNREACHABLE")
        );
    }
    ensure!(since.elapsed() < TOLD, "{:?}", since.elapsed());
    ensure!(most.0 < threads + 40, "{threads} threads became {}", most.0);
    ensure!(most.1 < open + 40, "{open} files became {}", most.1);
    eventually_is(&agent, false)?;
    // From now on nobody waits, half a minute, for what is known not to answer.
    for words in [&["ls"][..], &["create", name, "during"], &["ls", name]] {
        let (failure, took) = refused(&agent, words)?;
        assert_eq!(failure["reason"], "HYPERVISOR_UNREACHABLE", "{words:?}");
        ensure!(took < Duration::from_secs(15), "{words:?}: {took:?}");
    }
    // What needs no libvirt is served.
    agent.vmsnap(&["log", name])?.document()?;

    drop(stopped);
    eventually_is(&agent, true)?;
    agent.vmsnap(&["create", name, "after"])?.result()?;
    ensure!(
        agent.log().matches("events are registered").count() > registered,
        "events are not registered anew"
    );
    // Those that waited came back, and took nothing with them.
    eventually(SOON, "threads and files as before", || {
        sizes(pid).is_ok_and(|now| now.0 <= threads + 16 && now.1 <= open + 16)
    })?;

    // Hung in the middle of a run that holds the guest: it is let go when libvirt is
    // back, and never given up before.
    agent.stop();
    agent.set_env(
        "FAILPOINTS",
        "effect.take_a_snapshot_of=1*return(late 2000)->off",
    );
    agent.start()?;
    agent.set_env("FAILPOINTS", "");
    let mut command = agent.cli(&["create", name, "held", "--consistency", "suspend"])?;
    let caller = std::thread::spawn(move || run(&mut command, None, Duration::from_secs(180)));
    eventually(SOON, "held guest", || {
        domain.state().is_ok_and(|state| state == "paused")
    })?;
    let stopped = Stopped::new(libvirtd);
    eventually(TOLD, "undo that waits", || {
        agent.log().contains("undoing waits for libvirt")
    })?;
    signal(libvirtd, Signal::KILL);
    drop(stopped);
    eventually(SOON, "end of libvirtd", || owned.libvirtd_ended())?;
    owned.start_libvirtd()?;
    eventually(SOON, "VM that runs", || {
        domain.state().is_ok_and(|state| state == "running")
    })?;
    let output = caller
        .join()
        .map_err(|_| anyhow::anyhow!("the caller panicked"))??;
    assert_eq!(output.status, 1, "{}", output.complaint());
    let log = agent.vmsnap(&["log", name])?;
    assert_eq!(log.document()?["workflows"][0]["state"], "failed");
    assert_eq!(domain.snapshots()?, ["after", "before"]);
    agent.vmsnap(&["commit", name, "--all"])?.result()?;
    assert_eq!(domain.files()?, files);

    // A stop ends while libvirt hangs.
    let libvirtd = owned.libvirtd().context("its pid")?;
    let stopped = Stopped::new(libvirtd);
    let mut call = agent
        .cli(&["ls"])?
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    std::thread::sleep(Duration::from_millis(500));
    let since = Instant::now();
    agent.signal(Signal::TERM);
    eventually(SOON, "end of the agent", || agent.ended())?;
    ensure!(
        since.elapsed() < Duration::from_secs(15),
        "{:?}",
        since.elapsed()
    );
    drop(stopped);
    call.kill()?;
    call.wait()?;
    Ok(())
}

#[test]
fn a_snapshot_that_libvirt_forgot_is_left_for_its_next_start_where_others_descend_from_it()
-> Result<()> {
    let mut owned = OwnedLab::start(0)?;
    let lab = owned.lab.clone();
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    for (snapshot, more) in [("warm", &["--memory"][..]), ("later", &[])] {
        let mut words = vec!["create", name, snapshot];
        words.extend(more);
        agent.vmsnap(&words)?.result()?;
    }
    domain.write_pattern("vda", 3, 0, 4096)?;
    let before = (domain.files()?, domain.disk("vda")?, domain.snapshots()?);
    let records = lab.folder.join("config/libvirt/qemu/snapshot").join(name);
    let mut closed = None;
    let revert = ["revert", name, "warm", "--disks-only"];
    let failed = agent.vmsnap_seen(&revert, |event| {
        if event["name"] == "keep-definition" {
            closed = Closed::new(&records).ok();
        }
    })?;
    drop(closed);
    let outcome = failed.outcome()?;
    assert_eq!(outcome["state"], "stuck", "{}", failed.said);
    // The guest is not what hangs.
    assert_eq!(domain.state()?, "running");
    assert!(domain.has_pattern("vda", 3, 0, 4096)?);
    assert_eq!((domain.files()?, domain.disk("vda")?), (before.0, before.1));
    assert_eq!(domain.snapshots()?, ["later"]);
    assert!(agent.log().contains("has forgotten it"));

    let libvirtd = owned.libvirtd().context("its pid")?;
    signal(libvirtd, Signal::TERM);
    eventually(SOON, "end of libvirtd", || owned.libvirtd_ended())?;
    owned.start_libvirtd()?;
    eventually(SOON, "a VM that is known again", || {
        domain.snapshots().is_ok()
    })?;
    assert_eq!(domain.snapshots()?, before.2);
    let run = outcome["workflow_id"].as_str().context("its id")?;
    let said = ["--note", "libvirtd was started anew"];
    let mut words = vec!["resolve", run];
    words.extend(said);
    let resolved = agent.vmsnap(&words)?;
    ensure!(resolved.status == 0, "{}", resolved.said);
    agent.vmsnap(&revert)?.result()?;
    for snapshot in ["later", "warm"] {
        agent.vmsnap(&["cleanup", name, snapshot])?.result()?;
    }
    assert!(domain.snapshots()?.is_empty());
    Ok(())
}
