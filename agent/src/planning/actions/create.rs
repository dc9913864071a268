//! create: a snapshot that is as consistent as it can be, and can be reverted
//! to and deleted on this host.
//!
//! Order: what exists under that name, the kind, the consistency, the files and
//! their space, the steps.

use std::time::Duration;

use crate::planning::{
    actions::{checks, delete, kind},
    facts::{Consistency, Disk, Facts, Firmware, Kind, Memory, Source, VmState},
    files::{self, Files, OVERLAY_BYTES},
    plan::Draft,
    reason::{Fault, Reason},
    request::{Create, IfExists, Request, WaitFor},
    step::{NewDisk, NewMemory, NewSnapshot, Step, ToRecord},
};

/// What a guest's memory file holds beside its memory: device state.
const DEVICE_STATE_BYTES: u64 = 8 * 1024 * 1024;
/// Milliseconds for which an internal snapshot stops the guest for each GiB of
/// its memory; 2.7 to 3.2 s were measured at 1 GiB.
pub const INTERNAL_STOP_MS_PER_GIB: u64 = 3_200;
/// Milliseconds for which saving memory into a file stops the guest, whatever
/// its size, when the file is flushed while it runs and when it is not.
const EXTERNAL_STOP_MS: u64 = 450;
/// How long a guest may take to boot before it has to be frozen.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);

/// Drafts the plan.
///
/// # Errors
/// The refusal.
pub fn draft(request: &Request, create: &Create, facts: &Facts) -> Result<Draft, Fault> {
    let mut draft = Draft {
        generated_name: create.name.is_empty(),
        snapshot: if create.name.is_empty() {
            free_name(facts, "vmsnap")
        } else {
            create.name.clone()
        },
        ..Draft::default()
    };
    let mut create = create.clone();
    create.name.clone_from(&draft.snapshot);

    if facts.snapshot(&create.name).is_some() {
        match create.if_exists {
            IfExists::Ok => return existing(&create, facts, draft),
            IfExists::Fail => {
                return Err(Fault::new(
                    Reason::SnapshotExists,
                    format!(
                        "VM '{}' has a snapshot '{}' already and if_exists is fail",
                        facts.vm.name, create.name
                    ),
                )
                .with("snapshot", &create.name));
            }
            IfExists::Replace => {
                checks::changeable(facts)?;
                delete::named(&create.name, "replaced", None, facts, &mut draft)?;
                draft.warn(
                    "POINT_OF_NO_RETURN",
                    format!(
                        "snapshot '{}' is deleted before the new one is made: there is no way \
                         back to it",
                        create.name
                    ),
                    "",
                );
            }
        }
    }
    checks::changeable(facts)?;
    let state = checks::start_first(request, facts, &mut draft)?;
    let started = state != facts.vm.state;
    snapshot(&create, state, started, false, facts, &mut draft)?;
    if let Some(within) = create.revert_unless_confirmed {
        let created_by = draft
            .steps
            .iter()
            .rposition(|step| matches!(step, Step::CreateSnapshot(_)))
            .unwrap_or_default();
        draft.push(Step::ArmGuard {
            snapshot: create.name.clone(),
            within_ms: checks::millis(within),
            created_by,
        });
        draft.change(
            format!("guard.{}", create.name),
            None,
            Some(format!("{} to confirm", checks::for_people(within))),
        );
    }
    checks::wait_for(create.wait_for, create.wait_timeout, state, &mut draft);
    Ok(draft)
}

/// A name made from the time that no snapshot of this VM has.
#[must_use]
pub fn free_name(facts: &Facts, prefix: &str) -> String {
    let base = format!(
        "{prefix}-{}",
        // A timestamp formats in UTC.
        facts.now.strftime("%Y%m%dT%H%M%SZ")
    );
    let mut name = base.clone();
    let mut next = 2;
    while facts.snapshot(&name).is_some() {
        name = format!("{base}-{next}");
        next += 1;
    }
    name
}

