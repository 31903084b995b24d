"""What each engine counts and understands: the load generator and the gate name engines nowhere else.

A counter is ``name`` or ``name{label="value"}`` as it stands on the engine's metrics page; of several, the first that a
worker shows is taken. SGLang: 0.5.23, ``srt/observability/metrics_collector.py`` and ``srt/entrypoints/http_server.py``.
vLLM: 0.33, ``vllm/v1/metrics/loggers.py`` and the NIXL connector's metrics.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timer:
    """A histogram of one role's workers: counter names without ``_sum`` and ``_count`` (the first that is shown is taken).

    ``whole``: all of a request's time, so that there is no telling its parts apart without it.
    """

    role: str
    names: tuple[str, ...]
    unit_s: float = 1.0
    whole: bool = False


@dataclass(frozen=True)
class Stage:
    """A part of TTFT: the means of ``times`` less those of ``less``, which lie within them and are stages of their own.

    ``most``: the same of other timers, and the stage is no longer than that.
    """

    name: str
    times: tuple[Timer, ...]
    less: tuple[Timer, ...] = ()
    most: Stage | None = None


@dataclass(frozen=True)
class Stages:
    """How an engine splits TTFT: ``inside``: timers whose sum runs from a request's arrival to its first token."""

    inside: tuple[Timer, ...]
    parts: tuple[Stage, ...]


@dataclass(frozen=True)
class Engine:
    """The facts of one engine.

    ``served``: by role, what moves with every request that a worker did its part of. ``lifelines`` start from 0 with the
    process. ``transfer_role``: whose workers count KV transfers that ended well (``transfers``) and their size
    (``transferred``, in units of ``transfer_unit`` bytes). ``failures``: transfers that did not end well. ``computed``: prompt
    tokens whose KV a worker computed itself, and ``computed_allowed`` how many of them a decode worker computes for each
    request as a matter of course. ``log_lines``: what a worker's log says of its transport, in the plan's words.
    ``full_speed`` (path, body), ``stop_profile`` and ``flush`` are paths to POST to; "" where the engine has none. ``info``:
    the path of what a worker says of itself. ``verifiable``: a prefill worker can be asked for the log-probabilities of what a
    decode worker answered (pdbench.run.verify). ``apart`` and ``together``: the stages of TTFT with prefill and decode on
    workers of their own, and on the same ones.
    """

    served: Mapping[str, tuple[str, ...]]
    prompt_tokens: str
    output_tokens: str
    cached_tokens: str
    lifelines: tuple[str, ...]
    transfer_role: str
    transfers: tuple[str, ...]
    transferred: str
    transfer_unit: int
    failures: tuple[str, ...]
    computed: str
    computed_allowed: int
    log_lines: tuple[tuple[re.Pattern[str], str], ...]
    full_speed: tuple[str, Mapping[str, object]] = ("", {})
    stop_profile: str = ""
    flush: str = ""
    info: str = "/server_info"
    verifiable: bool = False
    apart: Stages = Stages((), ())
    together: Stages = Stages((), ())


#: Mooncake installs one transport and says which; UCX says what a protocol uses under UCX_PROTO_INFO=y, in tables.
_TRANSPORT_LINES = (
    (re.compile(r"MC_FORCE_TCP is set, using TCP|Using TCP transport"), "tcp"),
    (re.compile(r"Using RDMA transport|installTransport, type=rdma|zero-copy (?:rc|dc)_\w+/"), "rdma"),
    (re.compile(r"Using Intra-Node NVLink transport|zero-copy cuda_ipc/"), "cuda_ipc"),
)

#: the router's own time to first token, of those that measure it (sglang-router does for gRPC workers only)
ROUTER_TTFT = ("smg_pd_ttft_seconds", "smg_router_ttft_seconds")


def _sglang_stage(role: str, stage: str, *others: str) -> Timer:
    return Timer(role, (f'sglang:per_stage_req_latency_seconds{{stage="{stage}"}}', *others))


