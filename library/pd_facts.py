#!/usr/bin/python
"""What a host has."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_facts
short_description: Find a host's GPUs, RDMA devices, addresses and service manager
description: [Reads what the plan compares with what the inventory declares; changes nothing.]
options:
  accelerators: {description: Look for GPUs and RDMA devices., type: bool, default: true}
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
  description: The facts.
  returned: always
  type: dict
  sample: {service_manager: systemd, addresses: [127.0.0.1], gpus: [0, 1], rdma: {mlx5_0: {state: ACTIVE, fabric: roce, port: 1}}}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pdlib import facts


def main() -> None:
    """Gather and return."""
    module = AnsibleModule(argument_spec={"accelerators": {"type": "bool", "default": True}}, supports_check_mode=True)
    module.exit_json(changed=False, found=facts.gather(module.params["accelerators"]))


if __name__ == "__main__":
    main()
