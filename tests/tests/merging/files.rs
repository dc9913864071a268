//! Files that a merge or a clean-up must not write or delete: bases that are
//! read-only, what other VMs and clones stand on, and what metadata left behind.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use vmsnap_tests::{BlankSpec, Domain, Lab, command, eventually};

use super::{
    NONE, chain_of, files_judged, healths, holds, names, reason, refused, seen, still,
    virsh_external, write,
};

/// Marks a file so that nobody can write it, not even root.
struct Immutable<'a>(&'a str);

impl<'a> Immutable<'a> {
    fn mark(file: &'a str) -> Result<Self> {
        command::succeed(&mut command::privileged(["chattr", "+i", file]))?;
        Ok(Self(file))
    }
}

impl Drop for Immutable<'_> {
    fn drop(&mut self) {
        let _ = command::succeed(&mut command::privileged(["chattr", "-i", self.0]));
    }
}

#[test]
fn a_clone_that_comes_while_a_run_is_at_work_is_not_merged_into() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = still(&lab, BlankSpec::default())?;
    let name = domain.name.as_str();
    let base = domain.disk("vda")?;
    chain_of(&agent, &domain, 2)?;
    for number in 3..6 {
        write(&domain, number)?;
    }
    // The first merge is slow, and somebody makes a clone of the base meanwhile.
    let mut clone = None;
    let run = agent.vmsnap_seen(&["commit", name, "--all", "--bandwidth", "2M"], |event| {
        if event["event"] == "step_started" && clone.is_none() {
            clone = Some(lab.blank(&BlankSpec {
                backing: Some(base.clone()),
                stopped: true,
                ..BlankSpec::default()
            }));
        }
    })?;
    let clone = clone.context("a step")??;
    let failure = run.failure()?;
    assert_eq!(reason(failure), "FILE_SHARED");
    assert_eq!(names(failure, "users"), [clone.name.as_str()]);
    assert_eq!(failure["metadata"]["path"], base.as_str());
    // What was merged before is merged, and the clone reads what it read.
    assert_eq!(domain.snapshots()?, ["e1"]);
    healths(&agent, &domain, &[("e1", "whole")])?;
    holds(&domain, &[1, 2, 3, 4, 5])?;
    holds(&clone, &[])?;
    drop(clone);
    agent.vmsnap(&["commit", name, "--all"])?.result()?;
    holds(&domain, &[1, 2, 3, 4, 5])
}

#[test]
fn no_internal_snapshot_is_made_in_an_image_on_which_a_clone_stands() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let stopped = || BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    };
    let gold = lab.blank(&stopped())?;
    let disk = gold.disk("vda")?;
    let clone = lab.blank(&BlankSpec {
        backing: Some(disk.clone()),
        ..stopped()
    })?;
    let name = gold.name.as_str();
    // It could neither be reverted to nor deleted: both write into the clone's base.
    let failure = refused(&agent, &gold, &["create", name, "s", "--kind", "internal"])?;
    assert_eq!(reason(&failure), "FILE_SHARED");
    assert_eq!(names(&failure, "users"), [clone.name.as_str()]);
    assert_eq!(failure["metadata"]["path"], disk.as_str());
    // An external one leaves the image alone, and so does one in the clone's own.
    agent.vmsnap(&["create", name, "s"])?.result()?;
    agent.vmsnap(&["revert", name, "s"])?.result()?;
    let name = clone.name.as_str();
    let words = ["create", name, "s", "--kind", "internal"];
    agent.vmsnap(&words)?.result()?;
    agent.vmsnap(&["revert", name, "s"])?.result()?;
    agent.vmsnap(&["cleanup", name, "s"])?.result()?;
    assert_eq!(clone.snapshots()?, NONE);
    Ok(())
}

