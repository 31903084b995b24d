"""Latency and throughput of one load point, from its records alone.

Definitions follow SGLang's ``sglang/benchmark/serving.py`` (0.5.23, ``calculate_metrics`` and ``async_request_*``) and
``sglang/benchmark/goodput.py``; where this module differs, its docstring says so. docs/metrics.md is the same in prose.

Percentiles interpolate linearly between order statistics (NumPy's default, as in SGLang): with n sorted samples
x[0..n-1], p is x[k] + (h-k)(x[k+1]-x[k]) with h = (n-1)p/100 and k = floor(h).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pdbench import intervals
from pdbench.intervals import Floats, Ints
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
    values = np.fromiter(samples, dtype=np.float64) if not isinstance(samples, np.ndarray) else samples
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


def token_itl_s(record: Record) -> list[float]:
    """Inter-token latency by *token*: an event of k tokens counts k times, each a k-th of the gap before it, seconds.

    As serving.py does for ``/generate``. k is what the server says; where it gives a total only, events are taken to hold
    as many each as a stream interval would give them (`_interval`), else an even share. Tokens of the first event have no
    gap before them.
    """
    counts, times = record.chunk_tokens, np.array(record.chunk_s)
    if len(counts) != len(times):
        counts = _interval(output_tokens(record), len(times))
    if len(counts) == len(times):
        held = np.array(counts, dtype=np.int64)
        # An event without a new token ends no gap: it goes on to the next that has one.
        times, held = times[held > 0], held[held > 0]
        each = np.diff(times) / held[1:]
        return [float(gap) for gap in np.repeat(each, held[1:])]
    # Fewer tokens than events that had some: the total is wrong, and every event is one token.
    share = max(1.0, (output_tokens(record) - 1) / (len(times) - 1)) if len(times) > 1 else 1.0
    return [float(gap) for gap in np.repeat(np.diff(times) / share, round(share))]


def _interval(tokens: int, events: int) -> list[int]:
    """Return the tokens of every event of a stream that sends every k-th token, as its two totals tell; [] when none does.

    Either every event holds k but the last, or the first holds one: SGLang sends prefill's token at once
    (scheduler_output_processor_mixin.py, ``stream_interval``).
    """
    for first in (0, 1):
        if events > first and (k := -(-(tokens - first) // (events - first))) > 0:
            whole = events - first - 1
            last = tokens - first - k * whole
            if 0 < last <= k:
                return [1] * first + [k] * whole + [last]
    return []


def normalised_s(record: Record) -> float | None:
    """Normalised latency: E2E / n, seconds per output token, the first one and its wait included; None without tokens.

    As Orca (OSDI 2022, section 6) and vLLM's paper (SOSP 2023, section 6.1) define it.
    """
    n = output_tokens(record)
    return e2e_s(record) / n if n > 0 else None


def user_rate(record: Record) -> float | None:
    """Tokens per second per user: 1 / TPOT, what one reader sees once the first token is there; None for n < 2.

    It is the x-axis of InferenceX's Pareto plots (``intvty``), and not of a sweep's report, which has the wait in it, too.
    """
    tpot = tpot_s(record)
    return 1 / tpot if tpot else None


def request_rate(record: Record) -> float | None:
    """Tokens per second per user with the wait for the first token in it: n / E2E; None for a request that took no time.

    It is the x-axis of the Pareto plot in a sweep's report: a configuration whose prompts queue gains nothing there.
    """
    return output_tokens(record) / e2e_s(record) if e2e_s(record) > 0 else None


def goodput(records: Sequence[Record], slo: Slo, duration_s: float, gpus: int | None = None) -> dict[str, object] | None:
    """Return the requests that met every limit; None without a limit.

    ``good`` of ``sent`` (failed ones are sent and never good), ``attainment = good / sent`` with Wilson's 95 % interval of
    the ``independent`` requests that these are worth, ``request_throughput = good / duration`` in requests/s; ``met`` is
    the share that met each limit alone. TPOT of a one-token answer counts as 0 (goodput.py, ``calculate_goodput``).

    The goodput of a *deployment* is the highest rate, per GPU, at which attainment is 90 % (DistServe, OSDI 2024,
    section 2): `pdbench search goodput` looks for it.
    """
    if not slo:
        return None
    measures: dict[str, tuple[float | None, Callable[[Record], float | None]]] = {
        "ttft_ms": (slo.ttft_ms, ttft_s),
        "tpot_ms": (slo.tpot_ms, tpot_s),
        "e2e_ms": (slo.e2e_ms, e2e_s),
    }
    limits = {name: limit for name, (limit, _) in measures.items() if limit is not None}

    def meets(record: Record, name: str) -> bool:
        return record.ok and (measures[name][1](record) or 0.0) * 1000 <= limits[name]

    sent = len(records)
    met = {name: sum(meets(r, name) for r in records) for name in limits}
    kept = [all(meets(r, name) for name in limits) for r in records]
    good = sum(kept)
    worth = _independent(records, kept, [measures[name][1] for name in limits])
    ends = intervals.wilson(good / sent * worth, worth) if sent else (0.0, 1.0)
    rate = good / duration_s if duration_s > 0 else 0.0
    return {
        "slo": limits,
        "good": good,
        "sent": sent,
        "attainment": good / sent if sent else 0.0,
        "attainment_interval": list(ends),
        "independent": worth,
        "met": {name: count / sent if sent else 0.0 for name, count in met.items()},
        "request_throughput": rate,
        "request_throughput_per_gpu": rate / gpus if gpus else None,
    }


def _independent(records: Sequence[Record], kept: Sequence[bool], limited: Sequence[Callable[[Record], float | None]]) -> float:
    """Return how many independent requests would tell the share of good ones as well as these do.

    The least by being good and by each latency that has a limit: a queue that was short all the time leaves every request
    good, and only the latencies show that this is one piece of luck.
    """
    order = sorted(range(len(records)), key=lambda i: records[i].index)  # what was never sent has no time
    batch = intervals.batches(len(records))
    found = [intervals.independent(np.array([kept[i] for i in order], dtype=np.float64), batch)]
    for value in limited:
        inside = [(v, b) for i, b in zip(order, batch, strict=True) if records[i].ok and _real(v := value(records[i]))]
        values, batches = np.array([v for v, _ in inside], dtype=np.float64), np.array([b for _, b in inside], dtype=np.int64)
        if values.size:  # as a share: failed requests have no latency
            found.append(len(records) * intervals.independent(values, batches) / values.size)
    return min(found)


def duration_s(records: Sequence[Record]) -> float:
    """Return the point's duration: from the first request sent to the last output token, seconds; 0 without output."""
    sent = [r.sent_s for r in records if r.sent_s == r.sent_s]
    ends = [r.end_s for r in records if r.end_s == r.end_s]
    return max(ends) - min(sent) if sent and ends else 0.0


