//! Nothing is left behind: a journal on a full disk, disks that fill up at any step,
//! guests whose agent hangs for ever, and callers that come, stay and go as they
//! please. virsh, qemu-img, the guest and /proc are the witnesses.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use vmsnap_proto::v1;
use vmsnap_tests::{
    Agent, Blank, BlankSpec, Cli, Domain, Lab,
    command::{Output, run, succeed},
    eventually, eventually_some, fill,
};

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

// --- the journal's disk -------------------------------------------------------

#[test]
fn a_full_journal_stops_a_run_before_its_next_effect_and_the_run_is_closed_once_there_is_room()
-> Result<()> {
    let lab = Lab::from_env()?;
    let small = lab.small(4)?;
    let mut agent = lab.agent("")?;
    let own = agent.folder().display().to_string();
    let there = small.folder.display().to_string();
    agent.reconfigure(
        &format!("path = \"{own}/journal.db\""),
        &format!("path = \"{there}/journal.db\""),
    )?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    let files = domain.files()?;
    let words = ["create", name, "s", "--consistency", "suspend"];
    // Where the records are, seen in a run that nothing happens to.
    agent.stop();
    agent.start()?;
    let whole = agent.vmsnap(&words)?;
    whole.result()?;
    agent.vmsnap(&["cleanup", name, "s"])?.result()?;
    let kinds: Vec<String> = whole
        .events
        .iter()
        .filter(|event| event["event"] != "step_progress" && event["event"] != "heartbeat")
        .map(|event| event["event"].as_str().unwrap_or_default().to_owned())
        .collect();
    let places: Vec<usize> = (1..kinds.len())
        .filter(|at| {
            matches!(
                kinds[*at].as_str(),
                "planned" | "step_started" | "hold_taken"
            )
        })
        .collect();
    ensure!(places.len() >= 4, "{kinds:?}");
    for (turn, place) in places.into_iter().enumerate() {
        // It stands still right after this record; the disk is full when it goes on.
        let go = pausing(&mut agent, place)?;
        let came = agent.log().matches("failpoint reached").count();
        let mut command = agent.cli(&words)?;
        let caller = std::thread::spawn(move || run(&mut command, None, LONG));
        eventually(SOON, "record", || {
            agent.log().matches("failpoint reached").count() > came
        })?;
        let filler = fill(&small.folder)?;
        fs::write(go, "")?;
        let output = caller
            .join()
            .map_err(|_| anyhow::anyhow!("the caller panicked"))??;
        let cut = cli(&output)?;
        let at = format!("after record {} ({})", place + 1, kinds[place]);
        assert_ne!(cut.status, 0, "{at}");
        let failure = told(&cut)?;
        assert_eq!(failure["reason"], "JOURNAL_UNAVAILABLE", "{at}: {failure}");
        assert!(number(&failure, "need_bytes")? > number(&failure, "free_bytes")?);
        assert_eq!(
            failure["metadata"]["path"],
            format!("{there}/journal.db"),
            "{at}"
        );
        // Still full, and the guest runs again all the same.
        eventually(SOON, "VM that runs", || {
            domain.state().is_ok_and(|state| state == "running")
        })
        .with_context(|| at.clone())?;
        let refused = agent.vmsnap(&["create", name, "t"])?;
        assert_eq!(told(&refused)?["reason"], "JOURNAL_UNAVAILABLE", "{at}");
        assert_eq!(newest(&agent, name)?["state"], "running", "{at}");
        if turn % 2 == 1 {
            // Also an agent that starts on a full disk lets go, and serves.
            agent.kill();
            agent.start()?;
            assert_eq!(domain.state()?, "running", "{at}");
            let refused = agent.vmsnap(&["create", name, "t"])?;
            assert_eq!(told(&refused)?["reason"], "JOURNAL_UNAVAILABLE", "{at}");
        }
        fs::remove_file(filler)?;
        let run = closed(&agent, name, "failed")?;
        let reason = run["failure"]["reason"].as_str().context("a reason")?;
        let wanted = match turn % 2 {
            1 => "INTERRUPTED",
            _ => "JOURNAL_UNAVAILABLE",
        };
        assert_eq!(reason, wanted, "{at}: {run}");
        assert_eq!(domain.state()?, "running", "{at}");
        assert_eq!(domain.snapshots()?, NONE, "{at}");
        assert_eq!(domain.files()?, files, "{at}");
        agent.vmsnap(&words)?.result().with_context(|| at.clone())?;
        agent.vmsnap(&["cleanup", name, "s"])?.result()?;
    }
    Ok(())
}

