//! A plan, and how one is drafted.
//!
//! Invariants: `changes` is false exactly when no step changes anything; the
//! hash covers the request and the steps, with a name that was made from the
//! time replaced, so that what was reviewed in check mode is what runs.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    actions,
    facts::{Consistency, Facts, VmState},
    guard, issues,
    outcome::Verdict,
    reason::Fault,
    request::{Action, Request},
    step::Step,
};

/// Something to know that is never fatal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warning {
    /// Stable code.
    pub code: String,
    /// A sentence.
    pub message: String,
    /// What to do about it; may be empty.
    pub advice: String,
}

impl Warning {
    /// A warning.
    pub fn new(
        code: impl Into<String>,
        message: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            code: code.into(),
            message: message.into(),
            advice: advice.into(),
        }
    }
}

/// A choice, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// What was decided.
    pub subject: String,
    /// The choice.
    pub choice: String,
    /// Why.
    pub because: String,
}

/// One line of a diff; an absent side does not exist.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldChange {
    /// What changes.
    pub field: String,
    /// Before.
    pub before: Option<String>,
    /// After.
    pub after: Option<String>,
}

/// What will be done, in order, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// What was asked.
    pub request: Request,
    /// State of the VM when it was planned.
    pub vm_state: VmState,
    /// UUID of the VM.
    pub vm_uuid: String,
    /// The steps.
    pub steps: Vec<Step>,
    /// What to know beforehand.
    pub warnings: Vec<Warning>,
    /// What was chosen.
    pub decisions: Vec<Decision>,
    /// Before and after.
    pub diff: Vec<FieldChange>,
    /// The snapshot that it is about; empty for none.
    pub snapshot: String,
    /// Consistency of a new snapshot, if no freeze has to be given up.
    pub consistency: Option<Consistency>,
    /// Name of the safety snapshot that a revert takes first.
    pub safety_snapshot: Option<String>,
    /// What stays and what goes, for cleanup.
    pub verdicts: Vec<Verdict>,
    /// Names the plan.
    pub hash: String,
}

impl Plan {
    /// Whether running it would change anything.
    #[must_use]
    pub fn changes(&self) -> bool {
        self.steps.iter().any(Step::changes)
    }
}

/// A plan in the making.
#[derive(Debug, Default)]
pub struct Draft {
    /// The steps so far.
    pub steps: Vec<Step>,
    /// Warnings so far.
    pub warnings: Vec<Warning>,
    /// Decisions so far.
    pub decisions: Vec<Decision>,
    /// Diff so far.
    pub diff: Vec<FieldChange>,
    /// The snapshot that it is about.
    pub snapshot: String,
    /// The name was made here, from the time.
    pub generated_name: bool,
    /// Consistency of a new snapshot.
    pub consistency: Option<Consistency>,
    /// Name of the safety snapshot.
    pub safety_snapshot: Option<String>,
    /// What stays and what goes.
    pub verdicts: Vec<Verdict>,
}

impl Draft {
    /// Adds a step and returns its index.
    pub fn push(&mut self, step: Step) -> usize {
        self.steps.push(step);
        self.steps.len() - 1
    }

    /// Adds a warning.
    pub fn warn(&mut self, code: &str, message: impl Into<String>, advice: impl Into<String>) {
        self.warnings.push(Warning::new(code, message, advice));
    }

    /// Notes a choice.
    pub fn decide(
        &mut self,
        subject: impl Into<String>,
        choice: impl Into<String>,
        because: impl Into<String>,
    ) {
        self.decisions.push(Decision {
            subject: subject.into(),
            choice: choice.into(),
            because: because.into(),
        });
    }

    /// Notes a change for the diff.
    pub fn change(
        &mut self,
        field: impl Into<String>,
        before: Option<String>,
        after: Option<String>,
    ) {
        if before != after {
            self.diff.push(FieldChange {
                field: field.into(),
                before,
                after,
            });
        }
    }

    fn finish(self, request: &Request, facts: &Facts) -> Plan {
        let mut plan = Plan {
            request: request.clone(),
            vm_state: facts.vm.state,
            vm_uuid: facts.vm.uuid.clone(),
            steps: self.steps,
            warnings: self.warnings,
            decisions: self.decisions,
            diff: self.diff,
            snapshot: self.snapshot,
            consistency: self.consistency,
            safety_snapshot: self.safety_snapshot,
            verdicts: self.verdicts,
            hash: String::new(),
        };
        let mut generated: Vec<&str> = Vec::new();
        if self.generated_name {
            generated.push(&plan.snapshot);
        }
        generated.extend(plan.safety_snapshot.as_deref());
        plan.hash = hash(&plan, &generated);
        plan
    }
}

fn hash(plan: &Plan, generated: &[&str]) -> String {
    // Serialising plain data into a string cannot fail.
    let mut text =
        serde_json::to_string(&(&plan.request, &plan.vm_uuid, &plan.steps)).unwrap_or_default();
    for name in generated {
        text = text.replace(name, "{generated}");
    }
    let digest = Sha256::digest(text.as_bytes());
    digest[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Plans a request on the facts.
///
/// # Errors
/// The refusal: nothing may be touched.
pub fn plan(request: &Request, facts: &Facts) -> Result<Plan, Fault> {
    request.check()?;
    let mut draft = match &request.action {
        Action::Create(create) => actions::create::draft(request, create, facts)?,
        Action::Revert(revert) => actions::revert::draft(request, revert, facts)?,
        Action::Commit(commit) => actions::commit::draft(request, commit, facts)?,
        Action::List(list) => actions::list::draft(request, list, facts)?,
        Action::Cleanup(cleanup) => actions::cleanup::draft(request, cleanup, facts)?,
        Action::Confirm { name } => actions::confirm::draft(name, facts),
    };
    guard::allows(request, facts, &draft)?;
    let known = issues::warnings(request, facts, &draft.steps);
    draft.warnings.extend(known);
    Ok(draft.finish(request, facts))
}
