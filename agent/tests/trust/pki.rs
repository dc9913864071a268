//! A CA and certificates for tests.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose as Usage, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use vmsnap_client::TlsFiles;

/// A folder that goes with the test.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("vmsnap-t{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// From when until when, in seconds from now.
pub type Span = (i64, i64);

pub const NOW: Span = (-3_600, 86_400);
pub const PAST: Span = (-86_400, -60);
pub const FUTURE: Span = (3_600, 86_400);

/// A CA.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pub pem: String,
}

impl Ca {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    /// A certificate with these alternative names, or this common name alone.
    pub fn certificate(&self, common: &str, names: &[&str], span: Span) -> (String, String) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        if !common.is_empty() {
            params.distinguished_name.push(DnType::CommonName, common);
        }
        params.extended_key_usages = vec![Usage::ServerAuth, Usage::ClientAuth];
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        params.not_before = epoch + seconds(span.0);
        params.not_after = epoch + seconds(span.1);
        let key = KeyPair::generate().unwrap();
        let signed = params.signed_by(&key, &self.issuer).unwrap();
        (signed.pem(), key.serialize_pem())
    }

    /// A caller's files.
    pub fn caller(&self, folder: &Folder, common: &str, names: &[&str], span: Span) -> TlsFiles {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let stem = format!("caller{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let (certificate, key) = self.certificate(common, names, span);
        let ca = write(&folder.path(&format!("{stem}.ca")), &self.pem);
        TlsFiles {
            ca_path: Some(ca),
            client_cert: Some(write(&folder.path(&format!("{stem}.pem")), &certificate)),
            client_key: Some(write(&folder.path(&format!("{stem}.key")), &key)),
        }
    }
}

fn seconds(from_now: i64) -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let seconds = i64::try_from(now.as_secs()).unwrap() + from_now;
    Duration::from_secs(u64::try_from(seconds).unwrap())
}

/// Writes a file such that whoever reads it sees it whole.
pub fn write(path: &Path, text: &str) -> PathBuf {
    let fresh = path.with_extension("fresh");
    fs::write(&fresh, text).unwrap();
    fs::rename(&fresh, path).unwrap();
    path.to_owned()
}
