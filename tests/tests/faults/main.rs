//! Nothing is left behind: a journal on a full disk, disks that fill up at any step,
//! guests whose agent hangs for ever, and callers that come, stay and go as they
//! please. virsh, qemu-img, the guest and /proc are the witnesses.

mod callers;
mod foreign;
mod guests;
mod journal;
mod late;
mod space;

use std::{
    path::PathBuf,
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::Value;
use vmsnap_tests::{Agent, Cli, command::Output, eventually_some};

const SOON: Duration = Duration::from_secs(15);

const LONG: Duration = Duration::from_secs(60);

const NONE: [&str; 0] = [];

const MIB: u64 = 1 << 20;

/// What a call that was refused or cut off was told, or what its run failed with.
fn told(cli: &Cli) -> Result<Value> {
    let last = cli.events.last().context("it said nothing")?;
    let failure = ["error", "failure"]
        .iter()
        .map(|key| &last[*key])
        .find(|it| !it.is_null());
    Ok(failure
        .with_context(|| format!("no failure in {last}"))?
        .clone())
}

fn number(failure: &Value, key: &str) -> Result<u64> {
    let text = failure["metadata"][key].as_str();
    Ok(text
        .with_context(|| format!("no {key} in {failure}"))?
        .parse()?)
}

/// The newest run on a VM, as the journal has it.
fn newest(agent: &Agent, vm: &str) -> Result<Value> {
    let log = agent.vmsnap(&["log", vm])?;
    Ok(log.document()?["workflows"][0].clone())
}

fn closed(agent: &Agent, vm: &str, state: &str) -> Result<Value> {
    eventually_some(LONG, &format!("run that is {state}"), || {
        let run = newest(agent, vm)?;
        Ok((run["state"] == state).then_some(run))
    })
}

/// Has an agent stand still after the record behind `skip` others, until the file is
/// there that this gives.
fn pausing(agent: &mut Agent, skip: usize) -> Result<PathBuf> {
    agent.stop();
    let file = agent.folder().join(format!("go{skip}"));
    let wait = format!("1*return(wait {})->off", file.display());
    agent.set_env("FAILPOINTS", &format!("journal.record={skip}*off->{wait}"));
    agent.start()?;
    agent.set_env("FAILPOINTS", "");
    Ok(file)
}

/// What a command left that ran on a thread of its own.
fn cli(output: &Output) -> Result<Cli> {
    let events = output.text();
    let events = events.lines().map(serde_json::from_str);
    Ok(Cli {
        status: output.status,
        events: events.collect::<Result<_, _>>()?,
        said: output.complaint(),
    })
}

fn start(agent: &Agent, words: &[&str]) -> Result<Child> {
    let mut command = agent.cli(words)?;
    Ok(command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?)
}

fn words<'a>(words: &[&'a str], vm: &'a str) -> Vec<&'a str> {
    words
        .iter()
        .map(|word| if *word == "VM" { vm } else { word })
        .collect()
}
