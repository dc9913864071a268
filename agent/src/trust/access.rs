//! What one caller may see and do.

use std::sync::Arc;

use glob::Pattern;

use super::{
    audit::{Auditor, Denied},
    rights::{Deed, Needs, Right, Role},
};
use crate::{
    journal::Caller,
    planning::{Fault, Reason},
};

/// A role over the VMs whose names match a pattern.
#[derive(Debug, Clone)]
pub struct Grant {
    /// The role.
    pub role: Role,
    /// The names; `*` stands for all.
    pub vms: Vec<Pattern>,
}

impl Grant {
    fn covers(&self, vm: &str) -> bool {
        self.vms.iter().any(|pattern| pattern.matches(vm))
    }

    fn covers_all(&self) -> bool {
        self.vms.iter().any(|pattern| pattern.as_str() == "*")
    }
}

/// Which VMs somebody may see. The default sees all.
#[derive(Debug, Clone, Default)]
pub struct Sight(Option<Arc<[Grant]>>);

impl Sight {
    /// Whether a VM of this name would be seen.
    #[must_use]
    pub fn sees(&self, vm: &str) -> bool {
        match &self.0 {
            None => true,
            Some(grants) => grants.iter().any(|grant| grant.covers(vm)),
        }
    }

    /// Whether no name is hidden.
    #[must_use]
    pub fn sees_all(&self) -> bool {
        match &self.0 {
            None => true,
            Some(grants) => grants.iter().any(Grant::covers_all),
        }
    }
}

/// What one caller may see and do; goes with each call.
#[derive(Debug, Clone)]
pub struct Access {
    caller: Caller,
    grants: Arc<[Grant]>,
    auditor: Auditor,
}

impl Access {
    /// Of a caller with these grants; what he is denied is written down.
    #[must_use]
    pub fn new(caller: Caller, grants: Vec<Grant>, auditor: Auditor) -> Self {
        Self {
            caller,
            grants: grants.into(),
            auditor,
        }
    }

    /// Who is calling.
    #[must_use]
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// Which VMs he may see.
    #[must_use]
    pub fn sight(&self) -> Sight {
        Sight(Some(self.grants.clone()))
    }

    /// Where what he does is written down.
    #[must_use]
    pub fn auditor(&self) -> &Auditor {
        &self.auditor
    }

    /// His highest role over any VM.
    #[must_use]
    pub fn highest(&self) -> Option<Role> {
        self.grants.iter().map(|grant| grant.role).max()
    }

    /// His role over a VM of this name; none when he may not see it.
    #[must_use]
    pub fn over(&self, vm: &str) -> Option<Role> {
        let covering = self.grants.iter().filter(|grant| grant.covers(vm));
        covering.map(|grant| grant.role).max()
    }

    /// His role over all VMs.
    fn over_all(&self) -> Option<Role> {
        let all = self.grants.iter().filter(|grant| grant.covers_all());
        all.map(|grant| grant.role).max()
    }

    /// The gate: whether a call need be looked at at all.
    ///
    /// # Errors
    /// [`Reason::NotAllowed`], written down.
    pub fn may_try(&self, right: &Right) -> Result<(), Fault> {
        let has = match right.needs {
            Needs::Host(_) => self.over_all(),
            _ => self.highest(),
        };
        if has >= Some(right.needs.least()) {
            return Ok(());
        }
        let (asked, needs) = (right.method, right.needs.least());
        let fault = match (self.highest(), right.needs) {
            (None, _) => self.without_role(),
            (Some(_), Needs::Host(role)) => self.not_allowed(format!(
                "{asked} needs the role {role} over all VMs, and {} has {}",
                self.shown(),
                has.map_or_else(
                    || "no role over all of them".to_owned(),
                    |has| format!("{has} over them")
                ),
            )),
            (Some(has), _) => self.not_allowed(format!(
                "{asked} needs the role {needs}, and {} is {has}",
                self.shown()
            )),
        }
        .with("needs", needs);
        self.denied(asked, "", "", &fault);
        Err(fault)
    }

    /// Whether the caller may do what needs `role` over a VM that he sees.
    ///
    /// # Errors
    /// [`Reason::NotAllowed`], written down.
    pub fn allows(&self, method: &'static str, role: Role, vm: &str) -> Result<(), Fault> {
        self.allows_as(method, method, "", role, vm)
    }

