"""What can be said to the transfer engines beside the RDMA mask: one table, of which variables, docs and environment are made.

Names, types and defaults: SGLang 0.5.23's ``environ.py`` and its page on PD disaggregation, NIXL 1.5.1, and the names that
Mooncake 0.3.14's ``engine.so`` reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Tuple

PREFILL, DECODE = ("prefill",), ("decode",)
BOTH = (*PREFILL, *DECODE)
#: The emulated worker stands for SGLang's, and reads some of them, too.
_SGLANG = ("sglang", "emulated")
_MOONCAKE, _NIXL, _ASCEND = ("mooncake", "mooncake_tcp"), ("nixl",), ("ascend",)


@dataclass(frozen=True)
class Knob:
    """One variable of ours (``name``) and the environment variable that it becomes (``env``).

    ``default``: the engine's own, which holds where nothing is set. ``roles``, ``engines``, ``backends``: who reads it (no
    backends: all of them). ``present``: what reads it asks only whether it is there.
    """

    name: str
    env: str
    type: str
    default: str
    doc: str
    unit: str = ""
    choices: Tuple[str, ...] = ()
    minimum: Any = None
    roles: Tuple[str, ...] = BOTH
    engines: Tuple[str, ...] = _SGLANG
    backends: Tuple[str, ...] = ()
    present: bool = False


KNOBS: Tuple[Knob, ...] = (
    # -- NIXL
    Knob(
        "nixl_backend", "SGLANG_DISAGGREGATION_NIXL_BACKEND", "str", "UCX",
        "NIXL's plugin: `UCX`, `LIBFABRIC`, `GPUNETIO`, `MOONCAKE`, `UCCL`, or any that lies in `nixl_plugin_dir`.",
        backends=_NIXL,
    ),
    Knob(
        "nixl_backend_params", "SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS", "dict", "{}",
        "Parameters of that plugin: `{num_threads: 8}`.", backends=_NIXL,
    ),
    Knob(
        "nixl_plugin_dir", "NIXL_PLUGIN_DIR", "str", "the wheel's own", "Folder on the host with more plugins of NIXL.",
        engines=(*_SGLANG, "vllm"), backends=_NIXL,
    ),
    # -- Mooncake
    Knob(
        "mooncake_protocol", "MOONCAKE_PROTOCOL", "str", "rdma",
        "Mooncake's network; `efa` brings the build for AWS EFA, and is found at deploy on hosts with no other card.",
        choices=("rdma", "efa", "tcp"), backends=_MOONCAKE,
    ),
    Knob(
        "mooncake_custom_mem_pool", "SGLANG_MOONCAKE_CUSTOM_MEM_POOL", "str", "none",
        "Where the KV cache is allocated so that NVLink (or Barex) reaches it.",
        choices=("NVLINK", "INTRA_NODE_NVLINK", "BAREX"), backends=_MOONCAKE,
    ),
    Knob(
        "mooncake_intranode_nvlink", "MC_INTRANODE_NVLINK", "bool", "false",
        "NVLink between the GPUs of one host; with `mooncake_custom_mem_pool: INTRA_NODE_NVLINK`.", backends=_MOONCAKE,
        present=True,
    ),
    Knob(
        "mooncake_force_mnnvl", "MC_FORCE_MNNVL", "bool", "false",
        "NVLink between hosts (NVL72) though there are RDMA cards; with `mooncake_custom_mem_pool: NVLINK`.", backends=_MOONCAKE,
        present=True,
    ),
    Knob(
        "mooncake_max_transfer_batch_indices", "SGLANG_MOONCAKE_MAX_TRANSFER_BATCH_INDICES", "int", "0",
        "Split larger transfers into batches of so many KV indices; 0: one batch.", minimum=0, roles=PREFILL, backends=_MOONCAKE,
    ),
    Knob(
        "mooncake_send_aux_tcp", "SGLANG_MOONCAKE_SEND_AUX_TCP", "bool", "false",
        "Send what goes beside the KV cache by TCP (NVLink does so anyway).", roles=PREFILL, backends=_MOONCAKE,
    ),
    # -- any transfer engine, prefill
    Knob(
        "disaggregation_thread_pool_size", "SGLANG_DISAGGREGATION_THREAD_POOL_SIZE", "int",
        "a sixteenth of the cores, 4 to 12", "Threads that move KV cache, per rank; at least `disaggregation_queue_size`.",
        minimum=1, roles=PREFILL,
    ),
    Knob(
        "disaggregation_queue_size", "SGLANG_DISAGGREGATION_QUEUE_SIZE", "int", "4",
        "Transfer queues that share these threads; 1: one request after the other.", minimum=1, roles=PREFILL,
    ),
    Knob(
        "disaggregation_bootstrap_timeout", "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT", "int", "300",
        "How long prefill waits for decode to say where the KV cache goes.", unit="s", minimum=1, roles=PREFILL,
    ),
    Knob(
        "disaggregation_bootstrap_entry_cleanup_interval", "SGLANG_DISAGGREGATION_BOOTSTRAP_ENTRY_CLEANUP_INTERVAL", "int", "120",
        "Between clean-ups of the bootstrap server's entries.", unit="s", minimum=1, roles=PREFILL,
    ),
    # -- any transfer engine, decode
    Knob(
        "disaggregation_heartbeat_interval", "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL", "float", "5.0",
        "Between decode's checks of a prefill bootstrap server; under 2 is taken as 2.", unit="s", minimum=0.1, roles=DECODE,
    ),
    Knob(
        "disaggregation_heartbeat_max_failure", "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE", "int", "2",
        "Failed checks in a row until a prefill server counts as gone.", minimum=1, roles=DECODE,
    ),
    Knob(
        "disaggregation_waiting_timeout", "SGLANG_DISAGGREGATION_WAITING_TIMEOUT", "int", "300",
        "How long decode waits for the KV cache of a request.", unit="s", minimum=1, roles=DECODE,
    ),
    # -- both ends
    Knob(
        "disaggregation_engine_init_timeout", "SGLANG_DISAGGREGATION_ENGINE_INIT_TIMEOUT", "int", "60",
        "Longest start of the transfer engine; a hung RDMA stack fails then (0.5.17: never).", unit="s", minimum=1,
    ),
    Knob(
        "disaggregation_staging_buffer", "SGLANG_DISAGG_STAGING_BUFFER", "bool", "false",
        "Prefill and decode of different tensor parallel sizes: gather KV heads before they are sent. Not for MLA models.",
    ),
    Knob(
        "disaggregation_staging_pool_size_mb", "SGLANG_DISAGG_STAGING_POOL_SIZE_MB", "int", "4096",
        "GPU memory of decode's end of it.", unit="MB", minimum=1, roles=DECODE,
    ),
    # -- Ascend
    Knob(
        "ascend_mf_store_url", "ASCEND_MF_STORE_URL", "str", "none",
        "Where the memory fabric of NPUs meets, at prefill: `tcp://192.0.2.60:24667`.", backends=_ASCEND,
    ),
    Knob(
        "ascend_mf_transfer_protocol", "ASCEND_MF_TRANSFER_PROTOCOL", "str", "sdma", "How memfabric moves KV cache.",
        choices=("sdma", "device_rdma"), backends=_ASCEND,
    ),
    Knob(
        "ascend_transfer_with_mooncake", "ENABLE_ASCEND_TRANSFER_WITH_MOONCAKE", "bool", "false",
        "NPUs by Mooncake instead of memfabric, with `transfer_backend: mooncake`; ASCEND_NPU_PHY_ID is made from the worker's NPU.",
        backends=_MOONCAKE,
    ),
)  # fmt: skip
