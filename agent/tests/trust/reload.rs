//! Certificates and roles that change while the agent runs.

use std::{
    io::Write as _,
    os::unix::fs::MetadataExt as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use vmsnap_client::{Hindrance, TlsFiles};
use vmsnap_proto::v1;

use crate::{
    agent::{Agent, connect},
    pki::{Ca, NOW, write},
};

const ROLES: &str = "[[roles]]\nrole = 'viewer'\nvms = ['*']\ncertificates = ['deploy']\n";

/// Some seconds, or with `VMSNAP_TEST_LONG` in the environment a minute.
fn while_it_lasts() -> Duration {
    match std::env::var_os("VMSNAP_TEST_LONG") {
        Some(_) => Duration::from_secs(60),
        None => Duration::from_secs(6),
    }
}

fn hang_up(agent: &Agent) {
    let kill = std::process::Command::new("kill")
        .args(["-HUP", &agent.pid().to_string()])
        .status()
        .unwrap();
    assert!(kill.success());
}

/// An entry for certificates, and behind it one that leaves whoever runs this a
/// viewer.
fn roles_of_the_host() -> [String; 2] {
    let uid = std::fs::metadata("/proc/self").unwrap().uid();
    [
        ROLES.to_owned(),
        format!("[[roles]]\nrole = 'viewer'\nvms = ['*']\nuids = [{uid}]\n"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_that_does_not_match_and_roles_that_are_none_leave_the_former_ones_in_force() {
    let agent = Agent::start(ROLES, "[metrics]\nlisten = '127.0.0.1:0'\n");
    let served = async || {
        let client = agent.client("deploy").await;
        client.vms().await.unwrap().len()
    };
    // What health tells of it, and what is counted.
    let unusable = async || {
        let health = agent.client("deploy").await.health().await.unwrap();
        let kind = v1::HealthProblemKind::TrustUnusable as i32;
        let told = health.problems.into_iter();
        told.filter(|problem| problem.kind == kind)
            .map(|problem| problem.message)
            .collect::<Vec<_>>()
    };
    let counts = |of: &str, taken: u32, refused: u32, stale: u32| {
        let scrape = agent.scrape();
        for line in [
            format!("vmsnap_trust_reloads_total{{of=\"{of}\",result=\"taken\"}} {taken}\n"),
            format!("vmsnap_trust_reloads_total{{of=\"{of}\",result=\"refused\"}} {refused}\n"),
            format!("vmsnap_trust_unusable{{of=\"{of}\"}} {stale}\n"),
        ] {
            assert!(scrape.contains(&line), "no {line} in {scrape}");
        }
    };
    assert_eq!(unusable().await, Vec::<String>::new());
    counts("certificates", 0, 0, 0);
    counts("roles", 0, 0, 0);
    let (_, foreign) = agent.ca.certificate("", &["127.0.0.1"], NOW);
    let key = std::fs::read_to_string(agent.folder.path("agent.key")).unwrap();
    write(&agent.folder.path("agent.key"), &foreign);
    agent.says("is not the key of tls.certificate");
    assert_eq!(served().await, 2);
    let told = unusable().await;
    assert!(
        told.len() == 1
            && told[0].starts_with("new certificates cannot be used")
            && told[0].contains("is not the key of"),
        "{told:?}"
    );
    counts("certificates", 0, 1, 1);
    write(&agent.folder.path("agent.key"), "no key at all");
    agent.says("holds no private key in PEM");
    assert_eq!(served().await, 2);
    std::fs::remove_file(agent.folder.path("ca.pem")).unwrap();
    agent.says("tls.client_ca");
    assert_eq!(served().await, 2);
    write(&agent.folder.path("ca.pem"), &agent.ca.pem);
    write(&agent.folder.path("agent.key"), &key);
    let patience = Instant::now() + Duration::from_secs(10);
    while !unusable().await.is_empty() {
        assert!(Instant::now() < patience, "the old pair was never taken");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let end = "\nvmsnap_certificate_end_time_seconds ";
    let scrape = agent.scrape();
    let at = scrape.find(end).unwrap() + end.len();
    assert!(!scrape[at..].starts_with('0'), "{scrape}");
    write(
        &agent.folder.path("roles.toml"),
        "[[roles]]\nrole = 'king'\n",
    );
    agent.says("new roles cannot be used");
    assert_eq!(served().await, 2);
    std::fs::remove_file(agent.folder.path("roles.toml")).unwrap();
    agent.says("roles.toml' cannot be read");
    assert_eq!(served().await, 2);
    assert!(unusable().await[0].starts_with("new roles cannot be used"));
    counts("roles", 0, 2, 1);
    // Told once, not every second.
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    assert_eq!(agent.log().matches("role = 'king'").count(), 0);
    assert_eq!(
        agent.log().matches("unknown variant").count(),
        1,
        "{}",
        agent.log()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_root_lets_its_callers_in_and_the_old_ones_out_without_a_restart() {
    let agent = Agent::start(ROLES, "");
    let old = agent.ca.caller(&agent.folder, "deploy", &[], NOW);
    let next = Ca::new("next CA");
    let mut new = next.caller(&agent.folder, "deploy", &[], NOW);
    new.ca_path.clone_from(&old.ca_path);
    assert!(connect(&agent.tls(), new.clone()).await.is_err());
    write(&agent.folder.path("ca.pem"), &next.pem);
    let patience = Instant::now() + Duration::from_secs(10);
    while connect(&agent.tls(), new.clone()).await.is_err() {
        assert!(Instant::now() < patience, "the new root was never taken");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(connect(&agent.tls(), old).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_stream_ends_with_the_role_or_the_certificate_of_its_caller() {
    const ADMINS: &str =
        "[[roles]]\nrole = 'admin'\nvms = ['*']\ncertificates = ['root', 'late']\n";
    let agent = Agent::start(ADMINS, "");
    let open = async |name: &str, until: i64| {
        let files = agent.ca.caller(&agent.folder, name, &[], (-60, until));
        let client = connect(&agent.tls(), files).await.unwrap();
        client
            .watch_audit(v1::AuditFilter::default(), 0)
            .await
            .unwrap()
    };
    let (mut root, mut late) = (open("root", 3_600).await, open("late", 4).await);
    let soon = Duration::from_secs(10);
    let ended = tokio::time::timeout(soon, late.message()).await.unwrap();
    let status = ended.unwrap_err();
    assert_eq!(status.code(), tonic::Code::PermissionDenied);
    assert!(status.message().contains("has expired since"), "{status}");
    // New roles that still have him change nothing for who watches.
    write(
        &agent.folder.path("roles.toml"),
        &format!("# as before\n{ADMINS}"),
    );
    agent.says("new roles are in force");
    let entry = tokio::time::timeout(soon, root.message()).await.unwrap();
    let entry = entry.unwrap().unwrap().entry.unwrap();
    assert_eq!(
        (
            entry.method.as_str(),
            entry.caller.unwrap().identity.as_str()
        ),
        ("WatchAudit", "late")
    );
    let waits = tokio::time::timeout(Duration::from_millis(500), root.message()).await;
    assert!(waits.is_err(), "{waits:?}");
    write(&agent.folder.path("roles.toml"), ROLES);
    let ended = tokio::time::timeout(soon, root.message()).await.unwrap();
    let failure = vmsnap_client::Failure::from(&ended.unwrap_err());
    assert_eq!(failure.reason, "NOT_ALLOWED");
    assert_eq!(failure.metadata["caller"], "root");
    assert!(
        failure.message.contains("'root' has no role"),
        "{}",
        failure.message
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_has_everything_read_at_once() {
    let agent = Agent::start(ROLES, "");
    hang_up(&agent);
    agent.says("none of them changed");
    assert_eq!(agent.client("deploy").await.vms().await.unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_rotate_every_second_fail_no_call() {
    let agent = Arc::new(Agent::start(ROLES, ""));
    let stop = Arc::new(AtomicBool::new(false));
    let calls = Arc::new(AtomicU64::new(0));
    let mut load = Vec::new();
    for at in 0..8 {
        let (agent, stop, calls) = (agent.clone(), stop.clone(), calls.clone());
        load.push(tokio::spawn(async move {
            // Half of them keep their connection, the others make one for each call.
            let kept = agent.client("deploy").await;
            let files = agent.ca.caller(&agent.folder, "deploy", &[], NOW);
            while !stop.load(Ordering::Relaxed) {
                let client = if at % 2 == 0 {
                    kept.clone()
                } else {
                    let made = connect(&agent.tls(), files.clone()).await;
                    made.map_err(|error| error.chain())?
                };
                let vms = client.vms().await.map_err(|error| error.chain())?;
                assert_eq!(vms.len(), 2);
                calls.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<(), String>(())
        }));
    }
    let begun = Instant::now();
    let mut rotations = 0;
    while begun.elapsed() < while_it_lasts() {
        rotations += 1;
        let name = format!("r{rotations}.example.org");
        let (certificate, key) = agent.ca.certificate("", &[&name, "127.0.0.1"], NOW);
        // Not at one moment, as nobody can: in between they do not match.
        write(&agent.folder.path("agent.key"), &key);
        tokio::time::sleep(Duration::from_millis(3)).await;
        write(&agent.folder.path("agent.pem"), &certificate);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    agent.says(&format!("names=r{rotations}.example.org"));
    stop.store(true, Ordering::Relaxed);
    for one in load {
        one.await.unwrap().unwrap();
    }
    let (calls, least) = (
        calls.load(Ordering::Relaxed),
        begun.elapsed().as_secs() * 10,
    );
    assert!(calls > least, "only {calls} calls in {:?}", begun.elapsed());
    let taken = agent
        .log()
        .matches("the agent's certificate is in force")
        .count();
    assert!(taken * 2 > rotations, "{taken} of {rotations} were taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_roles_that_is_emptied_gives_local_callers_no_right_that_they_had_not() {
    let agent = Agent::start(&roles_of_the_host().concat(), "");
    let local = connect(&agent.socket(), TlsFiles::default()).await.unwrap();
    for (nothing, times) in ["", "# nobody\n", "roles = []\n"].into_iter().zip(1..) {
        write(&agent.folder.path("roles.toml"), nothing);
        hang_up(&agent);
        let patience = Instant::now() + Duration::from_secs(10);
        while agent.log().matches("has no entry").count() < times {
            assert!(Instant::now() < patience, "{}", agent.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let error = local.record_fix("NO_SPACE", "", "x").await.unwrap_err();
        assert_eq!(error.hindrance(), Hindrance::NotAllowed, "{nothing:?}");
    }
    assert_eq!(agent.client("deploy").await.vms().await.unwrap().len(), 2);
    // Taken away one by one they are meant.
    write(&agent.folder.path("roles.toml"), ROLES);
    agent.says("new roles are in force");
    local.record_fix("NO_SPACE", "", "x").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_still_being_written_is_not_taken_before_it_is_whole() {
    let [first, second] = roles_of_the_host();
    // On a busy machine the second half may come too late for one write.
    for _ in 0..20 {
        let agent = Agent::start(&format!("{first}{second}"), "");
        // What is there after the first half would let local callers do everything.
        let began = Instant::now();
        let mut file = std::fs::File::create(agent.folder.path("roles.toml")).unwrap();
        file.write_all(first.as_bytes()).unwrap();
        hang_up(&agent);
        std::thread::sleep(Duration::from_millis(40));
        file.write_all(second.as_bytes()).unwrap();
        file.write_all(b"# Whole.\n").unwrap();
        drop(file);
        if began.elapsed() > Duration::from_millis(120) {
            continue;
        }
        agent.says("entries=2");
        assert!(!agent.log().contains("entries=1"), "{}", agent.log());
        let local = connect(&agent.socket(), TlsFiles::default()).await.unwrap();
        assert!(local.record_fix("NO_SPACE", "", "x").await.is_err());
        return;
    }
    panic!("no file was written in a moment");
}
