//! Making snapshots where it has gone wrong for people: firmware, names, files
//! that are there already, disks and devices that no snapshot can cover, drives,
//! silent guest agents. virsh, qemu-img and the bytes on the disks are the
//! witnesses.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use vmsnap_tests::{Agent, Blank, BlankSpec, Cli, Domain, Lab, command, eventually};

const NONE: [&str; 0] = [];

/// Runs `vmsnap create DOMAIN WORDS`, which the plan has to refuse, and gives the
/// reason with its message; nothing may have changed.
fn refused(agent: &Agent, domain: &Domain, words: &[&str]) -> Result<(String, String)> {
    let seen = || -> Result<(String, Vec<String>)> {
        // One virsh for both.
        let words = format!("domstate {0}; snapshot-list {0} --name", domain.name);
        Ok((domain.lab.virsh([words])?, domain.files()?))
    };
    let before = seen()?;
    let mut all = vec!["create", domain.name.as_str()];
    all.extend(words);
    let cli = agent.vmsnap(&all)?;
    let failure = failure(&cli)?;
    ensure!(
        cli.all("step_started").count() == 0,
        "a step was begun: {:?}",
        cli.events
    );
    let after = seen()?;
    ensure!(before == after, "{before:?} became {after:?}");
    let text = |key: &str| failure[key].as_str().unwrap_or_default().to_owned();
    Ok((text("reason"), text("message")))
}

/// The failure of a run, or the error of a request that never became one, with
/// each bad field after the message.
fn failure(cli: &Cli) -> Result<Value> {
    if let Ok(failure) = cli.failure() {
        return Ok(failure.clone());
    }
    ensure!(
        cli.status == 1,
        "it ended with {}: {}",
        cli.status,
        cli.said
    );
    let mut error = cli.events.first().context("no document")?["error"].clone();
    error["message"] = Value::from(error.to_string());
    Ok(error)
}

fn warns(cli: &Cli, code: &str) -> bool {
    cli.all("planned")
        .flat_map(|event| event["plan"]["warnings"].as_array().into_iter().flatten())
        .chain(cli.all("warning"))
        .any(|warning| warning["code"] == code)
}

/// What a plan decided on one subject.
fn decided<'a>(cli: &'a Cli, subject: &str) -> Result<&'a str> {
    let plan = cli.all("planned").next().context("no plan")?;
    let decisions = plan["plan"]["decisions"].as_array();
    decisions
        .into_iter()
        .flatten()
        .find(|decision| decision["subject"] == subject)
        .and_then(|decision| decision["choice"].as_str())
        .with_context(|| format!("nothing decided on {subject}: {plan}"))
}

fn disk(target: &str, format: &str, readonly: bool) -> (String, String, bool) {
    (target.to_owned(), format.to_owned(), readonly)
}

// --- UEFI variables -----------------------------------------------------------

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

// --- names --------------------------------------------------------------------

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

// --- files --------------------------------------------------------------------

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

// --- disks and devices --------------------------------------------------------

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
    assert!(warns(&made, "MEMORY_INCLUDED"));
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
    assert!(warns(&made, "MEMORY_NOT_SAVABLE"));
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

// --- drives -------------------------------------------------------------------

/// A folder of the lab's user with a medium in it; gone when dropped.
struct Media {
    folder: PathBuf,
}

impl Media {
    fn new(lab: &Lab) -> Result<Self> {
        let folder = lab.folder.join(format!("m{}", std::process::id()));
        fs::create_dir(&folder)?;
        lab.own(&folder)?;
        lab.write(&folder.join("cd.iso"), &"iso ".repeat(256 << 10))?;
        Ok(Self { folder })
    }

    fn iso(&self) -> String {
        self.folder.join("cd.iso").display().to_string()
    }

    fn files(&self) -> Result<Vec<String>> {
        let mut files: Vec<String> = fs::read_dir(&self.folder)?
            .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
            .collect();
        files.sort();
        Ok(files)
    }

    fn drive(&self) -> BlankSpec {
        BlankSpec {
            devices: format!(
                "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>\
                 <source file='{}'/><target dev='sda' bus='sata'/><readonly/></disk>\
                 <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk>",
                self.iso()
            ),
            ..BlankSpec::default()
        }
    }
}

