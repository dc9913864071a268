//! The guest: a distribution's kernel, a busybox initramfs with the guest agent
//! and an ssh server, and a small ext4 disk.
//!
//! Invariants: packages are downloaded and unpacked, never installed; which
//! modules are needed is read from the kernel's own lists, because names, built-in
//! ones and compression differ between distributions; the image is built again
//! only when one of its inputs changed.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    command::{command, succeed},
    paths,
};

const INIT: &str = include_str!("image/init");
const UDHCPC: &str = include_str!("image/udhcpc.sh");
const SHUTDOWN: &str = include_str!("image/shutdown");
const HOOK: &str = include_str!("image/fsfreeze-hook");
/// Modules that the guest needs, with all that they need.
const MODULES: [&str; 5] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "ext4",
];
/// Raised when this file builds something else from the same inputs.
const BUILDER: u32 = 4;

/// The files of a built image.
#[derive(Debug, Clone)]
pub struct Image {
    /// Kernel.
    pub kernel: PathBuf,
    /// Initial ramdisk.
    pub initrd: PathBuf,
    /// Empty data disk, qcow2.
    pub data: PathBuf,
    /// ssh key that root in the guest accepts.
    pub key: PathBuf,
}

impl Image {
    /// Builds the image, or finds it built.
    ///
    /// # Errors
    /// When a tool is missing or a package cannot be had.
    pub fn build() -> Result<Self> {
        // Two labs that start side by side build it once.
        fs::create_dir_all(paths::kept())?;
        let alone = fs::File::create(paths::kept().join("lab-image.lock"))?;
        alone
            .lock()
            .context("the image's folder cannot be locked")?;
        let folder = paths::kept().join("lab-image");
        let image = Self {
            kernel: folder.join("vmlinuz"),
            initrd: folder.join("initrd.img"),
            data: folder.join("data.qcow2"),
            key: folder.join("key"),
        };
        let wanted = format!("{BUILDER}\n{INIT}{UDHCPC}{SHUTDOWN}{HOOK}");
        let stamp = folder.join("built-from");
        if fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) && image.initrd.exists() {
            return Ok(image);
        }
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder)?;
        let unpacked = folder.join("packages");
        let boot = if from_packages() {
            let kernel = kernel_packages()?;
            for package in kernel
                .iter()
                .map(String::as_str)
                .chain(["qemu-guest-agent", "busybox-static"])
            {
                unpack(&folder, &unpacked, package)?;
            }
            newest(&unpacked.join("boot"), "vmlinuz-")?
        } else {
            // Elsewhere the host's own kernel and tools serve the guest too.
            newest(Path::new("/boot"), "vmlinuz-").or_else(|_| {
                Ok::<_, anyhow::Error>(newest(Path::new("/lib/modules"), "")?.join("vmlinuz"))
            })?
        };
        fs::copy(&boot, &image.kernel)?;
        succeed(
            &mut command("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg_path(&image.key),
        )?;
        sshd(&folder)?;
        let root = folder.join("root");
        layout(&root, &unpacked, &image.key)?;
        pack(&root, &image.initrd)?;
        let raw = folder.join("data.raw");
        fs::File::create(&raw)?.set_len(64 << 20)?;
        succeed(&mut command(tool("mkfs.ext4")?, ["-q", "-F"]).arg_path(&raw))?;
        succeed(
            &mut command("qemu-img", ["convert", "-f", "raw", "-O", "qcow2"])
                .arg_path(&raw)
                .arg_path(&image.data),
        )?;
        fs::remove_file(&raw)?;
        let _ = fs::remove_dir_all(&unpacked);
        fs::remove_dir_all(&root)?;
        fs::write(stamp, wanted)?;
        Ok(image)
    }
}

trait ArgPath {
    fn arg_path(self, path: &Path) -> Command;
}

impl ArgPath for Command {
    fn arg_path(mut self, path: &Path) -> Command {
        self.arg(path);
        self
    }
}

