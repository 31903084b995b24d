"""From the rows of a measurement to figures: medians over repeats, and docs/results/client.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
START = "start"
#: case -> how the page calls it
CASES = {
    "c32": "32 in flight",
    "c512": "512 in flight",
    "c512-core-taken": "512 in flight, one core taken by a program that only spins",
    "k4": "32 in flight, 4 tokens an event",
    "j4": "32 in flight, 4 events a write",
}


@dataclass(frozen=True)
class Spread:
    """Median, least and most of the repeats."""

    median: float
    least: float
    most: float

    def text(self, digits: int) -> str:
        """Return ``median [least .. most]``; one figure where they are the same."""
        if self.least == self.most:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} [{self.least:.{digits}f} .. {self.most:.{digits}f}]"


def spread(values: Sequence[float]) -> Spread | None:
    """Return the spread of some values, None of none."""
    return Spread(statistics.median(values), min(values), max(values)) if values else None


def good(rows: Sequence[Row], tool: str, case: str) -> list[Row]:
    """Return the repeats that left figures."""
    return [row for row in rows if row["tool"] == tool and row["name"] == case and not row.get("problem")]


def start_cpu(rows: Sequence[Row], tool: str) -> Spread | None:
    """Return what a run of two requests costs, CPU seconds: that is starting and ending."""
    return spread([row["cpu_s"] for row in good(rows, tool, START)])


def figures(rows: Sequence[Row], tool: str, case: str) -> dict[str, Spread | None]:
    """Return what the page shows of a tool in a case; errors are what it reports minus what the server did, ms."""
    start = start_cpu(rows, tool)
    base = start.median if start else 0.0
    wanted: dict[str, Callable[[Row], float | None]] = {
        "cpu_ms": lambda row: 1000 * (row["cpu_s"] - base) / row["served"],
        "delivered": lambda row: row["delivered"],
        "ttft_wrong_by": lambda row: row["ttft_ms"] - row["true_ttft_ms"],
        "ttft_p99_wrong_by": lambda row: row["ttft_p99_ms"] - row["true_ttft_p99_ms"],
        "itl": lambda row: row["itl_ms"],
        "itl_wrong_by": lambda row: row["itl_ms"] - row["true_itl_ms"],
        "true_itl": lambda row: row["true_itl_ms"],
        "other_cores": lambda row: row["other_cores"],
        "connections": lambda row: row["connections"],
    }
    found = good(rows, tool, case)
    return {name: spread([v for row in found if (v := value(row)) is not None]) for name, value in wanted.items()}


_HEAD = """\
Measured on {date}: {cpus} cores, {python}, repeats: {repeats}, tools in turns. Other programs held {busy} cores meanwhile (median
[least .. most], as everywhere here); the latest write of the truth server was {late} ms late.

The truth server ([truthd.c](../../bench/yardstick/truthd.c), a process of its own) sends the first token {ttft_ms} ms after it
read a request, the next every {itl_ms} ms, {osl} in all, and notes when it really did. An *error* is what a tool reports minus
that. *delivered / ideal* is the share of the slots that were in use, from the server's log. *CPU* counts all processes of a tool
({meters}), less what a run of two requests costs. A CPU figure that falls while less is delivered is no merit: events then
share reads.
floor-raw and floor-parse are bare aiohttp on uvloop, no tool.
"""
_COLUMNS = (
    ("CPU ms a request", "cpu_ms", 2),
    ("delivered / ideal", "delivered", 3),
    ("mean TTFT error ms", "ttft_wrong_by", 1),
    ("p99 TTFT error ms", "ttft_p99_wrong_by", 1),
    ("ITL reported ms", "itl", 2),
    ("true ITL ms", "true_itl", 2),
    ("connections", "connections", 0),
)
#: (what, case, figure, the most or least that was aimed at, whether it is a most)
GOALS = (
    ("CPU a request, 512 in flight (ms)", "c512", "cpu_ms", 1.7, True),
    ("delivered / ideal, 512 in flight", "c512", "delivered", 0.99, False),
    ("delivered / ideal, 512 in flight, one core taken", "c512-core-taken", "delivered", 0.95, False),
    ("mean TTFT error, 32 in flight (ms)", "c32", "ttft_wrong_by", 0.5, True),
    ("mean TTFT error, 512 in flight (ms)", "c512", "ttft_wrong_by", 8.0, True),
    ("error of the ITL with 4 tokens an event (ms)", "k4", "itl_wrong_by", 0.1, True),
    ("CPU to start (s)", START, "cpu_s", 0.4, True),
)


def goals(rows: Sequence[Row], tools: Sequence[str]) -> list[str]:
    """Return the table of what was aimed at, ours and the peers' beside each other."""
    lines = [_line("", "goal", *tools, "reached"), _line(*["---"] * (len(tools) + 3))]
    for what, case, name, bound, most in GOALS:
        cells, first = [], None
        for tool in tools:
            found = start_cpu(rows, tool) if case == START else figures(rows, tool, case)[name]
            first = first or found if tool == tools[0] else first
            cells.append("-" if found is None else found.text(2))
        met = "-" if first is None else "yes" if (abs(first.median) <= bound if most else first.median >= bound) else "**no**"
        lines.append(_line(what, f"{'≤' if most else '≥'} {bound:g}", *cells, met))
    return lines


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page(meta: dict[str, Any], rows: Sequence[Row], tools: Sequence[str]) -> str:
    """Return docs/results/client.md."""
    busy = spread([row["other_cores"] for row in rows if "other_cores" in row])
    late = spread([row["server_late_ms"] for row in rows if "server_late_ms" in row and not row["core_taken"]])
    lines = [
        "# How far load generators can be believed",
        "",
        "    make bench-client          # gcc is needed; .pd/yardstick gets two virtualenvs",
        "",
        _HEAD.format(**meta, busy=_said(busy), late=_said(late), meters=", ".join(sorted({row["meter"] for row in rows}))),
        "![CPU, load delivered and TTFT error](client.png)",
        "",
        "## What was aimed at",
        "",
        *goals(rows, [tool for tool in tools if not tool.startswith("floor")]),
    ]
    for case, title in CASES.items():
        if not any(row["name"] == case for row in rows):
            continue
        lines += [
            "",
            f"## {title[0].upper()}{title[1:]}",
            "",
            _line("", *(name for name, _, _ in _COLUMNS)),
            _line(*["---"] * (len(_COLUMNS) + 1)),
        ]
        for tool in tools:
            all_figures = figures(rows, tool, case)
            cells = ["-" if (value := all_figures[name]) is None else value.text(digits) for _, name, digits in _COLUMNS]
            lines.append(_line(tool, *cells))
        said = {tool: row["says"] for tool in tools for row in good(rows, tool, case) if row.get("says")}
        lines += [f"\n{tool} says: {text}." for tool, text in said.items()]
    lines += ["", "## Start and end", "", _line("", "CPU s of a run of two requests"), _line("---", "---")]
    lines += [_line(tool, found.text(2) if (found := start_cpu(rows, tool)) else "-") for tool in tools]
    lines += _problems(rows, meta)
    return "\n".join(lines) + "\n"


def _said(found: Spread | None) -> str:
    return found.text(1) if found else "?"


def _problems(rows: Sequence[Row], meta: dict[str, Any]) -> list[str]:
    found = [f"{row['tool']}, {CASES.get(row['name'], row['name'])}: {row['problem']}" for row in rows if row.get("problem")]
    found = [*(f"{tool} was not measured: {why}" for tool, why in meta["absent"].items()), *dict.fromkeys(found)]
    return ["", "## What went wrong", "", *(f"- {line}" for line in found)] if found else []
