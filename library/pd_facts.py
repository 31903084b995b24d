#!/usr/bin/python
"""What a host has."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_facts
short_description: Find a host's GPUs, RDMA devices, addresses and service manager
description: [Reads what the plan compares with what the inventory declares; changes nothing.]
options:
  accelerators: {description: Look for GPUs and RDMA devices., type: bool, default: true}
  python: {description: "Python that makes the virtualenvs; empty: the one that runs this module.", type: str, default: ""}
  state_dir: {description: "Where a deploy keeps what it started, and whose it is (C(found.deployment)); empty: it is not looked for.", type: str, default: ""}
  service_manager: {description: Who would run units; C(auto) as it is found., type: str, default: auto}
  install_dir: {description: Where virtualenvs would be., type: str, default: ""}
  model: {description: "A path of which C(found.model) says whether it is there; anything else is not looked for.", type: str, default: ""}
attributes:
  check_mode: {support: full, description: Reads only.}
  diff_mode: {support: none, description: Reads only.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: What the host has
  pd_facts:
  register: _facts
"""

RETURN = r"""
found:
  description: The facts. C(units) has for each unit that a deploy started whether its process is the C(same), another C(anew), or C(ended). C(rdma) has for each device what C(rdma_facts) says of its first active port.
  returned: always
  type: dict
  sample: {python: {path: /usr/bin/python3, version: 3.11.2, machine: x86_64, glibc: "2.36"}, service_manager: systemd, addresses: [127.0.0.1], netdevs: {127.0.0.1: lo}, gpus: [0, 1], rdma: {mlx5_0: {state: ACTIVE, fabric: roce, port: 1}}}
installed: {description: The stamps of the virtualenvs that are there., returned: always, type: dict, sample: {supervisor: 5f2a}}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pdlib import facts, folders, reconcile
from ansible.module_utils.pdlib.errors import UserError


def main() -> None:
    """Gather and return."""
    module = AnsibleModule(
        argument_spec={
            "accelerators": {"type": "bool", "default": True},
            "python": {"type": "str", "default": ""},
            "state_dir": {"type": "str", "default": ""},
            "service_manager": {"type": "str", "default": "auto"},
            "install_dir": {"type": "str", "default": ""},
            "model": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    p = module.params
    try:
        found = facts.gather(p["accelerators"], p["python"], p["model"])
        if p["state_dir"]:
            manager = found["service_manager"] if p["service_manager"] == "auto" else p["service_manager"]
            found["units"] = reconcile.became(p["state_dir"], manager)
            found["deployment"] = folders.deployment(p["state_dir"])
        stamps = facts.installed(p["install_dir"]) if p["install_dir"] else {}
        if "gpu_fault" in found:
            raise UserError(found["gpu_fault"])
    except UserError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, found=found, installed=stamps)


if __name__ == "__main__":
    main()
