//! Snapshots that were defined again, as after a move to another host, so that
//! libvirt takes another one for the current, or none.

use std::fs;

use anyhow::Result;
use vmsnap_tests::{BlankSpec, Domain, Lab};

use super::{NONE, chain_of, holds, image_holds, keeps, names, reason, refused, still};

/// Takes snapshots off libvirt's list and defines them again, parents first.
fn define_again(domain: &Domain, names: &[&str], current: Option<&str>) -> Result<()> {
    let mut records = Vec::new();
    for name in names {
        let record = domain.virsh("snapshot-dumpxml", &[name, "--security-info"])?;
        records.push((*name, record));
    }
    for name in names.iter().rev() {
        domain.virsh("snapshot-delete", &[name, "--metadata"])?;
    }
    for (name, record) in records {
        let file = domain
            .lab
            .folder
            .join(format!("{}-{name}.xml", domain.name));
        domain.lab.write(&file, &record)?;
        let file = file.display().to_string();
        let mut words = vec![file.as_str(), "--redefine"];
        if current == Some(name) {
            words.push("--current");
        }
        domain.virsh("snapshot-create", &words)?;
        fs::remove_file(&file)?;
    }
    Ok(())
}

#[test]
fn what_the_present_state_stands_on_is_not_deleted_where_libvirt_knows_no_current_snapshot()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    for off in [false, true] {
        let domain = still(&lab, BlankSpec::default())?;
        let name = domain.name.as_str();
        chain_of(&agent, &domain, 1)?;
        if off {
            domain.virsh("destroy", &[])?;
        }
        define_again(&domain, &["e1"], None)?;
        for words in [
            vec!["cleanup", name, "e1"],
            vec!["commit", name, "e1"],
            vec!["commit", name, "--all"],
        ] {
            let failure = refused(&agent, &domain, &words)?;
            assert_eq!(reason(&failure), "CURRENT_SNAPSHOT_UNKNOWN", "{words:?}");
            let said = failure["message"].as_str().unwrap_or_default();
            let help = format!("virsh snapshot-current {name} e1");
            assert!(said.contains(&help), "{words:?}: {said}");
        }
        // A new one has no parent then, and the old one still must not go.
        agent.vmsnap(&["create", name, "e2"])?.result()?;
        let failure = refused(&agent, &domain, &["cleanup", name, "e1"])?;
        assert_eq!(names(&failure, "order"), ["e2"]);
        agent.vmsnap(&["cleanup", name, "e2"])?.result()?;
        keeps(&domain, "e1", &[])?;
        // As it was told.
        domain.virsh("snapshot-current", &["e1"])?;
        agent.vmsnap(&["cleanup", name, "e1"])?.result()?;
        image_holds(&lab, &domain.disk("vda")?, &[1])?;
        assert_eq!(domain.snapshots()?, NONE);
        assert_eq!(domain.files()?.len(), 1, "{:?}", domain.files()?);
    }
    Ok(())
}

#[test]
fn an_image_of_the_present_chain_is_not_deleted_where_libvirt_takes_a_wrong_snapshot_for_current()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = still(&lab, BlankSpec::default())?;
    let name = domain.name.as_str();
    chain_of(&agent, &domain, 2)?;
    define_again(&domain, &["e1", "e2"], Some("e1"))?;
    // Without a refusal libvirt deletes the image under the running VM's own.
    for words in [
        vec!["cleanup", name, "e2"],
        vec!["cleanup", name, "e1", "--children", "delete"],
        vec!["commit", name, "e2"],
        vec!["revert", name, "e1"],
    ] {
        let failure = refused(&agent, &domain, &words)?;
        let said = failure["message"].as_str().unwrap_or_default();
        let help = format!("virsh snapshot-current {name} e2");
        assert!(said.contains(&help), "{words:?}: {said}");
    }
    let policy = agent.vmsnap(&["cleanup", name, "--keep-last", "1"])?;
    policy.result()?;
    assert_eq!(domain.snapshots()?, ["e1", "e2"]);
    holds(&domain, &[1, 2])?;
    domain.virsh("snapshot-current", &["e2"])?;
    agent.vmsnap(&["commit", name, "--all"])?.result()?;
    holds(&domain, &[1, 2])?;
    assert_eq!(domain.snapshots()?, NONE);
    assert_eq!(domain.files()?.len(), 1, "{:?}", domain.files()?);
    Ok(())
}