impl Drop for Media {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

#[test]
fn a_medium_and_an_empty_drive_are_left_out_and_go_through_a_revert() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let media = Media::new(&lab)?;
    let domain = lab.blank(&media.drive())?;
    // Another VM reads the same medium.
    let other = lab.blank(&BlankSpec {
        stopped: true,
        ..media.drive()
    })?;
    let name = domain.name.as_str();
    let made = agent.vmsnap(&["create", name, "s"])?;
    made.result()?;
    assert_eq!(decided(&made, "drive sda")?, "left out");
    assert_eq!(decided(&made, "drive sdb")?, "left out");
    assert_eq!(domain.disk("sda")?, media.iso());
    // Nobody writes a medium that a snapshot left out.
    agent.vmsnap(&["cleanup", name, "s"])?.result()?;
    agent.vmsnap(&["create", name, "s"])?.result()?;
    agent.vmsnap(&["revert", name, "s"])?.result()?;
    assert_eq!(domain.state()?, "running");
    // libvirt put an overlay on it, which it would merge into the shared medium.
    assert_ne!(domain.disk("sda")?, media.iso());
    let kept = agent.vmsnap(&["cleanup", name, "s"])?;
    let failure = kept.failure()?;
    assert_eq!(failure["reason"], "FILE_SHARED");
    assert_eq!(failure["metadata"]["path"], media.iso());
    assert_eq!(failure["metadata"]["users"], other.name.as_str());
    drop(other);
    // Neither can it be deleted with the medium gone; after another revert it can.
    domain.virsh("change-media", &["sda", "--eject", "--live", "--config"])?;
    let kept = agent.vmsnap(&["cleanup", name, "s"])?;
    let failure = kept.failure()?;
    assert_eq!(failure["reason"], "MEDIA_NOT_COVERED");
    assert_eq!(failure["metadata"]["disk"], "sda");
    agent.vmsnap(&["revert", name, "s"])?.result()?;
    agent.vmsnap(&["cleanup", name, "s"])?.result()?;
    assert_eq!(domain.snapshots()?, NONE);
    assert_eq!(domain.disk("sda")?, media.iso());
    assert_eq!(media.files()?, ["cd.iso"]);
    assert_eq!(fs::read_to_string(media.iso())?, "iso ".repeat(256 << 10));
    // A medium that is in the drive for this run of the VM only is in nobody's way.
    domain.virsh("change-media", &["sda", "--eject", "--live"])?;
    agent.vmsnap(&["create", name, "t"])?.result()?;
    Ok(())
}

#[test]
fn a_medium_on_which_a_revert_could_put_no_overlay_is_refused_before_and_again_later() -> Result<()>
{
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let media = Media::new(&lab)?;
    let iso = media.iso();
    let closed = lab.read_only(&media.folder)?;
    let drive = media.drive();
    let seed = BlankSpec {
        devices: format!(
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/>\
             <source file='{iso}'/><target dev='vdb' bus='virtio'/><readonly/></disk>"
        ),
        stopped: true,
        ..BlankSpec::default()
    };
    let mut last = None;
    // The drive comes last: its folder is opened again for it.
    for (spec, what) in [(seed, "disk vdb"), (drive, "drive sda")] {
        let domain = lab.blank(&spec)?;
        let name = domain.name.as_str();
        let state = domain.state()?;
        let (reason, message) = refused(&agent, &domain, &["s"])?;
        assert_eq!(reason, "MEDIA_NOT_COVERED");
        for part in [what, iso.as_str(), "read-only", "accept_no_revert"] {
            assert!(message.contains(part), "{part}: {message}");
        }
        if what == "disk vdb" {
            // Inside the image there is no such need.
            let words = ["create", name, "inside", "--kind", "internal"];
            agent.vmsnap(&words)?.result()?;
            agent.vmsnap(&["revert", name, "inside"])?.result()?;
            agent.vmsnap(&["cleanup", name, "inside"])?.result()?;
        }
        let words = ["create", name, "s", "--accept-no-revert"];
        agent.vmsnap(&words)?.result()?;
        let kept = agent.vmsnap(&["revert", name, "s"])?;
        let failure = kept.failure()?;
        assert_eq!(failure["reason"], "MEDIA_NOT_COVERED");
        assert_eq!(failure["metadata"]["medium"], iso);
        assert_eq!(domain.state()?, state);
        last = Some(domain);
    }
    let domain = last.context("the drive")?;
    let name = domain.name.as_str();
    // Gone is as bad as read-only.
    drop(closed);
    let away = media.folder.join("away.iso");
    fs::rename(&iso, &away)?;
    let kept = agent.vmsnap(&["revert", name, "s"])?;
    assert_eq!(kept.failure()?["reason"], "MEDIA_NOT_COVERED");
    assert_eq!(domain.state()?, "running");
    fs::rename(&away, &iso)?;
    // With its folder writable it is a restore point after all.
    agent.vmsnap(&["revert", name, "s"])?.result()?;
    agent.vmsnap(&["cleanup", name, "s"])?.result()?;
    assert_eq!(media.files()?, ["cd.iso"]);
    // A folder that libvirt may not write into is as bad as a read-only mount.
    fs::set_permissions(&media.folder, fs::Permissions::from_mode(0o555))?;
    let (reason, message) = refused(&agent, &domain, &["s"])?;
    fs::set_permissions(&media.folder, fs::Permissions::from_mode(0o755))?;
    assert_eq!(reason, "MEDIA_NOT_COVERED");
    assert!(message.contains("may be made"), "{message}");
    Ok(())
}

