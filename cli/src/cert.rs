//! `vmsnap cert`: a small CA, and certificates of it for agents and people.
//!
//! Purpose: for those who have no CA of their own. Everything happens in files
//! here; no agent is asked.
//!
//! Invariants: keys can be read by their owner only, from their first byte on; what
//! exists is never overwritten unasked, a CA not at all; a file appears whole; a
//! name never leads out of the folder.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use serde_json::{Value, json};
use x509_parser::{
    certificate::X509Certificate, extensions::GeneralName, pem::Pem, prelude::ParsedExtension,
};

use crate::args::{CertCommand, NewCert};

const DAY: u64 = 86_400;
/// Clocks differ: a certificate counts from a little before it was made.
const BEFORE: u64 = 3_600;

/// What was made, or is shown.
#[derive(Debug)]
pub struct Report {
    /// For a program.
    pub json: Value,
    /// For a person.
    pub text: String,
}

/// Does what the command line asks.
///
/// # Errors
/// A sentence that names the file and what to do.
pub fn run(command: &CertCommand) -> Result<Report, String> {
    match command {
        CertCommand::Ca { dir, name, days } => ca(dir, name, *days),
        CertCommand::Agent { names, new } => {
            let first = names.first().map(String::as_str).unwrap_or_default();
            issue(new, first, names, ExtendedKeyUsagePurpose::ServerAuth)
        }
        CertCommand::Person { name, new } => {
            issue(new, name, &[], ExtendedKeyUsagePurpose::ClientAuth)
        }
        CertCommand::Show { files } => show(files),
    }
}

