//! Going back where it has gone wrong for people: states, managed saves, memory
//! files, siblings, definitions that changed meanwhile, and reverts that fail in
//! the middle. Bytes on the disks, virsh and the guest itself are the witnesses.

use std::{
    fs,
    net::TcpStream,
    path::{Path, PathBuf},
    process::Child,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use vmsnap_tests::{
    Agent, Blank, BlankSpec, Cli, Closed, Domain, Guest, Lab,
    command::{end, privileged, succeed},
    eventually, eventually_some,
};

#[path = "reverting/without_memory.rs"]
mod without_memory;

/// Where and how much of a disk is written to tell states apart.
const AT: u64 = 1 << 20;
const BYTES: u64 = 64 << 10;

fn stopped() -> BlankSpec {
    BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    }
}

fn put(domain: &Domain, byte: u8) -> Result<()> {
    domain.write_pattern("vda", byte, AT, BYTES)
}

fn has(domain: &Domain, byte: u8) -> Result<bool> {
    domain.has_pattern("vda", byte, AT, BYTES)
}

/// Writes `byte` and makes a snapshot of that.
fn point(agent: &Agent, domain: &Domain, name: &str, byte: u8, more: &[&str]) -> Result<()> {
    put(domain, byte)?;
    let mut words = vec!["create", &domain.name, name];
    words.extend(more);
    agent.vmsnap(&words)?.result().map(drop)
}

fn revert(agent: &Agent, domain: &Domain, name: &str, more: &[&str]) -> Result<Cli> {
    let mut words = vec!["revert", &domain.name, name];
    words.extend(more);
    agent.vmsnap(&words)
}

/// libvirt's number of this run of a domain: it changes with every new QEMU.
fn run_of(domain: &Domain) -> Result<String> {
    Ok(domain.virsh("domid", &[])?.trim().to_owned())
}

fn current(domain: &Domain) -> Result<String> {
    let name = domain.virsh("snapshot-current", &["--name"])?;
    Ok(name.trim().to_owned())
}

/// Health of each snapshot by the agent's word.
fn health(agent: &Agent, domain: &Domain) -> Result<Vec<(String, String)>> {
    let list = agent.vmsnap(&["ls", &domain.name])?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut all: Vec<(String, String)> = list.document()?["snapshots"]
        .as_array()
        .context("snapshots")?
        .iter()
        .map(|one| (text(&one["name"]), text(&one["health"])))
        .collect();
    all.sort();
    Ok(all)
}

fn all_whole(agent: &Agent, domain: &Domain) -> Result<()> {
    let found = health(agent, domain)?;
    ensure!(
        found.iter().all(|(_, health)| health == "whole"),
        "{found:?}"
    );
    Ok(())
}

/// Asks for a revert that has to be refused, and sees that nothing was touched.
fn untouched(agent: &Agent, domain: &Domain, name: &str, more: &[&str]) -> Result<Value> {
    let look = || -> Result<_> {
        let run = run_of(domain)?;
        Ok((
            domain.state()?,
            run,
            domain.disk("vda")?,
            domain.files()?,
            domain.snapshots()?,
        ))
    };
    let before = look()?;
    let refused = revert(agent, domain, name, more)?;
    let failure = refused.failure()?.clone();
    let after = look()?;
    ensure!(before == after, "{before:?} became {after:?}: {failure}");
    Ok(failure)
}

/// The images in which the data of snapshots lies, byte for byte.
struct Frozen(Vec<(PathBuf, Vec<u8>)>);

impl Frozen {
    fn of(domain: &Domain, snapshots: &[&str]) -> Result<Self> {
        let read = |name: &&str| {
            let path = domain.data(name, "vda")?;
            let bytes = fs::read(&path)?;
            Ok((path, bytes))
        };
        snapshots.iter().map(read).collect::<Result<_>>().map(Self)
    }

    fn stand_still(&self) -> Result<()> {
        for (path, bytes) in &self.0 {
            ensure!(
                fs::read(path)? == *bytes,
                "{} was written into",
                path.display()
            );
        }
        Ok(())
    }
}

// --- where it ends --------------------------------------------------------------

