//! `cargo xtask`: set-up, demo, test and package.
//!
//! Invariants: depends on no crate of the workspace and calls cargo for the
//! rest; works from any folder, as root or as a user with sudo, and twice in a
//! row; one target folder, development builds with `--workspace`.

mod package;
mod run;
mod setup;
mod sources;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};

use run::{cargo, step};

/// Builds, proves and shows vmsnap.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    /// Install what is missing without asking.
    #[arg(long, global = true)]
    yes: bool,
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Install what is missing.
    Setup,
    /// Show the main job on a real guest.
    Demo,
    /// Prove everything; ends with the test runner's summary.
    Test {
        /// Arguments for the test runner, such as the name of a test.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        runner: Vec<String>,
    },
    /// Build the collection's tarball.
    Package {
        /// With the module as built for this host, not for old ones.
        #[arg(long)]
        native: bool,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.command {
        Verb::Setup => setup::run(arguments.yes),
        Verb::Demo => demo(arguments.yes),
        Verb::Test { runner } => test(arguments.yes, &runner),
        Verb::Package { native } => setup::run(arguments.yes).and_then(|()| package::run(native)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            run::complain(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// The checkout's own folder.
fn checkout() -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.parent().map_or_else(|| here.clone(), PathBuf::from)
}

/// cargo's target folder.
fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => checkout().join(folder),
        None => checkout().join("target"),
    }
}

/// A program of the Python environment.
fn python_tool(name: &str) -> PathBuf {
    target().join("xtask/venv/bin").join(name)
}

fn demo(yes: bool) -> Result<()> {
    setup::run(yes)?;
    step("build", cargo(["build", "--workspace", "--locked"]))?;
    package::run(true)?;
    step(
        "demo",
        run::command(target().join("debug/vmsnap-lab"), ["demo"]),
    )
}

fn test(yes: bool, runner: &[String]) -> Result<()> {
    setup::run(yes)?;
    step("formatting", cargo(["fmt", "--all", "--check"]))?;
    step(
        "clippy",
        cargo([
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "-D",
            "warnings",
        ]),
    )?;
    let proto = checkout().join("proto");
    step(
        "buf lint",
        run::command(python_tool("buf"), ["lint".as_ref(), proto.as_os_str()]),
    )?;
    step("build", cargo(["build", "--workspace", "--locked"]))?;
    package::run(true)?;
    step(
        "doc tests",
        cargo(["test", "--workspace", "--doc", "--locked", "--quiet"]),
    )?;
    // Built before the lab is up, so that guests do not share the cores with
    // the compiler.
    let mut build = setup::nextest()?;
    build.args(["run", "--workspace", "--locked", "--no-run"]);
    step("build of the tests", build)?;
    let nextest = setup::nextest()?;
    let mut lab = run::command(target().join("debug/vmsnap-lab"), ["up", "--"]);
    lab.arg(nextest.get_program())
        .args(nextest.get_args())
        .args(["run", "--workspace", "--locked"])
        .args(runner);
    step("tests", lab).context("not everything is as it should be")
}
