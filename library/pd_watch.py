#!/usr/bin/python
"""What the action plugin pd_watch takes and returns."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_watch
short_description: Watch a deployment's queues until another ratio would serve its load better
description:
  - Calls C(pd_observe) on the router's host at fixed intervals and asks the rule of pdlib.autoscale after every window. Ends with
    the ratio to change to, or when the time is over. Every window is a line of JSON in the job's C(log).
  - C(pdbench autoscale) runs it; it changes nothing.
options:
  job:
    description:
      - "A JSON file on the controller: C(rule) (the fields of pdlib.autoscale.Rule), C(every_s), C(until) and C(rest_until) (Unix
        times, null for none), C(unfit) (pairs of ratios, from and to, of changes that are not asked for), C(log), C(pid) (the watch ends with that process)."
    type: path
    required: true
  state_dir: {description: State directory of the router's host., type: path, required: true}
attributes:
  action: {support: full, description: "Decides on the controller; pd_observe runs on the host."}
  check_mode: {support: full, description: Nothing is changed in either.}
  diff_mode: {support: none, description: Nothing is changed.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: Watch
  pd_watch: {job: /tmp/job.json, state_dir: /var/lib/pd}
"""

RETURN = r"""
ratio: {description: The ratio to change to, returned: always, type: str, sample: 2p2d}
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Say why nothing was done: Ansible did not find the action plugin of this name."""
    module = AnsibleModule(
        argument_spec={
            "job": {"type": "path", "required": True},
            "state_dir": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    module.fail_json(msg="pd_watch runs on the controller: use the checkout's ansible.cfg, which names plugins/action")


if __name__ == "__main__":
    main()
