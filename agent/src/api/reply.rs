//! What planning and the journal know, as it goes over the wire.

use jiff::Timestamp;
use tonic::Status;
use vmsnap_engine::{Closing, Hold, Step as _};
use vmsnap_proto::v1;

use super::errors;
use crate::{
    flow::Record,
    journal::{Caller, RunRow, RunStatus, Stamped},
    operate::health,
    planning::{
        Done, Facts, Outcome, Plan, Step, Warning,
        actions::{checks, revert},
        facts::{Consistency, Disk, Health, Kind, Memory, Snapshot, Storage, Vm, VmState},
        guard::{Guard, GuardState},
        outcome::{GuestReport, Verdict},
        plan::FieldChange,
    },
    workflows::Event,
};

/// A point in time.
#[must_use]
pub fn timestamp(time: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: time.as_second(),
        nanos: time.subsec_nanosecond(),
    }
}

/// Something that is wrong.
#[must_use]
pub fn problem(problem: health::Problem) -> v1::HealthProblem {
    let kind = match problem.kind {
        health::Kind::GuestHeld => v1::HealthProblemKind::GuestHeld,
        health::Kind::RunStuck => v1::HealthProblemKind::RunStuck,
        health::Kind::HypervisorUnreachable => v1::HealthProblemKind::HypervisorUnreachable,
        health::Kind::JournalUnusable => v1::HealthProblemKind::JournalUnusable,
        health::Kind::GuardOverdue => v1::HealthProblemKind::GuardOverdue,
        health::Kind::GuardHeld => v1::HealthProblemKind::GuardHeld,
        health::Kind::CallOverdue => v1::HealthProblemKind::CallOverdue,
        health::Kind::JournalSpaceLow => v1::HealthProblemKind::JournalSpaceLow,
        health::Kind::CertificateExpires => v1::HealthProblemKind::CertificateExpires,
        health::Kind::TrustUnusable => v1::HealthProblemKind::TrustUnusable,
        health::Kind::Stopping => v1::HealthProblemKind::Stopping,
    };
    v1::HealthProblem {
        kind: kind as i32,
        urgent: problem.urgent,
        since: problem.since.map(timestamp),
        vm_name: problem.vm,
        workflow_id: problem.run,
        message: problem.message,
        remedy: problem.remedy,
    }
}

fn millis(millis: u64) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(millis / 1000).unwrap_or(i64::MAX),
        nanos: i32::try_from(millis % 1000 * 1_000_000).unwrap_or(0),
    }
}

fn signed_millis(millis: i64) -> prost_types::Duration {
    prost_types::Duration {
        seconds: millis / 1000,
        nanos: i32::try_from(millis % 1000 * 1_000_000).unwrap_or(0),
    }
}

/// A kind.
#[must_use]
pub fn kind(kind: Kind) -> v1::SnapshotKind {
    match kind {
        Kind::Internal => v1::SnapshotKind::Internal,
        Kind::External => v1::SnapshotKind::External,
        Kind::Mixed => v1::SnapshotKind::Mixed,
    }
}

/// A consistency.
#[must_use]
pub fn consistency(consistency: Consistency) -> v1::Consistency {
    match consistency {
        Consistency::Memory => v1::Consistency::Memory,
        Consistency::Filesystem => v1::Consistency::Filesystem,
        Consistency::Suspend => v1::Consistency::Suspend,
        Consistency::Crash => v1::Consistency::Crash,
        Consistency::Stopped => v1::Consistency::Stopped,
    }
}

/// A state of a VM.
#[must_use]
pub fn vm_state(state: VmState) -> v1::VmState {
    match state {
        VmState::Running => v1::VmState::Running,
        VmState::Paused => v1::VmState::Paused,
        VmState::Stopped => v1::VmState::Stopped,
        VmState::Stopping => v1::VmState::Stopping,
        VmState::Crashed => v1::VmState::Crashed,
        VmState::PmSuspended => v1::VmState::PmSuspended,
    }
}

