//! Which snapshots a delete or a commit takes, and in which order: branches,
//! children, protected and foreign ones, and the VM's state before and after.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use vmsnap_tests::{BlankSpec, Lab};

use super::{
    NONE, chain_of, delete_as_told, healths, holds, keeps, names, reason, refused, still,
    virsh_external, write,
};

#[test]
fn after_a_revert_each_refused_delete_gives_the_order_that_works() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    // Back to the one in the middle: the newest hangs beside the present state.
    let domain = still(&lab, BlankSpec::default())?;
    let name = domain.name.as_str();
    chain_of(&agent, &domain, 3)?;
    agent
        .vmsnap(&["revert", name, "e2", "--state-after", "paused"])?
        .result()?;
    write(&domain, 9)?;
    for words in [
        vec!["cleanup", name, "e2"],
        vec!["commit", name, "e2"],
        vec!["commit", name, "e1"],
        vec!["commit", name, "--all"],
    ] {
        let failure = refused(&agent, &domain, &words)?;
        assert_eq!(reason(&failure), "SNAPSHOT_BRANCHES", "{words:?}");
        assert_eq!(names(&failure, "order"), ["e3"], "{words:?}");
    }
    let failure = refused(&agent, &domain, &["commit", name, "e3"])?;
    assert_eq!(reason(&failure), "SNAPSHOT_BRANCHES");
    assert_eq!(names(&failure, "active_path"), ["e2", "e1"]);
    // What lies below the fork goes from both branches alike.
    agent.vmsnap(&["cleanup", name, "e1"])?.result()?;
    holds(&domain, &[1, 9])?;
    keeps(&domain, "e2", &[1])?;
    keeps(&domain, "e3", &[1, 2])?;
    healths(&agent, &domain, &[("e2", "whole"), ("e3", "whole")])?;
    assert_eq!(delete_as_told(&agent, &domain, "e2")?, 1);
    assert_eq!(domain.snapshots()?, NONE);
    holds(&domain, &[1, 9])?;
    assert_eq!(domain.chain("vda")?.len(), 1);
    assert_eq!(domain.files()?.len(), 1, "{:?}", domain.files()?);
    domain.check("vda")
}

#[test]
fn a_branch_beside_the_present_state_goes_from_its_end_and_with_its_children_in_one_run()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = still(&lab, BlankSpec::default())?;
    let name = domain.name.as_str();
    chain_of(&agent, &domain, 4)?;
    agent
        .vmsnap(&["revert", name, "e1", "--state-after", "paused"])?
        .result()?;
    write(&domain, 9)?;
    agent.vmsnap(&["create", name, "f1"])?.result()?;
    write(&domain, 10)?;
    // libvirt deletes beside the present state only what has no children.
    for (snapshot, order) in [("e2", ["e4", "e3"].as_slice()), ("e1", &["e4", "e3", "e2"])] {
        let failure = refused(&agent, &domain, &["cleanup", name, snapshot])?;
        assert_eq!(reason(&failure), "SNAPSHOT_BRANCHES");
        assert_eq!(names(&failure, "order"), order, "{snapshot}");
    }
    let words = ["cleanup", name, "e3", "--children", "only"];
    agent.vmsnap(&words)?.result()?;
    assert_eq!(domain.snapshots()?, ["e1", "e2", "e3", "f1"]);
    keeps(&domain, "e3", &[1, 2])?;
    let words = ["cleanup", name, "e2", "--children", "delete"];
    agent.vmsnap(&words)?.result()?;
    assert_eq!(domain.snapshots()?, ["e1", "f1"]);
    keeps(&domain, "e1", &[])?;
    keeps(&domain, "f1", &[9])?;
    holds(&domain, &[9, 10])?;
    // All of both branches at once, from the ends on.
    agent.vmsnap(&["create", name, "f2"])?.result()?;
    let words = ["cleanup", name, "e1", "--children", "delete"];
    agent.vmsnap(&words)?.result()?;
    assert_eq!(domain.snapshots()?, NONE);
    holds(&domain, &[9, 10])?;
    assert_eq!(domain.files()?.len(), 1, "{:?}", domain.files()?);
    domain.check("vda")
}

#[test]
fn a_vm_that_is_off_merges_without_side_branches_only_and_ends_off_and_a_paused_one_stays_paused()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = still(&lab, BlankSpec::default())?;
    let name = domain.name.as_str();
    chain_of(&agent, &domain, 3)?;
    agent
        .vmsnap(&["revert", name, "e2", "--state-after", "paused"])?
        .result()?;
    assert_eq!(domain.state()?, "paused");
    // While it is on, the branch is no obstacle below the fork.
    agent.vmsnap(&["cleanup", name, "e1"])?.result()?;
    assert_eq!(domain.state()?, "paused");
    agent.vmsnap(&["create", name, "f1"])?.result()?;
    write(&domain, 9)?;
    domain.virsh("destroy", &[])?;
    // Both would have libvirt rebase the branch of a VM that is off: it crashes.
    let failure = refused(&agent, &domain, &["cleanup", name, "e2"])?;
    assert_eq!(reason(&failure), "SNAPSHOT_BRANCHES");
    assert_eq!(names(&failure, "order"), ["e3"]);
    agent.vmsnap(&["cleanup", name, "f1"])?.result()?;
    assert_eq!(domain.state()?, "shut off");
    holds(&domain, &[1, 9])?;
    assert_eq!(delete_as_told(&agent, &domain, "e2")?, 1);
    assert_eq!(domain.state()?, "shut off");
    assert_eq!(domain.snapshots()?, NONE);
    assert_eq!(domain.files()?.len(), 1, "{:?}", domain.files()?);
    holds(&domain, &[1, 9])?;
    domain.check("vda")
}