/// The name is taken and that is fine, if it is what is asked for.
fn existing(create: &Create, facts: &Facts, mut draft: Draft) -> Result<Draft, Fault> {
    let found = checks::find(facts, &create.name)?;
    checks::whole(found)?;
    checks::young_enough(facts, found, create.max_age)?;
    let conflict = |what: String| {
        Err(Fault::new(
            Reason::SnapshotConflict,
            format!(
                "VM '{}' has a snapshot '{}' already, but {what}; choose another name, or \
                 if_exists replace",
                facts.vm.name, create.name
            ),
        )
        .with("snapshot", &create.name))
    };
    if let Some(kind) = create.kind
        && kind != found.kind
    {
        return conflict(format!(
            "it is {} and {} is asked for",
            found.kind.name(),
            kind.name()
        ));
    }
    if create.memory && found.memory == Memory::None {
        return conflict("it holds no memory and memory is asked for".into());
    }
    // Of a foreign one that holds memory or was made of a stopped VM, that is known
    // to be at least as good as anything; of others nothing is.
    let known = match &found.record {
        Some(record) => Some(record.consistency),
        None if found.memory != Memory::None => Some(Consistency::Memory),
        None if found.state == VmState::Stopped => Some(Consistency::Stopped),
        None => None,
    };
    match (create.consistency, known) {
        (Some(asked), Some(known)) if rank(known) > rank(asked) => {
            return conflict(format!(
                "its consistency is {} and {} is asked for",
                known.name(),
                asked.name()
            ));
        }
        (Some(asked), None) if asked != Consistency::Crash => {
            return conflict(format!(
                "this agent did not make it, so that its consistency is not known, and {} is asked \
                 for",
                asked.name()
            ));
        }
        _ => {}
    }
    let record = found.record.as_ref();
    if create.exclude_disks.is_empty() && record.is_some_and(|record| record.not_revertible) {
        return conflict("it leaves disks out, so that it cannot be reverted to".into());
    }
    if create.protected && !record.is_some_and(|record| record.protected) {
        return conflict("it is not protected and protected is asked for".into());
    }
    if create.revert_unless_confirmed.is_some()
        && facts
            .guard
            .as_ref()
            .is_none_or(|guard| guard.snapshot != found.name)
    {
        draft.warn(
            "GUARD_NOT_ARMED",
            format!(
                "snapshot '{}' exists already, so nothing is guarded: what happened since it was \
                 made is not known",
                found.name
            ),
            "choose another name, or if_exists replace",
        );
    }
    draft.warn(
        "SNAPSHOT_EXISTS",
        format!(
            "snapshot '{}' exists already; it is {} old and was left as it is",
            found.name,
            checks::for_people(checks::age(facts, found))
        ),
        "use max_age to refuse an old one, or if_exists replace to make it anew",
    );
    draft.consistency = found.record.as_ref().map(|record| record.consistency);
    Ok(draft)
}

/// The smaller, the more consistent.
fn rank(consistency: Consistency) -> u8 {
    match consistency {
        Consistency::Memory | Consistency::Stopped => 0,
        Consistency::Filesystem => 1,
        Consistency::Suspend => 2,
        Consistency::Crash => 3,
    }
}

