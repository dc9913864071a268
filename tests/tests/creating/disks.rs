//! Disks and devices: which are covered, which are in the way of which kind, and
//! which can be left out.

use std::fs;

use anyhow::Result;
use vmsnap_tests::{BlankSpec, Lab};

use super::{decided, disk, refused};

#[test]
fn raw_and_qcow2_disks_are_covered_together_and_a_read_only_one_is_left_out() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        disks: vec![disk("vdb", "raw", false), disk("vdc", "raw", true)],
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    let (reason, message) = refused(&agent, &domain, &["s", "--kind", "internal"])?;
    assert_eq!(reason, "DISK_UNSUPPORTED");
    assert!(
        message.contains("vdb") && message.contains("raw"),
        "{message}"
    );
    domain.write_pattern("vdb", 5, 0, 65536)?;
    let made = agent.vmsnap(&["create", name, "s"])?;
    assert_eq!(made.result()?["snapshot"]["kind"], "external");
    assert_eq!(decided(&made, "kind")?, "external");
    assert!(decided(&made, "disk vdb")?.contains("vdb.s.qcow2"));
    assert_eq!(decided(&made, "disk vdc")?, "left out");
    assert_eq!(domain.chain("vdb")?.len(), 2);
    assert_eq!(domain.chain("vdc")?, [format!("{name}-vdc.raw")]);
    domain.write_pattern("vdb", 6, 0, 65536)?;
    agent.vmsnap(&["revert", name, "s"])?.result()?;
    assert!(domain.has_pattern("vdb", 5, 0, 65536)?);
    agent.vmsnap(&["cleanup", name, "s"])?.result()?;
    for target in ["vda", "vdb", "vdc"] {
        assert_eq!(domain.chain(target)?.len(), 1, "{target}");
    }
    assert_eq!(domain.files()?.len(), 3);
    assert!(domain.has_pattern("vdb", 5, 0, 65536)?);
    Ok(())
}

#[test]
fn a_read_only_raw_disk_is_in_the_way_of_no_internal_snapshot() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        disks: vec![disk("vdb", "raw", true), disk("vdc", "qcow2", false)],
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    // libvirt makes no internal snapshot that leaves a writable disk out.
    let out = [
        "s",
        "--kind",
        "internal",
        "--exclude-disk",
        "vdc",
        "--accept-no-revert",
    ];
    let (reason, message) = refused(&agent, &domain, &out)?;
    assert_eq!(reason, "KIND_UNSUPPORTED");
    assert!(message.contains("vdc"), "{message}");
    let made = agent.vmsnap(&["create", name, "s", "--kind", "internal"])?;
    assert_eq!(made.result()?["consistency"], "memory");
    assert!(made.warned("MEMORY_INCLUDED"));
    assert_eq!(decided(&made, "disk vdb")?, "left out");
    agent.vmsnap(&["revert", name, "s"])?.result()?;
    assert_eq!(domain.state()?, "running");
    agent.vmsnap(&["cleanup", name, "s"])?.result()?;
    Ok(())
}

