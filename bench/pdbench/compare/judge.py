"""Whether two configurations differ at one load: estimates, p-values, verdicts.

The unit is the run. Requests of one run share its luck (queues, clocks, neighbours), so with `ENOUGH` repeats on both sides
only one figure a run counts, on the log scale: pairs of runs of the same requests by the paired t-test, other runs by
Welch's. With fewer repeats nobody knows how far runs differ by themselves: each is taken to be off by `ASSUMED` (one standard
deviation), or by what two repeats show if that is more, on top of the noise within it (`pdbench.compare.within`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pdbench.compare import student, within
from pdbench.compare.within import Requests
from pdbench.intervals import Floats
from pdbench.sweep.tidy import LATENCIES, STATISTICS

#: repeats from which runs are compared with runs alone
ENOUGH = 3
#: how far a run is off by itself where repeats do not show it: one standard deviation, as a share
ASSUMED = 0.05
#: no figure is known better than this, as a share
_LEAST_ERROR = 1e-4
_HIGHER = ("output_throughput_per_gpu", "request_throughput_per_gpu", "input_throughput_per_gpu", "goodput_per_gpu", "tok_s_user")
#: every figure that can be compared -> whether more of it is better
FIGURES: dict[str, bool] = {
    **dict.fromkeys(_HIGHER, True),
    **{f"{metric}_{statistic}": False for metric in LATENCIES for statistic in STATISTICS},
}
#: what is compared unless told otherwise; goodput only where limits were set
USUAL = (
    *("output_throughput_per_gpu", "goodput_per_gpu", "ttft_ms_mean", "ttft_ms_p50", "ttft_ms_p99"),
    *("itl_ms_mean", "itl_ms_p99", "e2e_ms_mean", "e2e_ms_p99"),
)


@dataclass(frozen=True)
class Run:
    """One run at one load: its figures by name (as `FIGURES`; NaN: unknown), its requests where they are at hand.

    ``seed`` and ``told`` (lengths in their order) say which requests it was sent; None where that is not known.
    """

    repeat: int
    figures: Mapping[str, float]
    seed: int | None = None
    told: bytes | None = None
    requests: Requests | None = None

    def pairs_with(self, other: Run) -> bool:
        """Tell whether both were sent the same prompts in the same order."""
        return self.seed is not None and self.told is not None and (self.seed, self.told) == (other.seed, other.told)


@dataclass(frozen=True)
class Difference:
    """One figure of both sides. ``change`` is B's over A's, less 1, with its 95 % interval ``low`` to ``high``.

    With a figure of 0, which has no logarithm, it is the difference as a share of the larger figure. ``p`` and ``adjusted``
    are None where nothing can be judged, and ``why`` says why; ``spread`` is the standard deviation of the difference between
    two single runs, known by ``df`` degrees of freedom.
    """

    figure: str
    a: float
    b: float
    change: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float | None = None
    adjusted: float | None = None
    spread: float = math.nan
    df: float = math.nan
    why: str = ""

    @property
    def claimed(self) -> bool:
        """Tell whether a difference is shown."""
        return self.adjusted is not None and self.adjusted <= 1 - student.LEVEL

    @property
    def better(self) -> str:
        """Return "A", "B", or "" where no difference is shown."""
        return "" if not self.claimed else "B" if (self.change > 0) is FIGURES[self.figure] else "A"


@dataclass(frozen=True)
class Verdict:
    """All differences at one load.

    ``pairs``: how many pairs of runs were judged, 0 for none; ``assumed``: the spread between runs was.
    """

    differences: list[Difference]
    runs: tuple[int, int]
    pairs: int
    assumed: bool
    why_unpaired: str = ""
    remarks: list[str] = field(default_factory=list)


def judge(a: Sequence[Run], b: Sequence[Run], figures: Sequence[str]) -> Verdict:
    """Compare two configurations at one load, each given by its runs; p-values are not adjusted yet (`correct`)."""
    pairs, why = _pairs(a, b)
    assumed = min(len(a), len(b)) < ENOUGH
    if assumed:
        found = [_by_requests(a, b, pairs, name) for name in figures]
    else:
        if 0 < len(pairs) < ENOUGH:
            pairs, why = [], f"only {len(pairs)} pairs of runs were sent the same requests"
        found = [_by_runs(a, b, pairs, name) for name in figures]
    return Verdict(found, (len(a), len(b)), len(pairs), assumed, why)


def correct(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Adjust all p-values together by Holm's method."""
    adjusted = iter(student.holm([d.p for v in verdicts for d in v.differences if d.p is not None]))

    def finished(d: Difference) -> Difference:
        return d if d.p is None else replace(d, adjusted=next(adjusted))

    return [replace(v, differences=[finished(d) for d in v.differences]) for v in verdicts]


def family(verdicts: Sequence[Verdict]) -> int:
    """Return how many figures are judged together."""
    return sum(d.p is not None for v in verdicts for d in v.differences)


def recommend(found: Difference, together: int, effect: float) -> int | None:
    """Return how many pairs of such runs show a difference of ``effect`` (0.05 for 5 %) with 80 % power.

    ``together``: figures that will be judged together. None where it is not known, or more than `student.MOST`.
    """
    if found.p is None:
        return None
    spread = student.largest_spread(found.spread, found.df) if found.df < math.inf else found.spread
    return student.repeats(math.log1p(effect), spread, max(1, together), ENOUGH)


