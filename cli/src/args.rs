//! The command line: what may be said, and its help.
//!
//! Invariant: nothing malformed gets past this module, so that a wrong use ends
//! with status 2 before an agent is asked.

use std::{path::PathBuf, time::Duration};

use clap::{
    Args, Parser, Subcommand,
    builder::{PossibleValuesParser, TypedValueParser},
};
use vmsnap_client::{
    Endpoint,
    json::Word,
    quantity::{QuantityError, parse_duration, parse_rate, parse_size},
};
use vmsnap_proto::v1;

/// Snapshots of VMs on libvirt hosts: create, revert, commit, clean up, and see
/// what every run did.
#[derive(Debug, Parser)]
#[command(name = "vmsnap", version, max_term_width = 100, after_help = EXIT_STATUS)]
pub struct Cli {
    /// Agent to talk to: unix:///path, or host:port (IPv6: [::1]:7443), by mutual TLS
    /// but for a plain http://127.0.0.1:port [env: VMSNAP_AGENT] [default: unix:///run/vmsnap/agent.sock]
    // Not clap's own `env`: a variable that is set and empty means the default.
    #[arg(long, global = true, value_name = "ENDPOINT")]
    pub agent: Option<Endpoint>,
    /// CA that signed the agent's certificate [env: VMSNAP_CA_PATH]
    #[arg(long, global = true, value_name = "FILE")]
    pub ca_path: Option<PathBuf>,
    /// Certificate that says who calls [env: VMSNAP_CLIENT_CERT]
    #[arg(long, global = true, value_name = "FILE")]
    pub client_cert: Option<PathBuf>,
    /// Its key [env: VMSNAP_CLIENT_KEY]
    #[arg(long, global = true, value_name = "FILE")]
    pub client_key: Option<PathBuf>,
    /// Write one JSON document to standard output; one a line for what streams
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_STATUS: &str = "\
Exit status: 0 done; 1 failed or refused; 2 wrong use; 3 no agent reached, or none that trusts; 130 left with Ctrl-C \
(the run goes on at the agent).";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List VMs, or the snapshots of one VM as a tree
    #[command(visible_alias = "list")]
    Ls {
        /// VM whose snapshots to list; all VMs when left out
        vm: Option<String>,
    },
    /// Show everything that is known of a VM or of a run
    Show {
        /// Name of a VM, or id of a run
        what: String,
    },
    /// Make a snapshot
    Create(Box<CreateArgs>),
    /// Go back to a snapshot
    Revert(Box<RevertArgs>),
    /// Keep the present state and drop restore points by merging them
    Commit(Box<CommitArgs>),
    /// Delete a snapshot, what a policy does not keep, or left-over volumes
    Cleanup(Box<CleanupArgs>),
    /// Confirm a guarded change, so that it is not reverted
    Confirm {
        /// Name of the VM
        vm: String,
        /// The guarded snapshot; may be left out when only one is pending
        name: Option<String>,
    },
    /// List runs, newest first, or the events of one run
    Log(LogArgs),
    /// Follow a run to its end, past events first
    Watch {
        /// Id of the run
        id: String,
        /// First event wanted
        #[arg(long, value_name = "SEQUENCE", default_value_t = 1)]
        from: u64,
    },
    /// Stop a run between steps and undo what it did
    Cancel {
        /// Id of the run
        id: String,
    },
    /// Close a run that is stuck, with what was done about it
    Resolve {
        /// Id of the run
        id: String,
        /// What was done, for the record
        #[arg(long)]
        note: String,
    },
    /// List a pool's volumes and which VMs use them
    Volumes {
        /// Pool to list
        #[arg(default_value = "default")]
        pool: String,
    },
    /// Known issues, built in and learned here: list them, record a fix that worked, forget one
    Issues {
        #[command(subcommand)]
        command: Option<IssuesCommand>,
    },
    /// Who changed what, and who was denied
    Audit(AuditArgs),
    /// Make a small CA and certificates for agents and people, or look at some
    Cert {
        #[command(subcommand)]
        command: CertCommand,
    },
    /// Tell what is wrong at the agent, and what to do about it; status 1 when something is
    Health,
    /// Show the versions of this program, of the agent and of its hypervisor
    Version,
    /// Write the manual pages, and completions for shells, into a folder
    #[command(hide = true)]
    Manual {
        /// A folder that is there
        folder: PathBuf,
    },
}

