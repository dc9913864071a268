//! The playbooks and the role of the collection, as they are shipped, on real
//! guests that are reached over ssh.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use vmsnap_tests::{
    Agent, Guest, Lab,
    ansible::tool,
    command::{Output, run},
    paths,
};

/// How long a playbook may take.
const PLAY: Duration = Duration::from_secs(300);

/// A folder with an inventory of one guest and task files of the test's own.
struct Site {
    folder: PathBuf,
    socket: String,
}

impl Site {
    /// The guest is reached over ssh; localhost is the hypervisor.
    fn of(lab: &Lab, guest: &Guest, agent: &Agent) -> Result<Self> {
        let folder = lab.folder.join(format!("site-{}", std::process::id()));
        fs::create_dir(&folder)?;
        let inventory = format!(
            "[guests]\n{name} ansible_host=127.0.0.1 ansible_port={port} ansible_user=root ansible_ssh_private_key_file={key} \
             ansible_ssh_common_args='-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null'\n\
             [hypervisors]\nlocalhost ansible_connection=local\n",
            name = guest.name,
            port = guest.ssh_port,
            key = lab.folder.join("key").display(),
        );
        fs::write(folder.join("inventory"), inventory)?;
        let socket = agent.address();
        Ok(Self { folder, socket })
    }

    /// Writes a file of tasks and returns its path.
    fn tasks(&self, name: &str, text: &str) -> Result<String> {
        let path = self.folder.join(name);
        fs::write(&path, text)?;
        Ok(path.display().to_string())
    }

    /// Plays a playbook of the collection.
    fn play(&self, name: &str, variables: serde_json::Value) -> Result<Output> {
        let mut command = tool("ansible-playbook");
        command
            .arg("-i")
            .arg(self.folder.join("inventory"))
            .arg(format!("vmsnap.libvirt.{name}"))
            .args(["-e", &variables.to_string()])
            .env("VMSNAP_AGENT", &self.socket)
            .current_dir(&self.folder);
        run(&mut command, None, PLAY)
    }

    fn play_well(&self, name: &str, variables: serde_json::Value) -> Result<String> {
        let output = self.play(name, variables)?;
        let said = format!("{}\n{}", output.text(), output.complaint());
        ensure!(output.status == 0, "{name} failed:\n{said}");
        Ok(said)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

// The guest has no Python, so its tasks are raw shell lines.
const UPGRADE: &str = "- name: Upgrade\n  ansible.builtin.raw: touch /data/upgraded && sync\n";
const SICK: &str = "- name: Look\n  ansible.builtin.raw: test -e /data/never-there\n";
const WELL: &str = "- name: Look\n  ansible.builtin.raw: test -e /data/upgraded\n";

#[test]
fn an_upgrade_that_fails_its_check_is_taken_back_and_one_that_passes_is_kept() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let site = Site::of(&lab, &guest, &agent)?;
    let upgrade = site.tasks("upgrade.yml", UPGRADE)?;
    let variables =
        |check: &str| serde_json::json!({"upgrade_tasks": upgrade, "check_tasks": check});

    let sick = site.tasks("sick.yml", SICK)?;
    let output = site.play("snapshot_upgrade_revert", variables(&sick))?;
    let said = format!("{}\n{}", output.text(), output.complaint());
    assert_eq!(output.status, 2, "{said}");
    assert!(
        said.contains("The upgrade failed in the task Look"),
        "{said}"
    );
    assert!(said.contains("was taken back"), "{said}");
    assert!(
        !guest
            .exec("ls /data 2>/dev/null || true")?
            .contains("upgraded"),
        "{said}"
    );
    assert_eq!(guest.snapshots()?, [] as [&str; 0], "{said}");
    guest.lives()?;

    let well = site.tasks("well.yml", WELL)?;
    site.play_well("snapshot_upgrade_revert", variables(&well))?;
    assert!(
        guest
            .exec("ls /data 2>/dev/null || true")?
            .contains("upgraded")
    );
    assert_eq!(guest.snapshots()?, [] as [&str; 0]);
    guest.lives()
}

#[test]
fn a_lab_is_taken_back_to_its_baseline_and_configured_again() -> Result<()> {
    let lab = Lab::from_env()?;
    let (guest, agent) = (lab.guest()?, lab.agent("")?);
    let site = Site::of(&lab, &guest, &agent)?;
    let of_lab = |take| serde_json::json!({"lab_vms": [guest.name], "take_baseline": take});
    site.play_well("reset_lab", of_lab(true))?;
    assert_eq!(guest.snapshots()?, ["baseline"]);
    guest.exec("touch /data/damage && sync")?;
    let said = site.play_well("reset_lab", of_lab(false))?;
    assert!(
        said.contains(&format!("{} is back at snapshot baseline", guest.name)),
        "{said}"
    );
    assert!(
        !guest
            .exec("ls /data 2>/dev/null || true")?
            .contains("damage")
    );

    // The role needs Python on its host, and this machine stands in for a guest that has it.
    guest.exec("touch /data/damage && sync")?;
    let marker = site.folder.join("configured");
    let text = format!(
        "- name: Leave a mark\n  ansible.builtin.copy:\n    content: \"{{{{ ansible_facts['system'] }}}}\"\n    dest: {}\n    mode: \"0644\"\n",
        marker.display()
    );
    let configure = site.tasks("configure.yml", &text)?;
    site.play_well(
        "configure_after_revert",
        serde_json::json!({
            "ansible_connection": "local",
            "ansible_python_interpreter": paths::python_tool("python3"),
            "configure_tasks": [configure],
        }),
    )?;
    assert_eq!(fs::read_to_string(marker)?, "Linux");
    assert!(
        !guest
            .exec("ls /data 2>/dev/null || true")?
            .contains("damage")
    );
    guest.lives()
}
