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
#: so many windows in a row without a word from the router's host, and it is gone; from a worker, and somebody must look at it
PATIENCE, SILENT = 6, 30


class ActionModule(ActionBase):
    """`pd_watch: {job: FILE, state_dir: /var/lib/pd}`; documented in library/pd_watch.py."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset({"job", "state_dir"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return ``ratio``: the one to change to, "" once the time is over."""
        super().run(tmp, task_vars)
        job = json.loads(Path(self._task.args["job"]).read_text())
        try:
            return {"changed": False, "ratio": self._watch(job, task_vars or {})}
        except UserError as error:
            raise AnsibleActionFail(str(error)) from None

    def _watch(self, job: Json, variables: dict[str, Any]) -> str:
        """Return the ratio to change to, "" once the time is over; raise UserError for what cannot be watched."""
        host, rule = variables["inventory_hostname"], self._rule(job)
        before: Json | None = None
        plan: Json | None = None
        lost, silent, due = 0, 0, time.monotonic()
        while job.get("until") is None or time.time() < job["until"]:
            time.sleep(max(0.0, due - time.monotonic()))
            if not processes.alive(job["pid"]):
                return ""
            due = max(due + job["every_s"], time.monotonic())
            told, why = self._look(variables)
            if told is not None:
                autoscale.check(told["plan"])
                if plan is not None and plan != told["plan"]:
                    # Somebody deployed something else in between.
                    rule.changed_at, before = time.monotonic(), None
                    rule.forget()
                plan = told["plan"]
            quiet = {host: why} if told is None else told["silent"]
            lost, silent = (lost + 1 if told is None else 0), (silent + 1 if quiet else 0)
            if told is None or quiet:
                # Who is silent may be overloaded or dead: nothing is decided by what the others say, nor across the gap.
                self._note(job, ratio=plan["ratio"] if plan else None, silent=quiet)
                before = None
                rule.forget()
                if lost >= PATIENCE or silent >= SILENT:
                    said = "; ".join(f"{name}: {what}" for name, what in quiet.items())
                    raise UserError(f"{max(lost, silent)} windows in a row could not be judged ({said}): doctor.yml says more")
                continue
            if before is not None and told["at_s"] > before["at_s"]:
                ratio = self._judge(job, rule, before, told)
                if ratio:
                    return ratio
            before = told
        return ""

    @staticmethod
    def _rule(job: Json) -> autoscale.Controller:
        """Return the rule, still resting from the change before where that is so."""
        rule = autoscale.Controller(autoscale.Rule(**job["rule"]))
        rest = (job.get("rest_until") or 0) - time.time()
        if rest > 0:
            rule.changed_at = time.monotonic() + rest - rule.rule.rest_s
        return rule

    def _judge(self, job: Json, rule: autoscale.Controller, before: Json, told: Json) -> str:
        """Note what a window says; return the ratio to change to, "" for none."""
        plan = told["plan"]
        roles = {worker["name"]: worker["role"] for worker in plan["workers"]}
        ends = [{name: autoscale.Figures(**own) for name, own in look["figures"].items()} for look in (before, told)]
        seen = autoscale.observed(ends[0], ends[1], roles, told["at_s"] - before["at_s"])
        leave = autoscale.step(plan)
        move = rule.decide(time.monotonic(), seen, leave)
        wanted = autoscale.next_ratio(plan, move) if move else None
        ratio = "" if [plan["ratio"], wanted] in job["unfit"] else wanted or ""
        self._note(
            job, ratio=plan["ratio"], says=autoscale.words(rule.rule, seen), pressures=autoscale.pressures(rule.rule, seen),
            wish=autoscale.wish(rule.rule, seen, leave), to=ratio or None, unfit=None if ratio else wanted, seen=vars(seen),
        )  # fmt: skip
        if move and not ratio:
            rule.done(time.monotonic())
        return ratio

    def _look(self, variables: dict[str, Any]) -> tuple[Json | None, str]:
        """Return what the workers say, or (None, why the host that asks them does not answer)."""
        arguments = {"state_dir": self._task.args["state_dir"]}
        try:
            told = self._execute_module(module_name="pd_observe", module_args=arguments, task_vars=variables)
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
