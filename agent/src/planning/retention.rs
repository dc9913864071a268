//! Which snapshots a policy keeps and which it lets go, and by which rule.
//!
//! | snapshot | |
//! |---|---|
//! | not made by this agent, unless `include_foreign` | stays, not counted |
//! | name does not match `name_pattern` | stays, not counted |
//! | data not whole | stays, not counted: it is no restore point |
//! | safety snapshot of a revert | stays, not counted |
//! | protected, guarded, current | stays, counted |
//! | kept by any keep rule, on any branch | stays |
//! | younger than `older_than` | stays |
//! | anything else | goes |
//!
//! A branch is the path from a root of the tree to one of its leaves. The keep
//! rules count on each branch by itself, so a long branch never pushes out what
//! a short one needs. A period without a snapshot is not counted: `keep_daily: 7`
//! keeps the newest snapshot of each of the last seven days that have one.
//!
//! Invariants: pure; each snapshot gets exactly one judgement; with a keep rule
//! set, the newest counted snapshot of each branch stays.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{Timestamp, ZonedDateTime, tz::TimeZone};

use super::{
    actions::checks::{age, for_people},
    facts::{Facts, Health, Snapshot},
    reason::Fault,
    request::Policy,
    tree,
};

/// What a policy says of one snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement<'a> {
    /// The snapshot.
    pub snapshot: &'a Snapshot,
    /// It goes.
    pub goes: bool,
    /// The rule that says so.
    pub rule: String,
}

/// A span of the calendar in which the newest snapshot is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Period {
    Hour,
    Day,
    Week,
    Month,
}

impl Period {
    /// What all moments in the same period share. An hour that comes twice when
    /// the clock is set back is two hours: its offset differs.
    fn of(self, moment: &ZonedDateTime) -> (i64, i64, i64) {
        let date = moment.date();
        let day = || {
            (
                i64::from(date.year()),
                i64::from(date.month()),
                i64::from(date.day()),
            )
        };
        match self {
            Self::Hour => {
                let offset = i64::from(moment.offset().seconds());
                // Seconds of local time, in hours: zones with half an hour too.
                let local = moment.timestamp().as_second() + offset;
                (local.div_euclid(3600), offset, 0)
            }
            Self::Day => day(),
            Self::Week => {
                // ISO 8601: a week begins on Monday and belongs to the year that
                // holds its Thursday.
                let week = date.iso_week_date();
                (i64::from(week.year()), i64::from(week.week()), 0)
            }
            Self::Month => {
                let (year, month, _) = day();
                (year, month, 0)
            }
        }
    }
}

/// Judges all snapshots of a VM.
///
/// # Errors
/// When the pattern or the time zone is not one; [`Policy::check`] refuses them
/// earlier, at the door.
pub fn judge<'a>(policy: &Policy, facts: &'a Facts) -> Result<Vec<Judgement<'a>>, Fault> {
    let pattern = policy.pattern()?;
    let zone = policy.zone(&facts.host.time_zone)?;
    let counted: Vec<&Snapshot> = facts
        .snapshots
        .iter()
        .filter(|snapshot| uncounted(snapshot, policy, pattern.as_ref()).is_none())
        .collect();
    let mut kept: BTreeMap<&str, String> = BTreeMap::new();
    for branch in branches(facts) {
        // Newest first; of two in the same second the later in the tree.
        let mut newest_first: Vec<(usize, &Snapshot)> = branch
            .into_iter()
            .enumerate()
            .filter(|(_, one)| counted.iter().any(|other| other.name == one.name))
            .collect();
        newest_first.sort_by_key(|(depth, one)| std::cmp::Reverse((one.created, *depth)));
        let line: Vec<&Snapshot> = newest_first.into_iter().map(|(_, one)| one).collect();
        for (name, rule) in keep(policy, &line, facts, &zone) {
            kept.entry(name).or_insert(rule);
        }
    }
    let let_go = let_go_rule(policy);
    Ok(facts
        .snapshots
        .iter()
        .map(|snapshot| {
            let stays = uncounted(snapshot, policy, pattern.as_ref())
                .or_else(|| pinned(snapshot))
                .or_else(|| kept.get(snapshot.name.as_str()).cloned())
                .or_else(|| {
                    let limit = policy.older_than?;
                    (age(facts, snapshot) <= limit)
                        .then(|| format!("older_than: not older than {}", for_people(limit)))
                });
            Judgement {
                snapshot,
                goes: stays.is_none(),
                rule: stays.unwrap_or_else(|| let_go.clone()),
            }
        })
        .collect())
}