#[test]
fn every_kind_ends_in_the_state_that_was_asked_for_whatever_the_vm_was() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let outside = lab.blank(&BlankSpec::default())?;
    point(&agent, &outside, "disk", 1, &[])?;
    point(&agent, &outside, "memory", 2, &["--memory"])?;
    let inside = lab.blank(&BlankSpec::default())?;
    point(&agent, &inside, "memory", 3, &["--kind", "internal"])?;
    inside.virsh("destroy", &[])?;
    point(&agent, &inside, "off", 4, &["--kind", "internal"])?;
    // Each row begins in the state in which the row before it left that VM, unless
    // it says what is done to it first.
    for (vm, byte, first, snapshot, after, state) in [
        (&outside, 1, "", "disk", "auto", "running"),
        (&outside, 2, "suspend", "memory", "auto", "running"),
        (&outside, 1, "suspend", "disk", "paused", "paused"),
        (&outside, 2, "", "memory", "stopped", "shut off"),
        (&outside, 1, "", "disk", "auto", "running"),
        (&outside, 1, "", "disk", "stopped", "shut off"),
        (&outside, 2, "", "memory", "paused", "paused"),
        (&inside, 3, "", "memory", "auto", "running"),
        (&inside, 4, "", "off", "auto", "running"),
        (&inside, 3, "", "memory", "stopped", "shut off"),
        (&inside, 4, "", "off", "auto", "shut off"),
        (&inside, 3, "", "memory", "paused", "paused"),
    ] {
        if !first.is_empty() {
            vm.virsh(first, &[])?;
        }
        let from = vm.state()?;
        let done = revert(&agent, vm, snapshot, &["--state-after", after])?;
        let row = format!("{snapshot} from {from}, {after}");
        let told = done.result().context(row.clone())?["vm_state"].clone();
        assert_eq!(vm.state()?, state, "{row}");
        assert_eq!(
            told,
            if state == "shut off" {
                "stopped"
            } else {
                state
            },
            "{row}"
        );
        assert!(has(vm, byte)?, "{row}");
    }
    all_whole(&agent, &outside)?;
    all_whole(&agent, &inside)
}

#[test]
fn a_vm_is_started_before_anybody_waits_for_it_and_a_guest_that_cannot_answer_is_not_waited_for()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    point(&agent, &domain, "s", 1, &[])?;
    let began = Instant::now();
    let late = revert(&agent, &domain, "s", &["--wait-for", "agent"])?;
    assert!(
        began.elapsed() < Duration::from_secs(60),
        "it waited all the 300 s"
    );
    let steps: Vec<&str> = late
        .all("step_started")
        .filter_map(|event| event["name"].as_str())
        .collect();
    assert_eq!(steps, ["keep-definition", "revert", "start", "wait-for"]);
    let failure = late.failure()?;
    assert_eq!(failure["reason"], "WAIT_TIMEOUT");
    let reached = failure["metadata"]["reached"].to_string();
    assert!(reached.contains("no channel"), "{reached}");
    // The revert itself is done, and its result is there.
    assert_eq!(late.outcome()?["result"]["vm_state"], "running");
    assert_eq!(domain.state()?, "running");
    assert!(has(&domain, 1)?);
    let off = ["--wait-for", "agent", "--state-after", "paused"];
    let paused = revert(&agent, &domain, "s", &off)?;
    paused.result()?;
    assert!(paused.warned("NOT_WAITED"));
    Ok(())
}

// --- managed saves and memory files ---------------------------------------------