/// A VM.
#[must_use]
pub fn vm(vm: &Vm) -> v1::Vm {
    let firmware = &vm.firmware;
    v1::Vm {
        name: vm.name.clone(),
        uuid: vm.uuid.clone(),
        state: vm_state(vm.state) as i32,
        state_reason: vm.reason.clone(),
        persistent: vm.persistent,
        autostart: vm.autostart,
        vcpus: vm
            .vcpus
            .iter()
            .map(|vcpu| v1::Vcpu {
                number: vcpu.number,
                state: vcpu.state.clone(),
                host_cpu: vcpu.cpu,
                cpu_time: Some(prost_types::Duration {
                    seconds: i64::try_from(vcpu.time_ns / 1_000_000_000).unwrap_or(i64::MAX),
                    nanos: i32::try_from(vcpu.time_ns % 1_000_000_000).unwrap_or(0),
                }),
            })
            .collect(),
        vcpu_count: vm.vcpu_count,
        memory_bytes: vm.memory,
        max_memory_bytes: vm.max_memory,
        memory_tuning: Some(v1::MemoryTuning {
            hard_limit_bytes: vm.memtune.hard,
            soft_limit_bytes: vm.memtune.soft,
            swap_hard_limit_bytes: vm.memtune.swap_hard,
            min_guarantee_bytes: vm.memtune.min_guarantee,
        }),
        machine: vm.machine.clone(),
        arch: vm.arch.clone(),
        firmware: Some(v1::Firmware {
            kind: if firmware.uefi { "uefi" } else { "bios" }.into(),
            nvram_path: firmware.nvram.clone().unwrap_or_default(),
            nvram_format: firmware.nvram_format.clone(),
        }),
        has_managed_save: vm.managed_save,
        disks: vm.disks.iter().map(disk).collect(),
        guest_agent: Some(v1::GuestAgent {
            defined: vm.agent.defined,
            connected: vm.agent.connected,
            responding: vm.agent.responding,
        }),
        block_jobs: vm
            .block_jobs
            .iter()
            .map(|job| v1::BlockJob {
                disk: job.disk.clone(),
                kind: job.kind.clone(),
                done_bytes: job.done,
                total_bytes: job.total,
            })
            .collect(),
        not_migratable_devices: vm.not_migratable.clone(),
    }
}

fn disk(disk: &Disk) -> v1::Disk {
    use crate::planning::facts::Source;
    v1::Disk {
        target: disk.target.clone(),
        bus: disk.bus.clone(),
        device: disk.device.clone(),
        source_type: match disk.source {
            Source::File => "file",
            Source::Block => "block",
            Source::Network => "network",
            Source::Volume => "volume",
            Source::Empty => "none",
            Source::Other => "other",
        }
        .into(),
        source: disk.path.clone(),
        format: disk.format.clone(),
        readonly: disk.readonly,
        virtual_bytes: disk.virtual_size,
        chain: disk
            .chain
            .iter()
            .map(|image| v1::Image {
                path: image.path.clone(),
                format: image.format.clone(),
                virtual_bytes: image.virtual_size,
                actual_bytes: image.actual_size,
                internal_snapshots: image.internal.clone(),
            })
            .collect(),
    }
}

/// A snapshot, with its children among `all`.
#[must_use]
pub fn snapshot(vm_name: &str, snapshot: &Snapshot, all: &[Snapshot]) -> v1::Snapshot {
    let (health, detail) = match &snapshot.health {
        Health::Whole => (v1::SnapshotHealth::Whole, String::new()),
        Health::DataMissing(detail) | Health::MemoryMissing(detail) => {
            (v1::SnapshotHealth::DataMissing, detail.clone())
        }
        Health::Torn(detail) => (v1::SnapshotHealth::Torn, detail.clone()),
        Health::MergedAway(detail) => (v1::SnapshotHealth::MergedAway, detail.clone()),
        Health::MetadataOnly => (
            v1::SnapshotHealth::MetadataOnly,
            "no data was kept for any disk".into(),
        ),
    };
    let record = snapshot.record.as_ref();
    let not_revertible = match checks::whole(snapshot).and_then(|()| revert::ever(snapshot)) {
        Err(fault) => fault.message,
        Ok(()) => String::new(),
    };
    v1::Snapshot {
        vm_name: vm_name.to_owned(),
        name: snapshot.name.clone(),
        parent: snapshot.parent.clone().unwrap_or_default(),
        children: all
            .iter()
            .filter(|other| other.parent.as_ref() == Some(&snapshot.name))
            .map(|other| other.name.clone())
            .collect(),
        description: snapshot.description.clone(),
        kind: kind(snapshot.kind) as i32,
        memory: snapshot.memory != Memory::None,
        consistency: record.map_or(v1::Consistency::Unspecified, |record| {
            consistency(record.consistency)
        }) as i32,
        state: snapshot.state.name().to_owned(),
        created: Some(timestamp(snapshot.created)),
        current: snapshot.current,
        health: health as i32,
        health_detail: detail,
        revertible: not_revertible.is_empty(),
        not_revertible_because: not_revertible,
        size_bytes: snapshot.size,
        disks: snapshot
            .disks
            .iter()
            .map(|disk| v1::SnapshotDisk {
                target: disk.target.clone(),
                kind: disk.kind.map_or(v1::SnapshotKind::Unspecified, kind) as i32,
                overlay: disk.overlay.clone().unwrap_or_default(),
                data: disk.data.clone().unwrap_or_default(),
            })
            .collect(),
        memory_file: match &snapshot.memory {
            Memory::External(file) => file.clone(),
            _ => String::new(),
        },
        ours: record.is_some(),
        protected: record.is_some_and(|record| record.protected),
        workflow_id: record
            .map(|record| record.workflow.clone())
            .unwrap_or_default(),
        guard_deadline: snapshot.guard.map(timestamp),
    }
}

