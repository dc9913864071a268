//! Image files: their headers read here where that is certain, and everything
//! else through `qemu-img`.
//!
//! Invariants
//! - A reading is of this moment: headers are read anew each time. Only that a
//!   file was found to be raw is remembered, for as long as it is untouched.
//! - Reads never take the image's lock (`-U`), so they work on images that a
//!   guest has open.
//! - An image is read in the format in which QEMU opens it: the one that is
//!   given, or that the image on top of it names. What a guest writes into a raw
//!   disk is then never taken for a header.
//! - Nothing goes through a shell; each call has a deadline; paths never look
//!   like options.

use std::{
    collections::{HashMap, HashSet},
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::Path,
    process::Stdio,
    sync::{Arc, LazyLock, Mutex},
    time::Duration,
};

use serde::Deserialize;
use tokio::{process::Command, sync::Semaphore};

use crate::{
    connection::lock,
    counters,
    error::{Error, ErrorKind, Fault, What},
    qcow2::{self, Found},
    stamp::Stamp,
};

/// How long a reading call may take.
pub(crate) const READ: Duration = Duration::from_secs(20);
/// How long a changing call may take: growing is quick, shrinking is not.
const CHANGE: Duration = Duration::from_secs(600);
/// Readings at a time; one on a file system that hangs keeps its place, and
/// takes no more than these from everybody else's blocking work.
const READERS: usize = 64;
/// Files that are remembered to be raw.
const REMEMBERED: usize = 4096;

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
    absolute(operation, path)?;
    counters::add(&counters::QEMU_IMG);
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

fn absolute(operation: &'static str, path: &Path) -> Result<(), Error> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(Error::new(
        operation,
        format!("image {}", path.display()),
        Fault::new(ErrorKind::InvalidArgument, "its path is not absolute"),
    ))
}

impl qcow2::Bytes for File {
    fn length(&self) -> u64 {
        self.metadata().map_or(0, |metadata| metadata.len())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }
}

/// What a look at a file without QEMU yields.
enum Look {
    /// An image, and which file it is.
    Image(ImageInfo, FileId),
    /// There is no such file.
    Missing,
    /// Only QEMU can tell.
    Unsure,
}

/// Device and inode.
type FileId = (u64, u64);

/// Files without a format of their own, for as long as they are untouched.
static RAW: LazyLock<Mutex<HashMap<String, Stamp>>> = LazyLock::new(Mutex::default);

fn look(path: &str, format: Option<&str>) -> Look {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Look::Missing,
        // Opening a device may do something to it.
        Ok(metadata) if metadata.is_file() => {}
        _ => return Look::Unsure,
    }
    look_into(path, format).unwrap_or(Look::Unsure)
}

fn look_into(path: &str, format: Option<&str>) -> io::Result<Look> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Ok(Look::Unsure);
    }
    let raw = match format {
        Some("raw") => true,
        Some("qcow2") => false,
        Some(_) => return Ok(Look::Unsure),
        None => Stamp::of(&metadata)
            .is_some_and(|stamp| lock(&RAW).get(path).is_some_and(|it| *it == stamp)),
    };
    counters::add(&counters::HEADERS);
    let mut image = ImageInfo {
        path: path.to_owned(),
        format: "raw".to_owned(),
        // QEMU counts in sectors.
        virtual_size: metadata.len().next_multiple_of(512),
        actual_size: metadata.blocks().saturating_mul(512),
        backing_path: None,
        backing_format: None,
        snapshots: Vec::new(),
        compat: None,
    };
    if !raw {
        let Found::Image(header) = qcow2::read(&file)? else {
            return Ok(Look::Unsure);
        };
        image.format = "qcow2".to_owned();
        image.virtual_size = header.virtual_size;
        image.compat = Some(if header.version == 2 { "0.10" } else { "1.1" }.to_owned());
        image.snapshots = header.snapshots;
        if let Some(name) = header.backing {
            let Some(backing) = backing_path(path, &name) else {
                return Ok(Look::Unsure);
            };
            image.backing_path = Some(backing);
            image.backing_format = header.backing_format;
        }
    }
    Ok(Look::Image(image, (metadata.dev(), metadata.ino())))
}

/// Where QEMU looks for a backing file: a relative name counts from the folder
/// of the image that names it, as that image's own path is written. `None` when
/// the name is not simply that of a file (`json:`, `nbd:`, and so on).
fn backing_path(image: &str, name: &str) -> Option<String> {
    if name.starts_with('/') {
        return Some(name.to_owned());
    }
    let has_protocol = name
        .find([':', '/'])
        .is_some_and(|at| name[at..].starts_with(':'));
    if has_protocol {
        return None;
    }
    let folder = &image[..=image.rfind('/')?];
    Some(format!("{folder}{name}"))
}

/// Runs a look at files where it may block.
async fn blocking<T: Send + 'static>(
    operation: &'static str,
    path: &Path,
    work: impl FnOnce(&str) -> T + Send + 'static,
) -> Result<Option<T>, Error> {
    static PLACES: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(READERS)));
    absolute(operation, path)?;
    let Some(path_text) = path.to_str().map(str::to_owned) else {
        return Ok(None);
    };
    let looked = async {
        let place = PLACES.clone().acquire_owned().await.ok()?;
        tokio::task::spawn_blocking(move || {
            let done = work(&path_text);
            drop(place);
            done
        })
        .await
        .ok()
    };
    tokio::time::timeout(READ, looked).await.map_err(|_| {
        Error::new(
            operation,
            format!("image {}", path.display()),
            Fault::new(ErrorKind::Overdue { after: READ }, ""),
        )
    })
}