# req_time_stats.py. Prefill's E2E: until its scheduler comes round to the request and meets decode (bootstrap), its queue, the
# forward pass, and from there until it answers (stage `prefill_transfer_kv_cache`). It looks between two steps which transfers
# are over, so that stage is no time of the transfer: decode may have the KV cache long before. Decode meets prefill, waits for
# memory (allocation), tells prefill, and waits for the KV cache (`decode_transferred`): what of that is none of prefill's is
# the transfer. What decode has to say then waits in the router for prefill's answer (`prefill_answer`).
_SGLANG_E2E = Timer("prefill", ("sglang:e2e_request_latency_seconds",), whole=True)
_SGLANG_QUEUE = Timer("prefill", ("sglang:queue_time_seconds",))
_SGLANG_FORWARD = _sglang_stage("prefill", "prefill_forward")
_SGLANG_ANSWERS = _sglang_stage("prefill", "prefill_transfer_kv_cache")
_SGLANG_TTFT = Timer("decode", ("sglang:time_to_first_token_seconds",))
_SGLANG_MET = Timer("decode", ("sglang:kv_transfer_bootstrap_ms",), 1e-3)
_SGLANG_WAITED = _sglang_stage("decode", "decode_transferred")
_SGLANG_APART = Stages(
    inside=(_SGLANG_TTFT,),
    parts=(
        # A router that asks prefill first makes prefill wait, and decode not: that is the router's.
        Stage(
            "bootstrap",
            (_SGLANG_E2E,),
            (_SGLANG_QUEUE, _SGLANG_FORWARD, _SGLANG_ANSWERS),
            Stage("", (_SGLANG_MET, _SGLANG_WAITED), (_SGLANG_QUEUE, _SGLANG_FORWARD)),
        ),
        Stage("prefill_queue", (_SGLANG_QUEUE,)),
        Stage("prefill_forward", (_SGLANG_FORWARD,)),
        Stage("kv_allocation", (Timer("decode", ("sglang:kv_transfer_alloc_ms",), 1e-3),)),
        Stage("kv_transfer", (_SGLANG_MET, _SGLANG_WAITED, _SGLANG_ANSWERS), (_SGLANG_E2E,)),
        Stage("decode_queue", (_sglang_stage("decode", "decode_waiting", "sglang:queue_time_seconds"),)),
        Stage("first_step", (_sglang_stage("decode", "fake_output"),)),
        Stage("prefill_answer", (_SGLANG_E2E,), (_SGLANG_TTFT,), Stage("", (_SGLANG_ANSWERS,))),
    ),
)
_SGLANG_TOGETHER = Stages(
    inside=(Timer("aggregated", ("sglang:time_to_first_token_seconds",)),),
    parts=(
        Stage("prefill_queue", (Timer("aggregated", ("sglang:queue_time_seconds",)),)),
        Stage("prefill_forward", (_sglang_stage("aggregated", "prefill_forward"),)),
    ),
)

_SGLANG = Engine(
    # Counted when a request finishes (observe_one_finished_request); its own health requests carry log_metrics=False.
    served={
        "prefill": ("sglang:prompt_tokens_total", "sglang:num_requests_total", "sglang:kv_transfer_total_mb_count"),
        "decode": ("sglang:generation_tokens_total", "sglang:num_requests_total"),
        "aggregated": ("sglang:generation_tokens_total", "sglang:num_requests_total"),
    },
    prompt_tokens="sglang:prompt_tokens_total",
    output_tokens="sglang:generation_tokens_total",
    cached_tokens="sglang:cached_tokens_total",
    lifelines=(
        "sglang:num_requests_total",
        "sglang:prompt_tokens_total",
        "sglang:generation_tokens_total",
        "sglang:e2e_request_latency_seconds_count",
    ),
    # process_disagg_prefill_inflight_queue (disaggregation/prefill.py)
    transfer_role="prefill",
    transfers=(
        "sglang:kv_transfer_total_mb_count",
        "sglang:kv_transfer_latency_ms_count",
        'sglang:per_stage_req_latency_seconds_count{stage="prefill_transfer_kv_cache"}',
    ),
    transferred="sglang:kv_transfer_total_mb_sum",
    transfer_unit=2**20,
    failures=("sglang:num_transfer_failed_reqs_total", "sglang:num_bootstrap_failed_reqs_total"),
    # report_prefill_stats: a batch whose KV came from elsewhere (PREBUILT) never gets there.
    computed='sglang:realtime_tokens_total{mode="prefill_compute"}',
    computed_allowed=0,
    log_lines=_TRANSPORT_LINES,
    full_speed=("/slow_down", {"forward_sleep_time": None}),
    stop_profile="/stop_profile",
    flush="/flush_cache",
    verifiable=True,
    apart=_SGLANG_APART,
    together=_SGLANG_TOGETHER,
)

