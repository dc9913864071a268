//! Files that are the same although their paths differ: through a link to a
//! folder or a file, a second name, or a second mount.
//!
//! Invariant: who uses a file is known by the file, not by how a definition
//! spells its path.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::fs::MetadataExt as _,
};

use crate::planning::facts::FileUser;

/// Device and inode: what tells files apart.
pub(super) type Identity = (u64, u64);

/// Whether two paths are of one file. Reads the file system.
pub(super) fn same(one: &str, other: &str) -> bool {
    one == other || identity(one).is_some_and(|one| identity(other) == Some(one))
}

pub(super) fn identity(path: &str) -> Option<Identity> {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Adds to each of `paths` the users that know the same file by another path.
/// Reads the file system: not for an async thread.
pub(super) fn unite(
    users: &mut BTreeMap<String, Vec<FileUser>>,
    paths: impl IntoIterator<Item = String>,
) {
    let mut known: BTreeMap<Identity, BTreeSet<FileUser>> = BTreeMap::new();
    for (path, list) in users.iter() {
        if let Some(identity) = identity(path) {
            known
                .entry(identity)
                .or_default()
                .extend(list.iter().cloned());
        }
    }
    for path in paths {
        let Some(all) = identity(&path).and_then(|identity| known.get(&identity)) else {
            continue;
        };
        let list = users.entry(path).or_default();
        for user in all {
            if !list.contains(user) {
                list.push(user.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_in_use_whatever_name_it_is_used_by() {
        let folder = std::env::temp_dir().join(format!("vmsnap-same-{}", uuid::Uuid::now_v7()));
        std::fs::create_dir_all(folder.join("real")).unwrap();
        std::os::unix::fs::symlink(folder.join("real"), folder.join("linked")).unwrap();
        let at = |name: &str| folder.join(name).display().to_string();
        for name in ["real/a", "real/free"] {
            std::fs::write(at(name), b"x").unwrap();
        }
        std::fs::hard_link(at("real/a"), at("real/second")).unwrap();
        let user = FileUser {
            vm: "web1".into(),
            snapshot: None,
        };
        let mut users = BTreeMap::from([
            (at("linked/a"), vec![user.clone()]),
            (at("gone"), vec![user.clone()]),
        ]);
        let asked = ["real/a", "real/second", "linked/../real/a", "real/free"];
        unite(&mut users, asked.map(at));
        for name in &asked[..3] {
            assert_eq!(users.get(&at(name)), Some(&vec![user.clone()]), "{name}");
        }
        assert_eq!(users.get(&at("real/free")), None);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
