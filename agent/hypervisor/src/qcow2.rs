//! The header of a qcow2 image, read without QEMU: size, backing file, internal
//! snapshots.
//!
//! Source: QEMU's `docs/interop/qcow2.txt`, with the limits that QEMU itself
//! applies when it opens an image.
//!
//! Invariants
//! - Says only what is certain. Whatever a QEMU might refuse, repair or read in
//!   another way is [`Found::Strange`], and the caller asks `qemu-img`, which is
//!   the authority and has the words for what is wrong.
//! - No bytes make it panic, loop or hold more than the limits below.
//! - A running guest changes its image in place: the header is read again after
//!   everything it points to, and what moved meanwhile is read anew.

use std::{io, ops::Range};

use crate::image::ImageSnapshot;

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Header, extensions and backing file's name lie in here; QEMU writes them one
/// after the other, and more than this it never has to say.
const HEAD: usize = 4096;
/// Length of a version 2 header, and of the shortest version 3 one.
const V2_LENGTH: usize = 72;
const V3_LENGTH: usize = 104;
/// QEMU's own limits.
const BACKING_NAME: usize = 1023;
const FORMAT_NAME: usize = 15;
const L1_TABLE: u64 = 32 << 20;
const REFCOUNT_TABLE: u64 = 8 << 20;
const SNAPSHOTS: u32 = 65_536;
const SNAPSHOT_EXTRA: usize = 1024;
/// Ours: a larger table of internal snapshots is left to `qemu-img`.
const SNAPSHOT_TABLE: u64 = 4 << 20;
/// How often an image is read that changes under the reader.
const TRIES: usize = 4;

/// Incompatible features that change nothing of what is read here.
mod feature {
    pub const DIRTY: u64 = 1;
    pub const CORRUPT: u64 = 1 << 1;
    pub const DATA_FILE: u64 = 1 << 2;
    pub const COMPRESSION: u64 = 1 << 3;
    pub const EXTENDED_L2: u64 = 1 << 4;
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Kinds of header extensions.
mod extension {
    pub const END: u32 = 0;
    pub const BACKING_FORMAT: u32 = 0xE279_2ACA;
}

/// Something that can be read at any place.
pub(crate) trait Bytes {
    /// Its length.
    fn length(&self) -> u64;
    /// Fills the buffer from `offset` on.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// What an image's header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Bytes that a guest would see.
    pub virtual_size: u64,
    /// The backing file's name as it stands in the header.
    pub backing: Option<String>,
    /// The backing file's format.
    pub backing_format: Option<String>,
    /// Internal snapshots.
    pub snapshots: Vec<ImageSnapshot>,
}

/// What was found in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    /// No qcow2 image.
    Other,
    /// Something that only QEMU can tell: why.
    Strange(&'static str),
    /// A qcow2 image.
    Image(Header),
}

/// Reads a header and the table of internal snapshots.
///
/// # Errors
/// When the file cannot be read.
pub(crate) fn read(bytes: &impl Bytes) -> io::Result<Found> {
    for _ in 0..TRIES {
        let head = head(bytes)?;
        let found = found(bytes, &head)?;
        if self::head(bytes)? == head {
            return Ok(found);
        }
    }
    Ok(Found::Strange("it changes while it is read"))
}

fn head(bytes: &impl Bytes) -> io::Result<Vec<u8>> {
    let length = usize::try_from(bytes.length()).map_or(HEAD, |length| length.min(HEAD));
    let mut head = vec![0; length];
    bytes.read_at(0, &mut head)?;
    Ok(head)
}

fn found(bytes: &impl Bytes, head: &[u8]) -> io::Result<Found> {
    if !head.starts_with(&MAGIC) {
        return Ok(Found::Other);
    }
    let (mut header, table) = match header(head, bytes.length()) {
        Ok(parsed) => parsed,
        Err(Strange(why)) => return Ok(Found::Strange(why)),
    };
    match snapshots(bytes, &table) {
        Ok(snapshots) => header.snapshots = snapshots,
        Err(Stop::Strange(Strange(why))) => return Ok(Found::Strange(why)),
        Err(Stop::Io(error)) => return Err(error),
    }
    Ok(Found::Image(header))
}

/// Why only QEMU can tell.
#[derive(Debug)]
struct Strange(&'static str);

/// Why a table's reading ends.
enum Stop {
    Strange(Strange),
    Io(io::Error),
}

impl From<Strange> for Stop {
    fn from(strange: Strange) -> Self {
        Self::Strange(strange)
    }
}

fn strange<T>(why: &'static str) -> Result<T, Strange> {
    Err(Strange(why))
}

/// Fields of a header; one that lies outside is strange.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&self, at: Range<usize>) -> Result<&'a [u8], Strange> {
        self.0
            .get(at)
            .ok_or(Strange("it ends in the middle of its header"))
    }

