//! Domains: what they are, and what changes their state.

use std::{ffi::c_int, fmt, time::Duration};

use virt::{connect::Connect, domain::Domain, sys};

use crate::{
    connection::{Hypervisor, subject},
    error::{Error, Fault},
    lanes::Lane,
};

/// State of a domain, as libvirt tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainState {
    /// None that libvirt knows.
    NoState,
    /// vCPUs run.
    Running,
    /// vCPUs wait for a resource.
    Blocked,
    /// vCPUs stand still.
    Paused,
    /// On its way off.
    Shutdown,
    /// Off.
    Shutoff,
    /// Crashed.
    Crashed,
    /// Suspended by the guest's own power management.
    PmSuspended,
}

impl DomainState {
    fn from_raw(raw: c_int) -> Self {
        match u32::try_from(raw) {
            Ok(sys::VIR_DOMAIN_RUNNING) => Self::Running,
            Ok(sys::VIR_DOMAIN_BLOCKED) => Self::Blocked,
            Ok(sys::VIR_DOMAIN_PAUSED) => Self::Paused,
            Ok(sys::VIR_DOMAIN_SHUTDOWN) => Self::Shutdown,
            Ok(sys::VIR_DOMAIN_SHUTOFF) => Self::Shutoff,
            Ok(sys::VIR_DOMAIN_CRASHED) => Self::Crashed,
            Ok(sys::VIR_DOMAIN_PMSUSPENDED) => Self::PmSuspended,
            _ => Self::NoState,
        }
    }

    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NoState => "in no state",
            Self::Running => "running",
            Self::Blocked => "blocked",
            Self::Paused => "paused",
            Self::Shutdown => "shutting down",
            Self::Shutoff => "off",
            Self::Crashed => "crashed",
            Self::PmSuspended => "suspended by the guest",
        }
    }
}

/// Why a domain is in its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateReason {
    state: DomainState,
    code: c_int,
}

impl StateReason {
    /// Paused because somebody asked for it.
    #[must_use]
    pub fn is_user(self) -> bool {
        self.state == DomainState::Paused && self.code == sys::VIR_DOMAIN_PAUSED_USER as c_int
    }

    /// Paused, and libvirt does not know why: it was killed in the middle of the
    /// call that paused it, and found it so when it came back (measured on 11.3).
    #[must_use]
    pub fn is_unknown(self) -> bool {
        self.state == DomainState::Paused && self.code == sys::VIR_DOMAIN_PAUSED_UNKNOWN as c_int
    }

    /// Paused while its memory is loaded or carried away. A revert to memory that
    /// libvirt gave up stays like this, on the very images that the snapshot
    /// needs.
    #[must_use]
    pub fn is_migrating(self) -> bool {
        self.state == DomainState::Paused && self.code == sys::VIR_DOMAIN_PAUSED_MIGRATION as c_int
    }

    /// Paused because its storage failed.
    #[must_use]
    pub fn is_io_error(self) -> bool {
        self.state == DomainState::Paused && self.code == sys::VIR_DOMAIN_PAUSED_IOERROR as c_int
    }
}

impl fmt::Display for StateReason {
    /// libvirt's reasons (`virDomain*Reason`) in words.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const RUNNING: &[&str] = &[
            "unknown",
            "booted",
            "migrated",
            "restored",
            "from snapshot",
            "resumed",
            "migration cancelled",
            "save cancelled",
            "woken up",
            "crashed",
            "post-copy",
        ];
        const PAUSED: &[&str] = &[
            "unknown",
            "by a user",
            "migrating",
            "saving",
            "dumping",
            "I/O error",
            "watchdog",
            "from snapshot",
            "shutting down",
            "taking a snapshot",
            "crashed",
            "starting up",
            "post-copy",
            "post-copy failed",
            "API error",
        ];
        const SHUTOFF: &[&str] = &[
            "unknown",
            "shut down",
            "destroyed",
            "crashed",
            "migrated",
            "saved",
            "failed",
            "from snapshot",
            "daemon",
        ];
        let words = match self.state {
            DomainState::Running => RUNNING,
            DomainState::Paused => PAUSED,
            DomainState::Shutoff => SHUTOFF,
            _ => &[],
        };
        let word = usize::try_from(self.code).ok().and_then(|at| words.get(at));
        f.write_str(word.copied().unwrap_or("unknown"))
    }
}

