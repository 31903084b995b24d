"""File trees of hosts with RDMA devices: written from a short description, as the kernel lays them out.

``TREES`` are made after what `ibstat`, `show_gids` and `nvidia-smi topo -m` show of such hosts; the recording of a real device is
tests/data/sysfs-rxe0.json.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

ZERO = "0000:0000:0000:0000:0000:0000:0000:0000"
V1, V2 = "IB/RoCE v1", "RoCE v2"


def mapped(address: str) -> str:
    """The GID of an IPv4 address."""
    a, b, c, d = (int(part) for part in address.split("."))
    return f"0000:0000:0000:0000:0000:ffff:{a:02x}{b:02x}:{c:02x}{d:02x}"


def roce_gids(address: str, netdev: str) -> list[tuple[int, str, str, str]]:
    """The table of a RoCE port as mlx5 fills it: link-local and IPv4, each in version 1 and 2; the right one is 3."""
    local = "fe80:0000:0000:0000:0a94:efff:fe0c:1234"
    return [(0, V1, local, netdev), (1, V2, local, netdev), (2, V1, mapped(address), netdev), (3, V2, mapped(address), netdev)]


IB_GIDS = [(0, V1, "fe80:0000:0000:0000:946d:ae03:00b5:7e00", "")]


@dataclass
class Port:
    """One port; ``gids``: (index, type, GID, netdev)."""

    layer: str = "InfiniBand"
    state: str = "4: ACTIVE"
    phys: str = "5: LinkUp"
    rate: str = "400 Gb/sec (4X NDR)"
    gids: list[tuple[int, str, str, str]] = field(default_factory=lambda: list(IB_GIDS))


@dataclass
class Card:
    """One RDMA device; ``way``: bridges from the host bridge to the PCI function, "" for a device of software."""

    way: str
    ports: list[Port]
    numa: int = 0
    netdevs: tuple[str, ...] = ()
    vf_of: str = ""
    device_id: str = "0x1021"
    mtu: int = 2044
    node_type: str = "1: CA"


@dataclass
class Host:
    """RDMA devices by name; GPUs: the way to each and its NUMA node."""

    cards: dict[str, Card] = field(default_factory=dict)
    gpus: list[tuple[str, int]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))


def _pci(root: Path, way: str, numa: int, vendor: str, kind: str) -> Path:
    function = root / "sys/devices" / way
    function.mkdir(parents=True, exist_ok=True)
    for name, text in (("vendor", vendor), ("class", kind), ("numa_node", str(numa))):
        put(function / name, text)
    link(root / "sys/bus/pci/devices" / function.name, function)
    return function


def write(root: Path, host: Host) -> Path:
    """Write a host's files below ``root`` and return it."""
    (root / "sys").mkdir(parents=True, exist_ok=True)
    for name, card in host.cards.items():
        if card.way:
            function = _pci(root, card.way, card.numa, "0x15b3", "0x020700")
            device = function / "infiniband" / name
            device.mkdir(parents=True)
            link(device / "device", function)
            driver = root / "sys/bus/pci/drivers/mlx5_core"
            driver.mkdir(parents=True, exist_ok=True)
            link(function / "driver", driver)
            put(function / "device", card.device_id)
            if card.vf_of:
                link(function / "physfn", root / "sys/devices" / card.vf_of)
            for number, netdev in enumerate(card.netdevs):
                put(function / "net" / netdev / "dev_port", str(number))
                put(function / "net" / netdev / "mtu", str(card.mtu))
                if not (root / "sys/class/net" / netdev).is_symlink():
                    link(root / "sys/class/net" / netdev, function / "net" / netdev)
        else:
            device = root / "sys/devices/virtual/infiniband" / name
            put(device / "parent", card.netdevs[0])
        put(device / "fw_ver", "28.39.1002")
        put(device / "node_type", card.node_type)
        for number, port in enumerate(card.ports, 1):
            folder = device / "ports" / str(number)
            for file, text in (("state", port.state), ("phys_state", port.phys), ("link_layer", port.layer), ("rate", port.rate)):
                put(folder / file, text)
            put(folder / "gids" / "9", ZERO)
            for index, version, gid, netdev in port.gids:
                put(folder / "gids" / str(index), gid)
                put(folder / "gid_attrs/types" / str(index), version)
                if netdev:
                    put(folder / "gid_attrs/ndevs" / str(index), netdev)
        link(root / "sys/class/infiniband" / name, device)
    for way, numa in host.gpus:
        _pci(root, way, numa, "0x10de", "0x030200")
    for path, text in host.files.items():
        put(root / path, text)
    return root


def _ethernet(address: str, netdev: str, state: str = "4: ACTIVE") -> Port:
    return Port("Ethernet", state, "5: LinkUp", "100 Gb/sec (4X EDR)", roce_gids(address, netdev))


