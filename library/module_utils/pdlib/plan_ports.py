"""Which ports workers listen on: they keep those they have, and none is used twice on an address."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from .errors import UserError
from .plan_site import Site
from .topology import Placed

Json = Dict[str, Any]
#: Workers keep their ports while these lie within this many of the base.
_PORT_SPAN = 1000
#: kind of port -> the variable that has the first of them
_BASES = {"port": "worker_port_base", "bootstrap_port": "bootstrap_port_base", "side_channel_port": "side_channel_port_base"}


def assigned(site: Site, placed: Sequence[Placed], addresses: Mapping[str, str]) -> Dict[str, Dict[str, int]]:
    """Return worker -> its ports by kind; sticky, and never one twice on an address."""
    used: Dict[str, Set[int]] = {}
    router = used.setdefault(addresses[site.router_host], set())
    router |= {site.cluster["router_port"], site.cluster["router_prometheus_port"]}
    result: Dict[str, Dict[str, int]] = {worker.name: {} for worker in placed}
    wanted: List[Tuple[Placed, str, int]] = []
    for worker in placed:
        kinds = {kind: site.cluster[f"{_BASES[kind]}"] for kind in ("port", *site.engine.ports.get(worker.role, ()))}
        kinds["port"] = site.cluster.get(f"{worker.role}_worker_port_base") or kinds["port"]
        if site.may_switch(worker):
            kinds["bootstrap_port"] = site.cluster["bootstrap_port_base"]
        if len(worker.ranks) > 1:
            kinds["dist_init_port"] = site.cluster["dist_init_port_base"]
        kept = _before(site, worker, placed)
        taken = [used.setdefault(addresses[host], set()) for host, _ in worker.ranks]
        for kind, base in kinds.items():
            old = kept["ranks"][0].get(kind) if kept else None
            if (
                old
                and base <= old < base + _PORT_SPAN
                and not any(ports & taken_from(site, worker, kind, old) for ports in taken)
            ):
                result[worker.name][kind] = old
                for ports in taken:
                    ports |= taken_from(site, worker, kind, old)
            else:
                wanted.append((worker, kind, base))
    for worker, kind, base in wanted:
        taken = [used.setdefault(addresses[host], set()) for host, _ in worker.ranks]
        port = next(
            (p for p in range(base, 65536) if not any(ports & taken_from(site, worker, kind, p) for ports in taken)), None
        )
        if port is None:
            raise UserError(f"no port is left from {base} on for {worker.name} on {worker.ranks[0][0]}")
        result[worker.name][kind] = port
        for ports in taken:
            ports |= taken_from(site, worker, kind, port)
    return result


def _before(site: Site, worker: Placed, placed: Sequence[Placed]) -> Optional[Json]:
    """The deployed worker whose ports it keeps: the one of its name on its host, else the one that leaves it its GPUs."""
    kept = site.kept(worker.name)
    if kept is not None and kept["role"] == worker.role and kept["ranks"][0]["host"] == worker.ranks[0][0]:
        return kept
    staying, ranks = {(w.name, w.ranks) for w in placed}, list(worker.ranks)
    for old in site.running():
        if list(old.ranks) == ranks and (old.name, old.ranks) not in staying:
            return site.kept(old.name)
    return None


def taken_from(site: Site, worker: Placed, kind: str, first: int) -> Set[int]:
    """Return the ports that a worker takes from ``first`` on: one, or one for each of its data-parallel replicas."""
    args = site.engine_args(worker.ranks[0][0], worker.role) if kind == "side_channel_port" else {}
    return set(range(first, first + (site.engine.side_channels(args) if args else 1)))
