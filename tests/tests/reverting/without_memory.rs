//! Going back to the disks of a snapshot whose memory is gone or cannot be
//! loaded. libvirt loads it in any revert, so the agent does this by itself; what
//! it leaves has to be what libvirt would have left.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use vmsnap_tests::{Agent, BlankSpec, Closed, Domain, Lab};

use super::{
    AT, BYTES, Frozen, Own, all_whole, current, has, point, put, records, revert, run_of,
    untouched, with_points,
};

const ALONE: &str = "--disks-only";

/// The sum of all that is wrong with the files of a domain, by qemu-img.
fn checked(domain: &Domain) -> Result<()> {
    for file in domain.files()? {
        let path = domain.folder().join(&file);
        if !file.ends_with(".qcow2") {
            continue;
        }
        domain
            .lab
            .qemu_img(["check", "-q", "-U", &path.display().to_string()])
            .with_context(|| file.clone())?;
    }
    Ok(())
}

fn memory_file(domain: &Domain, name: &str) -> PathBuf {
    domain
        .lab
        .images()
        .join(format!("{}.{name}.mem", domain.name))
}

/// The snapshots that are not whole.
fn not_whole(agent: &Agent, domain: &Domain) -> Result<Vec<String>> {
    let found = agent.healths(&domain.name)?.into_iter();
    Ok(found
        .filter(|(_, health)| health != "whole")
        .map(|(name, _)| name)
        .collect())
}

#[test]
fn disks_come_back_alone_where_memory_is_gone_and_all_that_follows_works() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        disks: vec![("vdb".into(), "raw".into(), false)],
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    let write = |byte: u8| -> Result<()> {
        put(&domain, byte)?;
        domain.write_pattern("vdb", byte + 100, AT, BYTES)
    };
    let read = |byte: u8| -> Result<bool> {
        Ok(has(&domain, byte)? && domain.has_pattern("vdb", byte + 100, AT, BYTES)?)
    };
    for (byte, snapshot, more) in [
        (1, "cold", &[][..]),
        (2, "warm", &["--memory"]),
        (3, "later", &[]),
    ] {
        write(byte)?;
        let mut words = vec!["create", name, snapshot];
        words.extend(more);
        agent.vmsnap(&words)?.result()?;
    }
    write(4)?;
    fs::remove_file(memory_file(&domain, "warm"))?;
    let refused = untouched(&agent, &domain, "warm", &[])?;
    assert_eq!(refused["reason"], "SNAPSHOT_NOT_WHOLE");
    assert!(
        refused["message"].to_string().contains("disks_only"),
        "{refused}"
    );

    // From each state, onto a snapshot with another one below it and, as the
    // current one, once more.
    for (first, after, state) in [
        ("", "auto", "running"),
        ("suspend", "paused", "paused"),
        ("destroy", "stopped", "shut off"),
        ("start", "auto", "running"),
    ] {
        if !first.is_empty() {
            domain.virsh(first, &[])?;
        }
        let overlay = PathBuf::from(domain.disk("vda")?);
        let done = revert(&agent, &domain, "warm", &[ALONE, "--state-after", after])?;
        let row = format!("{first}, {after}: {}", done.said);
        done.result().context(row.clone())?;
        assert!(done.warned("GUEST_RESTARTS"), "{row}");
        assert_eq!(domain.state()?, state, "{row}");
        assert!(read(2)?, "{row}");
        assert_eq!(current(&domain)?, "warm", "{row}");
        assert!(!overlay.exists(), "{row}: the present state stays behind");
        assert_eq!(not_whole(&agent, &domain)?, ["warm"], "{row}");
        write(9)?;
    }
    checked(&domain)?;

    // libvirt goes on from there: a branch, and reverts of its own.
    write(5)?;
    agent.vmsnap(&["create", name, "branch"])?.result()?;
    write(6)?;
    for (snapshot, byte) in [("later", 3), ("branch", 5), ("cold", 1), ("branch", 5)] {
        revert(&agent, &domain, snapshot, &[])?.result()?;
        assert!(read(byte)?, "{snapshot}");
    }
    let by_hand = domain.virsh("snapshot-revert", &["later", "--running"]);
    by_hand.context("libvirt's own revert")?;
    assert!(read(3)?);

    // A safety snapshot keeps what was there, on a branch of its own.
    write(7)?;
    let done = revert(&agent, &domain, "warm", &[ALONE, "--safety-snapshot"])?;
    let safety = done.result()?["safety_snapshot"]
        .as_str()
        .context("a safety snapshot")?
        .to_owned();
    assert!(read(2)?);
    revert(&agent, &domain, &safety, &[])?.result()?;
    assert!(read(7)?);

    // And back to a leaf, which libvirt merges away in the end.
    for snapshot in [&safety, "later", "branch"] {
        agent.vmsnap(&["cleanup", name, snapshot])?.result()?;
    }
    revert(&agent, &domain, "warm", &[ALONE])?.result()?;
    assert!(read(2)?);
    write(8)?;
    revert(&agent, &domain, "warm", &[ALONE])?.result()?;
    assert!(read(2)?);
    write(8)?;
    agent.vmsnap(&["cleanup", name, "warm"])?.result()?;
    assert!(read(8)?);
    revert(&agent, &domain, "cold", &[])?.result()?;
    assert!(read(1)?);
    write(9)?;
    agent.vmsnap(&["commit", name, "--all"])?.result()?;
    assert!(read(9)? && domain.snapshots()?.is_empty());
    assert_eq!(domain.files()?.len(), 2, "{:?}", domain.files()?);
    checked(&domain)
}

