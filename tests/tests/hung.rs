//! Many guests whose agents hang, beside one that is well: nobody waits for the
//! agents of others. The guests are real ones, whose agent's port is open and read
//! by nobody.

use std::{
    fs,
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

/// Has a domain go on from where another one was saved. Names grow no longer by that.
fn go_on(saved: &[u8], of: &Domain, domain: &Domain) -> Result<()> {
    let end = b"</domain>";
    let length = saved[DEFINITION..]
        .windows(end.len())
        .position(|part| part == end)
        .context("a definition")?
        + end.len();
    let mut xml = std::str::from_utf8(&saved[DEFINITION..DEFINITION + length])?
        .replace(&of.name, &domain.name)
        .replace(
            of.virsh("domuuid", &[])?.trim(),
            domain.virsh("domuuid", &[])?.trim(),
        );
    ensure!(xml.len() <= length, "the definition became longer");
    xml.push_str(&" ".repeat(length - xml.len()));
    let mut copy = saved.to_vec();
    copy[DEFINITION..DEFINITION + length].copy_from_slice(xml.as_bytes());
    let path = domain.lab.folder.join(format!("{}.saved", domain.name));
    fs::write(&path, copy)?;
    domain.lab.own(&path)?;
    let restored = domain.lab.virsh(["restore".as_ref(), path.as_os_str()]);
    fs::remove_file(path)?;
    restored.map(drop)
}

/// Guests whose agents are connected and never answer: one boots, the others go on
/// from there.
fn herd_of_silent(lab: &Lab) -> Result<Vec<Blank>> {
    let hung: Vec<Blank> = (0..HUNG).map(|_| silent(lab)).collect::<Result<_>>()?;
    // The last one's name is the longest.
    let (first, others) = hung.split_last().context("guests")?;
    first.virsh("start", &[])?;
    eventually(BOOT, "guest agent's port that is open", || connected(first))?;
    let path = lab.folder.join(format!("{}.saved", first.name));
    lab.virsh(["save".as_ref(), first.name.as_ref(), path.as_os_str()])?;
    let saved = fs::read(&path)?;
    fs::remove_file(path)?;
    for domain in others.iter().chain([first]) {
        go_on(&saved, first, domain)?;
    }
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
    let mut slowest = Duration::ZERO;
    for round in 0..3 {
        let snapshot = format!("beside{round}");
        let (ms, took) = frozen(&["create", name, &snapshot])?;
        ensure!(
            ms < frozen_alone + 2_000,
            "frozen for {ms} ms, alone {frozen_alone} ms"
        );
        ensure!(
            took < alone + Duration::from_secs(8),
            "took {took:?}, alone {alone:?}"
        );
        slowest = slowest.max(virsh()?);
    }
    ensure!(
        slowest < virsh_alone + Duration::from_secs(2),
        "virsh took {slowest:?}, alone {virsh_alone:?}"
    );
    assert!(!guest.frozen()?);
    guest.lives()
}
