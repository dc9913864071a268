//! What is hidden from callers who may see some VMs only.
//!
//! Purpose: plans, events, runs and errors about a VM that a caller sees can name
//! others, as users of its files, as volumes of its pool, as what was probably
//! meant. Before they are sent, the names of VMs that he may not see become
//! "another VM", volumes that are of no VM that he sees are left out, and so are
//! orphans, which may be anybody's, also where a clean-up says why they stay.
//!
//! Invariant: who sees all VMs gets everything as it is, at no cost.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::Status;

use super::errors;
use crate::{
    flow::Record,
    journal::{RunRow, Stamped},
    planning::{
        Facts, Fault, Outcome, Plan, Reason,
        facts::Storage,
        issues::{Found, Learned},
        outcome::{FILE, Verdict},
    },
    trust::{Access, Sight, Tenure},
    workflows::{Event, Workflows},
};

/// What stands for a name that is hidden.
const ANOTHER: &str = "another VM";

/// What users of files are told with, when it is one of their snapshots that uses it.
const SNAPSHOT: &str = " (snapshot ";

/// What makes a veil anew.
type Renewing = Pin<Box<dyn Future<Output = Result<Veil, Status>> + Send>>;

/// The events of a run as an open stream's caller may see them: what is hidden from
/// him is known anew whenever his roles are.
pub struct Veiled {
    events: ReceiverStream<Event>,
    workflows: Workflows,
    tenure: Tenure,
    veil: Veil,
    renewing: Option<Renewing>,
}

impl Veiled {
    /// Of these events, with what is hidden now.
    pub fn new(
        events: ReceiverStream<Event>,
        workflows: Workflows,
        tenure: Tenure,
        veil: Veil,
    ) -> Self {
        Self {
            events,
            workflows,
            tenure,
            veil,
            renewing: None,
        }
    }
}

impl Stream for Veiled {
    type Item = Result<Event, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(renewing) = &mut self.renewing {
                let renewed = ready!(renewing.as_mut().poll(cx));
                self.renewing = None;
                match renewed {
                    Ok(veil) => self.veil = veil,
                    Err(status) => return Poll::Ready(Some(Err(status))),
                }
            }
            let Some(access) = self.tenure.renewed() else {
                let event = ready!(Pin::new(&mut self.events).poll_next(cx));
                return Poll::Ready(event.map(|event| self.veil.event(event)));
            };
            let workflows = self.workflows.clone();
            self.renewing = Some(Box::pin(async move { Veil::of(&workflows, &access).await }));
        }
    }
}

/// Names of the VMs of the host that a caller may see.
///
/// # Errors
/// When libvirt does not answer.
pub async fn seen_names(workflows: &Workflows, sight: &Sight) -> Result<Vec<String>, Fault> {
    let all = workflows.observer().vms().await?;
    Ok(all
        .into_iter()
        .map(|vm| vm.name)
        .filter(|name| sight.sees(name))
        .collect())
}

/// What is hidden from one caller.
#[derive(Debug, Clone)]
pub struct Veil(Option<Names>);

#[derive(Debug, Clone)]
struct Names {
    sight: Sight,
    seen: Vec<String>,
    /// The longest first, so that none is taken for a part of another.
    hidden: Vec<String>,
}

impl Veil {
    /// For a caller.
    ///
    /// # Errors
    /// When libvirt does not tell which VMs there are.
    pub async fn of(workflows: &Workflows, access: &Access) -> Result<Self, Status> {
        let sight = access.sight();
        if sight.sees_all() {
            return Ok(Self(None));
        }
        let all = workflows
            .observer()
            .vms()
            .await
            .map_err(|fault| errors::status(&fault))?;
        let names = all.into_iter().map(|vm| vm.name);
        let (seen, mut hidden): (Vec<_>, Vec<_>) = names.partition(|name| sight.sees(name));
        hidden.sort_by_key(|name| std::cmp::Reverse(name.len()));
        Ok(Self(Some(Names {
            sight,
            seen,
            hidden,
        })))
    }

    /// A fault as a status.
    pub fn status(&self, fault: &Fault) -> Status {
        errors::status(&self.fault(fault.clone()))
    }

    /// A fault.
    pub fn fault(&self, mut fault: Fault) -> Fault {
        let Some(names) = &self.0 else {
            return fault;
        };
        if fault.reason == Reason::VmNotFound
            && let Some(vm) = fault.metadata.get("vm")
        {
            return crate::observe::no_such_vm(vm, names.seen.iter().map(String::as_str));
        }
        fault.message = names.text(&fault.message);
        for value in fault.metadata.values_mut() {
            *value = names.text(value);
        }
        for violation in &mut fault.violations {
            violation.problem = names.text(&violation.problem);
        }
        fault
    }

