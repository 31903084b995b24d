"""Engine counters in evidence.json: what they moved by between the two ends of a load point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdbench.engines import total


@dataclass(frozen=True)
class Scrape:
    """One worker's metrics at one end of a point: ``samples`` by "name{labels}", and why there are none (``error``)."""

    samples: dict[str, float]
    error: str

    def total(self, counter: str) -> float | None:
        """Return the sum over label sets of ``name`` or ``name{label="value"}``; None when there is no such sample."""
        return total(self.samples, counter)


@dataclass(frozen=True)
class Moved:
    """By how much a counter of one worker moved; ``amount`` is None when ``problem`` says why it is not known."""

    counter: str
    amount: float | None
    problem: str = ""


def scrape(evidence: dict[str, Any], end: str, worker: str) -> Scrape:
    """Return a worker's scrape at ``end`` ("before" or "after") of a point's evidence."""
    side = evidence.get(end)
    if not isinstance(side, dict):
        return Scrape({}, f"no evidence was taken {end} the point")
    entry = side.get("workers", {}).get(worker)
    if not isinstance(entry, dict):
        return Scrape({}, f"{worker} is not in the evidence taken {end} the point")
    samples = {str(k): float(v) for k, v in (entry.get("metrics") or {}).items() if isinstance(v, (int, float))}
    if samples:
        return Scrape(samples, "")
    why = entry.get("error") or "it showed no metrics (is --enable-metrics set?)"
    return Scrape({}, f"{worker} {end} the point: {why}")


def moved(evidence: dict[str, Any], worker: str, counters: Sequence[str]) -> Moved:
    """Return the movement of the first of ``counters`` that the worker shows.

    A counter without a sample before the point started from 0: Prometheus clients show a labelled counter only once it
    has moved.
    """
    before, after = scrape(evidence, "before", worker), scrape(evidence, "after", worker)
    if before.error or after.error:
        return Moved(counters[0], None, before.error or after.error)
    for counter in counters:
        end = after.total(counter)
        if end is not None:
            return Moved(counter, end - (before.total(counter) or 0.0))
    return Moved(counters[0], None, f"{worker} shows none of {', '.join(counters)} (it never moved, or the engine lacks it)")


def info(evidence: dict[str, Any], end: str, worker: str) -> dict[str, Any]:
    """Return what a worker said of itself at ``end`` of a point (a part of its /server_info); empty when it did not."""
    side = evidence.get(end)
    entry = side.get("workers", {}).get(worker) if isinstance(side, dict) else None
    found = entry.get("server_info") if isinstance(entry, dict) else None
    return found if isinstance(found, dict) else {}


def signs_of_restart(evidence: dict[str, Any], worker: str, lifelines: Sequence[str]) -> list[str]:
    """Return what a process does not do while it lives: a counter of ``lifelines`` that fell, another start-up time.

    Nothing is returned for a worker without evidence: the checks that need it say so.
    """
    before, after = scrape(evidence, "before", worker), scrape(evidence, "after", worker)
    if before.error or after.error:
        return []
    signs = []
    for counter in lifelines:
        start, end = before.total(counter) or 0.0, after.total(counter) or 0.0
        if end < start:
            signs.append(f"{counter} fell from {start:g} to {end:g}")
    started = [info(evidence, end, worker).get("startup_time") for end in ("before", "after")]
    if None not in started and started[0] != started[1]:
        signs.append(f"startup_time changed from {started[0]} to {started[1]}")
    return signs
