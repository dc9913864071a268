//! Merges that end in the middle: QEMU or the agent killed, the run cancelled or
//! out of time. What is torn is known as torn until its delete is finished.

use std::{
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
use vmsnap_tests::{Agent, Blank, BlankSpec, Domain, Lab, command, eventually};

use super::{MIB, healths, reason, refused, still, virsh_external};

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
        for (snapshot, health) in self.agent.healths(&self.domain.name)? {
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
            self.agent
                .healths(&self.domain.name)?
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
    // 40 MiB at 2 MiB a second would take twenty seconds.
    let began = Instant::now();
    let words = [
        "commit",
        name,
        "--all",
        "--bandwidth",
        "2M",
        "--timeout",
        "5s",
    ];
    let stopped = agent.vmsnap(&words)?;
    let took = began.elapsed();
    assert!(
        (Duration::from_secs(5)..Duration::from_secs(18)).contains(&took),
        "{took:?}"
    );
    assert_eq!(stopped.failure()?["reason"], "TIMED_OUT");
    assert_eq!(stopped.outcome()?["state"], "cancelled");
    assert!(stopped.warned("LIMIT_LIFTED"));
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
        // To its end, the second one would take twenty seconds.
        assert!(began.elapsed() < Duration::from_secs(15));
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
