//! Who is at the other end of a connection, from what the transport proves.
//!
//! Invariant: a certificate's names are its subject alternative names, all of
//! them, and its common name only when it has none.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use jiff::Timestamp;
use x509_parser::{
    certificate::X509Certificate,
    extensions::GeneralName,
    prelude::{FromDer as _, ParsedExtension},
};

use crate::journal::Caller;

/// The other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// A process on this host, over the Unix socket.
    Socket {
        /// Its user, as the kernel tells.
        uid: Option<u32>,
        /// Its groups, as the kernel tells.
        groups: Arc<[u32]>,
    },
    /// Somebody on this host, over plain TCP.
    Loopback {
        /// His end of the connection.
        address: SocketAddr,
    },
    /// Somebody with a certificate that a CA of ours signed.
    Certificate {
        /// His end of the connection.
        address: SocketAddr,
        /// The names of the certificate; the first one stands in records.
        names: Arc<[String]>,
        /// Until when the certificate is valid.
        until: Timestamp,
    },
}

impl Peer {
    /// As it stands in records.
    #[must_use]
    pub fn caller(&self) -> Caller {
        let of = |identity: String, transport: &str, address: Option<&SocketAddr>| Caller {
            identity,
            transport: transport.into(),
            address: address.map(ToString::to_string).unwrap_or_default(),
        };
        match self {
            Self::Socket { uid, .. } => of(
                uid.map_or_else(|| "unknown".to_owned(), |uid| format!("uid:{uid}")),
                "unix",
                None,
            ),
            Self::Loopback { address } => of("loopback".into(), "tcp", Some(address)),
            Self::Certificate { address, names, .. } => of(
                names.first().cloned().unwrap_or_default(),
                "tls",
                Some(address),
            ),
        }
    }

    /// Whether its certificate has run out since the connection was made.
    #[must_use]
    pub fn has_expired(&self, now: Timestamp) -> bool {
        matches!(self, Self::Certificate { until, .. } if *until < now)
    }

    /// How long its certificate is still valid, rounded up, so that it has run out
    /// after that; none where it has no certificate.
    #[must_use]
    pub fn left(&self, now: Timestamp) -> Option<Duration> {
        match self {
            Self::Certificate { until, .. } => {
                let left = Duration::try_from(now.duration_until(*until)).unwrap_or_default();
                Some(left + Duration::from_millis(1))
            }
            _ => None,
        }
    }

    /// A peer by its certificate, which the handshake has verified.
    ///
    /// # Errors
    /// When it cannot be read, or has no name at all.
    pub fn by_certificate(address: SocketAddr, der: &[u8]) -> Result<Self, String> {
        let (_, certificate) = X509Certificate::from_der(der)
            .map_err(|error| format!("the client certificate cannot be read: {error}"))?;
        let names = names(&certificate);
        if names.is_empty() {
            return Err(
                "the client certificate has no name: neither a subject alternative name nor a \
                 common name"
                    .into(),
            );
        }
        let until = Timestamp::from_second(certificate.validity().not_after.timestamp())
            .unwrap_or(Timestamp::MAX);
        Ok(Self::Certificate {
            address,
            names: names.into(),
            until,
        })
    }
}

/// A certificate's names: DNS names, mail addresses, URIs and IP addresses of its
/// subject alternative names; without any its common name.
#[must_use]
pub fn names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let mut found = Vec::new();
    let mut alternative = false;
    for extension in certificate.extensions() {
        let ParsedExtension::SubjectAlternativeName(san) = extension.parsed_extension() else {
            continue;
        };
        alternative = true;
        for name in &san.general_names {
            match name {
                GeneralName::DNSName(name)
                | GeneralName::RFC822Name(name)
                | GeneralName::URI(name) => found.push((*name).to_owned()),
                GeneralName::IPAddress(bytes) => {
                    if let Ok(four) = <[u8; 4]>::try_from(*bytes) {
                        found.push(std::net::Ipv4Addr::from(four).to_string());
                    } else if let Ok(sixteen) = <[u8; 16]>::try_from(*bytes) {
                        found.push(std::net::Ipv6Addr::from(sixteen).to_string());
                    }
                }
                _ => {}
            }
        }
    }
    if !alternative {
        found.extend(
            certificate
                .subject()
                .iter_common_name()
                .filter_map(|name| name.as_str().ok())
                .map(str::to_owned),
        );
    }
    // A name with a line break would forge lines of logs and exports.
    found.retain(|name| !name.is_empty() && !name.chars().any(char::is_control));
    found
}
