#!/usr/bin/python
"""Benchmark runs on the client host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_bench
short_description: Start, watch, stop and pack benchmark runs on the client host
description:
  - C(run) starts C(pdbench run) detached, so that it survives the controller, and reports how far it is; the action
    C(pd_poll) calls it until it is done. C(left_over) ends runs that no controller watches any more and lists them.
options:
  action: {description: What to do., type: str, choices: [run, left_over, pack, drop], required: true}
  state_dir: {description: State directory of the client host., type: path, required: true}
  deployment: {description: "With C(left_over): as of C(pd_units); another one's runs are not ended.", type: str, default: ""}
  run_id: {description: The run., type: str, default: ""}
  argv: {description: "The load generator's command; C({dir}) is the run's folder.", type: list, elements: str, default: []}
  selfcheck: {description: "What goes before the load generator, to calibrate it; empty: nothing.", type: list, elements: str, default: []}
  after: {description: "What goes after the load generator; empty: nothing.", type: list, elements: str, default: []}
  plan: {description: The deployed plan., type: dict, default: {}}
  files: {description: Base64 contents of the load's files by their path on the controller., type: dict, default: {}}
  names: {description: "What they are called in the run's folder: name to path.", type: dict, default: {}}
  load: {description: "What C(--load) reads, as load.yml.", type: dict, default: {}}
  api_key: {description: The key of the deployment., type: str}
  admin_api_key: {description: The key for what changes a worker., type: str}
  meet_key: {description: What the clients of a run that several make know each other by., type: str}
  needed_mb: {description: Free disk that must be there., type: int, default: 0}
  archive: {description: Where C(pack) writes., type: str, default: ""}
  python: {description: The Python that has pdbench., type: str, default: ""}
  service_user: {description: "Who the load generator runs as, as a service of systemd's; empty: who we are.", type: str, default: ""}
  resumed: {description: Whether this call goes on with what an earlier one started., type: bool, default: false}
attributes:
  check_mode: {support: full, description: Starts and removes nothing.}
  diff_mode: {support: none, description: There is no file to show.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: The load
  pd_poll:
    module: pd_bench
    args: {action: run, run_id: 20260101-120000-3p1d, state_dir: /var/lib/pd, argv: "{{ pd_bench.argv }}", plan: "{{ pd_plan }}"}
"""

RETURN = r"""
done: {description: Whether the run has ended., returned: "C(action) run, left_over", type: bool, sample: true}
message: {description: How far it is., returned: "C(action) run", type: str, sample: "point 1 of 3: 120 of 200 requests"}
runs: {description: Runs that were never fetched., returned: "C(action) left_over", type: list, sample: []}
"""

import base64
import json

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pdlib import bench_job, folders, keys
from ansible.module_utils.pdlib.errors import UserError


def main() -> None:
    """Do the one action."""
    module = AnsibleModule(
        argument_spec={
            "action": {"type": "str", "choices": ["run", "left_over", "pack", "drop"], "required": True},
            "state_dir": {"type": "path", "required": True},
            "deployment": {"type": "str", "default": ""},
            "run_id": {"type": "str", "default": ""},
            "argv": {"type": "list", "elements": "str", "default": []},
            "selfcheck": {"type": "list", "elements": "str", "default": []},
            "after": {"type": "list", "elements": "str", "default": []},
            "plan": {"type": "dict", "default": {}},
            "files": {"type": "dict", "default": {}},
            "names": {"type": "dict", "default": {}},
            "load": {"type": "dict", "default": {}},
            "api_key": {"type": "str", "no_log": True},
            "admin_api_key": {"type": "str", "no_log": True},
            "meet_key": {"type": "str", "no_log": True},
            "needed_mb": {"type": "int", "default": 0},
            "archive": {"type": "str", "default": ""},
            "python": {"type": "str", "default": ""},
            "service_user": {"type": "str", "default": ""},
            "resumed": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    p = module.params
    user = p["service_user"]
    job = bench_job.Job(p["state_dir"], p["run_id"], user)
    result = {"changed": False, "changes": []}
    try:
        if p["action"] == "left_over":
            folders.refuse_others({"": folders.deployment(p["state_dir"])}, p["deployment"])
            runs = bench_job.left_over(p["state_dir"])
            stop = not module.check_mode
            result["runs"] = [
                bench_job.Job(p["state_dir"], run, user).stop(p["python"]) if stop else {"run_id": run} for run in runs
            ]
            result["done"] = True
        elif module.check_mode:
            result.update(done=True)
        elif p["action"] == "run":
            if not p["resumed"]:
                files = {name: p["files"][path] for name, path in p["names"].items()}
                if p["load"]:
                    files["load.yml"] = base64.b64encode(json.dumps(p["load"], indent=1).encode()).decode()
                secrets = {name: p[name] for name in keys.SHARED if p[name]}
                job.start(p["argv"], p["plan"], files, secrets, p["needed_mb"], p["selfcheck"], p["after"], p["meet_key"])
            outcome = job.watch()
            result.update(done=outcome.done, message=outcome.message, changed=True, changes=[f"ran {p['run_id']}"])
        elif p["action"] == "pack":
            job.pack(p["archive"])
        else:
            job.drop()
    except UserError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
