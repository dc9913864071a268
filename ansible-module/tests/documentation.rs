//! The collection's documentation says what the binary does, and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

fn collection() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../collection")
}

/// A documentation block of a stub, such as `DOCUMENTATION`.
fn block(module: &str, name: &str) -> Value {
    let path = collection()
        .join("plugins/modules")
        .join(format!("{module}.py"));
    let stub = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let opening = format!("\n{name} = r\"\"\"");
    let text = stub
        .split_once(&opening)
        .and_then(|(_, rest)| rest.split_once("\"\"\""))
        .map(|(block, _)| block)
        .unwrap_or_else(|| panic!("{module}.py has no {name}"));
    serde_yaml_ng::from_str(text).unwrap_or_else(|e| panic!("{name} of {module}.py: {e}"))
}

fn table(module: &str) -> BTreeMap<String, Value> {
    let output = Command::new(env!("CARGO_BIN_EXE_vm-snapshot"))
        .args(["--argument-spec", module])
        .output()
        .expect("the binary runs");
    let spec: Value = serde_json::from_slice(&output.stdout).expect("the table is JSON");
    assert_eq!(spec["module"], module);
    serde_json::from_value(spec["options"].clone()).expect("options are an object")
}

/// Names that an option's text refers to as `O(name)` or `O(name=value)`.
fn references(text: &str, markup: &str) -> Vec<(String, Option<String>)> {
    text.split(markup)
        .skip(1)
        .filter_map(|rest| rest.split_once(')'))
        .map(|(inside, _)| match inside.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (inside.to_owned(), None),
        })
        .filter(|(name, _)| !name.contains(['#', ':']))
        .collect()
}

#[test]
fn every_option_is_documented_as_the_binary_takes_it_and_no_other_is() {
    for module in ["vm_snapshot", "vm_snapshot_info"] {
        let documented = block(module, "DOCUMENTATION");
        assert_eq!(documented["module"], module);
        let documented: BTreeMap<String, Value> =
            serde_json::from_value(documented["options"].clone()).unwrap();
        let table = table(module);
        assert_eq!(
            documented.keys().collect::<BTreeSet<_>>(),
            table.keys().collect::<BTreeSet<_>>(),
            "options of {module}"
        );
        for (name, option) in &table {
            let written = &documented[name];
            for key in ["type", "elements", "default"] {
                assert_eq!(
                    written.get(key).unwrap_or(&Value::Null),
                    option.get(key).unwrap_or(&Value::Null),
                    "{key} of {name}"
                );
            }
            assert_eq!(
                written.get("required").unwrap_or(&json!(false)),
                &option["required"],
                "required of {name}"
            );
            for key in ["choices", "aliases"] {
                assert_eq!(
                    written.get(key).unwrap_or(&json!([])),
                    &option[key],
                    "{key} of {name}"
                );
            }
        }
    }
}

#[test]
fn what_the_documentation_refers_to_is_there() {
    for module in ["vm_snapshot", "vm_snapshot_info"] {
        let options = table(module);
        let returned: BTreeMap<String, Value> =
            serde_json::from_value(block(module, "RETURN")).unwrap();
        let texts = [
            block(module, "DOCUMENTATION").to_string(),
            block(module, "RETURN").to_string(),
        ];
        for text in &texts {
            for (name, value) in references(text, " O(") {
                let option = options
                    .get(&name)
                    .unwrap_or_else(|| panic!("{module}: O({name})"));
                if let Some(value) = value
                    && option["choices"] != json!([])
                {
                    let choices = option["choices"].as_array().unwrap();
                    assert!(
                        choices.contains(&json!(value)),
                        "{module}: O({name}={value})"
                    );
                }
            }
            for (name, _) in references(text, "RV(") {
                assert!(returned.contains_key(&name), "{module}: RV({name})");
            }
        }
    }
}

#[test]
fn every_example_uses_options_of_the_module_that_belong_to_its_action() {
    fn tasks(of: &Value, found: &mut Vec<(String, Value)>) {
        match of {
            Value::Array(items) => items.iter().for_each(|item| tasks(item, found)),
            Value::Object(keys) => {
                for (key, value) in keys {
                    match key.strip_prefix("vmsnap.libvirt.") {
                        Some(module) => found.push((module.to_owned(), value.clone())),
                        None => tasks(value, found),
                    }
                }
            }
            _ => {}
        }
    }
    let mut found = Vec::new();
    for module in ["vm_snapshot", "vm_snapshot_info"] {
        tasks(&block(module, "EXAMPLES"), &mut found);
    }
    for play in std::fs::read_dir(collection().join("playbooks")).unwrap() {
        let path = play.unwrap().path();
        if path.extension().is_some_and(|ext| ext == "yml") {
            let text = std::fs::read_to_string(&path).unwrap();
            tasks(&serde_yaml_ng::from_str(&text).unwrap(), &mut found);
        }
    }
    assert!(found.len() > 15, "only {} tasks were found", found.len());
    for (module, given) in found {
        let options = table(&module);
        let Value::Object(given) = given else {
            continue;
        };
        for name in given.keys() {
            let option = options
                .get(name)
                .unwrap_or_else(|| panic!("{module} has no {name}"));
            let actions = option["actions"].as_array().unwrap();
            assert!(
                actions.is_empty() || actions.contains(&given["action"]),
                "{name} does not belong to {}",
                given["action"]
            );
        }
    }
}

#[test]
fn the_modules_are_links_to_one_binary() {
    for module in ["vm_snapshot", "vm_snapshot_info"] {
        let link = std::fs::read_link(collection().join("plugins/modules").join(module)).unwrap();
        assert_eq!(link, Path::new("../bin/vm-snapshot-x86_64"));
    }
}
