"""From simulated runs to a ranking that names no winner inside the noise, and to what would move each ratio."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from pdbench.advise.layout import STAGES, Layout
from pdbench.advise.simulate import Simulated, Stage, Work, simulate
from pdbench.compare import judge, student
from pdbench.model.profile import Profile

#: seeds of every ratio: enough that its own scatter is known (compare.judge.ENOUGH) and intervals are narrow
SEEDS = 6
#: ratios closer than this are called equal whatever the seeds say: no model is that good
LEAST_DIFFERENCE = 0.02
#: how much faster (or larger) each stage is made to see what would move a ratio
FASTER = 1.1
#: a stage whose FASTER brings less than this does not limit
LEAST_GAIN = 0.01

#: (layouts, profiles, works by seed): what all simulations of one question share
Shared = tuple[Sequence[Layout], Mapping[str, Profile], Sequence[Work]]
#: (place of the layout, seed, stage that is faster or "")
Task = tuple[int, int, str]
Spread = Callable[[Callable[[Any, Any], Any], Sequence[Any]], list[Any]]


def one(shared: Shared, task: Task) -> Simulated:
    """Simulate one layout under one seed."""
    layouts, profiles, works = shared
    place, seed, stage = task
    return simulate(layouts[place], works[seed], profiles, {stage: FASTER} if stage else None)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95 % interval (Student's t)."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and interval of independent values; without a second one the interval is unbounded. NaN gives NaN."""
    if any(map(math.isnan, values)):
        return Estimate(math.nan, math.nan, math.nan)
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = student.quantile((1 - student.LEVEL) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Ranked:
    """One ratio with its runs by seed. ``rank``: 1 for the best and all that are not shown to differ from it.

    ``gains``: stage -> change of the goal when that stage alone is `FASTER`, as a share; ``sooner``: the same of the mean
    time of a whole request.
    """

    layout: Layout
    runs: Sequence[Simulated]
    rank: int = 0
    gains: Mapping[str, Estimate] = field(default_factory=dict)
    sooner: Mapping[str, Estimate] = field(default_factory=dict)

    def figure(self, name: str) -> Estimate:
        """Return a figure over the seeds."""
        return estimate([run.figures[name] for run in self.runs])

    def stage(self, name: str) -> Stage:
        """Return what a stage was doing, the mean over the seeds."""
        found = [run.stages[name] for run in self.runs]
        return Stage(*(statistics.fmean(getattr(each, part) for each in found) for part in ("busy", "most", "wait_ms", "batch")))

    @property
    def served(self) -> bool:
        """Tell whether every request of every seed was served: one whose prompt does not fit the memory never is."""
        return all(run.figures["failed"] == 0 for run in self.runs)

    @property
    def limit(self) -> str:
        """Return the stage that would move the ratio most, with those that would move it half as much; "" when none does."""
        known = {name: gain.mean for name, gain in self.gains.items() if gain.low > 0 and gain.mean >= LEAST_GAIN}
        most = max(known.values(), default=0.0)
        return ", ".join(sorted((name for name in known if known[name] >= most / 2), key=lambda name: -known[name]))

    @property
    def saturated(self) -> bool:
        """Tell whether requests wait in queues for most of the time to their first token."""
        return statistics.fmean(run.queued for run in self.runs) > 0.5


def goal_of(work: Work) -> str:
    """Return what is ranked by: goodput where limits are set, else output tokens, per GPU."""
    return "goodput_per_gpu" if work.slo else "output_throughput_per_gpu"


def differ(a: Sequence[Simulated], b: Sequence[Simulated], goal: str) -> judge.Verdict:
    """Compare two ratios over the same seeds, by the paired t-test of `pdbench compare`."""
    ours, theirs = ([judge.Run(seed, {goal: run.figures[goal]}, seed, b"") for seed, run in enumerate(runs)] for runs in (a, b))
    return judge.judge(ours, theirs, [goal])


def ranked(layouts: Sequence[Layout], runs: Mapping[int, Sequence[Simulated]], goal: str) -> list[Ranked]:
    """Return the ratios best first; ``runs`` by place in ``layouts``.

    From the best on, a ratio opens a new rank when it is shown to differ from the first of the rank before it (all pairs are
    judged together, Holm's method) by `LEAST_DIFFERENCE` or more. Within a rank, what answers soonest goes first.
    """
    found = [Ranked(layout, runs[place]) for place, layout in enumerate(layouts)]
    served = sorted((each for each in found if each.served), key=lambda each: -each.figure(goal).mean)
    pairs = list(combinations(range(len(served)), 2))
    verdicts = judge.correct([differ(served[a].runs, served[b].runs, goal) for a, b in pairs])
    apart = {pair: _apart(verdict.differences[0]) for pair, verdict in zip(pairs, verdicts, strict=True)}
    ranks: list[list[int]] = []
    for place in range(len(served)):
        if ranks and not apart[ranks[-1][0], place]:
            ranks[-1].append(place)
        else:
            ranks.append([place])
    ordered = []
    for number, members in enumerate(ranks):
        first = 1 + sum(map(len, ranks[:number]))
        sooner = sorted(members, key=lambda place: served[place].figure("e2e_ms_mean").mean)
        ordered += [replace(served[place], rank=first) for place in sooner]
    return ordered + [each for each in found if not each.served]


def _apart(found: judge.Difference) -> bool:
    top = max(abs(found.a), abs(found.b))
    return found.claimed and abs(found.a - found.b) >= LEAST_DIFFERENCE * top


def with_gains(each: Ranked, faster: Mapping[str, Sequence[Simulated]], goal: str) -> Ranked:
    """Return a ratio with what moves it; ``faster``: stage -> its runs with that stage faster, by seed."""

    def change(figure: str) -> dict[str, Estimate]:
        before = [run.figures[figure] for run in each.runs]
        return {
            stage: estimate([b.figures[figure] / a - 1 if a else math.nan for a, b in zip(before, runs, strict=True)])
            for stage, runs in faster.items()
        }

    return replace(each, gains=change(goal), sooner=change("e2e_ms_mean"))


def advise(layouts: Sequence[Layout], seeds: int, goal: str, spread: Spread, moved: int = 3) -> list[Ranked]:
    """Simulate every layout under every seed and rank them; of the best ``moved`` it is found out what would move them."""
    tasks = [(place, seed, "") for place in range(len(layouts)) for seed in range(seeds)]
    runs = spread(one, tasks)
    order = ranked(layouts, {place: runs[place * seeds : (place + 1) * seeds] for place in range(len(layouts))}, goal)
    chosen = [(layouts.index(each.layout), stage) for each in order[:moved] if each.rank for stage in STAGES]
    more = spread(one, [(place, seed, stage) for place, stage in chosen for seed in range(seeds)])
    faster: dict[int, dict[str, Sequence[Simulated]]] = {}
    for number, (place, stage) in enumerate(chosen):
        faster.setdefault(place, {})[stage] = more[number * seeds : (number + 1) * seeds]
    return [with_gains(each, faster.get(layouts.index(each.layout), {}), goal) for each in order]
