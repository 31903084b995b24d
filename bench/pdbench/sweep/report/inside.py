"""What went on inside: TTFT by stage, prefill against decode over time, and KV moved, one run a configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pdbench.engines import engine
from pdbench.gate.rundata import NotARun
from pdbench.gate.rundata import load as load_run
from pdbench.reading import json_in
from pdbench.records import Record
from pdbench.report import split
from pdbench.report.look import Theme
from pdbench.sweep.report.data import Cell, Load, Row
from pdbench.sweep.report.panels import from_zero, grid, legend_of_all, look, title
from pdbench.sweep.report.read import Json, Sweep, attribution

T = TypeVar("T")
Curve = NDArray[np.float64]
#: parts into which a run's time is cut, and the least requests worth drawing over time
_BINS, _LEAST = 24, 8
#: most bars in the figure of stages
_MOST_BARS = 40


def busiest(sweep: Sweep) -> Load | None:
    """Return the load that most configurations were measured under; of several the heaviest, then the longest prompts."""
    counts = {load: len(sweep.table.under(load)) for load in sweep.table.loads}
    loads = [load for load, count in counts.items() if count]
    return max(loads, key=lambda load: (counts[load], load.size, load.isl, load.osl)) if loads else None


def _first_of_each(sweep: Sweep, read: Callable[[Cell, Row], T | None]) -> list[T]:
    """Return what ``read`` makes, under the busiest load, of each configuration's first valid repeat that has what it needs."""
    load = busiest(sweep)
    found = []
    for cell in sweep.table.under(load) if load else []:
        made = next((one for row in cell.rows if (one := read(cell, row)) is not None), None)
        if made is not None:
            found.append(made)
    return found


@lru_cache(maxsize=1)
def stages(sweep: Sweep) -> list[tuple[str, Json]]:
    """Return (label, attribution) for each configuration under the heaviest load of each shape, the best shapes' first."""
    table = sweep.table
    bars: list[tuple[str, Json]] = []
    for shape in table.shapes:
        heaviest = max(cell.load.size for cell in table.measured if cell.load.shape == shape)
        for config in table.configs:
            for cell in table.line(config, shape):
                if cell.load.size == heaviest and (found := attribution(sweep, cell)):
                    bars.append((f"{config.label}: {table.load_label(cell.load)}", found))
    return bars[:_MOST_BARS]


def ttft_split(sweep: Sweep, theme: Theme) -> Figure:
    """Draw the mean TTFT by stage, a bar for each configuration under the heaviest load of each shape."""
    return split.bars(stages(sweep), theme, 0.42)


@dataclass(frozen=True)
class Rates:
    """One run over time: ``when`` in s; requests' worth of prefill and of decode done per second, as the client saw it."""

    cell: Cell
    when: Curve
    prefill: Curve
    decode: Curve


@lru_cache(maxsize=1)
def rates(sweep: Sweep) -> list[Rates]:
    """Return the rates of the first valid repeat of each configuration under the busiest load, where its records are there."""
    return _first_of_each(sweep, lambda cell, row: over_time(cell, _records(sweep, row)))


def _records(sweep: Sweep, row: Row) -> list[Record]:
    try:
        points = load_run(sweep.run(row)).points
    except NotARun:
        return []
    return next((point.good for point in points if point.index == row.get("point")), [])


def over_time(cell: Cell, records: list[Record]) -> Rates | None:
    """Return the rates of a run's good requests, smoothed over three parts of its time; None for too few to say."""
    good = [r for r in records if r.chunk_s and not math.isnan(r.first_s)]
    if len(good) < _LEAST:
        return None
    start, end = min(r.sent_s for r in good), max(r.end_s for r in good)
    edges = np.linspace(start, end, _BINS + 1)
    asked = [max(r.prompt_tokens_asked, 1) for r in good]
    first = np.histogram([r.first_s for r in good], edges, weights=asked)[0] / np.mean(asked)
    times = [t for r in good for t in r.chunk_s]
    tokens = [float(n) for r in good for n in _tokens(r)]
    out = np.histogram(times, edges, weights=tokens)[0] / max(1.0, sum(tokens) / len(good))
    width = (end - start) / _BINS
    return Rates(cell, (edges[:-1] + edges[1:]) / 2 - start, _smooth(first) / width, _smooth(out) / width)


