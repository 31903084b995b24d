#!/usr/bin/python
"""A model on a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_model
short_description: Check a model on a host, download it, give it to other hosts, or copy it from one
description:
  - A program of its own does the work in the background; the module calls work a few seconds each and return C(done), and the
    action C(pd_weights) calls it until it is done. Weights are never overwritten and never deleted.
  - C(action=have) makes sure of the model (with C(source.kind=hub) it is downloaded) and returns its checksum.
    C(serve) gives it to hosts that have the token until C(stop), or until nobody asked for a while; C(fetch) copies it from there.
options:
  action: {description: What to do., type: str, choices: [have, serve, fetch, stop], required: true}
  model: {description: "The plan's C(model) of the host: C(path), C(name), C(source), C(dir).", type: dict, required: true}
  state_dir: {description: Our state directory., type: path, required: true}
  python: {description: "Python of the program; empty: the one that runs this module.", type: str, default: ""}
  source: {description: "With C(have): C(kind), C(sha256), C(revision), C(endpoint).", type: dict, default: {}}
  token: {description: The token of the hub or of the host that serves., type: str}
  address: {description: With C(serve) what it listens on., type: str, default: ""}
  service_user: {description: With C(serve) who runs it; empty for who connects., type: str, default: ""}
  served: {description: With C(fetch) what C(serve) returned., type: dict, default: {}}
  giver: {description: With C(fetch) the host that serves., type: str, default: ""}
  size: {description: With C(fetch) how many bytes the model has., type: int, default: 0}
  resumed: {description: Whether this call goes on with what an earlier one started., type: bool, default: false}
attributes:
  check_mode: {support: full, description: Says what would be downloaded or copied.}
  diff_mode: {support: none, description: There is no file to show.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: The model is here
  pd_model:
    action: have
    model: {path: /models/Qwen2.5-3B, name: /models/Qwen2.5-3B, source: rsync, dir: /var/lib/pd-models}
    state_dir: /var/lib/pd
    source: {kind: rsync, sha256: null, revision: null, endpoint: null}
"""

RETURN = r"""
done: {description: Whether nothing is left to do., returned: always, type: bool, sample: true}
message: {description: How far it is., returned: always, type: str, sample: "copying 1.2 of 6.2 GB, 840 MB/s, 6 s left"}
changes: {description: What was done., returned: always, type: list, sample: ["copied Qwen/Qwen2.5-3B-Instruct (6.17 GB) from n1"]}
problem: {description: "With C(have), why it is no whole model.", returned: with have, type: str, sample: is not there}
digest: {description: The model's checksum., returned: with have and fetch and serve, type: str, sample: 5f2a}
bytes: {description: Its size., returned: with have and fetch, type: int, sample: 6170000000}
url: {description: Where it is served., returned: with serve, type: str, sample: "http://10.0.0.1:41233"}
"""

import sys

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pdlib import model_host
from ansible.module_utils.pdlib.errors import UserError
from ansible.module_utils.pdlib.steps import Outcome

#: how long it is served to nobody
_IDLE_S = 900.0


def main() -> None:
    """Run one step."""
    module = AnsibleModule(
        argument_spec={
            "action": {"type": "str", "choices": ["have", "serve", "fetch", "stop"], "required": True},
            "model": {"type": "dict", "required": True},
            "state_dir": {"type": "path", "required": True},
            "python": {"type": "str", "default": ""},
            "source": {"type": "dict", "default": {}},
            "token": {"type": "str", "no_log": True},
            "address": {"type": "str", "default": ""},
            "service_user": {"type": "str", "default": ""},
            "served": {"type": "dict", "default": {}},
            "giver": {"type": "str", "default": ""},
            "size": {"type": "int", "default": 0},
            "resumed": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    p = module.params
    python, token, outcome = p["python"] or sys.executable, p["token"] or "", Outcome(done=True)
    more = {}
    try:
        model = model_host.Model(p["model"]["path"], p["model"]["name"], p["state_dir"])
        if p["action"] == "have":
            outcome, more = model_host.have(model, {**p["source"], "python": python, "token": token}, module.check_mode)
        elif p["action"] == "serve" and not module.check_mode:
            outcome, more = model_host.serve(model, p["address"], token, _IDLE_S, python, p["service_user"])
        elif p["action"] == "fetch":
            outcome, more = model_host.fetch(model, p["served"], token, p["giver"], p["size"], python, module.check_mode)
        elif p["action"] == "stop" and not module.check_mode:
            model.stop()
    except UserError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=bool(outcome.changed), done=outcome.done, message=outcome.message, changes=outcome.changed, **more)


if __name__ == "__main__":
    main()
