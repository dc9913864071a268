//! Merging and deleting where it has gone wrong for people: mixed trees, block
//! jobs that were left open, QEMU killed in the middle, merges behind libvirt's
//! back, bases that cannot be written or that others stand on, branches, and what
//! is left when only metadata goes. virsh, qemu-img and the bytes on the disks
//! are the witnesses.
//!
//! Each disk is written in stretches of one MiB: what a step wrote is the byte of
//! its number in the stretch of its number.

use std::{
    collections::BTreeMap,
    fs,
    io::BufRead as _,
    path::Path,
    process::Stdio,
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use vmsnap_tests::{Agent, Blank, BlankSpec, Cli, Domain, Lab, command, eventually};

const NONE: [&str; 0] = [];
const MIB: u64 = 1 << 20;

/// Writes the byte `number` into the stretch of that number.
fn write(domain: &Domain, number: u8) -> Result<()> {
    domain.write_pattern("vda", number, u64::from(number) * MIB, MIB)
}

/// A blank domain that is on and whose vCPUs never ran: that costs next to
/// nothing, and merges are the same.
fn still(lab: &Lab, spec: BlankSpec) -> Result<Blank> {
    let domain = lab.blank(&BlankSpec {
        stopped: true,
        ..spec
    })?;
    domain.virsh("start", &["--paused"])?;
    Ok(domain)
}

/// Requires that the present disk holds the bytes of these numbers and of no
/// other below 16.
fn holds(domain: &Domain, numbers: &[u8]) -> Result<()> {
    let disk = domain.disk("vda")?;
    image_holds(&domain.lab, &disk, numbers)
}

/// Requires the same of an image, seen through what it stands on.
fn image_holds(lab: &Lab, image: &str, numbers: &[u8]) -> Result<()> {
    let mut command = lab.command("qemu-io");
    command.args(["-U", "-r", "-f", "qcow2"]);
    for number in 1..16_u8 {
        let byte = if numbers.contains(&number) { number } else { 0 };
        let at = u64::from(number) * MIB;
        command.args(["-c", &format!("read -P {byte} {at} {MIB}")]);
    }
    let said = command::succeed(command.arg(image))?;
    let wrong: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("failed"))
        .collect();
    ensure!(
        wrong.is_empty(),
        "{image} does not hold {numbers:?}: {wrong:?}"
    );
    Ok(())
}

/// Requires that what an external snapshot would bring back holds these numbers.
fn keeps(domain: &Domain, snapshot: &str, numbers: &[u8]) -> Result<()> {
    let data = domain.data(snapshot, "vda")?;
    image_holds(&domain.lab, &data.display().to_string(), numbers)
        .with_context(|| format!("snapshot {snapshot}"))
}

/// An external snapshot by virsh, its overlay beside the disk.
fn virsh_external(domain: &Domain, name: &str) -> Result<()> {
    let overlay = domain.folder().join(format!("{}.{name}", domain.name));
    let spec = format!("vda,snapshot=external,file={}", overlay.display());
    let words = [name, "--disk-only", "--diskspec", &spec];
    domain.virsh("snapshot-create-as", &words).map(drop)
}

/// Health of each snapshot, by the product.
fn health(agent: &Agent, domain: &Domain) -> Result<BTreeMap<String, String>> {
    fn walk(value: &Value, into: &mut BTreeMap<String, String>) {
        match value {
            Value::Array(all) => all.iter().for_each(|one| walk(one, into)),
            Value::Object(object) => {
                if let (Some(name), Some(health)) = (
                    object.get("name").and_then(Value::as_str),
                    object.get("health").and_then(Value::as_str),
                ) {
                    into.insert(name.to_owned(), health.to_owned());
                }
                object.values().for_each(|one| walk(one, into));
            }
            _ => {}
        }
    }
    let listed = agent.vmsnap(&["ls", &domain.name])?;
    let mut all = BTreeMap::new();
    walk(listed.document()?, &mut all);
    Ok(all)
}

/// Requires these healths, in the order of the names.
fn healths(agent: &Agent, domain: &Domain, expected: &[(&str, &str)]) -> Result<()> {
    let found = health(agent, domain)?;
    let found: Vec<(&str, &str)> = found
        .iter()
        .map(|(name, health)| (name.as_str(), health.as_str()))
        .collect();
    ensure!(found == expected, "{found:?}, not {expected:?}");
    Ok(())
}