@dataclass(frozen=True)
class Sample:
    """All values of one metric, in the order their requests were sent, and the batch (`pdbench.intervals`) of each."""

    values: Floats
    batch: Ints

    def stats(self) -> Stats:
        """Return mean, min, max and percentiles."""
        return stats(self.values)

    def intervals(self) -> dict[str, list[float | None] | None]:
        """Return the 95 % intervals of mean and percentiles, ``[low, high]``; None where there are too few samples."""
        ordered = np.sort(self.values)
        found = {"mean": intervals.of_mean(self.values, self.batch)}
        for p in _PERCENTILES:
            found[f"p{p}"] = intervals.of_percentile(ordered, self.values, self.batch, p / 100)
        return {name: None if ends is None else list(ends) for name, ends in found.items()}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


#: metric -> (its value of a request, when that value was complete)
_BY_REQUEST: dict[str, tuple[Callable[[Record], float | None], Callable[[Record], float]]] = {
    "ttft_ms": (lambda r: _ms(ttft_s(r)), lambda r: r.first_s),
    "tpot_ms": (lambda r: _ms(tpot_s(r)), lambda r: r.end_s),
    "e2e_ms": (lambda r: _ms(e2e_s(r)), lambda r: r.end_s),
    "normalised_latency_ms": (lambda r: _ms(normalised_s(r)), lambda r: r.end_s),
    "ttft_scheduled_ms": (lambda r: _ms(r.first_s - r.scheduled_s), lambda r: r.first_s),
    "e2e_scheduled_ms": (lambda r: _ms(r.end_s - r.scheduled_s), lambda r: r.end_s),
    "request_output_throughput": (request_rate, lambda r: r.end_s),
    "output_throughput_per_user": (user_rate, lambda r: r.end_s),
}
METRICS = (*_BY_REQUEST, "itl_ms", "itl_token_ms")


