//! The disks' disk: full right before an effect, and under a guest that writes.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use vmsnap_tests::{
    Agent, Blank, BlankSpec, Lab,
    command::{run, succeed},
    eventually, fill,
};

use super::{LONG, MIB, SOON, cli, number, words};

/// An action that meets a full disk right before its effect.
struct Full {
    what: &'static str,
    effect: &'static str,
    /// Made before, with these words.
    before: &'static [&'static str],
    action: &'static [&'static str],
    /// It ends with the guest started anew from its disk.
    restarted: bool,
}

const FULL: &[Full] = &[
    Full {
        what: "disk-only snapshot",
        effect: "take_a_snapshot_of",
        before: &[],
        action: &["create", "VM", "new"],
        restarted: false,
    },
    Full {
        what: "snapshot with memory",
        effect: "take_a_snapshot_of",
        before: &[],
        action: &["create", "VM", "new", "--memory"],
        restarted: false,
    },
    Full {
        what: "internal snapshot",
        effect: "take_a_snapshot_of",
        before: &[],
        action: &["create", "VM", "new", "--kind", "internal"],
        restarted: false,
    },
    Full {
        what: "revert",
        effect: "revert",
        before: &["--consistency", "suspend"],
        action: &["revert", "VM", "old"],
        restarted: true,
    },
    Full {
        what: "revert to memory",
        effect: "revert",
        before: &["--memory"],
        action: &["revert", "VM", "old"],
        restarted: true,
    },
    Full {
        what: "commit",
        effect: "delete_a_snapshot_of",
        before: &["--consistency", "suspend"],
        action: &["commit", "VM", "old"],
        restarted: false,
    },
    Full {
        what: "limited commit",
        effect: "merge_a_disk_of",
        before: &["--consistency", "suspend"],
        action: &["commit", "VM", "old", "--bandwidth", "64M"],
        restarted: false,
    },
    Full {
        what: "cleanup",
        effect: "delete_a_snapshot_of",
        before: &["--consistency", "suspend"],
        action: &["cleanup", "VM", "old"],
        restarted: false,
    },
    Full {
        what: "resize",
        effect: "resize_a_disk_of",
        before: &[],
        action: &["commit", "VM", "--resize-to", "4T"],
        restarted: false,
    },
];

