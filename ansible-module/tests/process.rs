//! What Ansible sees of the binary, whatever happens: one line of JSON.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

const BINARY: &str = env!("CARGO_BIN_EXE_vm-snapshot");

/// A folder of this test's own, gone with it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vmsnap-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn file(&self, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join("args");
        std::fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn command(arguments: &Path) -> Command {
    let mut command = Command::new(BINARY);
    command
        .arg(arguments)
        .env_remove("VMSNAP_AGENT")
        .stdin(Stdio::null());
    command
}

/// The answer, after it was seen to be all there is.
fn only_answer(output: &Output) -> Value {
    let stdout = str::from_utf8(&output.stdout).expect("stdout is UTF-8");
    assert!(stdout.is_ascii(), "{stdout}");
    assert!(stdout.ends_with('\n'), "{stdout:?}");
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    assert_eq!(str::from_utf8(&output.stderr), Ok(""));
    let answer: Value = serde_json::from_str(stdout).expect("the line is JSON");
    assert!(
        answer["changed"].is_boolean() && answer["failed"].is_boolean(),
        "{answer}"
    );
    assert_eq!(
        output.status.code(),
        Some(i32::from(answer["failed"] == json!(true))),
        "{answer}"
    );
    answer
}

fn failure(name: &str, arguments: Value) -> Value {
    let folder = Folder::new(name);
    let path = folder.file(arguments.to_string());
    let answer = only_answer(&command(&path).output().unwrap());
    assert_eq!(answer["failed"], true, "{answer}");
    answer
}

#[test]
fn without_an_arguments_file_the_answer_is_still_json() {
    let output = Command::new(BINARY).stdin(Stdio::null()).output().unwrap();
    let answer = only_answer(&output);
    assert!(
        answer["msg"]
            .as_str()
            .unwrap()
            .contains("an Ansible module is run by Ansible")
    );
}

#[test]
fn a_broken_arguments_file_is_named_with_what_is_wrong_with_it() {
    let folder = Folder::new("broken");
    for content in [&b"{\"vm_name\": "[..], b"[]", b"", b"\xff\xfe", b"null"] {
        let path = folder.file(content);
        let answer = only_answer(&command(&path).output().unwrap());
        let msg = answer["msg"].as_str().unwrap();
        assert!(msg.contains(path.to_str().unwrap()), "{msg}");
        assert!(msg.contains("does not hold a JSON object"), "{msg}");
    }
    let gone = folder.0.join("gone");
    let answer = only_answer(&command(&gone).output().unwrap());
    assert!(
        answer["msg"]
            .as_str()
            .unwrap()
            .contains("could not read the arguments file")
    );
    assert_eq!(answer["error"]["reason"], "INVALID_ARGUMENTS");
}

#[test]
fn an_unknown_option_fails_with_the_nearest_name_and_echoes_no_argument() {
    let answer = failure(
        "unknown",
        json!({"vm_name": "web01", "action": "create", "snapshotname": "top-secret"}),
    );
    assert_eq!(
        answer["msg"],
        "unknown option \"snapshotname\"; did you mean \"snapshot_name\"?"
    );
    assert!(!answer.to_string().contains("top-secret"));
}

#[test]
fn where_no_agent_is_the_answer_says_what_to_look_at() {
    let answer = failure(
        "no-agent",
        json!({"vm_name": "wéb\u{2028}01", "action": "list", "agent": "unix:///tmp/no/such.sock"}),
    );
    let msg = answer["msg"].as_str().unwrap();
    assert!(
        msg.contains("no agent there") && msg.contains("/tmp/no/such.sock"),
        "{msg}"
    );
    assert!(msg.contains("is vmsnap-agent running"), "{msg}");
    assert_eq!(answer["error"]["reason"], "AGENT_UNREACHABLE");
}

#[test]
fn an_agent_across_the_network_needs_tls_and_is_refused() {
    let answer = failure(
        "tls",
        json!({"vm_name": "a", "action": "list", "agent": "kvm01:7443"}),
    );
    assert!(
        answer["msg"].as_str().unwrap().contains("mutual TLS"),
        "{answer}"
    );
}

#[test]
fn several_vms_have_an_answer_each() {
    let answer = failure(
        "several",
        json!({"vm_name": ["a", "b"], "action": "list", "agent": "unix:///tmp/no/such.sock"}),
    );
    // The agent is one for all, so that it is missing is said once.
    assert!(
        answer["msg"].as_str().unwrap().contains("no agent there"),
        "{answer}"
    );
    let empty = Folder::new("empty");
    let path = empty.file(json!({"vm_name": [], "action": "list"}).to_string());
    let answer = only_answer(&command(&path).output().unwrap());
    assert_eq!(
        (&answer["changed"], &answer["results"]),
        (&json!(false), &json!([]))
    );
}

#[test]
fn the_module_is_told_by_ansibles_own_key_or_by_its_file_name() {
    let folder = Folder::new("name");
    let path = folder.file(
        json!({"action": "list", "_ansible_module_name": "vmsnap.libvirt.vm_snapshot_info"})
            .to_string(),
    );
    let answer = only_answer(&command(&path).output().unwrap());
    assert!(
        answer["msg"]
            .as_str()
            .unwrap()
            .contains("unknown option \"action\""),
        "{answer}"
    );
    let path = folder.file(json!({"action": "list"}).to_string());
    let link = folder.0.join("AnsiballZ_vm_snapshot_info");
    std::os::unix::fs::symlink(BINARY, &link).unwrap();
    let answer = only_answer(
        &Command::new(link)
            .arg(&path)
            .stdin(Stdio::null())
            .output()
            .unwrap(),
    );
    assert!(
        answer["msg"]
            .as_str()
            .unwrap()
            .contains("unknown option \"action\""),
        "{answer}"
    );
}

#[test]
fn a_reader_that_has_gone_away_is_passed_over_in_silence() {
    let folder = Folder::new("pipe");
    let path = folder.file(json!({}).to_string());
    let mut child = command(&path)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut stderr = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut stderr)
        .unwrap();
    let status = child.wait().unwrap();
    assert_eq!(stderr, "");
    // Either it wrote before the pipe was closed or after: both are one exit.
    assert_eq!(status.code(), Some(1));
}
