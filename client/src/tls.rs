//! Mutual TLS, from the caller's side.
//!
//! Purpose: which files prove who is calling and whom he trusts, the connection
//! that is made with them, and in words what kept it from being trusted.
//!
//! Invariants: TLS 1.2 or newer, certificates on both sides; a connection is
//! given on only after the agent was seen to take the caller's certificate (with
//! TLS 1.3 its refusal comes after the handshake), so that a refusal is an error
//! of connecting and not of whatever is asked first.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        self, AlertDescription, CertificateError, ClientConfig, InconsistentKeys, RootCertStore,
        pki_types::{
            CertificateDer, PrivateKeyDer, ServerName,
            pem::{self, PemObject as _},
        },
        version::{TLS12, TLS13},
    },
};

use crate::error::Error;

/// Names the file of the CA where nothing else does.
pub const CA_VARIABLE: &str = "VMSNAP_CA_PATH";
/// Names the file of the caller's certificate where nothing else does.
pub const CERT_VARIABLE: &str = "VMSNAP_CLIENT_CERT";
/// Names the file of the caller's key where nothing else does.
pub const KEY_VARIABLE: &str = "VMSNAP_CLIENT_KEY";

/// An agent begins to talk at once; whoever does not is let pass, and shows what
/// it is at the first call.
const FIRST_WORD: Duration = Duration::from_secs(5);

/// The files of mutual TLS, all PEM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// The CA that signed the agent's certificate; may hold several.
    pub ca_path: Option<PathBuf>,
    /// The caller's certificate, followed by its intermediates if there are any.
    pub client_cert: Option<PathBuf>,
    /// The key of the caller's certificate.
    pub client_key: Option<PathBuf>,
}

impl TlsFiles {
    /// What [`CA_VARIABLE`], [`CERT_VARIABLE`] and [`KEY_VARIABLE`] name; empty
    /// ones name nothing.
    #[must_use]
    pub fn from_environment() -> Self {
        let named = |variable| {
            std::env::var_os(variable)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        Self {
            ca_path: named(CA_VARIABLE),
            client_cert: named(CERT_VARIABLE),
            client_key: named(KEY_VARIABLE),
        }
    }

    /// These, and for what is not named the others.
    #[must_use]
    pub fn or(self, others: Self) -> Self {
        Self {
            ca_path: self.ca_path.or(others.ca_path),
            client_cert: self.client_cert.or(others.client_cert),
            client_key: self.client_key.or(others.client_key),
        }
    }

    /// Whether all three are named.
    #[must_use]
    pub fn are_named(&self) -> bool {
        self.missing().is_empty()
    }

    /// Which are not named, by their options' names.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        [
            ("ca_path", &self.ca_path),
            ("client_cert", &self.client_cert),
            ("client_key", &self.client_key),
        ]
        .into_iter()
        .filter(|(_, path)| path.is_none())
        .map(|(name, _)| name)
        .collect()
    }

    /// Reads them, and makes of them what connections are made with.
    pub(crate) fn read(&self) -> Result<Arc<ClientConfig>, Error> {
        let empty = PathBuf::new();
        let named = |path: &Option<PathBuf>| path.clone().unwrap_or_else(|| empty.clone());
        let (ca, cert, key) = (
            named(&self.ca_path),
            named(&self.client_cert),
            named(&self.client_key),
        );
        let mut roots = RootCertStore::empty();
        for certificate in certificates("ca_path", &ca)? {
            roots
                .add(certificate)
                .map_err(|error| unusable("ca_path", &ca, error.to_string()))?;
        }
        let chain = certificates("client_cert", &cert)?;
        let secret = PrivateKeyDer::from_pem_file(&key)
            .map_err(|error| unusable("client_key", &key, said(&error, "a private key")))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13, &TLS12])
            .map_err(|error| unusable("ca_path", &ca, error.to_string()))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, secret)
            .map_err(|error| match error {
                rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => unusable(
                    "client_key",
                    &key,
                    format!("is not the key of the certificate {}", cert.display()),
                ),
                other => unusable("client_key", &key, other.to_string()),
            })?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // Each connection proves itself: what was trusted once may have run out since.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(config))
    }
}

fn certificates(field: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| unusable(field, path, said(&error, "a certificate")))?;
    if found.is_empty() {
        return Err(unusable(field, path, "holds no certificate in PEM".into()));
    }
    Ok(found)
}

fn said(error: &pem::Error, wanted: &str) -> String {
    match error {
        pem::Error::Io(error) => format!("cannot be read: {error}"),
        pem::Error::NoItemsFound => format!("holds not {wanted} in PEM"),
        other => format!("is no PEM: {other}"),
    }
}

fn unusable(field: &'static str, path: &Path, problem: String) -> Error {
    Error::TlsFile {
        field,
        path: path.to_owned(),
        problem,
    }
}

/// What was in the way of a connection, and where on the way.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Obstacle {
    #[error("its name cannot be resolved")]
    Name(#[source] io::Error),
    #[error("{0}")]
    Connect(io::Error),
    #[error("{0}")]
    Tls(io::Error),
}

/// Connects to a host, the addresses of its name in turn.
pub(crate) async fn tcp(host: &str, port: u16) -> Result<TcpStream, Obstacle> {
    let addresses: Vec<_> = tokio::net::lookup_host((host, port))
        .await
        .map_err(Obstacle::Name)?
        .collect();
    let stream = TcpStream::connect(addresses.as_slice())
        .await
        .map_err(Obstacle::Connect)?;
    stream.set_nodelay(true).map_err(Obstacle::Connect)?;
    Ok(stream)
}

