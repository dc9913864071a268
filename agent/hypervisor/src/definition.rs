//! A domain's XML as far as snapshots care for it.
//!
//! Invariants: hostile or malformed XML is an error, never a panic; an element
//! that is not known is passed over; paths are kept as they stand.

use roxmltree::{Document, Node, ParsingOptions};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Fault};

/// More nodes than any real definition has.
const NODES: u32 = 200_000;

/// More attributes than any real element has. The parser compares each with all
/// others of its element, so that a hundred thousand take minutes.
const ATTRIBUTES: usize = 10_000;

/// What a disk lies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DiskSource {
    /// A file.
    File,
    /// A block device.
    Block,
    /// A network disk.
    Network,
    /// A volume of a pool.
    Volume,
    /// Nothing: an empty drive.
    None,
    /// Something else.
    Other,
}

/// An image below the active one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackingImage {
    /// Path.
    pub path: String,
    /// Format.
    pub format: Option<String>,
}

/// A disk or drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDefinition {
    /// Target, such as `vda`.
    pub target: String,
    /// Bus.
    pub bus: Option<String>,
    /// `disk`, `cdrom`, `floppy` or `lun`.
    pub device: String,
    /// What it lies on.
    pub source: DiskSource,
    /// File, device, `pool/volume` or network name.
    pub path: Option<String>,
    /// Format of the active image.
    pub format: Option<String>,
    /// Read-only.
    pub readonly: bool,
    /// Several domains may write it.
    pub shareable: bool,
    /// What is written to it is thrown away when the domain stops.
    pub transient: bool,
    /// The active image, or one below it, is encrypted by QEMU with a secret of
    /// libvirt's.
    #[serde(default)]
    pub encrypted: bool,
    /// The `snapshot` attribute.
    pub snapshot: Option<String>,
    /// The chain below the active image, as far as the XML tells.
    pub backing: Vec<BackingImage>,
    /// The XML tells what the active image stands on, be it nothing. What it does
    /// not tell libvirt reads from the image when it needs it.
    #[serde(default)]
    pub backing_told: bool,
    /// What an open block job writes besides the active image.
    pub mirror: Option<Mirror>,
}

/// The other side of an open copy or merge of an active image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mirror {
    /// What is written.
    pub path: String,
    /// A merge down the chain, rather than a copy to another place.
    pub merge: bool,
    /// Both sides are alike: a pivot is possible.
    pub ready: bool,
}

/// Where the UEFI variables are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nvram {
    /// File.
    pub path: Option<String>,
    /// Format.
    pub format: Option<String>,
}

/// A shared memory device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedMemory {
    /// Name.
    pub name: String,
    /// Model, such as `ivshmem-plain`.
    pub model: String,
    /// The role is `master`: QEMU then saves its content with the guest.
    pub master: bool,
}

/// A channel into the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelDefinition {
    /// Name of its target.
    pub name: String,
    /// The guest has it open.
    pub connected: bool,
}

/// A domain's definition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainDefinition {
    /// Name.
    pub name: String,
    /// UUID.
    pub uuid: Option<String>,
    /// Domain type, such as `kvm`.
    pub kind: Option<String>,
    /// Memory at most, in KiB.
    pub memory_kib: Option<u64>,
    /// vCPUs at most.
    pub vcpus: Option<u32>,
    /// vCPUs that are plugged in when it starts; all when absent.
    pub vcpus_at_start: Option<u32>,
    /// Machine type.
    pub machine: Option<String>,
    /// Architecture.
    pub arch: Option<String>,
    /// Firmware chosen by libvirt: `efi` or `bios`.
    pub firmware: Option<String>,
    /// Loader type: `pflash` or `rom`.
    pub loader: Option<String>,
    /// File of the loader.
    pub loader_path: Option<String>,
    /// UEFI variables.
    pub nvram: Option<Nvram>,
    /// Kernel that is booted directly.
    pub kernel: Option<String>,
    /// Its initial ramdisk.
    pub initrd: Option<String>,
    /// Disks and drives.
    pub disks: Vec<DiskDefinition>,
    /// Channels.
    pub channels: Vec<ChannelDefinition>,
    /// Shared memory devices.
    pub shmem: Vec<SharedMemory>,
    /// Shared folders: driver and target.
    pub filesystems: Vec<(String, String)>,
    /// Devices passed through, by type.
    pub hostdevs: Vec<String>,
    /// A TPM emulated by a process with state of its own.
    pub emulated_tpm: bool,
}

impl DiskDefinition {
    /// Whether the guest only reads it: a CD, or what is marked read-only.
    #[must_use]
    pub fn only_read(&self) -> bool {
        self.readonly || self.device == "cdrom"
    }
}

