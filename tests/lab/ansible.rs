//! Ansible, as a user runs it.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    command::{Output, command, run},
    domain::Lab,
    paths,
};

/// How long a playbook may take.
const PLAY: Duration = Duration::from_secs(300);

/// A tool of the Python environment, with the collection that was packaged for
/// tests on its path.
#[must_use]
pub fn tool(name: &str) -> Command {
    let mut command = command::<&str>(paths::python_tool(name), []);
    command
        .env("ANSIBLE_COLLECTIONS_PATH", paths::collections())
        .env("ANSIBLE_NOCOLOR", "1")
        // Without a shared connection, which would outlive the lab by a minute.
        .env("ANSIBLE_SSH_ARGS", "-C")
        .env("ANSIBLE_LOCALHOST_WARNING", "False")
        .env("ANSIBLE_HOME", paths::kept().join("ansible-home"))
        .env("LC_ALL", "C.UTF-8");
    command
}

/// What a playbook left.
#[derive(Debug)]
pub struct Played {
    /// Exit status.
    pub status: i32,
    /// What ansible-playbook printed.
    pub output: Output,
    folder: PathBuf,
}

impl Played {
    /// A variable that the playbook kept with the `keep` task (see [`keep`]).
    ///
    /// # Errors
    /// When it kept none of that name.
    pub fn kept(&self, name: &str) -> Result<Value> {
        let path = self.folder.join(format!("{name}.json"));
        let text = fs::read_to_string(&path)
            .with_context(|| format!("nothing was kept as {name}:\n{}", self.output.text()))?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Requires exit status 0.
    ///
    /// # Errors
    /// With what ansible-playbook printed.
    pub fn ok(self) -> Result<Self> {
        ensure!(
            self.status == 0,
            "the playbook failed:\n{}\n{}",
            self.output.text(),
            self.output.complaint()
        );
        Ok(self)
    }
}

impl Drop for Played {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A task that keeps a registered variable for the test to look at.
#[must_use]
pub fn keep(name: &str) -> String {
    format!(
        "    - ansible.builtin.copy:\n        content: \"{{{{ {name} | to_json }}}}\"\n        dest: \"{{{{ kept }}}}/{name}.json\"\n      check_mode: false\n"
    )
}

impl Lab {
    /// Runs a playbook on localhost with more arguments for ansible-playbook.
    ///
    /// # Errors
    /// When it cannot be run at all.
    pub fn playbook(&self, text: &str, arguments: &[&str]) -> Result<Played> {
        self.playbook_by(text, arguments, |command| command)
    }

    /// The same, with something done to the command before it runs.
    ///
    /// # Errors
    /// When it cannot be run at all.
    pub fn playbook_by(
        &self,
        text: &str,
        arguments: &[&str],
        with: impl FnOnce(Command) -> Command,
    ) -> Result<Played> {
        let folder = self.folder.join(format!(
            "play-{}-{}",
            std::process::id(),
            std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)?
                .as_nanos()
        ));
        fs::create_dir(&folder)?;
        let file = folder.join("play.yml");
        fs::write(&file, text)?;
        let mut command = tool("ansible-playbook");
        command
            .args(["-i", "localhost,", "-c", "local", "-e"])
            .arg(format!(
                "kept={} ansible_python_interpreter={}",
                folder.display(),
                paths::python_tool("python3").display()
            ))
            .args(arguments)
            .arg(&file)
            .env("TMPDIR", &folder)
            .current_dir(&folder);
        let output = run(&mut with(command), None, PLAY)?;
        Ok(Played {
            status: output.status,
            output,
            folder,
        })
    }
}
