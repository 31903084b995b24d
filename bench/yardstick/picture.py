"""docs/results/client.png: cost, load and error of each tool at 512 in flight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from pdbench.report.look import LIGHT
from yardstick.table import Row, Spread, figures

_PANELS = (
    ("CPU a request (ms)", "cpu_ms", "c512", False),
    ("delivered / ideal", "delivered", "c512", False),
    ("... one core taken", "delivered", "c512-core-taken", False),
    ("mean TTFT error (ms)", "ttft_wrong_by", "c512", True),
)


def draw(rows: Sequence[Row], tools: Sequence[str], path: Path, below: str) -> None:
    """Write the picture; tools without figures keep their line, and say so."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    settings: Any = LIGHT.settings()
    with mpl.rc_context(settings):
        figure, panels = plt.subplots(1, len(_PANELS), figsize=(13, 0.45 * len(tools) + 1.8), sharey=True)
        for panel, (title, name, case, logarithmic) in zip(panels, _PANELS, strict=True):
            if logarithmic:
                panel.set_xscale("symlog", linthresh=1)
                panel.xaxis.set_major_formatter("{x:g}")
            for place, tool in enumerate(tools):
                found: Spread | None = figures(rows, tool, case)[name]
                if found is None:
                    panel.text(0, place, " not measured", va="center", fontsize=8)
                    continue
                colour = LIGHT.lines[0 if tool.startswith("pdbench") else 1 if not tool.startswith("floor") else 2]
                panel.barh(place, found.median, color=colour, height=0.6)
                panel.plot([found.least, found.most], [place, place], color=LIGHT.ink, linewidth=1)
                panel.text(max(found.most, 0), place, f" {found.median:.3g}", va="center", fontsize=8)
            panel.set_title(title, loc="left")
            panel.margins(x=0.22)
            if not panel.patches:
                panel.set_xlim(0, 1)
        panels[0].set_yticks(range(len(tools)), tools)
        panels[0].invert_yaxis()
        figure.text(0.01, 0.01, below, fontsize=8, color=LIGHT.faint)
        figure.tight_layout(rect=(0, 0.05, 1, 1))
        figure.savefig(path, dpi=110)
        plt.close(figure)
