"""Panels in a grid, one look for each configuration in every figure, and axes for loads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pdbench.report.look import Theme
from pdbench.sweep.report.data import Config, Table

_MARKERS = "osD^vP*X<>"
#: loads of which the largest is this many times the smallest stand on a logarithmic axis
_LOG_SPAN = 4
#: the same for what is drawn up the page
_WIDE = 12
_COLUMNS, _WIDTH, _HEIGHT = 3, 4.0, 3.1


def look(table: Table, config: Config, theme: Theme) -> dict[str, Any]:
    """Return colour, dashes and marker of a configuration: the same in every figure of the sweep."""
    place = table.configs.index(config)
    return {**theme.series(place, len(table.configs)), "marker": _MARKERS[place % len(_MARKERS)]}


def grid(count: int, columns: int = 0, height: float = _HEIGHT, width: float = _WIDTH) -> tuple[Figure, list[Axes]]:
    """Return a figure with so many panels, in 3 columns (4 panels: 2) or so many; places that are left over are empty."""
    wide = max(1, min(columns or (2 if count == 4 else _COLUMNS), count))
    rows = max(1, math.ceil(count / wide))
    figure, axes = plt.subplots(rows, wide, figsize=(max(6.5, width * wide), height * rows + 0.8), squeeze=False)
    for ax in list(axes.flat)[count:]:
        ax.set_axis_off()
    return figure, list(axes.flat)[:count]


def title(ax: Axes, text: str, size: float = 11.0) -> None:
    """Put a title of so many points above a panel of the usual width, in as many lines as it needs."""
    ax.set_title(fill(text, int(400 / size), break_long_words=False, break_on_hyphens=False), fontsize=size)


def load_axis(ax: Axes, loads: Sequence[float]) -> None:
    """Make x an axis for these loads: each has a tick where there are few, logarithmic where they span much."""
    ticks = sorted(set(loads))
    if ticks and ticks[0] > 0 and ticks[-1] / ticks[0] >= _LOG_SPAN:
        ax.set_xscale("log", base=2)
    if len(ticks) <= 8:
        ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    if len(ticks) == 1:
        ax.margins(x=0.5)


def from_zero(axes: Sequence[Axes]) -> None:
    """Let y begin at 0 with a little room above the highest value, errors included."""
    for ax in axes:
        highest = ax.dataLim.y1
        ax.set_ylim(0, 1.1 * highest if np.isfinite(highest) and highest > 0 else 1.0)


def wide_span(axes: Sequence[Axes], values: Sequence[float]) -> bool:
    """Tell whether values span so much that small ones could not be told apart from 0; they have one logarithmic y then."""
    known = [value for value in values if value > 0]
    if not known or max(known) < _WIDE * min(known):
        return False
    for ax in axes:
        ax.set_yscale("log")
        ax.set_ylim(0.8 * min(known), 1.25 * max(known))
        log_ticks(ax.yaxis)
    return True


def log_ticks(axis: Axis) -> None:
    """Name 1, 2 and 5 of every power of ten on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_of_all(figure: Figure, axes: Sequence[Axes], table: Table | None = None, columns: int = 6) -> None:
    """Put one legend above the figure: every label of any panel, once, configurations in their order first."""
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    known = [config.label for config in table.configs] if table else []
    found = {
        label: found[label] for label in sorted(found, key=lambda label: known.index(label) if label in known else len(known))
    }
    longest = max(map(len, found), default=1)
    fits = max(1, int(figure.get_size_inches()[0] * 10 / (longest + 6)))
    figure.legend(list(found.values()), list(found), loc="outside upper center", ncols=min(columns, fits))
