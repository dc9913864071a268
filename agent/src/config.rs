//! The agent's configuration: documented defaults, a TOML file over them, and
//! [layers] of environment and command line over that.
//!
//! Invariants: an absent file at the default path is fine; unknown keys are
//! refused with file, line and key; a value that cannot work is refused by
//! [`Config::check`] before anything starts.

pub mod layers;

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// Where the configuration is looked for unless another file is named.
pub const DEFAULT_PATH: &str = "/etc/vmsnap/agent.toml";

/// Where the roles are looked for unless another file is named; it may be absent.
pub const DEFAULT_ROLES: &str = "/etc/vmsnap/roles.toml";

/// Longest time that is configured in seconds: longer ones are slips, and the
/// longest that TOML can write lie beyond every clock.
const YEAR: u64 = 366 * 86_400;
/// The same for days.
const CENTURY: u64 = 36_525;

/// The whole configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The hypervisor.
    pub libvirt: Libvirt,
    /// Where callers reach the agent.
    pub listen: Listen,
    /// The agent's own proof, and whose word it takes for that of callers.
    pub tls: Tls,
    /// Who may do what.
    pub trust: Trust,
    /// The journal.
    pub journal: Journal,
    /// Storage.
    pub storage: Storage,
    /// Limits.
    pub limits: Limits,
    /// Guarded changes.
    pub guards: Guards,
    /// Logs.
    pub log: Log,
    /// Metrics.
    pub metrics: Metrics,
}

/// `[libvirt]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Libvirt {
    /// libvirt's connection URI.
    pub uri: String,
    /// Seconds that a reading call may take.
    pub read_timeout: u64,
    /// Seconds that a changing call may take; merges and memory captures are
    /// bounded by progress instead.
    pub effect_timeout: u64,
    /// Seconds that a releasing call (thaw, resume, abort) may take.
    pub release_timeout: u64,
}

/// `[listen]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Listen {
    /// Path of the Unix socket; empty for none.
    pub socket: PathBuf,
    /// Group that may use the socket; empty leaves the agent's own.
    pub socket_group: String,
    /// Permissions of the socket, in octal.
    pub socket_mode: String,
    /// Loopback address for plaintext TCP, such as `127.0.0.1:7443`; empty for
    /// none. Anything but loopback is refused.
    pub tcp: String,
    /// Address for mutual TLS, such as `0.0.0.0:7443` or `[::]:7443`; empty for
    /// none.
    pub tls: String,
}

/// `[tls]`: PEM files, read anew when they change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// The agent's certificate, followed by its intermediates.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The CAs that sign the certificates of callers.
    pub client_ca: PathBuf,
}

/// `[trust]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Trust {
    /// The file of roles, read anew when it changes.
    pub roles: PathBuf,
}

impl Default for Tls {
    fn default() -> Self {
        Self {
            certificate: "/etc/vmsnap/agent.pem".into(),
            key: "/etc/vmsnap/agent.key".into(),
            client_ca: "/etc/vmsnap/ca.pem".into(),
        }
    }
}

impl Default for Trust {
    fn default() -> Self {
        Self {
            roles: DEFAULT_ROLES.into(),
        }
    }
}

/// `[journal]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Journal {
    /// Path of the database.
    pub path: PathBuf,
    /// Runs older than this many days are removed.
    pub keep_days: u32,
    /// The newest runs that stay whatever their age.
    pub keep_runs: u32,
    /// Entries of the audit trail that stay at most of what was done, and a tenth as
    /// many of what was denied.
    pub keep_audit: u32,
    /// MiB of runs from which on the oldest go, however young they are; those that only
    /// listed go first.
    pub max_mib: u32,
}

/// `[storage]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Storage {
    /// No other host uses the network file systems that this one has.
    pub exclusive: bool,
}

/// `[limits]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Deepest backing chain to which a snapshot is still added.
    pub max_chain: u32,
    /// Runs that may be open at once.
    pub max_runs: u32,
    /// Those of one caller among them.
    pub max_runs_per_peer: u32,
    /// Connections that may be open at once at each door.
    pub max_connections: u32,
    /// Calls that may wait for their answer at once, streams apart.
    pub max_calls: u32,
    /// Those of one caller among them.
    pub max_calls_per_peer: u32,
    /// Streams that may be open at once.
    pub max_streams: u32,
    /// Those of one caller among them.
    pub max_streams_per_peer: u32,
    /// Seconds between heartbeats of a watched run.
    pub heartbeat: u64,
    /// Seconds that open runs may take to stop when the agent is told to.
    pub shutdown: u64,
    /// Seconds that a frozen guest is asked to thaw before its run is stuck.
    pub stuck_after: u64,
}

