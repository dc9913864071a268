//! Lists of many VMs: right, in pages, and cheap once they were read. How they
//! were made and virsh are the witnesses; what a list costs, the agent's log.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context as _, Result, ensure};
use vmsnap_client::{Client, ConnectOptions, Endpoint};
use vmsnap_proto::v1::{self, inventory_service_client::InventoryServiceClient};
use vmsnap_tests::{Agent, BlankSpec, Herd, Lab};

/// What the agent has spent on lists so far: snapshots whose XML it asked for,
/// images it looked into, runs of qemu-img.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Costs {
    xml: u64,
    headers: u64,
    qemu_img: u64,
}

fn costs(agent: &Agent) -> Result<Costs> {
    let log = agent.log();
    let line = log.lines().rfind(|line| line.contains("costs so far"));
    let line = line.context("the agent has listed nothing")?;
    let read = |key: &str| -> Result<u64> {
        let rest = line.split(&format!(" {key}=")).nth(1);
        let digits: String = rest
            .context("a cost is missing")?
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        Ok(digits.parse()?)
    };
    Ok(Costs {
        xml: read("snapshot_xml")?,
        headers: read("headers")?,
        qemu_img: read("qemu_img")?,
    })
}

/// The list, and what it cost.
async fn listed(agent: &Agent, client: &Client) -> Result<(Vec<v1::Snapshot>, Costs)> {
    let before = costs(agent).unwrap_or(Costs {
        xml: 0,
        headers: 0,
        qemu_img: 0,
    });
    let all = client.snapshots("").await?;
    let after = costs(agent)?;
    let spent = Costs {
        xml: after.xml - before.xml,
        headers: after.headers - before.headers,
        qemu_img: after.qemu_img - before.qemu_img,
    };
    Ok((all, spent))
}

async fn client(agent: &Agent) -> Result<Client> {
    let endpoint = Endpoint::parse(&agent.address())?;
    Ok(Client::connect(&endpoint, &ConnectOptions::default()).await?)
}

/// libvirt's files of snapshots are trusted once they are older than this.
const SETTLED: Duration = Duration::from_millis(600);

/// Those of the herd: other tests may share the lab.
fn of_herd<'a>(herd: &Herd, all: &'a [v1::Snapshot]) -> Vec<&'a v1::Snapshot> {
    all.iter()
        .filter(|one| herd.vms.contains(&one.vm_name))
        .collect()
}

fn is_as_made(herd: &Herd, all: &[v1::Snapshot]) -> Result<()> {
    let found = of_herd(herd, all);
    ensure!(found.len() == herd.vms.len() * herd.snapshots.len());
    let expected = herd
        .vms
        .iter()
        .flat_map(|vm| herd.snapshots.iter().map(move |name| (vm, name)));
    for (snapshot, (vm, name)) in found.iter().zip(expected) {
        ensure!((&snapshot.vm_name, &snapshot.name) == (vm, name));
        let at = herd.snapshots.iter().position(|it| it == name);
        let at = at.context("a snapshot")?;
        let parent = at.checked_sub(1).map(|at| herd.snapshots[at].as_str());
        ensure!(
            snapshot.parent == parent.unwrap_or_default(),
            "{snapshot:?}"
        );
        ensure!(
            snapshot.current == (at + 1 == herd.snapshots.len()),
            "{snapshot:?}"
        );
        ensure!(
            snapshot.health() == v1::SnapshotHealth::Whole,
            "{snapshot:?}"
        );
        let created = snapshot.created.as_ref().context("a time")?;
        ensure!(created.seconds as u64 == vmsnap_tests::herd::FIRST + at as u64);
    }
    Ok(())
}

#[tokio::test]
async fn many_snapshots_are_listed_rightly_and_asked_for_once() -> Result<()> {
    let lab = Lab::from_env()?;
    let herd = lab.herd(30, 20)?;
    let agent = lab.agent("")?;
    let client = client(&agent).await?;
    tokio::time::sleep(SETTLED).await;
    let (cold, first) = listed(&agent, &client).await?;
    is_as_made(&herd, &cold)?;
    ensure!(first.xml >= 600, "{first:?}");
    // All that is asked for again belongs to other tests' VMs.
    let others = cold.len() - of_herd(&herd, &cold).len();
    let (warm, second) = listed(&agent, &client).await?;
    is_as_made(&herd, &warm)?;
    ensure!(second.xml <= others as u64 + 40, "{second:?}");
    ensure!(second.qemu_img < 10, "{second:?}");
    // Images are looked into each time: what is in them may have changed.
    ensure!(second.headers >= 30, "{second:?}");

    // What others change is seen at once, also when names and times stay.
    let (vm, name) = (&herd.vms[7], &herd.snapshots[3]);
    herd.describe(vm, name, "told again")?;
    let (changed, third) = listed(&agent, &client).await?;
    let told: Vec<(&String, &String)> = changed
        .iter()
        .filter(|one| one.description == "told again")
        .map(|one| (&one.vm_name, &one.name))
        .collect();
    ensure!(told == [(vm, name)], "{told:?}");
    ensure!(third.xml < 100, "{third:?}");

    // A parent goes, and its child has another.
    lab.virsh(["snapshot-delete", vm, name, "--metadata"])?;
    let image = herd.disk(&herd.vms[8]).display().to_string();
    lab.qemu_img(["snapshot", "-q", "-d", &herd.snapshots[5], &image])?;
    let (after, fourth) = listed(&agent, &client).await?;
    let child = after
        .iter()
        .find(|one| one.vm_name == *vm && one.name == herd.snapshots[4])
        .context("the child")?;
    ensure!(child.parent == herd.snapshots[2], "{child:?}");
    ensure!(
        after
            .iter()
            .filter(|one| one.vm_name == *vm)
            .all(|one| one.name != *name)
    );
    let lost: BTreeSet<(&String, &String)> = of_herd(&herd, &after)
        .into_iter()
        .filter(|one| one.health() != v1::SnapshotHealth::Whole)
        .map(|one| (&one.vm_name, &one.name))
        .collect();
    ensure!(lost == BTreeSet::from([(&herd.vms[8], &herd.snapshots[5])]));
    ensure!(fourth.xml < 100, "{fourth:?}");
    Ok(())
}

