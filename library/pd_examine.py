#!/usr/bin/python
"""What the action plugin pd_examine takes and returns."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_examine
short_description: Look at hosts and the deployment, judge, and print what was found
description:
  - With C(host) and C(network) calls C(pd_doctor) on the host with what the plan says it should look for. A host that cannot be
    reached, or on which that fails, is no failure of the task but has C(lost) in its result.
  - With C(findings) judges on the controller (docs/doctor.md), prints the table, and writes C(doctor.json) into C(results_dir). The
    task fails when one finding is an error.
options:
  look: {description: What to do., type: str, choices: [host, network, findings], required: true}
attributes:
  action: {support: full, description: "C(findings) runs on the controller only."}
  check_mode: {support: full, description: The same; C(doctor.json) is not written.}
  diff_mode: {support: none, description: Changes nothing on a host.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: What the hosts have and run
  pd_examine: {look: host}
  register: __pd_found
"""

RETURN = r"""
lost: {description: Why nothing was seen on the host., returned: when it was so, type: str, sample: Connection timed out}
asked: {description: "The controller's time before the call, in seconds.", returned: with C(look=host), type: float, sample: 1780000000.0}
answered: {description: "The controller's time after it.", returned: with C(look=host), type: float, sample: 1780000001.5}
findings:
  description: What doctor.json holds.
  returned: with C(look=findings)
  type: list
  elements: dict
  sample: [{id: clock, severity: ok, host: n1, evidence: within 0.4 s, fix: ""}]
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Say why nothing was done: Ansible did not find the action plugin of this name."""
    module = AnsibleModule(
        argument_spec={"look": {"type": "str", "choices": ["host", "network", "findings"], "required": True}},
        supports_check_mode=True,
    )
    module.fail_json(msg="pd_examine runs on the controller: use the checkout's ansible.cfg, which names plugins/action")


if __name__ == "__main__":
    main()
