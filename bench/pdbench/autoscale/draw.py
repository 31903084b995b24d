"""A session as a picture: the pressure on either role over time, and the ratio below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pdbench.report.draw import drawn, legend
from pdbench.report.look import BLUE, LIGHT, ORANGE
from pdlib import ratio as ratios

Json = dict[str, Any]
_COLOURS = {"prefill": BLUE, "decode": ORANGE}


def picture(entries: Sequence[Json]) -> bytes:
    """Return a PNG of a session's log; windows that were not judged are gaps."""
    start = entries[0]["at"]
    note = "pressure 1: the promise is just kept; grey: while a change was made"

    def build() -> Figure:
        figure, (top, below) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, height_ratios=(2, 1))
        windows = [entry for entry in entries if entry["kind"] == "window"]
        minutes = [(entry["at"] - start) / 60 for entry in windows]
        for place, (role, colour) in enumerate(_COLOURS.items()):
            pressed = [entry["pressures"][place] if entry.get("pressures") else float("nan") for entry in windows]
            top.plot(minutes, pressed, color=colour, marker=".", label=role)
            workers = [getattr(ratios.parse(entry["ratio"]), role) for entry in windows]
            below.step(minutes, workers, where="post", color=colour)
        top.axhline(1, color=LIGHT.faint, linewidth=0.9)
        top.set_ylabel("pressure")
        top.set_ylim(bottom=0)
        below.set_ylabel("workers")
        below.set_xlabel("minutes")
        below.set_ylim(bottom=0)
        below.yaxis.get_major_locator().set_params(integer=True)
        for ax in (top, below):
            _changes(ax, entries, start)
        legend(figure, top, 2)
        return figure

    return drawn(build, LIGHT, "", note, "png")[0]


def _changes(ax: Axes, entries: Sequence[Json], start: float) -> None:
    for entry in entries:
        if entry["kind"] == "change":
            begin = (entry["at"] - start) / 60
            ax.axvspan(begin, begin + entry["took_s"] / 60, color=LIGHT.faint, alpha=0.3, linewidth=0)
