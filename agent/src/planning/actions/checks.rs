//! Checks that several actions share.

use std::time::Duration;

use crate::planning::{
    facts::{Facts, Health, Snapshot, VmState, folder_of},
    files,
    health::WITHOUT_MEMORY,
    names,
    plan::Draft,
    reason::{Fault, Reason},
    request::{Request, WaitFor},
    step::Step,
};

/// Refuses what no changing action can be done on.
///
/// # Errors
/// Managed save, open block job, or a state in which nothing can be done.
pub fn changeable(facts: &Facts) -> Result<(), Fault> {
    no_block_job(facts)?;
    no_managed_save(facts)?;
    settled(facts)?;
    not_half_loaded(facts)?;
    definition_agrees(facts)
}

/// Refuses while the definition names another image than the one in which the
/// VM's present data lies: it would be lost from sight, or a restore point would
/// be written into.
///
/// # Errors
/// [`Reason::DefinitionDiffers`].
pub fn definition_agrees(facts: &Facts) -> Result<(), Fault> {
    let vm = &facts.vm.name;
    if let Some((target, defined, used)) = facts.vm.differing.first() {
        return Err(Fault::new(
            Reason::DefinitionDiffers,
            format!(
                "disk {target} of VM '{vm}' is defined as '{defined}' but runs on '{used}': its \
                 next start would go back to older data; define it with the image in use first"
            ),
        )
        .with("disk", target)
        .with("defined", defined)
        .with("in_use", used));
    }
    if let Some((disk, snapshot)) = facts.frozen_at_next_start().next() {
        let path = disk.path.as_deref().unwrap_or_default();
        return Err(Fault::new(
            Reason::DefinitionDiffers,
            format!(
                "disk {} of VM '{vm}' is defined as '{path}', in which the data of snapshot '{}' \
                 lies: its next start would write into that restore point, and leave out what was \
                 written since; define it with the image in use first",
                disk.target, snapshot.name
            ),
        )
        .with("disk", &disk.target)
        .with("defined", path)
        .with("snapshot", &snapshot.name));
    }
    let Some((disk, snapshot)) = facts.frozen_images().next() else {
        return Ok(());
    };
    let newest = facts
        .current()
        .and_then(|current| current.present_overlay(&disk.target));
    let advice = match newest {
        Some(newest) => format!("define it with '{newest}', its newest overlay, again"),
        None => "define it with its newest overlay again".to_owned(),
    };
    let fault = Fault::new(
        Reason::DefinitionDiffers,
        format!(
            "disk {} of VM '{vm}', which is off, is defined as '{}', in which the data of snapshot \
             '{name}' lies: a start would write into that restore point and leave out what was \
             written since; {advice}, or, if its overlays were merged on purpose, take the \
             snapshot off libvirt's list with 'virsh snapshot-delete {vm} {name} --metadata'",
            disk.target,
            disk.path,
            name = snapshot.name,
        ),
    )
    .with("disk", &disk.target)
    .with("defined", &disk.path)
    .with("snapshot", &snapshot.name);
    Err(match newest {
        Some(newest) => fault.with("newest", newest),
        None => fault,
    })
}

/// Refuses while memory of the VM is being loaded, or was and that was given up:
/// it stands on the images of a restore point then, and libvirt 11.3 was seen to
/// crash when it is told to revert.
///
/// # Errors
/// [`Reason::DomainState`].
pub fn not_half_loaded(facts: &Facts) -> Result<(), Fault> {
    if facts.vm.state == VmState::Paused && facts.vm.reason == "migrating" {
        return Err(Fault::new(
            Reason::DomainState,
            format!(
                "VM '{0}' is paused ({1}): its memory is being loaded or carried away, or an \
                 attempt at that was given up, and then it must not be resumed; when nothing goes \
                 on any more, switch it off with 'virsh destroy {0}'",
                facts.vm.name, facts.vm.reason
            ),
        )
        .with("state", facts.vm.state.name()));
    }
    Ok(())
}

/// Refuses while a block job is open.
///
/// # Errors
/// [`Reason::BlockJobActive`].
pub fn no_block_job(facts: &Facts) -> Result<(), Fault> {
    let Some(job) = facts.vm.block_jobs.first() else {
        return Ok(());
    };
    let disk = facts.vm.disks.iter().find(|disk| disk.target == job.disk);
    let into = disk.and_then(|disk| disk.merging_into.as_deref());
    let help = match into {
        // Given up, it leaves the chain as it was, and newer data in the image.
        Some(into) => format!(
            "it writes into '{into}', so the snapshots that stand on that image are spoilt already; \
             finish it with 'virsh blockjob {} {} --pivot' when it is ready",
            facts.vm.name, job.disk
        ),
        None => format!(
            "wait for it, or abort it with 'virsh blockjob {} {} --abort'",
            facts.vm.name, job.disk
        ),
    };
    let fault = Fault::new(
        Reason::BlockJobActive,
        format!(
            "a block job ({}) is open on disk {} of VM '{}' ({} of {} bytes done); {help}",
            job.kind, job.disk, facts.vm.name, job.done, job.total
        ),
    )
    .with("disk", &job.disk)
    .with("job", &job.kind);
    Err(match into {
        Some(into) => fault.with("path", into),
        None => fault,
    })
}

