//! `cargo xtask`: set-up, demo, test, fuzz, soak, bench and package.
//!
//! Invariants: depends on no crate of the workspace and calls cargo for the
//! rest; works from any folder, as root or as a user with sudo, and twice in a
//! row; one target folder, development builds with `--workspace`.

mod apt;
mod bench;
mod fuzz;
mod package;
mod packages;
mod python;
mod run;
mod setup;
mod sources;
mod system;

use std::{
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::Result;
use clap::{Parser, Subcommand};

use run::{cargo, command, replace, step};

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
    /// Feed inputs at random to whatever reads them; ends with their number.
    Fuzz {
        /// How many inputs, of all classes together.
        #[arg(long, default_value_t = 100_000)]
        inputs: u64,
    },
    /// Walk where nobody walked before, then break every action at every place, and
    /// judge what is left; the last line counts cells, runs and failures (see docs/contract.md).
    Soak {
        /// One place in twelve, and all of holds and points of no return.
        #[arg(long)]
        short: bool,
        /// Which of them.
        #[arg(long, default_value_t = 0)]
        seed: usize,
        /// Only scenarios whose name holds this, such as "revert".
        #[arg(long, default_value = "")]
        only: String,
    },
    /// Measure what every task pays, size and start of the programs, and lists of
    /// many snapshots beside virsh.
    Bench,
    /// Build what is handed out: the collection's tarball and the command line,
    /// for hosts with glibc 2.17 or newer, and the agent as .deb and .rpm.
    Package {
        /// Only the collection with this host's own build, installed for tests.
        #[arg(long)]
        native: bool,
    },
    /// Package programs that are built already, for the tests of the packages.
    #[command(hide = true)]
    AgentPackages {
        /// The folder in which they lie.
        #[arg(long)]
        programs: PathBuf,
        /// The version that the packages get.
        #[arg(long)]
        version: String,
        /// Where the packages go.
        #[arg(long)]
        into: PathBuf,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // What a test calls finds everything in place.
    let ready = match arguments.command {
        Verb::AgentPackages { .. } => Ok(()),
        _ => setup::run(arguments.yes),
    };
    let result = ready.and_then(|()| match arguments.command {
        Verb::Setup => Ok(()),
        Verb::Demo => demo(),
        Verb::Test { runner } => test(&runner),
        Verb::Fuzz { inputs } => build().and_then(|()| fuzz::run(inputs)),
        Verb::Soak { short, seed, only } => soak(short, seed, &only),
        Verb::Bench => bench::run(),
        Verb::Package { native: false } => package::publish(),
        Verb::Package { native: true } => build().and_then(|()| package::install_native()),
        Verb::AgentPackages {
            programs,
            version,
            into,
        } => packages::build_all(&programs, &version, &into, false),
    });
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

fn build() -> Result<()> {
    step("build", cargo(["build", "--workspace", "--locked"]))
}

fn demo() -> Result<()> {
    build()?;
    package::install_native()?;
    // In our place, so that Ctrl-C reaches it and the shell waits for its
    // clean-up.
    replace("demo", command(target().join("debug/vmsnap-lab"), ["demo"]))
}

fn soak(short: bool, seed: usize, only: &str) -> Result<()> {
    build()?;
    if !short && only.is_empty() {
        let mut walks = in_lab()?;
        walks.args(["-E", "binary(walk)"]);
        walks.env("VMSNAP_WALK_SEED", "new");
        walks.env("VMSNAP_WALK_STEPS", "300");
        step("walks that nobody went before", walks)?;
    }
    let mut lab = command(target().join("debug/vmsnap-lab"), ["soak"]);
    lab.args(["--seed", &seed.to_string(), "--only", only]);
    if short {
        lab.arg("--short");
    }
    replace("soak", lab)
}

fn test(runner: &[String]) -> Result<()> {
    step("formatting", cargo(["fmt", "--all", "--check"]))?;
    let clippy = [
        "clippy",
        "--workspace",
        "--all-targets",
        "--locked",
        "--",
        "-D",
        "warnings",
    ];
    step("clippy", cargo(clippy))?;
    let proto = checkout().join("proto");
    step(
        "buf lint",
        command(python::tool("buf"), ["lint".as_ref(), proto.as_os_str()]),
    )?;
    build()?;
    package::install_native()?;
    step(
        "doc tests",
        cargo(["test", "--workspace", "--doc", "--locked", "--quiet"]),
    )?;
    let mut lab = in_lab()?;
    lab.args(runner);
    replace("tests", lab)
}

/// The test runner in a lab of its own.
fn in_lab() -> Result<Command> {
    // Built before the lab is up, so that guests do not share the cores with
    // the compiler.
    let mut tests = setup::nextest()?;
    tests.args(["run", "--workspace", "--locked", "--no-run"]);
    step("build of the tests", tests)?;
    let nextest = setup::nextest()?;
    let mut lab = command(target().join("debug/vmsnap-lab"), ["up", "--"]);
    lab.arg(nextest.get_program())
        .args(nextest.get_args())
        .args(["run", "--workspace", "--locked"]);
    if std::env::var_os(THREADS).is_none() {
        lab.env(THREADS, threads().to_string());
    }
    Ok(lab)
}

/// The runner's variable for how many tests run at once.
const THREADS: &str = "NEXTEST_TEST_THREADS";
/// How many tests with guests run at once, as `.config/nextest.toml` has it: they wait
/// more than they work.
const GUESTS: usize = 3;

/// As many tests at once as there are cores, and never fewer than may have guests.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(GUESTS, |cores| cores.get().max(GUESTS))
}