/// What the four changing commands have in common.
#[derive(Debug, Args)]
#[command(next_help_heading = "The run")]
pub struct RunArgs {
    /// Only show what would be done
    #[arg(long)]
    pub check: bool,
    /// Return as soon as the run was accepted
    #[arg(long, conflicts_with = "check")]
    pub no_wait: bool,
    /// Start the VM first when it is off; it then stays running
    #[arg(long)]
    pub start_if_stopped: bool,
    /// Pool for volumes and resizing
    #[arg(long, value_name = "POOL", default_value = "default")]
    pub pool: String,
    /// Join the run of this id instead of running again
    #[arg(long, value_name = "ID")]
    pub request_id: Option<String>,
    /// Run only if the plan still has this hash (see --check)
    #[arg(long, value_name = "HASH")]
    pub plan_hash: Option<String>,
    /// Cancel the run when it takes longer
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub timeout: Option<Duration>,
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Name of the VM
    pub vm: String,
    /// Name of the snapshot; made from the time when left out
    pub name: Option<String>,
    /// What the snapshot is for
    #[arg(long, short, value_name = "TEXT", default_value_t)]
    pub description: String,
    /// Save memory too, so that a revert goes on where the guest was
    #[arg(long)]
    pub memory: bool,
    /// How the data is kept
    #[arg(long, value_parser = word::<v1::SnapshotKind>(["auto", "internal", "external"]), default_value = "auto")]
    pub kind: v1::SnapshotKind,
    /// How whole the data must be for the guest; auto freezes if it can, else suspends
    #[arg(long, value_parser = word::<v1::Consistency>(["auto", "filesystem", "suspend", "crash"]), default_value = "auto")]
    pub consistency: v1::Consistency,
    /// What to do when there is a snapshot of that name
    #[arg(long, value_parser = word::<v1::IfExists>(["ok", "fail", "replace"]), default_value = "ok")]
    pub if_exists: v1::IfExists,
    /// Refuse an existing snapshot of that name that is older
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub max_age: Option<Duration>,
    /// Disk to leave out, such as vdb; may be given more than once
    #[arg(
        long = "exclude-disk",
        value_name = "TARGET",
        requires = "accept_no_revert"
    )]
    pub exclude_disks: Vec<String>,
    /// Accept that a snapshot without every disk cannot be reverted to
    #[arg(long)]
    pub accept_no_revert: bool,
    /// Let no policy remove it
    #[arg(long)]
    pub protected: bool,
    /// Revert by itself unless `vmsnap confirm` comes within this time
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub revert_unless_confirmed: Option<Duration>,
    /// Refuse when the guest would stand still for longer
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub max_stop: Option<Duration>,
    /// Give up freezing after this time
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "10s")]
    pub freeze_timeout: Duration,
    #[command(flatten)]
    pub wait: WaitArgs,
    #[command(flatten)]
    pub run: RunArgs,
}

/// What to wait for before a run is over.
#[derive(Debug, Args)]
pub struct WaitArgs {
    /// Wait until the guest is back this far
    #[arg(long, value_parser = word::<v1::WaitFor>(["none", "agent", "address", "ssh"]), default_value = "none")]
    pub wait_for: v1::WaitFor,
    /// How long to wait for it
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "300s")]
    pub wait_timeout: Duration,
}

