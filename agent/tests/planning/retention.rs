//! Retention policies: what stays, what goes, by which rule, at every boundary of
//! the calendar.

use std::{collections::BTreeSet, time::Duration};

use jiff::{Timestamp, ToSpan as _};
use proptest::{collection::vec, prelude::*, sample::select};
use vmsnap_agent::planning::{
    Facts, Reason,
    facts::{Health, Kind, Snapshot},
    plan,
    request::{Action, Cleanup, Policy},
    retention::judge,
    tree,
};

use super::{path, quiet, request, snapshot};

const DAY: Duration = Duration::from_secs(86_400);

/// A point of `name` at a moment, on `parent`.
fn point(name: &str, parent: Option<&str>, created: &str) -> Snapshot {
    let mut one = snapshot(name, parent, Kind::Internal, &path("web1.qcow2"));
    one.created = created.parse().unwrap();
    one
}

/// A VM with a line of points, each on the one before; names are `p0`, `p1`, ….
fn line(now: &str, created: &[&str]) -> Facts {
    let mut facts = quiet();
    facts.now = now.parse().unwrap();
    for (at, created) in created.iter().enumerate() {
        let parent = at.checked_sub(1).map(|before| format!("p{before}"));
        facts
            .snapshots
            .push(point(&format!("p{at}"), parent.as_deref(), created));
    }
    facts
}

fn goes(policy: &Policy, facts: &Facts) -> Vec<String> {
    judge(policy, facts)
        .unwrap()
        .into_iter()
        .filter(|one| one.goes)
        .map(|one| one.snapshot.name.clone())
        .collect()
}

fn rule_of(policy: &Policy, facts: &Facts, name: &str) -> String {
    judge(policy, facts)
        .unwrap()
        .into_iter()
        .find(|one| one.snapshot.name == name)
        .unwrap()
        .rule
}

#[test]
fn keep_last_keeps_the_newest_and_says_which_of_how_many() {
    let facts = line(
        "2026-03-10T12:00:00Z",
        &[
            "2026-03-01T00:00:00Z",
            "2026-03-02T00:00:00Z",
            "2026-03-03T00:00:00Z",
            "2026-03-04T00:00:00Z",
        ],
    );
    let policy = Policy {
        keep_last: Some(2),
        ..Policy::default()
    };
    assert_eq!(goes(&policy, &facts), ["p0", "p1"]);
    assert_eq!(rule_of(&policy, &facts, "p3"), "keep_last: 1 of 2");
    assert_eq!(rule_of(&policy, &facts, "p2"), "keep_last: 2 of 2");
    assert_eq!(rule_of(&policy, &facts, "p0"), "not kept by keep_last");
}

#[test]
fn days_begin_at_midnight_of_the_zone_that_is_asked_for() {
    // 23:30 and 00:30 in Prague (UTC+1 in winter): one day in UTC, two there.
    let facts = line(
        "2026-01-20T12:00:00Z",
        &["2026-01-10T22:30:00Z", "2026-01-10T23:30:00Z"],
    );
    let in_zone = |zone: &str| Policy {
        keep_daily: Some(7),
        time_zone: zone.into(),
        ..Policy::default()
    };
    assert_eq!(goes(&in_zone("UTC"), &facts), ["p0"]);
    assert!(goes(&in_zone("Europe/Prague"), &facts).is_empty());
    // Where nothing is asked for, the host's zone counts.
    let mut abroad = facts;
    abroad.host.time_zone = "Europe/Prague".into();
    assert!(goes(&in_zone(""), &abroad).is_empty());
    assert_eq!(goes(&in_zone("UTC"), &abroad), ["p0"]);
}