/// All snapshots of a VM.
#[must_use]
pub fn snapshots(vm_name: &str, all: &[Snapshot]) -> Vec<v1::Snapshot> {
    all.iter().map(|one| snapshot(vm_name, one, all)).collect()
}

/// Pool and volumes.
#[must_use]
pub fn storage(storage: &Storage) -> v1::Storage {
    v1::Storage {
        pool: storage.pool.as_ref().map(|pool| v1::Pool {
            name: pool.name.clone(),
            active: pool.active,
            r#type: pool.kind.clone(),
            path: pool.path.clone(),
            capacity_bytes: pool.capacity,
            allocation_bytes: pool.allocation,
            available_bytes: pool.available,
        }),
        volumes: storage
            .volumes
            .iter()
            .map(|volume| v1::Volume {
                name: volume.name.clone(),
                path: volume.path.clone(),
                format: volume.format.clone(),
                capacity_bytes: volume.capacity,
                allocation_bytes: volume.allocation,
                backing_path: volume.backing.clone().unwrap_or_default(),
                used_by: volume.used_by.clone(),
            })
            .collect(),
        orphans: storage
            .orphans
            .iter()
            .flatten()
            .map(|orphan| v1::Orphan {
                path: orphan.path.clone(),
                size_bytes: orphan.size,
                ours: orphan.ours,
            })
            .collect(),
    }
}

fn guest(guest: &GuestReport) -> v1::Guest {
    v1::Guest {
        hostname: guest.hostname.clone(),
        os: guest.os.clone(),
        interfaces: guest
            .interfaces
            .iter()
            .map(|(name, mac, addresses)| v1::GuestInterface {
                name: name.clone(),
                mac: mac.clone(),
                addresses: addresses.clone(),
            })
            .collect(),
        addresses: guest.addresses(),
        ready: Some(millis(guest.ready_ms)),
        clock_skew: guest.skew_ms.map(signed_millis),
        clock_set: guest.clock_set,
    }
}

fn verdict(verdict: &Verdict) -> v1::Verdict {
    v1::Verdict {
        name: verdict.name.clone(),
        what: verdict.what.clone(),
        removed: verdict.removed,
        rule: verdict.rule.clone(),
        size_bytes: verdict.size,
    }
}

fn change(change: &FieldChange) -> v1::FieldChange {
    v1::FieldChange {
        field: change.field.clone(),
        before: change.before.clone(),
        after: change.after.clone(),
    }
}

/// A guarded change.
#[must_use]
pub fn guard(guard: &Guard) -> v1::Guard {
    v1::Guard {
        vm_name: guard.vm.clone(),
        snapshot_name: guard.snapshot.clone(),
        armed: Some(timestamp(guard.armed)),
        deadline: Some(timestamp(guard.deadline)),
        state: match guard.state {
            GuardState::Held => v1::GuardState::Held,
            _ => v1::GuardState::Pending,
        } as i32,
        note: guard.note.clone(),
        workflow_id: guard.run.clone(),
    }
}

/// A warning.
#[must_use]
pub fn warning(warning: &Warning) -> v1::Warning {
    v1::Warning {
        code: warning.code.clone(),
        message: warning.message.clone(),
        advice: warning.advice.clone(),
    }
}

