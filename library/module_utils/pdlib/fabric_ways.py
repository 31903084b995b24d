"""Which transfer engine moves the KV cache between hosts, and how each pair's should travel. Pure."""

from __future__ import annotations

from typing import Mapping, Optional, Sequence, Tuple

from .errors import UserError, did_you_mean, listing
from .fabric import Link


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


def _common_rdma(one: Link, other: Link) -> bool:
    return one.fabric == other.fabric != "none" and bool(one.devices) and bool(other.devices)


def over_nvlink(backend: str, prefill: str, decode: str, env: Mapping[str, str]) -> bool:
    """Whether Mooncake was told to use NVLink, in a host or between hosts (it asks only whether the variable is there)."""
    return backend == "mooncake" and ("MC_FORCE_MNNVL" in env or (prefill == decode and "MC_INTRANODE_NVLINK" in env))


def forces_tcp(
    backend: str, pairs: Sequence[Tuple[str, str]], links: Mapping[str, Link], envs: Sequence[Mapping[str, str]] = ()
) -> bool:
    """Whether Mooncake must be told to use TCP: it speaks one transport to all peers, and some pair has no other.

    Never where a fabric is not known. ``envs``: of each pair's prefill worker.
    """
    known = all(links[host].fabric != "auto" for pair in pairs for host in pair)
    own = envs or [{} for _ in pairs]
    ways = [expected_transport(backend, *pair, links, False, env) for pair, env in zip(pairs, own)]
    return backend == "mooncake" and known and "tcp" in ways


def expected_transport(
    backend: str, prefill: str, decode: str, links: Mapping[str, Link], on_cpu: bool, env: Optional[Mapping[str, str]] = None
) -> str:
    """Return how a pair's KV cache should travel: ``cuda_ipc``, ``rdma``, ``tcp``, or between NPUs ``hccs``.

    ``env``: the prefill worker's environment as the user has it. Ascend's engine (memfabric) moves by SDMA over HCCS unless
    ASCEND_MF_TRANSFER_PROTOCOL says ``device_rdma``; Mooncake's Ascend transport takes HCCS, too.
    """
    env = env or {}
    if backend == "ascend":
        return "rdma" if env.get("ASCEND_MF_TRANSFER_PROTOCOL", "").strip().lower() == "device_rdma" else "hccs"
    if backend == "mooncake" and env.get("ENABLE_ASCEND_TRANSFER_WITH_MOONCAKE", "").lower() in ("1", "true", "yes", "y"):
        return "hccs"
    if backend == "mooncake_tcp" or on_cpu:
        return "tcp"
    ucx = env.get("SGLANG_DISAGGREGATION_NIXL_BACKEND", "UCX") == "UCX"
    if (backend == "nixl" and ucx and prefill == decode) or over_nvlink(backend, prefill, decode, env):
        return "cuda_ipc"
    if backend == "mooncake" and env.get("MOONCAKE_PROTOCOL", "rdma") != "rdma":
        # EFA is RDMA by a protocol of its own, which our facts know no fabric of.
        return "rdma" if env["MOONCAKE_PROTOCOL"] == "efa" else "tcp"
    return "rdma" if _common_rdma(links[prefill], links[decode]) else "tcp"
