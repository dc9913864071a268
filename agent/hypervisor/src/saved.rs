//! The head of a file in which libvirt keeps the memory of a VM.
//!
//! libvirt itself reads it only after it has killed the guest, so it is looked
//! at before. The head tells whether the file was ever finished and how long
//! the definition in it is; it tells nothing of the memory behind.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
};

use crate::definition::DomainDefinition;

/// What a finished file begins with (`QEMU_SAVE_MAGIC`).
const FINISHED: &[u8; 16] = b"LibvirtQemudSave";
/// What a file begins with while it is written (`QEMU_SAVE_PARTIAL`).
const UNFINISHED: &[u8; 16] = b"LibvirtQemudPart";
/// More bytes than any definition has.
const LONGEST: u32 = 16 << 20;
/// Bytes of the head: the magic and nineteen numbers of four bytes.
const HEAD: usize = 16 + 19 * 4;

/// What is wrong with a memory file, as far as its head tells.
///
/// # Errors
/// When it cannot be read.
pub fn problem(path: &Path) -> io::Result<Option<String>> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let Some((magic, definition)) = head(&mut file)? else {
        return Ok(Some(format!("has {size} bytes, fewer than its head alone")));
    };
    if magic == *UNFINISHED {
        return Ok(Some("was never finished".into()));
    }
    if magic != *FINISHED {
        return Ok(Some("is no memory file of libvirt's".into()));
    }
    let needed = HEAD as u64 + u64::from(definition);
    if size <= needed {
        return Ok(Some(format!(
            "is cut off: it has {size} bytes, and its definition alone reaches to {needed}"
        )));
    }
    Ok(None)
}

/// UUID of the VM whose memory a file holds; `None` for any other file.
///
/// # Errors
/// When it cannot be read.
pub fn owner(path: &Path) -> io::Result<Option<String>> {
    let mut file = File::open(path)?;
    let Some((magic, length)) = head(&mut file)? else {
        return Ok(None);
    };
    if magic != *FINISHED && magic != *UNFINISHED {
        return Ok(None);
    }
    let mut definition = Vec::new();
    let length = length.min(LONGEST);
    file.take(u64::from(length)).read_to_end(&mut definition)?;
    // What libvirt adds for itself follows after a zero.
    let text = definition.split(|byte| *byte == 0).next();
    let text = text.and_then(|text| std::str::from_utf8(text).ok());
    Ok(text
        .and_then(|text| DomainDefinition::parse(text).ok())
        .and_then(|definition| definition.uuid))
}

/// Reads the head: the magic and the length of the definition behind it; `None` where
/// the file is shorter than a head.
fn head(file: &mut File) -> io::Result<Option<([u8; 16], u32)>> {
    let mut head = Vec::with_capacity(HEAD);
    file.take(HEAD as u64).read_to_end(&mut head)?;
    Ok(head
        .split_first_chunk::<16>()
        .filter(|_| head.len() == HEAD)
        .map(|(magic, numbers)| (*magic, definition_bytes(numbers))))
}

/// Length of the definition behind the head, by the numbers in it. A file of a
/// host with the other byte order is turned by libvirt.
fn definition_bytes(numbers: &[u8]) -> u32 {
    let number = |at: usize| {
        numbers
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u32::from_ne_bytes)
    };
    let (version, definition) = (number(0), number(4));
    if version > 0xffff {
        definition.swap_bytes()
    } else {
        definition
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_tells_what_is_unfinished_cut_off_or_something_else() {
        let path = std::env::temp_dir().join(format!("vmsnap-saved-{}", std::process::id()));
        let file = |magic: &[u8], definition: u32, rest: usize| {
            let mut bytes = magic.to_vec();
            for number in [2, definition] {
                bytes.extend(u32::to_ne_bytes(number));
            }
            bytes.resize(HEAD + rest, 0);
            bytes
        };
        for (bytes, part) in [
            (Vec::new(), Some("0 bytes")),
            (FINISHED.to_vec(), Some("16 bytes")),
            (file(UNFINISHED, 10, 100), Some("never finished")),
            (
                file(b"\x7fELF............", 10, 100),
                Some("no memory file"),
            ),
            (file(FINISHED, 500, 400), Some("cut off")),
            (file(FINISHED, 400, 401), None),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let found = problem(&path).unwrap();
            match part {
                None => assert_eq!(found, None),
                Some(part) => assert!(found.unwrap().contains(part), "{part}"),
            }
        }
        std::fs::remove_file(&path).unwrap();
        assert!(problem(&path).is_err());
    }

    #[test]
    fn a_memory_file_tells_whose_it_is_and_no_other_file_does() {
        let path = std::env::temp_dir().join(format!("vmsnap-owner-{}", std::process::id()));
        let xml = b"<domain type='qemu'><name>d</name><uuid>1-2-3</uuid></domain>";
        let file = |magic: &[u8], text: &[u8]| {
            let mut bytes = magic.to_vec();
            let length = u32::try_from(text.len() + 9).unwrap();
            for number in [2, length] {
                bytes.extend(u32::to_ne_bytes(number));
            }
            bytes.resize(HEAD, 0);
            bytes.extend(text);
            bytes.extend(b"\0<cookie/>and memory");
            bytes
        };
        for (bytes, owner) in [
            (file(FINISHED, xml), Some("1-2-3")),
            (file(UNFINISHED, xml), Some("1-2-3")),
            (file(b"QFI\xfb............", xml), None),
            (file(FINISHED, b"<domain"), None),
            (b"short".to_vec(), None),
        ] {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(super::owner(&path).unwrap().as_deref(), owner);
        }
        std::fs::remove_file(&path).unwrap();
    }
}
