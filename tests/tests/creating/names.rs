//! Names of snapshots, of disks' files and of what is to be written: those that
//! break libvirt or QEMU, those that others gave, and those that are taken.

use std::fs;

use anyhow::Result;
use vmsnap_tests::{BlankSpec, Lab};

use super::{NONE, decided, refused};

#[test]
fn a_new_name_that_breaks_something_is_refused_at_the_door_with_its_character() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    })?;
    let long = "x".repeat(65);
    for (bad, told) in [
        ("a b", "' '"),
        ("a:b", "':'"),
        ("a,b", "','"),
        ("a/b", "'/'"),
        (".a", "'.'"),
        ("it's", "'''"),
        ("ü", "'ü'"),
        ("a\u{7}", "U+0007"),
        (long.as_str(), "65 characters"),
    ] {
        let (reason, message) = refused(&agent, &domain, &[bad])?;
        assert_eq!(reason, "BAD_REQUEST", "{bad}");
        assert!(message.contains(told), "{bad}: {message}");
    }
    // An option's name is one of a file when it is marked as no option.
    let (reason, message) = refused(&agent, &domain, &["--", "-x"])?;
    assert_eq!(reason, "BAD_REQUEST");
    assert!(message.contains("'-'"), "{message}");
    // QEMU takes digits for the number of an internal snapshot; files have none.
    let (reason, message) = refused(&agent, &domain, &["7", "--kind", "internal"])?;
    assert_eq!(reason, "BAD_REQUEST");
    assert!(message.contains("digits only"), "{message}");
    agent.vmsnap(&["create", &domain.name, "7"])?.result()?;
    agent.vmsnap(&["create", &domain.name, "2026"])?.result()?;
    domain.write_pattern("vda", 9, 0, 65536)?;
    agent.vmsnap(&["revert", &domain.name, "7"])?.result()?;
    assert!(domain.has_pattern("vda", 0, 0, 65536)?);
    assert_eq!(domain.snapshots()?, ["2026", "7"]);
    Ok(())
}

/// Names that others may have given.
const FOREIGN: [&str; 3] = ["it's a:b, say, \"<&>\"", " žluť ", "--force"];

#[test]
fn foreign_external_snapshots_of_any_name_are_listed_reverted_to_and_deleted() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    for (number, foreign) in (1_u8..).zip(FOREIGN) {
        domain.write_pattern("vda", number, 0, 65536)?;
        let spec = format!("--name={foreign}");
        domain.virsh("snapshot-create-as", &[&spec, "--disk-only"])?;
        domain.write_pattern("vda", 99, 0, 65536)?;
        let listed = agent.vmsnap(&["ls", name])?.document()?.clone();
        let listed = listed["snapshots"][0]["name"].clone();
        assert_eq!(listed, foreign);
        agent.vmsnap(&["revert", "--", name, foreign])?.result()?;
        assert!(domain.has_pattern("vda", number, 0, 65536)?, "{foreign}");
        agent.vmsnap(&["cleanup", "--", name, foreign])?.result()?;
        assert_eq!(domain.snapshots()?, NONE);
        assert!(domain.has_pattern("vda", number, 0, 65536)?, "{foreign}");
        assert_eq!(domain.files()?, [format!("{name}.qcow2")]);
    }
    Ok(())
}

#[test]
fn foreign_internal_snapshots_of_any_name_work_and_the_reason_is_given_where_they_cannot()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    for (number, foreign) in (1_u8..).zip(FOREIGN) {
        domain.write_pattern("vda", number, 0, 65536)?;
        domain.virsh("snapshot-create-as", &[&format!("--name={foreign}")])?;
    }
    domain.virsh("start", &[])?;
    for foreign in FOREIGN.iter().filter(|name| **name != "--force") {
        // QEMU cannot delete it while the VM runs; said before anything is tried.
        let kept = agent.vmsnap(&["cleanup", "--", name, foreign])?;
        let failure = kept.failure()?;
        assert_eq!(failure["reason"], "DOMAIN_STATE", "{foreign}");
        assert!(failure["message"].to_string().contains("off"), "{failure}");
    }
    domain.virsh("destroy", &[])?;
    for (number, foreign) in (1_u8..).zip(FOREIGN) {
        agent.vmsnap(&["revert", "--", name, foreign])?.result()?;
        assert!(domain.has_pattern("vda", number, 0, 65536)?, "{foreign}");
        agent.vmsnap(&["cleanup", "--", name, foreign])?.result()?;
    }
    assert_eq!(domain.snapshots()?, NONE);
    let path = domain.disk("vda")?;
    assert_eq!(lab.qemu_img(["snapshot", "-l", &path])?.trim(), "");
    Ok(())
}

