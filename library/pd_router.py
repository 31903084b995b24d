#!/usr/bin/python
"""The running router's members and readiness."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_router
short_description: Make the running router know exactly the plan's workers, and prove that they serve
description:
  - C(remove) takes workers out that are about to stop. C(converge) adds what is missing and waits until the router counts
    every worker as healthy; then one request goes over every prefill-decode pair, to both ends directly.
  - C(leave) is C(remove) for workers that others stand in for. It is refused unless a healthy worker of each role is left, and
    done when those that left have answered all their requests. C(admit) is C(converge) for workers that are new, and asks over
    their pairs before the router sends clients there.
  - A router is not restarted for a change of members, unless it takes them only at its start (plan.router.membership).
options:
  action: {description: What to do., type: str, choices: [remove, converge, leave, admit], required: true}
  plan: {description: The plan., type: dict, required: true}
  leaving:
    description: With C(remove), URLs of workers that stop or start anew; those that come back are taken out, too.
    type: list
    elements: str
    default: []
  names: {description: "With C(leave), the workers of C(plan) that leave.", type: list, elements: str, default: []}
  state_dir: {description: State directory of the router's host; the key lies there., type: path, required: true}
  pair_timeout: {description: Longest wait for a pair's answer in seconds., type: int, default: 120}
  resumed: {description: Whether this call goes on with what an earlier one started., type: bool, default: false}
attributes:
  check_mode: {support: full, description: Says which members would change.}
  diff_mode: {support: none, description: There is no file to show.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: The router knows the workers
  pd_poll:
    module: pd_router
    args: {action: converge, plan: "{{ pd_plan }}", state_dir: /var/lib/pd}
"""

RETURN = r"""
done: {description: Whether all is well., returned: always, type: bool, sample: true}
message: {description: What is waited for., returned: always, type: str, sample: "waiting for the router"}
changes: {description: Members added and removed., returned: always, type: list, sample: []}
keep: {description: "By host, units that serve.", returned: with C(action=leave), type: dict, sample: {h1: [pd-prefill-0]}}
pairs:
  description: What every pair answered.
  returned: when done
  type: list
  sample: [{prefill: prefill-0, decode: decode-0, seconds: 0.1, error: ""}]
"""

import time
from pathlib import Path
from typing import Any, Dict, List

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pdlib import drain, gateway, keys
from ansible.module_utils.pdlib.errors import UserError
from ansible.module_utils.pdlib.steps import Outcome


def main() -> None:
    """Run one step."""
    module = AnsibleModule(
        argument_spec={
            "action": {"type": "str", "choices": ["remove", "converge", "leave", "admit"], "required": True},
            "plan": {"type": "dict", "required": True},
            "leaving": {"type": "list", "elements": "str", "default": []},
            "names": {"type": "list", "elements": "str", "default": []},
            "state_dir": {"type": "path", "required": True},
            "pair_timeout": {"type": "int", "default": 120},
            "resumed": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    p, plan = module.params, module.params["plan"]
    wanted = gateway.wanted_members(plan)
    pairs, keep = [], {}
    try:
        # What the running router was started with; a key that goes is still needed until the units have changed.
        key = keys.kept(Path(p["state_dir"]) / keys.FILES[keys.API])
        router = gateway.Gateway(plan["router"]["url"], key, plan["router"])
        if p["action"] == "remove":
            staying = [member for member in wanted if member.url not in p["leaving"]]
            outcome = router.remove_surplus(staying, module.check_mode)
        elif p["action"] == "leave":
            outcome = leave(router, plan, p["names"], module.check_mode)
            keep = serving(router, plan)
        elif p["action"] == "admit" and not module.check_mode:
            outcome, pairs = router.admit(plan, p["pair_timeout"], p["resumed"])
        else:
            outcome = router.converge(wanted, module.check_mode, p["resumed"])
            if outcome.done and not module.check_mode:
                pairs = router.probe_pairs(plan, p["pair_timeout"])
    except UserError as error:
        module.fail_json(msg=str(error))
    broken = [pair for pair in pairs if pair["error"]]
    if broken:
        lines = [f"{pair['prefill'] or 'worker'} -> {pair['decode']}: {pair['error']}" for pair in broken]
        module.fail_json(msg=f"{len(broken)} of {len(pairs)} paths do not serve:\n" + "\n".join(lines), pairs=pairs)
    module.exit_json(
        changed=bool(outcome.changed),
        done=outcome.done,
        message=outcome.message,
        changes=outcome.changed,
        pairs=pairs,
        keep=keep,
    )


def leave(router: gateway.Gateway, plan: Dict[str, Any], names: List[str], check: bool) -> Outcome:
    """Take workers out of the router and wait until they have nothing left to do."""
    if not names:
        return Outcome(done=True)
    staying = [gateway.member_of(worker) for worker in plan["workers"] if worker["name"] not in names]
    known = router.members()
    if known is None and not check:
        time.sleep(1.0)
        return Outcome(message=f"waiting for the router at {router.url}")
    if gateway.difference(known or [], staying).remove:
        router.check_floor(staying)
    outcome = router.remove_surplus(staying, check)
    if check or not outcome.done:
        return outcome
    urls = {worker["name"]: worker["url"] for worker in plan["workers"] if worker["name"] in names}
    drained = drain.wait(urls, router.request)
    drained.changed = outcome.changed
    return drained


def serving(router: gateway.Gateway, plan: Dict[str, Any]) -> Dict[str, List[str]]:
    """By host, the units of workers that the router has, and its own while it answers."""
    known = router.members()
    if known is None:
        return {}
    members = {member for _, member, _ in known}
    ranks = [rank for worker in plan["workers"] if gateway.member_of(worker) in members for rank in worker["ranks"]]
    found: Dict[str, List[str]] = {}
    for entry in [*ranks, plan["router"]]:
        found.setdefault(entry["host"], []).append(entry["unit"][: -len(".service")])
    return found


if __name__ == "__main__":
    main()
