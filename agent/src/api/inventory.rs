//! `InventoryService`.

use tonic::{Request, Response, Status};
use vmsnap_proto::v1::{self, inventory_service_server::InventoryService};

use super::{access, errors, paging, reply, veil::Veil, workflow};
use crate::{
    operate::health,
    planning::{Fault, actions::kind::version, request::DEFAULT_POOL},
    trust::Role,
    workflows::Workflows,
};

/// VMs whose snapshots are read before it is seen whether the page is full.
const VMS_AT_A_TIME: usize = 16;

/// The service over the observer.
#[derive(Debug, Clone)]
pub struct Service(pub Workflows);

fn failed(fault: Fault) -> Status {
    errors::status(&fault)
}

#[tonic::async_trait]
impl InventoryService for Service {
    async fn get_host(
        &self,
        _: Request<v1::GetHostRequest>,
    ) -> Result<Response<v1::GetHostResponse>, Status> {
        let (info, host) = self.0.observer().host().await.map_err(failed)?;
        Ok(Response::new(v1::GetHostResponse {
            hostname: info.hostname,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            libvirt_version: version(host.libvirt),
            hypervisor: info.hypervisor,
            hypervisor_version: version(host.qemu),
            uri: info.uri,
            can_revert_external: host.reverts_external(),
            can_delete_external: host.deletes_external(),
        }))
    }

    async fn get_health(
        &self,
        _: Request<v1::GetHealthRequest>,
    ) -> Result<Response<v1::GetHealthResponse>, Status> {
        let standing = self.0.standing().await;
        Ok(Response::new(v1::GetHealthResponse {
            problems: health::problems(&standing)
                .into_iter()
                .map(reply::problem)
                .collect(),
            open_workflows: u32::try_from(standing.open.len()).unwrap_or(u32::MAX),
        }))
    }

    async fn list_vms(
        &self,
        request: Request<v1::ListVmsRequest>,
    ) -> Result<Response<v1::ListVmsResponse>, Status> {
        let sight = access::of(&request)?.sight();
        let message = request.into_inner();
        let mut all = self.0.observer().vms().await.map_err(failed)?;
        all.retain(|vm| sight.sees(&vm.name));
        for vm in &mut all {
            vm.busy_with = self.0.busy_with(&vm.name);
        }
        let all = all
            .into_iter()
            .map(|vm| v1::VmSummary {
                name: vm.name,
                uuid: vm.uuid,
                state: reply::vm_state(vm.state) as i32,
                state_reason: vm.reason,
                vcpus: vm.vcpus,
                memory_bytes: vm.memory,
                snapshot_count: vm.snapshots,
                workflow_id: vm.busy_with.unwrap_or_default(),
            })
            .collect();
        let (vms, next_page_token) = paging::of_sorted(
            all,
            |vm: &v1::VmSummary| &vm.name,
            workflow::page(message.page_size, 100, 1_000),
            &message.page_token,
        )?;
        Ok(Response::new(v1::ListVmsResponse {
            vms,
            next_page_token,
        }))
    }

    async fn get_vm(
        &self,
        request: Request<v1::GetVmRequest>,
    ) -> Result<Response<v1::GetVmResponse>, Status> {
        let caller = access::of(&request)?;
        let name = request.into_inner().vm_name;
        workflow::named("vm_name", &name)?;
        access::over(&self.0, &caller, "GetVm", Role::Viewer, &name).await?;
        let vm = match self.0.observer().named_vm(&name).await {
            Ok(vm) => vm,
            Err(fault) => return Err(Veil::of(&self.0, &caller).await?.status(&fault)),
        };
        Ok(Response::new(v1::GetVmResponse {
            vm: Some(reply::vm(&vm)),
        }))
    }

    async fn list_snapshots(
        &self,
        request: Request<v1::ListSnapshotsRequest>,
    ) -> Result<Response<v1::ListSnapshotsResponse>, Status> {
        let caller = access::of(&request)?;
        let message = request.into_inner();
        workflow::named("vm_name", &message.vm_name)?;
        let observer = self.0.observer();
        let vms = match message.vm_name.as_str() {
            "" => {
                let sight = caller.sight();
                let mut all = observer.vms_with_snapshots().await.map_err(failed)?;
                all.retain(|(vm, _)| sight.sees(vm));
                all
            }
            name => {
                access::over(&self.0, &caller, "ListSnapshots", Role::Viewer, name).await?;
                match observer.vm_to_list(name).await {
                    Ok(vm) => vec![vm],
                    Err(fault) => return Err(Veil::of(&self.0, &caller).await?.status(&fault)),
                }
            }
        };
        let size = workflow::page(message.page_size, 100, 10_000) as usize;
        let after = paging::Token::read(&message.page_token)?;
        let from = match &after {
            Some(token) => vms.partition_point(|(vm, _)| *vm < token.group),
            None => 0,
        };
        let mut page = paging::Page::new(size);
        // Only as many VMs are looked at as fit the page.
        for some in vms[from..].chunks(VMS_AT_A_TIME) {
            for (vm, snapshots) in observer.list_snapshots(some).await.map_err(failed)? {
                let names: Vec<&str> = snapshots.iter().map(|one| one.name.as_str()).collect();
                let skip = after.as_ref().map_or(0, |token| token.skip(&vm, &names));
                for (at, snapshot) in reply::snapshots(&vm, &snapshots).into_iter().enumerate() {
                    if at >= skip {
                        let token = paging::Token::new(&vm, names[at], at);
                        page.add(token, snapshot);
                    }
                }
            }
            if page.is_full() {
                break;
            }
        }
        let (snapshots, next_page_token) = page.end();
        let costs = vmsnap_hypervisor::counters();
        tracing::debug!(
            snapshots = snapshots.len(),
            snapshot_xml = costs.snapshot_xml,
            headers = costs.headers,
            qemu_img = costs.qemu_img,
            "snapshots listed; costs so far"
        );
        Ok(Response::new(v1::ListSnapshotsResponse {
            snapshots,
            next_page_token,
        }))
    }

    async fn list_volumes(
        &self,
        request: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesResponse>, Status> {
        let caller = access::of(&request)?;
        let veil = Veil::of(&self.0, &caller).await?;
        let message = request.into_inner();
        workflow::named("pool", &message.pool)?;
        let pool = if message.pool.is_empty() {
            DEFAULT_POOL
        } else {
            &message.pool
        };
        let (mut storage, users) = self.0.observer().volumes(pool).await.map_err(failed)?;
        for volume in &mut storage.volumes {
            volume.used_by = users.get(&volume.path).cloned().unwrap_or_default();
        }
        veil.storage(&mut storage);
        let storage = reply::storage(&storage);
        let volumes = storage.volumes;
        let (volumes, next_page_token) = paging::of_sorted(
            volumes,
            |volume: &v1::Volume| &volume.name,
            workflow::page(message.page_size, 100, 1_000),
            &message.page_token,
        )?;
        Ok(Response::new(v1::ListVolumesResponse {
            pool: storage.pool,
            volumes,
            next_page_token,
        }))
    }
}
