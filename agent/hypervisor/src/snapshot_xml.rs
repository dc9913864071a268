//! Snapshot XML, written and read.
//!
//! Invariant: whatever a caller gives ends up as text or attribute value, never
//! as markup.

use std::{fmt::Write as _, ops::Range};

use quick_xml::escape::escape;

use crate::{
    definition::{self, DiskSource, child, child_text},
    error::Fault,
    snapshot::{
        SnapshotDiskInfo, SnapshotDiskMode, SnapshotInfo, SnapshotMemory, SnapshotMemoryInfo,
        SnapshotMode, SnapshotSpec,
    },
};

/// The document for a new snapshot.
pub(crate) fn write(spec: &SnapshotSpec) -> String {
    let mut xml = format!("<domainsnapshot><name>{}</name>", escape(&spec.name));
    // Writing into a string cannot fail.
    if !spec.description.is_empty() {
        let _ = write!(
            xml,
            "<description>{}</description>",
            escape(&spec.description)
        );
    }
    match &spec.memory {
        SnapshotMemory::None => xml.push_str("<memory snapshot='no'/>"),
        SnapshotMemory::Internal => xml.push_str("<memory snapshot='internal'/>"),
        SnapshotMemory::External { file, .. } => {
            let _ = write!(xml, "<memory snapshot='external' file='{}'/>", escape(file));
        }
    }
    xml.push_str("<disks>");
    for disk in &spec.disks {
        let target = escape(&disk.target);
        let _ = match &disk.mode {
            SnapshotDiskMode::No => write!(xml, "<disk name='{target}' snapshot='no'/>"),
            SnapshotDiskMode::Internal => {
                write!(xml, "<disk name='{target}' snapshot='internal'/>")
            }
            SnapshotDiskMode::External { file, format } => write!(
                xml,
                "<disk name='{target}' snapshot='external' type='file'><driver type='{}'/>\
                 <source file='{}'/></disk>",
                escape(format),
                escape(file)
            ),
        };
    }
    xml.push_str("</disks></domainsnapshot>");
    xml
}

fn mode(text: Option<&str>) -> SnapshotMode {
    match text {
        Some("internal") => SnapshotMode::Internal,
        Some("external") => SnapshotMode::External,
        _ => SnapshotMode::No,
    }
}

/// Understands a `<domainsnapshot>` document.
pub(crate) fn parse(xml: &str) -> Result<SnapshotInfo, Fault> {
    let document = definition::document(xml)?;
    let root = document.root_element();
    if !root.has_tag_name("domainsnapshot") {
        return Err(Fault::malformed("the document is no <domainsnapshot>"));
    }
    // Names are kept as they stand: libvirt allows spaces at both ends.
    let named = |node| {
        child(node, "name")
            .and_then(|name| name.text())
            .map(str::to_owned)
    };
    let Some(name) = named(root) else {
        return Err(Fault::malformed("a snapshot without a <name>"));
    };
    let disks = |tag: &str| -> Vec<SnapshotDiskInfo> {
        child(root, tag)
            .into_iter()
            .flat_map(|disks| disks.children())
            .filter(|disk| disk.has_tag_name("disk"))
            .filter_map(|disk| {
                let kind = definition::source_kind(disk.attribute("type"));
                Some(SnapshotDiskInfo {
                    target: disk.attribute("name")?.to_owned(),
                    mode: mode(disk.attribute("snapshot")),
                    file: child(disk, "source")
                        .and_then(|source| definition::source_path(kind, source)),
                    format: child(disk, "driver")
                        .and_then(|driver| driver.attribute("type"))
                        .map(str::to_owned),
                    delete_in_progress: child(disk, "snapshotDeleteInProgress").is_some(),
                })
            })
            .collect()
    };
    let memory = child(root, "memory");
    Ok(SnapshotInfo {
        name,
        parent: child(root, "parent").and_then(named),
        description: child_text(root, "description").map(str::to_owned),
        creation_time: child_text(root, "creationTime")
            .and_then(|text| text.parse().ok())
            .unwrap_or(0),
        state: child_text(root, "state").unwrap_or_default().to_owned(),
        memory: match memory.and_then(|memory| memory.attribute("snapshot")) {
            Some("internal") => SnapshotMemoryInfo::Internal,
            Some("external") => SnapshotMemoryInfo::External {
                file: memory
                    .and_then(|memory| memory.attribute("file"))
                    .unwrap_or_default()
                    .to_owned(),
            },
            _ => SnapshotMemoryInfo::None,
        },
        disks: disks("disks"),
        revert_disks: disks("revertDisks"),
        is_current: false,
        // The stored definition is the one that a revert brings back.
        definition: child(root, "inactiveDomain")
            .or_else(|| child(root, "domain"))
            .map(definition::domain)
            .transpose()?,
        live: child(root, "inactiveDomain")
            .and_then(|_| child(root, "domain"))
            .map(definition::domain)
            .transpose()?,
    })
}

