//! What a list of many snapshots costs, beside what it costs with virsh: both in
//! one run on one host, so that their ratio means something elsewhere too.

use std::{
    io::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use vmsnap_client::{Client, ConnectOptions, Endpoint};

use vmsnap_tests::{Agent, Herd, Lab, OwnedLab};

/// How many VMs virsh is used on; the rest is reckoned.
const BY_VIRSH: usize = 10;
/// How often a list is asked for once it was read.
const AGAIN: usize = 9;
/// A snapshot that was changed just now is asked for again next time.
const SETTLED: Duration = Duration::from_secs(1);

/// Makes a lab with that many VMs and snapshots and lists them.
pub fn run(vms: usize, snapshots: usize) -> Result<()> {
    let owned = OwnedLab::start(0)?;
    let lab = &owned.lab;
    let since = Instant::now();
    let herd = lab.herd(vms, snapshots)?;
    say(&format!(
        "{vms} VMs with {snapshots} snapshots each, made in {:.1} s",
        since.elapsed().as_secs_f64()
    ))?;
    std::thread::sleep(SETTLED);
    let agent = lab.agent("")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (first, again, volumes) = runtime.block_on(by_agent(&agent, &herd))?;
    let virsh = by_virsh(lab, &herd)?;
    let ratio = |time: Duration| virsh.as_secs_f64() / time.as_secs_f64().max(1e-9);
    say(&format!(
        "{:<46} {:>9} {:>9}",
        "list of all snapshots", "time", "ratio"
    ))?;
    for (what, time) in [
        ("virsh snapshot-list and -dumpxml, one by one", virsh),
        ("agent, for the first time", first),
        ("agent, again (median)", again),
    ] {
        say(&format!(
            "{what:<46} {:>6} ms {:>8.1}x",
            time.as_millis(),
            ratio(time)
        ))?;
    }
    say(&format!(
        "{:<46} {:>6} ms",
        "volumes with their users, all VMs",
        volumes.as_millis()
    ))
}

/// The first list, the median of further ones, and the volumes with their users.
async fn by_agent(agent: &Agent, herd: &Herd) -> Result<(Duration, Duration, Duration)> {
    let endpoint = Endpoint::parse(&agent.address())?;
    let client = Client::connect(&endpoint, &ConnectOptions::default()).await?;
    let expected = herd.vms.len() * herd.snapshots.len();
    let mut times = Vec::with_capacity(AGAIN);
    for _ in 0..=AGAIN {
        let since = Instant::now();
        let found = client.snapshots("").await?;
        times.push(since.elapsed());
        ensure!(found.len() == expected, "{} of {expected}", found.len());
    }
    let first = times.remove(0);
    times.sort_unstable();
    let since = Instant::now();
    client.volumes("").await?;
    let volumes = since.elapsed();
    let again = *times.get(AGAIN / 2).context("no times")?;
    Ok((first, again, volumes))
}

/// What a script does: the names of each VM's snapshots, then each one's XML.
fn by_virsh(lab: &Lab, herd: &Herd) -> Result<Duration> {
    let some = &herd.vms[..herd.vms.len().min(BY_VIRSH)];
    let since = Instant::now();
    for vm in some {
        let names = lab.virsh(["snapshot-list", vm, "--name"])?;
        let names: Vec<&str> = names.split_whitespace().collect();
        ensure!(names == herd.snapshots, "virsh lists {names:?}");
        for name in names {
            lab.virsh(["snapshot-dumpxml", vm, name])?;
        }
    }
    let share = u32::try_from(some.len().max(1))?;
    let spent = since.elapsed();
    say(&format!(
        "virsh was used on {share} of them in {:.1} s; the rest is reckoned",
        spent.as_secs_f64()
    ))?;
    Ok(spent * u32::try_from(herd.vms.len())? / share)
}

fn say(line: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}
