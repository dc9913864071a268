//! The lab itself: what every other test relies on.

use std::{
    fs,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal};
use vmsnap_tests::{
    BlankSpec, Lab, command, eventually, eventually_some,
    paths::{self, binary},
};

#[test]
fn a_leased_guest_answers_over_agent_and_ssh_and_its_counters_grow() -> Result<()> {
    let guest = Lab::from_env()?.guest()?;
    assert_eq!(guest.state()?, "running");
    assert!(!guest.frozen()?);
    guest.lives()?;
    let ticks = guest.ticks()?;
    eventually(Duration::from_secs(20), "growth of the ticks", || {
        guest.ticks().is_ok_and(|now| now > ticks)
    })?;
    assert_eq!(guest.ssh("hostname")?.trim(), guest.name);
    guest.ssh("echo from-ssh > /data/note && sync")?;
    assert_eq!(guest.exec("cat /data/note")?, "from-ssh\n");
    assert!(guest.console()?.starts_with("vmsnap counter="));
    Ok(())
}

#[test]
fn a_damaged_guest_is_back_at_its_beginning_with_the_next_lease() -> Result<()> {
    let lab = Lab::from_env()?;
    let guest = lab.guest()?;
    let (name, files) = (guest.name.clone(), guest.files()?);
    guest.exec("echo damaged > /data/damage && sync")?;
    guest.virsh("snapshot-create-as", &["one", "--disk-only"])?;
    guest.virsh("snapshot-create-as", &["two", "--disk-only"])?;
    guest.virsh("snapshot-delete", &["two", "--metadata"])?;
    assert_eq!(guest.chain("vda")?.len(), 3);
    guest.virsh("destroy", &[])?;
    guest.virsh("start", &[])?;
    guest.virsh("managedsave", &[])?;
    drop(guest);

    // Another test may lease the same guest in between: that changes nothing.
    let guest = eventually_some(Duration::from_secs(300), "lease of the same guest", || {
        let guest = lab.guest()?;
        Ok((guest.name == name).then_some(guest))
    })?;
    assert_eq!(guest.state()?, "running");
    assert_eq!(guest.files()?, files);
    assert!(guest.snapshots()?.is_empty());
    assert_eq!(guest.chain("vda")?, [format!("{name}.qcow2")]);
    assert!(
        !guest
            .exec("ls /data 2>/dev/null || true")?
            .contains("damage")
    );
    guest.lives()?;
    guest.virsh("destroy", &[])?;
    guest.check("vda")
}

#[test]
fn a_blank_domain_starts_at_once_and_leaves_nothing() -> Result<()> {
    let lab = Lab::from_env()?;
    let began = Instant::now();
    let blank = lab.blank(&BlankSpec {
        disks: vec![("vdb".into(), "raw".into(), false)],
        ..BlankSpec::default()
    })?;
    assert_eq!(blank.state()?, "running");
    // Far below what a guest takes to boot, on a machine that is busy.
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
    let name = blank.name.clone();
    assert_eq!(
        blank.files()?,
        [format!("{name}-vdb.raw"), format!("{name}.qcow2")]
    );
    blank.virsh("snapshot-create-as", &["s", "--disk-only"])?;
    drop(blank);
    assert!(!lab.virsh(["list", "--all", "--name"])?.contains(&name));
    assert!(lab.domain(&name).files()?.is_empty());
    Ok(())
}

#[test]
fn a_pattern_on_a_disk_is_seen_running_and_stopped_and_through_its_chain() -> Result<()> {
    const MIB: u64 = 1 << 20;
    let blank = Lab::from_env()?.blank(&BlankSpec::default())?;
    blank.write_pattern("vda", 0x11, 0, MIB)?;
    assert!(blank.has_pattern("vda", 0x11, 0, MIB)?);
    assert!(!blank.has_pattern("vda", 0x11, 0, MIB + 512)?);
    blank.virsh("snapshot-create-as", &["s", "--disk-only"])?;
    blank.write_pattern("vda", 0x22, MIB / 2, MIB)?;
    for stopped in [false, true] {
        if stopped {
            blank.virsh("destroy", &[])?;
        }
        assert!(blank.has_pattern("vda", 0x11, 0, MIB / 2)?);
        assert!(blank.has_pattern("vda", 0x22, MIB / 2, MIB)?);
        assert!(!blank.has_pattern("vda", 0x11, 0, MIB)?);
    }
    blank.write_pattern("vda", 0x33, 0, MIB)?;
    assert!(blank.has_pattern("vda", 0x33, 0, MIB)?);
    assert!(blank.write_pattern("vdz", 1, 0, 512).is_err());
    Ok(())
}

/// Starts a lab of its own and gives it with its folder.
fn own_lab(guests: &str, words: &[&str]) -> Result<(Child, PathBuf)> {
    let child = Command::new(binary("vmsnap-lab")?)
        .args(["up", "--guests", guests, "--"])
        .args(words)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let folder = folder_of(&child)?;
    Ok((child, folder))
}

/// The folder of the lab that a process starts.
fn folder_of(lab: &Child) -> Result<PathBuf> {
    let prefix = format!("vmsnap-lab-{}-", lab.id());
    eventually_some(Duration::from_secs(60), "folder of the lab", || {
        Ok(fs::read_dir("/tmp")?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| {
                path.file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
            }))
    })
}

/// Pids of the processes that live in a lab's folder: daemons, guests, passt.
fn processes(folder: &std::path::Path) -> Result<Vec<u32>> {
    let place = folder.display().to_string();
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")?.filter_map(Result::ok) {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let variables = fs::read(entry.path().join("environ")).unwrap_or_default();
        let mentions = |bytes: &[u8]| String::from_utf8_lossy(bytes).contains(&place);
        if mentions(&words) || mentions(&variables) {
            pids.push(pid);
        }
    }
    Ok(pids)
}

