//! Readings of real images, with `qemu-img` as the witness.

use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
};

use super::*;

/// A folder of images; gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let path = std::env::temp_dir().join(format!(
            "vmsnap-image-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        fs::create_dir_all(path.join("sub")).unwrap();
        Self(path)
    }

    /// Runs `qemu-img` in the folder, so that names may be relative.
    fn qemu_img(&self, arguments: &[&str]) {
        let output = std::process::Command::new("qemu-img")
            .args(arguments)
            .current_dir(&self.0)
            .output()
            .unwrap();
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {words}");
    }

    fn create(&self, options: &str, name: &str) -> PathBuf {
        match options {
            "" => self.qemu_img(&["create", "-q", "-f", "qcow2", name, "3M"]),
            _ => self.qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, "3M"]),
        }
        self.0.join(name)
    }

    fn overlay(&self, backing: &str, format: &str, name: &str) -> PathBuf {
        self.qemu_img(&[
            "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, name, "4M",
        ]);
        self.0.join(name)
    }

    /// An overlay that does not say of which format its backing file is; today's
    /// `qemu-img` makes none.
    fn overlay_without_format(&self, backing: &str, name: &str) -> PathBuf {
        let path = self.overlay(backing, "raw", name);
        let mut bytes = fs::read(&path).unwrap();
        let extension = [0xE2, 0x79, 0x2A, 0xCA];
        let at = bytes.windows(4).position(|four| four == extension).unwrap();
        // A kind of extension that nobody knows.
        bytes[at..at + 4].copy_from_slice(&[1, 2, 3, 4]);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The chain as `qemu-img` tells it.
async fn witness(path: &Path, format: Option<&str>) -> Result<Vec<ImageInfo>, Error> {
    let path_text = text(path);
    let mut arguments = vec!["info", "-U", "--backing-chain", "--output=json"];
    if let Some(format) = format {
        arguments.extend(["-f", format]);
    }
    arguments.push(&path_text);
    let json = run("witness", path, READ, &arguments).await?;
    let raw: Vec<RawInfo> = understand(path, &json)?;
    Ok(raw.into_iter().map(ImageInfo::from).collect())
}

fn natively(path: &Path, format: Option<&str>) -> bool {
    let walked = walk(path.to_str().unwrap(), format.map(str::to_owned));
    matches!(walked, (_, Walk::Whole))
}

/// Holds a reading against the witness; tells the chain.
async fn agrees(path: &Path, format: Option<&str>) -> Vec<ImageInfo> {
    let (ours, theirs) = (chain(path, format).await, witness(path, format).await);
    let shown = path.display();
    match (ours, theirs) {
        (Ok(ours), Ok(theirs)) => {
            assert_eq!(ours, theirs, "{shown}");
            let alone = info(path, format).await.unwrap();
            assert_eq!(alone, ours[0], "{shown}");
            ours
        }
        (Err(ours), Err(theirs)) => {
            assert_eq!(ours.kind(), theirs.kind(), "{shown}");
            Vec::new()
        }
        (ours, theirs) => panic!("{shown}: {ours:?}, but the witness {theirs:?}"),
    }
}

/// The same, for an image that needs no QEMU to be read.
async fn agrees_natively(path: &Path, format: Option<&str>) -> Vec<ImageInfo> {
    assert!(natively(path, format), "{} needs QEMU", path.display());
    agrees(path, format).await
}

#[tokio::test]
async fn every_kind_of_qcow2_header_is_read_as_qemu_reads_it() {
    let folder = Folder::new();
    let options = [
        "",
        "compat=0.10",
        "compat=v3",
        "cluster_size=512",
        "cluster_size=4k,compat=0.10",
        "cluster_size=2M",
        "cluster_size=2M,compat=0.10",
        "extended_l2=on",
        "compression_type=zstd",
        "lazy_refcounts=on",
        "refcount_bits=1",
        "refcount_bits=64",
        "preallocation=metadata",
        "preallocation=full",
    ];
    for (number, options) in options.into_iter().enumerate() {
        let path = folder.create(options, &format!("{number}.qcow2"));
        let read = agrees_natively(&path, None).await;
        assert_eq!(read[0].virtual_size, 3 << 20, "{options}");
        agrees_natively(&path, Some("qcow2")).await;
    }
    let with_bitmap = folder.create("", "bitmap.qcow2");
    folder.qemu_img(&["bitmap", "--add", "bitmap.qcow2", "changes"]);
    agrees_natively(&with_bitmap, None).await;
    let grown = folder.create("", "grown.qcow2");
    folder.qemu_img(&["resize", "-q", "grown.qcow2", "5G"]);
    agrees_natively(&grown, None).await;
    let empty = folder.0.join("empty.qcow2");
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "empty.qcow2", "0"]);
    agrees_natively(&empty, None).await;
}