def _dgx() -> Host:
    """Eight GPUs, each behind one switch with its own card, four to a socket; a storage card a socket on its own root port.

    GPU 0 and its card are two switches apart, as behind a baseboard's retimer switch.
    """
    bridges = ("15", "37", "48", "59", "87", "a7", "b7", "c7")
    cards, gpus = {}, []
    for number, bus in enumerate(bridges):
        numa, top = number // 4, f"pci0000:{bus}/0000:{bus}:01.0/0000:{int(bus, 16) + 1:02x}:00.0"
        up = int(bus, 16) + 2
        cards[f"mlx5_{number}"] = Card(f"{top}/0000:{up:02x}:00.0/0000:{up + 1:02x}:00.0", [Port()], numa, (f"ib{number}",))
        more = f"0000:{up:02x}:01.0/0000:{up + 2:02x}:00.0" if number else (
            f"0000:{up:02x}:01.0/0000:{up + 2:02x}:00.0/0000:{up + 3:02x}:00.0/0000:{up + 4:02x}:00.0"
        )  # fmt: skip
        gpus.append((f"{top}/{more}", numa))
    for number, (bus, numa) in enumerate((("0b", 0), ("d7", 1)), 8):
        cards[f"mlx5_{number}"] = Card(f"pci0000:{bus}/0000:{bus}:01.0/0000:{bus[0]}e:00.0", [Port()], numa, (f"ib{number}",))
    return Host(cards, gpus, {"sys/module/nvidia_peermem/refcnt": "0", "proc/sys/kernel/osrelease": "5.15.0-1063-nvidia"})


TREES: dict[str, Host] = {
    "none": Host(files={"proc/sys/kernel/osrelease": "6.1.0-37-amd64"}),
    # a GH200: GPU and card in PCI domains of their own
    "infiniband": Host(
        {"mlx5_0": Card("pci0000:00/0000:00:00.0/0000:01:00.0", [Port()], 0, ("ibp1s0",))},
        [("pci0009:00/0009:00:00.0/0009:01:00.0", 0)],
        {
            "proc/sys/kernel/osrelease": "6.8.0-1021-nvidia-64k",
            "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  570.86.15  Release Build",
        },
    ),
    # four A100s and a RoCE card under the root port beside them
    "roce": Host(
        {
            "mlx5_4": Card(
                "pci0000:40/0000:40:03.1/0000:45:00.0", [_ethernet("192.0.2.99", "ens1f0np0")], 1, ("ens1f0np0",), mtu=9000
            )
        },
        [(f"pci0000:40/0000:40:01.{n}/0000:4{n}:00.0", 1) for n in (1, 2)]
        + [(f"pci0000:80/0000:80:01.{n}/0000:8{n}:00.0", 0) for n in (1, 2)],
        {
            "proc/sys/kernel/osrelease": "5.4.0-200-generic",
            "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 2024",
        },
    ),
    # InfiniBand for GPUs beside RoCE for everything else
    "mixed": Host(
        {
            "mlx5_0": Card("pci0000:17/0000:17:01.0/0000:18:00.0", [Port()], 0, ("ibs1",)),
            "mlx5_1": Card("pci0000:97/0000:97:01.0/0000:98:00.0", [Port()], 1, ("ibs2",)),
            "mlx5_bond_0": Card(
                "pci0000:17/0000:17:03.0/0000:1b:00.0", [_ethernet("192.0.2.17", "bond0")], 0, ("ens9f0", "ens9f1"), mtu=1500
            ),
        }
    ),
    "port-down": Host(
        {
            "mlx5_0": Card("pci0000:17/0000:17:01.0/0000:18:00.0", [Port()]),
            "mlx5_2": Card(
                "pci0000:17/0000:17:02.0/0000:19:00.0", [Port(state="1: DOWN", phys="3: Disabled", rate="10 Gb/sec (4X SDR)")]
            ),
            # one card with two ports: the first is down, the second is the one to use
            "mlx4_0": Card(
                "pci0000:17/0000:17:03.0/0000:1a:00.0",
                [Port(state="1: DOWN", phys="2: Polling", gids=[]), _ethernet("192.0.2.18", "enp26s0d1")],
                0,
                ("enp26s0", "enp26s0d1"),
            ),
        }
    ),
    # one machine's physical function and two virtual ones of it
    "sriov": Host(
        {
            "mlx5_0": Card("pci0000:17/0000:17:01.0/0000:18:00.0", [Port()], 0, ("ibs1",)),
            **{
                f"mlx5_{n}": Card(
                    f"pci0000:17/0000:17:01.0/0000:18:00.{n}", [Port()], vf_of="pci0000:17/0000:17:01.0/0000:18:00.0"
                )
                for n in (1, 2)
            },
        }
    ),
    # a virtual machine with one virtual function: everything hangs from one host bridge, and NUMA is not told
    "vf": Host(
        {
            "mlx5_0": Card(
                "pci0000:00/0000:00:05.0", [_ethernet("192.0.2.21", "eth1")], -1, ("eth1",), device_id="0x101e"
            )
        },
        [("pci0000:00/0000:00:06.0", -1)],
    ),
    "dgx": _dgx(),
}  # fmt: skip
