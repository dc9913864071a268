//! cleanup: one snapshot or a policy, left-over volumes and orphaned files.
//!
//! Invariant: nothing goes that any chain of any VM refers to; what stays is
//! returned with the rule that kept it.

use crate::planning::{
    actions::{checks, delete},
    facts::{Facts, Orphan, Snapshot, Volume},
    files,
    outcome::{FILE, Verdict},
    plan::Draft,
    reason::Fault,
    request::{Children, Cleanup, Orphans, Request},
    retention,
    step::Step,
    tree,
};

/// Left-over volumes that are looked for unless others are named.
const DEFAULT_LEFTOVER: &str = "{vm_name}-old.qcow2";

/// Drafts the plan.
///
/// # Errors
/// The refusal.
pub fn draft(request: &Request, cleanup: &Cleanup, facts: &Facts) -> Result<Draft, Fault> {
    let mut draft = Draft {
        snapshot: cleanup.name.clone(),
        ..Draft::default()
    };
    let state = checks::start_first(request, facts, &mut draft)?;
    let mut seen = facts.clone();
    seen.vm.state = state;
    let facts = &seen;
    if !cleanup.name.is_empty() {
        snapshots(cleanup, facts, &mut draft)?;
    }
    if cleanup.policy.is_set() {
        policy(cleanup, facts, &mut draft)?;
    } else {
        leftovers(request, cleanup, facts, &mut draft);
    }
    orphans(cleanup, facts, &mut draft);
    Ok(draft)
}

fn snapshots(cleanup: &Cleanup, facts: &Facts, draft: &mut Draft) -> Result<(), Fault> {
    let Some(snapshot) = facts.snapshot(&cleanup.name) else {
        let fault = checks::not_found(facts, &cleanup.name);
        draft.warn(
            "SNAPSHOT_NOT_FOUND",
            format!("{}; nothing is deleted", fault.message),
            "",
        );
        return Ok(());
    };
    checks::changeable(facts)?;
    let mut list: Vec<&Snapshot> = match cleanup.children {
        Children::Keep => Vec::new(),
        Children::Delete | Children::Only => tree::descendants_leaf_first(facts, &cleanup.name),
    };
    if cleanup.children != Children::Only {
        list.push(snapshot);
    }
    delete::in_order(&list, "named", cleanup.bandwidth, facts, draft)
}

/// Lets go what the policy does not keep, as far as libvirt can delete it now.
fn policy(cleanup: &Cleanup, facts: &Facts, draft: &mut Draft) -> Result<(), Fault> {
    let policy = &cleanup.policy;
    let judged = retention::judge(policy, facts)?;
    if policy.counts_periods() {
        let zone = policy.zone(&facts.host.time_zone)?;
        draft.decide(
            "time zone",
            zone.iana_name().unwrap_or("UTC"),
            if policy.time_zone.is_empty() {
                "hours, days, weeks and months begin as on this host"
            } else {
                "asked for"
            },
        );
    }
    let (go, stay): (Vec<_>, Vec<_>) = judged.into_iter().partition(|one| one.goes);
    if !go.is_empty() {
        checks::changeable(facts)?;
    }
    for one in stay {
        let size = one.snapshot.size;
        draft.verdicts.push(verdict(
            &one.snapshot.name,
            "snapshot",
            false,
            &one.rule,
            size,
        ));
    }
    let go: Vec<(&Snapshot, String)> = go.into_iter().map(|one| (one.snapshot, one.rule)).collect();
    for held in delete::as_many_as_possible(&go, cleanup.bandwidth, facts, draft) {
        let (snapshot, because) = (held.snapshot, held.because);
        draft.warn(
            "SNAPSHOT_STAYS",
            format!(
                "the policy would remove snapshot '{}', but it stays for now ({}): {}",
                snapshot.name, because.reason, because.message
            ),
            "a later run of the same policy tries again",
        );
        let rule = format!(
            "cannot be deleted now ({}): {}",
            because.reason, because.message
        );
        draft.verdicts.push(verdict(
            &snapshot.name,
            "snapshot",
            false,
            &rule,
            snapshot.size,
        ));
    }
    Ok(())
}

