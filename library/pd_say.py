#!/usr/bin/python
"""What the action plugin pd_say takes and returns."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_say
short_description: Print what a command did on every host, and what to type next
description:
  - Reads what the roles registered. After a deploy it also keeps the controller's copy of the deployed plan, from which the
    next command plans before it contacts a host.
options:
  verb: {description: The command that ends., type: str, choices: [deploy, bench, profile, rebalance, teardown], required: true}
attributes:
  action: {support: full, description: Runs on the controller only.}
  check_mode: {support: full, description: Prints and keeps nothing.}
  diff_mode: {support: none, description: Changes nothing on a host.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: What happened
  pd_say: {verb: deploy}
  run_once: true
"""

RETURN = r"""# """

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Say why nothing was done: Ansible did not find the action plugin of this name."""
    module = AnsibleModule(
        argument_spec={
            "verb": {"type": "str", "choices": ["deploy", "bench", "profile", "rebalance", "teardown"], "required": True}
        },
        supports_check_mode=True,
    )
    module.fail_json(msg="pd_say runs on the controller: use the checkout's ansible.cfg, which names plugins/action")


if __name__ == "__main__":
    main()
