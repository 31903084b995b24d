"""The map of the best configuration: shapes of the load down, its size across."""

from __future__ import annotations

import math

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from pdbench.report.look import Theme
from pdbench.sweep.report.choose import Decision
from pdbench.sweep.report.panels import look
from pdbench.sweep.report.read import Sweep

_UNDECIDED = {"undecided": "undecided", "alone": "nothing to\ncompare with"}
#: configurations that are named in a cell that is not decided; more do not fit
_NAMED = 2


def best_map(sweep: Sweep, theme: Theme) -> Figure:
    """Draw a square for each load: the best configuration and its lead, or hatched that none was shown."""
    table = sweep.table
    sizes = sorted({(d.load.concurrency is None, d.load.size) for d in sweep.decisions})
    rows = list(dict.fromkeys(d.load.shape[:4] for d in sweep.decisions))
    labels = {d.load.shape[:4]: table.shape_label(d.load.shape) for d in sweep.decisions}
    figure, ax = plt.subplots(figsize=(max(6.5, 3.0 + 1.9 * len(sizes)), 1.7 + 0.85 * len(rows)))
    shown = set()
    for found in sweep.decisions:
        x, y = sizes.index((found.load.concurrency is None, found.load.size)), rows.index(found.load.shape[:4])
        colour = look(table, found.leader.config, theme)["color"] if found.state == "best" else theme.paper
        hatch = "" if found.state == "best" else "////"
        ax.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor=theme.faint, hatch=hatch, linewidth=1))
        # The colour stands beside the text, not below it: it reads on any of them.
        box = {"facecolor": theme.paper, "edgecolor": "none", "pad": 2.5, "alpha": 0.92}
        ax.text(x + 0.5, y + 0.5, _says(found), ha="center", va="center", fontsize=8, bbox=box)
        if found.state == "best":
            shown.add(found.leader.config)
    ax.set_xlim(0, len(sizes))
    ax.set_ylim(len(rows), 0)
    ax.set_xticks([i + 0.5 for i in range(len(sizes))], [f"{size:g}{' req/s' if rate else ''}" for rate, size in sizes])
    ax.set_yticks([i + 0.5 for i in range(len(rows))], [labels[row] for row in rows])
    ax.set_xlabel("requests in flight (configured)" if not any(rate for rate, _ in sizes) else "load")
    ax.grid(visible=False)
    ax.tick_params(length=0)
    handles = [Patch(color=look(table, c, theme)["color"], label=f"{c.label} is best") for c in table.configs if c in shown]
    if any(found.state != "best" for found in sweep.decisions):
        handles.append(Patch(facecolor=theme.paper, edgecolor=theme.faint, hatch="////", label="not decided"))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)))
    return figure


def _says(found: Decision) -> str:
    if found.state == "best" and found.lead:
        more = "others: none" if math.isinf(found.lead.value) else f"+{100 * (found.lead.value - 1):.3g} %"
        return f"{found.leader.config.label}\n{more}"
    text = _UNDECIDED[found.state]
    names = [cell.config.label for cell in (found.leader, *found.rivals)]
    if found.state == "alone":
        return f"{names[0]}:\n{text}"
    more = f"\nor {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{text}\n" + "\n".join(names[:_NAMED]) + more