/// The same record with other overlays of the present state: what libvirt takes
/// for its own on the next revert, and deletes then.
///
/// libvirt keeps them beside the snapshot's own overlays where those hold the data
/// of another snapshot (`beside`), and instead of them otherwise.
pub(crate) fn with_overlays(
    xml: &str,
    overlays: &[(String, String)],
    beside: bool,
) -> Result<String, Fault> {
    let document = definition::document(xml)?;
    let root = document.root_element();
    let Some(disks) = child(root, "disks") else {
        return Err(Fault::malformed("a snapshot without <disks>"));
    };
    let mut fresh = String::new();
    for (target, file) in overlays {
        // Writing into a string cannot fail.
        let _ = write!(
            fresh,
            "<disk name='{}' snapshot='external' type='file'><driver type='qcow2'/>\
             <source file='{}'/></disk>",
            escape(target),
            escape(file)
        );
    }
    let mut edits = Vec::new();
    if !beside {
        let others = disks
            .children()
            .filter(|disk| disk.has_tag_name("disk"))
            .filter_map(|disk| disk.attribute("name"))
            .filter(|name| overlays.iter().all(|(target, _)| target != name));
        for name in others {
            let _ = write!(fresh, "<disk name='{}' snapshot='no'/>", escape(name));
        }
        edits.push((disks.range(), format!("<disks>{fresh}</disks>")));
    } else if !overlays.is_empty() {
        let end = disks.range().end;
        let fresh = format!("\n  <revertDisks>{fresh}</revertDisks>");
        edits.push((end..end, fresh));
    }
    if let Some(old) = child(root, "revertDisks") {
        edits.push((old.range(), String::new()));
    }
    Ok(edited(xml, edits))
}

/// The definition that a revert brings back, with other images under its disks
/// (target and qcow2 file).
pub(crate) fn definition_on(xml: &str, images: &[(String, String)]) -> Result<String, Fault> {
    let document = definition::document(xml)?;
    let root = document.root_element();
    let inactive = child(root, "inactiveDomain");
    let Some(domain) = inactive.or_else(|| child(root, "domain")) else {
        return Err(Fault::malformed("a snapshot without a definition"));
    };
    let mut edits = Vec::new();
    for (target, file) in images {
        let disk = child(domain, "devices")
            .into_iter()
            .flat_map(|devices| devices.children())
            .filter(|disk| disk.has_tag_name("disk"))
            .find(|disk| {
                child(*disk, "target").and_then(|of| of.attribute("dev")) == Some(target.as_str())
            })
            .filter(|disk| definition::source_kind(disk.attribute("type")) == DiskSource::File);
        let source = disk.and_then(|disk| child(disk, "source"));
        let (Some(disk), Some(path)) = (
            disk,
            source.and_then(|source| source.attribute_node("file")),
        ) else {
            return Err(Fault::malformed(format!(
                "a definition in which disk {target} has no file"
            )));
        };
        // Encryption, slices and the like belong to the image, not to an overlay on it.
        if let Some(other) = source
            .into_iter()
            .flat_map(|source| source.children())
            .find(|child| child.is_element() && !child.has_tag_name("seclabel"))
        {
            return Err(Fault::malformed(format!(
                "a definition in which the file of disk {target} has <{}>, which an overlay on it \
                 would not have",
                other.tag_name().name()
            )));
        }
        edits.push((path.range_value(), escape(file).into_owned()));
        match child(disk, "driver") {
            Some(driver) => match driver.attribute_node("type") {
                Some(format) => edits.push((format.range_value(), "qcow2".to_owned())),
                None => {
                    let end = driver.range().start + "<driver".len();
                    edits.push((end..end, " type='qcow2'".to_owned()));
                }
            },
            None => {
                let start = disk
                    .first_child()
                    .map_or(disk.range().end, |it| it.range().start);
                edits.push((
                    start..start,
                    "<driver name='qemu' type='qcow2'/>".to_owned(),
                ));
            }
        }
        // What the former image stood on. libvirt looks at the new one itself.
        edits.extend(child(disk, "backingStore").map(|below| (below.range(), String::new())));
    }
    let range = domain.range();
    let text = &xml[range.clone()];
    let mut edits: Vec<_> = edits
        .into_iter()
        .map(|(at, with)| (at.start - range.start..at.end - range.start, with))
        .collect();
    if inactive.is_some() {
        let open = 1.."<inactiveDomain".len();
        edits.push((open, "domain".to_owned()));
        if let Some(at) = text.rfind("</inactiveDomain") {
            edits.push((at + 2..at + "</inactiveDomain".len(), "domain".to_owned()));
        }
    }
    Ok(edited(text, edits))
}

