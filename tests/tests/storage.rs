//! Where snapshots and disks lie: full pools, paths without a pool, sizes, and
//! volumes that must not go. virsh, qemu-img and the file system are the
//! witnesses.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use vmsnap_tests::{Agent, Blank, BlankSpec, Cli, Domain, Lab, eventually};

const MIB: u64 = 1 << 20;
const NONE: [&str; 0] = [];

fn number(value: &Value, key: &str) -> Result<u64> {
    let text = value["metadata"][key].as_str();
    Ok(text
        .with_context(|| format!("no {key} in {value}"))?
        .parse()?)
}

/// Virtual size of a disk's active image, by qemu-img.
fn size(domain: &Domain, target: &str) -> Result<u64> {
    let path = domain.disk(target)?;
    let text = domain
        .lab
        .qemu_img(["info", "-U", "--output=json", &path])?;
    let info: Value = serde_json::from_str(&text)?;
    info["virtual-size"].as_u64().context("a size")
}

fn entries(folder: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> = fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    names.sort();
    Ok(names)
}

/// A pool over a folder; gone when dropped.
struct Pool<'a> {
    lab: &'a Lab,
    name: String,
}

impl<'a> Pool<'a> {
    /// Each test runs in a process of its own.
    fn name() -> String {
        format!("pool{}", std::process::id())
    }

    fn over(lab: &'a Lab, folder: &Path) -> Result<Self> {
        let name = Self::name();
        let target = folder.display().to_string();
        lab.virsh(["pool-define-as", &name, "dir", "--target", &target])?;
        let pool = Self { lab, name };
        lab.virsh(["pool-start", &pool.name])?;
        Ok(pool)
    }
}

impl Drop for Pool<'_> {
    fn drop(&mut self) {
        let _ = self.lab.virsh(["pool-destroy", &self.name]);
        let _ = self.lab.virsh(["pool-undefine", &self.name]);
    }
}

// --- space --------------------------------------------------------------------

