//! Guarded changes on real domains: taken back by the agent itself unless
//! confirmed, over its restarts, and never over what somebody else did.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::Value;
use vmsnap_tests::{Agent, BlankSpec, Domain, Lab, command::run, eventually};

/// Long enough to see that nothing happens at a deadline.
const AFTER: Duration = Duration::from_secs(4);
const LONG: Duration = Duration::from_secs(60);

fn guards(agent: &Agent) -> Result<Vec<Value>> {
    let log = agent.vmsnap(&["log"])?;
    let guards = log.document()?["guards"].as_array();
    Ok(guards.context("the list of guards")?.clone())
}

/// A guarded snapshot `before`, and a change after it.
fn guarded(agent: &Agent, domain: &Domain, within: &str) -> Result<()> {
    domain.write_pattern("vda", 1, 0, 65_536)?;
    let made = agent.vmsnap(&[
        "create",
        &domain.name,
        "before",
        "--revert-unless-confirmed",
        within,
    ])?;
    assert!(made.result()?["guard_deadline"].is_string());
    domain.write_pattern("vda", 2, 0, 65_536)
}

#[test]
fn a_change_that_nobody_confirms_is_taken_back_and_its_state_is_kept_beside() -> Result<()> {
    let lab = Lab::from_env()?;
    let (domain, agent) = (lab.blank(&BlankSpec::default())?, lab.agent("")?);
    let name = domain.name.as_str();
    // Time for all that is asked until then, on a busy machine.
    guarded(&agent, &domain, "10s")?;
    let open = guards(&agent)?;
    assert_eq!(open[0]["state"], "pending");
    assert_eq!(open[0]["snapshot_name"], "before");
    // Until then nobody else changes the VM, and its snapshot is pinned.
    for words in [
        vec!["create", name, "more"],
        vec!["cleanup", name, "before"],
        vec!["commit", name, "--all"],
    ] {
        let refused = agent.vmsnap(&words)?;
        assert_eq!(
            refused.failure()?["reason"],
            "SNAPSHOT_GUARDED",
            "{words:?}"
        );
    }
    let kept = agent.vmsnap(&["cleanup", name, "--older-than", "1s"])?;
    assert_eq!(kept.result()?["changed"], false);

    eventually(LONG, "the revert by the agent", || {
        guards(&agent).is_ok_and(|open| open.is_empty())
    })?;
    eventually(LONG, "the VM running again", || {
        domain.state().is_ok_and(|state| state == "running")
    })?;
    assert!(domain.has_pattern("vda", 1, 0, 65_536)?);
    // The VM runs before the run that reverted it is closed.
    let newest = || -> Result<Value> {
        let log = agent.vmsnap(&["log", name])?;
        Ok(log.document()?["workflows"][0].clone())
    };
    eventually(LONG, "the end of that run", || {
        newest().is_ok_and(|run| run["state"] == "succeeded")
    })?;
    assert_eq!(newest()?["caller"]["identity"], "agent");
    // What was taken back is not lost.
    let safety = domain
        .snapshots()?
        .into_iter()
        .find(|snapshot| snapshot.starts_with("safety-"))
        .context("a safety snapshot")?;
    agent.vmsnap(&["revert", name, &safety])?.result()?;
    assert!(domain.has_pattern("vda", 2, 0, 65_536)?);
    Ok(())
}

#[test]
fn a_confirmed_change_stays_also_when_the_agent_is_killed_in_between() -> Result<()> {
    let lab = Lab::from_env()?;
    let (domain, mut agent) = (lab.blank(&BlankSpec::default())?, lab.agent("")?);
    let name = domain.name.as_str();
    guarded(&agent, &domain, "8s")?;
    let deadline = Instant::now() + Duration::from_secs(8);
    agent.kill();
    agent.start()?;
    assert_eq!(guards(&agent)?[0]["state"], "pending");
    let wrong = agent.vmsnap(&["confirm", name, "befor"])?;
    assert_eq!(wrong.document()?["changed"], false);
    let confirmed = agent.vmsnap(&["confirm", name])?;
    assert_eq!(confirmed.document()?["changed"], true);
    let again = agent.vmsnap(&["confirm", name])?;
    assert_eq!(again.document()?["changed"], false);
    assert!(guards(&agent)?.is_empty());
    sleep(deadline.saturating_duration_since(Instant::now()) + AFTER);
    assert!(domain.has_pattern("vda", 2, 0, 65_536)?);
    // An existing snapshot is not armed anew.
    let existing = agent.vmsnap(&["create", name, "before", "--revert-unless-confirmed", "1h"])?;
    assert_eq!(existing.result()?["changed"], false);
    assert!(guards(&agent)?.is_empty());
    // To commit it is allowed again.
    agent.vmsnap(&["commit", name, "before"])?.result()?;
    assert!(domain.has_pattern("vda", 2, 0, 65_536)?);
    Ok(())
}

