"""Which transfer engine moves the KV cache, over which devices, and why. Pure: facts and settings in, values with reasons out.

Sources of the variables' forms: SGLang's ``parse_ib_device_config``; UCX's UCX_NET_DEVICES; NCCL's and NVSHMEM's lists of
environment variables (``=`` before NCCL's list keeps mlx5_1 from meaning mlx5_10, too); Mooncake's ``MC_*`` take one value for
all devices of a process.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from . import rdma
from .errors import UserError, did_you_mean, listing

#: What an RDMA path can run over, as rdma_fabric names it.
FABRICS = ("infiniband", "roce")
IB_DEVICE = "--disaggregation-ib-device"
#: Settings beside which a GID index stands on RoCE.
_TAKES_GID = (IB_DEVICE, "NVSHMEM_HCA_LIST", "NCCL_IB_HCA")


@dataclass(frozen=True)
class Link:
    """A host's end of the KV path.

    ``fabric``: ``infiniband``, ``roce``, ``none``, or ``auto`` = not known. ``devices``: those that may be used, the mask;
    ``masked``: devices of the host that may not. ``ports``: device -> port. ``gid_index``: the one for all devices, None where
    none is needed or no single one will do. ``tcp_device``: the network device of TCP. ``nearest``: GPU -> its nearest devices.
    ``reasons``: ``rdma_devices``, ``tcp_device``, ``gid_index`` -> why.
    """

    fabric: str
    devices: Tuple[str, ...]
    masked: Tuple[str, ...] = ()
    ports: Mapping[str, int] = field(default_factory=dict)
    gid_index: Optional[int] = None
    tcp_device: Optional[str] = None
    nearest: Mapping[int, Tuple[str, ...]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def with_ports(self) -> List[str]:
        """Return ``mlx5_0:1`` for every device."""
        return [f"{device}:{self.ports.get(device, 1)}" for device in self.devices]

    def to_json(self) -> Dict[str, Any]:
        """Return what a deployed plan keeps, so that a host can be left alone later."""
        return {
            "fabric": self.fabric,
            "devices": list(self.devices),
            "masked": list(self.masked),
            "ports": dict(self.ports),
            "gid_index": self.gid_index,
            "tcp_device": self.tcp_device,
            "nearest": {str(gpu): list(devices) for gpu, devices in self.nearest.items()},
            "reasons": dict(self.reasons),
        }

    @classmethod
    def of_json(cls, kept: Mapping[str, Any]) -> Link:
        """Return what :meth:`to_json` kept; what a newer version kept beside it is left out."""
        nearest = {int(gpu): tuple(devices) for gpu, devices in kept["nearest"].items()}
        known = {field.name: kept[field.name] for field in fields(cls) if field.name in kept}
        return cls(**{**known, "devices": tuple(kept["devices"]), "masked": tuple(kept["masked"]), "nearest": nearest})


# -- a host's end


def link_of(
    host: str, wanted: Mapping[str, Any], facts: Mapping[str, Any], deployed: Mapping[str, Any], address: str, needed: bool
) -> Link:
    """Return a host's end of the KV path from what is declared (``wanted``) and what the host has (``facts``, {} = not asked).

    ``deployed``: the host's entry in the deployed plan, which stands for facts of a host that was not asked; ``needed``: whether
    something would use RDMA there. Raises UserError for a device that is masked, missing, down or on another fabric.
    """
    declared, excluded = wanted["rdma_devices"], wanted["rdma_devices_excluded"]
    both = [device for device in declared or [] if device in excluded]
    if both:
        raise UserError(f"host {host}: {listing(both)} stands in rdma_devices and in rdma_devices_excluded")
    tcp, tcp_reason = _tcp_device(host, wanted["tcp_device"], facts.get("netdevs"), address)
    cards = facts.get("rdma")
    if cards is None:
        kept = deployed.get("link")
        if kept and _agrees(kept, wanted):
            return Link.of_json(kept)
        fabric = wanted["rdma_fabric"]
        if declared is None and needed and (fabric in FABRICS or (fabric == "auto" and excluded)):
            what = f"rdma_fabric is {fabric}" if fabric in FABRICS else f"rdma_devices_excluded masks {listing(excluded)}"
            raise UserError(
                f"host {host}: {what}, and rdma_devices is not declared: list the devices (deploy_pd.yml finds them on the host)"
            )
        usable = () if fabric == "none" else tuple(declared or ())
        gid = wanted["rdma_gid_index"] if fabric != "infiniband" else None
        gid_reason = "set by rdma_gid_index" if gid is not None else "looked for at deploy" if fabric == "roce" else ""
        reasons = {"rdma_devices": "set by rdma_devices", "tcp_device": tcp_reason, "gid_index": gid_reason}
        return Link(fabric, usable, tuple(excluded), {}, gid, tcp, {}, reasons)
    fabric, devices, reason = _choose_devices(host, wanted, cards)
    rows = {device: cards[device] for device in devices}
    gid, gid_reason = _gid_index(host, wanted["rdma_gid_index"], rows, address) if fabric == "roce" else (None, "")
    return Link(
        fabric=fabric,
        devices=tuple(devices),
        masked=tuple(sorted({*cards, *excluded} - set(devices))),
        ports={device: int(row["port"]) for device, row in rows.items()},
        gid_index=gid,
        tcp_device=tcp,
        nearest=rdma.nearest(rows),
        reasons={"rdma_devices": reason, "tcp_device": tcp_reason, "gid_index": gid_reason},
    )


def _agrees(kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a deployed link is still what is declared."""
    same = [
        wanted["rdma_fabric"] in ("auto", kept["fabric"]),
        wanted["rdma_devices"] is None or list(wanted["rdma_devices"]) == list(kept["devices"]),
        wanted["tcp_device"] in (None, kept.get("tcp_device")),
        wanted["rdma_gid_index"] in (None, kept.get("gid_index")),
    ]
    return all(same) and not set(wanted["rdma_devices_excluded"]) & set(kept["devices"])


