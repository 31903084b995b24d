#!/usr/bin/python
"""What the action plugin pd_poll takes and returns."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_poll
short_description: Call a module that works in steps until it is done
description:
  - Calls C(module) on the host again and again, and prints a line of progress between calls. C(module) returns C(done),
    C(message) and C(changes), and takes C(resumed), which is true from the second call on. A step that fails ends it at once.
options:
  module: {description: The module., type: str, required: true}
  args: {description: "Its arguments, without C(files) and C(resumed).", type: dict, default: {}}
  timeout: {description: Longest time of all steps together in seconds., type: float, default: 1800}
  files:
    description:
      - Files of the checkout that the module gets as its C(files), base64 by name. C(pdbench) stands for the wheel that is
        built from C(bench/); C(no-deps:) before a name is for the module and not part of the path.
    type: list
    elements: str
    default: []
  keys:
    description:
      - Where the controller has what lies in private files of hosts (C(pd_owner.private)), when the module is to get it. C(api_key) and
        C(admin_api_key), as far as the deployment has them, come from the variables of these names, the controller's environment or
        C(folder); C(router_tls_cert) and C(router_tls_key), where a unit reads them, from these files, and C(hf_token) from its variable.
        They stand in no task.
    type: dict
  keep_going:
    description: Whether a host that fails or is gone is only told of, in C(lost), and the play goes on.
    type: bool
    default: false
attributes:
  action: {support: full, description: Loops on the controller; the module runs on the host.}
  check_mode: {support: full, description: As the module does.}
  diff_mode: {support: full, description: As the module does.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: Virtualenvs of this host
  pd_poll:
    module: pd_venv
    args: {install_dir: /opt/pd, state_dir: /var/lib/pd, venvs: [{name: supervisor, requirements: [requirements/supervisor.txt]}]}
    files: [requirements/supervisor.txt]
    timeout: 600
"""

RETURN = r"""
lost: {description: Why the host failed., returned: with C(keep_going) when it failed, type: str, sample: no space left on device}
done: {description: Whether nothing is left to do., returned: always, type: bool, sample: true}
message: {description: What the module said last., returned: always, type: str, sample: "all units are ready"}
changes: {description: The changes of all steps., returned: always, type: list, elements: str, sample: [started pd-prefill-0]}
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Say why nothing was done: Ansible did not find the action plugin of this name."""
    module = AnsibleModule(
        argument_spec={
            "module": {"type": "str", "required": True},
            "args": {"type": "dict", "default": {}},
            "timeout": {"type": "float", "default": 1800},
            "files": {"type": "list", "elements": "str", "default": []},
            "keys": {"type": "dict"},
            "keep_going": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    module.fail_json(msg="pd_poll runs on the controller: use the checkout's ansible.cfg, which names plugins/action")


if __name__ == "__main__":
    main()
