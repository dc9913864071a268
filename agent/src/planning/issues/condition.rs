//! Conditions of the catalogue: one comparison a line, such as
//! `disk.source = block | network` or `host.libvirt < 9.10`.
//!
//! Invariants: pure; a condition names a subject and one of its properties; what
//! it is compared with is read as the property's own kind (version, number,
//! flag, text), so that `0.10` is a version here and a text there.

use std::{cmp::Ordering, fmt};

use serde::Deserialize;

use crate::planning::actions::kind;

/// What a condition is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// The hypervisor.
    Host,
    /// The VM.
    Vm,
    /// What is asked and planned.
    Plan,
    /// A disk that the guest can write.
    Disk,
    /// A drive with a medium.
    Drive,
    /// A folder or pool in which disks of the VM lie.
    Place,
    /// A snapshot of the VM.
    Snapshot,
}

impl Subject {
    /// All of them, as they are written.
    pub const ALL: [(&'static str, Self); 7] = [
        ("host", Self::Host),
        ("vm", Self::Vm),
        ("plan", Self::Plan),
        ("disk", Self::Disk),
        ("drive", Self::Drive),
        ("place", Self::Place),
        ("snapshot", Self::Snapshot),
    ];

    /// Finds one by its word.
    #[must_use]
    pub fn of(word: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .find(|(name, _)| *name == word)
            .map(|(_, subject)| *subject)
    }
}

/// What is found of a property.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Yes or no.
    Flag(bool),
    /// A count.
    Number(u64),
    /// `major * 1_000_000 + minor * 1_000 + release`, as libvirt counts.
    Version(u64),
    /// A word or a path.
    Text(String),
    /// Several words: equal means that one of them is.
    Words(Vec<&'static str>),
    /// Depends on a plan, and there is none: fulfils every condition.
    Open,
}

impl fmt::Display for Value {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => write!(out, "{flag}"),
            Self::Number(number) => write!(out, "{number}"),
            Self::Version(version) => out.write_str(&kind::version(*version)),
            Self::Text(text) => out.write_str(text),
            Self::Words(words) => out.write_str(&words.join(", ")),
            Self::Open => Ok(()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Relation {
    Is,
    IsNot,
    Below,
    AtMost,
    Above,
    AtLeast,
}

/// One comparison.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Condition {
    /// What it is about.
    pub subject: Subject,
    /// Which property.
    pub key: String,
    relation: Relation,
    /// Alternatives.
    wanted: Vec<String>,
}

impl TryFrom<String> for Condition {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = |what: &str| format!("condition '{text}': {what}");
        let mut words = text.splitn(3, ' ');
        let (name, relation, wanted) = match (words.next(), words.next(), words.next()) {
            (Some(name), Some(relation), Some(wanted)) => (name, relation, wanted),
            _ => return Err(wrong("'SUBJECT.PROPERTY RELATION VALUE' is needed")),
        };
        let (subject, key) = name
            .split_once('.')
            .and_then(|(subject, key)| Some((Subject::of(subject)?, key)))
            .ok_or_else(|| wrong("it begins with no known subject"))?;
        let relation = match relation {
            "=" => Relation::Is,
            "!=" => Relation::IsNot,
            "<" => Relation::Below,
            "<=" => Relation::AtMost,
            ">" => Relation::Above,
            ">=" => Relation::AtLeast,
            _ => return Err(wrong("the relation is one of = != < <= > >=")),
        };
        let wanted: Vec<String> = wanted.split(" | ").map(str::to_owned).collect();
        if wanted.len() > 1 && !matches!(relation, Relation::Is | Relation::IsNot) {
            return Err(wrong("only = and != take alternatives"));
        }
        Ok(Self {
            subject,
            key: key.to_owned(),
            relation,
            wanted,
        })
    }
}

impl Condition {
    /// Whether a property fulfils it.
    ///
    /// # Errors
    /// When the property is of a kind that cannot be compared so.
    pub fn holds(&self, found: &Value) -> Result<bool, String> {
        let mut equal = false;
        let mut order = None;
        for wanted in &self.wanted {
            let compared = match found {
                Value::Open => return Ok(true),
                Value::Flag(flag) => flag.cmp(&self.read(wanted)?),
                Value::Number(number) => number.cmp(&self.read(wanted)?),
                Value::Version(version) => version.cmp(&self.version(wanted)?),
                Value::Text(text) => text.as_str().cmp(wanted),
                Value::Words(words) if words.contains(&wanted.as_str()) => Ordering::Equal,
                Value::Words(_) => Ordering::Less,
            };
            equal |= compared == Ordering::Equal;
            order = Some(compared);
        }
        let ordered = matches!(found, Value::Number(_) | Value::Version(_));
        let order = order.filter(|_| ordered).ok_or_else(|| {
            format!(
                "{} has no order, so it is compared with = or != only",
                self.key
            )
        });
        match self.relation {
            Relation::Is => Ok(equal),
            Relation::IsNot => Ok(!equal),
            Relation::Below => Ok(order?.is_lt()),
            Relation::AtMost => Ok(order?.is_le()),
            Relation::Above => Ok(order?.is_gt()),
            Relation::AtLeast => Ok(order?.is_ge()),
        }
    }