# vllm/v1/metrics/stats.py. One role after the other: prefill answers the router before decode is asked. Decode counts the
# wait for the KV cache as queueing, the last prompt token that it computes again as its prefill.
_VLLM_TRANSFER = Timer("decode", ("vllm:nixl_xfer_time_seconds",))
_VLLM_APART = Stages(
    inside=(
        Timer("prefill", ("vllm:e2e_request_latency_seconds",)),
        Timer("decode", ("vllm:time_to_first_token_seconds",)),
    ),
    parts=(
        Stage("prefill_queue", (Timer("prefill", ("vllm:request_queue_time_seconds",)),)),
        Stage("prefill_forward", (Timer("prefill", ("vllm:request_prefill_time_seconds",)),)),
        Stage("kv_transfer", (_VLLM_TRANSFER,)),
        Stage("decode_queue", (Timer("decode", ("vllm:request_queue_time_seconds",)),), (_VLLM_TRANSFER,)),
        Stage("first_step", (Timer("decode", ("vllm:request_prefill_time_seconds",)),)),
    ),
)
_VLLM_TOGETHER = Stages(
    inside=(Timer("aggregated", ("vllm:time_to_first_token_seconds",)),),
    parts=(
        Stage("prefill_queue", (Timer("aggregated", ("vllm:request_queue_time_seconds",)),)),
        Stage("prefill_forward", (Timer("aggregated", ("vllm:request_prefill_time_seconds",)),)),
    ),
)

_VLLM = Engine(
    served={
        "prefill": ("vllm:prompt_tokens_total", "vllm:request_success_total"),
        "decode": ("vllm:generation_tokens_total", "vllm:request_success_total"),
        "aggregated": ("vllm:generation_tokens_total", "vllm:request_success_total"),
    },
    prompt_tokens="vllm:prompt_tokens_total",
    output_tokens="vllm:generation_tokens_total",
    cached_tokens='vllm:prompt_tokens_by_source_total{source="local_cache_hit"}',
    lifelines=("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total"),
    # The NIXL connector of vLLM reads: it is the decode side that counts.
    transfer_role="decode",
    transfers=("vllm:nixl_bytes_transferred_count",),
    transferred="vllm:nixl_bytes_transferred_sum",
    transfer_unit=1,
    failures=("vllm:nixl_num_failed_transfers_total", "vllm:nixl_num_failed_notifications_total"),
    computed='vllm:prompt_tokens_by_source_total{source="local_compute"}',
    # The last token of a prompt may be run again for its logits.
    computed_allowed=1,
    log_lines=_TRANSPORT_LINES,
    # /server_info is there in its development mode only
    info="/version",
    apart=_VLLM_APART,
    together=_VLLM_TOGETHER,
)

_ENGINES = {"sglang": _SGLANG, "emulated": _SGLANG, "vllm": _VLLM}


def engine(name: object) -> Engine:
    """Return the facts of an engine of a plan; one that is not known counts as SGLang, so that what it lacks shows."""
    return _ENGINES.get(str(name), _SGLANG)


_SAMPLE = re.compile(r"(?P<name>[^{]+)(?:\{(?P<labels>.*)\})?", re.DOTALL)


def total(samples: Mapping[str, float], counter: str) -> float | None:
    """Return the sum over label sets of ``name`` or ``name{label="value"}``; None when there is no such sample."""
    wanted = _SAMPLE.fullmatch(counter)
    assert wanted is not None
    values = []
    for key, value in samples.items():
        sample = _SAMPLE.fullmatch(key)
        if sample and sample["name"] == wanted["name"] and (wanted["labels"] or "") in (sample["labels"] or ""):
            values.append(value)
    return sum(values) if values else None


def engine_of(samples: Collection[str]) -> Engine | None:
    """Return the facts of the engine that shows these samples; None when none of ours does."""
    for facts in (_SGLANG, _VLLM):
        prefix = facts.prompt_tokens.partition(":")[0] + ":"
        if any(name.startswith(prefix) for name in samples):
            return facts
    return None


def no_gpu(emulated: bool, on_cpu: bool) -> str:
    """Say why no GPU took part, "" where GPUs did."""
    return "the engine was emulated" if emulated else "the engine ran on a CPU" if on_cpu else ""


def cautions(why_no_gpu: str, truncated: str, whose: str = "") -> list[str]:
    """Return what every output says of figures that no GPU made, or a model that is not whole; ``whose``: such as " (A)"."""
    found = [f"{why_no_gpu}{whose}: no GPU was used, these figures say nothing about hardware"] if why_no_gpu else []
    return [*found, f"the model is not whole{whose}: {truncated}"] if truncated else found
