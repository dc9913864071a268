//! The agent's callers: told when it is stopped, and a thousand of them at once.

use std::{
    fs,
    process::Child,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use vmsnap_proto::v1;
use vmsnap_tests::{Agent, Blank, BlankSpec, Lab, eventually};

use super::{MIB, SOON, closed, newest, start};

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
    let watching = runtime.block_on(watch(&tcp, &id, 1))?;
    let watching = runtime.spawn(rest_of(watching));
    let since = Instant::now();
    agent.signal(rustix::process::Signal::TERM);
    eventually(Duration::from_secs(20), "end of the agent", || {
        agent.ended()
    })?;
    // Two seconds for the run, five for streams, one for threads.
    ensure!(
        since.elapsed() < Duration::from_secs(15),
        "{:?}",
        since.elapsed()
    );
    let (sequences, status) = runtime.block_on(watching)?;
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

/// Watches a run from an event on; the numbers of its records, and the status that
/// ended the stream, if one did.
async fn raw_watch(tcp: &str, id: &str, from: u64) -> Result<(Vec<u64>, Option<tonic::Status>)> {
    Ok(rest_of(watch(tcp, id, from).await?).await)
}

/// The stream of a run from an event on; the agent has let the watcher in.
async fn watch(
    tcp: &str,
    id: &str,
    from: u64,
) -> Result<tonic::Streaming<v1::WatchWorkflowResponse>> {
    let mut stub = stub(tcp).await?;
    let request = v1::WatchWorkflowRequest {
        workflow_id: id.to_owned(),
        from_sequence: from,
    };
    Ok(stub.watch_workflow(request).await?.into_inner())
}

async fn rest_of(
    mut events: tonic::Streaming<v1::WatchWorkflowResponse>,
) -> (Vec<u64>, Option<tonic::Status>) {
    let mut seen = Vec::new();
    loop {
        match events.message().await {
            Ok(Some(message)) => seen.extend(numbered(message.event.as_ref())),
            Ok(None) => return (seen, None),
            Err(status) => return (seen, Some(status)),
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

#[test]
fn a_run_whose_caller_is_gone_before_it_began_is_driven_all_the_same() -> Result<()> {
    let lab = Lab::from_env()?;
    let mut agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    })?;
    agent.stop();
    let go = agent.folder().join("go");
    let wait = format!("journal.begin=1*return(wait {})->off", go.display());
    agent.set_env("FAILPOINTS", &wait);
    agent.start()?;
    let words = ["create", domain.name.as_str(), "s"];
    let caller = start(&agent, &words)?;
    eventually(SOON, "run", || agent.log().contains("failpoint reached"))?;
    end(caller)?;
    // The agent has heard of that.
    std::thread::sleep(Duration::from_secs(1));
    fs::write(go, "")?;
    closed(&agent, &domain.name, "succeeded")?;
    assert_eq!(domain.snapshots()?, ["s"]);
    Ok(())
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
    let domain = merging(&lab, &agent, 40)?;
    let tcp = agent.tcp()?;
    let mut stub = stub(&tcp).await?;
    let asked = v1::RunWorkflowRequest {
        spec: Some(merge_of(&domain.name)),
        ..Default::default()
    };
    let mut hurried = tonic::Request::new(asked.clone());
    let patience = Duration::from_secs(3);
    hurried.set_timeout(patience);
    let mut events = stub.run_workflow(hurried).await?.into_inner();
    let (mut id, mut seen) = (String::new(), Vec::new());
    // tonic's own timer ends with the first answer; the caller that hangs up does not.
    let hung_up = tokio::time::timeout(patience, async {
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
    assert!(domain.has_pattern("vda", 7, 0, 40 * MIB)?);
    Ok(())
}
