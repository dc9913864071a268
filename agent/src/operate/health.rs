//! What is wrong now, each with what to do about it. Pure: from what stands now
//! to problems.
//!
//! Invariants: a problem says what, since when and on which VM or in which run;
//! *urgent* means that somebody has to act now, because a guest stands still,
//! nothing can be done for any VM, or the agent waits for a person.

use jiff::{SignedDuration, Timestamp};
use vmsnap_engine::Hold;

use crate::{
    journal::{Failing, Size},
    planning::{
        actions::checks::for_people,
        guard::{Guard, GuardState},
    },
    trust,
};

/// A guest that a run holds for longer than this is told.
const LONG_HOLD: SignedDuration = SignedDuration::from_secs(60);
/// A guard that is so far past its deadline and still pending is overdue.
const GUARD_LATE: SignedDuration = SignedDuration::from_secs(60);
/// Less room than this around the journal is told, in bytes.
const ROOM: u64 = 64 << 20;

/// A guest that is kept still.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// How.
    pub hold: Hold,
    /// Since when.
    pub since: Timestamp,
}

/// A run that goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenRun {
    /// Its id.
    pub id: String,
    /// Its VM.
    pub vm: String,
    /// Its action's name.
    pub action: &'static str,
    /// When it began.
    pub started: Timestamp,
    /// The holds that are open.
    pub holds: Vec<Held>,
}

/// A run that nobody looked after yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StuckRun {
    /// Its id.
    pub id: String,
    /// Its VM.
    pub vm: String,
    /// Its action's name.
    pub action: &'static str,
    /// When it ended.
    pub since: Timestamp,
    /// Why it failed.
    pub why: String,
    /// The holds that could not be released.
    pub holds: Vec<Held>,
}

/// A call past its deadline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OverdueCall {
    /// What it does.
    pub operation: &'static str,
    /// To what.
    pub subject: String,
    /// For how long libvirt has had it.
    pub seconds: u64,
}

/// What stands now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    /// When it was read.
    pub now: Timestamp,
    /// The agent was told to stop.
    pub stopping: bool,
    /// Runs that go on.
    pub open: Vec<OpenRun>,
    /// The newest stuck runs.
    pub stuck: Vec<StuckRun>,
    /// Stuck runs in all.
    pub stuck_in_all: u64,
    /// Open guards.
    pub guards: Vec<Guard>,
    /// Calls that libvirt has now.
    pub in_flight: usize,
    /// Those of them that are past their deadline.
    pub overdue: Vec<OverdueCall>,
    /// Since when libvirt is not reachable, and why.
    pub down: Option<(Timestamp, String)>,
    /// Room that the journal takes and has.
    pub journal: Option<Size>,
    /// The journal cannot be used.
    pub failing: Option<Failing>,
    /// The journal did not answer in time; what is told of it is older.
    pub silent: bool,
    /// How certificates and roles stand.
    pub trust: trust::Report,
}

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A guest stands still, and the run that did it does not go on or takes long.
    GuestHeld,
    /// A run could not undo what it did.
    RunStuck,
    /// libvirt cannot be reached.
    HypervisorUnreachable,
    /// The journal cannot be read or written.
    JournalUnusable,
    /// A guarded change is past its deadline and was not taken back.
    GuardOverdue,
    /// A guarded change waits for a person.
    GuardHeld,
    /// A call has been with libvirt for longer than its deadline.
    CallOverdue,
    /// The journal's file system is nearly full.
    JournalSpaceLow,
    /// The agent's certificate expires soon, or has expired.
    CertificateExpires,
    /// New certificates or roles cannot be used.
    TrustUnusable,
    /// The agent is stopping.
    Stopping,
}

impl Kind {
    /// All of them, the most urgent first.
    pub const ALL: [Self; 11] = [
        Self::GuestHeld,
        Self::RunStuck,
        Self::HypervisorUnreachable,
        Self::JournalUnusable,
        Self::GuardOverdue,
        Self::GuardHeld,
        Self::CallOverdue,
        Self::JournalSpaceLow,
        Self::CertificateExpires,
        Self::TrustUnusable,
        Self::Stopping,
    ];

    /// As in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::GuestHeld => "guest_held",
            Self::RunStuck => "run_stuck",
            Self::HypervisorUnreachable => "hypervisor_unreachable",
            Self::JournalUnusable => "journal_unusable",
            Self::GuardOverdue => "guard_overdue",
            Self::GuardHeld => "guard_held",
            Self::CallOverdue => "call_overdue",
            Self::JournalSpaceLow => "journal_space_low",
            Self::CertificateExpires => "certificate_expires",
            Self::TrustUnusable => "trust_unusable",
            Self::Stopping => "stopping",
        }
    }
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What.
    pub kind: Kind,
    /// Somebody has to act now.
    pub urgent: bool,
    /// Since when, where that is known.
    pub since: Option<Timestamp>,
    /// The VM, or empty.
    pub vm: String,
    /// The run, or empty.
    pub run: String,
    /// One sentence.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
}

