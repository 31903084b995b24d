"""The figures of a sweep: which there are, what they show in words, and when there is nothing to show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from pdbench.report.draw import drawn
from pdbench.report.look import Theme
from pdbench.sweep.report import heat, inside, lines
from pdbench.sweep.report.data import GOODPUT
from pdbench.sweep.report.read import Sweep


@dataclass(frozen=True)
class Plot:
    """A figure: ``lacks`` returns why there is nothing to show, "" where there is; ``how`` tells a reader how to read it."""

    title: str
    how: str
    draw: Callable[[Sweep, Theme], Figure]
    lacks: Callable[[Sweep], str]


def _no_cells(sweep: Sweep) -> str:
    return "" if sweep.table.measured else "no cell has a valid repeat"


def _no_loads(sweep: Sweep) -> str:
    sizes = {shape: {c.load.size for c in sweep.table.measured if c.load.shape == shape} for shape in sweep.table.shapes}
    return "" if any(len(found) > 1 for found in sizes.values()) else _no_cells(sweep) or "every shape has one load only"


def _no_limits(sweep: Sweep) -> str:
    return "not every run had limits for its requests" if sweep.table.goal != GOODPUT else _no_loads(sweep)


def _no_choice(sweep: Sweep) -> str:
    return "" if any(d.state != "alone" for d in sweep.decisions) else "no load has two configurations to choose from"


def _no_lengths(sweep: Sweep) -> str:
    return "" if lines.lengths(sweep.table) else "no two prompt lengths were measured at one load and output length"


def _no_stages(sweep: Sweep) -> str:
    return "" if inside.stages(sweep) else "no run has the servers' own times of its requests"


def _no_rates(sweep: Sweep) -> str:
    return "" if inside.rates(sweep) else "no run has enough records of requests"


def _no_moves(sweep: Sweep) -> str:
    return "" if inside.moved(sweep) else "no engine's counters of KV transfers were read three times or more within a run"


#: file name without its ending -> the figure, in the order of the page
FIGURES: dict[str, Plot] = {
    "best": Plot(
        "Best configuration, by load",
        "A square a load. A colour and a name: best, with its lead over the next. Hatched: no best one was shown, and which "
        "configurations remain. Empty: not measured.",
        heat.best_map,
        _no_choice,
    ),
    "goodput": Plot(
        "Goodput per GPU against load",
        "Requests/s that kept all limits. A line a configuration; bars are 95 % intervals over repeats, where there are repeats.",
        lines.goodput,
        _no_limits,
    ),
    "pareto_user": Plot(
        "Throughput per GPU against speed for each user",
        "Up and to the right is better. The broad line is the Pareto frontier: no measured point beats those on it in both. "
        "Numbers are loads.",
        lines.pareto_user,
        _no_cells,
    ),
    "pareto_ttft": Plot(
        "Throughput per GPU against time to first token",
        "Up and to the left is better. The broad line is the Pareto frontier. Numbers are loads.",
        lines.pareto_ttft,
        _no_cells,
    ),
    "throughput": Plot(
        "Throughput per GPU against load",
        "A line a configuration; bars are 95 % intervals over repeats, where there are repeats.",
        lines.throughput,
        _no_loads,
    ),
    "ttft": Plot("Time to first token against load", "A line a configuration, median over requests.", lines.ttft, _no_loads),
    "itl": Plot("Inter-token latency against load", "A line a configuration, mean over gaps.", lines.itl, _no_loads),
    "ttft_by_length": Plot(
        "Time to first token against prompt length",
        "A line an output length, a panel a configuration and load.",
        lines.ttft_by_length,
        _no_lengths,
    ),
    "ttft_split": Plot(
        "Where the time to first token goes",
        "Mean TTFT by stage, by what the servers say of the same requests, under the heaviest load of each shape. Hatched: "
        "waiting; plain: work.",
        inside.ttft_split,
        _no_stages,
    ),
    "rate_match": Plot(
        "Prefill rate against decode rate over time",
        "Both in requests' worth per second: prompt tokens/s over the prompt length (counted at the first token), output "
        "tokens/s over the output length, as the client saw them. Lines that lie on each other: the ratio matches the load. "
        "Prefill above decode for long: answers pile up in decode.",
        inside.rate_match,
        _no_rates,
    ),
    "kv_moved": Plot(
        "KV cache moved over time",
        "What the prefill (vLLM: decode) workers count of their transfers, added up, in one run of each configuration.",
        inside.kv_moved,
        _no_moves,
    ),
}


def shown(sweep: Sweep) -> list[str]:
    """Return the figures that the sweep has something for."""
    return [name for name, plot in FIGURES.items() if not plot.lacks(sweep)]


def left_out(sweep: Sweep) -> list[str]:
    """Say of each figure that is not there why."""
    return [f"“{plot.title}” is left out: {why}." for plot in FIGURES.values() if (why := plot.lacks(sweep))]


def draw(name: str, sweep: Sweep, theme: Theme, *kinds: str) -> list[bytes]:
    """Return a figure in each of ``kinds`` (``png``, ``svg``)."""
    return drawn(lambda: FIGURES[name].draw(sweep, theme), theme, "", "\n".join(sweep.cautions), *kinds)


def alt(name: str, sweep: Sweep) -> str:
    """Return what a reader who does not see the figure is told."""
    plot = FIGURES[name]
    text = f"{plot.title}. {plot.how}"
    names = ", ".join(config.label for config in sweep.table.configs)
    caution = f" {'; '.join(sweep.cautions)}." if sweep.cautions else ""
    return f"{text} Configurations: {names}. The figures stand in the tables and in results.csv.{caution}"
