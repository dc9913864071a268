//! The journal's statements.

use std::{collections::BTreeMap, path::Path};

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::{Serialize, de::DeserializeOwned};
use vmsnap_engine::Closing;

use super::{
    BegunMerge, JournalError, Learned, NotedFile, Pruned, Retention, RunRow, RunStatus, Stamped,
    audit, schema,
};
use crate::{
    flow::Record,
    planning::{
        facts::SnapshotRecord,
        guard::{Guard, GuardState},
    },
};

/// What went wrong in a statement.
pub enum Error {
    /// SQLite.
    Sql(rusqlite::Error),
    /// A stored value.
    Value(String, String),
    /// Known before anything was asked of SQLite.
    Journal(JournalError),
}

impl Error {
    /// Whether the file could not be read or written, rather than that something
    /// was asked for that is not there or not allowed.
    pub fn is_of_the_file(&self) -> bool {
        match self {
            Self::Sql(rusqlite::Error::SqliteFailure(failure, _)) => {
                failure.code != rusqlite::ErrorCode::ConstraintViolation
            }
            Self::Journal(_) => true,
            Self::Sql(_) | Self::Value(..) => false,
        }
    }

    /// With the journal's path.
    pub fn at(self, path: &Path) -> JournalError {
        match self {
            Self::Sql(error) => schema::classify(&path.display().to_string(), &error),
            Self::Value(row, what) => JournalError::Unreadable { row, what },
            Self::Journal(error) => error,
        }
    }
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sql(error)
    }
}

type Result<T> = std::result::Result<T, Error>;

/// Which runs to list.
#[derive(Debug, Clone, Default)]
pub struct RunFilter {
    /// Only on this VM.
    pub vm: Option<String>,
    /// Only in one of these; empty is all.
    pub statuses: Vec<RunStatus>,
    /// Only of one of these actions; empty is all.
    pub actions: Vec<String>,
    /// Only before this run, in the order of the list.
    pub after: Option<String>,
    /// At most this many.
    pub limit: u32,
}

pub fn to_json<T: Serialize>(row: &str, value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Error::Value(row.to_owned(), error.to_string()))
}

pub fn from_json<T: DeserializeOwned>(row: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| Error::Value(row.to_owned(), error.to_string()))
}

pub fn time(row: &str, millis: i64) -> Result<Timestamp> {
    Timestamp::from_millisecond(millis)
        .map_err(|error| Error::Value(row.to_owned(), error.to_string()))
}

pub fn begin(db: &mut Connection, run: &RunRow) -> Result<()> {
    let transaction = db.transaction()?;
    transaction.execute(
        "INSERT INTO runs (id, request_id, vm, action, request, caller, status, started, \
         plan_hash, last_sequence) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 0)",
        params![
            run.id,
            run.request_id,
            run.request.vm,
            run.request.action.name(),
            to_json(&run.id, &run.request)?,
            to_json(&run.id, &run.caller)?,
            run.status.name(),
            run.started.as_millisecond(),
            run.plan_hash,
        ],
    )?;
    audit::began(&transaction, run)?;
    transaction.commit()?;
    Ok(())
}