def samples(good: Iterable[Record], begin_s: float = -math.inf, end_s: float = math.inf) -> dict[str, Sample]:
    """Return the values of every metric of `METRICS` that were *complete* within (begin_s, end_s].

    A TTFT is complete when the first token is there, a gap with the event that ends it, the others with the last token.
    Counting what is complete in a window, not what was sent in it, favours neither short nor long requests.
    """
    requests = sorted(
        (r for r in good if r.end_s > begin_s and r.first_s <= end_s and r.sent_s == r.sent_s), key=lambda r: r.sent_s
    )
    batches = intervals.batches(len(requests))
    found: dict[str, Sample] = {}
    for name, (value, when) in _BY_REQUEST.items():
        inside = [(v, b) for r, b in zip(requests, batches, strict=True) if begin_s < when(r) <= end_s and _real(v := value(r))]
        found[name] = Sample(np.array([v for v, _ in inside], dtype=np.float64), np.array([b for _, b in inside], dtype=np.int64))
    for name, gaps in (("itl_ms", itl_s), ("itl_token_ms", token_itl_s)):
        parts = [np.array(gaps(_cut(r, begin_s, end_s))) * 1000 for r in requests]
        sizes = [part.size for part in parts]
        found[name] = Sample(np.concatenate([np.empty(0), *parts]), np.repeat(batches, sizes))
    return found


def _real(value: float | None) -> bool:
    return value is not None and value == value


def _cut(record: Record, begin_s: float, end_s: float) -> Record:
    """Return the record without the gaps that ended outside of (begin_s, end_s]."""
    if record.first_s > begin_s and record.end_s <= end_s:
        return record
    times = record.chunk_s
    # The last event before the window stays: it begins the first gap in it.
    first = max(0, int(np.searchsorted(times, begin_s, side="right")) - 1)
    last = int(np.searchsorted(times, end_s, side="right"))
    counts = record.chunk_tokens[first:last]
    share = output_tokens(record) * (last - first) / max(1, len(times))
    return replace(record, chunk_s=times[first:last], chunk_tokens=counts, output_tokens=round(share))


def summarise(records: Sequence[Record], gpus: int | None = None, slo: Slo | None = None) -> dict[str, object]:
    """Return the figures of one load point from its measured records (no warm-up among them).

    Failed requests are counted in ``failed`` and enter no latency and no throughput. Throughputs are per second of
    ``duration_s``; ``*_per_gpu`` divides by *all* ``gpus`` that the deployment holds, prefill and decode together, and
    is None when that number is unknown. ``mean_in_flight`` is sum(E2E) / duration (serving.py: ``concurrency``).
    ``intervals`` holds the 95 % intervals of means and percentiles by metric.
    """
    good = [r for r in records if r.ok]
    span = duration_s(records)
    n_in, n_out = sum(map(input_tokens, good)), sum(map(output_tokens, good))
    found = samples(good)
    return {
        "completed": len(good),
        "failed": len(records) - len(good),
        "duration_s": span,
        "input_tokens": n_in,
        "output_tokens": n_out,
        **rates(len(good), n_in, n_out, sum(map(e2e_s, good)), span, gpus),
        **{name: sample.stats() for name, sample in found.items()},
        "goodput": goodput(records, slo or Slo(), span, gpus),
        "intervals": {"level": intervals.LEVEL, **{name: sample.intervals() for name, sample in found.items()}},
    }


def rates(
    completed: float, n_in: float, n_out: float, busy_s: float, span_s: float, gpus: int | None
) -> Mapping[str, float | None]:
    """Return requests and tokens per second of ``span_s``, per GPU too; ``busy_s`` is the sum of all times in flight."""

    def rate(amount: float) -> float:
        return amount / span_s if span_s > 0 else 0.0

    whole = {"request": completed, "input": n_in, "output": n_out, "total": n_in + n_out}
    return {
        **{f"{name}_throughput": rate(amount) for name, amount in whole.items()},
        **{f"{name}_throughput_per_gpu": rate(amount) / gpus if gpus else None for name, amount in whole.items()},
        "mean_in_flight": rate(busy_s),
    }
