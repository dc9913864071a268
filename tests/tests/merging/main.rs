//! Merging and deleting where it has gone wrong for people: mixed trees, block
//! jobs that were left open, QEMU killed in the middle, merges behind libvirt's
//! back, bases that cannot be written or that others stand on, branches, and what
//! is left when only metadata goes. virsh, qemu-img and the bytes on the disks
//! are the witnesses.
//!
//! Each disk is written in stretches of one MiB: what a step wrote is the byte of
//! its number in the stretch of its number. Here is what the themes share.

mod current;
mod cut_off;
mod files;
mod foreign_jobs;
mod mixed;
mod order;

use std::{collections::BTreeMap, fs, path::Path, time::SystemTime};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use vmsnap_tests::{Agent, Blank, BlankSpec, Cli, Domain, Lab, command};

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

/// Requires these healths, in the order of the names.
fn healths(agent: &Agent, domain: &Domain, expected: &[(&str, &str)]) -> Result<()> {
    let found = agent.healths(&domain.name)?;
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
