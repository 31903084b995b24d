#!/usr/bin/python
"""What the action plugin pd_move takes and returns."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_move
short_description: One move of a change of ratio while the deployment serves
description:
  - Says what the move is and returns what the tasks that make it need. With C(made) it says what these took.
    The moves follow from the deployed plan (C(__pd_deployed)) and the new one (C(__pd_planned)); no host is contacted.
options:
  number: {description: "Which move, from 1; 0 is what an interrupted command left of the deployed plan.", type: int, required: true}
  made: {description: Whether the move was made., type: bool, default: false}
attributes:
  action: {support: full, description: Runs on the controller only.}
  check_mode: {support: full, description: Changes nothing.}
  diff_mode: {support: none, description: There is nothing to show.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: What changes now
  pd_move: {number: 1}
  run_once: true
  register: __pd_step
"""

RETURN = r"""
before: {description: The plan until the move is made., returned: without C(made), type: dict, sample: {ratio: 3p1d}}
plan: {description: The plan after it., returned: without C(made), type: dict, sample: {ratio: 2p2d}}
units: {description: "By host, its services after it.", returned: without C(made), type: dict, sample: {h3: [{name: pd-decode-1}]}}
leaving: {description: Workers of C(before) that leave., returned: without C(made), type: list, elements: str, sample: [prefill-2]}
arriving: {description: Workers of C(plan) that come., returned: without C(made), type: list, elements: str, sample: [decode-1]}
hosts: {description: Whose units change., returned: without C(made), type: list, elements: str, sample: [h3]}
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Say why nothing was done: Ansible did not find the action plugin of this name."""
    module = AnsibleModule(
        argument_spec={"number": {"type": "int", "required": True}, "made": {"type": "bool", "default": False}},
        supports_check_mode=True,
    )
    module.fail_json(msg="pd_move runs on the controller: use the checkout's ansible.cfg, which names plugins/action")


if __name__ == "__main__":
    main()
