//! UEFI variables: kept with a snapshot of either kind, put back with it, and gone
//! with one that fails.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use vmsnap_tests::{Blank, BlankSpec, Lab, command};

use super::{NONE, decided, refused};

/// A stopped domain that starts from (empty) UEFI with its variables in a file.
struct Uefi {
    domain: Blank,
    variables: PathBuf,
    format: &'static str,
}

impl Uefi {
    fn new(lab: &Lab, format: &'static str) -> Result<Self> {
        let code = lab.folder.join("code.fd");
        if !code.exists() {
            fs::write(&code, vec![0; 2 << 20])?;
        }
        let shown = format!("{}/{{name}}.vars.fd", lab.images().display());
        let spec = BlankSpec {
            os: format!(
                "<loader readonly='yes' type='pflash'>{}</loader><nvram format='{format}'>{shown}</nvram>",
                code.display()
            ),
            stopped: true,
            ..BlankSpec::default()
        };
        let domain = lab.blank(&spec)?;
        let variables = lab.images().join(format!("{}.vars.fd", domain.name));
        let path = variables.display().to_string();
        lab.qemu_img(["create", "-q", "-f", format, &path, "256K"])?;
        let this = Self {
            domain,
            variables,
            format,
        };
        this.put(1)?;
        Ok(this)
    }

    fn qemu_io(&self, words: &str) -> Result<command::Output> {
        let mut command = self.domain.lab.command("qemu-io");
        command
            .args(["-f", self.format, "-c", words])
            .arg(&self.variables);
        command::run(&mut command, None, Duration::from_secs(30))
    }

    /// Writes the variables while the VM is off.
    fn put(&self, byte: u8) -> Result<()> {
        let output = self.qemu_io(&format!("write -P {byte} 0 4k"))?;
        ensure!(output.status == 0, "{}", output.complaint());
        Ok(())
    }

    /// Whether they are what was written.
    fn has(&self, byte: u8) -> Result<bool> {
        let output = self.qemu_io(&format!("read -P {byte} 0 4k"))?;
        ensure!(output.status <= 1, "{}", output.complaint());
        Ok(output.status == 0)
    }

    fn copies(&self) -> Result<Vec<String>> {
        let mut files = self.domain.files()?;
        files.retain(|file| file.ends_with(".nvram"));
        Ok(files)
    }
}

#[test]
fn uefi_variables_are_kept_with_an_external_snapshot_and_come_back_with_it() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    for format in ["raw", "qcow2"] {
        let vm = Uefi::new(&lab, format)?;
        let name = vm.domain.name.as_str();
        let made = agent.vmsnap(&["create", name, "off"])?;
        made.result()?;
        let copy = format!("{name}.off.nvram");
        assert!(decided(&made, "uefi variables")?.contains(&copy));
        assert_eq!(vm.copies()?, [copy.as_str()]);
        vm.put(2)?;
        let mut snapshots = vec![("off", 1)];
        if format == "raw" {
            vm.domain.virsh("start", &[])?;
            agent.vmsnap(&["create", name, "on"])?.result()?;
            vm.domain.virsh("destroy", &[])?;
            vm.put(3)?;
            snapshots.insert(0, ("on", 2));
        }
        for (snapshot, byte) in snapshots {
            let words = ["revert", name, snapshot, "--state-after", "stopped"];
            agent.vmsnap(&words)?.result()?;
            assert!(vm.has(byte)?, "{format}, {snapshot}");
        }
        // A copy that is gone is missed before the VM is touched.
        fs::remove_file(lab.images().join(&copy))?;
        let missed = agent.vmsnap(&["revert", name, "off"])?;
        let failure = missed.failure()?;
        assert_eq!(failure["reason"], "SNAPSHOT_NOT_WHOLE");
        assert!(failure["message"].to_string().contains(&copy), "{failure}");
        agent
            .vmsnap(&["cleanup", name, "off", "--children", "delete"])?
            .result()?;
        assert_eq!(vm.copies()?, NONE);
        assert_eq!(vm.domain.snapshots()?, NONE);
    }
    Ok(())
}

#[test]
fn what_was_copied_for_a_snapshot_that_fails_goes_again() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let vm = Uefi::new(&lab, "raw")?;
    let name = vm.domain.name.as_str();
    // The disk moves into a folder where no overlay can be made.
    let folder = lab.folder.join(format!("shut{}", std::process::id()));
    fs::create_dir(&folder)?;
    lab.own(&folder)?;
    let disk = folder.join("disk.qcow2").display().to_string();
    lab.qemu_img(["create", "-q", "-f", "qcow2", &disk, "8M"])?;
    let xml = vm.domain.virsh("dumpxml", &["--inactive"])?;
    let xml = xml.replace(&vm.domain.disk("vda")?, &disk);
    let file = lab.folder.join(format!("{name}.xml"));
    lab.write(&file, &xml)?;
    lab.virsh(["define".as_ref(), file.as_os_str()])?;
    fs::remove_file(file)?;
    vm.domain.virsh("start", &[])?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o555))?;
    let failed = agent.vmsnap(&["create", name, "never"])?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
    failed.failure()?;
    assert_eq!(failed.outcome()?["state"], "failed", "{}", failed.said);
    let copied = failed
        .all("step_finished")
        .any(|event| event["note"].to_string().contains(".never.nvram"));
    assert!(copied, "{:?}", failed.events);
    assert_eq!(vm.copies()?, NONE);
    assert_eq!(vm.domain.state()?, "running");
    assert_eq!(vm.domain.snapshots()?, NONE);
    agent.vmsnap(&["create", name, "now"])?.result()?;
    drop(vm);
    fs::remove_dir_all(folder)?;
    Ok(())
}

#[test]
fn an_internal_snapshot_covers_uefi_variables_too_or_is_refused_by_name() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    for format in ["raw", "qcow2"] {
        let vm = Uefi::new(&lab, format)?;
        let name = vm.domain.name.as_str();
        let words = ["create", name, "inside", "--kind", "internal"];
        agent.vmsnap(&words)?.result()?;
        // libvirt keeps them only in qcow2 and says nothing of others.
        let path = vm.variables.display().to_string();
        let held = lab.qemu_img(["snapshot", "-l", &path]);
        if format == "qcow2" {
            assert!(held?.contains("inside"));
            assert_eq!(vm.copies()?, NONE);
        } else {
            assert_eq!(vm.copies()?, [format!("{name}.inside.nvram")]);
        }
        vm.put(2)?;
        agent.vmsnap(&["revert", name, "inside"])?.result()?;
        assert!(vm.has(1)?, "{format}");
        vm.domain.virsh("start", &[])?;
        let live = ["live", "--kind", "internal"];
        if format == "raw" {
            let (reason, message) = refused(&agent, &vm.domain, &live)?;
            assert_eq!(reason, "DISK_UNSUPPORTED");
            assert!(
                message.contains(&path) && message.contains("raw"),
                "{message}"
            );
        } else {
            agent
                .vmsnap(&["create", name, "live", "--kind", "internal"])?
                .result()?;
            agent.vmsnap(&["cleanup", name, "live"])?.result()?;
        }
        vm.domain.virsh("destroy", &[])?;
        agent.vmsnap(&["cleanup", name, "inside"])?.result()?;
        assert_eq!(vm.copies()?, NONE);
        if format == "qcow2" {
            assert_eq!(lab.qemu_img(["snapshot", "-l", &path])?.trim(), "");
        }
    }
    Ok(())
}