#[test]
#[expect(clippy::print_stdout, reason = "a skipped part says why")]
fn a_base_that_cannot_be_written_is_named_and_the_chain_stays_as_it_was() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    // In a folder of its own, which is read-only for everybody from here on.
    let folder = lab.folder.join(format!("base{}", std::process::id()));
    fs::create_dir(&folder)?;
    lab.own(&folder)?;
    let spec = BlankSpec {
        folder: Some(folder.clone()),
        ..BlankSpec::default()
    };
    let domain = still(&lab, spec)?;
    let name = domain.name.as_str();
    let base = domain.disk("vda")?;
    let overlay = lab.images().join(format!("{name}.e1"));
    let spec = format!("vda,snapshot=external,file={}", overlay.display());
    let words = ["e1", "--disk-only", "--diskspec", &spec];
    domain.virsh("snapshot-create-as", &words)?;
    write(&domain, 1)?;
    {
        let _closed = lab.read_only(&folder)?;
        for words in [vec!["cleanup", name, "e1"], vec!["commit", name, "e1"]] {
            let failure = refused(&agent, &domain, &words)?;
            assert_eq!(reason(&failure), "STORAGE_NOT_WRITABLE");
            assert_eq!(failure["metadata"]["path"], base.as_str());
        }
    }
    match Immutable::mark(&base) {
        Err(error) => {
            println!("no immutable files here, so QEMU's own refusal is not met: {error:#}")
        }
        Ok(_marked) => {
            for (state, limit) in [
                ("paused", None),
                // The agent's own merge.
                ("paused", Some("8M")),
                ("shut off", None),
            ] {
                if domain.state()? != state {
                    domain.virsh("destroy", &[])?;
                }
                let before = (domain.snapshots()?, domain.chain("vda")?);
                let mut words = vec!["cleanup", name, "e1"];
                words.extend(limit.into_iter().flat_map(|limit| ["--bandwidth", limit]));
                let failed = agent.vmsnap(&words)?;
                let failure = failed.failure()?;
                assert_eq!(reason(failure), "STORAGE_NOT_WRITABLE", "{failure}");
                assert_eq!(failure["metadata"]["path"], base.as_str());
                assert_eq!(failed.all("step_failed").count(), 1, "it is tried once");
                assert_eq!((domain.snapshots()?, domain.chain("vda")?), before);
                assert_eq!(domain.state()?, state);
                healths(&agent, &domain, &[("e1", "whole")])?;
            }
        }
    }
    holds(&domain, &[1])?;
    agent.vmsnap(&["cleanup", name, "e1"])?.result()?;
    holds(&domain, &[1])?;
    drop(domain);
    fs::remove_dir_all(folder)?;
    Ok(())
}

#[test]
fn what_another_vm_stands_on_is_neither_merged_into_nor_resized_reverted_or_deleted() -> Result<()>
{
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = still(&lab, BlankSpec::default())?;
    let name = domain.name.as_str();
    let base = domain.disk("vda")?;
    agent.vmsnap(&["create", name, "e1"])?.result()?;
    let overlay = domain.disk("vda")?;
    agent.vmsnap(&["create", name, "e2"])?.result()?;
    let shared = |domain: &Domain, users: &[String], all: &[&[&str]]| -> Result<()> {
        for words in all {
            let failure = refused(&agent, domain, words)?;
            ensure!(reason(&failure) == "FILE_SHARED", "{words:?}: {failure}");
            ensure!(names(&failure, "users") == users, "{words:?}: {failure}");
        }
        Ok(())
    };
    let on = |backing: &str, stopped: bool| BlankSpec {
        backing: Some(backing.to_owned()),
        stopped,
        ..BlankSpec::default()
    };
    {
        // Its clone runs: on the base, below all snapshots.
        let clone = lab.blank(&on(&base, false))?;
        let by_clone = [clone.name.clone()];
        shared(
            &domain,
            &by_clone,
            &[
                &["commit", name, "--all"],
                &["commit", name, "e1"],
                &["cleanup", name, "e1"],
                &["cleanup", name, "e1", "--children", "delete"],
                &["create", name, "e1", "--if-exists", "replace"],
            ],
        )?;
        // What lies above goes.
        agent.vmsnap(&["cleanup", name, "e2"])?.result()?;
        agent.vmsnap(&["create", name, "e2"])?.result()?;
    }
    {
        // On the data of a snapshot, and only in a snapshot: the VM itself has
        // another disk by now.
        let clone = lab.blank(&on(&overlay, true))?;
        virsh_external(&clone, "was")?;
        let other = lab.images().join(format!("{}-other.qcow2", clone.name));
        let other = other.display().to_string();
        lab.qemu_img(["create", "-q", "-f", "qcow2", &other, "64M"])?;
        let xml = clone.virsh("dumpxml", &["--inactive"])?;
        let definition = lab.folder.join(format!("{}.xml", clone.name));
        lab.write(&definition, &xml.replace(&clone.disk("vda")?, &other))?;
        lab.virsh(["define".as_ref(), definition.as_os_str()])?;
        fs::remove_file(definition)?;
        assert_eq!(clone.disk("vda")?, other);
        let by_clone = [format!("{} (snapshot was)", clone.name)];
        shared(
            &domain,
            &by_clone,
            &[
                &["commit", name, "--all"],
                &["cleanup", name, "e2"],
                &["cleanup", name, "e1"],
            ],
        )?;
    }
    agent.vmsnap(&["commit", name, "--all"])?.result()?;
    assert_eq!(domain.chain("vda")?.len(), 1);
    // The disk itself: what writes or removes it is refused.
    domain.virsh("destroy", &[])?;
    agent
        .vmsnap(&["create", name, "i1", "--kind", "internal"])?
        .result()?;
    let clone = lab.blank(&on(&base, true))?;
    let by_clone = [clone.name.clone()];
    shared(
        &domain,
        &by_clone,
        &[
            &["commit", name, "--resize-to", "128M"],
            &["revert", name, "i1"],
            &["cleanup", name, "i1"],
        ],
    )?;
    // The clone's own chain is its own.
    agent.vmsnap(&["create", &clone.name, "s"])?.result()?;
    agent.vmsnap(&["commit", &clone.name, "--all"])?.result()?;
    assert_eq!(clone.chain("vda")?.len(), 2);
    clone.check("vda")
}