pub fn append(db: &mut Connection, run: &str, record: Record) -> Result<Stamped> {
    let now = Timestamp::now();
    let transaction = db.transaction()?;
    let last: i64 = transaction.query_row(
        "SELECT last_sequence FROM runs WHERE id = ?1",
        [run],
        |row| row.get(0),
    )?;
    let sequence = last + 1;
    transaction.execute(
        "INSERT INTO records (run, sequence, time, body) VALUES (?1, ?2, ?3, ?4)",
        params![run, sequence, now.as_millisecond(), to_json(run, &record)?],
    )?;
    transaction.execute(
        "UPDATE runs SET last_sequence = ?2 WHERE id = ?1",
        params![run, sequence],
    )?;
    let status = match &record {
        Record::Queued { .. } => Some(RunStatus::Queued),
        Record::Planned { plan } => {
            transaction.execute(
                "UPDATE runs SET plan_hash = ?2 WHERE id = ?1",
                params![run, plan.hash],
            )?;
            Some(RunStatus::Running)
        }
        Record::UndoStarted { .. } | Record::Recovering => Some(RunStatus::Undoing),
        Record::Closed {
            closing,
            outcome,
            fault,
        } => {
            let outcome = outcome.as_ref().map(|it| to_json(run, it)).transpose()?;
            let fault = fault.as_ref().map(|it| to_json(run, it)).transpose()?;
            transaction.execute(
                "UPDATE runs SET finished = ?2, outcome = ?3, fault = ?4 WHERE id = ?1",
                params![run, now.as_millisecond(), outcome, fault],
            )?;
            let row = one(&transaction, run)?
                .ok_or_else(|| Error::Value(run.to_owned(), "the run is gone".into()))?;
            audit::ended(&transaction, &row, *closing, row.fault.as_ref())?;
            Some(match closing {
                Closing::Succeeded => RunStatus::Succeeded,
                Closing::Refused => RunStatus::Refused,
                Closing::Failed => RunStatus::Failed,
                Closing::Cancelled => RunStatus::Cancelled,
                Closing::Stuck => RunStatus::Stuck,
            })
        }
        Record::Resolved { .. } => Some(RunStatus::Failed),
        _ => None,
    };
    if let Some(status) = status {
        transaction.execute(
            "UPDATE runs SET status = ?2 WHERE id = ?1",
            params![run, status.name()],
        )?;
    }
    transaction.commit()?;
    Ok(Stamped {
        sequence: u64::try_from(sequence).unwrap_or(0),
        time: now,
        record,
    })
}

const COLUMNS: &str = "id, request_id, request, caller, status, started, finished, plan_hash, \
                       outcome, fault, last_sequence";

/// The columns of a run before they are understood.
struct RawRun {
    id: String,
    request_id: String,
    request: String,
    caller: String,
    status: String,
    started: i64,
    finished: Option<i64>,
    plan_hash: String,
    outcome: Option<String>,
    fault: Option<String>,
    last_sequence: i64,
}

impl RawRun {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get(0)?,
            request_id: row.get(1)?,
            request: row.get(2)?,
            caller: row.get(3)?,
            status: row.get(4)?,
            started: row.get(5)?,
            finished: row.get(6)?,
            plan_hash: row.get(7)?,
            outcome: row.get(8)?,
            fault: row.get(9)?,
            last_sequence: row.get(10)?,
        })
    }

    fn understand(self) -> Result<RunRow> {
        let row = format!("runs.{}", self.id);
        Ok(RunRow {
            request: from_json(&row, &self.request)?,
            caller: from_json(&row, &self.caller)?,
            status: RunStatus::ALL
                .into_iter()
                .find(|status| status.name() == self.status)
                .ok_or_else(|| Error::Value(row.clone(), format!("status '{}'", self.status)))?,
            started: time(&row, self.started)?,
            finished: self.finished.map(|at| time(&row, at)).transpose()?,
            outcome: self
                .outcome
                .map(|text| from_json(&row, &text))
                .transpose()?,
            fault: self.fault.map(|text| from_json(&row, &text)).transpose()?,
            last_sequence: u64::try_from(self.last_sequence)
                .map_err(|_| Error::Value(row, format!("last record {}", self.last_sequence)))?,
            id: self.id,
            request_id: self.request_id,
            plan_hash: self.plan_hash,
        })
    }
}

pub fn run(db: &mut Connection, id: &str) -> Result<Option<RunRow>> {
    one(db, id)
}

fn one(db: &Connection, id: &str) -> Result<Option<RunRow>> {
    db.query_row(
        &format!("SELECT {COLUMNS} FROM runs WHERE id = ?1"),
        [id],
        RawRun::read,
    )
    .optional()?
    .map(RawRun::understand)
    .transpose()
}

/// The newest runs of a request id, newest first: callers who do not see each
/// other's VMs may have chosen the same one.
pub fn by_request_id(db: &mut Connection, id: &str) -> Result<Vec<RunRow>> {
    let mut statement = db.prepare(&format!(
        "SELECT {COLUMNS} FROM runs WHERE request_id = ?1 ORDER BY started DESC, id DESC LIMIT 100"
    ))?;
    let rows = statement.query_map([id], RawRun::read)?;
    rows.map(|row| row.map_err(Error::from).and_then(RawRun::understand))
        .collect()
}