/// State, snapshots, chain, and files with the time of their last change.
type Seen = (String, Vec<String>, Vec<String>, Vec<(String, SystemTime)>);

/// What witnesses say of a VM.
fn seen(domain: &Domain) -> Result<Seen> {
    let mut files = Vec::new();
    for name in domain.files()? {
        let written = fs::metadata(domain.folder().join(&name))?.modified()?;
        files.push((name, written));
    }
    Ok((
        domain.state()?,
        domain.snapshots()?,
        domain.chain("vda")?,
        files,
    ))
}

/// Runs `vmsnap WORDS`, which the plan has to refuse without touching the VM, and
/// gives the failure.
fn refused(agent: &Agent, domain: &Domain, words: &[&str]) -> Result<Value> {
    let before = seen(domain)?;
    let cli = agent.vmsnap(words)?;
    let failure = cli.failure()?.clone();
    ensure!(
        cli.outcome()?["state"] == "refused" && cli.all("step_started").count() == 0,
        "{words:?} was begun: {:?}",
        cli.events
    );
    let after = seen(domain)?;
    ensure!(before == after, "{words:?}: {before:?} became {after:?}");
    Ok(failure)
}

fn reason(failure: &Value) -> &str {
    failure["reason"].as_str().unwrap_or_default()
}

/// A list in an error's metadata.
fn names<'a>(failure: &'a Value, key: &str) -> Vec<&'a str> {
    failure["metadata"][key]
        .as_str()
        .into_iter()
        .flat_map(|list| list.split(','))
        .filter(|name| !name.is_empty())
        .collect()
}

fn warns(cli: &Cli, code: &str) -> bool {
    cli.all("planned")
        .flat_map(|event| event["plan"]["warnings"].as_array().into_iter().flatten())
        .chain(cli.all("warning"))
        .any(|warning| warning["code"] == code)
}

/// What a cleanup said of files: path and whether it went.
fn files_judged(cli: &Cli) -> Result<BTreeMap<String, bool>> {
    Ok(cli.result()?["verdicts"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|verdict| verdict["what"] == "file")
        .map(|verdict| {
            let name = verdict["name"].as_str().unwrap_or_default();
            let file = Path::new(name).file_name().unwrap_or_default();
            (
                file.to_string_lossy().into_owned(),
                verdict["removed"] == true,
            )
        })
        .collect())
}

/// Snapshots by the product, each followed by a write: after `e1` the byte 1.
fn chain_of(agent: &Agent, domain: &Domain, count: u8) -> Result<()> {
    for number in 1..=count {
        let name = format!("e{number}");
        agent.vmsnap(&["create", &domain.name, &name])?.result()?;
        write(domain, number)?;
    }
    Ok(())
}

/// Deletes a snapshot by doing what each refusal says, and counts the refusals.
fn delete_as_told(agent: &Agent, domain: &Domain, snapshot: &str) -> Result<u32> {
    let mut refusals = 0;
    for _ in 0..10 {
        let cli = agent.vmsnap(&["cleanup", &domain.name, snapshot])?;
        if cli.status == 0 {
            return Ok(refusals);
        }
        refusals += 1;
        let failure = cli.failure()?;
        let first = names(failure, "order");
        if failure["metadata"]["state_needed"] == "stopped" {
            domain.virsh("destroy", &[])?;
        } else {
            ensure!(!first.is_empty(), "no way on: {failure}");
        }
        for name in first {
            if domain.snapshots()?.iter().any(|one| one == name) {
                refusals += delete_as_told(agent, domain, name)?;
            }
        }
    }
    anyhow::bail!("following what was said leads nowhere for {snapshot}")
}

/// A tree of both kinds, made by virsh: a name that begins with `i` is internal.
/// After each snapshot the byte of its place is written.
fn mixed(lab: &Lab, tree: &[&str]) -> Result<Blank> {
    let domain = lab.blank(&BlankSpec::default())?;
    for (number, name) in (1..).zip(tree) {
        if name.starts_with('i') {
            domain.virsh("snapshot-create-as", &[name])?;
        } else {
            virsh_external(&domain, name)?;
        }
        write(&domain, number)?;
    }
    Ok(domain)
}

