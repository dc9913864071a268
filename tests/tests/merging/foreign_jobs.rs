//! What others do to the VM's chain and to the VM meanwhile: block jobs left open,
//! copies, merges behind libvirt's back, and jobs with which libvirt is busy.

use std::{
    fs,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use vmsnap_tests::{BlankSpec, Domain, Lab, command, eventually};

use super::{
    MIB, NONE, chain_of, files_judged, healths, holds, keeps, reason, refused, still, write,
};

#[test]
fn an_open_block_job_is_in_the_way_of_everything_and_what_was_said_to_end_it_works() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    for end in ["--pivot", "--abort"] {
        let domain = still(&lab, BlankSpec::default())?;
        let name = domain.name.as_str();
        write(&domain, 1)?;
        agent.vmsnap(&["create", name, "e1"])?.result()?;
        // The same place again: a merge writes over what e1 holds.
        domain.write_pattern("vda", 2, MIB, MIB)?;
        if end == "--abort" {
            thread::sleep(Duration::from_secs(3));
        }
        domain.virsh("blockcommit", &["vda", "--active"])?;
        eventually(Duration::from_secs(20), "merge that is ready", || {
            domain
                .virsh("dumpxml", &[])
                .is_ok_and(|xml| xml.contains("ready='yes'"))
        })?;
        for words in [
            vec!["create", name, "e2"],
            vec!["commit", name, "e1"],
            vec!["commit", name, "--all"],
            vec!["commit", name, "--resize-to", "128M"],
            vec!["cleanup", name, "e1"],
            vec!["revert", name, "e1"],
        ] {
            let failure = refused(&agent, &domain, &words)?;
            assert_eq!(reason(&failure), "BLOCK_JOB_ACTIVE", "{words:?}");
            assert_eq!(failure["metadata"]["disk"], "vda");
            let message = failure["message"].as_str().context("a message")?;
            assert!(message.contains(&format!("virsh blockjob {name} vda --pivot")));
        }
        healths(&agent, &domain, &[("e1", "torn")])?;
        domain.virsh("blockjob", &["vda", end])?;
        // Either way the image of e1 holds what was written later.
        let left = if end == "--pivot" {
            "merged_away"
        } else {
            "torn"
        };
        healths(&agent, &domain, &[("e1", left)])?;
        let failure = refused(&agent, &domain, &["revert", name, "e1"])?;
        assert_eq!(reason(&failure), "SNAPSHOT_NOT_WHOLE");
        agent.vmsnap(&["cleanup", name, "e1"])?.result()?;
        assert_eq!(domain.snapshots()?, NONE);
        assert_eq!(domain.chain("vda")?, [format!("{name}.qcow2")]);
        assert!(domain.has_pattern("vda", 2, MIB, MIB)?);
        agent.vmsnap(&["create", name, "e2"])?.result()?;
    }
    Ok(())
}

#[test]
fn what_a_copy_job_writes_is_in_use_although_no_definition_names_it() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    let copy = lab.images().join(format!("{name}-old.qcow2"));
    let shown = copy.display().to_string();
    domain.virsh("blockcopy", &["vda", &shown, "--transient-job"])?;
    let kept = agent.vmsnap(&["cleanup", name])?;
    assert_eq!(kept.result()?["changed"], false, "{:?}", kept.events);
    assert!(copy.exists());
    domain.virsh("blockjob", &["vda", "--abort"])?;
    assert_eq!(agent.vmsnap(&["cleanup", name])?.result()?["changed"], true);
    assert!(!copy.exists());
    Ok(())
}

