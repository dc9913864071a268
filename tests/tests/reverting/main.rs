//! Going back where it has gone wrong for people: states, managed saves, memory
//! files, siblings, definitions that changed meanwhile, and reverts that fail in
//! the middle. Bytes on the disks, virsh and the guest itself are the witnesses.

mod beforehand;
mod branches;
mod definition;
mod ending;
mod failing;
mod waiting;
mod without_memory;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Result, ensure};
use serde_json::Value;
use vmsnap_tests::{Agent, Blank, BlankSpec, Cli, Domain, Lab};

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

fn all_whole(agent: &Agent, domain: &Domain) -> Result<()> {
    let found = agent.healths(&domain.name)?;
    ensure!(found.values().all(|health| health == "whole"), "{found:?}");
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

/// Where libvirt keeps its records of a domain's snapshots.
fn records(domain: &Domain) -> PathBuf {
    domain
        .lab
        .folder
        .join("config/libvirt/qemu/snapshot")
        .join(&domain.name)
}

fn seconds_now() -> Result<i64> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    Ok(i64::try_from(now.as_secs())?)
}

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
