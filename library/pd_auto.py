#!/usr/bin/python
"""What the action plugin pd_auto takes and returns."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_auto
short_description: Choose a ratio by simulation, and decide by measurement
description:
  - Runs C(pdbench advise --verify) on the controller with the inventory, the limit and the extra-vars of the command, and shows
    what it prints. That simulates every ratio, deploys and measures the best two, and says which won.
options: {}
attributes:
  action: {support: full, description: Runs on the controller; the plays that it starts contact hosts.}
  check_mode: {support: none, description: Nothing is known without measuring.}
  diff_mode: {support: none, description: It deploys.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: Advise, measure the best two, compare
  pd_auto:
  run_once: true
"""

RETURN = r"""
folder:
  description: "The folder on the controller: advice.json, advice.png, the sweep, check.json."
  returned: success
  type: str
  sample: /srv/pd/results/auto-20260101-120000
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Say why nothing was done: Ansible did not find the action plugin of this name."""
    module = AnsibleModule(argument_spec={}, supports_check_mode=False)
    module.fail_json(msg="pd_auto runs on the controller: use the checkout's ansible.cfg, which names plugins/action")


if __name__ == "__main__":
    main()
