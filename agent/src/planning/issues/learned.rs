//! What this host taught: errors of the past, and fixes that worked.
//!
//! Invariants: pure; a fix is shown with an error of its reason only, and only
//! where its subject is the error's own pool, folder or VM, or empty.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::planning::{
    facts::{Facts, folder_of},
    files,
    plan::Warning,
    reason::{Fault, Reason},
};

/// What metadata keys of fixes begin with.
pub const KNOWN_FIX: &str = "known_fix";
/// Code of the warning that a place was full before.
pub const FULL_BEFORE: &str = "NO_SPACE_BEFORE";

/// A fix that worked on this host, or a fault that was seen here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Learned {
    /// Id.
    pub id: String,
    /// Reason code.
    pub reason: String,
    /// Pool, folder or VM; empty for all.
    pub subject: String,
    /// The fix; empty when only the fault was seen.
    pub fix: String,
    /// How often it was seen.
    pub seen: u32,
    /// When it was last seen.
    pub last: Timestamp,
}

impl Learned {
    /// How often and when it was seen, for people.
    #[must_use]
    pub fn history(&self) -> String {
        let last = self.last.strftime("%Y-%m-%d %H:%M UTC");
        match self.seen {
            0 => "recorded by hand".to_owned(),
            1 => format!("once, at {last}"),
            times => format!("{times} times, last at {last}"),
        }
    }
}

/// The lack of space that was seen in a folder, or in the pool that lies there.
#[must_use]
pub fn full_before<'a>(path: &str, facts: &'a Facts) -> Option<&'a Learned> {
    let pool = facts
        .folders
        .get(path)
        .and_then(|folder| folder.pool.as_deref());
    facts.learned.iter().find(|learned| {
        learned.reason == Reason::NoSpace.as_str()
            && learned.seen > 0
            && (learned.subject == path || Some(learned.subject.as_str()) == pool)
    })
}

/// The warning that a place which a plan writes into was full before.
#[must_use]
pub fn warning(path: &str, facts: &Facts) -> Option<Warning> {
    let learned = full_before(path, facts)?;
    let folder = facts.folders.get(path)?;
    let forget = format!(
        "if it has room enough for good now: vmsnap issues forget {}",
        learned.id
    );
    Some(Warning::new(
        FULL_BEFORE,
        format!(
            "{} had too little space before ({}); it has {} of {} bytes free now",
            files::place(facts, path),
            learned.history(),
            folder.free,
            folder.capacity
        ),
        if learned.fix.is_empty() {
            format!("free space there or enlarge it; {forget}")
        } else {
            format!("what worked here before: {}; {forget}", learned.fix)
        },
    ))
}

/// Whether something learned is about this VM, its folders or its pools, or
/// about the whole host.
#[must_use]
pub fn is_about(learned: &Learned, facts: &Facts) -> bool {
    learned.subject.is_empty()
        || learned.subject == facts.vm.name
        || facts.folders.iter().any(|(path, folder)| {
            learned.subject == *path || folder.pool.as_deref() == Some(&learned.subject)
        })
}

/// Fixes for a fault of a run on `vm`: those for its own pool, folder or VM
/// first, then those for the whole host.
#[must_use]
pub fn fixes<'a>(fault: &Fault, vm: &str, learned: &'a [Learned]) -> Vec<&'a str> {
    let of = |key: &str| fault.metadata.get(key).map(String::as_str);
    let path = of("path");
    let own = [of("pool"), path, path.map(folder_of), of("vm"), Some(vm)];
    let matching = |specific: bool| {
        learned.iter().filter(move |learned| {
            learned.reason == fault.reason.as_str()
                && !learned.fix.is_empty()
                && learned.subject.is_empty() != specific
                && (!specific || own.contains(&Some(learned.subject.as_str())))
        })
    };
    matching(true)
        .chain(matching(false))
        .map(|learned| learned.fix.as_str())
        .collect()
}
