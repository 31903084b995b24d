#!/usr/bin/python
"""The nftables ruleset of a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_firewall
short_description: Let only those hosts connect to workers and router that have business there
description:
  - Loads a ruleset that the plan was made into (pdlib/firewall.py) at once, as the table C(inet pd), and keeps it over a reboot by a
    unit of its own, C(pd-firewall.service). A table that somebody edited or flushed is loaded again.
  - Needs root, systemd and C(nft); where one is missing it says so, and changes nothing.
options:
  state_dir: {description: The state directory of the deployment., type: path, required: true}
  rules: {description: The ruleset; empty takes the firewall off the host., type: str, required: true}
attributes:
  check_mode: {support: full, description: Says whether the ruleset would be loaded.}
  diff_mode: {support: full, description: Shows the ruleset and the unit.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: Only those who have business there reach our ports
  pd_firewall:
    state_dir: /var/lib/pd
    rules: "{{ pd_firewall[inventory_hostname].after }}"
"""

RETURN = r"""
changes: {description: What was done., returned: always, type: list, elements: str, sample: [loaded the firewall]}
closed:
  description: Programs of others at ports that the ruleset closes, where it was loaded.
  returned: always
  type: list
  elements: str
  sample: ["port 39123: process 712 (rpc.statd)"]
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pdlib import firewall_host
from ansible.module_utils.pdlib.errors import UserError
from ansible.module_utils.pdlib.folders import claim


def main() -> None:
    """Bring the host's firewall to what the plan wants."""
    module = AnsibleModule(
        argument_spec={"state_dir": {"type": "path", "required": True}, "rules": {"type": "str", "required": True}},
        supports_check_mode=True,
    )
    state_dir, rules = module.params["state_dir"], module.params["rules"]
    try:
        if rules:
            outcome = firewall_host.apply(state_dir, rules, True)
            if outcome.changed and not module.check_mode:
                claim(state_dir, shared=True)
                outcome = firewall_host.apply(state_dir, rules, False)
        else:
            outcome = firewall_host.Outcome(changed=firewall_host.remove(state_dir, module.check_mode))
    except UserError as error:
        module.fail_json(msg=str(error))
    if outcome.closed:
        module.warn(firewall_host.says(outcome.closed))
    module.exit_json(changed=bool(outcome.changed), changes=outcome.changed, diff=outcome.diff, closed=outcome.closed)


if __name__ == "__main__":
    main()
