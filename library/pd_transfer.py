#!/usr/bin/python
"""What a host's system lacks for its transfer engine."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_transfer
short_description: Say which system packages a host's transfer engine needs and has not
description:
  - Looks for the libraries and programs themselves, not for packages, so that those of a vendor count. Changes nothing.
options:
  system:
    description: What is needed, each with C(package) (Debian's name), C(rpm) (Red Hat's) and C(shows), signs of which one is enough.
    type: list
    elements: dict
    required: true
attributes:
  check_mode: {support: full, description: It changes nothing.}
  diff_mode: {support: none, description: It changes nothing.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: What the transfer engine needs of the system
  pd_transfer:
    system: "{{ pd_plan.hosts[inventory_hostname].transfer.system }}"
  register: __pd_transfer
"""

RETURN = r"""
missing: {description: Packages by the host's own names., returned: always, type: list, elements: str, sample: [libibverbs1]}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pdlib import transfer_host


def main() -> None:
    """Look."""
    module = AnsibleModule(
        argument_spec={"system": {"type": "list", "elements": "dict", "required": True}},
        supports_check_mode=True,
    )
    module.exit_json(changed=False, missing=transfer_host.missing(module.params["system"]))


if __name__ == "__main__":
    main()
