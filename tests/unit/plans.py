"""Builders that several tests share: inputs of a plan as Ansible would hand them over, and flag tables of our own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pdlib import settings
from pdlib.plan import Planner
from pdlib.plan_inputs import Inputs

Json = dict[str, Any]
#: A key that is found wherever it leaks to.
KEY = "leaked-k3y-0f-the-deployment"

_SGLANG_FLAGS = [
    {"flag": "--page-size", "aliases": [], "type": "int", "nargs": None, "choices": None},
    {"flag": "--tp-size", "aliases": ["--tensor-parallel-size", "--tp"], "type": "int", "nargs": None, "choices": None},
    {"flag": "--port", "aliases": [], "type": "int", "nargs": None, "choices": None},
    {"flag": "--device", "aliases": [], "type": "str", "nargs": None, "choices": None},
    {"flag": "--attention-backend", "aliases": [], "type": "str", "nargs": None, "choices": ["triton", "torch_native", "fa3"]},
    {"flag": "--trust-remote-code", "aliases": [], "type": "bool", "nargs": 0, "choices": None},
    {"flag": "--schedule-conservativeness", "aliases": [], "type": "float", "nargs": None, "choices": None},
    {"flag": "--cuda-graph-bs", "aliases": [], "type": "int", "nargs": "+", "choices": None},
    {"flag": "--json-model-override-args", "aliases": [], "type": "str", "nargs": None, "choices": None},
    {"flag": "--enable-metrics", "aliases": [], "type": "bool", "nargs": 0, "choices": None},
]


def write_flag_tables(folder: Path) -> None:
    """Write flag tables of both engines; small ones, so that no test hangs on what an engine happens to have."""
    folder.mkdir(parents=True, exist_ok=True)
    for version in ("0.5.17", "0.5.23"):
        table = {
            "engine": "sglang",
            "version": version,
            "flags": _SGLANG_FLAGS,
            "removed": {"--enable-deepep-moe": "use --moe-a2a-backend deepep"},
        }
        (folder / f"sglang-{version}.json").write_text(json.dumps(table))
    (folder / "emulated-0.1.0.json").write_text(json.dumps({"engine": "emulated", "version": "0.1.0", "flags": []}))


def host(number: int, gpus: Any = 4, **own: Any) -> Json:
    """A host's variables: an address of its own and ``gpus``."""
    return {"address": f"127.0.0.{number}", "gpus": gpus, "rdma_fabric": "none", **own}


def inputs(
    hosts: Mapping[str, Mapping[str, Any]],
    ratio: str = "1p1d",
    *,
    prefill: Sequence[str] | None = None,
    decode: Sequence[str] | None = None,
    router: Sequence[str] | str | None = None,
    clients: Sequence[str] = (),
    limit: Iterable[str] | None = None,
    current: Json | None = None,
    discovered: Mapping[str, Mapping[str, Any]] | None = None,
    **everywhere: Any,
) -> Inputs:
    """Inputs of a plan; every host is in both worker groups and the first one is the router, unless told otherwise.

    ``router``: the group's hosts; a word is the variable of that name.
    """
    names = list(hosts)
    if isinstance(router, str):
        everywhere, router = {**everywhere, "router": router}, None
    for_all = {"engine": "emulated", "ratio": ratio, **everywhere}
    by_host = {name: settings.host_settings(name, {**for_all, **own}, for_all) for name, own in hosts.items()}
    groups = {
        "prefill_nodes": list(names if prefill is None else prefill),
        "decode_nodes": list(names if decode is None else decode),
        "router": list(names[:1] if router is None else router),
        "bench_clients": list(clients),
    }
    return Inputs(
        groups=groups,
        cluster=settings.cluster_settings(by_host),
        hosts=by_host,
        limit=None if limit is None else frozenset(limit),
        current=current,
        discovered=discovered or {},
    )


def plan(hosts: Mapping[str, Mapping[str, Any]], ratio: str = "1p1d", **options: Any) -> Json:
    """The plan of :func:`inputs`."""
    return make_plan(inputs(hosts, ratio, **options))


def h200(ratio: str, **options: Any) -> Json:
    """One host with 8 GPUs, two a worker, as inventory/h200x8 has it."""
    fixed = {
        "engine": "sglang",
        "model": "openai/gpt-oss-120b",
        "tensor_parallel_size": 2,
        "bootstrap_port_base": 9000,
        "router_policy": "round_robin",
    }
    return plan({"h200": {"address": "127.0.0.1", "gpus": 8, "rdma_fabric": "none"}}, ratio, **{**fixed, **options})


def make_plan(given: Inputs) -> Json:
    """The plan of inputs."""
    return Planner(given).make()
