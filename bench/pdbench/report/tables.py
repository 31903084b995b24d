"""The figures of a run as rows of text for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdbench.gate.rundata import Point
from pdbench.report import split

_LATENCIES = (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms"), ("E2E", "e2e_ms"))
#: the same waits, looked at otherwise
_OTHERWISE = (
    ("ITL, by token", "itl_token_ms"),
    ("E2E per token", "normalised_latency_ms"),
    ("TTFT from schedule", "ttft_scheduled_ms"),
    ("E2E from schedule", "e2e_scheduled_ms"),
)
_THROUGHPUTS = (
    ("requests/s", "request_throughput"),
    ("output tokens/s", "output_throughput"),
    ("output tokens/s per GPU", "output_throughput_per_gpu"),
    ("input + output tokens/s per GPU", "total_throughput_per_gpu"),
)


@dataclass(frozen=True)
class Table:
    """``head``: (column name, how many columns of ``rows`` it spans); ``under``: names below it, or empty.

    ``prose``: the last column is words.
    """

    caption: str
    head: list[tuple[str, int]]
    under: list[str]
    rows: list[list[str]]
    prose: bool = False


def number(value: object) -> str:
    """Return three or more significant digits, and a dash for what was not measured."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def results(points: Sequence[Point]) -> list[Table]:
    """Return throughput and latency of every load point, the steady window, and goodput where limits were set."""
    tables = [_throughput(points), _latency("Latency (ms)", _LATENCIES, points)]
    if any(point.summary.get("itl_token_ms") for point in points):
        tables.append(_latency("Latency seen otherwise (ms)", _OTHERWISE, points))
    if any(_in(point.summary.get("steady"), "found") for point in points):
        tables.append(_steady(points))
    if any(isinstance(point.summary.get("goodput"), dict) for point in points):
        tables.append(_goodput(points))
    tables += [_turns(point) for point in points if point.summary.get("turns")]
    if split.known(points):
        head, rows = split.rows(points)
        shown = [[str(row[0]), *("not reported" if value is None else number(value) for value in row[1:])] for row in rows]
        tables.append(Table("Mean TTFT by stage (ms)", [(name, 1) for name in head], [], shown))
    return tables


def _throughput(points: Sequence[Point]) -> Table:
    head = [("load", 1), ("completed", 1), ("failed", 1), ("duration (s)", 1), ("mean in flight", 1)]
    rows = [
        [
            point.label,
            *(_count(point.summary.get(key)) for key in ("completed", "failed")),
            *(number(point.summary.get(key)) for key in ("duration_s", "mean_in_flight", *(key for _, key in _THROUGHPUTS))),
        ]
        for point in points
    ]
    return Table("Throughput", [*head, *((name, 1) for name, _ in _THROUGHPUTS)], [], rows)


def _latency(caption: str, metrics: Sequence[tuple[str, str]], points: Sequence[Point]) -> Table:
    quantiles = ("p50", "p95", "p99")
    rows = [[point.label, *(number(_in(point.summary.get(key), q)) for _, key in metrics for q in quantiles)] for point in points]
    return Table(caption, [("load", 1), *((name, 3) for name, _ in metrics)], ["", *quantiles * len(metrics)], rows)


def _turns(point: Point) -> Table:
    """One row a turn: the context grows, and a prefix cache that works keeps TTFT from growing with it."""
    head = ["turn", "completed", "failed", "prompt tokens", "cached tokens", "KV tokens at its end"]
    head.append("tokens/s per user, incl. TTFT")
    shown = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("tpot_ms", "p50"), ("cumulative_latency_ms", "p50"))
    names = ("TTFT p50", "TTFT p99", "TPOT p50", "latency so far p50")
    rows = [
        [
            *(_count(turn[key]) for key in ("turn", "completed", "failed")),
            *(number(turn[key]) for key in ("prompt_tokens", "cached_tokens")),
            number(turn.get("kv_tokens")),  # not in runs of before
            # Runs of before called it by the name of another figure, 1 / TPOT.
            number(turn.get("request_output_throughput", turn.get("output_throughput_per_user"))),
            *(number(_in(turn[key], q)) for key, q in shown),
        ]
        for turn in point.summary["turns"]
    ]
    return Table(f"By turn of the conversations ({point.label}; ms)", [(name, 1) for name in (*head, *names)], [], rows)


def _steady(points: Sequence[Point]) -> Table:
    """The steady window; where there is none, words.notes says why."""
    head = ["load", "window (s)", "requests", "requests/s", "output tokens/s per GPU", "tokens/s per user, p50"]
    shown = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("itl_token_ms", "mean"))
    names = ("TTFT p50", "TTFT p99", "ITL by token, mean")
    rows = []
    for point in points:
        found = point.summary.get("steady")
        if not _in(found, "found"):
            continue
        rows.append(
            [
                point.label,
                "–".join(number(_in(found, key)) for key in ("start_s", "end_s")),
                _count(_in(found, "completed")),
                *(number(_in(found, key)) for key in ("request_throughput", "output_throughput_per_gpu")),
                number(_in(_in(found, "output_throughput_per_user"), "p50")),
                *(_bounded(found, metric, statistic) for metric, statistic in shown),
            ]
        )
    return Table("Steady window, latencies in ms (95 % interval)", [(name, 1) for name in (*head, *names)], [], rows)


def _bounded(figures: object, metric: str, statistic: str) -> str:
    """Return a figure and its interval: ``82.7 (82.3–83.3)``; an end that is not known is three dots."""
    ends = _in(_in(_in(figures, "intervals"), metric), statistic)
    shown = number(_in(_in(figures, metric), statistic))
    return f"{shown} ({'–'.join('…' if end is None else number(end) for end in ends)})" if isinstance(ends, list) else shown


def _goodput(points: Sequence[Point]) -> Table:
    first: dict[str, Any] = next(p.summary["goodput"] for p in points if isinstance(p.summary.get("goodput"), dict))
    limits = ", ".join(f"{name.removesuffix('_ms').upper()} ≤ {limit:g} ms" for name, limit in first["slo"].items())
    rows = []
    for point in points:
        good = point.summary.get("goodput")
        share = _in(good, "attainment")
        shown = f"{100 * share:.1f}" if isinstance(share, (int, float)) else number(None)
        ends = _in(good, "attainment_interval")
        if isinstance(ends, list):
            shown += f" ({'–'.join(f'{100 * end:.1f}' for end in ends)})"
        rows.append(
            [point.label, _count(_in(good, "good")), _count(_in(good, "sent")), shown, number(_in(good, "request_throughput"))]
        )
    head = [("load", 1), ("good", 1), ("sent", 1), ("share (%, 95 % interval)", 1), ("good requests/s", 1)]
    return Table(f"Goodput: requests within {limits}", head, [], rows)


def _in(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, dict) else None


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else number(value)