#[test]
fn a_managed_save_goes_only_by_force_and_the_next_start_loads_nothing_of_it() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    point(&agent, &domain, "cold", 1, &[])?;
    point(&agent, &domain, "warm", 2, &["--memory"])?;
    put(&domain, 3)?;
    let saved = || -> Result<bool> {
        let info = domain.virsh("dominfo", &[])?;
        Ok(info
            .lines()
            .any(|line| line.starts_with("Managed save:") && line.trim_end().ends_with("yes")))
    };
    let off = ["--state-after", "stopped", "--force", "--safety-snapshot"];
    domain.virsh("managedsave", &[])?;
    let refuse = |name: &str, more: &[&str], reason: &str| -> Result<()> {
        let files = domain.files()?;
        let refused = revert(&agent, &domain, name, more)?;
        assert_eq!(refused.failure()?["reason"], reason, "{name} {more:?}");
        assert!(saved()?, "{name} {more:?}: the saved memory is gone");
        assert_eq!(
            (domain.files()?, domain.state()?),
            (files, "shut off".into())
        );
        Ok(())
    };
    refuse("cold", &[], "MANAGED_SAVE_PRESENT")?;
    refuse("warm", &["--safety-snapshot"], "MANAGED_SAVE_PRESENT")?;
    // What can be missed is missed before the saved memory goes.
    let memory = lab.images().join(format!("{}.warm.mem", domain.name));
    let whole = fs::read(&memory)?;
    let mut bytes = whole.clone();
    let last = bytes.len() - 100;
    bytes[last] ^= 0xff;
    fs::write(&memory, bytes)?;
    refuse("warm", &off, "SNAPSHOT_NOT_WHOLE")?;
    fs::write(&memory, whole)?;

    let done = revert(&agent, &domain, "cold", &off)?;
    let result = done.result()?;
    let safety = result["safety_snapshot"]
        .as_str()
        .context("a name")?
        .to_owned();
    assert!(done.warned("MANAGED_SAVE_DROPPED"));
    assert!(!saved()? && has(&domain, 1)?);
    domain.virsh("start", &[])?;
    let reason = domain.virsh("domstate", &["--reason"])?;
    assert!(reason.contains("booted"), "{reason}");
    // The disks of before were kept all the same.
    revert(&agent, &domain, &safety, &[])?.result()?;
    assert!(has(&domain, 3)?);
    Ok(())
}

#[test]
fn a_memory_file_that_is_gone_cut_or_unfinished_is_missed_before_the_guest_is_touched() -> Result<()>
{
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    point(&agent, &domain, "ours", 1, &["--memory"])?;
    let folder = lab.images();
    let theirs = folder.join(format!("{}.theirs.mem", domain.name));
    domain.virsh(
        "snapshot-create-as",
        &[
            "theirs",
            "--live",
            "--memspec",
            &format!("{},snapshot=external", theirs.display()),
            "--diskspec",
            &format!(
                "vda,snapshot=external,file={}",
                folder
                    .join(format!("{}.theirs.qcow2", domain.name))
                    .display()
            ),
        ],
    )?;
    put(&domain, 2)?;
    let ours = folder.join(format!("{}.ours.mem", domain.name));
    let unfinished = |mut bytes: Vec<u8>| {
        bytes[..16].copy_from_slice(b"LibvirtQemudPart");
        bytes
    };
    type Spoil<'a> = &'a dyn Fn(Vec<u8>) -> Vec<u8>;
    let cases: [(&str, &Path, Spoil<'_>, &str); 5] = [
        (
            "ours",
            &ours,
            &|bytes| bytes[..bytes.len() - 1].to_vec(),
            "bytes and had",
        ),
        ("ours", &ours, &|_| Vec::new(), "bytes and had"),
        // Nobody knows what a foreign one was like, but its head tells something.
        (
            "theirs",
            &theirs,
            &|bytes| bytes[..4096].to_vec(),
            "cut off",
        ),
        ("theirs", &theirs, &unfinished, "never finished"),
        ("theirs", &theirs, &|_| Vec::new(), "fewer than its head"),
    ];
    for (name, file, spoil, part) in cases {
        let whole = fs::read(file)?;
        fs::write(file, spoil(whole.clone()))?;
        let failure = untouched(&agent, &domain, name, &["--safety-snapshot"])?;
        assert_eq!(failure["reason"], "SNAPSHOT_NOT_WHOLE");
        assert!(failure["message"].to_string().contains(part), "{failure}");
        fs::write(file, whole)?;
    }
    for (name, file) in [("ours", &ours), ("theirs", &theirs)] {
        let away = file.with_extension("away");
        fs::rename(file, &away)?;
        let failure = untouched(&agent, &domain, name, &[])?;
        assert_eq!(failure["metadata"]["health"], "data missing");
        fs::rename(&away, file)?;
    }
    assert!(has(&domain, 2)?);
    revert(&agent, &domain, "ours", &[])?.result()?;
    assert!(has(&domain, 1)?);
    Ok(())
}

#[test]
fn what_a_start_needs_beside_the_disks_is_looked_for_before_the_guest_is_touched() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let kernel = lab.folder.join(format!("kernel{}", std::process::id()));
    lab.write(&kernel, "no kernel, but a file")?;
    let domain = lab.blank(&BlankSpec {
        os: format!("<kernel>{}</kernel>", kernel.display()),
        ..stopped()
    })?;
    point(&agent, &domain, "s", 1, &[])?;
    fs::remove_file(&kernel)?;
    let on = revert(&agent, &domain, "s", &["--state-after", "running"])?;
    let failure = on.failure()?;
    assert_eq!(failure["reason"], "SNAPSHOT_NOT_WHOLE");
    assert_eq!(failure["metadata"]["path"], kernel.display().to_string());
    revert(&agent, &domain, "s", &[])?.result()?;

    // Inside the image, no overlay is put on a medium, but QEMU opens it.
    let iso = lab.folder.join(format!("cd{}.iso", std::process::id()));
    lab.write(&iso, &"iso ".repeat(1024))?;
    let domain = lab.blank(&BlankSpec {
        devices: format!(
            "<disk type='file' device='cdrom'><source file='{}'/>\
             <target dev='sda' bus='sata'/><readonly/></disk>",
            iso.display()
        ),
        ..BlankSpec::default()
    })?;
    point(&agent, &domain, "s", 1, &["--kind", "internal"])?;
    fs::remove_file(&iso)?;
    let failure = untouched(&agent, &domain, "s", &[])?;
    assert_eq!(failure["reason"], "MEDIA_NOT_COVERED");
    assert_eq!(failure["metadata"]["medium"], iso.display().to_string());
    Ok(())
}