// --- consistency --------------------------------------------------------------

#[test]
fn without_an_answering_guest_agent_filesystem_consistency_is_refused_with_the_reason() -> Result<()>
{
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let channel =
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>";
    let mut last = None;
    for (devices, stopped, reason, why, silent) in [
        ("", false, "CONSISTENCY_NOT_MET", "no channel", false),
        (channel, true, "DOMAIN_NOT_RUNNING", "is off", false),
        (channel, false, "CONSISTENCY_NOT_MET", "not connected", true),
    ] {
        let domain = lab.blank(&BlankSpec {
            devices: devices.to_owned(),
            stopped,
            ..BlankSpec::default()
        })?;
        let demand = ["s", "--consistency", "filesystem"];
        let (was, message) = refused(&agent, &domain, &demand)?;
        assert_eq!(was, reason, "{why}");
        assert!(message.contains(why), "{message}");
        // Left to choose, it says what it achieved and why no more.
        let made = agent.vmsnap(&["create", &domain.name, "s"])?;
        let achieved = made.result()?["consistency"].clone();
        assert_eq!(achieved, if stopped { "stopped" } else { "suspend" });
        assert_eq!(made.result()?["frozen_ms"], Value::Null);
        assert_eq!(warns(&made, "AGENT_SILENT"), silent, "{why}");
        // Only the achieved consistency counts when it is asked for again.
        let again = refused(&agent, &domain, &demand);
        if stopped {
            // A stopped VM's snapshot is as consistent as any.
            assert!(again.is_err());
            let words = ["create", &domain.name, "s", "--consistency", "filesystem"];
            assert_eq!(agent.vmsnap(&words)?.result()?["changed"], false);
        } else {
            assert_eq!(again?.0, "SNAPSHOT_CONFLICT");
        }
        last = Some(domain);
    }
    let paused = last.context("the running one")?;
    paused.virsh("suspend", &[])?;
    let demand = ["t", "--consistency", "filesystem"];
    let (reason, message) = refused(&agent, &paused, &demand)?;
    assert_eq!(reason, "CONSISTENCY_NOT_MET");
    assert!(message.contains("paused"), "{message}");
    // Saved memory and frozen file systems exclude each other.
    let both = ["s", "--memory", "--consistency", "filesystem"];
    assert_eq!(refused(&agent, &paused, &both)?.0, "BAD_REQUEST");
    Ok(())
}

#[test]
fn a_guest_agent_that_hangs_or_is_gone_is_told_apart_and_demands_are_refused() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    for (signal, why) in [("STOP", "does not answer"), ("KILL", "not connected")] {
        guest.ssh(&format!("kill -{signal} $(pidof qemu-ga)"))?;
        eventually(Duration::from_secs(20), "silence", || {
            signal == "STOP" || guest.frozen().is_err()
        })?;
        let demand = ["s", "--consistency", "filesystem"];
        let (reason, message) = refused(&agent, &guest, &demand)?;
        assert_eq!(reason, "CONSISTENCY_NOT_MET");
        assert!(message.contains(why), "{message}");
    }
    let made = agent.vmsnap(&["create", name, "s"])?;
    assert_eq!(made.result()?["consistency"], "suspend");
    assert!(made.result()?["stopped_ms"].as_u64().is_some());
    assert!(warns(&made, "AGENT_SILENT"));
    assert_eq!(guest.state()?, "running");
    Ok(())
}

// --- what is there already ----------------------------------------------------

