"""Watch a deployment's queues, window by window, until another ratio would serve its load better."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "library" / "module_utils"))

from pdlib import autoscale, processes  # noqa: E402
from pdlib.errors import UserError  # noqa: E402

Json = dict[str, Any]
#: so many windows in a row without a word from the router's host, and it is gone
PATIENCE = 6


class ActionModule(ActionBase):
    """`pd_watch: {job: FILE, plan: {...}, state_dir: /var/lib/pd}`; documented in library/pd_watch.py."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset({"job", "plan", "state_dir"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return ``ratio``: the one to change to, "" once the time is over."""
        super().run(tmp, task_vars)
        plan = self._task.args["plan"]
        try:
            autoscale.check(plan)
        except UserError as error:
            raise AnsibleActionFail(str(error)) from None
        job = json.loads(Path(self._task.args["job"]).read_text())
        return {"changed": False, "ratio": self._watch(job, plan, task_vars or {})}

    def _watch(self, job: Json, plan: Json, variables: dict[str, Any]) -> str:
        rule = autoscale.Controller(autoscale.Rule(**job["rule"]))
        rest = (job.get("rest_until") or 0) - time.time()
        if rest > 0:
            rule.changed_at = time.monotonic() + rest - rule.rule.rest_s
        roles = {worker["name"]: worker["role"] for worker in plan["workers"]}
        before: tuple[float, dict[str, autoscale.Figures]] | None = None
        lost = 0
        due = time.monotonic()
        while job.get("until") is None or time.time() < job["until"]:
            time.sleep(max(0.0, due - time.monotonic()))
            if not processes.alive(job["pid"]):
                return ""
            due = max(due + job["every_s"], time.monotonic())
            told, why = self._look(plan, variables)
            lost = 0 if told else lost + 1
            if lost >= PATIENCE:
                raise AnsibleActionFail(f"{plan['router']['host']} has not answered for {lost} windows: {why}")
            silent = {plan["router"]["host"]: why} if told is None else told["silent"]
            if silent or told is None:
                # Who is silent may be overloaded or dead: nothing is decided by what the others say.
                before = None
                self._note(job, ratio=plan["ratio"], silent=silent)
                continue
            after = told["at_s"], {name: autoscale.Figures(**own) for name, own in told["figures"].items()}
            if before is not None and after[0] > before[0]:
                seen = autoscale.observed(before[1], after[1], roles, after[0] - before[0])
                wanted = autoscale.wish(rule.rule, seen)
                move = rule.decide(time.monotonic(), seen)
                ratio = autoscale.next_ratio(plan, move) if move else None
                pressed = autoscale.pressures(rule.rule, seen)
                self._note(
                    job, ratio=plan["ratio"], says=autoscale.words(rule.rule, seen), pressures=pressed, wish=wanted,
                    to=ratio, seen=vars(seen),
                )  # fmt: skip
                if move and (ratio is None or job["dry_run"]):
                    rule.done(time.monotonic())
                elif ratio:
                    return ratio
            before = after
        return ""

    def _look(self, plan: Json, variables: dict[str, Any]) -> tuple[Json | None, str]:
        """Return what the workers say, or (None, why the host that asks them does not answer)."""
        arguments = {"plan": {"workers": [{k: w[k] for k in ("name", "url")} for w in plan["workers"]]}}
        try:
            told = self._execute_module(
                module_name="pd_observe",
                module_args={**arguments, "state_dir": self._task.args["state_dir"]},
                task_vars=variables,
            )
        except AnsibleConnectionFailure as error:
            return None, str(error)
        if told.get("unreachable"):
            return None, str(told.get("msg"))
        if told.get("failed"):
            raise AnsibleActionFail(str(told.get("msg") or told.get("module_stderr")))
        return dict(told), ""

    @staticmethod
    def _note(job: Json, **what: Any) -> None:
        with open(job["log"], "a", encoding="utf-8") as log:
            log.write(json.dumps({"at": round(time.time(), 1), "kind": "window", **what}) + "\n")