/// A domain at a glance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainSummary {
    /// Name.
    pub name: String,
    /// UUID.
    pub uuid: String,
    /// State.
    pub state: DomainState,
    /// Why.
    pub reason: StateReason,
    /// Number that libvirt gave to this run of it; `None` while it is off.
    pub id: Option<u32>,
    /// Defined, rather than gone when it stops.
    pub persistent: bool,
    /// Starts with the host.
    pub autostart: bool,
    /// libvirt keeps its memory for the next start.
    pub has_managed_save: bool,
    /// Number of snapshots.
    pub snapshot_count: u32,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Memory now, in KiB.
    pub memory_kib: u64,
    /// Memory at most, in KiB.
    pub max_memory_kib: u64,
}

/// A vCPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VcpuInfo {
    /// Number.
    pub number: u32,
    /// `offline`, `running` or `blocked`.
    pub state: &'static str,
    /// Host CPU.
    pub host_cpu: Option<u32>,
    /// Nanoseconds of CPU time.
    pub cpu_time_ns: u64,
}

/// Memory limits in KiB; `None` is unlimited.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemTune {
    /// Hard limit.
    pub hard_limit_kib: Option<u64>,
    /// Soft limit.
    pub soft_limit_kib: Option<u64>,
    /// Limit of memory and swap.
    pub swap_hard_limit_kib: Option<u64>,
    /// Guaranteed minimum.
    pub min_guarantee_kib: Option<u64>,
}

/// A job on a whole domain, such as a memory capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DomainJob {
    /// Bytes done.
    pub processed: u64,
    /// Bytes in all.
    pub total: u64,
}

/// Which definition of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Xml {
    /// The one in use; of a domain that is off, the stored one.
    Live,
    /// The stored one, with secrets, so that it can be defined again.
    Inactive,
}

pub(crate) fn state_of(domain: &Domain) -> Result<(DomainState, StateReason), Fault> {
    let (mut state, mut code) = (0, 0);
    // SAFETY: the domain handle is alive, and both pointers are to locals.
    let result =
        unsafe { sys::virDomainGetState(domain.as_ptr(), &raw mut state, &raw mut code, 0) };
    if result < 0 {
        return Err(Fault::last());
    }
    let state = DomainState::from_raw(state);
    Ok((state, StateReason { state, code }))
}

fn summary(domain: &Domain) -> Result<DomainSummary, Fault> {
    let (state, reason) = state_of(domain)?;
    let info = domain.info()?;
    let persistent = domain.is_persistent()?;
    Ok(DomainSummary {
        name: domain.name()?,
        uuid: domain.uuid_string()?,
        state,
        reason,
        id: domain.id(),
        persistent,
        // A transient domain has neither.
        autostart: persistent && domain.autostart().unwrap_or(false),
        has_managed_save: persistent && domain.has_managed_save(0).unwrap_or(false),
        snapshot_count: domain.num_snapshots(0)?,
        vcpus: info.nr_virt_cpu,
        memory_kib: info.memory,
        max_memory_kib: info.max_mem,
    })
}

