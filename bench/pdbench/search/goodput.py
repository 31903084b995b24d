"""The goodput of a deployment: the highest rate at which the wanted share of requests meets every limit.

As DistServe defines it (OSDI 2024, section 2; there 90 %). Rates are doubled until one misses, then halved in between, by their
ratio. Whether a rate *meets* the share is decided by Wilson's 95 % interval of good / sent: all of it at or above the share, or
all of it below. Requests of a run share its queues, and runs differ by themselves: the interval is for the independent requests
that they are worth, and from three runs on for no more than the runs' own spread shows. While the share lies within, the rate
is measured again with other prompts and the counts are added up; after ``repeats`` the count itself decides, and the step says
that it was close. A rate whose backlog grows without end misses whatever its share: the share only says how long the run was.
So does one that cannot be judged: nothing above it can be, either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pdbench.intervals import between, wilson

Answer = Literal["met", "missed", "open"]
#: halvings of the first rate, when it misses; doublings, when all are met
_MOST_STEPS = 12
#: runs of a rate from which their own spread counts
ENOUGH = 3


@dataclass(frozen=True)
class Counts:
    """What one run found: requests within every limit, all sent, and how many independent ones these are worth (None: all).

    ``oversaturated``: the backlog grew without end; ``unjudged``: why the run tells nothing of the rate, "" when it does.
    """

    good: int
    sent: int
    oversaturated: bool = False
    independent: float | None = None
    unjudged: str = ""

    @property
    def worth(self) -> float:
        """Return how many independent requests these are worth."""
        return self.sent if self.independent is None else self.independent

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the share."""
        return wilson(self.good / self.sent * self.worth, self.worth) if self.sent else (0.0, 1.0)


def together(runs: Sequence[Counts]) -> Counts:
    """Return what runs at one rate say together."""
    good, sent = sum(run.good for run in runs), sum(run.sent for run in runs)
    worth = sum(run.worth for run in runs)
    if len(runs) >= ENOUGH:
        worth = min(worth, between([run.good / run.sent for run in runs if run.sent]))
    unjudged = next((run.unjudged for run in runs if run.unjudged), "")
    return Counts(good, sent, any(run.oversaturated for run in runs), worth, unjudged)


@dataclass(frozen=True)
class Step:
    """One rate (requests/s), what was found in ``runs`` runs, and the verdict; ``close``: the interval did not decide."""

    rate: float
    counts: Counts
    runs: int
    met: bool
    close: bool

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the share."""
        return self.counts.interval


@dataclass
class Outcome:
    """``rate``: the highest that was met, None when none was; ``above``: the lowest that was missed, None when none was."""

    steps: list[Step] = field(default_factory=list)

    @property
    def rate(self) -> float | None:
        """Return the goodput in requests/s."""
        return max((step.rate for step in self.steps if step.met), default=None)

    @property
    def above(self) -> float | None:
        """Return the other end of the bracket."""
        return min((step.rate for step in self.steps if not step.met), default=None)


def answer(counts: Counts, share: float) -> Answer:
    """Tell whether the share is met, as far as these counts decide it."""
    if counts.oversaturated or counts.unjudged:
        return "missed"
    low, high = counts.interval
    return "met" if low >= share else "missed" if high < share else "open"


def try_rate(measure: Callable[[float, int], Counts], rate: float, share: float, repeats: int) -> Step:
    """Measure a rate until its share is decided; ``measure`` takes the rate and the number of the run, from 0."""
    runs: list[Counts] = []
    counts = Counts(0, 0)
    for number in range(repeats):
        runs.append(measure(rate, number))
        counts = together(runs)
        found = answer(counts, share)
        if found != "open":
            return Step(rate, counts, number + 1, found == "met", False)
    return Step(rate, counts, repeats, counts.good >= share * counts.sent, True)


def search(
    measure: Callable[[float, int], Counts],
    start: float,
    share: float = 0.9,
    tolerance: float = 0.05,
    repeats: int = 3,
    highest: float = math.inf,
    told: Callable[[Step], None] = lambda step: None,
) -> Outcome:
    """Return the bracket of the goodput, no wider than ``tolerance`` of it where it has two ends.

    No rate above ``highest`` is tried. ``told`` hears of every step.
    """
    found = Outcome()

    def step(rate: float) -> bool:
        made = try_rate(measure, _round(rate), share, repeats)
        found.steps.append(made)
        told(made)
        return made.met

    rate = min(start, highest)
    up = step(rate)
    for _ in range(_MOST_STEPS):
        if (found.above if up else found.rate) is not None or (up and rate >= highest):
            break
        rate = min(2 * rate, highest) if up else rate / 2
        step(rate)
    while found.rate is not None and found.above is not None and found.above / found.rate > 1 + tolerance:
        middle = _round(math.sqrt(found.rate * found.above))
        if not found.rate < middle < found.above:
            break
        step(middle)
    return found


def _round(rate: float) -> float:
    """Return a rate that can be read and typed: four significant digits."""
    return float(f"{rate:.4g}")