/// Refuses while libvirt keeps memory that belongs to the present disks.
///
/// # Errors
/// [`Reason::ManagedSavePresent`].
pub fn no_managed_save(facts: &Facts) -> Result<(), Fault> {
    if facts.vm.managed_save {
        return Err(Fault::new(
            Reason::ManagedSavePresent,
            format!(
                "VM '{0}' has a managed save, memory that belongs to its present disks; start it \
                 once, or drop the memory with 'virsh managedsave-remove {0}'",
                facts.vm.name
            ),
        ));
    }
    Ok(())
}

fn settled(facts: &Facts) -> Result<(), Fault> {
    match facts.vm.state {
        VmState::Running | VmState::Paused | VmState::Stopped => Ok(()),
        state => Err(Fault::new(
            Reason::DomainState,
            format!(
                "VM '{}' is {} ({}); it has to be running, paused or stopped",
                facts.vm.name,
                state.name(),
                facts.vm.reason
            ),
        )
        .with("state", state.name())),
    }
}

/// Finds a snapshot, or says which there are and which was probably meant.
///
/// # Errors
/// [`Reason::SnapshotNotFound`].
pub fn find<'a>(facts: &'a Facts, name: &str) -> Result<&'a Snapshot, Fault> {
    facts.snapshot(name).ok_or_else(|| not_found(facts, name))
}

/// The fault for a name that is not there.
#[must_use]
pub fn not_found(facts: &Facts, name: &str) -> Fault {
    let valid: Vec<&str> = facts
        .snapshots
        .iter()
        .map(|snapshot| snapshot.name.as_str())
        .collect();
    let nearest = names::nearest(name, valid.iter().copied());
    let mut message = format!("VM '{}' has no snapshot '{name}'", facts.vm.name);
    if valid.is_empty() {
        message.push_str("; it has none at all");
    } else {
        message.push_str(&format!("; it has {}", valid.join(", ")));
    }
    if let Some(nearest) = nearest {
        message.push_str(&format!("; did you mean '{nearest}'?"));
    }
    let fault = Fault::new(Reason::SnapshotNotFound, message)
        .with("vm", &facts.vm.name)
        .with("snapshot", name)
        .with("valid_names", valid.join(","));
    match nearest {
        Some(nearest) => fault.with("nearest", nearest),
        None => fault,
    }
}

/// Refuses a snapshot that is older than allowed.
///
/// # Errors
/// [`Reason::SnapshotTooOld`].
pub fn young_enough(
    facts: &Facts,
    snapshot: &Snapshot,
    max_age: Option<Duration>,
) -> Result<(), Fault> {
    let age = age(facts, snapshot);
    match max_age {
        Some(max) if age > max => Err(Fault::new(
            Reason::SnapshotTooOld,
            format!(
                "snapshot '{}' is {} old and max_age is {}",
                snapshot.name,
                for_people(age),
                for_people(max)
            ),
        )
        .with("snapshot", &snapshot.name)
        .with("age_seconds", age.as_secs())
        .with("max_age_seconds", max.as_secs())),
        _ => Ok(()),
    }
}

/// Age of a snapshot; zero when the clock went back.
#[must_use]
pub fn age(facts: &Facts, snapshot: &Snapshot) -> Duration {
    Duration::try_from(facts.now.duration_since(snapshot.created)).unwrap_or_default()
}

