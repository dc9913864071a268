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
mod reply;
mod request;
mod tables;
mod task;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    reply::answer_panics();
    ExitCode::SUCCESS
}
