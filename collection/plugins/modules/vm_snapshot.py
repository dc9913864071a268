#!/usr/bin/python
# -*- coding: utf-8 -*-

# Copyright: vmsnap contributors
# SPDX-License-Identifier: Apache-2.0

# The documentation of the module. What runs is the binary of the same name
# beside this file.

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
---
module: vm_snapshot
short_description: Snapshots of libvirt virtual machines
version_added: 0.1.0
description:
  - Creates, reverts, merges, lists and cleans up snapshots of virtual machines on a libvirt host.
  - Asks the C(vmsnap-agent) on that host to run a workflow. The agent plans it, refuses beforehand what could not be
    undone later, and never leaves a guest paused or frozen.
  - The run belongs to the agent. When the connection breaks or the play is stopped, it goes on and can be watched
    with C(vmsnap watch).
  - The module is a program for x86_64 Linux that needs no Python on the host it runs on.
author:
  - vmsnap contributors (!UNKNOWN)
options:
  vm_name:
    description:
      - The virtual machine, as libvirt calls it.
      - With a list each VM has a run of its own; they run at the same time and independently of each other, and
        RV(results) has what came of each.
    type: list
    elements: str
    required: true
    aliases: [name]
  action:
    description:
      - What to do.
      - V(create) makes a snapshot, V(revert) takes the VM back to one.
      - V(commit) keeps the present state and drops restore points. With O(snapshot_name) that snapshot and those
        after it are merged into the disk under them; with O(all=true) the whole chain is. Without a name nothing is
        merged, pool and volumes are reported, and O(resize_to) is done if it is given.
      - V(list) returns the tree of snapshots, the VM and its storage, and changes nothing.
      - V(cleanup) removes one snapshot, or what a retention policy says (O(keep_last) and the like), and left-over
        volumes.
      - V(confirm) confirms a change that O(revert_unless_confirmed) guards.
    type: str
    required: true
    choices: [create, revert, commit, list, cleanup, confirm]
  snapshot_name:
    description:
      - The snapshot.
      - When it is not given V(create) makes a name from the time and returns it, and V(revert) refuses.
      - A new name has letters, digits, C(.), C(_) and C(-), begins with a letter or a digit, and has 64 characters
        at most.
      - Quote a name that looks like a number with a fraction, otherwise YAML shortens it.
    type: str
  description:
    description:
      - A text kept with the new snapshot.
    type: str
  memory:
    description:
      - Save the memory too, while the guest runs. A revert then goes on where the guest was.
      - Without it a revert restarts the guest from its disks.
    type: bool
    default: false
  kind:
    description:
      - Where the data of the new snapshot is kept, V(internal) in the disk images or V(external) in overlay files.
      - V(auto) is external where this host can also revert and delete it. Kinds are never mixed on one VM.
    type: str
    choices: [auto, internal, external]
    default: auto
  consistency:
    description:
      - How the guest is brought into a consistent state for the new snapshot.
      - V(auto) freezes the file systems through the guest agent where it answers, and otherwise suspends the VM
        around the snapshot. Any other value is a demand, and the task fails before anything is touched when it
        cannot be met.
      - V(filesystem) freezes, V(suspend) stands the vCPUs still, V(crash) does nothing.
      - What was achieved is returned as RV(consistency).
    type: str
    choices: [auto, filesystem, suspend, crash]
    default: auto
  if_exists:
    description:
      - What to do when a snapshot of that name is there already.
      - V(ok) leaves it, reports no change, and warns with its age.
      - V(replace) deletes it first, behind which there is no way back.
    type: str
    choices: [ok, fail, replace]
    default: ok
  max_age:
    description:
      - Refuse a snapshot of that name that is older than this, such as V(12h).
    type: str
  exclude_disks:
    description:
      - Disks to leave out of the new snapshot, by their target names such as V(vda).
      - Needs O(accept_no_revert=true), because a revert would take such a disk back further than the others.
    type: list
    elements: str
  accept_no_revert:
    description:
      - Make the snapshot although it cannot be reverted to.
    type: bool
    default: false
  protected:
    description:
      - No retention policy removes the new snapshot.
    type: bool
    default: false
  revert_unless_confirmed:
    description:
      - The agent itself takes the VM back to the new snapshot unless O(action=confirm) arrives within this time,
        such as V(30m).
    type: str
  max_stop:
    description:
      - Refuse when the guest would stand still for longer than this, such as V(2s).
    type: str
  freeze_timeout:
    description:
      - Give up freezing the file systems after this time.
    type: str
    default: 10s
  start_if_stopped:
    description:
      - Start the VM first when it is off. It then stays running.
    type: bool
    default: false
  state_after:
    description:
      - The state of the VM after a revert.
      - V(auto) is as saved when memory was saved, otherwise running if the VM runs now or ran then, otherwise stopped.
    type: str
    choices: [auto, running, paused, stopped]
    default: auto
  safety_snapshot:
    description:
      - Keep the present state as a snapshot before reverting.
    type: bool
    default: false
  wait_for:
    description:
      - What to wait for before the task is over, V(agent) that the guest agent answers, V(address) that the guest has
        an address, V(ssh) that an ssh server greets on that address, seen from the hypervisor.
    type: str
    choices: [none, agent, address, ssh]
    default: none
  wait_timeout:
    description:
      - How long to wait for it.
    type: str
    default: 300s
  sync_clock:
    description:
      - Set the guest's clock through the guest agent after a revert that brought memory back.
    type: bool
    default: true
  disks_only:
    description:
      - Revert to the disks of the snapshot alone, without the memory that was saved, where that is gone or damaged, or
        where QEMU cannot load it any more. The guest starts as after a power cut.
    type: bool
    default: false
  force:
    description:
      - Do what libvirt itself asks force for, drop a managed save, and let external snapshots go that stand on
        the image of an internal one.
    type: bool
    default: false
  all:
    description:
      - Merge the VM's whole chain, down to the disk of its oldest snapshot.
    type: bool
    default: false
  resize_to:
    description:
      - The new virtual size of the disk, a number of bytes or a size such as V(20G). Units are binary.
      - Grows a disk while the VM runs or is off; to shrink one the VM must be off and O(allow_shrink=true).
    type: str
  resize_disk:
    description:
      - The disk to resize, by its target name such as V(vda).
      - When it is not given it is the disk whose volume is called after the VM, otherwise the only one.
    type: str
  allow_shrink:
    description:
      - Let O(resize_to) make a disk smaller. What lies beyond the new end is lost.
    type: bool
    default: false
  bandwidth:
    description:
      - The most that a merge copies in a second, such as V(100M). Without limit when it is not given.
      - Kept for the newest snapshot of the present state, while the VM is on; elsewhere there is a warning.
    type: str
  children:
    description:
      - What becomes of the children of the snapshot that goes. V(keep) lets them move to its parent, V(delete)
        removes them with it, V(only) removes them and keeps the snapshot.
    type: str
    choices: [keep, delete, only]
    default: keep
  keep_last:
    description:
      - A policy that keeps the newest so many snapshots. Rules that keep unite.
    type: int
  keep_within:
    description:
      - A policy that keeps the snapshots that are younger than this, such as V(2d).
    type: str
  keep_hourly:
    description:
      - A policy that keeps one snapshot an hour, for so many hours that have one.
    type: int
  keep_daily:
    description:
      - A policy that keeps one snapshot a day, for so many days that have one.
    type: int
  keep_weekly:
    description:
      - A policy that keeps one snapshot a week, for so many weeks that have one.
    type: int
  keep_monthly:
    description:
      - A policy that keeps one snapshot a month, for so many months that have one.
    type: int
  older_than:
    description:
      - A policy removes only snapshots that are older than this, such as V(14d).
    type: str
  name_pattern:
    description:
      - A policy sees only snapshots whose names match this glob, such as V(nightly-*).
    type: str
  include_foreign:
    description:
      - A policy sees also snapshots that this agent did not make.
    type: bool
    default: false
  time_zone:
    description:
      - The zone in which hours, days, weeks and months begin, such as V(Europe/Berlin). The host's own when it is not
        given.
    type: str
  leftovers:
    description:
      - Volumes of O(pool) to delete when no VM refers to them. C({vm_name}) stands for the name of the VM.
      - Not applied together with a retention policy. An empty list deletes none.
    type: list
    elements: str
    default: ["{vm_name}-old.qcow2"]
  orphans:
    description:
      - What to do with files beside the VM's images that no VM refers to. V(delete) removes only those that the agent's
        own journal says it made.
    type: str
    choices: [ignore, report, delete]
    default: ignore
  pool:
    description:
      - The storage pool to report, to resize in, and to look for left-overs in. The host may have none of that name.
    type: str
    default: default
  request_id:
    description:
      - A name for this run. A task with the name of a run that goes on or is over joins that run instead of starting
        another. With a list of VMs C(/) and the name of the VM are added.
      - When it is not given each execution of a task has a name of its own.
    type: str
  plan_hash:
    description:
      - Run only if the plan is still the one with this hash, which check mode returns as RV(plan_hash).
      - For one VM at a time.
    type: str
  timeout:
    description:
      - Cancel the run, and undo what it did, when it takes longer than this, such as V(10m).
      - In check mode, how long to wait for the plan.
    type: str
  wait:
    description:
      - Wait for the end of the run. With V(false) the task is over as soon as the agent has accepted it, and
        RV(workflow_id) names it for M(vmsnap.libvirt.vm_snapshot_info).
    type: bool
    default: true
  agent:
    description:
      - Where the agent listens, V(unix:///path) for its socket on this host, or V(host:port), V([fd00::1]:7443) with an
        IPv6 address.
      - Over the network mutual TLS is spoken and nothing else, with O(ca_path), O(client_cert) and O(client_key). Plain
        TCP is only spoken to loopback, and where all three are given only as V(http://127.0.0.1:port).
      - When it is not given it is what the environment variable E(VMSNAP_AGENT) says, otherwise
        V(unix:///run/vmsnap/agent.sock).
    type: str
  ca_path:
    description:
      - The CA that signed the agent's certificate, a PEM file on the host that the task runs on.
      - When it is not given it is what the environment variable E(VMSNAP_CA_PATH) says.
    type: str
  client_cert:
    description:
      - The certificate that tells the agent who calls, a PEM file on the host that the task runs on. Its name must have
        a role on the agent.
      - When it is not given it is what the environment variable E(VMSNAP_CLIENT_CERT) says.
    type: str
  client_key:
    description:
      - The key of O(client_cert), a PEM file on the host that the task runs on.
      - When it is not given it is what the environment variable E(VMSNAP_CLIENT_KEY) says.
    type: str
notes:
  - In check mode the agent plans and nothing is touched. A snapshot that is missing is then a warning and a change,
    because an earlier task of the same play may be what creates it. Every other refusal fails as it would.
  - An option that does not belong to the action is refused, and so is an unknown one, with the nearest name.
  - Sizes are bytes or have a unit, V(20G), V(512MiB). Durations are seconds or have a unit, V(90s), V(30m), V(1h30m),
    V(2d), V(1w).
  - A task keyword C(timeout) does not stop the run. Use O(timeout).
seealso:
  - module: vmsnap.libvirt.vm_snapshot_info
  - module: community.libvirt.virt
"""

EXAMPLES = r"""
- name: Snapshot a VM before a change
  vmsnap.libvirt.vm_snapshot:
    vm_name: web01
    action: create
    snapshot_name: before-upgrade

- name: Snapshot with memory, and stand still for half a second at most
  vmsnap.libvirt.vm_snapshot:
    vm_name: db01
    action: create
    snapshot_name: before-upgrade
    memory: true
    max_stop: 500ms
  register: taken

- name: Show how long the guest stood still
  ansible.builtin.debug:
    msg: "{{ taken.vm_name }} stood still for {{ taken.stop_ms }} ms"

- name: Take the VM back and wait until ssh answers
  vmsnap.libvirt.vm_snapshot:
    vm_name: web01
    action: revert
    snapshot_name: before-upgrade
    wait_for: ssh
    wait_timeout: 5m
  register: back

- name: Tell the play where the guest is now
  ansible.builtin.set_fact:
    guest_address: "{{ back.guest.addresses | first }}"

- name: Keep the present state, drop the restore point, and grow the disk
  vmsnap.libvirt.vm_snapshot:
    vm_name: web01
    action: commit
    snapshot_name: before-upgrade
    resize_to: 40G

- name: Only grow the disk
  vmsnap.libvirt.vm_snapshot:
    vm_name: web01
    action: commit
    resize_to: 60G

- name: Remove one snapshot and the left-over volume web01-old.qcow2
  vmsnap.libvirt.vm_snapshot:
    vm_name: web01
    action: cleanup
    snapshot_name: before-upgrade

- name: Take several VMs back to their baseline at the same time
  vmsnap.libvirt.vm_snapshot:
    vm_name: [lab01, lab02, lab03]
    action: revert
    snapshot_name: baseline
    wait_for: agent
  register: lab

- name: Show what came of each
  ansible.builtin.debug:
    msg: "{{ lab.results | items2dict(key_name='vm_name', value_name='msg') }}"

- name: Look at the tree of snapshots
  vmsnap.libvirt.vm_snapshot:
    vm_name: web01
    action: list
  register: tree

- name: See what a revert would do, then do exactly that
  block:
    - name: Plan the revert
      vmsnap.libvirt.vm_snapshot:
        vm_name: web01
        action: revert
        snapshot_name: before-upgrade
      check_mode: true
      diff: true
      register: planned

    - name: Revert as planned
      vmsnap.libvirt.vm_snapshot:
        vm_name: web01
        action: revert
        snapshot_name: before-upgrade
        plan_hash: "{{ planned.plan_hash }}"

- name: Start a long merge and look after it later
  vmsnap.libvirt.vm_snapshot:
    vm_name: db01
    action: commit
    all: true
    bandwidth: 100M
    wait: false
  register: merge

- name: Wait for the merge
  vmsnap.libvirt.vm_snapshot_info:
    workflow_id: "{{ merge.workflow_id }}"
  register: run
  until: run.workflow.finished is not none
  retries: 60
  delay: 10
"""

RETURN = r"""
action:
  description: The action.
  returned: always, unless the arguments were refused
  type: str
  sample: create
vm_name:
  description: The VM.
  returned: for one VM
  type: str
  sample: web01
snapshot_name:
  description: The snapshot that was asked for, or that was made.
  returned: when there is one
  type: str
  sample: before-upgrade
workflow_id:
  description: The run at the agent, for C(vmsnap log) and C(vmsnap watch).
  returned: when a run was accepted
  type: str
  sample: 0198c0de-7a11-7c4e-8f00-5d2a0b1c2d3e
state:
  description: The state of the run. V(stuck) means that undoing failed too and somebody has to look.
  returned: when a run was accepted
  type: str
  sample: succeeded
plan_hash:
  description: Names the plan. The same request on the same facts has the same hash.
  returned: when there is a plan
  type: str
decisions:
  description: What the plan decided by itself, and why.
  returned: when there is a plan
  type: list
  elements: dict
  sample: [{"subject": "consistency", "choice": "filesystem", "because": "the guest agent answers"}]
steps:
  description: The steps of the plan in order.
  returned: when there is a plan
  type: list
  elements: dict
  contains:
    index:
      description: Its place.
      type: int
    name:
      description: A stable name.
      type: str
    title:
      description: What it does.
      type: str
    changes:
      description: Whether it changes anything.
      type: bool
    undo:
      description: What undoes it. Empty when nothing needs undoing.
      type: str
    point_of_no_return:
      description: Whether there is no way back behind it.
      type: bool
    took_ms:
      description: How long it took in milliseconds. Null when it did not run, or not to its end.
      type: int
    note:
      description: What came of it.
      type: str
events:
  description: How many events of the run were seen.
  returned: after a run
  type: int
snapshot:
  description: The snapshot that was made, found or reverted to.
  returned: when there is one
  type: dict
  contains: &snapshot
    name:
      description: Its name.
      type: str
    parent:
      description: The snapshot it was made from. Empty for a root.
      type: str
    children:
      description: The snapshots made from it.
      type: list
      elements: str
    description:
      description: The text kept with it.
      type: str
    kind:
      description: V(internal), V(external) or V(mixed).
      type: str
    memory:
      description: Whether memory was saved.
      type: bool
    consistency:
      description: As achieved. Null for snapshots that others made.
      type: str
    state:
      description: The state of the VM in it.
      type: str
    created:
      description: When it was made.
      type: str
    current:
      description: Whether the present state descends from it.
      type: bool
    health:
      description: V(whole), V(data_missing), V(torn), V(merged_away) or V(metadata_only).
      type: str
    health_detail:
      description: Why it is not whole.
      type: str
    revertible:
      description: Whether this host could revert to it now.
      type: bool
    not_revertible_because:
      description: Why it could not.
      type: str
    size_bytes:
      description: Bytes on the host of the files that belong to it alone.
      type: int
    disks:
      description: What it holds of each disk.
      type: list
      elements: dict
    memory_file:
      description: The file that holds the memory.
      type: str
    ours:
      description: Whether this agent made it.
      type: bool
    protected:
      description: Whether policies leave it alone.
      type: bool
    workflow_id:
      description: The run that made it.
      type: str
    guard_deadline:
      description: Until when a guarded change on it must be confirmed.
      type: str
    vm_name:
      description: The VM.
      type: str
snapshots:
  description: All snapshots of the VM, parents before children.
  returned: where the action reads them, always for O(action=list)
  type: list
  elements: dict
  contains: *snapshot
vm:
  description: The VM with its state, vCPUs, memory and its tuning, disks with their chains, and guest agent.
  returned: where the action reads it, always for O(action=list)
  type: dict
storage:
  description: The pool, its volumes with the VMs that use them, and orphaned files.
  returned: where the action reads it, always for O(action=list), O(action=commit) and O(action=cleanup)
  type: dict
  contains:
    pool:
      description: Capacity, allocation and free space. Null when the host has no pool of that name.
      type: dict
    volumes:
      description: The volumes in it.
      type: list
      elements: dict
    orphans:
      description: Files that no VM refers to.
      type: list
      elements: dict
guest:
  description: The guest as it came back.
  returned: when O(wait_for) is not V(none)
  type: dict
  contains:
    hostname:
      description: Its host name.
      type: str
    os:
      description: Its operating system.
      type: str
    addresses:
      description: Its addresses, without loopback and link-local ones.
      type: list
      elements: str
    interfaces:
      description: Its interfaces.
      type: list
      elements: dict
    ready_ms:
      description: From the moment the VM ran to the moment what was waited for was there.
      type: int
    clock_skew_ms:
      description: How far its clock was behind.
      type: int
    clock_set:
      description: Whether the clock was set.
      type: bool
consistency:
  description: How consistent the new snapshot is, V(memory), V(filesystem), V(suspend), V(crash) or V(stopped).
  returned: for O(action=create)
  type: str
  sample: filesystem
stop_ms:
  description: How long the vCPUs stood still, in milliseconds.
  returned: when they did
  type: int
  sample: 85
freeze_ms:
  description: How long file systems were frozen, in milliseconds.
  returned: when they were
  type: int
  sample: 240
vm_state:
  description: The state of the VM at the end.
  returned: after a run
  type: str
  sample: running
merged:
  description: The snapshots that were merged and dropped, in that order.
  returned: when there are any
  type: list
  elements: str
removed:
  description: What went, with the rule that said so.
  returned: for O(action=cleanup)
  type: list
  elements: dict
  sample: [{"name": "web01-old.qcow2", "what": "volume", "rule": "leftovers", "size_bytes": 197120}]
kept:
  description: What stayed, with the rule that said so.
  returned: for O(action=cleanup)
  type: list
  elements: dict
resized_to:
  description: The disk's virtual size in bytes.
  returned: when it was resized
  type: int
guard_deadline:
  description: Until when the change must be confirmed.
  returned: with O(revert_unless_confirmed)
  type: str
safety_snapshot:
  description: The snapshot that keeps the state before the revert.
  returned: with O(safety_snapshot=true)
  type: str
error:
  description: Why the task failed.
  returned: on failure
  type: dict
  contains:
    reason:
      description: A stable code, such as C(SNAPSHOT_NOT_FOUND).
      type: str
    code:
      description: The code of the call, such as C(not_found).
      type: str
    message:
      description: The reason as a sentence.
      type: str
    metadata:
      description: What belongs to it, such as the valid names and the nearest one.
      type: dict
    known_fixes:
      description: What worked against it here before.
      type: list
      elements: str
    page:
      description: Where to read more about it.
      type: str
results:
  description: The values above for each VM, with RV(ignore:changed), RV(ignore:failed) and RV(ignore:msg).
  returned: when O(vm_name) is a list
  type: list
  elements: dict
"""
