#!/usr/bin/python
"""Converge the services of one host, a few seconds a call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_units
short_description: Converge the prefill, decode, aggregated and router services of a host
description:
  - Writes unit files, stops what is surplus or changed, starts what is missing, and waits until each unit answers its
    health URL. Works a few seconds a call and returns C(done); the action C(pd_poll) calls it until it is done.
  - A unit that dies before it is ready fails the module with the end of its log.
options:
  state: {description: Whether the units should be there., type: str, choices: [present, absent], default: present}
  state_dir: {description: Configuration, logs and sockets., type: path, required: true}
  install_dir: {description: Where the virtualenvs are., type: path, required: true}
  service_manager: {description: Who runs the units., type: str, choices: [systemd, supervisord], required: true}
  ratio: {description: "The deployment's ratio, for the units' descriptions.", type: str, default: ""}
  units: {description: The host's units from the plan., type: list, elements: dict, default: []}
  api_key: {description: The key that the units share., type: str}
  admin_api_key: {description: The key for what changes a worker., type: str}
  router_tls_cert: {description: The router's certificate (PEM)., type: str}
  router_tls_key: {description: Its private key (PEM)., type: str}
  hf_token: {description: The hub's token., type: str}
  service_user: {description: Who the units run as under systemd., type: str, default: root}
  files: {description: Base64 contents of the launcher that reads the key., type: dict, default: {}}
  keep:
    description: Units that serve and must not restart; a change that would restart one is refused.
    type: list
    elements: str
    default: []
  deployment: {description: "The deployment's name, as C(pd_deployed) gives it: another one's state_dir is refused. Empty: whosever.", type: str, default: ""}
  purge:
    description: With C(state=absent), remove install_dir, folders of compiled kernels and the user, too, as far as we made them.
    type: bool
    default: false
  resumed: {description: Whether this call goes on with what an earlier one started., type: bool, default: false}
attributes:
  check_mode: {support: full, description: Says what would start, stop and be written.}
  diff_mode: {support: full, description: Shows the files.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: Services of this host
  pd_poll:
    module: pd_units
    args:
      state_dir: /var/lib/pd
      install_dir: /opt/pd
      service_manager: supervisord
      units: "{{ pd_units_of_host }}"
"""

RETURN = r"""
done: {description: Whether nothing is left to do., returned: always, type: bool, sample: true}
message: {description: What is waited for., returned: always, type: str, sample: "pd-prefill-0 is starting (12 s)"}
changes: {description: What was done., returned: always, type: list, sample: [started pd-prefill-0]}
"""

import base64

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pdlib import folders, keys, reconcile, steps, teardown
from ansible.module_utils.pdlib.errors import UserError


def main() -> None:
    """Run one step."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "state_dir": {"type": "path", "required": True},
            "install_dir": {"type": "path", "required": True},
            "service_manager": {"type": "str", "choices": ["systemd", "supervisord"], "required": True},
            "ratio": {"type": "str", "default": ""},
            "units": {"type": "list", "elements": "dict", "default": []},
            "api_key": {"type": "str", "no_log": True},
            "admin_api_key": {"type": "str", "no_log": True},
            "router_tls_cert": {"type": "str"},
            "router_tls_key": {"type": "str", "no_log": True},
            "hf_token": {"type": "str", "no_log": True},
            "service_user": {"type": "str", "default": "root"},
            "files": {"type": "dict", "default": {}},
            "keep": {"type": "list", "elements": "str", "default": []},
            "deployment": {"type": "str", "default": ""},
            "purge": {"type": "bool", "default": False},
            "resumed": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    p = module.params
    try:
        if p["state"] == "absent":
            folders.refuse_others({"": folders.deployment(p["state_dir"])}, p["deployment"])
            outcome = teardown.remove_everything(
                p["state_dir"], p["install_dir"], [p["service_manager"]], p["purge"], module.check_mode
            )
        else:
            files = {name.rpartition("/")[2]: base64.b64decode(data).decode() for name, data in p["files"].items()}
            launcher = files.pop("with_api_key.py", "")
            reconciler = reconcile.Reconciler(
                p["state_dir"],
                p["install_dir"],
                p["service_manager"],
                p["ratio"],
                p["units"],
                module.check_mode,
                {name: p[name] for name in keys.FILES if p[name]},
                launcher,
                p["service_user"],
                files,
                p["keep"],
                p["deployment"],
            )
            outcome = reconciler.step(p["resumed"])
    except UserError as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=steps.changed(outcome.changed),
        done=outcome.done,
        message=outcome.message,
        changes=outcome.changed,
        diff=outcome.diff,
    )


if __name__ == "__main__":
    main()