#[test]
fn memory_that_is_damaged_is_left_alone_and_a_snapshot_without_memory_reverts_as_ever() -> Result<()>
{
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    point(&agent, &domain, "cold", 1, &[])?;
    point(&agent, &domain, "warm", 2, &["--memory"])?;
    put(&domain, 3)?;
    let memory = memory_file(&domain, "warm");
    let whole = fs::read(&memory)?;
    let mut spoilt = whole.clone();
    let middle = spoilt.len() / 2;
    spoilt[middle] ^= 0xff;
    fs::write(&memory, &spoilt)?;
    let refused = untouched(&agent, &domain, "warm", &[])?;
    assert!(
        refused["message"].to_string().contains("disks_only"),
        "{refused}"
    );
    let done = revert(&agent, &domain, "warm", &[ALONE])?;
    done.result()?;
    let steps: Vec<&str> = done
        .all("step_started")
        .filter_map(|event| event["name"].as_str())
        .collect();
    assert_eq!(steps, ["keep-definition", "revert-disks", "start"]);
    assert!(has(&domain, 2)?);
    assert_eq!(fs::read(&memory)?, spoilt);
    // Brought back, it is loaded again.
    fs::write(&memory, &whole)?;
    put(&domain, 4)?;
    revert(&agent, &domain, "warm", &[])?.result()?;
    assert!(has(&domain, 2)?);
    let plain = revert(&agent, &domain, "cold", &[ALONE])?;
    plain.result()?;
    assert!(plain.all("step_started").any(|it| it["name"] == "revert"));
    assert!(has(&domain, 1)?);
    all_whole(&agent, &domain)
}

