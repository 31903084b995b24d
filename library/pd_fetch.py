#!/usr/bin/python
"""What the action plugin pd_fetch takes and returns."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_fetch
short_description: Bring a run, or a profile's traces, from a host to the controller
description:
  - Packs on the host with C(pd_bench) or C(pd_traces), which may need root's rights, and copies the archive as the user who connects,
    in a stream. C(ansible.builtin.fetch) sends what only root may read as JSON, whole, through the memory of both sides.
options:
  module: {description: What packs., type: str, choices: [pd_bench, pd_traces], default: pd_bench}
  state_dir: {description: State directory of the host., type: path, required: true}
  run_id: {description: The run., type: str, required: true}
  dest: {description: Folder on the controller., type: path, required: true}
  keep_going:
    description: Whether a host that fails or is gone is only told of, in C(lost), and the play goes on.
    type: bool
    default: false
attributes:
  action: {support: full, description: Copies to the controller; that module runs on the host.}
  check_mode: {support: full, description: Does nothing.}
  diff_mode: {support: none, description: There is no file to show.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: Bring the run to the controller
  pd_fetch: {state_dir: /var/lib/pd, run_id: 20260101-120000-3p1d, dest: results/.incoming}
"""

RETURN = r"""
lost: {description: Why there is none., returned: with C(keep_going) when it failed, type: str, sample: no space left on device}
archive: {description: The archive on the controller., returned: changed, type: str, sample: results/.incoming/x.tar.gz}
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Say why nothing was done: Ansible did not find the action plugin of this name."""
    module = AnsibleModule(
        argument_spec={
            "module": {"type": "str", "choices": ["pd_bench", "pd_traces"], "default": "pd_bench"},
            "state_dir": {"type": "path", "required": True},
            "run_id": {"type": "str", "required": True},
            "dest": {"type": "path", "required": True},
            "keep_going": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    module.fail_json(msg="pd_fetch runs on the controller: use the checkout's ansible.cfg, which names plugins/action")


if __name__ == "__main__":
    main()
