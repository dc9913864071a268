//! What each command asks the agent and how its answer is shown.

use std::{
    io,
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use clap::CommandFactory as _;
use clap_complete::Shell;
use serde_json::{Value, json};
use vmsnap_client::{
    Client, ConnectOptions, Endpoint, Error, Failure, Hindrance, REATTACH_WITHIN, TlsFiles,
    json::ToJson as _,
};
use vmsnap_proto::v1;

use crate::{
    args::{AuditArgs, Cli, Command, IssuesCommand, LogArgs, RunArgs},
    cert,
    follow::{Ended, Show, follow},
    render::{self, Clock, or_dash},
    spec,
    terminal::{self, Style, clean, data, talk},
};

/// How a command ended without an error of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// As asked.
    Done,
    /// The run failed, and that was shown.
    Failed,
    /// Left with Ctrl-C.
    Left,
}

/// Why a command could not do its work.
#[derive(Debug)]
pub enum Trouble {
    /// No agent, or its refusal.
    Agent(Box<Error>),
    /// Something on this machine, for what needs no agent.
    Here(String),
    /// Standard output could not be written.
    Output(io::Error),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Trouble::Agent(Box::new(error))
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Trouble::Output(error)
    }
}

/// Writes a page for each command, and what completes them in a shell.
fn manual(folder: &Path) -> io::Result<()> {
    clap_mangen::generate_to(Cli::command(), folder)?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        clap_complete::generate_to(shell, &mut Cli::command(), "vmsnap", folder)?;
    }
    Ok(())
}

/// Everything that a command needs beside its own arguments.
struct Context {
    agent: Endpoint,
    tls: TlsFiles,
    json: bool,
    style: Style,
    clock: Clock,
}

impl Context {
    async fn connect(&self) -> Result<Client, Trouble> {
        let options = ConnectOptions {
            user_agent: concat!("vmsnap/", env!("CARGO_PKG_VERSION")),
            tls: self.tls.clone(),
            ..ConnectOptions::default()
        };
        Ok(Client::connect(&self.agent, &options).await?)
    }

    /// Shows data: the JSON form if asked for, else the text.
    fn show(
        &self,
        value: impl FnOnce() -> Value,
        text: impl FnOnce() -> String,
    ) -> Result<Status, Trouble> {
        if self.json {
            terminal::json(&value())?;
        } else {
            data(&text())?;
        }
        Ok(Status::Done)
    }

    /// This program as it must be called to reach the same agent again.
    fn program(&self) -> String {
        if self.agent == Endpoint::default() {
            "vmsnap".to_owned()
        } else {
            format!("vmsnap --agent {}", self.agent)
        }
    }

    /// What to know when leaving a run that goes on.
    fn leaving(&self, id: Option<&str>, request_id: Option<&str>) -> String {
        let program = self.program();
        match (id, request_id) {
            (Some(id), _) => format!(
                "left; the run goes on at the agent\n  follow it: {program} watch {id}\n  stop it:   {program} cancel {id}"
            ),
            (None, Some(request_id)) => format!(
                "left before the agent accepted the run; if it did all the same, the same command with --request-id {request_id} joins it"
            ),
            (None, None) => "left".to_owned(),
        }
    }
}

