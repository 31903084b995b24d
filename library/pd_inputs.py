#!/usr/bin/python
"""What the action plugin pd_inputs takes and returns."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_inputs
short_description: Resolve the inventory for many sets of extra-vars
description:
  - Writes what C(pd_plan) would plan from, once for each set of variables in a file, so that C(pdbench sweep) checks and plans
    every cell before a host is touched. Secrets are left out. Contacts no host.
options:
  cases: {description: "A file of the controller: a JSON list of mappings, each a set of extra-vars.", type: path, required: true}
  dest: {description: "Where the JSON goes: groups, limit, and for every case the variables of every host.", type: path, required: true}
attributes:
  action: {support: full, description: Runs on the controller only.}
  check_mode: {support: full, description: The file is written in check mode, too; it is all that this makes.}
  diff_mode: {support: none, description: Nothing on a host changes.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: What the inventory says
  pd_inputs: {cases: /tmp/cases.json, dest: /tmp/inputs.json}
  run_once: true
"""

RETURN = r""" # """

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Say why nothing was done: Ansible did not find the action plugin of this name."""
    module = AnsibleModule(
        argument_spec={"cases": {"type": "path", "required": True}, "dest": {"type": "path", "required": True}},
        supports_check_mode=True,
    )
    module.fail_json(msg="pd_inputs runs on the controller: use the checkout's ansible.cfg, which names plugins/action")


if __name__ == "__main__":
    main()
