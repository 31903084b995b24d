"""The figures of a run as rows of text for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdbench.gate.rundata import Point

_LATENCIES = (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms"), ("E2E", "e2e_ms"))
_THROUGHPUTS = (
    ("requests/s", "request_throughput"),
    ("output tokens/s", "output_throughput"),
    ("output tokens/s per GPU", "output_throughput_per_gpu"),
    ("input + output tokens/s per GPU", "total_throughput_per_gpu"),
)


@dataclass(frozen=True)
class Table:
    """``head``: (column name, how many columns of ``rows`` it spans); ``under``: names below it, or empty."""

    caption: str
    head: list[tuple[str, int]]
    under: list[str]
    rows: list[list[str]]


def number(value: object) -> str:
    """Return three or more significant digits, and a dash for what was not measured."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def results(points: Sequence[Point]) -> list[Table]:
    """Return throughput and latency of every load point, and goodput where limits were set."""
    tables = [_throughput(points), _latency(points)]
    if any(isinstance(point.summary.get("goodput"), dict) for point in points):
        tables.append(_goodput(points))
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


def _latency(points: Sequence[Point]) -> Table:
    quantiles = ("p50", "p95", "p99")
    rows = [
        [point.label, *(number(_in(point.summary.get(key), q)) for _, key in _LATENCIES for q in quantiles)] for point in points
    ]
    return Table("Latency (ms)", [("load", 1), *((name, 3) for name, _ in _LATENCIES)], ["", *quantiles * 4], rows)


def _goodput(points: Sequence[Point]) -> Table:
    first: dict[str, Any] = next(p.summary["goodput"] for p in points if isinstance(p.summary.get("goodput"), dict))
    limits = ", ".join(f"{name.removesuffix('_ms').upper()} ≤ {limit:g} ms" for name, limit in first["slo"].items())
    rows = []
    for point in points:
        good = point.summary.get("goodput")
        share = _in(good, "attainment")
        shown = f"{100 * share:.1f}" if isinstance(share, (int, float)) else number(None)
        rows.append(
            [point.label, _count(_in(good, "good")), _count(_in(good, "sent")), shown, number(_in(good, "request_throughput"))]
        )
    head = [("load", 1), ("good", 1), ("sent", 1), ("share (%)", 1), ("good requests/s", 1)]
    return Table(f"Goodput: requests within {limits}", head, [], rows)


def _in(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, dict) else None


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else number(value)