/// Does what the command line asks.
///
/// # Errors
/// See [`Trouble`].
pub async fn run(cli: Cli) -> Result<Status, Trouble> {
    let tls = TlsFiles {
        ca_path: cli.ca_path,
        client_cert: cli.client_cert,
        client_key: cli.client_key,
    };
    let agent = match cli.agent {
        Some(agent) => agent,
        None => Endpoint::from_environment().map_err(Error::from)?,
    };
    let context = Context {
        agent,
        tls: tls.or(TlsFiles::from_environment()),
        json: cli.json,
        style: Style::from_environment(),
        clock: Clock::system(),
    };
    match cli.command {
        Command::Ls { vm: None } => {
            let vms = context.connect().await?.vms().await?;
            context.show(|| json!({"vms": vms.to_json()}), || render::vm::table(&vms))
        }
        Command::Ls { vm: Some(name) } => ls(&context, &name).await,
        Command::Show { what } => show(&context, &what).await,
        Command::Create(args) => change(&context, spec::create(&args), &args.run).await,
        Command::Revert(args) => change(&context, spec::revert(&args), &args.run).await,
        Command::Commit(args) => change(&context, spec::commit(&args), &args.run).await,
        Command::Cleanup(args) => change(&context, spec::cleanup(&args), &args.run).await,
        Command::Confirm { vm, name } => confirm(&context, &vm, name.as_deref()).await,
        Command::Log(args) => log(&context, &args).await,
        Command::Watch { id, from } => watch(&context, &id, from).await,
        Command::Cancel { id } => cancel(&context, &id).await,
        Command::Resolve { id, note } => {
            let run = context.connect().await?.resolve(&id, &note).await?;
            context.show(
                || run.to_json(),
                || {
                    format!(
                        "run {id} is {} now",
                        render::words::<v1::WorkflowState>(run.state)
                    )
                },
            )
        }
        Command::Volumes { pool } => {
            let storage = context.connect().await?.volumes(&pool).await?;
            context.show(|| storage.to_json(), || render::storage::storage(&storage))
        }
        Command::Issues { command } => issues(&context, command).await,
        Command::Audit(args) => audit(&context, &args).await,
        Command::Cert { command } => {
            let report = cert::run(&command).map_err(Trouble::Here)?;
            context.show(|| report.json.clone(), || report.text.clone())
        }
        Command::Health => {
            let health = context.connect().await?.health().await?;
            context.show(
                || health.to_json(),
                || render::health::problems(&health, &context.clock, context.style),
            )?;
            Ok(if health.problems.is_empty() {
                Status::Done
            } else {
                Status::Failed
            })
        }
        Command::Version => version(&context).await,
        Command::Manual { folder } => {
            let written = manual(&folder);
            written.map_err(|error| Trouble::Here(format!("{}: {error}", folder.display())))?;
            Ok(Status::Done)
        }
    }
}

async fn audit(context: &Context, args: &AuditArgs) -> Result<Status, Trouble> {
    let client = context.connect().await?;
    let since = args.since.map(|since| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let then = now.unwrap_or_default().saturating_sub(since);
        prost_types::Timestamp {
            seconds: i64::try_from(then.as_secs()).unwrap_or(i64::MAX),
            nanos: i32::try_from(then.subsec_nanos()).unwrap_or_default(),
        }
    });
    let denied = args.denied.then_some(i32::from(v1::AuditResult::Denied));
    let filter = v1::AuditFilter {
        vm_name: args.vm.clone().unwrap_or_default(),
        identity: args.caller.clone().unwrap_or_default(),
        method: args.method.clone().unwrap_or_default(),
        results: denied.into_iter().collect(),
        since,
    };
    let mut entries = client.audit(filter.clone(), args.limit).await?;
    entries.reverse();
    if context.json {
        for entry in &entries {
            terminal::json(&entry.to_json())?;
        }
    } else {
        data(&render::audit::table(&entries, &context.clock))?;
    }
    if !args.follow {
        return Ok(Status::Done);
    }
    let last = match entries.last() {
        Some(entry) => entry.sequence,
        // Nothing that matches is there yet, and what comes has a higher number than all.
        None => {
            let newest = client.audit(v1::AuditFilter::default(), 1).await?;
            newest.first().map_or(0, |entry| entry.sequence)
        }
    };
    // Over all of it: once it was listened for, the key does nothing by itself any more.
    tokio::select! {
        ended = follow_audit(context, &client, filter, last) => ended,
        left = tokio::signal::ctrl_c() => {
            left?;
            Ok(Status::Left)
        }
    }
}