#[tokio::test]
async fn internal_snapshots_of_any_name_are_read_as_qemu_reads_them() {
    let folder = Folder::new();
    let long = "x".repeat(200);
    let names = [
        "plain",
        "before upgrade",
        "it's \"quoted\" \\ $HOME",
        "Schnappschuß 名前 🦀",
        "a/b/../c",
        "two\nlines\tand a tab",
        "-d",
        "1",
        &long,
    ];
    for options in ["", "compat=0.10", "cluster_size=512"] {
        let file = format!("s{}.qcow2", options.len());
        let path = folder.create(options, &file);
        for (number, name) in names.iter().enumerate() {
            folder.qemu_img(&["snapshot", "-q", "-c", name, &file]);
            let read = agrees_natively(&path, None).await;
            assert_eq!(read[0].snapshots.len(), number + 1);
        }
        folder.qemu_img(&["snapshot", "-q", "-d", "plain", &file]);
        let read = agrees_natively(&path, None).await;
        let read: Vec<&str> = read[0].snapshots.iter().map(|one| &*one.name).collect();
        assert_eq!(read, names[1..]);
    }
}

#[tokio::test]
async fn chains_are_followed_as_qemu_follows_them() {
    let folder = Folder::new();
    let base = folder.create("", "base.qcow2");
    folder.qemu_img(&["create", "-q", "-f", "raw", "raw.img", "1M"]);
    let absolute = base.to_str().unwrap();
    let below = folder.0.join("sub/../base.qcow2");
    let tops = [
        folder.overlay(absolute, "qcow2", "absolute.qcow2"),
        folder.overlay("base.qcow2", "qcow2", "relative.qcow2"),
        folder.overlay("../base.qcow2", "qcow2", "sub/up.qcow2"),
        folder.overlay("sub/up.qcow2", "qcow2", "down.qcow2"),
        folder.overlay("./sub/.././base.qcow2", "qcow2", "crooked.qcow2"),
        folder.overlay(below.to_str().unwrap(), "qcow2", "other.qcow2"),
        folder.overlay_without_format("base.qcow2", "unnamed.qcow2"),
        folder.overlay("raw.img", "raw", "over-raw.qcow2"),
        // Raw for who opens it so, whatever is in it.
        folder.overlay("base.qcow2", "raw", "as-raw.qcow2"),
        folder.overlay("absolute.qcow2", "qcow2", "three.qcow2"),
    ];
    for top in &tops {
        assert!(agrees_natively(top, None).await.len() >= 2);
    }
    std::os::unix::fs::symlink(folder.0.join("sub/up.qcow2"), folder.0.join("link.qcow2")).unwrap();
    // Counted from where the link is: `../base.qcow2` is not there.
    assert!(agrees(&folder.0.join("link.qcow2"), None).await.is_empty());
    std::os::unix::fs::symlink(&base, folder.0.join("sub/base.qcow2")).unwrap();
    let over_link = folder.overlay("sub/base.qcow2", "qcow2", "over-link.qcow2");
    assert_eq!(agrees_natively(&over_link, None).await.len(), 2);
}

#[tokio::test]
async fn what_only_qemu_can_tell_is_asked_of_it() {
    let folder = Folder::new();
    let base = folder.create("", "base.qcow2");
    let json = format!(
        r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{}"}}}}"#,
        base.display()
    );
    let tops = [
        folder.overlay(&json, "qcow2", "json.qcow2"),
        folder.overlay(&format!("file:{}", base.display()), "qcow2", "file.qcow2"),
        folder.overlay("sub/json", "qcow2", "missing.qcow2"),
        folder.overlay("second.qcow2", "qcow2", "first.qcow2"),
        folder.overlay("first.qcow2", "qcow2", "second.qcow2"),
        folder.overlay_without_format("raw.img", "probed.qcow2"),
        folder.create("data_file=data.raw", "data.qcow2"),
        folder.create("data_file=data2.raw,data_file_raw=on", "data-raw.qcow2"),
        folder.file("raw.img", &[7; 1_000]),
        folder.file("nothing.img", b""),
        folder.file("text", b"QFI\xfb and no more"),
        folder.0.join("absent.qcow2"),
    ];
    for top in &tops {
        // An image stood on it before: what was found then is forgotten by a write.
        if top.ends_with("raw.img") {
            folder.file("raw.img", &[7; 1_000]);
        }
        assert!(!natively(top, None), "{}", top.display());
        agrees(top, None).await;
    }
    for format in ["vmdk", "vdi", "vpc", "qcow"] {
        folder.qemu_img(&["create", "-q", "-f", format, format, "1M"]);
        let read = agrees(&folder.0.join(format), None).await;
        assert_eq!(read[0].format, format);
        agrees(&folder.0.join(format), Some(format)).await;
    }
    assert_eq!(agrees(&tops[0], None).await.len(), 2);
}