/// A duration for people: the two largest units.
#[must_use]
pub fn for_people(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let units = [("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)];
    let first = units.iter().position(|(_, size)| seconds >= *size);
    let Some(first) = first else {
        return format!("{} ms", duration.as_millis());
    };
    let (unit, size) = units[first];
    let mut text = format!("{} {unit}", seconds / size);
    if let Some((next, next_size)) = units.get(first + 1) {
        let rest = seconds % size / next_size;
        if rest > 0 {
            text.push_str(&format!(" {rest} {next}"));
        }
    }
    text
}

/// Refuses a snapshot whose data cannot be trusted.
///
/// # Errors
/// [`Reason::SnapshotNotWhole`].
pub fn whole(snapshot: &Snapshot) -> Result<(), Fault> {
    let (state, detail, help) = match &snapshot.health {
        Health::Whole => return Ok(()),
        Health::DataMissing(detail) => (
            "data missing",
            detail.as_str(),
            "bring the file back, or remove the snapshot with cleanup",
        ),
        Health::MemoryMissing(detail) => ("data missing", detail.as_str(), WITHOUT_MEMORY),
        Health::Torn(detail) => (
            "torn",
            detail.as_str(),
            "its deletion has to be finished: cleanup it by name",
        ),
        Health::MergedAway(detail) => (
            "merged away",
            detail.as_str(),
            "its data is gone; remove what is left of it with cleanup",
        ),
        Health::MetadataOnly => (
            "metadata only",
            "no data was kept for any disk",
            "remove it with cleanup",
        ),
    };
    Err(Fault::new(
        Reason::SnapshotNotWhole,
        format!(
            "snapshot '{}' cannot be brought back: {detail}; {help}",
            snapshot.name
        ),
    )
    .with("snapshot", &snapshot.name)
    .with("health", state))
}

/// Drafts the start of a VM that is off, if the request allows it, and returns
/// the state that the next step meets.
///
/// # Errors
/// When the VM would start on data that it must not touch.
pub fn start_first(request: &Request, facts: &Facts, draft: &mut Draft) -> Result<VmState, Fault> {
    if facts.vm.state != VmState::Stopped || !request.start_if_stopped {
        return Ok(facts.vm.state);
    }
    no_managed_save(facts)?;
    definition_agrees(facts)?;
    draft.push(Step::Start { paused: false });
    draft.decide(
        "start",
        "started first",
        "the VM is off and start_if_stopped is set",
    );
    draft.change("state", Some("stopped".into()), Some("running".into()));
    Ok(VmState::Running)
}

/// Drafts the wait at the end for a VM that ends in `state`.
pub fn wait_for(what: WaitFor, timeout: Duration, state: VmState, draft: &mut Draft) {
    match (what, state) {
        (WaitFor::None, _) => {}
        (_, VmState::Running) => {
            draft.push(Step::WaitFor {
                what,
                timeout_ms: millis(timeout),
                required: false,
            });
        }
        _ => draft.warn(
            "NOT_WAITED",
            format!(
                "the VM ends {}, so there is no guest to wait for",
                state.name()
            ),
            "let the VM run",
        ),
    }
}

/// Whole milliseconds.
#[must_use]
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Why libvirt could not put an overlay beside a file that the guest only
/// reads, as a revert does.
#[must_use]
pub fn no_overlay_on(facts: &Facts, path: &str) -> Option<&'static str> {
    no_new_file_in(facts, folder_of(path)).or_else(|| {
        if files::exists(facts, path) != Some(true) {
            Some("it is not there")
        } else if names::overlay_stem(path).contains(',') {
            Some("its path has a comma, which libvirt writes twice there")
        } else {
            None
        }
    })
}

/// Why libvirt could make no file in a folder.
#[must_use]
pub fn no_new_file_in(facts: &Facts, folder: &str) -> Option<&'static str> {
    match facts.folders.get(folder) {
        None => Some("its folder cannot be read"),
        Some(folder) if !folder.writable => Some("its folder is read-only"),
        Some(folder) if folder.denied => Some("no file may be made in its folder"),
        Some(_) => None,
    }
}

/// Two of several disks, by target and path, on which a revert would put
/// overlays of the same name: libvirt replaces everything after the last dot.
#[must_use]
pub fn same_overlay<'a>(
    disks: impl Iterator<Item = (&'a str, &'a str)>,
) -> Option<[(&'a str, &'a str); 2]> {
    let disks: Vec<(&str, &str)> = disks.collect();
    disks.iter().enumerate().find_map(|(at, one)| {
        let stem = names::overlay_stem(one.1);
        let mut after = disks[at + 1..].iter();
        let other = after.find(|other| names::overlay_stem(other.1) == stem)?;
        Some([*one, *other])
    })
}

/// Refuses to write or delete files that other VMs refer to, here or unseen on
/// another host.
///
/// # Errors
/// [`Reason::FileShared`], naming the first file and all its users;
/// [`Reason::StorageShared`].
pub fn not_shared<'a>(
    facts: &Facts,
    paths: impl IntoIterator<Item = &'a str>,
) -> Result<(), Fault> {
    for path in paths {
        not_used(facts, [path])?;
        if !facts.host.storage_exclusive
            && facts
                .folders
                .get(folder_of(path))
                .is_some_and(|folder| folder.network)
        {
            return Err(Fault::new(
                Reason::StorageShared,
                format!(
                    "'{path}' lies on a network file system, where other hosts may use it unseen; \
                     set storage.exclusive in the agent's configuration if none does"
                ),
            )
            .with("path", path));
        }
    }
    Ok(())
}

/// Refuses to write or delete files that other VMs of this host refer to.
///
/// # Errors
/// [`Reason::FileShared`], naming the first file and all its users.
pub fn not_used<'a>(facts: &Facts, paths: impl IntoIterator<Item = &'a str>) -> Result<(), Fault> {
    for path in paths {
        let users = facts.other_users(path);
        if users.is_empty() {
            continue;
        }
        let names: Vec<String> = users
            .iter()
            .map(|user| match &user.snapshot {
                Some(snapshot) => format!("{} (snapshot {snapshot})", user.vm),
                None => user.vm.clone(),
            })
            .collect();
        return Err(Fault::new(
            Reason::FileShared,
            format!(
                "'{path}' would be written or deleted, but it is in the chain of {}; nothing is \
                 done to a file that others use",
                names.join(", ")
            ),
        )
        .with("path", path)
        .with("users", names.join(",")));
    }
    Ok(())
}
