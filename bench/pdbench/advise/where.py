"""Which ratios an inventory allows, each with its workers: from the code that plans deployments; no host is contacted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pdbench.advise.layout import FLAGS, Layout, Spot, of_plan
from pdbench.model import profile
from pdbench.model.profile import Profile, ProfileError
from pdbench.sweep import planning, plays
from pdbench.sweep.checkout import ROOT
from pdlib import bench_load
from pdlib import ratio as ratios
from pdlib.errors import UserError

Json = dict[str, Any]
#: prefill-decode ratios that are simulated when nobody names any
MOST = 15


@dataclass(frozen=True)
class Candidates:
    """Layouts to compare, the profiles that they name (also by host), what was left out, and the cluster's settings."""

    layouts: list[Layout]
    profiles: dict[str, Profile]
    of_host: dict[str, str]
    notes: list[str]
    settings: Json


def candidates(inventory: str, limit: str | None, given: Json, wanted: Sequence[str], named: Sequence[str]) -> Candidates:
    """Return the layouts of an inventory; raise UserError or ProfileError for what cannot be.

    ``given``: extra variables; ``wanted``: ratios, all that fill the GPUs when empty; ``named``: profiles, NAME or HOST=NAME.
    """
    inputs = plays.resolve(inventory, [given], limit)
    cluster = planning.cluster_of(inputs, inputs["cases"][0], given)
    planner = cluster.planner(None)
    found = [ratios.parse(one) for one in wanted] if wanted else planner.ratios()
    notes = []
    split = [one for one in found if one.disaggregated]
    if not wanted and len(split) > MOST:
        kept = {split[round(place * (len(split) - 1) / (MOST - 1))] for place in range(MOST)}
        notes.append(f"{MOST} of {len(split)} prefill-decode ratios are simulated; --ratios names others")
        found = [one for one in found if one in kept or not one.disaggregated]
    of_host = profiles_by_host(cluster, planner.worker_hosts, named)
    known = {name: profile.load(name) for name in dict.fromkeys(of_host.values())}
    layouts = [_layout(with_ratio(cluster, str(one)), of_host, one) for one in found]
    return Candidates(layouts, known, of_host, notes, cluster.cluster)


def load_arguments(settings: Json, scratch: Path) -> list[str]:
    """Return the load of the ``bench_*`` variables, and its limits, as options; files of ours go to ``scratch``."""
    files = bench_load.files(settings, str(ROOT))
    said = bench_load.arguments(settings, files)
    if settings["bench_load"]:
        files["load.yml"] = str(scratch / "load.yml")
        (scratch / "load.yml").write_text(json.dumps(settings["bench_load"]), encoding="utf-8")
    for name in ("ttft", "tpot", "e2e"):
        if settings[f"bench_slo_{name}_ms"] is not None:
            said += [f"--slo-{name}-ms", str(settings[f"bench_slo_{name}_ms"])]
    for name, path in files.items():
        said = [word.replace(f"{{dir}}/{name}", path) for word in said]
    return said


def with_ratio(cluster: planning.Cluster, ratio: str) -> planning.Cluster:
    """Return the cluster with another ratio."""
    hosts = {name: {**values, "ratio": ratio} for name, values in cluster.hosts.items()}
    return replace(cluster, cluster={**cluster.cluster, "ratio": ratio}, hosts=hosts)


def profiles_by_host(cluster: planning.Cluster, hosts: Sequence[str], named: Sequence[str]) -> dict[str, str]:
    """Return host -> profile: as ``named``, else that of an emulated host; raise UserError where nothing says it."""
    found: dict[str, str] = {}
    for text in named:
        host, equals, name = text.partition("=")
        if equals and host not in hosts:
            raise UserError(f"--profile {text}: no worker host is called {host}; there are {', '.join(hosts)}")
        found.update({host: name} if equals else {one: text for one in hosts if one not in found})
    for host in hosts:
        if host not in found and cluster.cluster["engine"] == "emulated":
            found[host] = str(cluster.hosts[host]["emulated_profile"])
        if host not in found:
            raise UserError(
                f"--profile is missing: nothing says how fast {cluster.cluster['model'] or 'the model'} is on {host}. Name a "
                f"shipped profile ({', '.join(profile.shipped())}) or the file that `pdbench fit` makes of measured runs; "
                f"hosts of several kinds: --profile {host}=NAME for each"
            )
    return found


def _layout(cluster: planning.Cluster, of_host: Mapping[str, str], ratio: ratios.Ratio) -> Layout:
    planner = cluster.planner(None)
    if not planner.left_to_discover():
        made = of_plan(planner.make(), of_host.__getitem__)
        odd = {way for row in made.ways for way in row} - set(profile.TRANSPORTS)
        if odd:
            raise ProfileError(
                f"{ratio}: the KV cache would go by {odd.pop()}, and profiles know {', '.join(profile.TRANSPORTS)}"
            )
        return made
    if len(planner.worker_hosts) > 1:
        raise UserError(
            f"{', '.join(planner.left_to_discover())}: the inventory leaves open what deploy_pd.yml finds there, and so how the "
            "KV cache will travel: declare address, gpus and rdma_fabric"
        )
    planner.check_fits()
    host = planner.worker_hosts[0]
    way = "tcp" if cluster.cluster["transfer_backend"] == "mooncake_tcp" else "cuda_ipc"

    def some(role: str, count: int) -> tuple[Spot, ...]:
        return (Spot(of_host[host], planner.shape[role].gpus, _flags(cluster.hosts[host], role)),) * count

    return Layout(
        str(ratio), some("prefill", ratio.prefill), some("decode", ratio.decode), some("aggregated", ratio.aggregated),
        ((way,) * ratio.decode,) * ratio.prefill,
    )  # fmt: skip


def _flags(host: Mapping[str, Any], role: str) -> tuple[tuple[str, float], ...]:
    """Return the flags that the plan of a host would have."""
    said = {**host["engine_args"], **host.get(f"{role}_engine_args", {})}
    if host["mem_fraction"] is not None:
        said.setdefault("mem-fraction-static", host["mem_fraction"])
    return tuple(sorted((name, float(value)) for name, value in said.items() if name in FLAGS))