#[test]
fn the_hour_that_comes_twice_in_autumn_is_two_hours_and_a_half_hour_zone_has_its_own() {
    // Clocks in Prague went from 03:00 back to 02:00 on 2025-10-26 at 01:00 UTC.
    let facts = line(
        "2025-11-01T00:00:00Z",
        &["2025-10-26T00:30:00Z", "2025-10-26T01:30:00Z"],
    );
    let hourly = |zone: &str| Policy {
        keep_hourly: Some(24),
        time_zone: zone.into(),
        ..Policy::default()
    };
    assert!(goes(&hourly("Europe/Prague"), &facts).is_empty());
    // Kolkata is UTC+5:30: 00:20 and 00:40 UTC are 05:50 and 06:10 there.
    let facts = line(
        "2025-11-01T00:00:00Z",
        &["2025-10-26T00:20:00Z", "2025-10-26T00:40:00Z"],
    );
    assert_eq!(goes(&hourly("UTC"), &facts), ["p0"]);
    assert!(goes(&hourly("Asia/Kolkata"), &facts).is_empty());
}

#[test]
fn a_day_of_twenty_three_hours_in_spring_is_one_day() {
    // Clocks in Prague went forward on 2026-03-29 at 01:00 UTC.
    let facts = line(
        "2026-04-02T00:00:00Z",
        &[
            "2026-03-28T22:59:59Z",
            "2026-03-28T23:00:00Z",
            "2026-03-29T21:59:59Z",
            "2026-03-29T22:00:00Z",
        ],
    );
    let policy = Policy {
        keep_daily: Some(9),
        time_zone: "Europe/Prague".into(),
        ..Policy::default()
    };
    assert_eq!(goes(&policy, &facts), ["p1"]);
}

#[test]
fn weeks_begin_on_monday_also_across_the_new_year_and_months_on_the_first() {
    // Monday 2025-12-29 to Sunday 2026-01-04 is one week in two years.
    let facts = line(
        "2026-01-20T00:00:00Z",
        &[
            "2025-12-28T23:59:59Z",
            "2025-12-29T00:00:00Z",
            "2026-01-04T23:59:59Z",
            "2026-01-05T00:00:00Z",
        ],
    );
    let weekly = Policy {
        keep_weekly: Some(9),
        time_zone: "UTC".into(),
        ..Policy::default()
    };
    assert_eq!(goes(&weekly, &facts), ["p1"]);
    let monthly = Policy {
        keep_monthly: Some(9),
        time_zone: "UTC".into(),
        ..Policy::default()
    };
    assert_eq!(goes(&monthly, &facts), ["p0", "p2"]);
    let one_month = Policy {
        keep_monthly: Some(1),
        time_zone: "UTC".into(),
        ..Policy::default()
    };
    assert_eq!(goes(&one_month, &facts), ["p0", "p1", "p2"]);
}

#[test]
fn keep_rules_unite_and_older_than_and_the_pattern_narrow() {
    let facts = line(
        "2026-03-10T12:00:00Z",
        &[
            "2026-02-01T00:00:00Z",
            "2026-03-01T00:00:00Z",
            "2026-03-09T00:00:00Z",
            "2026-03-10T00:00:00Z",
        ],
    );
    let united = Policy {
        keep_last: Some(1),
        keep_monthly: Some(2),
        ..Policy::default()
    };
    assert_eq!(goes(&united, &facts), ["p1", "p2"]);
    assert_eq!(rule_of(&united, &facts, "p0"), "keep_monthly: 2 of 2");
    let within = Policy {
        keep_within: Some(2 * DAY),
        ..Policy::default()
    };
    assert_eq!(goes(&within, &facts), ["p0", "p1"]);
    let narrowed = Policy {
        keep_last: Some(1),
        older_than: Some(5 * DAY),
        ..Policy::default()
    };
    assert_eq!(goes(&narrowed, &facts), ["p0", "p1"]);
    assert_eq!(
        rule_of(&narrowed, &facts, "p2"),
        "older_than: not older than 5 d"
    );
    let old_only = Policy {
        older_than: Some(20 * DAY),
        ..Policy::default()
    };
    assert_eq!(goes(&old_only, &facts), ["p0"]);
    let pattern = Policy {
        name_pattern: "p[01]".into(),
        ..Policy::default()
    };
    assert_eq!(goes(&pattern, &facts), ["p0", "p1"]);
    // What the pattern leaves out is not counted either.
    let counted = Policy {
        name_pattern: "p[012]".into(),
        keep_last: Some(1),
        ..Policy::default()
    };
    assert_eq!(goes(&counted, &facts), ["p0", "p1"]);
}

