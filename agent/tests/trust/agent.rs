//! An agent of a test's own, on libvirt's test driver.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use vmsnap_client::{Client, ConnectOptions, Endpoint, Error, TlsFiles};

use crate::pki::{Ca, Folder, NOW, write};

/// An agent with its CA; stopped when dropped.
pub struct Agent {
    pub folder: Folder,
    pub ca: Ca,
    child: Child,
}

const NODE: &str = "\
<node>
  <domain type='test'><name>in1</name><memory>1024</memory><os><type>hvm</type></os></domain>
  <domain type='test'><name>out1</name><memory>1024</memory><os><type>hvm</type></os></domain>
  <pool type='dir'><name>default</name><target><path>/nowhere</path></target></pool>
</node>
";

impl Agent {
    /// With a file of roles, and `more` lines of configuration.
    pub fn start(roles: &str, more: &str) -> Self {
        let (folder, ca) = (Folder::new(), Ca::new("test CA"));
        let (certificate, key) = ca.certificate("", &["localhost", "127.0.0.1"], NOW);
        write(&folder.path("agent.pem"), &certificate);
        write(&folder.path("agent.key"), &key);
        write(&folder.path("ca.pem"), &ca.pem);
        write(&folder.path("roles.toml"), roles);
        write(&folder.path("node.xml"), NODE);
        let shown = folder.0.display();
        write(
            &folder.path("agent.toml"),
            &format!(
                "[libvirt]\nuri = 'test://{shown}/node.xml'\n\
                 [listen]\nsocket = '{shown}/s'\ntls = '127.0.0.1:0'\ntcp = '127.0.0.1:0'\n\
                 [tls]\ncertificate = '{shown}/agent.pem'\nkey = '{shown}/agent.key'\n\
                 client_ca = '{shown}/ca.pem'\n\
                 [trust]\nroles = '{shown}/roles.toml'\n\
                 [journal]\npath = '{shown}/journal.db'\n{more}"
            ),
        );
        let child = spawn(&folder);
        let agent = Self { folder, ca, child };
        agent.says("serving socket=");
        agent
    }

    /// What it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path("log")).unwrap_or_default()
    }

    /// Waits until it logged something.
    pub fn says(&self, text: &str) {
        let patience = Instant::now() + Duration::from_secs(20);
        while !self.log().contains(text) {
            assert!(
                Instant::now() < patience,
                "the agent never said '{text}':\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn bound(&self, key: &str) -> String {
        let log = self.log();
        let line = log.lines().find(|line| line.contains("serving socket="));
        line.unwrap()
            .split_whitespace()
            .find_map(|word| word.strip_prefix(key))
            .unwrap()
            .to_owned()
    }

    /// Its address for TLS.
    pub fn tls(&self) -> String {
        self.bound("tls=")
    }

    /// Its address for plain TCP.
    pub fn plain(&self) -> String {
        format!("http://{}", self.bound("tcp="))
    }

    /// Its socket.
    pub fn socket(&self) -> String {
        format!("unix://{}", self.folder.path("s").display())
    }

    /// What it tells a Prometheus, where `metrics.listen` is set.
    pub fn scrape(&self) -> String {
        let mut stream = TcpStream::connect(self.bound("metrics=")).unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nhost: agent\r\n\r\n")
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A client of the common name `name`.
    pub async fn client(&self, name: &str) -> Client {
        let files = self.ca.caller(&self.folder, name, &[], NOW);
        connect(&self.tls(), files).await.unwrap()
    }
}

/// Connects with these files.
pub async fn connect(address: &str, tls: TlsFiles) -> Result<Client, Error> {
    let options = ConnectOptions {
        tls,
        ..ConnectOptions::default()
    };
    Client::connect(&Endpoint::parse(address).unwrap(), &options).await
}

fn spawn(folder: &Folder) -> Child {
    let log = fs::File::create(folder.path("log")).unwrap();
    Command::new(env!("CARGO_BIN_EXE_vmsnap-agent"))
        .args(["serve", "--config"])
        .arg(folder.path("agent.toml"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