#[tokio::test]
async fn a_file_that_is_opened_as_raw_is_never_read_as_an_image() {
    let folder = Folder::new();
    let base = folder.create("", "base.qcow2");
    let forged = folder.overlay(base.to_str().unwrap(), "qcow2", "forged.img");
    let read = agrees_natively(&forged, Some("raw")).await;
    assert_eq!((read.len(), &*read[0].format), (1, "raw"));
    for bytes in [0, 1, 511, 512, 1_000, 70_000] {
        let path = folder.file("raw.img", &vec![1; bytes]);
        agrees_natively(&path, Some("raw")).await;
    }
    let no_image = folder.file("no.qcow2", &[1; 1_000]);
    assert!(agrees(&no_image, Some("qcow2")).await.is_empty());
}

#[tokio::test]
async fn an_image_that_is_cut_off_anywhere_is_read_as_qemu_reads_it() {
    let folder = Folder::new();
    folder.create("", "base.qcow2");
    let whole = folder.overlay("base.qcow2", "qcow2", "top.qcow2");
    folder.qemu_img(&["snapshot", "-q", "-c", "one", "top.qcow2"]);
    let bytes = fs::read(&whole).unwrap();
    let mut lengths = vec![0, 3, 4, 71, 72, 100, 104, 112, 300, 511, 513, 65_535];
    lengths.extend((1..=bytes.len() / 65_536).map(|cluster| cluster * 65_536));
    lengths.extend([bytes.len() - 1, bytes.len()]);
    for length in lengths {
        let path = folder.file("cut.qcow2", &bytes[..length.min(bytes.len())]);
        agrees(&path, None).await;
        agrees(&path, Some("qcow2")).await;
    }
}

#[tokio::test]
async fn a_file_that_was_found_to_be_raw_is_looked_at_again_once_it_is_touched() {
    let folder = Folder::new();
    let path = folder.file("disk.img", &[0; 4_096]);
    tokio::time::sleep(crate::stamp::TICK * 2).await;
    let first = info(&path, None).await.unwrap();
    assert_eq!((&*first.format, first.virtual_size), ("raw", 4_096));
    assert!(natively(&path, None), "it is not remembered");
    assert_eq!(info(&path, None).await.unwrap(), first);
    let image = folder.create("", "image.qcow2");
    fs::write(&path, fs::read(image).unwrap()).unwrap();
    assert_eq!(agrees(&path, None).await[0].format, "qcow2");
    fs::write(&path, [0; 8_192]).unwrap();
    assert_eq!(info(&path, None).await.unwrap().virtual_size, 8_192);
    // Touched just now: its stamps tell nothing yet.
    assert!(!natively(&path, None), "it is remembered too early");
}

#[tokio::test]
async fn a_missing_image_and_a_path_that_is_not_absolute_are_told_apart() {
    let missing = info(Path::new("/nonexistent/x.qcow2"), None).await;
    assert_eq!(*missing.unwrap_err().kind(), ErrorKind::MissingFile);
    let relative = info(Path::new("--help"), None).await.unwrap_err();
    assert_eq!(*relative.kind(), ErrorKind::InvalidArgument);
}

#[tokio::test]
async fn what_is_no_regular_file_neither_hangs_nor_passes_for_an_image() {
    let folder = Folder::new();
    let fifo = folder.0.join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.unwrap().success());
    assert!(!natively(&fifo, Some("raw")) && !natively(&fifo, Some("qcow2")));
    assert!(!natively(&folder.0, None));
    agrees(&folder.0, Some("qcow2")).await;
}

#[tokio::test]
async fn overlays_are_made_and_grown() {
    let folder = Folder::new();
    let base = folder.create("", "base.qcow2");
    let top = folder.0.join("top.qcow2");
    create_overlay(&top, &base, "qcow2").await.unwrap();
    resize(&top, "qcow2", 8 << 20, false).await.unwrap();
    let chain = agrees_natively(&top, None).await;
    let sizes: Vec<u64> = chain.iter().map(|image| image.virtual_size).collect();
    assert_eq!(sizes, [8 << 20, 3 << 20]);
}