fn tool(name: &str) -> Result<PathBuf> {
    paths::program(name)
        .with_context(|| format!("{name} is missing: cargo xtask setup installs it"))
}

/// Whether this distribution's packages can be downloaded and unpacked.
fn from_packages() -> bool {
    paths::program("apt-get").is_some() && paths::program("dpkg-deb").is_some()
}

/// An ssh server for tests of the module over ssh: unpacked with the library
/// that it needs, so that none is ever installed or started on the machine.
fn sshd(folder: &Path) -> Result<()> {
    let unpacked = folder.join("sshd");
    if !from_packages() {
        let place = unpacked.join("usr/sbin");
        fs::create_dir_all(&place)?;
        fs::copy(tool("sshd")?, place.join("sshd"))?;
        return Ok(());
    }
    unpack(folder, &unpacked, "openssh-server")?;
    // Not every release links it.
    let _ = unpack(folder, &unpacked, "libwrap0");
    Ok(())
}

/// The packages that hold the distribution's kernel for virtual machines and its
/// modules.
fn kernel_packages() -> Result<Vec<String>> {
    let arch = succeed(&mut command("dpkg", ["--print-architecture"]))?;
    let arch = arch.trim();
    let cloud = format!("linux-image-cloud-{arch}");
    for meta in [cloud.as_str(), "linux-image-virtual", "linux-image-generic"] {
        let Ok(depends) = succeed(&mut command("apt-cache", ["depends", meta])) else {
            continue;
        };
        let kernel = depends
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|package| package.starts_with("linux-image-"));
        if let Some(kernel) = kernel {
            let modules = kernel.replace("linux-image-", "linux-modules-");
            // Ubuntu keeps modules in a package of their own.
            let split = succeed(&mut command("apt-cache", ["show", &modules]))
                .is_ok_and(|text| !text.trim().is_empty());
            let mut packages = vec![kernel.to_owned()];
            if split {
                packages.push(modules);
            }
            return Ok(packages);
        }
    }
    bail!("apt knows no kernel package for virtual machines; run apt-get update")
}

fn unpack(folder: &Path, into: &Path, package: &str) -> Result<()> {
    let download = folder.join(format!("download-{package}"));
    fs::create_dir_all(&download)?;
    succeed(command("apt-get", ["download", "-q", package]).current_dir(&download))
        .with_context(|| format!("package {package} cannot be downloaded"))?;
    for deb in fs::read_dir(&download)? {
        succeed(
            &mut command("dpkg-deb", ["-x"])
                .arg_path(&deb?.path())
                .arg_path(into),
        )?;
    }
    fs::remove_dir_all(&download)?;
    Ok(())
}

fn newest(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| format!("{} is not there", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(prefix))
        })
        .collect();
    found.sort();
    found
        .pop()
        .with_context(|| format!("no {prefix}* in {}", folder.display()))
}

fn install(text: &str, path: &Path) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn layout(root: &Path, unpacked: &Path, key: &Path) -> Result<()> {
    for folder in [
        "bin",
        "sbin",
        "dev",
        "proc",
        "sys",
        "data",
        "run",
        "tmp",
        "etc",
        "root",
        "lib/modules",
        "var/log",
    ] {
        fs::create_dir_all(root.join(folder))?;
    }
    symlink("/run", root.join("var/run"))?;
    install(INIT, &root.join("init"))?;
    install(UDHCPC, &root.join("etc/udhcpc.sh"))?;
    install(SHUTDOWN, &root.join("sbin/shutdown"))?;
    install(HOOK, &root.join("etc/fsfreeze-hook"))?;
    fs::write(root.join("etc/passwd"), "root::0:0:root:/root:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\n")?;
    fs::write(root.join("etc/shells"), "/bin/sh\n")?;
    fs::copy(key.with_extension("pub"), root.join("etc/authorized_keys"))?;
    // Unpacked, for its package would replace the one that a host's own initial
    // ramdisk is made with.
    let busybox = ["bin", "usr/bin"]
        .iter()
        .find_map(|place| newest(&unpacked.join(place), "busybox").ok())
        .map_or_else(|| tool("busybox"), Ok)?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    let agent = newest(&unpacked.join("usr/sbin"), "qemu-ga").or_else(|_| tool("qemu-ga"))?;
    binary(root, &agent)?;
    binary(root, &tool("dropbear")?)?;
    modules(root, unpacked)
}