#[test]
fn a_merge_behind_libvirts_back_spoils_only_what_does_not_read_through_it() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = still(&lab, BlankSpec::default())?;
    let name = domain.name.as_str();
    chain_of(&agent, &domain, 4)?;
    let overlay = |number: u8| {
        let file = format!("{name}.vda.e{number}.qcow2");
        domain.folder().join(file).display().to_string()
    };
    // What was written after e2 goes into the image that holds e2.
    let words = ["vda", "--top", &overlay(2), "--base", &overlay(1), "--wait"];
    domain.virsh("blockcommit", &words)?;
    let expected = [
        ("e1", "whole"),
        ("e2", "merged_away"),
        ("e3", "whole"),
        ("e4", "whole"),
    ];
    healths(&agent, &domain, &expected)?;
    let failure = refused(&agent, &domain, &["revert", name, "e2"])?;
    assert_eq!(reason(&failure), "SNAPSHOT_NOT_WHOLE");
    assert_eq!(failure["metadata"]["health"], "merged away");
    keeps(&domain, "e1", &[])?;
    keeps(&domain, "e3", &[1, 2])?;
    keeps(&domain, "e4", &[1, 2, 3])?;
    // The others still go the usual way, and the present state loses nothing.
    agent.vmsnap(&["cleanup", name, "e4"])?.result()?;
    let gone = agent.vmsnap(&["cleanup", name, "e2"])?;
    gone.result()?;
    assert!(
        !gone.warned("OVERLAY_STAYS") || domain.files()?.contains(&format!("{name}.vda.e2.qcow2"))
    );
    for snapshot in ["e3", "e1"] {
        agent.vmsnap(&["cleanup", name, snapshot])?.result()?;
    }
    assert_eq!(domain.snapshots()?, NONE);
    holds(&domain, &[1, 2, 3, 4])?;
    let judged = agent.vmsnap(&["cleanup", name, "--orphans", "delete"])?;
    judged.result()?;
    assert_eq!(domain.chain("vda")?, [format!("{name}.qcow2")]);
    assert_eq!(domain.files()?, [format!("{name}.qcow2")]);
    holds(&domain, &[1, 2, 3, 4])?;
    domain.check("vda")
}

#[test]
fn overlays_of_a_merge_behind_libvirts_back_go_only_when_orphans_are_to_be_deleted() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = still(&lab, BlankSpec::default())?;
    let name = domain.name.as_str();
    chain_of(&agent, &domain, 2)?;
    domain.virsh("blockcommit", &["vda", "--active", "--pivot", "--wait"])?;
    let overlay = |number: u8| format!("{name}.vda.e{number}.qcow2");
    // Nobody can tell whether an overlay holds what was never merged.
    let kept = agent.vmsnap(&["cleanup", name, "e2"])?;
    assert_eq!(files_judged(&kept)?, [(overlay(2), false)].into());
    assert!(kept.warned("OVERLAY_STAYS"));
    assert_eq!(domain.snapshots()?, ["e1"]);
    assert!(domain.files()?.contains(&overlay(2)));
    let gone = agent.vmsnap(&["cleanup", name, "e1", "--orphans", "delete"])?;
    let both = [(overlay(1), true), (overlay(2), true)];
    assert_eq!(files_judged(&gone)?, both.into());
    assert_eq!(domain.files()?, [format!("{name}.qcow2")]);
    holds(&domain, &[1, 2])
}

/// A dump of a running VM that does not end, because what it writes is hardly read:
/// libvirt is busy with the VM until this is dropped.
struct Dumping<'a> {
    domain: &'a Domain,
    pipe: std::path::PathBuf,
    processes: Vec<std::process::Child>,
}

impl<'a> Dumping<'a> {
    fn begin(domain: &'a Domain, reader: &str) -> Result<Self> {
        let lab = &domain.lab;
        let pipe = lab.images().join(format!("{}.pipe", domain.name));
        let shown = pipe.display().to_string();
        command::succeed(lab.command("mkfifo").arg(&pipe))?;
        let mut dumping = Self {
            domain,
            pipe,
            processes: Vec::new(),
        };
        let reader = format!("exec < '{shown}'; {reader}");
        for mut command in [
            {
                let mut shell = lab.command("sh");
                shell.args(["-c", &reader]);
                shell
            },
            {
                let mut virsh = lab.command("virsh");
                virsh.args(["-q", "-c", "qemu:///session", "dump", &domain.name, &shown]);
                virsh.arg("--live");
                virsh
            },
        ] {
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            dumping.processes.push(command.spawn()?);
        }
        eventually(Duration::from_secs(10), "dump", || {
            domain
                .virsh("domjobinfo", &[])
                .is_ok_and(|job| job.contains("Dump"))
        })?;
        Ok(dumping)
    }
}