    /// A plan.
    ///
    /// # Errors
    /// When it does not survive the way through text; none does not.
    pub fn plan(&self, mut plan: Plan) -> Result<Plan, Status> {
        self.verdicts(&mut plan.verdicts);
        self.through(plan)
    }

    /// Facts, as far as they are sent.
    pub fn facts(&self, mut facts: Facts) -> Facts {
        if let Some(names) = &self.0 {
            names.storage(&mut facts.storage);
        }
        facts
    }

    /// An event.
    ///
    /// # Errors
    /// As [`Veil::plan`].
    pub fn event(&self, event: Event) -> Result<Event, Status> {
        match (&self.0, event) {
            (Some(_), Event::Record(stamped)) => {
                let Stamped {
                    sequence,
                    time,
                    record,
                } = (*stamped).clone();
                let record = match record {
                    Record::Planned { plan } => Record::Planned {
                        plan: Box::new(self.plan(*plan)?),
                    },
                    // A name that stands alone in its metadata is in no sentence.
                    Record::StepFailed {
                        index,
                        took_ms,
                        fault,
                    } => Record::StepFailed {
                        index,
                        took_ms,
                        fault: self.fault(fault),
                    },
                    Record::Closed {
                        closing,
                        outcome,
                        fault,
                    } => Record::Closed {
                        closing,
                        outcome: match outcome {
                            Some(outcome) => Some(Box::new(self.outcome(*outcome)?)),
                            None => None,
                        },
                        fault: fault.map(|fault| self.fault(fault)),
                    },
                    other => self.through(other)?,
                };
                Ok(Event::Record(std::sync::Arc::new(Stamped {
                    sequence,
                    time,
                    record,
                })))
            }
            (_, event) => Ok(event),
        }
    }

    /// A run.
    ///
    /// # Errors
    /// As [`Veil::plan`].
    pub fn run(&self, mut run: RunRow) -> Result<RunRow, Status> {
        if self.0.is_some() {
            run.outcome = match run.outcome {
                Some(outcome) => Some(self.outcome(outcome)?),
                None => None,
            };
            run.fault = run.fault.map(|fault| self.fault(fault));
        }
        Ok(run)
    }

    /// What is listed of learned issues when none of a VM is asked for: those about
    /// all, and about VMs that the caller sees. A pool or a folder may be anybody's.
    pub fn shows_learned(&self, learned: &Learned) -> bool {
        self.0
            .as_ref()
            .is_none_or(|names| learned.subject.is_empty() || names.seen.contains(&learned.subject))
    }

    /// An issue that was found on a VM.
    pub fn found(&self, mut found: Found) -> Found {
        if let Some(names) = &self.0 {
            found.on = names.text(&found.on);
        }
        found
    }

    /// A pool and its volumes.
    pub fn storage(&self, storage: &mut Storage) {
        if let Some(names) = &self.0 {
            names.storage(storage);
        }
    }

    fn outcome(&self, outcome: Outcome) -> Result<Outcome, Status> {
        let mut outcome: Outcome = self.through(outcome)?;
        self.verdicts(&mut outcome.verdicts);
        if let (Some(names), Some(storage)) = (&self.0, &mut outcome.storage) {
            names.storage(storage);
        }
        Ok(outcome)
    }

    /// What is left of verdicts: those on files are on orphans.
    fn verdicts(&self, verdicts: &mut Vec<Verdict>) {
        if self.0.is_some() {
            verdicts.retain(|verdict| verdict.what != FILE);
        }
    }

    /// All texts of a value, through JSON.
    fn through<T: Serialize + DeserializeOwned>(&self, value: T) -> Result<T, Status> {
        let Some(names) = &self.0 else {
            return Ok(value);
        };
        let veiled = serde_json::to_value(&value).and_then(|mut json| {
            names.json(&mut json);
            serde_json::from_value(json)
        });
        veiled.map_err(|error| {
            errors::status(&Fault::new(
                Reason::Internal,
                format!("what is hidden could not be left out: {error}"),
            ))
        })
    }
}

impl Names {
    fn storage(&self, storage: &mut Storage) {
        storage.volumes.retain_mut(|volume| {
            volume.used_by.retain(|vm| self.sight.sees(vm));
            !volume.used_by.is_empty()
        });
        if let Some(orphans) = &mut storage.orphans {
            orphans.clear();
        }
    }

