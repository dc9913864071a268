//! Many guests whose agents hang, beside one that is well: nobody waits for the
//! agents of others. The guests are real ones, whose agent's port is open and read
//! by nobody.

use std::{
    fs,
    io::Read as _,
    os::unix::fs::FileExt as _,
    path::PathBuf,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use vmsnap_tests::{Blank, BlankSpec, Domain, Lab, eventually, eventually_some};

/// How many agents hang.
const HUNG: usize = 25;
const BOOT: Duration = Duration::from_secs(120);

/// A guest whose agent is connected and never answers; not started yet.
fn silent(lab: &Lab) -> Result<Blank> {
    let folder = lab.folder.display();
    lab.blank(&BlankSpec {
        os: format!(
            "<kernel>{folder}/vmlinuz</kernel><initrd>{folder}/initrd.img</initrd>\
             <cmdline>quiet panic=1 vmsnap.agent=silent</cmdline>"
        ),
        devices: "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/>\
                  </channel>"
            .to_owned(),
        disk_mib: 1,
        memory_mib: 128,
        stopped: true,
        ..BlankSpec::default()
    })
}

fn connected(domain: &Domain) -> bool {
    domain
        .virsh("dumpxml", &[])
        .is_ok_and(|xml| xml.contains("state='connected'"))
}

/// Where the definition begins in a file that libvirt saved a domain in: behind the
/// mark, a version, three numbers more and what is reserved.
const DEFINITION: usize = 92;
const END: &str = "</domain>";

/// More bytes than the definition has.
const LONGEST: u64 = 64 << 10;

/// What a domain was saved in, from which others go on: the file says whose it is.
struct Saved {
    path: PathBuf,
    /// The definition in it, with name and UUID of whom it was saved of.
    definition: String,
    name: String,
    uuid: String,
}

impl Saved {
    fn of(domain: &Domain) -> Result<Self> {
        let lab = &domain.lab;
        let uuid = domain.virsh("domuuid", &[])?.trim().to_owned();
        let path = lab.folder.join(format!("{}.saved", domain.name));
        lab.virsh(["save".as_ref(), domain.name.as_ref(), path.as_os_str()])?;
        let mut head = Vec::new();
        let file = fs::File::open(&path)?;
        file.take(LONGEST).read_to_end(&mut head)?;
        let text = String::from_utf8_lossy(&head[DEFINITION..]);
        let (definition, _) = text.split_once(END).context("a definition")?;
        Ok(Self {
            path,
            definition: format!("{definition}{END}"),
            name: domain.name.clone(),
            uuid,
        })
    }

    /// Has a domain go on from there, its vCPUs standing still. Its name is no longer
    /// than that of the one that was saved.
    fn go_on(&self, domain: &Domain) -> Result<()> {
        let uuid = domain.virsh("domuuid", &[])?;
        let mut xml = self
            .definition
            .replace(&self.name, &domain.name)
            .replace(&self.uuid, uuid.trim());
        let length = self.definition.len();
        ensure!(xml.len() <= length, "the definition became longer");
        xml.push_str(&" ".repeat(length - xml.len()));
        // Written into the same file: a copy of the memory for each would take longer
        // than the rest.
        let file = fs::File::options().write(true).open(&self.path)?;
        file.write_all_at(xml.as_bytes(), DEFINITION as u64)?;
        let words = [
            "restore".as_ref(),
            self.path.as_os_str(),
            "--paused".as_ref(),
        ];
        domain.lab.virsh(words).map(drop)
    }
}

/// Guests whose agents are connected and never answer: one boots, the others go on
/// from there.
fn herd_of_silent(lab: &Lab) -> Result<Vec<Blank>> {
    let hung: Vec<Blank> = (0..HUNG).map(|_| silent(lab)).collect::<Result<_>>()?;
    // The last one's name is the longest.
    let (first, others) = hung.split_last().context("guests")?;
    first.virsh("start", &[])?;
    eventually(BOOT, "guest agent's port that is open", || connected(first))?;
    let saved = Saved::of(first)?;
    for domain in others.iter().chain([first]) {
        saved.go_on(domain)?;
    }
    fs::remove_file(&saved.path)?;
    // All at once, so that none is restored beside others that run.
    let resume: Vec<String> = hung
        .iter()
        .map(|domain| format!("resume {}", domain.name))
        .collect();
    lab.virsh([resume.join("; ")])?;
    for domain in &hung {
        eventually(BOOT, "guest agent that is connected", || connected(domain))?;
    }
    Ok(hung)
}

struct Callers(Vec<Child>);

impl Drop for Callers {
    fn drop(&mut self) {
        for caller in &mut self.0 {
            let _ = caller.kill();
            let _ = caller.wait();
        }
    }
}

#[test]
fn twenty_five_hung_guest_agents_delay_neither_the_thaw_of_another_vm_nor_other_clients()
-> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    let hung = herd_of_silent(&lab)?;
    // Alone, for comparison.
    let frozen = |words: &[&str]| -> Result<(u64, Duration)> {
        let since = Instant::now();
        let made = agent.vmsnap(words)?;
        let result = made.result()?;
        assert_eq!(result["consistency"], "filesystem", "{:?}", made.events);
        let frozen = result["frozen_ms"].as_u64().context("frozen_ms")?;
        Ok((frozen, since.elapsed()))
    };
    let (frozen_alone, alone) = frozen(&["create", name, "alone"])?;
    let virsh = || -> Result<Duration> {
        let since = Instant::now();
        guest.virsh("domstats", &["--state"])?;
        Ok(since.elapsed())
    };
    let virsh_alone = virsh()?;

    // Each of these waits for its agent, over and over.
    let mut callers = Callers(Vec::new());
    for domain in &hung {
        let words = [
            "create",
            &domain.name,
            "s",
            "--wait-for",
            "agent",
            "--wait-timeout",
            "120s",
        ];
        let mut command = agent.cli(&words)?;
        callers.0.push(
            command
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()?,
        );
    }
    eventually_some(BOOT, "runs that all wait for their agent", || {
        let waiting = agent
            .log()
            .matches("step=\"wait for the guest agent")
            .count();
        Ok((waiting >= HUNG).then_some(()))
    })?;
    // Whoever waits for a hung agent waits for at least five seconds.
    let mut slowest = Duration::ZERO;
    for round in 0..3 {
        let snapshot = format!("beside{round}");
        let (ms, took) = frozen(&["create", name, &snapshot])?;
        ensure!(
            ms < frozen_alone + 4_000,
            "frozen for {ms} ms, alone {frozen_alone} ms"
        );
        ensure!(
            took < alone + Duration::from_secs(8),
            "took {took:?}, alone {alone:?}"
        );
        slowest = slowest.max(virsh()?);
    }
    ensure!(
        slowest < virsh_alone + Duration::from_secs(4),
        "virsh took {slowest:?}, alone {virsh_alone:?}"
    );
    assert!(!guest.frozen()?);
    guest.lives()
}