#[test]
fn a_floppy_that_the_guest_writes_is_covered_like_a_disk() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let floppy = format!("{}/{{name}}-fda.raw", lab.images().display());
    let domain = lab.blank(&BlankSpec {
        devices: format!(
            "<disk type='file' device='floppy'><driver name='qemu' type='raw'/>\
             <source file='{floppy}'/><target dev='fda' bus='fdc'/></disk>"
        ),
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    let floppy = floppy.replace("{name}", name);
    lab.qemu_img(["create", "-q", "-f", "raw", &floppy, "1440K"])?;
    let (reason, message) = refused(&agent, &domain, &["s", "--kind", "internal"])?;
    assert_eq!(reason, "DISK_UNSUPPORTED");
    assert!(message.contains("fda"), "{message}");
    domain.write_pattern("fda", 1, 0, 4096)?;
    domain.virsh("start", &[])?;
    let made = agent.vmsnap(&["create", name, "s"])?;
    made.result()?;
    assert!(decided(&made, "drive fda")?.contains("fda.s.qcow2"));
    domain.virsh("destroy", &[])?;
    domain.write_pattern("fda", 2, 0, 4096)?;
    agent.vmsnap(&["revert", name, "s"])?.result()?;
    assert_eq!(domain.state()?, "running");
    agent.vmsnap(&["cleanup", name, "s"])?.result()?;
    domain.virsh("destroy", &[])?;
    assert_eq!(domain.disk("fda")?, floppy);
    assert!(domain.has_pattern("fda", 1, 0, 4096)?);
    Ok(())
}

/// Refused whether or not libvirt's driver for secrets is installed. Without it libvirt
/// cannot even describe the volume.
#[test]
fn an_encrypted_disk_is_refused_for_either_kind_and_holds_up_nobody_else() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let path = format!("{}/{{name}}-vdb.qcow2", lab.images().display());
    let domain = lab.blank(&BlankSpec {
        devices: format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
             <source file='{path}'><encryption format='luks'><secret type='passphrase' \
             uuid='11111111-2222-3333-4444-555555555555'/></encryption></source>\
             <target dev='vdb' bus='virtio'/></disk>"
        ),
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let secret = "secret,id=s,data=of-this-test";
    let path = path.replace("{name}", name);
    let words = [
        "create", "-q", "-f", "qcow2", "--object", secret, "-o", luks,
    ];
    lab.qemu_img(words.into_iter().chain([path.as_str(), "16M"]))?;
    for kind in ["auto", "external", "internal"] {
        let (reason, message) = refused(&agent, &domain, &["s", "--kind", kind])?;
        assert_eq!(reason, "DISK_UNSUPPORTED", "{kind}: {message}");
        assert!(message.contains("vdb") && message.contains("encrypted"));
    }
    // What somebody else made of it all the same leaves a VM that does not start.
    domain.virsh("snapshot-create-as", &["theirs", "--disk-only"])?;
    let revert = agent.vmsnap(&["revert", name, "theirs"])?;
    assert_eq!(revert.failure()?["reason"], "SNAPSHOT_NOT_REVERTIBLE");
    let listed = agent.vmsnap(&["ls", name])?;
    assert_eq!(listed.document()?["snapshots"][0]["revertible"], false);

    let volumes = agent.vmsnap(&["volumes", "default"])?;
    let mut shown = volumes.document()?["volumes"]
        .as_array()
        .into_iter()
        .flatten();
    assert!(shown.any(|volume| volume["path"] == path.as_str()));
    let other = lab.blank(&BlankSpec::default())?;
    agent.vmsnap(&["create", &other.name, "s"])?.result()?;
    Ok(())
}

#[test]
fn a_transient_disk_is_refused_by_name_and_can_be_left_out() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let path = format!("{}/{{name}}-vdb.qcow2", lab.images().display());
    let domain = lab.blank(&BlankSpec {
        devices: format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
             <source file='{path}'/><target dev='vdb' bus='virtio'/><transient/></disk>"
        ),
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    let path = path.replace("{name}", name);
    lab.qemu_img(["create", "-q", "-f", "qcow2", &path, "8M"])?;
    domain.virsh("start", &[])?;
    let (reason, message) = refused(&agent, &domain, &["s"])?;
    assert_eq!(reason, "DISK_UNSUPPORTED");
    for part in ["vdb", "transient", "accept_no_revert"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let out = ["s", "--exclude-disk", "vdb", "--accept-no-revert"];
    for more in [["--memory"].as_slice(), &["--kind", "internal"]] {
        let (reason, message) = refused(&agent, &domain, &[&out[..], more].concat())?;
        let expected = match more {
            ["--memory"] => "MEMORY_NOT_SAVABLE",
            _ => "KIND_UNSUPPORTED",
        };
        assert_eq!(reason, expected);
        assert!(message.contains("vdb"), "{message}");
    }
    let words = [&["create", name], &out[..]].concat();
    agent.vmsnap(&words)?.result()?;
    let kept = agent.vmsnap(&["revert", name, "s"])?;
    assert_eq!(kept.failure()?["reason"], "SNAPSHOT_NOT_REVERTIBLE");
    assert_eq!(domain.state()?, "running");
    agent.vmsnap(&["cleanup", name, "s"])?.result()?;
    assert_eq!(domain.chain("vda")?, [format!("{name}.qcow2")]);
    Ok(())
}

#[test]
fn a_device_that_keeps_memory_from_being_saved_is_named_and_disks_alone_are_fine() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let shared = |role: &str| BlankSpec {
        devices: format!(
            "<shmem name='{{name}}'{role}><model type='ivshmem-plain'/><size unit='M'>1</size></shmem>"
        ),
        ..BlankSpec::default()
    };
    let domain = lab.blank(&shared(""))?;
    for words in [["s", "--memory"].as_slice(), &["s", "--kind", "internal"]] {
        let (reason, message) = refused(&agent, &domain, words)?;
        assert_eq!(reason, "MEMORY_NOT_SAVABLE");
        assert!(message.contains("shared memory device"), "{message}");
        assert!(message.contains("ivshmem-plain"), "{message}");
    }
    let made = agent.vmsnap(&["create", &domain.name, "s"])?;
    assert_eq!(made.result()?["snapshot"]["memory"], false);
    assert!(made.warned("MEMORY_NOT_SAVABLE"));
    // The master's content is saved with the guest.
    let master = lab.blank(&shared(" role='master'"))?;
    agent
        .vmsnap(&["create", &master.name, "s", "--memory"])?
        .result()?;
    agent.vmsnap(&["revert", &master.name, "s"])?.result()?;
    assert_eq!(master.state()?, "running");
    Ok(())
}

#[test]
fn a_block_device_is_refused_by_name_with_what_would_help() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let file = lab.images().join(format!("l{}.raw", std::process::id()));
    let shown = file.display().to_string();
    lab.qemu_img(["create", "-q", "-f", "raw", &shown, "8M"])?;
    let device = lab.block_device(&file)?;
    let path = device.path();
    let with = |format: &str| BlankSpec {
        devices: format!(
            "<disk type='block' device='disk'><driver name='qemu' type='{format}'/>\
             <source dev='{path}'/><target dev='vdb' bus='virtio'/></disk>"
        ),
        stopped: true,
        ..BlankSpec::default()
    };
    {
        let domain = lab.blank(&with("raw"))?;
        let (reason, message) = refused(&agent, &domain, &["s"])?;
        assert_eq!(reason, "DISK_UNSUPPORTED");
        for part in [
            "vdb",
            path,
            "block device",
            "into a file",
            "accept_no_revert",
        ] {
            assert!(message.contains(part), "{part}: {message}");
        }
        assert!(!message.contains("kind internal"), "{message}");
        let (reason, _) = refused(&agent, &domain, &["s", "--kind", "internal"])?;
        assert_eq!(reason, "DISK_UNSUPPORTED");
        let name = domain.name.as_str();
        let out = [
            "create",
            name,
            "s",
            "--exclude-disk",
            "vdb",
            "--accept-no-revert",
        ];
        agent.vmsnap(&out)?.result()?;
        let kept = agent.vmsnap(&["revert", name, "s"])?;
        assert_eq!(kept.failure()?["reason"], "SNAPSHOT_NOT_REVERTIBLE");
        // Neither has a device another size because a guest would like one.
        let words = ["commit", name, "--resize-to", "16M", "--resize-disk", "vdb"];
        let failed = agent.vmsnap(&words)?;
        assert_eq!(failed.failure()?["reason"], "DISK_UNSUPPORTED");
    }
    // qcow2 on a device holds internal snapshots.
    lab.qemu_img(["create", "-q", "-f", "qcow2", path, "4M"])?;
    let domain = lab.blank(&with("qcow2"))?;
    let (_, message) = refused(&agent, &domain, &["s"])?;
    assert!(message.contains("kind internal"), "{message}");
    let words = ["create", &domain.name, "s", "--kind", "internal"];
    agent.vmsnap(&words)?.result()?;
    agent.vmsnap(&["revert", &domain.name, "s"])?.result()?;
    fs::remove_file(file)?;
    Ok(())
}

