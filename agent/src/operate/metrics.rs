//! What is measured: every metric once, with its labels and help, and where its
//! numbers come from.
//!
//! Invariants: counters and times come from the runs' records, so that they are
//! what the journal holds; without a configured endpoint nothing is kept; names
//! of metrics, labels and their values are an interface.

use std::{sync::OnceLock, time::Duration};

use jiff::Timestamp;
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use metrics_util::MetricKindMask;
use vmsnap_engine::{Closing, Hold};

use super::{
    health::{self, Standing, held},
    readings::Known,
};
use crate::{
    config::Config,
    flow::Record,
    journal::Stamped,
    planning::{guard::GuardState, request::Action},
    workflows::Live,
};

/// What a metric is to Prometheus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Is what it is now.
    Gauge,
    /// Counts by size.
    Histogram,
}

impl Kind {
    /// Prometheus' word.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// One metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it tells.
    pub help: &'static str,
}

const fn metric(
    name: &'static str,
    kind: Kind,
    labels: &'static [&'static str],
    help: &'static str,
) -> Metric {
    Metric {
        name,
        kind,
        labels,
        help,
    }
}

const RUNS: &str = "vmsnap_runs_total";
const RUN_SECONDS: &str = "vmsnap_run_seconds";
const STEP_SECONDS: &str = "vmsnap_step_seconds";
const HOLD_SECONDS: &str = "vmsnap_hold_seconds";
const RUNS_OPEN: &str = "vmsnap_runs_open";
const RUN_OLDEST: &str = "vmsnap_run_oldest_seconds";
const RUNS_STUCK: &str = "vmsnap_runs_stuck";
const HOLDS_OPEN: &str = "vmsnap_holds_open";
const HOLD_OLDEST: &str = "vmsnap_hold_oldest_seconds";
const GUARDS: &str = "vmsnap_guards";
const GUARD_LATE: &str = "vmsnap_guard_late_seconds";
const CHAIN_DEPTH: &str = "vmsnap_chain_depth";
const CHAIN_LIMIT: &str = "vmsnap_chain_limit";
const POOL_CAPACITY: &str = "vmsnap_pool_capacity_bytes";
const POOL_AVAILABLE: &str = "vmsnap_pool_available_bytes";
const CALLS_IN_FLIGHT: &str = "vmsnap_calls_in_flight";
const CALLS_OVERDUE: &str = "vmsnap_calls_overdue";
const CALLS_OVERDUE_TOTAL: &str = "vmsnap_calls_overdue_total";
const HYPERVISOR_UP: &str = "vmsnap_hypervisor_up";
const RECONNECTS: &str = "vmsnap_reconnects_total";
const JOURNAL_BYTES: &str = "vmsnap_journal_bytes";
const JOURNAL_FREE: &str = "vmsnap_journal_free_bytes";
const JOURNAL_USABLE: &str = "vmsnap_journal_usable";
const TRUST_RELOADS: &str = "vmsnap_trust_reloads_total";
const TRUST_UNUSABLE: &str = "vmsnap_trust_unusable";
const CERTIFICATE_END: &str = "vmsnap_certificate_end_time_seconds";
const PROBLEMS: &str = "vmsnap_problems";
const READING_AGE: &str = "vmsnap_reading_age_seconds";
const BUILD: &str = "vmsnap_build_info";
const STARTED: &str = "vmsnap_start_time_seconds";

