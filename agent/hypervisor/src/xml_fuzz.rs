//! Domain and snapshot XML at random: malformed, hostile, and sound with damage.

use std::fmt::Write as _;

use proptest::{collection::vec, prelude::*, sample::select};
use vmsnap_fuzz::{
    Class,
    inputs::{damaged, numbers, texts},
};

use crate::{
    definition,
    snapshot::{SnapshotDiskMode, SnapshotDiskSpec, SnapshotMemory, SnapshotSpec},
    snapshot_xml,
};

const DOMAIN: &str = "<domain type='kvm' id='3'><name>web1</name><uuid>0b1c</uuid>
  <memory unit='MiB'>128</memory><vcpu current='1'>2</vcpu>
  <os firmware='efi'><type arch='x86_64' machine='pc-q35-10.0'>hvm</type>
   <loader type='pflash' readonly='yes'>/x</loader>
   <nvram format='qcow2'><source file='/n.fd'/></nvram><kernel>/k</kernel></os>
  <devices>
   <disk type='file' device='disk' snapshot='external'><driver type='qcow2'/><source file='/b'/>
    <backingStore type='file'><format type='qcow2'/><source file='/a'/>
     <backingStore type='block'><format type='raw'/><source dev='/dev/x'/><backingStore/></backingStore>
    </backingStore><target dev='vda' bus='virtio'/></disk>
   <disk type='volume' device='cdrom'><source pool='p' volume='v'/><target dev='sda'/><readonly/></disk>
   <disk type='network' device='disk'><source protocol='rbd' name='p/i'/><target dev='vdb'/><shareable/></disk>
   <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
   <shmem name='s' role='peer'><model type='ivshmem-plain'/></shmem>
   <filesystem><driver type='virtiofs'/><target dir='t'/></filesystem>
   <hostdev type='pci'/><interface type='hostdev'/><tpm><backend type='emulator'/></tpm>
  </devices></domain>";

fn snapshot() -> String {
    format!(
        "<domainsnapshot><name>s0</name><description>d</description><state>running</state>
         <parent><name>s</name></parent><creationTime>1700000000</creationTime>
         <memory snapshot='external' file='/m'/>
         <disks><disk name='vda' snapshot='external' type='file'><driver type='qcow2'/>
          <source file='/b'/><snapshotDeleteInProgress/></disk></disks>
         <revertDisks><disk name='vda' snapshot='external' type='file'><source file='/c'/></disk></revertDisks>
         {DOMAIN}{}</domainsnapshot>",
        DOMAIN
            .replace("<domain ", "<inactiveDomain ")
            .replace("</domain>", "</inactiveDomain>")
    )
}

/// Documents that eat a careless parser's time, stack or memory.
fn hostile() -> impl Strategy<Value = String> {
    let names = || {
        select(vec![
            "domain",
            "domainsnapshot",
            "disk",
            "backingStore",
            "name",
            "x:y",
            "source",
        ])
    };
    let nested = (names(), names(), 1..30_000_usize, any::<bool>()).prop_map(
        |(root, name, deep, closed)| {
            let mut xml = format!("<{root}><name>a</name>{}", format!("<{name}>").repeat(deep));
            if closed {
                xml.push_str(&format!("</{name}>").repeat(deep));
                let _ = write!(xml, "</{root}>");
            }
            xml
        },
    );
    let backing = (1..5_000_usize).prop_map(|deep| {
        format!(
            "<domain><name>a</name><devices><disk>{}{}<target dev='vda'/></disk></devices></domain>",
            "<backingStore type='file'><source file='/a'/>".repeat(deep),
            "</backingStore>".repeat(deep)
        )
    });
    let entities = (1..12_usize, 1..12_usize, names()).prop_map(|(levels, times, root)| {
        let mut xml = format!("<!DOCTYPE {root} [<!ENTITY e0 'lol'>");
        for level in 1..=levels {
            let body = format!("&e{};", level - 1).repeat(times);
            let _ = write!(xml, "<!ENTITY e{level} '{body}'>");
        }
        let _ = write!(xml, "]><{root}><name>&e{levels};</name></{root}>");
        xml
    });
    let outside = select(vec![
        "<!DOCTYPE domain SYSTEM 'file:///etc/passwd'><domain><name>a</name></domain>",
        "<!DOCTYPE domain [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><domain><name>&x;</name></domain>",
        "<?xml version='1.1' encoding='UTF-16'?><domain><name>a</name></domain>",
        "<?xml-stylesheet href='x'?><domain><name>a</name></domain>",
        "\u{feff}<domain><name><![CDATA[a]]></name></domain>",
    ])
    .prop_map(str::to_owned);
    let wide = (names(), 0..1_500_usize, any::<bool>()).prop_map(|(root, count, spaces)| {
        let mut xml = format!("<{root}");
        for at in 0..count {
            let _ = match spaces {
                true => write!(xml, " xmlns:n{at}='u{at}'"),
                false => write!(xml, " a{at}='{at}'"),
            };
        }
        let _ = write!(xml, "><name>a</name></{root}>");
        xml
    });
    let huge = (names(), texts(), 1..200_000_usize).prop_map(|(root, text, times)| {
        let body = text.repeat((times / text.len().max(1)).max(1));
        format!("<{root} type='{body}'><name>{body}</name><memory>{body}</memory></{root}>")
    });
    let many = (
        1..20_000_usize,
        select(vec![
            "<disk/>",
            "<disk><target dev='a'/></disk>",
            "<hostdev/>",
            "<!-- -->",
            "<?p?>",
        ]),
    )
        .prop_map(|(count, one)| {
            format!(
                "<domain><name>a</name><devices>{}</devices></domain>",
                one.repeat(count)
            )
        });
    prop_oneof![nested, backing, entities, outside, wide, huge, many]
}

