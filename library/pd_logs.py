#!/usr/bin/python
"""The ends of the units' logs."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_logs
short_description: Return the end of every unit's log
description:
  - Reads only; a run keeps what it returns beside its records.
  - A log goes on from one process of the unit to the next; what is returned is the last one's.
options:
  state_dir: {description: State directory of the host., type: path, required: true}
  service_manager: {description: Who runs the units., type: str, choices: [systemd, supervisord], required: true}
  units: {description: Names of the units., type: list, elements: str, required: true}
  keep:
    description: A regular expression; lines that match, and five after each, are kept wherever they stand since the last start.
    type: str
    default: ""
attributes:
  check_mode: {support: full, description: Reads only.}
  diff_mode: {support: none, description: Reads only.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: Logs
  pd_logs: {state_dir: /var/lib/pd, service_manager: systemd, units: [pd-prefill-0]}
  register: _logs
"""

RETURN = r"""
logs: {description: The ends of the logs by unit., returned: always, type: dict, sample: {pd-prefill-0: ready}}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pdlib.managers import MANAGERS, since_start

#: of each log
_LINES = 300


def main() -> None:
    """Read and return."""
    module = AnsibleModule(
        argument_spec={
            "state_dir": {"type": "path", "required": True},
            "service_manager": {"type": "str", "choices": ["systemd", "supervisord"], "required": True},
            "units": {"type": "list", "elements": "str", "required": True},
            "keep": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    p = module.params
    manager = MANAGERS[p["service_manager"]](p["state_dir"], "", "")
    logs = {}
    for unit in p["units"]:
        whole = manager.log_tail(unit, _LINES)
        end = since_start(whole)
        if len(end) < len(whole):
            # What an earlier process said, a crash perhaps: for people. Checks read the last process's alone.
            logs[f"{unit}.before"] = whole[: len(whole) - len(end)]
        kept = manager.log_matching(unit, p["keep"], 60, 5) if p["keep"] else ""
        missing = [line for line in kept.splitlines() if line not in end]
        logs[unit] = "\n".join([*missing, *(["[...]"] if missing else []), end])
    module.exit_json(changed=False, logs=logs)


if __name__ == "__main__":
    main()
