//! Block jobs, and the size of running domains' disks.
//!
//! Invariants: sizes are bytes and bandwidths bytes per second, everywhere; a
//! merge that is not ready is not pivoted.

use std::{ffi::CString, fmt};

use virt::sys;

use crate::{
    connection::Hypervisor,
    error::{Error, ErrorKind, Fault},
};

/// Kind of a block job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockJobKind {
    /// Pull from a backing image.
    Pull,
    /// Copy to another place.
    Copy,
    /// Merge of an inner image.
    Commit,
    /// Merge of the active image, which has to pivot.
    ActiveCommit,
    /// Backup.
    Backup,
    /// Something else.
    Other,
}

impl fmt::Display for BlockJobKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pull => "pull",
            Self::Copy => "copy",
            Self::Commit => "commit",
            Self::ActiveCommit => "active-commit",
            Self::Backup => "backup",
            Self::Other => "unknown job",
        })
    }
}

/// An open block job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockJob {
    /// Kind.
    pub kind: BlockJobKind,
    /// Bytes done.
    pub cur: u64,
    /// Bytes in all; an active merge is ready when both are equal.
    pub end: u64,
}

/// A string for C.
///
/// # Errors
/// When it holds a NUL.
pub(crate) fn c_string(text: &str) -> Result<CString, Fault> {
    CString::new(text).map_err(|_| {
        Fault::new(
            ErrorKind::InvalidArgument,
            "a name or path holds a NUL byte",
        )
    })
}

fn check(result: i32) -> Result<(), Fault> {
    if result < 0 {
        Err(Fault::last())
    } else {
        Ok(())
    }
}

impl Hypervisor {
    /// The block job on a disk; `None` when there is none.
    ///
    /// # Errors
    /// When the domain is off, or libvirt does not answer.
    pub async fn block_job(&self, name: &str, disk: &str) -> Result<Option<BlockJob>, Error> {
        let disk = disk.to_owned();
        self.read_domain("read the block job of", name, move |domain| {
            let disk = c_string(&disk)?;
            // SAFETY: plain integers, for which zero is a value.
            let mut info: sys::virDomainBlockJobInfo = unsafe { std::mem::zeroed() };
            // SAFETY: the handle is alive, the string ends with NUL, the struct
            // is a local.
            let found = unsafe {
                sys::virDomainGetBlockJobInfo(domain.as_ptr(), disk.as_ptr(), &raw mut info, 0)
            };
            check(found)?;
            let kind = match u32::try_from(info.type_) {
                Ok(sys::VIR_DOMAIN_BLOCK_JOB_TYPE_PULL) => BlockJobKind::Pull,
                Ok(sys::VIR_DOMAIN_BLOCK_JOB_TYPE_COPY) => BlockJobKind::Copy,
                Ok(sys::VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT) => BlockJobKind::Commit,
                Ok(sys::VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT) => BlockJobKind::ActiveCommit,
                Ok(sys::VIR_DOMAIN_BLOCK_JOB_TYPE_BACKUP) => BlockJobKind::Backup,
                _ => BlockJobKind::Other,
            };
            Ok((found > 0).then_some(BlockJob {
                kind,
                cur: info.cur,
                end: info.end,
            }))
        })
        .await
    }

    /// Begins to merge a disk's active image into `base`, an image below it, at
    /// `bandwidth` bytes per second at most. The job then keeps both alike until
    /// somebody ends it: [`Self::block_job_abort`].
    ///
    /// # Errors
    /// [`ErrorKind::BlockJobActive`] when there is a job already; when `base` is
    /// not in the chain or cannot be written.
    pub async fn block_commit(
        &self,
        name: &str,
        disk: &str,
        base: &str,
        bandwidth: u64,
    ) -> Result<(), Error> {
        let (disk, base) = (disk.to_owned(), base.to_owned());
        self.effect("merge a disk of", name, move |domain| {
            let (disk, base) = (c_string(&disk)?, c_string(&base)?);
            let bandwidth = std::ffi::c_ulong::try_from(bandwidth).unwrap_or(0);
            // SAFETY: the handle is alive, the strings end with NUL, and no top
            // means the active image.
            check(unsafe {
                sys::virDomainBlockCommit(
                    domain.as_ptr(),
                    disk.as_ptr(),
                    base.as_ptr(),
                    std::ptr::null(),
                    bandwidth,
                    sys::VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
                        | sys::VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES,
                )
            })
        })
        .await
    }

    /// Ends a block job: by a pivot to what it made, or by giving it up.
    ///
    /// # Errors
    /// [`ErrorKind::BlockJobNotReady`] for a pivot that comes too early.
    pub async fn block_job_abort(&self, name: &str, disk: &str, pivot: bool) -> Result<(), Error> {
        let disk = disk.to_owned();
        let flags = if pivot {
            sys::VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT
        } else {
            0
        };
        self.release("end the block job of", name, move |domain| {
            let disk = c_string(&disk)?;
            // SAFETY: the handle is alive, the string ends with NUL.
            check(unsafe { sys::virDomainBlockJobAbort(domain.as_ptr(), disk.as_ptr(), flags) })
        })
        .await
    }

    /// Limits a block job to so many bytes per second.
    ///
    /// # Errors
    /// When there is none.
    pub async fn block_job_speed(&self, name: &str, disk: &str, bytes: u64) -> Result<(), Error> {
        let disk = disk.to_owned();
        self.release("limit the block job of", name, move |domain| {
            let disk = c_string(&disk)?;
            // SAFETY: the handle is alive, the string ends with NUL.
            check(unsafe {
                sys::virDomainBlockJobSetSpeed(
                    domain.as_ptr(),
                    disk.as_ptr(),
                    bytes,
                    sys::VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES,
                )
            })
        })
        .await
    }

    /// Changes the size of a running domain's disk; libvirt shrinks without a
    /// question, so callers compare before.
    ///
    /// # Errors
    /// When the domain is off, or QEMU refuses.
    pub async fn block_resize(&self, name: &str, disk: &str, bytes: u64) -> Result<(), Error> {
        let disk = disk.to_owned();
        self.effect("resize a disk of", name, move |domain| {
            Ok(domain.block_resize(&disk, bytes, sys::VIR_DOMAIN_BLOCK_RESIZE_BYTES)?)
        })
        .await
    }
}