#[test]
fn committing_the_guarded_snapshot_confirms_the_change() -> Result<()> {
    let lab = Lab::from_env()?;
    let (domain, agent) = (lab.blank(&BlankSpec::default())?, lab.agent("")?);
    let name = domain.name.as_str();
    guarded(&agent, &domain, "1h")?;
    agent.vmsnap(&["commit", name, "before"])?.result()?;
    assert!(guards(&agent)?.is_empty());
    assert_eq!(domain.snapshots()?, [] as [&str; 0]);
    assert!(domain.has_pattern("vda", 2, 0, 65_536)?);
    Ok(())
}

#[test]
fn a_guard_that_is_found_long_overdue_asks_and_one_within_the_grace_acts() -> Result<()> {
    let lab = Lab::from_env()?;
    let (domain, mut agent) = (
        lab.blank(&BlankSpec::default())?,
        lab.agent("[guards]\ngrace = 0\n")?,
    );
    let name = domain.name.as_str();
    guarded(&agent, &domain, "3s")?;
    agent.kill();
    sleep(Duration::from_secs(5));
    agent.start()?;
    eventually(LONG, "the guard being held", || {
        guards(&agent).is_ok_and(|open| open.first().is_some_and(|one| one["state"] == "held"))
    })?;
    assert!(domain.has_pattern("vda", 2, 0, 65_536)?);
    let refused = agent.vmsnap(&["create", name, "more"])?;
    assert_eq!(refused.failure()?["reason"], "SNAPSHOT_GUARDED");
    // To revert to it by hand ends it.
    agent.vmsnap(&["revert", name, "before"])?.result()?;
    assert!(guards(&agent)?.is_empty());
    assert!(domain.has_pattern("vda", 1, 0, 65_536)?);

    let (domain, mut agent) = (lab.blank(&BlankSpec::default())?, lab.agent("")?);
    guarded(&agent, &domain, "3s")?;
    agent.kill();
    sleep(Duration::from_secs(5));
    agent.start()?;
    eventually(LONG, "the revert at the restart", || {
        guards(&agent).is_ok_and(|open| open.is_empty())
    })?;
    assert!(domain.has_pattern("vda", 1, 0, 65_536)?);
    Ok(())
}

#[test]
fn a_guard_is_held_when_somebody_else_changed_the_vm_and_waits_for_an_open_block_job() -> Result<()>
{
    let lab = Lab::from_env()?;
    let (domain, agent) = (lab.blank(&BlankSpec::default())?, lab.agent("")?);
    let name = domain.name.as_str();
    guarded(&agent, &domain, "4s")?;
    domain.virsh("setmaxmem", &["98304", "--config"])?;
    eventually(LONG, "the guard being held", || {
        guards(&agent).is_ok_and(|open| open.first().is_some_and(|one| one["state"] == "held"))
    })?;
    let held = &guards(&agent)?[0];
    assert!(held["note"].as_str().context("a note")?.contains("changed"));
    assert!(domain.has_pattern("vda", 2, 0, 65_536)?);
    agent.vmsnap(&["confirm", name, "before"])?.document()?;

    let (domain, agent) = (lab.blank(&BlankSpec::default())?, lab.agent("")?);
    guarded(&agent, &domain, "4s")?;
    let copy = domain.folder().join(format!("{}.copy.raw", domain.name));
    let shown = copy.display().to_string();
    domain.virsh("blockcopy", &["vda", "--dest", &shown, "--transient-job"])?;
    sleep(Duration::from_secs(4) + AFTER);
    assert_eq!(guards(&agent)?[0]["state"], "pending", "the job is open");
    domain.virsh("blockjob", &["vda", "--abort"])?;
    eventually(LONG, "the revert after the job", || {
        guards(&agent).is_ok_and(|open| open.is_empty())
    })?;
    assert!(domain.has_pattern("vda", 1, 0, 65_536)?);
    Ok(())
}

