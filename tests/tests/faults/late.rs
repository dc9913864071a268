//! Calls that were given up and come back long after: what they did by then is
//! taken back all the same, and they hold up no other VM.

use std::time::Duration;

use anyhow::Result;
use vmsnap_tests::{Agent, BlankSpec, Lab, eventually};

use super::{LONG, newest, start};

/// An agent that gives up effects after two seconds, with something broken.
fn impatient(lab: &Lab, more: &str, broken: &str) -> Result<Agent> {
    let mut agent = lab.agent(more)?;
    agent.stop();
    agent.reconfigure(
        "[libvirt]\n",
        "[libvirt]\neffect_timeout = 2\nrelease_timeout = 2\n",
    )?;
    agent.set_env("FAILPOINTS", broken);
    agent.start()?;
    agent.set_env("FAILPOINTS", "");
    Ok(agent)
}

fn came_back(agent: &Agent) -> Result<()> {
    eventually(LONG, "the late call", || {
        agent.log().contains("a call past its deadline came back")
    })
}

#[test]
fn a_vm_whose_suspension_lands_late_runs_again_before_its_run_is_closed() -> Result<()> {
    let lab = Lab::from_env()?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    let agent = impatient(&lab, "", "effect.suspend=1*return(late 14000)->off")?;
    let failed = agent.vmsnap(&["create", name, "s", "--consistency", "suspend"])?;
    assert_eq!(failed.outcome()?["state"], "failed", "{}", failed.said);
    assert_eq!(failed.failure()?["reason"], "HYPERVISOR_OVERDUE");
    came_back(&agent)?;
    assert_eq!(domain.state()?, "running");
    agent.vmsnap(&["create", name, "next"])?.result()?;
    Ok(())
}

#[test]
fn a_vm_that_a_stuck_run_suspends_in_the_end_runs_again_and_its_run_stays_stuck() -> Result<()> {
    let lab = Lab::from_env()?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    let late = "effect.suspend=1*return(late 13000)->off";
    let agent = impatient(&lab, "[limits]\nstuck_after = 1\n", late)?;
    let stuck = agent.vmsnap(&["create", name, "s", "--consistency", "suspend"])?;
    assert_eq!(stuck.outcome()?["state"], "stuck", "{}", stuck.said);
    came_back(&agent)?;
    eventually(LONG, "word that the VM was let go", || {
        agent.log().contains("holds its guest no more")
    })?;
    assert_eq!(domain.state()?, "running");
    assert_eq!(newest(&agent, name)?["state"], "stuck");
    // Somebody else's pause from then on is his.
    domain.virsh("suspend", &[])?;
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(domain.state()?, "paused");
    let id = stuck.run_id()?;
    let resolve = ["resolve", id, "--note", "it was let go"];
    agent.vmsnap(&resolve)?.document()?;
    Ok(())
}

#[test]
fn a_merge_that_begins_late_is_given_up_and_its_snapshot_is_not_taken_for_whole() -> Result<()> {
    let lab = Lab::from_env()?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    let late = "effect.merge_a_disk_of=1*return(late 12000)->off";
    let agent = impatient(&lab, "", late)?;
    agent
        .vmsnap(&["create", name, "s", "--consistency", "crash"])?
        .result()?;
    domain.write_pattern("vda", 3, 0, 8 << 20)?;
    let words = ["cleanup", name, "s", "--bandwidth", "1M"];
    let failed = agent.vmsnap(&words)?;
    assert_eq!(failed.outcome()?["state"], "failed", "{}", failed.said);
    came_back(&agent)?;
    let job = domain.virsh("blockjob", &["vda"])?;
    assert_eq!(job.trim(), "", "its merge is open");
    let refused = agent.vmsnap(&["revert", name, "s"])?;
    assert_eq!(refused.failure()?["reason"], "SNAPSHOT_NOT_WHOLE");
    agent.vmsnap(&["cleanup", name, "s"])?.result()?;
    assert!(domain.has_pattern("vda", 3, 0, 8 << 20)?);
    Ok(())
}

#[test]
fn long_merges_of_other_vms_keep_no_guest_standing_still() -> Result<()> {
    let lab = Lab::from_env()?;
    let mut agent = lab.agent("")?;
    agent.stop();
    let late = "effect.delete_a_snapshot_of=4*return(late 15000)->off";
    agent.set_env("FAILPOINTS", late);
    agent.start()?;
    let mut merging = Vec::new();
    for _ in 0..4 {
        let domain = lab.blank(&BlankSpec::default())?;
        let name = domain.name.clone();
        agent
            .vmsnap(&["create", &name, "s", "--consistency", "crash"])?
            .result()?;
        merging.push(domain);
    }
    let callers: Vec<_> = merging
        .iter()
        .map(|domain| start(&agent, &["cleanup", &domain.name, "s"]))
        .collect::<Result<_>>()?;
    eventually(LONG, "merges", || {
        agent.log().matches("failpoint reached").count() >= 2
    })?;
    std::thread::sleep(Duration::from_secs(1));
    let domain = lab.blank(&BlankSpec::default())?;
    let words = ["create", &domain.name, "s", "--consistency", "suspend"];
    let made = agent.vmsnap(&words)?;
    assert!(made.result()?["stopped_ms"].is_u64());
    for domain in &merging {
        assert_eq!(domain.snapshots()?, ["s"], "it waited for a merge");
    }
    // Those that waited for a place are merged, too.
    for (mut caller, domain) in callers.into_iter().zip(&merging) {
        assert!(caller.wait()?.success());
        assert_eq!(domain.snapshots()?, [] as [&str; 0]);
    }
    Ok(())
}