fn guest_runs(folder: &std::path::Path) -> Result<()> {
    let pid = folder.join("run/libvirt/qemu/run/guest0.pid");
    eventually(Duration::from_secs(120), "guest of the lab", || {
        pid.exists()
    })
}

#[test]
fn an_interrupted_lab_takes_its_guests_daemons_and_folder_with_it() -> Result<()> {
    let (mut lab, folder) = own_lab("1", &["sleep", "600"])?;
    guest_runs(&folder)?;
    command::signal(lab.id(), Signal::INT);
    let status = lab.wait()?;
    assert!(!status.success());
    assert!(!folder.exists());
    assert_eq!(processes(&folder)?, Vec::<u32>::new());
    Ok(())
}

#[test]
fn what_a_killed_lab_left_goes_when_the_next_one_starts() -> Result<()> {
    let (mut lab, folder) = own_lab("1", &["sleep", "600"])?;
    guest_runs(&folder)?;
    command::signal(lab.id(), Signal::KILL);
    lab.wait()?;
    assert!(folder.exists());
    assert!(!processes(&folder)?.is_empty());

    let (mut next, _) = own_lab("0", &["true"])?;
    assert!(next.wait()?.success());
    assert!(!folder.exists());
    eventually(Duration::from_secs(20), "end of what it ran", || {
        processes(&folder).is_ok_and(|pids| pids.is_empty())
    })
}

#[test]
fn a_lab_ends_with_the_status_of_its_command_and_hands_its_folder_on() -> Result<()> {
    let script = format!(
        "test -f \"${}/lab.json\" && exit 7",
        vmsnap_tests::domain::LAB
    );
    let (mut lab, folder) = own_lab("0", &["sh", "-c", &script])?;
    assert_eq!(lab.wait()?.code(), Some(7));
    assert!(!folder.exists());
    Ok(())
}

/// A container shares its first process's session with what started it: inside, the
/// session has no number.
#[test]
fn the_lab_works_where_its_session_began_outside_of_its_pid_namespace() -> Result<()> {
    let mut apart = command::privileged(["unshare", "--pid", "--fork", "--mount-proc"]);
    let image = apart.arg("--kill-child").arg(binary("vmsnap-lab")?);
    let done = command::run(image.arg("image"), None, Duration::from_secs(60))?;
    assert_eq!((done.status, done.complaint().as_str()), (0, ""));
    Ok(())
}

#[test]
fn the_lab_runs_where_its_user_may_read_and_sockets_fit() -> Result<()> {
    let lab = Lab::from_env()?;
    // The longest socket is a guest agent's: sockets' paths have 107 bytes.
    let longest = lab
        .folder
        .join("run/libvirt/qemu/channel/1000-b4194304x99/org.qemu.guest_agent.0");
    assert!(longest.as_os_str().len() <= 107, "{}", longest.display());
    assert!(!lab.folder.starts_with(paths::checkout()));
    let seen = command::succeed(lab.command("ls").arg(&lab.folder))?;
    assert!(seen.contains("lab.json"), "{seen}");
    let listed = lab.virsh(["pool-list", "--name"])?;
    listed
        .lines()
        .find(|line| line.trim() == "default")
        .map(drop)
        .context("no pool 'default'")
}

/// Starts the demo in a process group of its own, as a terminal does, with what
/// it shows in a file.
fn demo(shown: &std::path::Path) -> Result<(Child, PathBuf)> {
    let file = fs::File::create(shown)?;
    let child = Command::new(binary("vmsnap-lab")?)
        .arg("demo")
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .process_group(0)
        .spawn()?;
    let folder = folder_of(&child)?;
    Ok((child, folder))
}

#[test]
fn the_demo_shows_the_whole_job_within_two_minutes_and_leaves_nothing() -> Result<()> {
    let shown = Lab::from_env()?.folder.join("demo.shown");
    let began = Instant::now();
    let (mut demo, folder) = demo(&shown)?;
    let status = demo.wait()?;
    let text = fs::read_to_string(&shown)?;
    assert!(status.success(), "{status}\n{text}");
    assert!(
        began.elapsed() < Duration::from_secs(120),
        "{:?}",
        began.elapsed()
    );
    for wanted in [
        // A step as it ends, the proof, the table, and the end.
        "create snapshot before-upgrade",
        "the guest stood still for",
        "All assertions passed",
        "create (memory)",
        "The guest runs and its counter grows.",
    ] {
        assert!(text.contains(wanted), "'{wanted}' is missing in\n{text}");
    }
    assert!(!folder.exists());
    assert_eq!(processes(&folder)?, Vec::<u32>::new());
    Ok(())
}

#[test]
fn a_demo_that_is_left_with_control_c_in_the_middle_leaves_nothing() -> Result<()> {
    let shown = Lab::from_env()?.folder.join("left.shown");
    let (mut demo, folder) = demo(&shown)?;
    eventually(Duration::from_secs(120), "revert in the demo", || {
        fs::read_to_string(&shown).is_ok_and(|text| text.contains("TASK [Go back to"))
    })?;
    // The key reaches every process of the terminal's foreground group.
    let group = Pid::from_child(&demo);
    rustix::process::kill_process_group(group, Signal::INT)?;
    let status = demo.wait()?;
    assert_eq!(status.code(), Some(130), "{}", fs::read_to_string(&shown)?);
    assert!(!folder.exists());
    assert_eq!(processes(&folder)?, Vec::<u32>::new());
    Ok(())
}
