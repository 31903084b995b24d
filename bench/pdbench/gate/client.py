"""Checks on the run as a whole and on whether the client kept up with the load that it was to make."""

from __future__ import annotations

import math
from typing import Any

from pdbench.gate.check import Check, some
from pdbench.gate.rundata import EVIDENCE, PLAN, PROGRESS, REQUESTS, SUMMARY, Point, RunData
from pdbench.metrics import Stats, stats, ttft_s

#: Delivered over configured load, at most; the other bounds are those that the run was started with (run.json).
MOST_DELIVERED = 1.1
#: A client late by more than this share of the point's p99 TTFT, at p99, is within bounds and worth a word.
WORTH_A_WORD = 0.1
_PLACE = ("point", "points", "done", "total")


def files(run: RunData) -> Check:
    """Every file that the verdict rests on is there and readable."""
    bad = {name: run.problems[name] for name in (PLAN, REQUESTS, SUMMARY, EVIDENCE) if name in run.problems}
    message = some(f"{name} is {why}" for name, why in bad.items()) or "all files of the run are there"
    return Check("files", not bad, None, message, {"problems": bad})


def state(run: RunData) -> Check:
    """The run came to its end, and measured something."""
    if PROGRESS in run.problems:
        return Check("complete", False, None, f"incomplete: {PROGRESS} is {run.problems[PROGRESS]}", {})
    seen = run.progress.get("state")
    evidence = {key: run.progress.get(key) for key in (*_PLACE, "state", "message")}
    if seen != "done":
        said = run.progress.get("message")
        where = "point {point} of {points}, request {done} of {total}".format_map({**dict.fromkeys(_PLACE), **evidence})
        return Check("complete", False, None, f"incomplete: {seen} at {where}{f': {said}' if said else ''}", evidence)
    points = run.progress.get("points")
    measured = sum(1 for point in run.points if point.records)
    if not measured or (isinstance(points, int) and points != measured):
        return Check("complete", False, None, f"incomplete: {measured} of {points} load points have records", evidence)
    return Check("complete", True, None, f"the run came to its end ({measured} load points)", evidence)


def _late(point: Point, name: str, what: str, found: Stats | None, bound: float) -> Check:
    """Judge a p99 of the client, ms; latencies are compared with it at the same percentile."""
    p99 = (found or {}).get("p99")
    evidence: dict[str, Any] = {"measured_ms": found, "bound_ms": bound}
    if not isinstance(p99, (int, float)):
        return Check(name, False, point.index, f"the client recorded nothing of it: {what}", evidence)
    message = f"{what}: p99 {p99:.1f} ms (bound {bound:g} ms)"
    longest = stats(1000 * ttft_s(r) for r in point.good)["p99"]
    if p99 > bound:
        return Check(name, False, point.index, f"{message}: the client did not keep up", evidence)
    if longest and p99 > WORTH_A_WORD * longest:
        evidence["caution"] = (
            f"{what} is p99 {p99:.1f} ms beside a p99 TTFT of {longest:.1f} ms: the client's own part in it is large"
        )
    return Check(name, True, point.index, message, evidence)


def lag(run: RunData, point: Point) -> Check:
    """What arrived was read soon: what comes in one read has one stamp, and the next request waits for it."""
    found = point.client.get("loop_lag_ms")
    measured = found if isinstance(found, dict) else None
    return _late(point, "client-loop", "read delay of the client", measured, run.bounds.loop_lag_ms)


def lateness(run: RunData, point: Point) -> Check:
    """Requests went out when they were due."""
    waits = (1000 * (r.sent_s - r.scheduled_s) for r in point.records)
    late = stats(wait for wait in waits if not math.isnan(wait))
    return _late(point, "client-on-time", "sending after a request was due", late, run.bounds.lateness_ms)


def load(run: RunData, point: Point) -> Check:
    """The load that was configured is the load that was made (client.delivered_load, pdbench.run.watch)."""
    share = point.client.get("delivered_load")
    least = run.bounds.delivered
    evidence = {"delivered_load": share, "bounds": [least, MOST_DELIVERED]}
    if not isinstance(share, (int, float)):
        return Check("client-load", False, point.index, "the client did not record which load it delivered", evidence)
    ok = least <= share <= MOST_DELIVERED
    message = f"delivered {share:.1%} of the configured load ({point.label}; bounds {least:.0%} to {MOST_DELIVERED:.0%})"
    return Check("client-load", ok, point.index, message, evidence)