impl Problem {
    fn new(kind: Kind, urgent: bool, message: String, remedy: impl Into<String>) -> Self {
        Self {
            kind,
            urgent,
            since: None,
            vm: String::new(),
            run: String::new(),
            message,
            remedy: remedy.into(),
        }
    }

    fn since(mut self, since: Timestamp) -> Self {
        self.since = Some(since);
        self
    }

    fn of(mut self, vm: &str, run: &str) -> Self {
        vm.clone_into(&mut self.vm);
        run.clone_into(&mut self.run);
        self
    }
}

/// How a guest is kept still, for a sentence.
#[must_use]
pub fn held(hold: Hold) -> &'static str {
    match hold {
        Hold::Frozen => "frozen",
        Hold::Suspended => "suspended",
    }
}

fn lasting(now: Timestamp, since: Timestamp) -> String {
    for_people(std::time::Duration::try_from(now.duration_since(since)).unwrap_or_default())
}

/// All that is wrong, the most urgent first.
#[must_use]
pub fn problems(standing: &Standing) -> Vec<Problem> {
    let now = standing.now;
    let mut all = Vec::new();
    for run in &standing.stuck {
        for one in &run.holds {
            let how = held(one.hold);
            let message = format!(
                "guest '{}' was left {how} by run {}, which is stuck, and may not answer",
                run.vm, run.id
            );
            let remedy = match one.hold {
                Hold::Frozen => format!(
                    "thaw it (virsh domfsthaw {}), or reset it when its agent does not answer; \
                     then vmsnap resolve {} --note '...'",
                    run.vm, run.id
                ),
                Hold::Suspended => format!(
                    "resume it (virsh resume {}); then vmsnap resolve {} --note '...'",
                    run.vm, run.id
                ),
            };
            all.push(
                Problem::new(Kind::GuestHeld, true, message, remedy)
                    .since(one.since)
                    .of(&run.vm, &run.id),
            );
        }
        all.push(
            Problem::new(
                Kind::RunStuck,
                true,
                format!(
                    "run {} ({} on VM '{}') could not undo what it did: {}",
                    run.id, run.action, run.vm, run.why
                ),
                format!(
                    "look at what it left (vmsnap show {}), set the VM right, then vmsnap resolve \
                     {} --note '...'",
                    run.id, run.id
                ),
            )
            .since(run.since)
            .of(&run.vm, &run.id),
        );
    }
    let unnamed = standing
        .stuck_in_all
        .saturating_sub(standing.stuck.len() as u64);
    if unnamed > 0 {
        all.push(Problem::new(
            Kind::RunStuck,
            true,
            format!("{unnamed} older runs are stuck too"),
            "see vmsnap log --state stuck",
        ));
    }
    for run in &standing.open {
        for one in &run.holds {
            if now.duration_since(one.since) < LONG_HOLD {
                continue;
            }
            let how = held(one.hold);
            all.push(
                Problem::new(
                    Kind::GuestHeld,
                    false,
                    format!(
                        "guest '{}' has been {how} for {} by run {}, which goes on",
                        run.vm,
                        lasting(now, one.since),
                        run.id
                    ),
                    format!(
                        "follow it (vmsnap watch {}); vmsnap cancel {} lets the guest go",
                        run.id, run.id
                    ),
                )
                .since(one.since)
                .of(&run.vm, &run.id),
            );
        }
    }
    if let Some((since, why)) = &standing.down {
        all.push(
            Problem::new(
                Kind::HypervisorUnreachable,
                true,
                format!(
                    "libvirt has not been reachable for {}: {why}",
                    lasting(now, *since)
                ),
                "look whether libvirt's daemon runs and whether libvirt.uri is right; the agent \
                 connects again by itself",
            )
            .since(*since),
        );
    }
    if let Some(failing) = &standing.failing {
        all.push(
            Problem::new(
                Kind::JournalUnusable,
                true,
                failing.why.clone(),
                "look at the file system of journal.path: is it full, read-only or failing? Runs \
                 are refused until it can be written",
            )
            .since(failing.since),
        );
    } else if standing.silent {
        all.push(Problem::new(
            Kind::JournalUnusable,
            true,
            "the journal does not answer".into(),
            "look at the file system of journal.path: does it hang?",
        ));
    }
    for guard in &standing.guards {
        all.extend(of_guard(guard, now));
    }
    for call in &standing.overdue {
        all.push(Problem::new(
            Kind::CallOverdue,
            false,
            format!(
                "libvirt has had the call to {} {} for {} s and does not answer",
                call.operation, call.subject, call.seconds
            ),
            "look at the VM's QEMU and its storage; the VM is refused until the call comes back",
        ));
    }
    if let Some(size) = standing.journal.filter(|size| size.free < ROOM) {
        all.push(Problem::new(
            Kind::JournalSpaceLow,
            false,
            format!("the journal's file system has {} MiB free", size.free >> 20),
            "make room there, or lower journal.max_mib",
        ));
    }
    all.extend(of_trust(&standing.trust, now));
    if standing.stopping {
        all.push(Problem::new(
            Kind::Stopping,
            false,
            format!(
                "the agent was told to stop; {} runs are still open",
                standing.open.len()
            ),
            "wait until it is back",
        ));
    }
    all.sort_by_key(|problem| (!problem.urgent, problem.kind));
    all
}

