#!/usr/bin/python
"""The engine of a host that is not in a virtualenv of ours."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_runtime
short_description: Check an engine that is there, or pull or load its image
description:
  - With C(kind=existing) the Python must be there, run, and have the engine in the wanted version, and not two builds of Mooncake;
    of two builds of NIXL it warns.
  - With C(kind=docker) or C(podman) the client must be usable, GPUs must be known to it, and the image is pulled where it is
    not there, or loaded from an archive that the controller sends. Works a few seconds a call and returns C(done); the
    action C(pd_engine) calls it until it is done.
options:
  runtime: {description: The plan's C(runtime) of the host., type: dict, required: true}
  state_dir: {description: Our state directory; marks the client's processes as ours., type: path, required: true}
  install_dir: {description: Where what was loaded is recorded., type: path, required: true}
  service_user: {description: "Who runs the engine under systemd; empty: who connects.", type: str, default: ""}
  archive: {description: "Size and sha256 of the archive that the image comes from; empty: from its registry.", type: dict, default: {}}
  archive_path: {description: Where the archive lies on the host once it was sent., type: str, default: ""}
  resumed: {description: Whether this call goes on with what an earlier one started., type: bool, default: false}
attributes:
  check_mode: {support: full, description: Says what would be pulled or loaded.}
  diff_mode: {support: none, description: There is no file to show.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: The engine is there
  pd_runtime:
    runtime: "{{ pd_plan.hosts[inventory_hostname].runtime }}"
    state_dir: /var/lib/pd
    install_dir: /opt/pd
"""

RETURN = r"""
done: {description: Whether the engine is there., returned: always, type: bool, sample: true}
message: {description: How far it is., returned: always, type: str, sample: "pulling lmsysorg/sglang:v0.5.23 (12 s) 3 of 20 layers"}
changes: {description: What was done., returned: always, type: list, sample: ["pulled lmsysorg/sglang:v0.5.23"]}
lacks: {description: Archives that must be sent., returned: always, type: list, sample: ["lmsysorg/sglang:v0.5.23"]}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pdlib import images
from ansible.module_utils.pdlib.errors import UserError


def main() -> None:
    """Run one step."""
    module = AnsibleModule(
        argument_spec={
            "runtime": {"type": "dict", "required": True},
            "state_dir": {"type": "path", "required": True},
            "install_dir": {"type": "path", "required": True},
            "service_user": {"type": "str", "default": ""},
            "archive": {"type": "dict", "default": {}},
            "archive_path": {"type": "str", "default": ""},
            "resumed": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    p = module.params
    try:
        outcome = images.step(
            p["runtime"],
            p["state_dir"],
            p["install_dir"],
            p["service_user"],
            p["archive"] or None,
            p["archive_path"],
            module.check_mode,
            p["resumed"],
        )
    except UserError as error:
        module.fail_json(msg=str(error))
    if outcome.done and outcome.message:
        module.warn(outcome.message)
    module.exit_json(
        changed=bool(outcome.changed),
        done=outcome.done,
        message=outcome.message,
        changes=outcome.changed,
        lacks=outcome.lacks,
    )


if __name__ == "__main__":
    main()