    fn read<T: std::str::FromStr>(&self, wanted: &str) -> Result<T, String> {
        wanted
            .parse()
            .map_err(|_| format!("{} cannot be compared with '{wanted}'", self.key))
    }

    fn version(&self, wanted: &str) -> Result<u64, String> {
        let mut version = 0;
        let mut parts = wanted.split('.');
        for scale in [1_000_000, 1_000, 1] {
            if let Some(part) = parts.next() {
                version += self.read::<u64>(part)? * scale;
            }
        }
        Ok(version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(condition: &str, found: &Value) -> Result<bool, String> {
        Condition::try_from(condition.to_owned())?.holds(found)
    }

    #[test]
    fn a_value_is_compared_as_what_the_property_is() {
        let libvirt = Value::Version(9_010_000);
        assert_eq!(holds("host.libvirt >= 9.10", &libvirt), Ok(true));
        // As text, 9.9 would be the larger one.
        assert_eq!(holds("host.libvirt < 9.9", &libvirt), Ok(false));
        assert_eq!(holds("host.libvirt < 10", &libvirt), Ok(true));
        let compat = Value::Text("0.10".into());
        assert_eq!(holds("disk.compat = 0.10", &compat), Ok(true));
        assert_eq!(holds("disk.compat = 0.1", &compat), Ok(false));
        assert_eq!(holds("disk.source = block | file", &compat), Ok(false));
        assert_eq!(
            holds("place.free_percent <= 9", &Value::Number(10)),
            Ok(false)
        );
        assert_eq!(holds("vm.vtpm = true", &Value::Flag(true)), Ok(true));
        let does = Value::Words(vec!["create", "create-disks"]);
        assert_eq!(holds("plan.does = revert | create", &does), Ok(true));
        assert_eq!(holds("plan.does != create", &does), Ok(false));
        assert_eq!(holds("plan.does != stop", &Value::Words(vec![])), Ok(true));
    }

    #[test]
    fn what_depends_on_a_plan_is_open_without_one() {
        assert_eq!(holds("disk.covered = true", &Value::Open), Ok(true));
    }

    #[test]
    fn a_condition_that_makes_no_sense_is_an_error() {
        for text in ["vm.state", "cat.colour = red", "vm.state ~ running"] {
            assert!(
                holds(text, &Value::Open).unwrap_err().contains(text),
                "{text}"
            );
        }
        assert!(holds("vm.state < running", &Value::Text("paused".into())).is_err());
        assert!(holds("place.free < 1 | 2", &Value::Number(1)).is_err());
        assert!(holds("vm.vtpm = yes", &Value::Flag(true)).is_err());
        assert!(holds("host.qemu > new", &Value::Version(1)).is_err());
    }
}