/// Drafts the steps that make one snapshot of a VM in `state`; `started` says
/// that an earlier step of the same plan starts it.
///
/// # Errors
/// The refusal.
pub fn snapshot(
    create: &Create,
    state: VmState,
    started: bool,
    safety: bool,
    facts: &Facts,
    draft: &mut Draft,
) -> Result<(), Fault> {
    for target in &create.exclude_disks {
        if !facts.vm.disks.iter().any(|disk| disk.target == *target) {
            return Err(unknown_disk(facts, "exclude_disks", target));
        }
    }
    let kind = kind::choose(create.kind, state, &create.exclude_disks, facts, draft)?;
    if kind == Kind::Internal {
        kind::internal_name(&create.name, facts)?;
    }
    let way = consistency(create, kind, state, started, facts, draft)?;
    if kind == Kind::External {
        media_covered(create, facts)?;
    }

    let mut files = Files::new(facts);
    let mut disks = Vec::new();
    let mut anchor = None;
    for disk in &facts.vm.disks {
        let excluded = create.exclude_disks.contains(&disk.target);
        let subject = format!("{} {}", drive_or_disk(disk), disk.target);
        let mode = if let Some(why) = left_out(disk, excluded, kind) {
            draft.decide(subject, "left out", why);
            NewDisk::Leave
        } else if kind == Kind::Internal {
            if anchor.is_none() {
                anchor = Some(disk.path.clone());
            }
            draft.decide(
                subject,
                format!("inside '{}'", disk.path),
                "it is writable and qcow2",
            );
            NewDisk::Internal
        } else {
            if anchor.is_none() {
                anchor = Some(disk.path.clone());
            }
            let path = files.beside(
                &disk.path,
                &disk.target,
                &create.name,
                "qcow2",
                OVERLAY_BYTES,
            )?;
            draft.decide(
                subject,
                format!("overlay '{path}'"),
                "it is writable, and the name is free",
            );
            draft.change(
                format!("disk.{}", disk.target),
                Some(disk.path.clone()),
                Some(path.clone()),
            );
            NewDisk::Overlay(path)
        };
        disks.push((disk.target.clone(), mode));
    }
    let Some(anchor) = anchor else {
        return Err(Fault::new(
            Reason::DiskUnsupported,
            format!(
                "VM '{}' has no writable disk that a snapshot could cover",
                facts.vm.name
            ),
        ));
    };
    let memory = match (kind, way.memory) {
        (_, false) => NewMemory::None,
        (Kind::Internal, true) => {
            files.need(
                crate::planning::facts::folder_of(&anchor),
                facts.vm.memory.saturating_add(DEVICE_STATE_BYTES),
            );
            NewMemory::Internal
        }
        (_, true) => {
            let path = files.beside(
                &anchor,
                "",
                &create.name,
                "mem",
                facts.vm.memory.saturating_add(DEVICE_STATE_BYTES),
            )?;
            draft.decide("memory", format!("file '{path}'"), "the name is free");
            NewMemory::File(path)
        }
    };
    let nvram = variables(&create.name, kind, facts, &mut files, draft)?;
    files.check_space()?;
    if let Some(max_stop) = create.max_stop {
        let stop = Duration::from_millis(way.stop_ms(facts));
        if stop > max_stop {
            return Err(Fault::new(
                Reason::StopTooLong,
                format!(
                    "the guest would stand still for about {} ms and max_stop is {} ms; without \
                     memory, or with kind external, it is less",
                    stop.as_millis(),
                    max_stop.as_millis()
                ),
            )
            .with("estimated_ms", stop.as_millis())
            .with("max_stop_ms", max_stop.as_millis()));
        }
    }
    if way.memory && facts.vm.state == VmState::Running && !started {
        draft.decide(
            "stop",
            format!("about {} ms", way.stop_ms(facts)),
            "measured on guests of this size",
        );
    }

    way.hold(create, draft);
    if let Some((from, to)) = &nvram {
        draft.push(Step::CopyNvram {
            from: from.clone(),
            to: to.clone(),
        });
    }
    let memory_file = match &memory {
        NewMemory::File(file) => Some(file.clone()),
        _ => None,
    };
    draft.push(Step::CreateSnapshot(Box::new(NewSnapshot {
        name: create.name.clone(),
        description: create.description.clone(),
        memory,
        disks,
        stops_guest: way.memory && state == VmState::Running,
    })));
    way.release(draft);
    draft.push(Step::RecordSnapshot(Box::new(ToRecord {
        name: create.name.clone(),
        consistency: way.achieves,
        protected: create.protected,
        safety,
        not_revertible: !create.exclude_disks.is_empty(),
        memory_file,
        nvram_copy: nvram.map(|(_, to)| to),
    })));
    if !safety {
        draft.consistency = Some(way.achieves);
    }
    draft.change(
        format!("snapshot.{}", create.name),
        None,
        Some(kind.name().into()),
    );
    // Where memory cannot be saved at all, a known issue says so.
    let savable = facts.vm.not_migratable.is_empty();
    if !way.memory && state != VmState::Stopped && !safety && savable {
        draft.warn(
            "MEMORY_NOT_SAVED",
            "memory is not part of the snapshot: a revert starts the guest from its disks",
            "use memory: true to go on where the guest was",
        );
    }
    Ok(())
}

