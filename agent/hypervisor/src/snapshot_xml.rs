//! Snapshot XML, written and read.
//!
//! Invariant: whatever a caller gives ends up as text or attribute value, never
//! as markup.

use std::fmt::Write as _;

use quick_xml::escape::escape;

use crate::{
    definition::{self, child, child_text},
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
pub(crate) fn with_revert_overlays(
    xml: &str,
    overlays: &[(String, String)],
) -> Result<String, Fault> {
    let document = definition::document(xml)?;
    let root = document.root_element();
    let Some(disks) = child(root, "disks") else {
        return Err(Fault::malformed("a snapshot without <disks>"));
    };
    let mut fresh = String::from("\n  <revertDisks>");
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
    fresh.push_str("</revertDisks>");
    let mut edits = vec![(disks.range().end..disks.range().end, fresh.as_str())];
    if let Some(old) = child(root, "revertDisks") {
        edits.push((old.range(), ""));
    }
    // From the end on, so that what lies before keeps its place.
    edits.sort_by_key(|(range, _)| std::cmp::Reverse(range.start));
    let mut text = xml.to_owned();
    for (range, with) in edits {
        text.replace_range(range, with);
    }
    Ok(text)
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
            let changed = parse(&with_revert_overlays(&before, &other).unwrap()).unwrap();
            assert_eq!(changed.revert_disks.len(), 1);
            assert_eq!(changed.revert_disks[0].file.as_deref(), Some("/a & b"));
            let rest = SnapshotInfo {
                revert_disks: parse(&before).unwrap().revert_disks,
                ..changed
            };
            assert_eq!(rest, parse(&before).unwrap());
        }
    }
}
