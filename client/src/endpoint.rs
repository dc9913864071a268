//! Where an agent listens, as people write it.
//!
//! Invariants: an endpoint that parsed can be connected to in form; whether a
//! plain connection to it is allowed is asked at [`Endpoint::needs_tls`], and
//! plain TCP is allowed to loopback only. `http://` asks for a plain connection by
//! name, `https://` for TLS; without either, [`Endpoint::wants_tls`] decides.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    str::FromStr,
};

/// Where an agent listens unless its configuration says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/vmsnap/agent.sock";

/// The environment variable that names an agent where nothing else does.
pub const ENDPOINT_VARIABLE: &str = "VMSNAP_AGENT";

/// The longest path of a Unix socket: `sun_path` of unix(7) less its closing zero.
const LONGEST_SOCKET_PATH: usize = 107;

/// An address of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP address.
    Tcp {
        /// A name or an address, without the brackets of IPv6.
        host: String,
        /// The port, never zero.
        port: u16,
        /// `https://` (true) or `http://` (false) was written, or neither.
        tls: Option<bool>,
    },
}

/// An endpoint that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("agent {value:?}: {fault}; expected unix:///path/of/socket or host:port")]
pub struct EndpointError {
    /// The endpoint as written.
    pub value: String,
    /// What is wrong with it.
    pub fault: EndpointFault,
}

/// What is wrong with an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointFault {
    /// Nothing was written.
    #[error("empty")]
    Empty,
    /// A scheme other than `unix`, `http` and `https`.
    #[error("unknown scheme {0:?}")]
    UnknownScheme(String),
    /// A socket's path that does not begin at the root.
    #[error("the path {0:?} is not absolute")]
    RelativePath(String),
    /// A socket's path that no kernel would take.
    #[error("the path has {0} bytes, and a socket's path has at most {LONGEST_SOCKET_PATH}")]
    PathTooLong(usize),
    /// No port after the host.
    #[error("the port is missing")]
    NoPort,
    /// A port that is no number from 1 to 65535.
    #[error("port {0:?} is not a number from 1 to 65535")]
    BadPort(String),
    /// No host before the port.
    #[error("the host is missing")]
    NoHost,
    /// An IPv6 address without brackets, or brackets around something else.
    #[error(
        "{0:?} is neither a host name nor an address (an IPv6 address needs brackets, such as [::1]:7443)"
    )]
    BadHost(String),
    /// A path behind host and port.
    #[error("a path {0:?} after the port")]
    TrailingPath(String),
}

impl Default for Endpoint {
    fn default() -> Self {
        Endpoint::Unix(PathBuf::from(DEFAULT_SOCKET))
    }
}

impl Endpoint {
    /// Reads `unix:///path`, `/path`, `host:port`, `[::1]:7443`,
    /// `http://127.0.0.1:7443` or `https://host:7443`.
    ///
    /// # Errors
    /// An [`EndpointError`] that names the value and what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, EndpointError> {
        let value = text.trim();
        Self::read(value).map_err(|fault| EndpointError {
            value: value.to_owned(),
            fault,
        })
    }

    /// The endpoint of [`ENDPOINT_VARIABLE`] when it is set and not empty, else
    /// the default socket.
    ///
    /// # Errors
    /// As [`Endpoint::parse`].
    pub fn from_environment() -> Result<Self, EndpointError> {
        match std::env::var(ENDPOINT_VARIABLE) {
            Ok(value) if !value.trim().is_empty() => Self::parse(&value),
            _ => Ok(Self::default()),
        }
    }

    /// Whether only mutual TLS may be spoken to it: everything but a Unix socket
    /// and plain loopback.
    #[must_use]
    pub fn needs_tls(&self) -> bool {
        match self {
            Endpoint::Unix(_) => false,
            Endpoint::Tcp { host, tls, .. } => *tls == Some(true) || !is_loopback(host),
        }
    }

    /// Whether TLS is spoken to it, by a caller who has the files for it or not.
    #[must_use]
    pub fn wants_tls(&self, has_files: bool) -> bool {
        let unsaid = matches!(self, Endpoint::Tcp { tls: None, .. });
        self.needs_tls() || (unsaid && has_files)
    }

    fn read(value: &str) -> Result<Self, EndpointFault> {
        if value.is_empty() {
            return Err(EndpointFault::Empty);
        }
        if value.starts_with('/') {
            return socket(value);
        }
        if let Some(path) = value
            .strip_prefix("unix://")
            .or_else(|| value.strip_prefix("unix:"))
        {
            return socket(path);
        }
        let (address, tls) = match value.split_once("://") {
            None => (value, None),
            Some(("http", address)) => (address, Some(false)),
            Some(("https", address)) => (address, Some(true)),
            Some((scheme, _)) => return Err(EndpointFault::UnknownScheme(scheme.to_owned())),
        };
        let address = address.strip_suffix('/').unwrap_or(address);
        if let Some(slash) = address.find('/') {
            return Err(EndpointFault::TrailingPath(address[slash..].to_owned()));
        }
        tcp(address, tls)
    }
}