/// Why a snapshot is outside the policy altogether, if so.
fn uncounted(
    snapshot: &Snapshot,
    policy: &Policy,
    pattern: Option<&glob::Pattern>,
) -> Option<String> {
    if snapshot.record.is_none() && !policy.include_foreign {
        return Some("not made by this agent; include_foreign would count it".into());
    }
    if pattern.is_some_and(|pattern| !pattern.matches(&snapshot.name)) {
        return Some(format!(
            "name_pattern: does not match '{}'",
            policy.name_pattern
        ));
    }
    if snapshot.record.as_ref().is_some_and(|it| it.safety) {
        return Some("safety snapshot of a revert; remove it by name".into());
    }
    if snapshot.health != Health::Whole {
        return Some("its data is not whole; remove it by name".into());
    }
    None
}

/// Why no rule may remove a snapshot, if so.
fn pinned(snapshot: &Snapshot) -> Option<String> {
    if snapshot.record.as_ref().is_some_and(|it| it.protected) {
        return Some("protected".into());
    }
    if let Some(until) = snapshot.guard {
        return Some(format!(
            "guards a change that is to be confirmed until {until}"
        ));
    }
    snapshot
        .current
        .then(|| "current: the VM's present state stands on it".into())
}

/// Paths from a root to each leaf. A tree with a missing or circular parent ends
/// where it would repeat.
fn branches(facts: &Facts) -> Vec<Vec<&Snapshot>> {
    let mut all = Vec::new();
    let mut on_some: BTreeSet<&str> = BTreeSet::new();
    let leaves = facts
        .snapshots
        .iter()
        .filter(|one| tree::children(facts, &one.name).is_empty());
    let walk = |leaf: &'_ str| {
        let mut path: Vec<&Snapshot> = Vec::new();
        let mut next = facts.snapshot(leaf);
        while let Some(one) = next {
            if path.iter().any(|seen| seen.name == one.name) {
                break;
            }
            path.push(one);
            next = one.parent.as_deref().and_then(|name| facts.snapshot(name));
        }
        path.reverse();
        path
    };
    for leaf in leaves {
        let path = walk(&leaf.name);
        on_some.extend(path.iter().map(|one| one.name.as_str()));
        all.push(path);
    }
    // What hangs in a circle has no leaf: each of it is a branch of its own.
    for one in &facts.snapshots {
        if !on_some.contains(one.name.as_str()) {
            all.push(vec![one]);
        }
    }
    all
}

/// What the keep rules keep of one branch, newest first.
fn keep<'a>(
    policy: &Policy,
    line: &[&'a Snapshot],
    facts: &Facts,
    zone: &TimeZone,
) -> Vec<(&'a str, String)> {
    let mut kept: Vec<(&str, String)> = Vec::new();
    if let Some(count) = policy.keep_last {
        for (at, one) in line.iter().take(count as usize).enumerate() {
            let nth = at + 1;
            kept.push((&one.name, format!("keep_last: {nth} of {count}")));
        }
    }
    if let Some(limit) = policy.keep_within {
        for one in line.iter().filter(|one| age(facts, one) <= limit) {
            kept.push((
                &one.name,
                format!("keep_within: not older than {}", for_people(limit)),
            ));
        }
    }
    let local = |moment: Timestamp| moment.to_zoned_datetime(zone.clone());
    for (word, count, period) in [
        ("keep_hourly", policy.keep_hourly, Period::Hour),
        ("keep_daily", policy.keep_daily, Period::Day),
        ("keep_weekly", policy.keep_weekly, Period::Week),
        ("keep_monthly", policy.keep_monthly, Period::Month),
    ] {
        let Some(count) = count else { continue };
        let mut seen = Vec::new();
        for one in line {
            if seen.len() >= count as usize {
                break;
            }
            let key = period.of(&local(one.created));
            // Newest first: equal periods lie side by side.
            if seen.last() != Some(&key) {
                seen.push(key);
                kept.push((&one.name, format!("{word}: {} of {count}", seen.len())));
            }
        }
    }
    kept
}

/// The rule under which the rest goes.
fn let_go_rule(policy: &Policy) -> String {
    let mut rules: Vec<&str> = Vec::new();
    for (word, set) in [
        ("keep_last", policy.keep_last.is_some()),
        ("keep_within", policy.keep_within.is_some()),
        ("keep_hourly", policy.keep_hourly.is_some()),
        ("keep_daily", policy.keep_daily.is_some()),
        ("keep_weekly", policy.keep_weekly.is_some()),
        ("keep_monthly", policy.keep_monthly.is_some()),
    ] {
        if set {
            rules.push(word);
        }
    }
    let mut parts = Vec::new();
    if !rules.is_empty() {
        parts.push(format!("not kept by {}", rules.join(", ")));
    }
    if let Some(limit) = policy.older_than {
        parts.push(format!("older than {}", for_people(limit)));
    }
    if !policy.name_pattern.is_empty() {
        parts.push(format!("matches '{}'", policy.name_pattern));
    }
    parts.join("; ")
}