/// All metrics, in the order of `docs/metrics.md`.
pub const METRICS: &[Metric] = &[
    metric(
        RUNS,
        Kind::Counter,
        &["action", "result"],
        "Runs that ended since the agent started",
    ),
    metric(
        RUN_SECONDS,
        Kind::Histogram,
        &["action"],
        "Seconds from a run's first record to its end",
    ),
    metric(
        STEP_SECONDS,
        Kind::Histogram,
        &["step", "result"],
        "Seconds that a step took",
    ),
    metric(
        HOLD_SECONDS,
        Kind::Histogram,
        &["hold"],
        "Seconds for which a guest was kept still",
    ),
    metric(RUNS_OPEN, Kind::Gauge, &[], "Runs that go on now"),
    metric(
        RUN_OLDEST,
        Kind::Gauge,
        &[],
        "Age of the oldest run that goes on, in seconds; 0 without one",
    ),
    metric(
        RUNS_STUCK,
        Kind::Gauge,
        &[],
        "Runs that could not undo what they did and were not resolved",
    ),
    metric(
        HOLDS_OPEN,
        Kind::Gauge,
        &["hold"],
        "Guests that are kept still now, by runs that go on or are stuck",
    ),
    metric(
        HOLD_OLDEST,
        Kind::Gauge,
        &[],
        "For how long the longest of them has been, in seconds; 0 without one",
    ),
    metric(
        GUARDS,
        Kind::Gauge,
        &["state"],
        "Guarded changes that are pending, and those that wait for a person",
    ),
    metric(
        GUARD_LATE,
        Kind::Gauge,
        &[],
        "How far a pending guard is past its deadline at most, in seconds; 0 when none is",
    ),
    metric(
        CHAIN_DEPTH,
        Kind::Gauge,
        &["vm"],
        "Images in the deepest backing chain of a VM's disks",
    ),
    metric(
        CHAIN_LIMIT,
        Kind::Gauge,
        &[],
        "Depth from which on no snapshot is added (limits.max_chain)",
    ),
    metric(
        POOL_CAPACITY,
        Kind::Gauge,
        &["pool"],
        "Size of an active storage pool",
    ),
    metric(
        POOL_AVAILABLE,
        Kind::Gauge,
        &["pool"],
        "Room that is left in it",
    ),
    metric(
        CALLS_IN_FLIGHT,
        Kind::Gauge,
        &[],
        "Calls that libvirt has now, overdue ones included",
    ),
    metric(
        CALLS_OVERDUE,
        Kind::Gauge,
        &[],
        "Calls that libvirt has had for longer than their deadline",
    ),
    metric(
        CALLS_OVERDUE_TOTAL,
        Kind::Counter,
        &[],
        "Calls that passed their deadline since the agent started",
    ),
    metric(
        HYPERVISOR_UP,
        Kind::Gauge,
        &[],
        "1 when libvirt can be reached, 0 when not",
    ),
    metric(
        RECONNECTS,
        Kind::Counter,
        &[],
        "Times that libvirt came back after its connection was lost",
    ),
    metric(
        JOURNAL_BYTES,
        Kind::Gauge,
        &[],
        "Size of the journal with its log",
    ),
    metric(
        JOURNAL_FREE,
        Kind::Gauge,
        &[],
        "Room that is left in the journal's file system",
    ),
    metric(
        JOURNAL_USABLE,
        Kind::Gauge,
        &[],
        "1 when the journal can be read and written, 0 when not",
    ),
    metric(
        TRUST_RELOADS,
        Kind::Counter,
        &["of", "result"],
        "Times that new certificates or roles were read, since the agent started",
    ),
    metric(
        TRUST_UNUSABLE,
        Kind::Gauge,
        &["of"],
        "1 when the certificates or roles that are there cannot be used, and former ones are in \
         force",
    ),
    metric(
        CERTIFICATE_END,
        Kind::Gauge,
        &[],
        "When the agent's certificate expires, in seconds since 1970; 0 without TLS",
    ),
    metric(
        PROBLEMS,
        Kind::Gauge,
        &["kind", "urgent"],
        "What health tells, by kind; urgent is true when somebody has to act now",
    ),
    metric(
        READING_AGE,
        Kind::Gauge,
        &["of"],
        "Age of the figures of pools and chains, in seconds",
    ),
    metric(
        BUILD,
        Kind::Gauge,
        &["version"],
        "1, with the agent's version",
    ),
    metric(
        STARTED,
        Kind::Gauge,
        &[],
        "When the agent started, in seconds since 1970",
    ),
];

/// Upper bounds for runs and steps, in seconds.
const LONG: &[f64] = &[
    0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1_800.0, 3_600.0, 14_400.0,
];
/// Upper bounds for guests that stand still.
const SHORT: &[f64] = &[
    0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
];
/// A figure of something that is gone is shown no longer than this: one that was not
/// set for so long, so [`set`] sets all of them.
const GONE: Duration = Duration::from_secs(600);

/// When the agent began to keep metrics.
static BEGAN: OnceLock<Timestamp> = OnceLock::new();

fn result(closing: Closing) -> &'static str {
    match closing {
        Closing::Succeeded => "succeeded",
        Closing::Refused => "refused",
        Closing::Failed => "failed",
        Closing::Cancelled => "cancelled",
        Closing::Stuck => "stuck",
    }
}

const CLOSINGS: [Closing; 5] = [
    Closing::Succeeded,
    Closing::Refused,
    Closing::Failed,
    Closing::Cancelled,
    Closing::Stuck,
];

