//! The table of rights: which role each RPC and each action needs.
//!
//! Invariants: every RPC of the contract is here (a test compares it with the
//! descriptors); `docs/trust.md` shows this table (another test compares them).

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::planning::request::{Action, Cleanup, IfExists, Orphans, Request};

/// What somebody may do. Each one may do all that those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads.
    Viewer,
    /// Makes restore points and goes back to them.
    Operator,
    /// Drops restore points, changes disks, decides for the host.
    Admin,
}

impl Role {
    /// All of them, the least first.
    pub const ALL: [Self; 3] = [Self::Viewer, Self::Operator, Self::Admin];

    /// As written in a configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

/// What a call needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// A role over some VM; what is given is what the caller may see.
    Seeing,
    /// This role over the VM that is named, or whose run is named.
    Over(Role),
    /// What the action on the VM needs.
    Action,
    /// Viewer over the VM; over all VMs for a plan of what is done over all.
    Plan,
    /// The first over the VM for a run of the caller's own, the second for
    /// another's.
    Run(Role, Role),
    /// This role over all VMs.
    Host(Role),
}

impl Needs {
    /// The least role without which it need not be tried.
    #[must_use]
    pub fn least(self) -> Role {
        match self {
            Self::Seeing | Self::Action | Self::Plan => Role::Viewer,
            Self::Over(role) | Self::Run(role, _) | Self::Host(role) => role,
        }
    }
}

impl fmt::Display for Needs {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Seeing => write!(out, "viewer; shows the VMs of the caller's patterns"),
            Self::Over(role) => write!(out, "{role} over the VM"),
            Self::Action => write!(out, "what the action needs, see below"),
            Self::Plan => write!(
                out,
                "viewer over the VM, and over all VMs where the action needs a role over all"
            ),
            Self::Run(own, other) => {
                write!(
                    out,
                    "{own} over the VM for a run of one's own, else {other}"
                )
            }
            Self::Host(role) => write!(out, "{role} over all VMs"),
        }
    }
}

/// One RPC.
#[derive(Debug, Clone, Copy)]
pub struct Right {
    /// Its service in `vmsnap.v1`.
    pub service: &'static str,
    /// Its name.
    pub method: &'static str,
    /// What it needs.
    pub needs: Needs,
    /// It answers with a stream.
    pub streams: bool,
}

impl Right {
    /// Whether it only reads, at once, so that it takes its turn among readers.
    #[must_use]
    pub fn reads(&self) -> bool {
        let changes = [
            "CancelWorkflow",
            "ConfirmWorkflow",
            "ResolveWorkflow",
            "RecordFix",
            "ForgetFix",
        ];
        !self.streams && !changes.contains(&self.method)
    }
}

const fn call(service: &'static str, method: &'static str, needs: Needs) -> Right {
    Right {
        service,
        method,
        needs,
        streams: false,
    }
}

const fn stream(service: &'static str, method: &'static str, needs: Needs) -> Right {
    Right {
        service,
        method,
        needs,
        streams: true,
    }
}

const WORKFLOW: &str = "WorkflowService";
const INVENTORY: &str = "InventoryService";
const ISSUES: &str = "KnownIssueService";
const AUDIT: &str = "AuditService";

/// Every RPC.
pub const RIGHTS: &[Right] = &[
    call(WORKFLOW, "PlanWorkflow", Needs::Plan),
    stream(WORKFLOW, "RunWorkflow", Needs::Action),
    stream(WORKFLOW, "WatchWorkflow", Needs::Over(Role::Viewer)),
    call(
        WORKFLOW,
        "CancelWorkflow",
        Needs::Run(Role::Operator, Role::Admin),
    ),
    call(WORKFLOW, "ConfirmWorkflow", Needs::Over(Role::Operator)),
    call(WORKFLOW, "ResolveWorkflow", Needs::Over(Role::Admin)),
    call(WORKFLOW, "GetWorkflow", Needs::Over(Role::Viewer)),
    call(WORKFLOW, "ListWorkflows", Needs::Seeing),
    call(WORKFLOW, "ListGuards", Needs::Seeing),
    call(INVENTORY, "GetHost", Needs::Seeing),
    // It names VMs and runs, also while libvirt does not tell which VMs there are.
    call(INVENTORY, "GetHealth", Needs::Host(Role::Viewer)),
    call(INVENTORY, "ListVms", Needs::Seeing),
    call(INVENTORY, "GetVm", Needs::Over(Role::Viewer)),
    call(INVENTORY, "ListSnapshots", Needs::Seeing),
    call(INVENTORY, "ListVolumes", Needs::Seeing),
    call(ISSUES, "ListKnownIssues", Needs::Seeing),
    call(ISSUES, "RecordFix", Needs::Host(Role::Admin)),
    call(ISSUES, "ForgetFix", Needs::Host(Role::Admin)),
    call(AUDIT, "ListAudit", Needs::Host(Role::Admin)),
    stream(AUDIT, "WatchAudit", Needs::Host(Role::Admin)),
];

/// Services that everybody may ask whom the transport lets in.
const OPEN: &[&str] = &[
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1.ServerReflection/",
    "/grpc.reflection.v1alpha.ServerReflection/",
];

/// The right to what a request's path names.
#[must_use]
pub fn of_path(path: &str) -> Option<&'static Right> {
    let (service, method) = path.strip_prefix("/vmsnap.v1.")?.split_once('/')?;
    RIGHTS
        .iter()
        .find(|right| right.service == service && right.method == method)
}

