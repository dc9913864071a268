//! What is left of a run, by virsh, qemu-img and qemu-io, against the model.

use std::{collections::BTreeSet, fs, path::Path, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{Lab, command::Output, domain::data_of};

use super::stage::{Stage, words};

/// What is written of a disk for each point in time.
pub(super) const PART: u64 = 65_536;
/// Points in time that a disk can tell apart.
const EPOCHS: u64 = 6;

impl Stage<'_> {
    /// What is wrong afterwards.
    pub(super) fn judged(&self, output: &Output) -> Result<Vec<String>> {
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
        let definitions = domain.definitions(&found)?;
        let mut torn = false;
        for (snapshot, definition) in &definitions {
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
                if let Err(problem) = self.snapshot_holds(snapshot, definition, disk, epoch) {
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
        wrong.extend(self.files_wrong(&definitions)?);
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
    fn files_wrong(&self, snapshots: &[(String, String)]) -> Result<Vec<String>> {
        let domain = self.domain;
        let mut used: BTreeSet<String> = BTreeSet::new();
        let mut roots = Vec::new();
        for disk in self.disks() {
            used.extend(domain.chain(disk)?);
        }
        for (_, definition) in snapshots {
            let document = roxmltree::Document::parse(definition)?;
            for disk in self.disks() {
                roots.extend(data_of(&document, disk));
            }
            let memory = document
                .descendants()
                .filter(|node| node.has_tag_name("memory"));
            used.extend(
                memory
                    .filter_map(|node| node.attribute("file"))
                    .filter_map(file_name),
            );
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
        let left = domain
            .files()?
            .into_iter()
            .filter(|file| !used.contains(file));
        Ok(left
            .map(|file| format!("nothing refers to {file}"))
            .collect())
    }

    fn snapshot_holds(
        &self,
        snapshot: &str,
        definition: &str,
        disk: &str,
        epoch: u8,
    ) -> Result<()> {
        if self.scenario.guest {
            return Ok(());
        }
        let lab = &self.domain.lab;
        let held = if definition.contains("snapshot='internal'") {
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
            let document = roxmltree::Document::parse(definition)?;
            let data = data_of(&document, disk)
                .with_context(|| format!("snapshot {snapshot} names no data of {disk}"))?;
            parts(lab, &data, "qcow2")?
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
