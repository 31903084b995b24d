#!/usr/bin/python
"""What the workers say of their queues, right now."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_observe
short_description: What the workers say of their queues, right now
description:
  - Asks every worker of the deployed plan for its metrics, all at once, from the router's host, which reaches them as clients'
    requests do. The action plugin pd_watch calls it again and again.
options:
  state_dir: {description: State directory of the router's host; plan and key lie there., type: path, required: true}
  timeout: {description: Longest wait for an answer in seconds., type: float, default: 5}
attributes:
  check_mode: {support: full, description: Nothing is changed in either.}
  diff_mode: {support: none, description: Nothing is changed.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: Queues
  pd_observe: {state_dir: /var/lib/pd}
"""

RETURN = r"""
at_s: {description: "When that was, on the host's monotonic clock.", returned: always, type: float, sample: 8123.4}
plan:
  description: Of the deployed plan what a decision takes; empty when nothing is deployed.
  returned: always
  type: dict
  sample: {ratio: 1p1d, router: {name: sglang-router, membership: workers}, workers: [{name: prefill-0, role: prefill, url: "http://h1:30000", gpus: 1}]}
figures:
  description: By worker what it says, as pdlib.autoscale names it.
  returned: always
  type: dict
  sample:
    prefill-0:
      {queue_s: 1.2, queued: 40, gap_s: 0.0, gaps: 0, waiting: 3, prealloc: 0, held: 2, running: 1, usage: 0.2, most: 64, answer_s: 0.0, answers: 0}
silent: {description: By worker why it says nothing., returned: always, type: dict, sample: {decode-1: Connection refused}}
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pdlib import ask, autoscale, deployed, keys
from ansible.module_utils.pdlib.errors import UserError


def look(url: str, key: Optional[str], timeout_s: float) -> Tuple[Optional[autoscale.Figures], str]:
    """Return what one worker says, or (None, why it does not)."""
    status, page = ask.request("GET", f"{url}/metrics", key, timeout_s=timeout_s)
    if status != 200:
        return None, f"HTTP {status}" if status else page
    status, loads = ask.request("GET", f"{url}/v1/loads?include=core,disagg", key, timeout_s=timeout_s)
    if status not in (200, 404, 405, 501):
        # One that is too busy to say has a queue, and half of what it says would hide that.
        return None, f"/v1/loads: HTTP {status}" if status else loads
    found = autoscale.read(page, loads if status == 200 else None)
    return found, "" if found else "neither /v1/loads nor /metrics counts its requests (is --enable-metrics set?)"


def main() -> None:
    """Ask all of them."""
    module = AnsibleModule(
        argument_spec={
            "state_dir": {"type": "path", "required": True},
            "timeout": {"type": "float", "default": 5},
        },
        supports_check_mode=True,
    )
    p = module.params
    try:
        plan = autoscale.slim(deployed.read(p["state_dir"]) or {})
        key = keys.kept(Path(p["state_dir"]) / keys.FILES[keys.API])
    except UserError as error:
        module.fail_json(msg=str(error))
    urls = {worker["name"]: worker["url"] for worker in plan.get("workers", [])}
    at = time.monotonic()
    with ThreadPoolExecutor(min(32, len(urls) or 1)) as pool:
        told = list(pool.map(lambda url: look(url, key, p["timeout"]), urls.values()))
    figures: Dict[str, Any] = {name: asdict(found) for name, (found, _) in zip(urls, told) if found}
    silent = {name: why for name, (found, why) in zip(urls, told) if not found}
    module.exit_json(changed=False, at_s=(at + time.monotonic()) / 2, plan=plan, figures=figures, silent=silent)


if __name__ == "__main__":
    main()