#[derive(Debug, Args)]
pub struct RevertArgs {
    /// Name of the VM
    pub vm: String,
    /// Snapshot to go back to
    pub name: String,
    /// State of the VM afterwards
    #[arg(long, value_parser = word::<v1::StateAfter>(["auto", "running", "paused", "stopped"]), default_value = "auto")]
    pub state_after: v1::StateAfter,
    /// Keep the present state as a snapshot first
    #[arg(long)]
    pub safety_snapshot: bool,
    #[command(flatten)]
    pub wait: WaitArgs,
    /// Leave the guest's clock as the saved memory has it
    #[arg(long)]
    pub no_sync_clock: bool,
    /// Do what libvirt itself asks force for, drop a managed save, and let external snapshots go that
    /// stand on the image of an internal one
    #[arg(long)]
    pub force: bool,
    /// Refuse a snapshot that is older
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub max_age: Option<Duration>,
    /// Go back to the disks alone, without the memory that was saved: where it is gone or cannot be loaded
    #[arg(long)]
    pub disks_only: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Debug, Args)]
pub struct CommitArgs {
    /// Name of the VM
    pub vm: String,
    /// Merge this snapshot and those after it; without a name and --all nothing is merged
    #[arg(conflicts_with = "all")]
    pub name: Option<String>,
    /// Merge the whole chain of this VM
    #[arg(long)]
    pub all: bool,
    /// New size of the disk, such as 20G
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub resize_to: Option<u64>,
    /// Disk to resize, such as vda; needed when it is not clear
    #[arg(long, value_name = "TARGET", requires = "resize_to")]
    pub resize_disk: Option<String>,
    /// Let the new size be smaller than the present one (the VM must be off)
    #[arg(long, requires = "resize_to")]
    pub allow_shrink: bool,
    /// Merge at most this much a second, such as 100M/s
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub bandwidth: Option<u64>,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Debug, Args)]
pub struct CleanupArgs {
    /// Name of the VM
    pub vm: String,
    /// Snapshot to delete; without one, a policy or the left-overs
    #[arg(conflicts_with_all = [
        "keep_last", "keep_within", "keep_hourly", "keep_daily", "keep_weekly", "keep_monthly", "older_than",
        "name_pattern", "include_foreign",
    ])]
    pub name: Option<String>,
    /// What happens to the snapshot's children
    #[arg(long, requires = "name", value_parser = word::<v1::Children>(["keep", "delete", "only"]))]
    pub children: Option<v1::Children>,
    /// Keep the newest this many
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_last: Option<u32>,
    /// Keep all that are younger
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub keep_within: Option<Duration>,
    /// Keep the last of each of this many hours
    #[arg(long, value_name = "COUNT")]
    pub keep_hourly: Option<u32>,
    /// Keep the last of each of this many days
    #[arg(long, value_name = "COUNT")]
    pub keep_daily: Option<u32>,
    /// Keep the last of each of this many weeks
    #[arg(long, value_name = "COUNT")]
    pub keep_weekly: Option<u32>,
    /// Keep the last of each of this many months
    #[arg(long, value_name = "COUNT")]
    pub keep_monthly: Option<u32>,
    /// Remove only what is older
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub older_than: Option<Duration>,
    /// Remove only snapshots whose name matches, such as 'nightly-*'
    #[arg(long, value_name = "GLOB")]
    pub name_pattern: Option<String>,
    /// Let a policy remove snapshots that vmsnap did not make
    #[arg(long)]
    pub include_foreign: bool,
    /// Zone in which hours, days, weeks and months begin; the host's when left out
    #[arg(long, value_name = "ZONE")]
    pub time_zone: Option<String>,
    /// Volume to delete when nothing uses it; may be given more than once
    /// [default: {vm_name}-old.qcow2, unless there is a policy]
    #[arg(
        long = "leftover",
        value_name = "VOLUME",
        conflicts_with = "no_leftovers"
    )]
    pub leftovers: Vec<String>,
    /// Delete no left-over volume
    #[arg(long)]
    pub no_leftovers: bool,
    /// What happens to files that no VM refers to (delete: only those that vmsnap made)
    #[arg(long, value_parser = word::<v1::Orphans>(["ignore", "report", "delete"]), default_value = "report")]
    pub orphans: v1::Orphans,
    /// Merge at most this much a second, such as 100M/s
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub bandwidth: Option<u64>,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Debug, Args)]
pub struct LogArgs {
    /// VM whose runs to list, or id of the run whose events to show
    pub what: Option<String>,
    /// At most this many runs
    #[arg(long, short = 'n', value_name = "COUNT", default_value_t = 20)]
    pub limit: usize,
    /// Only runs in this state; may be given more than once
    #[arg(long = "state", value_parser = word::<v1::WorkflowState>([
        "queued", "running", "undoing", "succeeded", "failed", "cancelled", "stuck", "refused",
    ]))]
    pub states: Vec<v1::WorkflowState>,
    /// Only runs of this action; may be given more than once
    #[arg(long = "action", value_parser = word::<v1::Action>([
        "create", "revert", "commit", "list", "cleanup", "confirm",
    ]))]
    pub actions: Vec<v1::Action>,
}

