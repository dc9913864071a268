//! Certificates, keys, roots and roles, read anew while the agent runs.
//!
//! Invariants: files are read each second and when the agent is told to (SIGHUP),
//! and taken when their content changed and is the same a moment later: half a file
//! may give more rights than a whole one; what cannot be used, a key that is not the
//! certificate's among it, leaves what was there before in force, is logged once and
//! counted; a file of roles that vanished, or lost all its entries, is one that cannot
//! be used where it limits local callers, because without roles these would have all
//! rights. Streams that are open are told of new roles ([`Trust::news`]).

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_rustls::rustls::ServerConfig;

use super::{
    roles::{Roles, host_groups},
    tls::{Contents, Paths, Proof},
};
use crate::config::{Config, DEFAULT_ROLES};

/// How often the files are looked at.
const LOOK: Duration = Duration::from_millis(800);
/// How long what is new has to stay the same before it is taken.
const REST: Duration = Duration::from_millis(150);
/// How often that is waited for; what goes on changing is looked at next time.
const RESTS: usize = 4;
/// How long before its end a certificate is warned about.
pub const SOON: SignedDuration = SignedDuration::from_hours(14 * 24);

/// What is read anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// The agent's certificate and key, and the roots of its callers.
    Certificates,
    /// The file of roles.
    Roles,
}

impl Of {
    /// As in metrics and sentences.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Certificates => "certificates",
            Self::Roles => "roles",
        }
    }
}

/// How reading one of them anew goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reloads {
    /// What is read.
    pub of: Of,
    /// How often new files were taken.
    pub taken: u64,
    /// How often new files could not be used.
    pub refused: u64,
    /// Since when the files that are there cannot be used, and why; what was before
    /// them is in force.
    pub unusable: Option<(Timestamp, String)>,
}

/// How trust stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// What is read anew.
    pub reloads: Vec<Reloads>,
    /// Until when the agent's certificate is valid, where it has one.
    pub until: Option<Timestamp>,
}

/// Something that is read from files and kept while these cannot be used.
#[derive(Debug)]
struct Kept<C, T> {
    now: RwLock<Arc<T>>,
    tried: Mutex<Tried<C>>,
}

#[derive(Debug)]
struct Tried<C> {
    /// What was tried last, good or not, or why it could not even be read.
    contents: Result<C, String>,
    reloads: Reloads,
}

impl<C: PartialEq, T> Kept<C, T> {
    fn new(of: Of, contents: C, value: T) -> Self {
        Self {
            now: RwLock::new(Arc::new(value)),
            tried: Mutex::new(Tried {
                contents: Ok(contents),
                reloads: Reloads {
                    of,
                    taken: 0,
                    refused: 0,
                    unusable: None,
                },
            }),
        }
    }