#[test]
fn what_a_merge_would_write_is_counted_over_all_disks_before_it_begins() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let small = lab.small(32)?;
    // No pool lies there.
    let domain = lab.blank(&BlankSpec {
        disks: vec![("vdb".to_owned(), "qcow2".to_owned(), false)],
        folder: Some(small.folder.clone()),
        disk_mib: 16,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    // An internal snapshot of a running VM writes its memory into the image.
    let full = agent.vmsnap(&["create", name, "s", "--kind", "internal"])?;
    let failure = full.failure()?;
    assert_eq!(failure["reason"], "NO_SPACE");
    assert!(number(failure, "need_bytes")? > 64 * MIB);

    agent.vmsnap(&["create", name, "s"])?.result()?;
    for target in ["vda", "vdb"] {
        domain.write_pattern(target, 7, 0, 6 * MIB)?;
    }
    let filler = small.folder.join("filler");
    fs::write(&filler, vec![1; 10 << 20])?;
    let before = entries(&small.folder)?;
    for words in [["cleanup", name, "s"], ["commit", name, "--all"]] {
        // Each disk's would fit alone.
        let full = agent.vmsnap(&words)?;
        let failure = full.failure()?;
        assert_eq!(failure["reason"], "NO_SPACE", "{words:?}");
        let (need, free) = (
            number(failure, "need_bytes")?,
            number(failure, "free_bytes")?,
        );
        assert!(free > 6 * MIB && need > free, "{need} of {free}");
        assert_eq!(
            failure["metadata"]["path"],
            small.folder.display().to_string()
        );
        assert_eq!(failure["metadata"]["pool"], Value::Null);
        assert_eq!(domain.state()?, "running");
        assert_eq!(domain.snapshots()?, ["s"]);
        assert_eq!(entries(&small.folder)?, before);
    }
    // Full to the brim, no overlay fits either, and nothing is left of the attempt.
    let rest = small.folder.join("rest");
    let _ = fs::write(&rest, vec![1; 10 << 20]);
    let before = entries(&small.folder)?;
    let full = agent.vmsnap(&["create", name, "t"])?;
    let failure = full.failure()?;
    assert_eq!(failure["reason"], "NO_SPACE");
    assert_eq!(
        failure["metadata"]["path"],
        small.folder.display().to_string()
    );
    assert_eq!(full.all("step_started").count(), 0);
    assert_eq!(entries(&small.folder)?, before);
    assert_eq!(domain.state()?, "running");
    // libvirt would have switched the VM off before it found that out.
    let full = agent.vmsnap(&["revert", name, "s"])?;
    assert_eq!(full.failure()?["reason"], "NO_SPACE");
    assert_eq!(domain.state()?, "running");
    fs::remove_file(filler)?;
    fs::remove_file(rest)?;
    agent.vmsnap(&["cleanup", name, "s"])?.result()?;
    for target in ["vda", "vdb"] {
        assert!(domain.has_pattern(target, 7, 0, 6 * MIB)?);
        assert_eq!(domain.chain(target)?.len(), 1);
    }
    Ok(())
}

#[test]
fn space_that_runs_out_during_a_merge_is_told_with_need_and_free_and_the_merge_done_again()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let small = lab.small(40)?;
    let domain = lab.blank(&BlankSpec {
        folder: Some(small.folder.clone()),
        disk_mib: 16,
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    agent.vmsnap(&["create", name, "s"])?.result()?;
    domain.write_pattern("vda", 7, 0, 12 * MIB)?;
    let chain = domain.chain("vda")?;
    let mut merging = agent.cli(&["cleanup", name, "s", "--start-if-stopped"])?;
    let merging = merging.stdout(std::process::Stdio::piped()).spawn()?;
    // There was room enough when it was planned.
    eventually(Duration::from_secs(20), "start of the VM", || {
        agent.log().contains("step=\"start the VM")
    })?;
    let filler = small.folder.join("filler");
    let _ = fs::write(&filler, vec![1; 40 << 20]);
    let said = String::from_utf8(merging.wait_with_output()?.stdout)?;
    let last: Value = serde_json::from_str(said.lines().last().context("an outcome")?)?;
    let failure = &last["failure"];
    assert_eq!(failure["reason"], "NO_SPACE", "{last}");
    let (need, free) = (
        number(failure, "need_bytes")?,
        number(failure, "free_bytes")?,
    );
    assert!(need >= 12 * MIB && free < MIB, "{need} of {free}");
    assert_eq!(domain.state()?, "running");
    assert_eq!(domain.chain("vda")?, chain);
    assert!(domain.has_pattern("vda", 7, 0, 12 * MIB)?);
    fs::remove_file(filler)?;
    agent.vmsnap(&["cleanup", name, "s"])?.result()?;
    assert_eq!(domain.chain("vda")?.len(), 1);
    assert!(domain.has_pattern("vda", 7, 0, 12 * MIB)?);
    Ok(())
}

#[test]
fn a_pool_is_believed_only_once_it_was_looked_at_anew() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let small = lab.small(32)?;
    let pool = Pool::over(&lab, &small.folder)?;
    let domain = lab.blank(&BlankSpec {
        folder: Some(small.folder.clone()),
        disk_mib: 8,
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    // Neither the disk nor the overlay was made through libvirt.
    let made = agent.vmsnap(&["create", name, "s", "--pool", &pool.name])?;
    let overlay = format!("{name}.vda.s.qcow2");
    let volumes = |cli: &Cli| -> Result<Vec<String>> {
        let result = cli.result()?;
        let volumes = result["storage"]["volumes"].as_array().context("volumes")?;
        Ok(volumes
            .iter()
            .map(|volume| volume["name"].as_str().unwrap_or_default().to_owned())
            .collect())
    };
    assert!(volumes(&made)?.contains(&overlay));
    // A file that went and one that came behind libvirt's back.
    let left = format!("{name}-old.qcow2");
    let path = small.folder.join(&left);
    let free = |cli: &Cli| -> Result<u64> {
        let pool = &cli.result()?["storage"]["pool"];
        pool["available_bytes"].as_u64().context("free bytes")
    };
    fs::write(small.folder.join("big"), vec![1; 8 << 20])?;
    let seen = agent.vmsnap(&["commit", name, "--pool", &pool.name])?;
    assert!(volumes(&seen)?.contains(&"big".to_owned()));
    let before = free(&seen)?;
    fs::remove_file(small.folder.join("big"))?;
    fs::write(&path, "left over")?;
    let gone = agent.vmsnap(&["cleanup", name, "--pool", &pool.name])?;
    assert_eq!(gone.result()?["changed"], true);
    assert!(!path.exists());
    assert!(!volumes(&gone)?.contains(&"big".to_owned()));
    assert!(free(&gone)? >= before + 8 * MIB);
    // A pool that is not active holds nobody up: the folder is looked at.
    lab.virsh(["pool-destroy", &pool.name])?;
    let merged = agent.vmsnap(&["commit", name, "s", "--pool", &pool.name])?;
    assert_eq!(merged.result()?["storage"]["pool"]["active"], false);
    assert_eq!(domain.chain("vda")?, [format!("{name}.qcow2")]);
    Ok(())
}

// --- sizes --------------------------------------------------------------------

fn resize(agent: &Agent, domain: &Domain, to: &str, more: &[&str]) -> Result<Cli> {
    let mut words = vec!["commit", domain.name.as_str(), "--resize-to", to];
    words.extend(more);
    agent.vmsnap(&words)
}

#[test]
fn a_disk_is_resized_by_its_present_size_in_bytes_whatever_the_state_of_its_vm() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    // Beside all pools.
    let folder = lab.folder.join(format!("plain{}", std::process::id()));
    fs::create_dir(&folder)?;
    lab.own(&folder)?;
    let domain = lab.blank(&BlankSpec {
        disks: vec![
            ("vdb".to_owned(), "raw".to_owned(), false),
            ("vdc".to_owned(), "raw".to_owned(), true),
        ],
        folder: Some(folder.clone()),
        disk_mib: 8,
        ..BlankSpec::default()
    })?;
    let (small, odd, large) = (8 * MIB, 8 * MIB + 512, 9 * MIB);
    for (state, target, before, bytes) in [
        ("running", "vda", small, odd),
        ("paused", "vdb", small, odd),
        ("shut off", "vdb", odd, large),
        ("shut off", "vda", odd, large),
    ] {
        match state {
            "paused" => domain.virsh("suspend", &[])?,
            "shut off" => domain.virsh("destroy", &[]).unwrap_or_default(),
            _ => String::new(),
        };
        let to = |bytes: u64, more: &[&str]| {
            let more = [&["--resize-disk", target], more].concat();
            resize(&agent, &domain, &bytes.to_string(), &more)
        };
        assert_eq!(
            to(bytes, &[])?.result()?["resized_to_bytes"],
            bytes,
            "{state}, {target}"
        );
        assert_eq!(size(&domain, target)?, bytes, "{state}, {target}");
        assert_eq!(to(bytes, &[])?.result()?["changed"], false);
        let off = state == "shut off";
        let kept = to(before, if off { &[] } else { &["--allow-shrink"] })?;
        let failure = kept.failure()?;
        assert_eq!(failure["reason"], "SHRINK_REFUSED", "{state}");
        assert_eq!(number(failure, "present_bytes")?, bytes);
        assert_eq!(size(&domain, target)?, bytes, "{state}, {target}");
        if off {
            to(before, &["--allow-shrink"])?.result()?;
            assert_eq!(size(&domain, target)?, before);
        }
        ensure!(
            domain.state()? == state,
            "{state} became {}",
            domain.state()?
        );
    }
    // Which disk, and half a sector, have to be clear.
    let unknown = resize(&agent, &domain, "64M", &["--resize-disk", "vdc"])?;
    assert_eq!(unknown.failure()?["reason"], "DISK_UNKNOWN");
    let half = resize(&agent, &domain, &(20 * MIB + 100).to_string(), &[])?;
    let failure = half.failure()?;
    assert_eq!(failure["reason"], "BAD_REQUEST");
    assert_eq!(size(&domain, "vda")?, odd);
    drop(domain);
    fs::remove_dir_all(folder)?;
    Ok(())
}

#[test]
fn pools_and_volumes_that_come_and_go_disturb_nobody_who_only_looks() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let folder = lab.folder.join(format!("busy{}", std::process::id()));
    fs::create_dir(&folder)?;
    let domain = lab.blank(&BlankSpec {
        disk_mib: 8,
        stopped: true,
        ..BlankSpec::default()
    })?;
    let done = AtomicBool::new(false);
    let volumes: Vec<PathBuf> = (0..100)
        .map(|volume| folder.join(format!("v{volume}")))
        .collect();
    let others = || -> Result<usize> {
        let mut rounds = 0;
        while !done.load(Ordering::Relaxed) {
            let pool = Pool::over(&lab, &folder)?;
            for _ in 0..3 {
                for volume in &volumes {
                    fs::write(volume, [0; 512])?;
                }
                lab.virsh(["pool-refresh", &pool.name])?;
                for volume in &volumes {
                    fs::remove_file(volume)?;
                }
                lab.virsh(["pool-refresh", &pool.name])?;
            }
            rounds += 1;
        }
        Ok(rounds)
    };
    let looking = || -> Result<()> {
        for round in 1..=12 {
            let bytes = 8 * MIB + round * 512;
            resize(&agent, &domain, &bytes.to_string(), &[])?.result()?;
            assert_eq!(size(&domain, "vda")?, bytes);
            let listed = agent.vmsnap(&["volumes", &Pool::name()])?;
            // In the moment between two definitions there is none.
            ensure!(
                listed.status == 0 || listed.said.contains("this host has no storage pool"),
                "{}",
                listed.said
            );
        }
        Ok(())
    };
    let rounds = thread::scope(|scope| {
        let others = scope.spawn(others);
        let looked = looking();
        done.store(true, Ordering::Relaxed);
        let rounds = others.join().expect("no panic")?;
        looked.map(|()| rounds)
    })?;
    ensure!(rounds > 0, "nothing came and went");
    fs::remove_dir_all(folder)?;
    Ok(())
}

#[test]
fn a_disk_with_snapshots_is_resized_if_its_format_can_and_a_revert_tells_the_old_size() -> Result<()>
{
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    for (kind, compat) in [
        ("internal", "1.1"),
        ("external", "1.1"),
        ("internal", "0.10"),
    ] {
        let domain = lab.blank(&BlankSpec {
            disk_mib: 8,
            stopped: true,
            ..BlankSpec::default()
        })?;
        let name = domain.name.as_str();
        let option = format!("compat={compat}");
        lab.qemu_img(["amend", "-q", "-o", &option, &domain.disk("vda")?])?;
        agent
            .vmsnap(&["create", name, "s", "--kind", kind])?
            .result()?;
        let grown = resize(&agent, &domain, "16M", &[])?;
        if compat == "0.10" {
            let failure = grown.failure()?;
            assert_eq!(failure["reason"], "DISK_UNSUPPORTED");
            let message = failure["message"].to_string();
            assert!(
                message.contains("0.10") && message.contains("(s)"),
                "{message}"
            );
            assert_eq!(size(&domain, "vda")?, 8 * MIB);
            // Snapshots that the same run drops are not in the way.
            resize(&agent, &domain, "16M", &["--all"])?.result()?;
            assert_eq!(size(&domain, "vda")?, 16 * MIB);
            assert_eq!(domain.snapshots()?, NONE);
            continue;
        }
        grown.result()?;
        assert!(grown.warned("SIZE_COMES_BACK"), "{kind}");
        assert_eq!(size(&domain, "vda")?, 16 * MIB);
        let back = agent.vmsnap(&["revert", name, "s"])?;
        let result = back.result()?;
        assert_eq!(size(&domain, "vda")?, 8 * MIB, "{kind}");
        assert_eq!(result["vm"]["disks"][0]["virtual_bytes"], 8 * MIB);
        let text = |bytes: u64| Value::from(bytes.to_string());
        let told = result["diff"]
            .as_array()
            .context("a diff")?
            .iter()
            .any(|change| {
                change["field"] == "disk.vda.virtual_size"
                    && change["before"] == text(16 * MIB)
                    && change["after"] == text(8 * MIB)
            });
        assert!(told, "{kind}: {}", result["diff"]);
    }
    Ok(())
}

// --- volumes that must not go -------------------------------------------------

/// A stopped VM with the left-over volume that a clean-up looks for.
struct LeftOver {
    domain: Blank,
    path: PathBuf,
}

impl LeftOver {
    fn new(lab: &Lab) -> Result<Self> {
        let domain = lab.blank(&BlankSpec {
            stopped: true,
            ..BlankSpec::default()
        })?;
        let path = lab.images().join(format!("{}-old.qcow2", domain.name));
        lab.qemu_img([
            "create",
            "-q",
            "-f",
            "qcow2",
            &path.display().to_string(),
            "8M",
        ])?;
        Ok(Self { domain, path })
    }

    fn file(&self) -> String {
        self.path.display().to_string()
    }

    /// Has it cleaned up, and says whether it went, and by which rule.
    fn clean(&self, agent: &Agent) -> Result<(bool, String)> {
        let done = agent.vmsnap(&["cleanup", &self.domain.name])?;
        let result = done.result()?;
        let verdict = &result["verdicts"][0];
        ensure!(verdict["removed"] == result["changed"], "{result}");
        ensure!(verdict["removed"] != self.path.exists(), "{result}");
        Ok((
            verdict["removed"] == true,
            verdict["rule"].as_str().unwrap_or_default().to_owned(),
        ))
    }
}

#[test]
fn a_volume_in_use_stays_however_it_is_used_and_under_whatever_name() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let left = LeftOver::new(&lab)?;
    let file = left.file();
    let volume = left
        .path
        .file_name()
        .context("a name")?
        .to_string_lossy()
        .into_owned();
    let link = lab.folder.join(format!("link{}", std::process::id()));
    std::os::unix::fs::symlink(lab.images(), &link)?;
    let linked = link.join(&volume).display().to_string();
    let as_disk = |kind: &str, source: &str| BlankSpec {
        devices: format!(
            "<disk type='{kind}' device='disk'><driver name='qemu' type='qcow2'/>\
             <source {source}/><target dev='vdb' bus='virtio'/></disk>"
        ),
        stopped: true,
        ..BlankSpec::default()
    };
    let kept = |by: &Domain, how: &str| -> Result<()> {
        let (gone, rule) = left.clean(&agent)?;
        assert!(!gone, "{how}");
        assert!(rule.contains(&by.name), "{how}: {rule}");
        Ok(())
    };
    for (how, spec) in [
        (
            "defined by its path",
            as_disk("file", &format!("file='{file}'")),
        ),
        (
            "defined by a link",
            as_disk("file", &format!("file='{linked}'")),
        ),
        (
            "defined as a volume",
            as_disk("volume", &format!("pool='default' volume='{volume}'")),
        ),
    ] {
        let user = lab.blank(&spec)?;
        kept(&user, how)?;
    }
    {
        // Live only: the definition knows nothing of it.
        let user = lab.blank(&BlankSpec::default())?;
        let drive = lab.folder.join(format!("drive{}.xml", std::process::id()));
        let xml = format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
             <source file='{file}'/><target dev='sda' bus='usb'/></disk>"
        );
        lab.write(&drive, &xml)?;
        let attached = user.virsh("attach-device", &[&drive.display().to_string(), "--live"]);
        fs::remove_file(drive)?;
        attached?;
        kept(&user, "live")?;
    }
    {
        // In a snapshot only: the VM itself runs on another image by now.
        let user = lab.blank(&as_disk("file", &format!("file='{file}'")))?;
        user.virsh(
            "snapshot-create-as",
            &["was", "--diskspec", "vda,snapshot=internal"],
        )?;
        user.virsh("detach-disk", &["vdb", "--config"])?;
        kept(&user, "in a snapshot")?;
    }
    fs::remove_file(link)?;
    let (gone, rule) = left.clean(&agent)?;
    assert!(gone, "{rule}");
    Ok(())
}