#[test]
fn an_overlay_on_which_a_clone_stands_is_not_thrown_away_by_a_revert() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    agent.vmsnap(&["create", name, "e1"])?.result()?;
    write(&domain, 1)?;
    let present = domain.disk("vda")?;
    let clone = lab.blank(&BlankSpec {
        backing: Some(present.clone()),
        stopped: true,
        ..BlankSpec::default()
    })?;
    let failure = refused(&agent, &domain, &["revert", name, "e1"])?;
    assert_eq!(reason(&failure), "FILE_SHARED");
    assert_eq!(failure["metadata"]["path"], present.as_str());
    assert_eq!(names(&failure, "users"), [clone.name.as_str()]);
    holds(&clone, &[1])
}

#[test]
fn an_overlay_on_which_a_clone_comes_to_stand_before_the_revert_is_not_thrown_away() -> Result<()> {
    let lab = Lab::from_env()?;
    let mut agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    agent.vmsnap(&["create", name, "e1"])?.result()?;
    write(&domain, 1)?;
    let present = domain.disk("vda")?;
    // The run stands still between its plan and its first step.
    agent.stop();
    let go_on = lab.folder.join(format!("{name}.go-on"));
    let wait = format!("journal.record=1*return(wait {})->off", go_on.display());
    agent.set_env("FAILPOINTS", &wait);
    agent.start()?;
    let agent = agent;
    let (run, clone) = std::thread::scope(|scope| -> Result<_> {
        let run = scope.spawn(|| agent.vmsnap(&["revert", name, "e1"]));
        eventually(Duration::from_secs(20), "step", || {
            agent.log().contains("failpoint reached")
        })?;
        let clone = lab.blank(&BlankSpec {
            backing: Some(present.clone()),
            stopped: true,
            ..BlankSpec::default()
        });
        // A plan that is not a second old is fresh.
        std::thread::sleep(Duration::from_secs(1));
        fs::write(&go_on, "")?;
        let run = run.join().map_err(|_| anyhow::anyhow!("no run"))??;
        Ok((run, clone?))
    })?;
    fs::remove_file(go_on)?;
    let failure = run.failure()?;
    assert_eq!(reason(failure), "FILE_SHARED");
    assert_eq!(failure["metadata"]["path"], present.as_str());
    assert_eq!(names(failure, "users"), [clone.name.as_str()]);
    holds(&clone, &[1])?;
    holds(&domain, &[1])?;
    assert_eq!(domain.state()?, "shut off");
    drop(clone);
    agent.vmsnap(&["revert", name, "e1"])?.result()?;
    holds(&domain, &[])
}

/// A file that somebody else made: an image on another one.
fn foreign_overlay(lab: &Lab, name: &str, backing: &str) -> Result<String> {
    let path = lab.images().join(name).display().to_string();
    lab.qemu_img([
        "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, &path,
    ])?;
    Ok(path)
}

