//! The module as ansible-core runs it: on real guests, locally and over ssh.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use vmsnap_tests::{
    BlankSpec, Lab,
    ansible::{keep, tool},
    command, eventually, paths,
    ports::quiet_port,
};

const HEAD: &str = "- hosts: all\n  gather_facts: false\n  module_defaults:\n    group/vmsnap.libvirt.all: {agent: \"AGENT\"}\n  tasks:\n";

/// A play whose tasks are calls of the module, each kept under its name.
fn play(agent: &str, tasks: &[(&str, Value)]) -> String {
    let mut text = HEAD.replace("AGENT", agent);
    for (name, arguments) in tasks {
        text.push_str(&format!(
            "    - vmsnap.libvirt.vm_snapshot: {arguments}\n      register: {name}\n      ignore_errors: true\n"
        ));
        text.push_str(&keep(name));
    }
    text
}

#[test]
fn a_playbook_snapshots_damages_and_reverts_a_guest_and_says_what_changed() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let name = guest.name.as_str();
    let create = json!({"vm_name": name, "action": "create", "snapshot_name": "s", "memory": true});
    let text = play(
        &agent.address(),
        &[("made", create.clone()), ("again", create)],
    );
    let played = lab.playbook(&text, &[])?.ok()?;
    let made = played.kept("made")?;
    assert_eq!(made["changed"], true);
    assert_eq!(made["failed"], false);
    assert_eq!(made["consistency"], "memory");
    assert!(made["stop_ms"].is_number(), "{made}");
    assert_eq!(played.kept("again")?["changed"], false);
    guest.exec("echo x > /data/damage; sync")?;
    let revert =
        json!({"vm_name": name, "action": "revert", "snapshot_name": "s", "wait_for": "agent"});
    let list = json!({"vm_name": name, "action": "list"});
    let cleanup = json!({"vm_name": name, "action": "cleanup", "snapshot_name": "s"});
    let text = play(
        &agent.address(),
        &[
            ("reverted", revert),
            ("listed", list),
            ("cleaned", cleanup.clone()),
            ("clean", cleanup),
        ],
    );
    let played = lab.playbook(&text, &[])?.ok()?;
    assert_eq!(played.kept("reverted")?["changed"], true);
    assert!(guest.exec("test ! -e /data/damage").is_ok());
    let listed = played.kept("listed")?;
    assert_eq!(listed["changed"], false);
    assert_eq!(listed["snapshots"][0]["name"], "s");
    assert_eq!(listed["vm"]["state"], "running");
    assert!(listed["storage"]["volumes"].is_array());
    assert_eq!(played.kept("cleaned")?["changed"], true);
    assert_eq!(played.kept("clean")?["changed"], false);
    guest.lives()
}

#[test]
fn check_mode_is_the_plan_and_bad_options_are_refused_by_name() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let name = domain.name.as_str();
    let create = json!({"vm_name": name, "action": "create", "snapshot_name": "s"});
    let revert = json!({"vm_name": name, "action": "revert", "snapshot_name": "s"});
    let text = play(
        &agent.address(),
        &[("made", create), ("reverted", revert.clone())],
    );
    let played = lab.playbook(&text, &["--check", "--diff"])?.ok()?;
    let made = played.kept("made")?;
    assert_eq!(made["changed"], true);
    assert!(
        made["diff"]["after"].to_string().contains("snapshot.s"),
        "{made}"
    );
    let reverted = played.kept("reverted")?;
    assert_eq!(
        (&reverted["changed"], &reverted["failed"]),
        (&json!(true), &json!(false))
    );
    assert_eq!(domain.snapshots()?, [] as [&str; 0]);

    let mistyped = json!({"nmae": name, "action": "list", "vm_name": name});
    let wrong = json!({"vm_name": name, "action": "create", "memory": "perhaps"});
    let text = play(
        &agent.address(),
        &[
            ("missing", revert),
            ("mistyped", mistyped),
            ("wrong", wrong),
        ],
    );
    let played = lab.playbook(&text, &[])?.ok()?;
    let missing = played.kept("missing")?;
    assert_eq!(missing["failed"], true);
    assert_eq!(missing["error"]["reason"], "SNAPSHOT_NOT_FOUND");
    let mistyped = played.kept("mistyped")?["msg"].to_string();
    assert!(
        mistyped.contains("nmae") && mistyped.contains("name"),
        "{mistyped}"
    );
    let wrong = played.kept("wrong")?["msg"].to_string();
    assert!(
        wrong.contains("memory") && wrong.contains("perhaps"),
        "{wrong}"
    );
    Ok(())
}

