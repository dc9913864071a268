//! An agent of a test's own, as a process.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use rustix::process::Signal;

use crate::{
    command::{self, end, succeed},
    domain::Lab,
    network::Place,
    paths,
    wait::eventually_some,
};

/// An agent; stopped when dropped, its log shown when the test failed.
#[derive(Debug)]
pub struct Agent {
    lab: Lab,
    folder: PathBuf,
    child: Option<Child>,
    environment: Vec<(String, String)>,
    place: Option<Place>,
}

impl Lab {
    /// Starts an agent, with `more` lines of configuration, in which `FOLDER` stands
    /// for the agent's folder.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn agent(&self, more: &str) -> Result<Agent> {
        self.agent_at(more, None)
    }

    /// The same on a machine of a network.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn agent_at(&self, more: &str, place: Option<Place>) -> Result<Agent> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = self
            .folder
            .join(format!("a{}-{number}", std::process::id()));
        fs::create_dir(&folder)?;
        self.own(&folder)?;
        let shown = folder.display();
        let more = more.replace("FOLDER", &shown.to_string());
        let tcp = if more.contains("[listen]") {
            String::new()
        } else {
            format!(
                "[listen]\nsocket = \"{shown}/s\"\ntcp = \"127.0.0.1:0\"\nsocket_mode = \"0666\"\n"
            )
        };
        self.write(
            &folder.join("agent.toml"),
            &format!(
                "[libvirt]\nuri = \"qemu:///session\"\n{tcp}[journal]\npath = \"{shown}/journal.db\"\n\
                 [log]\nlevel = \"vmsnap_agent=debug,vmsnap_hypervisor=debug,info\"\n{more}"
            ),
        )?;
        let mut agent = Agent {
            lab: self.clone(),
            folder,
            child: None,
            environment: Vec::new(),
            place,
        };
        agent.start()?;
        Ok(agent)
    }

    /// The agent's program, where the lab's user may run it even when the
    /// checkout lies in a folder that only its owner may enter.
    ///
    /// # Errors
    /// When it is not built.
    pub fn agent_program(&self) -> Result<PathBuf> {
        let built = paths::binary("vmsnap-agent")?;
        let stamp = fs::metadata(&built)?
            .modified()?
            .duration_since(std::time::UNIX_EPOCH)?
            .as_millis();
        let copy = self.folder.join(format!("vmsnap-agent-{stamp}"));
        // One thread of this process at a time: they share the name of the new file.
        static COPYING: Mutex<()> = Mutex::new(());
        let _alone = COPYING.lock().unwrap_or_else(PoisonError::into_inner);
        if !copy.exists() {
            let fresh = self
                .folder
                .join(format!("vmsnap-agent-{stamp}.{}", std::process::id()));
            // By another program: what is begun by another thread meanwhile would have
            // the file open for writing, and then it cannot be run.
            succeed(Command::new("cp").args([&built, &fresh]))?;
            fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755))?;
            fs::rename(&fresh, &copy)?;
        }
        Ok(copy)
    }
}

impl Agent {
    /// Its socket, as callers name it.
    #[must_use]
    pub fn address(&self) -> String {
        format!("unix://{}/s", self.folder.display())
    }

    /// Its loopback TCP address, as its log tells.
    ///
    /// # Errors
    /// When it serves none.
    pub fn tcp(&self) -> Result<String> {
        self.bound("tcp=")
    }

    /// Its address for mutual TLS, as its log tells.
    ///
    /// # Errors
    /// When it serves none.
    pub fn tls(&self) -> Result<String> {
        self.bound("tls=")
    }

    fn bound(&self, key: &str) -> Result<String> {
        let log = self.log();
        log.rsplit(key)
            .next()
            .and_then(|rest| rest.split_whitespace().next())
            .filter(|address| address.contains(':'))
            .map(str::to_owned)
            .with_context(|| format!("the agent's log names no address behind {key}"))
    }

    /// Its folder.
    #[must_use]
    pub fn folder(&self) -> &std::path::Path {
        &self.folder
    }

    /// What it logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// Changes its configuration for the next start: one text for another, which has
    /// to be there.
    ///
    /// # Errors
    /// When it is not, or the file cannot be written.
    pub fn reconfigure(&self, from: &str, to: &str) -> Result<()> {
        let file = self.folder.join("agent.toml");
        let text = fs::read_to_string(&file)?;
        anyhow::ensure!(text.contains(from), "'{from}' is not in the configuration");
        self.lab.write(&file, &text.replace(from, to))
    }

    /// Sets a variable of its environment for the next start.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Starts it, and waits until it serves.
    ///
    /// # Errors
    /// When it does not.
    pub fn start(&mut self) -> Result<()> {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.join("log"))?;
        let before = self.log().matches("serving socket=").count();
        let mut command = self.lab.command(self.lab.agent_program()?);
        command
            .args(["serve", "--config"])
            .arg(self.folder.join("agent.toml"))
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        if let Some(place) = &self.place {
            command = place.holds(self.lab.user, &command);
        }
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut child = command.spawn().context("the agent cannot be started")?;
        let up = eventually_some(Duration::from_secs(60), "agent that serves", || {
            if let Some(status) = child.try_wait()? {
                bail!("the agent ended with {status}:\n{}", self.log());
            }
            Ok((self.log().matches("serving socket=").count() > before).then_some(()))
        });
        self.child = Some(child);
        up
    }

    /// Kills it without a word, as a crash would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Tells it to stop and waits.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            end(&mut child, Duration::from_secs(60));
        }
    }

    /// Whether it ended by itself.
    pub fn ended(&mut self) -> bool {
        let child = self.child.as_mut();
        child.is_none_or(|child| matches!(child.try_wait(), Ok(Some(_))))
    }

    /// Bytes of memory that are its own now.
    ///
    /// # Errors
    /// When it does not run.
    pub fn memory(&self) -> Result<u64> {
        let pid = self.pid().context("the agent does not run")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line
            .and_then(|line| line.split_whitespace().next())
            .context("no VmRSS")?;
        Ok(kib.parse::<u64>()? * 1024)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            command::signal(pid, signal);
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            end(&mut child, Duration::from_secs(10));
        }
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines.len().saturating_sub(80);
            #[expect(
                clippy::print_stderr,
                reason = "a failed test shows what the agent said"
            )]
            {
                eprintln!("--- the agent's log ---\n{}", lines[tail..].join("\n"));
            }
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}
