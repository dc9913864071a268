//! How much one peer, and all of them together, may have going on.
//!
//! Invariants: what is over a limit is refused at once and costs nothing more; a
//! place is given back when what holds it is dropped.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use crate::planning::{Fault, Reason};

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
}
