//! Linux guests that boot once: booted when the lab starts, saved, and brought
//! back to that state for each test that leases one.

use std::{fs, os::unix::fs::OpenOptionsExt as _, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};

use crate::{
    command::succeed,
    domain::{Domain, Lab},
    image::Image,
    wait::eventually_some,
};

/// How long a guest may take to boot on a busy machine without KVM.
const BOOT: Duration = Duration::from_secs(120);
/// Memory of a guest in MiB.
const MEMORY: u32 = 128;

/// A guest that belongs to one test until it is dropped.
#[derive(Debug)]
pub struct Guest {
    domain: Domain,
    /// Local port of its ssh server.
    pub ssh_port: u16,
    _lease: fs::File,
}

impl std::ops::Deref for Guest {
    type Target = Domain;
    fn deref(&self) -> &Domain {
        &self.domain
    }
}

/// The definition of a guest.
fn definition(lab: &Lab, name: &str, port: u16) -> String {
    let folder = lab.folder.display();
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>{MEMORY}</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{folder}/vmlinuz</kernel>\
         <initrd>{folder}/initrd.img</initrd><cmdline>console=ttyS0 quiet panic=1 vmsnap.name={name}</cmdline></os>\
         <features><acpi/></features><devices>\
         <disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
         <source file='{folder}/img/{name}/{name}.qcow2'/><target dev='vda' bus='virtio'/></disk>\
         <serial type='file'><source path='{folder}/{name}.console' append='on'/></serial>\
         <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
         <interface type='user'><backend type='passt'/><model type='virtio'/>\
         <portForward proto='tcp' address='127.0.0.1'><range start='{port}' to='22'/></portForward></interface>\
         <memballoon model='none'/></devices></domain>"
    )
}

fn saved(lab: &Lab, name: &str) -> (PathBuf, PathBuf) {
    (
        lab.folder.join(format!("{name}.saved")),
        lab.folder.join(format!("{name}.saved.qcow2")),
    )
}

/// Boots all guests of a lab at once and keeps the state that tests begin with.
pub(crate) fn boot(lab: &Lab, image: &Image) -> Result<()> {
    for (from, to) in [
        (&image.kernel, "vmlinuz"),
        (&image.initrd, "initrd.img"),
        (&image.key, "key"),
    ] {
        let to = lab.folder.join(to);
        fs::copy(from, &to)?;
        lab.own(&to)?;
    }
    for (name, port) in &lab.guests {
        let own = lab.images().join(name);
        fs::create_dir(&own)?;
        lab.own(&own)?;
        let disk = own.join(format!("{name}.qcow2"));
        fs::copy(&image.data, &disk)?;
        lab.own(&disk)?;
        let xml = lab.folder.join(format!("{name}.xml"));
        lab.write(&xml, &definition(lab, name, *port))?;
        lab.virsh(["define".as_ref(), xml.as_os_str()])?;
        lab.virsh(["start", name])?;
    }
    for (name, _) in &lab.guests {
        let domain = lab.domain(name);
        domain
            .answers(BOOT)
            .with_context(|| format!("guest {name} does not boot"))?;
        domain.lives()?;
        // With its UUID: a saved state is only restored into the same domain.
        let xml = domain.virsh("dumpxml", &["--inactive"])?;
        lab.write(&lab.folder.join(format!("{name}.xml")), &xml)?;
        let (state, disk) = saved(lab, name);
        lab.virsh(["save".as_ref(), name.as_ref(), state.as_os_str()])?;
        fs::copy(domain.folder().join(format!("{name}.qcow2")), &disk)?;
    }
    Ok(())
}

impl Lab {
    /// Leases a guest in the state in which it booted: waits for a free one.
    ///
    /// # Errors
    /// When none becomes free, or it cannot be brought back.
    pub fn guest(&self) -> Result<Guest> {
        let (name, port, lease) = eventually_some(Duration::from_secs(600), "free guest", || {
            for (name, port) in &self.guests {
                let file = fs::File::options()
                    .create(true)
                    .write(true)
                    .truncate(false)
                    .mode(0o666)
                    .open(self.folder.join(format!("{name}.lease")))?;
                if file.try_lock().is_ok() {
                    return Ok(Some((name.clone(), *port, file)));
                }
            }
            Ok(None)
        })?;
        let domain = self.domain(&name);
        domain.reset()?;
        let (state, disk) = saved(self, &name);
        let active = domain.folder().join(format!("{name}.qcow2"));
        fs::copy(disk, &active)?;
        self.own(&active)?;
        let xml = self.folder.join(format!("{name}.xml"));
        self.virsh(["define".as_ref(), xml.as_os_str()])?;
        self.virsh(["restore".as_ref(), state.as_os_str(), "--running".as_ref()])?;
        domain.answers(BOOT)?;
        Ok(Guest {
            domain,
            ssh_port: port,
            _lease: lease,
        })
    }
}

impl Domain {
    /// Removes the domain with snapshots and files, whatever state it is in.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn reset(&self) -> Result<()> {
        let name = &self.name;
        // Each of these fails where there is nothing to do; one virsh does them all,
        // and ends with the status of the last.
        let all = format!(
            "destroy {name}; managedsave-remove {name}; \
             undefine {name} --nvram --snapshots-metadata"
        );
        if self.lab.virsh([all]).is_err() {
            for snapshot in self.snapshots().unwrap_or_default() {
                let _ = self.virsh("snapshot-delete", &[&snapshot, "--metadata"]);
            }
            let _ = self.virsh("undefine", &["--nvram", "--snapshots-metadata"]);
        }
        for file in self.files()? {
            fs::remove_file(self.folder().join(file))?;
        }
        Ok(())
    }
}

impl Guest {
    /// Runs a shell line in the guest over ssh.
    ///
    /// # Errors
    /// When ssh or the line fails.
    pub fn ssh(&self, line: &str) -> Result<String> {
        let key = self.lab.folder.join("key");
        succeed(self.lab.command("ssh").args(["-i"]).arg(key).args([
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "LogLevel=ERROR",
            "-o",
            "BatchMode=yes",
            "-o",
            "ConnectTimeout=10",
            "-p",
            &self.ssh_port.to_string(),
            "root@127.0.0.1",
            line,
        ]))
    }

    /// The last beat on the guest's console: counter, ticks and uptime.
    ///
    /// # Errors
    /// When the console holds none.
    pub fn console(&self) -> Result<String> {
        let path = self.lab.folder.join(format!("{}.console", self.name));
        let text = String::from_utf8_lossy(&fs::read(path)?).into_owned();
        let beat = text
            .lines()
            .rev()
            .find(|line| line.starts_with("vmsnap counter="));
        Ok(beat.context("the console shows no beat")?.to_owned())
    }
}
