//! One VM as facts.

use std::{path::Path, time::Duration};

use vmsnap_hypervisor::{DiskSource, DomainDefinition, DomainState, FreezeStatus, Xml, image};

use super::{Observer, identity};
use crate::planning::{
    Fault,
    facts::{
        Agent, BlockJob, DefinedDisk, Definition, Disk, Firmware, Image, Memtune, Source, Vcpu, Vm,
        VmState,
    },
};

/// How long the guest agent may take to answer a ping.
const PING: Duration = Duration::from_secs(2);

/// libvirt's state as ours.
pub(super) fn state(state: DomainState) -> VmState {
    match state {
        DomainState::Running | DomainState::Blocked => VmState::Running,
        DomainState::Paused => VmState::Paused,
        DomainState::Shutdown => VmState::Stopping,
        DomainState::Shutoff | DomainState::NoState => VmState::Stopped,
        DomainState::Crashed => VmState::Crashed,
        DomainState::PmSuspended => VmState::PmSuspended,
    }
}

impl Observer {
    /// One VM.
    ///
    /// # Errors
    /// When there is no such VM, or libvirt does not answer.
    pub async fn vm(&self, name: &str) -> Result<Vm, Fault> {
        let domain = self.hypervisor.domain(name).await?;
        let state = state(domain.state);
        let active = state != VmState::Stopped;
        let live = self.hypervisor.definition(name, Xml::Live).await?;
        let inactive = if active && domain.persistent {
            Some(self.hypervisor.definition(name, Xml::Inactive).await?)
        } else {
            None
        };
        let mut disks = Vec::new();
        for disk in &live.disks {
            disks.push(self::disk(disk).await);
        }
        let agent = self.agent(name, &live, state).await;
        let frozen = if agent.responding {
            match self.hypervisor.freeze_status(name).await {
                Ok(status) => Some(status == FreezeStatus::Frozen),
                Err(_) => None,
            }
        } else {
            None
        };
        let memtune = self.hypervisor.memtune(name).await.unwrap_or_default();
        let kib = |limit: Option<u64>| limit.map(|kib| kib.saturating_mul(1024));
        Ok(Vm {
            name: domain.name.clone(),
            uuid: domain.uuid.clone(),
            state,
            reason: domain.reason.to_string(),
            persistent: domain.persistent,
            autostart: domain.autostart,
            vcpu_count: domain.vcpus,
            vcpus: if active {
                self.vcpus(name).await
            } else {
                Vec::new()
            },
            memory: domain.memory_kib.saturating_mul(1024),
            max_memory: domain.max_memory_kib.saturating_mul(1024),
            memtune: Memtune {
                hard: kib(memtune.hard_limit_kib),
                soft: kib(memtune.soft_limit_kib),
                swap_hard: kib(memtune.swap_hard_limit_kib),
                min_guarantee: kib(memtune.min_guarantee_kib),
            },
            machine: live.machine.clone().unwrap_or_default(),
            arch: live.arch.clone().unwrap_or_default(),
            firmware: firmware(&live),
            managed_save: domain.has_managed_save,
            block_jobs: if active {
                self.block_jobs(name, &disks).await
            } else {
                Vec::new()
            },
            not_migratable: live.not_migratable(),
            differing: inactive
                .as_ref()
                .map(|inactive| differing(&live, inactive))
                .unwrap_or_default(),
            definition: definition(inactive.as_ref().unwrap_or(&live)),
            disks,
            agent,
            frozen,
        })
    }

    async fn vcpus(&self, name: &str) -> Vec<Vcpu> {
        self.hypervisor
            .vcpus(name)
            .await
            .unwrap_or_default()
            .into_iter()
            .map(|vcpu| Vcpu {
                number: vcpu.number,
                state: vcpu.state.to_string(),
                cpu: vcpu.host_cpu,
                time_ns: vcpu.cpu_time_ns,
            })
            .collect()
    }

    async fn agent(&self, name: &str, live: &DomainDefinition, state: VmState) -> Agent {
        let Some(channel) = live.guest_agent() else {
            return Agent::default();
        };
        let connected = channel.connected && state == VmState::Running;
        Agent {
            defined: true,
            connected,
            responding: connected && self.hypervisor.agent_ping(name, PING).await.is_ok(),
        }
    }

    async fn block_jobs(&self, name: &str, disks: &[Disk]) -> Vec<BlockJob> {
        let mut jobs = Vec::new();
        for disk in disks.iter().filter(|disk| disk.writable()) {
            if let Ok(Some(job)) = self.hypervisor.block_job(name, &disk.target).await {
                jobs.push(BlockJob {
                    disk: disk.target.clone(),
                    kind: job.kind.to_string(),
                    done: job.cur,
                    total: job.end,
                });
            }
        }
        jobs
    }
}

