"""What is particular to each engine and router: command lines, health paths, versions. No other file names one in an `if`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from .errors import UserError, did_you_mean
from .units import KEY_FILE, KEY_LAUNCHER


@dataclass(frozen=True)
class WorkerContext:
    """One rank of one worker, as the plan knows it; paths are the host's."""

    role: str
    python: str
    state_dir: str
    model: str
    served_model_name: str
    listen: str
    port: int
    bootstrap_port: Optional[int]
    tensor_parallel_size: int
    nodes: int
    node_rank: int
    dist_init: str
    transfer_backend: str
    node: str
    rdma_fabric: str
    rdma_devices: Sequence[str]
    tcp_device: Optional[str]
    gpus: Sequence[int]
    mem_fraction: Optional[float]
    profile: str
    api_key: bool
    address: str


@dataclass(frozen=True)
class Engine:
    """The facts of one engine. ``flags``: what the plan sets, flag -> value; ``env``: the same for the environment."""

    name: str
    default_version: str
    needs_model: bool
    emulated: bool
    transfer_backends: Tuple[str, ...]
    #: flag (long, no dashes) -> the variable that sets it
    owned: Mapping[str, str]
    flags: Callable[[WorkerContext], Dict[str, Any]]
    env: Callable[[WorkerContext], Dict[str, str]]
    #: argv before the flags: (python, state_dir, api_key) ->
    command: Callable[[WorkerContext], List[str]]
    health_path: Callable[[str], str]
    #: requirement files installed in turn into the engine's virtualenv: version ->
    requirements: Callable[[str], List[str]]


def _sglang_flags(c: WorkerContext) -> Dict[str, Any]:
    flags: Dict[str, Any] = {"model-path": c.model}
    if c.served_model_name != c.model:
        flags["served-model-name"] = c.served_model_name
    flags.update({"host": c.listen, "port": c.port, "tp-size": c.tensor_parallel_size})
    if c.nodes > 1:
        flags.update({"dist-init-addr": c.dist_init, "nnodes": c.nodes, "node-rank": c.node_rank})
    if c.role != "aggregated":
        flags.update({"disaggregation-mode": c.role, "disaggregation-transfer-backend": c.transfer_backend})
        if c.bootstrap_port is not None:
            flags["disaggregation-bootstrap-port"] = c.bootstrap_port
        if c.rdma_devices and c.transfer_backend == "mooncake":
            flags["disaggregation-ib-device"] = ",".join(c.rdma_devices)
    if c.mem_fraction is not None:
        flags["mem-fraction-static"] = c.mem_fraction
    flags["enable-metrics"] = True
    flags["enable-cache-report"] = True
    return flags


def _sglang_env(c: WorkerContext) -> Dict[str, str]:
    env = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, c.gpus)), "SGLANG_HOST_IP": c.address}
    if c.role != "aggregated" and c.transfer_backend == "nixl":
        # An HCA alone leaves UCX no TCP device, and a mixed-fabric pair then has no path at all.
        devices = [f"{device}:1" for device in c.rdma_devices] + ([c.tcp_device] if c.tcp_device else [])
        if c.tcp_device and devices:
            env["UCX_NET_DEVICES"] = ",".join(devices)
    return env


def _run_module(module: str, c: Union[WorkerContext, RouterContext]) -> List[str]:
    """Return argv that runs a Python module which takes a key only in argv; the launcher keeps it out of there."""
    if c.api_key:
        return [c.python, f"{c.state_dir}/{KEY_LAUNCHER}", f"{c.state_dir}/{KEY_FILE}", "--api-key", module]
    return [c.python, "-m", module]


def _emulated_flags(c: WorkerContext) -> Dict[str, Any]:
    flags: Dict[str, Any] = {"role": c.role, "host": c.listen, "port": c.port}
    if c.bootstrap_port is not None:
        flags["bootstrap-port"] = c.bootstrap_port
    flags.update({"profile": c.profile, "model-path": c.model, "served-model-name": c.served_model_name})
    flags["tp-size"] = c.tensor_parallel_size
    if c.mem_fraction is not None:
        flags["mem-fraction-static"] = c.mem_fraction
    if c.role != "aggregated":
        flags.update({"node": c.node, "rdma-fabric": c.rdma_fabric, "transfer-backend": c.transfer_backend})
    if c.api_key:
        flags["api-key-file"] = f"{c.state_dir}/{KEY_FILE}"
    return flags


_SGLANG_OWNED = {
    "model-path": "model",
    "served-model-name": "served_model_name",
    "host": "listen_address",
    "port": "worker_port_base",
    "tp-size": "tensor_parallel_size",
    "nnodes": "nodes_per_worker",
    "node-rank": "nodes_per_worker",
    "dist-init-addr": "dist_init_port_base",
    "disaggregation-mode": "ratio",
    "disaggregation-transfer-backend": "transfer_backend",
    "disaggregation-bootstrap-port": "bootstrap_port_base",
    "disaggregation-ib-device": "rdma_devices",
    "mem-fraction-static": "mem_fraction",
    "api-key": "api_key",
}
_EMULATED_OWNED = {
    "role": "ratio",
    "host": "listen_address",
    "port": "worker_port_base",
    "bootstrap-port": "bootstrap_port_base",
    "profile": "emulated_profile",
    "model-path": "model",
    "served-model-name": "served_model_name",
    "tp-size": "tensor_parallel_size",
    "node": "the inventory",
    "rdma-fabric": "rdma_fabric",
    "transfer-backend": "transfer_backend",
    "mem-fraction-static": "mem_fraction",
    "api-key-file": "api_key",
}

