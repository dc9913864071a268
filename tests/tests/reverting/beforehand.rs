//! What is looked at before the guest is touched: managed saves, memory files, and
//! what a start needs beside the disks.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use vmsnap_tests::{BlankSpec, Lab};

use super::{has, point, put, revert, stopped, untouched};

#[test]
fn a_managed_save_goes_only_by_force_and_the_next_start_loads_nothing_of_it() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    point(&agent, &domain, "cold", 1, &[])?;
    point(&agent, &domain, "warm", 2, &["--memory"])?;
    put(&domain, 3)?;
    let saved = || -> Result<bool> {
        let info = domain.virsh("dominfo", &[])?;
        Ok(info
            .lines()
            .any(|line| line.starts_with("Managed save:") && line.trim_end().ends_with("yes")))
    };
    let off = ["--state-after", "stopped", "--force", "--safety-snapshot"];
    domain.virsh("managedsave", &[])?;
    let refuse = |name: &str, more: &[&str], reason: &str| -> Result<()> {
        let files = domain.files()?;
        let refused = revert(&agent, &domain, name, more)?;
        assert_eq!(refused.failure()?["reason"], reason, "{name} {more:?}");
        assert!(saved()?, "{name} {more:?}: the saved memory is gone");
        assert_eq!(
            (domain.files()?, domain.state()?),
            (files, "shut off".into())
        );
        Ok(())
    };
    refuse("cold", &[], "MANAGED_SAVE_PRESENT")?;
    refuse("warm", &["--safety-snapshot"], "MANAGED_SAVE_PRESENT")?;
    // What can be missed is missed before the saved memory goes.
    let memory = lab.images().join(format!("{}.warm.mem", domain.name));
    let whole = fs::read(&memory)?;
    let mut bytes = whole.clone();
    let last = bytes.len() - 100;
    bytes[last] ^= 0xff;
    fs::write(&memory, bytes)?;
    refuse("warm", &off, "SNAPSHOT_NOT_WHOLE")?;
    fs::write(&memory, whole)?;

    let done = revert(&agent, &domain, "cold", &off)?;
    let result = done.result()?;
    let safety = result["safety_snapshot"]
        .as_str()
        .context("a name")?
        .to_owned();
    assert!(done.warned("MANAGED_SAVE_DROPPED"));
    assert!(!saved()? && has(&domain, 1)?);
    domain.virsh("start", &[])?;
    let reason = domain.virsh("domstate", &["--reason"])?;
    assert!(reason.contains("booted"), "{reason}");
    // The disks of before were kept all the same.
    revert(&agent, &domain, &safety, &[])?.result()?;
    assert!(has(&domain, 3)?);
    Ok(())
}

#[test]
fn a_memory_file_that_is_gone_cut_or_unfinished_is_missed_before_the_guest_is_touched() -> Result<()>
{
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    point(&agent, &domain, "ours", 1, &["--memory"])?;
    let folder = lab.images();
    let theirs = folder.join(format!("{}.theirs.mem", domain.name));
    domain.virsh(
        "snapshot-create-as",
        &[
            "theirs",
            "--live",
            "--memspec",
            &format!("{},snapshot=external", theirs.display()),
            "--diskspec",
            &format!(
                "vda,snapshot=external,file={}",
                folder
                    .join(format!("{}.theirs.qcow2", domain.name))
                    .display()
            ),
        ],
    )?;
    put(&domain, 2)?;
    let ours = folder.join(format!("{}.ours.mem", domain.name));
    let unfinished = |mut bytes: Vec<u8>| {
        bytes[..16].copy_from_slice(b"LibvirtQemudPart");
        bytes
    };
    type Spoil<'a> = &'a dyn Fn(Vec<u8>) -> Vec<u8>;
    let cases: [(&str, &Path, Spoil<'_>, &str); 5] = [
        (
            "ours",
            &ours,
            &|bytes| bytes[..bytes.len() - 1].to_vec(),
            "bytes and had",
        ),
        ("ours", &ours, &|_| Vec::new(), "bytes and had"),
        // Nobody knows what a foreign one was like, but its head tells something.
        (
            "theirs",
            &theirs,
            &|bytes| bytes[..4096].to_vec(),
            "cut off",
        ),
        ("theirs", &theirs, &unfinished, "never finished"),
        ("theirs", &theirs, &|_| Vec::new(), "fewer than its head"),
    ];
    for (name, file, spoil, part) in cases {
        let whole = fs::read(file)?;
        fs::write(file, spoil(whole.clone()))?;
        let failure = untouched(&agent, &domain, name, &["--safety-snapshot"])?;
        assert_eq!(failure["reason"], "SNAPSHOT_NOT_WHOLE");
        assert!(failure["message"].to_string().contains(part), "{failure}");
        fs::write(file, whole)?;
    }
    for (name, file) in [("ours", &ours), ("theirs", &theirs)] {
        let away = file.with_extension("away");
        fs::rename(file, &away)?;
        let failure = untouched(&agent, &domain, name, &[])?;
        assert_eq!(failure["metadata"]["health"], "data missing");
        fs::rename(&away, file)?;
    }
    assert!(has(&domain, 2)?);
    revert(&agent, &domain, "ours", &[])?.result()?;
    assert!(has(&domain, 1)?);
    Ok(())
}

#[test]
fn what_a_start_needs_beside_the_disks_is_looked_for_before_the_guest_is_touched() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let kernel = lab.folder.join(format!("kernel{}", std::process::id()));
    lab.write(&kernel, "no kernel, but a file")?;
    let domain = lab.blank(&BlankSpec {
        os: format!("<kernel>{}</kernel>", kernel.display()),
        ..stopped()
    })?;
    point(&agent, &domain, "s", 1, &[])?;
    fs::remove_file(&kernel)?;
    let on = revert(&agent, &domain, "s", &["--state-after", "running"])?;
    let failure = on.failure()?;
    assert_eq!(failure["reason"], "SNAPSHOT_NOT_WHOLE");
    assert_eq!(failure["metadata"]["path"], kernel.display().to_string());
    revert(&agent, &domain, "s", &[])?.result()?;

    // Inside the image, no overlay is put on a medium, but QEMU opens it.
    let iso = lab.folder.join(format!("cd{}.iso", std::process::id()));
    lab.write(&iso, &"iso ".repeat(1024))?;
    let domain = lab.blank(&BlankSpec {
        devices: format!(
            "<disk type='file' device='cdrom'><source file='{}'/>\
             <target dev='sda' bus='sata'/><readonly/></disk>",
            iso.display()
        ),
        ..BlankSpec::default()
    })?;
    point(&agent, &domain, "s", 1, &["--kind", "internal"])?;
    fs::remove_file(&iso)?;
    let failure = untouched(&agent, &domain, "s", &[])?;
    assert_eq!(failure["reason"], "MEDIA_NOT_COVERED");
    assert_eq!(failure["metadata"]["medium"], iso.display().to_string());
    Ok(())
}
