//! What is there already: the same name, a managed save, snapshots of the other
//! kind, and several runs at once.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use vmsnap_tests::{BlankSpec, Lab};

use super::refused;

#[test]
fn an_existing_name_is_left_refused_or_replaced_and_another_kind_is_a_conflict() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    let created = || -> Result<String> {
        let xml = domain.virsh("snapshot-dumpxml", &["s"])?;
        let time = xml.split("<creationTime>").nth(1).context("a time")?;
        Ok(time.split('<').next().unwrap_or_default().to_owned())
    };
    agent.vmsnap(&["create", name, "s"])?.result()?;
    let first = created()?;
    let again = agent.vmsnap(&["create", name, "s"])?;
    assert_eq!(again.result()?["changed"], false);
    assert!(again.warned("SNAPSHOT_EXISTS"));
    for (words, reason) in [
        (["s", "--if-exists", "fail"].as_slice(), "SNAPSHOT_EXISTS"),
        (&["s", "--kind", "internal"], "SNAPSHOT_CONFLICT"),
        (&["s", "--memory"], "SNAPSHOT_CONFLICT"),
        (&["s", "--protected"], "SNAPSHOT_CONFLICT"),
        (&["s", "--consistency", "filesystem"], "SNAPSHOT_CONFLICT"),
    ] {
        assert_eq!(refused(&agent, &domain, words)?.0, reason, "{words:?}");
    }
    std::thread::sleep(Duration::from_millis(1100));
    let (reason, message) = refused(&agent, &domain, &["s", "--max-age", "1s"])?;
    assert_eq!(reason, "SNAPSHOT_TOO_OLD");
    assert!(message.contains("max_age"), "{message}");
    assert_eq!(created()?, first);
    let words = ["create", name, "s", "--max-age", "1h"];
    assert_eq!(agent.vmsnap(&words)?.result()?["changed"], false);
    let made = agent.vmsnap(&["create", name, "s", "--if-exists", "replace"])?;
    assert_eq!(made.result()?["changed"], true);
    assert!(made.warned("POINT_OF_NO_RETURN"));
    assert_ne!(created()?, first);
    assert_eq!(domain.chain("vda")?.len(), 2);
    // What is replaced mixes with nothing.
    let words = [
        "create",
        name,
        "s",
        "--kind",
        "internal",
        "--if-exists",
        "replace",
    ];
    let made = agent.vmsnap(&words)?;
    assert_eq!(made.result()?["snapshot"]["kind"], "internal");
    assert_eq!(domain.files()?, [format!("{name}.qcow2")]);
    assert_eq!(
        refused(&agent, &domain, &["s", "--kind", "external"])?.0,
        "SNAPSHOT_CONFLICT"
    );
    Ok(())
}

#[test]
fn a_foreign_snapshot_of_that_name_meets_no_demand_that_nobody_can_vouch_for() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    domain.virsh("snapshot-create-as", &["s", "--disk-only"])?;
    assert_eq!(
        agent.vmsnap(&["create", name, "s"])?.result()?["changed"],
        false
    );
    for demand in ["filesystem", "suspend"] {
        let (reason, message) = refused(&agent, &domain, &["s", "--consistency", demand])?;
        assert_eq!(reason, "SNAPSHOT_CONFLICT");
        assert!(message.contains("not known"), "{message}");
    }
    let words = ["create", name, "s", "--consistency", "crash"];
    assert_eq!(agent.vmsnap(&words)?.result()?["changed"], false);
    Ok(())
}

#[test]
fn snapshots_without_a_name_made_at_once_all_get_names_of_their_own() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    // Equal requests at the same time would be one run.
    let texts = ["one", "two", "three"];
    let mut children = Vec::new();
    for text in texts {
        let mut command = agent.cli(&["create", name, "--description", text])?;
        children.push(command.stdout(std::process::Stdio::null()).spawn()?);
    }
    for mut child in children {
        ensure!(child.wait()?.success());
    }
    let names = domain.snapshots()?;
    assert_eq!(names.len(), texts.len(), "{names:?}");
    for made in &names {
        // libvirt's own would be a number of seconds.
        assert!(made.starts_with("vmsnap-20"), "{made}");
    }
    assert_eq!(domain.chain("vda")?.len(), texts.len() + 1);
    Ok(())
}

#[test]
fn a_managed_save_and_mixed_kinds_keep_a_snapshot_from_being_made() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    domain.virsh("managedsave", &[])?;
    for words in [["s"].as_slice(), &["s", "--start-if-stopped"]] {
        let (reason, message) = refused(&agent, &domain, words)?;
        assert_eq!(reason, "MANAGED_SAVE_PRESENT");
        assert!(message.contains("managedsave-remove"), "{message}");
    }
    domain.virsh("start", &[])?;
    agent.vmsnap(&["create", name, "outside"])?.result()?;
    let (reason, message) = refused(&agent, &domain, &["s", "--kind", "internal"])?;
    assert_eq!(reason, "KINDS_MIXED");
    assert!(message.contains("'outside'"), "{message}");
    // Somebody else mixes them all the same: libvirt lets him.
    domain.virsh("snapshot-create-as", &["inside"])?;
    for kind in ["auto", "internal", "external"] {
        let (reason, message) = refused(&agent, &domain, &["s", "--kind", kind])?;
        assert_eq!(reason, "KINDS_MIXED");
        for part in ["inside: internal", "outside: external"] {
            assert!(message.contains(part), "{message}");
        }
    }
    Ok(())
}
