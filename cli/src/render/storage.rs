//! A pool and its volumes.

use std::fmt::Write as _;

use vmsnap_client::quantity::format_size;
use vmsnap_proto::v1;

use super::{Columns, list, or_dash};
use crate::terminal::clean;

/// The pool on one line, a line a volume, a line an orphan.
pub fn storage(storage: &v1::Storage) -> String {
    let mut text = String::new();
    if let Some(pool) = &storage.pool {
        let _ = writeln!(
            text,
            "{}  {}{}  {}  {} of {} free\n",
            clean(&pool.name),
            or_dash(&pool.r#type),
            if pool.active { "" } else { ", not active" },
            clean(or_dash(&pool.path)),
            format_size(pool.available_bytes),
            format_size(pool.capacity_bytes),
        );
    }
    let mut columns = Columns::new(
        &[
            "VOLUME",
            "FORMAT",
            "CAPACITY",
            "ON DISK",
            "USED BY",
            "BACKED BY",
        ],
        &[2, 3],
    );
    for volume in &storage.volumes {
        columns.row([
            clean(&volume.name).into_owned(),
            or_dash(&volume.format).to_owned(),
            format_size(volume.capacity_bytes),
            format_size(volume.allocation_bytes),
            clean(or_dash(&list(&volume.used_by))).into_owned(),
            clean(or_dash(&volume.backing_path)).into_owned(),
        ]);
    }
    text.push_str(&columns.text());
    for orphan in &storage.orphans {
        let maker = if orphan.ours {
            "made by this agent"
        } else {
            "not made by this agent"
        };
        let _ = writeln!(
            text,
            "orphan {} ({}, {maker})",
            clean(&orphan.path),
            format_size(orphan.size_bytes)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_say_who_uses_them() {
        let text = storage(&v1::Storage {
            pool: Some(v1::Pool {
                name: "default".to_owned(),
                active: true,
                r#type: "dir".to_owned(),
                path: "/pool".to_owned(),
                capacity_bytes: 100 << 30,
                available_bytes: 40 << 30,
                ..Default::default()
            }),
            volumes: vec![v1::Volume {
                name: "web1.qcow2".to_owned(),
                format: "qcow2".to_owned(),
                capacity_bytes: 20 << 30,
                allocation_bytes: 2 << 30,
                used_by: vec!["web1".to_owned(), "web2".to_owned()],
                ..Default::default()
            }],
            orphans: Vec::new(),
        });
        assert_eq!(
            text,
            "\
default  dir  /pool  40 GiB of 100 GiB free

VOLUME      FORMAT  CAPACITY  ON DISK  USED BY     BACKED BY
web1.qcow2  qcow2     20 GiB    2 GiB  web1, web2  -
"
        );
    }
}