#[test]
fn in_a_mixed_tree_each_delete_that_cannot_be_is_refused_with_what_helps_and_that_helps()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    for (tree, impossible) in [
        (["i1", "e1", "i2"], ["i1", "e1"].as_slice()),
        (["e1", "i1", "e2"], ["e1", "i1", "e2"].as_slice()),
    ] {
        let domain = mixed(&lab, &tree)?;
        let name = domain.name.as_str();
        for snapshot in impossible {
            let failure = refused(&agent, &domain, &["cleanup", name, snapshot])?;
            assert_eq!(reason(&failure), "KINDS_MIXED", "{tree:?}, {snapshot}");
        }
        let more = refused(&agent, &domain, &["create", name, "new"])?;
        assert_eq!(reason(&more), "KINDS_MIXED");
        holds(&domain, &[1, 2, 3])?;
        let mut refusals = 0;
        for snapshot in impossible.iter().rev() {
            if domain.snapshots()?.iter().any(|one| one == snapshot) {
                refusals += delete_as_told(&agent, &domain, snapshot)?;
            }
        }
        assert!(refusals > 1, "{tree:?}");
        assert_eq!(domain.state()?, "shut off", "{tree:?}: as was told");
        // Nothing of the present state went, and nothing is left.
        assert_eq!(domain.snapshots()?, NONE, "{tree:?}");
        assert_eq!(domain.files()?, [format!("{name}.qcow2")], "{tree:?}");
        holds(&domain, &[1, 2, 3])?;
        domain.check("vda")?;
    }
    Ok(())
}

#[test]
fn a_revert_to_an_internal_snapshot_says_which_external_ones_on_its_image_it_would_spoil()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = mixed(&lab, &["i1", "e1", "i2"])?;
    let name = domain.name.as_str();
    let failure = refused(&agent, &domain, &["revert", name, "i1"])?;
    assert_eq!(reason(&failure), "KINDS_MIXED");
    assert_eq!(names(&failure, "lost"), ["i2", "e1"]);
    // The one in the active image spoils nothing.
    agent.vmsnap(&["revert", name, "i2"])?.result()?;
    holds(&domain, &[1, 2])?;
    let forced = agent.vmsnap(&["revert", name, "i1", "--force"])?;
    forced.result()?;
    assert!(warns(&forced, "SNAPSHOTS_LOST"));
    holds(&domain, &[])?;
    healths(
        &agent,
        &domain,
        &[
            ("e1", "merged_away"),
            ("i1", "whole"),
            ("i2", "merged_away"),
        ],
    )?;
    // libvirt deletes none of them; their entries go, the overlay stays.
    for snapshot in ["e1", "i2"] {
        agent.vmsnap(&["cleanup", name, snapshot])?.result()?;
    }
    assert_eq!(domain.snapshots()?, ["i1"]);
    let overlay = format!("{name}.e1");
    let reported = agent.vmsnap(&["cleanup", name, "--orphans", "delete"])?;
    assert_eq!(files_judged(&reported)?, [(overlay.clone(), false)].into());
    assert!(domain.files()?.contains(&overlay), "it was made by others");
    holds(&domain, &[])
}

/// A delete in the middle of whose merge QEMU is killed.
struct CutOff<'a> {
    agent: &'a Agent,
    domain: &'a Domain,
    snapshot: &'a str,
}

