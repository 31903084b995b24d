"""Which configuration is best under a load, and how sure that is; which lie on the Pareto frontier. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pdbench.compare import student
from pdbench.compare.judge import ASSUMED, ENOUGH, Run, judge
from pdbench.sweep.report.data import RATE, Cell, Load, Table

#: the same for a reader
IN_SHORT = (
    "The configuration with the highest figure is compared with every other one under the same load, as pdbench compare does: "
    f"by the runs alone from {ENOUGH} repeats on, before that by the noise within runs and {100 * ASSUMED:g} % that a run may be "
    "off by itself. It is called the best only if it differs from every other one; all comparisons of the sweep are judged "
    "together at 95 % (Holm). The interval of a single figure is of 95 %, too, from the spread between repeats, pooled over the "
    "configurations under the same load."
)
State = Literal["best", "undecided", "alone"]
#: a cell -> its runs, as `pdbench compare` takes them
Runs = Callable[[Cell], Sequence[Run]]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; the ends are None where no spread is known."""

    value: float
    low: float | None
    high: float | None

    @property
    def half_width(self) -> float | None:
        """Return half the interval as a share of the figure."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2 / self.value


@dataclass(frozen=True)
class Decision:
    """What a load's cells say.

    ``leader`` has the highest figure; ``rivals`` are the cells that it was not shown to differ from; ``lead`` is how many
    times the runner-up's figure the leader's is, None without a runner-up; ``why`` says what made a comparison impossible.
    """

    load: Load
    state: State
    leader: Cell
    rivals: tuple[Cell, ...] = ()
    runner_up: Cell | None = None
    lead: Interval | None = None
    why: str = ""


def _spread(cells: Sequence[Cell], metric: str) -> tuple[float, int]:
    """Return the standard deviation of a repeat's logarithm, pooled over the cells, and its degrees of freedom."""
    squares, df = 0.0, 0
    for cell in cells:
        logs = [math.log(value) for value in cell.values(metric) if value > 0]
        if len(logs) > 1:
            mean = sum(logs) / len(logs)
            squares += sum((value - mean) ** 2 for value in logs)
            df += len(logs) - 1
    return (math.sqrt(squares / df), df) if df else (math.nan, 0)


def interval(cell: Cell, beside: Sequence[Cell], metric: str = RATE) -> Interval:
    """Return a cell's figure, by itself output tokens/s per GPU; ``beside``: all cells of its load, itself among them."""
    mean, (sd, df) = cell.mean(metric), _spread(beside, metric)
    if not df or not mean > 0:
        return Interval(mean, None, None)
    half = student.quantile((1 - student.LEVEL) / 2, df) * sd / math.sqrt(len(cell.values(metric)))
    return Interval(mean, mean * math.exp(-half), mean * math.exp(half))


def decisions(table: Table, runs: Runs) -> list[Decision]:
    """Return a decision for every load that has a measured cell, in order."""
    goal = table.goal
    ranked = [
        sorted(cells, key=lambda cell: cell.mean(goal), reverse=True) for load in table.loads if (cells := table.under(load))
    ]
    judged = [[judge(runs(cell), runs(leader), [goal]).differences[0] for cell in others] for leader, *others in ranked]
    known = [found.p for row in judged for found in row if found.p is not None]
    adjusted = iter(student.holm(known))
    made = []
    for (leader, *others), row in zip(ranked, judged, strict=True):
        if not others:
            made.append(Decision(leader.load, "alone", leader))
            continue
        differs = [found.p is not None and next(adjusted) <= 1 - student.LEVEL for found in row]
        rivals = tuple(cell for cell, shown in zip(others, differs, strict=True) if not shown)
        first = row[0]
        ends = (None, None) if math.isnan(first.low) else (1 + first.low, 1 + first.high)
        below = others[0].mean(goal)
        lead = Interval(leader.mean(goal) / below, *ends) if below > 0 else Interval(math.inf, None, None)
        why = next((found.why for found in row if found.why), "")
        made.append(Decision(leader.load, "undecided" if rivals else "best", leader, rivals, others[0], lead, why))
    return made


def frontier(points: Sequence[tuple[float, float]], higher_x: bool = True) -> list[int]:
    """Return the places of the points that no other one beats: none has more y and a better x.

    Better x is more of it, or less where ``higher_x`` is false; of equal points all stay; in the order of x.
    """
    sign = 1.0 if higher_x else -1.0
    places = sorted(range(len(points)), key=lambda i: (-sign * points[i][0], -points[i][1]))
    kept: list[int] = []
    for i in places:
        x, y = points[i]
        last = points[kept[-1]] if kept else None
        if last is None or y > last[1] or (y == last[1] and x == last[0]):
            kept.append(i)
    return sorted(kept, key=lambda i: points[i])
