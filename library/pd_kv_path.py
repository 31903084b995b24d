#!/usr/bin/python
"""What the action plugin pd_kv_path takes and returns."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_kv_path
short_description: Try the paths of the KV cache between prefill and decode hosts before workers start
description:
  - Calls C(pd_probe) on the hosts. With C(action=serve) one end of every path waits on its host, with C(move) the other ends come
    to them, and C(stop) ends what waits. A path that is broken, or a host where nothing can be started, fails none of these.
  - C(judge), on the controller, prints the matrix, writes C(kv_probe.json), and fails when a path is broken or is not the expected
    one, naming both ends, the likely cause and what to do. It only warns where C(kv_probe) is C(report).
options:
  action: {description: What to do., type: str, choices: [serve, move, stop, judge], required: true}
  work: {description: "What there is to probe, as pd_plan made it.", type: dict, required: true}
  state_dir: {description: Our state directory on the host., type: path}
  service_user: {description: "Who workers run as under systemd; empty: who connects.", type: str, default: ""}
  results_dir: {description: "With C(judge) where kv_probe.json goes, relative to the checkout.", type: str, default: results}
attributes:
  action: {support: full, description: "Prints and judges on the controller; programs run on the hosts."}
  check_mode: {support: full, description: Moves nothing and says over how many paths it would.}
  diff_mode: {support: none, description: Hosts are left as they were.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: Decode hosts wait
  pd_kv_path: {action: serve, work: "{{ pd_probe }}", state_dir: /var/lib/pd, service_user: pd}
  when: inventory_hostname in pd_probe.waiting
- name: Prefill hosts write
  pd_kv_path: {action: move, work: "{{ pd_probe }}", state_dir: /var/lib/pd, service_user: pd}
  when: inventory_hostname in pd_probe.moving
- name: Is it as the plan has it?
  pd_kv_path: {action: judge, work: "{{ pd_probe }}"}
  run_once: true
"""

RETURN = r"""
ports: {description: By end the port where it waits., returned: with serve, type: dict, sample: {decode-0: 40123}}
results:
  description: What became of every pair.
  returned: with move
  type: list
  sample: [{end: prefill-0, pair: "0", kind: "", gb_s: 43.1, latency_us: 11.0}]
trouble: {description: Why no program could be started., returned: when none could, type: str, sample: "/opt/x: No such file or directory"}
kv_probe:
  description: What is known of this plan's paths, for the deployed plan.
  returned: with judge
  type: dict
  sample: {5f2a90c1d3b7e684: {prefill: prefill-0 (h1), decode: decode-0 (h2), seen: rdma, gb_s: 43.1, latency_us: 11.0}}
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Say why nothing was done: Ansible did not find the action plugin of this name."""
    module = AnsibleModule(
        argument_spec={
            "action": {"type": "str", "choices": ["serve", "move", "stop", "judge"], "required": True},
            "work": {"type": "dict", "required": True},
            "state_dir": {"type": "path"},
            "service_user": {"type": "str", "default": ""},
            "results_dir": {"type": "str", "default": "results"},
        },
        supports_check_mode=True,
    )
    module.fail_json(msg="pd_kv_path runs on the controller: use the checkout's ansible.cfg, which names plugins/action")


if __name__ == "__main__":
    main()
