//! The journal's disk: full in the middle of a run, and its size over time.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use vmsnap_tests::{BlankSpec, Lab, command::run, eventually, fill};

use super::{LONG, MIB, NONE, SOON, cli, closed, newest, number, pausing, told};

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
