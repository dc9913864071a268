//! The command line, as a person runs it, with `--json`.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    Agent,
    command::{command, run},
    paths,
};

/// How long one command may take.
const LIMIT: Duration = Duration::from_secs(240);

/// What one command of `vmsnap` left.
#[derive(Debug)]
pub struct Cli {
    /// Exit status.
    pub status: i32,
    /// The JSON documents that it wrote, one a line.
    pub events: Vec<Value>,
    /// What it said to people.
    pub said: String,
}

impl Agent {
    /// The command line's process for this agent, not started yet.
    ///
    /// # Errors
    /// When it is not built.
    pub fn cli(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = command(
            paths::binary("vmsnap")?,
            ["--json", "--agent", &self.address()],
        );
        command.args(arguments).stdin(Stdio::null());
        Ok(command)
    }

    /// Runs `vmsnap ARGUMENTS`.
    ///
    /// # Errors
    /// When it cannot be run, or writes something else than JSON.
    pub fn vmsnap(&self, arguments: &[&str]) -> Result<Cli> {
        let output = run(&mut self.cli(arguments)?, None, LIMIT)?;
        let events = output
            .text()
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()
            .with_context(|| format!("no JSON: {}", output.text()))?;
        Ok(Cli {
            status: output.status,
            events,
            said: output.complaint(),
        })
    }
}

impl Agent {
    /// Runs `vmsnap ARGUMENTS` and shows each document as it comes, so that a
    /// test can step in between.
    ///
    /// # Errors
    /// When it cannot be run, or writes something else than JSON.
    pub fn vmsnap_seen(&self, arguments: &[&str], mut seen: impl FnMut(&Value)) -> Result<Cli> {
        let mut child = self
            .cli(arguments)?
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().context("its output")?;
        let mut events = Vec::new();
        for line in BufReader::new(output).lines() {
            let event: Value = serde_json::from_str(&line?)?;
            seen(&event);
            events.push(event);
        }
        let mut said = String::new();
        if let Some(mut complaints) = child.stderr.take() {
            complaints.read_to_string(&mut said)?;
        }
        let status = child.wait()?.code().unwrap_or(-1);
        Ok(Cli {
            status,
            events,
            said,
        })
    }
}

impl Agent {
    /// Health of each snapshot of a VM, by the product.
    ///
    /// # Errors
    /// When there is no such VM.
    pub fn healths(&self, vm: &str) -> Result<BTreeMap<String, String>> {
        let list = self.vmsnap(&["ls", vm])?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let all = list.document()?["snapshots"].as_array();
        Ok(all
            .context("snapshots")?
            .iter()
            .map(|one| (text(&one["name"]), text(&one["health"])))
            .collect())
    }
}

impl Cli {
    /// Whether a warning was given, with the plan or during the run.
    #[must_use]
    pub fn warned(&self, code: &str) -> bool {
        self.all("planned")
            .flat_map(|event| event["plan"]["warnings"].as_array().into_iter().flatten())
            .chain(self.all("warning"))
            .any(|warning| warning["code"] == code)
    }

    /// Requires success, and gives the run's result.
    ///
    /// # Errors
    /// With what it said.
    pub fn result(&self) -> Result<&Value> {
        ensure!(
            self.status == 0,
            "vmsnap ended with {}: {}",
            self.status,
            self.said
        );
        Ok(&self.outcome()?["result"])
    }

    /// Requires a failure, and gives it.
    ///
    /// # Errors
    /// When it succeeded.
    pub fn failure(&self) -> Result<&Value> {
        ensure!(
            self.status == 1,
            "vmsnap ended with {}: {}",
            self.status,
            self.said
        );
        Ok(&self.outcome()?["failure"])
    }

    /// The outcome event.
    ///
    /// # Errors
    /// When there is none.
    pub fn outcome(&self) -> Result<&Value> {
        self.all("outcome")
            .next()
            .with_context(|| format!("no outcome: {}", self.said))
    }

    /// All events of a kind.
    pub fn all<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.events
            .iter()
            .filter(move |event| event["event"] == kind)
    }

    /// The only document, for commands that write one.
    ///
    /// # Errors
    /// When it failed.
    pub fn document(&self) -> Result<&Value> {
        ensure!(
            self.status == 0,
            "vmsnap ended with {}: {}",
            self.status,
            self.said
        );
        self.events.first().context("it wrote nothing")
    }

    /// Id of the run.
    ///
    /// # Errors
    /// When there was none.
    pub fn run_id(&self) -> Result<&str> {
        self.events
            .iter()
            .find_map(|event| event["workflow_id"].as_str())
            .context("no run")
    }
}
