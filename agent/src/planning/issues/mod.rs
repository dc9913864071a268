//! Known issues: the catalogue that is built in, and what this host taught.
//!
//! The catalogue is data (`catalogue.toml`). Each entry says when it applies, as
//! conditions over the facts and the plan, what happens then and what to do. A
//! plan that meets an entry warns before anything is touched; a fault that an
//! entry explains carries its advice.
//!
//! Invariants: pure; an entry warns only with a plan that does what its
//! conditions on `plan.does` name; one thing is never warned of twice.

mod condition;
mod learned;
mod scene;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::LazyLock,
};

use serde::Deserialize;

use super::{
    facts::Facts,
    plan::Warning,
    reason::{Fault, Reason},
    request::Request,
    step::Step,
};
use condition::{Condition, Subject};
use scene::{Planned, Properties, Scene};

pub use learned::{FULL_BEFORE, KNOWN_FIX, Learned, fixes, is_about};

/// The data file.
const CATALOGUE: &str = include_str!("catalogue.toml");
/// Metadata key of the catalogue's entry that explains a fault.
pub const KNOWN_ISSUE: &str = "known_issue";
/// Metadata key of what that entry says to do.
pub const ADVICE: &str = "advice";

/// One entry of the catalogue.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Issue {
    /// Stable id, which is also the code of its warning.
    pub id: String,
    /// In a few words.
    pub title: String,
    /// When it applies, for people.
    pub applies_when: String,
    /// What happens.
    pub what_happens: String,
    /// What to do.
    pub what_to_do: String,
    /// The reason with which the agent refuses, or fails, because of it.
    pub reason: Option<Reason>,
    /// Conditions, all of which must hold.
    #[serde(default)]
    when: Vec<Condition>,
    /// What is found, with `{subject.property}` in place of what it is found on.
    #[serde(default)]
    found: String,
    /// Ids that this one is the stronger form of: they are left out beside it.
    #[serde(default)]
    instead_of: Vec<String>,
    /// The faults that it explains.
    explains: Option<Explains>,
}

/// Faults that an entry explains.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Explains {
    reason: Reason,
    /// What libvirt or QEMU says.
    says: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Catalogue {
    issue: Vec<Issue>,
}

/// Understands a catalogue.
///
/// # Errors
/// What is wrong, and where.
pub fn parse(text: &str) -> Result<Vec<Issue>, toml::de::Error> {
    Ok(toml::from_str::<Catalogue>(text)?.issue)
}

/// The catalogue that is built in, by id.
#[must_use]
pub fn catalogue() -> &'static [Issue] {
    // A test holds that the data file can be understood.
    static ALL: LazyLock<Vec<Issue>> = LazyLock::new(|| parse(CATALOGUE).unwrap_or_default());
    &ALL
}

/// An entry that applies, and what it was found on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The entry.
    pub issue: &'static Issue,
    /// A sentence that names what it was found on.
    pub on: String,
}

impl Issue {
    /// Whether a plan can warn of it.
    #[must_use]
    pub fn warns(&self) -> bool {
        self.when
            .iter()
            .any(|condition| condition.subject == Subject::Plan && condition.key == "does")
    }

    /// Whether it applies by what is found, rather than by a fault alone.
    #[must_use]
    pub fn has_conditions(&self) -> bool {
        !self.when.is_empty()
    }

    /// Whether it explains faults of any kind.
    #[must_use]
    pub fn explains_faults(&self) -> bool {
        self.explains.is_some()
    }

    /// Whether it explains a fault.
    #[must_use]
    pub fn explains(&self, fault: &Fault) -> bool {
        self.explains.as_ref().is_some_and(|explains| {
            explains.reason == fault.reason && fault.message.contains(&explains.says)
        })
    }