#[test]
fn an_existing_name_is_left_refused_or_replaced_and_another_kind_is_a_conflict() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    let created = || -> Result<String> {
        let xml = domain.virsh("snapshot-dumpxml", &["s"])?;
        let time = xml.split("<creationTime>").nth(1).context("a time")?;
        Ok(time.split('<').next().unwrap_or_default().to_owned())
    };
    agent.vmsnap(&["create", name, "s"])?.result()?;
    let first = created()?;
    let again = agent.vmsnap(&["create", name, "s"])?;
    assert_eq!(again.result()?["changed"], false);
    assert!(warns(&again, "SNAPSHOT_EXISTS"));
    for (words, reason) in [
        (["s", "--if-exists", "fail"].as_slice(), "SNAPSHOT_EXISTS"),
        (&["s", "--kind", "internal"], "SNAPSHOT_CONFLICT"),
        (&["s", "--memory"], "SNAPSHOT_CONFLICT"),
        (&["s", "--protected"], "SNAPSHOT_CONFLICT"),
        (&["s", "--consistency", "filesystem"], "SNAPSHOT_CONFLICT"),
    ] {
        assert_eq!(refused(&agent, &domain, words)?.0, reason, "{words:?}");
    }
    std::thread::sleep(Duration::from_millis(1100));
    let (reason, message) = refused(&agent, &domain, &["s", "--max-age", "1s"])?;
    assert_eq!(reason, "SNAPSHOT_TOO_OLD");
    assert!(message.contains("max_age"), "{message}");
    assert_eq!(created()?, first);
    let words = ["create", name, "s", "--max-age", "1h"];
    assert_eq!(agent.vmsnap(&words)?.result()?["changed"], false);
    let made = agent.vmsnap(&["create", name, "s", "--if-exists", "replace"])?;
    assert_eq!(made.result()?["changed"], true);
    assert!(warns(&made, "POINT_OF_NO_RETURN"));
    assert_ne!(created()?, first);
    assert_eq!(domain.chain("vda")?.len(), 2);
    // What is replaced mixes with nothing.
    let words = [
        "create",
        name,
        "s",
        "--kind",
        "internal",
        "--if-exists",
        "replace",
    ];
    let made = agent.vmsnap(&words)?;
    assert_eq!(made.result()?["snapshot"]["kind"], "internal");
    assert_eq!(domain.files()?, [format!("{name}.qcow2")]);
    assert_eq!(
        refused(&agent, &domain, &["s", "--kind", "external"])?.0,
        "SNAPSHOT_CONFLICT"
    );
    Ok(())
}

#[test]
fn a_foreign_snapshot_of_that_name_meets_no_demand_that_nobody_can_vouch_for() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    domain.virsh("snapshot-create-as", &["s", "--disk-only"])?;
    assert_eq!(
        agent.vmsnap(&["create", name, "s"])?.result()?["changed"],
        false
    );
    for demand in ["filesystem", "suspend"] {
        let (reason, message) = refused(&agent, &domain, &["s", "--consistency", demand])?;
        assert_eq!(reason, "SNAPSHOT_CONFLICT");
        assert!(message.contains("not known"), "{message}");
    }
    let words = ["create", name, "s", "--consistency", "crash"];
    assert_eq!(agent.vmsnap(&words)?.result()?["changed"], false);
    Ok(())
}

#[test]
fn snapshots_without_a_name_made_at_once_all_get_names_of_their_own() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec {
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    // Equal requests at the same time would be one run.
    let texts = ["one", "two", "three"];
    let mut children = Vec::new();
    for text in texts {
        let mut command = agent.cli(&["create", name, "--description", text])?;
        children.push(command.stdout(std::process::Stdio::null()).spawn()?);
    }
    for mut child in children {
        ensure!(child.wait()?.success());
    }
    let names = domain.snapshots()?;
    assert_eq!(names.len(), texts.len(), "{names:?}");
    for made in &names {
        // libvirt's own would be a number of seconds.
        assert!(made.starts_with("vmsnap-20"), "{made}");
    }
    assert_eq!(domain.chain("vda")?.len(), texts.len() + 1);
    Ok(())
}

#[test]
fn a_managed_save_and_mixed_kinds_keep_a_snapshot_from_being_made() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    domain.virsh("managedsave", &[])?;
    for words in [["s"].as_slice(), &["s", "--start-if-stopped"]] {
        let (reason, message) = refused(&agent, &domain, words)?;
        assert_eq!(reason, "MANAGED_SAVE_PRESENT");
        assert!(message.contains("managedsave-remove"), "{message}");
    }
    domain.virsh("start", &[])?;
    agent.vmsnap(&["create", name, "outside"])?.result()?;
    let (reason, message) = refused(&agent, &domain, &["s", "--kind", "internal"])?;
    assert_eq!(reason, "KINDS_MIXED");
    assert!(message.contains("'outside'"), "{message}");
    // Somebody else mixes them all the same: libvirt lets him.
    domain.virsh("snapshot-create-as", &["inside"])?;
    for kind in ["auto", "internal", "external"] {
        let (reason, message) = refused(&agent, &domain, &["s", "--kind", kind])?;
        assert_eq!(reason, "KINDS_MIXED");
        for part in ["inside: internal", "outside: external"] {
            assert!(message.contains(part), "{message}");
        }
    }
    Ok(())
}
