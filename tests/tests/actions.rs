//! The five actions on real guests and real QEMU domains, with virsh, qemu-img
//! and the guest itself as witnesses.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};
use vmsnap_tests::{BlankSpec, Closed, Domain, Lab, eventually};

fn damage(guest: &Domain) -> Result<()> {
    guest.exec("echo damaged > /data/damage && sync").map(drop)
}

fn is_damaged(guest: &Domain) -> Result<bool> {
    Ok(guest
        .exec("test -e /data/damage && echo yes || echo no")?
        .trim()
        == "yes")
}

fn runs_thawed(guest: &Domain) -> Result<()> {
    assert_eq!(guest.state()?, "running");
    assert!(!guest.frozen()?);
    guest.lives()
}

#[test]
fn a_running_guest_is_frozen_for_its_snapshot_and_a_revert_takes_damage_away() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    let made = agent.vmsnap(&["create", name, "clean"])?;
    let result = made.result()?;
    assert_eq!(result["changed"], true);
    assert_eq!(result["consistency"], "filesystem");
    assert!(result["frozen_ms"].as_u64().is_some());
    assert!(result["stopped_ms"].is_null());
    runs_thawed(&guest)?;
    assert_eq!(
        guest.chain("vda")?,
        [format!("{name}.vda.clean.qcow2"), format!("{name}.qcow2")]
    );
    let again = agent.vmsnap(&["create", name, "clean"])?;
    assert_eq!(again.result()?["changed"], false);

    let counter = guest.counter()?;
    damage(&guest)?;
    let ticks = guest.ticks()?;
    let reverted = agent.vmsnap(&["revert", name, "clean", "--wait-for", "agent"])?;
    let result = reverted.result()?;
    assert_eq!(result["vm_state"], "running");
    assert!(result["guest"]["ready_ms"].as_u64().is_some());
    assert!(!is_damaged(&guest)?);
    // It started from its disk: memory began anew, the counter went on from then.
    assert!(guest.ticks()? < ticks + 100, "the guest did not start anew");
    guest.lives()?;
    assert!(counter > 0);

    let missing = agent.vmsnap(&["revert", name, "claen"])?;
    let failure = missing.failure()?;
    assert_eq!(failure["reason"], "SNAPSHOT_NOT_FOUND");
    assert_eq!(failure["metadata"]["valid_names"], "clean");
    assert_eq!(failure["metadata"]["nearest"], "clean");
    guest.lives()
}

#[test]
fn a_memory_snapshot_is_taken_live_and_a_revert_goes_on_where_the_guest_was() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    guest.exec("echo in-memory > /run/mark")?;
    let made = agent.vmsnap(&["create", name, "warm", "--memory"])?;
    let result = made.result()?;
    assert_eq!(result["consistency"], "memory");
    assert!(
        result["stopped_ms"].as_u64().is_some(),
        "the stop is measured"
    );
    runs_thawed(&guest)?;
    let ticks = guest.ticks()?;
    damage(&guest)?;
    guest.exec("rm /run/mark")?;
    agent
        .vmsnap(&["revert", name, "warm", "--wait-for", "agent"])?
        .result()?;
    assert!(!is_damaged(&guest)?);
    assert_eq!(
        guest.exec("cat /run/mark")?.trim(),
        "in-memory",
        "memory came back"
    );
    assert!(
        guest.ticks()? + 5 >= ticks.saturating_sub(60),
        "memory went on"
    );
    runs_thawed(&guest)?;
    // A damaged memory file is found before libvirt kills the guest.
    let memory = guest.folder().join(format!("{name}.warm.mem"));
    let mut bytes = fs::read(&memory)?;
    let last = bytes.len() - 100;
    bytes[last] ^= 0xff;
    fs::write(&memory, bytes)?;
    let refused = agent.vmsnap(&["revert", name, "warm"])?;
    assert_eq!(refused.failure()?["reason"], "SNAPSHOT_NOT_WHOLE");
    runs_thawed(&guest)?;
    agent.vmsnap(&["cleanup", name, "warm"])?.result()?;
    assert_eq!(guest.files()?, [format!("{name}.qcow2")]);
    runs_thawed(&guest)
}