#[test]
fn the_journal_stays_small_while_the_agent_runs() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    agent.reconfigure("[journal]\n", "[journal]\nmax_mib = 1\n")?;
    let mut agent = agent;
    agent.stop();
    agent.start()?;
    let domain = lab.blank(&BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    agent.vmsnap(&["create", name, "kept"])?.result()?;
    let first = newest(&agent, name)?["id"].clone();
    let first = first.as_str().context("an id")?.to_owned();
    let journal = agent.folder().join("journal.db");
    // Each run keeps its plan and, here, what is in the pool.
    let mut gone = None;
    for _ in 0..40 {
        for _ in 0..10 {
            agent.vmsnap(&["commit", name])?.result()?;
        }
        let read = agent.vmsnap(&["log", &first])?;
        if read.status != 0 {
            gone = Some(told(&read)?);
            break;
        }
    }
    let gone = gone.context("the first run is never forgotten")?;
    assert_eq!(gone["reason"], "WORKFLOW_NOT_FOUND");
    eventually(SOON, "journal within its bounds", || {
        fs::metadata(&journal).is_ok_and(|file| file.len() < 2 * MIB)
    })?;
    // What is known of the snapshot outlives its run.
    let tree = agent.vmsnap(&["ls", name])?;
    let snapshot = &tree.document()?["snapshots"][0];
    assert_eq!(snapshot["name"], "kept");
    assert_eq!(snapshot["consistency"], "stopped");
    agent.vmsnap(&["cleanup", name, "kept"])?.result()?;
    assert_eq!(domain.files()?, [format!("{name}.qcow2")]);
    Ok(())
}

// --- the disks' disk ----------------------------------------------------------

/// An action that meets a full disk right before its effect.
struct Full {
    what: &'static str,
    effect: &'static str,
    /// Made before, with these words.
    before: &'static [&'static str],
    action: &'static [&'static str],
    /// It ends with the guest started anew from its disk.
    restarted: bool,
}

const FULL: &[Full] = &[
    Full {
        what: "disk-only snapshot",
        effect: "take_a_snapshot_of",
        before: &[],
        action: &["create", "VM", "new"],
        restarted: false,
    },
    Full {
        what: "snapshot with memory",
        effect: "take_a_snapshot_of",
        before: &[],
        action: &["create", "VM", "new", "--memory"],
        restarted: false,
    },
    Full {
        what: "internal snapshot",
        effect: "take_a_snapshot_of",
        before: &[],
        action: &["create", "VM", "new", "--kind", "internal"],
        restarted: false,
    },
    Full {
        what: "revert",
        effect: "revert",
        before: &["--consistency", "suspend"],
        action: &["revert", "VM", "old"],
        restarted: true,
    },
    Full {
        what: "revert to memory",
        effect: "revert",
        before: &["--memory"],
        action: &["revert", "VM", "old"],
        restarted: true,
    },
    Full {
        what: "commit",
        effect: "delete_a_snapshot_of",
        before: &["--consistency", "suspend"],
        action: &["commit", "VM", "old"],
        restarted: false,
    },
    Full {
        what: "limited commit",
        effect: "merge_a_disk_of",
        before: &["--consistency", "suspend"],
        action: &["commit", "VM", "old", "--bandwidth", "64M"],
        restarted: false,
    },
    Full {
        what: "cleanup",
        effect: "delete_a_snapshot_of",
        before: &["--consistency", "suspend"],
        action: &["cleanup", "VM", "old"],
        restarted: false,
    },
    Full {
        what: "resize",
        effect: "resize_a_disk_of",
        before: &[],
        action: &["commit", "VM", "--resize-to", "4T"],
        restarted: false,
    },
];

fn words<'a>(words: &[&'a str], vm: &'a str) -> Vec<&'a str> {
    words
        .iter()
        .map(|word| if *word == "VM" { vm } else { word })
        .collect()
}

