"""What each engine counts and understands: the load generator and the gate name engines nowhere else.

A counter is ``name`` or ``name{label="value"}`` as it stands on the engine's metrics page; of several, the first that a
worker shows is taken. SGLang: 0.5.23, ``srt/observability/metrics_collector.py`` and ``srt/entrypoints/http_server.py``.
vLLM: 0.33, ``vllm/v1/metrics/loggers.py`` and the NIXL connector's metrics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """The facts of one engine.

    ``served``: by role, what moves with every request that a worker did its part of. ``lifelines`` start from 0 with the
    process. ``transfer_role``: whose workers count KV transfers that ended well (``transfers``) and their size
    (``transferred``, in units of ``transfer_unit`` bytes). ``failures``: transfers that did not end well. ``computed``: prompt
    tokens whose KV a worker computed itself, and ``computed_allowed`` how many of them a decode worker computes for each
    request as a matter of course. ``log_lines``: what a worker's log says of its transport, as DESIGN names transports.
    ``full_speed`` (path, body), ``stop_profile`` and ``flush`` are paths to POST to; "" where the engine has none. ``info``:
    the path of what a worker says of itself. ``verifiable``: a prefill worker can be asked for the log-probabilities of what a
    decode worker answered (pdbench.run.verify).
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


#: Mooncake installs one transport and says which; UCX says what a protocol uses under UCX_PROTO_INFO=y, in tables.
_TRANSPORT_LINES = (
    (re.compile(r"MC_FORCE_TCP is set, using TCP|Using TCP transport"), "tcp"),
    (re.compile(r"Using RDMA transport|installTransport, type=rdma|zero-copy (?:rc|dc)_\w+/"), "rdma"),
    (re.compile(r"Using Intra-Node NVLink transport|zero-copy cuda_ipc/"), "cuda_ipc"),
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
)

_ENGINES = {"sglang": _SGLANG, "emulated": _SGLANG, "vllm": _VLLM}


def engine(name: object) -> Engine:
    """Return the facts of an engine of a plan; one that is not known counts as SGLang, so that what it lacks shows."""
    return _ENGINES.get(str(name), _SGLANG)