def _seen(cards: Mapping[str, Any]) -> str:
    rows = (f"{name} ({row['state'].lower()}, {row['fabric']})" for name, row in sorted(cards.items()))
    return listing(rows) or "no RDMA device"


def _choose_devices(host: str, wanted: Mapping[str, Any], cards: Mapping[str, Any]) -> Tuple[str, List[str], str]:
    """Return (fabric, devices, reason) of a host that was asked."""
    fabric, declared, excluded = wanted["rdma_fabric"], wanted["rdma_devices"], wanted["rdma_devices_excluded"]
    if fabric == "none":
        # Declared so: whatever cards the host has, the KV cache is not to use them.
        return "none", [], "rdma_fabric is none"
    unknown = [device for device in excluded if device not in cards]
    if unknown and cards:
        hint = did_you_mean(unknown[0], cards)
        raise UserError(f"host {host}: rdma_devices_excluded names {listing(unknown)}; the host has {_seen(cards)}{hint}")
    if declared is not None:
        wrong = [device for device in declared if device not in cards or cards[device]["state"] != "ACTIVE"]
        if wrong:
            raise UserError(f"host {host}: rdma_devices names {listing(wrong)}; the host has {_seen(cards)}")
        kinds = sorted({cards[device]["fabric"] for device in declared})
        if fabric != "auto" and any(kind != fabric for kind in kinds):
            on = listing(f"{device} is {cards[device]['fabric']}" for device in declared if cards[device]["fabric"] != fabric)
            raise UserError(f"host {host}: rdma_fabric={fabric}, and of rdma_devices {on}")
        if len(kinds) > 1:
            on = listing(f"{device} ({cards[device]['fabric']})" for device in declared)
            raise UserError(f"host {host}: rdma_devices names {on}: take those of one fabric")
        return (kinds[0] if kinds else "none"), list(declared), "set by rdma_devices"
    active = {name: row for name, row in cards.items() if row["state"] == "ACTIVE" and name not in excluded}
    kinds = sorted({row["fabric"] for row in active.values()} & set(FABRICS))
    if fabric != "auto" and fabric not in kinds:
        if not kinds:
            raise UserError(f"host {host}: rdma_fabric={fabric}, and no device is usable; the host has {_seen(cards)}")
        raise UserError(f"host {host}: rdma_fabric={fabric}, and its devices are on {listing(kinds)}")
    if not kinds:
        return "none", [], _left_out(cards, [], excluded) or "the host has no RDMA device"
    speed = {kind: sum(float(row.get("rate_gbps", 0)) for row in active.values() if row["fabric"] == kind) for kind in kinds}
    chosen = fabric if fabric != "auto" else max(kinds, key=lambda kind: (speed[kind], kind == "infiniband"))
    devices = sorted((name for name, row in active.items() if row["fabric"] == chosen), key=_natural)
    reason = f"all active {chosen} devices"
    if len(kinds) > 1 and fabric == "auto":
        reason += f", faster together than {listing(f'{kind} ({speed[kind]:.0f} Gb/s)' for kind in kinds if kind != chosen)}"
    left = _left_out(cards, devices, excluded)
    return chosen, devices, f"{reason}; {left}" if left else reason