/// `[guards]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Guards {
    /// Seconds after its deadline in which a guarded change is still taken back
    /// when the agent starts; later somebody is asked.
    pub grace: u64,
}

impl Default for Guards {
    fn default() -> Self {
        Self { grace: 600 }
    }
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// Filter, such as `info` or `vmsnap_agent=debug`.
    pub level: String,
    /// `text` or `json`.
    pub format: LogFormat,
}

/// `[metrics]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Address with port, such as `127.0.0.1:9177`, or the path of a Unix socket;
    /// empty for none.
    pub listen: String,
}

/// Where metrics are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MetricsAddress {
    /// Over TCP.
    Tcp(SocketAddr),
    /// Over a Unix socket.
    Unix(PathBuf),
}

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for Libvirt {
    fn default() -> Self {
        Self {
            uri: "qemu:///system".into(),
            read_timeout: 20,
            effect_timeout: 120,
            release_timeout: 30,
        }
    }
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            socket: "/run/vmsnap/agent.sock".into(),
            socket_group: String::new(),
            socket_mode: "0660".into(),
            tcp: String::new(),
            tls: String::new(),
        }
    }
}

impl Default for Journal {
    fn default() -> Self {
        Self {
            path: "/var/lib/vmsnap/journal.db".into(),
            keep_days: 90,
            keep_runs: 1_000,
            keep_audit: 100_000,
            max_mib: 256,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_chain: 32,
            max_runs: 256,
            max_runs_per_peer: 128,
            max_connections: 2_048,
            max_calls: 512,
            max_calls_per_peer: 256,
            max_streams: 1_024,
            max_streams_per_peer: 512,
            heartbeat: 10,
            shutdown: 60,
            stuck_after: 30,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".into(),
            format: LogFormat::Text,
        }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// File and line, or the key.
    pub place: String,
    /// What is wrong and what would be right.
    pub problem: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}: {}", self.place, self.problem)
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// Understands a configuration's text; `place` names it in errors.
    ///
    /// # Errors
    /// With file, line and key.
    pub fn parse(text: &str, place: &str) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let line = error
                .span()
                .map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            ConfigError {
                place: match line {
                    Some(line) => format!("{place}:{line}"),
                    None => place.to_owned(),
                },
                problem: error.message().to_owned(),
            }
        })
    }

    /// Checks values against each other and against what can work.
    ///
    /// # Errors
    /// The first value that cannot work, with its key.
    pub fn check(&self) -> Result<(), ConfigError> {
        let wrong = |key: &str, problem: String| {
            Err(ConfigError {
                place: key.to_owned(),
                problem,
            })
        };
        if self.listen.socket.as_os_str().is_empty()
            && self.listen.tcp.is_empty()
            && self.listen.tls.is_empty()
        {
            return wrong(
                "listen",
                "neither socket nor tls nor tcp is set; nobody could call".into(),
            );
        }
        if !self.listen.tls.is_empty() && self.tls().is_none() {
            return wrong(
                "listen.tls",
                format!(
                    "'{}' is not an address with a port, such as 0.0.0.0:7443 or [::]:7443",
                    self.listen.tls
                ),
            );
        }
        if self.listen.socket.as_os_str().len() > 107 {
            return wrong(
                "listen.socket",
                format!(
                    "'{}' has {} bytes; a socket's path has 107 at most",
                    self.listen.socket.display(),
                    self.listen.socket.as_os_str().len()
                ),
            );
        }
        if self.socket_mode().is_none() {
            return wrong(
                "listen.socket_mode",
                format!(
                    "'{}' is not an octal mode such as 0660",
                    self.listen.socket_mode
                ),
            );
        }
        if !self.listen.tcp.is_empty() {
            match self.tcp() {
                Some(address) if address.ip().is_loopback() => {}
                Some(address) => {
                    return wrong(
                        "listen.tcp",
                        format!(
                            "{address} is not a loopback address; plaintext is served on loopback \
                             only, across hosts mutual TLS is needed (listen.tls)"
                        ),
                    );
                }
                None => {
                    return wrong(
                        "listen.tcp",
                        format!(
                            "'{}' is not an address with a port, such as 127.0.0.1:7443",
                            self.listen.tcp
                        ),
                    );
                }
            }
        }
        if !self.metrics.listen.is_empty() && self.metrics_address().is_none() {
            return wrong(
                "metrics.listen",
                format!(
                    "'{}' is neither an address with a port, such as 127.0.0.1:9177, nor the \
                     absolute path of a socket, 107 bytes at most",
                    self.metrics.listen.escape_debug()
                ),
            );
        }
        let any = u64::from(u32::MAX);
        for (key, value, least, most) in [
            ("libvirt.read_timeout", self.libvirt.read_timeout, 1, YEAR),
            (
                "libvirt.effect_timeout",
                self.libvirt.effect_timeout,
                1,
                YEAR,
            ),
            (
                "libvirt.release_timeout",
                self.libvirt.release_timeout,
                1,
                YEAR,
            ),
            ("limits.heartbeat", self.limits.heartbeat, 1, YEAR),
            ("limits.shutdown", self.limits.shutdown, 0, YEAR),
            ("limits.stuck_after", self.limits.stuck_after, 1, YEAR),
            ("limits.max_chain", u64::from(self.limits.max_chain), 1, any),
            ("limits.max_runs", u64::from(self.limits.max_runs), 1, any),
            (
                "limits.max_runs_per_peer",
                u64::from(self.limits.max_runs_per_peer),
                1,
                any,
            ),
            (
                "limits.max_connections",
                u64::from(self.limits.max_connections),
                1,
                any,
            ),
            ("limits.max_calls", u64::from(self.limits.max_calls), 1, any),
            (
                "limits.max_calls_per_peer",
                u64::from(self.limits.max_calls_per_peer),
                1,
                any,
            ),
            (
                "limits.max_streams",
                u64::from(self.limits.max_streams),
                1,
                any,
            ),
            (
                "limits.max_streams_per_peer",
                u64::from(self.limits.max_streams_per_peer),
                1,
                any,
            ),
            (
                "journal.keep_audit",
                u64::from(self.journal.keep_audit),
                1,
                any,
            ),
            ("guards.grace", self.guards.grace, 0, YEAR),
            ("journal.max_mib", u64::from(self.journal.max_mib), 1, any),
            (
                "journal.keep_days",
                u64::from(self.journal.keep_days),
                0,
                CENTURY,
            ),
        ] {
            if value < least {
                return wrong(key, "is 0; a number above 0 is needed".into());
            }
            if value > most {
                return wrong(key, format!("is {value}; {most} at most"));
            }
        }
        let path = |path: &Path| path.display().to_string();
        for (key, text) in [
            ("libvirt.uri", self.libvirt.uri.clone()),
            ("listen.socket", path(&self.listen.socket)),
            ("listen.socket_group", self.listen.socket_group.clone()),
            ("journal.path", path(&self.journal.path)),
            ("tls.certificate", path(&self.tls.certificate)),
            ("tls.key", path(&self.tls.key)),
            ("tls.client_ca", path(&self.tls.client_ca)),
            ("trust.roles", path(&self.trust.roles)),
        ] {
            if let Some(c) = text.chars().find(|c| c.is_control()) {
                let code = u32::from(c);
                return wrong(key, format!("has the control character U+{code:04X}"));
            }
        }
        match self.log_filter() {
            Ok(_) => Ok(()),
            Err(problem) => wrong("log.level", problem),
        }
    }

    /// Which lines are logged.
    ///
    /// # Errors
    /// What is wrong with `log.level`.
    pub fn log_filter(&self) -> Result<EnvFilter, String> {
        EnvFilter::try_new(&self.log.level).map_err(|error| {
            format!(
                "'{}' is not a filter such as info or vmsnap_agent=debug,info: {error}",
                self.log.level.escape_debug()
            )
        })
    }

    /// The socket's permissions.
    #[must_use]
    pub fn socket_mode(&self) -> Option<u32> {
        u32::from_str_radix(&self.listen.socket_mode, 8)
            .ok()
            .filter(|mode| *mode <= 0o777)
    }

    /// The TCP address.
    #[must_use]
    pub fn tcp(&self) -> Option<SocketAddr> {
        self.listen.tcp.parse().ok()
    }

    /// The address for mutual TLS.
    #[must_use]
    pub fn tls(&self) -> Option<SocketAddr> {
        self.listen.tls.parse().ok()
    }

    /// The files of TLS, where it is served.
    #[must_use]
    pub fn tls_paths(&self) -> Option<crate::trust::TlsPaths> {
        self.tls().map(|_| crate::trust::TlsPaths {
            certificate: self.tls.certificate.clone(),
            key: self.tls.key.clone(),
            client_ca: self.tls.client_ca.clone(),
        })
    }

    /// Where metrics are read; `None` when they are not, or it cannot be
    /// understood.
    #[must_use]
    pub fn metrics_address(&self) -> Option<MetricsAddress> {
        let listen = &self.metrics.listen;
        let a_path =
            listen.starts_with('/') && listen.len() <= 107 && !listen.chars().any(char::is_control);
        if a_path {
            return Some(MetricsAddress::Unix(listen.into()));
        }
        listen.parse().ok().map(MetricsAddress::Tcp)
    }

    /// Time between heartbeats.
    #[must_use]
    pub fn heartbeat(&self) -> Duration {
        Duration::from_secs(self.limits.heartbeat)
    }
}

