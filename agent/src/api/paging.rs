//! Lists in pages.
//!
//! Invariants
//! - A page holds at most what was asked for, and at most [`BYTES`], so that any
//!   client takes it: gRPC's own limit is 4 MiB. An item that is larger alone is
//!   a page alone.
//! - A token names the last item that was given out, not a number of items: what
//!   comes and goes between two pages neither hides nor repeats others.

use prost::Message;
use serde::{Deserialize, Serialize};
use tonic::Status;

use super::errors;
use crate::planning::{Fault, Reason};

/// The largest page, in bytes.
const BYTES: usize = 2 << 20;

/// Where the next page begins: after this item.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// What the list is sorted by.
    pub group: String,
    /// Which one of the group.
    key: String,
    /// Its place in the group, should it be gone.
    at: usize,
}

impl Token {
    /// After the item `key`, at this place of a group.
    pub fn new(group: &str, key: &str, at: usize) -> Self {
        Self {
            group: group.to_owned(),
            key: key.to_owned(),
            at,
        }
    }

    /// What a caller handed in; `None` at the beginning.
    ///
    /// # Errors
    /// When the text is no token.
    pub fn read(text: &str) -> Result<Option<Self>, Status> {
        if text.is_empty() {
            return Ok(None);
        }
        serde_json::from_str(text)
            .map(Some)
            .map_err(|_| foreign_token())
    }

    /// How many of a group were given out already.
    pub fn skip(&self, group: &str, keys: &[&str]) -> usize {
        if group != self.group {
            return 0;
        }
        if keys.get(self.at).is_some_and(|key| *key == self.key) {
            return self.at + 1;
        }
        match keys.iter().position(|key| *key == self.key) {
            Some(at) => at + 1,
            None => self.at,
        }
    }

    fn write(&self) -> String {
        // Text and a number: nothing that JSON could not hold.
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// What is said of a token that is none of ours.
pub fn foreign_token() -> Status {
    errors::status(&Fault::new(
        Reason::BadRequest,
        "page_token: is not one that this agent gave out; begin again without it",
    ))
}

/// A page that is being filled.
#[derive(Debug)]
pub struct Page<T> {
    size: usize,
    items: Vec<T>,
    bytes: usize,
    last: Option<Token>,
    full: bool,
}

impl<T: Message> Page<T> {
    /// For at most so many items.
    pub fn new(size: usize) -> Self {
        Self {
            size,
            items: Vec::new(),
            bytes: 0,
            last: None,
            full: false,
        }
    }

    /// Adds an item, unless the page is full; it is from then on.
    pub fn add(&mut self, token: Token, item: T) {
        let bytes = item.encoded_len();
        let fits = self.items.is_empty()
            || (self.items.len() < self.size && self.bytes.saturating_add(bytes) <= BYTES);
        if self.full || !fits {
            self.full = true;
            return;
        }
        self.bytes = self.bytes.saturating_add(bytes);
        self.items.push(item);
        self.last = Some(token);
    }

    /// Whether an item did not fit any more.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// The items, and the token of the next page; empty when there is none.
    pub fn end(self) -> (Vec<T>, String) {
        let next = self.last.filter(|_| self.full);
        (
            self.items,
            next.map(|token| token.write()).unwrap_or_default(),
        )
    }
}

/// A page of a list that is held whole and sorted by `key`.
///
/// # Errors
/// When the token is none.
pub fn of_sorted<T: Message>(
    all: Vec<T>,
    key: impl Fn(&T) -> &str,
    size: u32,
    token: &str,
) -> Result<(Vec<T>, String), Status> {
    let after = Token::read(token)?;
    let from = after.map_or(0, |after| {
        all.partition_point(|item| *key(item) <= *after.group)
    });
    let mut page = Page::new(size as usize);
    for item in all.into_iter().skip(from) {
        page.add(Token::new(key(&item), "", 0), item);
    }
    Ok(page.end())
}

/// A page of a list that is held whole, in an order of its own.
///
/// # Errors
/// When the token is none.
pub fn of_list<T: Message>(
    all: Vec<T>,
    key: impl Fn(&T) -> &str,
    size: u32,
    token: &str,
) -> Result<(Vec<T>, String), Status> {
    let from = match Token::read(token)? {
        Some(after) => after.skip("", &all.iter().map(&key).collect::<Vec<_>>()),
        None => 0,
    };
    let mut page = Page::new(size as usize);
    for (at, item) in all.into_iter().enumerate().skip(from) {
        page.add(Token::new("", key(&item), at), item);
    }
    Ok(page.end())
}

#[cfg(test)]
mod tests {
    use vmsnap_proto::v1;

    use super::*;

    fn vms(names: &[String]) -> Vec<v1::VmSummary> {
        names
            .iter()
            .map(|name| v1::VmSummary {
                name: name.clone(),
                ..Default::default()
            })
            .collect()
    }

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|number| format!("vm{number:04}")).collect()
    }

