"""A host's end of the KV path: its fabric, the devices that may be used there, and why. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from . import rdma
from .errors import UserError, did_you_mean, listing

#: What an RDMA path can run over, as rdma_fabric names it.
FABRICS = ("infiniband", "roce")


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