    /// The same for what a run does.
    ///
    /// # Errors
    /// [`Reason::NotAllowed`], written down.
    pub fn allows_deed(&self, method: &'static str, deed: Deed, vm: &str) -> Result<(), Fault> {
        let role = deed.needs();
        if deed.needs_all() && self.over(vm) >= Some(role) && self.over_all() < Some(role) {
            let what = deed.to_string();
            return Err(self.not_over_all(method, deed, &what, role, vm));
        }
        self.allows_as(method, deed.name(), deed.action(), role, vm)
    }

    /// Whether the caller may see the plan of what a run does: one that reaches beyond
    /// the VM tells of volumes that may be anybody's.
    ///
    /// # Errors
    /// [`Reason::NotAllowed`], written down.
    pub fn allows_plan(&self, method: &'static str, deed: Deed, vm: &str) -> Result<(), Fault> {
        let role = Role::Viewer;
        if deed.needs_all() && self.over(vm).is_some() && !self.sight().sees_all() {
            let what = format!("a plan of {deed}");
            return Err(self.not_over_all(method, deed, &what, role, vm));
        }
        self.allows(method, role, vm)
    }

    /// Refuses what reaches beyond the VM, and writes that down.
    fn not_over_all(
        &self,
        method: &'static str,
        deed: Deed,
        what: &str,
        role: Role,
        vm: &str,
    ) -> Fault {
        let fault = self
            .not_allowed(format!(
                "{what} needs the role {role} over all VMs, and {} has it over some",
                self.shown()
            ))
            .with("needs", role)
            .with("vm", vm);
        self.denied(method, deed.action(), vm, &fault);
        fault
    }

    fn allows_as(
        &self,
        method: &'static str,
        what: &str,
        action: &str,
        role: Role,
        vm: &str,
    ) -> Result<(), Fault> {
        let has = self.over(vm);
        if has >= Some(role) {
            return Ok(());
        }
        let fault = self
            .not_allowed(format!(
                "{what} needs the role {role} over VM '{}', and {} {}",
                vm.escape_debug(),
                self.shown(),
                has.map_or_else(|| "has none".to_owned(), |has| format!("is {has}")),
            ))
            .with("needs", role)
            .with("vm", vm);
        self.denied(method, action, vm, &fault);
        Err(fault)
    }

    /// Whether the caller still has the right to a stream that he opened, about a VM
    /// where it is about one.
    ///
    /// # Errors
    /// [`Reason::NotAllowed`], written down.
    pub fn keeps(&self, right: &Right, vm: Option<&str>) -> Result<(), Fault> {
        self.may_try(right)?;
        match vm {
            Some(vm) => self.allows_as(right.method, "watching a run", "", Role::Viewer, vm),
            None => Ok(()),
        }
    }

    /// Writes down that something was asked for that is hidden from the caller.
    pub fn hidden(&self, method: &'static str, action: &str, vm: &str, answer: Reason) {
        self.auditor.denied(
            &self.caller,
            Denied {
                method,
                action,
                vm,
                reason: answer.as_str(),
                note: "the VM is not among those that the caller may see",
            },
        );
    }

    /// His certificate has run out since he connected; written down.
    #[must_use]
    pub fn expired(&self, method: &str) -> Fault {
        let fault = self.not_allowed(format!(
            "{} has expired since this connection was made; connect anew with a new one",
            self.shown()
        ));
        self.denied(method, "", "", &fault);
        fault
    }

    /// Nobody knows this caller, who asks for what is not there; written down.
    #[must_use]
    pub fn stranger(&self, method: &str) -> Fault {
        let fault = self.without_role();
        self.denied(method, "", "", &fault);
        fault
    }

    fn without_role(&self) -> Fault {
        self.not_allowed(format!(
            "{} has no role on this agent; who keeps it can give one in its file of roles",
            self.shown()
        ))
    }

    fn not_allowed(&self, message: String) -> Fault {
        Fault::new(Reason::NotAllowed, message).with("caller", &self.caller.identity)
    }

    fn denied(&self, method: &str, action: &str, vm: &str, fault: &Fault) {
        self.auditor.denied(
            &self.caller,
            Denied {
                method,
                action,
                vm,
                reason: fault.reason.as_str(),
                note: &fault.message,
            },
        );
    }

    fn shown(&self) -> String {
        match self.caller.transport.as_str() {
            "tls" => format!("certificate '{}'", self.caller.identity),
            _ => self.caller.identity.clone(),
        }
    }
}
