"""A sweep in short, on this machine and before hosts are rented: its deployments, order and report on emulated workers.

What is kept is what the sweep is about: ratios, sizes of workers, GPUs of hosts, routers and policies, prompts and answers, pace.
What only a real engine or a real host has a use for is checked when the sweep is planned as it is, and then left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pdbench.sweep import planning
from pdbench.sweep.checkout import ROOT
from pdbench.sweep.grid import Cell, unique
from pdbench.sweep.planning import Planned, Resolve
from pdlib import bench_load, engines, routers
from pdlib.variables import BENCH, VARIABLES

Json = dict[str, Any]

#: Of a load point at most: requests, those before it, and seconds where the file gives a time. Twenty requests are the fewest
#: of which `pdbench compare` and the report's intervals can say anything.
REQUESTS, WARMUPS, SECONDS = 20, 1, 10.0
#: Client, router and workers share this machine, and nothing that they do is a measurement: ms at p99.
CLIENT_DELAY = 5000.0
#: GPUs of a host whose inventory leaves them to be found there
_GPUS = 8
_ENGINE = "emulated"
_PROFILE = "rehearsal"
_SHAPES = ("tensor_parallel_size", "nodes_per_worker")
_KEPT = (
    *("ratio", "gpus", "prefill_gpus", "decode_gpus", "gpus_shared", "rdma_fabric", "rdma_devices"),
    *(f"{role}{shape}" for role in ("", "prefill_", "decode_") for shape in _SHAPES),
)
_ROUTER = ("router", "router_policy", "router_prefill_policy", "router_decode_policy", "router_args")
_LIMITS = {"num_requests": REQUESTS, "warmup": WARMUPS, "duration": SECONDS}


def plan(found: Sequence[Cell], baseline: bool, resolve: Resolve, folder: Path) -> Planned:
    """Plan a sweep as it is, then return it in short and planned for this machine.

    ``folder``: where the inventories of the emulated hosts go. Raise UserError as `planning.make` does.
    """
    bare: dict[str, Json] = {}

    def both(inventory: str, deployments: Sequence[Json]) -> Json:
        inputs = resolve(inventory, [*deployments, {}])
        bare[inventory] = {**inputs, "cases": inputs["cases"][-1:]}
        return {**inputs, "cases": inputs["cases"][:-1]}

    whole = planning.make(found, baseline, both)
    written = {name: _write(folder, name, inventory(inputs, ROOT)) for name, inputs in bare.items()}
    cells = [_short(whole, cell, written[cell.inventory]) for cell in chosen(whole)]
    made = planning.make(unique(cells), False, resolve)
    made.notes = [
        f"rehearsal: {len(made.cells)} of {len(whole.cells)} cells, every deployment under its heaviest load, "
        f"on emulated workers of this machine, at most {REQUESTS} requests a load point; what differs for real engines only is "
        "measured once",
        *(note for note in whole.notes if "baseline" in note),
    ]
    return made


def chosen(whole: Planned) -> list[Cell]:
    """Return the cells to rehearse: of every deployment the one with the heaviest load."""
    heaviest: dict[str, tuple[float, Cell]] = {}
    for cell in whole.cells:
        weight = _weight(planning.load_of(cell, whole.clusters[cell.deployment]))
        if weight >= heaviest.get(cell.deployment, (0.0, cell))[0]:
            heaviest[cell.deployment] = (weight, cell)
    kept = {cell.id for _, cell in heaviest.values()}
    return [cell for cell in whole.cells if cell.id in kept]


def _weight(load: Mapping[str, Any]) -> float:
    """Return about how many tokens are in flight (or come in a second) at the heaviest load point."""
    prompt, answer = bench_load.tokens(load)
    return (prompt + answer) * max(point.concurrency or point.rate or 1 for point in bench_load.points(load))


def _short(whole: Planned, cell: Cell, where: str) -> Cell:
    cluster = whole.clusters[cell.deployment]
    given = {**cluster.cluster, **cell.deploy}
    deploy = {name: value for name, value in cell.deploy.items() if name in _kept(given)}
    if "model" in cell.deploy:
        deploy["model"] = _named(cell.deploy["model"])
    return replace(cell, deploy=deploy, load=short_load(planning.load_of(cell, cluster), cell.load), inventory=where)


def short_load(full: Mapping[str, Any], own: Mapping[str, Any]) -> Json:
    """Return a cell's load with fewer requests; ``full``: typed ``bench_*`` settings, ``own``: what the sweep says of them."""
    found = {**own, "bench_selfcheck": False, "bench_tool": "pdbench", "bench_max_client_delay_ms": CLIENT_DELAY}
    for name, most in _LIMITS.items():
        value = full[f"bench_{name}"]
        if name == "warmup" or value is not None:
            found[f"bench_{name}"] = most if value is None else min(value, most)
    if full["bench_load"]:
        load = {**_capped(full["bench_load"])}
        if isinstance(load.get("stages"), list):
            load["stages"] = [_capped(stage) if isinstance(stage, Mapping) else stage for stage in load["stages"]]
        found["bench_load"] = load
    return found