impl DomainDefinition {
    /// Understands a `<domain>` document.
    ///
    /// # Errors
    /// When it is no such document.
    pub fn parse(xml: &str) -> Result<Self, Error> {
        parse(xml).map_err(|fault| Error::new("understand", "a domain's definition", fault))
    }

    /// The guest agent's channel.
    #[must_use]
    pub fn guest_agent(&self) -> Option<&ChannelDefinition> {
        self.channels
            .iter()
            .find(|channel| channel.name == "org.qemu.guest_agent.0")
    }

    /// Whether it starts from UEFI.
    #[must_use]
    pub fn is_uefi(&self) -> bool {
        self.firmware.as_deref() == Some("efi") || self.loader.as_deref() == Some("pflash")
    }

    /// Whether it has a TPM with state beside the disks.
    #[must_use]
    pub fn has_emulated_tpm(&self) -> bool {
        self.emulated_tpm
    }

    /// Devices that keep memory from being saved, for people: QEMU refuses to
    /// save with shared memory in peer mode, virtiofs and passed-through devices,
    /// libvirt with transient disks.
    /// Shared memory whose role is `master` is saved with the guest, and libvirt
    /// lets passed-through USB devices be: they are plugged in anew.
    #[must_use]
    pub fn not_migratable(&self) -> Vec<String> {
        let mut devices: Vec<String> = Vec::new();
        for SharedMemory { name, model, .. } in self.shmem.iter().filter(|shmem| !shmem.master) {
            devices.push(format!("shared memory device '{name}' ({model})"));
        }
        for (driver, target) in &self.filesystems {
            devices.push(format!("shared folder '{target}' ({driver})"));
        }
        for disk in self.disks.iter().filter(|disk| disk.transient) {
            devices.push(format!("transient disk {}", disk.target));
        }
        for kind in self.hostdevs.iter().filter(|kind| *kind != "usb") {
            devices.push(format!("passed-through {kind} device"));
        }
        devices
    }
}

/// Parses within bounds.
pub(crate) fn document(xml: &str) -> Result<Document<'_>, Fault> {
    // `<` stands in no attribute's value, so a piece holds one element at most.
    let wide = |piece: &str| piece.bytes().filter(|byte| *byte == b'=').count() > ATTRIBUTES;
    if xml.split('<').any(wide) {
        return Err(Fault::malformed(format!(
            "an element with more than {ATTRIBUTES} attributes"
        )));
    }
    let options = ParsingOptions {
        allow_dtd: false,
        nodes_limit: NODES,
        ..ParsingOptions::default()
    };
    Document::parse_with_options(xml, options).map_err(Fault::malformed)
}

/// The first child element of a name.
pub(crate) fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|child| child.has_tag_name(name))
}

/// Text of the first child element of a name.
pub(crate) fn child_text<'a>(node: Node<'a, '_>, name: &str) -> Option<&'a str> {
    child(node, name)?.text().map(str::trim)
}

pub(crate) fn parse(xml: &str) -> Result<DomainDefinition, Fault> {
    let document = document(xml)?;
    let root = document.root_element();
    if !root.has_tag_name("domain") {
        return Err(Fault::malformed(format!(
            "the document is a <{}>, not a <domain>",
            root.tag_name().name()
        )));
    }
    domain(root)
}

/// Bytes of a `<memory unit='…'>` in KiB; libvirt's own units are powers of two
/// in `KiB` and of ten in `KB`.
fn kib(node: Node<'_, '_>) -> Option<u64> {
    let value: u64 = node.text()?.trim().parse().ok()?;
    let bytes = match node.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        "T" | "TiB" => 1 << 40,
        _ => 1 << 10,
    };
    Some(value.checked_mul(bytes)? / 1024)
}

