"""The plots of a run: one function a figure, each from the run's own records and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from pdbench.gate.rundata import Point
from pdbench.metrics import itl_s, ttft_s
from pdbench.report import split
from pdbench.report.draw import drawn, legend, nothing
from pdbench.report.look import Theme

#: samples drawn of a distribution: more cannot be seen
_STEPS = 600
#: where a gap of 0 stands on a logarithmic axis, ms: tokens that came in one read
_ZERO_MS = 0.01
_QUANTILES = ("p50", "p95", "p99")
#: loads of which the largest is this many times the smallest stand on a logarithmic axis
_LOG_SPAN = 8
#: the same for a distribution
_LOG_DISTRIBUTION = 4
Curve = NDArray[np.float64]


@dataclass(frozen=True)
class Sheet:
    """What every figure of a run needs: its points, how to draw, and what has to be written across it.

    ``stamp`` goes across the figure ("INVALID RUN"), ``note`` below it; both may be "".
    """

    points: Sequence[Point]
    theme: Theme
    stamp: str = ""
    note: str = ""

    @property
    def measured(self) -> list[Point]:
        """Return the points that have at least one good answer."""
        return [point for point in self.points if point.good]

    def axis(self) -> tuple[list[float], str]:
        """Return where the points stand on a load axis, and its label."""
        for key, label in (
            ("concurrency", "requests in flight (configured)"),
            ("request_rate", "requests sent (1/s, configured)"),
        ):
            loads = [point.summary.get(key) for point in self.measured]
            if all(isinstance(load, (int, float)) for load in loads):
                return [float(load) for load in loads if load is not None], label
        return [float(point.index) for point in self.measured], "load point"


def throughput(sheet: Sheet) -> Figure:
    """Draw output tokens/s, per GPU too, and requests/s against the load."""
    figure, (tokens, requests) = plt.subplots(1, 2, figsize=(10, 4))
    _against_load(sheet, tokens, [("output tokens", [_of(p, "output_throughput") for p in sheet.measured])])
    tokens.set_title("Output throughput")
    tokens.set_ylabel("output tokens/s, whole cluster")
    gpus = next((p.summary["gpus"] for p in sheet.measured if p.summary.get("gpus")), None)
    if gpus:
        per_gpu = tokens.secondary_yaxis("right", functions=(lambda y: y / gpus, lambda y: y * gpus))
        per_gpu.set_ylabel(f"output tokens/s per GPU (all {gpus} {'GPU' if gpus == 1 else 'GPUs'})")
        per_gpu.spines["right"].set_color(sheet.theme.faint)
    _against_load(sheet, requests, [("requests", [_of(p, "request_throughput") for p in sheet.measured])], first=1)
    requests.set_title("Request throughput")
    requests.set_ylabel("completed requests/s")
    return figure


def latency(sheet: Sheet) -> Figure:
    """Draw p50, p95 and p99 of TTFT, TPOT and E2E against the load."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    names = (
        ("ttft_ms", "Time to first token (TTFT)"),
        ("tpot_ms", "Time per output token (TPOT)"),
        ("e2e_ms", "End to end (E2E)"),
    )
    for ax, (key, title) in zip(axes, names, strict=True):
        _against_load(sheet, ax, [(q, [_of(p, key, q) for p in sheet.measured]) for q in _QUANTILES])
        ax.set_title(title)
        ax.set_ylabel("ms")
    if len(sheet.measured) > 1:
        legend(figure, axes[0], 3)
    return figure


def _of(point: Point, *keys: str) -> float:
    value: Any = point.summary
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) else math.nan