    fn array<const N: usize>(&self, at: usize) -> Result<[u8; N], Strange> {
        let end = at.checked_add(N).ok_or(Strange("an offset is too large"))?;
        let mut field = [0; N];
        field.copy_from_slice(self.bytes(at..end)?);
        Ok(field)
    }

    fn u16(&self, at: usize) -> Result<u16, Strange> {
        Ok(u16::from_be_bytes(self.array(at)?))
    }

    fn u32(&self, at: usize) -> Result<u32, Strange> {
        Ok(u32::from_be_bytes(self.array(at)?))
    }

    fn u64(&self, at: usize) -> Result<u64, Strange> {
        Ok(u64::from_be_bytes(self.array(at)?))
    }

    /// Text that QEMU reads as it stands: it ends strings at a zero byte and
    /// replaces what is no UTF-8.
    fn text(&self, at: Range<usize>) -> Result<String, Strange> {
        let bytes = self.bytes(at)?;
        if bytes.contains(&0) {
            return strange("a name holds a zero byte");
        }
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => strange("a name is no UTF-8"),
        }
    }
}

/// Where the table of internal snapshots is.
struct Table {
    offset: u64,
    entries: u32,
}

/// Everything but the snapshots.
fn header(head: &[u8], length: u64) -> Result<(Header, Table), Strange> {
    let fields = Fields(head);
    let version = fields.u32(4)?;
    if !matches!(version, 2 | 3) {
        return strange("its version is neither 2 nor 3");
    }
    let cluster_bits = fields.u32(20)?;
    if !(9..=21).contains(&cluster_bits) {
        return strange("its cluster size is none that QEMU takes");
    }
    let cluster = 1_u64 << cluster_bits;
    let virtual_size = fields.u64(24)?;
    if !virtual_size.is_multiple_of(512) {
        return strange("its size is no multiple of 512");
    }
    if fields.u32(32)? > 2 {
        return strange("its encryption is unknown");
    }
    let (header_length, features) = match version {
        2 => (V2_LENGTH, 0),
        _ => version_3(&fields, cluster)?,
    };
    // A table that is not whole: QEMU may refuse, or read zeros.
    let whole = |offset: u64, size: u64| {
        offset.is_multiple_of(cluster)
            && offset >= cluster
            && offset.checked_add(size).is_some_and(|end| end <= length)
    };

    let entry = if features & feature::EXTENDED_L2 == 0 {
        8
    } else if cluster_bits < 14 {
        return strange("its clusters are too small for what it says of them");
    } else {
        16
    };
    let (l1_entries, l1_offset) = (u64::from(fields.u32(36)?), fields.u64(40)?);
    let covered = cluster * (cluster / entry);
    if l1_entries < virtual_size.div_ceil(covered) || l1_entries * 8 > L1_TABLE {
        return strange("its first table does not fit its size");
    }
    if l1_entries > 0 && !whole(l1_offset, l1_entries * 8) {
        return strange("its first table is not whole");
    }
    let refcounts = u64::from(fields.u32(56)?) * cluster;
    if refcounts == 0 || refcounts > REFCOUNT_TABLE || !whole(fields.u64(48)?, refcounts) {
        return strange("its table of reference counts is not whole");
    }

    let table = Table {
        offset: fields.u64(64)?,
        entries: fields.u32(60)?,
    };
    if table.entries > 0 && (table.entries > SNAPSHOTS || !whole(table.offset, 0)) {
        return strange("its table of snapshots is not where one can be");
    }

    let (name_offset, name_length) = (fields.u64(8)?, fields.u32(16)? as usize);
    let extensions_end = if name_offset == 0 {
        cluster
    } else {
        name_offset
    };
    if extensions_end > cluster {
        return strange("its backing file's name is outside of its header");
    }
    // Not more than the largest cluster, so it fits.
    let extensions_end = usize::try_from(extensions_end).unwrap_or(usize::MAX);
    if extensions_end < header_length {
        return strange("its backing file's name is inside of its header");
    }
    let backing = if name_offset == 0 || name_length == 0 {
        None
    } else if name_length > BACKING_NAME || (name_length as u64) > cluster - name_offset {
        return strange("its backing file's name is too long");
    } else {
        Some(fields.text(extensions_end..extensions_end + name_length)?)
    };
    let backing_format = backing_format(&fields, header_length, extensions_end)?;
    Ok((
        Header {
            version,
            virtual_size,
            backing,
            backing_format,
            snapshots: Vec::new(),
        },
        table,
    ))
}

