//! What is written into the audit trail beside the runs, which write their own.
//!
//! Invariants: what somebody did is on disk before he is answered; denials are
//! gathered, equal ones counted, and written together, so that a flood of them
//! costs neither the disk nor memory; not one of them is lost but by a crash
//! within a moment.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::Notify;

use crate::{
    journal::{AuditResult, AuditRow, Caller, Journal},
    planning::Fault,
};

/// How long denials are gathered.
const GATHER: Duration = Duration::from_millis(250);
/// So many different ones are gathered; further ones are told apart by caller and
/// call alone.
const KINDS: usize = 512;
/// And so many callers and calls; further ones are one.
const CALLERS: usize = 1_024;
/// Longest text that is kept of what a caller sent, in characters.
const TEXT: usize = 255;

/// What was denied.
#[derive(Debug, Clone, Copy)]
pub struct Denied<'a> {
    /// The call.
    pub method: &'a str,
    /// The action of a run; empty for other calls.
    pub action: &'a str,
    /// The VM; empty where none is named.
    pub vm: &'a str,
    /// The reason that the caller was given.
    pub reason: &'a str,
    /// More about it.
    pub note: &'a str,
}

/// What somebody did that is no run.
#[derive(Debug, Clone, Default)]
pub struct Did<'a> {
    /// The call.
    pub method: &'a str,
    /// The VM; empty where none is named.
    pub vm: &'a str,
    /// The run; empty where none is named.
    pub workflow: &'a str,
    /// More about it.
    pub note: &'a str,
}

/// Denials that differ in nothing of this are counted as one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Kind {
    identity: String,
    transport: String,
    method: String,
    action: String,
    vm: String,
    reason: String,
    note: String,
}

#[derive(Debug)]
struct Shared {
    journal: Journal,
    gathered: Mutex<HashMap<Kind, AuditRow>>,
    some: Notify,
}

/// Writes into the trail; cheap to clone.
#[derive(Debug, Clone)]
pub struct Auditor(Option<Arc<Shared>>);

impl Auditor {
    /// Into a journal.
    #[must_use]
    pub fn new(journal: Journal) -> Self {
        Self(Some(Arc::new(Shared {
            journal,
            gathered: Mutex::default(),
            some: Notify::new(),
        })))
    }

    /// Into nothing.
    #[must_use]
    pub fn unheard() -> Self {
        Self(None)
    }

    /// Notes a denial; it is on disk within a moment.
    pub fn denied(&self, caller: &Caller, denied: Denied<'_>) {
        let Some(shared) = &self.0 else {
            return;
        };
        let short = |text: &str| text.chars().take(TEXT).collect::<String>();
        let mut kind = Kind {
            identity: short(&caller.identity),
            transport: caller.transport.clone(),
            method: short(denied.method),
            action: denied.action.to_owned(),
            vm: short(denied.vm),
            reason: denied.reason.to_owned(),
            note: short(denied.note),
        };
        let mut gathered = shared
            .gathered
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if gathered.len() >= KINDS && !gathered.contains_key(&kind) {
            kind.vm.clear();
            kind.action.clear();
            kind.note = "several VMs".into();
            if gathered.len() >= CALLERS && !gathered.contains_key(&kind) {
                kind.identity = "several".into();
                kind.method.clear();
                kind.note = "several callers and calls".into();
            }
        }
        let row = gathered.entry(kind).or_insert_with_key(|kind| AuditRow {
            caller: Caller {
                identity: kind.identity.clone(),
                transport: kind.transport.clone(),
                address: String::new(),
            },
            method: kind.method.clone(),
            action: kind.action.clone(),
            vm: kind.vm.clone(),
            reason: kind.reason.clone(),
            note: kind.note.clone(),
            times: 0,
            ..AuditRow::now(AuditResult::Denied)
        });
        // Once for each moment: a flood of them would flood the log.
        if row.times == 0 {
            tracing::warn!(
                caller = %caller.identity.escape_debug(),
                transport = %caller.transport,
                address = %caller.address,
                method = denied.method,
                vm = %denied.vm.escape_debug(),
                reason = denied.reason,
                note = denied.note,
                "denied"
            );
        }
        row.times += 1;
        row.caller.address.clone_from(&caller.address);
        drop(gathered);
        shared.some.notify_one();
    }

    /// Writes down what somebody did, or could not.
    ///
    /// # Errors
    /// When it is not on disk.
    pub async fn did(
        &self,
        caller: &Caller,
        did: Did<'_>,
        failed: Option<&Fault>,
    ) -> Result<(), Fault> {
        let Some(shared) = &self.0 else {
            return Ok(());
        };
        let row = AuditRow {
            caller: caller.clone(),
            method: did.method.to_owned(),
            vm: did.vm.to_owned(),
            workflow: did.workflow.to_owned(),
            reason: failed
                .map(|fault| fault.reason.to_string())
                .unwrap_or_default(),
            note: did.note.chars().take(TEXT).collect(),
            ..AuditRow::now(match failed {
                None => AuditResult::Done,
                Some(_) => AuditResult::Failed,
            })
        };
        Ok(shared.journal.audit(vec![row]).await?)
    }

    /// Writes what was gathered, for ever.
    pub async fn keep(self) {
        let Some(shared) = &self.0 else {
            return;
        };
        loop {
            shared.some.notified().await;
            tokio::time::sleep(GATHER).await;
            self.flush().await;
        }
    }

    /// Writes what was gathered.
    pub async fn flush(&self) {
        let Some(shared) = &self.0 else {
            return;
        };
        let gathered = std::mem::take(
            &mut *shared
                .gathered
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        let mut rows: Vec<AuditRow> = gathered.into_values().collect();
        rows.sort_by_key(|row| row.time);
        if rows.is_empty() {
            return;
        }
        if let Err(error) = shared.journal.audit(rows).await {
            tracing::error!(%error, "denials could not be written into the audit trail");
        }
    }
}