#[derive(Debug, Subcommand)]
pub enum IssuesCommand {
    /// List them: those learned here first, then the built-in ones
    List {
        /// Only those that apply to this VM now
        #[arg(long)]
        vm: Option<String>,
    },
    /// Record the fix that worked against an error here
    Record {
        /// Reason code of the error, such as NO_SPACE
        reason: String,
        /// What worked
        fix: String,
        /// Pool, folder or VM that it is about; all when left out
        #[arg(long, value_name = "POOL|PATH|VM")]
        subject: Option<String>,
    },
    /// Forget what was learned: an error that was seen here, with its fix
    Forget {
        /// Its id, as listed
        id: String,
    },
}

#[derive(Debug, Args)]
pub struct AuditArgs {
    /// Only about this VM
    #[arg(long, value_name = "VM")]
    pub vm: Option<String>,
    /// Only of this caller, such as uid:1000 or the name of a certificate
    #[arg(long, value_name = "IDENTITY")]
    pub caller: Option<String>,
    /// Only of this call, such as RunWorkflow
    #[arg(long, value_name = "CALL")]
    pub method: Option<String>,
    /// Only what was denied
    #[arg(long)]
    pub denied: bool,
    /// Only what is younger
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub since: Option<Duration>,
    /// At most this many, the newest
    #[arg(long, short = 'n', value_name = "COUNT", default_value_t = 50)]
    pub limit: usize,
    /// Go on and show what comes
    #[arg(long, short)]
    pub follow: bool,
}

