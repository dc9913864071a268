//! `vmsnap`, the agent's calls for a person at a terminal.
//!
//! Invariants: standard output is data and nothing else; standard error is talk;
//! the exit status says what happened (see the help's last lines).

mod args;
mod cert;
mod commands;
mod follow;
mod render;
mod spec;
mod terminal;

use std::{io, process::ExitCode};

use clap::Parser as _;
use vmsnap_client::{Error, Hindrance};

use commands::{Status, Trouble};

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const NO_AGENT: u8 = 3;
/// As shells count a program that SIGINT ended.
const INTERRUPTED: u8 = 130;
/// As shells count a program that SIGPIPE ended.
const BROKEN_PIPE: u8 = 141;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = args::Cli::parse();
    let json = cli.json;
    match commands::run(cli).await {
        Ok(Status::Done) => ExitCode::SUCCESS,
        Ok(Status::Failed) => ExitCode::from(FAILED),
        Ok(Status::Left) => ExitCode::from(INTERRUPTED),
        Err(Trouble::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::from(BROKEN_PIPE)
        }
        Err(Trouble::Output(error)) => {
            terminal::talk(&format!("cannot write to standard output: {error}"));
            ExitCode::from(FAILED)
        }
        Err(Trouble::Here(problem)) => {
            if json && terminal::json(&commands::problem_json(&problem)).is_err() {
                return ExitCode::from(BROKEN_PIPE);
            }
            terminal::talk(&problem);
            ExitCode::from(FAILED)
        }
        Err(Trouble::Agent(error)) => {
            if json && terminal::json(&commands::error_json(&error)).is_err() {
                return ExitCode::from(BROKEN_PIPE);
            }
            terminal::talk(&render::failure::error(
                &error,
                terminal::Style::from_environment(),
            ));
            ExitCode::from(status_of(&error))
        }
    }
}

fn status_of(error: &Error) -> u8 {
    match error {
        error if error.hindrance() == Hindrance::Settings => USAGE,
        error if error.is_no_agent() => NO_AGENT,
        _ => FAILED,
    }
}
