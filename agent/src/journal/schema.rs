//! The journal's tables, and how an old one becomes a new one.
//!
//! Invariant: `user_version` is the number of migrations applied; a migration
//! that was released is never edited, only followed by another.

use std::{
    fs::{File, Permissions},
    io::Read as _,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::{JournalError, ROOM};

/// How every SQLite database begins.
const MAGIC: &[u8] = b"SQLite format 3\0";

/// The statements that lead from each schema to the next.
pub const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE runs (
        id TEXT PRIMARY KEY,
        request_id TEXT NOT NULL,
        vm TEXT NOT NULL,
        action TEXT NOT NULL,
        request TEXT NOT NULL,
        caller TEXT NOT NULL,
        status TEXT NOT NULL,
        started INTEGER NOT NULL,
        finished INTEGER,
        plan_hash TEXT NOT NULL,
        outcome TEXT,
        fault TEXT,
        last_sequence INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX runs_by_time ON runs (started, id);
    CREATE INDEX runs_by_request ON runs (request_id);
    CREATE INDEX runs_open ON runs (finished) WHERE finished IS NULL;
    CREATE TABLE records (
        run TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        sequence INTEGER NOT NULL,
        time INTEGER NOT NULL,
        body TEXT NOT NULL,
        PRIMARY KEY (run, sequence)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE snapshots (
        vm_uuid TEXT NOT NULL,
        name TEXT NOT NULL,
        body TEXT NOT NULL,
        PRIMARY KEY (vm_uuid, name)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE files (
        path TEXT PRIMARY KEY,
        run TEXT NOT NULL,
        made INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE learned (
        id TEXT PRIMARY KEY,
        reason TEXT NOT NULL,
        subject TEXT NOT NULL,
        fix TEXT NOT NULL,
        seen INTEGER NOT NULL,
        last INTEGER NOT NULL,
        UNIQUE (reason, subject)
    ) STRICT;
",
    "
    CREATE TABLE guards (
        run TEXT PRIMARY KEY,
        vm_uuid TEXT NOT NULL,
        deadline INTEGER NOT NULL,
        open INTEGER NOT NULL,
        body TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX guards_open ON guards (vm_uuid) WHERE open = 1;
",
    "
    CREATE TABLE merges (
        vm_uuid TEXT NOT NULL,
        snapshot TEXT NOT NULL,
        created INTEGER NOT NULL,
        disk TEXT NOT NULL,
        PRIMARY KEY (vm_uuid, snapshot, disk)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE merged (
        path TEXT PRIMARY KEY,
        written INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    ALTER TABLE files ADD COLUMN vm TEXT NOT NULL DEFAULT '';
    UPDATE files SET vm = coalesce((SELECT vm FROM runs WHERE id = files.run), '');
",
    "
    CREATE INDEX runs_stuck ON runs (id) WHERE status = 'stuck';
",
    "
    CREATE TABLE audit (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        time INTEGER NOT NULL,
        caller TEXT NOT NULL,
        identity TEXT NOT NULL,
        method TEXT NOT NULL,
        action TEXT NOT NULL,
        vm TEXT NOT NULL,
        snapshot TEXT NOT NULL,
        workflow TEXT NOT NULL,
        plan_hash TEXT NOT NULL,
        result TEXT NOT NULL,
        reason TEXT NOT NULL,
        note TEXT NOT NULL,
        times INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX audit_by_vm ON audit (vm, sequence);
    CREATE INDEX audit_by_identity ON audit (identity, sequence);
    CREATE INDEX audit_by_time ON audit (time);
",
];

/// Bytes up to which SQLite's write-ahead log keeps its room when it begins anew.
const LOG_BYTES: u32 = 1 << 20;
/// SQLite's number for a database that gives freed pages back when it is told to.
const INCREMENTAL: i64 = 2;

/// Opens a database and brings it to the newest schema.
pub fn open(path: &Path) -> Result<Connection, JournalError> {
    let shown = path.display().to_string();
    let wrong = |error: rusqlite::Error| classify(&shown, &error);
    not_cut_off(path)?;
    only_for_owner(path).map_err(|error| JournalError::Io {
        path: shown.clone(),
        what: error.to_string(),
    })?;
    let mut db = Connection::open(path).map_err(wrong)?;
    db.busy_timeout(std::time::Duration::from_secs(5))
        .map_err(wrong)?;
    // Of an empty database it has to be said before anything is written.
    if std::fs::metadata(path).is_ok_and(|file| file.len() == 0) {
        db.pragma_update(None, "auto_vacuum", INCREMENTAL)
            .map_err(wrong)?;
    }
    db.pragma_update(None, "journal_mode", "WAL")
        .map_err(wrong)?;
    db.pragma_update(None, "journal_size_limit", LOG_BYTES)
        .map_err(wrong)?;
    db.pragma_update(None, "synchronous", "FULL")
        .map_err(wrong)?;
    db.pragma_update(None, "foreign_keys", "ON")
        .map_err(wrong)?;
    let found = examine(&db, &shown)?;
    let from = usize::try_from(found).unwrap_or(0);
    for (version, migration) in (1_i64..).zip(MIGRATIONS).skip(from) {
        let transaction = db.transaction().map_err(wrong)?;
        transaction.execute_batch(migration).map_err(wrong)?;
        transaction
            .pragma_update(None, "user_version", version)
            .map_err(wrong)?;
        transaction.commit().map_err(wrong)?;
    }
    gives_room_back(&db);
    Ok(db)
}

/// Makes a database of an older agent give freed pages back. That copies it: where
/// there is no room for a copy, its freed pages are only used again.
fn gives_room_back(db: &Connection) {
    let read = db.pragma_query_value(None, "auto_vacuum", |row| row.get::<_, i64>(0));
    if read != Ok(0) {
        return;
    }
    let rebuilt = db
        .pragma_update(None, "auto_vacuum", INCREMENTAL)
        .and_then(|()| db.execute_batch("VACUUM"));
    if let Err(error) = rebuilt {
        tracing::info!(%error, "the journal was not rebuilt and keeps the room that it once took");
    }
}

/// Kept definitions hold the passwords of VMs' displays, so nobody else may read
/// the file; SQLite gives its side files the same permissions.
fn only_for_owner(path: &Path) -> std::io::Result<()> {
    let file = File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)?;
    file.set_permissions(Permissions::from_mode(0o600))
}

/// Refuses a file whose first page is not whole, which SQLite would take for an
/// empty database and begin anew: with it went what is known of held guests.
/// Nothing is refused that was never written, nor what SQLite's own rollback
/// journal brings back.
fn not_cut_off(path: &Path) -> Result<(), JournalError> {
    let beside = |ending: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(ending);
        std::fs::metadata(name).is_ok_and(|file| file.len() > 0)
    };
    let damaged = |what: String| {
        Err(JournalError::Damaged {
            path: path.display().to_string(),
            what,
        })
    };
    // What cannot be opened is told by whoever opens it next.
    let Ok(mut file) = File::open(path) else {
        return Ok(());
    };
    let length = file.metadata().map_or(0, |file| file.len());
    if beside("-journal") {
        return Ok(());
    }
    if length == 0 {
        return match beside("-wal") {
            true => damaged("it is empty, and its -wal file is not".into()),
            false => Ok(()),
        };
    }
    let mut head = [0; 18];
    if file.read_exact(&mut head).is_err() || !head.starts_with(MAGIC) {
        return damaged("it does not begin as a database does".into());
    }
    // SQLite writes 65536, which has no form in two bytes, as 1.
    let page = match u16::from_be_bytes([head[16], head[17]]) {
        1 => 65_536,
        size => u64::from(size),
    };
    if length < page {
        return damaged(format!("it is cut off after {length} bytes"));
    }
    Ok(())
}

/// Looks at a database and changes nothing.
pub fn probe(path: &Path) -> Result<(), JournalError> {
    let shown = path.display().to_string();
    not_cut_off(path)?;
    let db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)
        .map_err(|error| classify(&shown, &error))?;
    examine(&db, &shown).map(drop)
}

/// The schema of a sound database that this program knows.
fn examine(db: &Connection, shown: &str) -> Result<i64, JournalError> {
    let wrong = |error: rusqlite::Error| classify(shown, &error);
    let found: i64 = db
        .pragma_query_value(None, "user_version", |row| row.get(0))
        .map_err(wrong)?;
    let known = i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX);
    if found > known {
        return Err(JournalError::TooNew {
            path: shown.to_owned(),
            found,
            known,
        });
    }
    // Not the quick one, which passes over indexes: a damaged one would hide an
    // interrupted run, and with it a guest that is held.
    let check: String = db
        .pragma_query_value(None, "integrity_check", |row| row.get(0))
        .map_err(wrong)?;
    if check != "ok" {
        return Err(JournalError::Damaged {
            path: shown.to_owned(),
            what: check,
        });
    }
    Ok(found)
}

/// SQLite's error as ours.
pub fn classify(path: &str, error: &rusqlite::Error) -> JournalError {
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => JournalError::Damaged {
            path: path.to_owned(),
            what: error.to_string(),
        },
        _ => lacks_room(Path::new(path)).unwrap_or_else(|| JournalError::Io {
            path: path.to_owned(),
            what: error.to_string(),
        }),
    }
}

/// That there is no room for another run, if so. SQLite names a full disk in several
/// ways, by what it was about to write.
pub fn lacks_room(path: &Path) -> Option<JournalError> {
    let folder = path.parent().filter(|it| !it.as_os_str().is_empty());
    let space = rustix::fs::statvfs(folder.unwrap_or(Path::new("."))).ok()?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    (free < ROOM).then(|| JournalError::Full {
        path: path.display().to_string(),
        need: ROOM,
        free,
    })
}
