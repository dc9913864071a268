//! A wire between a client and an agent that a test can cut.

use std::path::{Path, PathBuf};

use tokio::{
    io::copy_bidirectional,
    net::{UnixListener, UnixStream},
    task::{JoinHandle, JoinSet},
};

/// Forwards one socket to another until it is cut.
pub struct Wire {
    front: PathBuf,
    behind: PathBuf,
    task: JoinHandle<()>,
}

impl Wire {
    pub fn new(front: PathBuf, behind: PathBuf) -> Self {
        let task = forward(&front, &behind);
        Wire {
            front,
            behind,
            task,
        }
    }

    /// Breaks what is connected; new connections are taken.
    pub fn cut(&mut self) {
        self.remove();
        self.restore();
    }

    /// Breaks what is connected, and nobody answers any more.
    pub fn remove(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.front);
    }

    /// Takes connections again.
    pub fn restore(&mut self) {
        self.task = forward(&self.front, &self.behind);
    }
}

fn forward(front: &Path, behind: &Path) -> JoinHandle<()> {
    let listener = UnixListener::bind(front).unwrap();
    let behind = behind.to_owned();
    tokio::spawn(async move {
        // Dropped with this task, and every connection with it.
        let mut connections = JoinSet::new();
        while let Ok((mut client, _)) = listener.accept().await {
            let behind = behind.clone();
            connections.spawn(async move {
                if let Ok(mut agent) = UnixStream::connect(behind).await {
                    let _ = copy_bidirectional(&mut client, &mut agent).await;
                }
            });
        }
    })
}

/// A folder of this test's own, gone afterwards.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("vmsnap-{}", uuid::Uuid::now_v7().simple()));
        std::fs::create_dir(&folder).unwrap();
        Folder(folder)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
