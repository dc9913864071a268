//! Where a revert ends: the state that was asked for, whatever the VM was.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use vmsnap_tests::{BlankSpec, Lab};

use super::{all_whole, has, point, revert};

#[test]
fn every_kind_ends_in_the_state_that_was_asked_for_whatever_the_vm_was() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let outside = lab.blank(&BlankSpec::default())?;
    point(&agent, &outside, "disk", 1, &[])?;
    point(&agent, &outside, "memory", 2, &["--memory"])?;
    let inside = lab.blank(&BlankSpec::default())?;
    point(&agent, &inside, "memory", 3, &["--kind", "internal"])?;
    inside.virsh("destroy", &[])?;
    point(&agent, &inside, "off", 4, &["--kind", "internal"])?;
    // Each row begins in the state in which the row before it left that VM, unless
    // it says what is done to it first.
    for (vm, byte, first, snapshot, after, state) in [
        (&outside, 1, "", "disk", "auto", "running"),
        (&outside, 2, "suspend", "memory", "auto", "running"),
        (&outside, 1, "suspend", "disk", "paused", "paused"),
        (&outside, 2, "", "memory", "stopped", "shut off"),
        (&outside, 1, "", "disk", "auto", "running"),
        (&outside, 1, "", "disk", "stopped", "shut off"),
        (&outside, 2, "", "memory", "paused", "paused"),
        (&inside, 3, "", "memory", "auto", "running"),
        (&inside, 4, "", "off", "auto", "running"),
        (&inside, 3, "", "memory", "stopped", "shut off"),
        (&inside, 4, "", "off", "auto", "shut off"),
        (&inside, 3, "", "memory", "paused", "paused"),
    ] {
        if !first.is_empty() {
            vm.virsh(first, &[])?;
        }
        let from = vm.state()?;
        let done = revert(&agent, vm, snapshot, &["--state-after", after])?;
        let row = format!("{snapshot} from {from}, {after}");
        let told = done.result().context(row.clone())?["vm_state"].clone();
        assert_eq!(vm.state()?, state, "{row}");
        assert_eq!(
            told,
            if state == "shut off" {
                "stopped"
            } else {
                state
            },
            "{row}"
        );
        assert!(has(vm, byte)?, "{row}");
    }
    all_whole(&agent, &outside)?;
    all_whole(&agent, &inside)
}

#[test]
fn a_vm_is_started_before_anybody_waits_for_it_and_a_guest_that_cannot_answer_is_not_waited_for()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    point(&agent, &domain, "s", 1, &[])?;
    let began = Instant::now();
    let late = revert(&agent, &domain, "s", &["--wait-for", "agent"])?;
    assert!(
        began.elapsed() < Duration::from_secs(60),
        "it waited all the 300 s"
    );
    let steps: Vec<&str> = late
        .all("step_started")
        .filter_map(|event| event["name"].as_str())
        .collect();
    assert_eq!(steps, ["keep-definition", "revert", "start", "wait-for"]);
    let failure = late.failure()?;
    assert_eq!(failure["reason"], "WAIT_TIMEOUT");
    let reached = failure["metadata"]["reached"].to_string();
    assert!(reached.contains("no channel"), "{reached}");
    // The revert itself is done, and its result is there.
    assert_eq!(late.outcome()?["result"]["vm_state"], "running");
    assert_eq!(domain.state()?, "running");
    assert!(has(&domain, 1)?);
    let off = ["--wait-for", "agent", "--state-after", "paused"];
    let paused = revert(&agent, &domain, "s", &off)?;
    paused.result()?;
    assert!(paused.warned("NOT_WAITED"));
    Ok(())
}