#[test]
fn the_age_that_equals_a_limit_still_stays() {
    let facts = line("2026-03-10T00:00:00Z", &["2026-03-03T00:00:00Z"]);
    let week = Duration::from_secs(7 * 86_400);
    for policy in [
        Policy {
            older_than: Some(week),
            ..Policy::default()
        },
        Policy {
            keep_within: Some(week),
            ..Policy::default()
        },
    ] {
        assert!(goes(&policy, &facts).is_empty());
        let mut later = facts.clone();
        later.now += 1.second();
        assert_eq!(goes(&policy, &later), ["p0"]);
    }
}

#[test]
fn each_branch_is_counted_by_itself() {
    // root - a1 - a2 - a3 (old) and root - b1 - b2 (new).
    let mut facts = quiet();
    facts.now = "2026-03-10T12:00:00Z".parse().unwrap();
    facts.snapshots = vec![
        point("root", None, "2026-01-01T00:00:00Z"),
        point("a1", Some("root"), "2026-01-02T00:00:00Z"),
        point("a2", Some("a1"), "2026-01-03T00:00:00Z"),
        point("a3", Some("a2"), "2026-01-04T00:00:00Z"),
        point("b1", Some("root"), "2026-02-01T00:00:00Z"),
        point("b2", Some("b1"), "2026-02-02T00:00:00Z"),
    ];
    let policy = Policy {
        keep_last: Some(1),
        ..Policy::default()
    };
    assert_eq!(goes(&policy, &facts), ["root", "a1", "a2", "b1"]);
}

#[test]
fn what_is_pinned_stays_with_its_reason() {
    let mut facts = line(
        "2026-03-10T12:00:00Z",
        &[
            "2026-03-01T00:00:00Z",
            "2026-03-02T00:00:00Z",
            "2026-03-03T00:00:00Z",
            "2026-03-04T00:00:00Z",
            "2026-03-05T00:00:00Z",
            "2026-03-06T00:00:00Z",
        ],
    );
    facts.snapshots[0].record.as_mut().unwrap().protected = true;
    facts.snapshots[1].record = None;
    facts.snapshots[2].record.as_mut().unwrap().safety = true;
    facts.snapshots[3].guard = Some("2026-03-11T00:00:00Z".parse().unwrap());
    facts.snapshots[4].health = Health::DataMissing("gone".into());
    facts.snapshots[5].current = true;
    let all = Policy {
        name_pattern: "*".into(),
        ..Policy::default()
    };
    assert!(goes(&all, &facts).is_empty());
    assert_eq!(rule_of(&all, &facts, "p0"), "protected");
    assert!(rule_of(&all, &facts, "p1").starts_with("not made by this agent"));
    assert!(rule_of(&all, &facts, "p2").starts_with("safety snapshot"));
    assert!(rule_of(&all, &facts, "p3").starts_with("guards a change"));
    assert!(rule_of(&all, &facts, "p4").starts_with("its data is not whole"));
    assert!(rule_of(&all, &facts, "p5").starts_with("current"));
    let foreign = Policy {
        include_foreign: true,
        ..all
    };
    assert_eq!(goes(&foreign, &facts), ["p1"]);
}

#[test]
fn a_broken_snapshot_never_counts_as_the_one_that_is_kept() {
    let mut facts = line(
        "2026-03-10T12:00:00Z",
        &["2026-03-01T00:00:00Z", "2026-03-02T00:00:00Z"],
    );
    facts.snapshots[1].health = Health::MergedAway("x".into());
    let policy = Policy {
        keep_last: Some(1),
        ..Policy::default()
    };
    assert!(goes(&policy, &facts).is_empty());
}

