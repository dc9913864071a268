//! The daemon's life: open everything, recover, serve, stop in bounded time.
//!
//! Callers from the network are served by threads of their own.
//!
//! Invariants: nobody is served before interrupted runs are recovered; a stop
//! ends within `limits.shutdown` seconds and a little more.

use std::{net::SocketAddr, path::Path, time::Duration};

use tokio::signal::unix::{SignalKind, signal};
use tokio::{runtime::Handle, sync::watch};
use vmsnap_hypervisor::{Hypervisor, Options};

use crate::{
    api::{Endpoints, Handed},
    config::Config,
    journal::{Closing, Journal},
    logs,
    operate::{activation, metrics, notify::Notifier, scrape},
    planning::actions::kind::version,
    trust::{Auditor, Trust},
    workflows::Workflows,
};

/// How long streams may take to end once all runs are over.
const STREAMS: Duration = Duration::from_secs(5);
/// How far behind others the network's threads are, in steps of nice(2).
const BEHIND: i32 = 5;
/// How long threads may take to end once everything else is over.
const THREADS: Duration = Duration::from_secs(1);
/// How long closing the journal may take.
const CLOSE: Duration = Duration::from_secs(5);

fn runtime() -> Result<tokio::runtime::Runtime, String> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("no runtime: {error}"))
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// A sentence that says what kept it from serving.
pub fn serve(config: Config) -> Result<(), String> {
    logs::to_stderr(&config)?;
    let (runtime, network) = (runtime()?, network()?);
    let mut closing = None;
    let served = runtime.block_on(run(config, network.handle().clone(), &mut closing));
    // A thread that reads a large file, or waits for libvirt, does not hold up the end.
    runtime.shutdown_timeout(THREADS);
    network.shutdown_timeout(THREADS);
    // With the tasks the journal's handles are gone: its last records go where a
    // copy of the one file finds them.
    if let Some(closing) = closing {
        closing.wait(CLOSE);
    }
    served
}

/// Threads for callers from the network, a little behind all others: a flood there
/// takes no processor from runs and their guests.
fn network() -> Result<tokio::runtime::Runtime, String> {
    tokio::runtime::Builder::new_multi_thread()
        .thread_name("network")
        .on_thread_start(|| {
            if let Err(error) = rustix::process::nice(BEHIND) {
                tracing::warn!(%error, "the network's threads run beside all others");
            }
        })
        .enable_all()
        .build()
        .map_err(|error| format!("no runtime: {error}"))
}

/// Checks configuration, journal and libvirt; returns a report.
///
/// # Errors
/// A sentence that says what would keep it from serving.
pub fn check(config: Config) -> Result<String, String> {
    runtime()?.block_on(async {
        // What is missing is made when the agent starts, so the nearest that is
        // there tells.
        let there = config
            .journal
            .path
            .ancestors()
            .skip(1)
            .find(|it| it.exists());
        if let Some(folder) = there
            && !folder.is_dir()
        {
            return Err(format!("journal.path: '{}' is no folder", folder.display()));
        }
        if config.journal.path.exists() {
            Journal::probe(&config.journal.path).map_err(|error| error.to_string())?;
        }
        Trust::open(&config)?;
        let hypervisor = connect(&config).await?;
        let host = hypervisor.host().await.map_err(|error| {
            format!(
                "libvirt.uri '{}': {}",
                config.libvirt.uri,
                crate::faults::sentence(&error)
            )
        })?;
        Ok(format!(
            "configuration, journal and libvirt are fine: {} on {} with libvirt {} and {} {}",
            host.uri,
            host.hostname,
            version(host.libvirt_version),
            host.hypervisor,
            version(host.hypervisor_version),
        ))
    })
}

async fn connect(config: &Config) -> Result<Hypervisor, String> {
    let libvirt = &config.libvirt;
    let options = Options {
        read_deadline: Duration::from_secs(libvirt.read_timeout),
        effect_deadline: Duration::from_secs(libvirt.effect_timeout),
        release_deadline: Duration::from_secs(libvirt.release_timeout),
        // Five intervals without an answer end a connection: before a read is overdue.
        keepalive_interval: u32::try_from(libvirt.read_timeout / 6)
            .unwrap_or(u32::MAX)
            .max(1),
        ..Options::for_uri(&libvirt.uri)
    };
    Hypervisor::connect(options).await.map_err(|error| {
        format!(
            "libvirt.uri '{}': {}",
            libvirt.uri,
            crate::faults::sentence(&error)
        )
    })
}

