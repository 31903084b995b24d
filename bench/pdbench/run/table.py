"""The table that ends a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from pdbench.attribution import in_words
from pdbench.engines import cautions

_LATENCIES = (("TTFT", "ttft_ms"), ("ITL", "itl_ms"), ("TPOT", "tpot_ms"), ("E2E", "e2e_ms"))


def ending(summary: Mapping[str, object]) -> str:
    """Return what a run ends with, from its summary: the table, and whether GPUs made these figures."""
    points, not_run = (cast(Sequence[Mapping[str, object]], summary[key]) for key in ("points", "not_run"))
    said = cautions(str(summary["no_gpu"]), str(summary["truncated"]))
    return "\n\n".join([render(points, not_run), *(["\n".join(said)] if said else [])])


def render(points: Sequence[Mapping[str, object]], not_run: Sequence[Mapping[str, object]] = ()) -> str:
    """Return throughputs and latencies of all requests, the steady window beside them, and notes."""
    parts = [_whole(points), _steady(points)]
    notes = [f"{load_name(p)}: {in_words(found)}" for p in points if isinstance(found := p.get("attribution"), Mapping)]
    notes += [f"note, {load_name(p)}: {note}" for p in points for note in cast(Sequence[str], p["notes"])]
    if not_run:
        notes.append(f"not run: {', '.join(map(load_name, not_run))}: {not_run[0]['why']}")
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def _whole(points: Sequence[Mapping[str, object]]) -> str:
    """Requests and throughputs, then latencies in ms (p50 / p95 / p99)."""
    head = ["load", "requests", "failed", "req/s", "in tok/s", "out tok/s", "out tok/s/GPU", *(f"{n} ms" for n, _ in _LATENCIES)]
    rows = [head, ["", "", "", "", "", "", "", *("p50 / p95 / p99" for _ in _LATENCIES)]]
    for p in points:
        rows.append(
            [
                load_name(p),
                str(p["completed"]),
                str(p["failed"]),
                *(number(p[f"{name}_throughput"]) for name in ("request", "input", "output")),
                number(p["output_throughput_per_gpu"]),
                *(" / ".join(number(_in(p, key, q)) for q in ("p50", "p95", "p99")) for _, key in _LATENCIES),
            ]
        )
    return _aligned(rows)


def _steady(points: Sequence[Mapping[str, object]]) -> str:
    """The steady window with 95 % intervals; attainment is of all requests."""
    slo = any(p["goodput"] for p in points)
    head = [
        "steady",
        "s",
        "requests",
        "req/s",
        "out tok/s/GPU",
        "tok/s/user",
        "TTFT ms p50",
        "p99",
        "ITL/token ms",
        "TPOT ms p50",
    ]
    rows = [head + (["in SLO"] if slo else [])]
    under = []
    for p in points:
        found = cast(Mapping[str, object], p["steady"])
        share = [_share(p["goodput"])] if slo else []
        if not found["found"]:
            if slo:
                rows.append([load_name(p), *["-"] * (len(head) - 1), *share])
            under.append(f"no steady window, {load_name(p)}: {found['reason']}")
            continue
        span = f"{cast(float, found['start_s']):.1f}-{cast(float, found['end_s']):.1f}"
        rows.append(
            [
                load_name(p),
                span,
                str(found["completed"]),
                *(number(found[key]) for key in ("request_throughput", "output_throughput_per_gpu")),
                number(_in(found, "output_throughput_per_user", "p50")),
                *(_bounded(found, "ttft_ms", q) for q in ("p50", "p99")),
                _bounded(found, "itl_token_ms", "mean"),
                _bounded(found, "tpot_ms", "p50"),
                *share,
            ]
        )
    return "\n".join([*([_aligned(rows)] if len(rows) > 1 else []), *under])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _in(mapping: object, *keys: str) -> object:
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, Mapping) else None
    return mapping


def _bounded(figures: Mapping[str, object], metric: str, statistic: str) -> str:
    """Return a figure with its interval: ``12.3 [11.9, 13.0]``; an end that is not known is a dash."""
    ends = _in(figures, "intervals", metric, statistic)
    shown = number(_in(figures, metric, statistic))
    return f"{shown} [{', '.join(map(number, cast(Sequence[object], ends)))}]" if ends else shown


def _share(goodput: object) -> str:
    if not isinstance(goodput, Mapping):
        return "-"
    low, high = cast(tuple[float, float], goodput["attainment_interval"])
    return f"{cast(float, goodput['attainment']):.1%} [{low:.0%}, {high:.0%}]"


def load_name(point: Mapping[str, object]) -> str:
    """Return what a load point is called: ``c=32``, ``4 req/s`` or ``trace x0.5``."""
    if point["concurrency"] is not None:
        return f"c={point['concurrency']}"
    if point["request_rate"] is not None:
        to = cast("float | None", point.get("request_rate_to"))
        return f"{cast(float, point['request_rate']):g}{'' if to is None else f'-{to:g}'} req/s"
    return f"trace x{cast(float, point['time_scale']):g}"


def number(value: object) -> str:
    """Return three significant digits or whole units, and a dash for what is not known."""
    if value is None:
        return "-"
    number = cast(float, value)
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}"
