//! The agent's packages for hosts: `.deb` and `.rpm`, with the command line, the
//! units, an example configuration, rules and dashboard, manual pages, completions and
//! the documentation.
//!
//! Invariants: both hold the same files, and the same source comes out as the same
//! bytes; the one file of configuration belongs to the operator once it is installed;
//! what a program needs of the host is read from the program.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    checkout,
    package::{copy_tree, epoch, newest_symbol, place},
    run::{cargo, command, say, step},
    target,
};

/// The package's name.
const NAME: &str = "vmsnap-agent";

/// Builds the programs for handing out and packages them into `target/package`.
///
/// # Errors
/// When a step fails.
pub fn publish() -> Result<()> {
    let build = [
        "build",
        "--release",
        "--locked",
        "--package",
        "vmsnap-agent",
        "--package",
        "vmsnap-cli",
    ];
    step("agent and command line", cargo(build))?;
    build_all(
        &target().join("release"),
        env!("CARGO_PKG_VERSION"),
        &target().join("package"),
        true,
    )
}

/// Packages the programs that lie in a folder; small or fast.
///
/// # Errors
/// When a step fails.
pub fn build_all(programs: &Path, version: &str, into: &Path, small: bool) -> Result<()> {
    let fine = |c: char| c.is_ascii_digit() || c == '.';
    if version.is_empty() || !version.chars().all(fine) {
        bail!("'{version}' is no version of numbers and dots");
    }
    fs::create_dir_all(into).with_context(|| format!("cannot make {}", into.display()))?;
    let into = into.canonicalize()?;
    let files = into.join("files");
    lay_out(programs, &files)?;
    let deb = deb(&files, version, &into, small)?;
    let rpm = rpm(&files, version, &into, small)?;
    remove(&files)?;
    say(&format!("built: {} and {}", deb.display(), rpm.display()));
    Ok(())
}

fn remove(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(())
}

/// Puts all files where they will lie on a host.
fn lay_out(programs: &Path, files: &Path) -> Result<()> {
    remove(files)?;
    let packaging = checkout().join("packaging");
    for program in ["vmsnap-agent", "vmsnap"] {
        let to = files.join("usr/bin").join(program);
        place(&programs.join(program), &to)?;
        let mut strip = command("strip", ["--strip-all"]);
        strip.arg(&to);
        step(&format!("strip of {program}"), strip)?;
    }
    for (from, to) in [
        (
            "systemd/vmsnap-agent.service",
            "usr/lib/systemd/system/vmsnap-agent.service",
        ),
        (
            "systemd/vmsnap-agent.socket",
            "usr/lib/systemd/system/vmsnap-agent.socket",
        ),
        ("systemd/vmsnap.sysusers", "usr/lib/sysusers.d/vmsnap.conf"),
        (
            "systemd/unprivileged.conf",
            "usr/share/doc/vmsnap-agent/unprivileged.conf",
        ),
        (
            "prometheus/vmsnap.rules.yml",
            "usr/share/vmsnap/vmsnap.rules.yml",
        ),
        ("grafana/vmsnap.json", "usr/share/vmsnap/vmsnap.json"),
    ] {
        put(&packaging.join(from), &files.join(to))?;
    }
    manual(files)?;
    let docs = files.join("usr/share/doc").join(NAME);
    copy_tree(&checkout().join("docs"), &docs)?;
    put(&checkout().join("LICENSE"), &docs.join("copyright"))?;
    put(&checkout().join("NOTICE"), &docs.join("NOTICE"))?;
    let example = checkout().join("docs/agent.example.toml");
    let example = fs::read_to_string(&example)
        .with_context(|| format!("cannot read {}", example.display()))?;
    let configuration = files.join("etc/vmsnap/agent.toml");
    if let Some(folder) = configuration.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(&configuration, commented(&example))?;
    open_up(files)
}

/// Has the programs write their manual pages and completions, and puts them where
/// they are looked for.
fn manual(files: &Path) -> Result<()> {
    let written = files.join("written");
    fs::create_dir_all(&written)?;
    for program in ["vmsnap-agent", "vmsnap"] {
        let mut manual = command(files.join("usr/bin").join(program), ["manual"]);
        manual.arg(&written);
        step(&format!("manual of {program}"), manual)?;
    }
    let share = files.join("usr/share");
    for (name, to) in [
        ("vmsnap.bash", "bash-completion/completions/vmsnap"),
        ("vmsnap.fish", "fish/vendor_completions.d/vmsnap.fish"),
        // Debian's zsh looks in the first, that of others in the second.
        ("_vmsnap", "zsh/vendor-completions/_vmsnap"),
        ("_vmsnap", "zsh/site-functions/_vmsnap"),
    ] {
        put(&written.join(name), &share.join(to))?;
    }
    for entry in fs::read_dir(&written)? {
        let page = entry?.path();
        let Some(section) = page.extension().and_then(|it| it.to_str()) else {
            continue;
        };
        if !matches!(section, "1" | "8") {
            continue;
        }
        let name = page.file_name().unwrap_or_default();
        let to = share.join(format!("man/man{section}")).join(name);
        put(&page, &to)?;
        // Without a name and a time in it, so that it comes out the same each time.
        let mut pack = command("gzip", ["-9", "-n"]);
        pack.arg(&to);
        step("manual page", pack)?;
    }
    remove(&written)
}

