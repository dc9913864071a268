//! One run of a scenario with its world: domain, agent, and a model of what every
//! snapshot holds.

use std::{
    collections::BTreeMap,
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    Agent, BlankSpec, Domain, Lab, OwnedLab,
    command::{Output, run},
    wait::{eventually, eventually_some},
};

use super::{
    judging::PART,
    scenarios::{DEADLINE, Fault, LATE, Scenario},
};

/// How long one run, recovery or end of a late call may take.
const LONG: Duration = Duration::from_secs(90);

/// A run of a scenario, with its world.
pub(super) struct Stage<'a> {
    pub(super) scenario: &'a Scenario,
    pub(super) domain: &'a Domain,
    pub(super) agent: Agent,
    /// What each snapshot holds.
    pub(super) model: BTreeMap<String, u8>,
    /// What the disks hold.
    pub(super) now: u8,
}

/// The words of a command, with the domain for `VM`.
pub(super) fn words<'a>(words: &[&'a str], vm: &'a str) -> Vec<&'a str> {
    words
        .iter()
        .map(|word| if *word == "VM" { vm } else { word })
        .collect()
}

impl<'a> Stage<'a> {
    fn new(scenario: &'a Scenario, domain: &'a Domain) -> Result<Self> {
        let agent = domain.lab.agent("")?;
        let (model, now) = (BTreeMap::new(), 0);
        let mut stage = Self {
            scenario,
            domain,
            agent,
            model,
            now,
        };
        stage.next_epoch()?;
        for name in scenario.before {
            let mut words = vec!["create", &domain.name, name];
            words.extend(scenario.making);
            stage.agent.vmsnap(&words)?.result()?;
            stage.model.insert((*name).to_owned(), stage.now);
            stage.next_epoch()?;
        }
        Ok(stage)
    }

    pub(super) fn disks(&self) -> &'static [&'static str] {
        if self.scenario.guest {
            &["vda"]
        } else {
            &["vda", "vdb"]
        }
    }

    fn next_epoch(&mut self) -> Result<()> {
        self.now += 1;
        if self.scenario.guest {
            return Ok(());
        }
        for disk in self.disks() {
            let parts = [0, u64::from(self.now) * PART];
            self.domain.write_patterns(disk, self.now, &parts, PART)?;
        }
        Ok(())
    }

    pub(super) fn command(&self) -> Vec<&str> {
        words(self.scenario.action, &self.domain.name)
    }

    pub(super) fn state(&self) -> &'static str {
        if self.scenario.stopped {
            "shut off"
        } else {
            "running"
        }
    }

    /// Breaks the run at a place; gives what the caller was told and how long the
    /// recovery took.
    pub(super) fn broken(
        &mut self,
        fault: &Fault,
        mut daemons: Option<&mut OwnedLab>,
    ) -> Result<(Output, Option<Duration>)> {
        self.agent.stop();
        let file = self.agent.folder().join("agent.toml");
        let text = fs::read_to_string(&file)?.replace(
            "[libvirt]\n",
            &format!("[libvirt]\neffect_timeout = {DEADLINE}\nrelease_timeout = {DEADLINE}\n"),
        );
        fs::write(&file, text)?;
        let libvirtd = daemons.as_ref().and_then(|lab| lab.libvirtd());
        self.agent.set_env("FAILPOINTS", &fault.variable(libvirtd));
        self.agent.start()?;
        self.agent.set_env("FAILPOINTS", "");
        let mut command = self.agent.cli(&self.command())?;
        let caller = thread::spawn(move || run(&mut command, None, LONG));
        let mut recovery = None;
        match fault {
            Fault::Record(_) => {
                eventually(LONG, "end of the agent", || {
                    self.agent.ended() || caller.is_finished()
                })?;
                ensure!(self.agent.ended(), "the run did not come to this place");
                let since = Instant::now();
                let (domain, wanted) = (self.domain.clone(), self.state());
                let seen = thread::spawn(move || {
                    eventually_some(LONG, "VM in its state again", || {
                        Ok((domain.state()? == wanted).then(|| since.elapsed()))
                    })
                });
                self.agent.start()?;
                let seen = seen
                    .join()
                    .map_err(|_| anyhow::anyhow!("the watcher panicked"))?;
                recovery = Some(seen.context("after recovery")?);
            }
            Fault::Effect(..) => {
                if let Some(lab) = daemons.as_mut() {
                    eventually(LONG, "end of libvirtd", || {
                        lab.libvirtd_ended() || caller.is_finished()
                    })?;
                    ensure!(lab.libvirtd_ended(), "the run did not come to this place");
                    lab.start_libvirtd()?;
                }
            }
        }
        let output = caller
            .join()
            .map_err(|_| anyhow::anyhow!("the caller panicked"))??;
        ensure!(
            matches!(fault, Fault::Record(_)) || self.agent.log().contains("failpoint reached"),
            "the run did not come to this place"
        );
        if let Some(lab) = daemons {
            // libvirt 11.3 may crash by itself soon after it found half of a merge;
            // a service manager would start it again.
            thread::sleep(Duration::from_millis(500));
            if lab.libvirtd_ended() {
                lab.start_libvirtd()?;
            }
        }
        if let Fault::Effect("lands late", ..) = fault {
            // Whatever was late has landed then.
            thread::sleep(Duration::from_millis(u64::from(LATE)));
        }
        Ok((output, recovery))
    }
}

/// Runs a scenario on a domain of its own.
pub(super) fn on_domain<T>(
    lab: &Lab,
    scenario: &Scenario,
    work: impl FnOnce(Stage<'_>) -> Result<T>,
) -> Result<T> {
    if scenario.guest {
        let guest = lab.guest()?;
        return work(Stage::new(scenario, &guest)?);
    }
    let blank = lab.blank(&BlankSpec {
        disks: vec![("vdb".to_owned(), "qcow2".to_owned(), false)],
        stopped: scenario.stopped,
        ..BlankSpec::default()
    })?;
    work(Stage::new(scenario, &blank)?)
}
