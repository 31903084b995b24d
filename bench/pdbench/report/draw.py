"""From a function that builds a figure to the bytes of its files, and what figures of runs and of sweeps share."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from pdbench.report.look import VERMILLION, Theme


def drawn(build: Callable[[], Figure], theme: Theme, stamp: str, note: str, *kinds: str) -> list[bytes]:
    """Return a figure in each of ``kinds`` (``png``, ``svg``); ``stamp`` goes across it, ``note`` below it, both may be ""."""
    pages = []
    with plt.style.context(theme.settings()):
        figure = build()
        try:
            figure.set_layout_engine("constrained", w_pad=0.1)
            if stamp:
                _stamp(figure, stamp, theme)
            if note:
                figure.supxlabel(note, fontsize=8)
            for kind in kinds:
                page = io.BytesIO()
                # Without a date the same run gives the same bytes.
                figure.savefig(page, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
                figure.set_layout_engine("none")  # the places that the first format was given hold for the others
                pages.append(page.getvalue())
        finally:
            plt.close(figure)
    return pages


def inline(svg: bytes) -> str:
    """Return an SVG as an address that holds it."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def _stamp(figure: Figure, stamp: str, theme: Theme) -> None:
    rim = [withStroke(linewidth=3, foreground=theme.paper)]
    where: dict[str, Any] = {"ha": "center", "va": "center", "rotation": 18, "zorder": 10}
    figure.text(0.5, 0.5, stamp, color=VERMILLION, fontsize=44, fontweight="bold", alpha=0.4, path_effects=rim, **where)


def nothing(ax: Axes, why: str) -> None:
    """Say in an empty panel why it is empty."""
    ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", va="center")


def legend(figure: Figure, ax: Axes, columns: int) -> None:
    """Put the legend of one panel above the figure."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)