    /// What it is found on, if it applies.
    fn found(&self, scene: &Scene) -> Result<Option<String>, String> {
        if self.when.is_empty() {
            return Ok(None);
        }
        let mut matching: BTreeMap<Subject, Vec<&Properties>> = BTreeMap::new();
        for (_, subject) in Subject::ALL {
            let conditions: Vec<&Condition> = self
                .when
                .iter()
                .filter(|condition| condition.subject == subject)
                .collect();
            let mut found = Vec::new();
            for properties in scene.subjects(subject) {
                if all_hold(&conditions, properties)? {
                    found.push(properties);
                }
            }
            if found.is_empty() && !conditions.is_empty() {
                return Ok(None);
            }
            matching.insert(subject, found);
        }
        fill(&self.found, &matching).map(Some)
    }
}

fn all_hold(conditions: &[&Condition], properties: &Properties) -> Result<bool, String> {
    for condition in conditions {
        let found = properties
            .get(condition.key.as_str())
            .ok_or_else(|| format!("there is no property '{}'", condition.key))?;
        if !condition.holds(found)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Puts what was found in the place of each `{subject.property}`.
fn fill(text: &str, found: &BTreeMap<Subject, Vec<&Properties>>) -> Result<String, String> {
    let mut parts = text.split('{');
    let mut filled = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, rest) = part
            .split_once('}')
            .ok_or_else(|| format!("'{{{part}' has no end"))?;
        let values = name
            .split_once('.')
            .and_then(|(subject, key)| {
                let all = found.get(&Subject::of(subject)?)?;
                all.iter()
                    .map(|properties| properties.get(key).map(ToString::to_string))
                    .collect::<Option<Vec<String>>>()
            })
            .ok_or_else(|| format!("there is no property '{name}'"))?;
        let mut seen = BTreeSet::new();
        let values: Vec<&str> = values
            .iter()
            .map(String::as_str)
            .filter(|value| seen.insert(*value))
            .collect();
        filled.push_str(&values.join(", "));
        filled.push_str(rest);
    }
    Ok(filled)
}

/// Entries that apply in a scene.
fn matching(scene: &Scene) -> Vec<Found> {
    let all: Vec<Found> = catalogue()
        .iter()
        .filter(|issue| !scene.planned || issue.warns())
        .filter_map(|issue| {
            // A test holds that the conditions of every entry make sense.
            let on = issue.found(scene).ok().flatten()?;
            Some(Found { issue, on })
        })
        .collect();
    let weaker: BTreeSet<&str> = all
        .iter()
        .flat_map(|found| &found.issue.instead_of)
        .map(String::as_str)
        .collect();
    all.iter()
        .filter(|found| !weaker.contains(found.issue.id.as_str()))
        .cloned()
        .collect()
}

/// What a plan has to warn of before anything is touched: entries of the
/// catalogue, and places that were full before.
#[must_use]
pub fn warnings(request: &Request, facts: &Facts, steps: &[Step]) -> Vec<Warning> {
    let scene = Scene::of(facts, Some(Planned { request, steps }));
    let mut warnings: Vec<Warning> = matching(&scene)
        .into_iter()
        .map(|found| Warning::new(&found.issue.id, found.on, &found.issue.what_to_do))
        .collect();
    warnings.extend(
        written(request, facts, steps)
            .into_iter()
            .filter_map(|path| learned::warning(path, facts)),
    );
    warnings
}

/// Folders into which steps write data.
#[must_use]
pub fn written<'a>(request: &'a Request, facts: &'a Facts, steps: &'a [Step]) -> BTreeSet<&'a str> {
    scene::written(Planned { request, steps }, facts)
}

/// Entries of the catalogue that apply to a VM now, whatever is done to it.
#[must_use]
pub fn applying(facts: &Facts) -> Vec<Found> {
    matching(&Scene::of(facts, None))
}

/// Adds to a fault of a run on `vm` what is known of it: fixes that worked here,
/// and the catalogue's entry that explains it.
#[must_use]
pub fn explained(mut fault: Fault, vm: &str, learned: &[Learned]) -> Fault {
    for (at, fix) in (1..).zip(fixes(&fault, vm, learned)) {
        fault = fault.with(&format!("{KNOWN_FIX}_{at}"), fix);
    }
    match catalogue().iter().find(|issue| issue.explains(&fault)) {
        Some(issue) => fault
            .with(KNOWN_ISSUE, &issue.id)
            .with(ADVICE, &issue.what_to_do),
        None => fault,
    }
}