fn seconds(millis: u64) -> f64 {
    Duration::from_millis(millis).as_secs_f64()
}

/// Seconds from one time to another; 0 when it is not later.
fn between(from: Timestamp, to: Timestamp) -> f64 {
    to.duration_since(from).as_secs_f64().max(0.0)
}

/// Keeps metrics from now on.
///
/// # Errors
/// When this process keeps some already.
pub fn install() -> Result<PrometheusHandle, String> {
    let recorder = recorder(GONE)?;
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|error| wrong(&error))?;
    BEGAN.get_or_init(Timestamp::now);
    begin();
    Ok(handle)
}

fn wrong(error: &dyn std::fmt::Display) -> String {
    format!("metrics: {error}")
}

/// What keeps metrics; gauges for so long after they were set.
fn recorder(gone: Duration) -> Result<PrometheusRecorder, String> {
    let mut builder = PrometheusBuilder::new().idle_timeout(MetricKindMask::GAUGE, Some(gone));
    for (name, bounds) in [
        (RUN_SECONDS, LONG),
        (STEP_SECONDS, LONG),
        (HOLD_SECONDS, SHORT),
    ] {
        builder = builder
            .set_buckets_for_metric(Matcher::Full(name.to_owned()), bounds)
            .map_err(|error| wrong(&error))?;
    }
    Ok(builder.build_recorder())
}

/// Says what there is, and what is 0 until it grows.
fn begin() {
    for metric in METRICS {
        match metric.kind {
            Kind::Counter => describe_counter!(metric.name, metric.help),
            Kind::Gauge => describe_gauge!(metric.name, metric.help),
            Kind::Histogram => describe_histogram!(metric.name, metric.help),
        }
    }
    // A rate over a counter that appears with its first event misses that event.
    for action in Action::NAMES {
        for closing in CLOSINGS {
            counter!(RUNS, "action" => action, "result" => result(closing)).absolute(0);
        }
    }
}

/// Counts what a record of a run tells. Called once it is on disk.
pub fn of_record(live: &Live, stamped: &Stamped) {
    match &stamped.record {
        Record::StepFinished { index, took_ms, .. } => step(live, *index, *took_ms, "done"),
        Record::StepFailed { index, took_ms, .. } => step(live, *index, *took_ms, "failed"),
        Record::HoldReleased {
            hold,
            held_ms: Some(held_ms),
        } => histogram!(HOLD_SECONDS, "hold" => held(*hold)).record(seconds(*held_ms)),
        Record::Closed { closing, .. } => {
            let action = live.request.action.name();
            counter!(RUNS, "action" => action, "result" => result(*closing)).increment(1);
            histogram!(RUN_SECONDS, "action" => action).record(between(live.started, stamped.time));
        }
        _ => {}
    }
}

fn step(live: &Live, index: usize, took_ms: u64, result: &'static str) {
    let name = live.records_from(1).iter().find_map(|record| {
        let Record::Planned { plan } = &record.record else {
            return None;
        };
        plan.steps.get(index).map(vmsnap_engine::Step::name)
    });
    if let Some(name) = name {
        histogram!(STEP_SECONDS, "step" => name, "result" => result).record(seconds(took_ms));
    }
}

