//! A long random walk: snapshots, reverts, commits and cleanups in any order on a
//! real domain, against a model of what each restore point must hold.
//!
//! After each step every listed snapshot's data and the present state equal the
//! model, a refusal has changed nothing, nothing failed inside libvirt that the
//! plan let through, and no file is left that nothing refers to.
//!
//! `VMSNAP_WALK_STEPS` makes it longer, `VMSNAP_WALK_SEED` repeats one, or takes a
//! new one with `new`.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use vmsnap_tests::{Agent, Blank, BlankSpec, Lab, command, domain::data_of};

/// Where a walk goes unless told otherwise.
const SEED: u64 = 8_098_710_831_100_342_620;
/// Steps of each walk unless told otherwise.
const STEPS: usize = 100;
/// Disks of the domain.
const DISKS: [&str; 2] = ["vda", "vdb"];
/// Regions of each disk that are written and compared.
const REGIONS: usize = 6;
/// Bytes of a region; one cluster, so that overlays share and split them.
const REGION: u64 = 64 * 1024;
/// Distance of two regions.
const DISTANCE: u64 = 1024 * 1024;
/// Most snapshots at a time.
const SNAPSHOTS: usize = 7;

/// What the disks hold: a byte for each region of each disk.
type Content = [[u8; REGIONS]; DISKS.len()];

/// One restore point of the model.
#[derive(Debug, Clone)]
struct Point {
    parent: Option<String>,
    content: Content,
    protected: bool,
}

/// What must be true of the domain.
#[derive(Debug, Clone, Default)]
struct Model {
    points: BTreeMap<String, Point>,
    current: Option<String>,
    present: Content,
}

impl Model {
    /// A point is gone: its children hang on its parent.
    fn remove(&mut self, name: &str) {
        let Some(gone) = self.points.remove(name) else {
            return;
        };
        for point in self.points.values_mut() {
            if point.parent.as_deref() == Some(name) {
                point.parent.clone_from(&gone.parent);
            }
        }
        if self.current.as_deref() == Some(name) {
            self.current = gone.parent;
        }
    }

    fn children(&self, name: &str) -> BTreeSet<String> {
        self.points
            .iter()
            .filter(|(_, point)| point.parent.as_deref() == Some(name))
            .map(|(child, _)| child.clone())
            .collect()
    }

    fn descendants(&self, name: &str) -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        let mut next = self.children(name);
        while let Some(one) = next.pop_first() {
            next.extend(self.children(&one));
            all.insert(one);
        }
        all
    }

    /// From the current point up to its root.
    fn active_path(&self) -> Vec<String> {
        let mut path = Vec::new();
        let mut next = self.current.clone();
        while let Some(name) = next {
            next = self.points[&name].parent.clone();
            path.push(name);
        }
        path
    }
}

/// An image with what it must hold.
struct Held {
    what: String,
    image: PathBuf,
    format: &'static str,
    content: [u8; REGIONS],
}

struct Walk {
    lab: Lab,
    domain: Blank,
    agent: Agent,
    kind: &'static str,
    model: Model,
    random: fastrand::Rng,
    next: u32,
    refused: BTreeMap<String, u32>,
}

impl Walk {
    fn begin(kind: &'static str, seed: u64) -> Result<Self> {
        let lab = Lab::from_env()?;
        let domain = lab.blank(&BlankSpec {
            disks: vec![("vdb".into(), "qcow2".into(), false)],
            ..BlankSpec::default()
        })?;
        let agent = lab.agent("")?;
        Ok(Self {
            lab,
            domain,
            agent,
            kind,
            model: Model::default(),
            random: fastrand::Rng::with_seed(seed),
            next: 0,
            refused: BTreeMap::new(),
        })
    }

    fn any_point(&mut self) -> Option<String> {
        let names: Vec<&String> = self.model.points.keys().collect();
        (!names.is_empty()).then(|| names[self.random.usize(..names.len())].clone())
    }

    /// One step; what was done, for the report of a failure.
    fn step(&mut self) -> Result<String> {
        match self.random.u32(..100) {
            0..25 => self.write(),
            25..52 => self.create(),
            52..70 => self.revert(),
            70..76 => self.commit(),
            76..92 => self.cleanup(),
            92..95 => self.policy(),
            _ => self.power(),
        }
    }

    fn write(&mut self) -> Result<String> {
        let (disk, region) = (
            self.random.usize(..DISKS.len()),
            self.random.usize(..REGIONS),
        );
        let byte = self.random.u8(1..);
        self.domain
            .write_pattern(DISKS[disk], byte, region as u64 * DISTANCE, REGION)?;
        self.model.present[disk][region] = byte;
        Ok(format!("write {} {region} {byte}", DISKS[disk]))
    }

