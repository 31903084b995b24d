"""Check on what somebody may have left switched on: a slowed scheduler, a profiler."""

from __future__ import annotations

from pdbench.gate.check import Check, some
from pdbench.gate.counters import info
from pdbench.gate.rundata import Point, RunData

_STARTED, _ENDED = "Profiling starts", "Profiling done"


def leftovers(run: RunData, point: Point) -> Check:
    """Every worker confirmed before the point that it runs at full speed, and no worker was slowed or profiled after it."""
    faults = []
    evidence = {}
    unknown = []
    for worker in run.workers:
        name, step = worker["name"], point.reset_of(worker["name"])
        after = info(point.evidence, "after", name)
        evidence[name] = {"reset": step, "after": {key: after.get(key) for key in ("slow_down_s", "profiling") if key in after}}
        if run.engine.full_speed[0] and step.get("full_speed") != "ok":
            faults.append(f"{name} did not confirm that slow_down is off ({step.get('full_speed') or 'it was not asked'})")
        if step.get("profile") not in (None, "none", "unknown", "stopped"):
            faults.append(f"a profile was running on {name} and was not stopped ({step['profile']})")
        if after.get("slow_down_s"):
            faults.append(f"{name} was slowed down after the point: {after['slow_down_s']:g} s before each step")
        if after.get("profiling"):
            faults.append(f"a profile was running on {name} after the point")
        elif "profiling" not in after:
            log = run.log_of(worker)
            if log.rfind(_STARTED) > log.rfind(_ENDED):
                faults.append(f"a profile was started on {name} and not ended (its log)")
            unknown.append(name)
    if not run.workers:
        faults.append("plan.json names no workers")
    doubt = f"; whether {some(unknown, 2)} were profiled, the engine does not say" if unknown else ""
    message = some(faults, 3) or f"slow_down is off on all {len(run.workers)} workers{doubt or ', and no profile runs'}"
    return Check("no-leftovers", not faults, point.index, message, evidence)