fn of_guard(guard: &Guard, now: Timestamp) -> Option<Problem> {
    let (vm, snapshot, deadline) = (&guard.vm, &guard.snapshot, guard.deadline);
    let remedy = format!(
        "keep the change (vmsnap confirm {vm} {snapshot}), or go back (vmsnap revert {vm} \
         {snapshot})"
    );
    let problem = match guard.state {
        GuardState::Held => Problem::new(
            Kind::GuardHeld,
            true,
            format!(
                "the guarded change of VM '{vm}' was not confirmed until {deadline} and waits for \
                 a person: {}",
                guard.note
            ),
            remedy,
        ),
        GuardState::Pending if now.duration_since(deadline) > GUARD_LATE => Problem::new(
            Kind::GuardOverdue,
            true,
            format!(
                "the guarded change of VM '{vm}' was to be taken back at {deadline} and was not \
                 yet, {} later",
                lasting(now, deadline)
            ),
            remedy,
        ),
        _ => return None,
    };
    Some(problem.since(deadline).of(vm, &guard.run))
}

fn of_trust(trust: &trust::Report, now: Timestamp) -> Vec<Problem> {
    let mut all = Vec::new();
    if let Some(until) = trust.until {
        let left = now.duration_until(until);
        let remedy = "put a new certificate and its key in their places (vmsnap cert agent ... \
                      --renew); they are taken without a restart";
        if left.is_negative() {
            let message = format!(
                "the agent's certificate expired at {until}; callers over the network refuse it"
            );
            all.push(Problem::new(Kind::CertificateExpires, true, message, remedy).since(until));
        } else if left < trust::SOON {
            let message = format!(
                "the agent's certificate expires at {until}, in {}",
                lasting(until, now)
            );
            all.push(Problem::new(
                Kind::CertificateExpires,
                false,
                message,
                remedy,
            ));
        }
    }
    for reloads in &trust.reloads {
        if let Some((since, why)) = &reloads.unusable {
            let message = format!(
                "new {} cannot be used, the former ones are in force: {why}",
                reloads.of.name()
            );
            let remedy = "set the file right; it is read anew within a second. A restart would be \
                          refused";
            all.push(Problem::new(Kind::TrustUnusable, false, message, remedy).since(*since));
        }
    }
    all
}