/// Length of a version 3 header, and its incompatible features.
fn version_3(fields: &Fields<'_>, cluster: u64) -> Result<(usize, u64), Strange> {
    let features = fields.u64(72)?;
    if features & !feature::KNOWN != 0 {
        return strange("it has features that are unknown here");
    }
    if features & feature::DATA_FILE != 0 {
        // Only QEMU knows from where it takes a relative name.
        return strange("its data lies in another file");
    }
    if fields.u32(96)? > 6 {
        return strange("its reference counts are wider than QEMU takes");
    }
    let length = fields.u32(100)? as usize;
    if length < V3_LENGTH || !length.is_multiple_of(8) || length as u64 > cluster {
        return strange("its header's length is none that QEMU takes");
    }
    let compression = match length {
        V3_LENGTH => 0,
        _ => fields.array::<1>(V3_LENGTH)?[0],
    };
    let differs = features & feature::COMPRESSION != 0;
    if !matches!((compression, differs), (0, false) | (1, true)) {
        return strange("its compression is unknown");
    }
    Ok((length, features))
}

/// Walks the extensions, which QEMU pads to eight bytes each.
fn backing_format(
    fields: &Fields<'_>,
    start: usize,
    end: usize,
) -> Result<Option<String>, Strange> {
    let mut format = None;
    let mut at = start;
    while at < end {
        if end - at < 8 {
            return strange("an extension of its header is cut off");
        }
        let (kind, length) = (fields.u32(at)?, fields.u32(at + 4)? as usize);
        at += 8;
        if length > end - at {
            return strange("an extension of its header is too long");
        }
        match kind {
            extension::END => break,
            extension::BACKING_FORMAT => {
                if format.is_some() || length > FORMAT_NAME {
                    return strange("its backing file's format is not clear");
                }
                format = Some(fields.text(at..at + length)?);
            }
            _ => {}
        }
        // Both are at most a cluster.
        at += length.next_multiple_of(8);
    }
    Ok(format.filter(|format| !format.is_empty()))
}

/// Reads on and on from a place, in pieces, up to a limit.
struct Stream<'a, B> {
    bytes: &'a B,
    /// Where the table begins.
    start: u64,
    /// What was taken of it.
    taken: u64,
    piece: Vec<u8>,
    /// Where the piece begins, counted from the table's beginning.
    piece_at: u64,
}

impl<B: Bytes> Stream<'_, B> {
    const PIECE: u64 = 64 << 10;

    /// The next bytes, fewer than a piece.
    fn take(&mut self, count: usize) -> Result<&[u8], Stop> {
        let (from, to) = (self.taken, self.taken + count as u64);
        if to > SNAPSHOT_TABLE {
            return Err(Strange("its table of snapshots is large").into());
        }
        if self.start.saturating_add(to) > self.bytes.length() {
            return Err(Strange("its table of snapshots is cut off").into());
        }
        if to > self.piece_at + self.piece.len() as u64 {
            let left = self.bytes.length() - self.start - from;
            // At most a piece and what was asked for.
            let size = usize::try_from(left.min(Self::PIECE.max(count as u64))).unwrap_or(count);
            self.piece.resize(size, 0);
            self.bytes
                .read_at(self.start + from, &mut self.piece)
                .map_err(Stop::Io)?;
            self.piece_at = from;
        }
        self.taken = to;
        let at = usize::try_from(from - self.piece_at).unwrap_or(usize::MAX);
        self.piece
            .get(at..at.saturating_add(count))
            .ok_or(Stop::Strange(Strange("its table of snapshots is cut off")))
    }
}

/// The table of internal snapshots.
fn snapshots(bytes: &impl Bytes, table: &Table) -> Result<Vec<ImageSnapshot>, Stop> {
    /// An entry without its parts of any length.
    const FIXED: usize = 40;
    let mut stream = Stream {
        bytes,
        start: table.offset,
        taken: 0,
        piece: Vec::new(),
        piece_at: 0,
    };
    let mut all = Vec::new();
    for _ in 0..table.entries {
        let fixed = Fields(stream.take(FIXED)?);
        let (id, name) = (usize::from(fixed.u16(12)?), usize::from(fixed.u16(14)?));
        let small_size = u64::from(fixed.u32(32)?);
        let extra = fixed.u32(36)? as usize;
        if extra > SNAPSHOT_EXTRA {
            return Err(Strange("a snapshot has more to it than is known here").into());
        }
        let entry = extra + id + name;
        let rest = Fields(stream.take(entry)?);
        let vm_state_size = match extra {
            0..8 => small_size,
            _ => rest.u64(0)?,
        };
        all.push(ImageSnapshot {
            id: rest.text(extra..extra + id)?,
            name: rest.text(extra + id..entry)?,
            vm_state_size,
        });
        let padded = (FIXED + entry).next_multiple_of(8);
        // The last one may end with the file.
        if all.len() < table.entries as usize {
            stream.take(padded - FIXED - entry)?;
        }
    }
    Ok(all)
}

#[cfg(test)]
#[path = "qcow2_tests.rs"]
mod tests;
