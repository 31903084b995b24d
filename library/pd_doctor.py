#!/usr/bin/python
"""What doctor.yml looks at on a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_doctor
short_description: Look at a host, its way to the others, and what router and workers say
description:
  - Changes nothing. With C(look=host) reads what the host has and what runs on it. With C(look=network) all hosts are called at the
    same time, listen for each other on ports that are free (for a few seconds at most) and connect to those of their peers; one of
    them also asks router and workers, and sends one request over every prefill-decode pair.
  - What it returns is judged on the controller (C(pd_examine)); docs/doctor.md lists the checks.
options:
  look: {description: What to look at., type: str, choices: [host, network], required: true}
  task: {description: "With C(look=host), what to look for; made by C(pd_examine).", type: dict, default: {}}
  python: {description: "With C(look=host), the Python that makes the virtualenvs; empty: the one that runs this module.", type: str, default: ""}
  model: {description: "With C(look=host), a path of which is said whether it is there.", type: str, default: ""}
  job: {description: "With C(look=network), what this host listens on and connects to; made by C(pd_examine).", type: dict, default: {}}
  window: {description: "With C(look=network), how long hosts wait for each other, in seconds.", type: float, default: 6.0}
  plan: {description: "With C(look=network), the deployed plan, on the one host that asks router and workers.", type: dict, default: {}}
  state_dir: {description: State directory; the API key and the deployed plan lie there., type: path, required: true}
  requests: {description: "With a plan, whether requests are sent over the pairs.", type: bool, default: true}
  pair_timeout: {description: "With a plan, longest wait for a pair's answer in seconds.", type: float, default: 8.0}
attributes:
  check_mode: {support: full, description: Changes nothing anyway.}
  diff_mode: {support: none, description: Changes nothing.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: What this host has
  pd_doctor:
    look: host
    state_dir: /var/lib/pd
    task: "{{ pd_task_of_host }}"
  register: __pd_found
"""

RETURN = r"""
found: {description: "What C(pd_facts) returns.", returned: with C(look=host), type: dict, sample: {service_manager: systemd}}
host: {description: What is on the host (pdlib/doctor_look.py)., returned: with C(look=host), type: dict, sample: {hostname: n1, units: []}}
deployed: {description: The deployed plan where the host keeps it., returned: with C(look=host), type: dict, sample: {ratio: 3p1d}}
holder: {description: Who holds the deployment's lock there., returned: with C(look=host), type: dict, sample: {verb: bench, pid: 4711}}
reach:
  description: Connections that were tried (pdlib/doctor_reach.py).
  returned: with C(look=network)
  type: list
  elements: dict
  sample: [{from: n1, to: n2, port: 8998, state: open}]
reach_s: {description: Seconds that the connections took., returned: with C(look=network), type: float, sample: 0.4}
network_s: {description: Seconds from their start to the end of all., returned: with C(look=network), type: float, sample: 1.3}
front: {description: What router and workers said (pdlib/doctor_ask.py)., returned: with C(look=network), type: dict, sample: {from: n1}}
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pdlib import deployed, doctor_ask, doctor_look, doctor_reach, facts, keys
from ansible.module_utils.pdlib.errors import UserError


def look_at_host(p: Dict[str, Any]) -> Dict[str, Any]:
    """Return what the host has."""
    task = p["task"]
    found = facts.gather(task["accelerators"], p["python"], p["model"])
    if task["service_manager"] == "auto":
        task = {**task, "service_manager": found["service_manager"]}
    plan = deployed.read(p["state_dir"]) or {}
    return {"found": found, "host": doctor_look.host(task), "deployed": plan, "holder": deployed.peek(p["state_dir"]) or {}}


def look_at_network(p: Dict[str, Any]) -> Dict[str, Any]:
    """Return what the host reaches, and what router and workers say where it is the one that asks."""
    key = keys.kept(Path(p["state_dir"]) / keys.FILES[keys.API])
    with ThreadPoolExecutor(max_workers=1) as pool:
        asked = None
        if p["plan"]:
            asked = pool.submit(doctor_ask.ask, p["plan"], key, p["job"]["name"], p["requests"], p["pair_timeout"])
        began = time.monotonic()
        rows = doctor_reach.reach(p["job"], p["window"])
        reached = time.monotonic()
        front = asked.result() if asked else {}
        return {"reach": rows, "front": front, "reach_s": reached - began, "network_s": time.monotonic() - began}


def main() -> None:
    """Look and return."""
    module = AnsibleModule(
        argument_spec={
            "look": {"type": "str", "choices": ["host", "network"], "required": True},
            "task": {"type": "dict", "default": {}},
            "python": {"type": "str", "default": ""},
            "model": {"type": "str", "default": ""},
            "job": {"type": "dict", "default": {}},
            "window": {"type": "float", "default": 6.0},
            "plan": {"type": "dict", "default": {}},
            "state_dir": {"type": "path", "required": True},
            "requests": {"type": "bool", "default": True},
            "pair_timeout": {"type": "float", "default": 8.0},
        },
        supports_check_mode=True,
    )
    look = look_at_host if module.params["look"] == "host" else look_at_network
    try:
        result = look(module.params)
    except UserError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