    fn now(&self) -> Arc<T> {
        self.now
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn tried(&self) -> MutexGuard<'_, Tried<C>> {
        self.tried.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reloads(&self) -> Reloads {
        self.tried().reloads.clone()
    }

    /// Reads, and where that is new once more until it rests. `None` when nothing
    /// changed since the last try, or it still changes.
    fn settled(&self, read: impl Fn() -> Result<C, String>) -> Option<Result<C, String>> {
        let mut found = read();
        if self.tried().contents == found {
            return None;
        }
        for _ in 0..RESTS {
            std::thread::sleep(REST);
            let again = read();
            if again == found {
                return Some(found);
            }
            found = again;
        }
        None
    }

    /// Takes what was read if it is new and can be used. `None` when nothing
    /// changed since the last try.
    fn look(
        &self,
        read: Result<C, String>,
        understand: impl FnOnce(&C) -> Result<T, String>,
    ) -> Option<Result<Arc<T>, String>> {
        let mut tried = self.tried();
        if tried.contents == read {
            return None;
        }
        tried.contents = read;
        let value = match &tried.contents {
            Ok(contents) => understand(contents),
            Err(problem) => Err(problem.clone()),
        };
        let reloads = &mut tried.reloads;
        Some(match value {
            Ok(value) => {
                let value = Arc::new(value);
                *self.now.write().unwrap_or_else(PoisonError::into_inner) = value.clone();
                reloads.taken += 1;
                reloads.unusable = None;
                Ok(value)
            }
            Err(problem) => {
                let since = reloads.unusable.take().map(|(since, _)| since);
                reloads.refused += 1;
                reloads.unusable = Some((since.unwrap_or_else(Timestamp::now), problem.clone()));
                Err(problem)
            }
        })
    }
}

/// What trust stands on now.
#[derive(Debug)]
pub struct Trust {
    tls: Option<(Paths, Kept<Contents, Proof>)>,
    roles_path: PathBuf,
    roles: Kept<String, Roles>,
    news: watch::Sender<()>,
}

impl Trust {
    /// Reads everything for the first time.
    ///
    /// # Errors
    /// What cannot be used: then the agent does not start.
    pub fn open(config: &Config) -> Result<Arc<Self>, String> {
        let tls = match config.tls_paths() {
            None => None,
            Some(paths) => {
                let contents = paths.read()?;
                let proof = paths.understand(&contents)?;
                tell(&proof);
                Some((paths, Kept::new(Of::Certificates, contents, proof)))
            }
        };
        let roles_path = config.trust.roles.clone();
        let text = match std::fs::read_to_string(&roles_path) {
            Ok(text) => text,
            // Only a file that was named must be there.
            Err(error)
                if error.kind() == std::io::ErrorKind::NotFound
                    && (roles_path == Path::new(DEFAULT_ROLES)
                        || roles_path.as_os_str().is_empty()) =>
            {
                String::new()
            }
            Err(error) => return Err(unreadable(&roles_path, &error)),
        };
        let roles =
            Roles::parse(&text, &host_groups()).map_err(|problem| wrong(&roles_path, &problem))?;
        if tls.is_some() && roles.is_empty() {
            tracing::warn!(
                roles = %roles_path.display(),
                "no roles are given: every caller with a certificate will be denied"
            );
        }
        Ok(Arc::new(Self {
            tls,
            roles: Kept::new(Of::Roles, text, roles),
            roles_path,
            news: watch::Sender::new(()),
        }))
    }

    /// What connections are accepted with now; none where TLS is not served.
    #[must_use]
    pub fn server_config(&self) -> Option<Arc<ServerConfig>> {
        let (_, kept) = self.tls.as_ref()?;
        Some(kept.now().config.clone())
    }

    /// Who has which role now.
    #[must_use]
    pub fn roles(&self) -> Arc<Roles> {
        self.roles.now()
    }

    /// Changes whenever new roles came into force.
    #[must_use]
    pub fn news(&self) -> watch::Receiver<()> {
        self.news.subscribe()
    }

    /// How it stands.
    #[must_use]
    pub fn report(&self) -> Report {
        let mut report = Report::default();
        if let Some((_, kept)) = &self.tls {
            report.reloads.push(kept.reloads());
            report.until = Some(kept.now().until);
        }
        report.reloads.push(self.roles.reloads());
        report
    }

    /// Looks at the files, for ever.
    pub async fn keep(self: Arc<Self>) {
        let mut told = signal(SignalKind::hangup()).ok();
        loop {
            let hangup = async {
                match &mut told {
                    Some(told) => told.recv().await.is_some(),
                    None => std::future::pending().await,
                }
            };
            let told = tokio::select! {
                told = hangup => told,
                () = tokio::time::sleep(LOOK) => false,
            };
            let trust = self.clone();
            // Files may lie where reading takes its time.
            let looked = tokio::task::spawn_blocking(move || trust.look()).await;
            if told && matches!(looked, Ok(0)) {
                tracing::info!("told to read certificates and roles anew; none of them changed");
            }
        }
    }