/// Whether a path is open to everybody.
#[must_use]
pub fn is_open(path: &str) -> bool {
    OPEN.iter().any(|prefix| path.starts_with(prefix))
}

/// What a run does, as far as rights tell it apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Deed {
    /// Lists.
    List,
    /// Lists, and starts the VM for that.
    ListStarting,
    /// Makes a snapshot.
    Create,
    /// Makes a snapshot, and deletes the one of that name.
    CreateReplacing,
    /// Goes back.
    Revert,
    /// Goes back, and drops what is in the way.
    RevertForcing,
    /// Confirms a guarded change.
    Confirm,
    /// Merges restore points away, or resizes a disk.
    Commit,
    /// Deletes snapshots, or the VM's own left-over volumes.
    Cleanup,
    /// Deletes volumes or files that are of no VM, and may be anybody's.
    CleanupBeyond,
}

/// Whether a clean-up reaches for what is not the VM's own.
fn reaches_beyond(cleanup: &Cleanup) -> bool {
    let own = |name: &String| {
        name.strip_prefix("{vm_name}")
            .is_some_and(|rest| rest.starts_with(['-', '.']))
    };
    cleanup.orphans == Orphans::Delete
        || cleanup
            .leftovers
            .as_ref()
            .is_some_and(|names| !names.iter().all(own))
}

impl Deed {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::List,
        Self::ListStarting,
        Self::Create,
        Self::CreateReplacing,
        Self::Revert,
        Self::RevertForcing,
        Self::Confirm,
        Self::Commit,
        Self::Cleanup,
        Self::CleanupBeyond,
    ];

    /// What a request would do.
    #[must_use]
    pub fn of(request: &Request) -> Self {
        match &request.action {
            Action::List(_) if request.start_if_stopped => Self::ListStarting,
            Action::List(_) => Self::List,
            Action::Create(create) if create.if_exists == IfExists::Replace => {
                Self::CreateReplacing
            }
            Action::Create(_) => Self::Create,
            Action::Revert(revert) if revert.force => Self::RevertForcing,
            Action::Revert(_) => Self::Revert,
            Action::Confirm { .. } => Self::Confirm,
            Action::Commit(_) => Self::Commit,
            Action::Cleanup(cleanup) if reaches_beyond(cleanup) => Self::CleanupBeyond,
            Action::Cleanup(_) => Self::Cleanup,
        }
    }

    /// What it needs over the VM.
    #[must_use]
    pub fn needs(self) -> Role {
        match self {
            Self::List => Role::Viewer,
            Self::ListStarting | Self::Create | Self::Revert | Self::Confirm => Role::Operator,
            Self::CreateReplacing
            | Self::RevertForcing
            | Self::Commit
            | Self::Cleanup
            | Self::CleanupBeyond => Role::Admin,
        }
    }

    /// Whether it needs that over all VMs.
    #[must_use]
    pub fn needs_all(self) -> bool {
        self == Self::CleanupBeyond
    }

    /// Its action.
    #[must_use]
    pub fn action(self) -> &'static str {
        let name = self.name();
        name.split(' ').next().unwrap_or(name)
    }

    /// As it is written in a request.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::List => "list",
            Self::ListStarting => "list with start_if_stopped",
            Self::Create => "create",
            Self::CreateReplacing => "create with if_exists: replace",
            Self::Revert => "revert",
            Self::RevertForcing => "revert with force",
            Self::Confirm => "confirm",
            Self::Commit => "commit",
            Self::Cleanup => "cleanup",
            Self::CleanupBeyond => {
                "cleanup with leftovers beyond {vm_name}-* and {vm_name}.*, or orphans: delete"
            }
        }
    }
}

impl fmt::Display for Deed {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;

    #[test]
    fn every_rpc_of_the_contract_stands_in_the_table_once_and_nothing_else_does() {
        let files = FileDescriptorSet::decode(vmsnap_proto::DESCRIPTORS).unwrap();
        let mut contract = BTreeSet::new();
        for file in files
            .file
            .iter()
            .filter(|file| file.package() == "vmsnap.v1")
        {
            for service in &file.service {
                for method in &service.method {
                    contract.insert((
                        service.name().to_owned(),
                        method.name().to_owned(),
                        method.server_streaming(),
                    ));
                }
            }
        }
        let table: BTreeSet<_> = RIGHTS
            .iter()
            .map(|right| {
                (
                    right.service.to_owned(),
                    right.method.to_owned(),
                    right.streams,
                )
            })
            .collect();
        assert_eq!(table.len(), RIGHTS.len());
        assert_eq!(table, contract);
    }

    #[test]
    fn a_path_has_the_right_of_its_rpc_and_no_other_path_has_one() {
        let path = "/vmsnap.v1.KnownIssueService/RecordFix";
        assert_eq!(of_path(path).unwrap().method, "RecordFix");
        for path in [
            "",
            "/",
            "/vmsnap.v1.WorkflowService/RecordFix",
            "/vmsnap.v1.KnownIssueService/RecordFix/",
            "/vmsnap.v1.KnownIssueService",
            "/vmsnap.v2.KnownIssueService/RecordFix",
        ] {
            assert!(of_path(path).is_none(), "{path}");
            assert!(!is_open(path), "{path}");
        }
        assert!(is_open("/grpc.health.v1.Health/Check"));
    }
}
