//! VMs: a table of all, and all of one.

use std::fmt::Write as _;

use vmsnap_client::quantity::format_size;
use vmsnap_proto::v1;

use super::{Columns, list, or_dash, words};
use crate::terminal::clean;

/// One line a VM.
pub fn table(vms: &[v1::VmSummary]) -> String {
    let mut columns = Columns::new(
        &[
            "VM",
            "STATE",
            "REASON",
            "VCPUS",
            "MEMORY",
            "SNAPSHOTS",
            "RUN",
        ],
        &[3, 4, 5],
    );
    for vm in vms {
        columns.row([
            clean(&vm.name).into_owned(),
            words::<v1::VmState>(vm.state),
            clean(or_dash(&vm.state_reason)).into_owned(),
            vm.vcpus.to_string(),
            format_size(vm.memory_bytes),
            vm.snapshot_count.to_string(),
            or_dash(&vm.workflow_id).to_owned(),
        ]);
    }
    columns.text()
}

/// The VM on one line, as the head of its tree.
pub fn headline(vm: &v1::Vm) -> String {
    format!(
        "{}  {}  {} vCPUs  {}\n",
        clean(&vm.name),
        state(vm),
        vm.vcpu_count,
        format_size(vm.memory_bytes)
    )
}

fn state(vm: &v1::Vm) -> String {
    let state = words::<v1::VmState>(vm.state);
    if vm.state_reason.is_empty() {
        state
    } else {
        format!("{state} ({})", clean(&vm.state_reason))
    }
}

