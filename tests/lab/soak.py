"""The pure parts of a soak: which fault when, what became of every request, and whether a process grows."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

KINDS = ("kill", "partition", "slow", "disk", "clock")
#: What an account needs of a request.
COLUMNS = ("index", "scheduled_s", "sent_s", "end_s", "ok", "error")
#: Seconds without a fault: at the begin, between two, and at the end.
CALM_S, GAP_S, TAIL_S = 20.0, 12.0, 25.0
#: How long a fault lasts before it is undone; a kill is undone by the service manager.
LASTS_S: Mapping[str, tuple[float, float]] = {
    "kill": (0.0, 0.0), "partition": (5.0, 15.0), "slow": (8.0, 20.0), "disk": (8.0, 20.0), "clock": (6.0, 15.0),
}  # fmt: skip
#: A cable's rate and its delay in ms each way.
SLOW = (("20mbit", 0), ("", 25), ("5mbit", 0), ("", 80))


@dataclass(frozen=True)
class Fault:
    """A fault: where it is (units, hosts), when it begins at the earliest, how long it lasts, and how it is made."""

    kind: str
    where: tuple[str, ...]
    at_s: float
    lasts_s: float
    how: str = ""


@dataclass(frozen=True)
class Window:
    """A fault as it was: from what moment to the one at which the deployment was seen to serve again (None: it was not)."""

    fault: Fault
    begin_s: float
    healed_s: float | None

    def touches(self, begin_s: float, end_s: float) -> bool:
        """Whether something that took so long met the fault."""
        return begin_s <= (math.inf if self.healed_s is None else self.healed_s) and end_s >= self.begin_s


def schedule(seed: int, seconds: float, workers: Sequence[str], hosts: Sequence[str], clocks: Sequence[str]) -> list[Fault]:
    """Return the faults of a soak, one at a time; every kind comes before any comes again.

    ``workers`` are killed; ``hosts`` are cut from each other, slowed, and have their disks filled; ``clocks`` are stepped.
    """
    rng, faults, bag = random.Random(seed), list[Fault](), list[str]()
    at = CALM_S
    while True:
        if not bag:
            bag = rng.sample(KINDS, len(KINDS))
        kind = bag.pop()
        lasts = round(rng.uniform(*LASTS_S[kind]), 1)
        if at + lasts > seconds - TAIL_S:
            return faults
        how = ""
        if kind == "kill":
            where: tuple[str, ...] = (rng.choice(workers),)
        elif kind == "partition":
            where = tuple(sorted(rng.sample(hosts, 2)))
        elif kind == "clock":
            where, how = (rng.choice(clocks),), rng.choice(("+3600", "-3600", "+5", "-5"))
        else:
            where = (rng.choice(hosts),)
        if kind == "slow":
            how = str(rng.randrange(len(SLOW)))
        faults.append(Fault(kind, where, round(at, 1), lasts, how))
        at += lasts + GAP_S + rng.uniform(0, GAP_S)


# -- requests


@dataclass
class Account:
    """What became of the requests: ``failed`` by (cause, what the client saw), ``unexplained`` in no fault's window.

    ``unsent``: those of the failed for which there was no connection.
    """

    asked: int
    recorded: int = 0
    unsent: int = 0
    answered: int = 0
    twice: int = 0
    failed: Counter[tuple[str, str]] = field(default_factory=Counter)
    unexplained: list[tuple[float, str]] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Requests without a record."""
        return self.asked - self.recorded

    @property
    def closed(self) -> bool:
        """Whether every request is there once, and was answered or failed for a known cause."""
        whole = self.recorded == self.answered + self.failed.total() + len(self.unexplained)
        return whole and not self.lost and not self.twice and not self.unexplained


def short(error: str) -> str:
    """Return an error without what differs from request to request."""
    return re.sub(r"https?://\S+|\b\d[\w.:-]*\b|[0-9a-f]{8,}", "#", " ".join(error.split()))[:100] or "no reason"


def _none(moment: float | None) -> bool:
    return moment is None or math.isnan(moment)


def account(rows: Iterable[Mapping[str, Any]], asked: int, windows: Sequence[Window], timeout_s: float) -> Account:
    """Count what became of requests; a failed one may have waited for as long as the client's limit.

    ``rows``: ``index``, ``scheduled_s``, ``sent_s``, ``end_s``, ``ok`` and ``error`` of each. Faults that it met are all named.
    """
    found, seen = Account(asked), set[int]()
    for row in rows:
        if row["index"] in seen:
            found.twice += 1
            continue
        seen.add(row["index"])
        found.recorded += 1
        if row["ok"]:
            found.answered += 1
            continue
        found.unsent += _none(row["sent_s"])
        sent = row["scheduled_s"] if _none(row["sent_s"]) else row["sent_s"]
        until = sent + timeout_s if _none(row["end_s"]) else max(row["end_s"], sent)
        causes = dict.fromkeys(window.fault.kind for window in windows if window.touches(sent, until))
        if causes:
            found.failed[" and ".join(causes), short(str(row["error"]))] += 1
        else:
            found.unexplained.append((sent, short(str(row["error"]))))
    return found


# -- growth


@dataclass(frozen=True)
class Growth:
    """How a quantity of a process grows: its level, and its slope per hour with its 95 % interval."""

    level: float
    per_hour: float
    low: float
    high: float

    @property
    def leaks(self) -> bool:
        """Whether it would surely double within a day."""
        return self.low > 0 and self.low * 24 > self.level


def growth(times: Sequence[float], values: Sequence[float], lives: Sequence[int], warm_s: float) -> Growth | None:
    """Return the slope that all lives of a process share, each from ``warm_s`` after its begin on; None for too few samples.

    Samples of one life follow one another, so that they count for less than as many independent ones: by the correlation of
    neighbours among the residuals, n (1 - r) / (1 + r).
    """
    t, v, life = np.asarray(times, float), np.asarray(values, float), np.asarray(lives)
    dt, dv, kept, levels = [], [], 0, []
    for one in dict.fromkeys(lives):
        own = life == one
        own &= t >= t[own].min() + warm_s
        if own.sum() < 4:
            continue
        kept += 1
        levels.append(v[own])
        dt.append(t[own] - t[own].mean())
        dv.append(v[own] - v[own].mean())
    if not kept:
        return None
    x, y = np.concatenate(dt), np.concatenate(dv)
    spread = float(x @ x)
    slope = float(x @ y) / spread
    left = [b - slope * a for a, b in zip(dt, dv, strict=True)]
    squares = float(sum(one @ one for one in left))
    near = float(sum(one[1:] @ one[:-1] for one in left))
    r = min(0.99, max(0.0, near / squares)) if squares > 1e-12 else 0.0
    free = len(x) * (1 - r) / (1 + r) - kept - 1
    if free < 1:
        return None
    half = _t(free) * math.sqrt(squares / (len(x) - kept - 1) / spread * (1 + r) / (1 - r))
    return Growth(float(np.concatenate(levels).mean()), slope * 3600, (slope - half) * 3600, (slope + half) * 3600)


def _t(free: float) -> float:
    """Return Student's t at 97.5 % (Cornish and Fisher's expansion; at 1 degree of freedom it is too small by a third)."""
    z = 1.959963984540054
    return float(z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2))