impl CutOff<'_> {
    /// Runs `delete` and kills QEMU as soon as the file that holds the snapshot's
    /// data is written.
    fn by(&self, mut delete: std::process::Command) -> Result<()> {
        let lower = self.domain.data(self.snapshot, "vda")?;
        let pid = self.domain.pid()?;
        let before = stamp(&lower)?;
        let mut caller = delete
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let limit = Instant::now() + Duration::from_secs(30);
        // No pause: the merge lasts some tens of milliseconds.
        while stamp(&lower)? == before {
            ensure!(
                Instant::now() < limit,
                "nothing is merged into {}",
                lower.display()
            );
        }
        thread::sleep(Duration::from_millis(5));
        command::signal(pid, Signal::KILL);
        ensure!(!caller.wait()?.success(), "the merge was over too soon");
        eventually(Duration::from_secs(10), "end of QEMU", || {
            self.domain.state().is_ok_and(|state| state == "shut off")
        })
    }

    fn by_virsh(&self) -> Result<()> {
        let mut command = self.domain.lab.command("virsh");
        command.args(["-q", "-c", "qemu:///session", "snapshot-delete"]);
        command.args([&self.domain.name, self.snapshot]);
        self.by(command)
    }

    fn by_the_product(&self, more: &[&str]) -> Result<()> {
        let mut words = vec!["cleanup", self.domain.name.as_str(), self.snapshot];
        words.extend(more);
        self.by(self.agent.cli(&words)?)
    }

    /// What must be true afterwards: only this snapshot is torn, and finishing
    /// its delete leaves all others and the present state as they were.
    fn is_told_and_finished(&self, running: bool) -> Result<()> {
        let name = self.domain.name.as_str();
        for (snapshot, health) in health(self.agent, self.domain)? {
            let expected = if snapshot == self.snapshot {
                "torn"
            } else {
                "whole"
            };
            ensure!(health == expected, "{snapshot} is {health}");
        }
        let failure = refused(self.agent, self.domain, &["revert", name, self.snapshot])?;
        ensure!(
            reason(&failure) == "SNAPSHOT_NOT_WHOLE" && failure["metadata"]["health"] == "torn"
        );
        if running {
            self.domain.virsh("start", &["--paused"])?;
        }
        let state = self.domain.state()?;
        self.agent
            .vmsnap(&["cleanup", name, self.snapshot])?
            .result()?;
        ensure!(self.domain.state()? == state, "the state is another one");
        ensure!(
            health(self.agent, self.domain)?
                .values()
                .all(|health| health == "whole")
        );
        Ok(())
    }
}

fn stamp(path: &Path) -> Result<SystemTime> {
    Ok(fs::metadata(path)?.modified()?)
}

/// Stretches that are written before and after each snapshot, all at the same
/// place, so that a merge writes over older data.
const LONG: u64 = 40 * MIB;

/// A VM with the snapshots `e1` … on a disk whose merges last: before `e1` it was
/// filled with 9, after each snapshot with that one's number.
fn slow(lab: &Lab, count: u8) -> Result<Blank> {
    let spec = BlankSpec {
        cache: "directsync".into(),
        ..BlankSpec::default()
    };
    let domain = still(lab, spec)?;
    domain.write_pattern("vda", 9, 0, LONG)?;
    for number in 1..=count {
        virsh_external(&domain, &format!("e{number}"))?;
        domain.write_pattern("vda", number, 0, LONG)?;
    }
    Ok(domain)
}

/// Requires that a snapshot would bring back one byte all over.
fn filled(domain: &Domain, snapshot: &str, byte: u8) -> Result<()> {
    let mut command = domain.lab.command("qemu-io");
    command.args(["-U", "-r", "-f", "qcow2", "-c"]);
    command.arg(format!("read -P {byte} 0 {LONG}"));
    let said = command::succeed(command.arg(domain.data(snapshot, "vda")?))?;
    ensure!(!said.contains("failed"), "{snapshot} is not all {byte}");
    Ok(())
}

#[test]
fn a_snapshot_whose_delete_by_virsh_was_cut_off_is_torn_until_the_delete_is_finished() -> Result<()>
{
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = slow(&lab, 4)?;
    // Such a merge is known by its traces where libvirt leaves no mark, and times
    // of snapshots have whole seconds.
    thread::sleep(Duration::from_secs(3));
    for (snapshot, running) in [("e1", true), ("e3", false), ("e4", true)] {
        let cut = CutOff {
            agent: &agent,
            domain: &domain,
            snapshot,
        };
        cut.by_virsh().with_context(|| snapshot.to_owned())?;
        cut.is_told_and_finished(running)
            .with_context(|| snapshot.to_owned())?;
        if domain.state()? == "shut off" {
            domain.virsh("start", &["--paused"])?;
        }
    }
    assert_eq!(domain.snapshots()?, ["e2"]);
    filled(&domain, "e2", 1)?;
    assert!(domain.has_pattern("vda", 4, 0, LONG)?);
    domain.check("vda")
}

