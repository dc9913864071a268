//! What a former life of the agent left open, where its journal was spoiled. On
//! libvirt's test driver.

use std::sync::Arc;

use jiff::Timestamp;
use vmsnap_agent::{
    config::Config,
    flow::Record,
    journal::{Caller, Journal, RunRow, RunStatus},
    planning::{
        Reason, Request,
        request::{Action, Create},
    },
    trust::Trust,
    workflows::Workflows,
};
use vmsnap_hypervisor::{Hypervisor, Options};

fn row(id: &str, vm: &str) -> RunRow {
    let request = Request {
        vm: vm.into(),
        action: Action::Create(Create::default()),
        start_if_stopped: false,
        pool: "default".into(),
    };
    let caller = Caller {
        identity: "uid:0".into(),
        transport: "unix".into(),
        address: String::new(),
    };
    RunRow::accepted(id.into(), id.into(), request, caller, Timestamp::now())
}

async fn life(journal: &Journal) -> Workflows {
    let hypervisor = Hypervisor::connect(Options::for_uri("test:///default"))
        .await
        .unwrap();
    let config = Config::default();
    let trust: Arc<Trust> = Trust::open(&config).unwrap();
    Workflows::new(hypervisor, journal.clone(), trust, config)
}

#[tokio::test]
async fn what_cannot_be_read_of_one_run_keeps_no_other_from_being_recovered() {
    let folder = std::env::temp_dir().join(format!("vmsnap-r-{}", uuid::Uuid::now_v7()));
    std::fs::create_dir(&folder).unwrap();
    let path = folder.join("journal.db");
    let journal = Journal::open(&path).unwrap();
    for (id, vm) in [("1", "spoiled"), ("2", "web"), ("3", "other")] {
        journal.begin(row(id, vm)).await.unwrap();
        let queued = Record::Queued { behind: "0".into() };
        journal.append(id, queued).await.unwrap();
    }
    let spoil = |statement: &str| {
        let db = rusqlite::Connection::open(&path).unwrap();
        assert_eq!(db.execute(statement, []).unwrap(), 1);
    };
    spoil("UPDATE records SET body = '{\"record\":\"from another time\"}' WHERE run = '1'");
    let workflows = life(&journal).await;
    assert_eq!(workflows.recover().await.unwrap(), 3);
    // Nobody knows what it did: somebody has to look, and can say so.
    let spoiled = journal.run("1").await.unwrap().unwrap();
    assert_eq!(spoiled.status, RunStatus::Stuck);
    let fault = spoiled.fault.unwrap();
    assert_eq!(fault.reason, Reason::JournalUnavailable);
    assert!(fault.message.contains("records.1.1"), "{fault}");
    let by = row("1", "spoiled").caller;
    workflows.resolve("1", "looked at it", &by).await.unwrap();
    for id in ["2", "3"] {
        let run = journal.run(id).await.unwrap().unwrap();
        assert_eq!(run.fault.unwrap().reason, Reason::Interrupted);
    }

    // Of this one not even the VM is known: that is told, once the others are done.
    journal.begin(row("4", "web")).await.unwrap();
    journal.begin(row("5", "web")).await.unwrap();
    spoil("UPDATE runs SET request = '{}' WHERE id = '4'");
    let told = life(&journal).await.recover().await.unwrap_err();
    assert!(told.message.contains("runs.4"), "{told}");
    assert!(told.message.contains("move the journal aside"), "{told}");
    let run = journal.run("5").await.unwrap().unwrap();
    assert_eq!(run.status, RunStatus::Refused);
    std::fs::remove_dir_all(folder).unwrap();
}
