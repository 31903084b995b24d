"""RDMA devices from file trees: states, GIDs, distances, GPU memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.sysfs import TREES, V1, V2, Card, Host, Port, mapped, put, roce_gids, write

from pdlib import rdma

Json = dict[str, Any]
REPO = Path(__file__).resolve().parents[2]


def ports(tmp_path: Path, name: str) -> dict[str, Json]:
    return {f"{row['device']}:{row['port']}": row for row in rdma.ports(write(tmp_path, TREES[name]))}


def module(**arguments: str) -> Json:
    """What the module rdma_facts returns in check mode."""
    command = [sys.executable, "-m", "ansible", "adhoc", "localhost", "--check", "-m", "rdma_facts", "-a", json.dumps(arguments)]
    env = {**os.environ, "ANSIBLE_LOAD_CALLBACK_PLUGINS": "1", "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.oneline"}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=False, timeout=60)
    said: Json = json.loads(done.stdout.partition("=> ")[2].splitlines()[0])
    return said


def test_a_host_without_rdma_has_none(tmp_path: Path) -> None:
    assert ports(tmp_path, "none") == {}
    assert rdma.ports(tmp_path / "nothing") == []
    assert rdma.peermem(tmp_path) == {"module": "", "dmabuf": False, "kernel": "6.1.0-37-amd64", "driver": ""}


def test_infiniband(tmp_path: Path) -> None:
    assert ports(tmp_path, "infiniband") == {
        "mlx5_0:1": {
            "device": "mlx5_0", "port": 1, "state": "ACTIVE", "phys_state": "LinkUp", "link_layer": "InfiniBand",
            "fabric": "infiniband", "rate": "400 Gb/sec (4X NDR)", "rate_gbps": 400.0, "netdev": "ibp1s0", "mtu": 2044, "numa": 0,
            "pci": "0000:01:00.0", "driver": "mlx5_core", "firmware": "28.39.1002", "function": "pf", "gpus": {"0": "NODE"},
            "gids": [
                {
                    "index": 0, "type": V1, "gid": "fe80:0000:0000:0000:946d:ae03:00b5:7e00",
                    "address": "fe80::946d:ae03:b5:7e00", "netdev": "",
                }
            ],
        }
    }  # fmt: skip
    assert rdma.peermem(tmp_path) == {"module": "", "dmabuf": True, "kernel": "6.8.0-1021-nvidia-64k", "driver": "570.86.15"}


def test_roce(tmp_path: Path) -> None:
    row = ports(tmp_path, "roce")["mlx5_4:1"]
    assert (row["fabric"], row["link_layer"], row["netdev"], row["mtu"], row["numa"]) == (
        "roce",
        "Ethernet",
        "ens1f0np0",
        9000,
        1,
    )
    assert [(gid["index"], gid["type"]) for gid in row["gids"]] == [(0, V1), (1, V2), (2, V1), (3, V2)], "zero GIDs are left out"
    assert row["gids"][3]["address"] == "192.0.2.99"
    assert row["gpus"] == {"0": "PHB", "1": "PHB", "2": "SYS", "3": "SYS"}
    # Neither the module, nor a kernel or driver that does without.
    assert rdma.peermem(tmp_path) == {"module": "", "dmabuf": False, "kernel": "5.4.0-200-generic", "driver": "535.183.01"}


def test_infiniband_beside_roce(tmp_path: Path) -> None:
    found = ports(tmp_path, "mixed")
    fabrics = {"mlx5_0:1": "infiniband", "mlx5_1:1": "infiniband", "mlx5_bond_0:1": "roce"}
    assert {name: row["fabric"] for name, row in found.items()} == fabrics
    # The PCI function has two network devices, and the GIDs say that the bond over them is meant.
    assert found["mlx5_bond_0:1"]["netdev"] == "bond0"


def test_of_several_ports_the_active_one_counts(tmp_path: Path) -> None:
    found = ports(tmp_path, "port-down")
    assert {name: row["state"] for name, row in found.items()} == {
        "mlx4_0:1": "DOWN", "mlx4_0:2": "ACTIVE", "mlx5_0:1": "ACTIVE", "mlx5_2:1": "DOWN"
    }  # fmt: skip
    assert (found["mlx4_0:1"]["netdev"], found["mlx4_0:2"]["netdev"]) == ("enp26s0", "enp26s0d1")
    best = rdma.by_device(list(found.values()))
    assert {name: (row["port"], row["state"]) for name, row in best.items()} == {
        "mlx4_0": (2, "ACTIVE"), "mlx5_0": (1, "ACTIVE"), "mlx5_2": (1, "DOWN")
    }  # fmt: skip


def test_a_virtual_function_in_a_machine_that_hides_its_tree(tmp_path: Path) -> None:
    row = ports(tmp_path, "vf")["mlx5_0:1"]
    assert (row["function"], row["numa"], row["gpus"]) == ("vf", -1, {"0": "PHB"})


def test_virtual_functions_beside_their_physical_one(tmp_path: Path) -> None:
    found = ports(tmp_path, "sriov")
    assert {name: row["function"] for name, row in found.items()} == {"mlx5_0:1": "pf", "mlx5_1:1": "vf", "mlx5_2:1": "vf"}


def test_eight_gpus_each_have_their_own_card(tmp_path: Path) -> None:
    found = {row["device"]: row for row in ports(tmp_path, "dgx").values()}
    assert found["mlx5_0"]["gpus"] == {"0": "PXB", **dict.fromkeys("123", "NODE"), **dict.fromkeys("4567", "SYS")}
    assert found["mlx5_5"]["gpus"] == {**dict.fromkeys("0123", "SYS"), "4": "NODE", "5": "PIX", "6": "NODE", "7": "NODE"}
    assert set(found["mlx5_8"]["gpus"].values()) == {"NODE", "SYS"}
    assert rdma.nearest(found) == {gpu: (f"mlx5_{gpu}",) for gpu in range(8)}
    # Without its own card a GPU has all those of its socket, the storage card among them.
    del found["mlx5_5"]
    assert rdma.nearest(found)[5] == ("mlx5_4", "mlx5_6", "mlx5_7", "mlx5_9")
    assert rdma.peermem(tmp_path)["module"] == "nvidia_peermem"


def test_gpus_are_numbered_by_address_or_as_nvidia_smi_says(tmp_path: Path) -> None:
    write(tmp_path, TREES["roce"])
    assert rdma.gpus(tmp_path) == {0: "0000:41:00.0", 1: "0000:42:00.0", 2: "0000:81:00.0", 3: "0000:82:00.0"}
    (row,) = rdma.ports(tmp_path, {0: "00000000:82:00.0", 7: "00000000:41:00.0", 8: "00000000:FF:00.0"})
    assert row["gpus"] == {"0": "SYS", "7": "PHB"}


@pytest.mark.parametrize(("layer", "node", "fabric"), [
    ("Ethernet", "4: RNIC", "iwarp"), ("Ethernet", "1: CA", "roce"), ("Unspecified", "7: <unknown>", "unspecified"),
])  # fmt: skip
def test_what_only_looks_like_roce(tmp_path: Path, layer: str, node: str, fabric: str) -> None:
    write(tmp_path, Host({"x0": Card("pci0000:00/0000:00:05.0", [Port(layer)], node_type=node)}))
    assert rdma.ports(tmp_path)[0]["fabric"] == fabric


def test_a_device_without_a_port_or_with_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, Host({"a": Card("pci0000:00/0000:00:05.0", []), "b": Card("pci0000:00/0000:00:06.0", [Port()])}))
    ports_of_b = tmp_path / "sys/class/infiniband/b/ports"
    (ports_of_b / "1" / "gid_attrs/types/0").unlink()
    (ports_of_b / "1" / "gids" / "3").mkdir()
    put(ports_of_b / "1" / "gids" / "4", "not a GID")
    put(ports_of_b / "2" / "state", "4: ACTIVE")
    rows = rdma.ports(tmp_path)
    assert [(row["device"], row["port"], [gid["type"] for gid in row["gids"]]) for row in rows] == [("b", 1, [""])]


def test_a_recorded_device_of_software(tmp_path: Path) -> None:
    """SoftRoCE of Linux 6.1, as tests/lab/test_rdma_vm.py met it."""
    recorded = json.loads((REPO / "tests/data/sysfs-rxe0.json").read_text())
    for path, text in recorded.items():
        if text.startswith("-> "):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).symlink_to(text[3:])
        else:
            put(tmp_path / path, text)
    (row,) = rdma.ports(tmp_path)
    assert (row["device"], row["state"], row["fabric"], row["rate_gbps"]) == ("rxe0", "ACTIVE", "roce", 2.5)
    assert (row["netdev"], row["numa"], row["pci"], row["driver"], row["function"], row["gpus"]) == ("eth0", None, "", "", "", {})
    assert rdma.gid_index(row["gids"], "10.0.0.1") == (1, "RoCE v2, 10.0.0.1: the host's address")


def test_the_module_reads_in_check_mode_and_says_which_gid(tmp_path: Path) -> None:
    root = write(tmp_path, TREES["port-down"])
    said = module(root=str(root), address="192.0.2.18")
    assert {(row["device"], row["port"]): row["gid_index"] for row in said["ports"]} == {
        ("mlx4_0", 1): None, ("mlx4_0", 2): 3, ("mlx5_0", 1): None, ("mlx5_2", 1): None
    }  # fmt: skip
    assert [row["gid_reason"] for row in said["ports"]][:3] == ["not RoCE", "RoCE v2, 192.0.2.18: the host's address", "not RoCE"]
    assert said["changed"] is False
    assert "there is no sys in it" in module(root=str(tmp_path / "sys"))["msg"]


# ---------------------------------------------------------------- GIDs


def gid(index: int, kind: str, address: str) -> Json:
    return {"index": index, "type": kind, "gid": "", "address": address, "netdev": "eth0"}


LOCAL4, LOCAL6 = "169.254.3.4", "fe80::1"


@pytest.mark.parametrize(
    ("gids", "address", "index", "why"),
    [
        ([gid(0, V1, LOCAL6), gid(1, V2, LOCAL6), gid(2, V1, "192.0.2.1"), gid(3, V2, "192.0.2.1")], "", 3, "IPv4"),
        ([gid(3, V2, "192.0.2.1"), gid(5, V2, "198.51.100.1")], "198.51.100.1", 5, "the host's address"),
        ([gid(3, V2, "192.0.2.1"), gid(7, V2, "2001:db8::7")], "2001:db8::7", 7, "the host's address"),
        ([gid(5, V2, "198.51.100.1"), gid(3, V2, "192.0.2.1")], "203.0.113.5", 3, "IPv4"),
        ([gid(1, V2, "2001:db8::1"), gid(4, V2, "192.0.2.1")], "", 4, "IPv4"),
        ([gid(1, V2, LOCAL6), gid(2, V2, LOCAL4), gid(6, V2, "2001:db8::1")], "", 6, "there is no IPv4"),
        ([gid(1, V2, LOCAL6), gid(0, V1, LOCAL6)], "", 1, "nothing routable"),
        ([gid(0, V1, "192.0.2.1")], "192.0.2.1", None, "give its network device an IP address"),
        ([], "192.0.2.1", None, "is its network device up?"),
    ],
)
def test_the_right_gid(gids: list[Json], address: str, index: int | None, why: str) -> None:
    assert rdma.gid_index(gids, address)[0] == index
    assert why in rdma.gid_index(gids, address)[1]


@given(st.lists(st.tuples(st.sampled_from([V1, V2]), st.sampled_from([LOCAL4, LOCAL6, "192.0.2.1", "2001:db8::1", "10.0.0.9"]))))
def test_a_gid_is_version_2_and_never_link_local_where_something_is_routable(table: list[tuple[str, str]]) -> None:
    gids = [gid(index, kind, address) for index, (kind, address) in enumerate(table)]
    found, _ = rdma.gid_index(gids, "10.0.0.9")
    second = [address for kind, address in table if kind == V2]
    assert (found is None) == (not second)
    if found is not None:
        assert table[found][0] == V2
        assert table[found][1] not in (LOCAL4, LOCAL6) or set(second) <= {LOCAL4, LOCAL6}
        assert table[found][1] == "10.0.0.9" or "10.0.0.9" not in second


def test_a_vlan_leaves_the_port_with_its_own_network_device(tmp_path: Path) -> None:
    gids = [(5, V2, mapped("198.51.100.2"), "eth0.100"), *roce_gids("192.0.2.1", "eth0")]
    write(tmp_path, Host({"mlx5_0": Card("pci0000:00/0000:00:05.0", [Port("Ethernet", gids=gids)], netdevs=("eth0",))}))
    assert rdma.ports(tmp_path)[0]["netdev"] == "eth0"


# ---------------------------------------------------------------- distances

ROOT, PORT, UP = "pci0000:15", "0000:15:01.0", "0000:16:00.0"


@pytest.mark.parametrize(
    ("one", "other", "numa", "wanted"),
    [
        ((ROOT, PORT, "a:0"), (ROOT, PORT, "a:1"), (0, 0), "PIX"),
        ((ROOT, PORT, UP, "d1", "nic"), (ROOT, PORT, UP, "d2", "gpu"), (0, 0), "PIX"),
        ((ROOT, PORT, UP, "d1", "nic"), (ROOT, PORT, UP, "d2", "u2", "d3", "gpu"), (0, 0), "PXB"),
        ((ROOT, PORT, "nic"), (ROOT, "0000:15:02.0", "gpu"), (0, 0), "PHB"),
        ((ROOT, "nic"), (ROOT, "gpu"), (-1, -1), "PHB"),
        ((ROOT, PORT, "nic"), ("pci0000:37", "p", "gpu"), (0, 0), "NODE"),
        ((ROOT, PORT, "nic"), ("pci0000:37", "p", "gpu"), (0, 1), "SYS"),
        ((ROOT, PORT, "nic"), ("pci0000:37", "p", "gpu"), (-1, 1), "NODE"),
        ((ROOT, PORT, "nic"), ("pci0000:37", "p", "gpu"), (None, None), "NODE"),
    ],
)
def test_distances(one: tuple[str, ...], other: tuple[str, ...], numa: tuple[int | None, ...], wanted: str) -> None:
    assert rdma.distance(one, other, numa) == wanted
    assert rdma.distance(other, one, numa[::-1]) == wanted


def test_pci_addresses_are_written_as_sysfs_does() -> None:
    assert rdma.normal_pci("00000000:1B:00.0") == "0000:1b:00.0"
    assert rdma.normal_pci("00000009:01:00.0") == "0009:01:00.0"
    assert rdma.normal_pci("10000:01:00.0") == "10000:01:00.0"
    assert rdma.normal_pci("[N/A]") == "[N/A]"
