//! What a script sees of `vmsnap`: exit status, standard output, standard error.

use std::process::{Command, Output};

use serde_json::Value;

fn vmsnap(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmsnap"))
        .args(arguments)
        .env_remove("VMSNAP_AGENT")
        .env("LC_ALL", "C")
        .output()
        .unwrap()
}

#[test]
fn a_missing_agent_is_status_3_with_nothing_on_standard_output() {
    let output = vmsnap(&["--agent", "/nowhere/agent.sock", "ls"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(output.stdout.is_empty());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.starts_with("x no agent there: /nowhere/agent.sock does not exist\n"),
        "{said}"
    );
    assert!(said.is_ascii());
}

#[test]
fn with_json_an_error_is_one_document_on_standard_output() {
    let output = vmsnap(&["--json", "--agent", "/nowhere/agent.sock", "create", "web1"]);
    assert_eq!(output.status.code(), Some(3));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["error"]["code"], "unavailable");
}

#[test]
fn with_json_what_fails_without_an_agent_is_a_document_too() {
    let output = vmsnap(&["--json", "cert", "person", "x", "--dir", "/nowhere"]);
    assert_eq!(output.status.code(), Some(1));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let message = document["error"]["message"].as_str().unwrap();
    assert!(message.contains("/nowhere/ca.pem"), "{document}");
    assert_eq!(document["error"]["reason"], "FAILED");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("/nowhere/ca.pem"), "{said}");
}

#[test]
fn wrong_use_is_status_2() {
    for arguments in [
        &["create"][..],
        &["nonsense"],
        &["--agent", "kvm1", "ls"],
        &["commit", "web1", "--resize-to", "much"],
        &["commit", "web1", "before", "--all"],
        &["cleanup", "web1", "before", "--keep-last", "3"],
        &["create", "web1", "--exclude-disk", "vdb"],
    ] {
        assert_eq!(vmsnap(arguments).status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn a_variable_names_the_agent_and_an_empty_one_does_not() {
    let with = |value: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_vmsnap"))
            .arg("ls")
            .env("VMSNAP_AGENT", value)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (status, said) = with("/nowhere/other.sock");
    assert!(
        status == Some(3) && said.contains("/nowhere/other.sock"),
        "{said}"
    );
    let (status, said) = with("kvm1");
    assert!(
        status == Some(2) && said.contains("the port is missing"),
        "{said}"
    );
    let (_, said) = with("");
    assert!(!said.contains("empty"), "{said}");
}

#[test]
fn the_own_version_is_told_without_an_agent() {
    let output = vmsnap(&["--json", "--agent", "/nowhere/agent.sock", "version"]);
    assert_eq!(output.status.code(), Some(0));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["vmsnap"], env!("CARGO_PKG_VERSION"));
    assert_eq!(document["agent"], Value::Null);
}