    fn create(&mut self) -> Result<String> {
        if self.model.points.len() >= SNAPSHOTS {
            return self.cleanup();
        }
        self.next += 1;
        let name = format!("n{}", self.next);
        let vm = self.domain.name.clone();
        let mut words = vec!["create", &vm, &name, "--kind", self.kind];
        let memory = self.domain.state()? == "running" && self.random.u32(..6) == 0;
        if memory {
            words.push("--memory");
        }
        let protected = self.random.u32(..8) == 0;
        if protected {
            words.push("--protected");
        }
        if self.run(&words)?.is_some() {
            let point = Point {
                parent: self.model.current.clone(),
                content: self.model.present,
                protected,
            };
            self.model.points.insert(name.clone(), point);
            self.model.current = Some(name.clone());
        }
        Ok(words.join(" "))
    }

    fn revert(&mut self) -> Result<String> {
        let Some(name) = self.any_point() else {
            return self.write();
        };
        let vm = self.domain.name.clone();
        let state = ["auto", "running", "stopped", "paused"][self.random.usize(..4)];
        let mut words = vec!["revert", &vm, &name, "--state-after", state];
        let safe = self.model.points.len() < SNAPSHOTS && self.random.u32(..6) == 0;
        if safe {
            words.push("--safety-snapshot");
        }
        // Counts for those with memory.
        if self.kind == "external" && self.random.u32(..2) == 0 {
            words.push("--disks-only");
        }
        if let Some(result) = self.run(&words)? {
            if safe {
                let safety = result["safety_snapshot"]
                    .as_str()
                    .context("the name of the safety snapshot")?;
                let point = Point {
                    parent: self.model.current.clone(),
                    content: self.model.present,
                    protected: false,
                };
                self.model.points.insert(safety.to_owned(), point);
            }
            self.model.present = self.model.points[&name].content;
            self.model.current = Some(name.clone());
            if state != "auto" {
                let expected = if state == "stopped" {
                    "shut off"
                } else {
                    state
                };
                assert_eq!(self.domain.state()?, expected, "after {}", words.join(" "));
            }
        }
        Ok(words.join(" "))
    }

    fn commit(&mut self) -> Result<String> {
        let vm = self.domain.name.clone();
        let path = self.model.active_path();
        if path.is_empty() {
            return self.write();
        }
        let (words, expected) = if self.random.u32(..4) == 0 {
            (vec!["commit", &vm, "--all"], path)
        } else {
            let at = self.random.usize(..path.len());
            (vec!["commit", &vm, path[at].as_str()], path[..=at].to_vec())
        };
        let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
        self.removing(&words, &expected.into_iter().collect())?;
        Ok(words.join(" "))
    }

    fn cleanup(&mut self) -> Result<String> {
        let Some(name) = self.any_point() else {
            return self.write();
        };
        let children = ["keep", "keep", "keep", "delete", "only"][self.random.usize(..5)];
        let mut expected = self.model.descendants(&name);
        match children {
            "keep" => expected = BTreeSet::from([name.clone()]),
            "delete" => {
                expected.insert(name.clone());
            }
            _ => {}
        }
        let words: Vec<String> = ["cleanup", &self.domain.name, &name, "--children", children]
            .map(str::to_owned)
            .to_vec();
        self.removing(&words, &expected)?;
        Ok(words.join(" "))
    }

    fn policy(&mut self) -> Result<String> {
        let keep = self.random.u32(1..4).to_string();
        let words: Vec<String> = ["cleanup", &self.domain.name, "--keep-last", &keep]
            .map(str::to_owned)
            .to_vec();
        let before = self.model.points.clone();
        let arguments: Vec<&str> = words.iter().map(String::as_str).collect();
        if let Some(result) = self.run(&arguments)? {
            for name in removed(&result) {
                let point = &before[&name];
                ensure!(!point.protected, "a policy removed the protected {name}");
                ensure!(
                    self.model.current.as_ref() != Some(&name),
                    "a policy removed the current {name}"
                );
                ensure!(
                    !name.starts_with("safety"),
                    "a policy removed the safety snapshot {name}"
                );
                self.model.remove(&name);
            }
        }
        Ok(words.join(" "))
    }

    fn power(&mut self) -> Result<String> {
        let verb = match self.domain.state()?.as_str() {
            "running" => ["destroy", "suspend"][self.random.usize(..2)],
            "paused" => "resume",
            _ => "start",
        };
        self.domain.virsh(verb, &[])?;
        Ok(verb.to_owned())
    }