/// Why a snapshot leaves a disk or drive out, if it does.
fn left_out(disk: &Disk, excluded: bool, kind: Kind) -> Option<&'static str> {
    if excluded {
        Some("exclude_disks names it")
    } else if disk.source == Source::Empty {
        Some("nothing is in it")
    } else if !disk.writable() && kind == Kind::External {
        Some("the guest only reads it; a revert puts an overlay on it, in its own folder")
    } else if !disk.writable() {
        Some("the guest only reads it")
    } else {
        None
    }
}

fn drive_or_disk(disk: &Disk) -> &'static str {
    match &*disk.device {
        "cdrom" | "floppy" => "drive",
        _ => "disk",
    }
}

/// Where the UEFI variables are copied from and to, if libvirt does not keep
/// them: it never does in an external snapshot, and in an internal one only when
/// their file is qcow2 (of a running VM it refuses another, of a stopped one it
/// says nothing).
fn variables(
    snapshot: &str,
    kind: Kind,
    facts: &Facts,
    files: &mut Files<'_>,
    draft: &mut Draft,
) -> Result<Option<(String, String)>, Fault> {
    const SUBJECT: &str = "uefi variables";
    let Firmware {
        nvram: Some(from),
        nvram_format,
        ..
    } = &facts.vm.firmware
    else {
        return Ok(None);
    };
    if kind == Kind::Internal && nvram_format == "qcow2" {
        draft.decide(SUBJECT, format!("inside '{from}'"), "they are in qcow2");
        return Ok(None);
    }
    if files::exists(facts, from) == Some(false) {
        draft.decide(
            SUBJECT,
            "nothing to copy",
            "the VM never ran: its first start makes them",
        );
        return Ok(None);
    }
    let to = files.beside(from, "", snapshot, "nvram", OVERLAY_BYTES)?;
    draft.decide(
        SUBJECT,
        format!("copied to '{to}'"),
        if kind == Kind::External {
            "an external snapshot does not cover them"
        } else {
            "an internal snapshot covers them only in qcow2"
        },
    );
    Ok(Some((from.clone(), to)))
}

/// How the guest is kept still for the call, and what that achieves.
struct Way {
    memory: bool,
    achieves: Consistency,
    freeze: Option<bool>,
    suspend: bool,
    boot_first: bool,
    internal: bool,
    running: bool,
}

impl Way {
    fn still(achieves: Consistency) -> Self {
        Self {
            memory: false,
            achieves,
            freeze: None,
            suspend: false,
            boot_first: false,
            internal: false,
            running: false,
        }
    }

    fn stop_ms(&self, facts: &Facts) -> u64 {
        let gib = 1024 * 1024 * 1024;
        match (self.memory && self.running, self.internal) {
            (true, true) => 400 + facts.vm.memory.saturating_mul(INTERNAL_STOP_MS_PER_GIB) / gib,
            (true, false) => EXTERNAL_STOP_MS,
            (false, _) if self.suspend => 150,
            (false, _) => 0,
        }
    }

    fn hold(&self, create: &Create, draft: &mut Draft) {
        if self.boot_first {
            draft.push(Step::WaitFor {
                what: WaitFor::Agent,
                timeout_ms: checks::millis(BOOT_TIMEOUT),
                required: true,
            });
        }
        let freeze = self.freeze.map(|fall_back| {
            draft.push(Step::Freeze {
                timeout_ms: checks::millis(create.freeze_timeout),
                fall_back,
            })
        });
        if self.suspend {
            draft.push(Step::Suspend {
                unless_frozen: freeze,
            });
        }
    }

    fn release(&self, draft: &mut Draft) {
        if self.suspend {
            draft.push(Step::Resume);
        }
        if self.freeze.is_some() {
            draft.push(Step::Thaw);
        }
    }
}