def _against_load(sheet: Sheet, ax: Axes, series: Sequence[tuple[str, list[float]]], first: int = 0) -> None:
    loads, label = sheet.axis()
    if not loads:
        nothing(ax, "no request succeeded")
        return
    if len(loads) == 1:
        _bars(sheet, ax, [(name, values[0]) for name, values in series], first)
        return
    order = np.argsort(loads, kind="stable")
    for number, (name, values) in enumerate(series, first):
        style = sheet.theme.series(number, len(sheet.theme.lines))
        ax.plot(np.array(loads)[order], np.array(values)[order], marker="os^"[number % 3], label=name, **style)
    ax.set_xlabel(label)
    highest = max((value for _, values in series for value in values if value > 0), default=1.0)
    ax.set_ylim(0, 1.1 * highest)
    if min(loads) > 0 and max(loads) / min(loads) >= _LOG_SPAN:
        ax.set_xscale("log", base=2)
    ticks = sorted(set(loads))
    if len(ticks) <= 8:
        ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _bars(sheet: Sheet, ax: Axes, bars: Sequence[tuple[str, float]], first: int) -> None:
    """Draw one load point: a line needs two."""
    colours = [sheet.theme.series(first + i, len(sheet.theme.lines))["color"] for i in range(len(bars))]
    drawn = ax.bar([name for name, _ in bars], [value for _, value in bars], width=0.5, color=colours)
    ax.bar_label(drawn, [f"{value:.4g}" for _, value in bars], padding=2)
    ax.margins(x=1.2 if len(bars) == 1 else 0.2, y=0.12)
    ax.grid(visible=False, axis="x")
    ax.set_xlabel(f"one load point: {sheet.measured[0].label}")


def ttft_distribution(sheet: Sheet) -> Figure:
    """Draw which share of the requests had their first token after how long, a line a load point."""
    return _distributions(sheet, "Time to first token", "TTFT (ms)", lambda p: _array(ttft_s(r) for r in p.good), "requests")


def itl_distribution(sheet: Sheet) -> Figure:
    """Draw the gaps between events that carry tokens, pooled over the requests, a line a load point."""
    return _distributions(
        sheet, "Inter-token latency", "ITL (ms)", lambda p: _array(gap for r in p.good for gap in itl_s(r)), "gaps"
    )


def _array(seconds: Any) -> Curve:
    return np.fromiter(seconds, dtype=np.float64) * 1000


def _distributions(sheet: Sheet, title: str, label: str, values: Callable[[Point], Curve], of: str) -> Figure:
    figure, ax = plt.subplots(figsize=(8.5, 4.5))
    zeros, ends = False, list[float]()
    for number, point in enumerate(sheet.measured):
        samples = values(point)
        if not samples.size:
            continue
        zeros = zeros or bool((samples <= 0).any())
        x, share = ecdf(np.maximum(samples, _ZERO_MS))
        ends += [float(x[0]), float(x[-1])]
        ax.plot(x, share, label=f"{point.label} ({samples.size:,} {of})", **sheet.theme.series(number, len(sheet.measured)))
    if not ends:
        nothing(ax, f"no {of} to show: each answer came in one piece")
    else:
        low, high = min(ends), max(ends)
        # A narrow range has too few round numbers for a logarithmic axis.
        if high / low >= _LOG_DISTRIBUTION:
            ax.set_xscale("log")
            if high / low < 1000:
                ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        for level in (0.5, 0.95, 0.99):
            ax.axhline(level, color=sheet.theme.faint, linewidth=0.7, linestyle=":", zorder=1)
            ax.annotate(f"p{100 * level:g}", (1.0, level), xycoords=("axes fraction", "data"), va="center", fontsize=7)
        _legend_beside(figure, ax)
    ax.set_title(f"{title}: share of {of} at most this long")
    ax.set_xlabel(label + (f", 0 is shown at {_ZERO_MS:g}" if zeros else ""))
    ax.set_ylabel(f"share of {of}")
    ax.set_ylim(0, 1.02)
    return figure


