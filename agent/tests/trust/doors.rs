//! Who comes in by which door, and what those are told who do not.

use std::{io::Read as _, net::TcpStream, os::unix::fs::MetadataExt as _, time::Duration};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use vmsnap_client::{Distrust, Error, Hindrance, TlsFiles};

use crate::{
    agent::{Agent, connect},
    pki::{Ca, FUTURE, NOW, PAST, write},
};

const ROLES: &str = "
[[roles]]
role = 'viewer'
vms = ['*']
certificates = ['deploy', 'deploy.example.org']
";

fn distrust(error: Error) -> Distrust {
    match error {
        Error::NotTrusted { distrust, .. } => distrust,
        other => panic!("{} ({:?})", other.chain(), other.hindrance()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_with_a_certificate_and_a_role_is_served_and_known_by_san_and_else_by_cn() {
    let agent = Agent::start(ROLES, "");
    for (common, names, served) in [
        ("deploy", &[][..], true),
        ("", &["deploy.example.org"], true),
        ("", &["other.example.org", "deploy.example.org"], true),
        // With an alternative name the common one counts for nothing.
        ("deploy", &["other.example.org"], false),
        ("Deploy", &[], false),
        ("uid:0", &[], false),
    ] {
        let files = agent.ca.caller(&agent.folder, common, names, NOW);
        let client = connect(&agent.tls(), files).await.unwrap();
        let vms = client.vms().await;
        if served {
            assert_eq!(vms.unwrap().len(), 2);
        } else {
            let error = vms.unwrap_err();
            assert_eq!(
                error.hindrance(),
                Hindrance::NotAllowed,
                "{common} {names:?}"
            );
            assert!(error.chain().contains("has no role"), "{}", error.chain());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_sort_of_distrust_is_an_error_of_its_own_that_says_what_to_do() {
    let agent = Agent::start(ROLES, "");
    let address = agent.tls();
    let good = || agent.ca.caller(&agent.folder, "deploy", &[], NOW);
    let expired = agent.ca.caller(&agent.folder, "deploy", &[], PAST);
    let error = connect(&address, expired).await.unwrap_err();
    assert_eq!(distrust(error), Distrust::CallerExpired);
    agent.says("the client certificate has expired");

    let other = Ca::new("another CA");
    let stranger = TlsFiles {
        ca_path: good().ca_path,
        ..other.caller(&agent.folder, "deploy", &[], NOW)
    };
    let error = connect(&address, stranger).await.unwrap_err();
    assert_eq!(distrust(error), Distrust::CallerUnknown);
    agent.says("no CA in tls.client_ca signed the client certificate");

    let early = agent.ca.caller(&agent.folder, "deploy", &[], FUTURE);
    let error = connect(&address, early).await.unwrap_err();
    assert!(matches!(
        distrust(error),
        Distrust::CallerOther(_) | Distrust::CallerExpired
    ));

    let wrong_ca = TlsFiles {
        ca_path: Some(write(&agent.folder.path("other.pem"), &other.pem)),
        ..good()
    };
    let error = connect(&address, wrong_ca).await.unwrap_err();
    assert!(error.advice().unwrap().contains("ca_path"));
    assert_eq!(distrust(error), Distrust::AgentUnknown);

    let port = address.rsplit(':').next().unwrap();
    let error = connect(&format!("127.0.0.2:{port}"), good()).await;
    // Nobody listens there.
    assert_eq!(error.unwrap_err().hindrance(), Hindrance::NoAgent);

    let error = connect(&agent.plain().replace("http", "https"), good()).await;
    assert_eq!(error.unwrap_err().hindrance(), Hindrance::NotTrusted);

    let error = connect("https://nosuch.invalid:7443", good()).await;
    assert_eq!(error.unwrap_err().hindrance(), Hindrance::NoRoute);

    let none = TlsFiles {
        client_key: None,
        ..good()
    };
    let error = connect(&format!("https://{address}"), none)
        .await
        .unwrap_err();
    assert_eq!(error.hindrance(), Hindrance::Settings);
    assert!(
        error.chain().contains("client_key is not given"),
        "{}",
        error.chain()
    );

    let mixed = TlsFiles {
        client_key: good().client_key,
        ..good()
    };
    let error = connect(&address, mixed).await.unwrap_err();
    assert!(
        error.chain().contains("is not the key of"),
        "{}",
        error.chain()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_under_a_foreign_name_or_with_an_expired_certificate_is_not_trusted() {
    let agent = Agent::start(ROLES, "");
    let files = || agent.ca.caller(&agent.folder, "deploy", &[], NOW);
    let present = |names: &[&str], span| {
        let (certificate, key) = agent.ca.certificate("", names, span);
        write(&agent.folder.path("agent.key"), &key);
        write(&agent.folder.path("agent.pem"), &certificate);
    };
    present(&["elsewhere.example.org"], NOW);
    agent.says("names=elsewhere.example.org");
    let error = connect(&agent.tls(), files()).await.unwrap_err();
    assert!(
        error.chain().contains("elsewhere.example.org"),
        "{}",
        error.chain()
    );
    assert!(matches!(distrust(error), Distrust::AgentName { .. }));
    present(&["late.example.org", "127.0.0.1"], PAST);
    agent.says("names=late.example.org");
    let error = connect(&agent.tls(), files()).await.unwrap_err();
    assert_eq!(distrust(error), Distrust::AgentExpired);
    agent.says("the agent's certificate has expired");
}

#[tokio::test(flavor = "multi_thread")]
async fn local_callers_may_do_everything_until_a_role_names_a_user_of_the_host() {
    let agent = Agent::start("", "");
    for address in [agent.socket(), agent.plain()] {
        let client = connect(&address, TlsFiles::default()).await.unwrap();
        client.record_fix("NO_SPACE", "", "grow it").await.unwrap();
    }
    let uid = std::fs::metadata("/proc/self").unwrap().uid();
    let roles = format!("[[roles]]\nrole = 'viewer'\nvms = ['in*']\nuids = [{uid}]\n");
    write(&agent.folder.path("roles.toml"), &roles);
    agent.says("new roles are in force");
    let client = connect(&agent.socket(), TlsFiles::default()).await.unwrap();
    let vms = client.vms().await.unwrap();
    assert_eq!(vms.len(), 1);
    let error = client.record_fix("NO_SPACE", "", "x").await.unwrap_err();
    assert_eq!(error.hindrance(), Hindrance::NotAllowed);
    let client = connect(&agent.plain(), TlsFiles::default()).await.unwrap();
    let error = client.vms().await.unwrap_err();
    assert_eq!(error.hindrance(), Hindrance::NotAllowed);
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_who_never_end_their_handshake_hold_up_nobody() {
    let agent = Agent::start(ROLES, "");
    let address = agent.tls();
    // They connect and say nothing, or nonsense. Their time is ten seconds.
    let begun = std::time::Instant::now();
    let silent: Vec<_> = (0..40)
        .map(|_| TcpStream::connect(&address).unwrap())
        .collect();
    for _ in 0..5 {
        let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        let read = tokio::time::timeout(Duration::from_secs(5), read).await;
        read.expect("nonsense is answered at once").ok();
    }
    agent.says("what was sent is no TLS");
    let client = agent.client("deploy").await;
    assert_eq!(client.vms().await.unwrap().len(), 2);
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}: whoever waits for them waits until their time is over",
        begun.elapsed()
    );
    // Their own time is bounded too.
    let mut last = silent.into_iter().next_back().unwrap();
    last.set_read_timeout(Some(Duration::from_secs(15)))
        .unwrap();
    let mut rest = Vec::new();
    let ended = last.read_to_end(&mut rest);
    assert!(
        !matches!(&ended, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock),
        "{ended:?}"
    );
    agent.says("it took longer than 10 s");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_runs_out_on_an_open_connection_ends_what_it_may_do() {
    let agent = Agent::start(ROLES, "");
    let files = agent.ca.caller(&agent.folder, "deploy", &[], (-60, 6));
    let client = connect(&agent.tls(), files).await.unwrap();
    assert_eq!(client.vms().await.unwrap().len(), 2);
    let patience = std::time::Instant::now() + Duration::from_secs(30);
    let error = loop {
        match client.vms().await {
            Err(error) => break error,
            Ok(_) => assert!(std::time::Instant::now() < patience, "it never runs out"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!(error.hindrance(), Hindrance::NotAllowed);
    assert!(
        error.chain().contains("has expired since"),
        "{}",
        error.chain()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_older_than_tls_1_2_is_refused_with_its_alert() {
    let agent = Agent::start(ROLES, "");
    // The first word of a client that knows this version of TLS at most, and what is
    // answered first: kind of record, and the last byte that was sent with it.
    let answer = async |minor: u8| {
        let mut hello = vec![3, minor];
        hello.extend([7; 32]);
        // No session; ECDHE_ECDSA_WITH_AES_128_GCM_SHA256; no compression.
        hello.extend([0, 0, 2, 0xc0, 0x2b, 1, 0]);
        // Signatures by ecdsa_secp256r1_sha256, the group x25519, points as they are.
        let extensions = [
            0, 13, 0, 4, 0, 2, 4, 3, 0, 10, 0, 4, 0, 2, 0, 29, 0, 11, 0, 2, 1, 0,
        ];
        hello.extend([0, u8::try_from(extensions.len()).unwrap()]);
        hello.extend(extensions);
        let length = u8::try_from(hello.len()).unwrap();
        let mut record = vec![22, 3, 1, 0, length + 4, 1, 0, 0, length];
        record.extend(hello);
        let mut stream = tokio::net::TcpStream::connect(agent.tls()).await.unwrap();
        stream.write_all(&record).await.unwrap();
        let mut answer = [0; 7];
        let read = stream.read_exact(&mut answer);
        let read = tokio::time::timeout(Duration::from_secs(5), read).await;
        read.expect("it is answered at once").unwrap();
        answer
    };
    // TLS 1.2 goes on with the agent's hello, TLS 1.1 ends with protocol_version (70).
    assert_eq!(answer(3).await[0], 22);
    let refused = answer(2).await;
    assert_eq!((refused[0], &refused[5..]), (21, &[2, 70][..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_at_the_networks_door_keeps_nobody_on_the_host_out() {
    let agent = Agent::start(ROLES, "[limits]\nmax_connections = 8\n");
    let address = agent.tls();
    // They need no certificate for this: they only connect.
    let crowd: Vec<_> = (0..12)
        .map(|_| TcpStream::connect(&address).unwrap())
        .collect();
    agent.says("connections were turned away");
    for address in [agent.socket(), agent.plain()] {
        let client = connect(&address, TlsFiles::default()).await.unwrap();
        assert_eq!(client.vms().await.unwrap().len(), 2, "{address}");
    }
    drop(crowd);
}