fn meets_a_full_disk(lab: &Lab, agent: &Agent, case: &Full, folder: &Path) -> Result<()> {
    let domain: Blank = lab.blank(&BlankSpec {
        folder: Some(folder.to_owned()),
        disk_mib: 16,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    domain.write_pattern("vda", 7, 0, 4 * MIB)?;
    if !case.before.is_empty() {
        let mut making = vec!["create", name, "old"];
        making.extend(case.before);
        agent.vmsnap(&making)?.result()?;
        domain.write_pattern("vda", 8, 4 * MIB, 4 * MIB)?;
    }
    let reached = || {
        let effect = format!("operation=\"{}\"", case.effect.replace('_', " "));
        let log = agent.log();
        log.lines()
            .filter(|line| line.contains("failpoint reached") && line.contains(&effect))
            .count()
    };
    let before = reached();
    let (chain, snapshots, files) = (domain.chain("vda")?, domain.snapshots()?, domain.files()?);
    let pid = domain.pid()?;
    let mut command = agent.cli(&words(case.action, name))?;
    let caller = std::thread::spawn(move || run(&mut command, None, LONG));
    let came = eventually(SOON, "effect", || {
        reached() > before || caller.is_finished()
    });
    let filler = fill(folder)?;
    came?;
    let output = caller
        .join()
        .map_err(|_| anyhow::anyhow!("the caller panicked"))??;
    let cli = cli(&output)?;
    let failure = cli.failure()?;
    assert_eq!(failure["reason"], "NO_SPACE", "{failure}");
    assert_eq!(
        failure["metadata"]["path"],
        folder.display().to_string(),
        "{failure}"
    );
    ensure!(
        number(failure, "need_bytes")? > number(failure, "free_bytes")?,
        "{failure}"
    );
    // Nothing is lost, the guest runs, and nothing half-made is left.
    eventually(SOON, "VM that runs", || {
        domain.state().is_ok_and(|state| state == "running")
    })?;
    assert_eq!(domain.pid()? != pid, case.restarted);
    assert_eq!(domain.snapshots()?, snapshots);
    assert_eq!(domain.chain("vda")?, chain);
    assert_eq!(domain.files()?, files);
    assert!(domain.has_pattern("vda", 7, 0, 4 * MIB)?);
    if !case.before.is_empty() {
        assert!(domain.has_pattern("vda", 8, 4 * MIB, 4 * MIB)?);
    }
    if case.what == "internal snapshot" {
        assert!(cli.warned("IMAGE_GREW"), "{:?}", cli.events);
    }
    fs::remove_file(filler)?;
    let again = agent.vmsnap(&words(case.action, name))?;
    again.result()?;
    domain.check("vda")?;
    assert!(domain.has_pattern("vda", 7, 0, 4 * MIB)?);
    Ok(())
}

#[test]
fn a_disk_that_fills_up_right_before_an_effect_costs_nothing_but_the_run() -> Result<()> {
    let lab = Lab::from_env()?;
    let small = lab.small(96)?;
    let mut agent = lab.agent("")?;
    agent.stop();
    // Time to fill the disk between the last look at it and the effect.
    let effects: std::collections::BTreeSet<&str> = FULL.iter().map(|case| case.effect).collect();
    let late: Vec<String> = effects
        .iter()
        .map(|effect| format!("effect.{effect}=return(late 500)"))
        .collect();
    agent.set_env("FAILPOINTS", &late.join(";"));
    agent.start()?;
    for case in FULL {
        let result = meets_a_full_disk(&lab, &agent, case, &small.folder);
        let _ = fs::remove_file(small.folder.join("filler"));
        result.with_context(|| case.what.to_owned())?;
    }
    Ok(())
}

/// A boot sector that writes a sector of each next 64 KiB of its disk, for ever, by
/// the firmware's extended write (interrupt 13h, function 43h).
fn writing_boot_sector() -> Vec<u8> {
    let mut code = vec![
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0xbe, 0x40, 0x7c, // again: mov si, packet
        0xb8, 0x00, 0x43, // mov ax, 4300h
        0xb2, 0x80, // mov dl, 80h
        0xcd, 0x13, // int 13h
        0x66, 0x81, 0x06, 0x48, 0x7c, 0x80, 0x00, 0x00, 0x00, // add dword [packet + 8], 128
        0xeb, 0xeb, // jmp again
    ];
    code.resize(0x40, 0);
    // Sixteen bytes long, one sector, from 0000:7c00, to sector 128.
    code.extend([16, 0, 1, 0, 0x00, 0x7c, 0, 0, 128, 0, 0, 0, 0, 0, 0, 0]);
    code.resize(510, 0);
    code.extend([0x55, 0xaa]);
    code
}

#[test]
fn a_guest_that_qemu_stopped_for_lack_of_space_is_told_and_never_resumed() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let small = lab.small(8)?;
    let domain = lab.blank(&BlankSpec {
        folder: Some(small.folder.clone()),
        disk_mib: 64,
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    let sector = small.folder.join("sector");
    fs::write(&sector, writing_boot_sector())?;
    let disk = domain.disk("vda")?;
    let line = format!("write -s {} 0 512", sector.display());
    succeed(
        lab.command("qemu-io")
            .args(["-f", "qcow2", "-c", &line, &disk]),
    )?;
    domain.virsh("start", &[])?;
    eventually(LONG, "VM that QEMU stopped", || {
        domain.state().is_ok_and(|state| state == "paused")
    })?;
    assert!(
        domain
            .virsh("domstate", &["--reason"])?
            .contains("I/O error")
    );
    let vm = agent.vmsnap(&["show", name])?;
    assert_eq!(vm.document()?["state_reason"], "I/O error");
    // Neither a refusal nor a run makes it go on, also once there is room.
    let refused = agent.vmsnap(&["create", name, "s"])?;
    assert_eq!(refused.failure()?["reason"], "NO_SPACE");
    assert_eq!(domain.state()?, "paused");
    Ok(())
}

// --- guests that hang ---------------------------------------------------------

fn hook(guest: &Domain, line: &str) -> Result<()> {
    let script = format!(
        "printf '#!/bin/sh\\n{line}\\nexit 0\\n' > /run/freeze-hook; chmod +x /run/freeze-hook"
    );
    guest.exec(&script).map(drop)
}

fn settled(guest: &Domain) -> Result<()> {
    eventually(LONG, "guest that is thawed", || {
        guest.frozen().is_ok_and(|frozen| !frozen)
    })?;
    assert_eq!(guest.state()?, "running");
    guest.lives()
}

#[test]
fn a_freeze_that_lands_after_its_time_is_thawed_and_falls_back_or_fails_as_asked() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    // Only the freeze takes longer than it may; then it lands.
    hook(&guest, "[ $1 = freeze ] && sleep 5 && touch /run/landed")?;
    let since = Instant::now();
    let fell = agent.vmsnap(&["create", name, "s", "--freeze-timeout", "2s"])?;
    assert_eq!(fell.result()?["consistency"], "suspend");
    assert!(fell.warned("FREEZE_GAVE_UP"));
    // It waited for the freeze to land: before, nobody can be certain.
    assert!(since.elapsed() > Duration::from_secs(4));
    settled(&guest)?;
    assert_eq!(guest.exec("ls /run/landed")?.trim(), "/run/landed");
    let demand = [
        "create",
        name,
        "t",
        "--consistency",
        "filesystem",
        "--freeze-timeout",
        "2s",
    ];
    let failed = agent.vmsnap(&demand)?;
    assert_eq!(failed.failure()?["reason"], "GUEST_AGENT_UNAVAILABLE");
    settled(&guest)?;
    assert_eq!(guest.snapshots()?, ["s"]);
    Ok(())
}

#[test]
fn a_hook_that_refuses_the_freeze_is_quoted_and_the_guest_is_thawed() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    hook(&guest, "[ $1 = freeze ] && exit 3")?;
    let fell = agent.vmsnap(&["create", name, "s"])?;
    assert_eq!(fell.result()?["consistency"], "suspend");
    let gave_up = fell
        .all("warning")
        .find(|warning| warning["code"] == "FREEZE_GAVE_UP");
    let message = gave_up.context("a warning")?["message"].to_string();
    assert!(message.contains("hook"), "{message}");
    settled(&guest)?;
    let failed = agent.vmsnap(&["create", name, "t", "--consistency", "filesystem"])?;
    let failure = failed.failure()?;
    assert_eq!(failure["reason"], "GUEST_AGENT_FAILED");
    let message = failure["message"].as_str().unwrap_or_default();
    assert!(message.contains("hook"), "{message}");
    settled(&guest)?;
    assert_eq!(guest.snapshots()?, ["s"]);
    Ok(())
}

#[test]
fn a_guest_whose_agent_never_answers_again_leaves_its_run_stuck_until_somebody_resolves_it()
-> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, mut agent) = (lab.guest()?, lab.agent("[limits]\nstuck_after = 1\n")?);
    let name = guest.name.clone();
    // The freeze lands, and the agent stops right after it.
    hook(
        &guest,
        "[ $1 = freeze ] && { (sleep 1.5; kill -STOP $(pidof qemu-ga)) > /dev/null 2>&1 < /dev/null & }",
    )?;
    let words = ["create", name.as_str(), "s", "--consistency", "filesystem"];
    agent.stop();
    agent.set_env(
        "FAILPOINTS",
        "effect.take_a_snapshot_of=1*return(late 3000)->off",
    );
    agent.start()?;
    agent.set_env("FAILPOINTS", "");
    let stuck = agent.vmsnap(&words)?;
    assert_eq!(stuck.outcome()?["state"], "stuck", "{}", stuck.said);
    let failure = stuck.failure()?;
    assert_eq!(failure["reason"], "GUEST_AGENT_UNAVAILABLE");
    let message = failure["message"].as_str().unwrap_or_default();
    assert!(message.contains("may be frozen"), "{message}");
    assert!(agent.log().contains("a run is stuck"), "no alarm");
    // The next life of the agent raises the alarm again, and leaves the run stuck.
    agent.stop();
    agent.start()?;
    let alarms = agent.log().matches("a run is stuck").count();
    assert_eq!(alarms, 2);
    let id = stuck.run_id()?;
    assert_eq!(newest(&agent, &name)?["state"], "stuck");
    // Once the agent answers, the guest is thawed; that does not resolve the run.
    guest.ssh("kill -CONT $(pidof qemu-ga)")?;
    settled(&guest)?;
    assert_eq!(newest(&agent, &name)?["state"], "stuck");
    // Health tells of the run, and of the guest no more.
    eventually(LONG, "word that the guest was let go", || {
        let health = agent.vmsnap(&["health"]);
        health.is_ok_and(|health| {
            let problems = health.events[0]["problems"].as_array();
            problems.is_some_and(|all| all.len() == 1 && all[0]["kind"] == "run_stuck")
        })
    })?;
    agent
        .vmsnap(&["resolve", id, "--note", "the agent was continued"])?
        .document()?;
    assert_eq!(newest(&agent, &name)?["state"], "failed");
    let again = agent.vmsnap(&["resolve", id, "--note", "twice"])?;
    assert_eq!(told(&again)?["reason"], "WORKFLOW_STATE");
    Ok(())
}

