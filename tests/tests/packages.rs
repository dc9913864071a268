//! The packages, each installed on a throw-away copy of this host, upgraded from a
//! former version whose journal is full of runs, and removed.
//!
//! The copy is an overlay over the host's root in a mount namespace of its own:
//! nothing of it reaches the host.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use vmsnap_tests::{
    command::{command, privileged, run, succeed},
    paths,
};

/// How long one package's whole life may take.
const LIMIT: Duration = Duration::from_secs(240);
const FORMER: &str = "0.0.9";
const NEW: &str = env!("CARGO_PKG_VERSION");

/// What happens in the copy; `$1` is its folder, `$2` says how packages are handled.
/// Lines that begin with `#` are what the test looks at.
const LIFE: &str = r##"
set -eu
folder=$1 kind=$2
mount -t tmpfs none "$folder"
mkdir "$folder/upper" "$folder/work" "$folder/root" "$folder/packages"
cp "$3" "$4" "$folder/packages"
mount -t overlay overlay -o "lowerdir=/,upperdir=$folder/upper,workdir=$folder/work" "$folder/root"
mount --rbind /proc "$folder/root/proc"
mount --rbind /dev "$folder/root/dev"
mount -t tmpfs none "$folder/root/run"
mount -t tmpfs none "$folder/root/tmp"
cp "$folder"/packages/* "$folder/root/tmp"
exec chroot "$folder/root" /bin/sh -c '
set -eu
kind=$1 former=/tmp/$(basename "$2") new=/tmp/$(basename "$3")
cd /
say() { echo "# $*"; }
case $kind in
deb)
    # Elsewhere dpkg does not know what the host has.
    add() { dpkg -i $([ -e /etc/debian_version ] || echo --force-depends) "$1"; }
    remove() { dpkg -r vmsnap-agent; }
    version() { dpkg-query -W -f "\${Version}" vmsnap-agent; }
    ;;
rpm)
    rpm --initdb
    add() { rpm -U --nodeps "$1"; }
    remove() { rpm -e vmsnap-agent; }
    version() { rpm -q --qf "%{VERSION}" vmsnap-agent; }
    ;;
esac
start() {
    vmsnap-agent serve >/tmp/log 2>&1 &
    agent=$!
    for _ in $(seq 200); do
        grep -q "serving socket=" /tmp/log && return
        kill -0 $agent || break
        sleep 0.1
    done
    cat /tmp/log
    exit 1
}
stop() { kill $agent; wait $agent; }
runs() { vmsnap --json log -n 1000 | tr "," "\n" | grep -c "\"request_id\":" || :; }

add "$former" >&2
say former $(version)
say user $(getent passwd vmsnap | cut -d: -f1) $(getent group vmsnap | cut -d: -f1)
say started $(ls /run/vmsnap 2>/dev/null | wc -l)
for page in 1/vmsnap 1/vmsnap-create 1/vmsnap-cert-ca 8/vmsnap-agent 8/vmsnap-agent-serve; do
    say page $page $(zcat /usr/share/man/man${page%%/*}/${page#*/}.${page%%/*}.gz | grep -c "^\.SH")
done
say completes $(bash -c ". /usr/share/bash-completion/completions/vmsnap; complete -p vmsnap" | grep -c vmsnap)
say configuration $(stat -c "%a %U" /etc/vmsnap/agent.toml)
vmsnap-agent check --libvirt-uri test:///default >&2
printf "# mine\n[libvirt]\nuri = \"test:///default\"\n[limits]\nmax_chain = 9\n" >/etc/vmsnap/agent.toml
# The disk of the VM that the test driver has.
mkdir /guest
qemu-img create -q -f qcow2 /guest/diskimage1 1M
start
for n in $(seq 25); do vmsnap --json create test s$n >/dev/null 2>&1 || :; done
before=$(runs)
say runs $before
say states $(vmsnap --json log -n 1000 | tr "," "\n" | grep "\"state\":" | sort | uniq -c)
vmsnap --json log -n 1000 | md5sum >/tmp/before
stop
say journal $(stat -c "%a" /var/lib/vmsnap/journal.db)
# As the former version left it: before the newest schema.
python3 - <<EOF
import sqlite3
db = sqlite3.connect("/var/lib/vmsnap/journal.db")
newest = db.execute("PRAGMA user_version").fetchone()[0]
db.execute("DROP INDEX runs_stuck")
db.execute("DROP TABLE audit")
db.execute("PRAGMA user_version = 3")
db.commit()
print("# schema", newest)
EOF

add "$new" >&2
say new $(version)
say kept $(head -n 1 /etc/vmsnap/agent.toml)
say others $(ls /etc/vmsnap | tr "\n" " ")
vmsnap-agent check >&2
start
say runs_after $(runs)
vmsnap --json log -n 1000 | md5sum | cmp - /tmp/before && say same
vmsnap --json create test more >/dev/null 2>&1 || :
say more $(runs)
vmsnap health >/dev/null
stop
python3 - <<EOF
import sqlite3
db = sqlite3.connect("/var/lib/vmsnap/journal.db")
print("# schema_after", db.execute("PRAGMA user_version").fetchone()[0])
EOF

remove >&2
say program $(ls /usr/bin/vmsnap-agent /usr/bin/vmsnap /usr/lib/systemd/system/vmsnap* 2>/dev/null | wc -l)
say left $(ls /var/lib/vmsnap/journal.db | wc -l) $(ls /etc/vmsnap/ | tr "\n" " ")
if [ $kind = deb ]; then
    dpkg -P vmsnap-agent >&2
    say purged $(ls -d /var/lib/vmsnap /etc/vmsnap 2>/dev/null | wc -l)
fi
' life "$kind" "$3" "$4"
"##;

/// A former and the new package of a kind, of the programs that are built.
fn packages(folder: &Path) -> Result<()> {
    let programs = paths::target().join("debug");
    for version in [FORMER, NEW] {
        succeed(
            command(paths::binary("xtask")?, ["agent-packages"])
                .arg("--programs")
                .arg(&programs)
                .args(["--version", version, "--into"])
                .arg(folder),
        )?;
    }
    Ok(())
}

/// A folder of a test's own; gone with it.
struct Folder(std::path::PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn live(kind: &str, former: &str, new: &str) -> Result<()> {
    let folder = Folder(paths::target().join(format!("packages-{kind}-{}", std::process::id())));
    fs::create_dir_all(folder.0.join("root"))?;
    let built = folder.0.join("built");
    packages(&built)?;
    let path = |path: &Path| path.to_str().map(str::to_owned).context("a path in UTF-8");
    let words = [
        path(&folder.0.join("root"))?,
        kind.to_owned(),
        path(&built.join(former))?,
        path(&built.join(new))?,
    ];
    let mut life = privileged([
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        LIFE,
        "sh",
        &words[0],
        &words[1],
        &words[2],
        &words[3],
    ]);
    let output = run(
        life.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        None,
        LIMIT,
    )?;
    let text = output.text();
    ensure!(
        output.status == 0,
        "the {kind} ended with {}:\n{text}\n{}",
        output.status,
        output.complaint()
    );
    let told = |what: &str| -> Result<String> {
        text.lines()
            .find_map(|line| line.strip_prefix(&format!("# {what}")))
            .map(|rest| rest.trim().to_owned())
            .with_context(|| format!("nothing on '{what}' in\n{text}"))
    };
    assert_eq!(told("former")?, FORMER);
    assert_eq!(told("user")?, "vmsnap vmsnap");
    assert_eq!(told("started")?, "0");
    for page in [
        "1/vmsnap",
        "1/vmsnap-create",
        "1/vmsnap-cert-ca",
        "8/vmsnap-agent",
        "8/vmsnap-agent-serve",
    ] {
        let sections: u32 = told(&format!("page {page} "))?.parse()?;
        assert!(sections >= 3, "{page}: {text}");
    }
    assert_eq!(told("completes")?, "1");
    assert_eq!(told("configuration")?, "644 root");
    assert_eq!(told("journal")?, "600");
    let runs: u32 = told("runs ")?.parse()?;
    assert!(runs >= 25, "{runs} runs");
    // The test driver refuses their effect: they have a plan, steps and undoing.
    assert_eq!(told("states")?, format!("{runs} \"state\":\"failed\""));
    assert_eq!(told("new")?, NEW);
    assert_eq!(told("kept")?, "# mine");
    assert_eq!(told("runs_after")?, runs.to_string());
    assert_eq!(told("same")?, "");
    assert_eq!(told("more")?, (runs + 1).to_string());
    assert_eq!(told("schema_after")?, told("schema ")?);
    assert_eq!(told("program")?, "0");
    assert!(told("left")?.starts_with('1'), "{text}");
    if kind == "deb" {
        assert_eq!(told("left")?, "1 agent.toml");
        assert_eq!(told("purged")?, "0");
    }
    Ok(())
}

#[test]
fn a_deb_is_installed_upgraded_with_its_runs_and_configuration_removed_and_purged() -> Result<()> {
    live(
        "deb",
        &format!("vmsnap-agent_{FORMER}_amd64.deb"),
        &format!("vmsnap-agent_{NEW}_amd64.deb"),
    )
}

#[test]
fn an_rpm_is_installed_upgraded_with_its_runs_and_configuration_and_removed() -> Result<()> {
    live(
        "rpm",
        &format!("vmsnap-agent-{FORMER}-1.x86_64.rpm"),
        &format!("vmsnap-agent-{NEW}-1.x86_64.rpm"),
    )
}