fn put(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::copy(from, to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// The example with its values as comments, so that a default that gets better
/// reaches those who did not choose another.
fn commented(example: &str) -> String {
    let mut text = String::from(
        "# The vmsnap agent's configuration. Every key is here with its default; take the #\n\
         # away from what is to be another. After a change:\n\
         #   vmsnap-agent check && systemctl restart vmsnap-agent\n",
    );
    // The first line speaks of the example.
    for line in example.lines().skip(1) {
        let is_value = line.starts_with(|c: char| c.is_ascii_lowercase());
        if is_value {
            text.push('#');
        }
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// Everybody may read, whatever the umask was.
fn open_up(path: &Path) -> Result<()> {
    let is_folder = path.is_dir();
    let program = path
        .parent()
        .is_some_and(|folder| folder.ends_with("usr/bin"));
    let mode = if is_folder || program { 0o755 } else { 0o644 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    if is_folder {
        for entry in fs::read_dir(path)? {
            open_up(&entry?.path())?;
        }
    }
    Ok(())
}

/// Bytes below a folder.
fn size(path: &Path) -> Result<u64> {
    if !path.is_dir() {
        return Ok(path.metadata()?.len());
    }
    let mut all = 0;
    for entry in fs::read_dir(path)? {
        all += size(&entry?.path())?;
    }
    Ok(all)
}

fn shown(version: Option<Vec<u32>>) -> String {
    let parts: Vec<String> = version
        .unwrap_or_default()
        .iter()
        .map(u32::to_string)
        .collect();
    parts.join(".")
}

fn deb(files: &Path, version: &str, into: &Path, small: bool) -> Result<PathBuf> {
    let tree = into.join("deb");
    remove(&tree)?;
    let mut copy = command("cp", ["-a"]);
    copy.arg(files).arg(&tree);
    step("files of the .deb", copy)?;
    let scripts = checkout().join("packaging/deb");
    let control = tree.join("DEBIAN");
    fs::create_dir_all(&control)?;
    for script in ["postinst", "prerm", "postrm"] {
        put(&scripts.join(script), &control.join(script))?;
        fs::set_permissions(control.join(script), fs::Permissions::from_mode(0o755))?;
    }
    let agent = fs::read(files.join("usr/bin/vmsnap-agent"))?;
    let text = fs::read_to_string(scripts.join("control"))?
        .replace("@VERSION@", version)
        .replace("@SIZE@", &(size(files)? / 1024).to_string())
        .replace("@GLIBC@", &shown(newest_symbol(&agent, b"GLIBC_")))
        .replace("@LIBVIRT@", &shown(newest_symbol(&agent, b"LIBVIRT_")));
    fs::write(control.join("control"), text)?;
    fs::write(control.join("conffiles"), "/etc/vmsnap/agent.toml\n")?;
    let package = into.join(format!("{NAME}_{version}_amd64.deb"));
    let mut build = command(
        "dpkg-deb",
        [
            "--root-owner-group",
            if small { "-Zxz" } else { "-Znone" },
            "--build",
        ],
    );
    build
        .arg(&tree)
        .arg(&package)
        .envs(epoch().map(|epoch| ("SOURCE_DATE_EPOCH", epoch)));
    step(".deb", build)?;
    remove(&tree)?;
    Ok(package)
}

fn rpm(files: &Path, version: &str, into: &Path, small: bool) -> Result<PathBuf> {
    let top = into.join("rpm");
    remove(&top)?;
    let define = |name: &str, value: &str| format!("{name} {value}");
    let mut build = command("rpmbuild", ["-bb", "--quiet", "--target", "x86_64"]);
    build
        .args(["--define", &define("_topdir", &top.to_string_lossy())])
        .args(["--define", &define("_rpmdir", &into.to_string_lossy())])
        .args([
            "--define",
            "_rpmfilename %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm",
        ])
        .args(["--define", &define("_files", &files.to_string_lossy())])
        .args(["--define", &define("_wanted", version)])
        .args([
            "--define",
            &define(
                "_binary_payload",
                if small { "w19.zstdio" } else { "w0.gzdio" },
            ),
        ])
        .arg(checkout().join("packaging/rpm/vmsnap-agent.spec"))
        .envs(epoch().map(|epoch| ("SOURCE_DATE_EPOCH", epoch)));
    step(".rpm", build)?;
    remove(&top)?;
    let package = into.join(format!("{NAME}-{version}-1.x86_64.rpm"));
    if !package.is_file() {
        bail!("{} was not built", package.display());
    }
    Ok(package)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packaged_configuration_says_all_and_sets_nothing() {
        let text = commented("# first\n\n[limits]\n# Why.\nmax_chain = 32\n");
        assert!(
            text.ends_with("\n\n[limits]\n# Why.\n#max_chain = 32\n"),
            "{text}"
        );
        assert!(!text.contains("first"));
    }
}