// --- overlays and branches --------------------------------------------------------

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

// --- the definition ---------------------------------------------------------------

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

// --- reverts that fail in the middle ------------------------------------------------

/// A VM with a point of each kind, in a folder of its own.
fn with_points(lab: &Lab, agent: &Agent, folder: &Path) -> Result<Blank> {
    let domain = lab.blank(&BlankSpec {
        folder: Some(folder.to_owned()),
        ..BlankSpec::default()
    })?;
    point(agent, &domain, "cold", 1, &[])?;
    point(agent, &domain, "warm", 2, &["--memory"])?;
    put(&domain, 3)?;
    Ok(domain)
}

/// A folder of the lab's user; gone when dropped.
struct Own(PathBuf);

impl Own {
    fn new(lab: &Lab) -> Result<Self> {
        let folder = lab.folder.join(format!("own{}", std::process::id()));
        fs::create_dir(&folder)?;
        lab.own(&folder)?;
        Ok(Self(folder))
    }

    fn names(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = fs::read_dir(&self.0)?
            .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
            .collect();
        names.sort();
        Ok(names)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

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

/// Where libvirt keeps its records of a domain's snapshots.
fn records(domain: &Domain) -> PathBuf {
    domain
        .lab
        .folder
        .join("config/libvirt/qemu/snapshot")
        .join(&domain.name)
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
        // libvirt cannot write its record of the snapshot, which it does last.
        let mut closed = None;
        let failed = agent.vmsnap_seen(&words, |event| {
            match (event["event"].as_str(), event["name"].as_str()) {
                (Some("step_started"), Some("keep-definition")) => {
                    closed = Closed::new(&records(&domain)).ok();
                }
                (Some("step_failed"), _) => closed = None,
                _ => {}
            }
        })?;
        failed.failure()?;
        assert_eq!(failed.outcome()?["state"], "failed", "{}", failed.said);
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
    let mut closed = None;
    let words = ["revert", domain.name.as_str(), "warm", "--safety-snapshot"];
    let failed = agent.vmsnap_seen(&words, |event| {
        match (event["event"].as_str(), event["name"].as_str()) {
            (Some("step_started"), Some("keep-definition")) => {
                closed = Closed::new(&records(&domain)).ok();
            }
            (Some("step_failed"), _) => closed = None,
            _ => {}
        }
    })?;
    failed.failure()?;
    assert_eq!(failed.outcome()?["state"], "failed", "{}", failed.said);
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

// --- the guest ----------------------------------------------------------------------

/// Makes an address of the guest's reach its ssh server, until dropped: the network
/// of the lab's guests has no way in but a port of the host.
struct Way {
    address: String,
    forwarder: Child,
}

const FORWARD: &str = "
import socket, sys, threading
server = socket.create_server((sys.argv[1], 22))
def copy(a, b):
    while data := a.recv(4096):
        b.sendall(data)
    b.close()
def serve(near):
    try:
        far = socket.create_connection(('127.0.0.1', int(sys.argv[2])))
    except OSError:
        return near.close()
    threading.Thread(target=copy, args=(near, far), daemon=True).start()
    copy(far, near)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
";

impl Way {
    /// An address for this test alone, from the range for tests of networks.
    fn address() -> String {
        let id = std::process::id();
        format!("198.18.{}.{}", id / 250 % 250, id % 250 + 1)
    }

    fn open(guest: &Guest) -> Result<Self> {
        let address = Self::address();
        succeed(&mut privileged([
            "ip", "addr", "add", &address, "dev", "lo",
        ]))?;
        let port = guest.ssh_port.to_string();
        let forwarder = privileged(["python3", "-c", FORWARD, &address, &port]).spawn()?;
        let this = Self { address, forwarder };
        eventually(Duration::from_secs(20), "forwarder", || {
            TcpStream::connect((this.address.as_str(), 22)).is_ok()
        })?;
        Ok(this)
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        end(&mut self.forwarder, Duration::from_secs(5));
        let _ = succeed(&mut privileged([
            "ip",
            "addr",
            "del",
            &self.address,
            "dev",
            "lo",
        ]));
    }
}

/// A revert that waits in vain: what it says, and how long it took.
fn waits_in_vain(
    agent: &Agent,
    guest: &Guest,
    snapshot: &str,
    what: &str,
) -> Result<(Cli, Duration)> {
    let words = [
        "revert",
        &guest.name,
        snapshot,
        "--wait-for",
        what,
        "--wait-timeout",
        "6s",
    ];
    let cli = agent.vmsnap(&words)?;
    let waited = cli
        .all("step_finished")
        .filter_map(|event| event["took_ms"].as_u64())
        .max()
        .unwrap_or_default();
    assert_eq!(
        cli.failure()?["reason"],
        "WAIT_TIMEOUT",
        "{what}: {}",
        cli.said
    );
    // The revert is done, and told beside the failure.
    let outcome = cli.outcome()?;
    assert_eq!(outcome["state"], "failed");
    assert_eq!(outcome["result"]["vm_state"], "running");
    assert_eq!(outcome["result"]["changed"], true);
    assert_eq!(
        cli.all("undo").count(),
        0,
        "a revert that is done is not undone"
    );
    assert_eq!(guest.state()?, "running");
    Ok((cli, Duration::from_millis(waited)))
}

fn seconds_in(guest: &Guest) -> Result<i64> {
    Ok(guest.exec("date +%s")?.trim().parse()?)
}

fn seconds_now() -> Result<i64> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    Ok(i64::try_from(now.as_secs())?)
}

#[test]
fn a_guest_that_goes_on_from_memory_is_waited_for_told_of_and_has_its_clock_set() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    let address = Way::address();
    guest.exec(&format!("ip addr add {address}/32 dev eth0"))?;
    // Its state was saved when the lab was started, and its clock stood still since.
    guest.exec(&format!("date -s @{}", seconds_now()?))?;
    agent
        .vmsnap(&["create", name, "warm", "--memory"])?
        .result()?;
    let made = Instant::now();
    let way = Way::open(&guest)?;
    eventually(Duration::from_secs(10), "some age", || {
        made.elapsed() > Duration::from_secs(3)
    })?;
    let done = revert(&agent, &guest, "warm", &["--wait-for", "ssh"])?;
    let report = &done.result()?["guest"];
    assert_eq!(report["hostname"], name);
    assert!(report["os"].to_string().contains("Linux"), "{report}");
    let addresses = report["addresses"].as_array().context("addresses")?;
    assert!(
        addresses.contains(&Value::from(address.as_str())),
        "{report}"
    );
    assert!(!addresses.contains(&Value::from("127.0.0.1")), "{report}");
    assert!(report["ready_ms"].as_u64().context("ready_ms")? < 30_000);
    let skew = report["clock_skew_ms"].as_i64().context("skew")?;
    assert!((2_500..60_000).contains(&skew), "{skew}");
    assert_eq!(report["clock_set"], true);
    assert!((seconds_in(&guest)? - seconds_now()?).abs() <= 2);
    guest.lives()?;

    // Left alone when that is asked for.
    let left = revert(
        &agent,
        &guest,
        "warm",
        &["--wait-for", "address", "--no-sync-clock"],
    )?;
    assert!(left.result()?["guest"]["clock_skew_ms"].is_null());
    assert!(seconds_now()? - seconds_in(&guest)? >= 3);

    // Without anybody to greet there, the wait ends by its own deadline.
    drop(way);
    guest.exec("ip -4 addr flush dev eth0; ip -6 addr flush dev eth0")?;
    guest.exec(&format!("ip addr add {address}/32 dev eth0"))?;
    agent
        .vmsnap(&["create", name, "alone", "--memory"])?
        .result()?;
    let (cli, waited) = waits_in_vain(&agent, &guest, "alone", "ssh")?;
    let failure = cli.failure()?;
    assert!(
        failure["metadata"]["reached"]
            .to_string()
            .contains("an address"),
        "{failure}"
    );
    assert!(waited < Duration::from_secs(20), "{waited:?}");
    let found = &cli.outcome()?["result"]["guest"];
    assert_eq!(found["addresses"], serde_json::json!([address]));
    guest.lives()
}

#[test]
fn a_guest_that_does_not_come_back_in_time_says_how_far_it_came_and_the_revert_stays() -> Result<()>
{
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    // An agent that may not set the clock, in a guest without a network.
    guest.exec(
        "ip -4 addr flush dev eth0; ip -6 addr flush dev eth0; \
         port=$(ls /dev/vport*); \
         setsid sh -c \"sleep 0.5; killall qemu-ga; sleep 0.5; \
         exec qemu-ga -m virtio-serial -p $port -t /run -b guest-set-time\" > /dev/null 2>&1 &",
    )?;
    eventually(Duration::from_secs(20), "the other agent", || {
        guest
            .virsh("qemu-agent-command", &["{\"execute\":\"guest-info\"}"])
            .is_ok_and(|said| said.contains(r#""enabled":false,"name":"guest-set-time""#))
    })?;
    agent
        .vmsnap(&["create", name, "cut", "--memory"])?
        .result()?;
    let (cli, waited) = waits_in_vain(&agent, &guest, "cut", "address")?;
    let failure = cli.failure()?;
    assert!(
        failure["metadata"]["reached"]
            .to_string()
            .contains("no address"),
        "{failure}"
    );
    assert!(waited < Duration::from_secs(20), "{waited:?}");
    // The clock is another matter: it is behind, and that is said.
    let report = &cli.outcome()?["result"]["guest"];
    assert!(
        report["clock_skew_ms"].as_i64().context("skew")? > 500,
        "{report}"
    );
    assert_eq!(report["clock_set"], false);
    assert!(cli.warned("CLOCK_BEHIND"));
    let warning = cli
        .all("warning")
        .find(|event| event["code"] == "CLOCK_BEHIND");
    let message = warning.context("the warning")?["message"].to_string();
    assert!(
        message.contains("cannot be set") && message.contains("ms behind"),
        "{message}"
    );

    guest.exec("setsid sh -c 'sleep 0.5; killall qemu-ga' > /dev/null 2>&1 &")?;
    eventually_some(
        Duration::from_secs(20),
        "silence of the guest agent",
        || {
            let xml = guest.virsh("dumpxml", &[])?;
            Ok(xml.contains("state='disconnected'").then_some(()))
        },
    )?;
    agent
        .vmsnap(&["create", name, "mute", "--memory"])?
        .result()?;
    let (cli, waited) = waits_in_vain(&agent, &guest, "mute", "agent")?;
    let failure = cli.failure()?;
    assert!(
        failure["metadata"]["reached"]
            .to_string()
            .contains("nothing yet"),
        "{failure}"
    );
    assert!(waited < Duration::from_secs(20), "{waited:?}");
    // Nobody knows the clock then, and that is said too.
    assert!(cli.warned("CLOCK_BEHIND"));
    assert_eq!(guest.snapshots()?, ["cut", "mute"]);
    Ok(())
}
