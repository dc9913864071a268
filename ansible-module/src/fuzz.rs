//! Arguments at random: whatever the file holds, there is one line of JSON.

use std::ffi::OsString;
use std::path::PathBuf;

use proptest::{collection::vec, prelude::*, sample::select};
use serde_json::{Map, Number, Value, json};
use vmsnap_fuzz::{
    Class,
    inputs::{damaged, numbers, texts},
};

use crate::{
    answered, reply, request,
    snapshot::Accepted,
    tables::{ACTIONS, VM_SNAPSHOT, VM_SNAPSHOT_INFO},
    task::ArgumentsFile,
};

/// Where no agent is.
const NOBODY: &str = "unix:///nonexistent/vmsnap-fuzz.sock";

/// An option's name: right, almost right, or anything.
fn names() -> impl Strategy<Value = String> {
    let right = || {
        let all: Vec<&str> = VM_SNAPSHOT
            .iter()
            .chain(VM_SNAPSHOT_INFO)
            .flat_map(|argument| argument.aliases.iter().copied().chain([argument.name]))
            .collect();
        select(all).prop_map(str::to_owned)
    };
    let own = vec![
        "_ansible_check_mode",
        "_ansible_diff",
        "_ansible_verbosity",
        "_ansible_module_name",
        "_ansible_",
    ];
    prop_oneof![
        12 => right(),
        2 => (right(), any::<prop::sample::Index>(), any::<Option<char>>()).prop_map(|(name, at, with)| {
            let mut chars: Vec<char> = name.chars().collect();
            let at = at.index(chars.len());
            match with {
                Some(with) => chars[at] = with,
                None => drop(chars.remove(at)),
            }
            chars.into_iter().collect()
        }),
        2 => select(own).prop_map(str::to_owned),
        1 => texts(),
    ]
}

/// Quantities as people write them, and not quite so.
fn quantities() -> impl Strategy<Value = String> {
    let units = vec![
        "", "s", "m", "h", "d", "w", "ms", "K", "M", "G", "T", "P", "E", "KB", "MiB", "/s", "G/s",
        "é", "h30m", " ",
    ];
    (numbers(), select(units), 0..3_u8).prop_map(|(number, unit, form)| match form {
        0 => format!("{number}{unit}"),
        1 => format!("{number}.{number}{unit}"),
        _ => format!("{}{unit}", "9".repeat(number.unsigned_abs() as usize % 60)),
    })
}

fn scalars() -> impl Strategy<Value = Value> {
    let words = vec![
        "create", "revert", "commit", "list", "cleanup", "confirm", "yes", "no", "auto",
        "external", "internal", "memory", "ok", "fail", "replace", "agent", "ssh", "keep",
        "delete", "report", "vda", "before", "web1", "[\"a\"]", "a,b", "20G",
    ];
    prop_oneof![
        1 => Just(Value::Null),
        3 => any::<bool>().prop_map(Value::from),
        2 => numbers().prop_map(Value::from),
        1 => any::<u64>().prop_map(Value::from),
        1 => any::<f64>().prop_map(|it| Number::from_f64(it).map_or(Value::Null, Value::Number)),
        3 => quantities().prop_map(Value::from),
        6 => select(words).prop_map(Value::from),
        4 => texts().prop_map(Value::from),
    ]
}

fn values() -> impl Strategy<Value = Value> {
    scalars().prop_recursive(4, 24, 6, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..6).prop_map(Value::from),
            vec((texts(), inner), 0..4).prop_map(|all| Value::Object(all.into_iter().collect())),
        ]
    })
}

/// Options at random, over some with which a task would be in order.
fn tasks() -> impl Strategy<Value = Value> {
    let sound = (select(ACTIONS.to_vec()), any::<bool>(), any::<bool>()).prop_map(
        |(action, named, many)| {
            let mut sound = json!({"action": action});
            sound["vm_name"] = if many {
                json!(["web1", "web2"])
            } else {
                json!("web1")
            };
            if named {
                sound["snapshot_name"] = json!("before");
            }
            sound
        },
    );
    let base = prop_oneof![3 => sound, 1 => Just(json!({}))];
    (base, vec((names(), values()), 0..6)).prop_map(|(mut base, more)| {
        if let Some(object) = base.as_object_mut() {
            object.extend(more);
        }
        base
    })
}

