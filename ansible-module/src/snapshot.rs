//! The module `vm_snapshot`: one run for each VM of the task.
//!
//! Purpose: plans in check mode, runs otherwise, and follows a run to its end.
//!
//! Invariants: in check mode nothing but plans is asked for. Runs of several
//! VMs go on beside each other, and what comes of one does not touch another.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use vmsnap_client::json::Word as _;
use vmsnap_client::{Client, Error, Finished, RunOptions};
use vmsnap_proto::v1;
use vmsnap_proto::v1::workflow_event::Kind;

use crate::failed;
use crate::rendered::{self, StepTaken, Values};
use crate::request;
use crate::task::Task;

/// The agent's reason for a snapshot that is not there.
const SNAPSHOT_NOT_FOUND: &str = "SNAPSHOT_NOT_FOUND";
/// The agent's reason when `plan_hash` is that of another plan.
const PLAN_CHANGED: &str = "PLAN_CHANGED";

/// The runs that the agent has accepted so far, by VM: what is to be said when
/// the module is told to stop.
#[derive(Clone, Debug, Default)]
pub struct Accepted(Arc<Mutex<BTreeMap<String, String>>>);

impl Accepted {
    fn note(&self, vm_name: &str, workflow_id: &str) {
        let mut runs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        runs.insert(vm_name.to_owned(), workflow_id.to_owned());
    }

