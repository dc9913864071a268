//! What a disk holds, written and read without an operating system: for domains
//! that have none, and for disks that nobody mounted.
//!
//! Invariant: a running domain's disk is written by its own QEMU and a stopped
//! one's by qemu-io, so that nobody ever writes beside the owner of an image.

use anyhow::{Context as _, Result, ensure};

use crate::{
    command::{DEADLINE, run, succeed},
    domain::Domain,
};

/// A disk in a domain's definition.
struct Disk {
    /// Where QEMU keeps the device of a running domain.
    device: Option<String>,
    file: String,
    format: String,
}

impl Domain {
    /// Fills `bytes` from `offset` of a disk with `byte`.
    ///
    /// # Errors
    /// When there is no such disk, or QEMU or qemu-io refuses.
    pub fn write_pattern(&self, target: &str, byte: u8, offset: u64, bytes: u64) -> Result<()> {
        self.write_patterns(target, byte, &[offset], bytes)
    }

    /// Fills `bytes` from each of these offsets of a disk with `byte`.
    ///
    /// # Errors
    /// When there is no such disk, or QEMU or qemu-io refuses.
    pub fn write_patterns(
        &self,
        target: &str,
        byte: u8,
        offsets: &[u64],
        bytes: u64,
    ) -> Result<()> {
        let disk = self.pattern_disk(target)?;
        let mut writes: Vec<String> = offsets
            .iter()
            .map(|offset| format!("write -P {byte} {offset} {bytes}"))
            .collect();
        if let Some(device) = &disk.device {
            writes.push("flush".to_owned());
            return self.inside(device, &writes);
        }
        let mut command = self.lab.command("qemu-io");
        command.args(["-f", &disk.format]);
        for write in &writes {
            command.args(["-c", write]);
        }
        succeed(command.arg(&disk.file)).map(drop)
    }

    /// Whether all `bytes` from `offset` of a disk are `byte`, seen through its
    /// whole chain.
    ///
    /// # Errors
    /// When there is no such disk, or qemu-io cannot read it.
    pub fn has_pattern(&self, target: &str, byte: u8, offset: u64, bytes: u64) -> Result<bool> {
        let disk = self.pattern_disk(target)?;
        let mut command = self.lab.command("qemu-io");
        if let Some(device) = &disk.device {
            // What QEMU still keeps for itself would be missed from outside.
            self.inside(device, &["flush".to_owned()])?;
            command.arg("-U");
        }
        let words = format!("read -P {byte} {offset} {bytes}");
        command.args(["-r", "-f", &disk.format, "-c", &words, &disk.file]);
        let output = run(&mut command, None, DEADLINE)?;
        let said = format!("{}{}", output.text(), output.complaint());
        if said.contains("Pattern verification failed") {
            return Ok(false);
        }
        ensure!(
            output.status == 0,
            "qemu-io cannot read {}: {said}",
            disk.file
        );
        Ok(true)
    }

    /// Has QEMU do all of these, by one virsh.
    fn inside(&self, device: &str, all: &[String]) -> Result<()> {
        let name = &self.name;
        let lines: Vec<String> = all
            .iter()
            .map(|words| {
                format!("qemu-monitor-command {name} --hmp 'qemu-io -d {device} \"{words}\"'")
            })
            .collect();
        // The monitor tells errors in its text, with success as its status.
        let said = self.lab.virsh([lines.join("; ")])?;
        ensure!(
            said.trim().is_empty(),
            "QEMU refuses {all:?}: {}",
            said.trim()
        );
        Ok(())
    }

    fn pattern_disk(&self, target: &str) -> Result<Disk> {
        let xml = self.virsh("dumpxml", &[])?;
        let document = roxmltree::Document::parse(&xml)?;
        let disk = document
            .descendants()
            .filter(|node| node.has_tag_name("disk"))
            .find(|disk| attribute(*disk, "target", "dev") == Some(target))
            .with_context(|| format!("{} has no disk {target}", self.name))?;
        let file = attribute(disk, "source", "file")
            .with_context(|| format!("disk {target} of {} is no file", self.name))?;
        Ok(Disk {
            device: attribute(disk, "alias", "name")
                .map(|alias| format!("/machine/peripheral/{alias}/virtio-backend")),
            file: file.to_owned(),
            format: attribute(disk, "driver", "type")
                .unwrap_or("raw")
                .to_owned(),
        })
    }
}

fn attribute<'a>(node: roxmltree::Node<'a, '_>, child: &str, name: &str) -> Option<&'a str> {
    node.children()
        .find(|it| it.has_tag_name(child))?
        .attribute(name)
}
