"""The study of changing ratios in tables and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pdbench.advise.rank import Estimate, estimate
from pdbench.report.draw import drawn, legend
from pdbench.report.look import BLUE, GREEN, LIGHT, ORANGE, VERMILLION

if TYPE_CHECKING:
    from pdbench.advise.study import Run

#: the share of requests within the limits that goodput asks for (DistServe, OSDI 2024)
ENOUGH = 0.9
_COLOURS = {"best fixed": BLUE, "controller": VERMILLION, "oracle": GREEN, "aggregated": ORANGE}


def of(found: Sequence[Run], source: str, load: float, policy: str) -> list[Run]:
    """Return the runs of one policy, by seed."""
    return sorted((r for r in found if (r.source, r.load, r.policy) == (source, load, policy)), key=lambda r: r.seed)


def met(found: Sequence[Run], source: str, load: float, policy: str) -> Estimate:
    """Return the share within the limits over the seeds."""
    return estimate([run.met for run in of(found, source, load, policy)])


def fixed(found: Sequence[Run]) -> list[str]:
    """Return the fixed prefill-decode ratios."""
    names = dict.fromkeys(run.policy for run in found if run.policy[0].isdigit())
    return sorted(names, key=lambda name: int(name.split("p")[0]))


def best_fixed(found: Sequence[Run], source: str, load: float) -> str:
    """Return the best fixed ratio in hindsight: of the mean over the seeds."""
    return max(fixed(found), key=lambda name: met(found, source, load, name).mean)


def gain(found: Sequence[Run], source: str, load: float, policy: str, over: str) -> Estimate:
    """Return how much larger the share of a policy is, seed by seed."""
    ours, theirs = of(found, source, load, policy), of(found, source, load, over)
    return estimate([a.met - b.met for a, b in zip(ours, theirs, strict=True)])


def highest(found: Sequence[Run], source: str, policy: str) -> float:
    """Return the load up to which a policy keeps `ENOUGH` of its requests within the limits, between loads on a line.

    NaN when it never does; infinity when it does at every load.
    """
    loads = sorted({run.load for run in found if run.source == source})
    shares = [met(found, source, load, policy).mean for load in loads]
    if shares[0] < ENOUGH:
        return math.nan
    for (low, above), (high, below) in zip(
        zip(loads, shares, strict=True), zip(loads[1:], shares[1:], strict=True), strict=False
    ):
        if below < ENOUGH:
            return low + (high - low) * (above - ENOUGH) / (above - below)
    return math.inf


def _percent(one: Estimate, sign: bool = False) -> str:
    return f"{one.mean * 100:{'+' if sign else ''}.1f} ±{(one.high - one.mean) * 100:.1f}"


def words(found: Sequence[Run]) -> str:
    """Return the tables in Markdown."""
    lines: list[str] = []
    for source in dict.fromkeys(run.source for run in found):
        loads = sorted({run.load for run in found if run.source == source})
        lines += [f"### {source}: % of requests within the limits (95 % interval over seeds)", ""]
        lines += [
            "| policy | " + " | ".join(f"load {load:g}" for load in loads) + " | 90 % up to load |",
            "|---" * (len(loads) + 2) + "|",
        ]
        for policy in [*fixed(found), "aggregated", "controller", "oracle"]:
            cells = []
            for load in loads:
                mark = " **best fixed**" if policy == best_fixed(found, source, load) else ""
                cells.append(_percent(met(found, source, load, policy)) + mark)
            top = highest(found, source, policy)
            reach = "never" if math.isnan(top) else "all" if math.isinf(top) else f"{top:.2f}"
            lines.append(f"| {policy} | {' | '.join(cells)} | {reach} |")
        lines += [
            "",
            "| load | best fixed | controller − best fixed | oracle − best fixed | its changes, s each | the oracle's |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for load in loads:
            best = best_fixed(found, source, load)
            moves = []
            for policy in ("controller", "oracle"):
                mine = of(found, source, load, policy)
                number, took = sum(r.changes for r in mine) / len(mine), max(r.change_s for r in mine)
                moves.append(f"{number:.1f}, {took:.0f} s")
            gains = [_percent(gain(found, source, load, policy, best), True) for policy in ("controller", "oracle")]
            lines.append(f"| {load:g} | {best} | {gains[0]} | {gains[1]} | {moves[0]} | {moves[1]} |")
        lines.append("")
    return "\n".join(lines)


def picture(found: Sequence[Run]) -> bytes:
    """Return a PNG: the share within the limits against the load, a panel a workload."""
    sources = list(dict.fromkeys(run.source for run in found))

    def build() -> Figure:
        figure, axes = plt.subplots(1, len(sources), figsize=(5.2 * len(sources) + 0.6, 4), sharey=True, squeeze=False)
        for ax, source in zip(axes[0], sources, strict=True):
            _panel(ax, found, source)
        axes[0][0].set_ylabel("requests within the limits, %")
        legend(figure, axes[0][0], 5 if len(sources) > 1 else 3)
        return figure

    note = "simulated; whiskers: 95 % interval over seeds; grey: the other fixed ratios"
    return drawn(build, LIGHT, "", note, "png")[0]


def _panel(ax: Axes, found: Sequence[Run], source: str) -> None:
    loads = sorted({run.load for run in found if run.source == source})
    for number, policy in enumerate(fixed(found)):
        shares = [met(found, source, load, policy).mean * 100 for load in loads]
        ax.plot(
            loads,
            shares,
            color=LIGHT.faint,
            linewidth=0.9,
            marker=".",
            alpha=0.7,
            label="every fixed ratio" if number == 0 else None,
        )
    for name, colour in _COLOURS.items():
        each = [met(found, source, load, best_fixed(found, source, load) if name == "best fixed" else name) for load in loads]
        high = [max(0.0, (one.high - one.mean) * 100) for one in each]
        ax.errorbar(loads, [one.mean * 100 for one in each], yerr=high, color=colour, marker="o", capsize=3, label=name)
    ax.axhline(ENOUGH * 100, color=LIGHT.ink, linewidth=0.8, linestyle=":")
    ax.set_title(source)
    ax.set_xlabel("load: share of the workers' time")
    ax.set_ylim(0, 103)
