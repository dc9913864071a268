//! The journal's file at random: damaged, cut, too new, with garbage in its rows.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use jiff::Timestamp;
use proptest::{collection::vec, prelude::*, sample::select};
use rusqlite::Connection;
use tokio::runtime::Runtime;
use vmsnap_agent::{
    flow::Record,
    journal::{AuditFilter, Caller, Journal, JournalError, RunFilter, RunRow},
    planning::{
        Request,
        request::{Action, List},
    },
};
use vmsnap_fuzz::{
    Class,
    inputs::{damaged, numbers, texts},
};

const RUNS: usize = 12;
const RECORDS: usize = 3;

/// Run ids, records and files of a journal.
type Content = (Vec<String>, usize, usize);

/// A folder of a test's own.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("vmsnap-fuzz-{}", uuid::Uuid::now_v7()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A journal of these bytes, without what is left of another one.
    fn journal(&self, bytes: &[u8]) -> PathBuf {
        let path = self.0.join("journal.db");
        for side in ["-wal", "-shm", "-journal"] {
            let _ = fs::remove_file(self.0.join(format!("journal.db{side}")));
        }
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

fn row(id: &str) -> RunRow {
    let request = Request {
        vm: "web1".into(),
        action: Action::List(List::default()),
        start_if_stopped: false,
        pool: "default".into(),
    };
    let [identity, transport, address] = ["uid:0", "unix", ""].map(str::to_owned);
    let caller = Caller {
        identity,
        transport,
        address,
    };
    let started = Timestamp::UNIX_EPOCH;
    RunRow::accepted(id.into(), format!("request-{id}"), request, caller, started)
}

/// The file of a journal with interrupted runs.
static SOUND: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let folder = Folder::new();
    let path = folder.0.join("made.db");
    let journal = Journal::open(&path).unwrap();
    runtime().block_on(async {
        for at in 0..RUNS {
            let id = format!("run-{at:02}");
            journal.begin(row(&id)).await.unwrap();
            for _ in 0..RECORDS {
                journal.append(&id, Record::Recovering).await.unwrap();
            }
            let file = vec![format!("/images/{id}.qcow2")];
            journal.note_files(&id, file).await.unwrap();
        }
        journal.learn("NO_SPACE", "default", None).await.unwrap();
    });
    drop(journal);
    let copy = folder.0.join("journal.db");
    let db = Connection::open(&path).unwrap();
    db.execute("VACUUM INTO ?1", [copy.to_str().unwrap()])
        .unwrap();
    fs::read(copy).unwrap()
});

/// Everything that a journal holds.
async fn read(path: &Path) -> Result<Content, JournalError> {
    let journal = Journal::open(path)?;
    let all = RunFilter {
        limit: 1_000,
        ..RunFilter::default()
    };
    let runs = journal.runs(all).await?;
    let open = journal.open_runs().await?;
    let mut records = 0;
    for run in &runs {
        records += journal.records(&run.id, 0).await?.len();
        journal.run(&run.id).await?;
        journal.by_request_id(&run.request_id).await?;
    }
    journal.snapshot_records("vm").await?;
    journal.open_guards().await?;
    journal.learned().await?;
    journal
        .audited(AuditFilter {
            limit: 1_000,
            ..Default::default()
        })
        .await?;
    let files = journal.noted_files().await?;
    let mut ids: Vec<String> = open.into_iter().map(|run| run.id).collect();
    ids.sort();
    Ok((ids, records, files.len()))
}

/// An error that says where and what.
fn clear(error: &JournalError) -> Result<(), TestCaseError> {
    let text = error.to_string();
    prop_assert!(text.starts_with("the journal"), "{text}");
    prop_assert!(
        !matches!(error, JournalError::Closed),
        "the journal's thread ended"
    );
    Ok(())
}

/// What is read of it is all that was there, or there is a clear error.
fn whole_or_clear(runtime: &Runtime, path: &Path) -> Result<(), TestCaseError> {
    if let Err(error) = Journal::probe(path) {
        clear(&error)?;
    }
    match runtime.block_on(read(path)) {
        Ok((open, records, files)) => {
            prop_assert_eq!(open.len(), RUNS, "open runs are lost: {:?}", open);
            prop_assert_eq!(records, RUNS * RECORDS, "records are lost");
            prop_assert_eq!(files, RUNS, "files are lost");
        }
        Err(error) => clear(&error)?,
    }
    Ok(())
}

#[test]
fn a_file_that_is_no_journal_is_refused_and_left_as_it_is() {
    let folder = Folder::new();
    let runtime = runtime();
    let header = SOUND[..100].to_vec();
    let inputs = (vec(any::<u8>(), 1..3_000), any::<bool>()).prop_map(move |(bytes, headed)| {
        if headed {
            [header.clone(), bytes].concat()
        } else {
            bytes
        }
    });
    Class::new("journal, bytes", 20)
        .few(32)
        .check(&inputs, |bytes| {
            let path = folder.journal(&bytes);
            match runtime.block_on(read(&path)) {
                Ok(content) => prop_assert!(false, "read {content:?} out of nothing"),
                Err(error) => clear(&error)?,
            }
            prop_assert_eq!(fs::metadata(&path).unwrap().len(), bytes.len() as u64);
            Ok(())
        });
}

#[test]
fn a_damaged_journal_is_read_whole_or_refused() {
    let folder = Folder::new();
    let runtime = runtime();
    // A journal that was cut to nothing is a new one.
    let inputs = damaged(SOUND.clone()).prop_filter("it is not empty", |bytes| !bytes.is_empty());
    Class::new("journal, damaged", 40)
        .few(32)
        .check(&inputs, |bytes| {
            let path = folder.journal(&bytes);
            whole_or_clear(&runtime, &path)
        });
}

#[test]
fn garbage_in_a_row_or_another_schema_is_an_error_and_hides_no_run() {
    let folder = Folder::new();
    let runtime = runtime();
    let cells = select(vec![
        "runs.request",
        "runs.caller",
        "runs.status",
        "runs.started",
        "runs.outcome",
        "runs.fault",
        "runs.last_sequence",
        "records.body",
        "records.time",
        "user_version",
    ]);
    let bodies = prop_oneof![
        texts(),
        select(vec![
            "{}",
            "[]",
            "null",
            "{\"closed\":{}}",
            "\"recovering\"",
            "1"
        ])
        .prop_map(str::to_owned),
        (1..10_000_usize).prop_map(|deep| "[".repeat(deep)),
    ];
    let inputs = (cells, bodies, numbers(), any::<bool>());
    Class::new("journal, rows", 10)
        .few(32)
        .check(&inputs, |(cell, body, number, first)| {
            let path = folder.journal(&SOUND);
            let db = Connection::open(&path).unwrap();
            let id = if first { "run-00" } else { "run-07" };
            match cell.split_once('.') {
                None => db
                    .pragma_update(None, "user_version", number as i32)
                    .unwrap(),
                Some((table, column)) => {
                    let key = if table == "runs" { "id" } else { "run" };
                    let sql = format!("UPDATE {table} SET {column} = ?1 WHERE {key} = ?2");
                    let numeric = matches!(column, "started" | "last_sequence" | "time");
                    let done = if numeric {
                        db.execute(&sql, rusqlite::params![number, id])
                    } else {
                        db.execute(&sql, rusqlite::params![body, id])
                    };
                    done.unwrap();
                }
            }
            drop(db);
            whole_or_clear(&runtime, &path)
        });
}