// --- stopping -----------------------------------------------------------------

#[test]
fn sigterm_ends_in_bounded_time_and_tells_watchers_from_where_to_go_on() -> Result<()> {
    let lab = Lab::from_env()?;
    let mut agent = lab.agent("[limits]\nshutdown = 2\n")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.clone();
    agent.stop();
    // A step that cannot be stopped in the middle.
    agent.set_env(
        "FAILPOINTS",
        "effect.take_a_snapshot_of=1*return(late 20000)->off",
    );
    agent.start()?;
    agent.set_env("FAILPOINTS", "");
    let idle = std::net::TcpStream::connect(agent.tcp()?)?;
    let caller = start(&agent, &["create", &name, "s", "--consistency", "suspend"])?;
    eventually(SOON, "step", || agent.log().contains("failpoint reached"))?;
    let id = newest(&agent, &name)?["id"]
        .as_str()
        .context("an id")?
        .to_owned();
    let tcp = agent.tcp()?;
    let runtime = tokio::runtime::Runtime::new()?;
    let watching = {
        let id = id.clone();
        runtime.spawn(async move { raw_watch(&tcp, &id, 1).await })
    };
    std::thread::sleep(Duration::from_millis(500));
    let since = Instant::now();
    agent.signal(rustix::process::Signal::TERM);
    eventually(Duration::from_secs(20), "end of the agent", || {
        agent.ended()
    })?;
    // Two seconds for the run, five for streams, one for threads.
    ensure!(
        since.elapsed() < Duration::from_secs(10),
        "{:?}",
        since.elapsed()
    );
    let (sequences, status) = runtime.block_on(watching)??;
    let status = status.context("a watcher was cut off without a word")?;
    let failure = vmsnap_client::Failure::from(&status);
    assert_eq!(failure.reason, "SHUTTING_DOWN", "{status}");
    assert_eq!(failure.metadata["workflow_id"], id);
    let last = sequences.last().context("events")?;
    assert_eq!(failure.metadata["sequence"], last.to_string());
    drop(idle);
    end(caller)?;
    agent.start()?;
    let run = closed(&agent, &name, "failed")?;
    assert_eq!(run["failure"]["reason"], "INTERRUPTED");
    assert_eq!(domain.state()?, "running");
    // The rest can be read from where the watcher was.
    let rest = agent.vmsnap(&["watch", &id, "--from", &(last + 1).to_string()])?;
    assert_eq!(rest.events[0]["sequence"], *last + 1);
    assert_eq!(rest.outcome()?["state"], "failed");
    Ok(())
}

