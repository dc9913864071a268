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

/// What a finished file begins with (`QEMU_SAVE_MAGIC`).
const FINISHED: &[u8; 16] = b"LibvirtQemudSave";
/// What a file begins with while it is written (`QEMU_SAVE_PARTIAL`).
const UNFINISHED: &[u8; 16] = b"LibvirtQemudPart";
/// Bytes of the head: the magic and nineteen numbers of four bytes.
const HEAD: usize = 16 + 19 * 4;

/// What is wrong with a memory file, as far as its head tells.
///
/// # Errors
/// When it cannot be read.
pub fn problem(path: &Path) -> io::Result<Option<String>> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut head = Vec::with_capacity(HEAD);
    file.by_ref().take(HEAD as u64).read_to_end(&mut head)?;
    let Some((magic, numbers)) = head
        .split_first_chunk::<16>()
        .filter(|_| head.len() == HEAD)
    else {
        return Ok(Some(format!("has {size} bytes, fewer than its head alone")));
    };
    if magic == UNFINISHED {
        return Ok(Some("was never finished".into()));
    }
    if magic != FINISHED {
        return Ok(Some("is no memory file of libvirt's".into()));
    }
    let number = |at: usize| {
        numbers
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u32::from_ne_bytes)
    };
    // A file of a host with the other byte order is turned by libvirt.
    let (version, mut definition) = (number(0), number(4));
    if version > 0xffff {
        definition = definition.swap_bytes();
    }
    let needed = HEAD as u64 + u64::from(definition);
    if size <= needed {
        return Ok(Some(format!(
            "is cut off: it has {size} bytes, and its definition alone reaches to {needed}"
        )));
    }
    Ok(None)
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
}