/// Everything that is known of a VM.
pub fn details(vm: &v1::Vm) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: &str| {
        let _ = writeln!(text, "{label:<14}{}", clean(value));
    };
    line("name", &vm.name);
    line("uuid", &vm.uuid);
    line("state", &state(vm));
    line(
        "definition",
        match (vm.persistent, vm.autostart) {
            (true, true) => "persistent, started with the host",
            (true, false) => "persistent",
            (false, _) => "transient",
        },
    );
    line("machine", &format!("{} {}", vm.arch, vm.machine));
    line("vcpus", &vm.vcpu_count.to_string());
    for vcpu in &vm.vcpus {
        let cpu = vcpu
            .host_cpu
            .map(|cpu| format!(" on host CPU {cpu}"))
            .unwrap_or_default();
        let time = super::took(vcpu.cpu_time.as_ref());
        line(
            "",
            &format!("{}: {}{cpu}, {time} of CPU time", vcpu.number, vcpu.state),
        );
    }
    line(
        "memory",
        &format!(
            "{} of at most {}",
            format_size(vm.memory_bytes),
            format_size(vm.max_memory_bytes)
        ),
    );
    let tuning = vm.memory_tuning.unwrap_or_default();
    for (label, limit) in [
        ("hard limit", tuning.hard_limit_bytes),
        ("soft limit", tuning.soft_limit_bytes),
        ("swap limit", tuning.swap_hard_limit_bytes),
        ("guaranteed", tuning.min_guarantee_bytes),
    ] {
        if let Some(bytes) = limit {
            line("", &format!("{label} {}", format_size(bytes)));
        }
    }
    if let Some(firmware) = &vm.firmware {
        let nvram = match firmware.nvram_path.as_str() {
            "" => String::new(),
            path => format!(
                ", variables in {path} ({})",
                or_dash(&firmware.nvram_format)
            ),
        };
        line("firmware", &format!("{}{nvram}", or_dash(&firmware.kind)));
    }
    let agent = vm.guest_agent.unwrap_or_default();
    line(
        "guest agent",
        match (agent.defined, agent.connected, agent.responding) {
            (false, _, _) => "not defined",
            (true, _, true) => "answers",
            (true, true, false) => "connected, does not answer",
            (true, false, false) => "defined, not connected",
        },
    );
    if vm.has_managed_save {
        line(
            "managed save",
            "present: starting the VM brings its memory back",
        );
    }
    if !vm.not_migratable_devices.is_empty() {
        line(
            "no memory",
            &format!(
                "cannot be saved because of {}",
                list(&vm.not_migratable_devices)
            ),
        );
    }
    for job in &vm.block_jobs {
        let done = format!(
            "{} of {}",
            format_size(job.done_bytes),
            format_size(job.total_bytes)
        );
        line(
            "block job",
            &format!("{} on {}: {done}", job.kind, job.disk),
        );
    }
    for disk in &vm.disks {
        let readonly = if disk.readonly { ", read-only" } else { "" };
        let what = format!(
            "{} ({}, {}{readonly}), {}",
            disk.target,
            disk.device,
            disk.bus,
            format_size(disk.virtual_bytes)
        );
        line("disk", &what);
        if disk.chain.is_empty() {
            line(
                "",
                &format!("{} ({})", or_dash(&disk.source), or_dash(&disk.source_type)),
            );
        }
        for (depth, image) in disk.chain.iter().enumerate() {
            let inside = match image.internal_snapshots.len() {
                0 => String::new(),
                _ => format!(", holds {}", list(&image.internal_snapshots)),
            };
            let on_disk = format_size(image.actual_bytes);
            line(
                "",
                &format!(
                    "{:depth$}{} ({}, {on_disk} on disk{inside})",
                    "", image.path, image.format
                ),
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_shown_with_its_chains_from_the_active_image_down() {
        let image = |path: &str, bytes| v1::Image {
            path: path.to_owned(),
            format: "qcow2".to_owned(),
            actual_bytes: bytes,
            ..Default::default()
        };
        let vm = v1::Vm {
            name: "web1".to_owned(),
            uuid: "u".to_owned(),
            state: v1::VmState::Running.into(),
            state_reason: "booted".to_owned(),
            persistent: true,
            vcpu_count: 1,
            vcpus: vec![v1::Vcpu {
                state: "running".to_owned(),
                host_cpu: Some(3),
                ..Default::default()
            }],
            memory_bytes: 1 << 30,
            max_memory_bytes: 2 << 30,
            memory_tuning: Some(v1::MemoryTuning {
                hard_limit_bytes: Some(3 << 30),
                ..Default::default()
            }),
            machine: "q35".to_owned(),
            arch: "x86_64".to_owned(),
            guest_agent: Some(v1::GuestAgent {
                defined: true,
                connected: true,
                responding: true,
            }),
            disks: vec![v1::Disk {
                target: "vda".to_owned(),
                bus: "virtio".to_owned(),
                device: "disk".to_owned(),
                virtual_bytes: 20 << 30,
                chain: vec![
                    image("/p/web1.after", 3 << 20),
                    image("/p/web1.qcow2", 1 << 30),
                ],
                ..Default::default()
            }],
            ..Default::default()
        };
        assert_eq!(
            details(&vm),
            "\
name          web1
uuid          u
state         running (booted)
definition    persistent
machine       x86_64 q35
vcpus         1
              0: running on host CPU 3, 0ms of CPU time
memory        1 GiB of at most 2 GiB
              hard limit 3 GiB
guest agent   answers
disk          vda (disk, virtio), 20 GiB
              /p/web1.after (qcow2, 3 MiB on disk)
               /p/web1.qcow2 (qcow2, 1 GiB on disk)
"
        );
    }

    #[test]
    fn the_table_of_vms_names_the_run_that_is_changing_one() {
        let vm = v1::VmSummary {
            name: "web1".to_owned(),
            state: v1::VmState::PmSuspended.into(),
            vcpus: 2,
            memory_bytes: 512 << 20,
            snapshot_count: 3,
            workflow_id: "0199".to_owned(),
            ..Default::default()
        };
        assert_eq!(
            table(&[vm]),
            "\
VM    STATE         REASON  VCPUS   MEMORY  SNAPSHOTS  RUN
web1  pm suspended  -           2  512 MiB          3  0199
"
        );
    }
}
