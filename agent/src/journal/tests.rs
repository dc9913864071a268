use vmsnap_engine::Closing;

use super::*;
use crate::planning::request::{Action, Create, List};

fn folder() -> PathBuf {
    let path = std::env::temp_dir().join(format!("vmsnap-journal-{}", uuid::Uuid::now_v7()));
    std::fs::create_dir_all(&path).unwrap();
    path
}

fn row(id: &str) -> RunRow {
    let request = Request {
        vm: "web1".into(),
        action: Action::List(List::default()),
        start_if_stopped: false,
        pool: "default".into(),
    };
    let caller = Caller {
        identity: "uid:0".into(),
        transport: "unix".into(),
        address: String::new(),
    };
    let started = Timestamp::from_millisecond(1_700_000_000_000).unwrap();
    RunRow::accepted(id.into(), format!("request-{id}"), request, caller, started)
}

fn older_than(time: Timestamp) -> Retention {
    Retention {
        before: Some(time),
        keep: 0,
        bytes: u64::MAX,
    }
}

fn closed() -> Record {
    Record::Closed {
        closing: Closing::Succeeded,
        outcome: Some(Box::default()),
        fault: None,
    }
}

#[tokio::test]
async fn a_run_and_its_records_read_back_after_the_journal_was_closed() {
    let folder = folder();
    let path = folder.join("journal.db");
    let journal = Journal::open(&path).unwrap();
    journal.begin(row("1")).await.unwrap();
    let first = journal.append("1", Record::Recovering).await.unwrap();
    let last = journal.append("1", closed()).await.unwrap();
    assert_eq!((first.sequence, last.sequence), (1, 2));
    drop(journal);
    let journal = Journal::open(&path).unwrap();
    let run = journal.run("1").await.unwrap().unwrap();
    assert_eq!(run.status, RunStatus::Succeeded);
    assert_eq!(run.last_sequence, 2);
    assert!(run.finished.is_some());
    assert_eq!(journal.records("1", 2).await.unwrap().len(), 1);
    assert!(journal.open_runs().await.unwrap().is_empty());
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_damaged_journal_is_an_error_with_a_way_on_and_is_left_as_it_is() {
    let folder = folder();
    let path = folder.join("journal.db");
    std::fs::write(&path, b"this is no database, but it may be somebody's").unwrap();
    let error = Journal::open(&path).unwrap_err();
    assert!(matches!(error, JournalError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("move it aside"));
    let probed = Journal::probe(&path).unwrap_err();
    assert!(matches!(probed, JournalError::Damaged { .. }), "{probed}");
    assert!(std::fs::read(&path).unwrap().starts_with(b"this is no"));
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_journal_of_a_newer_agent_is_refused() {
    let folder = folder();
    let path = folder.join("journal.db");
    drop(Journal::open(&path).unwrap());
    let db = Connection::open(&path).unwrap();
    db.pragma_update(None, "user_version", 99).unwrap();
    drop(db);
    let error = Journal::open(&path).unwrap_err();
    assert!(
        matches!(error, JournalError::TooNew { found: 99, .. }),
        "{error}"
    );
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_fault_that_is_seen_again_is_counted_and_a_recorded_fix_stays_with_it() {
    let folder = folder();
    let journal = Journal::open(&folder.join("journal.db")).unwrap();
    journal.learn("NO_SPACE", "default", None).await.unwrap();
    journal
        .learn("NO_SPACE", "default", Some("grow the pool"))
        .await
        .unwrap();
    let again = journal.learn("NO_SPACE", "default", None).await.unwrap();
    assert_eq!((again.seen, again.fix.as_str()), (2, "grow the pool"));
    assert!(journal.forget_learned(&again.id).await.unwrap());
    assert!(!journal.forget_learned(&again.id).await.unwrap());
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn old_runs_go_but_open_and_stuck_ones_stay() {
    let folder = folder();
    let journal = Journal::open(&folder.join("journal.db")).unwrap();
    for id in ["1", "2", "3"] {
        journal.begin(row(id)).await.unwrap();
    }
    journal.append("1", closed()).await.unwrap();
    let stuck = Record::Closed {
        closing: Closing::Stuck,
        outcome: None,
        fault: None,
    };
    journal.append("2", stuck).await.unwrap();
    let later = Timestamp::now() + jiff::SignedDuration::from_hours(1);
    assert_eq!(journal.prune(older_than(later)).await.unwrap().runs, 1);
    assert!(journal.run("1").await.unwrap().is_none());
    assert!(journal.records("1", 0).await.unwrap().is_empty());
    assert!(journal.run("2").await.unwrap().is_some());
    assert!(journal.run("3").await.unwrap().is_some());
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn only_its_owner_may_read_the_journal() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = folder();
    let path = folder.join("journal.db");
    // One that an older agent made is closed too.
    std::fs::write(&path, b"").unwrap();
    let db = schema::open(&path).unwrap();
    db.execute_batch("CREATE TABLE t (x INTEGER) STRICT")
        .unwrap();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{}", entry.file_name().to_string_lossy());
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

#[tokio::test]
async fn a_noted_file_tells_whose_it_is_also_when_its_run_is_forgotten() {
    let folder = folder();
    let journal = Journal::open(&folder.join("journal.db")).unwrap();
    journal.begin(row("1")).await.unwrap();
    let (known, unknown) = ("/a.qcow2".to_owned(), "/b.qcow2".to_owned());
    journal.note_files("1", vec![known.clone()]).await.unwrap();
    journal
        .note_files("never-begun", vec![unknown.clone()])
        .await
        .unwrap();
    journal.append("1", closed()).await.unwrap();
    let later = Timestamp::now() + jiff::SignedDuration::from_hours(1);
    assert_eq!(journal.prune(older_than(later)).await.unwrap().runs, 1);
    let noted = journal.noted_files().await.unwrap();
    let vms: Vec<(&str, &str)> = noted
        .iter()
        .map(|file| (file.path.as_str(), file.vm.as_str()))
        .collect();
    assert_eq!(vms, [("/a.qcow2", "web1"), ("/b.qcow2", "")]);
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_begun_merge_is_known_until_it_is_forgotten() {
    let folder = folder();
    let path = folder.join("journal.db");
    let journal = Journal::open(&path).unwrap();
    let disks = vec!["vda".to_owned(), "vdb".to_owned()];
    journal.note_merge("u", "s", 7, disks).await.unwrap();
    drop(journal);
    let journal = Journal::open(&path).unwrap();
    let begun = journal.begun_merges("u").await.unwrap();
    assert_eq!(begun.len(), 2);
    assert_eq!(
        (
            begun[0].snapshot.as_str(),
            begun[0].created,
            begun[0].disk.as_str()
        ),
        ("s", 7, "vda")
    );
    assert!(journal.begun_merges("other").await.unwrap().is_empty());
    journal.forget_merge("u", "s").await.unwrap();
    assert!(journal.begun_merges("u").await.unwrap().is_empty());
    journal
        .note_merge("u", "s", 7, vec!["vda".to_owned()])
        .await
        .unwrap();
    let written = vec![("/base.qcow2".to_owned(), 42)];
    journal
        .finish_merge("u", "s", written.clone())
        .await
        .unwrap();
    assert!(journal.begun_merges("u").await.unwrap().is_empty());
    let finished = journal.finished_merges().await.unwrap();
    assert_eq!(finished.into_iter().collect::<Vec<_>>(), written);
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn records_that_are_missing_are_an_error_and_not_a_shorter_history() {
    for gone in [1, 2, 3] {
        let folder = folder();
        let path = folder.join("journal.db");
        let journal = Journal::open(&path).unwrap();
        journal.begin(row("1")).await.unwrap();
        for _ in 0..3 {
            journal.append("1", Record::Recovering).await.unwrap();
        }
        let db = Connection::open(&path).unwrap();
        db.execute("DELETE FROM records WHERE sequence = ?1", [gone])
            .unwrap();
        let error = journal.records("1", 0).await.unwrap_err();
        assert!(
            error
                .to_string()
                .contains(&format!("record {gone} is expected")),
            "{error}"
        );
        // From beyond the last one on there is nothing to miss.
        assert!(journal.records("1", 4).await.unwrap().is_empty());
        std::fs::remove_dir_all(folder).unwrap();
    }
}

#[tokio::test]
async fn a_damaged_index_that_would_hide_an_interrupted_run_is_found_at_the_start() {
    let folder = folder();
    let path = folder.join("journal.db");
    let journal = Journal::open(&path).unwrap();
    journal.begin(row("1")).await.unwrap();
    drop(journal);
    // The index of open runs is emptied behind the table's back.
    let db = Connection::open(&path).unwrap();
    db.execute_batch(
        "PRAGMA writable_schema = ON;
         UPDATE sqlite_schema SET sql = replace(sql, 'IS NULL', 'IS NOT NULL')
           WHERE name = 'runs_open';
         PRAGMA writable_schema = RESET;
         REINDEX runs_open;
         PRAGMA writable_schema = ON;
         UPDATE sqlite_schema SET sql = replace(sql, 'IS NOT NULL', 'IS NULL')
           WHERE name = 'runs_open';
         PRAGMA writable_schema = RESET;",
    )
    .unwrap();
    drop(db);
    let error = Journal::open(&path).unwrap_err();
    assert!(matches!(error, JournalError::Damaged { .. }), "{error}");
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_journal_that_was_cut_off_is_refused_and_not_begun_anew() {
    let folder = folder();
    let path = folder.join("journal.db");
    let db = schema::open(&path).unwrap();
    db.pragma_update(None, "journal_mode", "DELETE").unwrap();
    drop(db);
    let sound = std::fs::read(&path).unwrap();
    for length in [1, 17, 100, 600, 2_700, 4_095] {
        std::fs::write(&path, &sound[..length]).unwrap();
        for error in [
            Journal::open(&path).unwrap_err(),
            Journal::probe(&path).unwrap_err(),
        ] {
            assert!(matches!(error, JournalError::Damaged { .. }), "{error}");
        }
        assert_eq!(std::fs::read(&path).unwrap(), sound[..length]);
    }
    std::fs::write(&path, b"").unwrap();
    std::fs::write(folder.join("journal.db-wal"), b"what was written last").unwrap();
    let error = Journal::open(&path).unwrap_err();
    assert!(error.to_string().contains("-wal"), "{error}");
    std::fs::remove_dir_all(folder).unwrap();
}

/// A record of so many bytes, as a failed run of a VM with many disks has.
fn long(bytes: usize) -> Record {
    Record::Closed {
        closing: Closing::Failed,
        outcome: None,
        fault: Some(Fault::new(
            crate::planning::Reason::Internal,
            "x".repeat(bytes),
        )),
    }
}

fn file_size(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

#[tokio::test]
async fn the_journal_stays_within_its_bytes_while_runs_come_and_gives_room_back() {
    let folder = folder();
    let path = folder.join("journal.db");
    let journal = Journal::open(&path).unwrap();
    let most = 512 << 10;
    let stay = Retention {
        before: None,
        keep: 1000,
        bytes: most,
    };
    let guard = Guard {
        run: "run-0000".into(),
        vm_uuid: "u".into(),
        vm: "web1".into(),
        snapshot: "s".into(),
        created: 1,
        armed: row("").started,
        deadline: row("").started,
        fingerprint: String::new(),
        state: crate::planning::guard::GuardState::Pending,
        note: String::new(),
    };
    journal.put_guard(guard.clone()).await.unwrap();
    let file = "/pool/web1.vda.s.qcow2".to_owned();
    let mut largest = 0;
    for number in 0..400 {
        let id = format!("run-{number:04}");
        journal.begin(row(&id)).await.unwrap();
        if number == 3 {
            journal.note_files(&id, vec![file.clone()]).await.unwrap();
        }
        if number != 2 {
            journal.append(&id, long(20_000)).await.unwrap();
        }
        while journal.prune(stay).await.unwrap().more {}
        largest = largest.max(file_size(&path));
    }
    // 400 runs of more than 20 kB each are 8 MB and more.
    assert!(largest < 3 * most, "{largest}");
    for (id, there) in [
        ("run-0000", true),
        ("run-0001", false),
        ("run-0002", true),
        ("run-0003", false),
        ("run-0399", true),
    ] {
        assert_eq!(journal.run(id).await.unwrap().is_some(), there, "{id}");
    }
    assert!(journal.records("run-0001", 1).await.unwrap().is_empty());
    assert_eq!(journal.open_guards().await.unwrap(), [guard]);
    assert_eq!(journal.noted_files().await.unwrap()[0].path, file);
    // However little is allowed, the newest runs can be read back.
    let least = Retention { bytes: 1, ..stay };
    while journal.prune(least).await.unwrap().more {}
    assert!(journal.run("run-0380").await.unwrap().is_some());
    assert!(journal.run("run-0379").await.unwrap().is_none());
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn runs_that_only_read_go_before_those_that_did_something() {
    let folder = folder();
    let path = folder.join("journal.db");
    let journal = Journal::open(&path).unwrap();
    let mut created = row("run-0000");
    created.request.action = Action::Create(Create::default());
    journal.begin(created).await.unwrap();
    journal.append("run-0000", closed()).await.unwrap();
    let stay = Retention {
        before: None,
        keep: 0,
        bytes: 1 << 20,
    };
    for number in 1..100 {
        let id = format!("run-{number:04}");
        journal.begin(row(&id)).await.unwrap();
        journal.append(&id, long(20_000)).await.unwrap();
        while journal.prune(stay).await.unwrap().more {}
    }
    assert!(journal.run("run-0000").await.unwrap().is_some());
    assert!(journal.run("run-0001").await.unwrap().is_none());
    // Not for ever: with too little room for the newest, it goes as well.
    let least = Retention { bytes: 1, ..stay };
    while journal.prune(least).await.unwrap().more {}
    assert!(journal.run("run-0000").await.unwrap().is_none());
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn old_runs_go_in_parts_and_the_file_becomes_smaller() {
    let folder = folder();
    let path = folder.join("journal.db");
    let journal = Journal::open(&path).unwrap();
    for number in 0..250 {
        let id = format!("run-{number:04}");
        journal.begin(row(&id)).await.unwrap();
        journal.append(&id, long(20_000)).await.unwrap();
    }
    let stay = Retention {
        keep: 10,
        ..older_than(Timestamp::now() + jiff::SignedDuration::from_hours(1))
    };
    let mut parts = Vec::new();
    loop {
        let pruned = journal.prune(stay).await.unwrap();
        parts.push(pruned.runs);
        if !pruned.more {
            break;
        }
    }
    assert_eq!(parts, [100, 100, 40]);
    assert!(file_size(&path) < 2 << 20, "{}", file_size(&path));
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_journal_of_the_first_version_opens_with_all_that_it_holds_and_learns_to_shrink() {
    let folder = folder();
    let path = folder.join("journal.db");
    let first = Connection::open(&path).unwrap();
    first.pragma_update(None, "journal_mode", "WAL").unwrap();
    first.execute_batch(schema::MIGRATIONS[0]).unwrap();
    first.pragma_update(None, "user_version", 1).unwrap();
    let old = row("1");
    first
        .execute(
            "INSERT INTO runs VALUES ('1', 'r', 'web1', 'list', ?1, ?2, 'running', 1, NULL, '', \
             NULL, NULL, 0)",
            [
                serde_json::to_string(&old.request).unwrap(),
                serde_json::to_string(&old.caller).unwrap(),
            ],
        )
        .unwrap();
    first
        .execute("INSERT INTO files VALUES ('/a.qcow2', '1', 1)", [])
        .unwrap();
    drop(first);
    let journal = Journal::open(&path).unwrap();
    assert_eq!(journal.open_runs().await.unwrap()[0].id, "1");
    assert_eq!(journal.noted_files().await.unwrap()[0].vm, "web1");
    journal.append("1", closed()).await.unwrap();
    drop(journal);
    let db = schema::open(&path).unwrap();
    let mode: i64 = db
        .pragma_query_value(None, "auto_vacuum", |row| row.get(0))
        .unwrap();
    assert_eq!(mode, 2);
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_journal_that_cannot_be_written_says_so_until_it_can() {
    let folder = folder();
    let path = folder.join("journal.db");
    let journal = Journal::open(&path).unwrap();
    journal.beat().await.unwrap();
    assert_eq!(journal.failing(), None);
    let other = Connection::open(&path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    // Reading goes on; whether writing does is tried when nothing proves it.
    journal.beat().await.unwrap();
    journal.condition().written = Instant::now().checked_sub(PROVEN).unwrap();
    let error = journal.beat().await.unwrap_err();
    assert!(error.to_string().contains("locked"), "{error}");
    let failing = journal.failing().unwrap();
    assert!(failing.why.contains("locked"), "{failing:?}");
    // What is merely not there is no failure of the file.
    assert_eq!(journal.run("none").await.unwrap(), None);
    assert_eq!(journal.failing(), Some(failing));
    other.execute_batch("ROLLBACK").unwrap();
    journal.beat().await.unwrap();
    assert_eq!(journal.failing(), None);
    assert!(journal.append("none", closed()).await.is_err());
    assert_eq!(journal.failing(), None);
    assert!(journal.size().unwrap().bytes > 4_096);
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn stuck_runs_are_found_by_their_index_and_counted() {
    let folder = folder();
    let path = folder.join("journal.db");
    let journal = Journal::open(&path).unwrap();
    for id in ["1", "2", "3"] {
        journal.begin(row(id)).await.unwrap();
        let closing = if id == "2" {
            Closing::Succeeded
        } else {
            Closing::Stuck
        };
        let record = Record::Closed {
            closing,
            outcome: None,
            fault: None,
        };
        journal.append(id, record).await.unwrap();
    }
    let (named, all) = journal.stuck_runs(1).await.unwrap();
    assert_eq!(all, 2);
    assert_eq!(named.len(), 1);
    assert_eq!(named[0].id, "3");
    let resolved = Record::Resolved {
        by: "uid:0".into(),
        note: "done".into(),
    };
    journal.append("3", resolved).await.unwrap();
    assert_eq!(journal.stuck_runs(9).await.unwrap().1, 1);
    let db = Connection::open(&path).unwrap();
    let plan: String = db
        .query_row(
            "EXPLAIN QUERY PLAN SELECT count(*) FROM runs WHERE status = 'stuck'",
            [],
            |row| row.get(3),
        )
        .unwrap();
    assert!(plan.contains("runs_stuck"), "{plan}");
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_journal_of_before_the_audit_trail_keeps_its_runs_and_gets_one() {
    let folder = folder();
    let path = folder.join("journal.db");
    let db = Connection::open(&path).unwrap();
    for migration in &schema::MIGRATIONS[..3] {
        db.execute_batch(migration).unwrap();
    }
    db.pragma_update(None, "user_version", 3).unwrap();
    let old = row("1");
    db.execute(
        "INSERT INTO runs (id, request_id, vm, action, request, caller, status, started, \
         plan_hash, last_sequence) VALUES ('1', 'r', 'web1', 'list', ?1, ?2, 'running', 5, '', 0)",
        [
            serde_json::to_string(&old.request).unwrap(),
            serde_json::to_string(&old.caller).unwrap(),
        ],
    )
    .unwrap();
    drop(db);
    let journal = Journal::open(&path).unwrap();
    assert_eq!(journal.run("1").await.unwrap().unwrap().request_id, "r");
    let all = AuditFilter {
        limit: 10,
        ..AuditFilter::default()
    };
    assert_eq!(journal.audited(all.clone()).await.unwrap(), []);
    let denied = AuditRow {
        vm: "web1".into(),
        ..AuditRow::now(AuditResult::Denied)
    };
    journal.audit(vec![denied]).await.unwrap();
    assert_eq!(journal.audited(all).await.unwrap()[0].sequence, 1);
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_run_that_changes_writes_its_beginning_and_its_end_into_the_trail_and_a_list_does_not() {
    let folder = folder();
    let journal = Journal::open(&folder.join("journal.db")).unwrap();
    journal.begin(row("1")).await.unwrap();
    journal.append("1", closed()).await.unwrap();
    let mut grows = journal.audit_grows();
    grows.mark_unchanged();
    let mut changing = row("2");
    changing.request.action = Action::Confirm { name: "s".into() };
    changing.plan_hash = "abc".into();
    journal.begin(changing).await.unwrap();
    assert!(grows.has_changed().unwrap());
    journal.append("2", closed()).await.unwrap();
    let filter = AuditFilter {
        limit: 10,
        behind: Some(0),
        vm: Some("web1".into()),
        identity: Some("uid:0".into()),
        ..AuditFilter::default()
    };
    let rows = journal.audited(filter.clone()).await.unwrap();
    let told: Vec<_> = rows
        .iter()
        .map(|row| (row.workflow.as_str(), row.snapshot.as_str(), row.result))
        .collect();
    assert_eq!(
        told,
        [
            ("2", "s", AuditResult::Accepted),
            ("2", "s", AuditResult::Done)
        ]
    );
    assert_eq!(rows[1].plan_hash, "abc");
    for (other, count) in [
        (
            AuditFilter {
                vm: Some("x".into()),
                ..filter.clone()
            },
            0,
        ),
        (
            AuditFilter {
                results: vec![AuditResult::Done],
                ..filter.clone()
            },
            1,
        ),
        (
            AuditFilter {
                since: Some(Timestamp::MAX),
                ..filter.clone()
            },
            0,
        ),
        (
            AuditFilter {
                behind: Some(rows[0].sequence),
                ..filter.clone()
            },
            1,
        ),
    ] {
        assert_eq!(journal.audited(other).await.unwrap().len(), count);
    }
    assert_eq!(journal.prune_audit(Timestamp::MIN, 1).await.unwrap(), 1);
    let left = journal.audited(filter).await.unwrap();
    assert_eq!(left[0].sequence, rows[1].sequence);
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn whoever_is_denied_over_and_over_pushes_nothing_out_of_the_trail_that_others_did() {
    let folder = folder();
    let journal = Journal::open(&folder.join("journal.db")).unwrap();
    let entry = |result, note: String| AuditRow {
        note,
        ..AuditRow::now(result)
    };
    for (result, count) in [
        (AuditResult::Accepted, 1),
        (AuditResult::Done, 3),
        (AuditResult::Denied, 50),
        (AuditResult::Failed, 2),
        (AuditResult::Denied, 50),
    ] {
        let rows = (0..count).map(|at| entry(result, at.to_string()));
        journal.audit(rows.collect()).await.unwrap();
    }
    assert_eq!(journal.prune_audit(Timestamp::MIN, 50).await.unwrap(), 95);
    let filter = AuditFilter {
        limit: 100,
        ..AuditFilter::default()
    };
    let left = journal.audited(filter.clone()).await.unwrap();
    let told: Vec<_> = left
        .iter()
        .map(|row| (row.result, row.note.as_str()))
        .collect();
    assert_eq!(
        told,
        [
            (AuditResult::Denied, "49"),
            (AuditResult::Denied, "48"),
            (AuditResult::Denied, "47"),
            (AuditResult::Denied, "46"),
            (AuditResult::Denied, "45"),
            (AuditResult::Failed, "1"),
            (AuditResult::Failed, "0"),
            (AuditResult::Done, "2"),
            (AuditResult::Done, "1"),
            (AuditResult::Done, "0"),
            (AuditResult::Accepted, "0"),
        ]
    );
    // Fewer than that stay as they are, of what was done too the oldest go, and age
    // ends both.
    assert_eq!(journal.prune_audit(Timestamp::MIN, 60).await.unwrap(), 0);
    assert_eq!(journal.prune_audit(Timestamp::MIN, 5).await.unwrap(), 1 + 4);
    assert_eq!(journal.prune_audit(Timestamp::MAX, 60).await.unwrap(), 6);
    std::fs::remove_dir_all(folder).unwrap();
}
