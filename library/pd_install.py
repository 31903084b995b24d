#!/usr/bin/python
"""What the action plugin pd_install takes and returns."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_install
short_description: Make a host's virtualenvs, from a registry or from wheels that the controller sends
description:
  - Compares what the host has (C(installed)) with what is wanted, and calls C(pd_venv) on the host only where they differ.
  - With C(wheelhouse) the controller fetches the wheels for the host's Python and machine, keeps them below C(.pd/wheelhouse),
    and sends one archive for each virtualenv whose wheels the host lacks. Hashes are checked on both sides.
options:
  install_dir: {description: Where virtualenvs go., type: path, required: true}
  state_dir: {description: Our state directory; marks the installer's processes as ours., type: path, required: true}
  venvs:
    description: Virtualenvs, each with C(name) and C(requirements) installed in turn.
    type: list
    elements: dict
    required: true
  python: {description: The Python that makes them as pd_facts found it., type: dict, required: true}
  installed: {description: The stamps of those that are there., type: dict, required: true}
  wheelhouse: {description: The host reaches no registry., type: bool, default: false}
  shared: {description: Whether other users run what is installed., type: bool, default: false}
attributes:
  action: {support: full, description: Fetches and sends on the controller; pd_venv runs on the host.}
  check_mode: {support: full, description: Says what would be installed.}
  diff_mode: {support: none, description: There is no file to show.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: Virtualenvs
  pd_install:
    install_dir: /opt/pd
    state_dir: /var/lib/pd
    venvs: [{name: supervisor, requirements: [requirements/supervisor.txt]}]
    python: "{{ __pd_found.found.python }}"
    installed: "{{ __pd_found.installed }}"
"""

RETURN = r"""
changes: {description: What was done., returned: always, type: list, elements: str, sample: [installed supervisor]}
seconds: {description: How long it took., returned: always, type: float, sample: 12.5}
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Say why nothing was done: Ansible did not find the action plugin of this name."""
    module = AnsibleModule(
        argument_spec={
            "install_dir": {"type": "path", "required": True},
            "state_dir": {"type": "path", "required": True},
            "venvs": {"type": "list", "elements": "dict", "required": True},
            "python": {"type": "dict", "required": True},
            "installed": {"type": "dict", "required": True},
            "wheelhouse": {"type": "bool", "default": False},
            "shared": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    module.fail_json(msg="pd_install runs on the controller: use the checkout's ansible.cfg, which names plugins/action")


if __name__ == "__main__":
    main()