#[test]
fn what_metadata_left_behind_is_found_by_looking_and_only_the_agents_own_goes() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = still(&lab, BlankSpec::default())?;
    let name = domain.name.as_str();
    let base = domain.disk("vda")?;
    let judged = |words: &[&str]| -> Result<BTreeMap<String, bool>> {
        let mut all = vec!["cleanup", name];
        all.extend(words);
        files_judged(&agent.vmsnap(&all)?)
    };
    // The present state stands on them: no orphans, although no snapshot knows them.
    chain_of(&agent, &domain, 3)?;
    for snapshot in ["e3", "e2"] {
        domain.virsh("snapshot-delete", &[snapshot, "--metadata"])?;
    }
    assert_eq!(judged(&["--orphans", "delete"])?, [].into());
    holds(&domain, &[1, 2, 3])?;
    // libvirt cannot merge across what no snapshot knows; off, it is said.
    domain.virsh("destroy", &[])?;
    let failure = refused(&agent, &domain, &["cleanup", name, "e1"])?;
    assert_eq!(reason(&failure), "DOMAIN_NOT_RUNNING");
    assert_eq!(failure["metadata"]["state_needed"], "running");
    agent
        .vmsnap(&["commit", name, "--all", "--start-if-stopped"])?
        .result()?;
    assert_eq!(domain.chain("vda")?, [format!("{name}.qcow2")]);
    assert_eq!(domain.files()?, [format!("{name}.qcow2")]);
    holds(&domain, &[1, 2, 3])?;
    // Gone back, so that nothing stands on what the forgotten ones held.
    chain_of(&agent, &domain, 2)?;
    let overlay = lab
        .images()
        .join(format!("{name}.theirs"))
        .display()
        .to_string();
    let memory = format!("{name}.theirs.mem");
    let memspec = lab.images().join(&memory).display().to_string();
    domain.virsh(
        "snapshot-create-as",
        &[
            "theirs",
            "--memspec",
            &format!("{memspec},snapshot=external"),
            "--diskspec",
            &format!("vda,snapshot=external,file={overlay}"),
        ],
    )?;
    agent
        .vmsnap(&["revert", name, "e1", "--state-after", "stopped"])?
        .result()?;
    for snapshot in ["theirs", "e2"] {
        domain.virsh("snapshot-delete", &[snapshot, "--metadata"])?;
    }
    // One that stands on an orphan, and one that has only the name of one.
    let ours = [
        format!("{name}.vda.e1.qcow2"),
        format!("{name}.vda.e2.qcow2"),
    ];
    let theirs = format!("{name}.more");
    let upper = lab.images().join(&ours[1]).display().to_string();
    foreign_overlay(&lab, &theirs, &upper)?;
    let stranger = format!("{name}.vda.e9.qcow2");
    let path = lab.images().join(&stranger).display().to_string();
    lab.qemu_img(["create", "-q", "-f", "qcow2", &path, "1M"])?;
    let expected = |gone: bool| -> BTreeMap<String, bool> {
        [
            (ours[0].clone(), gone),
            (ours[1].clone(), gone),
            (theirs.clone(), false),
            (memory.clone(), false),
        ]
        .into()
    };
    assert_eq!(judged(&[])?, expected(false), "reported by default");
    assert_eq!(judged(&["--orphans", "ignore"])?, [].into());
    let before = seen(&domain)?;
    assert_eq!(judged(&["--orphans", "report"])?, expected(false));
    assert_eq!(seen(&domain)?, before);
    {
        // Somebody uses one of them, and with it what it stands on.
        let _user = lab.blank(&BlankSpec {
            backing: Some(upper.clone()),
            stopped: true,
            ..BlankSpec::default()
        })?;
        let left = judged(&["--orphans", "delete"])?;
        let expected = [(theirs.clone(), false), (memory.clone(), false)];
        assert_eq!(left, expected.into());
    }
    assert_eq!(judged(&["--orphans", "delete"])?, expected(true));
    let files = domain.files()?;
    for kept in [&theirs, &memory, &stranger] {
        assert!(files.contains(kept), "{kept} was not made by this agent");
    }
    assert!(!files.contains(&ours[0]) && !files.contains(&ours[1]));
    // Made by this agent once, and another file by now.
    foreign_overlay(&lab, &ours[1], &base)?;
    assert!(!judged(&["--orphans", "delete"])?[&ours[1]]);
    Ok(())
}

#[test]
fn the_overlay_of_a_transient_vm_stays_while_it_is_away_and_goes_once_it_stands_elsewhere()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let (domain, neighbour) = (
        still(&lab, BlankSpec::default())?,
        lab.blank(&BlankSpec {
            stopped: true,
            ..BlankSpec::default()
        })?,
    );
    let name = domain.name.as_str();
    let definition = lab.folder.join(format!("{name}.xml"));
    lab.write(&definition, &domain.virsh("dumpxml", &["--inactive"])?)?;
    domain.virsh("undefine", &[])?;
    agent.vmsnap(&["create", name, "s"])?.result()?;
    write(&domain, 1)?;
    let overlay = domain.disk("vda")?;
    let file = format!("{name}.vda.s.qcow2");
    domain.virsh("destroy", &[])?;
    let gone = agent.vmsnap(&["cleanup", name, "--orphans", "delete"])?;
    assert_eq!(gone.failure()?["reason"], "VM_NOT_FOUND");
    // The present state of a VM that is only away, in the folder of another.
    let words = ["cleanup", &neighbour.name, "--orphans", "delete"];
    assert_eq!(files_judged(&agent.vmsnap(&words)?)?, [].into());
    assert!(Path::new(&overlay).exists());
    // Back on its base, by a definition that knows nothing of the overlay.
    lab.virsh(["define".as_ref(), definition.as_os_str()])?;
    fs::remove_file(definition)?;
    let reported = agent.vmsnap(&["cleanup", name])?;
    assert_eq!(files_judged(&reported)?, [(file.clone(), false)].into());
    let deleted = agent.vmsnap(&["cleanup", name, "--orphans", "delete"])?;
    assert_eq!(files_judged(&deleted)?, [(file, true)].into());
    assert!(!Path::new(&overlay).exists());
    Ok(())
}
