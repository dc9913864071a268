//! The stored definition: what is taken back of it, one that names a frozen image,
//! and the UEFI variables.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use vmsnap_tests::{BlankSpec, Lab, eventually};

use super::{Frozen, all_whole, has, point, put, revert, untouched};

#[test]
fn what_is_taken_back_of_the_definition_is_in_the_diff_and_is_taken_back() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    point(&agent, &domain, "s", 1, &[])?;
    // Of the running VM none of this is to be seen.
    domain.virsh("setmaxmem", &["128M", "--config"])?;
    domain.virsh("setvcpus", &["3", "--maximum", "--config"])?;
    domain.virsh("setvcpus", &["2", "--config"])?;
    let added = lab.images().join(format!("{name}-added.qcow2"));
    let shown = added.display().to_string();
    lab.qemu_img(["create", "-q", "-f", "qcow2", &shown, "1M"])?;
    let attach = ["vdb", "--subdriver", "qcow2", "--config"];
    let mut words = vec![shown.as_str()];
    words.extend(attach);
    domain.virsh("attach-disk", &words)?;
    let definition = |what: &str| -> Result<String> {
        let xml = domain.virsh("dumpxml", &["--inactive"])?;
        let document = roxmltree::Document::parse(&xml)?;
        let node = document.descendants().find(|node| node.has_tag_name(what));
        let node = node.with_context(|| format!("no {what}"))?;
        Ok(node.text().unwrap_or_default().to_owned())
    };
    assert_eq!(
        (definition("memory")?, definition("vcpu")?),
        ("131072".into(), "3".into())
    );
    let plan = agent.vmsnap(&["revert", name, "s", "--check"])?;
    let plan = plan.document()?;
    let mib = |mib: u64| (mib << 20).to_string();
    for (field, before, after) in [
        ("definition.memory", Some(mib(128)), Some(mib(64))),
        ("definition.vcpus", Some("3".into()), Some("1".into())),
        (
            "definition.vcpus_at_start",
            Some("2".into()),
            Some("1".into()),
        ),
        ("definition.disk.vdb", Some(shown.clone()), None),
    ] {
        let change = plan["diff"]
            .as_array()
            .and_then(|diff| diff.iter().find(|change| change["field"] == field))
            .with_context(|| format!("no {field} in {}", plan["diff"]))?;
        assert_eq!(
            change["before"].as_str().map(str::to_owned),
            before,
            "{field}"
        );
        assert_eq!(
            change["after"].as_str().map(str::to_owned),
            after,
            "{field}"
        );
    }
    let done = revert(&agent, &domain, "s", &[])?;
    done.result()?;
    assert!(done.warned("DISK_TAKEN_BACK"));
    assert_eq!(
        (definition("memory")?, definition("vcpu")?),
        ("65536".into(), "1".into())
    );
    assert!(domain.disk("vdb").is_err() && added.exists());
    // Nothing differs any more.
    let again = agent.vmsnap(&["revert", name, "s", "--check"])?;
    let text = again.document()?["diff"].to_string();
    assert!(!text.contains("definition."), "{text}");
    Ok(())
}

#[test]
fn a_definition_that_names_a_base_stops_everything_that_would_start_or_merge_on_it() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    let xml = domain.virsh("dumpxml", &["--inactive"])?;
    point(&agent, &domain, "one", 1, &[])?;
    point(&agent, &domain, "two", 2, &[])?;
    put(&domain, 3)?;
    let overlay = domain.disk("vda")?;
    let frozen = Frozen::of(&domain, &["one", "two"])?;
    // A playbook defines the VM again as it once was.
    let path = lab.folder.join(format!("{name}.again.xml"));
    lab.write(&path, &xml)?;
    let define = || lab.virsh(["define".as_ref(), path.as_os_str()]);
    define()?;
    let all: [&[&str]; 9] = [
        &["revert", name, "one"],
        &["create", name, "three"],
        &["commit", name, "two"],
        &["commit", name, "--all"],
        &["cleanup", name, "two"],
        &["cleanup", name, "one", "--children", "delete"],
        &["create", name, "three", "--start-if-stopped"],
        &["cleanup", name, "two", "--start-if-stopped"],
        &["revert", name, "one", "--force", "--start-if-stopped"],
    ];
    for state in ["running", "shut off"] {
        for words in all {
            let refused = agent.vmsnap(words)?;
            let failure = refused.failure()?;
            assert_eq!(
                failure["reason"], "DEFINITION_DIFFERS",
                "{state}, {words:?}"
            );
            assert_eq!(failure["metadata"]["disk"], "vda");
            assert_eq!(domain.state()?, state);
        }
        assert_eq!(domain.snapshots()?, ["one", "two"]);
        let policy = agent.vmsnap(&["cleanup", name, "--keep-last", "1"])?;
        // Off, its snapshots look as if something was merged into them: none counts.
        if policy.status == 0 {
            assert_eq!(policy.result()?["changed"], false, "{state}");
        } else {
            assert_eq!(policy.failure()?["reason"], "DEFINITION_DIFFERS", "{state}");
        }
        assert_eq!(domain.snapshots()?, ["one", "two"]);
        if state == "running" {
            domain.virsh("destroy", &[])?;
        }
    }
    assert!(Path::new(&overlay).exists());
    frozen.stand_still()?;
    // The message names the way out.
    let said = agent.vmsnap(&["create", name, "three"])?;
    let failure = said.failure()?;
    assert_eq!(failure["metadata"]["newest"], overlay.as_str());
    let base = domain.disk("vda")?;
    lab.write(&path, &xml.replace(&base, &overlay))?;
    define()?;
    fs::remove_file(path)?;
    all_whole(&agent, &domain)?;
    assert!(has(&domain, 3)?);
    agent
        .vmsnap(&["create", name, "three", "--start-if-stopped"])?
        .result()?;
    assert_eq!(domain.state()?, "running");
    frozen.stand_still()
}