/// Understands a `<domain>` element, also one inside a snapshot.
pub(crate) fn domain(root: Node<'_, '_>) -> Result<DomainDefinition, Fault> {
    let Some(name) = child_text(root, "name") else {
        return Err(Fault::malformed("a <domain> without a <name>"));
    };
    let own = |text: &str| text.to_owned();
    let os = child(root, "os");
    let os_type = os.and_then(|os| child(os, "type"));
    let devices = child(root, "devices");
    let of = |tag: &'static str| {
        devices
            .into_iter()
            .flat_map(|devices| devices.children())
            .filter(move |device| device.has_tag_name(tag))
    };
    Ok(DomainDefinition {
        name: own(name),
        uuid: child_text(root, "uuid").map(own),
        kind: root.attribute("type").map(own),
        memory_kib: child(root, "memory").and_then(kib),
        vcpus: child_text(root, "vcpu").and_then(|text| text.parse().ok()),
        vcpus_at_start: child(root, "vcpu")
            .and_then(|vcpu| vcpu.attribute("current")?.parse().ok()),
        machine: os_type.and_then(|it| it.attribute("machine")).map(own),
        arch: os_type.and_then(|it| it.attribute("arch")).map(own),
        firmware: os.and_then(|os| os.attribute("firmware")).map(own),
        loader: os
            .and_then(|os| child(os, "loader"))
            .and_then(|loader| loader.attribute("type"))
            .map(own),
        loader_path: os
            .and_then(|os| child_text(os, "loader"))
            .filter(|path| !path.is_empty())
            .map(own),
        nvram: os.and_then(|os| child(os, "nvram")).map(|nvram| Nvram {
            path: child(nvram, "source")
                .and_then(|source| source.attribute("file"))
                .or_else(|| nvram.text().map(str::trim).filter(|text| !text.is_empty()))
                .map(own),
            format: nvram.attribute("format").map(own),
        }),
        kernel: os.and_then(|os| child_text(os, "kernel")).map(own),
        initrd: os.and_then(|os| child_text(os, "initrd")).map(own),
        disks: of("disk").filter_map(disk).collect(),
        channels: of("channel")
            .filter_map(|channel| {
                let target = child(channel, "target")?;
                Some(ChannelDefinition {
                    name: own(target.attribute("name")?),
                    connected: target.attribute("state") == Some("connected"),
                })
            })
            .collect(),
        shmem: of("shmem")
            .map(|shmem| SharedMemory {
                name: own(shmem.attribute("name").unwrap_or_default()),
                model: own(child(shmem, "model")
                    .and_then(|model| model.attribute("type"))
                    .unwrap_or("ivshmem")),
                master: shmem.attribute("role") == Some("master"),
            })
            .collect(),
        filesystems: of("filesystem")
            .map(|folder| {
                (
                    own(child(folder, "driver")
                        .and_then(|driver| driver.attribute("type"))
                        .unwrap_or("9p")),
                    own(child(folder, "target")
                        .and_then(|target| target.attribute("dir"))
                        .unwrap_or_default()),
                )
            })
            .collect(),
        hostdevs: of("hostdev")
            .map(|device| own(device.attribute("type").unwrap_or("host")))
            .chain(
                of("interface")
                    .filter(|interface| interface.attribute("type") == Some("hostdev"))
                    .map(|_| own("network")),
            )
            .collect(),
        emulated_tpm: of("tpm").any(|tpm| {
            child(tpm, "backend").and_then(|backend| backend.attribute("type")) == Some("emulator")
        }),
    })
}

/// What a `<source>` names, by the type of the disk.
pub(crate) fn source_path(kind: DiskSource, source: Node<'_, '_>) -> Option<String> {
    let attribute = |name| source.attribute(name);
    match kind {
        DiskSource::File => attribute("file").map(str::to_owned),
        DiskSource::Block => attribute("dev").map(str::to_owned),
        DiskSource::Network => attribute("name").map(str::to_owned),
        DiskSource::Volume => Some(format!("{}/{}", attribute("pool")?, attribute("volume")?)),
        _ => None,
    }
}

pub(crate) fn source_kind(kind: Option<&str>) -> DiskSource {
    match kind {
        None | Some("file") => DiskSource::File,
        Some("block") => DiskSource::Block,
        Some("network") => DiskSource::Network,
        Some("volume") => DiskSource::Volume,
        Some(_) => DiskSource::Other,
    }
}

