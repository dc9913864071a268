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
    let wrong: Vec<&str> = said.lines().filter(|line| line.contains("failed")).collect();
    ensure!(wrong.is_empty(), "{image} does not hold {numbers:?}: {wrong:?}");
    Ok(())
}

/// The file that holds a snapshot's data.
fn data_of(domain: &Domain, snapshot: &str) -> Result<String> {
    let xml = domain.virsh("snapshot-dumpxml", &[snapshot])?;
    let document = roxmltree::Document::parse(&xml)?;
    let root = document.root_element();
    let definition = root
        .children()
        .find(|node| node.has_tag_name("inactiveDomain"))
        .or_else(|| root.children().find(|node| node.has_tag_name("domain")));
    let file = definition
        .into_iter()
        .flat_map(|definition| definition.descendants())
        .find(|node| node.has_tag_name("disk"))
        .and_then(|disk| disk.children().find(|node| node.has_tag_name("source")))
        .and_then(|source| source.attribute("file"));
    Ok(file.context("a file")?.to_owned())
}

/// Requires that what an external snapshot would bring back holds these numbers.
fn keeps(domain: &Domain, snapshot: &str, numbers: &[u8]) -> Result<()> {
    image_holds(&domain.lab, &data_of(domain, snapshot)?, numbers)
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

/// What witnesses say of a VM: state, snapshots, chain, and its files with the
/// time of their last change.
fn seen(domain: &Domain) -> Result<(String, Vec<String>, Vec<String>, Vec<(String, SystemTime)>)> {
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
fn in_a_mixed_tree_each_delete_that_cannot_be_is_refused_with_what_helps_and_that_helps() -> Result<()>
{
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
fn a_revert_to_an_internal_snapshot_says_which_external_ones_on_its_image_it_would_spoil() -> Result<()>
{
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
        &[("e1", "merged_away"), ("i1", "whole"), ("i2", "merged_away")],
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
        let lower = data_of(self.domain, self.snapshot)?;
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
            ensure!(Instant::now() < limit, "nothing is merged into {lower}");
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
        ensure!(reason(&failure) == "SNAPSHOT_NOT_WHOLE" && failure["metadata"]["health"] == "torn");
        if running {
            self.domain.virsh("start", &[])?;
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

fn stamp(path: &str) -> Result<SystemTime> {
    Ok(fs::metadata(path)?.modified()?)
}

/// Stretches that are written before and after each snapshot, all at the same
/// place, so that a merge writes over older data.
const LONG: u64 = 40 * MIB;

/// A VM with the snapshots `e1` … on a disk whose merges last: before `e1` it was
/// filled with 9, after each snapshot with that one's number.
fn slow(lab: &Lab, count: u8) -> Result<Blank> {
    let domain = lab.blank(&BlankSpec {
        cache: "directsync".into(),
        ..BlankSpec::default()
    })?;
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
    let said = command::succeed(command.arg(data_of(domain, snapshot)?))?;
    ensure!(!said.contains("failed"), "{snapshot} is not all {byte}");
    Ok(())
}

#[test]
fn a_snapshot_whose_delete_by_virsh_was_cut_off_is_torn_until_the_delete_is_finished() -> Result<()> {
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
            domain.virsh("start", &[])?;
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
