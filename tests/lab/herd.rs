//! Many VMs that are off, with many snapshots each, made in seconds: libvirt is
//! told of snapshots that the images hold already.

use std::{
    fmt::Write as _,
    fs,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Result, ensure};

use crate::{command, domain::Lab};

/// Size of each disk.
const SIZE: &str = "1M";
/// Creation time of the first snapshot; each next one is a second younger.
pub const FIRST: u64 = 1_700_000_000;
/// How long making or removing all of them may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// A herd of VMs; gone with its files when dropped.
#[derive(Debug)]
pub struct Herd {
    lab: Lab,
    /// Names of the VMs, sorted.
    pub vms: Vec<String>,
    /// Names of the snapshots that each of them has, oldest first: each is the
    /// parent of the next, and the last is current.
    pub snapshots: Vec<String>,
    folder: PathBuf,
}

impl Lab {
    /// Makes a herd, each VM with that many internal snapshots.
    ///
    /// # Errors
    /// When libvirt or qemu-img refuses.
    pub fn herd(&self, vms: usize, snapshots: usize) -> Result<Herd> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let stem = format!(
            "h{}x{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let herd = Herd {
            lab: self.clone(),
            vms: (0..vms).map(|vm| format!("{stem}-{vm:03}")).collect(),
            snapshots: (0..snapshots).map(|it| format!("s{it:03}")).collect(),
            folder: self.folder.join(&stem),
        };
        fs::create_dir(&herd.folder)?;
        self.own(&herd.folder)?;
        let model = herd.folder.join("model").display().to_string();
        self.qemu_img([
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=4k",
            &model,
            SIZE,
        ])?;
        for name in &herd.snapshots {
            self.qemu_img(["snapshot", "-q", "-c", name, &model])?;
        }
        let mut script = String::new();
        for vm in &herd.vms {
            let disk = herd.disk(vm);
            fs::copy(&model, &disk)?;
            self.own(&disk)?;
            let file = herd.folder.join(format!("{vm}.xml"));
            self.write(&file, &herd.definition(vm))?;
            writeln!(script, "define {}", file.display())?;
            for name in &herd.snapshots {
                let file = herd.folder.join(format!("{vm}-{name}.xml"));
                self.write(&file, &herd.snapshot(vm, name, ""))?;
                let current = match herd.snapshots.last() {
                    Some(last) if last == name => "--current",
                    _ => "",
                };
                let file = file.display();
                writeln!(script, "snapshot-create {vm} {file} --redefine {current}")?;
            }
        }
        herd.script(&script)?;
        Ok(herd)
    }
}

impl Herd {
    /// A VM's image.
    #[must_use]
    pub fn disk(&self, vm: &str) -> PathBuf {
        self.folder.join(format!("{vm}.qcow2"))
    }

    /// Tells libvirt of a snapshot again, with another description.
    ///
    /// # Errors
    /// When libvirt refuses.
    pub fn describe(&self, vm: &str, snapshot: &str, description: &str) -> Result<()> {
        let file = self.folder.join("described.xml");
        self.lab
            .write(&file, &self.snapshot(vm, snapshot, description))?;
        let file = file.display().to_string();
        self.lab
            .virsh(["snapshot-create", vm, &file, "--redefine"])?;
        Ok(())
    }

    fn definition(&self, vm: &str) -> String {
        let number = self.vms.iter().position(|it| it == vm).unwrap_or(0);
        let uuid = format!("{:08x}-0000-4000-8000-{number:012x}", std::process::id());
        format!(
            "<domain type='qemu'><name>{vm}</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory>\
             <vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os><devices>\
             <disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
             <source file='{}'/><target dev='vda' bus='virtio'/></disk>\
             <memballoon model='none'/></devices></domain>",
            self.disk(vm).display()
        )
    }

    fn snapshot(&self, vm: &str, name: &str, description: &str) -> String {
        let at = self.snapshots.iter().position(|it| it == name).unwrap_or(0);
        let parent = at
            .checked_sub(1)
            .and_then(|at| self.snapshots.get(at))
            .map(|parent| format!("<parent><name>{parent}</name></parent>"))
            .unwrap_or_default();
        format!(
            "<domainsnapshot><name>{name}</name><description>{description}</description>{parent}\
             <creationTime>{}</creationTime><state>shutoff</state><memory snapshot='no'/>\
             <disks><disk name='vda' snapshot='internal'/></disks>{}</domainsnapshot>",
            FIRST + at as u64,
            self.definition(vm)
        )
    }

    /// Has one virsh do all of it.
    fn script(&self, script: &str) -> Result<()> {
        let mut virsh = self.lab.command("virsh");
        virsh.args(["-q", "-c", "qemu:///session"]);
        let output = command::run(&mut virsh, Some(script.as_bytes()), PATIENCE)?;
        let complaint = output.complaint();
        ensure!(complaint.is_empty(), "virsh says: {complaint}");
        Ok(())
    }
}

impl Drop for Herd {
    fn drop(&mut self) {
        let script: Vec<String> = self
            .vms
            .iter()
            .map(|vm| format!("undefine {vm} --snapshots-metadata\n"))
            .collect();
        // A test that failed is told of its own failure, not of this one.
        let _ = self.script(&script.concat());
        let _ = fs::remove_dir_all(&self.folder);
    }
}