async fn run(config: Config, network: Handle, closing: &mut Option<Closing>) -> Result<(), String> {
    let manager = Notifier::from_environment();
    let starting = manager.starting();
    let handed = activation::take()?;
    let path = &config.journal.path;
    if let Some(folder) = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
    {
        std::fs::create_dir_all(folder)
            .map_err(|error| format!("journal.path: '{}': {error}", folder.display()))?;
    }
    let trust = Trust::open(&config)?;
    // The sockets first: they also tell whether another agent is alive, whose
    // journal must not be recovered under its feet.
    let sockets = Handed {
        unix: handed.unix,
        tcp: handed.tcp,
    };
    let endpoints = Endpoints::open(&config, sockets).await?;
    let metrics = match scrape::Endpoint::open(&config, handed.metrics).await? {
        // Before anything is counted.
        Some(endpoint) => Some((endpoint, metrics::install()?)),
        None => None,
    };
    let _owner = own(path)?;
    let journal = Journal::open(path).map_err(|error| error.to_string())?;
    *closing = Some(journal.closing());
    let hypervisor = connect(&config).await?;
    let host = hypervisor
        .host()
        .await
        .map_err(|error| crate::faults::sentence(&error))?;
    tracing::info!(
        uri = %host.uri,
        libvirt = %version(host.libvirt_version),
        hypervisor = %host.hypervisor,
        hypervisor_version = %version(host.hypervisor_version),
        "connected"
    );
    let auditor = Auditor::new(journal.clone());
    let shutdown = Duration::from_secs(config.limits.shutdown);
    let workflows = Workflows::new(hypervisor, journal, trust.clone(), config);
    let recovered = workflows
        .recover()
        .await
        .map_err(|fault| fault.to_string())?;
    if recovered > 0 {
        tracing::warn!(runs = recovered, "interrupted runs were recovered");
    }
    let bound = endpoints.bound();
    tracing::info!(
        socket = bound.socket.as_deref().unwrap_or("none"),
        tcp = %shown(bound.tcp),
        tls = %shown(bound.tls),
        metrics = %metrics
            .as_ref()
            .map_or_else(|| "none".to_owned(), |(endpoint, _)| endpoint.address()),
        "serving"
    );

    tokio::spawn(workflows.clone().keep_guards());
    tokio::spawn(workflows.clone().keep_audit_short());
    tokio::spawn(trust.keep());
    tokio::spawn(auditor.clone().keep());
    tokio::spawn(workflows.clone().keep_journal());
    tokio::spawn(workflows.clone().keep_stuck());
    if let Some((endpoint, handle)) = metrics {
        tokio::spawn(endpoint.serve(workflows.clone(), handle));
    }
    let (stop, stopped) = watch::channel(false);
    let mut serving = tokio::spawn({
        let (workflows, auditor) = (workflows.clone(), auditor.clone());
        async move {
            let serving = endpoints.serve(workflows, auditor, &network, stopped);
            serving.await
        }
    });
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| error.to_string())?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| error.to_string())?;
    drop(starting);
    manager.ready();
    tokio::spawn(manager.clone().keep(workflows.clone()));
    tokio::select! {
        ended = &mut serving => {
            return match ended {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(format!("serving failed: {error}")),
                Err(error) => Err(format!("serving failed: {error}")),
            };
        }
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    manager.stopping(shutdown);
    let left = workflows.shut_down().await;
    if left > 0 {
        tracing::error!(
            runs = left,
            "runs are still going on; they are recovered at the next start"
        );
    }
    stop.send_replace(true);
    if tokio::time::timeout(STREAMS, serving).await.is_err() {
        tracing::info!("streams that were still open are cut");
    }
    auditor.flush().await;
    Ok(())
}

fn shown(address: Option<SocketAddr>) -> String {
    address.map_or_else(|| "none".to_owned(), |address| address.to_string())
}

/// Takes the lock that says whose journal this is.
fn own(journal: &Path) -> Result<std::fs::File, String> {
    let path = journal.with_extension("lock");
    let file = std::fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|error| format!("journal.path: '{}': {error}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(format!(
            "journal.path: another agent has '{}' open; stop it first",
            journal.display()
        )),
        Err(std::fs::TryLockError::Error(error)) => {
            Err(format!("journal.path: '{}': {error}", path.display()))
        }
    }
}
