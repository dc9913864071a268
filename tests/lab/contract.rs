//! The contract: whatever breaks in the middle of a run, the guest runs, is
//! thawed, its disks are whole, and the run can be read back.
//!
//! Each scenario runs once without faults, which tells how many records it writes
//! and which effects it makes; then once for every place at which it can break
//! (a *cell*). What is left is judged by virsh, qemu-img and qemu-io against a
//! model of what every snapshot holds.
//!
//! Invariant: a place that a run did not come to is a failed cell, not a passed
//! one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    Agent, BlankSpec, Domain, Lab, OwnedLab,
    command::{Output, run},
    wait::{eventually, eventually_some},
};

/// How long one run, recovery or end of a late call may take.
const LONG: Duration = Duration::from_secs(90);
/// Seconds that effects and releases may take in a broken run.
const DEADLINE: u32 = 2;
/// Milliseconds by which a late effect is late: past its deadline, and past the
/// two seconds for which the next call waits.
const LATE: u32 = 5000;
/// What is written of a disk for each point in time.
const PART: u64 = 65_536;
/// Points in time that a disk can tell apart.
const EPOCHS: u64 = 6;

/// What is run and what it may do.
struct Scenario {
    name: &'static str,
    /// On a guest with an agent.
    guest: bool,
    /// On a domain that is off.
    stopped: bool,
    /// Snapshots before it, with what makes them beside the name.
    before: &'static [&'static str],
    making: &'static [&'static str],
    /// The command; `VM` is the domain.
    action: &'static [&'static str],
    /// The snapshot that it makes.
    makes: Option<&'static str>,
    /// Those that it may take away.
    drops: &'static [&'static str],
}

const PLAIN: Scenario = Scenario {
    name: "",
    guest: false,
    stopped: false,
    before: &[],
    making: &["--consistency", "crash"],
    action: &[],
    makes: Some("new"),
    drops: &[],
};

const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "create frozen",
        guest: true,
        action: &["create", "VM", "new", "--consistency", "filesystem"],
        ..PLAIN
    },
    Scenario {
        name: "create suspended",
        action: &["create", "VM", "new", "--consistency", "suspend"],
        ..PLAIN
    },
    Scenario {
        name: "create crash",
        before: &["one"],
        action: &["create", "VM", "new", "--consistency", "crash"],
        ..PLAIN
    },
    Scenario {
        name: "create memory",
        action: &["create", "VM", "new", "--memory"],
        ..PLAIN
    },
    Scenario {
        name: "create internal",
        action: &["create", "VM", "new", "--kind", "internal"],
        ..PLAIN
    },
    Scenario {
        name: "create stopped",
        stopped: true,
        making: &[],
        action: &["create", "VM", "new"],
        ..PLAIN
    },
    Scenario {
        name: "create guarded",
        action: &["create", "VM", "new", "--revert-unless-confirmed", "1h"],
        ..PLAIN
    },
    Scenario {
        name: "revert disk-only",
        before: &["one", "two"],
        action: &["revert", "VM", "one"],
        makes: None,
        ..PLAIN
    },
    Scenario {
        name: "revert memory",
        before: &["one"],
        making: &["--memory"],
        action: &["revert", "VM", "one"],
        makes: None,
        ..PLAIN
    },
    Scenario {
        name: "revert disks alone",
        before: &["one", "two"],
        making: &["--memory"],
        action: &["revert", "VM", "one", "--disks-only"],
        makes: None,
        ..PLAIN
    },
    Scenario {
        name: "revert internal",
        before: &["one"],
        making: &["--kind", "internal"],
        action: &["revert", "VM", "one"],
        makes: None,
        ..PLAIN
    },
    Scenario {
        name: "revert stopped",
        stopped: true,
        before: &["one"],
        making: &[],
        action: &["revert", "VM", "one"],
        makes: None,
        ..PLAIN
    },
    Scenario {
        name: "revert with safety",
        before: &["one"],
        action: &["revert", "VM", "one", "--safety-snapshot"],
        makes: None,
        ..PLAIN
    },
    Scenario {
        name: "commit running",
        before: &["one", "two"],
        action: &["commit", "VM", "one"],
        makes: None,
        drops: &["one", "two"],
        ..PLAIN
    },
    Scenario {
        name: "commit stopped",
        stopped: true,
        before: &["one"],
        making: &[],
        action: &["commit", "VM", "--all"],
        makes: None,
        drops: &["one"],
        ..PLAIN
    },
    Scenario {
        name: "cleanup",
        before: &["one", "two", "three"],
        action: &["cleanup", "VM", "two"],
        makes: None,
        drops: &["two"],
        ..PLAIN
    },
    Scenario {
        name: "resize",
        action: &["commit", "VM", "--resize-to", "96M", "--resize-disk", "vda"],
        makes: None,
        ..PLAIN
    },
];

