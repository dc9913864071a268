use super::*;

#[track_caller]
fn is(code: u32, domain: u32, message: &str, kind: ErrorKind) {
    assert_eq!(
        classify(code, domain, message),
        kind,
        "E{code}/{domain} {message}"
    );
}

#[test]
fn a_lost_connection_is_told_by_the_rpc_domain_whatever_the_code() {
    is(
        38,
        7,
        "End of file while reading data: Input/output error",
        ErrorKind::ConnectionLost,
    );
    is(
        1,
        7,
        "internal error: connection closed due to keepalive timeout",
        ErrorKind::ConnectionLost,
    );
    is(
        1,
        7,
        "internal error: client socket is closed",
        ErrorKind::Unreachable,
    );
    is(
        38,
        7,
        "Failed to connect socket to '/var/run/libvirt/libvirt-sock': Connection refused",
        ErrorKind::Unreachable,
    );
    is(
        38,
        7,
        "Failed to connect socket to '/var/run/libvirt/libvirt-sock': Permission denied",
        ErrorKind::Denied,
    );
}

#[test]
fn what_is_missing_is_named() {
    is(
        42,
        10,
        "Domain not found: no domain with matching name 'x'",
        ErrorKind::NotFound(What::Domain),
    );
    is(
        72,
        10,
        "Domain snapshot not found: no domain snapshot with matching name 's'",
        ErrorKind::NotFound(What::Snapshot),
    );
    is(
        49,
        18,
        "Storage pool not found: no storage pool with matching name 'default'",
        ErrorKind::NotFound(What::Pool),
    );
    is(
        50,
        18,
        "Storage volume not found",
        ErrorKind::NotFound(What::Volume),
    );
    is(
        67,
        35,
        "unsupported configuration: no disk named 'vdz'",
        ErrorKind::NotFound(What::Disk),
    );
    is(
        9,
        10,
        "operation failed: image of disk 'vda' does not have internal snapshot 'z'",
        ErrorKind::NotFound(What::ImageSnapshot),
    );
    is(
        38,
        10,
        "failed to create image file '/x/y': No such file or directory",
        ErrorKind::MissingFile,
    );
    is(
        38,
        10,
        "missing existing file for disk vda: /x",
        ErrorKind::MissingFile,
    );
    is(
        38,
        18,
        "Cannot access storage file '/x' (as uid:64055, gid:64055): No such file or directory",
        ErrorKind::MissingFile,
    );
    is(
        38,
        18,
        "Cannot access backing file '/x' of storage file '/y'",
        ErrorKind::MissingFile,
    );
    is(
        38,
        18,
        "Cannot access storage file '/x' (as uid:1, gid:1): Permission denied",
        ErrorKind::Denied,
    );
}

#[test]
fn what_is_taken_is_taken_under_every_code() {
    is(
        9,
        20,
        "operation failed: domain moment i1 already exists",
        ErrorKind::AlreadyExists,
    );
    is(
        67,
        10,
        "unsupported configuration: external snapshot file for disk vda already exists and is not a block device: /x",
        ErrorKind::AlreadyExists,
    );
    is(
        9,
        10,
        "operation failed: snapshot-save job failed: Snapshot 'a' already exists in one or more devices",
        ErrorKind::AlreadyExists,
    );
    is(
        90,
        18,
        "storage volume 'a.qcow2' exists already",
        ErrorKind::AlreadyExists,
    );
}

#[test]
fn a_full_disk_is_told_by_its_words() {
    is(
        9,
        0,
        "operation failed: /usr/lib/libvirt/libvirt_iohelper: failure with /x: Unable to write /x: No space left on device",
        ErrorKind::NoSpace,
    );
    is(
        9,
        10,
        "operation failed: failed to format image: 'Could not write qcow2 header: No space left on device'",
        ErrorKind::NoSpace,
    );
}

