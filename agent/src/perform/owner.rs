//! Whose a new file is: that of the file whose place it takes, or that lies below.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};

use crate::planning::{Fault, Reason};

/// Gives a new file the owner and permissions of the one that it replaces.
///
/// # Errors
/// When that is not allowed.
pub(super) fn same(like: &str, file: &str) -> Result<(), Fault> {
    let set = || -> std::io::Result<()> {
        let model = std::fs::metadata(like)?;
        let present = std::fs::metadata(file)?;
        if (present.uid(), present.gid()) != (model.uid(), model.gid()) {
            chown(file, Some(model.uid()), Some(model.gid()))?;
        }
        std::fs::set_permissions(file, model.permissions())
    };
    set().map_err(|error| {
        Fault::new(
            Reason::StorageNotWritable,
            format!("'{file}' cannot be given the owner of '{like}': {error}"),
        )
        .with("path", file)
    })
}

/// Gives a new overlay the owner of an image below it, and the permissions, but
/// that its owner may write it: whoever keeps an image that stands still from
/// being written does not mean the overlay.
///
/// # Errors
/// When that is not allowed.
pub(super) fn of_below(below: &str, overlay: &str) -> Result<(), Fault> {
    same(below, overlay)?;
    let set = || -> std::io::Result<()> {
        let mut permissions = std::fs::metadata(overlay)?.permissions();
        permissions.set_mode(permissions.mode() | 0o600);
        std::fs::set_permissions(overlay, permissions)
    };
    set().map_err(|error| {
        Fault::new(
            Reason::StorageNotWritable,
            format!("'{overlay}' cannot be made writable for its owner: {error}"),
        )
        .with("path", overlay)
    })
}