#[test]
fn a_commit_merges_from_the_named_point_on_with_progress_and_keeps_the_present() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    for snapshot in ["one", "two", "three"] {
        agent.vmsnap(&["create", name, snapshot])?.result()?;
        guest.exec(&format!(
            "dd if=/dev/urandom of=/data/{snapshot} bs=1M count=4 2>/dev/null; sync"
        ))?;
    }
    let sums = guest.exec("cat /data/one /data/two /data/three | md5sum")?;
    let merged = agent.vmsnap(&["commit", name, "two", "--bandwidth", "16M"])?;
    assert_eq!(
        merged.result()?["merged"],
        serde_json::json!(["three", "two"])
    );
    let progress = merged
        .all("step_progress")
        .filter_map(|event| event["total_bytes"].as_u64());
    assert!(progress.max().context("progress in bytes")? >= 4 << 20);
    assert_eq!(guest.snapshots()?, ["one"]);
    assert_eq!(
        guest.chain("vda")?,
        [format!("{name}.vda.one.qcow2"), format!("{name}.qcow2")]
    );
    assert_eq!(
        guest.exec("cat /data/one /data/two /data/three | md5sum")?,
        sums
    );

    let all = agent.vmsnap(&["commit", name, "--all", "--resize-to", "96M"])?;
    assert_eq!(all.result()?["resized_to_bytes"], 96 << 20);
    assert_eq!(guest.chain("vda")?, [format!("{name}.qcow2")]);
    assert_eq!(guest.files()?, [format!("{name}.qcow2")]);
    assert_eq!(
        guest.exec("cat /sys/block/vda/size")?.trim(),
        (96 * 2048).to_string()
    );
    assert_eq!(
        guest.exec("cat /data/one /data/two /data/three | md5sum")?,
        sums
    );
    let again = agent.vmsnap(&["commit", name, "--all", "--resize-to", "96M"])?;
    assert_eq!(again.result()?["changed"], false);
    let shrink = agent.vmsnap(&["commit", name, "--resize-to", "32M"])?;
    assert_eq!(shrink.failure()?["reason"], "SHRINK_REFUSED");
    runs_thawed(&guest)?;
    guest.check("vda")
}

#[test]
fn a_snapshot_call_that_fails_after_freeze_or_suspend_leaves_the_guest_running_and_thawed()
-> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    for (consistency, hold) in [("filesystem", "frozen"), ("suspend", "suspended")] {
        let closed = Closed::new(&guest.folder())?;
        let failed = agent.vmsnap(&["create", name, "never", "--consistency", consistency])?;
        drop(closed);
        failed.failure()?;
        assert_eq!(failed.outcome()?["state"], "failed", "{}", failed.said);
        let taken: Vec<_> = failed
            .all("hold_taken")
            .map(|event| &event["kind"])
            .collect();
        assert_eq!(taken, [hold]);
        let released: Vec<_> = failed
            .all("hold_released")
            .map(|event| &event["kind"])
            .collect();
        assert_eq!(released, [hold]);
        runs_thawed(&guest)?;
        assert_eq!(guest.snapshots()?, [] as [&str; 0]);
        assert_eq!(guest.files()?, [format!("{name}.qcow2")]);
    }
    Ok(())
}

#[test]
fn paused_and_stopped_domains_stay_as_they_were_found_and_come_back_as_asked() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    domain.virsh("suspend", &[])?;
    let made = agent.vmsnap(&["create", name, "paused"])?;
    assert_eq!(made.result()?["consistency"], "suspend");
    assert_eq!(domain.state()?, "paused");
    let made = agent.vmsnap(&["create", name, "paused-memory", "--memory"])?;
    assert_eq!(made.result()?["consistency"], "memory");
    assert_eq!(domain.state()?, "paused");
    domain.virsh("destroy", &[])?;
    let made = agent.vmsnap(&["create", name, "off"])?;
    assert_eq!(made.result()?["consistency"], "stopped");
    assert_eq!(domain.state()?, "shut off");
    let refused = agent.vmsnap(&["create", name, "warm", "--memory"])?;
    assert_eq!(refused.failure()?["reason"], "DOMAIN_NOT_RUNNING");

    for (snapshot, after, state) in [
        ("paused-memory", "auto", "paused"),
        ("off", "auto", "running"),
        ("off", "stopped", "shut off"),
        ("off", "auto", "shut off"),
        ("paused", "paused", "paused"),
        ("paused-memory", "running", "running"),
        ("paused-memory", "stopped", "shut off"),
    ] {
        agent
            .vmsnap(&["revert", name, snapshot, "--state-after", after])?
            .result()?;
        assert_eq!(domain.state()?, state, "{snapshot}, {after}");
    }
    let started = agent.vmsnap(&["create", name, "warm", "--memory", "--start-if-stopped"])?;
    assert_eq!(started.result()?["consistency"], "memory");
    assert_eq!(domain.state()?, "running");
    domain.virsh("destroy", &[])?;
    domain.check("vda")
}

