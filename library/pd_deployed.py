#!/usr/bin/python
"""The deployed plan on the router's host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_deployed
short_description: Read, lock and keep the deployed plan on the router's host
description: [The plan is replaced atomically; one command at a time holds the lock.]
options:
  action:
    description: C(read) returns the plan, C(lock) also takes the lock, C(store) keeps C(plan), C(unlock) gives the lock back,
      C(forget) takes the workers of C(hosts) out of the plan.
    type: str
    choices: [read, lock, store, unlock, forget]
    required: true
  state_dir: {description: State directory of the router's host., type: path, required: true}
  owner: {description: "Who takes the lock: controller, place, sees_all, pid, user, verb.", type: dict, default: {}}
  live_pids: {description: "Processes of the controller that are alive, among those that may hold the lock.", type: list, elements: int, default: []}
  create: {description: "With C(lock): make state_dir where it is not there; without, nothing is locked there, and no plan is read.", type: bool, default: true}
  steal: {description: Take over a lock whose command is not known to be dead., type: bool, default: false}
  hosts: {description: "With C(forget): hosts that were torn down.", type: list, elements: str, default: []}
  plan: {description: The plan to keep., type: dict, default: {}}
attributes:
  check_mode: {support: full, description: Takes no lock and stores nothing.}
  diff_mode: {support: none, description: The units' own files are shown by pd_units.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: What is deployed
  pd_deployed: {action: read, state_dir: /var/lib/pd}
  register: _deployed
"""

RETURN = r"""
plan: {description: The deployed plan; empty when there is none., returned: "C(action) read or lock", type: dict, sample: {ratio: 3p1d}}
deployment:
  description: What names the deployment, whoever drives it; empty with C(steal) and without C(create), when whatever is there goes.
  returned: C(action) lock
  type: str
  sample: /var/lib/pd on n3
holder: {description: Who holds the lock., returned: "C(action) read", type: dict, sample: {pid: 4711, verb: deploy}}
"""

from pathlib import Path
from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pdlib import deployed, folders
from ansible.module_utils.pdlib.errors import UserError


def main() -> None:
    """Do the one action."""
    module = AnsibleModule(
        argument_spec={
            "action": {"type": "str", "choices": ["read", "lock", "store", "unlock", "forget"], "required": True},
            "state_dir": {"type": "path", "required": True},
            "owner": {"type": "dict", "default": {}},
            "live_pids": {"type": "list", "elements": "int", "default": []},
            "create": {"type": "bool", "default": True},
            "steal": {"type": "bool", "default": False},
            "hosts": {"type": "list", "elements": "str", "default": []},
            "plan": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    p = module.params
    result: Dict[str, Any] = {"changed": False}
    try:
        if p["action"] == "store":
            before = deployed.read(p["state_dir"])
            result["changed"] = before != p["plan"]
            if not module.check_mode:
                deployed.store(p["state_dir"], p["plan"])
        elif p["action"] == "forget":
            result["changed"] = deployed.forget(p["state_dir"], p["hosts"], module.check_mode)
        elif p["action"] == "unlock":
            if not module.check_mode:
                deployed.unlock(p["state_dir"], p["owner"])
        else:
            if p["action"] == "lock":
                result["deployment"] = "" if p["steal"] and not p["create"] else folders.named(p["state_dir"])
                folders.refuse_others({"": folders.deployment(p["state_dir"])}, result["deployment"])
            if p["action"] == "lock" and not module.check_mode and (p["create"] or Path(p["state_dir"]).exists()):
                deployed.lock(p["state_dir"], p["owner"], p["live_pids"], p["steal"])
            wanted = p["action"] == "read" or p["create"]
            result["plan"] = (deployed.read(p["state_dir"]) if wanted else None) or {}
            result["holder"] = deployed.peek(p["state_dir"]) or {}
    except UserError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
