//! Drives with and without a medium: left out of the snapshot, and in the way of
//! the revert where no overlay can be put on the medium.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf};

use anyhow::{Context as _, Result};
use vmsnap_tests::{BlankSpec, Lab};

use super::{NONE, decided, refused};

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