def ecdf(values: Curve) -> tuple[Curve, Curve]:
    """Return the empirical distribution as a polyline (x, share), thinned to _STEPS points; the extremes always stay."""
    ordered = np.sort(values)
    n = ordered.size
    places = np.arange(n) if n <= _STEPS else np.unique(np.linspace(0, n - 1, _STEPS).round().astype(int))
    return ordered[places], (places + 1) / n


def in_flight(sheet: Sheet) -> Figure:
    """Draw how many requests were sent and not yet ended, over time, a panel a load point."""
    points = [p for p in sheet.points if any(not math.isnan(r.sent_s) for r in p.records)]
    columns = min(3, max(1, len(points)))
    rows = max(1, math.ceil(len(points) / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(max(6.0, 4 * columns), 2.4 * rows + 0.8), squeeze=False)
    for ax, point in zip(axes.flat, points, strict=False):
        when, count = flight(point)
        ax.step(when, count, where="post", color=sheet.theme.lines[0], linewidth=1.1, label="in flight")
        if isinstance(point.summary.get("concurrency"), int):
            ax.axhline(point.summary["concurrency"], color=sheet.theme.lines[1], linestyle="--", linewidth=1, label="configured")
        unknown = sum(math.isnan(r.end_s) for r in point.records)
        ax.set_title(point.label + (f"\n{unknown} failed ones not shown" if unknown else ""))
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    for ax in axes.flat[len(points) :]:
        ax.set_axis_off()
    if points:
        for ax in axes[:, 0]:
            ax.set_ylabel("requests in flight")
        for number, ax in enumerate(axes.flat[: len(points)]):
            if number + columns >= len(points):
                ax.set_xlabel("s since the first request")
        legend(figure, axes.flat[0], 2)
    else:
        nothing(axes.flat[0], "no request was sent")
    return figure


def flight(point: Point) -> tuple[Curve, Curve]:
    """Return (seconds since the first request, requests in flight) as steps, thinned to about 2 * _STEPS points.

    A request without an end (it failed) is left out: when it stopped being in flight is not known.
    """
    spans = np.array([(r.sent_s, r.end_s) for r in point.records]).reshape(-1, 2)
    spans = spans[~np.isnan(spans).any(axis=1)]
    if not len(spans):
        return np.zeros(1), np.zeros(1)
    when = np.concatenate((spans[:, 0], spans[:, 1]))
    change = np.repeat((1.0, -1.0), len(spans))
    order = np.lexsort((change, when))
    when, count = when[order] - spans[:, 0].min(), np.cumsum(change[order])
    if len(when) <= 2 * _STEPS:
        return when, count
    # Of every stretch of time its lowest and its highest count, so that no dip is lost.
    keep = {0, len(when) - 1}
    for part in np.array_split(np.arange(len(when)), _STEPS):
        keep |= {int(part[np.argmin(count[part])]), int(part[np.argmax(count[part])])}
    chosen = np.array(sorted(keep))
    return when[chosen], count[chosen]


def _legend_beside(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)


#: file name without its ending -> (function, what it shows)
FIGURES: dict[str, tuple[Callable[[Sheet], Figure], str]] = {
    "throughput": (throughput, "Throughput against load"),
    "latency": (latency, "Latency against load: p50, p95 and p99"),
    "ttft": (ttft_distribution, "Distribution of the time to first token"),
    "itl": (itl_distribution, "Distribution of the inter-token latency"),
    "in_flight": (in_flight, "Requests in flight over time"),
    "ttft_split": (split.figure, "Where the time to the first token goes, by what servers say of the same requests"),
}


def shown(sheet: Sheet) -> list[str]:
    """Return the figures that this run has something for."""
    return [name for name in FIGURES if name != "ttft_split" or split.known(sheet.points)]


def draw(name: str, sheet: Sheet, *kinds: str) -> list[bytes]:
    """Return a figure in each of ``kinds`` (``png``, ``svg``)."""
    return drawn(lambda: FIGURES[name][0](sheet), sheet.theme, sheet.stamp, sheet.note, *kinds)