#[test]
fn a_snapshot_whose_delete_by_the_product_was_cut_off_is_torn_until_the_delete_is_finished()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = slow(&lab, 4)?;
    for (snapshot, limit, running) in [
        ("e1", [].as_slice(), true),
        ("e3", &[], true),
        // Merged by the agent's own hand.
        ("e4", &["--bandwidth", "8M"], false),
    ] {
        let cut = CutOff {
            agent: &agent,
            domain: &domain,
            snapshot,
        };
        cut.by_the_product(limit)
            .with_context(|| snapshot.to_owned())?;
        cut.is_told_and_finished(running)
            .with_context(|| snapshot.to_owned())?;
    }
    assert_eq!(domain.snapshots()?, ["e2"]);
    filled(&domain, "e2", 1)?;
    assert!(domain.has_pattern("vda", 4, 0, LONG)?);
    domain.check("vda")
}

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
        !warns(&gone, "OVERLAY_STAYS") || domain.files()?.contains(&format!("{name}.vda.e2.qcow2"))
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
    assert!(warns(&kept, "OVERLAY_STAYS"));
    assert_eq!(domain.snapshots()?, ["e1"]);
    assert!(domain.files()?.contains(&overlay(2)));
    let gone = agent.vmsnap(&["cleanup", name, "e1", "--orphans", "delete"])?;
    let both = [(overlay(1), true), (overlay(2), true)];
    assert_eq!(files_judged(&gone)?, both.into());
    assert_eq!(domain.files()?, [format!("{name}.qcow2")]);
    holds(&domain, &[1, 2])
}

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
fn internal_snapshots_go_from_any_place_of_their_tree_on_and_off() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = still(&lab, BlankSpec::default())?;
    let name = domain.name.as_str();
    let make = |count: u8| -> Result<()> {
        for number in 1..=count {
            let snapshot = format!("i{number}");
            let words = ["create", name, &snapshot, "--kind", "internal"];
            agent.vmsnap(&words)?.result()?;
            write(&domain, number)?;
        }
        Ok(())
    };
    let inside = || -> Result<Vec<String>> {
        let text = lab.qemu_img(["info", "-U", "--output=json", &domain.disk("vda")?])?;
        let info: Value = serde_json::from_str(&text)?;
        let mut names: Vec<String> = info["snapshots"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|one| one["name"].as_str().map(str::to_owned))
            .collect();
        names.sort();
        Ok(names)
    };
    make(4)?;
    for state in ["paused", "shut off"] {
        // One in the middle, the newest, the oldest: by name, or as what a commit
        // drops.
        for (words, left) in [
            (vec!["cleanup", name, "i2"], vec!["i1", "i3", "i4"]),
            (vec!["commit", name, "i4"], vec!["i1", "i3"]),
            (
                vec!["cleanup", name, "i1", "--children", "only"],
                vec!["i1"],
            ),
            (vec!["cleanup", name, "i1", "--children", "delete"], vec![]),
        ] {
            agent.vmsnap(&words)?.result()?;
            assert_eq!(domain.snapshots()?, left, "{state}: {words:?}");
            assert_eq!(inside()?, left, "{state}: {words:?}");
            assert_eq!(domain.state()?, state);
        }
        holds(&domain, &[1, 2, 3, 4])?;
        if state == "paused" {
            domain.virsh("destroy", &[])?;
            make(4)?;
        }
    }
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