/// A text with parts of it replaced.
fn edited(text: &str, mut edits: Vec<(Range<usize>, String)>) -> String {
    // From the end on, so that what lies before keeps its place.
    edits.sort_by_key(|(range, _)| std::cmp::Reverse(range.start));
    let mut text = text.to_owned();
    for (range, with) in edits {
        text.replace_range(range, &with);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::SnapshotDiskSpec;

    #[test]
    fn whatever_a_caller_gives_stays_text() {
        let hostile = "x'/><domain>&\"<!--";
        let spec = SnapshotSpec {
            name: hostile.into(),
            description: hostile.into(),
            memory: SnapshotMemory::External {
                file: hostile.into(),
                live: true,
            },
            disks: vec![SnapshotDiskSpec {
                target: hostile.into(),
                mode: SnapshotDiskMode::External {
                    file: hostile.into(),
                    format: "qcow2".into(),
                },
            }],
        };
        let read = parse(&write(&spec)).unwrap();
        assert_eq!(read.name, hostile);
        assert_eq!(read.description.as_deref(), Some(hostile));
        assert_eq!(read.disks[0].target, hostile);
        assert_eq!(read.disks[0].file.as_deref(), Some(hostile));
        assert_eq!(
            read.memory,
            SnapshotMemoryInfo::External {
                file: hostile.into()
            }
        );
    }

    #[test]
    fn a_snapshot_tells_parent_disks_and_the_definition_that_a_revert_brings_back() {
        let xml = "<domainsnapshot><name> b</name><state>disk-snapshot</state>
          <parent><name>a </name></parent><creationTime>1700000000</creationTime>
          <memory snapshot='no'/><disks><disk name='vda' snapshot='external' type='file'>
          <driver type='qcow2'/><source file='/b'/><snapshotDeleteInProgress/></disk></disks>
          <revertDisks><disk name='vda' snapshot='external' type='file'><source file='/a.17'/></disk></revertDisks>
          <domain type='qemu'><name>d</name><devices><disk type='file'><source file='/live'/><target dev='vda'/></disk></devices></domain>
          <inactiveDomain type='qemu'><name>d</name><devices><disk type='file'><source file='/a'/><target dev='vda'/></disk></devices></inactiveDomain>
          </domainsnapshot>";
        let snapshot = parse(xml).unwrap();
        assert_eq!(snapshot.name, " b", "spaces belong to the name");
        assert_eq!(snapshot.parent.as_deref(), Some("a "));
        assert!(snapshot.disks[0].delete_in_progress);
        assert_eq!(snapshot.revert_disks[0].file.as_deref(), Some("/a.17"));
        let disks = snapshot.definition.unwrap().disks;
        assert_eq!(disks[0].path.as_deref(), Some("/a"));
        let live = snapshot.live.unwrap().disks;
        assert_eq!(live[0].path.as_deref(), Some("/live"));
        // The overlays of the present state are replaced, and nothing else.
        for before in [xml.to_owned(), xml.replace("revertDisks", "other")] {
            let other = vec![("vda".to_owned(), "/a & b".to_owned())];
            let changed = parse(&with_overlays(&before, &other, true).unwrap()).unwrap();
            assert_eq!(changed.revert_disks.len(), 1);
            assert_eq!(changed.revert_disks[0].file.as_deref(), Some("/a & b"));
            let rest = SnapshotInfo {
                revert_disks: parse(&before).unwrap().revert_disks,
                ..changed
            };
            assert_eq!(rest, parse(&before).unwrap());
        }
        // Without children they take the place of the snapshot's own.
        let other = vec![("vda".to_owned(), "/a.18".to_owned())];
        let leaf = xml.replace("</disks>", "<disk name='sda' snapshot='external'/></disks>");
        let changed = parse(&with_overlays(&leaf, &other, false).unwrap()).unwrap();
        assert!(changed.revert_disks.is_empty());
        let disks: Vec<_> = changed
            .disks
            .iter()
            .map(|disk| (disk.target.as_str(), disk.mode, disk.file.as_deref()))
            .collect();
        assert_eq!(
            disks,
            [
                ("vda", SnapshotMode::External, Some("/a.18")),
                ("sda", SnapshotMode::No, None)
            ]
        );
        let none = parse(&with_overlays(xml, &[], true).unwrap()).unwrap();
        assert!(none.revert_disks.is_empty());
        assert_eq!(none.disks, parse(xml).unwrap().disks);
    }

    #[test]
    fn the_definition_of_a_snapshot_is_put_on_other_images_and_is_else_what_it_was() {
        let disk = |image: &str, format: &str, below: &str| {
            format!(
                "<disk type='file' device='disk'><driver name='qemu' type='{format}' discard='unmap'/>\
                 <source file='{image}'><seclabel model='dac' relabel='no'/></source>{below}\
                 <target dev='vda' bus='virtio'/></disk>\
                 <disk type='file' device='disk'><source file='{image}'/><target dev='vdb'/></disk>\
                 <disk type='file' device='cdrom'><driver name='qemu' type='raw'/>\
                 <source file='/cd.iso'/><target dev='sda'/></disk>"
            )
        };
        let body = |disks: &str| {
            format!(
                " type='kvm' xmlns:qemu='urn:q'><name>d</name><devices>{disks}</devices>\
                 <qemu:commandline><qemu:arg value='-x'/></qemu:commandline>"
            )
        };
        let then = body(&disk(
            "/a &amp; b",
            "raw",
            "<backingStore type='file'><format type='raw'/></backingStore>",
        ));
        let images = [
            ("vda".to_owned(), "/a & b.17".to_owned()),
            ("vdb".to_owned(), "/c.17".to_owned()),
        ];
        let now = body(&disk("/a &amp; b.17", "qcow2", "").replacen(
            "<disk type='file' device='disk'><source file='/a &amp; b.17'/>",
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/c.17'/>",
            1,
        ));
        let live = "<domain type='kvm'><name>live</name></domain>";
        let running = format!(
            "<domainsnapshot><name>s</name>{live}<inactiveDomain{then}</inactiveDomain></domainsnapshot>"
        );
        let off = format!("<domainsnapshot><name>s</name><domain{then}</domain></domainsnapshot>");
        for record in [running, off] {
            let definition = definition_on(&record, &images).unwrap();
            assert_eq!(definition, format!("<domain{now}</domain>"));
        }
        // Neither is an overlay encrypted, nor does it begin within its file.
        let sliced = "<domainsnapshot><domain><devices><disk type='file'><source file='/a'>\
                      <slices/></source><target dev='vda'/></disk></devices></domain>\
                      </domainsnapshot>";
        assert!(definition_on(sliced, &images[..1]).is_err());
        for (record, images) in [
            (
                "<domainsnapshot><name>s</name></domainsnapshot>",
                &images[..],
            ),
            (
                "<domainsnapshot><domain><devices/></domain></domainsnapshot>",
                &images[..1],
            ),
        ] {
            assert!(definition_on(record, images).is_err());
        }
    }
}