#[test]
fn a_file_that_was_deleted_under_a_running_vm_is_told_from_one_that_is_not_there() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let path = domain.disk("vda")?;
    fs::remove_file(&path)?;
    for kind in ["external", "internal"] {
        let (reason, message) = refused(&agent, &domain, &["s", "--kind", kind])?;
        assert_eq!(reason, "DISK_UNSUPPORTED");
        assert!(message.contains("deleted under VM"), "{message}");
        assert!(message.contains(&path), "{message}");
    }
    // What the message tells rescues the data.
    let copy = lab.images().join(format!("{}-rescued.qcow2", domain.name));
    let shown = copy.display().to_string();
    domain.virsh("undefine", &[])?;
    domain.virsh("blockcopy", &["vda", &shown, "--wait", "--pivot"])?;
    assert_eq!(domain.disk("vda")?, shown);
    domain.virsh("destroy", &[])?;
    let stopped = lab.blank(&BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    })?;
    fs::remove_file(stopped.disk("vda")?)?;
    let (reason, message) = refused(&agent, &stopped, &["s"])?;
    assert_eq!(reason, "DISK_UNSUPPORTED");
    assert!(message.contains("is not there"), "{message}");
    Ok(())
}

#[test]
fn a_disk_is_left_out_only_by_name_and_with_the_loss_of_revert_accepted() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        disks: vec![disk("vdb", "qcow2", false)],
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    let wrong = agent.vmsnap(&["create", name, "s", "--exclude-disk", "vdb"])?;
    assert_eq!(wrong.status, 2);
    assert!(wrong.said.contains("--accept-no-revert"), "{}", wrong.said);
    let unknown = ["s", "--exclude-disk", "vdz", "--accept-no-revert"];
    let (reason, message) = refused(&agent, &domain, &unknown)?;
    assert_eq!(reason, "DISK_UNKNOWN");
    assert!(message.contains("vda, vdb"), "{message}");
    let without = [
        "create",
        name,
        "s",
        "--exclude-disk",
        "vdb",
        "--accept-no-revert",
    ];
    let made = agent.vmsnap(&without)?;
    assert_eq!(made.result()?["snapshot"]["revertible"], false);
    assert_eq!(decided(&made, "disk vdb")?, "left out");
    assert_eq!(domain.chain("vdb")?.len(), 1);
    assert_eq!(agent.vmsnap(&without)?.result()?["changed"], false);
    // It is no restore point, so not what is asked for without exclude_disks.
    let (reason, _) = refused(&agent, &domain, &["s"])?;
    assert_eq!(reason, "SNAPSHOT_CONFLICT");
    let before = (domain.disk("vda")?, domain.disk("vdb")?);
    let kept = agent.vmsnap(&["revert", name, "s"])?;
    assert_eq!(kept.failure()?["reason"], "SNAPSHOT_NOT_REVERTIBLE");
    assert_eq!((domain.disk("vda")?, domain.disk("vdb")?), before);
    assert_eq!(domain.state()?, "running");
    // Neither is a foreign one that leaves a disk out.
    domain.virsh(
        "snapshot-create-as",
        &["theirs", "--disk-only", "--diskspec", "vdb,snapshot=no"],
    )?;
    let kept = agent.vmsnap(&["revert", name, "theirs"])?;
    let failure = kept.failure()?;
    assert_eq!(failure["reason"], "SNAPSHOT_NOT_REVERTIBLE");
    assert_eq!(failure["metadata"]["disk"], "vdb");
    agent
        .vmsnap(&["cleanup", name, "s", "--children", "delete"])?
        .result()?;
    assert_eq!(domain.files()?.len(), 2);
    Ok(())
}
