//! Names: which new ones are allowed, which one was probably meant, and how a
//! VM's or a snapshot's name becomes part of a file name.
//!
//! Invariant: a name that passed [`check_new_snapshot_name`] is safe in XML, in
//! a path and in QEMU's job ids. Foreign snapshots may have any name; theirs
//! only ever meet libvirt, never a path.

/// The longest new snapshot name, in characters.
pub const MAX_NAME: usize = 64;

/// Checks the name of a snapshot that is to be made:
/// `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`.
///
/// A space, a colon, quotes or anything beyond ASCII makes QEMU refuse the job
/// id of a live internal snapshot; `/` and a leading `.` are refused by libvirt.
///
/// # Errors
/// A sentence that names the character and what would be right.
pub fn check_new_snapshot_name(name: &str) -> Result<(), String> {
    const RIGHT: &str = "letters, digits, '.', '_' and '-' are allowed, a letter or digit first, \
                         64 characters at most";
    if name.is_empty() {
        return Err(format!("the name is empty; {RIGHT}"));
    }
    let length = name.chars().count();
    if length > MAX_NAME {
        return Err(format!("the name has {length} characters; {RIGHT}"));
    }
    for (at, c) in name.chars().enumerate() {
        let ok = c.is_ascii_alphanumeric() || (at > 0 && matches!(c, '.' | '_' | '-'));
        if !ok {
            let shown = if c.is_control() {
                format!("U+{:04X}", u32::from(c))
            } else {
                format!("'{c}'")
            };
            return Err(format!(
                "'{}' has {shown} at position {}; {RIGHT}",
                name.escape_debug(),
                at + 1
            ));
        }
    }
    Ok(())
}

/// Whether QEMU takes a name of an internal snapshot for the number of one: it
/// looks for a number first, so a revert to the snapshot `1` goes to whatever
/// snapshot is the image's first, and says that all went well.
#[must_use]
pub fn is_number(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit())
}

/// Whether QEMU accepts a name as part of the id of a job, as deleting an
/// internal snapshot of a running VM needs it.
#[must_use]
pub fn is_job_id(name: &str) -> bool {
    name.chars()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

/// The name that libvirt makes up for a new overlay on `path`, without its own
/// ending: everything after the last dot of the file's name is replaced.
#[must_use]
pub fn overlay_stem(path: &str) -> &str {
    match path.rfind(['.', '/']) {
        Some(at) if path.as_bytes()[at] == b'.' => &path[..at],
        _ => path,
    }
}

/// Checks a name that refers to something that exists: a VM, a snapshot that
/// somebody else may have made, a pool, a disk.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn check_reference(name: &str) -> Result<(), String> {
    if name.len() > 255 {
        return Err(format!(
            "the name has {} bytes; libvirt's names have 255 at most",
            name.len()
        ));
    }
    match name.chars().find(|c| c.is_control()) {
        Some(c) => Err(format!(
            "'{}' has the control character U+{:04X}",
            name.escape_debug(),
            u32::from(c)
        )),
        None => Ok(()),
    }
}

/// The name that was probably meant, if one is near enough to be of help.
#[must_use]
pub fn nearest<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    names
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(wanted, name), name))
        .filter(|(distance, name)| {
            *distance * 2 <= wanted.chars().count().max(name.chars().count())
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// A name as part of a file name: what is not `[A-Za-z0-9._-]` becomes `_`, a
/// leading dot too, and 64 characters are kept.
#[must_use]
pub fn file_part(name: &str) -> String {
    name.chars()
        .take(MAX_NAME)
        .enumerate()
        .map(|(at, c)| {
            if c.is_ascii_alphanumeric() || c == '_' || c == '-' || (c == '.' && at > 0) {
                c
            } else {
                '_'
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_breaks_qemu_or_libvirt_is_refused_and_the_character_is_named() {
        for good in ["a", "before-upgrade", "1", "v1.2_3", &"x".repeat(64)] {
            assert_eq!(check_new_snapshot_name(good), Ok(()), "{good}");
        }
        for (bad, told) in [
            ("a b", "' '"),
            ("a:b", "':'"),
            ("a/b", "'/'"),
            (".a", "'.'"),
            ("-a", "'-'"),
            ("ä", "'ä'"),
            ("a\nb", "U+000A"),
            ("a\"b", "'\"'"),
            ("", "empty"),
            (&"x".repeat(65), "65 characters"),
        ] {
            let error = check_new_snapshot_name(bad).unwrap_err();
            assert!(error.contains(told), "{bad}: {error}");
        }
    }

    #[test]
    fn a_mistyped_name_finds_its_neighbour_and_a_strange_one_finds_none() {
        let names = ["before-upgrade", "clean", "baseline"];
        assert_eq!(nearest("befor-upgrade", names), Some("before-upgrade"));
        assert_eq!(nearest("claen", names), Some("clean"));
        assert_eq!(nearest("zzzzzzzz", names), None);
    }

    #[test]
    fn names_that_qemu_or_libvirt_take_for_something_else_are_told() {
        assert!(is_number("1") && is_number("20260101"));
        assert!(!is_number("") && !is_number("1a") && !is_number("-1"));
        assert!(is_job_id("v1.2_3-x"));
        for odd in ["a b", "a:b", "a,b", "it's", "ü"] {
            assert!(!is_job_id(odd), "{odd}");
        }
        for (path, stem) in [
            ("/i/web1.qcow2", "/i/web1"),
            ("/i/web1.a,b", "/i/web1"),
            ("/i.d/web1", "/i.d/web1"),
            ("/i/a,b.qcow2", "/i/a,b"),
        ] {
            assert_eq!(overlay_stem(path), stem);
        }
    }

    #[test]
    fn a_file_name_is_made_of_harmless_characters_only() {
        assert_eq!(file_part("web 1/../x"), "web_1_.._x");
        assert_eq!(file_part("..hidden"), "_.hidden");
    }
}