fn missing(operation: &'static str, path: &Path, file: &str) -> Error {
    Error::new(
        operation,
        format!("image {}", path.display()),
        Fault::new(
            ErrorKind::MissingFile,
            format!("Could not open '{file}': No such file or directory"),
        ),
    )
}

/// One image, in the format in which QEMU opens it; found out when that is not
/// known.
///
/// # Errors
/// When it is not there or not readable.
pub async fn info(path: &Path, format: Option<&str>) -> Result<ImageInfo, Error> {
    let wanted = format.map(str::to_owned);
    let looked = blocking("read", path, move |path| look(path, wanted.as_deref())).await?;
    match looked {
        Some(Look::Image(image, _)) => return Ok(image),
        Some(Look::Missing) => return Err(missing("read", path, &text(path))),
        Some(Look::Unsure) | None => {}
    }
    let before = remembering(path, format).await;
    let path_text = text(path);
    let mut arguments = vec!["info", "-U", "--output=json"];
    if let Some(format) = format {
        arguments.extend(["-f", format]);
    }
    arguments.push(&path_text);
    let json = run("read", path, READ, &arguments).await?;
    let image = ImageInfo::from(understand::<RawInfo>(path, &json)?);
    remember(&image, before);
    Ok(image)
}

/// The stamp of a file whose format has to be found out.
async fn remembering(path: &Path, format: Option<&str>) -> Option<Stamp> {
    if format.is_some() {
        return None;
    }
    let of = |path: &str| Stamp::of(&std::fs::metadata(path).ok()?);
    blocking("read", path, of).await.ok().flatten().flatten()
}

/// Remembers a raw file by the stamp that it had before it was looked into.
fn remember(image: &ImageInfo, before: Option<Stamp>) {
    if let Some(stamp) = before
        && image.format == "raw"
    {
        let mut all = lock(&RAW);
        if all.len() >= REMEMBERED {
            all.clear();
        }
        all.insert(image.path.clone(), stamp);
    }
}

/// How far a chain was walked.
enum Walk {
    /// To its end.
    Whole,
    /// This file is not there.
    Missing(String),
    /// From this file on, in this format, only QEMU can tell.
    Unsure(String, Option<String>),
    /// It comes back to itself.
    Circular,
}

fn walk(top: &str, format: Option<String>) -> (Vec<ImageInfo>, Walk) {
    let (mut chain, mut seen) = (Vec::new(), HashSet::new());
    let mut next = (top.to_owned(), format);
    loop {
        let (path, format) = next;
        match look(&path, format.as_deref()) {
            Look::Missing => return (chain, Walk::Missing(path)),
            Look::Unsure => return (chain, Walk::Unsure(path, format)),
            Look::Image(_, file) if !seen.insert(file) => return (chain, Walk::Circular),
            Look::Image(image, _) => {
                let below = image.backing_path.clone();
                next = (String::new(), image.backing_format.clone());
                chain.push(image);
                match below {
                    Some(path) => next.0 = path,
                    None => return (chain, Walk::Whole),
                }
            }
        }
    }
}

/// An image and all that it stands on, the uppermost first. The uppermost is
/// read in the given format, each other in the one that the image above names;
/// where none is named, it is found out.
///
/// # Errors
/// When one of them is not there or not readable.
pub async fn chain(path: &Path, format: Option<&str>) -> Result<Vec<ImageInfo>, Error> {
    match reach(path, format).await {
        (chain, None) => Ok(chain),
        (_, Some(error)) => Err(error),
    }
}

/// The same, as far as it can be read: what was read before the error is as
/// true as without it.
pub async fn reach(path: &Path, format: Option<&str>) -> (Vec<ImageInfo>, Option<Error>) {
    const OPERATION: &str = "read the chain of";
    let given = format.map(str::to_owned);
    let walked = blocking(OPERATION, path, {
        let format = given.clone();
        move |path| walk(path, format)
    });
    let (mut chain, from, format) = match walked.await {
        Err(error) => return (Vec::new(), Some(error)),
        Ok(Some((chain, Walk::Whole))) => return (chain, None),
        Ok(Some((chain, Walk::Missing(file)))) => {
            return (chain, Some(missing(OPERATION, path, &file)));
        }
        Ok(Some((chain, Walk::Unsure(from, format)))) => (chain, from, format),
        // QEMU has the words for it.
        Ok(Some((_, Walk::Circular)) | None) => (Vec::new(), text(path).into_owned(), given),
    };
    let before = remembering(Path::new(&from), format.as_deref()).await;
    let mut arguments = vec!["info", "-U", "--backing-chain", "--output=json"];
    if let Some(format) = &format {
        arguments.extend(["-f", format]);
    }
    arguments.push(&from);
    let told = run(OPERATION, path, READ, &arguments).await;
    match told.and_then(|json| understand::<Vec<RawInfo>>(path, &json)) {
        Err(error) => (chain, Some(error)),
        Ok(raw) => {
            let rest: Vec<ImageInfo> = raw.into_iter().map(ImageInfo::from).collect();
            if let Some(image) = rest.first() {
                remember(image, before);
            }
            chain.extend(rest);
            (chain, None)
        }
    }
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
pub async fn resize(path: &Path, format: &str, bytes: u64, shrink: bool) -> Result<(), Error> {
    let (path_text, size) = (text(path), bytes.to_string());
    let mut arguments = vec!["resize", "-q", "-f", format];
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
#[path = "image_tests.rs"]
mod tests;