#[test]
fn a_revert_to_disks_alone_that_fails_in_the_middle_loses_nothing() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let own = Own::new(&lab)?;
    let domain = with_points(&lab, &agent, &own.0)?;
    let words = ["revert", domain.name.as_str(), "warm", ALONE];
    let definition = lab
        .folder
        .join("config/libvirt/qemu")
        .join(format!("{}.xml.new", domain.name));
    // The overlay cannot be made; libvirt cannot write the definition; it cannot
    // write the record, and only then the guest is off.
    let fails = |unwritable: &Path, restarts: bool, former: &str| -> Result<()> {
        let row = format!("{}, on {former}", unwritable.display());
        let frozen = Frozen::of(&domain, &["cold", "warm"])?;
        let (overlay, files, run) = (domain.disk("vda")?, own.names()?, run_of(&domain)?);
        let stored = domain.virsh("dumpxml", &["--inactive"])?;
        let mut closed = None;
        let failed = agent.vmsnap_seen(&words, |event| {
            match (event["event"].as_str(), event["name"].as_str()) {
                (Some("step_started"), Some("keep-definition")) if *unwritable == definition => {
                    // No file can be made where a folder is.
                    let _ = fs::create_dir(unwritable);
                }
                (Some("step_started"), Some("keep-definition")) => {
                    closed = Closed::new(unwritable).ok();
                }
                (Some("step_failed"), _) => {
                    closed = None;
                    let _ = fs::remove_dir(&definition);
                }
                _ => {}
            }
        })?;
        drop(closed);
        failed.failure().context(row.clone())?;
        assert_eq!(
            failed.outcome()?["state"],
            "failed",
            "{row}: {}",
            failed.said
        );
        assert_eq!(run_of(&domain)? != run, restarts, "{row}");
        assert_eq!(failed.warned("GUEST_RESTARTED"), restarts, "{row}");
        assert!(!failed.warned("STATE_LOST"), "{row}");
        assert_eq!(domain.state()?, "running", "{row}");
        assert_eq!(domain.disk("vda")?, overlay, "{row}");
        assert_eq!(domain.virsh("dumpxml", &["--inactive"])?, stored, "{row}");
        assert_eq!(own.names()?, files, "{row}");
        assert_eq!(current(&domain)?, former, "{row}");
        frozen.stand_still().context(row.clone())?;
        assert!(has(&domain, 3)?, "{row}");
        all_whole(&agent, &domain).context(row)
    };
    fails(&own.0, false, "warm")?;
    fails(&definition, false, "warm")?;
    fails(&records(&domain), true, "warm")?;
    // From another branch.
    revert(&agent, &domain, "cold", &[])?.result()?;
    point(&agent, &domain, "side", 3, &[])?;
    fails(&definition, false, "side")?;
    fails(&records(&domain), true, "side")?;
    for (snapshot, more, byte) in [
        ("warm", &[ALONE][..], 2),
        ("side", &[], 3),
        ("cold", &[], 1),
    ] {
        revert(&agent, &domain, snapshot, more)?.result()?;
        assert!(has(&domain, byte)?);
    }
    // What libvirt had forgotten for a moment hangs where it was, in its files too.
    let told = domain.virsh("snapshot-parent", &["warm"])?;
    assert_eq!(told.trim(), "cold");
    let file = fs::read_to_string(records(&domain).join("warm.xml"))?;
    assert!(file.contains("<name>cold</name>"), "{file}");
    Ok(())
}

#[test]
fn a_disk_that_was_added_later_stays_with_what_was_written_to_it_or_its_loss_is_told_before()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    point(&agent, &domain, "warm", 1, &["--memory"])?;
    let added = lab.images().join(format!("{}-added.qcow2", domain.name));
    let shown = added.display().to_string();
    lab.qemu_img(["create", "-q", "-f", "qcow2", &shown, "8M"])?;
    lab.own(&added)?;
    for (more, told, stays) in [
        (&[ALONE][..], "stays", true),
        (&[], "libvirt deletes", false),
    ] {
        let words = ["vdb", "--subdriver", "qcow2", "--config", "--live"];
        let mut attach = vec![shown.as_str()];
        attach.extend(words);
        domain.virsh("attach-disk", &attach)?;
        point(&agent, &domain, "later", 2, &[])?;
        domain.write_pattern("vdb", 7, AT, BYTES)?;
        let overlay = PathBuf::from(domain.disk("vdb")?);
        let done = revert(&agent, &domain, "warm", more)?;
        done.result()?;
        assert!(has(&domain, 1)?);
        let warning = done
            .all("planned")
            .flat_map(|event| event["plan"]["warnings"].as_array().into_iter().flatten())
            .find(|warning| warning["code"] == "DISK_TAKEN_BACK")
            .context("a warning")?;
        assert!(warning["message"].to_string().contains(told), "{warning}");
        assert_eq!(overlay.exists(), stays, "{}", overlay.display());
        agent
            .vmsnap(&["cleanup", &domain.name, "later"])?
            .result()?;
    }
    assert!(added.exists());
    fs::remove_file(added)?;
    Ok(())
}