fn meets_a_full_disk(lab: &Lab, agent: &Agent, case: &Full, folder: &Path) -> Result<()> {
    let domain: Blank = lab.blank(&BlankSpec {
        folder: Some(folder.to_owned()),
        disk_mib: 16,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    domain.write_pattern("vda", 7, 0, 4 * MIB)?;
    if !case.before.is_empty() {
        let mut making = vec!["create", name, "old"];
        making.extend(case.before);
        agent.vmsnap(&making)?.result()?;
        domain.write_pattern("vda", 8, 4 * MIB, 4 * MIB)?;
    }
    let reached = || {
        let effect = format!("operation=\"{}\"", case.effect.replace('_', " "));
        let log = agent.log();
        log.lines()
            .filter(|line| line.contains("failpoint reached") && line.contains(&effect))
            .count()
    };
    let before = reached();
    let (chain, snapshots, files) = (domain.chain("vda")?, domain.snapshots()?, domain.files()?);
    let pid = domain.pid()?;
    let mut command = agent.cli(&words(case.action, name))?;
    let caller = std::thread::spawn(move || run(&mut command, None, LONG));
    let came = eventually(SOON, "effect", || {
        reached() > before || caller.is_finished()
    });
    let filler = fill(folder)?;
    came?;
    let output = caller
        .join()
        .map_err(|_| anyhow::anyhow!("the caller panicked"))??;
    let cli = cli(&output)?;
    let failure = cli.failure()?;
    assert_eq!(failure["reason"], "NO_SPACE", "{failure}");
    assert_eq!(
        failure["metadata"]["path"],
        folder.display().to_string(),
        "{failure}"
    );
    ensure!(
        number(failure, "need_bytes")? > number(failure, "free_bytes")?,
        "{failure}"
    );
    // Nothing is lost, the guest runs, and nothing half-made is left.
    eventually(SOON, "VM that runs", || {
        domain.state().is_ok_and(|state| state == "running")
    })?;
    assert_eq!(domain.pid()? != pid, case.restarted);
    assert_eq!(domain.snapshots()?, snapshots);
    assert_eq!(domain.chain("vda")?, chain);
    assert_eq!(domain.files()?, files);
    assert!(domain.has_pattern("vda", 7, 0, 4 * MIB)?);
    if !case.before.is_empty() {
        assert!(domain.has_pattern("vda", 8, 4 * MIB, 4 * MIB)?);
    }
    if case.what == "internal snapshot" {
        assert!(cli.warned("IMAGE_GREW"), "{:?}", cli.events);
    }
    fs::remove_file(filler)?;
    let again = agent.vmsnap(&words(case.action, name))?;
    again.result()?;
    domain.check("vda")?;
    assert!(domain.has_pattern("vda", 7, 0, 4 * MIB)?);
    Ok(())
}

#[test]
fn a_disk_that_fills_up_right_before_an_effect_costs_nothing_but_the_run() -> Result<()> {
    let lab = Lab::from_env()?;
    let small = lab.small(96)?;
    let mut agent = lab.agent("")?;
    agent.stop();
    // Time to fill the disk between the last look at it and the effect.
    let effects: std::collections::BTreeSet<&str> = FULL.iter().map(|case| case.effect).collect();
    let late: Vec<String> = effects
        .iter()
        .map(|effect| format!("effect.{effect}=return(late 500)"))
        .collect();
    agent.set_env("FAILPOINTS", &late.join(";"));
    agent.start()?;
    for case in FULL {
        let result = meets_a_full_disk(&lab, &agent, case, &small.folder);
        let _ = fs::remove_file(small.folder.join("filler"));
        result.with_context(|| case.what.to_owned())?;
    }
    Ok(())
}

/// A boot sector that writes a sector of each next 64 KiB of its disk, for ever, by
/// the firmware's extended write (interrupt 13h, function 43h).
fn writing_boot_sector() -> Vec<u8> {
    let mut code = vec![
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0xbe, 0x40, 0x7c, // again: mov si, packet
        0xb8, 0x00, 0x43, // mov ax, 4300h
        0xb2, 0x80, // mov dl, 80h
        0xcd, 0x13, // int 13h
        0x66, 0x81, 0x06, 0x48, 0x7c, 0x80, 0x00, 0x00, 0x00, // add dword [packet + 8], 128
        0xeb, 0xeb, // jmp again
    ];
    code.resize(0x40, 0);
    // Sixteen bytes long, one sector, from 0000:7c00, to sector 128.
    code.extend([16, 0, 1, 0, 0x00, 0x7c, 0, 0, 128, 0, 0, 0, 0, 0, 0, 0]);
    code.resize(510, 0);
    code.extend([0x55, 0xaa]);
    code
}

#[test]
fn a_guest_that_qemu_stopped_for_lack_of_space_is_told_and_never_resumed() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let small = lab.small(8)?;
    let domain = lab.blank(&BlankSpec {
        folder: Some(small.folder.clone()),
        disk_mib: 64,
        stopped: true,
        ..BlankSpec::default()
    })?;
    let name = domain.name.as_str();
    let sector = small.folder.join("sector");
    fs::write(&sector, writing_boot_sector())?;
    let disk = domain.disk("vda")?;
    let line = format!("write -s {} 0 512", sector.display());
    succeed(
        lab.command("qemu-io")
            .args(["-f", "qcow2", "-c", &line, &disk]),
    )?;
    domain.virsh("start", &[])?;
    eventually(LONG, "VM that QEMU stopped", || {
        domain.state().is_ok_and(|state| state == "paused")
    })?;
    assert!(
        domain
            .virsh("domstate", &["--reason"])?
            .contains("I/O error")
    );
    let vm = agent.vmsnap(&["show", name])?;
    assert_eq!(vm.document()?["state_reason"], "I/O error");
    // Neither a refusal nor a run makes it go on, also once there is room.
    let refused = agent.vmsnap(&["create", name, "s"])?;
    assert_eq!(refused.failure()?["reason"], "NO_SPACE");
    assert_eq!(domain.state()?, "paused");
    Ok(())
}
