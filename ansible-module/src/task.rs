//! The task as Ansible hands it over: one flat JSON object in a file.
//!
//! Purpose: reads it, sets Ansible's own keys apart, and holds the rest
//! against the module's table.
//!
//! Invariants: a [`Task`] carries only options of its table that belong to its
//! action, each of its kind; what was not given (or was null, which is what an
//! undefined variable with a default of nothing becomes) has the default. All
//! problems are found at once, so that one run of a play shows them all.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::argument::{Argument, Fallback};
use crate::coerce::{Setting, coerce, nearest};

/// Ansible marks its own keys with this.
const INTERNAL: &str = "_ansible_";

/// Why a task could not be read. The text is for the task's `msg`.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// Nothing was named on the command line.
    #[error(
        "no arguments file was named: an Ansible module is run by Ansible, with the file as first argument"
    )]
    NoFile,
    /// The file could not be read.
    #[error("could not read the arguments file {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file holds something else.
    #[error("the arguments file {} does not hold a JSON object", path.display())]
    NotAnObject {
        /// The file.
        path: PathBuf,
        /// Where reading it failed, if it is no JSON at all.
        source: Option<serde_json::Error>,
    },
    /// Options are missing, unknown, or have wrong values.
    #[error("{}", .0.join("; "))]
    Options(Vec<String>),
}

/// What Ansible itself says about a task.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Setup {
    /// Change nothing, only say what would change.
    pub check_mode: bool,
    /// A diff is wanted.
    pub diff: bool,
    /// How often `-v` was given.
    pub verbosity: u64,
    /// The module's full name.
    pub module_name: Option<String>,
}

/// The arguments file, with Ansible's keys set apart.
#[derive(Clone, Debug)]
pub struct ArgumentsFile {
    /// Its path: unique for each execution of a task.
    pub path: PathBuf,
    /// What Ansible says.
    pub setup: Setup,
    options: Map<String, Value>,
}

impl ArgumentsFile {
    /// Reads it.
    ///
    /// # Errors
    /// [`TaskError`] when there is none, or it holds no JSON object.
    pub fn read(path: Option<&Path>) -> Result<Self, TaskError> {
        let path = path.ok_or(TaskError::NoFile)?.to_owned();
        let content = match std::fs::read(&path) {
            Ok(content) => content,
            Err(source) => return Err(TaskError::Unreadable { path, source }),
        };
        Self::understand(path, &content)
    }

    /// Understands the content of the file at `path`.
    ///
    /// # Errors
    /// [`TaskError::NotAnObject`].
    pub fn understand(path: PathBuf, content: &[u8]) -> Result<Self, TaskError> {
        match serde_json::from_slice(content) {
            Ok(Value::Object(all)) => Ok(Self::sort(path, all)),
            Ok(_) => Err(TaskError::NotAnObject { path, source: None }),
            Err(source) => Err(TaskError::NotAnObject {
                path,
                source: Some(source),
            }),
        }
    }

    fn sort(path: PathBuf, all: Map<String, Value>) -> Self {
        let (internal, options): (Map<_, _>, Map<_, _>) = all
            .into_iter()
            .partition(|(name, _)| name.starts_with(INTERNAL));
        let flag = |name: &str| internal.get(name).and_then(Value::as_bool).unwrap_or(false);
        let setup = Setup {
            check_mode: flag("_ansible_check_mode"),
            diff: flag("_ansible_diff"),
            verbosity: internal
                .get("_ansible_verbosity")
                .and_then(Value::as_u64)
                .unwrap_or(0),
            module_name: internal
                .get("_ansible_module_name")
                .and_then(Value::as_str)
                .map(str::to_owned),
        };
        ArgumentsFile {
            path,
            setup,
            options,
        }
    }

    /// What a file with this content would give.
    #[cfg(test)]
    pub fn of(content: Value) -> Self {
        let Value::Object(all) = content else {
            panic!("an object is needed")
        };
        Self::sort(PathBuf::from("/tmp/ansible-tmp-1-2-3/args"), all)
    }