fn vcpus_of(domain: &Domain) -> Result<Vec<VcpuInfo>, Fault> {
    let count = domain.info()?.nr_virt_cpu as usize;
    // SAFETY: `virVcpuInfo` is plain integers, for which zero is a value.
    let mut info: Vec<sys::virVcpuInfo> = vec![unsafe { std::mem::zeroed() }; count];
    // SAFETY: the buffer has `count` elements; no map of CPUs is asked for.
    let found = unsafe {
        sys::virDomainGetVcpus(
            domain.as_ptr(),
            info.as_mut_ptr(),
            c_int::try_from(count).unwrap_or(c_int::MAX),
            std::ptr::null_mut(),
            0,
        )
    };
    let found = usize::try_from(found).map_err(|_| Fault::last())?;
    Ok(info
        .into_iter()
        .take(found)
        .map(|vcpu| VcpuInfo {
            number: vcpu.number,
            state: match vcpu.state {
                0 => "offline",
                1 => "running",
                2 => "blocked",
                _ => "unknown",
            },
            host_cpu: u32::try_from(vcpu.cpu).ok(),
            cpu_time_ns: vcpu.cpuTime,
        })
        .collect())
}

fn job_of(domain: &Domain) -> Result<Option<DomainJob>, Fault> {
    let stats = domain.job_info()?;
    let total = stats.data_total.unwrap_or(0);
    Ok((total > 0).then(|| DomainJob {
        processed: stats.data_processed.unwrap_or(0),
        total,
    }))
}

