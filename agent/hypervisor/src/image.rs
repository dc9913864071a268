//! Image files, through `qemu-img`.
//!
//! Invariants: reads never take the image's lock (`-U`), so they work on images
//! that a guest has open; nothing goes through a shell; each call has a
//! deadline; paths never look like options.

use std::{path::Path, process::Stdio, time::Duration};

use serde::Deserialize;
use tokio::process::Command;

use crate::error::{Error, ErrorKind, Fault, What};

/// How long a reading call may take.
pub(crate) const READ: Duration = Duration::from_secs(20);
/// How long a changing call may take: growing is quick, shrinking is not.
const CHANGE: Duration = Duration::from_secs(600);

/// An internal snapshot of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSnapshot {
    /// QEMU's id.
    pub id: String,
    /// Name.
    pub name: String,
    /// Bytes of memory state in it.
    pub vm_state_size: u64,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// Path.
    pub path: String,
    /// Format.
    pub format: String,
    /// Size that a guest would see.
    pub virtual_size: u64,
    /// Bytes that it takes.
    pub actual_size: u64,
    /// Its backing file, as an absolute path.
    pub backing_path: Option<String>,
    /// Its backing file's format.
    pub backing_format: Option<String>,
    /// Internal snapshots.
    pub snapshots: Vec<ImageSnapshot>,
    /// qcow2: compatibility level.
    pub compat: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct RawInfo {
    filename: String,
    format: String,
    virtual_size: u64,
    #[serde(default)]
    actual_size: u64,
    full_backing_filename: Option<String>,
    backing_filename: Option<String>,
    backing_filename_format: Option<String>,
    #[serde(default)]
    snapshots: Vec<RawSnapshot>,
    format_specific: Option<RawSpecific>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct RawSnapshot {
    id: String,
    name: String,
    #[serde(default)]
    vm_state_size: u64,
}

#[derive(Deserialize)]
struct RawSpecific {
    data: Option<RawSpecificData>,
}

#[derive(Deserialize)]
struct RawSpecificData {
    compat: Option<String>,
}

impl From<RawInfo> for ImageInfo {
    fn from(raw: RawInfo) -> Self {
        let data = raw.format_specific.and_then(|specific| specific.data);
        Self {
            path: raw.filename,
            format: raw.format,
            virtual_size: raw.virtual_size,
            actual_size: raw.actual_size,
            backing_path: raw.full_backing_filename.or(raw.backing_filename),
            backing_format: raw.backing_filename_format,
            snapshots: raw
                .snapshots
                .into_iter()
                .map(|snapshot| ImageSnapshot {
                    id: snapshot.id,
                    name: snapshot.name,
                    vm_state_size: snapshot.vm_state_size,
                })
                .collect(),
            compat: data.and_then(|data| data.compat),
        }
    }
}

fn classify(words: &str) -> ErrorKind {
    let says = |needle: &str| words.contains(needle);
    if says("No such file or directory") {
        ErrorKind::MissingFile
    } else if says("No space left on device") {
        ErrorKind::NoSpace
    } else if says("lock") && says("another process") {
        ErrorKind::ImageLocked
    } else if says("Permission denied") || says("Read-only file system") {
        ErrorKind::Denied
    } else if says("Can't find the snapshot") || says("snapshot not found") {
        ErrorKind::NotFound(What::ImageSnapshot)
    } else if says("already exists") {
        ErrorKind::AlreadyExists
    } else {
        ErrorKind::Other
    }
}

pub(crate) async fn run(
    operation: &'static str,
    path: &Path,
    deadline: Duration,
    arguments: &[&str],
) -> Result<Vec<u8>, Error> {
    let failed = |fault| Error::new(operation, format!("image {}", path.display()), fault);
    if !path.is_absolute() {
        return Err(failed(Fault::new(
            ErrorKind::InvalidArgument,
            "its path is not absolute",
        )));
    }
    let mut command = Command::new("qemu-img");
    command
        .args(arguments)
        .stdin(Stdio::null())
        .env("LC_ALL", "C")
        .kill_on_drop(true);
    let output = match tokio::time::timeout(deadline, command.output()).await {
        Err(_) => {
            return Err(failed(Fault::new(
                ErrorKind::Overdue { after: deadline },
                "",
            )));
        }
        Ok(Err(error)) => {
            let words = format!("qemu-img cannot be run: {error}");
            return Err(failed(Fault::new(ErrorKind::Other, words)));
        }
        Ok(Ok(output)) => output,
    };
    if output.status.success() {
        return Ok(output.stdout);
    }
    let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(failed(Fault::new(classify(&words), words)))
}

fn text(path: &Path) -> std::borrow::Cow<'_, str> {
    path.to_string_lossy()
}

