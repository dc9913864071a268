//! Reverts that fail in the middle: what is put back, and what is kept.

use anyhow::{Context as _, Result};
use vmsnap_tests::{Agent, BlankSpec, Cli, Closed, Domain, Lab};

use super::{
    Frozen, Own, all_whole, current, has, point, put, records, revert, run_of, stopped, untouched,
    with_points,
};

#[test]
fn a_revert_that_cannot_make_its_overlay_is_refused_or_puts_everything_back() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let own = Own::new(&lab)?;
    let domain = with_points(&lab, &agent, &own.0)?;
    let frozen = Frozen::of(&domain, &["cold", "warm"])?;
    let overlay = domain.disk("vda")?;
    let files = own.names()?;
    {
        let _closed = Closed::new(&own.0)?;
        for snapshot in ["cold", "warm"] {
            let failure = untouched(&agent, &domain, snapshot, &[])?;
            assert_eq!(failure["reason"], "STORAGE_NOT_WRITABLE", "{snapshot}");
        }
    }
    // Closed only after the plan looked: libvirt fails when the guest is dead, and
    // a revert to memory has opened the image of the restore point by then.
    for (state, first, snapshot) in [
        ("running", "", "warm"),
        ("running", "", "cold"),
        ("paused", "suspend", "warm"),
        ("shut off", "destroy", "warm"),
    ] {
        if !first.is_empty() {
            domain.virsh(first, &[])?;
        }
        let run = run_of(&domain)?;
        let mut closed = None;
        let failed = agent.vmsnap_seen(&["revert", &domain.name, snapshot], |event| {
            if event["event"] == "planned" {
                closed = Closed::new(&own.0).ok();
            }
        })?;
        drop(closed);
        let row = format!("{snapshot}, {state}: {}", failed.said);
        failed.failure().context(row.clone())?;
        assert_eq!(failed.outcome()?["state"], "failed", "{row}");
        assert_eq!(domain.state()?, state, "{row}");
        assert_eq!(domain.disk("vda")?, overlay, "{row}");
        assert_eq!(own.names()?, files, "{row}");
        assert_eq!(current(&domain)?, "warm", "{row}");
        if state == "running" {
            assert_ne!(run_of(&domain)?, run, "{row}: libvirt did not get that far");
            assert!(failed.warned("GUEST_RESTARTED"), "{row}");
        }
        frozen.stand_still().context(row.clone())?;
        assert!(has(&domain, 3)?, "{row}");
        all_whole(&agent, &domain).context(row)?;
    }
    for (snapshot, byte) in [("warm", 2), ("cold", 1)] {
        revert(&agent, &domain, snapshot, &[])?.result()?;
        assert!(has(&domain, byte)?);
    }
    Ok(())
}

/// A revert in which libvirt cannot write its record of the snapshot, which it does
/// last.
fn fails_last(agent: &Agent, domain: &Domain, words: &[&str]) -> Result<Cli> {
    let mut closed = None;
    let failed = agent.vmsnap_seen(words, |event| {
        match (event["event"].as_str(), event["name"].as_str()) {
            (Some("step_started"), Some("keep-definition")) => {
                closed = Closed::new(&records(domain)).ok();
            }
            (Some("step_failed"), _) => closed = None,
            _ => {}
        }
    })?;
    failed.failure()?;
    assert_eq!(failed.outcome()?["state"], "failed", "{}", failed.said);
    Ok(failed)
}

#[test]
fn a_revert_that_fails_after_the_present_overlay_was_deleted_begins_an_empty_one() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let own = Own::new(&lab)?;
    for safe in [false, true] {
        let domain = with_points(&lab, &agent, &own.0)?;
        let frozen = Frozen::of(&domain, &["cold", "warm"])?;
        let overlay = domain.disk("vda")?;
        let files = own.names()?;
        let mut words = vec!["revert", domain.name.as_str(), "cold"];
        if safe {
            words.push("--safety-snapshot");
        }
        let failed = fails_last(&agent, &domain, &words)?;
        assert!(failed.warned("STATE_LOST") && failed.warned("GUEST_RESTARTED"));
        assert_eq!(domain.state()?, "running");
        assert_eq!(domain.snapshots()?, ["cold", "warm"]);
        assert_eq!(current(&domain)?, "warm");
        assert_eq!(domain.disk("vda")?, overlay);
        assert_eq!(own.names()?, files);
        frozen.stand_still()?;
        all_whole(&agent, &domain)?;
        // Kept by a safety snapshot, nothing of the present is lost; without one it
        // is what the last snapshot was made of.
        assert!(has(&domain, if safe { 3 } else { 2 })?);
        // libvirt's records are those of before also on disk.
        for (snapshot, byte) in [("warm", 2), ("cold", 1)] {
            revert(&agent, &domain, snapshot, &[])?.result()?;
            assert!(has(&domain, byte)?);
        }
    }
    Ok(())
}

#[test]
fn a_revert_that_went_through_although_libvirt_says_that_it_failed_keeps_what_was_kept()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let own = Own::new(&lab)?;
    let domain = with_points(&lab, &agent, &own.0)?;
    let frozen = Frozen::of(&domain, &["cold", "warm"])?;
    let words = ["revert", domain.name.as_str(), "warm", "--safety-snapshot"];
    let failed = fails_last(&agent, &domain, &words)?;
    assert!(failed.warned("REVERT_WENT_THROUGH"));
    // The VM is in the snapshot, and the safety snapshot has all that was there.
    assert_eq!(domain.state()?, "running");
    assert_eq!(current(&domain)?, "warm");
    assert!(has(&domain, 2)?);
    frozen.stand_still()?;
    all_whole(&agent, &domain)?;
    let names = domain.snapshots()?;
    let safety = names.iter().find(|name| name.starts_with("safety-"));
    revert(&agent, &domain, safety.context("the safety snapshot")?, &[])?.result()?;
    assert!(has(&domain, 3)?);
    Ok(())
}

#[test]
fn a_start_that_fails_after_a_revert_leaves_the_vm_off_on_an_overlay_of_its_own() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    // A host device that is not there: nothing that a plan looks for.
    let domain = lab.blank(&BlankSpec {
        devices: "<serial type='dev'><source path='/dev/vmsnap-nowhere'/></serial>".into(),
        ..stopped()
    })?;
    point(&agent, &domain, "s", 1, &[])?;
    put(&domain, 2)?;
    let frozen = Frozen::of(&domain, &["s"])?;
    let failed = revert(&agent, &domain, "s", &["--state-after", "running"])?;
    let failure = failed.failure()?;
    assert_eq!(failed.outcome()?["state"], "failed", "{}", failed.said);
    assert!(
        failure["message"].to_string().contains("is done"),
        "{failure}"
    );
    assert_eq!(domain.state()?, "shut off");
    assert!(has(&domain, 1)?);
    assert_eq!(domain.chain("vda")?.len(), 2);
    frozen.stand_still()?;
    all_whole(&agent, &domain)
}
