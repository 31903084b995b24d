#!/usr/bin/python
"""What the action plugin pd_plan takes and returns."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_plan
short_description: Check everything the user wrote and make the plan
description:
  - Reads extra-vars, C(--limit) and the inventory on the controller, refuses what cannot work, and places the workers.
    Contacts no host. Plays register the result as C(__pd_planned) and take C(pd_plan), C(pd_hosts), ... from it through
    the role C(pd).
options:
  verb: {description: The command that the plan is for., type: str, choices: [deploy, bench, profile, rebalance, plan, doctor, teardown, watch], required: true}
  discovered:
    description: Compare with what the hosts have, and start from the plan that the router's host holds (both as role preflight found them).
    type: bool
    default: false
  show: {description: Print the table of workers., type: bool, default: false}
attributes:
  action: {support: full, description: Runs on the controller only.}
  check_mode: {support: full, description: "With C(verb=plan) the files are written, too: they are all that it makes."}
  diff_mode: {support: none, description: The plan is printed with C(show).}
author: [the pd project]
"""

EXAMPLES = r"""
- name: Variables, limit, placement
  pd_plan: {verb: deploy}
  run_once: true
  register: __pd_planned
"""

RETURN = r"""
pd_plan: {description: The plan; empty for C(verb=teardown) and C(watch)., returned: always, type: dict, sample: {ratio: 3p1d}}
pd_hosts:
  description: By host, what every role needs to know.
  returned: always
  type: dict
  sample: {n1: {state_dir: /var/lib/pd, install_dir: /opt/pd, service_manager: systemd, venv_python: null}}
pd_owner: {description: Who runs this command., returned: always, type: dict, sample: {pid: 4711, verb: deploy}}
pd_settings: {description: "The deployment's variables, typed and without secrets.", returned: always, type: dict, sample: {purge: false}}
pd_live_pids: {description: Processes of the controller that may hold a lock., returned: always, type: list, elements: int, sample: [4711]}
pd_units: {description: "By host, its services.", returned: unless C(verb) is teardown or watch, type: dict, sample: {n1: [{name: pd-prefill-0}]}}
pd_leaving:
  description: Workers of the deployed plan that stop or start anew, and where they answer.
  returned: unless C(verb) is teardown or watch
  type: dict
  sample: {decode-1: "http://n2:30001"}
pd_firewall:
  description: "By host that has a firewall or gets one, its ruleset while the deployment changes and after it; empty: none."
  returned: unless C(verb) is teardown or watch
  type: dict
  sample: {n1: {during: "table inet pd", after: "table inet pd"}}
pd_moves:
  description: What changes in which order, and the hosts that get their first worker.
  returned: with C(verb=rebalance), once the deployed plan is known
  type: dict
  sample: {moves: [{number: 1, says: prefill-2 (h3) becomes decode-1}], fresh: []}
pd_accelerators:
  description: By host, whether the plan uses its GPUs and RDMA devices.
  returned: unless C(verb) is teardown or watch
  type: dict
  sample: {n1: true}
pd_probe:
  description: What the KV path probe has to do.
  returned: unless C(verb) is teardown or watch
  type: dict
  sample: {says: "KV path probe: 3 of 3 paths", pairs: []}
pd_examined:
  description:
    - Whether C(pd_plan) is the deployed one, and why the inventory cannot be planned (empty when it can); its id, as kv_probe.json
      has it, and where several bench clients meet.
  returned: with C(verb=doctor)
  type: dict
  sample: {deployed: true, refused: "", inventory: local-1f2e3d4c, meet: {address: 192.0.2.1, port: 8890}}
pd_bench:
  description: The run and where it happens.
  returned: with C(verb=bench) and C(profile); with C(verb=teardown) and C(watch) when there is a client host
  type: dict
  sample: {client: n1, run_id: 20260101-120000-3p1d}
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Say why nothing was done: Ansible did not find the action plugin of this name."""
    module = AnsibleModule(
        argument_spec={
            "verb": {
                "type": "str",
                "choices": ["deploy", "bench", "profile", "rebalance", "plan", "doctor", "teardown", "watch"],
                "required": True,
            },
            "discovered": {"type": "bool", "default": False},
            "show": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    module.fail_json(msg="pd_plan runs on the controller: use the checkout's ansible.cfg, which names plugins/action")


if __name__ == "__main__":
    main()