/// What a run achieved.
#[must_use]
pub fn outcome(outcome: &Outcome) -> v1::WorkflowResult {
    let name = outcome
        .vm
        .as_ref()
        .map(|vm| vm.name.as_str())
        .unwrap_or_default();
    v1::WorkflowResult {
        changed: outcome.changed,
        snapshot: outcome
            .snapshot
            .as_ref()
            .map(|one| snapshot(name, one, &outcome.snapshots)),
        vm: outcome.vm.as_ref().map(vm),
        snapshots: snapshots(name, &outcome.snapshots),
        storage: outcome.storage.as_ref().map(storage),
        guest: outcome.guest.as_ref().map(guest),
        consistency: outcome
            .consistency
            .map_or(v1::Consistency::Unspecified, consistency) as i32,
        stopped: outcome.stopped_ms.map(millis),
        frozen: outcome.frozen_ms.map(millis),
        verdicts: outcome.verdicts.iter().map(verdict).collect(),
        diff: outcome.diff.iter().map(change).collect(),
        merged: outcome.merged.clone(),
        resized_to_bytes: outcome.resized_to.unwrap_or(0),
        vm_state: outcome.vm_state.map_or(v1::VmState::Unspecified, vm_state) as i32,
        guard_deadline: outcome.guard.map(timestamp),
        safety_snapshot: outcome.safety_snapshot.clone().unwrap_or_default(),
    }
}

fn planned_step((index, step): (usize, &Step)) -> v1::PlannedStep {
    v1::PlannedStep {
        index: number(index),
        name: step.name().to_owned(),
        title: step.title(),
        changes: step.changes(),
        undo: step.undo_title().to_owned(),
        point_of_no_return: step.point_of_no_return(),
    }
}

/// A plan; with the facts, also what is known without running it.
#[must_use]
pub fn plan(plan: &Plan, facts: Option<&Facts>) -> v1::Plan {
    v1::Plan {
        hash: plan.hash.clone(),
        steps: plan.steps.iter().enumerate().map(planned_step).collect(),
        changes: plan.changes(),
        warnings: plan.warnings.iter().map(warning).collect(),
        decisions: plan
            .decisions
            .iter()
            .map(|decision| v1::Decision {
                subject: decision.subject.clone(),
                choice: decision.choice.clone(),
                because: decision.because.clone(),
            })
            .collect(),
        diff: plan.diff.iter().map(change).collect(),
        snapshot_name: plan.snapshot.clone(),
        preview: facts.map(|facts| v1::WorkflowResult {
            changed: plan.changes(),
            snapshot: facts
                .snapshot(&plan.snapshot)
                .map(|one| snapshot(&facts.vm.name, one, &facts.snapshots)),
            vm: Some(vm(&facts.vm)),
            snapshots: snapshots(&facts.vm.name, &facts.snapshots),
            storage: Some(storage(&facts.storage)),
            consistency: plan
                .consistency
                .map_or(v1::Consistency::Unspecified, consistency) as i32,
            verdicts: plan.verdicts.iter().map(verdict).collect(),
            vm_state: vm_state(facts.vm.state) as i32,
            ..v1::WorkflowResult::default()
        }),
    }
}

fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

fn hold(hold: Hold) -> i32 {
    let kind = match hold {
        Hold::Frozen => v1::HoldKind::Frozen,
        Hold::Suspended => v1::HoldKind::Suspended,
    };
    kind as i32
}

/// Titles of a plan's steps, for events that come after it.
#[derive(Debug, Default)]
pub struct Titles(Vec<(String, String)>);

impl Titles {
    /// Learns them from the plan's own record.
    pub fn learn(&mut self, record: &Record) {
        if let Record::Planned { plan } = record {
            self.0 = plan
                .steps
                .iter()
                .map(|step| (step.name().to_owned(), step.title()))
                .collect();
        }
    }

    fn of(&self, index: usize) -> (String, String) {
        self.0.get(index).cloned().unwrap_or_default()
    }
}

/// An event.
///
/// # Errors
/// The status that ends the stream, where that is what the event says.
pub fn event(run: &str, event: &Event, titles: &mut Titles) -> Result<v1::WorkflowEvent, Status> {
    use v1::workflow_event::Kind as K;
    let (sequence, time, kind) = match event {
        Event::Record(stamped) => {
            titles.learn(&stamped.record);
            (stamped.sequence, stamped.time, record(stamped, titles))
        }
        Event::Progress(sequence, progress) => (
            *sequence,
            Timestamp::now(),
            K::StepProgress(v1::EventStepProgress {
                index: number(progress.index),
                done_bytes: progress.done,
                total_bytes: progress.total,
                disk: progress.disk.clone(),
            }),
        ),
        Event::Heartbeat(sequence) => (
            *sequence,
            Timestamp::now(),
            K::Heartbeat(v1::EventHeartbeat {}),
        ),
        Event::LeftOpen(why) => return Err(errors::status(why)),
    };
    Ok(v1::WorkflowEvent {
        workflow_id: run.to_owned(),
        sequence,
        time: Some(timestamp(time)),
        kind: Some(kind),
    })
}

