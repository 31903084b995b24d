#!/usr/bin/python
"""What the action plugin pd_weights takes and returns."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_weights
short_description: Bring a model to a host
description:
  - Calls C(pd_model) on the host until it is done, with a line of progress every few seconds.
  - C(action=choose) contacts no host. From what C(have) returned on every host (registered as C(__pd_model)) it says which one gives
    the model to which.
options:
  action: {description: What to do., type: str, choices: [have, choose, serve, fetch, stop], required: true}
  model: {description: "The plan's C(model) of the host: C(path), C(name), C(source), C(dir).", type: dict, required: true}
  state_dir: {description: Our state directory., type: path}
  python: {description: "Python of the program; empty: the one that runs the module.", type: str, default: ""}
  source: {description: "C(kind), C(sha256), C(revision), C(endpoint).", type: dict, default: {}}
  token: {description: The token of the hub or of the host that serves., type: str}
  address: {description: With C(serve) what it listens on., type: str, default: ""}
  service_user: {description: With C(serve) who runs it; empty for who connects., type: str, default: ""}
  served: {description: With C(fetch) what C(serve) returned., type: dict, default: {}}
  giver: {description: With C(fetch) the host that serves., type: str, default: ""}
  size: {description: With C(fetch) how many bytes the model has., type: int, default: 0}
attributes:
  action: {support: full, description: Loops and chooses on the controller; pd_model runs on the host.}
  check_mode: {support: full, description: Says what would be downloaded or copied.}
  diff_mode: {support: none, description: There is no file to show.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: The model is here
  pd_weights:
    action: have
    model: {path: /models/Qwen2.5-3B, name: /models/Qwen2.5-3B, source: rsync, dir: /var/lib/pd-models}
    state_dir: /var/lib/pd
    source: {kind: rsync}
  register: __pd_model
"""

RETURN = r"""
changes: {description: What was done., returned: but for choose, type: list, elements: str, sample: ["copied Qwen/Qwen2.5-3B-Instruct (6.17 GB) from n1"]}
giver: {description: "The host that gives; empty: no host lacks it.", returned: with choose, type: str, sample: n1}
lacking: {description: The hosts that lack it., returned: with choose, type: list, elements: str, sample: [n2]}
size: {description: Its bytes., returned: with choose, type: int, sample: 6170000000}
token: {description: For the two of them and one time., returned: with choose, type: str, sample: "(secret)"}
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Say why nothing was done: Ansible did not find the action plugin of this name."""
    module = AnsibleModule(
        argument_spec={
            "action": {"type": "str", "choices": ["have", "choose", "serve", "fetch", "stop"], "required": True},
            "model": {"type": "dict", "required": True},
            "state_dir": {"type": "path"},
            "python": {"type": "str", "default": ""},
            "source": {"type": "dict", "default": {}},
            "token": {"type": "str", "no_log": True},
            "address": {"type": "str", "default": ""},
            "service_user": {"type": "str", "default": ""},
            "served": {"type": "dict", "default": {}},
            "giver": {"type": "str", "default": ""},
            "size": {"type": "int", "default": 0},
        },
        supports_check_mode=True,
    )
    module.fail_json(msg="pd_weights runs on the controller: use the checkout's ansible.cfg, which names plugins/action")


if __name__ == "__main__":
    main()