#[test]
fn an_internal_snapshot_named_like_the_number_of_another_is_never_reverted_to() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    for (byte, snapshot) in [(1, "first"), (2, "1"), (3, "3")] {
        domain.write_pattern("vda", byte, 0, 65536)?;
        domain.virsh("snapshot-create-as", &[snapshot])?;
    }
    domain.write_pattern("vda", 9, 0, 65536)?;
    // QEMU would go to the first one, and say that it went to this one.
    let kept = agent.vmsnap(&["revert", name, "1"])?;
    let failure = kept.failure()?;
    assert_eq!(failure["reason"], "SNAPSHOT_NOT_REVERTIBLE");
    assert!(failure["message"].to_string().contains("'first'"));
    assert!(domain.has_pattern("vda", 9, 0, 65536)?);
    // What the message tells does read it.
    let out = lab.images().join(format!("{name}-read.raw"));
    let out = out.display().to_string();
    let path = domain.disk("vda")?;
    lab.qemu_img(["convert", "-l", "snapshot.name=1", "-O", "raw", &path, &out])?;
    assert!(fs::read(&out)?[..65536].iter().all(|byte| *byte == 2));
    // Its own number is no other's.
    agent.vmsnap(&["revert", name, "3"])?.result()?;
    assert!(domain.has_pattern("vda", 3, 0, 65536)?);
    // Deleting goes by name.
    agent.vmsnap(&["cleanup", name, "1"])?.result()?;
    agent.vmsnap(&["revert", name, "first"])?.result()?;
    assert!(domain.has_pattern("vda", 1, 0, 65536)?);
    Ok(())
}

#[test]
fn an_internal_snapshot_that_libvirt_forgot_keeps_its_name_from_being_used_again() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    domain.write_pattern("vda", 1, 0, 65536)?;
    domain.virsh("snapshot-create-as", &["s"])?;
    domain.virsh("snapshot-delete", &["s", "--metadata"])?;
    domain.write_pattern("vda", 2, 0, 65536)?;
    // libvirt would make a second one, and a revert go back to the first.
    let (reason, message) = refused(&agent, &domain, &["s", "--kind", "internal"])?;
    assert_eq!(reason, "SNAPSHOT_CONFLICT");
    assert!(message.contains("qemu-img snapshot -d s"), "{message}");
    let path = domain.disk("vda")?;
    lab.qemu_img(["snapshot", "-d", "s", &path])?;
    let words = ["create", name, "s", "--kind", "internal"];
    agent.vmsnap(&words)?.result()?;
    domain.write_pattern("vda", 3, 0, 65536)?;
    agent.vmsnap(&["revert", name, "s"])?.result()?;
    assert!(domain.has_pattern("vda", 2, 0, 65536)?);
    Ok(())
}

#[test]
fn a_disk_whose_path_has_a_comma_is_refused_because_no_revert_would_bring_it_back() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let path = lab
        .images()
        .join(format!("c{},x.qcow2", std::process::id()));
    let shown = path.display().to_string();
    lab.qemu_img(["create", "-q", "-f", "qcow2", &shown, "8M"])?;
    let spec = BlankSpec {
        devices: format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
             <source file='{shown}'/><target dev='vdb' bus='virtio'/></disk>"
        ),
        ..BlankSpec::default()
    };
    let domain = lab.blank(&spec)?;
    let name = domain.name.as_str();
    let (reason, message) = refused(&agent, &domain, &["s"])?;
    assert_eq!(reason, "DISK_UNSUPPORTED");
    assert!(
        message.contains("vdb") && message.contains("comma"),
        "{message}"
    );
    let overlays = |target: &str| {
        format!(
            "{target},file={}/{name}.{target}.their.qcow2",
            lab.images().display()
        )
    };
    let (vda, vdb) = (overlays("vda"), overlays("vdb"));
    domain.virsh(
        "snapshot-create-as",
        &[
            "their",
            "--disk-only",
            "--diskspec",
            &vda,
            "--diskspec",
            &vdb,
        ],
    )?;
    let kept = agent.vmsnap(&["revert", name, "their"])?;
    assert_eq!(kept.failure()?["reason"], "SNAPSHOT_NOT_REVERTIBLE");
    assert_eq!(domain.state()?, "running");
    agent.vmsnap(&["cleanup", name, "their"])?.result()?;
    let words = ["create", name, "inside", "--kind", "internal"];
    agent.vmsnap(&words)?.result()?;
    domain.virsh("destroy", &[])?;
    fs::remove_file(path)?;
    Ok(())
}