/// Sound documents with values at random.
fn valued() -> impl Strategy<Value = String> {
    let replaced = vec(
        select(vec![
            "web1",
            "0b1c",
            "128",
            "MiB",
            "'1'",
            "2",
            "pflash",
            "/b",
            "/a",
            "vda",
            "qcow2",
            "file",
            "1700000000",
            "running",
            "external",
            "emulator",
            "s0",
            "disk",
            "target",
        ]),
        1..4,
    );
    (
        prop_oneof![Just(DOMAIN.to_owned()), Just(snapshot())],
        replaced,
        texts(),
        numbers(),
        any::<bool>(),
    )
        .prop_map(|(mut xml, words, text, number, numeric)| {
            for word in words {
                let with = if numeric {
                    number.to_string()
                } else {
                    text.clone()
                };
                xml = xml.replacen(word, &with, 2);
            }
            xml.chars().take(1 << 20).collect()
        })
}

/// What holds for a text, whatever it is.
fn read(xml: &str) -> Result<(), TestCaseError> {
    if let Ok(domain) = definition::DomainDefinition::parse(xml) {
        let _ = (
            domain.guest_agent(),
            domain.is_uefi(),
            domain.not_migratable(),
        );
        // What was understood is no more than what was there.
        let paths: usize = domain
            .disks
            .iter()
            .flat_map(|disk| {
                disk.path
                    .iter()
                    .chain(disk.backing.iter().map(|one| &one.path))
            })
            .map(String::len)
            .sum();
        prop_assert!(paths <= xml.len());
    }
    if let Ok(before) = snapshot_xml::parse(xml)
        && let Ok(changed) =
            snapshot_xml::with_overlays(xml, &[("vda".into(), "/it's <&>".into())], true)
    {
        // The record of another snapshot was never made of this one.
        let after = snapshot_xml::parse(&changed)
            .map_err(|error| TestCaseError::fail(format!("{error:?} in {changed}")))?;
        prop_assert_eq!(&after.name, &before.name);
        prop_assert_eq!(&after.disks, &before.disks);
        prop_assert_eq!(after.definition, before.definition);
        let overlays: Vec<_> = after
            .revert_disks
            .iter()
            .map(|disk| disk.file.as_deref())
            .collect();
        prop_assert_eq!(overlays, [Some("/it's <&>")]);
    }
    if let Ok(then) = snapshot_xml::definition_on(xml, &[])
        && definition::parse(&then).is_ok()
        && let Ok(definition) =
            snapshot_xml::definition_on(xml, &[("vda".into(), "/it's <&>".into())])
    {
        let domain = definition::parse(&definition)
            .map_err(|error| TestCaseError::fail(format!("{error:?} in {definition}")))?;
        let disk = domain.disks.iter().find(|disk| disk.target == "vda");
        prop_assert_eq!(
            disk.and_then(|disk| disk.path.as_deref()),
            Some("/it's <&>"),
            "{}",
            definition
        );
    }
    Ok(())
}

#[test]
fn no_damage_to_xml_makes_a_reader_fail_otherwise_than_by_an_error() {
    let inputs = prop_oneof![
        3 => damaged(DOMAIN.into()),
        3 => damaged(snapshot().into()),
        1 => vec(any::<u8>(), 0..500),
    ];
    Class::new("xml, damaged", 120).check(&inputs, |bytes| read(&String::from_utf8_lossy(&bytes)));
}

#[test]
fn no_values_in_xml_make_a_reader_fail_otherwise_than_by_an_error() {
    Class::new("xml, values", 80).check(&valued(), |xml| read(&xml));
}

#[test]
fn no_hostile_xml_takes_time_or_stack() {
    Class::new("xml, hostile", 10)
        .few(32)
        .check(&hostile(), |xml| read(&xml));
}

#[test]
fn what_is_written_into_a_snapshots_xml_is_read_back_or_refused() {
    let inputs = (texts(), texts(), texts(), texts());
    Class::new("xml, written", 40).check(&inputs, |(name, description, target, file)| {
        let spec = SnapshotSpec {
            name,
            description,
            memory: SnapshotMemory::External {
                file: file.clone(),
                live: true,
            },
            disks: vec![SnapshotDiskSpec {
                target: target.clone(),
                mode: SnapshotDiskMode::External {
                    file,
                    format: "qcow2".into(),
                },
            }],
        };
        // Characters that XML cannot hold are refused, and the rest is there
        // once, as one disk of one snapshot.
        if let Ok(read) = snapshot_xml::parse(&snapshot_xml::write(&spec)) {
            prop_assert_eq!(read.disks.len(), 1);
            prop_assert!(read.definition.is_none() && read.parent.is_none());
        }
        Ok(())
    });
}