/// A program with the libraries that it is linked to.
fn binary(root: &Path, program: &Path) -> Result<()> {
    let name = program.file_name().context("a program has a name")?;
    fs::copy(program, root.join("sbin").join(name))?;
    let listed = succeed(&mut command("ldd", [program]))?;
    ensure!(
        !listed.contains("not found"),
        "{} needs libraries that are not installed:\n{listed}",
        program.display()
    );
    for word in listed
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let target = root.join(word.trim_start_matches('/'));
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::copy(word, &target)?;
    }
    Ok(())
}

fn modules(root: &Path, unpacked: &Path) -> Result<()> {
    let unpacked = if from_packages() {
        unpacked
    } else {
        Path::new("/")
    };
    // Newer packages put them below /usr.
    if !unpacked.join("lib/modules").exists() {
        let _ = fs::remove_dir_all(unpacked.join("lib"));
        symlink("usr/lib", unpacked.join("lib"))?;
    }
    let version = newest(&unpacked.join("lib/modules"), "")?;
    let name = version.file_name().context("a version has a name")?;
    // Packages leave this list to be made when they are installed.
    if !version.join("modules.dep").exists() {
        succeed(
            &mut command(tool("depmod")?, ["-b"])
                .arg_path(unpacked)
                .arg_path(Path::new(name)),
        )?;
    }
    let builtin: BTreeSet<String> = fs::read_to_string(version.join("modules.builtin"))?
        .lines()
        .map(module_name)
        .collect();
    let depends = fs::read_to_string(version.join("modules.dep"))?;
    let mut order: Vec<String> = Vec::new();
    for wanted in MODULES {
        if builtin.contains(wanted) {
            continue;
        }
        let line = depends
            .lines()
            .find(|line| module_name(line.split(':').next().unwrap_or_default()) == wanted)
            .with_context(|| format!("the kernel has no module {wanted}"))?;
        let (module, needs) = line
            .split_once(':')
            .context("a line of modules.dep has a colon")?;
        // Each needs those after it: the last is loaded first.
        for path in needs.split_whitespace().rev().chain([module]) {
            let name = format!("{}.ko", module_name(path));
            if !order.contains(&name) {
                decompress(&version.join(path), &root.join("lib/modules").join(&name))?;
                order.push(name);
            }
        }
    }
    fs::write(root.join("lib/modules/order"), order.join("\n") + "\n")?;
    Ok(())
}

fn module_name(path: &str) -> String {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.split('.').next().unwrap_or(name).replace('-', "_")
}

fn decompress(from: &Path, to: &Path) -> Result<()> {
    let program = match from.extension().and_then(|it| it.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => {
            fs::copy(from, to)?;
            return Ok(());
        }
    };
    let output = crate::command::run(
        &mut command(tool(program)?, ["-d", "-c"]).arg_path(from),
        None,
        crate::command::DEADLINE,
    )?;
    ensure!(
        output.status == 0,
        "{} cannot be unpacked: {}",
        from.display(),
        output.complaint()
    );
    fs::write(to, output.stdout)?;
    Ok(())
}

fn pack(root: &Path, initrd: &Path) -> Result<()> {
    let script = "find . | bin/busybox cpio -o -H newc 2>/dev/null | gzip -1 > \"$1\"";
    succeed(
        command("sh", ["-e", "-c", script, "pack"])
            .arg(initrd)
            .current_dir(root),
    )?;
    Ok(())
}