    /// Holds the options against a module's table.
    ///
    /// # Errors
    /// [`TaskError::Options`] with every problem there is.
    pub fn against(self, table: &'static [Argument]) -> Result<Task, TaskError> {
        let mut problems = Vec::new();
        let mut settings = BTreeMap::new();
        let mut given = BTreeMap::new();
        for (name, value) in &self.options {
            let Some(argument) = find(table, name) else {
                problems.push(unknown(table, name));
                continue;
            };
            if value.is_null() {
                continue;
            }
            if let Some(earlier) = given.insert(argument.name, name) {
                problems.push(format!("\"{earlier}\" and \"{name}\" are the same option"));
                continue;
            }
            match coerce(argument, value) {
                Ok(setting) => drop(settings.insert(argument.name, setting)),
                Err(problem) => problems.push(format!("{name}: {problem}")),
            }
        }
        for argument in table.iter().filter(|argument| argument.required) {
            if !given.contains_key(argument.name) || blank(&settings, argument.name) {
                problems.push(format!("{} is required", argument.name));
            }
        }
        if let Some(Setting::Text(action)) = settings.get("action") {
            for argument in table.iter().filter(|argument| !argument.belongs_to(action)) {
                if given.contains_key(argument.name) {
                    problems.push(format!(
                        "{} does not belong to action {action}: it is for {}",
                        argument.name,
                        argument.actions.join(" and ")
                    ));
                }
            }
        }
        if !problems.is_empty() {
            return Err(TaskError::Options(problems));
        }
        // A list of VMs stays one even when it has a single entry, so that a
        // play over a group finds its results in the same place.
        let many = match given
            .get("vm_name")
            .and_then(|name| self.options.get(*name))
        {
            Some(Value::Array(_)) => true,
            Some(Value::String(text)) => text.contains(',') || text.trim_start().starts_with('['),
            _ => false,
        };
        Ok(Task {
            path: self.path,
            setup: self.setup,
            table,
            settings,
            many,
            given: self.options,
        })
    }
}

