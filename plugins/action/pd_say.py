"""The table at the end of a verb: what happened on every host, and what to type next."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "library" / "module_utils"))

from pdlib import tables  # noqa: E402

display = Display()

NEXT = {
    "deploy": "next: ansible-playbook bench.yml    (ansible-playbook teardown.yml stops everything)",
    "bench": "",
    "profile": "",
    "rebalance": "",
    "teardown": "next: ansible-playbook deploy_pd.yml",
}


#: What roles register, in the order in which it happens.
STEPS = ("__pd_firewall", "__pd_runtime", "__pd_installed", "__pd_model", "__pd_copied", "__pd_units", "__pd_narrowed")


class ActionModule(ActionBase):
    """`pd_say: {verb: deploy}`; documented in library/pd_say.py."""

    _VALID_ARGS = frozenset({"verb"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Print; change nothing."""
        super().run(tmp, task_vars)
        variables = task_vars or {}
        planned = variables["__pd_planned"]
        rows = []
        for host in variables["ansible_play_hosts_all"]:
            steps = [variables["hostvars"][host].get(name, {}) for name in STEPS]
            changes = [change for step in steps for change in step.get("changes") or []]
            took = sum(step.get("seconds") or 0.0 for step in steps)
            idle = "nothing to do" if host in variables["ansible_play_hosts"] else "went no further"
            rows.append([host, tables.grouped(changes) or idle, tables.duration(took) if took >= 0.05 else ""])
        verb = self._task.args["verb"]
        if not self._task.check_mode:
            self._keep_copy(planned, verb)
        plan = planned["pd_plan"]
        text = tables.table(["host", "what happened", "took"], rows)
        if verb == "rebalance":
            text = self._moved(variables.get("ansible_facts", {}).get("pd_moved", []), planned["pd_moves"]["moves"])
        if plan:
            members = variables.get("__pd_router", {})
            left = [] if verb == "rebalance" else planned["pd_leaving"]
            changes = [f"let go of {name}" for name in left] + members.get("changes", [])
            text += f"\nrouter: {tables.grouped(changes)}" if changes else ""
            pairs = members.get("pairs") or []
            if pairs:
                slowest = max(pair["seconds"] for pair in pairs)
                what = "prefill-decode pairs serve" if plan["pairs"] else "workers serve"
                text += f"\n{len(pairs)} of {len(pairs)} {what} (slowest first answer {slowest:.2f} s)"
            when = "would be ready" if self._task.check_mode else "ready"
            text += f"\n{when}: {plan['router']['url']}  ({plan['ratio']}, {plan['served_model_name']})"
            own = planned["pd_owner"]["own_key"]
            text += f"\nits key: {own}" if own else ""
            text += f"\nthe model is not whole: {plan['truncated']}" if plan.get("truncated") else ""
        display.display("\n" + text + ("\n" + NEXT[verb] if NEXT[verb] else "") + "\n")
        return {"changed": False}

    @staticmethod
    def _moved(done: list[dict[str, Any]], moves: list[dict[str, Any]]) -> str:
        """Return the moves with what each took; number 0 is what an interrupted command had left."""
        took = {row["number"]: row for row in done}
        rows = [{"number": 0, "says": "what an interrupted command left"}] if took.get(0, {}).get("changes") else []
        names = ("drained", "restarted", "admitted")
        table = [
            [row["says"], *(tables.duration(took[row["number"]][name]) for name in names)]
            for row in [*rows, *moves]
            if row["number"] in took
        ]
        return tables.table(["move", "drained in", "restarted in", "admitted in"], table) if table else "no worker changes"

    @staticmethod
    def _keep_copy(planned: dict[str, Any], verb: str) -> None:
        """Keep a copy of the deployed plan on the controller, for planning without contact; after a teardown there is none."""
        path = Path(planned["pd_owner"]["plan_copy"])
        if verb == "teardown":
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(json.dumps(planned["pd_plan"], indent=1, sort_keys=True) + "\n")
