//! Overlays and branches: names by the second, siblings, and the present kept in a
//! safety snapshot.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use vmsnap_tests::{BlankSpec, Closed, Lab, eventually};

use super::{
    AT, BYTES, all_whole, current, has, point, put, records, revert, seconds_now, stopped,
};

#[test]
fn reverts_and_snapshots_within_one_second_all_work_and_leave_nothing_behind() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        disks: vec![("vdb".into(), "qcow2".into(), false)],
        ..stopped()
    })?;
    let name = domain.name.as_str();
    domain.write_pattern("vdb", 7, AT, BYTES)?;
    point(&agent, &domain, "s", 1, &[])?;
    for round in 2..5 {
        put(&domain, round)?;
        domain.write_pattern("vdb", round, AT, BYTES)?;
        revert(&agent, &domain, "s", &[])?.result()?;
        assert!(has(&domain, 1)? && domain.has_pattern("vdb", 7, AT, BYTES)?);
        // Each disk has its own image and one overlay on it.
        assert_eq!(domain.files()?.len(), 4, "{:?}", domain.files()?);
        assert_eq!(domain.chain("vda")?.len(), 2);
    }
    // The overlay that was just made is frozen by a snapshot, and the next revert
    // would give its own the same name.
    for round in 0..3 {
        point(&agent, &domain, &format!("t{round}"), 10 + round, &[])?;
        revert(&agent, &domain, "s", &[])?.result()?;
        assert!(has(&domain, 1)?);
    }
    for round in 0..3 {
        revert(&agent, &domain, &format!("t{round}"), &[])?.result()?;
        assert!(has(&domain, 10 + round)?);
    }
    revert(&agent, &domain, "s", &[])?.result()?;
    agent
        .vmsnap(&["cleanup", name, "s", "--children", "only"])?
        .result()?;
    assert_eq!(domain.files()?.len(), 4, "{:?}", domain.files()?);
    all_whole(&agent, &domain)
}

#[test]
fn a_sibling_keeps_its_data_although_libvirt_takes_its_image_for_the_present_one() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&stopped())?;
    point(&agent, &domain, "base", 1, &[])?;
    revert(&agent, &domain, "base", &[])?.result()?;
    point(&agent, &domain, "kept", 2, &[])?;
    let reverts_spare_it = |what: &str| -> Result<()> {
        all_whole(&agent, &domain).context(what.to_owned())?;
        let kept = domain.data("kept", "vda")?;
        revert(&agent, &domain, "base", &[])?.result()?;
        ensure!(
            kept.exists(),
            "{what}: libvirt deleted the data of a sibling"
        );
        all_whole(&agent, &domain).context(what.to_owned())?;
        revert(&agent, &domain, "kept", &[])?.result()?;
        ensure!(has(&domain, 2)?, "{what}");
        let files = domain.files()?;
        ensure!(files.len() <= 3, "{what} left something behind: {files:?}");
        Ok(())
    };
    for delete in ["agent", "virsh"] {
        revert(&agent, &domain, "base", &[])?.result()?;
        point(&agent, &domain, "short", 3, &[])?;
        match delete {
            "agent" => agent
                .vmsnap(&["cleanup", &domain.name, "short"])?
                .result()
                .map(drop)?,
            _ => domain.virsh("snapshot-delete", &["short"]).map(drop)?,
        }
        assert!(has(&domain, 3)?, "{delete}");
        reverts_spare_it(delete)?;
    }
    // A revert by hand that failed late, because libvirt could not write its
    // record: no snapshot is current then, which crashes libvirt in the next one.
    revert(&agent, &domain, "base", &[])?.result()?;
    let by_hand = || {
        // Nobody else paces for libvirt's names by the second.
        let disk = domain.disk("vda")?;
        let second: i64 = disk.rsplit('.').next().context("a second")?.parse()?;
        eventually(Duration::from_secs(5), "next second", || {
            seconds_now().is_ok_and(|now| now > second)
        })?;
        let _closed = Closed::new(&records(&domain))?;
        domain.virsh("snapshot-revert", &["base"])
    };
    assert!(by_hand().is_err() && current(&domain).is_err());
    reverts_spare_it("by hand")
}

#[test]
fn a_safety_snapshot_brings_the_present_back_whole_of_either_kind_on_or_off() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    for kind in ["external", "internal"] {
        let domain = lab.blank(&BlankSpec::default())?;
        point(&agent, &domain, "s", 1, &["--kind", kind])?;
        let mut safe = Vec::new();
        for (byte, state) in [(2, "running"), (3, "stopped")] {
            put(&domain, byte)?;
            let words = ["--safety-snapshot", "--state-after", "stopped"];
            let done = revert(&agent, &domain, "s", &words)?;
            let name = done.result()?["safety_snapshot"]
                .as_str()
                .context("a name")?;
            safe.push((name.to_owned(), byte));
            assert!(domain.snapshots()?.iter().any(|one| one == name));
            assert!(has(&domain, 1)?, "{kind}, {state}");
        }
        for (name, byte) in safe {
            revert(&agent, &domain, &name, &["--state-after", "stopped"])?.result()?;
            assert!(has(&domain, byte)?, "{kind}, {name}");
        }
        all_whole(&agent, &domain)?;
    }
    Ok(())
}
