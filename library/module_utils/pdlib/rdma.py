"""RDMA devices of a host as sysfs shows them, the GID to use, and how far each is from each GPU.

Every function takes the root of a file tree, so that trees of other machines can be read. What the files mean:
Documentation/ABI/stable/sysfs-class-infiniband of the Linux kernel. Nothing here starts a program.
"""

from __future__ import annotations

import os
import re
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

Json = Dict[str, Any]
#: Ways between two PCI devices as `nvidia-smi topo -m` names them, nearest first: at most one switch; several switches; one
#: host bridge; one NUMA node; several.
DISTANCES = ("PIX", "PXB", "PHB", "NODE", "SYS")
_PCI = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f]")
#: PCI vendor NVIDIA; class "display controller" (an NVSwitch is a bridge)
_NVIDIA, _DISPLAY = "0x10de", "0x03"
#: mlx5 virtual functions by PCI device id (drivers/net/ethernet/mellanox/mlx5/core/main.c): inside a virtual machine nothing else
#: tells them from physical ones.
_MLX5_VF = ("0x1014", "0x1016", "0x1018", "0x101a", "0x101c", "0x101e", "0xa2d3")
#: The first kernel whose RDMA devices take GPU memory as a dma-buf (with NVIDIA's open driver).
_DMABUF_KERNEL = (5, 12)


def _text(path: Path) -> str:
    """Return a file's text; "" for one that is not there or, as with an unused GID's type, does not let itself be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _names(folder: Path) -> List[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _number(text: str) -> Optional[int]:
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else None


# -- the PCI tree


def pci_path(device: Path) -> Tuple[str, ...]:
    """Return the way from the host bridge to a device: ``("pci0000:15", "0000:15:01.0", ..., "0000:18:00.0")``; () for none."""
    parts = Path(os.path.realpath(device)).parts
    bridge = next((i for i, part in enumerate(parts) if re.fullmatch(r"pci[0-9a-f]+:[0-9a-f]+", part)), None)
    return tuple(parts[bridge:]) if bridge is not None and _PCI.fullmatch(parts[-1]) else ()


def distance(one: Sequence[str], other: Sequence[str], numa: Sequence[Optional[int]] = (None, None)) -> str:
    """Return one of DISTANCES between two devices by their :func:`pci_path`; ``numa``: their nodes (None or -1: not known)."""
    if one[0] != other[0]:
        known = [node for node in numa if node is not None and node >= 0]
        return "SYS" if len(set(known)) > 1 else "NODE"
    shared = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    if shared == 1:
        return "PHB"
    # Bridges that only one of both is behind: a switch has one for each of its downstream ports.
    apart = max(len(one), len(other)) - shared - 1
    return "PIX" if apart <= 1 else "PXB"


def normal_pci(address: str) -> str:
    """Return a PCI address as sysfs writes it; nvidia-smi has eight digits for the domain, and capitals."""
    domain, _, rest = address.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}" if rest and re.fullmatch(r"[0-9a-f]+", domain) else address


def gpus(root: Path) -> Dict[int, str]:
    """Return NVIDIA GPUs, index -> PCI address, in the order of their addresses, which is nvidia-smi's."""
    bus = root / "sys/bus/pci/devices"
    found = [
        name
        for name in _names(bus)
        if _text(bus / name / "vendor") == _NVIDIA and _text(bus / name / "class").startswith(_DISPLAY)
    ]
    return dict(enumerate(sorted(found, key=lambda name: (int(name.partition(":")[0], 16), name))))


def _to_gpus(root: Path, device: Path, numa: Optional[int], cards: Mapping[int, str]) -> Dict[str, str]:
    own, bus = pci_path(device), root / "sys/bus/pci/devices"
    ways = {index: pci_path(bus / address) for index, address in cards.items()}
    nodes = {index: _number(_text(bus / address / "numa_node")) for index, address in cards.items()}
    # Keys are text: facts travel as JSON.
    return {str(index): distance(own, way, (numa, nodes[index])) for index, way in ways.items() if own and way}


# -- ports and GIDs


def _gids(port: Path) -> List[Json]:
    """Return the GIDs in use: ``index``, ``type`` (``IB/RoCE v1`` or ``RoCE v2``), ``gid``, ``address`` (IPv4 where it is one)."""
    found = []
    for index in sorted((int(name) for name in _names(port / "gids") if name.isdigit())):
        text = _text(port / "gids" / str(index))
        try:
            gid = IPv6Address(text)
        except ValueError:
            continue
        if int(gid):
            found.append(
                {
                    "index": index,
                    "type": _text(port / "gid_attrs/types" / str(index)),
                    "gid": text,
                    "address": str(gid.ipv4_mapped or gid),
                    "netdev": _text(port / "gid_attrs/ndevs" / str(index)),
                }
            )
    return found


def gid_index(gids: Sequence[Mapping[str, Any]], address: str = "") -> Tuple[Optional[int], str]:
    """Return (GID index, reason) for RoCE; (None, why not) where no GID will do.

    RoCE v2 only. In this order: the GID of ``address`` (the host's own), IPv4, routable IPv6, link-local; the lowest index of those.
    """
    second = [entry for entry in gids if "v2" in str(entry["type"]).lower()]
    if not second:
        return None, "no RoCE v2 GID: give its network device an IP address" if gids else "no GID: is its network device up?"

    def rank(entry: Mapping[str, Any]) -> Tuple[int, int]:
        parsed = ip_address(entry["address"])
        kinds = [str(parsed) == address, parsed.version == 4 and not parsed.is_link_local, not parsed.is_link_local, True]
        return kinds.index(True), int(entry["index"])

    best = min(second, key=rank)
    words = ("the host's address", "IPv4", "IPv6, and there is no IPv4", "link-local, and there is nothing routable")
    return int(best["index"]), f"RoCE v2, {best['address']}: {words[rank(best)[0]]}"