#[test]
fn a_limit_is_kept_and_a_run_that_is_out_of_time_finishes_the_merge_it_is_in() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        disk_mib: 128,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    let (long, place) = (40 * MIB, |number: u8| u64::from(number) * 42 * MIB);
    for number in 1..=2_u8 {
        let snapshot = format!("e{number}");
        agent.vmsnap(&["create", name, &snapshot])?.result()?;
        domain.write_pattern("vda", number, place(number), long)?;
    }
    // 40 MiB at 4 MiB a second would take ten seconds.
    let began = Instant::now();
    let words = [
        "commit",
        name,
        "--all",
        "--bandwidth",
        "2M",
        "--timeout",
        "2s",
    ];
    let stopped = agent.vmsnap(&words)?;
    let took = began.elapsed();
    assert!(
        (Duration::from_secs(2)..Duration::from_secs(8)).contains(&took),
        "{took:?}"
    );
    assert_eq!(stopped.failure()?["reason"], "TIMED_OUT");
    assert_eq!(stopped.outcome()?["state"], "cancelled");
    assert!(warns(&stopped, "LIMIT_LIFTED"));
    let bytes = |event: &Value| event["done_bytes"].as_u64().unwrap_or(0);
    let first: Vec<u64> = stopped.all("step_progress").map(bytes).collect();
    assert!(
        first.iter().any(|done| *done > 0 && *done < long / 2),
        "{first:?}"
    );
    // The one that had begun is done, the other was never begun.
    assert_eq!(domain.snapshots()?, ["e1"]);
    assert_eq!(
        domain.chain("vda")?,
        [format!("{name}.vda.e1.qcow2"), format!("{name}.qcow2")]
    );
    assert_eq!(domain.state()?, "running");
    healths(&agent, &domain, &[("e1", "whole")])?;
    assert_eq!(domain.virsh("blockjob", &["vda", "--raw"])?.trim(), "");
    let rest = agent.vmsnap(&["commit", name, "--all"])?;
    assert_eq!(rest.result()?["merged"], serde_json::json!(["e1"]));
    for number in 1..=2_u8 {
        assert!(domain.has_pattern("vda", number, place(number), long)?);
    }
    assert_eq!(domain.files()?, [format!("{name}.qcow2")]);
    domain.check("vda")
}

/// Has QEMU copy slowly as soon as it copies for libvirt's own delete: asked over
/// and over, because such a merge may take less than a second.
struct SlowDown(std::process::Child);

impl SlowDown {
    fn begin(domain: &Domain, node: u32) -> Result<Self> {
        let ask = serde_json::json!({
            "execute": "block-job-set-speed",
            "arguments": {"device": format!("commit-vda-libvirt-{node}-format"), "speed": MIB},
        });
        let line = format!("qemu-monitor-command {} '{ask}'\n", domain.name);
        let script = domain.lab.folder.join(format!("{}.virsh", domain.name));
        fs::write(&script, line.repeat(20_000))?;
        let mut virsh = domain.lab.command("virsh");
        virsh
            .args(["-q", "-c", "qemu:///session"])
            .stdin(fs::File::open(&script)?)
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        fs::remove_file(script)?;
        Ok(Self(virsh.spawn()?))
    }