fn consistency(
    create: &Create,
    kind: Kind,
    state: VmState,
    started: bool,
    facts: &Facts,
    draft: &mut Draft,
) -> Result<Way, Fault> {
    let vm = &facts.vm.name;
    let not_met = |why: String| {
        Fault::new(
            Reason::ConsistencyNotMet,
            format!("consistency filesystem was asked for, but {why}"),
        )
    };
    if state == VmState::Stopped {
        let needs_running = if create.memory {
            Some("memory")
        } else if create.consistency == Some(Consistency::Filesystem) {
            Some("consistency filesystem")
        } else {
            None
        };
        if let Some(what) = needs_running {
            return Err(Fault::new(
                Reason::DomainNotRunning,
                format!(
                    "{what} was asked for, but VM '{vm}' is off; start it first, or set \
                     start_if_stopped"
                ),
            )
            .with("state", state.name()));
        }
        draft.decide("consistency", "stopped", "the VM is off");
        return Ok(Way::still(Consistency::Stopped));
    }

    // An internal snapshot of a VM that is not off always holds memory.
    let memory = create.memory || kind == Kind::Internal;
    if memory {
        return with_memory(create, kind, state, facts, draft);
    }
    if state == VmState::Paused {
        if create.consistency == Some(Consistency::Filesystem) {
            return Err(not_met(format!(
                "VM '{vm}' is paused, so its guest agent cannot answer; resume it first"
            )));
        }
        draft.decide(
            "consistency",
            "suspend",
            "the VM is paused already and stays so",
        );
        return Ok(Way::still(Consistency::Suspend));
    }
    if facts.vm.frozen == Some(true) && create.consistency != Some(Consistency::Crash) {
        draft.decide("consistency", "filesystem", "the guest is frozen already");
        return Ok(Way::still(Consistency::Filesystem));
    }
    let agent = facts.vm.agent;
    let way = match create.consistency {
        Some(Consistency::Filesystem) if started && agent.defined => {
            draft.decide("consistency", "filesystem", "asked for");
            Way {
                freeze: Some(false),
                boot_first: true,
                ..Way::still(Consistency::Filesystem)
            }
        }
        Some(Consistency::Filesystem) if agent.responding => {
            draft.decide("consistency", "filesystem", "asked for");
            Way {
                freeze: Some(false),
                ..Way::still(Consistency::Filesystem)
            }
        }
        Some(Consistency::Filesystem) => {
            return Err(not_met(if !agent.defined {
                format!(
                    "VM '{vm}' has no channel for a guest agent; add one named \
                     org.qemu.guest_agent.0 and install qemu-guest-agent in the guest"
                )
            } else if !agent.connected {
                format!(
                    "the guest agent of VM '{vm}' is not connected; is qemu-guest-agent running in \
                     the guest?"
                )
            } else {
                format!("the guest agent of VM '{vm}' is connected but does not answer")
            }));
        }
        Some(Consistency::Crash) => {
            draft.decide("consistency", "crash", "asked for");
            Way::still(Consistency::Crash)
        }
        Some(_) => {
            draft.decide("consistency", "suspend", "asked for");
            Way {
                suspend: true,
                ..Way::still(Consistency::Suspend)
            }
        }
        None if agent.responding && !started => {
            draft.decide("consistency", "filesystem", "the guest agent answers");
            Way {
                freeze: Some(true),
                suspend: true,
                ..Way::still(Consistency::Filesystem)
            }
        }
        None => {
            let why = match (started, agent.defined, agent.connected) {
                (true, ..) => "the guest is only just being started",
                (false, false, _) => "the VM has no channel for a guest agent",
                (false, true, false) => "the guest agent is not connected",
                (false, true, true) => "the guest agent does not answer",
            };
            draft.decide("consistency", "suspend", why);
            Way {
                suspend: true,
                ..Way::still(Consistency::Suspend)
            }
        }
    };
    Ok(way)
}