#[test]
fn a_confirmation_under_way_at_the_deadline_decides_and_nothing_is_taken_back() -> Result<()> {
    let lab = Lab::from_env()?;
    let (domain, mut agent) = (lab.blank(&BlankSpec::default())?, lab.agent("")?);
    let name = domain.name.clone();
    guarded(&agent, &domain, "8s")?;
    agent.stop();
    // The next record is that of the confirmation's plan: it has its turn then.
    let go = agent.folder().join("go");
    let wait = format!("journal.record=1*return(wait {})->off", go.display());
    agent.set_env("FAILPOINTS", &wait);
    agent.start()?;
    let mut command = agent.cli(&["confirm", &name])?;
    let caller = std::thread::spawn(move || run(&mut command, None, LONG));
    eventually(LONG, "the confirmation", || {
        agent.log().contains("failpoint reached")
    })?;
    let newest = || -> Result<Value> {
        let log = agent.vmsnap(&["log", &name])?;
        Ok(log.document()?["workflows"][0].clone())
    };
    eventually(LONG, "the agent's revert behind it", || {
        newest().is_ok_and(|run| run["caller"]["identity"] == "agent" && run["state"] == "queued")
    })?;
    std::fs::write(go, "")?;
    let confirmed = caller
        .join()
        .map_err(|_| anyhow::anyhow!("the caller panicked"))??;
    assert_eq!(confirmed.status, 0, "{}", confirmed.complaint());
    eventually(LONG, "the end of the agent's revert", || {
        newest().is_ok_and(|run| run["state"] != "queued" && run["state"] != "running")
    })?;
    assert_eq!(newest()?["state"], "refused");
    assert!(domain.has_pattern("vda", 2, 0, 65_536)?);
    assert_eq!(domain.snapshots()?, ["before"]);
    // And what was decided is not asked again.
    assert!(guards(&agent)?.is_empty());
    Ok(())
}

#[test]
fn a_guard_whose_revert_takes_long_holds_up_no_other() -> Result<()> {
    let lab = Lab::from_env()?;
    let slow = lab.blank(&BlankSpec::default())?;
    let (other, mut agent) = (lab.blank(&BlankSpec::default())?, lab.agent("")?);
    agent.stop();
    agent.set_env("FAILPOINTS", "effect.revert=1*return(late 12000)->off");
    agent.start()?;
    guarded(&agent, &slow, "3s")?;
    guarded(&agent, &other, "4s")?;
    eventually(LONG, "the revert of the other", || {
        guards(&agent)
            .is_ok_and(|open| open.iter().all(|one| one["vm_name"] != other.name.as_str()))
    })?;
    let open = guards(&agent)?;
    assert_eq!(open.len(), 1, "the slow one was waited for");
    assert_eq!(open[0]["vm_name"], slow.name.as_str());
    eventually(LONG, "the slow revert", || {
        guards(&agent).is_ok_and(|open| open.is_empty())
    })?;
    for domain in [&slow, &other] {
        assert!(domain.has_pattern("vda", 1, 0, 65_536)?);
    }
    Ok(())
}

#[test]
fn a_revert_that_was_cut_off_once_it_was_done_ends_its_guard_all_the_same() -> Result<()> {
    let lab = Lab::from_env()?;
    let (domain, mut agent) = (lab.blank(&BlankSpec::default())?, lab.agent("")?);
    let name = domain.name.clone();
    guarded(&agent, &domain, "1h")?;
    agent.stop();
    // The plan, the definition that is kept, and the revert: its fifth record.
    agent.set_env("FAILPOINTS", "journal.record=4*off->1*return->off");
    agent.start()?;
    agent.set_env("FAILPOINTS", "");
    let mut caller = agent.cli(&["revert", &name, "before"])?.spawn()?;
    eventually(LONG, "the end of the agent", || agent.ended())?;
    caller.kill()?;
    caller.wait()?;
    agent.start()?;
    assert_eq!(domain.state()?, "running");
    assert!(domain.has_pattern("vda", 1, 0, 65_536)?);
    assert!(guards(&agent)?.is_empty(), "it would be taken back again");
    agent.vmsnap(&["create", &name, "next"])?.result()?;
    Ok(())
}
