"""Colours and lettering of the pictures: Okabe and Ito's palette, which colour-blind readers can tell apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib

#: Okabe-Ito without its yellow and black, which vanish on white and on dark paper
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
#: one colour a role, here and in the picture of the cluster
ROLE_COLOURS = {"prefill": ORANGE, "decode": SKY, "aggregated": GREEN}
_DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Theme:
    """Paper and ink of one rendering; ``ramp`` is the part of the cividis scale that shows on the paper."""

    name: str
    paper: str
    ink: str
    faint: str
    lines: tuple[str, ...]
    ramp: tuple[float, float]

    def settings(self) -> dict[str, Any]:
        """Return the matplotlib settings."""
        return {
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "figure.facecolor": self.paper,
            "savefig.facecolor": self.paper,
            "axes.facecolor": self.paper,
            "axes.edgecolor": self.faint,
            "axes.labelcolor": self.ink,
            "axes.titlesize": 11,
            "axes.titlecolor": self.ink,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": self.faint,
            "grid.alpha": 0.35,
            "grid.linewidth": 0.6,
            "text.color": self.ink,
            "text.parse_math": False,
            "xtick.color": self.ink,
            "ytick.color": self.ink,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "lines.markersize": 6,
            # The same run gives the same file.
            "svg.hashsalt": "pdbench",
        }

    def series(self, number: int, of: int) -> dict[str, Any]:
        """Return colour and dashes of one line out of ``of``: distinct ones for few, a scale from first to last for many."""
        if of <= len(self.lines):
            return {"color": self.lines[number], "linestyle": _DASHES[number % len(_DASHES)]}
        low, high = self.ramp
        place = low + (high - low) * number / (of - 1)
        return {"color": matplotlib.colormaps["cividis"](place), "linestyle": _DASHES[number % len(_DASHES)]}


LIGHT = Theme("light", "#ffffff", "#1a1a1a", "#8a8a8a", (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY), (0.0, 0.85))
DARK = Theme("dark", "#15181c", "#e8e8e8", "#7d848c", (SKY, ORANGE, GREEN, PURPLE, VERMILLION, "#F0E442"), (0.25, 1.0))
