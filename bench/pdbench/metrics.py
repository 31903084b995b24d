"""Latency and throughput of one load point, from its records alone.

Definitions follow SGLang's ``sglang/benchmark/serving.py`` (0.5.23, ``calculate_metrics`` and ``async_request_*``) and
``sglang/benchmark/goodput.py``; where this module differs, its docstring says so. docs/metrics.md is the same in prose.

Percentiles interpolate linearly between order statistics (NumPy's default, as in SGLang): with n sorted samples
x[0..n-1], p is x[k] + (h-k)(x[k+1]-x[k]) with h = (n-1)p/100 and k = floor(h).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pdbench.records import NOT_REPORTED, Record

#: a distribution as it stands in summary.json: mean, min, max, p50, p90, p95, p99; None when there is no sample
Stats = dict[str, float | None]
_PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Slo:
    """Latency limits in milliseconds that a good request meets, all of them; None is no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    def __bool__(self) -> bool:
        """Tell whether any limit is set."""
        return any(limit is not None for limit in (self.ttft_ms, self.tpot_ms, self.e2e_ms))


def stats(samples: Iterable[float]) -> Stats:
    """Return mean, min, max and percentiles of the samples, in their unit; every value is None when there are none."""
    values = np.fromiter(samples, dtype=np.float64)
    names = ("mean", "min", "max", *(f"p{p}" for p in _PERCENTILES))
    if not values.size:
        return dict.fromkeys(names)
    numbers = (values.mean(), values.min(), values.max(), *np.percentile(values, _PERCENTILES))
    return {name: float(number) for name, number in zip(names, numbers, strict=True)}


def output_tokens(record: Record) -> int:
    """Return the output tokens of a request: as the server counts them, else one for each event that carried output.

    SGLang falls back on the number *asked for*, which hides a server that stops early; this does not.
    """
    return record.output_tokens if record.output_tokens != NOT_REPORTED else len(record.chunk_s)


def input_tokens(record: Record) -> int:
    """Return the prompt tokens of a request: as the server counts them, else as asked."""
    return record.prompt_tokens if record.prompt_tokens != NOT_REPORTED else record.prompt_tokens_asked


def ttft_s(record: Record) -> float:
    """Time to first token: ``first_s - sent_s``, seconds (serving.py: ``output.ttft``)."""
    return record.first_s - record.sent_s


def e2e_s(record: Record) -> float:
    """End-to-end latency: ``end_s - sent_s``, seconds, up to the last output token.

    serving.py takes the last line of the stream for some APIs (the usage chunk, ``[DONE]``) and the last token for
    others; here it is always the last token.
    """
    return record.end_s - record.sent_s


def tpot_s(record: Record) -> float | None:
    """Time per output token after the first: ``(E2E - TTFT) / (n - 1)``, seconds; None for n < 2."""
    n = output_tokens(record)
    return (e2e_s(record) - ttft_s(record)) / (n - 1) if n > 1 else None


def itl_s(record: Record) -> list[float]:
    """Inter-token latency: the gaps between events that carry output, seconds; one fewer than there are events."""
    return [float(gap) for gap in np.diff(record.chunk_s)]


def goodput(records: Sequence[Record], slo: Slo, duration_s: float) -> dict[str, object] | None:
    """Return the requests that met every limit; None without a limit.

    ``good`` of ``sent`` (failed ones are sent and never good), ``attainment = good / sent``, ``request_throughput =
    good / duration`` in requests/s. TPOT of a one-token answer counts as 0 (goodput.py, ``calculate_goodput``).
    """
    if not slo:
        return None

    def within(seconds: float | None, limit_ms: float | None) -> bool:
        return limit_ms is None or (seconds or 0.0) * 1000 <= limit_ms

    good = sum(
        r.ok and within(ttft_s(r), slo.ttft_ms) and within(tpot_s(r), slo.tpot_ms) and within(e2e_s(r), slo.e2e_ms)
        for r in records
    )
    limits = {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms, "e2e_ms": slo.e2e_ms}
    return {
        "slo": {name: limit for name, limit in limits.items() if limit is not None},
        "good": good,
        "sent": len(records),
        "attainment": good / len(records) if records else 0.0,
        "request_throughput": good / duration_s if duration_s > 0 else 0.0,
    }


def duration_s(records: Sequence[Record]) -> float:
    """Return the point's duration: from the first request sent to the last output token, seconds; 0 without output."""
    sent = [r.sent_s for r in records if r.sent_s == r.sent_s]
    ends = [r.end_s for r in records if r.end_s == r.end_s]
    return max(ends) - min(sent) if sent and ends else 0.0


def summarise(records: Sequence[Record], gpus: int | None = None, slo: Slo | None = None) -> dict[str, object]:
    """Return the figures of one load point from its measured records (no warm-up among them).

    Failed requests are counted in ``failed`` and enter no latency and no throughput. Throughputs are per second of
    ``duration_s``; ``*_per_gpu`` divides by *all* ``gpus`` that the deployment holds, prefill and decode together, and
    is None when that number is unknown. ``mean_in_flight`` is sum(E2E) / duration (serving.py: ``concurrency``).
    """
    good = [r for r in records if r.ok]
    span = duration_s(records)
    n_in, n_out = sum(map(input_tokens, good)), sum(map(output_tokens, good))

    def rate(amount: float) -> float:
        return amount / span if span > 0 else 0.0

    def per_gpu(amount: float) -> float | None:
        return rate(amount) / gpus if gpus else None

    def ms(seconds: Iterable[float]) -> Stats:
        return stats(1000 * s for s in seconds)

    latencies = [e2e_s(r) for r in good]
    return {
        "completed": len(good),
        "failed": len(records) - len(good),
        "duration_s": span,
        "input_tokens": n_in,
        "output_tokens": n_out,
        "request_throughput": rate(len(good)),
        "input_throughput": rate(n_in),
        "output_throughput": rate(n_out),
        "total_throughput": rate(n_in + n_out),
        "output_throughput_per_gpu": per_gpu(n_out),
        "total_throughput_per_gpu": per_gpu(n_in + n_out),
        "mean_in_flight": rate(sum(latencies)),
        "ttft_ms": ms(ttft_s(r) for r in good),
        "itl_ms": ms(gap for r in good for gap in itl_s(r)),
        "tpot_ms": ms(t for t in map(tpot_s, good) if t is not None),
        "e2e_ms": ms(latencies),
        "request_output_throughput": stats(output_tokens(r) / e2e_s(r) for r in good if e2e_s(r) > 0),
        "goodput": goodput(records, slo or Slo(), span),
    }
