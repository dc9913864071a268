//! The file of roles: who has which role over which VMs.
//!
//! ```toml
//! [[roles]]
//! role = "operator"
//! vms = ["web*", "db1"]
//! certificates = ["deploy.example.org"]
//! groups = ["vm-operators"]
//! ```
//!
//! Invariants: an unknown key, a role without VMs or without anybody, and a
//! pattern that is none are refused with their place; an empty file, or none, gives
//! nobody with a certificate a role, and whoever may open the socket all of them.

use std::collections::BTreeMap;

use glob::Pattern;
use serde::Deserialize;

use super::{
    access::{Access, Grant},
    audit::Auditor,
    peer::Peer,
    rights::Role,
};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    roles: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    role: Role,
    vms: Vec<String>,
    #[serde(default)]
    certificates: Vec<String>,
    #[serde(default)]
    uids: Vec<u32>,
    #[serde(default)]
    groups: Vec<Group>,
}

/// A group by name or number.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Group {
    Id(u32),
    Name(String),
}

#[derive(Debug)]
struct Rule {
    grant: Grant,
    certificates: Vec<String>,
    uids: Vec<u32>,
    groups: Vec<u32>,
}

/// Who has which role.
#[derive(Debug, Default)]
pub struct Roles(Vec<Rule>);

impl Roles {
    /// Understands a file of roles; `groups` are the ids of the host's groups by
    /// name.
    ///
    /// # Errors
    /// What is wrong, with its line or entry.
    pub fn parse(text: &str, groups: &BTreeMap<String, u32>) -> Result<Self, String> {
        let file: File = toml::from_str(text).map_err(|error| {
            let line = error
                .span()
                .map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            match line {
                Some(line) => format!("line {line}: {}", error.message()),
                None => error.message().to_owned(),
            }
        })?;
        let rules = file.roles.into_iter().zip(1..).map(|(entry, number)| {
            Self::rule(entry, groups).map_err(|problem| format!("roles entry {number}: {problem}"))
        });
        rules.collect::<Result<_, _>>().map(Self)
    }

    fn rule(entry: Entry, known: &BTreeMap<String, u32>) -> Result<Rule, String> {
        if entry.vms.is_empty() {
            return Err("vms is empty; name patterns are needed, \"*\" for all VMs".into());
        }
        if entry.certificates.is_empty() && entry.uids.is_empty() && entry.groups.is_empty() {
            return Err("names nobody; certificates, uids or groups are needed".into());
        }
        if entry.certificates.iter().any(|name| name.trim().is_empty()) {
            return Err("certificates has an empty name".into());
        }
        let vms = entry
            .vms
            .iter()
            .map(|pattern| {
                Pattern::new(pattern)
                    .map_err(|error| format!("vms: '{}' is no pattern: {error}", pattern))
            })
            .collect::<Result<_, _>>()?;
        let groups = entry
            .groups
            .into_iter()
            .map(|group| match group {
                Group::Id(id) => Ok(id),
                Group::Name(name) => known
                    .get(&name)
                    .copied()
                    .ok_or_else(|| format!("groups: the host has no group '{name}'")),
            })
            .collect::<Result<_, _>>()?;
        Ok(Rule {
            grant: Grant {
                role: entry.role,
                vms,
            },
            certificates: entry.certificates,
            uids: entry.uids,
            groups,
        })
    }

    /// How many entries there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What a peer may do.
    #[must_use]
    pub fn access(&self, peer: &Peer, auditor: &Auditor) -> Access {
        let grants = match peer {
            Peer::Certificate { names, .. } => self.matching(|rule| {
                let mut names = names.iter();
                names.any(|name| rule.certificates.contains(name))
            }),
            _ if self.leaves_host_to_the_socket() => vec![Grant {
                role: Role::Admin,
                vms: Pattern::new("*").into_iter().collect(),
            }],
            Peer::Socket { uid, groups } => self.matching(|rule| {
                uid.is_some_and(|uid| rule.uids.contains(&uid))
                    || groups.iter().any(|group| rule.groups.contains(group))
            }),
            // Nobody knows whose connection it is.
            Peer::Loopback { .. } => Vec::new(),
        };
        Access::new(peer.caller(), grants, auditor.clone())
    }

    /// Whether no entry is about people of this host: then whoever the socket's
    /// permissions let in may do everything.
    pub(super) fn leaves_host_to_the_socket(&self) -> bool {
        self.0
            .iter()
            .all(|rule| rule.uids.is_empty() && rule.groups.is_empty())
    }