/// What breaks.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fault {
    /// The agent, right after this record.
    Record(u64),
    /// An effect, the so-manieth of its name.
    Effect(&'static str, String, usize),
}

impl Fault {
    fn column(&self) -> &'static str {
        match self {
            Self::Record(_) => "agent killed",
            Self::Effect(how, ..) => how,
        }
    }

    fn place(&self) -> String {
        match self {
            Self::Record(number) => format!("record {number}"),
            Self::Effect(_, operation, nth) => format!("'{operation}' ({})", nth + 1),
        }
    }

    fn variable(&self, libvirtd: Option<u32>) -> String {
        let (place, skip, value) = match self {
            Self::Record(number) => ("journal.record".to_owned(), number - 1, String::new()),
            Self::Effect(how, operation, nth) => {
                let value = match *how {
                    "fails before" => "before".to_owned(),
                    "fails after" => "after".to_owned(),
                    "lands late" => format!("late {LATE}"),
                    _ => format!("kill {} 5", libvirtd.unwrap_or_default()),
                };
                (
                    format!("effect.{}", operation.replace(' ', "_")),
                    *nth as u64,
                    value,
                )
            }
        };
        let before = if skip == 0 {
            String::new()
        } else {
            format!("{skip}*off->")
        };
        format!("{place}={before}1*return({value})->off")
    }
}

const COLUMNS: [&str; 5] = [
    "agent killed",
    "fails before",
    "fails after",
    "lands late",
    "libvirtd killed",
];

/// Which cells are run.
#[derive(Debug, Clone)]
pub struct Choice {
    /// One cell in so many, apart from those of holds and points of no return;
    /// 1 is all.
    pub one_in: usize,
    /// Which of them.
    pub seed: usize,
    /// Only scenarios whose name holds this.
    pub only: String,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    counts: BTreeMap<(usize, usize), (usize, usize)>,
    runs: usize,
    failures: Vec<String>,
    recoveries: Vec<Duration>,
}

impl Report {
    /// What failed, one a line.
    #[must_use]
    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    /// The matrix, the failures, the times of recovery and, as its last line,
    /// the counts.
    #[must_use]
    pub fn text(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::ASCII_MARKDOWN);
        table.set_header(std::iter::once("").chain(COLUMNS));
        for (row, scenario) in SCENARIOS.iter().enumerate() {
            let cell = |column| match self.counts.get(&(row, column)) {
                None => "-".to_owned(),
                Some((cells, 0)) => cells.to_string(),
                Some((cells, failed)) => format!("{cells}, {failed} FAILED"),
            };
            table.add_row(
                std::iter::once(scenario.name.to_owned()).chain((0..COLUMNS.len()).map(cell)),
            );
        }
        let mut lines = vec![table.to_string()];
        lines.extend(
            self.failures
                .iter()
                .map(|failure| format!("FAILED {failure}")),
        );
        let mut times = self.recoveries.clone();
        times.sort();
        if let (Some(middle), Some(longest)) = (times.get(times.len() / 2), times.last()) {
            lines.push(format!(
                "from the agent's start to the VM in its state again: median {} ms, longest {} ms, {} times",
                middle.as_millis(),
                longest.as_millis(),
                times.len()
            ));
        }
        let cells: usize = self.counts.values().map(|(cells, _)| cells).sum();
        lines.push(format!(
            "contract: {cells} cells, {} runs, {} failures",
            self.runs,
            self.failures.len()
        ));
        lines.join("\n")
    }
}

/// A run of a scenario, with its world.
struct Stage<'a> {
    scenario: &'a Scenario,
    domain: &'a Domain,
    agent: Agent,
    /// What each snapshot holds.
    model: BTreeMap<String, u8>,
    /// What the disks hold.
    now: u8,
}

fn words<'a>(words: &[&'a str], vm: &'a str) -> Vec<&'a str> {
    words
        .iter()
        .map(|word| if *word == "VM" { vm } else { word })
        .collect()
}

