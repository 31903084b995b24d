#!/usr/bin/python
"""What the action plugin pd_results takes and returns."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_results
short_description: Make room for a run on the controller, unpack it, judge and report it
description:
  - C(room) fails when the records would not fit. C(unpack) puts a fetched run below C(bench.results_dir); a run that nobody
    watched is judged and reported there, too. C(report) writes the manifest, the units' logs, the verdict, plots and the
    page, points C(latest) to the run, and fails when the run is invalid; its records are kept. C(profile) puts the traces that
    were fetched beside the run, opens them all, prints what they say, and fails when some are missing.
options:
  action: {description: What to do., type: str, choices: [room, unpack, report, profile], required: true}
  bench: {description: The run as pd_plan made it., type: dict, required: true}
  run: {description: "With C(action=unpack): the run's C(run_id), and how it was C(found).", type: dict}
attributes:
  action: {support: full, description: Runs on the controller only.}
  check_mode: {support: full, description: Does nothing.}
  diff_mode: {support: none, description: There is no file to show.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: Validity, plots, report
  pd_results: {action: report, bench: "{{ pd_bench }}"}
  run_once: true
"""

RETURN = r"""
folder: {description: "The run's folder.", returned: C(action=report), type: str, sample: results/20260101-120000-3p1d}
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Say why nothing was done: Ansible did not find the action plugin of this name."""
    module = AnsibleModule(
        argument_spec={
            "action": {"type": "str", "choices": ["room", "unpack", "report", "profile"], "required": True},
            "bench": {"type": "dict", "required": True},
            "run": {"type": "dict"},
        },
        supports_check_mode=True,
    )
    module.fail_json(msg="pd_results runs on the controller: use the checkout's ansible.cfg, which names plugins/action")


if __name__ == "__main__":
    main()
