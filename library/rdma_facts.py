#!/usr/bin/python
"""The RDMA devices of a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rdma_facts
short_description: Find a host's RDMA devices, their GIDs and how far they are from GPUs
description: [Reads sysfs; starts no program and changes nothing. C(pd_facts) finds the same during a deployment.]
options:
  address: {description: "The host's address; the GID that has it is preferred.", type: str, default: ""}
  root: {description: Read the tree of another machine below this folder., type: path, default: /}
attributes:
  check_mode: {support: full, description: Reads only.}
  diff_mode: {support: none, description: Reads only.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: Which cards, which GID, how far from which GPU
  rdma_facts:
    address: "{{ address }}"
  register: _rdma

- name: Only the active ones
  ansible.builtin.debug:
    msg: "{{ _rdma.ports | selectattr('state', 'eq', 'ACTIVE') | map(attribute='device') }}"
"""

RETURN = r"""
ports:
  description:
    - Every port of every device. C(gpus) has the way to each GPU as C(nvidia-smi topo) names it.
    - C(gid_index) is the RoCE v2 GID to use (null on InfiniBand), C(gid_reason) says why that one.
  returned: always
  type: list
  elements: dict
  sample:
    - {device: mlx5_0, port: 1, state: ACTIVE, phys_state: LinkUp, link_layer: Ethernet, fabric: roce, rate: 400 Gb/sec (4X NDR),
       rate_gbps: 400.0, netdev: ens1f0np0, mtu: 9000, numa: 0, pci: "0000:18:00.0", driver: mlx5_core, firmware: 28.39.1002,
       function: pf, gpus: {"0": PIX, "1": NODE}, gid_index: 3, gid_reason: "RoCE v2, 192.0.2.7: the host's address",
       gids: [{index: 3, type: RoCE v2, gid: "0000:0000:0000:0000:0000:ffff:c000:0207", address: 192.0.2.7, netdev: ens1f0np0}]}
peermem:
  description: How RDMA reaches GPU memory; C(module) is empty where none is loaded, C(dmabuf) where none is needed.
  returned: always
  type: dict
  sample: {module: nvidia_peermem, dmabuf: true, kernel: 6.8.0-60-generic, driver: 580.65.06}
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pdlib import rdma


def main() -> None:
    """Read and return."""
    module = AnsibleModule(
        argument_spec={"address": {"type": "str", "default": ""}, "root": {"type": "path", "default": "/"}},
        supports_check_mode=True,
    )
    root = Path(module.params["root"])
    if not (root / "sys").is_dir():
        module.fail_json(msg=f"root={root}: there is no sys in it, so it is not the root of a machine's files")
    rows = rdma.ports(root)
    for row in rows:
        index, reason = rdma.gid_index(row["gids"], module.params["address"]) if row["fabric"] == "roce" else (None, "not RoCE")
        row.update({"gid_index": index, "gid_reason": reason})
    module.exit_json(changed=False, ports=rows, peermem=rdma.peermem(root))


if __name__ == "__main__":
    main()