#[test]
fn files_that_a_revert_would_name_alike_are_refused_because_it_would_leave_the_vm_off() -> Result<()>
{
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    // As a cloud-init seed beside its disk: NAME.qcow2 and NAME.iso.
    let iso = format!("{}/{{name}}.iso", lab.images().display());
    let domain = lab.blank(&BlankSpec {
        devices: format!(
            "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>\
             <source file='{iso}'/><target dev='sda' bus='sata'/><readonly/></disk>"
        ),
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    lab.write(&lab.images().join(format!("{name}.iso")), "seed")?;
    let (reason, message) = refused(&agent, &domain, &["s"])?;
    assert_eq!(reason, "DISK_UNSUPPORTED");
    for part in ["vda", "sda", ".qcow2", ".iso", "kind internal"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let words = ["create", name, "inside", "--kind", "internal"];
    agent.vmsnap(&words)?.result()?;
    agent.vmsnap(&["revert", name, "inside"])?.result()?;
    agent.vmsnap(&["cleanup", name, "inside"])?.result()?;
    let overlay = format!("vda,file={}/{name}.their.qcow2", lab.images().display());
    domain.virsh(
        "snapshot-create-as",
        &["their", "--disk-only", "--diskspec", &overlay],
    )?;
    let before = domain.chain("vda")?;
    let kept = agent.vmsnap(&["revert", name, "their"])?;
    assert_eq!(kept.failure()?["reason"], "SNAPSHOT_NOT_REVERTIBLE");
    assert_eq!(domain.chain("vda")?, before);
    // The overlay in use by now has a name of its own.
    agent.vmsnap(&["create", name, "s"])?.result()?;
    agent.vmsnap(&["revert", name, "s"])?.result()?;
    domain.virsh("start", &[]).map(drop)
}

#[test]
fn files_that_are_there_already_are_never_touched_and_other_names_are_found() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    let at = |file: &str| lab.images().join(file);
    let taken = [
        (format!("{name}.vda.s.qcow2"), "theirs"),
        // libvirt would use it.
        (format!("{name}.vda.s-2.qcow2"), ""),
        // libvirt would overwrite it.
        (format!("{name}.s.mem"), "theirs too"),
        (format!("{name}.s-2.mem"), ""),
    ];
    for (file, text) in &taken {
        lab.write(&at(file), text)?;
    }
    let made = agent.vmsnap(&["create", name, "s", "--memory"])?;
    let result = made.result()?;
    let overlay = at(&format!("{name}.vda.s-3.qcow2"));
    let memory = at(&format!("{name}.s-3.mem"));
    assert_eq!(domain.disk("vda")?, overlay.display().to_string());
    assert_eq!(
        result["snapshot"]["memory_file"],
        memory.display().to_string()
    );
    assert!(decided(&made, "disk vda")?.contains("s-3.qcow2"));
    agent.vmsnap(&["revert", name, "s"])?.result()?;
    assert_eq!(domain.state()?, "running");
    agent.vmsnap(&["cleanup", name, "s"])?.result()?;
    for (file, text) in &taken {
        assert_eq!(fs::read_to_string(at(file))?, *text, "{file}");
    }
    assert!(!overlay.exists() && !memory.exists());
    assert_eq!(domain.files()?.len(), taken.len() + 1);
    Ok(())
}
