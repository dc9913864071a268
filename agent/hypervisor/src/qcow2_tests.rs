use std::cell::Cell;

use proptest::prelude::*;
use vmsnap_fuzz::Class;

use super::*;

impl Bytes for [u8] {
    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset).unwrap();
        let piece = self.get(from..from + buffer.len());
        buffer.copy_from_slice(piece.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl Bytes for Vec<u8> {
    fn length(&self) -> u64 {
        self.as_slice().length()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.as_slice().read_at(offset, buffer)
    }
}

const CLUSTER: usize = 512;

/// An image of clusters of 512 bytes: header, reference counts, first table,
/// snapshots.
fn image(
    version: u32,
    backing: &str,
    format: &str,
    snapshots: &[(String, String, u64)],
) -> Vec<u8> {
    let mut head = vec![0; CLUSTER * 3];
    let mut set = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
    let start = if version == 2 { V2_LENGTH } else { V3_LENGTH };
    set(0, &MAGIC);
    set(4, &version.to_be_bytes());
    set(20, &9_u32.to_be_bytes());
    set(24, &32_768_u64.to_be_bytes());
    set(36, &1_u32.to_be_bytes());
    set(40, &(CLUSTER as u64 * 2).to_be_bytes());
    set(48, &(CLUSTER as u64).to_be_bytes());
    set(56, &1_u32.to_be_bytes());
    set(60, &u32::try_from(snapshots.len()).unwrap().to_be_bytes());
    set(64, &(CLUSTER as u64 * 3).to_be_bytes());
    if version == 3 {
        set(96, &4_u32.to_be_bytes());
        set(100, &104_u32.to_be_bytes());
    }
    let mut at = start;
    if !format.is_empty() {
        set(at, &extension::BACKING_FORMAT.to_be_bytes());
        set(at + 4, &u32::try_from(format.len()).unwrap().to_be_bytes());
        set(at + 8, format.as_bytes());
        at += 8 + format.len().next_multiple_of(8);
    }
    at += 8;
    if !backing.is_empty() {
        set(8, &(at as u64).to_be_bytes());
        set(16, &u32::try_from(backing.len()).unwrap().to_be_bytes());
        set(at, backing.as_bytes());
    }
    for (id, name, state) in snapshots {
        let mut entry = vec![0; 40];
        entry[12..14].copy_from_slice(&u16::try_from(id.len()).unwrap().to_be_bytes());
        entry[14..16].copy_from_slice(&u16::try_from(name.len()).unwrap().to_be_bytes());
        entry[36..40].copy_from_slice(&16_u32.to_be_bytes());
        entry.extend(state.to_be_bytes());
        entry.extend(32_768_u64.to_be_bytes());
        entry.extend(id.bytes());
        entry.extend(name.bytes());
        entry.resize(entry.len().next_multiple_of(8), 0);
        head.extend(entry);
    }
    head
}

fn one() -> Vec<(String, String, u64)> {
    vec![("1".into(), "before upgrade".into(), 5 << 30)]
}

fn set_u32(image: &mut [u8], at: usize, value: u32) {
    image[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn set_u64(image: &mut [u8], at: usize, value: u64) {
    image[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

#[test]
fn a_header_tells_size_backing_file_and_snapshots() {
    for version in [2, 3] {
        let Found::Image(header) = read(&image(version, "../base.img", "raw", &one())).unwrap()
        else {
            panic!("version {version} is not understood")
        };
        assert_eq!(header.version, version);
        assert_eq!(header.virtual_size, 32_768);
        assert_eq!(header.backing.as_deref(), Some("../base.img"));
        assert_eq!(header.backing_format.as_deref(), Some("raw"));
        assert_eq!(
            header.snapshots,
            [ImageSnapshot {
                id: "1".into(),
                name: "before upgrade".into(),
                vm_state_size: 5 << 30
            }]
        );
    }
}

#[test]
fn what_is_no_qcow2_image_is_other() {
    for bytes in [&b""[..], b"QFI", b"conectix", &[0; 70_000]] {
        assert_eq!(read(&bytes.to_vec()).unwrap(), Found::Other);
    }
}

/// A name of what is changed, and the change.
type Change = (&'static str, fn(&mut Vec<u8>));

#[test]
fn whatever_qemu_might_refuse_or_read_otherwise_is_left_to_it() {
    let changes: [Change; 27] = [
        ("version 1", |image| set_u32(image, 4, 1)),
        ("version 4", |image| set_u32(image, 4, 4)),
        ("small clusters", |image| set_u32(image, 20, 8)),
        ("large clusters", |image| set_u32(image, 20, 22)),
        ("odd size", |image| set_u64(image, 24, 32_767)),
        ("huge size", |image| set_u64(image, 24, u64::MAX - 511)),
        ("encryption", |image| set_u32(image, 32, 3)),
        ("no first table", |image| set_u32(image, 36, 0)),
        ("huge first table", |image| set_u32(image, 36, u32::MAX)),
        ("first table nowhere", |image| set_u64(image, 40, u64::MAX)),
        ("first table in the header", |image| set_u64(image, 40, 0)),
        ("first table not aligned", |image| set_u64(image, 40, 1025)),
        ("counts nowhere", |image| set_u64(image, 48, 1 << 60)),
        ("no counts", |image| set_u32(image, 56, 0)),
        ("huge counts", |image| set_u32(image, 56, u32::MAX)),
        ("many snapshots", |image| set_u32(image, 60, u32::MAX)),
        ("more snapshots", |image| set_u32(image, 60, 2)),
        ("snapshots nowhere", |image| {
            set_u64(image, 64, u64::MAX - 511)
        }),
        ("snapshots not aligned", |image| set_u64(image, 64, 1537)),
        ("unknown feature", |image| set_u64(image, 72, 1 << 5)),
        ("data file", |image| set_u64(image, 72, 1 << 2)),
        ("extended entries", |image| set_u64(image, 72, 1 << 4)),
        ("compression", |image| set_u64(image, 72, 1 << 3)),
        ("wide counts", |image| set_u32(image, 96, 7)),
        ("short header", |image| set_u32(image, 100, 96)),
        ("long header", |image| set_u32(image, 100, 1024)),
        ("backing name outside", |image| set_u64(image, 8, 600)),
    ];
    for (name, change) in changes {
        let mut bytes = image(3, "base", "qcow2", &one());
        change(&mut bytes);
        let found = read(&bytes).unwrap();
        assert!(matches!(found, Found::Strange(_)), "{name}: {found:?}");
    }
}

#[test]
fn a_name_that_qemu_would_show_otherwise_is_left_to_it() {
    let zero = image(3, "ba\0se", "", &[]);
    let mut no_text = image(3, "base", "", &one());
    let at = no_text.len() - 8;
    no_text[at] = 0xff;
    for bytes in [zero, no_text] {
        assert!(matches!(read(&bytes).unwrap(), Found::Strange(_)));
    }
}

/// An image whose table of snapshots is moved away after its header was read,
/// as by a guest's QEMU that just took another snapshot.
struct Moving {
    before: Vec<u8>,
    after: Vec<u8>,
    reads: Cell<usize>,
    moves_after: usize,
}

impl Bytes for Moving {
    fn length(&self) -> u64 {
        self.before.length().max(self.after.length())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let reads = self.reads.get();
        self.reads.set(reads + 1);
        let bytes = match reads.cmp(&self.moves_after) {
            std::cmp::Ordering::Less => &self.before,
            _ => &self.after,
        };
        bytes.read_at(offset, buffer)
    }
}

#[test]
fn a_table_that_moves_while_it_is_read_is_read_again() {
    let two = vec![one()[0].clone(), ("2".into(), "after".into(), 0)];
    let mut after = image(3, "", "", &two);
    // Where the old table was, there is guest data now.
    let table = after.split_off(CLUSTER * 3);
    after.extend([0xa5; CLUSTER]);
    after.extend(table);
    set_u64(&mut after, 64, CLUSTER as u64 * 4);
    let mut before = image(3, "", "", &one());
    before.resize(after.len(), 0);
    for moves_after in 0..3 {
        let moving = Moving {
            before: before.clone(),
            after: after.clone(),
            reads: Cell::new(0),
            moves_after,
        };
        let Found::Image(header) = read(&moving).unwrap() else {
            panic!("not understood")
        };
        let names: Vec<&str> = header.snapshots.iter().map(|one| &*one.name).collect();
        assert_eq!(names, ["before upgrade", "after"]);
    }
}

#[test]
fn a_large_table_of_snapshots_is_left_to_qemu() {
    let large = vec![("1".to_owned(), "n".repeat(60_000), 0); 80];
    let found = read(&image(3, "", "", &large)).unwrap();
    assert!(matches!(found, Found::Strange(why) if why.contains("large")));
    let fits = vec![("1".to_owned(), "n".repeat(60_000), 0); 40];
    let Found::Image(header) = read(&image(3, "", "", &fits)).unwrap() else {
        panic!("not understood")
    };
    assert_eq!(header.snapshots.len(), 40);
}

fn bounded(found: &Found) {
    if let Found::Image(header) = found {
        let names: usize = header
            .snapshots
            .iter()
            .map(|one| one.id.len() + one.name.len() + 40)
            .sum();
        assert!(names as u64 <= SNAPSHOT_TABLE);
    }
}

#[test]
fn no_bytes_make_it_panic() {
    let inputs = (
        proptest::collection::vec(any::<u8>(), 0..6_000),
        any::<bool>(),
    );
    Class::new("qcow2, bytes", 60).check(&inputs, |(mut bytes, magic)| {
        if magic && bytes.len() >= 4 {
            bytes[..4].copy_from_slice(&MAGIC);
        }
        bounded(&read(&bytes).unwrap());
        Ok(())
    });
}

#[test]
fn no_damage_to_an_image_makes_it_panic() {
    let inputs = (
        2_u32..=3,
        proptest::collection::vec((0..2_000_usize, any::<u8>()), 1..12),
        proptest::collection::vec((0..26_usize, any::<u32>()), 0..3),
        proptest::option::of(0..2_000_usize),
    );
    Class::new("qcow2, damaged", 120).check(&inputs, |(version, changes, fields, cut)| {
        let mut bytes = image(version, "base", "qcow2", &one());
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        for (field, value) in fields {
            set_u32(&mut bytes, 4 + field * 4, value);
        }
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        bounded(&read(&bytes).unwrap());
        Ok(())
    });
}

proptest! {
    #[test]
    fn names_are_read_as_they_were_written(
        version in 2_u32..=3,
        backing in "[^\0]{0,60}",
        format in "[a-z0-9]{0,15}",
        snapshots in proptest::collection::vec(("[0-9]{1,5}", "[^\0]{0,200}", any::<u64>()), 0..40),
    ) {
        let Found::Image(header) = read(&image(version, &backing, &format, &snapshots)).unwrap() else {
            panic!("not understood")
        };
        prop_assert_eq!(header.backing.unwrap_or_default(), backing);
        prop_assert_eq!(header.backing_format.unwrap_or_default(), format);
        let read: Vec<(String, String, u64)> = header
            .snapshots
            .into_iter()
            .map(|one| (one.id, one.name, one.vm_state_size))
            .collect();
        prop_assert_eq!(read, snapshots);
    }
}