    /// Looks at the files once; how many had changed. Waits for those that do.
    pub fn look(&self) -> u64 {
        let mut changed = 0;
        if let Some((paths, kept)) = &self.tls
            && let Some(read) = kept.settled(|| paths.read())
            && let Some(looked) = kept.look(read, |contents| paths.understand(contents))
        {
            changed += 1;
            match looked {
                Ok(proof) => tell(&proof),
                Err(problem) => tracing::error!(
                    %problem,
                    "new certificates cannot be used: the former ones stay in force"
                ),
            }
        }
        // An absent default file stays what it was.
        let read = || match std::fs::read_to_string(&self.roles_path) {
            Err(error)
                if error.kind() == std::io::ErrorKind::NotFound && self.roles().is_empty() =>
            {
                Ok(String::new())
            }
            other => other.map_err(|error| unreadable(&self.roles_path, &error)),
        };
        let understand = |text: &String| {
            let roles = Roles::parse(text, &host_groups());
            let roles = roles.map_err(|problem| wrong(&self.roles_path, &problem))?;
            if roles.is_empty() && !self.roles().leaves_host_to_the_socket() {
                return Err(wrong(&self.roles_path, EMPTIED));
            }
            Ok(roles)
        };
        if let Some(text) = self.roles.settled(read)
            && let Some(looked) = self.roles.look(text, understand)
        {
            changed += 1;
            match looked {
                Ok(roles) => {
                    tracing::info!(entries = roles.len(), "new roles are in force");
                    self.news.send_replace(());
                }
                Err(problem) => tracing::error!(
                    %problem,
                    "new roles cannot be used: the former ones stay in force"
                ),
            }
        }
        changed
    }
}

fn tell(proof: &Proof) {
    let names = proof.names.join(", ");
    tracing::info!(%names, until = %proof.until, "the agent's certificate is in force");
    let left = Timestamp::now().duration_until(proof.until);
    if left.is_negative() {
        tracing::error!(until = %proof.until, "the agent's certificate has expired");
    } else if left < SOON {
        tracing::warn!(until = %proof.until, "the agent's certificate expires soon");
    }
}

/// Why a file of roles is not taken that lost all its entries.
const EMPTIED: &str = "has no entry, which would give all callers on this host every right; keep an \
                       entry, or start the agent anew if that is meant";

fn unreadable(path: &Path, error: &std::io::Error) -> String {
    format!("trust.roles '{}' cannot be read: {error}", path.display())
}

fn wrong(path: &Path, problem: &str) -> String {
    format!("trust.roles '{}': {problem}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_used_leaves_what_was_there_and_is_tried_once() {
        let kept = Kept::new(Of::Roles, "1".to_owned(), 1_u32);
        let parse = |text: &String| text.parse::<u32>().map_err(|error| error.to_string());
        let told = || {
            let reloads = kept.reloads();
            (reloads.taken, reloads.refused, reloads.unusable)
        };
        assert!(kept.look(Ok("1".into()), parse).is_none());
        assert_eq!(told(), (0, 0, None));
        assert!(kept.look(Ok("x".into()), parse).unwrap().is_err());
        assert_eq!(*kept.now(), 1);
        assert!(kept.look(Ok("x".into()), parse).is_none());
        let (_, refused, unusable) = told();
        let since = unusable.unwrap().0;
        assert_eq!(refused, 1);
        assert!(kept.look(Err("gone".into()), parse).unwrap().is_err());
        assert!(kept.look(Err("gone".into()), parse).is_none());
        assert_eq!(*kept.now(), 1);
        // Since the first of them, for the reason of the last.
        assert_eq!(told(), (0, 2, Some((since, "gone".into()))));
        assert_eq!(*kept.look(Ok("2".into()), parse).unwrap().unwrap(), 2);
        assert_eq!(*kept.now(), 2);
        assert_eq!(told(), (1, 2, None));
    }
}