    /// A run that removes exactly `expected`, or is refused and removes nothing.
    fn removing(&mut self, words: &[String], expected: &BTreeSet<String>) -> Result<()> {
        let arguments: Vec<&str> = words.iter().map(String::as_str).collect();
        if let Some(result) = self.run(&arguments)? {
            let gone: BTreeSet<String> = removed(&result).into_iter().collect();
            ensure!(
                gone == *expected,
                "{} removed {gone:?} and not {expected:?}",
                words.join(" ")
            );
            for name in &gone {
                self.model.remove(name);
            }
        }
        Ok(())
    }

    /// Runs the command line; `None` when it was refused beforehand.
    fn run(&mut self, words: &[&str]) -> Result<Option<Value>> {
        let state = self.domain.state()?;
        let made = self.agent.vmsnap(words)?;
        if made.status == 0 {
            return Ok(Some(made.result()?.clone()));
        }
        let failure = made.failure()?;
        let reason = failure["reason"].as_str().unwrap_or_default().to_owned();
        // Only a refusal is allowed: what fails in the middle was not foreseen.
        ensure!(
            ["SNAPSHOT_BRANCHES", "SNAPSHOT_PROTECTED", "CHAIN_TOO_DEEP"]
                .contains(&reason.as_str()),
            "'{}' failed: {failure}",
            words.join(" ")
        );
        assert_eq!(self.domain.state()?, state, "a refusal changed the state");
        *self.refused.entry(reason).or_default() += 1;
        Ok(None)
    }

    /// Holds the domain against the model.
    fn check(&self) -> Result<()> {
        let listed: BTreeSet<String> = self.domain.snapshots()?.into_iter().collect();
        let expected: BTreeSet<String> = self.model.points.keys().cloned().collect();
        ensure!(
            listed == expected,
            "virsh lists {listed:?} and not {expected:?}"
        );
        let mut referred: BTreeSet<PathBuf> = BTreeSet::new();
        let mut whose = String::new();
        let mut chains = BTreeMap::new();
        let mut images = Vec::new();
        for (at, target) in DISKS.iter().enumerate() {
            let active = PathBuf::from(self.domain.disk(target)?);
            referred.extend(self.chain(&active, &mut chains)?);
            images.push(Held {
                what: format!("the present state of {target}"),
                image: active,
                format: "qcow2",
                content: self.model.present[at],
            });
        }
        for (name, xml) in self.domain.definitions(&listed)? {
            let point = &self.model.points[&name];
            let document = roxmltree::Document::parse(&xml)?;
            for (at, target) in DISKS.iter().enumerate() {
                let data = data_of(&document, target)
                    .with_context(|| format!("snapshot {name} names no data of {target}"))?;
                let chain = self.chain(&data, &mut chains)?;
                let names: Vec<_> = chain.iter().filter_map(|path| path.file_name()).collect();
                let _ = writeln!(whose, "{name} {target}: {names:?}");
                referred.extend(chain);
                let (image, format) = if self.kind == "internal" {
                    (self.copy_of(&data, &name, target)?, "raw")
                } else {
                    (data, "qcow2")
                };
                images.push(Held {
                    what: format!("snapshot {name}, disk {target}"),
                    image,
                    format,
                    content: point.content[at],
                });
            }
            referred.extend(
                document
                    .descendants()
                    .filter(|node| node.has_tag_name("memory"))
                    .filter_map(|node| node.attribute("file"))
                    .map(PathBuf::from),
            );
        }
        self.hold(&images)?;
        for copy in images.iter().filter(|held| held.format == "raw") {
            fs::remove_file(&copy.image)?;
        }
        let referred: BTreeSet<String> = referred
            .iter()
            .filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
            .collect();
        let files: BTreeSet<String> = self.domain.files()?.into_iter().collect();
        ensure!(
            files == referred,
            "nothing refers to {:?}, and {:?} are missing; snapshots stand on\n{whose}",
            files.difference(&referred),
            referred.difference(&files)
        );
        Ok(())
    }

    /// An internal snapshot is read through a copy.
    fn copy_of(&self, image: &Path, name: &str, target: &str) -> Result<PathBuf> {
        let copy = self.agent.folder().join(format!("{name}-{target}.raw"));
        let mut convert = self.lab.command("qemu-img");
        convert
            .args(["convert", "-U", "-l"])
            .arg(format!("snapshot.name={name}"))
            .args(["-O", "raw"])
            .args([image, &copy]);
        command::succeed(&mut convert)?;
        Ok(copy)
    }