#[test]
fn a_frozen_base_is_known_under_another_target_and_through_a_link() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    for way in ["target", "link"] {
        let domain = lab.blank(&BlankSpec::default())?;
        let name = domain.name.as_str();
        let xml = domain.virsh("dumpxml", &["--inactive"])?;
        let base = domain.disk("vda")?;
        point(&agent, &domain, "one", 1, &[])?;
        put(&domain, 2)?;
        let overlay = domain.disk("vda")?;
        let frozen = Frozen::of(&domain, &["one"])?;
        let link = lab.folder.join(format!("{name}.link"));
        let again = match way {
            "target" => xml.replace("dev='vda'", "dev='vdb'"),
            _ => {
                std::os::unix::fs::symlink(domain.folder(), &link)?;
                let file = Path::new(&base).file_name().context("a file")?;
                xml.replace(&base, &link.join(file).display().to_string())
            }
        };
        let path = lab.folder.join(format!("{name}.again.xml"));
        let define = |xml: &str| {
            lab.write(&path, xml)?;
            lab.virsh(["define".as_ref(), path.as_os_str()])
        };
        define(&again)?;
        for state in ["running", "shut off"] {
            for words in [
                &["create", name, "two", "--start-if-stopped"] as &[&str],
                &["commit", name, "--all"],
                &["revert", name, "one", "--start-if-stopped"],
            ] {
                let refused = agent.vmsnap(words)?;
                let failure = refused.failure()?;
                let reason = &failure["reason"];
                assert_eq!(reason, "DEFINITION_DIFFERS", "{way}, {state}, {words:?}");
                assert_eq!(domain.state()?, state);
            }
            if state == "running" {
                domain.virsh("destroy", &[])?;
            }
        }
        // As it is defined, the image of the snapshot is the one that is written.
        assert_eq!(agent.healths(name)?["one"], "merged_away", "{way}");
        frozen.stand_still()?;
        define(&xml.replace(&base, &overlay))?;
        assert_eq!(agent.healths(name)?["one"], "whole", "{way}");
        assert!(has(&domain, 2)?);
        if way == "link" {
            // The same overlay by another path is no other image.
            domain.virsh("start", &[])?;
            let file = Path::new(&overlay).file_name().context("a file")?;
            define(&xml.replace(&base, &link.join(file).display().to_string()))?;
        }
        agent.vmsnap(&["cleanup", name, "one"])?.result()?;
        assert!(has(&domain, 2)?);
        fs::remove_file(&path)?;
        if way == "link" {
            fs::remove_file(link)?;
        }
    }
    Ok(())
}

#[test]
fn saved_flash_brings_the_uefi_variables_back_also_when_the_guest_never_runs_again() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let code = lab.folder.join(format!("code{}.fd", std::process::id()));
    let variables = lab.images().join(format!("vars{}.fd", std::process::id()));
    for (path, bytes) in [(&code, 2 << 20), (&variables, 256 << 10)] {
        fs::write(path, vec![0; bytes])?;
        lab.own(path)?;
    }
    let domain = lab.blank(&BlankSpec {
        os: format!(
            "<loader readonly='yes' type='pflash'>{}</loader><nvram>{}</nvram>",
            code.display(),
            variables.display()
        ),
        ..BlankSpec::default()
    })?;
    point(&agent, &domain, "warm", 1, &["--memory"])?;
    domain.virsh("suspend", &[])?;
    point(&agent, &domain, "still", 2, &["--memory"])?;
    let copies: Vec<PathBuf> = domain
        .files()?
        .iter()
        .filter(|file| file.ends_with(".nvram"))
        .map(|file| lab.images().join(file))
        .collect();
    assert_eq!(copies.len(), 2);
    let then = fs::read(&variables)?;
    for (snapshot, after, resume) in [
        ("warm", "running", false),
        ("warm", "stopped", false),
        ("still", "stopped", false),
        ("warm", "paused", true),
        ("still", "auto", true),
    ] {
        domain.virsh("destroy", &[]).ok();
        fs::write(&variables, vec![0xab; 256 << 10])?;
        lab.own(&variables)?;
        revert(&agent, &domain, snapshot, &["--state-after", after])?.result()?;
        if resume {
            domain.virsh("resume", &[])?;
        }
        eventually(Duration::from_secs(10), "variables of then", || {
            fs::read(&variables).is_ok_and(|now| now == then)
        })
        .with_context(|| format!("{snapshot}, {after}"))?;
    }
    // A copy that is gone or cut is missed before the guest is touched, where it
    // is needed.
    domain.virsh("start", &[]).ok();
    let stopped = ["--state-after", "stopped"];
    fs::write(&copies[1], vec![0; 5])?;
    let failure = untouched(&agent, &domain, "warm", &stopped)?;
    assert_eq!(failure["reason"], "SNAPSHOT_NOT_WHOLE");
    assert!(
        failure["message"].to_string().contains(".nvram"),
        "{failure}"
    );
    Ok(())
}
