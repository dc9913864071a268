//! Where apt gets packages from, and the one source that Debian 12 lacks.
//!
//! Debian 12 itself has libvirt 9.0, which cannot revert external snapshots; its
//! backports have a newer one.
//!
//! Invariant: sources of others are read, never edited; ours is a file of its
//! own.

use std::{fs, path::Path};

use anyhow::{Result, bail};

/// The file that is added.
pub const OURS: &str = "/etc/apt/sources.list.d/vmsnap-backports.sources";

/// One archive that offers a suite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archive {
    /// Where it is.
    pub uri: String,
    /// The keys that sign it, if the entry says.
    pub signed_by: Option<String>,
}

/// Finds the archive of a suite's component `main` among all sources.
#[must_use]
pub fn archive_of(suite: &str) -> Option<Archive> {
    let mut files = vec![Path::new("/etc/apt/sources.list").to_path_buf()];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    // apt reads these two kinds only: others are switched off.
    files.iter().find_map(|file| {
        let text = fs::read_to_string(file).ok()?;
        match file.extension()?.to_str()? {
            "sources" => stanzas(&text, suite),
            "list" => one_line(&text, suite),
            _ => None,
        }
    })
}

/// The form with one field a line; a value may go on in lines that begin with a
/// space, as keys that are written out do.
fn stanzas(text: &str, suite: &str) -> Option<Archive> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    lines
        .split(|line| line.trim().is_empty())
        .find_map(|stanza| {
            let mut fields: Vec<(String, String)> = Vec::new();
            for line in stanza {
                if line.starts_with([' ', '\t']) {
                    if let Some((_, value)) = fields.last_mut() {
                        value.push('\n');
                        value.push_str(line);
                    }
                } else if let Some((name, value)) = line.split_once(':') {
                    fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
                }
            }
            let field = |name: &str| {
                fields
                    .iter()
                    .find(|(found, _)| found == name)
                    .map(|(_, value)| value)
            };
            let has = |name: &str, wanted: &str| {
                field(name).is_some_and(|value| value.split_whitespace().any(|word| word == wanted))
            };
            let off = field("enabled").is_some_and(|value| value.eq_ignore_ascii_case("no"));
            (!off && has("types", "deb") && has("suites", suite) && has("components", "main"))
                .then_some(())?;
            Some(Archive {
                uri: field("uris")?.split_whitespace().next()?.to_owned(),
                signed_by: field("signed-by")
                    .filter(|value| !value.is_empty())
                    .cloned(),
            })
        })
}

/// The form with one source a line.
fn one_line(text: &str, suite: &str) -> Option<Archive> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb")?;
        // "deb-src" is another kind.
        rest.starts_with([' ', '\t']).then_some(())?;
        let (options, rest) = match rest.trim_start().strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let uri = words.next()?;
        (words.next()? == suite && words.any(|word| word == "main")).then_some(())?;
        Some(Archive {
            uri: uri.to_owned(),
            signed_by: options
                .split_whitespace()
                .find_map(|option| option.strip_prefix("signed-by="))
                .map(str::to_owned),
        })
    })
}

/// The text of our file for a suite's backports.
///
/// # Errors
/// When no archive of the suite is known.
pub fn backports(suite: &str) -> Result<String> {
    let Some(archive) = archive_of(suite) else {
        bail!(
            "no apt source offers {suite} main, so its backports cannot be found; add \
             {suite}-backports by hand"
        );
    };
    let mut text = format!(
        "# Added by vmsnap's set-up: libvirt and QEMU that can revert external snapshots.\n\
         Types: deb\nURIs: {}\nSuites: {suite}-backports\nComponents: main\n",
        archive.uri
    );
    if let Some(keys) = archive.signed_by {
        text.push_str(&format!("Signed-By: {keys}\n"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_is_switched_off_is_none_and_written_out_keys_are_kept() {
        let text = "Enabled: no\nTypes: deb\nURIs: http://off\nSuites: bookworm\nComponents: main\n\n\
            Types: deb\nURIs: http://on\nSuites: bookworm\nComponents: main\nSigned-By:\n -----BEGIN\n .\n abc\n";
        let found = stanzas(text, "bookworm");
        assert_eq!(
            found,
            Some(Archive {
                uri: "http://on".into(),
                signed_by: Some("\n -----BEGIN\n .\n abc".into()),
            })
        );
    }

    #[test]
    fn an_archive_is_found_in_both_forms_of_sources() {
        let text = "Types: deb\n# x\nURIs: http://a/debian\nSuites: bookworm bookworm-updates\nComponents: main\nSigned-By: /k.gpg\n\nTypes: deb\nURIs: http://b\nSuites: other\nComponents: main\n";
        let wanted = Archive {
            uri: "http://a/debian".into(),
            signed_by: Some("/k.gpg".into()),
        };
        assert_eq!(stanzas(text, "bookworm"), Some(wanted.clone()));
        assert_eq!(stanzas(text, "trixie"), None);
        let line = "# deb http://x bookworm main\ndeb [arch=amd64 signed-by=/k.gpg] http://a/debian bookworm main contrib\n";
        assert_eq!(one_line(line, "bookworm"), Some(wanted));
        assert_eq!(one_line("deb-src http://a bookworm main", "bookworm"), None);
    }
}