/// Sets what is as it is now.
pub fn set(standing: &Standing, known: &Known, config: &Config) {
    let now = standing.now;
    let count = |n: usize| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
    let truth = |is: bool| if is { 1.0 } else { 0.0 };
    gauge!(BUILD, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    let began = *BEGAN.get_or_init(|| now);
    gauge!(STARTED).set(between(Timestamp::UNIX_EPOCH, began));
    gauge!(RUNS_OPEN).set(count(standing.open.len()));
    let oldest = |times: &mut dyn Iterator<Item = Timestamp>| {
        times.min().map_or(0.0, |since| between(since, now))
    };
    gauge!(RUN_OLDEST).set(oldest(&mut standing.open.iter().map(|run| run.started)));
    gauge!(RUNS_STUCK).set(bytes(standing.stuck_in_all));
    let holds = || {
        let open = standing.open.iter().flat_map(|run| &run.holds);
        open.chain(standing.stuck.iter().flat_map(|run| &run.holds))
    };
    for hold in [Hold::Frozen, Hold::Suspended] {
        let open = holds().filter(|one| one.hold == hold).count();
        gauge!(HOLDS_OPEN, "hold" => held(hold)).set(count(open));
    }
    gauge!(HOLD_OLDEST).set(oldest(&mut holds().map(|one| one.since)));
    for state in [GuardState::Pending, GuardState::Held] {
        let guards = standing.guards.iter().filter(|guard| guard.state == state);
        gauge!(GUARDS, "state" => state.name()).set(count(guards.count()));
    }
    let mut deadlines = standing
        .guards
        .iter()
        .filter(|guard| guard.state == GuardState::Pending)
        .map(|guard| guard.deadline);
    gauge!(GUARD_LATE).set(oldest(&mut deadlines));
    gauge!(CALLS_IN_FLIGHT).set(count(standing.in_flight));
    gauge!(CALLS_OVERDUE).set(count(standing.overdue.len()));
    let counters = vmsnap_hypervisor::counters();
    counter!(CALLS_OVERDUE_TOTAL).absolute(counters.overdue);
    counter!(RECONNECTS).absolute(counters.reconnects);
    gauge!(HYPERVISOR_UP).set(truth(standing.down.is_none()));
    if let Some(size) = standing.journal {
        gauge!(JOURNAL_BYTES).set(bytes(size.bytes));
        gauge!(JOURNAL_FREE).set(bytes(size.free));
    }
    gauge!(JOURNAL_USABLE).set(truth(standing.failing.is_none() && !standing.silent));
    for reloads in &standing.trust.reloads {
        let of = reloads.of.name();
        for (result, times) in [("taken", reloads.taken), ("refused", reloads.refused)] {
            counter!(TRUST_RELOADS, "of" => of, "result" => result).absolute(times);
        }
        gauge!(TRUST_UNUSABLE, "of" => of).set(truth(reloads.unusable.is_some()));
    }
    let end = standing.trust.until;
    gauge!(CERTIFICATE_END).set(end.map_or(0.0, |end| between(Timestamp::UNIX_EPOCH, end)));
    let problems = health::problems(standing);
    for kind in health::Kind::ALL {
        for urgent in [true, false] {
            let told = problems
                .iter()
                .filter(|problem| problem.kind == kind && problem.urgent == urgent);
            let urgent = if urgent { "true" } else { "false" };
            gauge!(PROBLEMS, "kind" => kind.name(), "urgent" => urgent).set(count(told.count()));
        }
    }
    gauge!(CHAIN_LIMIT).set(f64::from(config.limits.max_chain));
    for (vm, depth) in &known.chains.figures {
        gauge!(CHAIN_DEPTH, "vm" => vm.clone()).set(count(*depth));
    }
    for pool in &known.pools.figures {
        gauge!(POOL_CAPACITY, "pool" => pool.name.clone()).set(bytes(pool.capacity));
        gauge!(POOL_AVAILABLE, "pool" => pool.name.clone()).set(bytes(pool.available));
    }
    for (of, age) in [("pools", known.pools.age()), ("chains", known.chains.age())] {
        if let Some(age) = age {
            gauge!(READING_AGE, "of" => of).set(age.as_secs_f64());
        }
    }
}

/// A number of bytes as Prometheus has numbers: exact up to 2^53.
#[expect(
    clippy::cast_precision_loss,
    reason = "Prometheus has no other numbers"
)]
fn bytes(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Size;

    #[test]
    fn what_is_as_it_is_now_is_shown_for_as_long_as_the_agent_is_asked() {
        const GONE: Duration = Duration::from_millis(20);
        let recorder = recorder(GONE).unwrap();
        let handle = recorder.handle();
        let standing = Standing {
            now: Timestamp::now(),
            journal: Some(Size {
                bytes: 4_096,
                free: 1 << 30,
            }),
            ..Standing::default()
        };
        let shown = || {
            metrics::with_local_recorder(&recorder, || {
                set(&standing, &Known::default(), &Config::default());
            });
            let text = handle.render();
            let all = METRICS.iter().filter(|it| it.kind == Kind::Gauge);
            all.map(|metric| metric.name)
                .filter(|name| text.contains(&format!("\n# TYPE {name} gauge\n{name}")))
                .collect::<Vec<_>>()
        };
        metrics::with_local_recorder(&recorder, begin);
        let first = shown();
        assert!(first.len() > 15 && first.contains(&STARTED), "{first:?}");
        for _ in 0..3 {
            std::thread::sleep(GONE * 2);
            assert_eq!(shown(), first);
        }
    }
}
