//! Figures that libvirt or storage has to be asked for: room in pools, depth of
//! chains. Read beside whoever wants them, and kept.
//!
//! Invariants: nobody waits for a reading longer than [`FIRST`]; one reading of
//! each goes on at a time, so that a hung libvirt or file system costs one task;
//! what is shown says how old it is.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;

use crate::observe::Observer;

/// Figures of pools are read anew when they are older than this.
const POOLS: Duration = Duration::from_secs(30);
/// Figures of chains are; each VM costs a call and its images' headers.
const CHAINS: Duration = Duration::from_secs(60);
/// Whoever asks first waits so long for a reading, and everybody else not at all.
const FIRST: Duration = Duration::from_secs(3);

/// Room in a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolRoom {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub capacity: u64,
    /// Bytes that are left.
    pub available: u64,
}

/// Figures with their age.
#[derive(Debug, Clone)]
pub struct Aged<T> {
    /// The figures.
    pub figures: Vec<T>,
    read: Option<Instant>,
}

impl<T> Default for Aged<T> {
    fn default() -> Self {
        Self {
            figures: Vec::new(),
            read: None,
        }
    }
}

impl<T> Aged<T> {
    /// How old they are; `None` when they were never read.
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        self.read.map(|read| read.elapsed())
    }

    fn is_due(&self, after: Duration) -> bool {
        self.age().is_none_or(|age| age >= after)
    }

    fn now(figures: Vec<T>) -> Self {
        Self {
            figures,
            read: Some(Instant::now()),
        }
    }
}

/// All figures that are kept.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// Active pools.
    pub pools: Aged<PoolRoom>,
    /// VMs and the depth of their deepest chain.
    pub chains: Aged<(String, usize)>,
}

#[derive(Debug, Default)]
struct Kept {
    known: Known,
    reading_pools: bool,
    reading_chains: bool,
}

/// Keeps figures; cheap to clone.
#[derive(Debug, Clone)]
pub struct Readings {
    observer: Observer,
    kept: Arc<Mutex<Kept>>,
    /// Told when a reading ended.
    ended: watch::Sender<()>,
}

impl Readings {
    /// Nothing is read yet.
    #[must_use]
    pub fn new(observer: Observer) -> Self {
        Self {
            observer,
            kept: Arc::default(),
            ended: watch::Sender::new(()),
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known; starts to read what is too old.
    pub async fn known(&self) -> Known {
        let mut ended = self.ended.subscribe();
        self.start();
        let all_read = async {
            loop {
                let known = self.kept().known.clone();
                if known.pools.read.is_some() && known.chains.read.is_some() {
                    return known;
                }
                if ended.changed().await.is_err() {
                    return known;
                }
            }
        };
        match tokio::time::timeout(FIRST, all_read).await {
            Ok(known) => known,
            Err(_) => self.kept().known.clone(),
        }
    }

    fn start(&self) {
        let mut kept = self.kept();
        if !kept.reading_pools && kept.known.pools.is_due(POOLS) {
            kept.reading_pools = true;
            let readings = self.clone();
            tokio::spawn(async move {
                let read = readings.observer.pool_rooms().await;
                let mut kept = readings.kept();
                kept.reading_pools = false;
                match read {
                    Ok(rooms) => kept.known.pools = Aged::now(rooms),
                    Err(fault) => tracing::debug!(%fault, "pools cannot be read"),
                }
                drop(kept);
                readings.ended.send_replace(());
            });
        }
        if !kept.reading_chains && kept.known.chains.is_due(CHAINS) {
            kept.reading_chains = true;
            let readings = self.clone();
            tokio::spawn(async move {
                let read = readings.observer.chain_depths().await;
                let mut kept = readings.kept();
                kept.reading_chains = false;
                match read {
                    Ok(depths) => kept.known.chains = Aged::now(depths),
                    Err(fault) => tracing::debug!(%fault, "chains cannot be read"),
                }
                drop(kept);
                readings.ended.send_replace(());
            });
        }
    }
}