#[test]
fn what_cannot_be_deleted_now_stays_with_the_reason_and_the_rest_goes() {
    let mut facts = super::with_chain(super::running(), 4);
    // A second child of s0 that no policy may touch.
    let mut side = snapshot("side", Some("s0"), Kind::External, &path("web1.s0"));
    side.record = None;
    facts.snapshots.push(side);
    let asked = request(Action::Cleanup(Cleanup {
        policy: Policy {
            name_pattern: "s*".into(),
            ..Policy::default()
        },
        ..Cleanup::default()
    }));
    let plan = plan(&asked, &facts).unwrap();
    let verdict = |name: &str| {
        plan.verdicts
            .iter()
            .find(|one| one.name == name)
            .unwrap_or_else(|| panic!("no verdict on {name}"))
    };
    // s0 has two children, s1 is merged under s2; s3 is current.
    assert!(!verdict("s0").removed);
    assert!(verdict("s0").rule.contains("SNAPSHOT_BRANCHES"));
    assert!(verdict("s2").removed);
    assert!(!verdict("s3").removed);
    assert!(!verdict("side").removed);
    assert!(
        plan.warnings
            .iter()
            .any(|warning| warning.code == "SNAPSHOT_STAYS")
    );
}

#[test]
fn malformed_rules_are_refused_at_the_door_by_name() {
    let broken = [
        (
            "cleanup.keep_last",
            Policy {
                keep_last: Some(0),
                ..Policy::default()
            },
        ),
        (
            "cleanup.keep_daily",
            Policy {
                keep_daily: Some(0),
                ..Policy::default()
            },
        ),
        (
            "cleanup.older_than",
            Policy {
                older_than: Some(Duration::ZERO),
                ..Policy::default()
            },
        ),
        (
            "cleanup.name_pattern",
            Policy {
                name_pattern: "a[".into(),
                ..Policy::default()
            },
        ),
        (
            "cleanup.time_zone",
            Policy {
                keep_daily: Some(1),
                time_zone: "Prag".into(),
                ..Policy::default()
            },
        ),
        (
            "cleanup.include_foreign",
            Policy {
                include_foreign: true,
                ..Policy::default()
            },
        ),
    ];
    for (field, policy) in broken {
        let asked = request(Action::Cleanup(Cleanup {
            policy,
            ..Cleanup::default()
        }));
        let fault = plan(&asked, &quiet()).unwrap_err();
        assert_eq!(fault.reason, Reason::BadRequest);
        assert_eq!(fault.violations[0].field, field, "{fault}");
    }
}

prop_compose! {
    /// Policies with at least one rule.
    pub fn policies()(
        last in prop::option::of(1u32..5),
        within in prop::option::of(1u64..40),
        hourly in prop::option::of(1u32..5),
        daily in prop::option::of(1u32..5),
        weekly in prop::option::of(1u32..5),
        monthly in prop::option::of(1u32..5),
        older in prop::option::of(1u64..40),
        pattern in select(vec!["", "s*", "s[01]", "*"]),
        foreign in any::<bool>(),
        zone in select(vec!["", "UTC", "Europe/Prague", "Asia/Kolkata", "Pacific/Chatham"]),
    ) -> Policy {
        let mut policy = Policy {
            keep_last: last,
            keep_within: within.map(|days| DAY * u32::try_from(days).unwrap()),
            keep_hourly: hourly,
            keep_daily: daily,
            keep_weekly: weekly,
            keep_monthly: monthly,
            older_than: older.map(|days| DAY * u32::try_from(days).unwrap()),
            name_pattern: pattern.into(),
            include_foreign: foreign,
            time_zone: zone.into(),
        };
        if !policy.is_set() {
            policy.keep_last = Some(1);
        }
        policy
    }
}

