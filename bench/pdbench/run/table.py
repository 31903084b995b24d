"""The table that ends a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

_LATENCIES = (("TTFT", "ttft_ms"), ("ITL", "itl_ms"), ("TPOT", "tpot_ms"), ("E2E", "e2e_ms"))


def render(points: Sequence[Mapping[str, object]]) -> str:
    """Return figures per load point: requests and throughputs, then latencies in ms (p50 / p95 / p99)."""
    head = ["load", "requests", "failed", "req/s", "in tok/s", "out tok/s", "out tok/s/GPU", *(f"{n} ms" for n, _ in _LATENCIES)]
    rows = [head, ["", "", "", "", "", "", "", *("p50 / p95 / p99" for _ in _LATENCIES)]]
    for p in points:
        rows.append(
            [
                load_name(p),
                str(p["completed"]),
                str(p["failed"]),
                _number(p["request_throughput"]),
                _number(p["input_throughput"]),
                _number(p["output_throughput"]),
                _number(p["output_throughput_per_gpu"]),
                *(
                    " / ".join(_number(cast(Mapping[str, object], p[key])[q]) for q in ("p50", "p95", "p99"))
                    for _, key in _LATENCIES
                ),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def load_name(point: Mapping[str, object]) -> str:
    """Return what a load point is called: ``c=32``, ``4 req/s`` or ``trace x0.5``."""
    if point["concurrency"] is not None:
        return f"c={point['concurrency']}"
    if point["request_rate"] is not None:
        return f"{cast(float, point['request_rate']):g} req/s"
    return f"trace x{cast(float, point['time_scale']):g}"


def _number(value: object) -> str:
    if value is None:
        return "-"
    number = cast(float, value)
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}"