fn find(table: &'static [Argument], name: &str) -> Option<&'static Argument> {
    table
        .iter()
        .find(|argument| argument.name == name || argument.aliases.contains(&name))
}

fn unknown(table: &[Argument], name: &str) -> String {
    match nearest(name, table.iter().map(|argument| argument.name)) {
        Some(near) => format!("unknown option \"{name}\"; did you mean \"{near}\"?"),
        None => {
            let names: Vec<&str> = table.iter().map(|argument| argument.name).collect();
            format!(
                "unknown option \"{name}\"; the options are {}",
                names.join(", ")
            )
        }
    }
}

/// Whether a required option was given as empty text.
fn blank(settings: &BTreeMap<&str, Setting>, name: &str) -> bool {
    matches!(settings.get(name), Some(Setting::Text(text)) if text.trim().is_empty())
}

/// A task whose options are in order.
#[derive(Clone, Debug)]
pub struct Task {
    /// Path of the arguments file.
    pub path: PathBuf,
    /// What Ansible says.
    pub setup: Setup,
    /// Whether `vm_name` was a list.
    pub many: bool,
    table: &'static [Argument],
    settings: BTreeMap<&'static str, Setting>,
    given: Map<String, Value>,
}

impl Task {
    /// What was given for an option, without its default.
    pub fn given(&self, name: &str) -> Option<&Setting> {
        self.settings.get(name)
    }

    /// A text, given or by default; `None` when there is neither, or it is empty.
    pub fn text(&self, name: &str) -> Option<&str> {
        match (self.given(name), self.default(name)) {
            (Some(Setting::Text(text)), _) => Some(text.as_str()),
            (None, Fallback::Text(text)) => Some(text),
            _ => None,
        }
        .filter(|text| !text.is_empty())
    }

    /// A yes or no, given or by default; no when there is neither.
    pub fn flag(&self, name: &str) -> bool {
        match (self.given(name), self.default(name)) {
            (Some(Setting::Flag(flag)), _) => *flag,
            (None, Fallback::Flag(flag)) => flag,
            _ => false,
        }
    }

    /// A number, given or by default.
    pub fn number(&self, name: &str) -> Option<u64> {
        match (self.given(name), self.default(name)) {
            (Some(Setting::Number(number)), _) => Some(*number),
            (None, Fallback::Number(number)) => Some(number),
            _ => None,
        }
    }

    /// A length of time, given or by default.
    pub fn duration(&self, name: &str) -> Option<Duration> {
        match (self.given(name), self.default(name)) {
            (Some(Setting::Duration(duration)), _) => Some(*duration),
            (None, Fallback::Text(text)) => vmsnap_client::quantity::parse_duration(text).ok(),
            _ => None,
        }
    }

    /// A number of bytes, or of bytes a second, as given.
    pub fn bytes(&self, name: &str) -> Option<u64> {
        match self.given(name) {
            Some(Setting::Bytes(bytes)) => Some(*bytes),
            _ => None,
        }
    }

    /// Texts as given; `None` when the default holds.
    pub fn list(&self, name: &str) -> Option<&[String]> {
        match self.given(name) {
            Some(Setting::List(list)) => Some(list),
            _ => None,
        }
    }

    fn default(&self, name: &str) -> Fallback {
        find(self.table, name).map_or(Fallback::Absent, |argument| argument.default)
    }

    /// A name for this execution: the same when a broken connection makes ssh
    /// repeat the command, another one for every task, loop item and retry.
    pub fn execution_id(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.path.as_os_str().as_encoded_bytes());
        // Sorted, because the order of the keys carries no meaning.
        for (name, value) in self.given.iter().collect::<BTreeMap<_, _>>() {
            hash.update([0]);
            hash.update(name);
            hash.update([0]);
            hash.update(value.to_string());
        }
        let digest = hash.finalize();
        digest[..16]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// Whether [`Task::execution_id`] can come back only by a repetition of
    /// this very execution: Ansible makes a folder of its own for each.
    pub fn execution_is_unique(&self) -> bool {
        self.path.components().any(|part| {
            part.as_os_str()
                .to_string_lossy()
                .starts_with("ansible-tmp-")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::argument::Kind;
    use crate::tables::{ACTIONS, VM_SNAPSHOT, VM_SNAPSHOT_INFO};
    use serde_json::json;

    /// Every default of a table can be read as its option's kind.
    fn defaults_hold(table: &[Argument]) -> Result<(), String> {
        for argument in table {
            let fits = match (argument.default, argument.kind) {
                (Fallback::Absent, _)
                | (Fallback::Flag(_), Kind::Flag)
                | (Fallback::Number(_), Kind::Number)
                | (Fallback::List(_), Kind::List) => true,
                (Fallback::Text(text), _) => coerce(argument, &Value::from(text)).is_ok(),
                _ => false,
            };
            if !fits {
                return Err(argument.name.to_owned());
            }
        }
        Ok(())
    }

    fn file(options: Value) -> ArgumentsFile {
        ArgumentsFile::of(options)
    }

    fn task(options: Value) -> Result<Task, String> {
        file(options)
            .against(VM_SNAPSHOT)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn every_default_is_of_its_options_kind_and_every_name_is_used_once() {
        for table in [VM_SNAPSHOT, VM_SNAPSHOT_INFO] {
            assert_eq!(defaults_hold(table), Ok(()));
            let mut names: Vec<&str> = table
                .iter()
                .flat_map(|a| a.aliases.iter().copied().chain([a.name]))
                .collect();
            let all = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), all);
            for argument in table {
                assert!(
                    argument
                        .actions
                        .iter()
                        .all(|action| ACTIONS.contains(action))
                );
            }
        }
    }

    #[test]
    fn an_unknown_option_is_refused_by_name_with_the_nearest_one() {
        let refused = task(json!({"vm_name": "web01", "action": "create", "snapshotname": "a"}));
        assert_eq!(
            refused.unwrap_err(),
            "unknown option \"snapshotname\"; did you mean \"snapshot_name\"?"
        );
    }

    #[test]
    fn an_option_of_another_action_is_refused_naming_both() {
        let refused = task(
            json!({"vm_name": "web01", "action": "revert", "snapshot_name": "a", "memory": true}),
        );
        assert_eq!(
            refused.unwrap_err(),
            "memory does not belong to action revert: it is for create"
        );
    }

    #[test]
    fn all_problems_are_found_at_once() {
        let refused = task(json!({"action": "crate", "memory": "perhaps", "colour": "red"}));
        let text = refused.unwrap_err();
        assert!(text.contains("did you mean \"create\"?"), "{text}");
        assert!(
            text.contains("memory: \"perhaps\" is neither true nor false"),
            "{text}"
        );
        assert!(text.contains("unknown option \"colour\""), "{text}");
        assert!(text.contains("vm_name is required"), "{text}");
    }

    #[test]
    fn ansibles_own_keys_are_read_or_passed_over() {
        let file = file(json!({
            "vm_name": "web01", "action": "list", "_ansible_check_mode": true,
            "_ansible_diff": true, "_ansible_verbosity": 3, "_ansible_of_tomorrow": {"x": 1},
            "_ansible_module_name": "vmsnap.libvirt.vm_snapshot", "_ansible_tmpdir": null,
        }));
        assert_eq!(
            file.setup,
            Setup {
                check_mode: true,
                diff: true,
                verbosity: 3,
                module_name: Some("vmsnap.libvirt.vm_snapshot".into()),
            }
        );
        assert!(file.against(VM_SNAPSHOT).is_ok());
    }

    #[test]
    fn what_is_null_counts_as_not_given() {
        let task = task(
            json!({"vm_name": "web01", "action": "revert", "snapshot_name": "a", "memory": null}),
        )
        .unwrap();
        assert!(task.flag("sync_clock"));
        assert_eq!(task.text("state_after"), Some("auto"));
        assert_eq!(
            task.duration("wait_timeout"),
            Some(Duration::from_secs(300))
        );
        assert_eq!(task.given("wait_timeout"), None);
    }

    #[test]
    fn the_alias_means_the_same_and_both_together_are_refused() {
        assert!(task(json!({"name": "web01", "action": "list"})).is_ok());
        let refused = task(json!({"name": "web01", "vm_name": "web02", "action": "list"}));
        assert_eq!(
            refused.unwrap_err(),
            "\"name\" and \"vm_name\" are the same option"
        );
    }

    #[test]
    fn several_vms_come_as_a_list_or_with_commas() {
        for (vms, many) in [
            (json!("web01"), false),
            (json!("a,b"), true),
            (json!(["web01"]), true),
            (json!(7), false),
        ] {
            assert_eq!(
                task(json!({"vm_name": vms, "action": "list"}))
                    .unwrap()
                    .many,
                many
            );
        }
    }

    #[test]
    fn an_execution_keeps_its_id_and_every_other_has_another() {
        let id = |options: Value, path: &str| {
            let Value::Object(all) = options else {
                panic!("an object is needed")
            };
            let task = ArgumentsFile::sort(path.into(), all)
                .against(VM_SNAPSHOT)
                .unwrap();
            (task.execution_id(), task.execution_is_unique())
        };
        let one = json!({"vm_name": "a", "action": "list", "_ansible_verbosity": 0});
        let same = json!({"action": "list", "vm_name": "a", "_ansible_verbosity": 3});
        let here = "/root/.ansible/tmp/ansible-tmp-1.5-7-9/args";
        let there = "/tmp/args";
        assert_eq!(id(one.clone(), here), id(same, here));
        assert_ne!(id(one.clone(), here).0, id(one.clone(), there).0);
        assert_ne!(
            id(one.clone(), here).0,
            id(json!({"vm_name": "b", "action": "list"}), here).0
        );
        assert!(id(one.clone(), here).1);
        assert!(!id(one, there).1);
    }
}
