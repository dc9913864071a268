//! The audit trail as `vmsnap audit --follow` shows it, against an agent that goes
//! away.

use std::{
    path::PathBuf,
    pin::Pin,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::UnixListener,
    process::Command,
};
use tokio_stream::{Stream, wrappers::UnixListenerStream};
use tonic::{Request, Response, Status, transport::Server};
use vmsnap_proto::v1::{
    self,
    audit_service_server::{AuditService, AuditServiceServer},
};

/// A folder of a test's own; gone with it.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Tells one entry to the first who follows, and is away for all others.
#[derive(Clone, Default)]
struct GoingAway {
    asked: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl AuditService for GoingAway {
    async fn list_audit(
        &self,
        _: Request<v1::ListAuditRequest>,
    ) -> Result<Response<v1::ListAuditResponse>, Status> {
        Ok(Response::new(v1::ListAuditResponse::default()))
    }

    type WatchAuditStream =
        Pin<Box<dyn Stream<Item = Result<v1::WatchAuditResponse, Status>> + Send>>;

    async fn watch_audit(
        &self,
        _: Request<v1::WatchAuditRequest>,
    ) -> Result<Response<Self::WatchAuditStream>, Status> {
        if self.asked.fetch_add(1, Ordering::SeqCst) > 0 {
            return Err(Status::unavailable("gone"));
        }
        let entry = v1::AuditEntry {
            sequence: 7,
            ..v1::AuditEntry::default()
        };
        let message = v1::WatchAuditResponse { entry: Some(entry) };
        Ok(Response::new(Box::pin(tokio_stream::iter([Ok(message)]))))
    }
}

#[tokio::test]
async fn ctrl_c_ends_who_follows_the_trail_also_while_the_agent_is_away() {
    let folder = std::env::temp_dir().join(format!("vmsnap-cli-audit-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let folder = Folder(folder);
    let socket = folder.0.join("agent.sock");
    let agent = GoingAway::default();
    let listener = UnixListener::bind(&socket).unwrap();
    tokio::spawn(
        Server::builder()
            .add_service(AuditServiceServer::new(agent.clone()))
            .serve_with_incoming(UnixListenerStream::new(listener)),
    );
    let mut child = Command::new(env!("CARGO_BIN_EXE_vmsnap"))
        .arg("--agent")
        .arg(&socket)
        .args(["--json", "audit", "--follow"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut data = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = data.next_line().await.unwrap().unwrap();
    let entry: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(entry["sequence"], 7);
    let patience = Instant::now() + Duration::from_secs(20);
    while agent.asked.load(Ordering::SeqCst) < 2 {
        assert!(Instant::now() < patience, "it never tried again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let pid = child.id().unwrap().to_string();
    let kill = Command::new("kill").args(["-INT", &pid]).status();
    assert!(kill.await.unwrap().success());
    let ended = tokio::time::timeout(Duration::from_secs(10), child.wait()).await;
    let ended = ended.expect("Ctrl-C did nothing").unwrap();
    assert_eq!(ended.code(), Some(130));
}