fn leftovers(request: &Request, cleanup: &Cleanup, facts: &Facts, draft: &mut Draft) {
    let names: Vec<String> = cleanup
        .leftovers
        .clone()
        .unwrap_or_else(|| vec![DEFAULT_LEFTOVER.to_owned()])
        .iter()
        .map(|name| name.replace("{vm_name}", &facts.vm.name))
        .collect();
    for name in names {
        let Some(volume) = facts
            .storage
            .volumes
            .iter()
            .find(|volume| volume.name == name)
        else {
            continue;
        };
        match kept_because(volume, facts) {
            Some(rule) => {
                draft.warn(
                    "LEFTOVER_KEPT",
                    format!("volume '{name}' of pool '{}' stays: {rule}", request.pool),
                    "",
                );
                draft
                    .verdicts
                    .push(verdict(&name, "volume", false, &rule, volume.allocation));
            }
            None => {
                draft.push(Step::DeleteVolume {
                    pool: request.pool.clone(),
                    name: name.clone(),
                    path: volume.path.clone(),
                    size: volume.allocation,
                });
                draft.change(format!("volume.{name}"), Some(volume.path.clone()), None);
                draft.verdicts.push(verdict(
                    &name,
                    "volume",
                    true,
                    "left over, and no chain refers to it",
                    volume.allocation,
                ));
            }
        }
    }
}

/// Why a volume must stay, if so.
fn kept_because(volume: &Volume, facts: &Facts) -> Option<String> {
    let Some(users) = &facts.users else {
        return Some("who uses it could not be found out".to_owned());
    };
    let users = users
        .get(&volume.path)
        .map(Vec::as_slice)
        .unwrap_or_default();
    if !users.is_empty() {
        let names: Vec<&str> = users.iter().map(|user| user.vm.as_str()).collect();
        return Some(format!("it is in the chain of {}", names.join(", ")));
    }
    checks::not_shared(facts, [volume.path.as_str()])
        .err()
        .map(|fault| fault.message)
}

fn orphans(cleanup: &Cleanup, facts: &Facts, draft: &mut Draft) {
    let Some(found) = &facts.storage.orphans else {
        return;
    };
    let mut orphans = found.clone();
    orphans.extend(left_by(&draft.steps, facts));
    for orphan in orphans {
        match cleanup.orphans {
            Orphans::Ignore => {}
            Orphans::Delete if orphan.ours => {
                // Another host's VM may stand on what lies on a network file system.
                if let Err(fault) = checks::not_shared(facts, [orphan.path.as_str()]) {
                    draft.verdicts.push(verdict(
                        &orphan.path,
                        FILE,
                        false,
                        &fault.message,
                        orphan.size,
                    ));
                    continue;
                }
                draft.push(Step::DeleteFile {
                    path: orphan.path.clone(),
                    size: orphan.size,
                });
                draft.change(format!("file.{}", orphan.path), Some("orphan".into()), None);
                draft.verdicts.push(verdict(
                    &orphan.path,
                    FILE,
                    true,
                    "made by this agent, and nothing refers to it",
                    orphan.size,
                ));
            }
            Orphans::Delete | Orphans::Report => {
                let rule = if orphan.ours {
                    "only reported"
                } else {
                    "not made by this agent"
                };
                draft
                    .verdicts
                    .push(verdict(&orphan.path, FILE, false, rule, orphan.size));
            }
        }
    }
}

fn verdict(name: &str, what: &str, removed: bool, rule: &str, size: u64) -> Verdict {
    Verdict {
        name: name.to_owned(),
        what: what.to_owned(),
        removed,
        rule: rule.to_owned(),
        size,
    }
}

/// Overlays that nobody refers to any more once libvirt's mere entries of their
/// snapshots are gone.
fn left_by(steps: &[Step], facts: &Facts) -> Vec<Orphan> {
    let mut gone: Vec<&str> = Vec::new();
    let mut forgotten: Vec<&Snapshot> = Vec::new();
    for step in steps {
        let Step::DeleteSnapshot {
            name,
            metadata_only,
            ..
        } = step
        else {
            continue;
        };
        gone.push(name);
        forgotten.extend(facts.snapshot(name).filter(|_| *metadata_only));
    }
    let mut left: Vec<Orphan> = Vec::new();
    for overlay in forgotten.into_iter().flat_map(delete::overlays_of) {
        let in_use = facts
            .users
            .iter()
            .filter_map(|users| users.get(overlay))
            .flatten()
            .any(|user| {
                let by_one_gone = user
                    .snapshot
                    .as_deref()
                    .is_some_and(|snapshot| gone.contains(&snapshot));
                user.vm != facts.vm.name || !by_one_gone
            });
        if !in_use
            && files::exists(facts, overlay) == Some(true)
            && left.iter().all(|orphan| orphan.path != *overlay)
        {
            left.push(Orphan {
                path: overlay.clone(),
                size: 0,
                ours: facts.ours.contains(overlay),
            });
        }
    }
    left
}
