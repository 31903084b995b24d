"""Checks on the clients of a run that several made together (`pdbench merge`)."""

from __future__ import annotations

from typing import Any

from pdbench.gate.check import Check, some
from pdbench.gate.rundata import Json, Point, RunData

_ID, _TOGETHER = "clients", "clients-together"
#: Beginnings of the clients may lie apart by this many ms at most, as far as their clocks could be compared: a hundredth of
#: a second in a load point of a second is a hundredth of its rates.
MOST_CLOCK_MS = 10.0


def clients(run: RunData) -> list[Check]:
    """Every client made its share, was on time by itself, and its clock is known; nothing of the kind for one client."""
    if not run.clients:
        return []
    lost = {str(name): str(why) for key in ("lost", "unfinished") for name, why in (run.clients.get(key) or {}).items()}
    there = [str(name) for name in run.clients.get("clients") or []]
    message = some(f"{name}: {why}" for name, why in lost.items()) or f"all {len(there)} clients made their share: {some(there)}"
    whole = Check(_ID, not lost, None, message, {"clients": there, "lost": lost})
    return [whole, *(_at(run, point) for point in run.points)]


def _at(run: RunData, point: Point) -> Check:
    entries: list[Json] = point.summary.get("clients") or []
    evidence: dict[str, Any] = {"clients": entries, "bound_ms": MOST_CLOCK_MS}
    try:
        faults = [fault for entry in entries for fault in _faults(run, entry)]
        unsure = max((1000 * entry["clock"]["error_s"] for entry in entries), default=None)
    except (KeyError, TypeError, ValueError) as why:
        message = f"what summary.json says of the clients is not as `pdbench merge` writes it: {type(why).__name__} {why}"
        return Check(_TOGETHER, False, point.index, message, evidence)
    if unsure is None:
        return Check(_TOGETHER, False, point.index, "no client says when it began", evidence)
    if faults:
        return Check(_TOGETHER, False, point.index, "; ".join(faults), evidence)
    message = f"{len(entries)} clients began together, their clocks known to {unsure:.2f} ms (bound {MOST_CLOCK_MS:g} ms)"
    return Check(_TOGETHER, True, point.index, message, evidence)


def _faults(run: RunData, entry: Json) -> list[str]:
    found = []
    unsure = 1000 * entry["clock"]["error_s"]
    if unsure > MOST_CLOCK_MS:
        found.append(f"{entry['name']}: its clock is known to {unsure:.1f} ms only (bound {MOST_CLOCK_MS:g} ms)")
    if not entry["asked"]:
        return found
    for key, most, what in (
        ("loop_lag_ms", run.bounds.loop_lag_ms, "read delay"),
        ("send_lateness_ms", run.bounds.lateness_ms, "sending after a request was due"),
    ):
        p99 = entry["client"][key]["p99"]
        if p99 is None or p99 > most:
            found.append(f"{entry['name']}: {what} {'not known' if p99 is None else f'p99 {p99:.0f} ms'} (bound {most:g} ms)")
    return found