def _natural(name: str) -> List[Any]:
    """Sort mlx5_2 before mlx5_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def _left_out(cards: Mapping[str, Any], devices: Sequence[str], excluded: Sequence[str]) -> str:
    """Say why devices of the host are not used, those of one reason together."""
    why: Dict[str, List[str]] = {}
    for name in sorted(set(cards) - set(devices), key=_natural):
        state = cards[name]["state"]
        reason = "masked" if name in excluded else state.lower() if state != "ACTIVE" else str(cards[name]["fabric"])
        why.setdefault(reason, []).append(name)
    return "; ".join(f"{listing(names)} {'is' if len(names) == 1 else 'are'} {reason}" for reason, names in why.items())


def _tcp_device(
    host: str, declared: Optional[str], netdevs: Optional[Mapping[str, str]], address: str
) -> Tuple[Optional[str], str]:
    """Return (network device of TCP, reason); ``netdevs``: address -> network device, None where the host was not asked."""
    if declared is not None:
        missing = [name for name in declared.split(",") if netdevs is not None and name not in netdevs.values()]
        if missing:
            seen = listing(f"{name} ({ip})" for ip, name in netdevs.items()) if netdevs else "none with an address"
            raise UserError(f"host {host}: tcp_device={declared}, and the host has no {listing(missing)} with an address: {seen}")
        return declared, "set by tcp_device"
    if netdevs is None:
        return None, ""
    found = netdevs.get(address) or ("lo" if address.startswith("127.") else None)
    return found, f"has address {address}" if found else ""


def _gid_index(host: str, declared: Optional[int], rows: Mapping[str, Any], address: str) -> Tuple[Optional[int], str]:
    """Return (GID index for all devices of a RoCE host, reason)."""
    if declared is not None:
        for name, row in rows.items():
            second = [entry["index"] for entry in row.get("gids", []) if "v2" in str(entry["type"]).lower()]
            if declared not in second:
                there = f"RoCE v2 at {listing(map(str, second))}" if second else "no RoCE v2 GID"
                raise UserError(f"host {host}: rdma_gid_index={declared}, and {name} has {there}")
        return declared, "set by rdma_gid_index"
    found = {name: rdma.gid_index(row.get("gids", []), address) for name, row in rows.items()}
    indices = {index for index, _ in found.values()}
    if len(indices) == 1:
        return next(iter(found.values()))
    each = listing(f"{name} has {'none' if index is None else index}" for name, (index, _) in found.items())
    return None, f"{each}: no single one fits, so each library picks its own"


# -- between hosts


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


# -- what a worker is told


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
