//! What the client does when the connection to an agent breaks, against a
//! scripted agent behind a wire that can be cut.

mod scripted;
mod wire;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::net::UnixListener;
use vmsnap_client::{Client, ConnectOptions, Connection, Endpoint, Error, RunOptions};
use vmsnap_proto::v1::{self, workflow_event::Kind};

use scripted::{ID, Scripted, outcome, refusal, step};
use wire::Wire;

/// The scripted agent, a wire to it, and a client at the wire's other end.
struct Scene {
    agent: Scripted,
    wire: Wire,
    client: Client,
    _folder: wire::Folder,
}

impl Scene {
    async fn new(agent: Scripted) -> Self {
        let folder = wire::Folder::new();
        let behind = folder.path("agent.sock");
        agent.serve(&behind);
        let wire = Wire::new(folder.path("wire.sock"), behind);
        let endpoint = Endpoint::Unix(folder.path("wire.sock"));
        let client = Client::connect(&endpoint, &ConnectOptions::default())
            .await
            .unwrap();
        Scene {
            agent,
            wire,
            client,
            _folder: folder,
        }
    }
}

fn five_events() -> Scripted {
    Scripted::new(vec![
        (1, Kind::Planned(v1::EventPlanned::default())),
        (2, step(0)),
        (3, step(1)),
        (4, step(2)),
        (5, outcome(v1::WorkflowState::Succeeded, None)),
    ])
}