impl Drop for Dumping<'_> {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
        let _ = self.domain.virsh("destroy", &[]);
        let _ = fs::remove_file(&self.pipe);
    }
}

#[test]
fn a_vm_that_libvirt_is_busy_with_can_be_read_and_a_merge_names_the_holder() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    agent.vmsnap(&["create", name, "e1"])?.result()?;
    let _dumping = Dumping::begin(&domain, "exec sleep 120")?;
    let began = Instant::now();
    healths(&agent, &domain, &[("e1", "whole")])?;
    // libvirt itself waits thirty seconds for the holder.
    assert!(began.elapsed() < Duration::from_secs(15));
    let busy = agent.vmsnap(&["cleanup", name, "e1"])?;
    let failure = busy.failure()?;
    assert_eq!(failure["reason"], "VM_BUSY");
    let message = failure["message"].as_str().context("a message")?;
    assert!(
        message.contains("remoteDispatchDomainCoreDump"),
        "{message}"
    );
    assert!(busy.said.contains("try again after"), "{}", busy.said);
    assert_eq!(domain.snapshots()?, ["e1"]);
    healths(&agent, &domain, &[("e1", "whole")])
}

#[test]
fn a_paused_vm_whose_memory_somebody_else_captured_merges_and_stays_paused() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    write(&domain, 1)?;
    let file = |ending: &str| {
        let path = domain.folder().join(format!("{name}.{ending}"));
        path.display().to_string()
    };
    for limit in [None, Some("8M")] {
        domain.virsh("suspend", &[])?;
        let memory = format!("{},snapshot=external", file("mem"));
        let disk = format!("vda,snapshot=external,file={}", file("m"));
        let words = ["m", "--memspec", &memory, "--diskspec", &disk];
        domain.virsh("snapshot-create-as", &words)?;
        let mut words = vec!["cleanup", name, "m"];
        words.extend(limit.into_iter().flat_map(|limit| ["--bandwidth", limit]));
        agent.vmsnap(&words)?.result()?;
        assert_eq!(domain.state()?, "paused");
        assert_eq!(domain.files()?, [format!("{name}.qcow2")]);
        domain.virsh("resume", &[])?;
        holds(&domain, &[1])?;
    }
    domain.check("vda")
}

#[test]
fn a_cancelled_capture_that_waits_for_somebody_elses_job_leaves_that_job_alone() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    // Of more memory than a pipe holds.
    let domain = lab.guest()?;
    let name = domain.name.as_str();
    // Read a little at a time, so that QEMU sees when it is told to give it up.
    let reader = "while sleep 0.2; do head -c 65536 > /dev/null; done";
    let _dumping = Dumping::begin(&domain, reader)?;
    let files = domain.files()?;
    let mut command = agent.cli(&["create", name, "m", "--memory"])?;
    let caller = thread::spawn(move || command::run(&mut command, None, Duration::from_secs(90)));
    eventually(Duration::from_secs(30), "capture", || {
        agent.log().contains("operation=\"take a snapshot of\"")
    })?;
    let log = agent.vmsnap(&["log", name])?;
    let run = log.document()?["workflows"][0]["id"].clone();
    agent.vmsnap(&["cancel", run.as_str().context("the run")?])?;
    let told = caller
        .join()
        .map_err(|_| anyhow::anyhow!("the caller panicked"))??;
    assert_ne!(told.status, 0, "{}", told.text());
    let job = domain.virsh("domjobinfo", &[])?;
    assert!(job.contains("Dump"), "{job}");
    let log = agent.vmsnap(&["log", name])?;
    let state = &log.document()?["workflows"][0]["state"];
    assert!(
        ["cancelled", "failed"].contains(&state.as_str().unwrap_or_default()),
        "{state}"
    );
    assert_eq!(domain.snapshots()?, NONE);
    assert_eq!(domain.files()?, files);
    Ok(())
}
