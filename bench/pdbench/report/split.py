"""Mean TTFT split into its stages: the figure and the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from pdbench.attribution import NAMES, Json, attribute, in_words
from pdbench.gate.rundata import Point
from pdbench.report.look import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, Theme

if TYPE_CHECKING:
    from pdbench.report.figures import Sheet

#: waits are hatched, work is not: neighbours differ by more than colour
_LOOK = {
    "router": ("#8a8a8a", ""),
    "bootstrap": (PURPLE, "//"),
    "prefill_queue": (ORANGE, "//"),
    "prefill_forward": (ORANGE, ""),
    "kv_allocation": (GREEN, "//"),
    "kv_transfer": (BLUE, ""),
    "decode_queue": (SKY, "//"),
    "first_step": (SKY, ""),
    "prefill_answer": ("#8a8a8a", "//"),
    "rest": (VERMILLION, ".."),
}
REST = "unexplained rest"
#: a part below this share of its bar has no room for a number
_ROOM = 0.06


def of(point: Point) -> Json | None:
    """Return the attribution of a load point, from its evidence; None where there is none."""
    return attribute(point.evidence, [*point.warmup, *point.records])


def known(points: Sequence[Point]) -> list[tuple[Point, Json]]:
    """Return the points whose TTFT can be split."""
    return [(point, found) for point in points if (found := of(point))]


def figure(sheet: Sheet) -> Figure:
    """Draw a bar a load point: the mean TTFT, stage by stage."""
    return bars([(point.label, found) for point, found in known(sheet.points)], sheet.theme)


def bars(bars: Sequence[tuple[str, Json]], theme: Theme, each: float = 0.7) -> Figure:
    """Draw a bar for each label and its attribution, ``each`` inches high."""
    drawn, ax = plt.subplots(figsize=(10, 1.6 + each * len(bars)))
    labels = [label for label, _ in bars]
    left = [0.0] * len(bars)
    longest = max((found["ttft_ms"] for _, found in bars), default=1.0)
    for stage in (*NAMES, "rest"):
        # A rest below 0 (stages that overlap) cannot be drawn; the table has it.
        values = [max(0.0, _ms(found, stage) or 0.0) for _, found in bars]
        if not any(values):
            continue
        colour, hatch = _LOOK[stage]
        parts = ax.barh(labels, values, left=left, color=colour, hatch=hatch, label=NAMES.get(stage, REST), edgecolor=theme.paper)
        shown = [(f"{value:,.0f}" if value >= 100 else f"{value:.3g}") if value > _ROOM * longest else "" for value in values]
        rim = {"facecolor": theme.paper, "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
        for text in ax.bar_label(parts, shown, label_type="center", fontsize=8):
            if text.get_text():
                text.set_bbox(rim)
        left = [start + value for start, value in zip(left, values, strict=True)]
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("ms, mean over requests")
    drawn.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return drawn


def _ms(found: Json, stage: str) -> float | None:
    if stage == "rest":
        rest: float = found["rest_ms"]
        return rest
    return next((row["ms"] for row in found["stages"] if row["stage"] == stage), None)


def rows(points: Sequence[Point]) -> tuple[list[str], list[list[object]]]:
    """Return the columns and, a load point, the label and figures in ms; None is "not reported"."""
    bars = known(points)
    stages = [stage for stage in NAMES if any(row["stage"] == stage for _, found in bars for row in found["stages"])]
    head = ["load", "mean TTFT", *(NAMES[stage] for stage in stages), REST]
    return head, [
        [point.label, found["ttft_ms"], *(_ms(found, stage) for stage in stages), found["rest_ms"]] for point, found in bars
    ]


def sentences(points: Sequence[Point]) -> list[str]:
    """Return a sentence a load point, and what its window was."""
    return [
        f"{point.label}: {in_words(found)} ({found['requests']:,} requests{', warm-up among them' if found['warmup'] else ''})"
        for point, found in known(points)
    ]
