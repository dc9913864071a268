//! The units under a real systemd: it boots a throw-away copy of this host, in which
//! the agent is installed, as a container.
//!
//! The copy is an overlay over the host's root in a mount namespace of its own:
//! nothing of it reaches the host. The agent serves libvirt's test driver there.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use vmsnap_tests::{
    command::{privileged, run},
    paths,
};

/// How long all of it may take.
const LIMIT: Duration = Duration::from_secs(150);

/// Makes the copy and boots it; `$1` is its folder, `$2` the programs', `$3` that of
/// the units, `$4` what is done inside.
const BOOT: &str = r##"
set -eu
folder=$1
mount -t tmpfs none "$folder"
mkdir "$folder/upper" "$folder/work" "$folder/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$folder/upper,workdir=$folder/work" "$folder/root" ||
    { echo "# cannot: no overlay can be put on /"; exit 0; }
group=$(sed -n 's/^0:://p' /proc/self/cgroup) probe=/sys/fs/cgroup${group%/}/vmsnap-probe-$$
mkdir "$probe" && rmdir "$probe" || { echo "# cannot: no control group can be made"; exit 0; }
root=$folder/root units=$folder/root/etc/systemd/system
for program in vmsnap-agent vmsnap; do
    strip -o "$root/usr/bin/$program" "$2/$program"
done
cp "$3/vmsnap-agent.service" "$3/vmsnap-agent.socket" "$root/usr/lib/systemd/system"
cp "$3/vmsnap.sysusers" "$root/usr/lib/sysusers.d/vmsnap.conf"
rm -rf "$root/etc/vmsnap" "$root/var/lib/vmsnap" "$root/etc/machine-id"
mkdir -p "$root/etc/vmsnap" "$units/vmsnap-agent.service.d"
: >"$root/etc/machine-id"
# What takes long by design is made short; all else is as it is installed.
printf "[Service]\nRestartSec=1\nWatchdogSec=3\n" >"$units/vmsnap-agent.service.d/short.conf"
printf "%s" "$4" >"$root/try"
printf "[Unit]\nAfter=basic.target\nRequires=basic.target\n[Service]\nType=oneshot\nExecStart=/bin/sh /try\nStandardOutput=append:/told\nStandardError=append:/told\nExecStopPost=/bin/systemctl poweroff --force --no-block\n" >"$units/try.service"
# Where systemd runs the host, it has to know of the container.
keep=--keep-unit
[ ! -d /run/systemd/system ] || keep=
systemd-nspawn --quiet --register=no $keep --private-network --console=pipe -D "$root" \
    --boot -- --unit=try.service </dev/null >"$folder/console" 2>&1 || { cat "$folder/console" >&2; exit 1; }
cat "$root/told"
"##;

/// What is done inside; lines that begin with `#` are what the test looks at.
const TRY: &str = r##"
say() { echo "# $*"; }
until_so() { for _ in $(seq 150); do eval "$1" && return; sleep 0.1; done; echo "never: $1"; }
of() { systemctl show -P "$1" "${2:-vmsnap-agent.service}"; }
systemd-sysusers vmsnap.conf
printf "[libvirt]\nuri = \"test:///default\"\n" >/etc/vmsnap/agent.toml
systemctl start vmsnap-agent.socket vmsnap-agent.service
agent=$(of MainPID)
say started $(of ActiveState) $(of ActiveState vmsnap-agent.socket)
say headline $(of StatusText)
say socket $(stat -c "%a %U %G" /run/vmsnap/agent.sock)
say health $(vmsnap health)
say rights $(awk '/^(CapEff|CapBnd|NoNewPrivs|Seccomp):/ { print $2 }' /proc/$agent/status)
say behind $(for thread in /proc/$agent/task/*; do
    [ $(cat $thread/comm) != network ] || awk '{ print $19 }' $thread/stat; done | sort -u)
for folder in /etc /usr /root /var/log /var/lib/vmsnap /var/lib/libvirt; do
    nsenter -m -t $agent touch $folder/.x 2>/dev/null && say writes $folder
    rm -f $folder/.x
done
say hidden $(nsenter -m -t $agent ls /home | wc -l)

kill -KILL $agent
until_so '[ $(of NRestarts) = 1 ] && [ $(of ActiveState) = active ]'
say killed $(of NRestarts) $(vmsnap health)
kill -STOP $(of MainPID)
until_so '[ $(of NRestarts) = 2 ] && [ $(of ActiveState) = active ]'
say hung $(of NRestarts) $(vmsnap health)
systemctl stop vmsnap-agent.service
say stopped $(of Result) $(of ActiveState)
say called $(vmsnap health) $(of ActiveState)

echo "x = 1" >>/etc/vmsnap/agent.toml
systemctl restart vmsnap-agent.service
say refused $(of ActiveState) $(of NRestarts) $(of ExecMainStatus)
until_so 'vmsnap ls 2>&1 | grep -q "no agent there"'
say given_up $(of ActiveState vmsnap-agent.socket)
sed -i '$d' /etc/vmsnap/agent.toml
systemctl start vmsnap-agent.service
say mended $(of ActiveState) $(of ActiveState vmsnap-agent.socket) $(vmsnap health)
"##;

/// A folder of the test's own; gone with it.
struct Folder(std::path::PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
#[expect(
    clippy::print_stdout,
    reason = "a machine on which this cannot be tried is told, and is no failure"
)]
fn systemd_starts_confines_watches_and_restarts_the_agent_and_leaves_a_refused_one_alone()
-> Result<()> {
    let folder = Folder(paths::target().join(format!("units-{}", std::process::id())));
    fs::create_dir_all(&folder.0)?;
    let units = paths::checkout().join("packaging/systemd");
    let mut boot = privileged([
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        BOOT,
        "sh",
    ]);
    boot.arg(&folder.0)
        .arg(paths::target().join("debug"))
        .arg(units)
        .arg(TRY)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let output = run(&mut boot, None, LIMIT)?;
    let text = output.text();
    ensure!(
        output.status == 0,
        "the container ended with {}:\n{text}\n{}",
        output.status,
        output.complaint()
    );
    // A container without these rights, in which somebody runs the tests.
    if let Some(why) = text
        .lines()
        .find_map(|line| line.strip_prefix("# cannot: "))
    {
        println!("not tried on this machine: {why}");
        return Ok(());
    }
    let told = |what: &str| -> Result<Vec<&str>> {
        let found: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix(&format!("# {what} ")))
            .collect();
        ensure!(!found.is_empty(), "nothing on '{what}' in\n{text}");
        Ok(found)
    };
    for (what, wanted) in [
        ("started", "active active"),
        ("headline", "all is well"),
        ("socket", "660 root vmsnap"),
        ("health", "all is well"),
        // CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER; no new
        // ones, and system calls are filtered.
        ("rights", "000000000000000f 000000000000000f 1 2"),
        ("behind", "5"),
        ("hidden", "0"),
        ("killed", "1 all is well"),
        ("hung", "2 all is well"),
        ("stopped", "success inactive"),
        ("called", "all is well active"),
        ("refused", "failed 0 78"),
        ("given_up", "failed"),
        ("mended", "active active all is well"),
    ] {
        assert_eq!(told(what)?, [wanted], "{what} in\n{text}");
    }
    let writes = told("writes").context("nothing can be written")?;
    assert!(
        writes.contains(&"/var/lib/vmsnap")
            && writes.iter().all(|folder| folder.starts_with("/var/lib/")),
        "{writes:?}"
    );
    Ok(())
}