    fn matching(&self, matches: impl Fn(&Rule) -> bool) -> Vec<Grant> {
        self.0
            .iter()
            .filter(|rule| matches(rule))
            .map(|rule| rule.grant.clone())
            .collect()
    }
}

/// The host's groups, from its group file.
#[must_use]
pub fn host_groups() -> BTreeMap<String, u32> {
    let text = std::fs::read_to_string("/etc/group").unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?.to_owned();
            Some((name, fields.nth(1)?.parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn roles(text: &str) -> Result<Roles, String> {
        let groups = BTreeMap::from([("operators".to_owned(), 70)]);
        Roles::parse(text, &groups)
    }

    fn certificate(names: &[&str]) -> Peer {
        Peer::Certificate {
            address: SocketAddr::from(([10, 0, 0, 1], 5)),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            until: jiff::Timestamp::MAX,
        }
    }

    fn socket(uid: u32, groups: &[u32]) -> Peer {
        Peer::Socket {
            uid: Some(uid),
            groups: groups.into(),
        }
    }

    #[test]
    fn without_entries_the_socket_may_do_everything_and_a_certificate_nothing() {
        let roles = Roles::default();
        let access = roles.access(&socket(7, &[]), &Auditor::unheard());
        assert_eq!(access.over("any"), Some(Role::Admin));
        assert!(access.sight().sees_all());
        let access = roles.access(&certificate(&["a"]), &Auditor::unheard());
        assert_eq!(access.highest(), None);
        assert!(!access.sight().sees("any"));
    }

    #[test]
    fn the_highest_role_of_all_that_match_holds_and_only_inside_their_patterns() {
        let roles = roles(
            "[[roles]]\nrole = 'viewer'\nvms = ['*']\ncertificates = ['a', 'b']\n\
             [[roles]]\nrole = 'admin'\nvms = ['web*', 'db[12]']\ncertificates = ['b']\n",
        )
        .unwrap();
        let b = roles.access(&certificate(&["x", "b"]), &Auditor::unheard());
        assert_eq!(b.over("web1"), Some(Role::Admin));
        assert_eq!(b.over("db2"), Some(Role::Admin));
        assert_eq!(b.over("db3"), Some(Role::Viewer));
        let a = roles.access(&certificate(&["a"]), &Auditor::unheard());
        assert_eq!(a.over("web1"), Some(Role::Viewer));
        // No entry is about people of this host.
        let local = roles.access(&socket(1, &[]), &Auditor::unheard());
        assert_eq!(local.over("web1"), Some(Role::Admin));
    }

    #[test]
    fn an_entry_for_a_user_or_a_group_ends_the_power_of_all_other_local_callers() {
        let roles = roles(
            "[[roles]]\nrole = 'operator'\nvms = ['*']\nuids = [1000]\ngroups = ['operators', 71]\n",
        )
        .unwrap();
        let over = |peer: &Peer| roles.access(peer, &Auditor::unheard()).over("x");
        assert_eq!(over(&socket(1000, &[])), Some(Role::Operator));
        assert_eq!(over(&socket(1, &[70])), Some(Role::Operator));
        assert_eq!(over(&socket(1, &[71])), Some(Role::Operator));
        assert_eq!(over(&socket(0, &[0])), None);
        let address = SocketAddr::from(([127, 0, 0, 1], 5));
        assert_eq!(over(&Peer::Loopback { address }), None);
    }

    #[test]
    fn a_file_that_cannot_be_meant_is_refused_with_its_place() {
        for (text, part) in [
            ("[[roles]]\nrole = 'root'\n", "line 2"),
            (
                "[[roles]]\nrole = 'admin'\nvms = ['*']\nuid = [1]\n",
                "line 4",
            ),
            (
                "[[roles]]\nrole = 'admin'\nvms = []\nuids = [1]\n",
                "entry 1: vms",
            ),
            ("[[roles]]\nrole = 'admin'\nvms = ['*']\n", "nobody"),
            (
                "[[roles]]\nrole = 'admin'\nvms = ['[']\nuids = [1]\n",
                "'[' is no pattern",
            ),
            (
                "[[roles]]\nrole = 'admin'\nvms = ['*']\ngroups = ['nosuch']\n",
                "no group 'nosuch'",
            ),
        ] {
            let problem = roles(text).unwrap_err();
            assert!(problem.contains(part), "{problem}");
        }
    }
}
