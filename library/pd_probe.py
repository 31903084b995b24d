#!/usr/bin/python
"""The ends of the KV path probe on a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_probe
short_description: Move real bytes with the transfer engine between prefill and decode hosts, before workers start
description:
  - With C(action=serve) programs wait on the host, in the Python and environment of its workers; with C(move) others go from it
    to those that wait elsewhere, write GPU memory (host memory without GPUs) with NIXL or Mooncake, and compare what arrived.
    C(stop) ends what waits. The host is left as it was.
  - Works a few seconds a call and returns C(done); the action C(pd_kv_path) calls it until it is done.
options:
  action: {description: What to do., type: str, choices: [serve, move, stop], required: true}
  ends: {description: The ends of this host., type: list, elements: dict, default: []}
  state_dir: {description: Our state directory., type: path, required: true}
  service_user: {description: "Who workers run as under systemd; empty: who connects.", type: str, default: ""}
  token: {description: What those who come must show., type: str}
  resumed: {description: Whether this call goes on with what an earlier one started., type: bool, default: false}
attributes:
  check_mode: {support: full, description: Moves nothing and says what would be tried.}
  diff_mode: {support: none, description: The host is left as it was.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: Ends wait
  pd_probe:
    action: serve
    ends: [{task: {id: decode-0, mode: wait, backend: nixl}, python: /opt/pd/sglang-0.5.23/bin/python, env: {}, container: null}]
    token: "{{ lookup('ansible.builtin.password', '/dev/null') }}"
    state_dir: /var/lib/pd
"""

RETURN = r"""
done: {description: Whether nothing is left to do., returned: with move, type: bool, sample: true}
message: {description: How far it is., returned: with move, type: str, sample: "prefill-0 and decode-0: times transfers of 64 MiB"}
ports: {description: By end the port where it waits., returned: with serve, type: dict, sample: {decode-0: 40123}}
results:
  description: What became of every pair.
  returned: with move
  type: list
  sample: [{end: prefill-0, pair: "0", kind: "", gb_s: 43.1, latency_us: 11.0}]
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pdlib.errors import UserError
from ansible.module_utils.pdlib.probe_host import Probe


def main() -> None:
    """Run one step."""
    module = AnsibleModule(
        argument_spec={
            "action": {"type": "str", "choices": ["serve", "move", "stop"], "required": True},
            "ends": {"type": "list", "elements": "dict", "default": []},
            "state_dir": {"type": "path", "required": True},
            "service_user": {"type": "str", "default": ""},
            "token": {"type": "str", "no_log": True},
            "resumed": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    p = module.params
    if module.check_mode:
        module.exit_json(changed=False, done=True, message="", results=[], ports={})
    probe = Probe(p["state_dir"], p["service_user"])
    try:
        if p["action"] == "serve":
            module.exit_json(changed=False, done=True, ports=probe.serve(p["ends"], p["token"]))
        elif p["action"] == "move":
            outcome, results = probe.move(p["ends"], p["token"], p["resumed"])
            module.exit_json(changed=False, done=outcome.done, message=outcome.message, results=results)
        probe.stop()
    except UserError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, done=True)


if __name__ == "__main__":
    main()
