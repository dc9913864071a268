//! Guests that hang: a freeze that lands too late, that is refused, or of which
//! nothing is heard again.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use vmsnap_tests::{Domain, Lab, eventually};

use super::{LONG, newest, told};

fn hook(guest: &Domain, line: &str) -> Result<()> {
    let script = format!(
        "printf '#!/bin/sh\\n{line}\\nexit 0\\n' > /run/freeze-hook; chmod +x /run/freeze-hook"
    );
    guest.exec(&script).map(drop)
}

fn settled(guest: &Domain) -> Result<()> {
    eventually(LONG, "guest that is thawed", || {
        guest.frozen().is_ok_and(|frozen| !frozen)
    })?;
    assert_eq!(guest.state()?, "running");
    guest.lives()
}

#[test]
fn a_freeze_that_lands_after_its_time_is_thawed_and_falls_back_or_fails_as_asked() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    // Only the freeze takes longer than it may; then it lands.
    hook(&guest, "[ $1 = freeze ] && sleep 5 && touch /run/landed")?;
    let since = Instant::now();
    let fell = agent.vmsnap(&["create", name, "s", "--freeze-timeout", "2s"])?;
    assert_eq!(fell.result()?["consistency"], "suspend");
    assert!(fell.warned("FREEZE_GAVE_UP"));
    // It waited for the freeze to land: before, nobody can be certain.
    assert!(since.elapsed() > Duration::from_secs(4));
    settled(&guest)?;
    assert_eq!(guest.exec("ls /run/landed")?.trim(), "/run/landed");
    let demand = [
        "create",
        name,
        "t",
        "--consistency",
        "filesystem",
        "--freeze-timeout",
        "2s",
    ];
    let failed = agent.vmsnap(&demand)?;
    assert_eq!(failed.failure()?["reason"], "GUEST_AGENT_UNAVAILABLE");
    settled(&guest)?;
    assert_eq!(guest.snapshots()?, ["s"]);
    Ok(())
}

#[test]
fn a_hook_that_refuses_the_freeze_is_quoted_and_the_guest_is_thawed() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    hook(&guest, "[ $1 = freeze ] && exit 3")?;
    let fell = agent.vmsnap(&["create", name, "s"])?;
    assert_eq!(fell.result()?["consistency"], "suspend");
    let gave_up = fell
        .all("warning")
        .find(|warning| warning["code"] == "FREEZE_GAVE_UP");
    let message = gave_up.context("a warning")?["message"].to_string();
    assert!(message.contains("hook"), "{message}");
    settled(&guest)?;
    let failed = agent.vmsnap(&["create", name, "t", "--consistency", "filesystem"])?;
    let failure = failed.failure()?;
    assert_eq!(failure["reason"], "GUEST_AGENT_FAILED");
    let message = failure["message"].as_str().unwrap_or_default();
    assert!(message.contains("hook"), "{message}");
    settled(&guest)?;
    assert_eq!(guest.snapshots()?, ["s"]);
    Ok(())
}

#[test]
fn a_guest_whose_agent_never_answers_again_leaves_its_run_stuck_until_somebody_resolves_it()
-> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, mut agent) = (lab.guest()?, lab.agent("[limits]\nstuck_after = 1\n")?);
    let name = guest.name.clone();
    // The freeze lands, and the agent stops right after it.
    hook(
        &guest,
        "[ $1 = freeze ] && { (sleep 1.5; kill -STOP $(pidof qemu-ga)) > /dev/null 2>&1 < /dev/null & }",
    )?;
    let words = ["create", name.as_str(), "s", "--consistency", "filesystem"];
    agent.stop();
    agent.set_env(
        "FAILPOINTS",
        "effect.take_a_snapshot_of=1*return(late 3000)->off",
    );
    agent.start()?;
    agent.set_env("FAILPOINTS", "");
    let stuck = agent.vmsnap(&words)?;
    assert_eq!(stuck.outcome()?["state"], "stuck", "{}", stuck.said);
    let failure = stuck.failure()?;
    assert_eq!(failure["reason"], "GUEST_AGENT_UNAVAILABLE");
    let message = failure["message"].as_str().unwrap_or_default();
    assert!(message.contains("may be frozen"), "{message}");
    assert!(agent.log().contains("a run is stuck"), "no alarm");
    // The next life of the agent raises the alarm again, and leaves the run stuck.
    agent.stop();
    agent.start()?;
    let alarms = agent.log().matches("a run is stuck").count();
    assert_eq!(alarms, 2);
    let id = stuck.run_id()?;
    assert_eq!(newest(&agent, &name)?["state"], "stuck");
    // Once the agent answers, the guest is thawed; that does not resolve the run.
    guest.ssh("kill -CONT $(pidof qemu-ga)")?;
    settled(&guest)?;
    assert_eq!(newest(&agent, &name)?["state"], "stuck");
    // Health tells of the run, and of the guest no more.
    eventually(LONG, "word that the guest was let go", || {
        let health = agent.vmsnap(&["health"]);
        health.is_ok_and(|health| {
            let problems = health.events[0]["problems"].as_array();
            problems.is_some_and(|all| all.len() == 1 && all[0]["kind"] == "run_stuck")
        })
    })?;
    agent
        .vmsnap(&["resolve", id, "--note", "the agent was continued"])?
        .document()?;
    assert_eq!(newest(&agent, &name)?["state"], "failed");
    let again = agent.vmsnap(&["resolve", id, "--note", "twice"])?;
    assert_eq!(told(&again)?["reason"], "WORKFLOW_STATE");
    Ok(())
}
