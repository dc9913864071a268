//! Whether a merge of one image into another was begun: part of what the upper
//! one holds is in the lower one too.
//!
//! A merge copies from the lowest address on, so the first clusters that the
//! upper image holds are the first that the lower one gets.
//!
//! Invariants: reads only, and never much: a bounded number of clusters; where
//! they cannot be compared (compressed, all zero), they say nothing.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path};

use serde::Deserialize;

use crate::{
    error::{Error, Fault},
    image,
};

/// Bytes that are compared at each place: a cluster, as QEMU makes them.
const CLUSTER: u64 = 64 * 1024;
/// Clusters that are compared from the lowest address on.
const FIRST: usize = 16;
/// Clusters that are compared all over what was looked at: the guest may have
/// written the first ones anew since.
const SPREAD: usize = 32;
/// The first stretch of addresses that is looked at; each further one is four
/// times as long.
const STRETCH: u64 = 256 << 20;

/// One extent of an image, as `qemu-img map` tells it.
#[derive(Debug, Deserialize)]
struct Extent {
    start: u64,
    length: u64,
    /// 0 is the image itself.
    depth: u32,
    data: bool,
    zero: bool,
    /// Where it lies in the file; absent for compressed data.
    offset: Option<u64>,
}

impl Extent {
    /// Data that lies in the image itself, as it is.
    fn is_own(&self) -> bool {
        self.depth == 0 && self.data && !self.zero && self.offset.is_some()
    }
}

/// Whether part of what `upper` holds is in `lower` too.
///
/// # Errors
/// When one of them cannot be read.
pub async fn shares_data(upper: &Path, lower: &Path) -> Result<bool, Error> {
    let size = image::info(upper, None).await?.virtual_size;
    let (mut start, mut length) = (0_u64, STRETCH);
    while start < size {
        let above = extents(upper, start, length).await?;
        let clusters = chosen(&above);
        if !clusters.is_empty() {
            let below = extents(lower, start, length).await?;
            let (upper, lower) = (upper.to_owned(), lower.to_owned());
            let compared =
                tokio::task::spawn_blocking(move || compare(&upper, &lower, &below, &clusters))
                    .await;
            let equal = compared
                .map_err(std::io::Error::other)
                .and_then(|it| it)
                .map_err(|error| {
                    Error::new(
                        "compare images with",
                        "what they stand on",
                        Fault::malformed(error),
                    )
                })?;
            // One alone may be chance.
            return Ok(equal > 1);
        }
        start = start.saturating_add(length);
        length = length.saturating_mul(4);
    }
    Ok(false)
}

/// Places to compare: address and offset in the upper file.
fn chosen(extents: &[Extent]) -> Vec<(u64, u64)> {
    let clusters: Vec<(u64, u64)> = extents
        .iter()
        .filter(|extent| extent.is_own())
        .flat_map(|extent| {
            let offset = extent.offset.unwrap_or_default();
            (0..extent.length / CLUSTER)
                .map(move |at| (extent.start + at * CLUSTER, offset + at * CLUSTER))
                .take(1 << 16)
        })
        .collect();
    let step = (clusters.len() / SPREAD).max(1);
    clusters
        .iter()
        .enumerate()
        .filter(|(at, _)| *at < FIRST || at % step == 0)
        .map(|(_, cluster)| *cluster)
        .collect()
}

/// How many of the chosen clusters are alike in both files.
fn compare(
    upper: &Path,
    lower: &Path,
    below: &[Extent],
    clusters: &[(u64, u64)],
) -> std::io::Result<usize> {
    let (upper, lower) = (File::open(upper)?, File::open(lower)?);
    let size = usize::try_from(CLUSTER).unwrap_or_default();
    let (mut one, mut other) = (vec![0; size], vec![0; size]);
    let mut equal = 0;
    for (address, offset) in clusters {
        let found = below.iter().find(|extent| {
            extent.is_own()
                && extent.start <= *address
                && address + CLUSTER <= extent.start + extent.length
        });
        let Some(extent) = found else { continue };
        let at = extent.offset.unwrap_or_default() + (address - extent.start);
        upper.read_exact_at(&mut one, *offset)?;
        lower.read_exact_at(&mut other, at)?;
        if one.iter().all(|byte| *byte == 0) {
            continue;
        }
        equal += usize::from(one == other);
    }
    Ok(equal)
}

async fn extents(path: &Path, start: u64, length: u64) -> Result<Vec<Extent>, Error> {
    let json = image::run(
        "read the extents of",
        path,
        image::READ,
        &[
            "map",
            "-U",
            "--output=json",
            &format!("--start-offset={start}"),
            &format!("--max-length={length}"),
            &path.to_string_lossy(),
        ],
    )
    .await?;
    image::understand(path, &json)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn tool(program: &str, arguments: &[&str]) {
        let done = Command::new(program).args(arguments).output().unwrap();
        assert!(done.status.success(), "{program} {arguments:?}");
    }

    #[tokio::test]
    async fn what_was_copied_down_in_part_is_told_from_what_was_not() {
        let folder = std::env::temp_dir().join(format!("vmsnap-overlap-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let at = |name: &str| folder.join(name);
        let shown = |name: &str| at(name).display().to_string();
        tool(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", &shown("base"), "1G"],
        );
        let write = |image: &str, words: &str| {
            tool("qemu-io", &["-f", "qcow2", "-c", words, &shown(image)]);
        };
        write("base", "write -P 1 0 4M");
        tool(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                "-b",
                &shown("base"),
                &shown("top"),
            ],
        );
        // Nothing in it yet, then other data at the same place and far away.
        assert!(!shares_data(&at("top"), &at("base")).await.unwrap());
        write("top", "write -P 2 1M 2M");
        write("top", "write -P 0 3M 1M");
        write("top", "write -P 3 900M 1M");
        assert!(!shares_data(&at("top"), &at("base")).await.unwrap());
        // As a merge begins.
        write("base", "write -P 2 1M 256k");
        assert!(shares_data(&at("top"), &at("base")).await.unwrap());
        std::fs::remove_dir_all(folder).unwrap();
    }
}
