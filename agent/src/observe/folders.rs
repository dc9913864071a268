//! Folders in which files of VMs lie: names, free space, kind of file system.
//!
//! Invariant: read as the agent's own user; a folder that cannot be read is
//! absent, and the plan says so.

use std::{collections::BTreeSet, path::Path};

use rustix::fs::{Access, StatVfsMountFlags, access, stat, statfs, statvfs};

use crate::planning::facts::Folder;

/// File system types whose files other hosts may use: NFS, CIFS, SMB2, Ceph,
/// GFS2, OCFS2, Lustre, AFS, 9p and FUSE (GlusterFS, sshfs), by `statfs(2)`.
const NETWORK: [u64; 10] = [
    0x6969,
    0xFF53_4D42,
    0xFE53_4D42,
    0x00C3_6400,
    0x0116_1970,
    0x7461_636F,
    0x0BD0_0BD0,
    0x5346_414F,
    0x0102_1997,
    0x6573_5546,
];

/// Reads one folder.
#[must_use]
pub fn read(path: &str, pool: Option<String>) -> Option<Folder> {
    let names: BTreeSet<String> = std::fs::read_dir(Path::new(path))
        .ok()?
        .filter_map(Result::ok)
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    let space = statvfs(path).ok()?;
    let kind = statfs(path).ok()?.f_type;
    #[expect(clippy::cast_sign_loss, reason = "a magic number is a bit pattern")]
    let kind = (kind as u64) & 0xFFFF_FFFF;
    Some(Folder {
        names,
        free: space.f_bavail.saturating_mul(space.f_frsize),
        capacity: space.f_blocks.saturating_mul(space.f_frsize),
        device: stat(path).ok()?.st_dev,
        network: NETWORK.contains(&kind),
        writable: !space.f_flag.contains(StatVfsMountFlags::RDONLY),
        denied: access(path, Access::WRITE_OK | Access::EXEC_OK).is_err(),
        pool,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_tells_its_names_and_free_space_and_a_missing_one_is_absent() {
        let path = std::env::temp_dir().join(format!("vmsnap-folder-{}", uuid::Uuid::now_v7()));
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("a.qcow2"), b"x").unwrap();
        let folder = read(path.to_str().unwrap(), None).unwrap();
        assert!(folder.names.contains("a.qcow2"));
        assert!(folder.free > 0 && folder.capacity >= folder.free);
        assert!(folder.device != 0);
        assert!(folder.writable && !folder.denied && !folder.network);
        std::fs::remove_dir_all(&path).unwrap();
        assert_eq!(read(path.to_str().unwrap(), None), None);
    }
}
