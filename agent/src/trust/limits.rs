//! How much one peer, and all of them together, may have going on.
//!
//! Invariants: what is over a limit is refused at once and costs nothing more; a
//! place is given back when what holds it is dropped. What only reads takes turns,
//! few at once and fewer of one peer: libvirt and the journal answer one after the
//! other, and a run that holds a guest still must not wait behind readers, nor one
//! reader behind the flood of another.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::planning::{Fault, Reason};

/// Reading calls and runs that go on at once.
const READING: usize = 4;
/// Those of one peer among them.
const READING_OF_ONE: usize = 2;

/// A limit for all, and one for each peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Most {
    /// For all together.
    pub all: usize,
    /// For each peer.
    pub peer: usize,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_peer: HashMap<String, usize>,
}

#[derive(Debug)]
struct Inner {
    /// What is counted, in the plural.
    what: &'static str,
    /// The key that sets the limit for all; that of the peer has `_per_peer` behind.
    key: &'static str,
    most: Most,
    taken: Mutex<Taken>,
}

/// Places that are taken and given back.
#[derive(Debug, Clone)]
pub struct Places(Arc<Inner>);

/// A place, given back when dropped.
#[derive(Debug)]
pub struct Place {
    places: Places,
    peer: String,
}

impl Places {
    /// All free.
    #[must_use]
    pub fn new(what: &'static str, key: &'static str, most: Most) -> Self {
        Self(Arc::new(Inner {
            what,
            key,
            most,
            taken: Mutex::default(),
        }))
    }

    /// Takes one for a peer.
    ///
    /// # Errors
    /// [`Reason::LimitReached`], naming the limit.
    pub fn take(&self, peer: &str) -> Result<Place, Fault> {
        let Inner {
            what, key, most, ..
        } = *self.0;
        let mut taken = self.0.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let own = taken.by_peer.get(peer).copied().unwrap_or(0);
        let over = |key: String, most: usize, whose: &str| {
            Fault::new(
                Reason::LimitReached,
                format!(
                    "{whose} {what} are open at this agent, and {key} is {most}; try again when \
                     some are over"
                ),
            )
            .with("limit", key)
            .with("most", most)
        };
        if own >= most.peer {
            let whose = format!("{own} of this caller's");
            return Err(over(format!("{key}_per_peer"), most.peer, &whose));
        }
        if taken.all >= most.all {
            return Err(over(key.to_owned(), most.all, &taken.all.to_string()));
        }
        taken.all += 1;
        taken.by_peer.insert(peer.to_owned(), own + 1);
        Ok(Place {
            places: self.clone(),
            peer: peer.to_owned(),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let taken = &self.places.0.taken;
        let mut taken = taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.all = taken.all.saturating_sub(1);
        if let Some(own) = taken.by_peer.get_mut(&self.peer) {
            *own = own.saturating_sub(1);
            if *own == 0 {
                taken.by_peer.remove(&self.peer);
            }
        }
    }
}

/// Whose turn it is to read.
#[derive(Debug, Clone)]
pub struct Turns {
    all: Arc<Semaphore>,
    peers: Arc<Mutex<HashMap<String, OfOne>>>,
}

/// How many of a peer's calls wait or read, and whose turn it is among them.
type OfOne = (usize, Arc<Semaphore>);

impl Default for Turns {
    fn default() -> Self {
        Self {
            all: Arc::new(Semaphore::new(READING)),
            peers: Arc::default(),
        }
    }
}

/// A turn, given back when dropped.
#[derive(Debug)]
pub struct Turn {
    _held: Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)>,
    _waiting: Waiting,
}

/// Somebody who waits for his turn, or has it.
#[derive(Debug)]
struct Waiting {
    turns: Turns,
    peer: String,
}

impl Turns {
    /// Waits for a turn of a peer.
    pub async fn take(&self, peer: &str) -> Turn {
        let own = {
            let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
            let (count, own) = peers
                .entry(peer.to_owned())
                .or_insert_with(|| (0, Arc::new(Semaphore::new(READING_OF_ONE))));
            *count += 1;
            own.clone()
        };
        let waiting = Waiting {
            turns: self.clone(),
            peer: peer.to_owned(),
        };
        // Neither is ever closed; if one were, reading would go on without turns.
        let own = own.acquire_owned().await.ok();
        let all = self.all.clone().acquire_owned().await.ok();
        Turn {
            _held: own.zip(all),
            _waiting: waiting,
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let peers = &self.turns.peers;
        let mut peers = peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((count, _)) = peers.get_mut(&self.peer) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                peers.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_and_all_together_have_their_limits_and_places_come_back() {
        let places = Places::new("streams", "limits.max_streams", Most { all: 3, peer: 2 });
        let first = places.take("a").unwrap();
        let second = places.take("a").unwrap();
        let fault = places.take("a").unwrap_err();
        assert_eq!(fault.reason, Reason::LimitReached);
        assert_eq!(fault.metadata["limit"], "limits.max_streams_per_peer");
        let third = places.take("b").unwrap();
        let fault = places.take("c").unwrap_err();
        assert_eq!(fault.metadata["limit"], "limits.max_streams");
        drop((first, third));
        let _third = places.take("c").unwrap();
        let _fourth = places.take("a").unwrap();
        drop(second);
        assert_eq!(places.0.taken.lock().unwrap().by_peer.len(), 2);
    }

    #[tokio::test]
    async fn a_peer_who_takes_all_his_turns_leaves_some_to_others() {
        let turns = Turns::default();
        let mut held = Vec::new();
        for _ in 0..READING_OF_ONE {
            held.push(turns.take("a").await);
        }
        let moment = std::time::Duration::from_millis(20);
        let third = tokio::time::timeout(moment, turns.take("a")).await;
        assert!(third.is_err());
        let other = tokio::time::timeout(moment, turns.take("b")).await;
        assert!(other.is_ok());
        held.pop();
        let third = tokio::time::timeout(moment, turns.take("a")).await;
        assert!(third.is_ok());
        drop((held, other, third));
        assert!(turns.peers.lock().unwrap().is_empty());
        assert_eq!(turns.all.available_permits(), READING);
    }
}