/// A disk with its chain as the images' own headers tell it.
pub(super) async fn disk(disk: &vmsnap_hypervisor::DiskDefinition) -> Disk {
    let source = source(disk.source);
    let path = disk.path.clone().unwrap_or_default();
    let (chain, chain_problem) = match source {
        Source::File | Source::Block => {
            match image::chain(Path::new(&path), disk.format.as_deref()).await {
                Ok(chain) => (chain.into_iter().map(image_fact).collect(), None),
                Err(error) => (Vec::new(), Some(crate::faults::sentence(&error))),
            }
        }
        _ => (Vec::new(), None),
    };
    let chain: Vec<Image> = chain;
    Disk {
        target: disk.target.clone(),
        bus: disk.bus.clone().unwrap_or_default(),
        device: disk.device.clone(),
        source,
        format: disk.format.clone().unwrap_or_default(),
        readonly: disk.readonly,
        shareable: disk.shareable,
        encrypted: disk.encrypted,
        transient: disk.transient,
        virtual_size: chain.first().map_or(0, |image| image.virtual_size),
        path,
        also: Vec::new(),
        chain,
        chain_problem,
        merging_into: disk
            .mirror
            .as_ref()
            .filter(|mirror| mirror.merge)
            .map(|mirror| mirror.path.clone()),
    }
}

fn image_fact(image: image::ImageInfo) -> Image {
    let (numbers, internal) = image
        .snapshots
        .into_iter()
        .map(|snapshot| (snapshot.id, snapshot.name))
        .unzip();
    Image {
        path: image.path,
        format: image.format,
        virtual_size: image.virtual_size,
        actual_size: image.actual_size,
        internal,
        numbers,
        compat: image.compat.unwrap_or_default(),
    }
}

fn firmware(definition: &DomainDefinition) -> Firmware {
    let nvram = definition.nvram.as_ref();
    Firmware {
        uefi: definition.is_uefi(),
        nvram: nvram.and_then(|nvram| nvram.path.clone()),
        nvram_format: nvram
            .and_then(|nvram| nvram.format.clone())
            .unwrap_or_else(|| "raw".into()),
        vtpm: definition.has_emulated_tpm(),
    }
}

fn source(source: DiskSource) -> Source {
    match source {
        DiskSource::File => Source::File,
        DiskSource::Block => Source::Block,
        DiskSource::Network => Source::Network,
        DiskSource::Volume => Source::Volume,
        DiskSource::None => Source::Empty,
        _ => Source::Other,
    }
}

/// A definition as facts.
pub(super) fn definition(of: &DomainDefinition) -> Definition {
    let boot = [
        ("kernel", &of.kernel),
        ("initial ramdisk", &of.initrd),
        ("firmware", &of.loader_path),
    ];
    Definition {
        memory: of.memory_kib.unwrap_or(0).saturating_mul(1024),
        vcpus: of.vcpus.unwrap_or(0),
        vcpus_at_start: of.vcpus_at_start.or(of.vcpus).unwrap_or(0),
        machine: of.machine.clone().unwrap_or_default(),
        nvram: of.nvram.as_ref().and_then(|nvram| nvram.path.clone()),
        agent: of.guest_agent().is_some(),
        disks: of
            .disks
            .iter()
            .map(|disk| DefinedDisk {
                target: disk.target.clone(),
                device: disk.device.clone(),
                source: source(disk.source),
                path: disk.path.clone(),
                readonly: disk.readonly,
                encrypted: disk.encrypted,
            })
            .collect(),
        boot: boot
            .into_iter()
            .filter_map(|(what, path)| Some((what.to_owned(), path.clone()?)))
            .collect(),
    }
}

/// Disks whose next start would use another image than the one in use. A medium
/// may be changed for this run of the VM only, and so is what a transient disk
/// stands for.
fn differing(
    live: &DomainDefinition,
    inactive: &DomainDefinition,
) -> Vec<(String, String, String)> {
    live.disks
        .iter()
        .filter(|disk| !disk.only_read() && !disk.transient)
        .filter_map(|disk| {
            let used = disk.path.as_ref()?;
            let defined = inactive
                .disks
                .iter()
                .find(|other| other.target == disk.target)?
                .path
                .as_ref()?;
            (used != defined && !identity::same(used, defined))
                .then(|| (disk.target.clone(), defined.clone(), used.clone()))
        })
        .collect()
}
