//! The audit trail.

use vmsnap_proto::v1;

use super::{Clock, Columns, or_dash, words};
use crate::terminal::clean;

/// One line an entry, the oldest first.
pub fn table(entries: &[v1::AuditEntry], clock: &Clock) -> String {
    let mut columns = Columns::new(
        &[
            "TIME", "BY", "FROM", "CALL", "VM", "SNAPSHOT", "RESULT", "REASON", "RUN",
        ],
        &[],
    );
    for entry in entries {
        columns.row(cells(entry, clock));
    }
    columns.text()
}

/// One entry on one line, for who follows.
pub fn line(entry: &v1::AuditEntry, clock: &Clock) -> String {
    let cells = cells(entry, clock);
    let mut line = cells
        .iter()
        .map(|cell| cell.trim())
        .collect::<Vec<_>>()
        .join("  ");
    line.push('\n');
    line
}

fn cells(entry: &v1::AuditEntry, clock: &Clock) -> [String; 9] {
    let caller = entry.caller.clone().unwrap_or_default();
    let call = if entry.action.is_empty() {
        entry.method.clone()
    } else {
        entry.action.clone()
    };
    let from = if caller.address.is_empty() {
        caller.transport
    } else {
        caller.address
    };
    let result = words::<v1::AuditResult>(entry.result);
    let result = if entry.times > 1 {
        format!("{result} x{}", entry.times)
    } else {
        result
    };
    let own = |text: &str| clean(or_dash(text)).into_owned();
    [
        clock.time(entry.time.as_ref()),
        own(&caller.identity),
        own(&from),
        own(&call),
        own(&entry.vm_name),
        own(&entry.snapshot_name),
        result,
        own(&entry.reason),
        own(&entry.workflow_id),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> v1::AuditEntry {
        v1::AuditEntry {
            sequence: 7,
            caller: Some(v1::Caller {
                identity: "mallory\u{1b}[2J".to_owned(),
                transport: "tls".to_owned(),
                address: "10.0.0.9:5".to_owned(),
            }),
            method: "RunWorkflow".to_owned(),
            action: "cleanup".to_owned(),
            vm_name: "db1".to_owned(),
            result: v1::AuditResult::Denied as i32,
            reason: "NOT_ALLOWED".to_owned(),
            times: 12,
            ..Default::default()
        }
    }

    #[test]
    fn a_denial_says_who_from_where_what_on_which_vm_and_how_often() {
        let text = table(&[entry()], &Clock::fixed(0));
        let line = text.lines().nth(1).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(
            words[words.len() - 8..],
            [
                "10.0.0.9:5",
                "cleanup",
                "db1",
                "-",
                "denied",
                "x12",
                "NOT_ALLOWED",
                "-"
            ]
        );
        assert!(words[0].starts_with("mallory"), "{line}");
        assert!(!text.contains('\u{1b}'));
        assert_eq!(super::line(&entry(), &Clock::fixed(0)).lines().count(), 1);
    }
}