pub fn runs(db: &mut Connection, filter: &RunFilter) -> Result<Vec<RunRow>> {
    let mut sql = format!("SELECT {COLUMNS} FROM runs WHERE 1 = 1");
    let mut values: Vec<String> = Vec::new();
    let mut one_of = |column: &str, list: Vec<String>, sql: &mut String| {
        if !list.is_empty() {
            let marks = vec!["?"; list.len()].join(", ");
            sql.push_str(&format!(" AND {column} IN ({marks})"));
            values.extend(list);
        }
    };
    one_of("vm", filter.vm.iter().cloned().collect(), &mut sql);
    one_of(
        "status",
        filter
            .statuses
            .iter()
            .map(|it| it.name().to_owned())
            .collect(),
        &mut sql,
    );
    one_of("action", filter.actions.clone(), &mut sql);
    if let Some(after) = &filter.after {
        // Ids are UUIDs of version 7: their order is that of time.
        sql.push_str(" AND id < ?");
        values.push(after.clone());
    }
    sql.push_str(&format!(" ORDER BY id DESC LIMIT {}", filter.limit));
    let mut statement = db.prepare(&sql)?;
    let rows = statement.query_map(rusqlite::params_from_iter(values), RawRun::read)?;
    rows.map(|row| row.map_err(Error::from).and_then(RawRun::understand))
        .collect()
}

pub fn open_runs(db: &mut Connection) -> Result<Vec<Result<RunRow>>> {
    let mut statement = db.prepare(&format!(
        "SELECT {COLUMNS} FROM runs WHERE finished IS NULL ORDER BY id"
    ))?;
    let rows = statement.query_map([], RawRun::read)?;
    rows.map(|row| Ok(row?.understand())).collect()
}

/// The newest stuck runs. The status stands in the statement itself, so that the
/// index of stuck runs serves and no other row is read.
pub fn stuck_runs(db: &mut Connection, limit: u32) -> Result<Vec<RunRow>> {
    let mut statement = db.prepare(&format!(
        "SELECT {COLUMNS} FROM runs WHERE status = 'stuck' ORDER BY id DESC LIMIT ?1"
    ))?;
    let rows = statement.query_map([limit], RawRun::read)?;
    rows.map(|row| row.map_err(Error::from).and_then(RawRun::understand))
        .collect()
}

pub fn count_stuck(db: &mut Connection) -> Result<u64> {
    let count: i64 = db.query_row(
        "SELECT count(*) FROM runs WHERE status = 'stuck'",
        [],
        |row| row.get(0),
    )?;
    Ok(u64::try_from(count).unwrap_or(0))
}

/// Writes one page, as it was: proves that writing works.
pub fn beat(db: &mut Connection) -> Result<()> {
    let version: i64 = db.pragma_query_value(None, "user_version", |row| row.get(0))?;
    db.pragma_update(None, "user_version", version)?;
    Ok(())
}

/// Reads from the file: proves that reading works.
pub fn look(db: &mut Connection) -> Result<()> {
    db.pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0))?;
    Ok(())
}

pub fn records(db: &mut Connection, run: &str, from: u64) -> Result<Vec<Stamped>> {
    let from = i64::try_from(from).unwrap_or(i64::MAX);
    let mut statement = db.prepare(
        "SELECT sequence, time, body FROM records WHERE run = ?1 AND sequence >= ?2 \
         ORDER BY sequence",
    )?;
    let rows = statement.query_map(params![run, from], |row| {
        Ok((
            row.get::<_, i64>(0)?,
            row.get::<_, i64>(1)?,
            row.get::<_, String>(2)?,
        ))
    })?;
    let mut next = from.max(1);
    let mut found = Vec::new();
    for row in rows {
        let (sequence, at, body) = row?;
        let name = format!("records.{run}.{sequence}");
        whole(run, next, sequence)?;
        next = sequence.saturating_add(1);
        found.push(Stamped {
            sequence: u64::try_from(sequence).unwrap_or(0),
            time: time(&name, at)?,
            record: from_json(&name, &body)?,
        });
    }
    let last: Option<i64> = db
        .query_row(
            "SELECT last_sequence FROM runs WHERE id = ?1",
            [run],
            |row| row.get(0),
        )
        .optional()?;
    // A caller may ask from beyond the last one on.
    if let Some(last) = last
        && last >= next
    {
        whole(run, next, last.saturating_add(1))?;
    }
    Ok(found)
}