fn ca(dir: &Path, name: &str, days: u32) -> Result<Report, String> {
    if name.trim().is_empty() {
        return Err("the CA's name is empty".into());
    }
    let (certificate, key) = (dir.join("ca.pem"), dir.join("ca.key"));
    for path in [&certificate, &key] {
        if path.exists() {
            return Err(format!(
                "{} exists: a CA is never overwritten, because all certificates of it would be \
                 worth nothing; choose another folder with --dir",
                path.display()
            ));
        }
    }
    let mut params = CertificateParams::default();
    params.distinguished_name = named(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid(&mut params, days);
    let pair = KeyPair::generate().map_err(failed)?;
    let signed = params.self_signed(&pair).map_err(failed)?;
    fs::create_dir_all(dir).map_err(|error| at(dir, &error))?;
    write(&key, &pair.serialize_pem(), 0o600)?;
    write(&certificate, &signed.pem(), 0o644)?;
    Ok(Report {
        json: json!({"certificate": shown(&certificate), "key": shown(&key)}),
        text: format!(
            "made the CA '{name}'\n  certificate: {} (give it to agents as tls.client_ca, and to \
             people as ca_path)\n  key:         {} (keep it off the agents and safe: whoever has \
             it can make certificates)\n",
            certificate.display(),
            key.display()
        ),
    })
}

fn issue(
    new: &NewCert,
    name: &str,
    hosts: &[String],
    usage: ExtendedKeyUsagePurpose,
) -> Result<Report, String> {
    let stem = stem(name)?;
    let dir = &new.dir;
    let (certificate, key) = (
        dir.join(format!("{stem}.pem")),
        dir.join(format!("{stem}.key")),
    );
    let (ca, ca_key) = (dir.join("ca.pem"), dir.join("ca.key"));
    if stem == "ca" {
        return Err("the name 'ca' is the CA's own; choose another".into());
    }
    for path in [&certificate, &key] {
        if path.exists() && !new.renew {
            return Err(format!(
                "{} exists; --renew replaces certificate and key",
                path.display()
            ));
        }
    }
    let read = |path: &Path| {
        fs::read_to_string(path).map_err(|error| {
            format!(
                "{}: {error}; `vmsnap cert ca --dir {}` makes a CA first",
                path.display(),
                dir.display()
            )
        })
    };
    let ca_pem = read(&ca)?;
    let ca_pair = KeyPair::from_pem(&read(&ca_key)?)
        .map_err(|error| format!("{}: is no key that can sign: {error}", ca_key.display()))?;
    let issuer = Issuer::from_ca_cert_pem(&ca_pem, ca_pair)
        .map_err(|error| format!("{}: is no CA: {error}", ca.display()))?;
    let mut params = CertificateParams::new(hosts.to_vec())
        .map_err(|error| format!("{}: cannot be in a certificate: {error}", hosts.join(", ")))?;
    params.distinguished_name = named(name);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    valid(&mut params, new.days);
    let pair = KeyPair::generate().map_err(failed)?;
    let signed = params.signed_by(&pair, &issuer).map_err(failed)?;
    write(&key, &pair.serialize_pem(), 0o600)?;
    write(&certificate, &signed.pem(), 0o644)?;
    let what = if hosts.is_empty() {
        format!(
            "made a certificate for '{name}': the name to write into the agents' roles\n  \
             client_cert: {}\n  client_key:  {}\n  ca_path:     {}\n",
            certificate.display(),
            key.display(),
            ca.display()
        )
    } else {
        format!(
            "made a certificate for an agent at {}\n  tls.certificate: {}\n  tls.key:         {}\n  \
             tls.client_ca:   {}\n",
            hosts.join(", "),
            certificate.display(),
            key.display(),
            ca.display()
        )
    };
    Ok(Report {
        json: json!({
            "certificate": shown(&certificate), "key": shown(&key), "ca": shown(&ca),
            "names": if hosts.is_empty() { vec![name.to_owned()] } else { hosts.to_vec() },
        }),
        text: what,
    })
}

fn show(files: &[PathBuf]) -> Result<Report, String> {
    let mut all = Vec::new();
    let mut text = String::new();
    for file in files {
        let bytes = fs::read(file).map_err(|error| at(file, &error))?;
        let mut found = 0;
        for block in Pem::iter_from_buffer(&bytes) {
            let block = block.map_err(|error| format!("{}: is no PEM: {error}", shown(file)))?;
            if block.label != "CERTIFICATE" {
                continue;
            }
            let certificate = block
                .parse_x509()
                .map_err(|error| format!("{}: is no certificate: {error}", shown(file)))?;
            found += 1;
            let one = described(&certificate);
            text.push_str(&format!("{}\n", crate::terminal::clean(&shown(file))));
            for (label, key) in [
                ("names", "names"),
                ("subject", "subject"),
                ("signed by", "issuer"),
                ("valid from", "not_before"),
                ("valid until", "not_after"),
                ("state", "state"),
                ("is a CA", "ca"),
            ] {
                let value = match &one[key] {
                    Value::String(text) => text.clone(),
                    Value::Array(all) => all
                        .iter()
                        .filter_map(Value::as_str)
                        .collect::<Vec<_>>()
                        .join(", "),
                    Value::Bool(true) => "yes".to_owned(),
                    Value::Bool(false) => "no".to_owned(),
                    other => other.to_string(),
                };
                text.push_str(&format!("  {label}: {}\n", crate::terminal::clean(&value)));
            }
            let mut one = one;
            one["file"] = shown(file).into();
            all.push(one);
        }
        if found == 0 {
            return Err(format!("{}: holds no certificate in PEM", shown(file)));
        }
    }
    Ok(Report {
        json: json!({"certificates": all}),
        text,
    })
}

fn described(certificate: &X509Certificate<'_>) -> Value {
    let validity = certificate.validity();
    let time = |seconds: i64| {
        Timestamp::from_second(seconds).map_or_else(|_| "unknown".to_owned(), |it| it.to_string())
    };
    let now = Timestamp::now().as_second();
    let (from, until) = (
        validity.not_before.timestamp(),
        validity.not_after.timestamp(),
    );
    let state = if now < from {
        "not valid yet".to_owned()
    } else if now > until {
        "expired".to_owned()
    } else {
        let left = u64::try_from(until - now).unwrap_or_default();
        let left = vmsnap_client::quantity::format_duration(Duration::from_secs(left));
        format!("valid, for {left} more")
    };
    json!({
        "names": names(certificate),
        "subject": certificate.subject().to_string(),
        "issuer": certificate.issuer().to_string(),
        "not_before": time(from),
        "not_after": time(until),
        "state": state,
        "ca": certificate.is_ca(),
    })
}

/// The names that an agent knows a caller by, or a caller an agent.
fn names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let alternative =
        certificate
            .extensions()
            .iter()
            .find_map(|extension| match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(san) => Some(san),
                _ => None,
            });
    let Some(alternative) = alternative else {
        let common = certificate.subject().iter_common_name();
        return common
            .filter_map(|name| name.as_str().ok())
            .map(str::to_owned)
            .collect();
    };
    let name = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) | GeneralName::RFC822Name(name) | GeneralName::URI(name) => {
            Some((*name).to_owned())
        }
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes)
                .ok()
                .map(|four| std::net::Ipv4Addr::from(four).to_string()),
            _ => <[u8; 16]>::try_from(*bytes)
                .ok()
                .map(|all| std::net::Ipv6Addr::from(all).to_string()),
        },
        _ => None,
    };
    alternative.general_names.iter().filter_map(name).collect()
}

