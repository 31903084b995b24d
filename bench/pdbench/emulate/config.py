"""What one emulated worker was started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pdbench.emulate.handshake import Timeouts
from pdbench.model.profile import Profile

Role = Literal["prefill", "decode", "aggregated"]
#: What SGLang calls the roles: in `disaggregation_mode`, and in the label `engine_type`.
MODES: dict[Role, str] = {"prefill": "prefill", "decode": "decode", "aggregated": "null"}
ENGINE_TYPES: dict[Role, str] = {"prefill": "prefill", "decode": "decode", "aggregated": "unified"}


@dataclass(frozen=True)
class WorkerConfig:
    """What one worker was started with. Ports are TCP ports; `context_length`, `max_total_tokens` are in tokens."""

    role: Role
    host: str
    port: int
    bootstrap_port: int
    profile: Profile
    model_path: str
    served_model_name: str
    tp_size: int
    max_running_requests: int
    context_length: int
    max_total_tokens: int
    timeouts: Timeouts
    node: str = "localhost"
    rdma_fabric: str = "none"
    transfer_backend: str = "nixl"
    chunked_prefill_size: int = 8192
    num_reserved_decode_tokens: int = 512
    disable_radix_cache: bool = False
    enable_pd_role_switch: bool = False
    allow_faults: bool = False
    api_key: str | None = field(default=None, repr=False)
    admin_api_key: str | None = field(default=None, repr=False)