/// Records are numbered without gaps: where the next one has another number,
/// some are lost.
fn whole(run: &str, expected: i64, found: i64) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::Value(
        format!("records.{run}"),
        format!("record {expected} is expected and {found} was found"),
    ))
}

pub fn record_snapshot(
    db: &mut Connection,
    vm: &str,
    name: &str,
    record: &SnapshotRecord,
) -> Result<()> {
    db.execute(
        "INSERT INTO snapshots (vm_uuid, name, body) VALUES (?1, ?2, ?3) \
         ON CONFLICT (vm_uuid, name) DO UPDATE SET body = excluded.body",
        params![vm, name, to_json(name, record)?],
    )?;
    Ok(())
}

pub fn forget_snapshot(db: &mut Connection, vm: &str, name: &str) -> Result<()> {
    db.execute(
        "DELETE FROM snapshots WHERE vm_uuid = ?1 AND name = ?2",
        [vm, name],
    )?;
    Ok(())
}

pub fn snapshot_records(db: &mut Connection, vm: &str) -> Result<Vec<(String, SnapshotRecord)>> {
    let mut statement = db.prepare("SELECT name, body FROM snapshots WHERE vm_uuid = ?1")?;
    let rows = statement.query_map([vm], |row| {
        Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
    })?;
    rows.map(|row| {
        let (name, body) = row?;
        let record = from_json(&format!("snapshots.{name}"), &body)?;
        Ok((name, record))
    })
    .collect()
}

pub fn note_merge(
    db: &mut Connection,
    vm: &str,
    snapshot: &str,
    created: i64,
    disks: &[String],
) -> Result<()> {
    let transaction = db.transaction()?;
    for disk in disks {
        transaction.execute(
            "INSERT INTO merges (vm_uuid, snapshot, created, disk) VALUES (?1, ?2, ?3, ?4) \
             ON CONFLICT (vm_uuid, snapshot, disk) DO UPDATE SET created = excluded.created",
            params![vm, snapshot, created, disk],
        )?;
    }
    transaction.commit()?;
    Ok(())
}

pub fn forget_merge(db: &mut Connection, vm: &str, snapshot: &str) -> Result<()> {
    db.execute(
        "DELETE FROM merges WHERE vm_uuid = ?1 AND snapshot = ?2",
        [vm, snapshot],
    )?;
    Ok(())
}

pub fn finish_merge(
    db: &mut Connection,
    vm: &str,
    snapshot: &str,
    written: &[(String, i64)],
) -> Result<()> {
    let transaction = db.transaction()?;
    for (path, time) in written {
        transaction.execute(
            "INSERT INTO merged (path, written) VALUES (?1, ?2) \
             ON CONFLICT (path) DO UPDATE SET written = excluded.written",
            params![path, time],
        )?;
    }
    transaction.execute(
        "DELETE FROM merges WHERE vm_uuid = ?1 AND snapshot = ?2",
        [vm, snapshot],
    )?;
    transaction.commit()?;
    Ok(())
}

