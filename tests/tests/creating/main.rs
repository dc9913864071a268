//! Making snapshots where it has gone wrong for people: firmware, names, files
//! that are there already, disks and devices that no snapshot can cover, drives,
//! silent guest agents. virsh, qemu-img and the bytes on the disks are the
//! witnesses.

mod consistency;
mod disks;
mod drives;
mod existing;
mod firmware;
mod names;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use vmsnap_tests::{Agent, Cli, Domain};

const NONE: [&str; 0] = [];

/// Runs `vmsnap create DOMAIN WORDS`, which the plan has to refuse, and gives the
/// reason with its message; nothing may have changed.
fn refused(agent: &Agent, domain: &Domain, words: &[&str]) -> Result<(String, String)> {
    let seen = || -> Result<(String, Vec<String>)> {
        // One virsh for both.
        let words = format!("domstate {0}; snapshot-list {0} --name", domain.name);
        Ok((domain.lab.virsh([words])?, domain.files()?))
    };
    let before = seen()?;
    let mut all = vec!["create", domain.name.as_str()];
    all.extend(words);
    let cli = agent.vmsnap(&all)?;
    let failure = failure(&cli)?;
    ensure!(
        cli.all("step_started").count() == 0,
        "a step was begun: {:?}",
        cli.events
    );
    let after = seen()?;
    ensure!(before == after, "{before:?} became {after:?}");
    let text = |key: &str| failure[key].as_str().unwrap_or_default().to_owned();
    Ok((text("reason"), text("message")))
}

/// The failure of a run, or the error of a request that never became one, with
/// each bad field after the message.
fn failure(cli: &Cli) -> Result<Value> {
    if let Ok(failure) = cli.failure() {
        return Ok(failure.clone());
    }
    ensure!(
        cli.status == 1,
        "it ended with {}: {}",
        cli.status,
        cli.said
    );
    let mut error = cli.events.first().context("no document")?["error"].clone();
    error["message"] = Value::from(error.to_string());
    Ok(error)
}

/// What a plan decided on one subject.
fn decided<'a>(cli: &'a Cli, subject: &str) -> Result<&'a str> {
    let plan = cli.all("planned").next().context("no plan")?;
    let decisions = plan["plan"]["decisions"].as_array();
    decisions
        .into_iter()
        .flatten()
        .find(|decision| decision["subject"] == subject)
        .and_then(|decision| decision["choice"].as_str())
        .with_context(|| format!("nothing decided on {subject}: {plan}"))
}

fn disk(target: &str, format: &str, readonly: bool) -> (String, String, bool) {
    (target.to_owned(), format.to_owned(), readonly)
}
