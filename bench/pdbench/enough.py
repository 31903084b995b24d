"""When a load point may end: what was wanted is known well enough.

`--until ttft_p99:5%,tpot_mean:2%` asks for every figure's 95 % interval (`pdbench.intervals`) to reach at most 5 % (2 %) to
each side, seen in the steady window (`pdbench.steady`) alone. Stopping when an interval is narrow keeps its coverage for
long runs (Chow and Robbins, Annals of Mathematical Statistics 36, 1965), but each look is a chance to stop on a lucky one:
look seldom (`next_look`), and believe two looks in a row (`pdbench.run.looks`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pdbench import metrics, steady
from pdbench.load.errors import LoadError
from pdbench.records import Record

_STATISTICS = ("mean", "p50", "p90", "p95", "p99")
#: name in `--until` -> key in summary.json
_NAMES = {name.removesuffix("_ms"): name for name in metrics.METRICS}
_TARGET = re.compile(r"(?P<name>\w+)_(?P<statistic>mean|p\d+):(?P<percent>\d+(?:\.\d+)?)%")
#: requests at the first look, and how many times more at each later one
_FIRST_LOOK, _GROWTH = 100, 1.2


@dataclass(frozen=True)
class Target:
    """A figure (``ttft_ms``, ``p99``) and the half-width that its interval may have, as a share of the figure."""

    metric: str
    statistic: str
    share: float

    @property
    def name(self) -> str:
        """Return it as it is written in ``--until``, without the bound."""
        return f"{self.metric.removesuffix('_ms')}_{self.statistic}"


@dataclass(frozen=True)
class Verdict:
    """``widths``: target -> half-width as a share of the figure, None where it is unbounded. ``message`` says it in words."""

    done: bool
    widths: Mapping[str, float | None]
    message: str


def parse(text: str) -> tuple[Target, ...]:
    """Read ``ttft_p99:5%,tpot_mean:2%``; raise LoadError, which says what can be written."""
    found = []
    for part in text.split(","):
        match = _TARGET.fullmatch(part.strip())
        share = float(match["percent"]) / 100 if match else 0.0
        if not match or match["name"] not in _NAMES or match["statistic"] not in _STATISTICS or not 0 < share < 1:
            raise LoadError(
                f"--until {part.strip()!r}: write METRIC_STATISTIC:PERCENT%, such as ttft_p99:5%; "
                f"metrics: {', '.join(sorted(_NAMES))}; statistics: {', '.join(_STATISTICS)}"
            )
        found.append(Target(_NAMES[match["name"]], match["statistic"], share))
    return tuple(found)


def next_look(requests: int) -> int:
    """Return at how many ended requests to look again, after a look at ``requests`` (0: none yet)."""
    return max(_FIRST_LOOK, int(requests * _GROWTH) + 1)


def enough(records: Sequence[Record], targets: Sequence[Target], slots: int | None = None) -> Verdict:
    """Tell whether every target is met by the measured records so far; ``slots`` is a closed loop's concurrency.

    Without a steady window, the answer is no: an interval of figures that still drift says nothing.
    """
    window = steady.find(records, slots)
    if window.reason:
        return Verdict(False, {target.name: None for target in targets}, f"no steady window yet: {window.reason}")
    found = metrics.samples((r for r in records if r.ok), window.begin_s, window.end_s)
    widths = {target.name: _width(found[target.metric], target.statistic) for target in targets}
    shown = ", ".join(
        f"{target.name} {'unbounded' if (width := widths[target.name]) is None else f'± {width:.1%}'} (wanted {target.share:.3g})"
        for target in targets
    )
    done = all((width := widths[target.name]) is not None and width <= target.share for target in targets)
    return Verdict(done, widths, shown)


def _width(sample: metrics.Sample, statistic: str) -> float | None:
    ends, figure = sample.intervals()[statistic], sample.stats()[statistic]
    if ends is None or figure is None or figure <= 0:
        return None
    low, high = ends
    return None if low is None or high is None else max(figure - low, high - figure) / figure