/// One line for the service manager.
#[must_use]
pub fn headline(standing: &Standing) -> String {
    let problems = problems(standing);
    match problems.split_first() {
        None => match standing.open.len() {
            0 => "all is well".into(),
            1 => "all is well; 1 run is open".into(),
            open => format!("all is well; {open} runs are open"),
        },
        Some((first, [])) => first.message.clone(),
        Some((first, others)) => format!("{} (and {} more)", first.message, others.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + seconds).unwrap()
    }

    fn standing() -> Standing {
        Standing {
            now: at(1_000),
            journal: Some(Size {
                bytes: 4_096,
                free: 1 << 40,
            }),
            ..Standing::default()
        }
    }

    fn guard(state: GuardState, deadline: i64) -> Guard {
        Guard {
            run: "r1".into(),
            vm_uuid: "u".into(),
            vm: "web1".into(),
            snapshot: "before".into(),
            created: 0,
            armed: at(0),
            deadline: at(deadline),
            fingerprint: String::new(),
            state,
            note: "the VM is gone".into(),
        }
    }

    fn kinds(standing: &Standing) -> Vec<(Kind, bool)> {
        problems(standing)
            .iter()
            .map(|problem| (problem.kind, problem.urgent))
            .collect()
    }

    #[test]
    fn nothing_is_wrong_when_nothing_is_wrong() {
        let mut standing = standing();
        assert_eq!(problems(&standing), []);
        assert_eq!(headline(&standing), "all is well");
        standing.guards = vec![guard(GuardState::Pending, 990)];
        standing.in_flight = 3;
        standing.open = vec![OpenRun {
            id: "r2".into(),
            vm: "web2".into(),
            action: "create",
            started: at(900),
            holds: vec![Held {
                hold: Hold::Frozen,
                since: at(995),
            }],
        }];
        assert_eq!(problems(&standing), []);
        assert_eq!(headline(&standing), "all is well; 1 run is open");
    }

    #[test]
    fn a_guest_that_a_stuck_run_left_frozen_comes_before_all_else_with_the_way_out() {
        let mut standing = standing();
        standing.down = Some((at(400), "end of file".into()));
        standing.stuck_in_all = 3;
        standing.stuck = vec![StuckRun {
            id: "r9".into(),
            vm: "db1".into(),
            action: "create",
            since: at(500),
            why: "the thaw failed".into(),
            holds: vec![Held {
                hold: Hold::Frozen,
                since: at(450),
            }],
        }];
        assert_eq!(
            kinds(&standing),
            [
                (Kind::GuestHeld, true),
                (Kind::RunStuck, true),
                (Kind::RunStuck, true),
                (Kind::HypervisorUnreachable, true),
            ]
        );
        let first = &problems(&standing)[0];
        assert_eq!((first.vm.as_str(), first.run.as_str()), ("db1", "r9"));
        assert_eq!(first.since, Some(at(450)));
        assert!(first.remedy.contains("virsh domfsthaw db1"), "{first:?}");
        assert!(problems(&standing)[2].message.starts_with("2 older"));
        assert!(headline(&standing).ends_with("(and 3 more)"));
    }

    #[test]
    fn every_kind_is_told_when_it_stands_and_has_its_own_name() {
        let mut standing = standing();
        standing.stopping = true;
        standing.open = vec![OpenRun {
            id: "r2".into(),
            vm: "web2".into(),
            action: "create",
            started: at(0),
            holds: vec![Held {
                hold: Hold::Suspended,
                since: at(900),
            }],
        }];
        standing.stuck = vec![StuckRun {
            id: "r3".into(),
            vm: "web3".into(),
            action: "revert",
            since: at(0),
            why: String::new(),
            holds: Vec::new(),
        }];
        standing.stuck_in_all = 1;
        standing.down = Some((at(0), "gone".into()));
        standing.failing = Some(Failing {
            since: at(1),
            why: "disk full".into(),
        });
        standing.guards = vec![
            guard(GuardState::Pending, 900),
            guard(GuardState::Held, 900),
        ];
        standing.overdue = vec![OverdueCall {
            operation: "resume",
            subject: "domain web1".into(),
            seconds: 40,
        }];
        standing.journal = Some(Size {
            bytes: 1,
            free: 1 << 20,
        });
        standing.trust = trust::Report {
            reloads: vec![trust::Reloads {
                of: trust::Of::Roles,
                taken: 1,
                refused: 1,
                unusable: Some((at(900), "line 2: unknown key".into())),
            }],
            until: Some(at(2_000)),
        };
        let mut told: Vec<Kind> = kinds(&standing).into_iter().map(|(kind, _)| kind).collect();
        told.sort();
        assert_eq!(told, Kind::ALL);
        let mut names: Vec<&str> = Kind::ALL.iter().map(|kind| kind.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Kind::ALL.len());
        for problem in problems(&standing) {
            assert!(!problem.remedy.is_empty() && !problem.message.is_empty());
        }
    }

    #[test]
    fn a_certificate_is_told_two_weeks_before_its_end_and_urgent_from_then_on() {
        let mut standing = standing();
        let days = 24 * 3_600;
        for (end, told) in [
            (15 * days, vec![]),
            (13 * days, vec![(Kind::CertificateExpires, false)]),
            (999, vec![(Kind::CertificateExpires, true)]),
        ] {
            standing.trust.until = Some(at(end));
            assert_eq!(kinds(&standing), told, "{end}");
        }
        standing.trust.until = Some(at(1_000 + 2 * days));
        assert!(
            headline(&standing).ends_with(", in 2 d"),
            "{}",
            headline(&standing)
        );
    }

    #[test]
    fn a_journal_that_does_not_answer_is_told_once() {
        let mut standing = standing();
        standing.silent = true;
        assert_eq!(kinds(&standing), [(Kind::JournalUnusable, true)]);
        standing.failing = Some(Failing {
            since: at(0),
            why: "read-only".into(),
        });
        assert_eq!(kinds(&standing), [(Kind::JournalUnusable, true)]);
        assert_eq!(problems(&standing)[0].message, "read-only");
    }
}
