//! The agent as a program: its version, and what `check` refuses.

use std::process::Command;

fn agent(arguments: &[&str]) -> (bool, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_vmsnap-agent"))
        .args(arguments)
        .output()
        .unwrap();
    (
        output.status.success(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn it_tells_its_version() {
    let (ok, said, _) = agent(&["version"]);
    assert!(ok);
    assert_eq!(
        said,
        format!("vmsnap-agent {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn check_refuses_an_unknown_key_and_an_unreachable_libvirt_and_passes_a_good_configuration() {
    let folder = std::env::temp_dir().join(format!("vmsnap-check-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let file = folder.join("agent.toml");
    let check = |text: &str| {
        std::fs::write(&file, text).unwrap();
        agent(&["check", "--config", file.to_str().unwrap()])
    };
    let journal = format!("[journal]\npath = '{}/journal.db'\n", folder.display());
    let (ok, _, complaint) = check("[libvirt]\nurl = 'x'\n");
    assert!(
        !ok && complaint.contains("agent.toml:2") && complaint.contains("url"),
        "{complaint}"
    );
    let nowhere = format!("{journal}[libvirt]\nuri = 'qemu+unix:///system?socket=/nonexistent'\n");
    let (ok, _, complaint) = check(&nowhere);
    assert!(!ok && complaint.contains("libvirt.uri"), "{complaint}");
    let (ok, said, complaint) = check(&format!("{journal}[libvirt]\nuri = 'test:///default'\n"));
    assert!(ok && said.contains("are fine"), "{complaint}");
    std::fs::remove_dir_all(folder).unwrap();
}
