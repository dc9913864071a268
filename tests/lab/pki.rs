//! A CA with certificates, made by `vmsnap cert`.

use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::Result;
use vmsnap_client::TlsFiles;

use crate::{
    command::{command, succeed},
    domain::Lab,
    paths,
};

/// A CA with its folder, which is gone when dropped.
#[derive(Debug)]
pub struct Pki {
    folder: PathBuf,
    lab: Lab,
}

impl Lab {
    /// A new CA.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn pki(&self) -> Result<Pki> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = self
            .folder
            .join(format!("pki-{}-{number}", std::process::id()));
        fs::create_dir(&folder)?;
        let pki = Pki {
            folder,
            lab: self.clone(),
        };
        pki.cert(&["ca"])?;
        Ok(pki)
    }
}

impl Pki {
    /// Runs `vmsnap cert ARGUMENTS` in the folder.
    ///
    /// # Errors
    /// When it fails, with its words.
    pub fn cert(&self, arguments: &[&str]) -> Result<String> {
        succeed(
            command(paths::binary("vmsnap")?, ["cert"])
                .args(arguments)
                .current_dir(&self.folder),
        )
    }

    /// A file of the folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Makes a certificate for an agent and a file of roles, and gives the lines of
    /// configuration with which the agent serves mutual TLS at `listen`.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn agent(&self, listen: &str, names: &[&str], roles: &str) -> Result<String> {
        let mut arguments = vec!["agent"];
        arguments.extend(names);
        self.cert(&arguments)?;
        let stem = names.first().map(|name| name.replace(':', "-"));
        let stem = stem.unwrap_or_default();
        for name in [
            format!("{stem}.pem"),
            format!("{stem}.key"),
            "ca.pem".into(),
        ] {
            self.lab.own(&self.path(&name))?;
        }
        let file = self.path(&format!("{stem}.roles"));
        self.lab.write(&file, roles)?;
        let shown = self.folder.display();
        Ok(format!(
            "[listen]\nsocket = \"FOLDER/s\"\ntls = \"{listen}\"\nsocket_mode = \"0666\"\n\
             [tls]\ncertificate = \"{shown}/{stem}.pem\"\nkey = \"{shown}/{stem}.key\"\n\
             client_ca = \"{shown}/ca.pem\"\n[trust]\nroles = \"{}\"\n",
            file.display()
        ))
    }

    /// A person's files; made when they are not there yet.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn person(&self, name: &str) -> Result<TlsFiles> {
        if !self.path(&format!("{name}.pem")).exists() {
            self.cert(&["person", name])?;
        }
        Ok(TlsFiles {
            ca_path: Some(self.path("ca.pem")),
            client_cert: Some(self.path(&format!("{name}.pem"))),
            client_key: Some(self.path(&format!("{name}.key"))),
        })
    }
}

impl Drop for Pki {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}