impl<'a> Stage<'a> {
    fn new(scenario: &'a Scenario, domain: &'a Domain) -> Result<Self> {
        let agent = domain.lab.agent("")?;
        let (model, now) = (BTreeMap::new(), 0);
        let mut stage = Self {
            scenario,
            domain,
            agent,
            model,
            now,
        };
        stage.next_epoch()?;
        for name in scenario.before {
            let mut words = vec!["create", &domain.name, name];
            words.extend(scenario.making);
            stage.agent.vmsnap(&words)?.result()?;
            stage.model.insert((*name).to_owned(), stage.now);
            stage.next_epoch()?;
        }
        Ok(stage)
    }

    fn disks(&self) -> &'static [&'static str] {
        if self.scenario.guest {
            &["vda"]
        } else {
            &["vda", "vdb"]
        }
    }

    fn next_epoch(&mut self) -> Result<()> {
        self.now += 1;
        if self.scenario.guest {
            return Ok(());
        }
        for disk in self.disks() {
            for part in [0, u64::from(self.now)] {
                self.domain
                    .write_pattern(disk, self.now, part * PART, PART)?;
            }
        }
        Ok(())
    }

    fn command(&self) -> Vec<&str> {
        words(self.scenario.action, &self.domain.name)
    }

    fn state(&self) -> &'static str {
        if self.scenario.stopped {
            "shut off"
        } else {
            "running"
        }
    }

    /// Breaks the run at a place; gives what the caller was told and how long the
    /// recovery took.
    fn broken(
        &mut self,
        fault: &Fault,
        mut daemons: Option<&mut OwnedLab>,
    ) -> Result<(Output, Option<Duration>)> {
        self.agent.stop();
        let file = self.agent.folder().join("agent.toml");
        let text = fs::read_to_string(&file)?.replace(
            "[libvirt]\n",
            &format!("[libvirt]\neffect_timeout = {DEADLINE}\nrelease_timeout = {DEADLINE}\n"),
        );
        fs::write(&file, text)?;
        let libvirtd = daemons.as_ref().and_then(|lab| lab.libvirtd());
        self.agent.set_env("FAILPOINTS", &fault.variable(libvirtd));
        self.agent.start()?;
        self.agent.set_env("FAILPOINTS", "");
        let mut command = self.agent.cli(&self.command())?;
        let caller = thread::spawn(move || run(&mut command, None, LONG));
        let mut recovery = None;
        match fault {
            Fault::Record(_) => {
                eventually(LONG, "end of the agent", || {
                    self.agent.ended() || caller.is_finished()
                })?;
                ensure!(self.agent.ended(), "the run did not come to this place");
                let since = Instant::now();
                let (domain, wanted) = (self.domain.clone(), self.state());
                let seen = thread::spawn(move || {
                    eventually_some(LONG, "VM in its state again", || {
                        Ok((domain.state()? == wanted).then(|| since.elapsed()))
                    })
                });
                self.agent.start()?;
                let seen = seen
                    .join()
                    .map_err(|_| anyhow::anyhow!("the watcher panicked"))?;
                recovery = Some(seen.context("after recovery")?);
            }
            Fault::Effect(..) => {
                if let Some(lab) = daemons.as_mut() {
                    eventually(LONG, "end of libvirtd", || {
                        lab.libvirtd_ended() || caller.is_finished()
                    })?;
                    ensure!(lab.libvirtd_ended(), "the run did not come to this place");
                    lab.start_libvirtd()?;
                }
            }
        }
        let output = caller
            .join()
            .map_err(|_| anyhow::anyhow!("the caller panicked"))??;
        ensure!(
            matches!(fault, Fault::Record(_)) || self.agent.log().contains("failpoint reached"),
            "the run did not come to this place"
        );
        if let Some(lab) = daemons {
            // libvirt 11.3 may crash by itself soon after it found half of a merge;
            // a service manager would start it again.
            thread::sleep(Duration::from_millis(500));
            if lab.libvirtd_ended() {
                lab.start_libvirtd()?;
            }
        }
        if let Fault::Effect("lands late", ..) = fault {
            // Whatever was late has landed then.
            thread::sleep(Duration::from_millis(u64::from(LATE)));
        }
        Ok((output, recovery))
    }

    /// What is wrong afterwards.
    fn judged(&self, output: &Output) -> Result<Vec<String>> {
        let (domain, name) = (self.domain, self.domain.name.as_str());
        let mut wrong = Vec::new();
        let log = self.agent.vmsnap(&["log", name])?;
        let runs = log.document()?["workflows"].as_array().context("runs")?;
        let ended = runs
            .first()
            .and_then(|run| run["state"].as_str())
            .unwrap_or("missing");
        let done = ended == "succeeded";
        if !done && ended != "failed" {
            wrong.push(format!("the run is {ended}"));
        }
        if (output.status == 0) != done {
            wrong.push(format!(
                "the run is {ended} and the caller ended with {}: {}",
                output.status,
                output.complaint()
            ));
        }
        let state = domain.state()?;
        if state != self.state() {
            wrong.push(format!("the VM is {state}, not {}", self.state()));
        }
        if self.scenario.guest {
            if domain.frozen()? {
                wrong.push("the guest is frozen".to_owned());
            }
            domain.lives().context("the guest")?;
        }
        // What the snapshots hold, and no others are there.
        let listed = self.agent.vmsnap(&["ls", name])?;
        let listed = listed.document()?["snapshots"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let found: BTreeSet<String> = domain.snapshots()?.into_iter().collect();
        let mut torn = false;
        for snapshot in &found {
            let known = self.model.contains_key(snapshot);
            let made = self.scenario.makes == Some(snapshot.as_str()) && done;
            let safety = snapshot.starts_with("safety-")
                && self.scenario.action.contains(&"--safety-snapshot");
            if !known && !made && !safety {
                wrong.push(format!(
                    "snapshot {snapshot} is there, and the run is {ended}"
                ));
                continue;
            }
            if done && self.scenario.drops.contains(&snapshot.as_str()) {
                wrong.push(format!(
                    "snapshot {snapshot} is still there, and the run is {ended}"
                ));
            }
            let epoch = self.model.get(snapshot).copied().unwrap_or(self.now);
            let health = listed.iter().find(|it| it["name"] == snapshot.as_str());
            let health = health
                .and_then(|it| it["health"].as_str())
                .unwrap_or("not listed");
            // A merge that was cut off has spoiled what was to go, and says so.
            if health == "torn" && self.scenario.drops.contains(&snapshot.as_str()) {
                torn = true;
                continue;
            }
            for disk in self.disks() {
                if let Err(problem) = self.snapshot_holds(snapshot, disk, epoch) {
                    wrong.push(format!("{problem:#}"));
                }
            }
            if health != "whole" {
                wrong.push(format!("vmsnap says that snapshot {snapshot} is {health}"));
            }
        }
        let lost = self
            .model
            .keys()
            .filter(|it| !self.scenario.drops.contains(&it.as_str()));
        for snapshot in lost.filter(|it| !found.contains(*it)) {
            wrong.push(format!("snapshot {snapshot} is gone"));
        }
        if let (Some(made), true) = (self.scenario.makes, done)
            && !found.contains(made)
        {
            wrong.push(format!("the run succeeded without snapshot {made}"));
        }
        wrong.extend(self.disks_wrong(done)?);
        wrong.extend(self.files_wrong(&found)?);
        if torn {
            let again = self.agent.vmsnap(&self.command())?;
            if again.status != 0 {
                wrong.push(format!(
                    "what was cut off cannot be finished: {}",
                    again.said
                ));
            }
            wrong.extend(self.disks_wrong(true)?);
        }
        // The next request works.
        let guarded = done && self.scenario.action.contains(&"--revert-unless-confirmed");
        let next: &[&[&str]] = if guarded {
            &[&["confirm", "VM"], &["create", "VM", "next"]]
        } else {
            &[&["create", "VM", "next"]]
        };
        for request in next {
            let next = self.agent.vmsnap(&words(request, name))?;
            if next.status != 0 {
                wrong.push(format!(
                    "the next request ended with {}: {}",
                    next.status, next.said
                ));
            }
        }
        Ok(wrong)
    }

    fn disks_wrong(&self, done: bool) -> Result<Vec<String>> {
        let domain = self.domain;
        let mut wrong = Vec::new();
        let back = (self.scenario.action[0] == "revert")
            .then(|| self.model.get(self.scenario.action[2]).copied())
            .flatten();
        for disk in self.disks() {
            // A guest may write while its image is read: only what stays is damage.
            let mut checked = domain.check(disk);
            for _ in 0..4 {
                if checked.is_err() {
                    thread::sleep(Duration::from_millis(300));
                    checked = domain.check(disk);
                }
            }
            if let Err(problem) = checked {
                wrong.push(format!("{disk} is damaged: {problem:#}"));
            }
            if !self.scenario.guest {
                let file = domain.disk(disk)?;
                let held = parts(&domain.lab, Path::new(&file), "qcow2")?;
                let may = match back {
                    Some(back) if done => vec![back],
                    Some(back) => vec![self.now, back],
                    None => vec![self.now],
                };
                if !may.iter().any(|epoch| held == expected(*epoch)) {
                    wrong.push(format!("{disk} holds {held:?}, not that of {may:?}"));
                }
            }
            if !self.scenario.stopped {
                let job = domain.virsh("blockjob", &[disk])?;
                if !job.trim().is_empty() {
                    wrong.push(format!("{disk} has an open block job: {}", job.trim()));
                }
            }
        }
        if !self.scenario.stopped && !domain.virsh("domjobinfo", &[])?.contains("None") {
            wrong.push("the VM has an open job".to_owned());
        }
        Ok(wrong)
    }

    /// Files of the domain that nothing refers to.
    fn files_wrong(&self, snapshots: &BTreeSet<String>) -> Result<Vec<String>> {
        let domain = self.domain;
        let mut used: BTreeSet<String> = BTreeSet::new();
        let mut roots = Vec::new();
        for disk in self.disks() {
            used.extend(domain.chain(disk)?);
            for snapshot in snapshots {
                roots.extend(domain.data(snapshot, disk));
            }
        }
        for root in roots {
            let shown = root.display().to_string();
            let text =
                domain
                    .lab
                    .qemu_img(["info", "-U", "--backing-chain", "--output=json", &shown])?;
            let images: Vec<Value> = serde_json::from_str(&text)?;
            let names = images.iter().filter_map(|image| image["filename"].as_str());
            used.extend(names.filter_map(file_name));
            domain
                .lab
                .qemu_img(["check", "-q", "-U", &shown])
                .or_else(|problem| {
                    // Leaks of an image in use are only what is not flushed yet.
                    let leaks = format!("{problem:#}").contains("status 3");
                    if leaks {
                        Ok(String::new())
                    } else {
                        Err(problem)
                    }
                })?;
        }
        for snapshot in snapshots {
            let xml = domain.virsh("snapshot-dumpxml", &[snapshot])?;
            let document = roxmltree::Document::parse(&xml)?;
            let memory = document
                .descendants()
                .filter(|node| node.has_tag_name("memory"));
            used.extend(
                memory
                    .filter_map(|node| node.attribute("file"))
                    .filter_map(file_name),
            );
        }
        let left = domain
            .files()?
            .into_iter()
            .filter(|file| !used.contains(file));
        Ok(left
            .map(|file| format!("nothing refers to {file}"))
            .collect())
    }

    fn snapshot_holds(&self, snapshot: &str, disk: &str, epoch: u8) -> Result<()> {
        if self.scenario.guest {
            return Ok(());
        }
        let lab = &self.domain.lab;
        let xml = self.domain.virsh("snapshot-dumpxml", &[snapshot])?;
        let held = if xml.contains("snapshot='internal'") {
            let image = self.domain.disk(disk)?;
            let copy = lab.folder.join(format!("{}.copy", self.domain.name));
            let shown = copy.display().to_string();
            let option = format!("snapshot.name={snapshot}");
            lab.qemu_img(["convert", "-U", "-O", "raw", "-l", &option, &image, &shown])
                .with_context(|| format!("snapshot {snapshot} has no data on {disk}"))?;
            let held = parts(lab, &copy, "raw");
            fs::remove_file(&copy)?;
            held?
        } else {
            parts(lab, &self.domain.data(snapshot, disk)?, "qcow2")?
        };
        let wanted = expected(epoch);
        ensure!(
            held == wanted,
            "snapshot {snapshot} holds {held:?} on {disk}, not {wanted:?}"
        );
        Ok(())
    }
}

