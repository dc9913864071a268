//! Runs as `vmsnap` shows them, against a scripted agent.

#[path = "../../client/tests/scripted/mod.rs"]
mod scripted;

use std::{path::PathBuf, process::Stdio, time::Duration};

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
};
use vmsnap_proto::v1::{self, workflow_event::Kind};

use scripted::{ID, Scripted, outcome, refusal, step};

/// A scripted agent on a socket in a folder of its own.
struct Scene {
    folder: PathBuf,
}

impl Scene {
    fn new(name: &str, agent: &Scripted) -> Self {
        let folder = std::env::temp_dir().join(format!("vmsnap-cli-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        agent.serve(&folder.join("agent.sock"));
        Scene { folder }
    }

    fn vmsnap(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmsnap"));
        command
            .arg("--agent")
            .arg(self.folder.join("agent.sock"))
            .args(arguments)
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    async fn run(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = self.vmsnap(arguments).output();
        let output = tokio::time::timeout(Duration::from_secs(20), output)
            .await
            .unwrap()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn finished(index: u32) -> Kind {
    Kind::StepFinished(v1::EventStepFinished {
        index,
        ..Default::default()
    })
}

fn titled(title: &str) -> Kind {
    Kind::StepStarted(v1::EventStepStarted {
        title: title.to_owned(),
        ..Default::default()
    })
}

fn created() -> Scripted {
    let result = v1::WorkflowResult {
        changed: true,
        snapshot: Some(v1::Snapshot {
            name: "before".to_owned(),
            kind: v1::SnapshotKind::External.into(),
            ..Default::default()
        }),
        consistency: v1::Consistency::Suspend.into(),
        ..Default::default()
    };
    let end = v1::EventOutcome {
        state: v1::WorkflowState::Succeeded.into(),
        result: Some(result),
        failure: None,
    };
    Scripted::new(vec![
        (1, titled("create snapshot before")),
        (2, finished(0)),
        (3, Kind::Outcome(end)),
    ])
}

#[tokio::test]
async fn a_run_is_told_on_standard_error_and_its_result_on_standard_output() {
    let agent = created();
    agent.release(3);
    let (status, data, talk) = Scene::new("told", &agent)
        .run(&["create", "web1", "before"])
        .await;
    assert_eq!(status, Some(0));
    assert_eq!(
        data,
        "web1: created snapshot before (external, suspend consistency)\n"
    );
    assert_eq!(
        talk,
        "  · create snapshot before\n  ✓ create snapshot before (0ms)\n✓ succeeded\n"
    );
}

#[tokio::test]
async fn with_json_a_run_is_a_line_an_event_and_nothing_else() {
    let agent = created();
    agent.release(3);
    let (status, data, talk) = Scene::new("json", &agent)
        .run(&["--json", "create", "web1", "before"])
        .await;
    assert_eq!(status, Some(0));
    let events: Vec<Value> = data
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let names: Vec<_> = events
        .iter()
        .map(|event| event["event"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["step_started", "step_finished", "outcome"]);
    assert_eq!(events[2]["result"]["snapshot"]["name"], "before");
    assert_eq!(talk, "");
}

#[tokio::test]
async fn a_failed_run_is_status_1_with_reason_page_and_the_way_to_its_log() {
    let failure = v1::Failure {
        code: 5,
        reason: "SNAPSHOT_NOT_FOUND".to_owned(),
        message: "no such snapshot".to_owned(),
        ..Default::default()
    };
    let end = outcome(v1::WorkflowState::Failed, Some(failure));
    let agent = Scripted {
        closing: Some(refusal()),
        ..Scripted::new(vec![(1, end)])
    };
    agent.release(1);
    let (status, data, talk) = Scene::new("failed", &agent)
        .run(&["revert", "web1", "befor"])
        .await;
    assert_eq!((status, data.as_str()), (Some(1), ""));
    assert!(
        talk.starts_with(
            "✗ failed\n✗ SNAPSHOT_NOT_FOUND: no such snapshot\n  read on: docs/errors/SNAPSHOT_NOT_FOUND.md\n"
        ),
        "{talk}"
    );
    assert!(talk.trim_end().ends_with(&format!("log {ID}")), "{talk}");
}

#[tokio::test]
async fn a_refusal_is_status_1_and_one_error_document_with_json() {
    let agent = Scripted {
        refusal: Some(refusal()),
        ..created()
    };
    let scene = Scene::new("refused", &agent);
    let (status, data, _) = scene.run(&["--json", "revert", "web1", "befor"]).await;
    assert_eq!(status, Some(1));
    let document: Value = serde_json::from_str(&data).unwrap();
    assert_eq!(document["error"]["reason"], "SNAPSHOT_NOT_FOUND");
    assert_eq!(document["error"]["message"], "no such snapshot");
}

#[tokio::test]
async fn ctrl_c_leaves_the_run_alone_and_says_how_to_come_back() {
    let agent = Scripted::new(vec![
        (1, step(0)),
        (2, outcome(v1::WorkflowState::Succeeded, None)),
    ]);
    agent.release(1);
    let scene = Scene::new("left", &agent);
    let mut child = scene
        .vmsnap(&["create", "web1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut talk = BufReader::new(child.stderr.take().unwrap()).lines();
    // The first line says that the run is being followed.
    talk.next_line().await.unwrap().unwrap();
    let pid = child.id().unwrap().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .await
            .unwrap()
            .success()
    );
    let mut said = String::new();
    while let Some(line) = talk.next_line().await.unwrap() {
        said.push_str(&line);
        said.push('\n');
    }
    assert_eq!(child.wait().await.unwrap().code(), Some(130));
    assert!(said.contains("the run goes on at the agent"), "{said}");
    assert!(
        said.contains(&format!("watch {ID}")) && said.contains(&format!("cancel {ID}")),
        "{said}"
    );
}

#[tokio::test]
async fn a_run_that_is_not_waited_for_gives_its_id_and_comes_back_at_once() {
    let agent = created();
    agent.release(1);
    let (status, data, _) = Scene::new("nowait", &agent)
        .run(&["create", "web1", "--no-wait"])
        .await;
    assert_eq!((status, data.as_str()), (Some(0), "0199-run\n"));
}

#[tokio::test]
async fn watching_gives_sequences_and_times_on_standard_output() {
    let agent = created();
    agent.release(3);
    let (status, data, talk) = Scene::new("watch", &agent)
        .run(&["watch", ID, "--from", "2"])
        .await;
    assert_eq!((status, talk.as_str()), (Some(0), ""));
    let sequences: Vec<_> = data
        .lines()
        .map(|line| line.split_whitespace().next().unwrap())
        .collect();
    assert_eq!(sequences, ["2", "3"]);
}