def _capped(load: Mapping[str, Any]) -> Json:
    numbers = {name: value for name, value in load.items() if name in _LIMITS and isinstance(value, (int, float))}
    return {**load, **{name: min(value, _LIMITS[name]) for name, value in numbers.items()}}


def _named(model: Any) -> str:
    """Return a name under which no figure is taken for one of the model."""
    return f"{_ENGINE}/{str(model).rsplit('/', 1)[-1]}"


def _kept(given: Mapping[str, Any]) -> set[str]:
    """Return the names of variables that mean the same to emulated workers; ``given``: the cluster's values."""
    kept = set(_KEPT)
    if given.get("transfer_backend") in ("auto", *engines.engine(_ENGINE).transfer_backends):
        kept.add("transfer_backend")
    if _ENGINE in routers.router(str(given.get("router") or VARIABLES["router"].default)).engines:
        kept |= set(_ROUTER)
    return kept


def inventory(inputs: Mapping[str, Any], root: Path) -> Json:
    """Return an inventory of emulated hosts on this machine, by name and group as real ones are.

    ``inputs``: what `playbooks/inputs.yml` says of the real inventory, with one case, that of no extra-vars; ``root``: the
    checkout. Ports and ways to a host are this machine's: those of the site (group_vars) or the defaults.
    """
    (case,) = inputs["cases"]
    hosts = {
        host: {
            **_values(given),
            "address": f"127.0.{number // 250}.{number % 250 + 1}",
            "state_dir": str(root / ".pd" / f"rehearsal-{host}"),
        }
        for number, (host, given) in enumerate(case.items())
    }
    shared = {
        "ansible_connection": "local",
        "ansible_become": False,
        "ansible_python_interpreter": "{{ ansible_playbook_python }}",
        "engine": _ENGINE,
        "emulated_profile": _PROFILE,
        "service_manager": "supervisord",
        "ready_timeout": 120,
        "install_dir": str(root / ".pd" / "install"),
        "model_dir": str(root / ".pd" / "models"),
    }
    children: Json = {group: {"hosts": {host: {} for host in members}} for group, members in inputs["groups"].items()}
    return {"all": {"hosts": {host: {**values, **shared} for host, values in hosts.items()}, "children": children}}


def _values(given: Mapping[str, Any]) -> Json:
    """Return a real host's variables as its emulated one has them; null takes away what the site's group_vars say."""
    kept = _kept(given)
    found = {
        name: value if name in kept or VARIABLES[name].scope == BENCH else None
        for name, value in given.items()
        if "port" not in name.split("_")
    }
    found["gpus"] = _GPUS if given.get("gpus") in (None, "auto") else given["gpus"]
    found["rdma_fabric"] = "none" if given.get("rdma_fabric") in (None, "auto") else given["rdma_fabric"]
    found["model"] = _named(given.get("model") or "model")
    return found


def _write(folder: Path, name: str, content: Json) -> str:
    """Write an inventory, named by what it says: sweeps of one checkout do not change each other's."""
    text = json.dumps(content, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{Path(name).name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yml"
    path.write_text(text, encoding="utf-8")
    return str(path)
