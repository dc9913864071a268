//! The agent's side of mutual TLS.
//!
//! Invariants: TLS 1.2 or newer, HTTP/2, and a client certificate that one of our
//! roots signed; every connection proves itself anew, so that nothing outlives its
//! certificate by resumption; certificate and key belong together.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use jiff::Timestamp;
use tokio_rustls::rustls::{
    self, InconsistentKeys, RootCertStore, ServerConfig,
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject as _},
    },
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::{TLS12, TLS13},
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};

use super::peer::names;

/// Where the agent's own proof and the roots of its callers are, all PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// The certificate, followed by its intermediates.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The CAs that sign the certificates of callers.
    pub client_ca: PathBuf,
}

/// What the files held at one moment.
#[derive(Clone, PartialEq, Eq)]
pub struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Vec<u8>,
}

// By hand: a key has no place in a log.
impl fmt::Debug for Contents {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Contents").finish_non_exhaustive()
    }
}

/// What connections are accepted with.
#[derive(Debug, Clone)]
pub struct Proof {
    /// For the handshake.
    pub config: Arc<ServerConfig>,
    /// The names of the agent's certificate.
    pub names: Vec<String>,
    /// Until when it is valid.
    pub until: Timestamp,
}

impl Paths {
    /// Reads the files.
    ///
    /// # Errors
    /// Which one cannot be read, and why.
    pub fn read(&self) -> Result<Contents, String> {
        let read = |key: &str, path: &Path| {
            std::fs::read(path)
                .map_err(|error| format!("{key} '{}' cannot be read: {error}", path.display()))
        };
        Ok(Contents {
            certificate: read("tls.certificate", &self.certificate)?,
            key: read("tls.key", &self.key)?,
            client_ca: read("tls.client_ca", &self.client_ca)?,
        })
    }

    /// Makes of what was read what connections are accepted with.
    ///
    /// # Errors
    /// Which file cannot be used, and why.
    pub fn understand(&self, contents: &Contents) -> Result<Proof, String> {
        let chain = certificates("tls.certificate", &self.certificate, &contents.certificate)?;
        let roots_of = certificates("tls.client_ca", &self.client_ca, &contents.client_ca)?;
        let key = PrivateKeyDer::from_pem_slice(&contents.key)
            .map_err(|error| wrong("tls.key", &self.key, &error, "private key"))?;
        let leaf = chain.first().cloned().unwrap_or_else(|| Vec::new().into());
        let (_, parsed) = X509Certificate::from_der(&leaf).map_err(|error| {
            format!(
                "tls.certificate '{}' is no certificate: {error}",
                self.certificate.display()
            )
        })?;
        let unusable = |key: &str, path: &Path, error: String| {
            format!("{key} '{}' cannot be used: {error}", path.display())
        };
        let mut roots = RootCertStore::empty();
        for root in roots_of {
            roots
                .add(root)
                .map_err(|error| unusable("tls.client_ca", &self.client_ca, error.to_string()))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .build()
                .map_err(|error| unusable("tls.client_ca", &self.client_ca, error.to_string()))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13, &TLS12])
            .map_err(|error| unusable("tls.certificate", &self.certificate, error.to_string()))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| match error {
                rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => format!(
                    "tls.key '{}' is not the key of tls.certificate '{}'",
                    self.key.display(),
                    self.certificate.display()
                ),
                other => unusable("tls.key", &self.key, other.to_string()),
            })?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Proof {
            config: Arc::new(config),
            names: names(&parsed),
            until: Timestamp::from_second(parsed.validity().not_after.timestamp())
                .unwrap_or(Timestamp::MAX),
        })
    }
}

fn certificates(
    key: &str,
    path: &Path,
    text: &[u8],
) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(text)
        .collect::<Result<_, _>>()
        .map_err(|error| wrong(key, path, &error, "certificate"))?;
    if found.is_empty() {
        return Err(wrong(key, path, &pem::Error::NoItemsFound, "certificate"));
    }
    Ok(found)
}

fn wrong(key: &str, path: &Path, error: &pem::Error, wanted: &str) -> String {
    let path = path.display();
    match error {
        pem::Error::NoItemsFound => format!("{key} '{path}' holds no {wanted} in PEM"),
        other => format!("{key} '{path}' is no PEM: {other}"),
    }
}