/// Connects with mutual TLS, and waits until the other side has said something
/// behind the handshake.
pub(crate) async fn tls(
    host: &str,
    port: u16,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
) -> Result<BufReader<TlsStream<TcpStream>>, Obstacle> {
    let tcp = tcp(host, port).await?;
    let stream = TlsConnector::from(config)
        .connect(name, tcp)
        .await
        .map_err(Obstacle::Tls)?;
    let mut stream = BufReader::new(stream);
    match timeout(FIRST_WORD, stream.fill_buf()).await {
        Ok(Ok([])) => Err(Obstacle::Tls(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the connection was closed behind the TLS handshake",
        ))),
        Ok(Err(error)) => Err(Obstacle::Tls(error)),
        Ok(Ok(_)) | Err(_) => Ok(stream),
    }
}

/// Why two sides do not trust each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Distrust {
    /// No CA of `ca_path` signed the agent's certificate.
    AgentUnknown,
    /// The agent's certificate has expired.
    AgentExpired,
    /// The agent's certificate is not valid yet.
    AgentNotYet,
    /// The agent's certificate is for other names.
    AgentName {
        /// The names that it is for.
        presented: Vec<String>,
    },
    /// The agent's certificate cannot be used for another reason.
    AgentOther(String),
    /// The agent says that the caller's certificate has expired.
    CallerExpired,
    /// The agent does not know the CA that signed the caller's certificate.
    CallerUnknown,
    /// The agent refused the caller's certificate for another reason.
    CallerOther(String),
    /// What listens there speaks no TLS, or none that this program speaks.
    NoTls(String),
}

impl fmt::Display for Distrust {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AgentUnknown => out.write_str("no CA in ca_path signed the agent's certificate"),
            Self::AgentExpired => out.write_str("the agent's certificate has expired"),
            Self::AgentNotYet => out.write_str("the agent's certificate is not valid yet"),
            Self::AgentName { presented } if presented.is_empty() => {
                out.write_str("the agent's certificate is for another name")
            }
            Self::AgentName { presented } => write!(
                out,
                "the agent's certificate is for other names ({})",
                presented.join(", ")
            ),
            Self::AgentOther(problem) => {
                write!(out, "the agent's certificate cannot be used: {problem}")
            }
            Self::CallerExpired => {
                out.write_str("the agent says that the client certificate has expired")
            }
            Self::CallerUnknown => {
                out.write_str("the agent does not know the CA that signed the client certificate")
            }
            Self::CallerOther(problem) => {
                write!(out, "the agent refused the client certificate: {problem}")
            }
            Self::NoTls(problem) => write!(out, "what listens there speaks no TLS: {problem}"),
        }
    }
}

impl Distrust {
    /// What to look at or to do, for a person.
    #[must_use]
    pub fn advice(&self) -> &'static str {
        match self {
            Self::AgentUnknown => {
                "give the CA that signed the agent's certificate as ca_path (on the agent's host: \
                 tls.certificate in /etc/vmsnap/agent.toml)"
            }
            Self::AgentExpired => {
                "put a new certificate and its key in place on the agent's host: it takes them \
                 without a restart; compare the clocks of both machines too"
            }
            Self::AgentNotYet => "compare the clocks of both machines",
            Self::AgentName { .. } => {
                "call the agent by a name or an address that is in its certificate, or have one \
                 made that names this one (vmsnap cert agent)"
            }
            Self::AgentOther(_) => "look at the agent's certificate with vmsnap cert show",
            Self::CallerExpired => {
                "have a new certificate made for client_cert (vmsnap cert show tells how long one \
                 is valid); compare the clocks of both machines too"
            }
            Self::CallerUnknown => {
                "use a certificate of the CA that the agent trusts (tls.client_ca in its \
                 configuration)"
            }
            Self::CallerOther(_) => {
                "look at the certificate with vmsnap cert show; the agent's log says why it was \
                 refused"
            }
            Self::NoTls(_) => {
                "is this the address of listen.tls in the agent's configuration? Plain loopback is \
                 written http://127.0.0.1:PORT"
            }
        }
    }

    /// What a failed connection tells of trust; `None` when it failed otherwise.
    pub(crate) fn of(error: &io::Error) -> Option<Self> {
        let tls = error.get_ref()?.downcast_ref::<rustls::Error>()?;
        Some(match tls {
            rustls::Error::InvalidCertificate(problem) => match problem {
                CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                    Self::AgentUnknown
                }
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                    Self::AgentExpired
                }
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    Self::AgentNotYet
                }
                CertificateError::NotValidForName => Self::AgentName {
                    presented: Vec::new(),
                },
                CertificateError::NotValidForNameContext { presented, .. } => Self::AgentName {
                    presented: presented.clone(),
                },
                other => Self::AgentOther(other.to_string()),
            },
            rustls::Error::AlertReceived(alert) => match alert {
                AlertDescription::CertificateExpired => Self::CallerExpired,
                AlertDescription::UnknownCA => Self::CallerUnknown,
                other => Self::CallerOther(format!("TLS alert {}", words(*other))),
            },
            rustls::Error::InvalidMessage(_)
            | rustls::Error::PeerIncompatible(_)
            | rustls::Error::PeerMisbehaved(_)
            | rustls::Error::NoApplicationProtocol => Self::NoTls(tls.to_string()),
            _ => return None,
        })
    }
}

/// An alert as its RFC writes it.
fn words(alert: AlertDescription) -> String {
    match alert.as_str() {
        Some(name) => name.to_owned(),
        None => format!("number {}", u8::from(alert)),
    }
}