prop_compose! {
    /// A tree of points at random moments, each made after its parent.
    fn trees()(
        parents in vec(any::<prop::sample::Index>(), 0..12),
        gaps in vec(0i64..200_000, 12),
        kinds in vec(0u8..8, 12),
    ) -> Facts {
        let mut facts = quiet();
        let mut moment: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        for (at, parent) in parents.iter().enumerate() {
            moment += gaps[at].seconds();
            let parent = (at > 0).then(|| format!("s{}", parent.index(at)));
            let mut one = point(&format!("s{at}"), parent.as_deref(), "2026-01-01T00:00:00Z");
            one.created = moment;
            match kinds[at] {
                0 => one.record = None,
                1 => one.record.as_mut().unwrap().protected = true,
                2 => one.record.as_mut().unwrap().safety = true,
                3 => one.health = Health::DataMissing("x".into()),
                _ => {}
            }
            one.current = at + 1 == parents.len();
            facts.snapshots.push(one);
        }
        facts.now = moment + 3600.seconds();
        facts
    }
}

proptest! {
    #[test]
    fn a_policy_judges_each_snapshot_once_and_never_lets_go_what_is_pinned(policy in policies(), facts in trees()) {
        let judged = judge(&policy, &facts).unwrap();
        prop_assert_eq!(judged.len(), facts.snapshots.len());
        for one in judged {
            prop_assert!(!one.rule.is_empty());
            if one.goes {
                let record = one.snapshot.record.as_ref();
                prop_assert!(record.is_some() || policy.include_foreign);
                prop_assert!(record.is_none_or(|it| !it.protected && !it.safety));
                prop_assert!(!one.snapshot.current && one.snapshot.guard.is_none());
                prop_assert_eq!(&one.snapshot.health, &Health::Whole);
            }
        }
    }

    #[test]
    fn a_further_keep_rule_never_lets_go_of_more(policy in policies(), facts in trees(), count in 1u32..5) {
        prop_assume!(policy.keep_last.is_some() || policy.keep_within.is_some() || policy.counts_periods());
        let before: BTreeSet<String> = goes(&policy, &facts).into_iter().collect();
        let more = Policy { keep_daily: Some(policy.keep_daily.unwrap_or(0) + count), ..policy };
        let after: BTreeSet<String> = goes(&more, &facts).into_iter().collect();
        prop_assert!(after.is_subset(&before));
    }

    #[test]
    fn with_a_counting_rule_the_newest_restore_point_of_each_branch_stays(policy in policies(), facts in trees()) {
        prop_assume!(policy.keep_last.is_some() || policy.counts_periods());
        let gone = goes(&policy, &facts);
        for leaf in facts.snapshots.iter().filter(|one| tree::children(&facts, &one.name).is_empty()) {
            let mut next = Some(leaf);
            while let Some(one) = next {
                let is_counted = (one.record.is_some() || policy.include_foreign)
                    && one.record.as_ref().is_none_or(|it| !it.safety)
                    && one.health == Health::Whole
                    && (policy.name_pattern != "s[01]" || ["s0", "s1"].contains(&&*one.name));
                if is_counted {
                    prop_assert!(!gone.contains(&one.name), "{} went", one.name);
                    break;
                }
                next = one.parent.as_deref().and_then(|name| facts.snapshot(name));
            }
        }
    }

    #[test]
    fn what_a_policy_left_it_leaves_again(policy in policies(), facts in trees()) {
        let gone = goes(&policy, &facts);
        let mut after = facts.clone();
        // Children of what went hang on its parent.
        for name in &gone {
            let parent = after.snapshot(name).unwrap().parent.clone();
            after.snapshots.retain(|one| one.name != *name);
            for child in &mut after.snapshots {
                if child.parent.as_ref() == Some(name) {
                    child.parent.clone_from(&parent);
                }
            }
        }
        prop_assert!(goes(&policy, &after).is_empty());
    }
}
