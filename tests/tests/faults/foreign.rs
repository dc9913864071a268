//! What somebody else does in the middle of a run.

use std::fs;

use anyhow::{Result, anyhow};
use serde_json::Value;
use vmsnap_tests::{Agent, BlankSpec, Lab, command::run, eventually};

use super::{LONG, SOON, cli, newest, pausing, told};

#[test]
fn a_snapshot_that_somebody_else_makes_under_the_same_name_is_not_undone() -> Result<()> {
    let lab = Lab::from_env()?;
    for (kind, foreign) in [
        ("external", &["--disk-only", "--atomic"][..]),
        ("internal", &[]),
    ] {
        let (domain, mut agent) = (lab.blank(&BlankSpec::default())?, lab.agent("")?);
        let name = domain.name.as_str();
        domain.write_pattern("vda", 1, 0, 65_536)?;
        // It stands still once the plan is made.
        let go = pausing(&mut agent, 0)?;
        let mut command = agent.cli(&["create", name, "s", "--kind", kind])?;
        let caller = std::thread::spawn(move || run(&mut command, None, LONG));
        eventually(SOON, "plan", || agent.log().contains("failpoint reached"))?;
        let words = [&["s"], foreign].concat();
        domain.virsh("snapshot-create-as", &words)?;
        let files = domain.files()?;
        fs::write(go, "")?;
        let output = caller
            .join()
            .map_err(|_| anyhow!("the caller panicked"))??;
        let refused = cli(&output)?;
        let message = told(&refused)?["message"].to_string();
        assert!(message.contains("exists already"), "{kind}: {message}");
        assert_eq!(newest(&agent, name)?["state"], "failed", "{kind}");
        assert_eq!(domain.snapshots()?, ["s"], "{kind}");
        assert_eq!(domain.files()?, files, "{kind}");
        assert_eq!(domain.state()?, "running", "{kind}");
        domain.write_pattern("vda", 2, 0, 65_536)?;
        agent.vmsnap(&["revert", name, "s"])?.result()?;
        assert!(domain.has_pattern("vda", 1, 0, 65_536)?, "{kind}");
    }
    Ok(())
}

/// Has somebody do `other` once a run is planned and before its first effect.
fn meanwhile(
    agent: &mut Agent,
    words: &[&str],
    other: impl FnOnce() -> Result<()>,
) -> Result<Value> {
    let go = pausing(agent, 0)?;
    let mut command = agent.cli(words)?;
    let caller = std::thread::spawn(move || run(&mut command, None, LONG));
    eventually(SOON, "plan", || agent.log().contains("failpoint reached"))?;
    other()?;
    fs::write(go, "")?;
    let output = caller
        .join()
        .map_err(|_| anyhow!("the caller panicked"))??;
    told(&cli(&output)?)
}

#[test]
fn a_disk_that_somebody_else_made_larger_is_not_shrunk_to_what_was_planned() -> Result<()> {
    let lab = Lab::from_env()?;
    let (domain, mut agent) = (lab.blank(&BlankSpec::default())?, lab.agent("")?);
    let name = domain.name.as_str();
    let words = ["commit", name, "--resize-to", "96M", "--resize-disk", "vda"];
    let refused = meanwhile(&mut agent, &words, || {
        domain.virsh("blockresize", &["vda", "128M"])?;
        domain.write_pattern("vda", 5, 100 << 20, 65_536)
    })?;
    assert_eq!(refused["reason"], "SHRINK_REFUSED", "{refused}");
    assert!(domain.has_pattern("vda", 5, 100 << 20, 65_536)?);
    Ok(())
}

#[test]
fn a_guest_that_somebody_else_froze_before_the_run_could_stays_frozen() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, mut agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.clone();
    let words = ["create", name.as_str(), "s"];
    let refused = meanwhile(&mut agent, &words, || {
        guest.virsh("domfsfreeze", &[]).map(drop)
    })?;
    assert_eq!(refused["reason"], "GUEST_FROZEN", "{refused}");
    assert!(guest.frozen()?, "what somebody else relies on was thawed");
    guest.virsh("domfsthaw", &[])?;
    guest.lives()?;
    assert_eq!(guest.snapshots()?, [] as [&str; 0]);
    Ok(())
}