#[test]
fn an_internal_snapshot_is_made_when_asked_and_kinds_are_never_mixed() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    let made = agent.vmsnap(&["create", name, "inside", "--kind", "internal"])?;
    assert_eq!(made.result()?["snapshot"]["kind"], "internal");
    assert_eq!(domain.state()?, "running");
    assert_eq!(domain.files()?.len(), 1);
    let mixed = agent.vmsnap(&["create", name, "outside", "--kind", "external"])?;
    assert_eq!(mixed.failure()?["reason"], "KINDS_MIXED");
    agent.vmsnap(&["revert", name, "inside"])?.result()?;
    assert_eq!(domain.state()?, "running");
    agent.vmsnap(&["cleanup", name, "inside"])?.result()?;
    assert_eq!(domain.snapshots()?, [] as [&str; 0]);
    Ok(())
}

#[test]
fn a_stopped_disk_grows_and_shrinks_only_when_allowed_and_chains_merge_offline() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    agent.vmsnap(&["create", name, "a"])?.result()?;
    agent.vmsnap(&["create", name, "b"])?.result()?;
    let merged = agent.vmsnap(&["commit", name, "--all", "--resize-to", "128M"])?;
    assert_eq!(merged.result()?["vm_state"], "stopped");
    assert_eq!(domain.state()?, "shut off");
    assert_eq!(domain.chain("vda")?.len(), 1);
    let size = |lab: &Lab| -> Result<u64> {
        let text = lab.qemu_img(["info", "--output=json", &domain.disk("vda")?])?;
        let info: serde_json::Value = serde_json::from_str(&text)?;
        info["virtual-size"].as_u64().context("a size")
    };
    assert_eq!(size(&lab)?, 128 << 20);
    let refused = agent.vmsnap(&["commit", name, "--resize-to", "64M"])?;
    assert_eq!(refused.failure()?["reason"], "SHRINK_REFUSED");
    agent
        .vmsnap(&["commit", name, "--resize-to", "64M", "--allow-shrink"])?
        .result()?;
    assert_eq!(size(&lab)?, 64 << 20);
    domain.check("vda")
}

#[test]
fn a_left_over_volume_goes_only_when_no_chain_of_any_domain_refers_to_it() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    let volume = lab.images().join(format!("{name}-old.qcow2"));
    let shown = volume.display().to_string();
    lab.qemu_img(["create", "-q", "-f", "qcow2", &shown, "8M"])?;
    {
        // Another domain stands on it.
        let _clone = lab.blank(&BlankSpec {
            backing: Some(shown),
            stopped: true,
            ..BlankSpec::default()
        })?;
        let kept = agent.vmsnap(&["cleanup", name])?;
        let result = kept.result()?;
        assert_eq!(result["changed"], false);
        assert_eq!(result["verdicts"][0]["removed"], false);
        assert!(volume.exists());
    }
    let gone = agent.vmsnap(&["cleanup", name])?;
    assert_eq!(gone.result()?["changed"], true);
    assert!(!volume.exists());
    let again = agent.vmsnap(&["cleanup", name])?;
    assert_eq!(again.result()?["changed"], false);
    Ok(())
}

#[test]
fn a_file_that_a_clone_stands_on_is_neither_merged_into_nor_deleted() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let gold = lab.blank(&BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = gold.name.as_str();
    let base = gold.disk("vda")?;
    agent.vmsnap(&["create", name, "s"])?.result()?;
    let clone = lab.blank(&BlankSpec {
        backing: Some(base),
        stopped: true,
        ..BlankSpec::default()
    })?;
    for words in [
        vec!["cleanup", name, "s"],
        vec!["commit", name, "s"],
        vec!["commit", name, "--all"],
    ] {
        let refused = agent.vmsnap(&words)?;
        let failure = refused.failure()?;
        assert_eq!(failure["reason"], "FILE_SHARED", "{words:?}");
        assert_eq!(failure["metadata"]["users"], clone.name.as_str());
    }
    Ok(())
}