/// A file's text; nothing for one that need not be there and is not.
fn read(path: &Path, needed: bool) -> Result<Option<String>, ConfigError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if !needed && error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ConfigError {
            place: path.display().to_string(),
            problem: format!("cannot be read: {error}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_the_defaults_and_they_pass_the_check() {
        let config = Config::parse("", "x").unwrap();
        assert_eq!(config, Config::default());
        assert_eq!(config.check(), Ok(()));
    }

    #[test]
    fn an_unknown_key_is_refused_with_file_line_and_key() {
        let error =
            Config::parse("[libvirt]\nurl = 'qemu:///session'\n", "/etc/a.toml").unwrap_err();
        assert_eq!(error.place, "/etc/a.toml:2");
        assert!(error.problem.contains("url"), "{error}");
    }

    #[test]
    fn plaintext_beyond_loopback_is_refused() {
        let config = Config::parse("[listen]\ntcp = '0.0.0.0:7443'\n", "x").unwrap();
        let error = config.check().unwrap_err();
        assert_eq!(error.place, "listen.tcp");
        assert!(error.problem.contains("mutual TLS"), "{error}");
    }

    #[test]
    fn an_address_for_tls_needs_a_port() {
        for (address, right) in [
            ("0.0.0.0:7443", true),
            ("[::]:7443", true),
            ("10.0.0.1", false),
            ("kvm1:7443", false),
        ] {
            let text = format!("[listen]\ntls = '{address}'\n");
            let checked = Config::parse(&text, "x").unwrap().check();
            assert_eq!(checked.is_ok(), right, "{address}");
            if let Err(error) = checked {
                assert_eq!(error.place, "listen.tls");
            }
        }
    }

    #[test]
    fn a_value_that_would_end_the_agent_later_is_refused_by_its_key() {
        for (text, key) in [
            (
                "[limits]\nshutdown = 9223372036854775807",
                "limits.shutdown",
            ),
            (
                "[limits]\nheartbeat = 9223372036854775807",
                "limits.heartbeat",
            ),
            (
                "[libvirt]\nread_timeout = 9223372036854775807",
                "libvirt.read_timeout",
            ),
            ("[guards]\ngrace = 9223372036854775807", "guards.grace"),
            ("[journal]\nkeep_days = 4294967295", "journal.keep_days"),
            ("[libvirt]\nuri = \"test:\\u0000\"", "libvirt.uri"),
            ("[journal]\npath = \"/a\\u0000\"", "journal.path"),
            ("[log]\nlevel = 'a=b=c'", "log.level"),
        ] {
            let config = Config::parse(text, "x").unwrap();
            assert_eq!(config.check().unwrap_err().place, key);
        }
    }

    #[test]
    fn a_wrong_type_names_the_line() {
        let error = Config::parse("\n[limits]\nmax_chain = 'deep'\n", "a").unwrap_err();
        assert_eq!(error.place, "a:3");
    }
}
