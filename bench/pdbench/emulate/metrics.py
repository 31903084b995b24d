"""SGLang's Prometheus metrics, as far as an emulated worker has something true to say.

Names, labels, buckets and meaning follow `srt/observability/metrics_collector.py` of SGLang 0.5.23. As there, a
counter or histogram that never moved has no sample.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

_SECONDS = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)
_E2E = (*_SECONDS, 600, 1200, 1800, 2400)
_TOKEN_SECONDS = (
    *(0.002, 0.004, 0.006, 0.008, 0.010, 0.015, 0.020, 0.025, 0.030, 0.035, 0.040, 0.060, 0.080),
    *(0.100, 0.200, 0.400, 0.600, 0.800, 1.000, 2.000, 4.000, 6.000, 8.000),
)
_KV_MS = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)


def _labels(pairs: dict[str, str]) -> str:
    escaped = ((key, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for key, value in pairs.items())
    return ",".join(f'{key}="{value}"' for key, value in escaped)


class Counter:
    """A counter with at most one label of its own beside those of the worker."""

    kind = "counter"

    def __init__(self, name: str, text: str, labels: dict[str, str], own_label: str = "") -> None:
        """Name it as Prometheus shows it, `_total` included."""
        self.name, self.text, self._base, self._own = name, text, labels, own_label
        self.values: dict[str, float] = {}

    def inc(self, amount: float = 1, own: str = "") -> None:
        """Add to the sample of this value of the own label."""
        self.values[own] = self.values.get(own, 0) + amount

    def lines(self) -> list[str]:
        """Return the samples in the text format."""
        return [
            f"{self.name}{{{_labels({**self._base, **({self._own: own} if self._own else {})})}}} {value:.17g}"
            for own, value in self.values.items()
        ]


class Gauge(Counter):
    """A value that goes up and down; always shown."""

    kind = "gauge"

    def set(self, value: float) -> None:
        """Replace the value."""
        self.values[""] = value


class Histogram:
    """A cumulative histogram with at most one label of its own."""

    kind = "histogram"

    def __init__(self, name: str, text: str, labels: dict[str, str], bounds: Sequence[float], own_label: str = "") -> None:
        """Give the upper bounds without +Inf."""
        self.name, self.text, self._base, self._own = name, text, labels, own_label
        self._bounds = tuple(bounds)
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, value: float, own: str = "") -> None:
        """Count one value."""
        counts = self._counts.get(own)
        if counts is None:
            counts = self._counts[own] = [0] * (len(self._bounds) + 1)
            self._sums[own] = 0.0
        counts[bisect_left(self._bounds, value)] += 1
        self._sums[own] += value

    def lines(self) -> list[str]:
        """Return buckets, count and sum in the text format."""
        rows = []
        for own, counts in self._counts.items():
            labels = _labels({**self._base, **({self._own: own} if self._own else {})})
            for bound, count in zip((*map(str, map(float, self._bounds)), "+Inf"), accumulate(counts), strict=True):
                rows.append(f'{self.name}_bucket{{{labels},le="{bound}"}} {count}')
            rows.append(f"{self.name}_count{{{labels}}} {sum(counts)}")
            rows.append(f"{self.name}_sum{{{labels}}} {self._sums[own]:.17g}")
        return rows


class WorkerMetrics:
    """Every metric of one worker; attributes are the SGLang names without prefix and unit suffix."""

    def __init__(self, model_name: str, engine_type: str) -> None:
        """Take the labels that all samples of this worker carry."""
        front = {"model_name": model_name, "engine_type": engine_type}
        back = {**front, "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"}
        stream = "is_streaming"
        self.requests = Counter("sglang:num_requests_total", "Number of requests processed.", front, stream)
        self.prompt_tokens = Counter("sglang:prompt_tokens_total", "Number of prefill tokens processed.", front, stream)
        self.generation_tokens = Counter(
            "sglang:generation_tokens_total", "Number of generation tokens processed.", front, stream
        )
        self.cached_tokens = Counter(
            "sglang:cached_tokens_total", "Number of cached prompt tokens by source.", front, "cache_source"
        )
        self.aborted = Counter("sglang:num_aborted_requests_total", "Number of requests aborted.", front)
        self.ttft = Histogram("sglang:time_to_first_token_seconds", "Time to first token in seconds.", front, _SECONDS, stream)
        self.itl = Histogram("sglang:inter_token_latency_seconds", "Inter-token latency in seconds.", front, _TOKEN_SECONDS)
        self.tpot = Histogram(
            "sglang:request_time_per_output_token_seconds",
            "Per-request TPOT in seconds: (finished_time - first_token_time) / (completion_tokens - 1).",
            front,
            _TOKEN_SECONDS,
            stream,
        )
        self.e2e = Histogram("sglang:e2e_request_latency_seconds", "End-to-end request latency in seconds", front, _E2E, stream)
        self.running = Gauge("sglang:num_running_reqs", "The number of running requests.", back)
        self.queue = Gauge("sglang:num_queue_reqs", "The number of requests in the waiting queue.", back)
        self.bootstrap_queue = Gauge("sglang:num_prefill_bootstrap_queue_reqs", "Requests in the prefill bootstrap queue.", back)
        self.inflight_queue = Gauge("sglang:num_prefill_inflight_queue_reqs", "Requests in the prefill inflight queue.", back)
        self.prealloc_queue = Gauge("sglang:num_decode_prealloc_queue_reqs", "Requests in the decode prealloc queue.", back)
        self.transfer_queue = Gauge("sglang:num_decode_transfer_queue_reqs", "Requests in the decode transfer queue.", back)
        self.kv_speed = Histogram(
            "sglang:kv_transfer_speed_gb_s",
            "KV cache transfer speed in GB/s (SGLang's GB: 2^30 bytes).",
            back,
            (0.1, 0.5, 1, 5, 10, 25, 50, 100, 200, 400),
        )
        self.kv_latency = Histogram("sglang:kv_transfer_latency_ms", "KV cache transfer latency in ms.", back, (*_KV_MS, 5000))
        self.kv_bootstrap = Histogram("sglang:kv_transfer_bootstrap_ms", "KV transfer bootstrap time in ms.", back, _KV_MS)
        self.kv_total_mb = Histogram(
            "sglang:kv_transfer_total_mb",
            "KV cache transfer size in MB (SGLang's MB: 2^20 bytes).",
            back,
            (1, 5, 10, 50, 100, 500, 1000, 5000, 10000),
        )
        self.bootstrap_failed = Counter(
            "sglang:num_bootstrap_failed_reqs_total", "The number of bootstrap failed requests.", back
        )
        self.transfer_failed = Counter("sglang:num_transfer_failed_reqs_total", "The number of transfer failed requests.", back)

    def text(self) -> str:
        """Return the page in the Prometheus text format."""
        rows: list[str] = []
        for metric in vars(self).values():
            rows += [f"# HELP {metric.name} {metric.text}", f"# TYPE {metric.name} {metric.kind}", *metric.lines()]
        return "\n".join(rows) + "\n"