#[test]
fn too_little_space_in_a_pool_is_refused_with_pool_need_and_free() -> Result<()> {
    let lab = Lab::from_env()?;
    let small = lab.small_pool("size=6m")?;
    let agent = lab.agent("")?;
    let spec = BlankSpec {
        folder: Some(small.folder.clone()),
        disk_mib: 4,
        ..BlankSpec::default()
    };
    let domain = lab.blank(&spec)?;
    let name = domain.name.as_str();
    let before = fs::read_dir(&small.folder)?.count();
    // Memory of 64 MiB never fits.
    let refused = agent.vmsnap(&["create", name, "warm", "--memory"])?;
    let failure = refused.failure()?;
    assert_eq!(failure["reason"], "NO_SPACE");
    assert_eq!(failure["metadata"]["pool"], small.name.as_str());
    assert!(
        failure["metadata"]["need_bytes"]
            .as_str()
            .context("need")?
            .parse::<u64>()?
            > 64 << 20
    );
    assert_eq!(domain.state()?, "running");
    assert_eq!(fs::read_dir(&small.folder)?.count(), before);
    // It fits in the plan, and the disk is full all the same.
    small.fill()?;
    let refused = agent.vmsnap(&["create", name, "cold"])?;
    assert_eq!(refused.failure()?["reason"], "NO_SPACE");
    assert_eq!(domain.state()?, "running");
    assert_eq!(domain.snapshots()?, [] as [&str; 0]);
    Ok(())
}

#[test]
fn a_list_shows_the_tree_the_vm_and_the_storage_and_changes_nothing() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    for snapshot in ["a", "b"] {
        agent.vmsnap(&["create", name, snapshot])?.result()?;
    }
    let shown = agent.vmsnap(&["show", name])?;
    let vm = shown.document()?;
    let text = vm.to_string();
    for part in [
        "\"running\"",
        "\"vcpus\"",
        "\"memory_tuning\"",
        "\"guest_agent\"",
        "\"chain\"",
        &format!("{name}.vda.b.qcow2"),
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    // A host without that pool, and a VM without any, work all the same.
    let poolless = agent.vmsnap(&["cleanup", name, "--pool", "nowhere"])?;
    assert_eq!(poolless.result()?["changed"], false);
    assert!(poolless.result()?["storage"]["pool"].is_null());
    let tree = agent.vmsnap(&["ls", name])?;
    let tree = tree.document()?.to_string();
    assert!(tree.contains("\"parent\":\"a\""), "{tree}");
    let order: Vec<&str> = ["a", "b"]
        .into_iter()
        .filter(|one| tree.contains(&format!("\"name\":\"{one}\"")))
        .collect();
    assert_eq!(order, ["a", "b"]);
    assert_eq!(guest.parent("b")?, "a");
    assert_eq!(guest.snapshots()?, ["a", "b"]);
    guest.lives()
}

#[test]
fn a_run_goes_on_when_its_caller_is_killed_and_can_be_watched_from_any_event_on() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    agent.vmsnap(&["create", name, "s"])?.result()?;
    guest.exec("dd if=/dev/urandom of=/data/x bs=1M count=40 2>/dev/null; sync")?;
    let mut caller = agent.cli(&["commit", name, "s", "--bandwidth", "4M"])?;
    let mut caller = caller
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()?;
    eventually(Duration::from_secs(20), "merge", || {
        agent.log().contains("step=\"delete snapshot s")
    })?;
    caller.kill()?;
    caller.wait()?;
    // A second run on the same VM waits for the first.
    let second = agent.vmsnap(&["create", name, "t"])?;
    assert_eq!(second.all("queued").count(), 1);
    second.result()?;
    assert_eq!(guest.snapshots()?, ["t"]);
    let same = ["create", name, "u", "--request-id", "mine"];
    let (first, joined) = (agent.vmsnap(&same)?, agent.vmsnap(&same)?);
    assert_eq!(
        first.run_id()?,
        joined.run_id()?,
        "an equal id joins a run that is over"
    );
    let other = agent.vmsnap(&["create", name, "v", "--request-id", "mine"])?;
    assert_eq!(other.status, 1);
    assert_eq!(guest.snapshots()?, ["t", "u"]);
    let log = agent.vmsnap(&["log", name])?;
    let text = serde_json::to_string(&log.events)?;
    let id = second
        .all("queued")
        .next()
        .and_then(|event| event["behind_workflow_id"].as_str())
        .context("an id")?;
    assert!(text.contains(id));
    let watched = agent.vmsnap(&["watch", id, "--from", "3"])?;
    assert_eq!(watched.events[0]["sequence"], 3);
    assert_eq!(watched.outcome()?["state"], "succeeded");
    guest.lives()
}