def _fabric(layer: str, node: str) -> str:
    """``infiniband``, ``roce``, ``iwarp``, or what the link layer calls itself (EFA: ``unspecified``)."""
    if layer == "Ethernet":
        return "iwarp" if "RNIC" in node else "roce"
    return layer.lower()


def _netdev(root: Path, device: Path, port: int, gids: Sequence[Mapping[str, Any]]) -> str:
    """The network device of a port: what its GIDs name (a bond has no other way), else the PCI function's own, by port."""
    named = [str(entry["netdev"]) for entry in gids if entry["netdev"]]
    # A VLAN has GIDs on the same port; the plain device is the one whose name the others start with.
    if named:
        return min(named, key=len)
    own = _names(device / "device/net")
    of_port = [name for name in own if _number(_text(root / "sys/class/net" / name / "dev_port")) == port - 1]
    return next(iter(of_port or own), _text(device / "parent"))


def ports(root: Path = Path("/"), cards: Optional[Mapping[int, str]] = None) -> List[Json]:
    """Return every port of every RDMA device, in the order of names and ports.

    ``cards``: GPU index -> PCI address; not given: :func:`gpus`. A row: ``device``, ``port``, ``state`` (ACTIVE, INIT, DOWN),
    ``phys_state``, ``link_layer``, ``fabric``, ``rate`` (as the kernel has it), ``rate_gbps``, ``gids``, ``netdev``, ``mtu`` (of
    the netdev, bytes), ``numa``, ``pci``, ``driver``, ``firmware``, ``function`` (pf, vf; "" for software) and ``gpus``
    (index -> one of DISTANCES).
    """
    lent = gpus(root) if cards is None else {index: normal_pci(address) for index, address in cards.items()}
    return [row for name in _names(root / "sys/class/infiniband") for row in _ports_of(root, name, lent)]


def _ports_of(root: Path, name: str, cards: Mapping[int, str]) -> Iterator[Json]:
    device = root / "sys/class/infiniband" / name
    function, node = device / "device", _text(device / "node_type")
    numa = _number(_text(function / "numa_node"))
    own = pci_path(function)
    virtual = (function / "physfn").is_symlink() or _text(function / "device") in _MLX5_VF
    about = {
        "numa": numa,
        "pci": own[-1] if own else "",
        "driver": os.path.basename(os.path.realpath(function / "driver")) if (function / "driver").exists() else "",
        "firmware": _text(device / "fw_ver"),
        "function": "" if not own else "vf" if virtual else "pf",
        "gpus": _to_gpus(root, function, numa, cards),
    }
    for number in sorted(int(port) for port in _names(device / "ports") if port.isdigit()):
        folder = device / "ports" / str(number)
        layer, state = _text(folder / "link_layer"), _text(folder / "state").partition(": ")[2]
        if not layer or not state:
            continue
        gids = _gids(folder)
        rate, netdev = _text(folder / "rate"), _netdev(root, device, number, gids)
        speed = re.match(r"[0-9.]+", rate)
        yield {
            "device": name, "port": number, "state": state, "phys_state": _text(folder / "phys_state").partition(": ")[2],
            "link_layer": layer, "fabric": _fabric(layer, node), "rate": rate, "rate_gbps": float(speed[0]) if speed else 0.0,
            "gids": gids, "netdev": netdev, "mtu": _number(_text(root / "sys/class/net" / netdev / "mtu")) if netdev else None,
            **about,
        }  # fmt: skip


def by_device(rows: Sequence[Json]) -> Dict[str, Json]:
    """Return device -> the row of its first active port (else of its first)."""
    found: Dict[str, Json] = {}
    for row in sorted(rows, key=lambda row: (row["state"] != "ACTIVE", row["port"])):
        found.setdefault(row["device"], row)
    return dict(sorted(found.items()))


def nearest(devices: Mapping[str, Mapping[str, Any]]) -> Dict[int, Tuple[str, ...]]:
    """Return GPU index -> the devices nearest to it (several at one distance); ``devices``: name -> its row."""
    found: Dict[int, Tuple[str, ...]] = {}
    for index in sorted({int(gpu) for row in devices.values() for gpu in row.get("gpus", {})}):
        ways = {name: DISTANCES.index(row["gpus"][str(index)]) for name, row in devices.items() if str(index) in row["gpus"]}
        found[index] = tuple(name for name, way in ways.items() if way == min(ways.values()))
    return found


# -- GPU memory


def peermem(root: Path = Path("/")) -> Json:
    """Return how RDMA devices can reach GPU memory.

    ``module``: the loaded peer memory module ("" for none); ``dmabuf``: kernel (5.12 or newer) and driver (NVIDIA's open one) do
    without it; ``kernel``, ``driver``: their versions ("" without a driver).
    """
    loaded = [name for name in ("nvidia_peermem", "nv_peer_mem") if (root / "sys/module" / name).is_dir()]
    kernel = _text(root / "proc/sys/kernel/osrelease")
    said = _text(root / "proc/driver/nvidia/version")
    version = re.search(r"\s([0-9]{3,}\.[0-9.]+)\s", said + " ")
    major = re.match(r"([0-9]+)\.([0-9]+)", kernel)
    new = major is not None and (int(major[1]), int(major[2])) >= _DMABUF_KERNEL
    return {
        "module": loaded[0] if loaded else "",
        "dmabuf": new and "Open Kernel Module" in said,
        "kernel": kernel,
        "driver": version[1] if version else "",
    }
