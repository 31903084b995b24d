"""Figures with a line for each configuration: frontiers, figures against load, TTFT against prompt length."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pdbench.report.look import Theme
from pdbench.sweep.report.choose import frontier, interval
from pdbench.sweep.report.data import GOALS, GOODPUT, RATE, Cell, Config, Load, Table, number
from pdbench.sweep.report.panels import from_zero, grid, legend_of_all, load_axis, log_ticks, look, title, wide_span
from pdbench.sweep.report.read import Sweep

#: most loads that the figure of TTFT against prompt length shows: the lightest, the middle one, the heaviest
_MOST_ROWS = 3
#: TTFTs of which the longest is this many times the shortest stand on a logarithmic axis
_LOG_TTFT = 12


def pareto_user(sweep: Sweep, theme: Theme) -> Figure:
    """Draw output tokens/s per GPU against output tokens/s per user, the wait for the first one included."""
    return _pareto(sweep.table, theme, "tok_s_user", "output tokens/s per user, TTFT included (mean of n / E2E)", higher_x=True)


def pareto_ttft(sweep: Sweep, theme: Theme) -> Figure:
    """Draw output tokens/s per GPU against the median TTFT."""
    return _pareto(sweep.table, theme, "ttft_ms_p50", "TTFT, median (ms)", higher_x=False)


def _pareto(table: Table, theme: Theme, metric: str, label: str, higher_x: bool) -> Figure:
    figure, axes = grid(len(table.shapes))
    for ax, shape in zip(axes, table.shapes, strict=True):
        points: list[tuple[float, float]] = []
        for config in table.configs:
            line = [cell for cell in table.line(config, shape) if number(cell.mean(metric))]
            xs, ys = [cell.mean(metric) for cell in line], [cell.mean(RATE) for cell in line]
            points += zip(xs, ys, strict=True)
            if line:
                ax.plot(xs, ys, label=config.label, **{**look(table, config, theme), "linewidth": 1.1})
                for end in {0, len(line) - 1}:
                    # The lower end is named below its mark: two marks that touch keep their names apart.
                    above = 4 if ys[end] >= max(ys[0], ys[-1]) else -10
                    size = line[end].load.size
                    ax.annotate(f"{size:g}", (xs[end], ys[end]), xytext=(4, above), textcoords="offset points", fontsize=7)
        best = [points[i] for i in frontier(points, higher_x)]
        if best:
            xs, ys = [x for x, _ in best], [y for _, y in best]
            # What is reached at a point is reached at every worse x, too.
            where = "pre" if higher_x else "post"
            ax.step(xs, ys, where=where, color=theme.ink, linewidth=5, alpha=0.22, label="frontier", zorder=1)  # type: ignore[arg-type]
        ax.set_title(table.shape_label(shape))
        ax.set_xlabel(label)
        ax.margins(x=0.12)
        if not higher_x and points and max(x for x, _ in points) >= _LOG_TTFT * min(x for x, _ in points):
            ax.set_xscale("log")
            log_ticks(ax.xaxis)
        else:
            ax.set_xlim(left=0)
    from_zero(axes)
    axes[0].set_ylabel("output tokens/s per GPU (all GPUs)")
    legend_of_all(figure, axes, table)
    return figure


def throughput(sweep: Sweep, theme: Theme) -> Figure:
    """Draw output tokens/s per GPU against load, with intervals."""
    return _against_load(sweep.table, theme, RATE, "output tokens/s per GPU (all GPUs)", intervals=True)


def goodput(sweep: Sweep, theme: Theme) -> Figure:
    """Draw the requests/s that kept all limits, per GPU, against load, with intervals."""
    return _against_load(sweep.table, theme, GOODPUT, GOALS[GOODPUT], intervals=True)


def ttft(sweep: Sweep, theme: Theme) -> Figure:
    """Draw the median TTFT against load."""
    return _against_load(sweep.table, theme, "ttft_ms_p50", "TTFT, median (ms)")


def itl(sweep: Sweep, theme: Theme) -> Figure:
    """Draw the mean inter-token latency against load."""
    return _against_load(sweep.table, theme, "itl_ms_mean", "ITL, mean (ms)")


def _against_load(table: Table, theme: Theme, metric: str, label: str, intervals: bool = False) -> Figure:
    figure, axes = grid(len(table.shapes))
    heights: list[float] = []
    for ax, shape in zip(axes, table.shapes, strict=True):
        sizes: list[float] = []
        for config in table.configs:
            line = [cell for cell in table.line(config, shape) if number(cell.mean(metric))]
            if line:
                xs, ys = [cell.load.size for cell in line], [cell.mean(metric) for cell in line]
                sizes += xs
                heights += ys
                style = look(table, config, theme)
                ax.errorbar(
                    xs, ys, yerr=_errors(table, line, metric) if intervals else None, label=config.label, capsize=3, **style
                )
        load_axis(ax, sizes)
        ax.set_title(table.shape_label(shape))
        ax.set_xlabel("requests in flight (configured)" if shape[4] else "requests sent (1/s, configured)")
    if intervals or not wide_span(axes, heights):
        from_zero(axes)
    axes[0].set_ylabel(label)
    legend_of_all(figure, axes, table)
    return figure


def _errors(table: Table, line: Sequence[Cell], metric: str) -> list[list[float]] | None:
    """Return how far the interval of each cell reaches below and above its figure; None where no spread is known."""
    found = [interval(cell, table.under(cell.load), metric) for cell in line]
    if any((one.low is None or one.high is None) and one.value > 0 for one in found):
        return None
    return [[one.value - (one.low or 0.0) for one in found], [(one.high or one.value) - one.value for one in found]]


def lengths(table: Table) -> list[tuple[Load, Config]]:
    """Return the panels of TTFT against prompt length: (a load of its size, configuration); [] without two prompt lengths.

    Rows are sizes of load: the lightest, the middle one and the heaviest of those that have two prompt lengths.
    """
    seen: dict[tuple[object, ...], set[float]] = {}
    first: dict[tuple[object, ...], Load] = {}
    for cell in table.measured:
        key = _row(cell.load)
        seen.setdefault((*key, cell.load.osl), set()).add(cell.load.isl)
        first.setdefault(key, cell.load)
    keys = [key for key in first if any(len(isls) > 1 for name, isls in seen.items() if name[:-1] == key)]
    keys.sort(key=lambda key: first[key].size)
    if len(keys) > _MOST_ROWS:
        keys = [keys[0], keys[len(keys) // 2], keys[-1]]
    return [(first[key], config) for key in keys for config in table.configs]


def _row(load: Load) -> tuple[object, ...]:
    return load.model, load.other, load.concurrency, load.rate


def ttft_by_length(sweep: Sweep, theme: Theme) -> Figure:
    """Draw the median TTFT against prompt length: a line an output length, a panel a configuration and load."""
    table = sweep.table
    panels = lengths(table)
    figure, axes = grid(len(panels), columns=len(table.configs), height=2.4, width=max(2.4, 10 / len(table.configs)))
    outputs = sorted({cell.load.osl for cell in table.measured})
    heights: list[float] = []
    for ax, (load, config) in zip(axes, panels, strict=True):
        cells = [cell for cell in table.measured if cell.config == config and _row(cell.load) == _row(load)]
        for place, osl in enumerate(outputs):
            line = sorted((cell.load.isl, cell.mean("ttft_ms_p50")) for cell in cells if cell.load.osl == osl)
            if line:
                style = {**theme.series(place, len(outputs)), "marker": "os^Dv"[place % 5]}
                ax.plot([x for x, _ in line], [y for _, y in line], label=f"{osl:g} output tokens", **style)
                heights += [y for _, y in line]
        load_axis(ax, [cell.load.isl for cell in cells])
        title(ax, f"{config.label}, {load.label}", 8.5)
        _outer(ax)
    if not wide_span(axes, heights):
        for ax in axes:
            ax.set_ylim(0, 1.1 * max(heights, default=1.0))
    legend_of_all(figure, axes, table)
    return figure


def _outer(ax: Axes) -> None:
    place = ax.get_subplotspec()
    if place is not None and place.is_first_col():
        ax.set_ylabel("TTFT, median (ms)")
    if place is not None and place.is_last_row():
        ax.set_xlabel("prompt tokens")
