//! The audit trail: its table, and what runs write into it.
//!
//! Invariants: entries are added and, when they are old, removed; none is ever
//! changed. A run that may change something writes its two entries in the same
//! transactions as its own beginning and end.

use jiff::Timestamp;
use rusqlite::{Connection, Row, Transaction, params, types::Value};
use vmsnap_engine::Closing;

use super::{
    Caller, RunRow,
    store::{Error, from_json, time},
};
use crate::planning::{Fault, Request};

type Result<T> = std::result::Result<T, Error>;

/// What came of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuditResult {
    /// A run was begun.
    Accepted,
    /// Done as asked.
    Done,
    /// It failed, or was stopped.
    Failed,
    /// The caller was not allowed, or not trusted.
    Denied,
}

impl AuditResult {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Accepted, Self::Done, Self::Failed, Self::Denied];

    /// As stored.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Denied => "denied",
        }
    }
}

/// An entry of the trail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditRow {
    /// Its number; 0 before it is written.
    pub sequence: u64,
    /// When it was.
    pub time: Timestamp,
    /// Who.
    pub caller: Caller,
    /// The call.
    pub method: String,
    /// The action of a run.
    pub action: String,
    /// The VM.
    pub vm: String,
    /// The snapshot.
    pub snapshot: String,
    /// The run.
    pub workflow: String,
    /// Hash of its plan.
    pub plan_hash: String,
    /// What came of it.
    pub result: AuditResult,
    /// Reason of a denial or failure.
    pub reason: String,
    /// More about it.
    pub note: String,
    /// How many equal denials it stands for.
    pub times: u64,
}

impl AuditRow {
    /// An entry of now that says nothing but its result.
    #[must_use]
    pub fn now(result: AuditResult) -> Self {
        Self {
            sequence: 0,
            time: Timestamp::now(),
            caller: Caller {
                identity: String::new(),
                transport: String::new(),
                address: String::new(),
            },
            method: String::new(),
            action: String::new(),
            vm: String::new(),
            snapshot: String::new(),
            workflow: String::new(),
            plan_hash: String::new(),
            result,
            reason: String::new(),
            note: String::new(),
            times: 1,
        }
    }
}

/// Which entries to read.
#[derive(Debug, Clone, Default)]
pub struct AuditFilter {
    /// Only about this VM.
    pub vm: Option<String>,
    /// Only of this caller.
    pub identity: Option<String>,
    /// Only of this call.
    pub method: Option<String>,
    /// Only with one of these results; empty is all.
    pub results: Vec<AuditResult>,
    /// Not before this time.
    pub since: Option<Timestamp>,
    /// Only before this entry; the newest first then.
    pub before: Option<u64>,
    /// Only behind this entry; the oldest first then.
    pub behind: Option<u64>,
    /// At most this many.
    pub limit: u32,
}

/// Whether a request may change something.
fn changes(request: &Request) -> bool {
    !request.action.reads_only() || request.start_if_stopped
}

/// A run was begun.
pub fn began(transaction: &Transaction<'_>, run: &RunRow) -> Result<()> {
    if !changes(&run.request) {
        return Ok(());
    }
    let row = AuditRow {
        time: run.started,
        ..of_run(run, AuditResult::Accepted)
    };
    insert(transaction, &row)
}

/// A run is over.
pub fn ended(
    transaction: &Transaction<'_>,
    run: &RunRow,
    closing: Closing,
    fault: Option<&Fault>,
) -> Result<()> {
    if !changes(&run.request) {
        return Ok(());
    }
    let (result, note) = match closing {
        Closing::Succeeded => (AuditResult::Done, "the run succeeded"),
        Closing::Refused => (AuditResult::Failed, "the run was refused"),
        Closing::Failed => (AuditResult::Failed, "the run failed and was undone"),
        Closing::Cancelled => (AuditResult::Failed, "the run was cancelled and undone"),
        Closing::Stuck => (AuditResult::Failed, "the run is stuck"),
    };
    let row = AuditRow {
        reason: fault
            .map(|fault| fault.reason.to_string())
            .unwrap_or_default(),
        note: note.to_owned(),
        ..of_run(run, result)
    };
    insert(transaction, &row)
}

fn of_run(run: &RunRow, result: AuditResult) -> AuditRow {
    AuditRow {
        caller: run.caller.clone(),
        method: "RunWorkflow".to_owned(),
        action: run.request.action.name().to_owned(),
        vm: run.request.vm.clone(),
        snapshot: run.request.snapshot_name().to_owned(),
        workflow: run.id.clone(),
        plan_hash: run.plan_hash.clone(),
        ..AuditRow::now(result)
    }
}

/// Adds entries.
pub fn add(db: &mut Connection, rows: &[AuditRow]) -> Result<()> {
    let transaction = db.transaction()?;
    for row in rows {
        insert(&transaction, row)?;
    }
    transaction.commit()?;
    Ok(())
}

