//! Arguments at random for the program itself, as Ansible calls it.

use std::process::{Command, Stdio};

use proptest::{collection::vec, prelude::*, sample::select};
use serde_json::Value;
use vmsnap_fuzz::{
    Class,
    inputs::{damaged, texts},
};

#[test]
fn the_program_writes_one_line_of_json_whatever_the_file_holds() {
    let folder = std::env::temp_dir().join(format!("vmsnap-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("args");
    let sound = br#"{"vm_name": "web1", "action": "create", "snapshot_name": "a", "memory": true}"#;
    let names = select(vec![
        "vm_name",
        "action",
        "snapshot_name",
        "memory",
        "max_age",
        "actoin",
    ]);
    let inputs = prop_oneof![
        damaged(sound.to_vec()),
        vec(any::<u8>(), 0..300),
        vec((names, texts()), 0..6).prop_map(|all| {
            let all = all
                .into_iter()
                .map(|(name, text)| (name.to_owned(), text.into()));
            Value::Object(all.collect()).to_string().into_bytes()
        }),
        (1..100_000_usize).prop_map(|deep| vec![b'['; deep]),
    ];
    Class::new("ansible, program", 4)
        .few(32)
        .check(&inputs, |content| {
            std::fs::write(&file, content).unwrap();
            let output = Command::new(env!("CARGO_BIN_EXE_vm-snapshot"))
                .arg(&file)
                .env("VMSNAP_AGENT", "unix:///nonexistent/vmsnap-fuzz.sock")
                .stdin(Stdio::null())
                .output()
                .unwrap();
            prop_assert!(output.stdout.is_ascii());
            prop_assert!(output.stderr.is_empty());
            let text = String::from_utf8(output.stdout).unwrap();
            prop_assert_eq!(text.matches('\n').count(), 1, "{}", text);
            let answer: Value = serde_json::from_str(&text).unwrap();
            let failed = answer["failed"].as_bool().unwrap();
            prop_assert_eq!(output.status.code(), Some(i32::from(failed)));
            Ok(())
        });
    std::fs::remove_dir_all(folder).unwrap();
}