/// Keeps tests from calling an agent that somebody runs on this machine.
fn without_agent(mut options: Map<String, Value>) -> Map<String, Value> {
    let called = options
        .get("agent")
        .and_then(Value::as_str)
        .is_none_or(|text| vmsnap_client::Endpoint::parse(text).is_ok() || text.is_empty());
    if called {
        options.insert("agent".to_owned(), NOBODY.into());
    }
    options
}

/// What holds for a file, whatever is in it.
fn holds(
    runtime: &tokio::runtime::Runtime,
    content: &[u8],
    info: bool,
) -> Result<(), TestCaseError> {
    let path = || PathBuf::from("/tmp/ansible-tmp-1-2-3/args");
    let content = match serde_json::from_slice::<Value>(content) {
        Ok(Value::Object(options)) => Value::Object(without_agent(options))
            .to_string()
            .into_bytes(),
        _ => content.to_vec(),
    };
    let understood = ArgumentsFile::understand(path(), &content);
    if let Ok(file) = &understood
        && let Ok(task) = file.clone().against(VM_SNAPSHOT)
    {
        let spec = request::spec(&task, "web1");
        prop_assert_eq!(spec.vm_name, "web1");
        // One execution has one name.
        let again = ArgumentsFile::understand(path(), &content)
            .and_then(|file| file.against(VM_SNAPSHOT))
            .map_err(|error| TestCaseError::fail(error.to_string()))?;
        prop_assert_eq!(task.execution_id(), again.execution_id());
    }
    let program = OsString::from(if info {
        "AnsiballZ_vm_snapshot_info"
    } else {
        "AnsiballZ_vm_snapshot"
    });
    let answer = runtime.block_on(answered(understood, Some(&program), Accepted::default()));
    let line = reply::answer_line(answer);
    prop_assert!(line.is_ascii() && line.ends_with('\n'));
    prop_assert!(
        !line
            .trim_end_matches('\n')
            .contains(|c: char| c.is_control())
    );
    let answer: Value =
        serde_json::from_str(&line).map_err(|error| TestCaseError::fail(error.to_string()))?;
    prop_assert!(
        answer["changed"] == false,
        "nothing was reached, so nothing changed"
    );
    prop_assert!(answer["failed"].is_boolean() && answer["msg"].is_string());
    // Without an agent nothing but a list without VMs goes well.
    if answer["failed"] == false {
        prop_assert_eq!(&answer["results"], &json!([]));
    } else {
        let reasons = [
            json!("INVALID_ARGUMENTS"),
            json!("AGENT_UNREACHABLE"),
            json!("NO_ROUTE"),
        ];
        prop_assert!(
            reasons.contains(&answer["error"]["reason"]),
            "{}",
            answer["error"]
        );
    }
    Ok(())
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

#[test]
fn any_options_of_any_types_have_one_line_of_json_as_answer() {
    let runtime = runtime();
    Class::new("ansible, options", 120)
        .few(128)
        .check(&(tasks(), any::<bool>()), |(options, info)| {
            holds(&runtime, options.to_string().as_bytes(), info)
        });
}

#[test]
fn any_bytes_as_arguments_file_have_one_line_of_json_as_answer() {
    let sound = json!({
        "vm_name": ["web1", "web2"], "action": "create", "snapshot_name": "before", "memory": true,
        "max_age": "1h", "exclude_disks": ["vda"], "agent": NOBODY, "_ansible_check_mode": true,
    });
    let inputs = prop_oneof![
        6 => damaged(sound.to_string().into_bytes()),
        1 => vec(any::<u8>(), 0..300),
        1 => (1..100_000_usize, select(vec!["[", "{\"a\":", "\"", "-", "1e9"]))
            .prop_map(|(deep, what)| what.repeat(deep).into_bytes()),
    ];
    let runtime = runtime();
    Class::new("ansible, bytes", 60).check(&(inputs, any::<bool>()), |(content, info)| {
        holds(&runtime, &content, info)
    });
}
