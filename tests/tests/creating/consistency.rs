//! A demand for consistent file systems of a guest whose agent does not answer.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;
use vmsnap_tests::{BlankSpec, Lab, eventually};

use super::refused;

#[test]
fn without_an_answering_guest_agent_filesystem_consistency_is_refused_with_the_reason() -> Result<()>
{
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let channel =
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>";
    let mut last = None;
    for (devices, stopped, reason, why, silent) in [
        ("", false, "CONSISTENCY_NOT_MET", "no channel", false),
        (channel, true, "DOMAIN_NOT_RUNNING", "is off", false),
        (channel, false, "CONSISTENCY_NOT_MET", "not connected", true),
    ] {
        let domain = lab.blank(&BlankSpec {
            devices: devices.to_owned(),
            stopped,
            ..BlankSpec::default()
        })?;
        let demand = ["s", "--consistency", "filesystem"];
        let (was, message) = refused(&agent, &domain, &demand)?;
        assert_eq!(was, reason, "{why}");
        assert!(message.contains(why), "{message}");
        // Left to choose, it says what it achieved and why no more.
        let made = agent.vmsnap(&["create", &domain.name, "s"])?;
        let achieved = made.result()?["consistency"].clone();
        assert_eq!(achieved, if stopped { "stopped" } else { "suspend" });
        assert_eq!(made.result()?["frozen_ms"], Value::Null);
        assert_eq!(made.warned("AGENT_SILENT"), silent, "{why}");
        // Only the achieved consistency counts when it is asked for again.
        let again = refused(&agent, &domain, &demand);
        if stopped {
            // A stopped VM's snapshot is as consistent as any.
            assert!(again.is_err());
            let words = ["create", &domain.name, "s", "--consistency", "filesystem"];
            assert_eq!(agent.vmsnap(&words)?.result()?["changed"], false);
        } else {
            assert_eq!(again?.0, "SNAPSHOT_CONFLICT");
        }
        last = Some(domain);
    }
    let paused = last.context("the running one")?;
    paused.virsh("suspend", &[])?;
    let demand = ["t", "--consistency", "filesystem"];
    let (reason, message) = refused(&agent, &paused, &demand)?;
    assert_eq!(reason, "CONSISTENCY_NOT_MET");
    assert!(message.contains("paused"), "{message}");
    // Saved memory and frozen file systems exclude each other.
    let both = ["s", "--memory", "--consistency", "filesystem"];
    assert_eq!(refused(&agent, &paused, &both)?.0, "BAD_REQUEST");
    Ok(())
}

#[test]
fn a_guest_agent_that_hangs_or_is_gone_is_told_apart_and_demands_are_refused() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    for (signal, why) in [("STOP", "does not answer"), ("KILL", "not connected")] {
        guest.ssh(&format!("kill -{signal} $(pidof qemu-ga)"))?;
        eventually(Duration::from_secs(20), "silence", || {
            signal == "STOP" || guest.frozen().is_err()
        })?;
        let demand = ["s", "--consistency", "filesystem"];
        let (reason, message) = refused(&agent, &guest, &demand)?;
        assert_eq!(reason, "CONSISTENCY_NOT_MET");
        assert!(message.contains(why), "{message}");
    }
    let made = agent.vmsnap(&["create", name, "s"])?;
    assert_eq!(made.result()?["consistency"], "suspend");
    assert!(made.result()?["stopped_ms"].as_u64().is_some());
    assert!(made.warned("AGENT_SILENT"));
    assert_eq!(guest.state()?, "running");
    Ok(())
}