#[test]
fn a_commit_of_all_drops_nothing_protected_and_nothing_foreign_that_was_not_named() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    // The disk stands on a golden image, into which nothing is ever merged.
    let gold = lab
        .images()
        .join(format!("gold{}.qcow2", std::process::id()));
    let gold = gold.display().to_string();
    lab.qemu_img(["create", "-q", "-f", "qcow2", &gold, "64M"])?;
    let untouched = fs::read(&gold)?;
    let spec = BlankSpec {
        backing: Some(gold.clone()),
        ..BlankSpec::default()
    };
    let domain = still(&lab, spec)?;
    let name = domain.name.as_str();
    write(&domain, 1)?;
    agent
        .vmsnap(&["create", name, "kept", "--protected"])?
        .result()?;
    write(&domain, 2)?;
    virsh_external(&domain, "theirs")?;
    write(&domain, 3)?;
    agent.vmsnap(&["create", name, "ours"])?.result()?;
    write(&domain, 4)?;
    for words in [vec!["commit", name, "--all"], vec!["commit", name, "kept"]] {
        let failure = refused(&agent, &domain, &words)?;
        assert_eq!(reason(&failure), "SNAPSHOT_PROTECTED");
        assert_eq!(failure["metadata"]["snapshot"], "theirs", "{words:?}");
    }
    // Each that is named goes, with the newer one that may go unnamed.
    let merged = agent.vmsnap(&["commit", name, "theirs"])?;
    assert_eq!(
        merged.result()?["merged"],
        serde_json::json!(["ours", "theirs"])
    );
    let failure = refused(&agent, &domain, &["commit", name, "--all"])?;
    assert_eq!(reason(&failure), "SNAPSHOT_PROTECTED");
    assert_eq!(failure["metadata"]["snapshot"], "kept");
    agent.vmsnap(&["commit", name, "kept"])?.result()?;
    agent.vmsnap(&["create", name, "a"])?.result()?;
    write(&domain, 5)?;
    agent.vmsnap(&["create", name, "b"])?.result()?;
    write(&domain, 6)?;
    let all = agent.vmsnap(&["commit", name, "--all"])?;
    assert_eq!(all.result()?["merged"], serde_json::json!(["b", "a"]));
    let again = agent.vmsnap(&["commit", name, "--all"])?;
    assert_eq!(again.result()?["changed"], false);
    let base = Path::new(&gold).file_name().context("a name")?;
    assert_eq!(
        domain.chain("vda")?,
        [format!("{name}.qcow2"), base.to_string_lossy().into_owned()]
    );
    holds(&domain, &[1, 2, 3, 4, 5, 6])?;
    assert!(
        fs::read(&gold)? == untouched,
        "the golden image was written"
    );
    drop(domain);
    fs::remove_file(gold)?;
    Ok(())
}

#[test]
fn a_snapshot_with_a_disk_that_was_detached_since_goes_once_the_disk_is_attached_again()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let two_disks = BlankSpec {
        disks: vec![("vdb".into(), "qcow2".into(), false)],
        stopped: true,
        ..BlankSpec::default()
    };
    // Beside the present state nothing is merged, and nothing needs the disk.
    let beside = lab.blank(&two_disks)?;
    let name = beside.name.as_str();
    chain_of(&agent, &beside, 2)?;
    agent.vmsnap(&["revert", name, "e1"])?.result()?;
    beside.virsh("detach-disk", &["vdb", "--config"])?;
    agent.vmsnap(&["cleanup", name, "e2"])?.result()?;
    assert_eq!(beside.snapshots()?, ["e1"]);

    let domain = lab.blank(&two_disks)?;
    let name = domain.name.as_str();
    chain_of(&agent, &domain, 2)?;
    domain.write_pattern("vdb", 7, 0, 4096)?;
    let overlay = domain.disk("vdb")?;
    domain.virsh("detach-disk", &["vdb", "--config"])?;
    for state in ["shut off", "paused"] {
        if state == "paused" {
            domain.virsh("start", &["--paused"])?;
        }
        for words in [["cleanup", name, "e2"], ["commit", name, "--all"]] {
            let failure = refused(&agent, &domain, &words)?;
            assert_eq!(reason(&failure), "DISK_UNKNOWN", "{state}, {words:?}");
            assert_eq!(failure["metadata"]["disk"], "vdb");
            assert_eq!(failure["metadata"]["path"], overlay.as_str());
        }
        // A policy goes on with what it can do, and says what stays.
        let policy = agent.vmsnap(&["cleanup", name, "--older-than", "1ms"])?;
        assert_eq!(policy.result()?["changed"], false);
        assert_eq!(domain.snapshots()?, ["e1", "e2"]);
    }
    // As the message says.
    let words = [&overlay, "vdb", "--subdriver", "qcow2", "--persistent"];
    domain.virsh("attach-disk", &words)?;
    agent.vmsnap(&["commit", name, "--all"])?.result()?;
    assert_eq!(domain.snapshots()?, NONE);
    holds(&domain, &[1, 2])?;
    assert!(domain.has_pattern("vdb", 7, 0, 4096)?);
    assert_eq!(domain.files()?.len(), 2, "{:?}", domain.files()?);
    Ok(())
}