#[derive(Debug, Subcommand)]
pub enum CertCommand {
    /// Make a CA: ca.pem and ca.key
    Ca {
        /// Folder of the CA and of its certificates
        #[arg(long, value_name = "FOLDER", default_value = ".")]
        dir: PathBuf,
        /// Name of the CA
        #[arg(long, default_value = "vmsnap CA")]
        name: String,
        /// How long it is valid
        #[arg(long, value_name = "DAYS", default_value_t = 3_650, value_parser = clap::value_parser!(u32).range(1..36_500))]
        days: u32,
    },
    /// Make a certificate for an agent: NAME.pem and NAME.key
    Agent {
        /// Names and addresses by which callers reach it; the first one names the files
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        #[command(flatten)]
        new: NewCert,
    },
    /// Make a certificate for a person or a program that calls: NAME.pem and NAME.key
    Person {
        /// The name that stands in the agents' roles
        name: String,
        #[command(flatten)]
        new: NewCert,
    },
    /// Show whom certificates are for, who signed them and how long they are valid
    Show {
        /// PEM files
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
}

/// How a certificate is made.
#[derive(Debug, Args)]
pub struct NewCert {
    /// Folder of the CA and of its certificates
    #[arg(long, value_name = "FOLDER", default_value = ".")]
    pub dir: PathBuf,
    /// How long it is valid
    #[arg(long, value_name = "DAYS", default_value_t = 397, value_parser = clap::value_parser!(u32).range(1..36_500))]
    pub days: u32,
    /// Replace the certificate and key of that name
    #[arg(long)]
    pub renew: bool,
}

fn duration(text: &str) -> Result<Duration, QuantityError> {
    parse_duration(text)
}

fn size(text: &str) -> Result<u64, QuantityError> {
    parse_size(text)
}

fn rate(text: &str) -> Result<u64, QuantityError> {
    parse_rate(text)
}

/// One of the given words as a value of the contract. `auto` is the contract's
/// own where it has one, and else what the contract calls unspecified.
fn word<E>(words: impl IntoIterator<Item = &'static str>) -> impl TypedValueParser<Value = E>
where
    E: Word + Send + Sync + Default,
{
    PossibleValuesParser::new(words).map(|word| E::from_word(&word).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_contradicts_itself_nowhere() {
        Cli::command().debug_assert();
    }

    /// The words of a command as a shell has them, up to a comment or another command.
    fn words(command: &str) -> Vec<String> {
        let mut words = Vec::new();
        let (mut word, mut quoted) = (String::new(), None);
        for c in command.chars().chain([' ']) {
            match quoted {
                Some(quote) if c == quote => quoted = None,
                Some(_) => word.push(c),
                None if matches!(c, '\'' | '"') => quoted = Some(c),
                None if c.is_whitespace() => {
                    if matches!(word.as_str(), "#" | "|" | ">" | "&&" | "&") {
                        return words;
                    }
                    if !word.is_empty() {
                        words.push(std::mem::take(&mut word));
                    }
                }
                None => word.push(c),
            }
        }
        words
    }

    /// Every command that a page tells to give: in a block of code the lines that
    /// begin with it, elsewhere what stands between backticks.
    fn commands(page: &str) -> Vec<String> {
        let mut found = Vec::new();
        let mut in_block = false;
        for line in page.lines() {
            let of_block = line.trim_start().starts_with("```");
            if of_block {
                in_block = !in_block;
            } else if in_block {
                found.push(line.trim().to_owned());
            } else {
                found.extend(line.split('`').skip(1).step_by(2).map(str::to_owned));
            }
        }
        found.retain(|command| command.starts_with("vmsnap "));
        found
    }

    #[test]
    fn every_command_that_the_documentation_tells_is_one_of_these() {
        use clap::error::ErrorKind as Kind;
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
        let mut pages = vec![
            format!("{root}/README.md").into(),
            format!("{root}/collection/README.md").into(),
        ];
        for folder in ["docs", "docs/errors"] {
            let files = std::fs::read_dir(format!("{root}/{folder}")).unwrap();
            pages.extend(files.map(|file| file.unwrap().path()));
        }
        pages.retain(|page: &PathBuf| page.extension().is_some_and(|it| it == "md"));
        let (mut tried, mut wrong) = (0, Vec::new());
        for page in pages {
            let text = std::fs::read_to_string(&page).unwrap();
            for command in commands(&text) {
                tried += 1;
                if let Err(error) = Cli::try_parse_from(words(&command)) {
                    // What a sentence names need not be whole.
                    let only_named = matches!(
                        error.kind(),
                        Kind::MissingRequiredArgument
                            | Kind::MissingSubcommand
                            | Kind::DisplayHelpOnMissingArgumentOrSubcommand
                    );
                    if !only_named {
                        wrong.push(format!("{}: {command}: {error}", page.display()));
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert!(tried > 80, "only {tried} commands were found");
    }

    #[test]
    fn words_become_the_contracts_values_and_auto_the_unspecified_one() {
        let cli = Cli::parse_from(["vmsnap", "create", "web1", "--consistency", "filesystem"]);
        let Command::Create(create) = cli.command else {
            panic!("create was asked for")
        };
        assert_eq!(create.consistency, v1::Consistency::Filesystem);
        assert_eq!(create.kind, v1::SnapshotKind::Unspecified);
        let cli = Cli::parse_from(["vmsnap", "revert", "web1", "before"]);
        let Command::Revert(revert) = cli.command else {
            panic!("revert was asked for")
        };
        assert_eq!(revert.state_after, v1::StateAfter::Auto);
    }

    #[test]
    fn wrong_quantities_are_refused_with_the_option_and_what_would_be_right() {
        let error =
            Cli::try_parse_from(["vmsnap", "commit", "web1", "--resize-to", "20GB"]).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("--resize-to") && text.contains("GiB"),
            "{text}"
        );
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn keeping_nothing_is_refused() {
        assert!(Cli::try_parse_from(["vmsnap", "cleanup", "web1", "--keep-last", "0"]).is_err());
    }
}
