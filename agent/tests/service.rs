//! The program as a service manager and an operator meet it: units, sockets that
//! are handed over, notification, configuration from all layers, alert rules. On
//! libvirt's test driver, which needs no daemon.

use std::{
    io::Read as _,
    os::unix::net::{UnixDatagram, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

const AGENT: &str = env!("CARGO_BIN_EXE_vmsnap-agent");
const PACKAGING: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging");
const URI: &str = "test:///default";

/// A folder of a test's own; gone with it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("vmsnap-s-{}", uuid::Uuid::now_v7()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A process that does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

fn agent(folder: &Folder, words: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(AGENT);
    command
        .args(words)
        .args(["--journal", &folder.path("journal.db")])
        .env_remove("VMSNAP_AGENT_CONFIG")
        .envs(environment.iter().copied());
    command.output().unwrap()
}

#[test]
fn check_tells_which_layer_a_slip_is_in_and_ends_with_a_status_of_its_own() {
    let folder = Folder::new();
    let file = folder.path("agent.toml");
    std::fs::write(&file, "[limits]\nmax_runs = 3\n[log]\nlevl = 'x'\n").unwrap();
    let refused = agent(&folder, &["check", "--config", &file], &[]);
    assert_eq!(refused.status.code(), Some(78), "{}", said(&refused));
    assert!(said(&refused).contains(&format!("{file}:4: ")));
    assert!(said(&refused).contains("levl"));

    std::fs::write(&file, "[limits]\nmax_runs = 3\n").unwrap();
    let slip = [("VMSNAP_AGENT_LIMIT_MAX_RUNS", "4")];
    let refused = agent(&folder, &["check", "--config", &file], &slip);
    assert_eq!(refused.status.code(), Some(78));
    assert!(
        said(&refused).contains("VMSNAP_AGENT_LIMITS_MAX_RUNS?"),
        "{}",
        said(&refused)
    );

    let right = [
        ("VMSNAP_AGENT_LIMITS_MAX_CHAIN", "7"),
        ("VMSNAP_AGENT_LIBVIRT_URI", "nowhere:///"),
    ];
    let words = [
        "check",
        "--config",
        &file,
        "--dump",
        "--libvirt-uri",
        URI,
        "--set",
        "limits.heartbeat=9",
    ];
    let dumped = agent(&folder, &words, &right);
    let text = said(&dumped);
    assert!(dumped.status.success(), "{text}");
    for line in [
        &format!("# limits.max_runs from {file}:2"),
        "# limits.max_chain from environment variable VMSNAP_AGENT_LIMITS_MAX_CHAIN",
        "# libvirt.uri from --libvirt-uri",
        "# limits.heartbeat from --set",
        "max_runs = 3",
        "max_chain = 7",
        "heartbeat = 9",
        "uri = \"test:///default\"",
    ] {
        assert!(
            text.lines().any(|it| it == line),
            "no line {line} in {text}"
        );
    }
    // A folder that the agent would make is not missed, but a file in its place is.
    let deep = folder.path("not/yet/there.db");
    let fine = Command::new(AGENT)
        .args(["check", "--libvirt-uri", URI, "--journal", &deep])
        .output()
        .unwrap();
    assert!(fine.status.success(), "{}", said(&fine));
    let below = format!("{file}/journal.db");
    let refused = Command::new(AGENT)
        .args(["check", "--libvirt-uri", URI, "--journal", &below])
        .output()
        .unwrap();
    assert!(
        said(&refused).contains("is no folder"),
        "{}",
        said(&refused)
    );
    // It changes nothing.
    assert!(!Path::new(&folder.path("not")).exists());
    assert!(!Path::new(&folder.path("journal.db")).exists());
    // What cannot be reached is no slip of the configuration.
    let away = agent(&folder, &["check", "--libvirt-uri", "nowhere:///"], &[]);
    assert_eq!(away.status.code(), Some(1), "{}", said(&away));
}

#[test]
fn a_service_manager_hands_its_socket_over_and_hears_how_the_agent_is() {
    let folder = Folder::new();
    let (socket, other) = (folder.path("s"), folder.path("other"));
    let manager = UnixDatagram::bind(folder.path("notify")).unwrap();
    manager
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let heard = || {
        let mut text = [0; 4096];
        let length = manager.recv(&mut text).expect("nothing was told");
        String::from_utf8(text[..length].to_vec()).unwrap()
    };
    let wait_for = |wanted: &str| {
        let since = Instant::now();
        loop {
            let text = heard();
            if text.lines().any(|line| line == wanted) {
                return text;
            }
            assert!(since.elapsed() < Duration::from_secs(30), "no {wanted}");
        }
    };
    let log = std::fs::File::create(folder.path("log")).unwrap();
    let mut activated = Command::new("systemd-socket-activate");
    activated
        .args(["--listen", &socket, "--fdname", "grpc"])
        .args(["-E", &format!("NOTIFY_SOCKET={}", folder.path("notify"))])
        .args(["-E", "WATCHDOG_USEC=1500000"])
        .args([AGENT, "serve", "--libvirt-uri", URI])
        .args(["--socket", &other, "--journal", &folder.path("journal.db")])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log);
    let mut running = Running(activated.spawn().expect("systemd-socket-activate"));
    // The first caller wakes it, and waits in the socket meanwhile.
    let since = Instant::now();
    let mut caller = loop {
        match UnixStream::connect(&socket) {
            Ok(caller) => break caller,
            Err(error) => {
                assert!(since.elapsed() < Duration::from_secs(20), "{error}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    };
    let first = heard();
    assert!(first.contains("EXTEND_TIMEOUT_USEC="), "{first}");
    wait_for("READY=1");
    wait_for("WATCHDOG=1");
    wait_for("STATUS=all is well");
    wait_for("WATCHDOG=1");
    // It is served over the socket that was handed over, by HTTP/2.
    let mut greeting = [0; 1];
    std::io::Write::write_all(&mut caller, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    caller.read_exact(&mut greeting).unwrap();
    assert!(
        !Path::new(&other).exists(),
        "the configured socket is not opened"
    );

    let pid = rustix::process::Pid::from_child(&running.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    wait_for("STOPPING=1");
    drop(caller);
    let ended = running.0.wait().unwrap();
    let log = std::fs::read_to_string(folder.path("log")).unwrap();
    assert!(ended.success(), "{ended}: {log}");
    assert!(
        log.contains(&format!("serving socket=\"{socket}\"")),
        "{log}"
    );
    assert!(Path::new(&socket).exists(), "the socket is the manager's");
    // All of the journal is in its one file.
    assert!(Path::new(&folder.path("journal.db")).exists());
    assert!(!Path::new(&folder.path("journal.db-wal")).exists());
}

#[test]
fn where_errors_go_to_the_journal_lines_carry_their_level_and_no_time() {
    use std::os::unix::fs::MetadataExt as _;
    let folder = Folder::new();
    let log = std::fs::File::create(folder.path("log")).unwrap();
    let own = log.metadata().unwrap();
    let mut running = Running(
        Command::new(AGENT)
            .args(["serve", "--libvirt-uri", URI, "--socket", &folder.path("s")])
            .args(["--journal", &folder.path("journal.db")])
            .env("JOURNAL_STREAM", format!("{}:{}", own.dev(), own.ino()))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap(),
    );
    let since = Instant::now();
    let read = || std::fs::read_to_string(folder.path("log")).unwrap();
    while !read().contains("serving socket=") {
        assert!(since.elapsed() < Duration::from_secs(20), "{}", read());
        std::thread::sleep(Duration::from_millis(20));
    }
    running.0.kill().unwrap();
    for line in read().lines() {
        assert!(line.starts_with("<6>vmsnap_agent::"), "{line}");
    }
}

#[test]
fn the_units_are_sound_and_as_tight_as_the_guide_says() {
    let unit = format!("{PACKAGING}/systemd/vmsnap-agent.service");
    let verified = Command::new("systemd-analyze")
        .args(["verify", "--man=no", &unit])
        .arg(format!("{PACKAGING}/systemd/vmsnap-agent.socket"))
        .output()
        .expect("systemd-analyze");
    let complaints: Vec<String> = said(&verified)
        .lines()
        .filter(|line| line.contains("vmsnap"))
        // It is not installed where it is tested.
        .filter(|line| !line.contains("/usr/bin/vmsnap-agent is not executable"))
        .map(str::to_owned)
        .collect();
    assert!(complaints.is_empty(), "{complaints:?}");
    let rated = Command::new("systemd-analyze")
        .args(["security", "--offline=true", "--threshold=25", &unit])
        .output()
        .expect("systemd-analyze");
    assert!(rated.status.success(), "{}", said(&rated));
    // A line that is not understood would be passed over.
    let text = std::fs::read_to_string(&unit).unwrap();
    assert!(text.contains("ExecStartPre=-/usr/bin/vmsnap-agent check"));
}

#[test]
fn alert_rules_come_when_they_should_and_not_before() {
    for words in [
        ["check", "rules", "vmsnap.rules.yml"],
        ["test", "rules", "vmsnap.rules.test.yml"],
    ] {
        let tried = Command::new("promtool")
            .args(words)
            .current_dir(format!("{PACKAGING}/prometheus"))
            .output()
            .expect("promtool");
        assert!(tried.status.success(), "{}", said(&tried));
    }
    let read = |name: &str| std::fs::read_to_string(format!("{PACKAGING}/prometheus/{name}"));
    let tests = read("vmsnap.rules.test.yml").unwrap();
    for rule in read("vmsnap.rules.yml").unwrap().lines() {
        if let Some(alert) = rule.trim().strip_prefix("- alert: ") {
            let fires = format!("alertname: {alert}\n        exp_alerts:\n          - exp_labels");
            assert!(tests.contains(&fires), "no test lets {alert} come");
        }
    }
}