fn named(name: &str) -> DistinguishedName {
    let mut all = DistinguishedName::new();
    all.push(DnType::CommonName, name);
    all
}

fn valid(params: &mut CertificateParams, days: u32) {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_secs(now.saturating_sub(BEFORE));
    params.not_after = epoch + Duration::from_secs(now + u64::from(days) * DAY);
}

/// What files of a name are called.
fn stem(name: &str) -> Result<String, String> {
    let stem = name.replace(':', "-");
    let right = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '@');
    if stem.is_empty() || stem.len() > 200 || stem.starts_with('.') || !stem.chars().all(right) {
        return Err(format!(
            "'{}' cannot be the name: letters, digits, '.', '-', '_', '@' and ':' are allowed, and \
             no '.' first",
            name.escape_debug()
        ));
    }
    Ok(stem)
}

/// Writes a file such that it is there whole or not at all.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), String> {
    let fresh = path.with_extension(format!("new-{}", std::process::id()));
    let written = || -> io::Result<()> {
        let mut file = fs::File::options()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&fresh)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    };
    written().map_err(|error| {
        // What was begun is of no use; that it stays is told by the error anyway.
        let _ = fs::remove_file(&fresh);
        at(path, &error)
    })
}

fn at(path: &Path, error: &io::Error) -> String {
    format!("{}: {error}", path.display())
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn failed(error: rcgen::Error) -> String {
    format!("the certificate could not be made: {error}")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("vmsnap-cert-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn new_cert(&self, renew: bool) -> NewCert {
            NewCert {
                dir: self.0.clone(),
                days: 30,
                renew,
            }
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_ca_and_certificates_are_made_with_their_names_and_keys_for_their_owner_only() {
        let folder = Folder::new("made");
        ca(&folder.0, "lab CA", 100).unwrap();
        let command = CertCommand::Agent {
            names: vec!["kvm1.example".into(), "10.0.0.1".into(), "fd00::1".into()],
            new: folder.new_cert(false),
        };
        run(&command).unwrap();
        let command = CertCommand::Person {
            name: "alice@example.org".into(),
            new: folder.new_cert(false),
        };
        run(&command).unwrap();
        for key in ["ca.key", "kvm1.example.key", "alice@example.org.key"] {
            let mode = fs::metadata(folder.0.join(key))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600, "{key}");
        }
        let files = ["kvm1.example.pem", "alice@example.org.pem", "ca.pem"];
        let shown = show(&files.map(|file| folder.0.join(file))).unwrap();
        let all = &shown.json["certificates"];
        assert_eq!(
            all[0]["names"],
            json!(["kvm1.example", "10.0.0.1", "fd00::1"])
        );
        assert_eq!(all[1]["names"], json!(["alice@example.org"]));
        assert_eq!(all[1]["issuer"], "CN=lab CA");
        assert_eq!(all[2]["ca"], true);
        assert!(shown.text.contains("valid, for 4w"), "{}", shown.text);
    }

    #[test]
    fn nothing_is_overwritten_unasked_and_the_ca_never() {
        let folder = Folder::new("kept");
        let person = |renew| CertCommand::Person {
            name: "bob".into(),
            new: folder.new_cert(renew),
        };
        assert!(
            run(&person(false))
                .unwrap_err()
                .contains("makes a CA first")
        );
        ca(&folder.0, "CA", 10).unwrap();
        assert!(ca(&folder.0, "CA", 10).unwrap_err().contains("never"));
        run(&person(false)).unwrap();
        let before = fs::read(folder.0.join("bob.pem")).unwrap();
        assert!(run(&person(false)).unwrap_err().contains("--renew"));
        assert_eq!(fs::read(folder.0.join("bob.pem")).unwrap(), before);
        run(&person(true)).unwrap();
        assert_ne!(fs::read(folder.0.join("bob.pem")).unwrap(), before);
    }

    #[test]
    fn no_name_leads_out_of_the_folder() {
        let folder = Folder::new("names");
        ca(&folder.0, "CA", 10).unwrap();
        for name in [
            "", "../bob", "a/b", "/etc/x", ".hidden", "a\nb", "ca", "ca\0",
        ] {
            let command = CertCommand::Person {
                name: name.into(),
                new: folder.new_cert(true),
            };
            assert!(run(&command).is_err(), "{name:?}");
        }
    }
}
