"""SGLang's Prometheus metrics, as far as an emulated worker has something true to say, and a few of our own.

Names, labels, buckets and meaning of `sglang:*` follow `srt/observability/metrics_collector.py` of SGLang 0.5.23. As
there, a counter or histogram that never moved has no sample. What begins with `pdbench_emulator_` tells about the
emulator itself: whether it kept its schedule, and which KV cache came from where.
"""

from __future__ import annotations

import time
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
_QUEUE_SECONDS = (
    *(0.0, 0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 4, 5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90),
    *(100, 200, 300, 400, 500, 600, 700, 800, 900, 1000, 1200, 1400, 1600, 1800, 2000, 2500, 3000),
)
_STAGE_SECONDS = tuple(0.001 * 1.62**step for step in range(30))
#: 0.1 ms to 1 s, finest around the bound of 5 ms that the emulator promises.
_LATENESS = (
    *(0.0001, 0.0002, 0.0003, 0.0004, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.0025, 0.003, 0.0035, 0.004, 0.0045),
    *(0.005, 0.006, 0.007, 0.008, 0.009, 0.01, 0.0125, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0),
)
#: SGLang counts generated tokens over so many decode steps (`--decode-log-interval`) ...
_THROUGHPUT_STEPS = 40
#: ... and a figure older than this many seconds is no longer shown.
_THROUGHPUT_STALE_S = 30.0
#: The values of a metric's own labels, "" for a metric without any.
Own = str | tuple[str, ...]