fn file_name(path: &str) -> Option<String> {
    Some(Path::new(path).file_name()?.to_string_lossy().into_owned())
}

/// What a disk holds at an epoch, part by part.
fn expected(epoch: u8) -> Vec<u8> {
    let later = (1..EPOCHS).map(|part| {
        u8::try_from(part)
            .ok()
            .filter(|part| *part <= epoch)
            .unwrap_or_default()
    });
    std::iter::once(epoch).chain(later).collect()
}

/// The first byte of every part of an image, through its chain.
fn parts(lab: &Lab, file: &Path, format: &str) -> Result<Vec<u8>> {
    let mut command = lab.command("qemu-io");
    command.args(["-r", "-U", "-f", format]);
    for part in 0..EPOCHS {
        command.args(["-c", &format!("read -v {} 1", part * PART)]);
    }
    let said = crate::command::succeed(command.arg(file))?;
    let bytes: Vec<u8> = said
        .lines()
        .filter_map(|line| line.split_once(":  "))
        .filter_map(|(_, rest)| u8::from_str_radix(rest.get(..2)?, 16).ok())
        .collect();
    ensure!(
        bytes.len() as u64 == EPOCHS,
        "qemu-io says of {}: {said}",
        file.display()
    );
    Ok(bytes)
}

/// Runs a scenario on a domain of its own.
fn on_domain<T>(
    lab: &Lab,
    scenario: &Scenario,
    work: impl FnOnce(Stage<'_>) -> Result<T>,
) -> Result<T> {
    if scenario.guest {
        let guest = lab.guest()?;
        return work(Stage::new(scenario, &guest)?);
    }
    let blank = lab.blank(&BlankSpec {
        disks: vec![("vdb".to_owned(), "qcow2".to_owned(), false)],
        stopped: scenario.stopped,
        ..BlankSpec::default()
    })?;
    work(Stage::new(scenario, &blank)?)
}

/// The cells of a scenario, each with whether a hold or a point of no return
/// belongs to it.
fn learn(lab: &Lab, scenario: &Scenario) -> Result<Vec<(Fault, bool)>> {
    on_domain(lab, scenario, |stage| {
        let before = stage.agent.log().len();
        let made = stage.agent.vmsnap(&stage.command())?;
        made.result()?;
        let wrong = stage.judged(&Output {
            status: made.status,
            stdout: Vec::new(),
            stderr: Vec::new(),
        });
        let mut cells = Vec::new();
        let mut held = false;
        let mut last = 0;
        for event in &made.events {
            let number = event["sequence"].as_u64().unwrap_or_default();
            if number <= last {
                continue;
            }
            last = number;
            let kind = event["event"].as_str().unwrap_or_default();
            let step = event["name"].as_str().unwrap_or_default();
            let title = event["title"].as_str().unwrap_or_default();
            let edge = matches!(
                step,
                "freeze" | "suspend" | "revert" | "revert-disks" | "delete-snapshot" | "resize"
            ) || title.contains("delete")
                || title.contains("merge");
            held |= kind == "hold_taken";
            cells.push((Fault::Record(number), held || edge));
            held &= kind != "hold_released";
        }
        ensure!(
            last as usize == cells.len(),
            "the caller saw {} of {last} records",
            cells.len()
        );
        let log = stage.agent.log();
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        // The next request's effects come after this run's.
        let log = &log[before..];
        let log = log.split("run ends").next().unwrap_or(log);
        for line in log.lines().filter(|line| line.contains("effect begins")) {
            let operation = line
                .split("operation=\"")
                .nth(1)
                .and_then(|rest| rest.split('"').next());
            let operation = operation.context("the operation in the agent's log")?;
            let nth = counts.entry(operation.to_owned()).or_default();
            let edge = operation == "revert" || operation == "delete a snapshot of";
            for how in &COLUMNS[1..] {
                let always = edge && *how == "fails after";
                cells.push((Fault::Effect(how, operation.to_owned(), *nth), always));
            }
            *nth += 1;
        }
        let wrong = wrong?;
        ensure!(wrong.is_empty(), "without a fault: {}", wrong.join("; "));
        Ok(cells)
    })
}

/// Runs the chosen cells, two at a time.
///
/// # Errors
/// When a lab for libvirtd's end cannot be started.
pub fn run_contract(lab: &Lab, choice: &Choice) -> Result<Report> {
    let report = Mutex::new(Report::default());
    let queue = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    let put =
        |row: usize, fault: Option<&Fault>, result: Result<(Vec<String>, Option<Duration>)>| {
            let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
            report.runs += 1;
            let name = SCENARIOS[row].name;
            let place = fault.map_or("without a fault".to_owned(), |fault| {
                format!("{} at {}", fault.column(), fault.place())
            });
            let wrong = match result {
                Ok((wrong, recovery)) => {
                    report.recoveries.extend(recovery);
                    wrong.join("; ")
                }
                Err(problem) => format!("{problem:#}"),
            };
            if let Some(fault) = fault {
                let column = COLUMNS
                    .iter()
                    .position(|it| *it == fault.column())
                    .unwrap_or_default();
                let count = report.counts.entry((row, column)).or_default();
                count.0 += 1;
                count.1 += usize::from(!wrong.is_empty());
            }
            if !wrong.is_empty() {
                report.failures.push(format!("{name}: {place}: {wrong}"));
            }
        };
    let learner = || {
        loop {
            let row = next.fetch_add(1, Ordering::Relaxed);
            let Some(scenario) = SCENARIOS.get(row) else {
                break;
            };
            if !scenario.name.contains(&choice.only) {
                continue;
            }
            match learn(lab, scenario) {
                Ok(cells) => {
                    put(row, None, Ok((Vec::new(), None)));
                    let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
                    let mut killed = false;
                    for (at, (fault, always)) in cells.into_iter().enumerate() {
                        let daemon = fault.column() == "libvirtd killed";
                        // In the short forms libvirtd is killed once an action, in what is
                        // neither a hold nor on a guest.
                        let operation = match &fault {
                            Fault::Effect(_, operation, _) => operation.as_str(),
                            Fault::Record(_) => "",
                        };
                        let reads = operation == "refresh";
                        let hold = matches!(operation, "freeze" | "suspend" | "resume" | "thaw");
                        let short = choice.one_in > 1 && (killed || hold || scenario.guest);
                        if reads || daemon && short {
                            continue;
                        }
                        killed |= daemon;
                        if always || (at + row) % choice.one_in == choice.seed % choice.one_in {
                            queue.push((row, fault));
                        }
                    }
                }
                Err(problem) => put(row, None, Err(problem)),
            }
        }
    };
    thread::scope(|scope| {
        scope.spawn(learner);
        scope.spawn(learner);
    });
    let mut cells = queue.into_inner().unwrap_or_else(PoisonError::into_inner);
    cells.sort_by_key(|(row, fault)| (*row, fault.column() == "libvirtd killed"));
    let (daemon, cells): (Vec<_>, Vec<_>) = cells
        .into_iter()
        .partition(|(_, fault)| fault.column() == "libvirtd killed");
    let next = AtomicUsize::new(0);
    let worker = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some((row, fault)) = cells.get(at) else {
                break;
            };
            put(*row, Some(fault), cell(lab, &SCENARIOS[*row], fault, None));
        }
    };
    let last = || -> Result<()> {
        if !daemon.is_empty() {
            let guests = daemon.iter().any(|(row, _)| SCENARIOS[*row].guest);
            let mut own = OwnedLab::start(u32::from(guests))?;
            let lab = own.lab.clone();
            for (row, fault) in &daemon {
                let result = cell(&lab, &SCENARIOS[*row], fault, Some(&mut own));
                put(*row, Some(fault), result);
            }
        }
        worker();
        Ok(())
    };
    thread::scope(|scope| {
        scope.spawn(worker);
        last()
    })?;
    Ok(report.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn cell(
    lab: &Lab,
    scenario: &Scenario,
    fault: &Fault,
    daemons: Option<&mut OwnedLab>,
) -> Result<(Vec<String>, Option<Duration>)> {
    on_domain(lab, scenario, |mut stage| {
        let broken = stage.broken(fault, daemons);
        let judged = broken.and_then(|(output, recovery)| Ok((stage.judged(&output)?, recovery)));
        let (mut wrong, recovery) = match judged {
            Ok(judged) => judged,
            Err(problem) => (vec![format!("{problem:#}")], None),
        };
        if !wrong.is_empty() {
            let log = stage.agent.log();
            // The run that broke, and the one after it.
            let last = log.rfind("run begins").unwrap_or_default();
            let from = log[..last].rfind("run begins").unwrap_or(last);
            let tail: Vec<&str> = log[from..].lines().take(60).collect();
            wrong.push(format!("the agent said:\n{}", tail.join("\n")));
        }
        Ok((wrong, recovery))
    })
}