fn with_memory(
    create: &Create,
    kind: Kind,
    state: VmState,
    facts: &Facts,
    draft: &mut Draft,
) -> Result<Way, Fault> {
    let vm = &facts.vm.name;
    if let Some(device) = facts.vm.not_migratable.first() {
        let help = if create.memory {
            "leave memory out"
        } else {
            "use kind external"
        };
        return Err(Fault::new(
            Reason::MemoryNotSavable,
            format!("memory of VM '{vm}' cannot be saved because of its {device}; {help}"),
        )
        .with("devices", facts.vm.not_migratable.join(",")));
    }
    if facts.vm.frozen == Some(true) {
        return Err(Fault::new(
            Reason::GuestFrozen,
            format!(
                "the file systems of VM '{vm}' are frozen by somebody else; a guest whose memory \
                 is saved now would come back frozen: thaw it first (virsh domfsthaw {vm})"
            ),
        ));
    }
    if create.consistency == Some(Consistency::Filesystem) {
        return Err(Fault::new(
            Reason::ConsistencyNotMet,
            format!(
                "consistency filesystem was asked for, but an internal snapshot of VM '{vm}', \
                 which is {}, holds memory, and memory is never saved while a guest is frozen; \
                 use kind external",
                state.name()
            ),
        ));
    }
    if kind == Kind::Internal && !create.memory {
        draft.warn(
            "MEMORY_INCLUDED",
            "an internal snapshot of a VM that is not off always holds its memory",
            "use kind external to leave it out",
        );
    }
    draft.decide(
        "consistency",
        "memory",
        if create.memory {
            "asked for"
        } else {
            "an internal snapshot of a VM that is not off holds memory"
        },
    );
    Ok(Way {
        memory: true,
        internal: kind == Kind::Internal,
        running: state == VmState::Running,
        ..Way::still(Consistency::Memory)
    })
}

/// libvirt's revert puts an overlay on what the guest only reads too: in its own
/// folder, which has to be there and writable then.
fn media_covered(create: &Create, facts: &Facts) -> Result<(), Fault> {
    if create.accept_no_revert {
        return Ok(());
    }
    let held = facts
        .vm
        .disks
        .iter()
        .filter(|disk| disk.source == Source::File)
        .map(|disk| (disk.target.as_str(), disk.path.as_str()));
    if let Some([one, other]) = checks::same_overlay(held) {
        return Err(Fault::new(
            Reason::DiskUnsupported,
            format!(
                "disks {} ('{}') and {} ('{}') of VM '{}' lie in files whose names differ only in \
                 their endings, so that libvirt's revert would call both new overlays the same, \
                 and fail with the VM off; rename one of them or take it out, or use kind internal",
                one.0, one.1, other.0, other.1, facts.vm.name
            ),
        )
        .with("disk", other.0)
        .with("source", other.1));
    }
    for disk in facts
        .vm
        .disks
        .iter()
        .filter(|disk| disk.only_read() && disk.source != Source::Empty)
    {
        let problem = if disk.source == Source::File {
            checks::no_overlay_on(facts, &disk.path)
        } else {
            Some("it is not a file")
        };
        if let Some(problem) = problem {
            let help = match drive_or_disk(disk) {
                "drive" => "eject it first",
                _ => "detach it first",
            };
            return Err(Fault::new(
                Reason::MediaNotCovered,
                format!(
                    "{} {} of VM '{}' holds '{}', on which a revert must put an overlay, but \
                     {problem}; {help}, or set accept_no_revert",
                    drive_or_disk(disk),
                    disk.target,
                    facts.vm.name,
                    disk.path
                ),
            )
            .with("disk", &disk.target)
            .with("medium", &disk.path));
        }
    }
    Ok(())
}

/// The fault for a target that the VM does not have.
#[must_use]
pub fn unknown_disk(facts: &Facts, field: &str, target: &str) -> Fault {
    let targets: Vec<&str> = facts
        .vm
        .disks
        .iter()
        .map(|disk| disk.target.as_str())
        .collect();
    Fault::new(
        Reason::DiskUnknown,
        format!(
            "{field}: VM '{}' has no disk '{target}'; it has {}",
            facts.vm.name,
            targets.join(", ")
        ),
    )
    .with("disk", target)
    .with("valid_names", targets.join(","))
}
