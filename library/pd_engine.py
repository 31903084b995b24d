#!/usr/bin/python
"""What the action plugin pd_engine takes and returns."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_engine
short_description: Make sure of an engine that is not in a virtualenv of ours
description:
  - Calls C(pd_runtime) on the host until the engine is there; it is checked, or its image is pulled.
  - An image that comes from an archive on the controller is sent where it is not there yet, or is another one.
options:
  runtime: {description: The plan's C(runtime) of the host., type: dict, required: true}
  state_dir: {description: Our state directory; marks the client's processes as ours., type: path, required: true}
  install_dir: {description: Where what was loaded is recorded., type: path, required: true}
  service_user: {description: "Who runs the engine under systemd; empty: who connects.", type: str, default: ""}
attributes:
  action: {support: full, description: Sends on the controller; pd_runtime runs on the host.}
  check_mode: {support: full, description: Says what would be pulled or loaded.}
  diff_mode: {support: none, description: There is no file to show.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: The engine is there
  pd_engine:
    runtime: "{{ pd_plan.hosts[inventory_hostname].runtime }}"
    state_dir: /var/lib/pd
    install_dir: /opt/pd
"""

RETURN = r"""
changes: {description: What was done., returned: always, type: list, elements: str, sample: ["pulled lmsysorg/sglang:v0.5.23"]}
seconds: {description: How long it took., returned: always, type: float, sample: 12.5}
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Say why nothing was done: Ansible did not find the action plugin of this name."""
    module = AnsibleModule(
        argument_spec={
            "runtime": {"type": "dict", "required": True},
            "state_dir": {"type": "path", "required": True},
            "install_dir": {"type": "path", "required": True},
            "service_user": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    module.fail_json(msg="pd_engine runs on the controller: use the checkout's ansible.cfg, which names plugins/action")


if __name__ == "__main__":
    main()
