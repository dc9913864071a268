//! Foreign clients in Python.

use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::Result;

use crate::{command, domain::Lab, paths};

/// Runs the Python of the tests.
///
/// # Errors
/// When it fails, with its words.
pub fn python(arguments: &[&str]) -> Result<String> {
    command::succeed(&mut command::command(
        paths::python_tool("python3"),
        arguments,
    ))
}

/// Stubs that grpcio's own generator made of the contract; gone when dropped.
#[derive(Debug)]
pub struct Stubs(pub PathBuf);

impl Stubs {
    /// Made anew.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn new(lab: &Lab) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = lab
            .folder
            .join(format!("stubs-{}-{number}", std::process::id()));
        fs::create_dir(&folder)?;
        let stubs = Self(folder);
        let proto = paths::checkout().join("proto");
        let (shown, root) = (stubs.0.display().to_string(), proto.display().to_string());
        let mut generate = vec![
            "-m",
            "grpc_tools.protoc",
            "-I",
            &root,
            "--python_out",
            &shown,
            "--grpc_python_out",
            &shown,
        ];
        let files: Vec<String> = fs::read_dir(proto.join("vmsnap/v1"))?
            .filter_map(|entry| Some(entry.ok()?.path().display().to_string()))
            .collect();
        generate.extend(files.iter().map(String::as_str));
        python(&generate)?;
        Ok(stubs)
    }

    /// Where they are.
    #[must_use]
    pub fn folder(&self) -> String {
        self.0.display().to_string()
    }
}

impl Drop for Stubs {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