    /// Workflow ids by VM.
    pub fn runs(&self) -> BTreeMap<String, String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Does what the task says.
pub async fn perform(task: Task, accepted: Accepted) -> Values {
    let vms = task.list("vm_name").unwrap_or_default().to_vec();
    if let Some(refused) = refusal(&task, &vms) {
        let mut values = Values::new();
        failed::add_plain(&mut values, failed::ARGUMENTS, &refused);
        return values;
    }
    if vms.is_empty() {
        return object(json!({
            "changed": false, "failed": false, "results": [], "msg": "no vm was named: nothing to do",
        }));
    }
    let client = match crate::connect(&task).await {
        Ok(client) => client,
        Err(error) => {
            let mut values = Values::new();
            failed::add_error(&mut values, &error);
            return values;
        }
    };
    let task = Arc::new(task);
    if !task.many {
        return one(client, task, vms[0].clone(), accepted).await;
    }
    let runs: Vec<_> = vms
        .iter()
        .map(|vm| {
            tokio::spawn(one(
                client.clone(),
                Arc::clone(&task),
                vm.clone(),
                accepted.clone(),
            ))
        })
        .collect();
    let mut results = Vec::new();
    for run in runs {
        // A run that panicked has ended the process already.
        if let Ok(result) = run.await {
            results.push(result);
        }
    }
    together(&task, results)
}

/// What a table cannot say about options: how they go together.
fn refusal(task: &Task, vms: &[String]) -> Option<String> {
    let mut seen = std::collections::BTreeSet::new();
    if let Some(twice) = vms.iter().find(|vm| !seen.insert(vm.as_str())) {
        return Some(format!("vm_name names {twice} twice"));
    }
    if vms.len() > 1 && task.text("plan_hash").is_some() {
        return Some(
            "plan_hash is the hash of one VM's plan, and vm_name names several".to_owned(),
        );
    }
    if vms.is_empty() && !task.many {
        return Some("vm_name is empty".to_owned());
    }
    None
}

/// The answer for a list of VMs.
fn together(task: &Task, results: Vec<Values>) -> Values {
    let is = |result: &Values, name: &str| result.get(name) == Some(&Value::Bool(true));
    let failed: Vec<&Values> = results
        .iter()
        .filter(|result| is(result, "failed"))
        .collect();
    let changed = results
        .iter()
        .filter(|result| is(result, "changed"))
        .count();
    let text = |result: &Values, name: &str| {
        result
            .get(name)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let msg = if failed.is_empty() {
        format!("{changed} of {} VMs changed", results.len())
    } else {
        let told: Vec<String> = failed
            .iter()
            .map(|result| format!("{}: {}", text(result, "vm_name"), text(result, "msg")))
            .collect();
        format!(
            "{} of {} VMs failed: {}",
            failed.len(),
            results.len(),
            told.join(" | ")
        )
    };
    let mut answer = object(json!({
        "changed": changed > 0,
        "failed": !failed.is_empty(),
        "msg": msg,
        "action": task.text("action"),
    }));
    if let Some(error) = failed.first().and_then(|result| result.get("error")) {
        answer.insert("error".to_owned(), error.clone());
    }
    // Ansible prints the warnings and diffs of a task, not those of its results.
    let mut warnings = Vec::new();
    let mut diffs = Vec::new();
    for result in &results {
        let vm = text(result, "vm_name");
        for warning in result
            .get("warnings")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            warnings.push(json!(format!(
                "{vm}: {}",
                warning.as_str().unwrap_or_default()
            )));
        }
        diffs.extend(result.get("diff").cloned());
    }
    if !warnings.is_empty() {
        answer.insert("warnings".to_owned(), Value::Array(warnings));
    }
    if !diffs.is_empty() {
        answer.insert("diff".to_owned(), Value::Array(diffs));
    }
    answer.insert(
        "results".to_owned(),
        results.into_iter().map(Value::Object).collect(),
    );
    answer
}

/// The answer for one VM.
async fn one(client: Client, task: Arc<Task>, vm: String, accepted: Accepted) -> Values {
    let spec = request::spec(&task, &vm);
    let mut values = object(json!({
        "changed": false, "failed": false, "msg": "", "action": task.text("action"), "vm_name": vm,
    }));
    if !spec.snapshot_name.is_empty() {
        values.insert(
            "snapshot_name".to_owned(),
            Value::from(spec.snapshot_name.clone()),
        );
    }
    let done = if task.setup.check_mode {
        plan(&client, &task, &spec, &mut values).await
    } else if spec.action() == v1::Action::Confirm {
        confirm(&client, &spec, &mut values).await
    } else {
        run(&client, &task, &spec, &accepted, &mut values).await
    };
    if let Err(error) = done {
        failed::add_error(&mut values, &error);
    }
    values
}

/// Check mode.
async fn plan(
    client: &Client,
    task: &Task,
    spec: &v1::WorkflowSpec,
    values: &mut Values,
) -> Result<(), Error> {
    let plan = match client.plan(spec.clone()).await {
        Ok(plan) => plan,
        Err(Error::Failed(failure)) if failure.reason == SNAPSHOT_NOT_FOUND => {
            // An earlier task of the same play may be what would have made it.
            let text = format!(
                "{} (no failure in check mode: an earlier task may be what creates it)",
                failure.message
            );
            values.insert("changed".to_owned(), Value::Bool(true));
            values.insert("msg".to_owned(), Value::from(text.clone()));
            values.insert("warnings".to_owned(), json!([text]));
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    rendered::add_plan(values, &plan, &BTreeMap::new());
    add_warnings(values, &plan.warnings);
    if task.setup.diff {
        rendered::add_diff(values, &spec.vm_name, &plan.diff);
    }
    if let Some(demanded) = task.text("plan_hash")
        && demanded != plan.hash
    {
        let text = format!(
            "the plan is {} now, and plan_hash asks for {demanded}",
            plan.hash
        );
        failed::add_plain(values, PLAN_CHANGED, &text);
        return Ok(());
    }
    values.insert("changed".to_owned(), Value::Bool(plan.changes));
    values.insert(
        "msg".to_owned(),
        Value::from(rendered::planned(spec, &plan)),
    );
    Ok(())
}

async fn confirm(
    client: &Client,
    spec: &v1::WorkflowSpec,
    values: &mut Values,
) -> Result<(), Error> {
    let answer = client.confirm(&spec.vm_name, &spec.snapshot_name).await?;
    let vm = &spec.vm_name;
    let text = if answer.changed {
        format!("the change of {vm} is confirmed")
    } else {
        format!("no change of {vm} waits to be confirmed")
    };
    values.insert("changed".to_owned(), Value::Bool(answer.changed));
    values.insert("msg".to_owned(), Value::from(text));
    add_warnings(values, &answer.warnings);
    Ok(())
}

async fn run(
    client: &Client,
    task: &Task,
    spec: &v1::WorkflowSpec,
    accepted: &Accepted,
    values: &mut Values,
) -> Result<(), Error> {
    let (request_id, join_finished) = request_id(task, &spec.vm_name);
    let options = RunOptions {
        request_id,
        plan_hash: task.text("plan_hash").unwrap_or_default().to_owned(),
        timeout: task.duration("timeout"),
        join_finished,
        ..RunOptions::default()
    };
    let mut events = client.run(spec.clone(), options);
    let mut taken = BTreeMap::new();
    while let Some(event) = events.next().await? {
        accepted.note(&spec.vm_name, &event.workflow_id);
        values.insert(
            "workflow_id".to_owned(),
            Value::from(event.workflow_id.clone()),
        );
        match event.kind {
            Some(Kind::StepFinished(step)) => {
                taken.insert(
                    step.index,
                    StepTaken {
                        took: step.took,
                        note: step.note,
                    },
                );
            }
            Some(Kind::StepFailed(step)) => {
                let note = step
                    .failure
                    .map(|failure| failure.message)
                    .unwrap_or_default();
                taken.insert(step.index, StepTaken { took: None, note });
            }
            Some(Kind::Planned(planned)) if !task.flag("wait") => {
                let plan = planned.plan.unwrap_or_default();
                rendered::add_plan(values, &plan, &taken);
                add_warnings(values, &plan.warnings);
                goes_on(spec, &event.workflow_id, "running", plan.changes, values);
                return Ok(());
            }
            Some(Kind::Queued(_)) if !task.flag("wait") => {
                // There is no plan yet, and a run that may change something
                // must not be told as one that does not.
                goes_on(spec, &event.workflow_id, "queued", true, values);
                return Ok(());
            }
            _ => {}
        }
    }
    if let Some(run) = events.finished() {
        finished(task, spec, run, &taken, values);
    }
    Ok(())
}

/// With `wait: false`, when the agent has accepted the run.
fn goes_on(spec: &v1::WorkflowSpec, id: &str, state: &str, changes: bool, values: &mut Values) {
    let text = format!(
        "the run on {} goes on at the agent as workflow {id}",
        spec.vm_name
    );
    values.insert("changed".to_owned(), Value::Bool(changes));
    values.insert("state".to_owned(), Value::from(state));
    values.insert("msg".to_owned(), Value::from(text));
}

/// What a run came to.
fn finished(
    task: &Task,
    spec: &v1::WorkflowSpec,
    run: Finished,
    taken: &BTreeMap<u32, StepTaken>,
    values: &mut Values,
) {
    values.insert("events".to_owned(), Value::from(run.events));
    values.insert("state".to_owned(), Value::from(run.state.word()));
    if let Some(plan) = &run.plan {
        rendered::add_plan(values, plan, taken);
    }
    rendered::add_result(values, &run.result);
    add_warnings(values, &run.warnings);
    // What a run that is stuck left behind is unknown: not "unchanged".
    let changed = run.result.changed || run.state == v1::WorkflowState::Stuck;
    values.insert("changed".to_owned(), Value::Bool(changed));
    if task.setup.diff {
        rendered::add_diff(values, &spec.vm_name, &run.result.diff);
    }
    if run.succeeded() {
        if spec.action() == v1::Action::List {
            // A VM without snapshots has an empty tree, not none.
            values.entry("snapshots").or_insert_with(|| json!([]));
        }
        values.insert(
            "msg".to_owned(),
            Value::from(rendered::done(spec, &run.result)),
        );
        return;
    }
    match &run.failure {
        Some(failure) => failed::add_failure(values, failure),
        None => failed::add_plain(
            values,
            "INTERNAL",
            &format!("the run on {} ended as {}", spec.vm_name, run.state.word()),
        ),
    }
}

/// The run's name, and whether a run of that name that is over is meant too.
///
/// A name that the task gives means so. One that is made of this execution
/// does where no other execution can come to the same name; a repetition of
/// the command by ssh must not run a second time.
fn request_id(task: &Task, vm: &str) -> (String, bool) {
    match task.text("request_id") {
        Some(id) if task.many => (format!("{id}/{vm}"), true),
        Some(id) => (id.to_owned(), true),
        None => {
            let id = format!("ansible-{}", task.execution_id());
            let id = if task.many { format!("{id}/{vm}") } else { id };
            (id, task.execution_is_unique())
        }
    }
}

fn add_warnings(values: &mut Values, warnings: &[v1::Warning]) {
    if !warnings.is_empty() {
        let texts = warnings
            .iter()
            .map(rendered::warning)
            .map(Value::from)
            .collect();
        values.insert("warnings".to_owned(), texts);
    }
}

fn object(value: Value) -> Values {
    match value {
        Value::Object(values) => values,
        _ => Values::new(),
    }
}