/// Shows what comes behind an entry of the trail, for ever, also over a new start of
/// the agent.
async fn follow_audit(
    context: &Context,
    client: &Client,
    filter: v1::AuditFilter,
    mut last: u64,
) -> Result<Status, Trouble> {
    let mut lost: Option<Instant> = None;
    loop {
        let mut stream = match client.watch_audit(filter.clone(), last).await {
            Ok(stream) => stream,
            Err(error) => {
                // The agent is being started again, perhaps.
                let since = *lost.get_or_insert_with(Instant::now);
                if !error.is_no_agent() || since.elapsed() > REATTACH_WITHIN {
                    return Err(error.into());
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        lost = None;
        while let Ok(Some(message)) = stream.message().await {
            let Some(entry) = message.entry else { continue };
            last = entry.sequence;
            if context.json {
                terminal::json(&entry.to_json())?;
            } else {
                data(&render::audit::line(&entry, &context.clock))?;
            }
        }
        // The agent was stopped, or the line was cut: the trail goes on behind the last entry.
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn ls(context: &Context, name: &str) -> Result<Status, Trouble> {
    let client = context.connect().await?;
    let (vm, snapshots) = tokio::try_join!(client.vm(name), client.snapshots(name))?;
    context.show(
        || json!({"vm": vm.to_json(), "snapshots": snapshots.to_json()}),
        || {
            let mut text = render::vm::headline(&vm);
            if snapshots.is_empty() {
                text.push_str("no snapshots\n");
            } else {
                text.push_str(&render::tree::snapshots(
                    &snapshots,
                    &context.clock,
                    context.style,
                ));
            }
            text
        },
    )
}

async fn show(context: &Context, what: &str) -> Result<Status, Trouble> {
    let client = context.connect().await?;
    if is_run_id(what) {
        match client.workflow(what).await {
            Ok(run) => {
                return context.show(
                    || run.to_json(),
                    || render::runs::details(&run, &context.clock, context.style),
                );
            }
            // A VM may be called anything, also like this.
            Err(Error::Failed(failure)) if failure.reason == "WORKFLOW_NOT_FOUND" => {
                if let Ok(vm) = client.vm(what).await {
                    return context.show(|| vm.to_json(), || render::vm::details(&vm));
                }
                return Err(Error::Failed(failure).into());
            }
            Err(error) => return Err(error.into()),
        }
    }
    let vm = client.vm(what).await?;
    context.show(|| vm.to_json(), || render::vm::details(&vm))
}

/// Whether a text has the form of a run's id, a UUID.
fn is_run_id(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

/// The four commands that change something.
async fn change(
    context: &Context,
    spec: v1::WorkflowSpec,
    run: &RunArgs,
) -> Result<Status, Trouble> {
    let client = context.connect().await?;
    if run.check {
        let plan = client.plan(spec).await?;
        return context.show(
            || plan.to_json(),
            || render::plan::plan(&plan, &context.clock, context.style),
        );
    }
    let mut stream = client.run(spec.clone(), spec::run_options(run));
    if run.no_wait {
        stream.next().await?;
        let id = stream.workflow_id().unwrap_or_default().to_owned();
        let request_id = stream.request_id().unwrap_or_default().to_owned();
        if !context.json {
            talk(&format!(
                "accepted; follow it: {} watch {id}",
                context.program()
            ));
        }
        return context.show(
            || json!({"workflow_id": id, "request_id": request_id}),
            || id.clone(),
        );
    }
    let show = if context.json {
        Show::Json
    } else {
        Show::Steps
    };
    let leave = |id: Option<&str>, request: Option<&str>| context.leaving(id, request);
    let finished = match follow(stream, show, context.style, None, leave).await? {
        Ended::Left => return Ok(Status::Left),
        Ended::Finished(finished) => finished,
    };
    if let Some(failure) = &finished.failure {
        talk(&render::failure::failure(failure, context.style));
    }
    if !finished.succeeded() {
        if !context.json {
            talk(&format!(
                "what it did: {} log {}",
                context.program(),
                finished.workflow_id
            ));
        }
        return Ok(Status::Failed);
    }
    if !context.json {
        data(&render::result::summary(&finished, &spec, &context.clock))?;
    }
    Ok(Status::Done)
}

async fn watch(context: &Context, id: &str, from: u64) -> Result<Status, Trouble> {
    let stream = context.connect().await?.watch(id, from, REATTACH_WITHIN);
    let show = if context.json { Show::Json } else { Show::Log };
    let leave = |id: Option<&str>, request: Option<&str>| context.leaving(id, request);
    match follow(stream, show, context.style, None, leave).await? {
        Ended::Left => Ok(Status::Left),
        Ended::Finished(finished) => {
            if let Some(failure) = &finished.failure {
                talk(&render::failure::failure(failure, context.style));
            }
            Ok(if finished.succeeded() {
                Status::Done
            } else {
                Status::Failed
            })
        }
    }
}

async fn log(context: &Context, args: &LogArgs) -> Result<Status, Trouble> {
    let client = context.connect().await?;
    if let Some(id) = args.what.as_deref().filter(|what| is_run_id(what)) {
        let run = client.workflow(id).await?;
        if !context.json {
            data(&render::runs::details(&run, &context.clock, context.style))?;
        }
        if run.last_sequence == 0 {
            return Ok(Status::Done);
        }
        let show = if context.json { Show::Json } else { Show::Log };
        let stream = client.watch(id, 1, REATTACH_WITHIN);
        let leave = |_: Option<&str>, _: Option<&str>| "left".to_owned();
        let ended = follow(stream, show, context.style, Some(run.last_sequence), leave).await?;
        // A log of a run that failed was shown all the same.
        let _ = ended;
        return Ok(Status::Done);
    }
    let filter = v1::ListWorkflowsRequest {
        vm_name: args.what.clone().unwrap_or_default(),
        states: args.states.iter().map(|state| i32::from(*state)).collect(),
        actions: args
            .actions
            .iter()
            .map(|action| i32::from(*action))
            .collect(),
        ..Default::default()
    };
    let runs = client.workflows(filter, args.limit).await?;
    let guards = client
        .guards(args.what.as_deref().unwrap_or_default())
        .await?;
    context.show(
        || json!({"workflows": runs.to_json(), "guards": guards.to_json()}),
        || {
            format!(
                "{}{}",
                render::runs::guards(&guards, &context.clock),
                render::runs::table(&runs, &context.clock)
            )
        },
    )
}

async fn confirm(context: &Context, vm: &str, name: Option<&str>) -> Result<Status, Trouble> {
    let answer = context
        .connect()
        .await?
        .confirm(vm, name.unwrap_or_default())
        .await?;
    for warning in &answer.warnings {
        talk(&render::plan::warning(warning, context.style));
    }
    context.show(
        || answer.to_json(),
        || {
            let said = if answer.changed {
                "confirmed"
            } else {
                "nothing was pending"
            };
            format!("{}: {said}", clean(vm))
        },
    )
}

async fn cancel(context: &Context, id: &str) -> Result<Status, Trouble> {
    let answer = context.connect().await?.cancel(id).await?;
    let state = answer
        .workflow
        .as_ref()
        .map(|run| run.state)
        .unwrap_or_default();
    context.show(
        || answer.to_json(),
        || {
            let mut text = format!("run {id} is {}", render::words::<v1::WorkflowState>(state));
            if !answer.note.is_empty() {
                text.push_str(&format!("\n{}", clean(&answer.note)));
            }
            text
        },
    )
}

async fn issues(context: &Context, command: Option<IssuesCommand>) -> Result<Status, Trouble> {
    let client = context.connect().await?;
    match command.unwrap_or(IssuesCommand::List { vm: None }) {
        IssuesCommand::List { vm } => {
            let issues = client
                .known_issues(vm.as_deref().unwrap_or_default())
                .await?;
            context.show(
                || json!({"issues": issues.to_json()}),
                || match issues.as_slice() {
                    [] => "no known issues".to_owned(),
                    issues => render::issues::issues(issues, &context.clock),
                },
            )
        }
        IssuesCommand::Record {
            reason,
            fix,
            subject,
        } => {
            let issue = client
                .record_fix(&reason, subject.as_deref().unwrap_or_default(), &fix)
                .await?;
            context.show(
                || issue.to_json(),
                || format!("recorded as {}", clean(&issue.id)),
            )
        }
        IssuesCommand::Forget { id } => {
            client.forget_fix(&id).await?;
            context.show(
                || json!({"forgotten": id}),
                || format!("forgot {}", clean(&id)),
            )
        }
    }
}

/// The own version is worth knowing without an agent too, so a missing one is
/// said and is no failure.
async fn version(context: &Context) -> Result<Status, Trouble> {
    let own = env!("CARGO_PKG_VERSION");
    let host = match context.connect().await {
        Ok(client) => client.host().await.map_err(Trouble::from),
        Err(trouble) => Err(trouble),
    };
    let host = match host {
        Ok(host) => Some(host),
        Err(Trouble::Agent(error)) => {
            talk(&render::failure::error(&error, context.style));
            None
        }
        Err(trouble) => return Err(trouble),
    };
    context.show(
        || json!({"vmsnap": own, "agent": host.to_json()}),
        || {
            let Some(host) = &host else { return format!("vmsnap {own}") };
            let able = |able| if able { "yes" } else { "no" };
            format!(
                "vmsnap {own}\nagent {} on {} ({})\nlibvirt {}, {} {}, {}\nexternal snapshots: revert {}, delete {}",
                host.agent_version,
                clean(&host.hostname),
                context.agent,
                host.libvirt_version,
                or_dash(&host.hypervisor),
                host.hypervisor_version,
                clean(&host.uri),
                able(host.can_revert_external),
                able(host.can_delete_external),
            )
        },
    )
}

/// A problem of this machine as a JSON document, in the same form.
pub fn problem_json(problem: &str) -> Value {
    let failure = v1::Failure {
        // UNKNOWN: what it was is in the message.
        code: 2,
        reason: Hindrance::Failed.reason().to_owned(),
        message: problem.to_owned(),
        ..Default::default()
    };
    json!({"error": Failure::from(&failure).to_json()})
}

/// An error as a JSON document, in the form of a run's failure.
pub fn error_json(error: &Error) -> Value {
    let failure = match error {
        Error::Failed(failure) => failure.to_json(),
        other => {
            let hindrance = other.hindrance();
            let failure = v1::Failure {
                // INVALID_ARGUMENT for what was written, UNAUTHENTICATED and PERMISSION_DENIED
                // for trust, UNAVAILABLE for the way to the agent.
                code: match hindrance {
                    Hindrance::Settings => 3,
                    Hindrance::NotTrusted => 16,
                    Hindrance::NotAllowed => 7,
                    Hindrance::NoRoute | Hindrance::NoAgent | Hindrance::Failed => 14,
                },
                reason: hindrance.reason().to_owned(),
                message: other.chain(),
                ..Default::default()
            };
            Failure::from(&failure).to_json()
        }
    };
    let mut document = json!({"error": failure});
    document["error"]["advice"] = error.advice().map_or(Value::Null, Value::from);
    document
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_id_is_a_uuid_and_a_name_is_not() {
        assert!(is_run_id("0199f3a2-7c11-7d3e-9a55-0123456789ab"));
        assert!(!is_run_id("web1"));
        assert!(!is_run_id("0199f3a2-7c11-7d3e-9a55-0123456789aü"));
    }

    #[test]
    fn an_unreachable_agent_is_an_error_document_with_advice() {
        let document = error_json(&Error::NoSuchSocket { path: "/s".into() });
        assert_eq!(document["error"]["code"], "unavailable");
        assert_eq!(document["error"]["reason"], "AGENT_UNREACHABLE");
        assert_eq!(
            document["error"]["message"],
            "no agent there: /s does not exist"
        );
        assert!(document["error"]["advice"].is_string());
    }
}