#[test]
fn an_agent_killed_while_it_holds_a_guest_lets_it_run_again_when_it_comes_back() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, mut agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.clone();
    // A hung guest agent makes the freeze last, so that the kill comes within it.
    guest.exec("printf '#!/bin/sh\\ntouch /run/hook-ran\\n[ $1 = freeze ] && sleep 4\\nexit 0\\n' > /run/freeze-hook; chmod +x /run/freeze-hook")?;
    let mut caller = agent.cli(&["create", &name, "s", "--consistency", "filesystem"])?;
    let mut caller = caller
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()?;
    // Seen over ssh: the guest agent is busy with the hook.
    eventually(Duration::from_secs(30), "freeze", || {
        guest.ssh("test -e /run/hook-ran").is_ok()
    })?;
    agent.kill();
    caller.kill()?;
    caller.wait()?;
    eventually(Duration::from_secs(20), "frozen guest", || {
        guest.frozen().unwrap_or(false)
    })?;
    agent.start()?;
    runs_thawed(&guest)?;
    let log = agent.vmsnap(&["log", &name])?;
    assert!(serde_json::to_string(&log.events)?.contains("INTERRUPTED"));
    assert_eq!(guest.snapshots()?, [] as [&str; 0]);
    Ok(())
}

#[test]
fn a_revert_that_fails_inside_libvirt_leaves_the_guest_running_on_its_own_data() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    // Made by somebody else, so that no checksum of its memory is known.
    let folder = guest.folder().display().to_string();
    guest.virsh(
        "snapshot-create-as",
        &[
            "theirs",
            "--live",
            "--memspec",
            &format!("{folder}/{name}.theirs.mem,snapshot=external"),
            "--diskspec",
            &format!("vda,snapshot=external,file={folder}/{name}.theirs.qcow2"),
        ],
    )?;
    guest.exec("echo kept > /data/kept && sync")?;
    let chain = guest.chain("vda")?;
    let memory = guest.folder().join(format!("{name}.theirs.mem"));
    let mut bytes = fs::read(&memory)?;
    let half = bytes.len() / 2;
    bytes[half..].fill(0xA5);
    fs::write(&memory, bytes)?;
    let failed = agent.vmsnap(&["revert", name, "theirs"])?;
    failed.failure()?;
    assert_eq!(failed.outcome()?["state"], "failed", "{}", failed.said);
    // It did kill the guest, which was then started again.
    let restarted = failed
        .all("warning")
        .any(|event| event["code"] == "GUEST_RESTARTED");
    assert!(restarted, "{:?}", failed.events);
    guest.answers(Duration::from_secs(60))?;
    runs_thawed(&guest)?;
    // On its own overlay again, with what was written since: not on the base that
    // the snapshot needs.
    assert_eq!(guest.chain("vda")?, chain);
    assert_eq!(guest.exec("cat /data/kept")?.trim(), "kept");
    assert_eq!(guest.snapshots()?, ["theirs"]);
    Ok(())
}

#[test]
fn what_was_merged_behind_libvirts_back_is_never_reverted_to_and_what_clones_use_stays()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    agent.vmsnap(&["create", name, "e1"])?.result()?;
    let overlay = domain.disk("vda")?;
    agent.vmsnap(&["create", name, "e2"])?.result()?;
    domain.virsh("blockcommit", &["vda", "--active", "--pivot", "--wait"])?;
    // The one stands on what was merged into, the other above it.
    for snapshot in ["e1", "e2"] {
        let refused = agent.vmsnap(&["revert", name, snapshot])?;
        let failure = refused.failure()?;
        assert_eq!(failure["reason"], "SNAPSHOT_NOT_WHOLE");
        assert_eq!(failure["metadata"]["health"], "merged away");
    }
    assert_eq!(domain.state()?, "running");
    // The file that the merge left behind has found a use.
    let clone = lab.blank(&BlankSpec {
        backing: Some(overlay.clone()),
        stopped: true,
        ..BlankSpec::default()
    })?;
    for snapshot in ["e2", "e1"] {
        agent.vmsnap(&["cleanup", name, snapshot])?.result()?;
    }
    assert_eq!(domain.snapshots()?, [] as [&str; 0]);
    assert!(std::path::Path::new(&overlay).exists(), "{overlay}");
    assert_eq!(clone.chain("vda")?.len(), 3, "the clone's chain is whole");
    assert_eq!(domain.state()?, "running");
    Ok(())
}
