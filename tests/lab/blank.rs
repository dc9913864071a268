//! Domains without an operating system: they start in a moment, and their disks
//! hold what a test writes into them.

use std::{
    fmt::Write as _,
    fs,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::Result;

use crate::domain::{Domain, Lab};

/// What a blank domain has.
#[derive(Debug, Clone, Default)]
pub struct BlankSpec {
    /// More disks: target, format (`qcow2` or `raw`), read-only.
    pub disks: Vec<(String, String, bool)>,
    /// More devices, as XML; `{name}` is the domain's name.
    pub devices: String,
    /// More below `<os>`, as XML; `{name}` is the domain's name.
    pub os: String,
    /// Backing file of the first disk.
    pub backing: Option<String>,
    /// Folder of its disks; the default pool's when absent.
    pub folder: Option<std::path::PathBuf>,
    /// Cache mode of its disks; libvirt's default when empty. `directsync` makes
    /// merges slow enough to be met in the middle.
    pub cache: String,
    /// Size of each disk in MiB; 64 when zero.
    pub disk_mib: u32,
    /// Memory in MiB; 64 when zero.
    pub memory_mib: u32,
    /// Leave it off.
    pub stopped: bool,
}

/// A blank domain; gone with its files when dropped.
#[derive(Debug)]
pub struct Blank {
    domain: Domain,
}

impl std::ops::Deref for Blank {
    type Target = Domain;
    fn deref(&self) -> &Domain {
        &self.domain
    }
}

impl Lab {
    /// Makes a blank domain.
    ///
    /// # Errors
    /// When libvirt or qemu-img refuses.
    pub fn blank(&self, spec: &BlankSpec) -> Result<Blank> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "b{}x{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let folder = spec.folder.clone().unwrap_or_else(|| self.images());
        let size = format!(
            "{}M",
            if spec.disk_mib == 0 {
                64
            } else {
                spec.disk_mib
            }
        );
        let cache = match spec.cache.as_str() {
            "" => String::new(),
            cache => format!(" cache='{cache}'"),
        };
        let mut disks = String::new();
        let first = ("vda".to_owned(), "qcow2".to_owned(), false);
        for (target, format, readonly) in std::iter::once(&first).chain(&spec.disks) {
            let stem = if target == "vda" {
                name.clone()
            } else {
                format!("{name}-{target}")
            };
            let path = folder.join(format!("{stem}.{format}"));
            let shown = path.display().to_string();
            match (&spec.backing, target.as_str()) {
                (Some(backing), "vda") => {
                    self.qemu_img([
                        "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, &shown,
                    ])?;
                }
                _ => {
                    self.qemu_img(["create", "-q", "-f", format, &shown, &size])?;
                }
            }
            let readonly = if *readonly { "<readonly/>" } else { "" };
            // Writing into a string cannot fail.
            let _ = write!(
                disks,
                "<disk type='file' device='disk'><driver name='qemu' type='{format}'{cache}/>\
                 <source file='{shown}'/><target dev='{target}' bus='virtio'/>{readonly}</disk>"
            );
        }
        let memory = if spec.memory_mib == 0 {
            64
        } else {
            spec.memory_mib
        };
        let named = |xml: &str| xml.replace("{name}", &name);
        // UEFI needs ACPI.
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='q35'>hvm</type>{}</os><features><acpi/></features>\
             <devices>{disks}{}<memballoon model='none'/></devices></domain>",
            named(&spec.os),
            named(&spec.devices)
        );
        let domain = self.domain(&name);
        let blank = Blank { domain };
        let path = self.folder.join(format!("{name}.xml"));
        self.write(&path, &xml)?;
        self.virsh(["define".as_ref(), path.as_os_str()])?;
        fs::remove_file(path)?;
        if !spec.stopped {
            blank.virsh("start", &[])?;
        }
        Ok(blank)
    }
}

impl Drop for Blank {
    fn drop(&mut self) {
        // A test that failed is told of its own failure, not of this one.
        let _ = self.domain.reset();
    }
}