fn insert(transaction: &Transaction<'_>, row: &AuditRow) -> Result<()> {
    transaction.execute(
        "INSERT INTO audit (time, caller, identity, method, action, vm, snapshot, workflow, \
         plan_hash, result, reason, note, times) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
        params![
            row.time.as_millisecond(),
            super::store::to_json("audit", &row.caller)?,
            row.caller.identity,
            row.method,
            row.action,
            row.vm,
            row.snapshot,
            row.workflow,
            row.plan_hash,
            row.result.name(),
            row.reason,
            row.note,
            i64::try_from(row.times).unwrap_or(i64::MAX),
        ],
    )?;
    Ok(())
}

/// Reads entries.
pub fn read(db: &mut Connection, filter: &AuditFilter) -> Result<Vec<AuditRow>> {
    let mut sql = String::from(
        "SELECT sequence, time, caller, method, action, vm, snapshot, workflow, plan_hash, \
         result, reason, note, times FROM audit WHERE 1 = 1",
    );
    let mut values: Vec<Value> = Vec::new();
    let number = |number: u64| Value::from(i64::try_from(number).unwrap_or(i64::MAX));
    for (condition, value) in [
        ("vm = ?", filter.vm.clone().map(Value::from)),
        ("identity = ?", filter.identity.clone().map(Value::from)),
        ("method = ?", filter.method.clone().map(Value::from)),
        (
            "time >= ?",
            filter.since.map(|since| since.as_millisecond().into()),
        ),
        ("sequence < ?", filter.before.map(number)),
        ("sequence > ?", filter.behind.map(number)),
    ] {
        if let Some(value) = value {
            sql.push_str(" AND ");
            sql.push_str(condition);
            values.push(value);
        }
    }
    if !filter.results.is_empty() {
        let marks = vec!["?"; filter.results.len()].join(", ");
        sql.push_str(&format!(" AND result IN ({marks})"));
        let names = filter.results.iter().map(|it| it.name().to_owned());
        values.extend(names.map(Value::from));
    }
    let order = if filter.behind.is_some() {
        "ASC"
    } else {
        "DESC"
    };
    sql.push_str(&format!(
        " ORDER BY sequence {order} LIMIT {}",
        filter.limit
    ));
    let mut statement = db.prepare(&sql)?;
    let rows = statement.query_map(rusqlite::params_from_iter(values), Raw::read)?;
    rows.map(|row| row.map_err(Error::from).and_then(Raw::understand))
        .collect()
}

/// The columns before they are understood.
struct Raw {
    sequence: i64,
    time: i64,
    caller: String,
    result: String,
    times: i64,
    row: AuditRow,
}

impl Raw {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            sequence: row.get(0)?,
            time: row.get(1)?,
            caller: row.get(2)?,
            result: row.get(9)?,
            times: row.get(12)?,
            row: AuditRow {
                method: row.get(3)?,
                action: row.get(4)?,
                vm: row.get(5)?,
                snapshot: row.get(6)?,
                workflow: row.get(7)?,
                plan_hash: row.get(8)?,
                reason: row.get(10)?,
                note: row.get(11)?,
                ..AuditRow::now(AuditResult::Done)
            },
        })
    }

    fn understand(self) -> Result<AuditRow> {
        let name = format!("audit.{}", self.sequence);
        Ok(AuditRow {
            sequence: u64::try_from(self.sequence).unwrap_or(0),
            time: time(&name, self.time)?,
            caller: from_json(&name, &self.caller)?,
            result: AuditResult::ALL
                .into_iter()
                .find(|result| result.name() == self.result)
                .ok_or_else(|| Error::Value(name, format!("result '{}'", self.result)))?,
            times: u64::try_from(self.times).unwrap_or(1),
            ..self.row
        })
    }
}

/// Removes entries of before a time, and all but the newest `keep` of what was done
/// and a tenth as many of what was denied: whoever is denied over and over neither
/// pushes out what others did nor fills the journal.
pub fn prune(db: &mut Connection, before: Timestamp, keep: u32) -> Result<u64> {
    let transaction = db.transaction()?;
    let mut gone = transaction.execute(
        "DELETE FROM audit WHERE time < ?1",
        params![before.as_millisecond()],
    )?;
    for (is_denial, keep) in [(false, keep), (true, keep.div_ceil(10))] {
        gone += transaction.execute(
            "DELETE FROM audit WHERE (result = ?1) = ?2 AND sequence <= \
             (SELECT sequence FROM audit WHERE (result = ?1) = ?2 \
             ORDER BY sequence DESC LIMIT 1 OFFSET ?3)",
            params![AuditResult::Denied.name(), is_denial, keep],
        )?;
    }
    transaction.commit()?;
    Ok(u64::try_from(gone).unwrap_or(0))
}