fn record(stamped: &Stamped, titles: &Titles) -> v1::workflow_event::Kind {
    use v1::workflow_event::Kind as K;
    match &stamped.record {
        Record::Queued { behind } => K::Queued(v1::EventQueued {
            behind_workflow_id: behind.clone(),
        }),
        Record::Planned { plan: planned } => K::Planned(v1::EventPlanned {
            plan: Some(plan(planned, None)),
        }),
        Record::Notice { notice } => K::Warning(warning(notice)),
        Record::StepStarted { index } => {
            let (name, title) = titles.of(*index);
            K::StepStarted(v1::EventStepStarted {
                index: number(*index),
                name,
                title,
            })
        }
        Record::StepFinished {
            index,
            took_ms,
            done,
        } => K::StepFinished(v1::EventStepFinished {
            index: number(*index),
            took: Some(millis(*took_ms)),
            note: Done::note(done),
        }),
        Record::StepFailed {
            index,
            took_ms,
            fault,
        } => K::StepFailed(v1::EventStepFailed {
            index: number(*index),
            took: Some(millis(*took_ms)),
            failure: Some(errors::failure(fault)),
        }),
        Record::HoldTaken { hold: taken } => {
            K::HoldTaken(v1::EventHoldTaken { kind: hold(*taken) })
        }
        Record::HoldReleased {
            hold: released,
            held_ms,
        } => K::HoldReleased(v1::EventHoldReleased {
            kind: hold(*released),
            held: held_ms.map(millis),
        }),
        Record::UndoStarted { index } => K::Undo(v1::EventUndo {
            index: number(*index),
            title: titles.of(*index).1,
            succeeded: None,
            note: String::new(),
        }),
        Record::UndoFinished { index, outcome } => K::Undo(v1::EventUndo {
            index: number(*index),
            title: titles.of(*index).1,
            succeeded: Some(outcome.is_ok()),
            note: match outcome {
                Ok(note) => note.clone(),
                Err(fault) => fault.to_string(),
            },
        }),
        Record::Recovering => K::Warning(v1::Warning {
            code: "RECOVERING".into(),
            message: "the agent stopped in the middle of this run; it is undone now".into(),
            advice: String::new(),
        }),
        Record::Closed {
            closing,
            outcome: achieved,
            fault,
        } => K::Outcome(v1::EventOutcome {
            state: closing_state(*closing) as i32,
            result: achieved.as_ref().map(|achieved| outcome(achieved)),
            failure: fault.as_ref().map(errors::failure),
        }),
        Record::Resolved { by, note } => K::Warning(v1::Warning {
            code: "RESOLVED".into(),
            message: format!("{by} recorded: {note}"),
            advice: String::new(),
        }),
    }
}

fn closing_state(closing: Closing) -> v1::WorkflowState {
    match closing {
        Closing::Succeeded => v1::WorkflowState::Succeeded,
        Closing::Refused => v1::WorkflowState::Refused,
        Closing::Failed => v1::WorkflowState::Failed,
        Closing::Cancelled => v1::WorkflowState::Cancelled,
        Closing::Stuck => v1::WorkflowState::Stuck,
    }
}

/// A status of a run.
#[must_use]
pub fn status(status: RunStatus) -> v1::WorkflowState {
    match status {
        RunStatus::Queued => v1::WorkflowState::Queued,
        RunStatus::Running => v1::WorkflowState::Running,
        RunStatus::Undoing => v1::WorkflowState::Undoing,
        RunStatus::Succeeded => v1::WorkflowState::Succeeded,
        RunStatus::Failed => v1::WorkflowState::Failed,
        RunStatus::Cancelled => v1::WorkflowState::Cancelled,
        RunStatus::Stuck => v1::WorkflowState::Stuck,
        RunStatus::Refused => v1::WorkflowState::Refused,
    }
}

/// Somebody who called.
#[must_use]
pub fn caller(caller: &Caller) -> v1::Caller {
    v1::Caller {
        identity: caller.identity.clone(),
        transport: caller.transport.clone(),
        address: caller.address.clone(),
    }
}

/// A run.
#[must_use]
pub fn workflow(run: &RunRow, warnings: Vec<v1::Warning>) -> v1::Workflow {
    v1::Workflow {
        id: run.id.clone(),
        request_id: run.request_id.clone(),
        spec: Some(super::spec::spec(&run.request)),
        state: status(run.status) as i32,
        started: Some(timestamp(run.started)),
        finished: run.finished.map(timestamp),
        caller: Some(caller(&run.caller)),
        plan_hash: run.plan_hash.clone(),
        result: run.outcome.as_ref().map(outcome),
        failure: run.fault.as_ref().map(errors::failure),
        last_sequence: run.last_sequence,
        warnings,
    }
}