fn spec() -> v1::WorkflowSpec {
    v1::WorkflowSpec {
        vm_name: "web1".to_owned(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_run_cut_in_the_middle_goes_on_after_the_last_event_and_gives_none_twice() {
    let mut scene = Scene::new(five_events()).await;
    scene.agent.release(2);
    let heard = Arc::new(Mutex::new(Vec::new()));
    let listener = Arc::clone(&heard);
    let mut stream = scene
        .client
        .run(spec(), RunOptions::default())
        .on_connection(move |connection| listener.lock().unwrap().push(connection.clone()));
    let mut seen = Vec::new();
    for _ in 0..2 {
        seen.push(stream.next().await.unwrap().unwrap().sequence);
    }
    scene.wire.cut();
    scene.agent.release(5);
    while let Some(event) = stream.next().await.unwrap() {
        seen.push(event.sequence);
    }
    assert_eq!(seen, [1, 2, 3, 4, 5]);
    let finished = stream.finished().unwrap();
    assert!(finished.succeeded());
    assert_eq!(
        (
            finished.workflow_id.as_str(),
            finished.events,
            finished.reattachments
        ),
        (ID, 5, 1)
    );
    assert_eq!(scene.agent.runs.lock().unwrap().len(), 1);
    assert_eq!(scene.agent.watches.lock().unwrap()[0].from_sequence, 3);
    let heard = heard.lock().unwrap();
    assert!(matches!(heard.first(), Some(Connection::Lost { .. })));
    assert_eq!(heard.last(), Some(&Connection::Restored));
}

#[tokio::test]
async fn a_run_cut_before_its_first_event_joins_by_the_same_request_id() {
    let mut scene = Scene::new(five_events()).await;
    let mut stream = scene.client.run(spec(), RunOptions::default());
    let runs = scene.agent.runs.clone();
    let asked = async {
        while runs.lock().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        first = stream.next() => panic!("nothing was released yet, and {first:?} came"),
        asked = tokio::time::timeout(Duration::from_secs(30), asked) => asked.unwrap(),
    }
    scene.wire.cut();
    scene.agent.release(5);
    let finished = stream.to_end(|_| {}).await.unwrap();
    assert_eq!(finished.events, 5);
    let runs = scene.agent.runs.lock().unwrap();
    assert_eq!(runs.len(), 2);
    assert!(!runs[0].request_id.is_empty());
    assert_eq!(runs[0].request_id, runs[1].request_id);
    assert_eq!(
        (runs[0].join_finished, runs[1].join_finished),
        (false, true)
    );
}

#[tokio::test]
async fn an_agent_that_stays_away_is_given_up_in_bounded_time_with_the_run_named() {
    let mut scene = Scene::new(five_events()).await;
    scene.agent.release(1);
    let options = RunOptions {
        reattach_within: Duration::from_millis(500),
        ..RunOptions::default()
    };
    let mut stream = scene.client.run(spec(), options);
    stream.next().await.unwrap();
    scene.wire.remove();
    let error = tokio::time::timeout(Duration::from_secs(10), stream.next())
        .await
        .unwrap()
        .unwrap_err();
    assert!(error.is_no_agent());
    assert!(
        error
            .to_string()
            .ends_with("while following workflow 0199-run"),
        "{error}"
    );
    assert!(error.advice().unwrap().contains("vmsnap watch 0199-run"));
}

#[tokio::test]
async fn an_agent_that_comes_back_within_the_time_is_found_again() {
    let mut scene = Scene::new(five_events()).await;
    scene.agent.release(1);
    let mut stream = scene.client.run(spec(), RunOptions::default());
    stream.next().await.unwrap();
    scene.wire.remove();
    let following = tokio::spawn(stream.to_end(|_| {}));
    tokio::time::sleep(Duration::from_millis(400)).await;
    scene.wire.restore();
    scene.agent.release(5);
    let finished = following.await.unwrap().unwrap();
    assert_eq!((finished.events, finished.reattachments), (5, 1));
}

#[tokio::test]
async fn a_refusal_is_not_tried_again_and_keeps_its_details() {
    let agent = Scripted {
        refusal: Some(refusal()),
        ..five_events()
    };
    let scene = Scene::new(agent).await;
    let error = scene
        .client
        .run(spec(), RunOptions::default())
        .to_end(|_| {})
        .await
        .unwrap_err();
    let failure = error.failure().unwrap();
    assert_eq!(failure.reason, "SNAPSHOT_NOT_FOUND");
    assert!(failure.page.is_some());
    assert_eq!(scene.agent.runs.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_failed_run_ends_with_its_outcome_and_the_page_of_its_error() {
    let failure = v1::Failure {
        code: 5,
        reason: "SNAPSHOT_NOT_FOUND".to_owned(),
        ..Default::default()
    };
    let agent = Scripted {
        closing: Some(refusal()),
        ..Scripted::new(vec![(1, outcome(v1::WorkflowState::Failed, Some(failure)))])
    };
    let scene = Scene::new(agent).await;
    scene.agent.release(1);
    let finished = scene
        .client
        .run(spec(), RunOptions::default())
        .to_end(|_| {})
        .await
        .unwrap();
    assert_eq!(finished.state, v1::WorkflowState::Failed);
    assert_eq!(
        finished.failure.unwrap().page.as_deref(),
        Some("docs/errors/SNAPSHOT_NOT_FOUND.md")
    );
}

#[tokio::test]
async fn heartbeats_are_hidden_and_progress_passes_without_counting() {
    let agent = Scripted::new(vec![
        (1, step(0)),
        (1, Kind::Heartbeat(v1::EventHeartbeat {})),
        (
            1,
            Kind::StepProgress(v1::EventStepProgress {
                done_bytes: 7,
                ..Default::default()
            }),
        ),
        (2, outcome(v1::WorkflowState::Succeeded, None)),
    ]);
    let scene = Scene::new(agent).await;
    scene.agent.release(4);
    let mut shown = 0;
    let finished = scene
        .client
        .watch(ID, 1, Duration::from_secs(1))
        .to_end(|_| shown += 1)
        .await
        .unwrap();
    assert_eq!((shown, finished.events), (3, 2));
}

#[tokio::test]
async fn what_is_not_there_is_named_by_its_kind() {
    let folder = wire::Folder::new();
    let options = ConnectOptions::default();
    let missing = Endpoint::Unix(folder.path("none.sock"));
    assert!(matches!(
        Client::connect(&missing, &options).await,
        Err(Error::NoSuchSocket { .. })
    ));

    let deserted = folder.path("deserted.sock");
    drop(UnixListener::bind(&deserted).unwrap());
    let deserted = Endpoint::Unix(deserted);
    assert!(matches!(
        Client::connect(&deserted, &options).await,
        Err(Error::Refused { .. })
    ));

    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let closed = Endpoint::parse(&free.to_string()).unwrap();
    assert!(matches!(
        Client::connect(&closed, &options).await,
        Err(Error::Refused { .. })
    ));

    let remote = Endpoint::parse("192.0.2.1:7443").unwrap();
    assert!(matches!(
        Client::connect(&remote, &options).await,
        Err(Error::TlsNeeded { .. })
    ));
}

#[tokio::test]
async fn something_that_accepts_and_never_answers_runs_into_the_deadline() {
    let folder = wire::Folder::new();
    let path = folder.path("mute.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let options = ConnectOptions {
        connect_timeout: Duration::from_millis(300),
        call_timeout: Duration::from_millis(300),
        ..ConnectOptions::default()
    };
    let client = Client::connect(&Endpoint::Unix(path), &options).await;
    // HTTP/2's preface is sent without waiting for the peer's, so connecting may succeed.
    let error = match client {
        Ok(client) => client.host().await.unwrap_err(),
        Err(error) => error,
    };
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
}
