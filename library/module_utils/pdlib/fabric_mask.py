"""What a worker is told of its host's RDMA mask: flags and environment variables, each with its reason. Pure.

Sources of the variables' forms: SGLang's ``parse_ib_device_config``; UCX's UCX_NET_DEVICES; NCCL's and NVSHMEM's lists of
environment variables (``=`` before NCCL's list keeps mlx5_1 from meaning mlx5_10, too); Mooncake's ``MC_*`` take one value for
all devices of a process.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Sequence, Set

from .errors import UserError, listing
from .fabric import Link

IB_DEVICE = "--disaggregation-ib-device"
#: Settings beside which a GID index stands on RoCE.
_TAKES_GID = (IB_DEVICE, "NVSHMEM_HCA_LIST", "NCCL_IB_HCA")


@dataclass(frozen=True)
class Setting:
    """A flag (``--...``) or environment variable that a mask gives a worker, and why."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Use:
    """What a rank needs of its host's link.

    ``backend``: ``none`` for an aggregated worker; ``gpus``: the host's indices, in the order in which the worker sees them;
    ``nodes``: hosts of the worker; ``nvshmem``: expert parallelism over NVSHMEM; ``per_gpu``: a device map instead of a list;
    ``force_tcp``: Mooncake without RDMA; ``own``: what the user set in the worker's environment, which wins; ``excluded``: devices
    that even this may not name.
    """

    backend: str
    gpus: Sequence[int] = ()
    nodes: int = 1
    nvshmem: bool = False
    per_gpu: bool = False
    force_tcp: bool = False
    own: Mapping[str, str] = field(default_factory=dict)
    excluded: Sequence[str] = ()


def settings_for(host: str, link: Link, use: Use) -> List[Setting]:
    """Return everything that a mask means for one rank. Raises UserError where NIXL has no TCP device to be told of."""
    masked = f"; without {listing(link.masked)}" if link.masked else ""
    mask, gid = f"rdma_devices{masked}", link.gid_index
    found: List[Setting] = []
    if use.backend == "nixl" and (link.devices or link.masked or link.reasons.get("tcp_device") == "set by tcp_device"):
        if "UCX_NET_DEVICES" not in use.own and link.tcp_device is None:
            raise UserError(
                f"host {host}: tcp_device is not declared, and NIXL must be told the network device that has the host's address "
                f"beside its RDMA devices (an HCA alone leaves UCX no TCP device); deploy_pd.yml finds it where the host has `ip`"
            )
        why = "RDMA ports and the TCP device, without which UCX has none" if link.devices else f"TCP only{masked}"
        found.append(Setting("UCX_NET_DEVICES", ",".join([*link.with_ports(), link.tcp_device or ""]), why))
        # UCX finds an index of each device by itself; one that was set by hand holds for it, too.
        if gid is not None and link.devices and link.reasons.get("gid_index") == "set by rdma_gid_index":
            found.append(Setting("UCX_IB_GID_INDEX", str(gid), "set by rdma_gid_index"))
    if use.backend == "mooncake" and use.force_tcp:
        found.append(Setting("MC_FORCE_TCP", "1", "a pair has no common RDMA path, and Mooncake uses one transport for all"))
    elif use.backend == "mooncake" and link.devices:
        found.append(_ib_device(link, use, mask))
        if gid is not None:
            found.append(Setting("MC_GID_INDEX", str(gid), link.reasons.get("gid_index", "")))
        other = {link.ports.get(device, 1) for device in link.devices}
        if len(other) == 1 and other != {1}:
            found.append(Setting("MC_IB_PORT", str(other.pop()), "the port that is active"))
    if use.nvshmem and link.devices:
        plain = [name if link.ports.get(name, 1) == 1 else f"{name}:{link.ports[name]}" for name in link.devices]
        found.append(Setting("NVSHMEM_HCA_LIST", ",".join(plain), f"expert parallelism: {mask}"))
        if gid is not None:
            found.append(Setting("NVSHMEM_IB_GID_INDEX", str(gid), link.reasons.get("gid_index", "")))
    # NCCL opens every card that it is not kept from, also where all its GPUs are in one host.
    nccl = f"{use.nodes} hosts a worker" if use.nodes > 1 else f"{len(use.gpus)} GPUs a worker" if len(use.gpus) > 1 else ""
    if nccl and link.devices:
        found.append(Setting("NCCL_IB_HCA", "=" + ",".join(link.with_ports()), f"{nccl}: {mask}"))
        if gid is not None and use.nodes > 1:
            found.append(Setting("NCCL_IB_GID_INDEX", str(gid), link.reasons.get("gid_index", "")))
    elif nccl and link.masked:
        found.append(Setting("NCCL_IB_DISABLE", "1", f"{nccl}{masked}, and none is left"))
    _check_own(host, use)
    return [Setting(s.name, use.own[s.name], "set by engine_env") if s.name in use.own else s for s in found]


def _ib_device(link: Link, use: Use, mask: str) -> Setting:
    """The devices as SGLang takes them: one list, or a map from the GPU that the worker sees to its own list."""
    shared = ",".join(link.devices)
    if not use.per_gpu:
        return Setting(IB_DEVICE, shared, mask)
    if not set(use.gpus) <= set(link.nearest):
        return Setting(IB_DEVICE, shared, f"{mask} (rdma_device_per_gpu: how near they are is found at deploy, on GPU hosts)")
    near = {str(seen): ",".join(link.nearest[gpu]) for seen, gpu in enumerate(use.gpus)}
    return Setting(IB_DEVICE, json.dumps(near, separators=(",", ":")), f"nearest of {mask}, by the GPU that the worker sees")


def _check_own(host: str, use: Use) -> None:
    """Refuse a masked device in what the user set by hand."""
    for name in ("UCX_NET_DEVICES", "NVSHMEM_HCA_LIST", "NCCL_IB_HCA"):
        value = use.own.get(name, "")
        named: Set[str] = set() if value.startswith("^") else {item.split(":")[0] for item in value.lstrip("=").split(",")}
        # NCCL takes a name for every device that begins with it, unless "=" stands before the list.
        prefix = name == "NCCL_IB_HCA" and not value.startswith(("=", "^"))
        wrong = [
            device
            for device in use.excluded
            if device in named
            or (name == "UCX_NET_DEVICES" and "all" in named)
            or (prefix and any(item and device.startswith(item) for item in named))
        ]
        if wrong:
            raise UserError(
                f"host {host}: engine_env sets {name}={value}, and rdma_devices_excluded masks {listing(wrong)}: "
                f"leave {name} out, it is made from rdma_devices"
            )


def shown(link: Link, settings: Sequence[Setting]) -> List[Dict[str, str]]:
    """Return the rows that a plan shows of a host: the mask, what follows from it, and why (``setting``, ``value``, ``reason``)."""
    if not settings and not link.devices:
        return []
    rows = [("rdma_devices", ",".join(link.devices) or "none", link.reasons.get("rdma_devices", ""))]
    if any(setting.name == "UCX_NET_DEVICES" for setting in settings) and link.tcp_device:
        rows.append(("tcp_device", link.tcp_device, link.reasons.get("tcp_device", "")))
    if link.gid_index is None and link.reasons.get("gid_index") and any(s.name.startswith(_TAKES_GID) for s in settings):
        rows.append(("rdma_gid_index", "none", link.reasons["gid_index"]))
    rows += [(setting.name, setting.value, setting.reason) for setting in settings]
    return [{"setting": name, "value": value, "reason": reason} for name, value, reason in dict.fromkeys(rows)]