fn end(mut child: Child) -> Result<()> {
    child.kill()?;
    child.wait()?;
    Ok(())
}

// --- many callers -------------------------------------------------------------

/// Watches a run from an event on; the numbers of its records, and the status that
/// ended the stream, if one did.
async fn raw_watch(tcp: &str, id: &str, from: u64) -> Result<(Vec<u64>, Option<tonic::Status>)> {
    let mut stub = stub(tcp).await?;
    let request = v1::WatchWorkflowRequest {
        workflow_id: id.to_owned(),
        from_sequence: from,
    };
    let mut events = stub.watch_workflow(request).await?.into_inner();
    let mut seen = Vec::new();
    loop {
        match events.message().await {
            Ok(Some(message)) => seen.extend(numbered(message.event.as_ref())),
            Ok(None) => return Ok((seen, None)),
            Err(status) => return Ok((seen, Some(status))),
        }
    }
}

type Stub = v1::workflow_service_client::WorkflowServiceClient<tonic::transport::Channel>;

async fn stub(tcp: &str) -> Result<Stub> {
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{tcp}"))?
        .connect()
        .await?;
    Ok(Stub::new(channel))
}

/// The number of an event that is a record.
fn numbered(event: Option<&v1::WorkflowEvent>) -> Option<u64> {
    use v1::workflow_event::Kind;
    let event = event?;
    match event.kind {
        Some(Kind::Heartbeat(_) | Kind::StepProgress(_)) => None,
        _ => Some(event.sequence),
    }
}

