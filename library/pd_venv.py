#!/usr/bin/python
"""Virtualenvs on a host, made in the background."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_venv
short_description: Make the virtualenvs that a host needs
description:
  - Starts C(pip) in the background from locked requirement files and reports how far it is; the action C(pd_poll) calls
    it until it is done. A virtualenv whose requirements did not change is left alone.
options:
  install_dir: {description: Where virtualenvs go., type: path, required: true}
  state_dir: {description: Our state directory; marks the installer's processes as ours., type: path, required: true}
  python: {description: "Python that makes the virtualenvs; empty: the one that runs this module.", type: str, default: ""}
  venvs:
    description: Virtualenvs, each with C(name) and C(requirements) installed in turn.
    type: list
    elements: dict
    required: true
  files: {description: Base64 contents of the requirement files and wheels by name., type: dict, default: {}}
  wheelhouses: {description: Virtualenvs that are installed without a registry and the wheelhouse of each., type: dict, default: {}}
  archives: {description: Wheelhouses that were sent and the tar file of each., type: dict, default: {}}
  shared: {description: Whether other users run what is installed., type: bool, default: false}
  resumed: {description: Whether this call goes on with what an earlier one started., type: bool, default: false}
attributes:
  check_mode: {support: full, description: Says what would be installed.}
  diff_mode: {support: none, description: There is no file to show.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: Virtualenvs of this host
  pd_poll:
    module: pd_venv
    args: {install_dir: /opt/pd, state_dir: /var/lib/pd, venvs: "{{ pd_plan.hosts[inventory_hostname].installs }}"}
    files: [requirements/supervisor.txt]
"""

RETURN = r"""
done: {description: Whether all virtualenvs are there., returned: always, type: bool, sample: true}
message: {description: How far the installers are., returned: always, type: str, sample: "installing supervisor (3 s)"}
changes: {description: What was done., returned: always, type: list, sample: [installed supervisor]}
lacks: {description: Wheelhouses that are not there., returned: always, type: list, sample: [supervisor-0123456789ab]}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pdlib import venvs
from ansible.module_utils.pdlib.errors import UserError


def main() -> None:
    """Run one step."""
    module = AnsibleModule(
        argument_spec={
            "install_dir": {"type": "path", "required": True},
            "state_dir": {"type": "path", "required": True},
            "python": {"type": "str", "default": ""},
            "venvs": {"type": "list", "elements": "dict", "required": True},
            "files": {"type": "dict", "default": {}},
            "wheelhouses": {"type": "dict", "default": {}},
            "archives": {"type": "dict", "default": {}},
            "shared": {"type": "bool", "default": False},
            "resumed": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    p = module.params
    try:
        outcome = venvs.step(
            p["install_dir"],
            p["state_dir"],
            p["python"],
            p["venvs"],
            p["files"],
            module.check_mode,
            p["resumed"],
            p["wheelhouses"],
            p["archives"],
            p["shared"],
        )
    except UserError as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=bool(outcome.changed),
        done=outcome.done,
        message=outcome.message,
        changes=outcome.changed,
        lacks=outcome.lacks,
    )


if __name__ == "__main__":
    main()