impl Hypervisor {
    /// All domains, in no order.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn list_domains(&self) -> Result<Vec<DomainSummary>, Error> {
        self.read(
            "list the domains of",
            "the host",
            None,
            |connection: &Connect| {
                let mut all = Vec::new();
                for domain in connection.list_all_domains(0)? {
                    match summary(&domain) {
                        Ok(summary) => all.push(summary),
                        // Gone since it was listed.
                        Err(fault)
                            if fault.kind == crate::ErrorKind::NotFound(crate::What::Domain) => {}
                        Err(fault) => return Err(fault),
                    }
                }
                Ok(all)
            },
        )
        .await
    }

    /// Names and UUIDs of the domains that have snapshots, in no order: one call.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn domains_with_snapshots(&self) -> Result<Vec<(String, String)>, Error> {
        self.names(sys::VIR_CONNECT_LIST_DOMAINS_HAS_SNAPSHOT).await
    }

    /// Names and UUIDs of all domains, in no order: one call.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn domain_names(&self) -> Result<Vec<(String, String)>, Error> {
        self.names(0).await
    }

    async fn names(&self, flags: u32) -> Result<Vec<(String, String)>, Error> {
        self.read("list the domains of", "the host", None, move |connection| {
            connection
                .list_all_domains(flags)?
                .into_iter()
                .map(|domain| Ok((domain.name()?, domain.uuid_string()?)))
                .collect()
        })
        .await
    }

    /// A domain as it runs, and as it would start next when it is defined: that
    /// is not there a second time when it is the same.
    ///
    /// # Errors
    /// When libvirt does not answer, or its XML cannot be understood.
    pub async fn definitions(&self, name: &str) -> Result<Vec<crate::DomainDefinition>, Error> {
        self.read_domain("read the definition of", name, |domain| {
            let live = domain.xml_desc(0)?;
            let mut all = vec![crate::definition::parse(&live)?];
            if domain.is_persistent()? {
                let next = domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)?;
                if next != live {
                    all.push(crate::definition::parse(&next)?);
                }
            }
            Ok(all)
        })
        .await
    }

    /// One domain, by name.
    ///
    /// # Errors
    /// When there is none of that name, or libvirt does not answer.
    pub async fn domain(&self, name: &str) -> Result<DomainSummary, Error> {
        self.read_domain("look at", name, summary).await
    }

    /// A domain's definition as XML.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn domain_xml(&self, name: &str, which: Xml) -> Result<String, Error> {
        let flags = match which {
            Xml::Live => 0,
            Xml::Inactive => sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE,
        };
        self.read_domain("read the definition of", name, move |domain| {
            Ok(domain.xml_desc(flags)?)
        })
        .await
    }

    /// A domain's definition.
    ///
    /// # Errors
    /// When libvirt does not answer, or its XML cannot be understood.
    pub async fn definition(
        &self,
        name: &str,
        which: Xml,
    ) -> Result<crate::DomainDefinition, Error> {
        let flags = match which {
            Xml::Live => 0,
            Xml::Inactive => sys::VIR_DOMAIN_XML_INACTIVE,
        };
        self.read_domain("read the definition of", name, move |domain| {
            crate::definition::parse(&domain.xml_desc(flags)?)
        })
        .await
    }

    /// The vCPUs of a domain that runs.
    ///
    /// # Errors
    /// When it is off, or libvirt does not answer.
    pub async fn vcpus(&self, name: &str) -> Result<Vec<VcpuInfo>, Error> {
        self.read_domain("read the vCPUs of", name, vcpus_of).await
    }

    /// Memory limits.
    ///
    /// # Errors
    /// When the driver has none, or libvirt does not answer.
    pub async fn memtune(&self, name: &str) -> Result<MemTune, Error> {
        self.read_domain("read the memory limits of", name, |domain| {
            let limits = domain.memory_parameters(0)?;
            // `VIR_DOMAIN_MEMORY_PARAM_UNLIMITED`, in KiB.
            let limit =
                |value: Option<u64>| value.filter(|kib| (1..9_007_199_254_740_991).contains(kib));
            Ok(MemTune {
                hard_limit_kib: limit(limits.hard_limit),
                soft_limit_kib: limit(limits.soft_limit),
                swap_hard_limit_kib: limit(limits.swap_hard_limit),
                min_guarantee_kib: limit(limits.min_guarantee),
            })
        })
        .await
    }

    /// The job that goes on, such as a memory capture.
    ///
    /// # Errors
    /// When libvirt does not answer: during an internal snapshot it does not.
    pub async fn job(&self, name: &str) -> Result<Option<DomainJob>, Error> {
        self.read_domain("read the job of", name, job_of).await
    }

    /// Starts a domain.
    ///
    /// # Errors
    /// When it runs already, or cannot be started.
    pub async fn start(&self, name: &str, paused: bool) -> Result<(), Error> {
        let flags = if paused {
            sys::VIR_DOMAIN_START_PAUSED
        } else {
            0
        };
        self.effect("start", name, move |domain| {
            Ok(domain.create_with_flags(flags)?)
        })
        .await
    }

    /// Stops the vCPUs.
    ///
    /// # Errors
    /// When it is off, or libvirt does not answer.
    pub async fn suspend(&self, name: &str) -> Result<(), Error> {
        self.effect("suspend", name, |domain| Ok(domain.suspend()?))
            .await
    }

    /// Lets the vCPUs run again.
    ///
    /// # Errors
    /// When it is not paused, or libvirt does not answer.
    pub async fn resume(&self, name: &str) -> Result<(), Error> {
        self.release("resume", name, |domain| Ok(domain.resume()?))
            .await
    }

    /// Switches a domain off, as by pulling the plug; fine when it is off.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn destroy(&self, name: &str) -> Result<(), Error> {
        self.release("switch off", name, |domain| {
            if !domain.is_active()? {
                return Ok(());
            }
            Ok(domain.destroy()?)
        })
        .await
    }

    /// Defines a domain, or changes its stored definition.
    ///
    /// # Errors
    /// When libvirt refuses the XML.
    pub async fn define(&self, xml: &str) -> Result<(), Error> {
        let xml = xml.to_owned();
        let name = crate::definition::parse(&xml)
            .map(|definition| definition.name)
            .unwrap_or_default();
        let deadline = self.0.options.effect_deadline;
        self.once(
            Lane::Effect,
            "define",
            subject(&name),
            &name,
            deadline,
            move |connection| {
                connection.define_domain_xml(&xml)?;
                Ok(())
            },
        )
        .await
    }

    /// Drops the memory that libvirt keeps for the next start.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn managed_save_remove(&self, name: &str) -> Result<(), Error> {
        self.effect("drop the managed save of", name, |domain| {
            Ok(domain.managed_save_remove(0)?)
        })
        .await
    }

    /// Aborts the job that goes on: a memory capture; an internal snapshot
    /// cannot be aborted.
    ///
    /// # Errors
    /// When there is none, or libvirt does not answer.
    pub async fn abort_job(&self, name: &str) -> Result<(), Error> {
        self.release("abort the job of", name, |domain| {
            // SAFETY: the domain handle is alive.
            if unsafe { sys::virDomainAbortJob(domain.as_ptr()) } < 0 {
                return Err(Fault::last());
            }
            Ok(())
        })
        .await
    }

    /// Makes the block nodes of a paused guest active again: after a memory
    /// capture of a paused guest QEMU leaves them inactive (measured on 10.0).
    ///
    /// # Errors
    /// When QEMU refuses, or libvirt does not answer.
    pub async fn activate_disks(&self, name: &str) -> Result<(), Error> {
        self.effect("make the disks active of", name, |domain| {
            let command =
                serde_json::json!({"execute": "blockdev-set-active", "arguments": {"active": true}});
            match monitor(domain, &command)? {
                // QEMU before 9.2 does not know the command, nor leaves nodes
                // inactive in a way that it could mend.
                Err(refused) if refused.unknown => Ok(()),
                answer => answer.map(|_| ()).map_err(Refused::fault),
            }
        })
        .await
    }

    /// Has QEMU give up the merges of a domain that are still copying, also those
    /// inside libvirt's own delete, which takes no other way to end: `abortJob`
    /// says OK there and does nothing, `blockJobAbort` waits for its end (measured
    /// on libvirt 11.3). The call that began them then fails, and the chain is as
    /// it was; what was copied stays in the lower image. Whether there were any.
    ///
    /// # Errors
    /// When QEMU refuses, or libvirt does not answer.
    pub async fn give_up_merges(&self, name: &str) -> Result<bool, Error> {
        self.release("give up the merges of", name, |domain| {
            let query = serde_json::json!({"execute": "query-block-jobs"});
            let jobs = monitor(domain, &query)?.map_err(Refused::fault)?;
            let mut any = false;
            for job in jobs.as_array().into_iter().flatten() {
                if job["type"] != "commit" || job["ready"] == true || job["status"] != "running" {
                    continue;
                }
                let cancel = serde_json::json!({
                    "execute": "block-job-cancel",
                    "arguments": {"device": job["device"], "force": true},
                });
                // One that ended meanwhile is none to give up.
                any |= monitor(domain, &cancel)?.is_ok();
            }
            Ok(any)
        })
        .await
    }

    /// The deadline of a short call to the guest agent.
    pub(crate) fn agent_deadline(answer: Duration) -> Duration {
        // libvirt's own synchronisation with the agent takes up to five seconds
        // before the command's time begins.
        answer + Duration::from_secs(7)
    }
}

/// What QEMU says against a command.
struct Refused {
    /// It does not know the command.
    unknown: bool,
    words: String,
}

impl Refused {
    fn fault(self) -> Fault {
        Fault::new(crate::ErrorKind::Other, self.words)
    }
}

/// Asks QEMU itself, past libvirt.
fn monitor(
    domain: &virt::domain::Domain,
    command: &serde_json::Value,
) -> Result<Result<serde_json::Value, Refused>, Fault> {
    let reply = domain.qemu_monitor_command(&command.to_string(), 0)?;
    let mut reply: serde_json::Value = serde_json::from_str(&reply).map_err(Fault::malformed)?;
    Ok(match reply.get("error") {
        None => Ok(reply["return"].take()),
        Some(error) => Err(Refused {
            unknown: error["class"] == "CommandNotFound",
            words: error["desc"].as_str().unwrap_or_default().to_owned(),
        }),
    })
}