#[test]
fn somebody_else_holding_it_is_busy_or_a_block_job() {
    is(
        68,
        0,
        "Timed out during operation: cannot acquire state change lock (held by monitor=remoteDispatchDomainSnapshotCreateXML)",
        ErrorKind::Busy,
    );
    is(
        83,
        10,
        "block copy still active: block job 'commit-vda-libvirt-6-format' not ready for pivot yet",
        ErrorKind::BlockJobNotReady,
    );
    is(
        83,
        10,
        "block copy still active: disk 'vda' already in active block job",
        ErrorKind::BlockJobActive,
    );
    is(
        84,
        10,
        "Operation not supported: cannot delete external snapshots when there is another active block job",
        ErrorKind::BlockJobActive,
    );
    is(
        55,
        10,
        "Requested operation is not valid: domain has active block job",
        ErrorKind::BlockJobActive,
    );
    is(
        8,
        10,
        "invalid argument: disk vda does not have an active block job",
        ErrorKind::InvalidArgument,
    );
    is(
        1,
        0,
        "internal error: Child process (/usr/bin/qemu-img resize x) unexpected exit status 1: qemu-img: Could not open 'x': Failed to get \"write\" lock\nIs another process using the image [x]?",
        ErrorKind::ImageLocked,
    );
}

#[test]
fn the_agents_failures_say_whether_the_command_may_still_land() {
    is(
        74,
        10,
        "argument unsupported: QEMU guest agent is not configured",
        ErrorKind::AgentUnavailable,
    );
    is(
        86,
        10,
        "Guest agent is not responding: QEMU guest agent is not connected",
        ErrorKind::AgentUnavailable,
    );
    is(
        112,
        10,
        "guest agent command timed out: guest agent didn't respond to command within '2' seconds",
        ErrorKind::AgentTimeout,
    );
    is(
        113,
        10,
        "guest agent command failed: unable to execute QEMU agent command 'guest-fsfreeze-freeze': Command guest-fsfreeze-freeze has been disabled: the agent is in frozen state",
        ErrorKind::GuestFrozen,
    );
    is(
        113,
        10,
        "guest agent command failed: unable to execute QEMU agent command 'guest-set-time'",
        ErrorKind::AgentFailed,
    );
}

#[test]
fn wrong_states_unsupported_calls_and_refused_arguments_are_told_apart() {
    is(
        55,
        10,
        "Requested operation is not valid: domain is not running",
        ErrorKind::InvalidState,
    );
    is(
        55,
        20,
        "Requested operation is not valid: domain is not running",
        ErrorKind::InvalidState,
    );
    is(
        1,
        12,
        "internal error: domain 'test' not running",
        ErrorKind::InvalidState,
    );
    is(
        9,
        20,
        "operation failed: domain is not running",
        ErrorKind::InvalidState,
    );
    is(
        55,
        18,
        "storage pool 'pp' is not active",
        ErrorKind::InvalidState,
    );
    is(
        55,
        10,
        "Requested operation is not valid: cannot migrate domain: Migration is disabled when \
         using feature 'peer mode' in device 'ivshmem'",
        ErrorKind::NotMigratable,
    );
    is(
        77,
        12,
        "revert requires force: snapshot 's3' lacks domain 'd1' rollback info",
        ErrorKind::Risky,
    );
    is(
        78,
        10,
        "operation aborted: job 'snapshot' canceled by client",
        ErrorKind::Aborted,
    );
    is(
        29,
        35,
        "operation forbidden: read only access prevents virDomainSnapshotCreateXML",
        ErrorKind::Denied,
    );
    is(
        8,
        12,
        "unsupported flags (0x10) in function testDomainSnapshotCreateXML",
        ErrorKind::Unsupported,
    );
    is(
        3,
        12,
        "this function is not supported by the connection driver: virDomainBlockCommit",
        ErrorKind::Unsupported,
    );
    is(
        67,
        10,
        "unsupported configuration: deletion of external children disk snapshots not supported",
        ErrorKind::Unsupported,
    );
    is(
        8,
        10,
        "invalid argument: commit of 'vda' active layer requires active flag",
        ErrorKind::InvalidArgument,
    );
    is(
        35,
        10,
        "invalid snapshot name 'a/b': name can't contain '/'",
        ErrorKind::InvalidArgument,
    );
    is(
        9,
        10,
        "operation failed: failed to read domain XML",
        ErrorKind::Other,
    );
}

#[test]
fn the_message_and_its_source_do_not_repeat_each_other() {
    let error = Error::new(
        "suspend",
        "domain web",
        Fault {
            kind: ErrorKind::Busy,
            libvirt: Some((68, 0)),
            detail: "cannot acquire state change lock".into(),
        },
    );
    assert_eq!(
        error.to_string(),
        "cannot suspend domain web: another operation is in the way"
    );
    let source = std::error::Error::source(&error).expect("the detail is the source");
    assert_eq!(
        source.to_string(),
        "cannot acquire state change lock (libvirt error 68, domain 0)"
    );
    assert!(!error.outcome_unknown());
}