    fn json(&self, value: &mut Value) {
        match value {
            // Words of ours have no space, sentences do.
            Value::String(text) if text.contains(' ') => *text = self.text(text),
            Value::Array(all) => all.iter_mut().for_each(|one| self.json(one)),
            Value::Object(all) => all.values_mut().for_each(|one| self.json(one)),
            _ => {}
        }
    }

    /// A text without the names that are hidden, where they stand as words.
    fn text(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for name in self.hidden.iter().filter(|name| !name.is_empty()) {
            let mut from = 0;
            while let Some(at) = text[from..].find(name.as_str()) {
                let (start, end) = (from + at, from + at + name.len());
                let before = text[..start].chars().next_back();
                let after = text[end..].chars().next();
                let ends = |c: Option<char>| {
                    c.is_none_or(|c| c.is_whitespace() || "'\"`,;:()?!".contains(c))
                };
                if ends(before) && (ends(after) || (after == Some('.') && text[end..].len() == 1)) {
                    // The name of its snapshot is hidden with it.
                    let snapshot = text[end..]
                        .strip_prefix(SNAPSHOT)
                        .and_then(|rest| rest.find(')'))
                        .map_or(0, |at| SNAPSHOT.len() + at + 1);
                    text.replace_range(start..end + snapshot, ANOTHER);
                    from = start + ANOTHER.len();
                } else {
                    from = start + name.chars().next().map_or(1, char::len_utf8);
                }
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn veil(seen: &[&str], hidden: &[&str]) -> Names {
        let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Names {
            sight: Sight::default(),
            seen: own(seen),
            hidden: own(hidden),
        }
    }

    #[test]
    fn names_that_are_hidden_are_left_out_of_sentences_and_parts_of_words_stay() {
        let names = veil(&["web1"], &["db1 old", "db1", "b"]);
        for (text, wanted) in [
            (
                "'/a.qcow2' is in the chain of db1 (snapshot was), web1 (snapshot s), db1 old; stop",
                "'/a.qcow2' is in the chain of another VM, web1 (snapshot s), another VM; stop",
            ),
            ("/images/db1/a-b.qcow2", "/images/db1/a-b.qcow2"),
            ("db1,web1", "another VM,web1"),
            ("used by 'db1'.", "used by 'another VM'."),
            ("the end is db1.", "the end is another VM."),
        ] {
            assert_eq!(names.text(text), wanted);
        }
    }

    #[test]
    fn users_of_a_file_are_left_out_of_a_step_that_failed_by_them_also_where_they_stand_alone() {
        let fault = Fault::new(Reason::FileShared, "'/a' came into use by db1 since then")
            .with("path", "/a")
            .with("users", "db1");
        let event = Event::Record(std::sync::Arc::new(Stamped {
            sequence: 3,
            time: jiff::Timestamp::UNIX_EPOCH,
            record: Record::StepFailed {
                index: 0,
                took_ms: 1,
                fault,
            },
        }));
        let told = Veil(Some(veil(&["web1"], &["db1"]))).event(event).unwrap();
        let Event::Record(stamped) = told else {
            panic!("it is a record")
        };
        let Record::StepFailed { fault, .. } = &stamped.record else {
            panic!("it is of a step that failed")
        };
        assert_eq!(fault.metadata["users"], "another VM");
        assert_eq!(fault.metadata["path"], "/a");
        assert!(!fault.message.contains("db1"), "{fault}");
    }

    #[test]
    fn orphans_that_stay_are_left_out_where_what_a_clean_up_does_is_told() {
        let verdict = |what: &str| Verdict {
            name: format!("/images/{what}"),
            what: what.to_owned(),
            removed: false,
            rule: "only reported".into(),
            size: 1,
        };
        let outcome = Outcome {
            verdicts: ["snapshot", "volume", FILE].map(verdict).into(),
            ..Outcome::default()
        };
        let told = |veil: Veil| -> Vec<String> {
            let outcome = veil.outcome(outcome.clone()).unwrap();
            outcome.verdicts.into_iter().map(|one| one.what).collect()
        };
        assert_eq!(told(Veil(None)), ["snapshot", "volume", FILE]);
        let some = Veil(Some(veil(&["web1"], &["db1"])));
        assert_eq!(told(some), ["snapshot", "volume"]);
    }

    #[test]
    fn a_vm_that_is_not_there_is_told_by_what_the_caller_sees_alone() {
        let veil = Veil(Some(veil(&["web1"], &["web12"])));
        let told = veil.fault(
            Fault::new(Reason::VmNotFound, "did you mean 'web12'?")
                .with("vm", "web123")
                .with("nearest", "web12"),
        );
        assert_eq!(told.metadata["nearest"], "web1");
        assert!(!told.to_string().contains("web12'?"), "{told}");
    }
}