def _labels(pairs: dict[str, str]) -> str:
    escaped = ((key, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for key, value in pairs.items())
    return ",".join(f'{key}="{value}"' for key, value in escaped)


def _sample_labels(base: dict[str, str], names: Sequence[str], own: Own) -> str:
    values = (own,) if isinstance(own, str) else own
    return _labels({**base, **dict(zip(names, values, strict=True))} if names else base)


class Counter:
    """A counter, with labels of its own beside those of the worker or without."""

    kind = "counter"

    def __init__(self, name: str, text: str, labels: dict[str, str], *own_labels: str) -> None:
        """Name it as Prometheus shows it, `_total` included."""
        self.name, self.text, self._base, self._own = name, text, labels, own_labels
        self.values: dict[Own, float] = {}

    def inc(self, amount: float = 1, own: Own = "") -> None:
        """Add to the sample of these values of the own labels (a tuple when there are several)."""
        self.values[own] = self.values.get(own, 0) + amount

    def lines(self) -> list[str]:
        """Return the samples in the text format."""
        return [f"{self.name}{{{_sample_labels(self._base, self._own, own)}}} {value:.17g}" for own, value in self.values.items()]


class Gauge(Counter):
    """A value that goes up and down; always shown, from 0 on."""

    kind = "gauge"

    def __init__(self, name: str, text: str, labels: dict[str, str]) -> None:
        """Start at 0."""
        super().__init__(name, text, labels)
        self.values[""] = 0.0

    def set(self, value: float) -> None:
        """Replace the value."""
        self.values[""] = value


class Throughput(Gauge):
    """Tokens a second as SGLang counts them: over its last 40 decode steps, 0 once that is 30 s ago."""

    def __init__(self, name: str, text: str, labels: dict[str, str]) -> None:
        """Start at 0."""
        super().__init__(name, text, labels)
        self._steps = self._tokens = 0
        self._since = self._until = time.monotonic()

    def step(self, tokens: int) -> None:
        """Count one decode step that made so many tokens."""
        self._steps += 1
        self._tokens += tokens
        if self._steps == _THROUGHPUT_STEPS:
            now = time.monotonic()
            self.set(self._tokens / max(now - self._since, 1e-9))
            self._steps = self._tokens = 0
            self._since = self._until = now

    @property
    def value(self) -> float:
        """The figure that is shown now, in tokens per second."""
        if time.monotonic() - self._until > _THROUGHPUT_STALE_S:
            self.set(0)
        return self.values[""]

    def lines(self) -> list[str]:
        """Return the sample in the text format."""
        _ = self.value
        return super().lines()


class CpuSeconds(Counter):
    """The CPU time of this process in seconds, user and system."""

    def lines(self) -> list[str]:
        """Return the sample in the text format."""
        self.values[""] = time.process_time()
        return super().lines()


class Histogram:
    """A cumulative histogram with at most one label of its own."""

    kind = "histogram"

    def __init__(self, name: str, text: str, labels: dict[str, str], bounds: Sequence[float], *own_labels: str) -> None:
        """Give the upper bounds without +Inf."""
        self.name, self.text, self._base, self._own = name, text, labels, own_labels
        self._bounds = tuple(map(float, bounds))
        self._counts: dict[Own, list[int]] = {}
        self._sums: dict[Own, float] = {}

    def observe(self, value: float, own: Own = "") -> None:
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
            labels = _sample_labels(self._base, self._own, own)
            for bound, count in zip((*map(str, self._bounds), "+Inf"), accumulate(counts), strict=True):
                rows.append(f'{self.name}_bucket{{{labels},le="{bound}"}} {count}')
            rows.append(f"{self.name}_count{{{labels}}} {sum(counts)}")
            rows.append(f"{self.name}_sum{{{labels}}} {self._sums[own]:.17g}")
        return rows


class WorkerMetrics:
    """Every metric of one worker; attributes are the SGLang names without prefix and unit suffix."""

    def __init__(self, model_name: str, engine_type: str) -> None:
        """Take the labels that all samples of this worker carry."""
        self._front = front = {"model_name": model_name, "engine_type": engine_type}
        self._back = back = {**front, "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"}
        stream = "is_streaming"
        self.requests = Counter("sglang:num_requests_total", "Number of requests processed.", front, stream)
        self.prompt_tokens = Counter("sglang:prompt_tokens_total", "Number of prefill tokens processed.", front, stream)
        self.generation_tokens = Counter(
            "sglang:generation_tokens_total", "Number of generation tokens processed.", front, stream
        )
        self.cached_tokens = Counter(
            "sglang:cached_tokens_total", "Number of cached prompt tokens by source.", front, "cache_source"
        )
        self.realtime = Counter(
            "sglang:realtime_tokens_total", "Number of tokens computed: prefill_compute, decode.", back, "mode"
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
        self._add_scheduler(back)
        self._add_own(front)

    def _add_scheduler(self, back: dict[str, str]) -> None:
        self.token_usage = Gauge("sglang:token_usage", "The token usage: used tokens / capacity.", back)
        self.num_used_tokens = Gauge("sglang:num_used_tokens", "The number of used tokens.", back)
        self.max_total_num_tokens = Gauge(
            "sglang:max_total_num_tokens", "Maximum total number of tokens in the KV cache pool.", back
        )
        self.cache_hit_rate = Gauge("sglang:cache_hit_rate", "The prefix cache hit rate of the last prefill batch.", back)
        self.gen_throughput = Throughput("sglang:gen_throughput", "The generation throughput (token/s).", back)
        self.retracted = Gauge("sglang:num_retracted_reqs", "The number of retracted requests.", back)
        self.retracted_total = Counter("sglang:num_retracted_requests_total", "Total number of retracted requests.", back)
        self.retracted_input_tokens = Counter(
            "sglang:num_retracted_input_tokens_total", "Total number of retracted input tokens.", back
        )
        self.retracted_output_tokens = Counter(
            "sglang:num_retracted_output_tokens_total", "Total number of retracted output tokens.", back
        )
        self.pending_prealloc_token_usage = Gauge(
            "sglang:pending_prealloc_token_usage",
            "The token usage for pending preallocated tokens (not preallocated yet).",
            back,
        )
        self.kv_alloc = Histogram("sglang:kv_transfer_alloc_ms", "KV transfer allocation waiting time in ms.", back, _KV_MS)
        self.prefill_retries = Counter("sglang:num_prefill_retries_total", "Total number of prefill retries.", back)
        self.queue_time = Histogram("sglang:queue_time_seconds", "Queueing time in seconds.", back, _QUEUE_SECONDS)
        self.stage = Histogram(
            "sglang:per_stage_req_latency_seconds", "The latency of each stage of requests.", back, _STAGE_SECONDS, "stage"
        )

    def _add_own(self, front: dict[str, str]) -> None:
        self.lateness = Histogram(
            "pdbench_emulator_token_lateness_seconds",
            "How long after its due time an output token was written to the client's socket, in seconds.",
            front,
            _LATENESS,
        )
        self.cpu = CpuSeconds("pdbench_emulator_cpu_seconds_total", "CPU time of the emulator's process in seconds.", front)
        peers = ("peer", "transport")
        self.kv_transfers = Counter("pdbench_emulator_kv_transfers_total", "KV caches that arrived or left.", front, *peers)
        self.kv_bytes = Counter("pdbench_emulator_kv_bytes_total", "Bytes of KV cache that arrived or left.", front, *peers)
        self.slow_clients = Counter(
            "pdbench_emulator_slow_clients_total", "Streams that were ended because their client did not read.", front
        )

    def note_stage(self, stage: str, seconds: float) -> None:
        """Count a stage of a request as SGLang does: waiting before the first forward pass is queueing time."""
        if stage.endswith("_waiting"):
            self.queue_time.observe(seconds)
        # metrics_is_observed of RequestStage (req_time_stats.py)
        if stage != "prefill_waiting":
            self.stage.observe(seconds, stage)

    def relabel(self, engine_type: str) -> None:
        """Change the label `engine_type` of all samples: the worker has switched its role."""
        self._front["engine_type"] = self._back["engine_type"] = engine_type

    def text(self) -> str:
        """Return the page in the Prometheus text format."""
        rows: list[str] = []
        for metric in vars(self).values():
            if not isinstance(metric, (Counter, Histogram)):
                continue
            rows += [f"# HELP {metric.name} {metric.text}", f"# TYPE {metric.name} {metric.kind}", *metric.lines()]
        return "\n".join(rows) + "\n"