pub(crate) fn understand<T: serde::de::DeserializeOwned>(
    path: &Path,
    json: &[u8],
) -> Result<T, Error> {
    serde_json::from_slice(json).map_err(|error| {
        Error::new(
            "understand the description of",
            format!("image {}", path.display()),
            Fault::malformed(error),
        )
    })
}

/// One image.
///
/// # Errors
/// When it is not there or not readable.
pub async fn info(path: &Path) -> Result<ImageInfo, Error> {
    let json = run(
        "read",
        path,
        READ,
        &["info", "-U", "--output=json", &text(path)],
    )
    .await?;
    understand::<RawInfo>(path, &json).map(ImageInfo::from)
}

/// An image and all that it stands on, the uppermost first.
///
/// # Errors
/// When one of them is not there or not readable.
pub async fn chain(path: &Path) -> Result<Vec<ImageInfo>, Error> {
    let json = run(
        "read the chain of",
        path,
        READ,
        &[
            "info",
            "-U",
            "--backing-chain",
            "--output=json",
            &text(path),
        ],
    )
    .await?;
    let raw: Vec<RawInfo> = understand(path, &json)?;
    Ok(raw.into_iter().map(ImageInfo::from).collect())
}

/// Makes an empty qcow2 overlay.
///
/// # Errors
/// When it cannot be made.
pub async fn create_overlay(path: &Path, backing: &Path, format: &str) -> Result<(), Error> {
    run(
        "make",
        path,
        CHANGE,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            format,
            "-b",
            &text(backing),
            &text(path),
        ],
    )
    .await
    .map(|_| ())
}

/// Changes the size of an image that nobody has open.
///
/// # Errors
/// When it is in use, or cannot be changed.
pub async fn resize(path: &Path, bytes: u64, shrink: bool) -> Result<(), Error> {
    let format = info(path).await?.format;
    let (path_text, size) = (text(path), bytes.to_string());
    let mut arguments = vec!["resize", "-q", "-f", &format];
    if shrink {
        arguments.push("--shrink");
    }
    arguments.extend([&*path_text, &size]);
    run("resize", path, CHANGE, &arguments).await.map(|_| ())
}

/// Removes an internal snapshot from an image that nobody has open.
///
/// # Errors
/// When it is in use, or has no such snapshot.
pub async fn remove_snapshot(path: &Path, name: &str) -> Result<(), Error> {
    run(
        "remove an internal snapshot from",
        path,
        CHANGE,
        &["snapshot", "-q", "-d", name, &text(path)],
    )
    .await
    .map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("vmsnap-image-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    #[tokio::test]
    async fn a_chain_is_read_from_the_images_own_headers() {
        let folder = folder("chain");
        let (base, top) = (folder.join("base.qcow2"), folder.join("top.qcow2"));
        run(
            "make",
            &base,
            READ,
            &["create", "-q", "-f", "qcow2", &text(&base), "1M"],
        )
        .await
        .unwrap();
        create_overlay(&top, &base, "qcow2").await.unwrap();
        resize(&top, 2 << 20, false).await.unwrap();
        let chain = chain(&top).await.unwrap();
        let sizes: Vec<u64> = chain.iter().map(|image| image.virtual_size).collect();
        assert_eq!(sizes, [2 << 20, 1 << 20]);
        assert_eq!(chain[0].backing_path.as_deref(), base.to_str());
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[tokio::test]
    async fn a_missing_image_and_a_path_that_is_not_absolute_are_told_apart() {
        let missing = info(Path::new("/nonexistent/x.qcow2")).await.unwrap_err();
        assert_eq!(*missing.kind(), ErrorKind::MissingFile);
        let relative = info(Path::new("--help")).await.unwrap_err();
        assert_eq!(*relative.kind(), ErrorKind::InvalidArgument);
    }
}