    fn key(vm: &v1::VmSummary) -> &str {
        &vm.name
    }

    #[test]
    fn pages_together_are_the_list() {
        let all = names(25);
        for size in [1, 7, 24, 25, 26, 1_000] {
            let (mut found, mut token, mut pages) = (Vec::new(), String::new(), 0);
            loop {
                let (page, next) = of_sorted(vms(&all), key, size, &token).unwrap();
                assert!(page.len() <= size as usize);
                found.extend(page.into_iter().map(|vm| vm.name));
                pages += 1;
                token = next;
                if token.is_empty() {
                    break;
                }
            }
            assert_eq!(found, all);
            assert_eq!(pages, 25_usize.div_ceil(size as usize));
        }
        assert_eq!(of_sorted(vms(&[]), key, 1, "").unwrap().1, "");
    }

    #[test]
    fn pages_of_a_list_in_any_order_are_the_list_too() {
        let all = ["b", "a", "b", "b", "c", "a"].map(str::to_owned);
        for size in 1..8 {
            let (mut found, mut token) = (Vec::new(), String::new());
            loop {
                let (page, next) = of_list(vms(&all), key, size, &token).unwrap();
                found.extend(page.into_iter().map(|vm| vm.name));
                token = next;
                if token.is_empty() {
                    break;
                }
            }
            assert_eq!(found, all);
        }
    }

    #[test]
    fn what_goes_between_two_pages_hides_no_other() {
        let mut all = names(10);
        let (_, token) = of_sorted(vms(&all), key, 5, "").unwrap();
        all.drain(3..5);
        all.insert(0, "new".into());
        all.sort();
        let (page, _) = of_sorted(vms(&all), key, 5, &token).unwrap();
        assert_eq!(page[0].name, "vm0005");
        let token = Token::new("vm", "s2", 2);
        assert_eq!(token.skip("vm", &["s0", "s1", "s2", "s3"]), 3);
        assert_eq!(token.skip("vm", &["s0", "s1", "s3"]), 2);
        assert_eq!(token.skip("other", &["s2"]), 0);
    }

    #[test]
    fn a_page_of_large_items_is_short() {
        let large: Vec<String> = (0..5)
            .map(|n| format!("{n}{}", "x".repeat(1 << 20)))
            .collect();
        let (page, token) = of_sorted(vms(&large), key, 100, "").unwrap();
        assert_eq!((page.len(), token.is_empty()), (1, false));
        let huge = vec!["y".repeat(5 << 20)];
        let (page, token) = of_sorted(vms(&huge), key, 100, "").unwrap();
        assert_eq!((page.len(), &*token), (1, ""));
    }

    #[test]
    fn a_token_of_another_make_is_refused() {
        for token in ["7", "x", "{}", "{\"group\":1}"] {
            assert!(of_sorted(vms(&names(2)), key, 1, token).is_err(), "{token}");
        }
    }
}
