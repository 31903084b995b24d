"""Which transfer engine moves the KV cache, over what, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Sequence, Tuple

from .errors import UserError, did_you_mean, listing


@dataclass(frozen=True)
class Link:
    """A host's end of the KV path: fabric (``infiniband``, ``roce``, ``none``, ``auto`` = not known) and its devices."""

    fabric: str
    devices: Tuple[str, ...]


def choose_backend(
    wanted: str, available: Sequence[str], pairs: Sequence[Tuple[str, str]], links: Mapping[str, Link]
) -> Tuple[str, str]:
    """Return (transfer backend, reason).

    ``pairs``: (prefill host, decode host) of every prefill-decode pair; ``links``: host -> its link. Raises UserError for a
    backend that the engine has not, and for ``auto`` where a fabric that decides is not known.
    """
    if wanted != "auto":
        if wanted not in available:
            choices = ["auto", *available]
            raise UserError(f"transfer_backend={wanted!r}: one of {', '.join(choices)}{did_you_mean(wanted, choices)}")
        return wanted, "set by transfer_backend"
    if not pairs:
        return "none", "aggregated workers move no KV cache"
    if all(prefill == decode for prefill, decode in pairs):
        return "nixl", "every prefill-decode pair is on one host: NVLink (cuda_ipc)"
    hosts = sorted({host for pair in pairs for host in pair})
    unknown = [host for host in hosts if links[host].fabric == "auto"]
    if unknown:
        raise UserError(
            f"rdma_fabric is not declared for {listing(unknown)}: set it (infiniband, roce or none) in host_vars, "
            "or set transfer_backend; deploy_pd.yml finds it on the hosts"
        )
    fabrics = {links[host].fabric for host in hosts}
    if fabrics == {"none"}:
        return "nixl", "no RDMA fabric: TCP"
    if len(fabrics) == 1 and all(links[host].devices for host in hosts):
        best = "mooncake" if "mooncake" in available else "nixl"
        return best, f"all hosts are on one RDMA fabric ({fabrics.pop()})"
    if len(fabrics) == 1:
        without = [host for host in hosts if not links[host].devices]
        return "nixl", f"no usable RDMA device on {listing(without)}: TCP"
    by_fabric = listing(f"{host} is {links[host].fabric}" for host in hosts)
    return "nixl", f"{by_fabric}: no common RDMA path, so TCP"


def expected_transport(backend: str, prefill: str, decode: str, links: Mapping[str, Link], on_cpu: bool) -> str:
    """Return how a pair's KV cache should travel: ``cuda_ipc``, ``rdma`` or ``tcp``."""
    if backend == "mooncake_tcp" or on_cpu:
        return "tcp"
    one, other = links[prefill], links[decode]
    rdma = one.fabric == other.fabric != "none" and bool(one.devices) and bool(other.devices)
    if backend == "nixl" and prefill == decode:
        return "cuda_ipc"
    return "rdma" if rdma else "tcp"