fn socket(path: &str) -> Result<Endpoint, EndpointFault> {
    if !Path::new(path).is_absolute() {
        return Err(EndpointFault::RelativePath(path.to_owned()));
    }
    if path.len() > LONGEST_SOCKET_PATH {
        return Err(EndpointFault::PathTooLong(path.len()));
    }
    Ok(Endpoint::Unix(PathBuf::from(path)))
}

fn tcp(address: &str, tls: Option<bool>) -> Result<Endpoint, EndpointFault> {
    let (host, port) = if let Some(rest) = address.strip_prefix('[') {
        let (host, port) = rest
            .split_once(']')
            .ok_or_else(|| EndpointFault::BadHost(address.to_owned()))?;
        if host.parse::<Ipv6Addr>().is_err() {
            return Err(EndpointFault::BadHost(host.to_owned()));
        }
        (host, port.strip_prefix(':').ok_or(EndpointFault::NoPort)?)
    } else {
        let (host, port) = address.rsplit_once(':').ok_or(EndpointFault::NoPort)?;
        let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if !host.chars().all(name) {
            return Err(EndpointFault::BadHost(host.to_owned()));
        }
        (host, port)
    };
    if host.is_empty() {
        return Err(EndpointFault::NoHost);
    }
    if port.is_empty() {
        return Err(EndpointFault::NoPort);
    }
    // `parse` alone would take "+80".
    let number = port
        .parse::<u16>()
        .ok()
        .filter(|n| *n > 0 && port.bytes().all(|b| b.is_ascii_digit()));
    let port = number.ok_or_else(|| EndpointFault::BadPort(port.to_owned()))?;
    Ok(Endpoint::Tcp {
        host: host.to_owned(),
        port,
        tls,
    })
}