    fn wait(mut self) -> Result<()> {
        let said = self.0.stdout.take().context("what virsh says")?;
        let mut lines = std::io::BufReader::new(said).lines();
        let slow = lines.any(|line| line.is_ok_and(|line| line.contains(r#""return":{}"#)));
        ensure!(slow, "no merge was seen");
        Ok(())
    }
}

impl Drop for SlowDown {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_cancelled_run_gives_up_the_merge_that_it_is_in_and_the_vm_goes_on_as_before() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        disk_mib: 512,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    let long = 400 * MIB;
    agent.vmsnap(&["create", name, "e1"])?.result()?;
    domain.write_pattern("vda", 1, 0, long)?;
    agent.vmsnap(&["create", name, "e2"])?.result()?;
    domain.write_pattern("vda", 2, long, 40 * MIB)?;
    // Inside libvirt's own delete, and in one that the agent drives.
    for (words, first, second) in [
        (vec!["cleanup", name, "e1"], "e1", "whole"),
        (
            vec!["commit", name, "e2", "--bandwidth", "2M"],
            "e2",
            "torn",
        ),
    ] {
        let slow = (first == "e1").then(|| SlowDown::begin(&domain, 2));
        let mut command = agent.cli(&words)?;
        let caller =
            thread::spawn(move || command::run(&mut command, None, Duration::from_secs(60)));
        if let Some(slow) = slow {
            slow?.wait()?;
        } else {
            eventually(Duration::from_secs(20), "merge", || {
                let job = domain.virsh("blockjob", &["vda", "--raw"]);
                job.is_ok_and(|job| job.contains("Commit"))
            })?;
        }
        let log = agent.vmsnap(&["log", name])?;
        let run = log.document()?["workflows"][0]["id"].clone();
        let began = Instant::now();
        let cancelled = agent.vmsnap(&["cancel", run.as_str().context("the run")?])?;
        assert_eq!(cancelled.status, 0, "{}", cancelled.said);
        let told = caller
            .join()
            .map_err(|_| anyhow::anyhow!("the caller panicked"))??;
        assert!(began.elapsed() < Duration::from_secs(10));
        let told = told.complaint();
        assert!(told.contains("given up before its end"), "{told}");
        assert!(told.contains("deleting it again finishes"), "{told}");
        let log = agent.vmsnap(&["log", name])?;
        assert_eq!(log.document()?["workflows"][0]["state"], "cancelled");
        assert_eq!(domain.state()?, "running");
        assert_eq!(domain.chain("vda")?.len(), 3);
        assert_eq!(domain.snapshots()?, ["e1", "e2"]);
        assert_eq!(domain.virsh("blockjob", &["vda", "--raw"])?.trim(), "");
        healths(&agent, &domain, &[("e1", "torn"), ("e2", second)])?;
    }
    assert!(domain.has_pattern("vda", 1, 0, long)?);
    let words = ["cleanup", name, "e1", "--children", "delete"];
    agent.vmsnap(&words)?.result()?;
    assert!(domain.has_pattern("vda", 1, 0, long)?);
    assert!(domain.has_pattern("vda", 2, long, 40 * MIB)?);
    assert_eq!(domain.files()?, [format!("{name}.qcow2")]);
    domain.check("vda")
}

#[test]
fn an_agent_killed_in_its_own_merge_gives_it_up_when_it_comes_back_and_finishes_it_when_asked()
-> Result<()> {
    let lab = Lab::from_env()?;
    let mut agent = lab.agent("")?;
    let domain = still(&lab, BlankSpec::default())?;
    let name = domain.name.as_str();
    domain.write_pattern("vda", 9, 0, 16 * MIB)?;
    agent.vmsnap(&["create", name, "e1"])?.result()?;
    domain.write_pattern("vda", 1, 0, 16 * MIB)?;
    let mut caller = agent
        .cli(&["commit", name, "e1", "--bandwidth", "2M"])?
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let job = || domain.virsh("blockjob", &["vda", "--raw"]);
    eventually(Duration::from_secs(20), "merge", || {
        job().is_ok_and(|job| job.contains("Commit"))
    })?;
    agent.kill();
    caller.kill()?;
    caller.wait()?;
    assert!(job()?.contains("Commit"), "libvirt goes on with it");
    agent.start()?;
    assert_eq!(job()?.trim(), "", "nobody would ever have ended it");
    assert_eq!(domain.state()?, "paused");
    assert_eq!(domain.chain("vda")?.len(), 2);
    healths(&agent, &domain, &[("e1", "torn")])?;
    agent.vmsnap(&["cleanup", name, "e1"])?.result()?;
    assert!(domain.has_pattern("vda", 1, 0, 16 * MIB)?);
    assert_eq!(domain.files()?, [format!("{name}.qcow2")]);
    domain.check("vda")
}

/// A dump of a running VM that never ends, because nobody reads what it writes:
/// libvirt is busy with the VM until this is dropped.
struct Dumping<'a> {
    domain: &'a Domain,
    pipe: std::path::PathBuf,
    processes: Vec<std::process::Child>,
}

impl<'a> Dumping<'a> {
    fn begin(domain: &'a Domain) -> Result<Self> {
        let lab = &domain.lab;
        let pipe = lab.images().join(format!("{}.pipe", domain.name));
        let shown = pipe.display().to_string();
        command::succeed(lab.command("mkfifo").arg(&pipe))?;
        let mut dumping = Self {
            domain,
            pipe,
            processes: Vec::new(),
        };
        // Opens the pipe and reads nothing.
        let reader = format!("exec sleep 120 < '{shown}'");
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
    let _dumping = Dumping::begin(&domain)?;
    let began = Instant::now();
    healths(&agent, &domain, &[("e1", "whole")])?;
    assert!(began.elapsed() < Duration::from_secs(5));
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
