//! What a task becomes at an agent, and what an agent's answers become in a
//! play, against a scripted agent: what a VM's run does stands in its name.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use vmsnap_proto::ERROR_DOMAIN;
use vmsnap_proto::v1::workflow_event::Kind;
use vmsnap_proto::v1::workflow_service_server::{WorkflowService, WorkflowServiceServer};
use vmsnap_proto::v1::{self, PlannedStep, WorkflowState};

/// An agent that remembers what it was asked to run.
#[derive(Clone, Default)]
struct Scripted {
    runs: Arc<Mutex<Vec<v1::RunWorkflowRequest>>>,
}

fn not_found(name: &str) -> Status {
    let mut details = ErrorDetails::new();
    let metadata = [("valid_names", "before, nightly"), ("nearest", "before")];
    details.set_error_info(
        "SNAPSHOT_NOT_FOUND",
        ERROR_DOMAIN,
        metadata.map(|(key, value)| (key.to_owned(), value.to_owned())),
    );
    let message = format!("web01 has no snapshot \"{name}\"");
    Status::with_error_details(Code::NotFound, message, details)
}

fn plan() -> v1::Plan {
    let step = |index, name: &str, changes| PlannedStep {
        index,
        name: name.into(),
        title: name.into(),
        changes,
        ..Default::default()
    };
    v1::Plan {
        hash: "abc123".into(),
        changes: true,
        steps: vec![step(0, "freeze", true), step(1, "snapshot", true)],
        warnings: vec![v1::Warning {
            code: "MEMORY_NOT_SAVED".into(),
            message: "a revert restarts the guest".into(),
            advice: "save memory too".into(),
        }],
        diff: vec![v1::FieldChange {
            field: "snapshots".into(),
            before: None,
            after: Some("before".into()),
        }],
        snapshot_name: "before".into(),
        ..Default::default()
    }
}

fn events(vm: &str) -> Vec<Kind> {
    let mut kinds = vec![
        Kind::Planned(v1::EventPlanned { plan: Some(plan()) }),
        Kind::StepStarted(v1::EventStepStarted {
            index: 0,
            ..Default::default()
        }),
    ];
    if vm.starts_with("hangs") {
        return kinds;
    }
    if vm.starts_with("fails") {
        let failure = v1::Failure {
            code: Code::ResourceExhausted as i32,
            reason: "NO_SPACE".into(),
            message: "pool default has no space".into(),
            ..Default::default()
        };
        kinds.push(Kind::Outcome(v1::EventOutcome {
            state: WorkflowState::Failed.into(),
            result: None,
            failure: Some(failure),
        }));
        return kinds;
    }
    let took = Some(prost_types::Duration {
        seconds: 0,
        nanos: 12_000_000,
    });
    kinds.push(Kind::StepFinished(v1::EventStepFinished {
        index: 0,
        took,
        note: "two file systems".into(),
    }));
    kinds.push(Kind::Outcome(v1::EventOutcome {
        state: WorkflowState::Succeeded.into(),
        result: Some(v1::WorkflowResult {
            changed: true,
            frozen: took,
            snapshot: Some(v1::Snapshot {
                name: "before".into(),
                ..Default::default()
            }),
            diff: plan().diff,
            ..Default::default()
        }),
        failure: None,
    }));
    kinds
}

type Stream<T> = ReceiverStream<Result<T, Status>>;

#[tonic::async_trait]
impl WorkflowService for Scripted {
    type RunWorkflowStream = Stream<v1::RunWorkflowResponse>;
    type WatchWorkflowStream = Stream<v1::WatchWorkflowResponse>;

    async fn plan_workflow(
        &self,
        request: Request<v1::PlanWorkflowRequest>,
    ) -> Result<Response<v1::PlanWorkflowResponse>, Status> {
        let spec = request.into_inner().spec.unwrap_or_default();
        match spec.snapshot_name.as_str() {
            "befor" => Err(not_found("befor")),
            _ => Ok(Response::new(v1::PlanWorkflowResponse {
                plan: Some(plan()),
            })),
        }
    }