ENGINES: Dict[str, Engine] = {
    "sglang": Engine(
        name="sglang",
        default_version="0.5.23",
        needs_model=True,
        emulated=False,
        transfer_backends=("nixl", "mooncake", "mooncake_tcp"),
        owned=_SGLANG_OWNED,
        flags=_sglang_flags,
        env=_sglang_env,
        command=lambda c: _run_module("sglang.launch_server", c),
        # /ready is new; /health generates a token, so it takes a second or more
        health_path=lambda version: "/health" if version == "0.5.17" else "/ready",
        requirements=lambda version: [
            f"requirements/engine-sglang-{version}.txt",
            "no-deps:requirements/engine-sglang-no-deps.txt",
        ],
    ),
    "emulated": Engine(
        name="emulated",
        default_version="0.1.0",
        needs_model=False,
        emulated=True,
        transfer_backends=("nixl", "mooncake", "mooncake_tcp"),
        owned=_EMULATED_OWNED,
        flags=_emulated_flags,
        env=lambda c: {},
        command=lambda c: [c.python, "-m", "pdbench", "emulate"],
        health_path=lambda version: "/ready",
        requirements=lambda version: ["requirements/pdbench-emulate.txt", "pdbench"],
    ),
}


def engine(name: str) -> Engine:
    """Return an engine's facts; raise UserError for one we do not have."""
    if name not in ENGINES:
        raise UserError(f"engine={name!r}: one of {', '.join(ENGINES)}{did_you_mean(name, ENGINES)}")
    return ENGINES[name]


@dataclass(frozen=True)
class RouterContext:
    """What a router's command line is made of; ``workers``: (role, url, bootstrap port) in plan order."""

    python: str
    state_dir: str
    listen: str
    port: int
    prometheus_port: int
    policy: str
    prefill_policy: Optional[str]
    decode_policy: Optional[str]
    check_interval: int
    disaggregated: bool
    workers: Sequence[Tuple[str, str, Optional[int]]]
    api_key: bool


@dataclass(frozen=True)
class Router:
    """The facts of one router."""

    name: str
    version: str
    requirements: Tuple[str, ...]
    command: Callable[[RouterContext], List[str]]
    flags: Callable[[RouterContext], Dict[str, Any]]
    owned: Mapping[str, str]
    #: command-line items that name the workers; the router learns changes of them while it runs
    members: Callable[[RouterContext], List[str]]


def _router_flags(c: RouterContext) -> Dict[str, Any]:
    flags: Dict[str, Any] = {"host": c.listen, "port": c.port}
    flags.update({"prometheus-host": c.listen, "prometheus-port": c.prometheus_port, "policy": c.policy})
    if c.disaggregated:
        flags["pd-disaggregation"] = True
        if c.prefill_policy:
            flags["prefill-policy"] = c.prefill_policy
        if c.decode_policy:
            flags["decode-policy"] = c.decode_policy
    # The defaults (30 s, 60 s) leave a deployment waiting for half a minute and a dead worker in use for three.
    flags["worker-startup-check-interval"] = 1
    flags["health-check-interval-secs"] = c.check_interval
    return flags


def _router_members(c: RouterContext) -> List[str]:
    items: List[str] = []
    for role, url, bootstrap_port in c.workers:
        if role == "prefill":
            items += ["--prefill", url, str(bootstrap_port)]
        elif role == "decode":
            items += ["--decode", url]
    aggregated = [url for role, url, _ in c.workers if role == "aggregated"]
    return items + (["--worker-urls", *aggregated] if aggregated else [])


ROUTERS: Dict[str, Router] = {
    "sglang-router": Router(
        name="sglang-router",
        version="0.3.2",
        requirements=("requirements/router-sglang-router.txt",),
        command=lambda c: _run_module("sglang_router.launch_router", c),
        flags=_router_flags,
        members=_router_members,
        owned={
            "host": "listen_address",
            "port": "router_port",
            "prometheus-host": "listen_address",
            "prometheus-port": "router_prometheus_port",
            "policy": "router_policy",
            "prefill-policy": "router_prefill_policy",
            "decode-policy": "router_decode_policy",
            "pd-disaggregation": "ratio",
            "prefill": "ratio",
            "decode": "ratio",
            "worker-urls": "ratio",
            "api-key": "api_key",
            "health-check-interval-secs": "router_health_check_interval",
        },
    ),
}


def router(name: str) -> Router:
    """Return a router's facts; raise UserError for one we do not have."""
    if name not in ROUTERS:
        raise UserError(f"router={name!r}: one of {', '.join(ROUTERS)}{did_you_mean(name, ROUTERS)}")
    return ROUTERS[name]
