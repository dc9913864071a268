//! `vmsnap-lab`: the lab from the command line.

mod bench;
mod demo;

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use vmsnap_tests::{
    OwnedLab,
    contract::{Choice, run_contract},
    image::Image,
    reaper,
    wait::{INTERRUPT, interrupted},
};

/// A private libvirt daemon with real guests, for tests and the demo.
#[derive(Debug, Parser)]
#[command(name = "vmsnap-lab")]
struct Arguments {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Build the guest's image.
    Image,
    /// Start a lab, run a command in it, take it down.
    Up {
        /// Number of Linux guests: one for each test that runs beside others.
        #[arg(long, default_value_t = 3)]
        guests: u32,
        /// The command, with its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Lists of many snapshots, beside virsh.
    Bench {
        /// Number of VMs.
        #[arg(long, default_value_t = 200)]
        vms: usize,
        /// Number of snapshots of each.
        #[arg(long, default_value_t = 20)]
        snapshots: usize,
    },
    /// Break every action at every place and see what is left.
    Soak {
        /// One place in twelve, and all of holds and points of no return.
        #[arg(long)]
        short: bool,
        /// Which of them.
        #[arg(long, default_value_t = 0)]
        seed: usize,
        /// Only scenarios whose name holds this.
        #[arg(long, default_value = "")]
        only: String,
    },
    /// The main job, from a snapshot to its clean-up, on a real guest.
    Demo,
}

fn main() -> ExitCode {
    // The lab is taken down by its owner's drop: a signal only says so.
    for signal in [
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGHUP,
    ] {
        if let Err(error) = signal_hook::flag::register(signal, INTERRUPT.clone()) {
            complain(&format!("signals cannot be handled: {error}"));
        }
    }
    let command = Arguments::parse().command;
    if let Err(error) = reaper::adopt() {
        complain(&format!("{error:#}; every stop of a VM may take seconds"));
    }
    let result = match command {
        Verb::Image => Image::build().map(|_| 0),
        Verb::Up { guests, command } => up(guests, &command),
        Verb::Bench { vms, snapshots } => bench::run(vms, snapshots).map(|()| 0),
        Verb::Demo => demo::run(),
        Verb::Soak { short, seed, only } => soak(Choice {
            one_in: if short { 12 } else { 1 },
            seed,
            only,
        }),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn up(guests: u32, words: &[String]) -> Result<u8> {
    let lab = OwnedLab::start(guests)?;
    let mut child = lab
        .with(&words[0], &words[1..])
        .spawn()
        .with_context(|| format!("'{}' cannot be run", words[0]))?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status
                .code()
                .map_or(1, |code| u8::try_from(code).unwrap_or(1)));
        }
        if interrupted() {
            vmsnap_tests::command::end(&mut child, Duration::from_secs(10));
            return Ok(130);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[expect(clippy::print_stdout, reason = "the matrix is what was asked for")]
fn soak(choice: Choice) -> Result<u8> {
    let owned = OwnedLab::start(2)?;
    let report = run_contract(&owned.lab, &choice)?;
    println!("{}", report.text());
    Ok(u8::from(!report.failures().is_empty()))
}

#[expect(clippy::print_stderr, reason = "problems go to stderr")]
fn complain(problem: &str) {
    eprintln!("vmsnap-lab: {problem}");
}