def _tokens(record: Record) -> Sequence[float]:
    """Return the tokens of each event; where the server does not say, all events of an answer hold the same."""
    return record.chunk_tokens or [max(record.output_tokens, 1) / len(record.chunk_s)] * len(record.chunk_s)


def _smooth(values: Curve) -> Curve:
    """Return each value's mean with its neighbours: prompts end in bursts."""
    padded = np.concatenate((values[:1], values, values[-1:]))
    return np.convolve(padded, np.full(3, 1 / 3), mode="valid")


def rate_match(sweep: Sweep, theme: Theme) -> Figure:
    """Draw prefill and decode rates over time, a panel a configuration."""
    found = rates(sweep)
    figure, axes = grid(len(found), height=2.5)
    highest = max(float(max(one.prefill.max(), one.decode.max())) for one in found)
    for ax, one in zip(axes, found, strict=True):
        ax.plot(one.when, one.prefill, label="prefill: prompt tokens/s ÷ prompt length", color=theme.lines[1], linestyle="-")
        ax.plot(one.when, one.decode, label="decode: output tokens/s ÷ output length", color=theme.lines[0], linestyle="--")
        title(ax, one.cell.config.label)
        ax.set_ylim(0, 1.1 * highest)
        place = ax.get_subplotspec()
        if place is not None and place.is_first_col():
            ax.set_ylabel("requests' worth per s")
        ax.set_xlabel("s since the first request")
    legend_of_all(figure, axes, columns=2)
    return figure


@dataclass(frozen=True)
class Moved:
    """KV cache of one run: MB moved since the load point began, over time, by what the engine counts."""

    cell: Cell
    when: Curve
    megabytes: Curve


@lru_cache(maxsize=1)
def moved(sweep: Sweep) -> list[Moved]:
    """Return what server_metrics.parquet says of KV transfers under the busiest load, a run a configuration."""
    return _first_of_each(sweep, lambda cell, row: _moved(sweep, cell, row))


def _moved(sweep: Sweep, cell: Cell, row: Row) -> Moved | None:
    known = engine(json_in(sweep.run(row) / "plan.json").get("engine"))
    name, _, labels = known.transferred.partition("{")
    try:
        frame = pd.read_parquet(sweep.run(row) / "server_metrics.parquet")
    except (OSError, ValueError):
        return None
    chosen = frame[
        (frame["point"] == row.get("point"))
        & (frame["name"] == name)
        & frame["labels"].str.contains(labels.removesuffix("}"), regex=False)
        & frame["source"].str.startswith(known.transfer_role)
    ]
    if chosen.empty:
        return None
    # Workers are read one after the other: their values are brought to common times before they are added.
    when = np.unique(chosen["t_s"].to_numpy(dtype=np.float64))
    total = np.zeros_like(when)
    for _, series in chosen.groupby(["source", "labels"]):
        at, value = (series[column].to_numpy(dtype=np.float64) for column in ("t_s", "value"))
        total += np.interp(when, at, value - value[0])
    if len(when) < 3 or total[-1] <= 0:
        return None
    return Moved(cell, when, total * known.transfer_unit / 1e6)


def kv_moved(sweep: Sweep, theme: Theme) -> Figure:
    """Draw how much KV cache had been moved, over time, a line a configuration."""
    found = moved(sweep)
    unit, scale = ("GB", 1e-3) if max(one.megabytes[-1] for one in found) > 5000 else ("MB", 1.0)
    figure, axes = grid(1, height=3.2)
    for one in found:
        style = {**look(sweep.table, one.cell.config, theme), "markevery": max(1, len(one.when) // 8)}
        axes[0].plot(one.when, scale * one.megabytes, label=one.cell.config.label, **style)
    axes[0].set_xlabel("s since the load point began")
    axes[0].set_ylabel(f"KV cache moved ({unit})")
    from_zero(axes)
    legend_of_all(figure, axes, sweep.table)
    return figure
