"""Every cell planned before a host is touched, with the code that plans deployments."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pdbench.sweep.checkout import ROOT
from pdbench.sweep.grid import Cell, baseline_of, canonical, unique
from pdlib import bench_load, bench_spec, plan, plan_inputs, settings
from pdlib import ratio as ratios
from pdlib.errors import UserError
from pdlib.variables import VARIABLES

Json = dict[str, Any]
#: (inventory, deployments' variables) -> what `playbooks/inputs.yml` writes for them.
Resolve = Callable[[str, Sequence[Json]], Json]


@dataclass(frozen=True)
class Cluster:
    """One deployment's inputs: the settings of its cluster and hosts, resolved with the cell's variables."""

    groups: Mapping[str, Sequence[str]]
    cluster: Json
    hosts: dict[str, Json]
    limit: frozenset[str] | None

    def planner(self, current: Json | None) -> plan.Planner:
        """Return the planner that goes on from ``current``."""
        known = (current or {}).get("hosts", {})
        hosts = {name: dict(values) for name, values in self.hosts.items()}
        for name, values in hosts.items():
            if values["service_manager"] == "auto" and name in known:
                values["service_manager"] = known[name]["service_manager"]
        return plan.Planner(plan_inputs.Inputs(self.groups, self.cluster, hosts, self.limit, current))

    def plan(self, current: Json | None) -> Json:
        """Return the plan of this deployment after ``current``.

        Where the inventory leaves something to be found on the hosts, the plan is a stand-in: workers by name and configuration,
        on hosts yet unknown.
        """
        planner = self.planner(current)
        if not planner.left_to_discover():
            return planner.make()
        planner.check_limit()
        planner.check_flags()
        names = [f"{role}-{i}" for role, count in planner.ratio.counts().items() for i in range(count)]
        content = canonical([{k: v for k, v in said.items() if k != "ratio"} for said in (self.cluster, *self.hosts.values())])
        rank = {"host": "?", "argv": [content], "env": {}, "gpus": []}
        return {
            "ratio": str(planner.ratio), "engine": planner.engine.name, "emulated": planner.engine.emulated,
            "model": planner.model, "served_model_name": planner.model, "api_key": False, "admin_api_key": False,
            "unknown": planner.left_to_discover(),
            "workers": [{"name": name, "role": name.rsplit("-", 1)[0], "url": name, "ranks": [dict(rank)]} for name in names],
            "router": {"argv": [str(planner.ratio.disaggregated)], "members": [], "host": "?", "url": "?"}, "hosts": {},
        }  # fmt: skip


def gpus_of(made: Json, cluster: Json) -> int:
    """Return the GPUs of a deployment, each counted once however many workers share it."""
    lent = {(rank["host"], gpu) for worker in made["workers"] for rank in worker["ranks"] for gpu in rank["gpus"]}
    each = {role: cluster.get(f"{role}_tensor_parallel_size") or cluster["tensor_parallel_size"] for role in ratios.ROLES}
    return len(lent) or sum(each[worker["role"]] for worker in made["workers"])


@dataclass
class Planned:
    """All cells with their plans.

    ``clusters`` and ``plans``: by `Cell.deployment`, the plans as on hosts that run nothing. ``notes``: what was left out or is
    not known, and why.
    """

    cells: list[Cell]
    clusters: dict[str, Cluster] = field(default_factory=dict)
    plans: dict[str, Json] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def replan(self, deployment: str, running: Json | None) -> Json:
        """Return the plan that a deploy makes where ``running`` does, with the inventory that it is for."""
        where = next(cell.inventory for cell in self.cells if cell.deployment == deployment)
        current = running if running and running["inventory"] == where else None
        made = self.plans[deployment] if current is None else self.clusters[deployment].plan(current)
        return {**made, "inventory": where}

    def gpus(self, cell: Cell) -> int:
        """Return the GPUs that the cell's deployment has."""
        return gpus_of(self.plans[cell.deployment], self.clusters[cell.deployment].cluster)