#[tokio::test]
async fn pages_of_any_size_make_the_same_list() -> Result<()> {
    let lab = Lab::from_env()?;
    let herd = lab.herd(5, 7)?;
    let agent = lab.agent("")?;
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", agent.tcp()?))?
        .connect()
        .await?;
    let mut inventory = InventoryServiceClient::new(channel);
    for page_size in [1, 3, 7, 8, 34, 35, 36, 10_000] {
        let (mut found, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = v1::ListSnapshotsRequest {
                vm_name: String::new(),
                page_size,
                page_token,
            };
            let page = inventory.list_snapshots(request).await?.into_inner();
            ensure!(page.snapshots.len() <= page_size as usize);
            found.extend(page.snapshots);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        is_as_made(&herd, &found)?;
    }
    let mut one = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = v1::ListSnapshotsRequest {
            vm_name: herd.vms[2].clone(),
            page_size: 2,
            page_token,
        };
        let page = inventory.list_snapshots(request).await?.into_inner();
        one.extend(page.snapshots.into_iter().map(|one| one.name));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    ensure!(one == herd.snapshots, "{one:?}");
    for (page_size, most) in [(2, 2), (0, 100)] {
        let (mut names, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = v1::ListVmsRequest {
                page_size,
                page_token,
            };
            let page = inventory.list_vms(request).await?.into_inner();
            ensure!(page.vms.len() <= most);
            names.extend(page.vms.into_iter().map(|vm| vm.name));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        names.retain(|name| herd.vms.contains(name));
        ensure!(names == herd.vms, "{names:?}");
    }
    let wrong = inventory
        .list_snapshots(v1::ListSnapshotsRequest {
            page_token: "35".into(),
            ..Default::default()
        })
        .await;
    let refused = wrong.err().context("a token of another make is taken")?;
    ensure!(refused.message().contains("page_token"), "{refused}");
    let nobody = inventory
        .list_snapshots(v1::ListSnapshotsRequest {
            vm_name: format!("{}x", herd.vms[0]),
            ..Default::default()
        })
        .await;
    let refused = nobody.err().context("a VM that is not there is listed")?;
    ensure!(refused.message().contains("did you mean"), "{refused}");
    Ok(())
}

#[tokio::test]
async fn an_external_chain_that_changes_behind_the_agent_is_listed_as_it_is() -> Result<()> {
    let lab = Lab::from_env()?;
    let domain = lab.blank(&BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    })?;
    for name in ["one", "two", "three"] {
        domain.virsh("snapshot-create-as", &[name, "--disk-only"])?;
    }
    let agent = lab.agent("")?;
    let client = client(&agent).await?;
    tokio::time::sleep(SETTLED).await;
    for _ in 0..2 {
        let all = client.snapshots(&domain.name).await?;
        let names: Vec<&str> = all.iter().map(|one| &*one.name).collect();
        ensure!(names == ["one", "two", "three"], "{names:?}");
        ensure!(
            all.iter()
                .all(|one| one.health() == v1::SnapshotHealth::Whole)
        );
        ensure!(all[2].current && all[2].parent == "two", "{all:?}");
    }
    // libvirt merges: the next one's data is in another image then.
    domain.virsh("snapshot-delete", &["two"])?;
    let all = client.snapshots(&domain.name).await?;
    let names: Vec<&str> = all.iter().map(|one| &*one.name).collect();
    ensure!(names == ["one", "three"], "{names:?}");
    ensure!(all[1].parent == "one", "{all:?}");
    ensure!(
        all.iter()
            .all(|one| one.health() == v1::SnapshotHealth::Whole),
        "{all:?}"
    );
    // A revert is a new overlay, which libvirt notes in the snapshot.
    domain.virsh("snapshot-revert", &["one"])?;
    let all = client.snapshots(&domain.name).await?;
    ensure!(all[0].current && !all[1].current, "{all:?}");
    ensure!(
        all.iter()
            .all(|one| one.health() == v1::SnapshotHealth::Whole),
        "{all:?}"
    );
    // And a file that goes is missed.
    let xml = domain.virsh("snapshot-dumpxml", &["three"])?;
    let path = xml
        .split("<domain ")
        .nth(1)
        .and_then(|rest| rest.split("<source file='").nth(1))
        .and_then(|rest| rest.split('\'').next())
        .context("the image that holds the data")?
        .to_owned();
    std::fs::remove_file(&path)?;
    let all = client.snapshots(&domain.name).await?;
    let broken: Vec<&str> = all
        .iter()
        .filter(|one| one.health() != v1::SnapshotHealth::Whole)
        .map(|one| &*one.name)
        .collect();
    ensure!(broken == ["three"], "{broken:?}, but {path} is gone");
    Ok(())
}
