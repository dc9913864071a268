//! The snapshots of one VM as a tree.

use std::collections::{HashMap, HashSet};

use vmsnap_client::quantity::format_size;
use vmsnap_proto::v1;

use super::{Clock, Columns, words};
use crate::terminal::{Style, clean};

/// One line a snapshot, children under their parents. A snapshot whose parent is
/// not listed stands at the root; a circle, which only a broken peer could send,
/// is cut rather than followed.
pub fn snapshots(snapshots: &[v1::Snapshot], clock: &Clock, style: Style) -> String {
    let names: HashSet<&str> = snapshots
        .iter()
        .map(|snapshot| snapshot.name.as_str())
        .collect();
    let mut children: HashMap<&str, Vec<&v1::Snapshot>> = HashMap::new();
    for snapshot in snapshots {
        let parent = snapshot.parent.as_str();
        let parent = if names.contains(parent) { parent } else { "" };
        children.entry(parent).or_default().push(snapshot);
    }
    let mut columns = Columns::new(
        &[
            "SNAPSHOT",
            "KIND",
            "MEMORY",
            "CONSISTENCY",
            "STATE",
            "AGE",
            "SIZE",
            "HEALTH",
            "NOTES",
        ],
        &[5, 6],
    );
    let mut branches = Branches {
        children,
        seen: HashSet::new(),
        columns: &mut columns,
        clock,
        style,
    };
    branches.under("", "", true);
    columns.text()
}

struct Branches<'a> {
    children: HashMap<&'a str, Vec<&'a v1::Snapshot>>,
    seen: HashSet<&'a str>,
    columns: &'a mut Columns,
    clock: &'a Clock,
    style: Style,
}

impl<'a> Branches<'a> {
    fn under(&mut self, parent: &'a str, indent: &str, root: bool) {
        let siblings = self.children.get(parent).cloned().unwrap_or_default();
        for (at, snapshot) in siblings.iter().enumerate() {
            if !self.seen.insert(&snapshot.name) {
                continue;
            }
            let last = at + 1 == siblings.len();
            let (branch, below) = match (root, last) {
                (true, _) => ("", ""),
                (false, false) => (self.style.pick("├─ ", "|- "), self.style.pick("│  ", "|  ")),
                (false, true) => (self.style.pick("└─ ", "`- "), "   "),
            };
            self.columns
                .row(row(snapshot, &format!("{indent}{branch}"), self.clock));
            self.under(&snapshot.name, &format!("{indent}{below}"), false);
        }
    }
}

fn row(snapshot: &v1::Snapshot, branch: &str, clock: &Clock) -> [String; 9] {
    [
        format!("{branch}{}", clean(&snapshot.name)),
        words::<v1::SnapshotKind>(snapshot.kind),
        if snapshot.memory { "yes" } else { "no" }.to_owned(),
        words::<v1::Consistency>(snapshot.consistency),
        clean(super::or_dash(&snapshot.state)).into_owned(),
        clock.age(snapshot.created.as_ref()),
        format_size(snapshot.size_bytes),
        words::<v1::SnapshotHealth>(snapshot.health),
        notes(snapshot, clock),
    ]
}

/// What else is to be known of it, the most pressing first.
fn notes(snapshot: &v1::Snapshot, clock: &Clock) -> String {
    let mut notes = Vec::new();
    if snapshot.current {
        notes.push("current".to_owned());
    }
    if let Some(deadline) = &snapshot.guard_deadline {
        notes.push(format!(
            "reverts at {} unless confirmed",
            clock.time(Some(deadline))
        ));
    }
    if snapshot.protected {
        notes.push("protected".to_owned());
    }
    if !snapshot.ours {
        notes.push("foreign".to_owned());
    }
    if !snapshot.health_detail.is_empty() {
        notes.push(clean(&snapshot.health_detail).into_owned());
    } else if !snapshot.revertible {
        let because = clean(&snapshot.not_revertible_because);
        notes.push(if because.is_empty() {
            "not revertible".to_owned()
        } else {
            format!("not revertible: {because}")
        });
    }
    notes.join("; ")
}

#[cfg(test)]
mod tests {
    use prost_types::Timestamp;

    use super::*;

    const NOW: i64 = 1_800_000_000;

    fn snapshot(name: &str, parent: &str, age: i64) -> v1::Snapshot {
        v1::Snapshot {
            name: name.to_owned(),
            parent: parent.to_owned(),
            kind: v1::SnapshotKind::External.into(),
            consistency: v1::Consistency::Filesystem.into(),
            state: "running".to_owned(),
            created: Some(Timestamp {
                seconds: NOW - age,
                nanos: 0,
            }),
            health: v1::SnapshotHealth::Whole.into(),
            revertible: true,
            size_bytes: 1 << 20,
            ours: true,
            ..Default::default()
        }
    }

    fn family() -> Vec<v1::Snapshot> {
        vec![
            snapshot("base", "", 200_000),
            v1::Snapshot {
                memory: true,
                consistency: v1::Consistency::Memory.into(),
                protected: true,
                ..snapshot("before-upgrade", "base", 7_200)
            },
            v1::Snapshot {
                current: true,
                ..snapshot("after-upgrade", "before-upgrade", 90)
            },
            v1::Snapshot {
                ours: false,
                consistency: 0,
                health: v1::SnapshotHealth::DataMissing.into(),
                health_detail: "/pool/web1.old is not there".to_owned(),
                revertible: false,
                ..snapshot("by-hand", "base", 3_600)
            },
        ]
    }

    #[test]
    fn a_tree_is_drawn_with_lines_where_the_terminal_has_them() {
        assert_eq!(
            snapshots(&family(), &Clock::fixed(NOW), Style::unicode()),
            "\
SNAPSHOT             KIND      MEMORY  CONSISTENCY  STATE      AGE   SIZE  HEALTH        NOTES
base                 external  no      filesystem   running   2d7h  1 MiB  whole
├─ before-upgrade    external  yes     memory       running     2h  1 MiB  whole         protected
│  └─ after-upgrade  external  no      filesystem   running  1m30s  1 MiB  whole         current
└─ by-hand           external  no      -            running     1h  1 MiB  data missing  foreign; /pool/web1.old is not there
"
        );
    }

    #[test]
    fn a_tree_is_drawn_in_ascii_elsewhere() {
        let text = snapshots(&family(), &Clock::fixed(NOW), Style::ascii());
        assert!(text.is_ascii());
        assert!(text.contains("\n|- before-upgrade"));
        assert!(text.contains("\n|  `- after-upgrade"));
    }

    #[test]
    fn a_parent_that_is_not_listed_makes_a_root_and_a_circle_does_not_hang() {
        let lost = [snapshot("b", "gone", 1)];
        assert!(snapshots(&lost, &Clock::fixed(NOW), Style::ascii()).contains("\nb "));
        let circle = [snapshot("a", "b", 1), snapshot("b", "a", 1)];
        snapshots(&circle, &Clock::fixed(NOW), Style::ascii());
    }
}
