//! `vmsnap-agent`: the daemon on each hypervisor.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use vmsnap_agent::{config::Config, daemon};

/// VM snapshot workflows over libvirt, as a gRPC service.
#[derive(Debug, Parser)]
#[command(name = "vmsnap-agent", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until told to stop (SIGTERM or SIGINT).
    Serve {
        /// Configuration file; the default one may be absent.
        #[arg(long, value_name = "FILE", env = "VMSNAP_AGENT_CONFIG")]
        config: Option<PathBuf>,
    },
    /// Check the configuration, the journal and the way to libvirt, and change nothing.
    Check {
        /// Configuration file; the default one may be absent.
        #[arg(long, value_name = "FILE", env = "VMSNAP_AGENT_CONFIG")]
        config: Option<PathBuf>,
        /// Print the whole configuration as it applies.
        #[arg(long)]
        dump: bool,
    },
    /// Print the version.
    Version,
}

fn main() -> ExitCode {
    let _set = vmsnap_hypervisor::failpoint::from_environment();
    let arguments = Arguments::parse();
    let result = match arguments.command {
        Command::Version => {
            say(&format!("vmsnap-agent {}", env!("CARGO_PKG_VERSION")));
            return ExitCode::SUCCESS;
        }
        Command::Serve { config } => load(config).and_then(daemon::serve),
        Command::Check { config, dump } => load(config).and_then(|config| {
            if dump {
                let text = toml::to_string(&config).map_err(|error| error.to_string())?;
                say(text.trim_end());
            }
            let report = daemon::check(config)?;
            if !dump {
                say(&report);
            }
            Ok(())
        }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            complain(&problem);
            ExitCode::FAILURE
        }
    }
}

fn load(path: Option<PathBuf>) -> Result<Config, String> {
    let config = Config::load(path.as_deref()).map_err(|error| error.to_string())?;
    config.check().map_err(|error| error.to_string())?;
    Ok(config)
}

#[expect(clippy::print_stdout, reason = "what was asked for goes to stdout")]
fn say(text: &str) {
    println!("{text}");
}

#[expect(clippy::print_stderr, reason = "problems go to stderr")]
fn complain(problem: &str) {
    eprintln!("vmsnap-agent: {problem}");
}