/// Resident memory of a process in bytes.
fn memory(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("no VmRSS")?;
    let kib: u64 = line
        .split_whitespace()
        .next()
        .context("a number")?
        .parse()?;
    Ok(kib * 1024)
}

/// A domain with so many MiB to merge, below the snapshot `s`.
fn merging(lab: &Lab, agent: &Agent, mib: u64) -> Result<Blank> {
    let domain = lab.blank(&BlankSpec::default())?;
    agent.vmsnap(&["create", &domain.name, "s"])?.result()?;
    domain.write_pattern("vda", 7, 0, mib * MIB)?;
    Ok(domain)
}

fn merge_of(vm: &str) -> v1::WorkflowSpec {
    v1::WorkflowSpec {
        vm_name: vm.to_owned(),
        action: v1::Action::Commit as i32,
        snapshot_name: "s".to_owned(),
        commit: Some(v1::CommitOptions {
            bandwidth_bytes_per_second: 4 * MIB,
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_watchers_slow_no_run_and_those_that_do_not_read_cost_little() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("[limits]\nheartbeat = 1\nmax_streams_per_peer = 1100\n")?;
    let alone = merging(&lab, &agent, 24)?;
    let watched = merging(&lab, &agent, 24)?;
    let tcp = agent.tcp()?;
    let pid = agent.pid().context("its process")?;
    let mut own = stub(&tcp).await?;
    let run = |vm: &str| v1::RunWorkflowRequest {
        spec: Some(merge_of(vm)),
        ..Default::default()
    };
    let since = Instant::now();
    let mut events = own.run_workflow(run(&alone.name)).await?.into_inner();
    while events.message().await?.is_some() {}
    assert_eq!(newest(&agent, &alone.name)?["state"], "succeeded");
    let usual = since.elapsed();

    let before = memory(pid)?;
    let since = Instant::now();
    let mut events = own.run_workflow(run(&watched.name)).await?.into_inner();
    let first = events.message().await?.context("an event")?;
    let id = first.event.context("an event")?.workflow_id;
    let (mut readers, mut silent) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        let mut stub = stub(&tcp).await?;
        for number in 0..100 {
            let request = v1::WatchWorkflowRequest {
                workflow_id: id.clone(),
                from_sequence: 1,
            };
            let mut events = stub.watch_workflow(request).await?.into_inner();
            if number % 2 == 0 {
                // Never read, never given up.
                silent.push(events);
                continue;
            }
            readers.push(tokio::spawn(async move {
                let (mut seen, mut outcome) = (Vec::new(), false);
                while let Some(message) = events.message().await? {
                    let event = message.event.as_ref();
                    seen.extend(numbered(event));
                    outcome |= matches!(
                        event.and_then(|event| event.kind.as_ref()),
                        Some(v1::workflow_event::Kind::Outcome(_))
                    );
                }
                anyhow::Ok((seen, outcome))
            }));
        }
    }
    let mut last = 0;
    while let Some(message) = events.message().await? {
        last = numbered(message.event.as_ref()).unwrap_or(last);
    }
    let took = since.elapsed();
    // Opening a thousand streams costs two cores a moment, which is theirs as well.
    ensure!(
        took < usual * 2 + Duration::from_secs(3),
        "{took:?}, alone {usual:?}"
    );
    ensure!(last >= 4, "the run has {last} records");
    for reader in readers {
        let (seen, outcome) = reader.await??;
        ensure!(outcome && seen.iter().copied().eq(1..=last), "{seen:?}");
    }
    let grown = memory(pid)?.saturating_sub(before);
    ensure!(grown < 200 * MIB, "{grown} bytes for a thousand watchers");
    // Those who read late get all that matters, too.
    let mut late = silent.pop().context("a silent watcher")?;
    let mut seen = Vec::new();
    while let Some(message) = late.message().await? {
        seen.extend(numbered(message.event.as_ref()));
    }
    ensure!(seen.iter().copied().eq(1..=last), "{seen:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_the_watch_and_not_the_run_and_equal_requests_share_it() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = merging(&lab, &agent, 16)?;
    let tcp = agent.tcp()?;
    let mut stub = stub(&tcp).await?;
    let asked = v1::RunWorkflowRequest {
        spec: Some(merge_of(&domain.name)),
        ..Default::default()
    };
    let mut hurried = tonic::Request::new(asked.clone());
    hurried.set_timeout(Duration::from_millis(500));
    let mut events = stub.run_workflow(hurried).await?.into_inner();
    let (mut id, mut seen) = (String::new(), Vec::new());
    // tonic's own timer ends with the first answer; the caller that hangs up does not.
    let hung_up = tokio::time::timeout(Duration::from_millis(500), async {
        while let Some(message) = events.message().await? {
            seen.extend(numbered(message.event.as_ref()));
            id = message.event.unwrap_or_default().workflow_id;
        }
        anyhow::Ok(())
    });
    ensure!(
        hung_up.await.is_err(),
        "the run was over within its deadline"
    );
    drop(events);
    // An equal request joins; another one on that VM waits and is told for whom.
    let mut joined = stub.run_workflow(asked).await?.into_inner();
    let first = joined.message().await?.context("an event")?;
    ensure!(first.event.unwrap_or_default().workflow_id == id);
    let other = v1::WorkflowSpec {
        vm_name: domain.name.clone(),
        action: v1::Action::Create as i32,
        snapshot_name: "t".to_owned(),
        ..Default::default()
    };
    let other = v1::RunWorkflowRequest {
        spec: Some(other),
        ..Default::default()
    };
    let mut waiting = stub.run_workflow(other).await?.into_inner();
    let first = waiting.message().await?.context("an event")?;
    let kind = first.event.unwrap_or_default().kind;
    let Some(v1::workflow_event::Kind::Queued(queued)) = kind else {
        anyhow::bail!("it does not wait: {kind:?}");
    };
    ensure!(queued.behind_workflow_id == id);
    let next = seen.last().context("events")? + 1;
    let (rest, status) = raw_watch(&tcp, &id, next).await?;
    ensure!(status.is_none(), "{status:?}");
    seen.extend(rest);
    ensure!(seen.iter().copied().eq(1..=seen.len() as u64), "{seen:?}");
    while waiting.message().await?.is_some() {}
    assert_eq!(domain.snapshots()?, ["t"]);
    assert!(domain.has_pattern("vda", 7, 0, 16 * MIB)?);
    Ok(())
}
