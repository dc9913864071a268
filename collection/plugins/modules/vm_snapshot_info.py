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
module: vm_snapshot_info
short_description: Read virtual machines, snapshots, storage and runs of a libvirt host
version_added: 0.1.0
description:
  - Reads what the C(vmsnap-agent) of a libvirt host knows, and changes nothing.
  - The module is a program for x86_64 Linux that needs no Python on the host it runs on.
author:
  - vmsnap contributors (!UNKNOWN)
options:
  vm_name:
    description:
      - The virtual machine or machines to read. All of the host when it is not given.
    type: list
    elements: str
    aliases: [name]
  pool:
    description:
      - The storage pool to read. The host may have none of that name.
    type: str
    default: default
  workflow_id:
    description:
      - One run to read, and nothing else. It is then returned as RV(workflow).
    type: str
  workflows:
    description:
      - How many of the newest runs to read, for each VM that is named. V(0) reads none.
    type: int
    default: 20
  timeout:
    description:
      - Give up reading after this time.
    type: str
    default: 60s
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
seealso:
  - module: vmsnap.libvirt.vm_snapshot
"""

EXAMPLES = r"""
- name: Read the whole host
  vmsnap.libvirt.vm_snapshot_info:
  register: host

- name: Show snapshots that can no longer be reverted to
  ansible.builtin.debug:
    msg: "{{ host.snapshots | rejectattr('revertible') | map(attribute='name') | list }}"

- name: Read one VM and its last run
  vmsnap.libvirt.vm_snapshot_info:
    vm_name: web01
    workflows: 1
  register: web

- name: Stop when somebody has to look after a run first
  ansible.builtin.assert:
    that: web.workflows | selectattr('state', 'eq', 'stuck') | length == 0

- name: Wait for the end of a run
  vmsnap.libvirt.vm_snapshot_info:
    workflow_id: "{{ merge.workflow_id }}"
  register: run
  until: run.workflow.finished is not none
  retries: 60
  delay: 10
"""

RETURN = r"""
host:
  description: The hypervisor and the agent on it, with their versions.
  returned: without O(workflow_id)
  type: dict
  contains:
    hostname:
      description: The host's name.
      type: str
    agent_version:
      description: The agent's version.
      type: str
    libvirt_version:
      description: The version of libvirt.
      type: str
    hypervisor:
      description: The hypervisor.
      type: str
    hypervisor_version:
      description: The hypervisor's version.
      type: str
    uri:
      description: The connection to libvirt.
      type: str
    can_revert_external:
      description: Whether external snapshots can be reverted to here.
      type: bool
    can_delete_external:
      description: Whether external snapshots can be deleted here.
      type: bool
vms:
  description:
    - The VMs. Those that O(vm_name) names come whole, as RV(vmsnap.libvirt.vm_snapshot#module:vm); otherwise there is
      one line for each, with name, state, vCPUs, memory and the number of its snapshots.
  returned: without O(workflow_id)
  type: list
  elements: dict
snapshots:
  description: The snapshots, as RV(vmsnap.libvirt.vm_snapshot#module:snapshots), each with its RV(ignore:vm_name).
  returned: without O(workflow_id)
  type: list
  elements: dict
storage:
  description: The pool and its volumes with the VMs that use them.
  returned: without O(workflow_id)
  type: dict
  contains:
    pool:
      description: Capacity, allocation and free space. Null when the host has no pool of that name.
      type: dict
    volumes:
      description: The volumes in it.
      type: list
      elements: dict
workflows:
  description: The newest runs, newest first, with what was asked, state, times, result and failure.
  returned: without O(workflow_id)
  type: list
  elements: dict
workflow:
  description: The run.
  returned: with O(workflow_id)
  type: dict
  contains:
    id:
      description: Its id.
      type: str
    state:
      description: V(queued), V(running), V(undoing), V(succeeded), V(failed), V(cancelled), V(stuck) or V(refused).
      type: str
    started:
      description: When it began.
      type: str
    finished:
      description: When it ended. Null while it goes on.
      type: str
    result:
      description: What it achieved.
      type: dict
    failure:
      description: Why it failed.
      type: dict
error:
  description: Why the task failed.
  returned: on failure
  type: dict
  contains:
    reason:
      description: A stable code, such as C(VM_NOT_FOUND).
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
"""