def _pairs(a: Sequence[Run], b: Sequence[Run]) -> tuple[list[tuple[Run, Run]], str]:
    """Return the runs of the same repeat when all of them were sent the same requests, else why not."""
    others = {run.repeat: run for run in b}
    pairs = [(run, others[run.repeat]) for run in a if run.repeat in others]
    if not pairs:
        return [], "no repeat has a run on both sides"
    for one, other in pairs:
        if None in (one.seed, other.seed, one.told, other.told):
            return [], "it is not recorded which requests they were sent"
        if one.seed != other.seed:
            return [], f"the prompts are not the same: seed {one.seed} and seed {other.seed}"
        if not one.pairs_with(other):
            return [], "the requests are not the same: their number, lengths or order differ"
    return pairs, ""


def _scaled(a: Floats, b: Floats) -> tuple[Floats, Floats, bool]:
    """Return figures on the log scale; where one is 0, as shares of the largest (and False)."""
    if (a > 0).all() and (b > 0).all():
        return np.log(a), np.log(b), True
    top = max(float(a.max()), float(b.max())) or 1.0
    return a / top, b / top, False


def _by_runs(a: Sequence[Run], b: Sequence[Run], pairs: Sequence[tuple[Run, Run]], name: str) -> Difference:
    ours, theirs = (pair for pair in zip(*pairs, strict=True)) if pairs else (a, b)
    x, y = (np.array([run.figures.get(name, math.nan) for run in runs]) for runs in (ours, theirs))
    blank = Difference(name, float(np.mean(x)), float(np.mean(y)))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return replace(blank, why="a run lacks it")
    x, y, logs = _scaled(x, y)
    estimate = float(y.mean() - x.mean())
    if pairs:
        spread = float((y - x).std(ddof=1))
        error, df = spread / math.sqrt(len(x)), len(x) - 1.0
    else:
        parts = [float(v.var(ddof=1)) / len(v) for v in (x, y)]
        error, spread = math.sqrt(sum(parts)), math.sqrt(float(x.var(ddof=1) + y.var(ddof=1)))
        df = _welch(parts, (len(x) - 1, len(y) - 1))
    return _estimated(blank, estimate, error, df, logs, spread)


def _welch(parts: Sequence[float], freedom: Sequence[int]) -> int:
    """Return Satterthwaite's degrees of freedom of a sum of variances (Biometrics Bulletin 2, 1946), rounded down."""
    total = sum(parts)
    if total == 0:
        return min(freedom)
    return math.floor(total**2 / sum(part**2 / df for part, df in zip(parts, freedom, strict=True)))


def _by_requests(a: Sequence[Run], b: Sequence[Run], pairs: Sequence[tuple[Run, Run]], name: str) -> Difference:
    x, y = (np.array([run.figures.get(name, math.nan) for run in runs]) for runs in (a, b))
    blank = Difference(name, float(np.mean(x)), float(np.mean(y)))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return replace(blank, why="a run lacks it")
    if not ((x > 0).all() and (y > 0).all()):
        return replace(blank, why=f"it is 0, which takes {ENOUGH} repeats to judge")
    if any(run.requests is None for run in (*a, *b)):
        return replace(blank, why=f"without its requests, it takes {ENOUGH} repeats to judge")
    noise = _paired_noise(pairs, name) if len(pairs) == len(a) == len(b) else math.nan
    if math.isnan(noise):
        noise = sum(_noise(runs, name) for runs in (a, b))
    if math.isnan(noise):
        return replace(blank, why="too few requests to tell noise from difference")
    x, y = np.log(x), np.log(y)
    between = [max(ASSUMED**2, float(v.var(ddof=1)) if len(v) > 1 else 0.0) for v in (x, y)]
    error = math.sqrt(noise + sum(variance / len(v) for variance, v in zip(between, (x, y), strict=True)))
    spread = math.sqrt(noise * min(len(x), len(y)) + sum(between))
    found = _estimated(blank, float(y.mean() - x.mean()), error, within.DF, True, spread)
    # The greater part of the spread is assumed, not estimated: no margin for how well it is known.
    return replace(found, df=math.inf)


def _noise(runs: Sequence[Run], name: str) -> float:
    """Return the variance within runs of the mean of their logs."""
    each = [within.variance(*within.replicates(run.requests, name)) for run in runs if run.requests is not None]
    return sum(each) / len(each) ** 2


def _paired_noise(pairs: Sequence[tuple[Run, Run]], name: str) -> float:
    total = 0.0
    for one, other in pairs:
        if one.requests is None or other.requests is None:
            return math.nan
        (left, pairable), (right, _) = within.replicates(one.requests, name), within.replicates(other.requests, name)
        if not pairable or left.size != right.size:
            return math.nan
        total += within.variance(right - left, by_requests=True)
    return total / len(pairs) ** 2


def _estimated(blank: Difference, estimate: float, error: float, df: float, logs: bool, spread: float) -> Difference:
    # Without any spread there is nothing to widen, unless both differ: figures are never that exact.
    error = max(error, _LEAST_ERROR)
    half = student.quantile((1 - student.LEVEL) / 2, df) * error
    ends = (estimate, estimate - half, estimate + half)
    change, low, high = (math.expm1(min(end, 700.0)) if logs else end for end in ends)
    p = student.p_value(estimate, error, df)
    return replace(blank, change=change, low=low, high=high, p=p, spread=max(spread, _LEAST_ERROR), df=df)