def make(found: Sequence[Cell], baseline: bool, resolve: Resolve) -> Planned:
    """Return the cells, planned; raise UserError that names the cell which cannot be.

    ``baseline``: add, for every disaggregated cell, aggregated workers on as many GPUs under the same load.
    """
    made = Planned(cells=list(found))
    for inventory in dict.fromkeys(cell.inventory for cell in found):
        deployments = {cell.deployment: cell.deploy for cell in found if cell.inventory == inventory}
        inputs = resolve(inventory, list(deployments.values()))
        for key, given, deploy in zip(deployments, inputs["cases"], deployments.values(), strict=True):
            first = next(cell for cell in found if cell.deployment == key)
            made.clusters[key] = _checked(first, partial(cluster_of, inputs, given, deploy))
    for cell in found:
        _plan(made, cell)
    if baseline:
        _add_baselines(made)
    unknown = sorted({host for one in made.plans.values() for host in one.get("unknown", [])})
    if unknown:
        made.notes.append(f"{', '.join(unknown)}: left to be found there at deploy, so placement and restarts are estimates")
    return made


def _checked(cell: Cell, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except UserError as error:
        raise UserError(f"cell {cell.id}: {error}") from None


def cluster_of(inputs: Json, given: Json, deploy: Json) -> Cluster:
    """Return the cluster that an inventory describes; ``given``: variables by host, as `Resolve` returns them for ``deploy``."""
    hosts = {host: settings.host_settings(host, values, deploy) for host, values in given.items()}
    limit = frozenset(inputs["limit"]) if inputs["limit"] is not None else None
    return Cluster(inputs["groups"], settings.cluster_settings(hosts), hosts, limit)


def _plan(made: Planned, cell: Cell) -> None:
    cluster = made.clusters[cell.deployment]
    if cell.deployment not in made.plans:
        made.plans[cell.deployment] = _checked(cell, lambda: cluster.plan(None))
    _checked(cell, lambda: _check_load(cell, cluster, made.plans[cell.deployment]))


def load_of(cell: Cell, cluster: Cluster) -> Json:
    """Return the cluster's settings with the cell's load."""
    where = f"cell {cell.id}"
    given = {name: settings.convert(VARIABLES[name], value, where) for name, value in cell.load.items()}
    return {**cluster.cluster, **given}


def _check_load(cell: Cell, cluster: Cluster, made: Json) -> None:
    load = load_of(cell, cluster)
    bench_load.points(load)
    bench_spec.make(made, load, cluster.groups["bench_clients"], cluster.hosts, str(ROOT), time.time())


def _add_baselines(made: Planned) -> None:
    known = {canonical([cell.deployment, cell.load]) for cell in made.cells}
    for cell in list(made.cells):
        planned, cluster = made.plans[cell.deployment], made.clusters[cell.deployment]
        if not ratios.parse(planned["ratio"]).disaggregated:
            continue
        gpus, each = made.gpus(cell), cluster.cluster["tensor_parallel_size"]
        beside = baseline_of(cell, gpus, each)
        if beside is None:
            _note(made, f"{planned['ratio']}: no aggregated baseline, {gpus} GPUs are no multiple of tensor_parallel_size={each}")
            continue
        if canonical([beside.deployment, beside.load]) in known:
            continue
        if beside.deployment not in made.clusters:
            settled = {**cluster.cluster, "ratio": beside.deploy["ratio"]}
            hosts = {host: {**values, "ratio": beside.deploy["ratio"]} for host, values in cluster.hosts.items()}
            made.clusters[beside.deployment] = Cluster(cluster.groups, settled, hosts, cluster.limit)
        try:
            _plan(made, beside)
        except UserError as error:
            _note(made, f"no aggregated baseline for {planned['ratio']}: {error}")
            continue
        known.add(canonical([beside.deployment, beside.load]))
        made.cells.append(beside)
    made.cells = unique(made.cells)


def _note(made: Planned, text: str) -> None:
    if text not in made.notes:
        made.notes.append(text)