pub fn finished_merges(db: &mut Connection) -> Result<BTreeMap<String, i64>> {
    let mut statement = db.prepare("SELECT path, written FROM merged")?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

pub fn begun_merges(db: &mut Connection, vm: &str) -> Result<Vec<BegunMerge>> {
    let mut statement =
        db.prepare("SELECT snapshot, created, disk FROM merges WHERE vm_uuid = ?1")?;
    let rows = statement.query_map([vm], |row| {
        Ok(BegunMerge {
            snapshot: row.get(0)?,
            created: row.get(1)?,
            disk: row.get(2)?,
        })
    })?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

pub fn put_guard(db: &mut Connection, guard: &Guard) -> Result<()> {
    db.execute(
        "INSERT INTO guards (run, vm_uuid, deadline, open, body) VALUES (?1, ?2, ?3, ?4, ?5) \
         ON CONFLICT (run) DO UPDATE SET open = excluded.open, body = excluded.body",
        params![
            guard.run,
            guard.vm_uuid,
            guard.deadline.as_millisecond(),
            guard.state.is_open(),
            to_json(&guard.run, guard)?
        ],
    )?;
    Ok(())
}

pub fn hold_guard(db: &mut Connection, run: &str, why: String) -> Result<bool> {
    // One job of the journal's thread: nobody ends it in between.
    let body: Option<String> = db
        .query_row(
            "SELECT body FROM guards WHERE run = ?1 AND open = 1",
            [run],
            |row| row.get(0),
        )
        .optional()?;
    let Some(body) = body else {
        return Ok(false);
    };
    let guard: Guard = from_json(&format!("guards.{run}"), &body)?;
    if guard.state != GuardState::Pending {
        return Ok(false);
    }
    put_guard(
        db,
        &Guard {
            state: GuardState::Held,
            note: why,
            ..guard
        },
    )?;
    Ok(true)
}

pub fn remove_guard(db: &mut Connection, run: &str) -> Result<()> {
    db.execute("DELETE FROM guards WHERE run = ?1", [run])?;
    Ok(())
}

pub fn open_guards(db: &mut Connection) -> Result<Vec<Guard>> {
    let mut statement =
        db.prepare("SELECT run, body FROM guards WHERE open = 1 ORDER BY deadline, run")?;
    let rows = statement.query_map([], |row| {
        Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
    })?;
    rows.map(|row| {
        let (run, body) = row?;
        from_json(&format!("guards.{run}"), &body)
    })
    .collect()
}

pub fn note_files(db: &mut Connection, run: &str, paths: &[String]) -> Result<()> {
    let now = Timestamp::now().as_millisecond();
    let transaction = db.transaction()?;
    for path in paths {
        transaction.execute(
            "INSERT INTO files (path, run, made, vm) \
             VALUES (?1, ?2, ?3, coalesce((SELECT vm FROM runs WHERE id = ?2), '')) \
             ON CONFLICT (path) DO UPDATE \
             SET run = excluded.run, made = excluded.made, vm = excluded.vm",
            params![path, run, now],
        )?;
    }
    transaction.commit()?;
    Ok(())
}

pub fn noted_files(db: &mut Connection) -> Result<Vec<NotedFile>> {
    let mut statement = db.prepare("SELECT path, vm FROM files ORDER BY path")?;
    let rows = statement.query_map([], |row| {
        Ok(NotedFile {
            path: row.get(0)?,
            vm: row.get(1)?,
        })
    })?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

pub fn forget_files(db: &mut Connection, paths: &[String]) -> Result<()> {
    let transaction = db.transaction()?;
    for path in paths {
        transaction.execute("DELETE FROM files WHERE path = ?1", [path])?;
        transaction.execute("DELETE FROM merged WHERE path = ?1", [path])?;
    }
    transaction.commit()?;
    Ok(())
}

pub fn learn(
    db: &mut Connection,
    reason: &str,
    subject: &str,
    fix: Option<&str>,
) -> Result<Learned> {
    let now = Timestamp::now();
    let id = uuid::Uuid::now_v7().to_string();
    // A fix that somebody recorded was not seen to be needed once more.
    db.execute(
        "INSERT INTO learned (id, reason, subject, fix, seen, last) \
         VALUES (?1, ?2, ?3, coalesce(?4, ''), ?5, ?6) \
         ON CONFLICT (reason, subject) DO UPDATE SET \
           fix = coalesce(?4, fix), seen = seen + ?5, \
           last = CASE WHEN ?5 > 0 THEN excluded.last ELSE last END",
        params![
            id,
            reason,
            subject,
            fix,
            i64::from(fix.is_none()),
            now.as_millisecond()
        ],
    )?;
    let found = learned(db)?
        .into_iter()
        .find(|it| it.reason == reason && it.subject == subject);
    found.ok_or_else(|| Error::Value("learned".into(), "the row just written is gone".into()))
}

pub fn learned(db: &mut Connection) -> Result<Vec<Learned>> {
    let mut statement =
        db.prepare("SELECT id, reason, subject, fix, seen, last FROM learned ORDER BY last DESC")?;
    let rows = statement.query_map([], |row| {
        Ok((
            row.get::<_, String>(0)?,
            row.get::<_, String>(1)?,
            row.get::<_, String>(2)?,
            row.get::<_, String>(3)?,
            row.get::<_, i64>(4)?,
            row.get::<_, i64>(5)?,
        ))
    })?;
    rows.map(|row| {
        let (id, reason, subject, fix, seen, last) = row?;
        Ok(Learned {
            last: time("learned", last)?,
            seen: u32::try_from(seen).unwrap_or(u32::MAX),
            id,
            reason,
            subject,
            fix,
        })
    })
    .collect()
}

pub fn forget_learned(db: &mut Connection, id: &str) -> Result<bool> {
    Ok(db.execute("DELETE FROM learned WHERE id = ?1", [id])? > 0)
}

/// Writes without changing anything.
pub fn touch(db: &mut Connection, run: &str) -> Result<()> {
    db.execute("UPDATE runs SET status = status WHERE id = ?1", [run])?;
    Ok(())
}

/// Runs that go at a time: others want to write too.
const AT_ONCE: u32 = 100;
/// The newest runs that stay however large they are: who asked for them reads them
/// back.
const NEWEST: u32 = 20;
/// Free pages that are not given back: the next run uses them.
const SPARE: u64 = 64;

/// The action of runs that only read.
const LISTS: &str = "list";
/// What keeps a run from being removed, as a condition.
const MAY_GO: &str = "finished IS NOT NULL AND status != 'stuck' \
                      AND id NOT IN (SELECT run FROM guards WHERE open = 1)";

pub fn prune(db: &mut Connection, stay: Retention) -> Result<Pruned> {
    let mut gone = 0;
    if let Some(before) = stay.before {
        // A run that ended before began before: the index tells those.
        gone += db.execute(
            &format!(
                "DELETE FROM runs WHERE id IN (SELECT id FROM runs WHERE started < ?1 \
                 AND finished < ?1 AND {MAY_GO} \
                 AND id NOT IN (SELECT id FROM runs ORDER BY id DESC LIMIT ?2) \
                 ORDER BY started LIMIT {AT_ONCE})"
            ),
            params![before.as_millisecond(), stay.keep],
        )?;
    }
    let mut more = gone >= AT_ONCE as usize;
    if !more && used(db)? > stay.bytes {
        // What only read goes first: whoever looks often must not push out what was done.
        let mut large = 0;
        for only_read in [true, false] {
            large = db.execute(
                &format!(
                    "DELETE FROM runs WHERE id IN (SELECT id FROM runs WHERE {MAY_GO} \
                     AND (action = ?1) = ?2 \
                     AND id NOT IN (SELECT id FROM runs ORDER BY id DESC LIMIT {NEWEST}) \
                     ORDER BY id LIMIT {})",
                    AT_ONCE / 10
                ),
                params![LISTS, only_read],
            )?;
            if large > 0 {
                break;
            }
        }
        more = large > 0;
        gone += large;
    }
    if gone > 0 {
        db.execute(
            "DELETE FROM guards WHERE open = 0 AND run NOT IN (SELECT id FROM runs)",
            [],
        )?;
    }
    if !more {
        give_room_back(db)?;
    }
    Ok(Pruned {
        runs: u64::try_from(gone).unwrap_or(0),
        more,
    })
}

fn pragma(db: &Connection, name: &str) -> Result<u64> {
    let value: i64 = db.pragma_query_value(None, name, |row| row.get(0))?;
    Ok(u64::try_from(value).unwrap_or(0))
}

/// Bytes that hold something.
fn used(db: &Connection) -> Result<u64> {
    let pages = pragma(db, "page_count")?.saturating_sub(pragma(db, "freelist_count")?);
    Ok(pages.saturating_mul(pragma(db, "page_size")?))
}

/// Makes the file smaller by the pages that are free, but for a few.
fn give_room_back(db: &Connection) -> Result<()> {
    let free = pragma(db, "freelist_count")?;
    if free <= 2 * SPARE {
        return Ok(());
    }
    // Each row is a page that was given back.
    let mut pages = db.prepare(&format!("PRAGMA incremental_vacuum({})", free - SPARE))?;
    let mut given = pages.query([])?;
    while given.next()?.is_some() {}
    drop(given);
    let mut checkpoint = db.prepare("PRAGMA wal_checkpoint(TRUNCATE)")?;
    checkpoint.query([])?.next()?;
    Ok(())
}
