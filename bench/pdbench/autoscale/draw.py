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
_UNKNOWN = (float("nan"), float("nan"))


def picture(entries: Sequence[Json]) -> bytes:
    """Return a PNG of a session's log; windows that were not judged are gaps."""
    start = entries[0]["at"]
    note = "pressure 1: the promise is just kept; grey: while a change was made"

    def build() -> Figure:
        figure, (top, below) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, height_ratios=(2, 1))
        points = [_point(entry, start) for entry in entries if entry["kind"] in ("window", "change") and entry["ratio"]]
        minutes = [at for at, _, _ in points]
        for place, (role, colour) in enumerate(_COLOURS.items()):
            top.plot(minutes, [pressed[place] for _, pressed, _ in points], color=colour, marker=".", label=role)
            below.step(minutes, [getattr(ratios.parse(ratio), role) for _, _, ratio in points], where="post", color=colour)
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


def _point(entry: Json, start: float) -> tuple[float, Sequence[float], str]:
    """Return when (minutes), the pressures (NaN where nothing was judged), and the ratio from then on."""
    if entry["kind"] == "change":
        return (entry["at"] + entry["took_s"] - start) / 60, _UNKNOWN, entry["to"] if entry["ok"] else entry["ratio"]
    return (entry["at"] - start) / 60, entry.get("pressures") or _UNKNOWN, entry["ratio"]


def _changes(ax: Axes, entries: Sequence[Json], start: float) -> None:
    for entry in entries:
        if entry["kind"] == "change":
            begin = (entry["at"] - start) / 60
            ax.axvspan(begin, begin + entry["took_s"] / 60, color=LIGHT.faint, alpha=0.3, linewidth=0)