fn is_loopback(host: &str) -> bool {
    match host.parse::<IpAddr>() {
        Ok(IpAddr::V4(address)) => address.is_loopback(),
        Ok(IpAddr::V6(address)) => {
            address.is_loopback()
                || address
                    .to_ipv4_mapped()
                    .as_ref()
                    .is_some_and(Ipv4Addr::is_loopback)
        }
        // Of names only this one is certain to stay on the machine (RFC 6761, 6.3).
        Err(_) => host.eq_ignore_ascii_case("localhost"),
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Unix(path) => write!(f, "unix://{}", path.display()),
            Endpoint::Tcp { host, port, tls } => {
                let scheme = match tls {
                    Some(true) => "https://",
                    Some(false) => "http://",
                    None => "",
                };
                if host.contains(':') {
                    write!(f, "{scheme}[{host}]:{port}")
                } else {
                    write!(f, "{scheme}{host}:{port}")
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16, tls: Option<bool>) -> Endpoint {
        Endpoint::Tcp {
            host: host.to_owned(),
            port,
            tls,
        }
    }

    #[test]
    fn the_ways_of_writing_an_endpoint_are_read_and_written_back() {
        for (text, endpoint, written) in [
            (
                "unix:///run/a.sock",
                Endpoint::Unix("/run/a.sock".into()),
                "unix:///run/a.sock",
            ),
            (
                "unix:/run/a.sock",
                Endpoint::Unix("/run/a.sock".into()),
                "unix:///run/a.sock",
            ),
            (
                "/run/a.sock",
                Endpoint::Unix("/run/a.sock".into()),
                "unix:///run/a.sock",
            ),
            (
                "kvm1.example:7443",
                tcp("kvm1.example", 7443, None),
                "kvm1.example:7443",
            ),
            ("[::1]:7443", tcp("::1", 7443, None), "[::1]:7443"),
            (
                "http://127.0.0.1:7443/",
                tcp("127.0.0.1", 7443, Some(false)),
                "http://127.0.0.1:7443",
            ),
            (
                "https://kvm1:7443",
                tcp("kvm1", 7443, Some(true)),
                "https://kvm1:7443",
            ),
        ] {
            assert_eq!(Endpoint::parse(text).as_ref(), Ok(&endpoint), "{text}");
            assert_eq!(endpoint.to_string(), written);
        }
        assert_eq!(
            Endpoint::default().to_string(),
            "unix:///run/vmsnap/agent.sock"
        );
    }

    #[test]
    fn a_malformed_endpoint_is_refused_with_its_value_its_fault_and_what_would_be_right() {
        for (text, fault) in [
            ("", "empty"),
            (
                "unix://run/a.sock",
                "the path \"run/a.sock\" is not absolute",
            ),
            ("ssh://host:1", "unknown scheme \"ssh\""),
            ("kvm1", "the port is missing"),
            ("kvm1:", "the port is missing"),
            (":7443", "the host is missing"),
            (
                "kvm1:70000",
                "port \"70000\" is not a number from 1 to 65535",
            ),
            ("kvm1:0", "port \"0\" is not a number from 1 to 65535"),
            ("kvm1:+80", "port \"+80\" is not a number from 1 to 65535"),
            ("[::1]", "the port is missing"),
            ("http://kvm1:7443/v1", "a path \"/v1\" after the port"),
            (
                "a b:1",
                "\"a b\" is neither a host name nor an address (an IPv6 address needs brackets, such as [::1]:7443)",
            ),
            (
                "::1:7443",
                "\"::1\" is neither a host name nor an address (an IPv6 address needs brackets, such as [::1]:7443)",
            ),
        ] {
            assert_eq!(
                Endpoint::parse(text).unwrap_err().to_string(),
                format!("agent {text:?}: {fault}; expected unix:///path/of/socket or host:port")
            );
        }
        let long = format!("/{}", "x".repeat(107));
        assert_eq!(
            Endpoint::parse(&long).unwrap_err().fault,
            EndpointFault::PathTooLong(108)
        );
    }

    #[test]
    fn who_has_the_files_for_tls_speaks_it_where_nothing_else_was_asked_for() {
        for (text, with, without) in [
            ("/run/a.sock", false, false),
            ("127.0.0.1:1", true, false),
            ("http://127.0.0.1:1", false, false),
            ("https://127.0.0.1:1", true, true),
            ("kvm1:1", true, true),
            ("http://kvm1:1", true, true),
        ] {
            let endpoint = Endpoint::parse(text).unwrap();
            assert_eq!(endpoint.wants_tls(true), with, "{text}");
            assert_eq!(endpoint.wants_tls(false), without, "{text}");
        }
    }

    #[test]
    fn only_sockets_and_loopback_go_without_tls() {
        for (text, needs) in [
            ("/run/a.sock", false),
            ("127.0.0.1:1", false),
            ("127.9.9.9:1", false),
            ("localhost:1", false),
            ("[::1]:1", false),
            ("[::ffff:127.0.0.1]:1", false),
            ("https://127.0.0.1:1", true),
            ("10.0.0.1:1", true),
            ("kvm1:1", true),
            ("localhost.example:1", true),
        ] {
            assert_eq!(Endpoint::parse(text).unwrap().needs_tls(), needs, "{text}");
        }
    }
}
