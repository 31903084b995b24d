#!/usr/bin/python
"""The profiler's traces on the hosts of workers."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_traces
short_description: Make room for, wait for, pack and remove the profiler's traces of a host's workers
description:
  - Traces lie below the working directory of each worker's unit. C(collect) is called by the action C(pd_poll) until the traces
    are whole; what has not come by then, C(pdbench traces) says on the controller.
options:
  action: {description: What to do., type: str, choices: [prepare, collect, pack, drop], required: true}
  state_dir: {description: State directory of the host., type: path, required: true}
  run_id: {description: The profile., type: str, required: true}
  wanted: {description: "Traces that each unit writes on this host, by unit.", type: dict, default: {}}
  user: {description: "Who owns the folders; empty: who we are.", type: str, default: ""}
  archive: {description: Where C(pack) writes., type: str, default: ""}
  resumed: {description: Whether this call goes on with what an earlier one started., type: bool, default: false}
attributes:
  check_mode: {support: full, description: Makes and removes nothing.}
  diff_mode: {support: none, description: There is no file to show.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: Traces of this host are whole
  pd_poll:
    module: pd_traces
    args: {action: collect, state_dir: /var/lib/pd, run_id: profile-20260101-120000-1p1d-decode, wanted: {pd-decode-0: 1}}
"""

RETURN = r"""
done: {description: Whether there is nothing more to wait for., returned: "C(action) collect", type: bool, sample: true}
message: {description: What is waited for., returned: "C(action) collect", type: str, sample: pd-decode-0 has written 0 of 1 traces}
changes: {description: What was done., returned: always, type: list, sample: [made room for pd-decode-0]}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pdlib import traces
from ansible.module_utils.pdlib.errors import UserError


def main() -> None:
    """Do the one action."""
    module = AnsibleModule(
        argument_spec={
            "action": {"type": "str", "choices": ["prepare", "collect", "pack", "drop"], "required": True},
            "state_dir": {"type": "path", "required": True},
            "run_id": {"type": "str", "required": True},
            "wanted": {"type": "dict", "default": {}},
            "user": {"type": "str", "default": ""},
            "archive": {"type": "str", "default": ""},
            "resumed": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    p = module.params
    result = {"changed": False, "changes": []}
    wanted = {unit: int(number) for unit, number in p["wanted"].items()}
    try:
        if module.check_mode:
            result["done"] = True
        elif p["action"] == "prepare":
            result["changes"] = traces.prepare(p["state_dir"], list(wanted), p["run_id"], p["user"])
            result["changed"] = bool(result["changes"])
        elif p["action"] == "collect":
            outcome = traces.collect(p["state_dir"], wanted, p["run_id"])
            result.update(done=outcome.done, message=outcome.message)
        elif p["action"] == "pack":
            traces.pack(p["state_dir"], p["run_id"], p["archive"])
        else:
            traces.drop(p["state_dir"], p["run_id"])
    except UserError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
