//! The Ansible modules `vm_snapshot` and `vm_snapshot_info`, in one binary.
//!
//! Purpose: turns a task's arguments into calls to a vmsnap agent, and what
//! came of them into Ansible's JSON. It knows no libvirt, decides nothing, and
//! keeps nothing: a run belongs to the agent.
//!
//! Invariants: whatever happens, stdout gets exactly one line of JSON, stderr
//! nothing, and stdin is never read (see [`reply`]). The exit status is 1 on
//! failure. When the module is told to stop it leaves; the run goes on.

mod argument;
mod coerce;
mod failed;
#[cfg(test)]
mod fuzz;
mod info;
mod rendered;
mod reply;
mod request;
mod snapshot;
mod tables;
mod task;

use std::error::Error as _;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tokio::signal::unix::{Signal, SignalKind, signal};
use vmsnap_client::{Client, ConnectOptions, Endpoint, Error, TlsFiles};

use crate::rendered::Values;
use crate::snapshot::Accepted;
use crate::task::{ArgumentsFile, Task, TaskError};

const VM_SNAPSHOT: &str = "vm_snapshot";
const VM_SNAPSHOT_INFO: &str = "vm_snapshot_info";

fn main() -> ExitCode {
    reply::answer_panics();
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if arguments
        .get(1)
        .is_some_and(|first| first == "--argument-spec")
    {
        return reply::line(&argument_spec(arguments.get(2)));
    }
    // One thread does: the module waits, the agent works.
    match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => reply::answer(runtime.block_on(attended(&arguments))),
        Err(error) => {
            let mut values = Values::new();
            let text = format!("the module could not start: {error}");
            failed::add_plain(&mut values, "INTERNAL", &text);
            reply::answer(values)
        }
    }
}

/// The table of the named module, or of `vm_snapshot`.
fn argument_spec(module: Option<&OsString>) -> serde_json::Value {
    if module.is_some_and(|module| module == VM_SNAPSHOT_INFO) {
        argument::describe(VM_SNAPSHOT_INFO, tables::VM_SNAPSHOT_INFO)
    } else {
        argument::describe(VM_SNAPSHOT, tables::VM_SNAPSHOT)
    }
}

/// Does the task, unless a signal comes first.
async fn attended(arguments: &[OsString]) -> Values {
    let accepted = Accepted::default();
    let stop = async {
        let hold = |kind| signal(kind).ok();
        // Ansible sends INT on Ctrl-C and TERM when it is ended itself; HUP is
        // what arrives when the ssh connection is gone.
        tokio::select! {
            () = caught(hold(SignalKind::terminate())) => "SIGTERM",
            () = caught(hold(SignalKind::interrupt())) => "SIGINT",
            () = caught(hold(SignalKind::hangup())) => "SIGHUP",
        }
    };
    tokio::select! {
        biased;
        name = stop => interrupted(name, &accepted),
        values = perform(arguments, accepted.clone()) => values,
    }
}

/// Waits for a signal; for ever where it cannot be listened for.
async fn caught(signal: Option<Signal>) {
    match signal {
        Some(mut signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

/// The answer when the module is told to stop.
fn interrupted(signal: &str, accepted: &Accepted) -> Values {
    let runs = accepted.runs();
    let told: Vec<String> = runs
        .iter()
        .map(|(vm, id)| {
            format!("workflow {id} on {vm} goes on at the agent, `vmsnap watch {id}` shows it")
        })
        .collect();
    let text = match told.as_slice() {
        [] => format!("stopped by {signal} before the agent was seen to accept a run"),
        told => format!("stopped by {signal}; {}", told.join("; ")),
    };
    let mut values = Values::new();
    if let [id] = runs.values().collect::<Vec<_>>().as_slice() {
        values.insert("workflow_id".to_owned(), id.as_str().into());
    }
    failed::add_plain(&mut values, failed::INTERRUPTED, &text);
    values
}

async fn perform(arguments: &[OsString], accepted: Accepted) -> Values {
    let file = ArgumentsFile::read(arguments.get(1).map(Path::new));
    answered(file, arguments.first(), accepted).await
}

/// The answer to a task that was read, or could not be, by the program of a name.
async fn answered(
    file: Result<ArgumentsFile, TaskError>,
    program: Option<&OsString>,
    accepted: Accepted,
) -> Values {
    let read = file.and_then(|file| {
        let info = is_info(file.setup.module_name.as_deref(), program);
        let table = if info {
            tables::VM_SNAPSHOT_INFO
        } else {
            tables::VM_SNAPSHOT
        };
        file.against(table).map(|task| (info, task))
    });
    match read {
        Ok((true, task)) => info::read(task).await,
        Ok((false, task)) => snapshot::perform(task, accepted).await,
        Err(error) => {
            let mut values = Values::new();
            failed::add_plain(&mut values, failed::ARGUMENTS, &told(&error));
            values
        }
    }
}

/// An error and what caused it.
fn told(error: &TaskError) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// Which module this is: what Ansible calls it, or else the file's name, which
/// Ansible begins with `AnsiballZ_`.
fn is_info(module_name: Option<&str>, program: Option<&OsString>) -> bool {
    match module_name {
        Some(name) => name.rsplit('.').next() == Some(VM_SNAPSHOT_INFO),
        None => program
            .and_then(|program| Path::new(program).file_name())
            .is_some_and(|file| {
                file.to_string_lossy().trim_start_matches("AnsiballZ_") == VM_SNAPSHOT_INFO
            }),
    }
}

/// Connects to the agent that the task names.
async fn connect(task: &Task) -> Result<Client, Error> {
    let endpoint = match task.text("agent") {
        Some(text) => Endpoint::parse(text)?,
        None => Endpoint::from_environment()?,
    };
    let file = |option: &str| task.text(option).map(PathBuf::from);
    let tls = TlsFiles {
        ca_path: file("ca_path"),
        client_cert: file("client_cert"),
        client_key: file("client_key"),
    };
    let mut options = ConnectOptions {
        user_agent: concat!("vmsnap-ansible/", env!("CARGO_PKG_VERSION")),
        tls: tls.or(TlsFiles::from_environment()),
        ..ConnectOptions::default()
    };
    // A run is bounded by the agent; a plan and a read are bounded here.
    if task.setup.check_mode
        && let Some(timeout) = task.duration("timeout")
    {
        options.call_timeout = timeout;
    }
    Client::connect(&endpoint, &options).await
}