    async fn run_workflow(
        &self,
        request: Request<v1::RunWorkflowRequest>,
    ) -> Result<Response<Self::RunWorkflowStream>, Status> {
        let request = request.into_inner();
        self.runs.lock().unwrap().push(request.clone());
        let spec = request.spec.unwrap_or_default();
        if spec.snapshot_name == "befor" {
            return Err(not_found("befor"));
        }
        let (sender, receiver) = tokio::sync::mpsc::channel(8);
        tokio::spawn(async move {
            for (at, kind) in events(&spec.vm_name).into_iter().enumerate() {
                let event = v1::WorkflowEvent {
                    workflow_id: format!("run-of-{}", spec.vm_name),
                    sequence: at as u64 + 1,
                    time: None,
                    kind: Some(kind),
                };
                let _ = sender
                    .send(Ok(v1::RunWorkflowResponse { event: Some(event) }))
                    .await;
            }
            // A run that hangs stays open until its caller goes.
            if spec.vm_name.starts_with("hangs") {
                sender.closed().await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn confirm_workflow(
        &self,
        _: Request<v1::ConfirmWorkflowRequest>,
    ) -> Result<Response<v1::ConfirmWorkflowResponse>, Status> {
        Ok(Response::new(v1::ConfirmWorkflowResponse {
            changed: true,
            warnings: vec![],
        }))
    }

    async fn watch_workflow(
        &self,
        _: Request<v1::WatchWorkflowRequest>,
    ) -> Result<Response<Self::WatchWorkflowStream>, Status> {
        Err(Status::unimplemented("not in this script"))
    }

    async fn cancel_workflow(
        &self,
        _: Request<v1::CancelWorkflowRequest>,
    ) -> Result<Response<v1::CancelWorkflowResponse>, Status> {
        Err(Status::unimplemented("not in this script"))
    }

    async fn resolve_workflow(
        &self,
        _: Request<v1::ResolveWorkflowRequest>,
    ) -> Result<Response<v1::ResolveWorkflowResponse>, Status> {
        Err(Status::unimplemented("not in this script"))
    }

    async fn list_guards(
        &self,
        _: Request<v1::ListGuardsRequest>,
    ) -> Result<Response<v1::ListGuardsResponse>, Status> {
        Err(Status::unimplemented("not in this script"))
    }

    async fn get_workflow(
        &self,
        request: Request<v1::GetWorkflowRequest>,
    ) -> Result<Response<v1::GetWorkflowResponse>, Status> {
        let workflow = v1::Workflow {
            id: request.into_inner().workflow_id,
            state: WorkflowState::Running.into(),
            ..Default::default()
        };
        Ok(Response::new(v1::GetWorkflowResponse {
            workflow: Some(workflow),
        }))
    }

    async fn list_workflows(
        &self,
        _: Request<v1::ListWorkflowsRequest>,
    ) -> Result<Response<v1::ListWorkflowsResponse>, Status> {
        Err(Status::unimplemented("not in this script"))
    }
}

/// A scripted agent on a socket in a folder of its own.
struct Agent {
    scripted: Scripted,
    folder: PathBuf,
    _runtime: Runtime,
}

impl Agent {
    fn start(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("vmsnap-{name}-{}", std::process::id()));
        // As Ansible names the folder of one execution.
        std::fs::create_dir_all(folder.join("ansible-tmp-1-2-3")).unwrap();
        let runtime = Runtime::new().unwrap();
        let scripted = Scripted::default();
        let service = WorkflowServiceServer::new(scripted.clone());
        let listener = {
            let _inside = runtime.enter();
            UnixListener::bind(folder.join("s")).unwrap()
        };
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        Agent {
            scripted,
            folder,
            _runtime: runtime,
        }
    }

    fn spawn(&self, module: &str, mut arguments: Value) -> Child {
        arguments["_ansible_module_name"] = json!(format!("vmsnap.libvirt.{module}"));
        let path = self.folder.join("ansible-tmp-1-2-3/args");
        std::fs::write(&path, arguments.to_string()).unwrap();
        Command::new(env!("CARGO_BIN_EXE_vm-snapshot"))
            .arg(path)
            .env(
                "VMSNAP_AGENT",
                format!("unix://{}/s", self.folder.display()),
            )
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn module(&self, arguments: Value) -> Value {
        answer(self.spawn("vm_snapshot", arguments))
    }

    fn runs(&self) -> Vec<v1::RunWorkflowRequest> {
        self.scripted.runs.lock().unwrap().clone()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn answer(child: Child) -> Value {
    let output = child.wait_with_output().unwrap();
    assert_eq!(str::from_utf8(&output.stderr), Ok(""));
    let stdout = str::from_utf8(&output.stdout).unwrap();
    assert!(
        stdout.is_ascii() && stdout.ends_with('\n') && stdout.lines().count() == 1,
        "{stdout}"
    );
    let answer: Value = serde_json::from_str(stdout).unwrap();
    let code = i32::from(answer["failed"] == json!(true));
    assert_eq!(output.status.code(), Some(code), "{answer}");
    answer
}

#[test]
fn a_run_is_returned_with_its_plan_its_steps_and_what_it_achieved() {
    let agent = Agent::start("run");
    let answer = agent.module(json!({"vm_name": "web01", "action": "create"}));
    assert_eq!(
        (&answer["changed"], &answer["failed"]),
        (&json!(true), &json!(false))
    );
    assert_eq!(answer["snapshot_name"], "before");
    assert_eq!(answer["workflow_id"], "run-of-web01");
    assert_eq!(answer["state"], "succeeded");
    assert_eq!(answer["plan_hash"], "abc123");
    assert_eq!(answer["events"], 4);
    assert_eq!(answer["freeze_ms"], 12);
    assert_eq!(answer["steps"][0]["took_ms"], 12);
    assert_eq!(answer["steps"][0]["note"], "two file systems");
    assert_eq!(answer["steps"][1]["took_ms"], Value::Null);
    assert_eq!(
        answer["warnings"],
        json!(["a revert restarts the guest; save memory too (MEMORY_NOT_SAVED)"])
    );
    assert_eq!(
        answer["msg"],
        "created snapshot before of web01; its file systems were frozen for 12 ms"
    );
    assert!(answer.get("diff").is_none());
}

#[test]
fn a_diff_is_returned_when_one_is_asked_for() {
    let agent = Agent::start("diff");
    for check_mode in [false, true] {
        let answer = agent.module(json!({
            "vm_name": "web01", "action": "create", "_ansible_diff": true,
            "_ansible_check_mode": check_mode,
        }));
        assert_eq!(answer["diff"]["before"], json!({}));
        assert_eq!(answer["diff"]["after"], json!({"snapshots": "before"}));
    }
}

#[test]
fn check_mode_plans_and_runs_nothing() {
    let agent = Agent::start("check");
    let answer = agent.module(json!({
        "vm_name": "web01", "action": "create", "_ansible_check_mode": true,
    }));
    assert_eq!(answer["changed"], true);
    assert_eq!(answer["msg"], "would change web01: freeze, then snapshot");
    assert_eq!(answer["snapshot_name"], "before");
    let answer = agent.module(json!({
        "vm_name": "web01", "action": "create", "plan_hash": "other", "_ansible_check_mode": true,
    }));
    assert_eq!(
        (&answer["failed"], &answer["error"]["reason"]),
        (&json!(true), &json!("PLAN_CHANGED"))
    );
    assert!(agent.runs().is_empty());
}

#[test]
fn a_missing_snapshot_fails_a_run_and_is_a_warning_and_a_change_in_check_mode() {
    let agent = Agent::start("missing");
    let options = json!({"vm_name": "web01", "action": "revert", "snapshot_name": "befor"});
    let answer = agent.module(options.clone());
    assert_eq!(
        (&answer["failed"], &answer["changed"]),
        (&json!(true), &json!(false))
    );
    assert_eq!(
        answer["msg"],
        "web01 has no snapshot \"befor\"; the valid names are before, nightly; did you mean \
         \"before\"? (SNAPSHOT_NOT_FOUND)"
    );
    assert_eq!(answer["error"]["metadata"]["nearest"], "before");
    let mut options = options;
    options["_ansible_check_mode"] = json!(true);
    let answer = agent.module(options);
    assert_eq!(
        (&answer["failed"], &answer["changed"]),
        (&json!(false), &json!(true))
    );
    assert!(
        answer["warnings"][0]
            .as_str()
            .unwrap()
            .contains("an earlier task may be what creates it")
    );
}

#[test]
fn several_vms_run_beside_each_other_and_what_failed_is_named() {
    let agent = Agent::start("several");
    let answer = agent.module(json!({
        "vm_name": ["web01", "fails01", "web02"], "action": "create", "_ansible_diff": true,
    }));
    assert_eq!(
        (&answer["failed"], &answer["changed"]),
        (&json!(true), &json!(true))
    );
    assert_eq!(
        answer["msg"],
        "1 of 3 VMs failed: fails01: pool default has no space (NO_SPACE)"
    );
    assert_eq!(answer["error"]["reason"], "NO_SPACE");
    let results = answer["results"].as_array().unwrap();
    let names: Vec<_> = results
        .iter()
        .map(|result| result["vm_name"].clone())
        .collect();
    assert_eq!(names, ["web01", "fails01", "web02"]);
    assert_eq!(results[0]["changed"], true);
    assert_eq!(results[1]["state"], "failed");
    assert_eq!(answer["diff"].as_array().unwrap().len(), 3);
    assert!(
        answer["warnings"][0]
            .as_str()
            .unwrap()
            .starts_with("web01: ")
    );
    let mut ids: Vec<_> = agent.runs().into_iter().map(|run| run.request_id).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 3);
}

#[test]
fn an_execution_that_ssh_repeats_asks_for_the_same_run() {
    let agent = Agent::start("repeat");
    let options = json!({"vm_name": "web01", "action": "create"});
    agent.module(options.clone());
    agent.module(options);
    agent.module(
        json!({"vm_name": "web01", "action": "create", "request_id": "mine", "timeout": "2m"}),
    );
    let runs = agent.runs();
    assert_eq!(runs[0].request_id, runs[1].request_id);
    assert!(runs.iter().all(|run| run.join_finished));
    assert_eq!(runs[2].request_id, "mine");
    assert_eq!(runs[2].timeout.unwrap().seconds, 120);
    assert_eq!(runs[0].timeout, None);
}

#[test]
fn without_waiting_the_task_is_over_when_the_run_is_accepted() {
    let agent = Agent::start("nowait");
    let answer =
        agent.module(json!({"vm_name": "hangs01", "action": "commit", "all": true, "wait": "no"}));
    assert_eq!(
        (&answer["changed"], &answer["failed"]),
        (&json!(true), &json!(false))
    );
    assert_eq!(answer["workflow_id"], "run-of-hangs01");
    assert_eq!(answer["state"], "running");
    let later = info(&agent, "run-of-hangs01");
    assert_eq!(later["workflow"]["state"], "running");
    assert_eq!(later["workflow"]["finished"], Value::Null);
}

fn info(agent: &Agent, id: &str) -> Value {
    answer(agent.spawn("vm_snapshot_info", json!({"workflow_id": id})))
}

#[test]
fn a_guarded_change_is_confirmed() {
    let agent = Agent::start("confirm");
    let answer = agent.module(json!({"vm_name": "web01", "action": "confirm"}));
    assert_eq!(answer["changed"], true);
    assert_eq!(answer["msg"], "the change of web01 is confirmed");
}

#[test]
fn told_to_stop_it_leaves_at_once_and_names_the_run_that_goes_on() {
    let agent = Agent::start("stop");
    for name in ["SIGTERM", "SIGINT", "SIGHUP"] {
        let answer = stopped_by(&agent, name);
        assert_eq!(
            (&answer["failed"], &answer["changed"]),
            (&json!(true), &json!(false))
        );
        assert_eq!(answer["error"]["reason"], "INTERRUPTED");
        assert_eq!(answer["workflow_id"], "run-of-hangs01");
        let msg = answer["msg"].as_str().unwrap();
        assert!(msg.starts_with(&format!("stopped by {name}; ")), "{msg}");
        assert!(msg.contains("vmsnap watch run-of-hangs01"), "{msg}");
    }
}

/// The answer of a module that was told to stop after its run's id had reached
/// it. When that was cannot be seen from outside, so the wait grows until it was.
fn stopped_by(agent: &Agent, signal: &str) -> Value {
    for patience in [50, 500, 5_000] {
        let before = agent.runs().len();
        let child = agent.spawn(
            "vm_snapshot",
            json!({"vm_name": "hangs01", "action": "create"}),
        );
        let waiting = Instant::now();
        while agent.runs().len() == before {
            assert!(
                waiting.elapsed() < Duration::from_secs(20),
                "the run did not begin"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(patience));
        let number = &signal["SIG".len()..];
        let sent = Command::new("kill")
            .args(["-s", number, &child.id().to_string()])
            .status();
        assert!(sent.unwrap().success(), "{signal} was sent");
        let answer = answer(child);
        if answer.get("workflow_id").is_some() {
            return answer;
        }
    }
    panic!("no event of the run reached the module");
}