    /// Requires that images hold the bytes that they must, seen through their chains:
    /// all of them by one qemu-io, as starting it takes longer than what it reads.
    fn hold(&self, images: &[Held]) -> Result<()> {
        let all = self.read(images)?;
        if all.is_none() {
            return Ok(());
        }
        // Which of them it was.
        for image in images {
            if let Some(problem) = self.read(std::slice::from_ref(image))? {
                bail!("{}: {problem}", image.what);
            }
        }
        bail!("read together, and no more one by one: {all:?}")
    }

    /// What is wrong with the bytes that images hold.
    fn read(&self, images: &[Held]) -> Result<Option<String>> {
        let mut command = self.lab.command("qemu-io");
        for held in images {
            let (format, image) = (held.format, held.image.display());
            command.args(["-c", &format!("open -r -U -o driver={format} {image}")]);
            for (at, byte) in held.content.iter().enumerate() {
                let offset = at as u64 * DISTANCE;
                command.args(["-c", &format!("read -P {byte} {offset} {REGION}")]);
            }
            command.args(["-c", "close"]);
        }
        let output = command::run(&mut command, None, command::DEADLINE)?;
        let said = format!("{}{}", output.text(), output.complaint());
        let read = said
            .matches(&format!("read {REGION}/{REGION} bytes"))
            .count();
        let failed = output.status != 0 || said.contains("failed");
        Ok((failed || read != images.len() * REGIONS).then_some(said))
    }

    /// The files of an image's chain, from itself on; `known` are those of each image
    /// that was looked at already.
    fn chain(
        &self,
        image: &Path,
        known: &mut BTreeMap<PathBuf, Vec<PathBuf>>,
    ) -> Result<Vec<PathBuf>> {
        if let Some(chain) = known.get(image) {
            return Ok(chain.clone());
        }
        let mut command = self.lab.command("qemu-img");
        command
            .args(["info", "-U", "--backing-chain", "--output=json"])
            .arg(image);
        let chain: Vec<Value> = serde_json::from_str(&command::succeed(&mut command)?)?;
        let chain: Vec<PathBuf> = chain
            .iter()
            .filter_map(|image| image["filename"].as_str().map(PathBuf::from))
            .collect();
        for (at, image) in chain.iter().enumerate() {
            known.insert(image.clone(), chain[at..].to_vec());
        }
        Ok(chain)
    }
}

/// Names of the snapshots that a run removed.
fn removed(result: &Value) -> Vec<String> {
    result["verdicts"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|verdict| verdict["removed"] == true && verdict["what"] == "snapshot")
        .filter_map(|verdict| verdict["name"].as_str().map(str::to_owned))
        .collect()
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok()?.parse().ok()
}

#[expect(
    clippy::print_stdout,
    reason = "the walk's figures, for who asks nextest for them"
)]
fn walk(kind: &'static str) -> Result<()> {
    // The same walk in every test run, so that a change of its result is the
    // product's; `cargo xtask soak` walks new ones.
    let seed = match env::var("VMSNAP_WALK_SEED").as_deref() {
        Ok("new") => fastrand::u64(..),
        _ => number("VMSNAP_WALK_SEED").unwrap_or(SEED),
    };
    let steps = number("VMSNAP_WALK_STEPS").map_or(STEPS, |steps| steps as usize);
    let mut walk = Walk::begin(kind, seed)?;
    let mut done: Vec<String> = Vec::new();
    for at in 0..steps {
        let stepped = walk.step();
        let checked = stepped.and_then(|said| {
            done.push(said);
            walk.check()
        });
        checked.with_context(|| {
            let log = walk.agent.log();
            let last = log.rfind("run begins").unwrap_or_default();
            format!(
                "step {at} of the walk with VMSNAP_WALK_SEED={seed}, after:\n{}\nthe agent said:\n{}",
                done[done.len().saturating_sub(25)..].join("\n"),
                log[last..].lines().take(40).collect::<Vec<_>>().join("\n")
            )
        })?;
    }
    for target in DISKS {
        walk.domain.check(target)?;
    }
    println!("{steps} steps; refused: {:?}", walk.refused);
    Ok(())
}

#[test]
fn a_random_walk_over_external_snapshots_keeps_every_restore_point_and_leaves_no_file() -> Result<()>
{
    walk("external")
}

#[test]
fn a_random_walk_over_internal_snapshots_keeps_every_restore_point_and_leaves_no_file() -> Result<()>
{
    walk("internal")
}