fn disk(disk: Node<'_, '_>) -> Option<DiskDefinition> {
    let target = child(disk, "target")?.attribute("dev")?.to_owned();
    let kind = source_kind(disk.attribute("type"));
    let source = child(disk, "source");
    let path = source.and_then(|source| source_path(kind, source));
    let mut backing = Vec::new();
    let mut next = child(disk, "backingStore");
    while let Some(store) = next {
        let kind = source_kind(store.attribute("type"));
        if let Some(path) = child(store, "source").and_then(|source| source_path(kind, source)) {
            backing.push(BackingImage {
                path,
                format: child(store, "format")
                    .and_then(|format| format.attribute("type"))
                    .map(str::to_owned),
            });
        }
        next = child(store, "backingStore");
    }
    Some(DiskDefinition {
        target,
        bus: child(disk, "target")
            .and_then(|target| target.attribute("bus"))
            .map(str::to_owned),
        device: disk.attribute("device").unwrap_or("disk").to_owned(),
        source: if path.is_some() {
            kind
        } else {
            DiskSource::None
        },
        path,
        format: child(disk, "driver")
            .and_then(|driver| driver.attribute("type"))
            .map(str::to_owned),
        readonly: child(disk, "readonly").is_some(),
        shareable: child(disk, "shareable").is_some(),
        transient: child(disk, "transient").is_some(),
        // Below the source since libvirt 3.9, below the disk before.
        encrypted: disk
            .descendants()
            .any(|node| node.has_tag_name("encryption")),
        snapshot: disk.attribute("snapshot").map(str::to_owned),
        backing,
        backing_told: child(disk, "backingStore").is_some(),
        mirror: child(disk, "mirror").and_then(|mirror| {
            let kind = source_kind(mirror.attribute("type"));
            Some(Mirror {
                path: source_path(kind, child(mirror, "source")?)?,
                merge: mirror.attribute("job") == Some("active-commit"),
                ready: mirror.attribute("ready") == Some("yes"),
            })
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = "<domain type='kvm'><name>a &amp; b</name><memory unit='MiB'>128</memory>
      <vcpu current='1'>2</vcpu><os firmware='efi'><type arch='x86_64' machine='pc-q35-10.0'>hvm</type>
      <loader type='pflash' readonly='yes'>/x</loader><nvram format='qcow2'>/n.fd</nvram></os>
      <devices>
       <disk type='file' device='disk'><driver type='qcow2'/><source file='/b.qcow2'/>
         <backingStore type='file'><format type='qcow2'/><source file='/a.qcow2'/><backingStore/></backingStore>
         <target dev='vda' bus='virtio'/></disk>
       <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
       <disk type='volume' device='disk'><source pool='p' volume='v'/><target dev='vdb'/></disk>
       <disk type='file' device='disk'><source file='/t'/><target dev='vdc'/><transient/></disk>
       <disk type='file' device='floppy'><source file='/f'/><target dev='fda'/></disk>
       <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
       <shmem name='m'><model type='ivshmem-plain'/></shmem>
       <shmem name='n' role='master'><model type='ivshmem-plain'/></shmem>
       <filesystem type='mount'><driver type='virtiofs'/><source dir='/srv'/><target dir='shared'/></filesystem>
       <hostdev mode='subsystem' type='pci'/>
       <hostdev mode='subsystem' type='usb'/>
       <interface type='hostdev'/>
      </devices></domain>";

    #[test]
    fn an_element_with_too_many_attributes_is_refused_before_it_takes_time() {
        let attributes: String = (0..200_000).map(|at| format!(" a{at}='>'")).collect();
        let xml = format!("<domain{attributes}><name>a</name></domain>");
        let since = std::time::Instant::now();
        let error = DomainDefinition::parse(&xml).unwrap_err();
        assert!(error.detail().contains("10000 attributes"), "{error}");
        assert!(since.elapsed() < std::time::Duration::from_secs(5));
    }

    #[test]
    fn a_definition_tells_disks_chains_firmware_and_what_cannot_be_saved() {
        let domain = DomainDefinition::parse(XML).unwrap();
        assert_eq!(domain.name, "a & b");
        assert_eq!((domain.memory_kib, domain.vcpus), (Some(131_072), Some(2)));
        assert_eq!(domain.vcpus_at_start, Some(1));
        assert_eq!(domain.loader_path.as_deref(), Some("/x"));
        assert!(domain.is_uefi());
        assert_eq!(
            domain.nvram.as_ref().unwrap().format.as_deref(),
            Some("qcow2")
        );
        assert_eq!(domain.disks[0].backing[0].path, "/a.qcow2");
        assert_eq!(domain.disks[1].source, DiskSource::None);
        assert_eq!(domain.disks[2].path.as_deref(), Some("p/v"));
        let read: Vec<bool> = domain.disks.iter().map(DiskDefinition::only_read).collect();
        assert_eq!(read, [false, true, false, false, false]);
        assert!(domain.guest_agent().unwrap().connected);
        assert_eq!(
            domain.not_migratable(),
            [
                "shared memory device 'm' (ivshmem-plain)",
                "shared folder 'shared' (virtiofs)",
                "transient disk vdc",
                "passed-through pci device",
                "passed-through network device",
            ]
        );
    }

    #[test]
    fn hostile_documents_are_errors() {
        let bomb = "<!DOCTYPE d [<!ENTITY a 'aaaa'>]><domain><name>&a;</name></domain>";
        let deep = format!("{}{}", "<a>".repeat(5_000), "</a>".repeat(5_000));
        for xml in [
            "",
            "<domain",
            "<domain/>",
            "<pool/>",
            bomb,
            &deep,
            "\0",
            "<domain><name/></domain>",
        ] {
            let shown = &xml[..xml.len().min(20)];
            assert!(DomainDefinition::parse(xml).is_err(), "{shown}");
        }
    }
}
