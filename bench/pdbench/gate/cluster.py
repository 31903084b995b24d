"""Checks on what router and engines say of themselves, before and after every load point."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pdbench.gate.check import Check, some
from pdbench.gate.counters import moved, signs_of_restart
from pdbench.gate.rundata import Point, RunData
from pdbench.metrics import input_tokens, output_tokens

#: The role in which sglang-router lists a worker -> the role in the plan.
_ROUTER_ROLES = {"regular": "aggregated"}


def ratio(run: RunData, point: Point) -> Check:
    """The router lists the plan's workers in their roles, all healthy, before and after the point."""
    wanted = Counter((str(w["role"]), _url(w["url"])) for w in run.workers)
    faults: list[str] = []
    evidence: dict[str, Any] = {"plan": run.plan.get("ratio"), "wanted": _by_role(wanted)}
    if not wanted:
        faults.append("plan.json names no workers")
    for end in ("before", "after"):
        side = point.evidence.get(end)
        seen = side.get("router") if isinstance(side, dict) else None
        if not isinstance(seen, dict) or not seen.get("workers"):
            why = seen.get("error") if isinstance(seen, dict) else ""
            faults.append(f"the router's worker list was not read {end} the point{f': {why}' if why else ''}")
            continue
        listed = _listed(seen["workers"])
        running = Counter((str(_ROUTER_ROLES.get(w["worker_type"], w["worker_type"])), _url(w["url"])) for w in listed)
        evidence[end] = _by_role(running)
        faults += [f"{role} {url} was missing at the router {end} the point" for role, url in (wanted - running)]
        faults += [f"the router had {role} {url} {end} the point, which is not in the plan" for role, url in (running - wanted)]
        sick = [w["url"] for w in listed if w.get("is_healthy") is not True]
        faults += [f"the router held {some(sick)} for unhealthy {end} the point"] if sick else []
    message = some(faults, 3) or f"the router ran the plan's {run.plan.get('ratio')}, all healthy, before and after"
    return Check("ratio", not faults, point.index, message, evidence)


def _listed(workers: Any) -> list[dict[str, Any]]:
    rows = workers.get("workers", []) if isinstance(workers, dict) else workers
    return [
        {"url": str(row.get("url")), "worker_type": str(row.get("worker_type")), "is_healthy": row.get("is_healthy")}
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
    ]


def _url(url: str) -> str:
    return url.rstrip("/")


def _by_role(workers: Counter[tuple[str, str]]) -> dict[str, list[str]]:
    return {role: sorted(url for r, url in workers.elements() if r == role) for role in sorted({r for r, _ in workers})}


def served(run: RunData, point: Point) -> Check:
    """Every worker of the plan did its part: its engine's own counter moved during the point."""
    evidence: dict[str, Any] = {}
    faults, unknown = [], []
    for worker in run.workers:
        change = moved(point.evidence, worker["name"], run.engine.served[worker["role"]])
        evidence[worker["name"]] = {"counter": change.counter, "moved": change.amount}
        if change.amount is None:
            unknown.append(change.problem)
        elif change.amount <= 0:
            faults.append(f"{worker['name']} served nothing ({change.counter} moved by {change.amount:g})")
    if not run.workers:
        faults.append("plan.json names no workers")
    faults += [f"cannot tell whether it served: {problem}" for problem in unknown]
    message = some(faults, 3) or f"all {len(run.workers)} workers served requests"
    return Check("workers-served", not faults, point.index, message, evidence)


def engine_counts(run: RunData, point: Point) -> Check:
    """The engines counted at least the tokens that the client received: the answers came from these workers."""
    faults: list[str] = []
    evidence: dict[str, Any] = {}
    wanted = {
        run.engine.prompt_tokens: ("prefill", sum(map(input_tokens, point.answers))),
        run.engine.output_tokens: ("decode", sum(map(output_tokens, point.answers))),
    }
    for counter, (role, received) in wanted.items():
        workers = [w["name"] for w in run.workers if w["role"] in (role, "aggregated")]
        changes = [moved(point.evidence, name, (counter,)) for name in workers]
        counted = sum(change.amount or 0.0 for change in changes)
        problems = [change.problem for change in changes if change.problem]
        evidence[counter] = {"engines": counted, "client": received, "workers": workers}
        if counted < received:
            because = f" ({some(problems, 1)})" if problems else ""
            faults.append(f"{counter} of {some(workers)} moved by {counted:g}, the client's answers imply {received}{because}")
    message = "; ".join(faults) or "the engines counted at least the tokens that the client saw"
    return Check("engine-counts", not faults, point.index, message, evidence)


def restarted(run: RunData, point: Point) -> Check:
    """No worker restarted during the point."""
    signs = {worker["name"]: signs_of_restart(point.evidence, worker["name"], run.engine.lifelines) for worker in run.workers}
    signs = {name: found for name, found in signs.items() if found}
    message = some((f"{name} restarted during the point ({some(found, 1)})" for name, found in signs.items()), 3)
    return Check("no-restart", not signs, point.index, message or "no worker restarted", {"signs": signs})
