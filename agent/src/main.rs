//! `vmsnap-agent`: the daemon on each hypervisor.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use vmsnap_agent::{
    config::{
        Config,
        layers::{Layers, Loaded, Setting},
    },
    daemon,
};

/// What a configuration that cannot be used ends with: `EX_CONFIG` of sysexits.h,
/// so that a service manager can tell it from what may pass.
const CONFIGURATION: u8 = 78;

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
    Serve(Configured),
    /// Check the configuration, the journal and the way to libvirt, and change nothing.
    Check {
        #[command(flatten)]
        configured: Configured,
        /// Print the whole configuration as it applies, and what is not a default
        /// with where it comes from.
        #[arg(long)]
        dump: bool,
    },
    /// Print the version.
    Version,
    /// Write the manual pages into a folder.
    #[command(hide = true)]
    Manual {
        /// A folder that is there.
        folder: PathBuf,
    },
}

/// The configuration: defaults, the file over them, VMSNAP_AGENT_SECTION_KEY of the
/// environment over that, and these over all.
#[derive(Debug, Args)]
struct Configured {
    /// Configuration file; the default one may be absent.
    #[arg(long, value_name = "FILE", env = "VMSNAP_AGENT_CONFIG")]
    config: Option<PathBuf>,
    /// Any key, such as limits.max_chain=16; may be given more than once.
    #[arg(long, value_name = "KEY=VALUE", value_parser = setting)]
    set: Vec<Setting>,
    /// libvirt's connection URI (libvirt.uri).
    #[arg(long, value_name = "URI")]
    libvirt_uri: Option<String>,
    /// Path of the Unix socket (listen.socket).
    #[arg(long, value_name = "PATH")]
    socket: Option<String>,
    /// Path of the journal (journal.path).
    #[arg(long, value_name = "PATH")]
    journal: Option<String>,
    /// Where metrics are read (metrics.listen).
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<String>,
    /// Filter for the log (log.level).
    #[arg(long, value_name = "FILTER")]
    log_level: Option<String>,
}

fn setting(text: &str) -> Result<Setting, String> {
    let (key, value) = text
        .split_once('=')
        .ok_or("it has to be KEY=VALUE, such as limits.max_chain=16")?;
    Ok(Setting {
        flag: "--set".into(),
        key: key.into(),
        value: value.into(),
    })
}

impl Configured {
    fn load(self) -> Result<Loaded, Problem> {
        let own = [
            ("--libvirt-uri", "libvirt.uri", self.libvirt_uri),
            ("--socket", "listen.socket", self.socket),
            ("--journal", "journal.path", self.journal),
            ("--metrics", "metrics.listen", self.metrics),
            ("--log-level", "log.level", self.log_level),
        ];
        let own = own.into_iter().filter_map(|(flag, key, value)| {
            Some(Setting {
                flag: flag.into(),
                key: key.into(),
                value: value?,
            })
        });
        let layers = Layers {
            file: self.config,
            environment: std::env::vars_os()
                .filter_map(|(name, value)| {
                    Some((name.into_string().ok()?, value.to_string_lossy().into()))
                })
                .collect(),
            settings: self.set.into_iter().chain(own).collect(),
        };
        layers
            .load()
            .map_err(|error| Problem::Configuration(error.to_string()))
    }
}

enum Problem {
    Configuration(String),
    Other(String),
}

fn main() -> ExitCode {
    let _set = vmsnap_hypervisor::failpoint::from_environment();
    let arguments = Arguments::parse();
    let result = match arguments.command {
        Command::Version => {
            say(&format!("vmsnap-agent {}", env!("CARGO_PKG_VERSION")));
            return ExitCode::SUCCESS;
        }
        Command::Manual { folder } => manual(&folder)
            .map_err(|error| Problem::Other(format!("{}: {error}", folder.display()))),
        Command::Serve(configured) => configured
            .load()
            .and_then(|loaded| daemon::serve(loaded.config).map_err(Problem::Other)),
        Command::Check { configured, dump } => configured.load().and_then(|loaded| {
            if dump {
                say(dumped(&loaded).map_err(Problem::Other)?.trim_end());
            }
            let report = daemon::check(loaded.config).map_err(Problem::Other)?;
            if !dump {
                say(&report);
            }
            Ok(())
        }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Problem::Configuration(problem)) => {
            complain(&problem);
            ExitCode::from(CONFIGURATION)
        }
        Err(Problem::Other(problem)) => {
            complain(&problem);
            ExitCode::FAILURE
        }
    }
}

/// Writes a page for the program and for each of its commands.
fn manual(folder: &Path) -> std::io::Result<()> {
    let mut whole = Arguments::command().disable_help_subcommand(true);
    whole.build();
    let commands = whole.get_subcommands().filter(|one| !one.is_hide_set());
    for page in commands.chain([&whole]) {
        clap_mangen::Man::new(page.clone())
            .section("8")
            .generate_to(folder)?;
    }
    Ok(())
}

/// The configuration as a file would have it, after what is not a default.
fn dumped(loaded: &Loaded) -> Result<String, String> {
    let mut text = String::new();
    for (key, source) in &loaded.sources {
        text.push_str(&format!("# {key} from {source}\n"));
    }
    let config: &Config = &loaded.config;
    text.push_str(&toml::to_string(config).map_err(|error| error.to_string())?);
    Ok(text)
}

#[expect(clippy::print_stdout, reason = "what was asked for goes to stdout")]
fn say(text: &str) {
    println!("{text}");
}

#[expect(clippy::print_stderr, reason = "problems go to stderr")]
fn complain(problem: &str) {
    eprintln!("vmsnap-agent: {problem}");
}