#[test]
fn an_ad_hoc_call_with_words_only_works() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let arguments = format!(
        "agent={} vm_name={} action=create snapshot_name=s memory=yes",
        agent.address(),
        domain.name
    );
    let said = command::succeed(tool("ansible").args([
        "localhost",
        "-i",
        "localhost,",
        "-c",
        "local",
        "-m",
        "vmsnap.libvirt.vm_snapshot",
        "-a",
        &arguments,
    ]))?;
    assert!(said.contains("CHANGED"), "{said}");
    assert_eq!(domain.snapshots()?, ["s"]);
    Ok(())
}

#[test]
fn the_collection_documents_itself_and_passes_the_linter() -> Result<()> {
    let listed = command::succeed(tool("ansible-doc").args(["-l", "vmsnap.libvirt"]))?;
    assert!(listed.contains("vmsnap.libvirt.vm_snapshot "), "{listed}");
    let shown = command::succeed(tool("ansible-doc").arg("vmsnap.libvirt.vm_snapshot"))?;
    for part in ["state_after", "EXAMPLES", "RETURN VALUES", "if_exists"] {
        assert!(shown.contains(part), "{part}");
    }
    let installed = paths::collections().join("ansible_collections/vmsnap/libvirt");
    command::succeed(
        tool("ansible-lint")
            .args(["--offline", "--nocolor"])
            .current_dir(installed),
    )?;
    Ok(())
}

/// An ssh server of our own on loopback, for the user who runs the tests.
struct Sshd {
    child: Child,
    port: u16,
    folder: std::path::PathBuf,
}

impl Sshd {
    fn start(lab: &Lab) -> Result<Self> {
        let port = quiet_port()?;
        let folder = lab.folder.join(format!("sshd-{}", std::process::id()));
        fs::create_dir(&folder)?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700))?;
        let unpacked = paths::kept().join("lab-image/sshd");
        for name in ["host", "user"] {
            command::succeed(
                command::command("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-f"])
                    .arg(folder.join(name)),
            )?;
        }
        let shown = folder.display();
        fs::write(
            folder.join("config"),
            format!(
                "Port {port}\nListenAddress 127.0.0.1\nHostKey {shown}/host\nAuthorizedKeysFile {shown}/user.pub\n\
                 StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\nSubsystem sftp internal-sftp\n"
            ),
        )?;
        // Root's server changes to this folder before anybody has logged in.
        if command::User::current().uid == 0 {
            fs::create_dir_all("/run/sshd")?;
        }
        let program = unpacked.join("usr/sbin/sshd");
        let child = command::command::<&str>(&program, [])
            .args(["-D", "-e", "-f"])
            .arg(folder.join("config"))
            .env("LD_LIBRARY_PATH", unpacked.join("usr/lib/x86_64-linux-gnu"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(folder.join("log"))?)
            .spawn()
            .context("sshd cannot be started")?;
        let sshd = Self {
            child,
            port,
            folder,
        };
        eventually(Duration::from_secs(10), "ssh server", || {
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
        })?;
        Ok(sshd)
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

#[test]
fn the_module_runs_over_ssh_with_one_line_of_json() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = lab.blank(&BlankSpec::default())?;
    let sshd = Sshd::start(&lab)?;
    let create = json!({"vm_name": domain.name, "action": "create", "snapshot_name": "s", "description": "über \u{2028} ssh"});
    let list = json!({"vm_name": domain.name, "action": "list"});
    let text = play(&agent.address(), &[("made", create), ("listed", list)])
        // What is kept is written where the tests are, not through ssh.
        .replace(
            "    - ansible.builtin.copy:",
            "    - delegate_to: localhost\n      connection: local\n      ansible.builtin.copy:",
        );
    let key = sshd.folder.join("user");
    let played = lab.playbook(
        &text,
        &[
            "-i", "127.0.0.1,", "-c", "ssh", "--limit", "127.0.0.1",
            "-e", &format!("ansible_port={}", sshd.port),
            "-e", &format!("ansible_ssh_private_key_file={}", key.display()),
            "-e", "ansible_ssh_common_args='-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o IdentitiesOnly=yes'",
            // Only root's server can hand out a terminal.
            "-e", &format!("ansible_ssh_use_tty={}", command::User::current().uid == 0),
        ],
    )?;
    let log = fs::read_to_string(sshd.folder.join("log")).unwrap_or_default();
    let played = played.ok().context(log)?;
    assert_eq!(played.kept("made")?["changed"], true);
    // YAML folds the space around a line separator; the separator itself stays.
    let listed = played.kept("listed")?;
    assert_eq!(listed["snapshots"][0]["description"], "über\u{2028}ssh");
    assert_eq!(domain.snapshots()?, ["s"]);
    Ok(())
}
