"""The picture of a ranking: what each ratio is predicted to do, with intervals over the seeds."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pdbench.advise.rank import Ranked
from pdbench.advise.say import GOALS
from pdbench.report.draw import drawn
from pdbench.report.look import BLUE, LIGHT

NOTE = "a prediction; bars: mean over seeds, whiskers: 95 % interval; dark: not shown to differ, seed by seed, from the best"


def picture(order: Sequence[Ranked], goal: str, title: str) -> bytes:
    """Return a PNG of the ratios that serve the load, best first."""
    shown = [each for each in order if each.rank]

    def build() -> Figure:
        figure, axes = plt.subplots(1, 3, figsize=(11, 1.4 + 0.34 * len(shown)), sharey=True)
        for ax, (name, label) in zip(
            axes, ((goal, GOALS[goal]), ("ttft_ms_p50", "TTFT p50, ms"), ("itl_ms_p99", "ITL p99, ms")), strict=True
        ):
            _bars(ax, shown, name)
            ax.set_xlabel(label)
        axes[0].invert_yaxis()
        figure.suptitle(title)
        return figure

    return drawn(build, LIGHT, "", NOTE, "png")[0]


def _bars(ax: Axes, shown: Sequence[Ranked], name: str) -> None:
    found = [each.figure(name) for each in shown]
    places = range(len(shown))
    colours = [BLUE if each.rank == 1 else "#9dbfd6" for each in shown]
    ends = [[max(0.0, one.mean - max(one.low, 0.0)) for one in found], [one.high - one.mean for one in found]]
    whiskers = None if len(shown[0].runs) < 2 else ends
    ax.barh(places, [one.mean for one in found], color=colours, xerr=whiskers, ecolor=LIGHT.ink, capsize=3)
    ax.set_yticks(places, [each.layout.ratio for each in shown])
    ax.grid(axis="y", visible=False)
