"""One mask, everything derived: devices of a host, what workers are told of them, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.plans import Json, host, inputs, make_plan, plan, write_flag_tables
from unit.sysfs import TREES, write

from pdlib import flags, rdma, tables, units
from pdlib.errors import UserError
from pdlib.fabric import Link, link_of
from pdlib.fabric_mask import IB_DEVICE, Use, settings_for, shown
from pdlib.plan import Planner


@pytest.fixture(autouse=True, scope="module")
def _small_flag_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("flags")
    write_flag_tables(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "_FOLDER", folder)
        yield


NOTHING: Json = {
    "rdma_fabric": "auto", "rdma_devices": None, "rdma_devices_excluded": [], "rdma_device_per_gpu": False,
    "rdma_gid_index": None, "tcp_device": None,
}  # fmt: skip
ADDRESS = "192.0.2.7"
NETDEVS = {"127.0.0.1": "lo", ADDRESS: "eth0"}


def card(fabric: str = "infiniband", state: str = "ACTIVE", port: int = 1, rate: float = 400.0, gid: int = 3, **own: Any) -> Json:
    gids = [{"index": gid, "type": "RoCE v2", "address": ADDRESS}] if fabric == "roce" and gid >= 0 else []
    return {"fabric": fabric, "state": state, "port": port, "rate_gbps": rate, "gids": gids, "gpus": {}, **own}


def link(cards: Json | None, deployed: Json | None = None, needed: bool = True, **wanted: Any) -> Link:
    """The link of host n1; ``cards`` None: nobody asked it."""
    facts = {} if cards is None else {"rdma": cards, "netdevs": NETDEVS}
    return link_of("n1", {**NOTHING, **wanted}, facts, deployed or {}, ADDRESS, needed)


IB, ROCE = card(), card("roce", rate=100)
CARDS = {"mlx5_0": IB, "mlx5_1": card(), "mlx5_2": card(), "mlx5_10": card(), "mlx5_3": card(state="DOWN"), "mlx5_4": ROCE}


# ---------------------------------------------------------------- what a host's devices are


def test_what_is_proposed_comes_with_its_reason() -> None:
    found = link(CARDS, rdma_devices_excluded=["mlx5_2"])
    assert (found.fabric, found.devices) == ("infiniband", ("mlx5_0", "mlx5_1", "mlx5_10"))
    assert found.masked == ("mlx5_2", "mlx5_3", "mlx5_4")
    assert found.reasons["rdma_devices"] == (
        "all active infiniband devices, faster together than roce (100 Gb/s); mlx5_2 is masked; mlx5_3 is down; mlx5_4 is roce"
    )
    assert (found.tcp_device, found.reasons["tcp_device"]) == ("eth0", "has address 192.0.2.7")


def test_the_faster_fabric_is_proposed_and_a_declared_one_wins() -> None:
    two = {"mlx5_0": card(rate=100), "mlx5_4": card("roce", rate=400)}
    assert (link(two).fabric, link(two).devices) == ("roce", ("mlx5_4",))
    assert link(two, rdma_fabric="infiniband").devices == ("mlx5_0",)
    assert link({"mlx5_0": card(rate=100), "mlx5_4": card("roce", rate=100)}).fabric == "infiniband"
    assert link({"mlx5_0": IB, "efa_0": card("unspecified")}).devices == ("mlx5_0",)


@pytest.mark.parametrize("cards", [{}, {"mlx5_0": card(state="DOWN")}, {"mlx5_1": IB}, {"efa_0": card("unspecified")}])
def test_a_host_without_a_usable_device_has_no_fabric(cards: Json) -> None:
    found = link(cards, rdma_devices_excluded=["mlx5_1"] if "mlx5_1" in cards else [])
    assert (found.fabric, found.devices, set(found.masked)) == ("none", (), set(cards))
    assert found.reasons["rdma_devices"]


def test_a_fabric_declared_none_masks_all_cards() -> None:
    found = link(CARDS, rdma_fabric="none", rdma_devices=["mlx5_0"])
    assert (found.fabric, found.devices, set(found.masked)) == ("none", (), set(CARDS))


@pytest.mark.parametrize(
    ("wanted", "parts"),
    [
        ({"rdma_devices": ["mlx5_2"], "rdma_devices_excluded": ["mlx5_2"]}, ["mlx5_2 stands in rdma_devices and in"]),
        ({"rdma_devices": ["mlx5_0", "mlx5_9"]}, ["rdma_devices names mlx5_9; the host has mlx5_0 (active, infiniband)"]),
        ({"rdma_devices": ["mlx5_3"]}, ["rdma_devices names mlx5_3", "mlx5_3 (down, infiniband)"]),
        ({"rdma_devices": ["mlx5_0", "mlx5_4"]}, ["rdma_devices names mlx5_0 (infiniband) and mlx5_4 (roce)", "one fabric"]),
        (
            {"rdma_devices": ["mlx5_4"], "rdma_fabric": "infiniband"},
            ["rdma_fabric=infiniband, and of rdma_devices mlx5_4 is roce"],
        ),
        ({"rdma_devices_excluded": ["mlx_2"]}, ["rdma_devices_excluded names mlx_2; the host has", "did you mean mlx5_2?"]),
        ({"rdma_devices_excluded": ["mlx5_4"], "rdma_fabric": "roce"}, ["rdma_fabric=roce, and its devices are on infiniband"]),
        ({"tcp_device": "eth7"}, ["tcp_device=eth7, and the host has no eth7", "eth0 (192.0.2.7)"]),
        ({"rdma_fabric": "roce", "rdma_gid_index": 5}, ["rdma_gid_index=5, and mlx5_4 has RoCE v2 at 3"]),
    ],
)
def test_what_cannot_be_is_refused_by_name(wanted: Json, parts: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        link(CARDS, **wanted)
    for part in ["host n1: ", *parts]:
        assert part in str(refused.value)


def test_a_fabric_without_a_usable_device_is_refused() -> None:
    with pytest.raises(UserError, match=r"rdma_fabric=roce, and no device is usable; the host has mlx5_4 \(down, roce\)"):
        link({"mlx5_4": card("roce", state="DOWN")}, rdma_fabric="roce")
    with pytest.raises(UserError, match=r"rdma_gid_index=3, and mlx5_4 has no RoCE v2 GID"):
        link({"mlx5_4": card("roce", gid=-1)}, rdma_gid_index=3)


def test_one_gid_index_for_all_devices_or_none() -> None:
    same = link({"mlx5_0": ROCE, "mlx5_1": card("roce")})
    assert (same.gid_index, same.reasons["gid_index"]) == (3, "RoCE v2, 192.0.2.7: the host's address")
    other = link({"mlx5_0": ROCE, "mlx5_1": card("roce", gid=5), "mlx5_2": card("roce", gid=-1)})
    assert other.gid_index is None
    assert other.reasons["gid_index"].startswith("mlx5_0 has 3, mlx5_1 has 5 and mlx5_2 has none: no single one fits")
    assert link({"mlx5_0": IB}).gid_index is None
    assert link({"mlx5_0": ROCE}, rdma_gid_index=3).reasons["gid_index"] == "set by rdma_gid_index"


def test_the_network_device_is_the_one_of_the_address() -> None:
    for address, wanted in ((ADDRESS, "eth0"), ("127.0.0.9", "lo"), ("203.0.113.1", None)):
        assert link_of("n1", NOTHING, {"rdma": {}, "netdevs": NETDEVS}, {}, address, True).tcp_device == wanted
    assert link({}, tcp_device="eth0,lo").tcp_device == "eth0,lo"


# ---------------------------------------------------------------- hosts that nobody asked


def test_what_is_declared_stands_for_a_host_that_was_not_asked() -> None:
    found = link(None, rdma_fabric="roce", rdma_devices=["mlx5_4"], rdma_gid_index=3, tcp_device="eth0")
    assert (found.fabric, found.devices, found.gid_index, found.tcp_device) == ("roce", ("mlx5_4",), 3, "eth0")
    assert link(None, rdma_fabric="infiniband", rdma_devices=[]).devices == ()
    assert link(None, rdma_fabric="infiniband", needed=False).devices == ()


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ({"rdma_fabric": "infiniband"}, "rdma_fabric is infiniband, and rdma_devices is not declared"),
        ({"rdma_devices_excluded": ["mlx5_2"]}, "rdma_devices_excluded masks mlx5_2, and rdma_devices is not declared"),
    ],
)
def test_a_mask_that_needs_the_host_is_refused_without_it(wanted: Json, part: str) -> None:
    with pytest.raises(UserError, match=part):
        link(None, **wanted)


def test_a_deployed_link_stands_for_facts_as_long_as_it_agrees() -> None:
    seen = {"mlx5_0": card("roce", port=2, gpus={"0": "PIX", "1": "SYS"}), "mlx5_1": card("roce", gpus={"0": "SYS", "1": "PIX"})}
    before = link(seen)
    kept = {"link": json.loads(json.dumps(before.to_json()))}
    assert link(None, kept) == before
    assert link(None, kept, rdma_devices=["mlx5_0", "mlx5_1"], rdma_fabric="roce", tcp_device="eth0", rdma_gid_index=3) == before
    others: list[Json] = [
        {"rdma_devices": ["mlx5_0"]}, {"rdma_fabric": "infiniband"}, {"tcp_device": "eth1"}, {"rdma_gid_index": 1}
    ]  # fmt: skip
    for changed in others:
        assert link(None, kept, **{"rdma_devices": ["mlx5_0", "mlx5_1"], **changed}) != before
    with pytest.raises(UserError, match="masks mlx5_1"):
        link(None, kept, rdma_devices_excluded=["mlx5_1"])


# ---------------------------------------------------------------- what workers are told


def told(cards: Json, wanted: Json | None = None, **use: Any) -> dict[str, str]:
    return {s.name: s.value for s in settings_for("n1", link(cards, **(wanted or {})), Use(**use))}


PORTS = {"mlx5_0": IB, "mlx4_0": card(port=2)}


@pytest.mark.parametrize(
    ("cards", "use", "wanted"),
    [
        (PORTS, {"backend": "nixl"}, {"UCX_NET_DEVICES": "mlx4_0:2,mlx5_0:1,eth0"}),
        (PORTS, {"backend": "mooncake"}, {IB_DEVICE: "mlx4_0,mlx5_0"}),
        ({"mlx4_0": card(port=2)}, {"backend": "mooncake"}, {IB_DEVICE: "mlx4_0", "MC_IB_PORT": "2"}),
        ({"mlx5_0": ROCE}, {"backend": "mooncake"}, {IB_DEVICE: "mlx5_0", "MC_GID_INDEX": "3"}),
        ({"mlx5_0": ROCE}, {"backend": "mooncake", "force_tcp": True}, {"MC_FORCE_TCP": "1"}),
        ({"mlx5_0": ROCE}, {"backend": "mooncake_tcp"}, {}),
        ({"mlx5_0": IB}, {"backend": "none"}, {}),
        (PORTS, {"backend": "none", "nodes": 2}, {"NCCL_IB_HCA": "=mlx4_0:2,mlx5_0:1"}),
        ({"mlx5_0": ROCE}, {"backend": "none", "nodes": 2}, {"NCCL_IB_HCA": "=mlx5_0:1", "NCCL_IB_GID_INDEX": "3"}),
        # Also in one host NCCL opens every card; it sends nothing over them.
        ({"mlx5_0": ROCE}, {"backend": "none", "gpus": (0, 1)}, {"NCCL_IB_HCA": "=mlx5_0:1"}),
        (PORTS, {"backend": "none", "nvshmem": True}, {"NVSHMEM_HCA_LIST": "mlx4_0:2,mlx5_0"}),
        ({"mlx5_0": ROCE}, {"backend": "none", "nvshmem": True}, {"NVSHMEM_HCA_LIST": "mlx5_0", "NVSHMEM_IB_GID_INDEX": "3"}),
        ({}, {"backend": "nixl", "nodes": 2, "nvshmem": True}, {}),
        # Without being told, both would open the card that is down or masked as soon as it comes up.
        ({"mlx5_0": card(state="DOWN")}, {"backend": "nixl", "nodes": 2}, {"UCX_NET_DEVICES": "eth0", "NCCL_IB_DISABLE": "1"}),
    ],
)
def test_every_library_is_told_the_same_devices(cards: Json, use: Json, wanted: dict[str, str]) -> None:
    assert told(cards, **use) == wanted


def test_every_value_has_a_reason_that_names_what_was_left_out() -> None:
    masked = link({"mlx5_0": ROCE, "mlx5_2": ROCE}, rdma_devices_excluded=["mlx5_2"])
    found = settings_for("n1", masked, Use(backend="mooncake", nodes=3, nvshmem=True))
    assert [s.name for s in found] == [
        IB_DEVICE, "MC_GID_INDEX", "NVSHMEM_HCA_LIST", "NVSHMEM_IB_GID_INDEX", "NCCL_IB_HCA", "NCCL_IB_GID_INDEX"
    ]  # fmt: skip
    for setting in found:
        assert "mlx5_2" not in setting.value
        assert ("without mlx5_2" in setting.reason) == ("GID" not in setting.name)
    rows = shown(masked, found)
    assert rows[0] == {"setting": "rdma_devices", "value": "mlx5_0", "reason": "all active roce devices; mlx5_2 is masked"}
    assert len(rows) == 1 + len(found)
    assert shown(link({}), []) == []


def test_a_gid_index_that_is_not_known_is_said_where_one_is_used() -> None:
    unknown = link(None, rdma_fabric="roce", rdma_devices=["mlx5_4"], tcp_device="eth0")
    for backend, wanted in (("mooncake", ["looked for at deploy"]), ("nixl", [])):
        rows = shown(unknown, settings_for("n1", unknown, Use(backend=backend)))
        assert [row["reason"] for row in rows if row["setting"] == "rdma_gid_index"] == wanted


def test_nixl_without_a_network_device_is_refused_and_the_mask_not_dropped() -> None:
    unknown = link(None, rdma_fabric="infiniband", rdma_devices=["mlx5_0"])
    with pytest.raises(UserError, match=r"host n1: tcp_device is not declared, .*\(an HCA alone leaves UCX no TCP device"):
        settings_for("n1", unknown, Use(backend="nixl"))
    assert settings_for("n1", unknown, Use(backend="mooncake"))
    by_hand = settings_for("n1", unknown, Use(backend="nixl", own={"UCX_NET_DEVICES": "mlx5_0:1"}))
    assert [(s.name, s.value, s.reason) for s in by_hand] == [("UCX_NET_DEVICES", "mlx5_0:1", "set by engine_env")]


@pytest.mark.parametrize("name", ["UCX_NET_DEVICES", "NVSHMEM_HCA_LIST", "NCCL_IB_HCA"])
@pytest.mark.parametrize("value", ["mlx5_2:1", "=mlx5_0:1,mlx5_2:1", "mlx5_0,mlx5_2"])
def test_a_masked_device_is_refused_in_what_is_set_by_hand_too(name: str, value: str) -> None:
    use = Use(backend="nixl", own={name: value}, excluded=["mlx5_2"])
    with pytest.raises(UserError, match=rf"host n1: engine_env sets {name}={value}, and rdma_devices_excluded masks mlx5_2"):
        settings_for("n1", link({"mlx5_0": IB, "mlx5_2": IB}, rdma_devices_excluded=["mlx5_2"]), use)
    without = Use(backend="nixl", own={name: f"^{value.lstrip('=')}"}, excluded=["mlx5_2"])
    settings_for("n1", link({"mlx5_0": IB, "mlx5_2": IB}, rdma_devices_excluded=["mlx5_2"]), without)


def test_each_gpu_gets_its_nearest_card(tmp_path: Path) -> None:
    cards = rdma.by_device(rdma.ports(write(tmp_path, TREES["dgx"])))
    told_map = told(cards, backend="mooncake", gpus=[4, 5], per_gpu=True)[IB_DEVICE]
    # The worker sees its GPUs as 0 and 1.
    assert json.loads(told_map) == {"0": "mlx5_4", "1": "mlx5_5"}
    masked = told(cards, {"rdma_devices_excluded": ["mlx5_5"]}, backend="mooncake", gpus=[4, 5], per_gpu=True)[IB_DEVICE]
    assert json.loads(masked) == {"0": "mlx5_4", "1": "mlx5_4,mlx5_6,mlx5_7,mlx5_9"}
    assert told(cards, backend="mooncake", gpus=[4, 5])[IB_DEVICE] == ",".join(f"mlx5_{n}" for n in range(10))
    (unknown,) = settings_for("n1", link({"mlx5_0": IB}), Use(backend="mooncake", gpus=[0], per_gpu=True))
    assert (unknown.value, "found at deploy" in unknown.reason) == ("mlx5_0", True)


# ---------------------------------------------------------------- plans

REAL = {"engine": "sglang", "model": "m"}


def facts(number: int, cards: Json, count: int = 4) -> Json:
    address = f"127.0.0.{number}"
    return {"rdma": cards, "gpus": list(range(count)), "addresses": [address], "netdevs": {address: f"eth{number}"}}


@st.composite
def clusters(draw: st.DrawFn) -> tuple[str, dict[str, Json], str, str]:
    """(backend, host -> its cards, a host, a device of it that is not its only one)."""
    backend, fabric = draw(st.sampled_from(["auto", "nixl", "mooncake"])), draw(st.sampled_from(["infiniband", "roce"]))
    names = [f"n{i}" for i in range(1, draw(st.integers(2, 4)) + 1)]
    way = st.sampled_from(rdma.DISTANCES)
    cards = {
        name: {
            f"mlx5_{i}": card(fabric, port=draw(st.integers(1, 2)), gpus={str(gpu): draw(way) for gpu in range(4)})
            for i in draw(st.lists(st.integers(0, 11), min_size=2, max_size=4, unique=True))
        }
        for name in names
    }
    one = draw(st.sampled_from(names))
    return backend, cards, one, draw(st.sampled_from(sorted(cards[one])))


@settings(max_examples=30, deadline=None)
@given(clusters(), st.booleans(), st.booleans())
def test_a_mask_on_one_host_changes_exactly_that_hosts_units(
    cluster: tuple[str, dict[str, Json], str, str], per_gpu: bool, wide: bool
) -> None:
    backend, cards, one, device = cluster
    found = {name: facts(int(name[1:]), rows) for name, rows in cards.items()}
    own = {"gpus": 4, "rdma_fabric": "auto", "rdma_device_per_gpu": per_gpu}
    hosts = {name: host(int(name[1:]), **own) for name in cards}
    # Every host has a worker, so that every host has units to compare.
    half = len(cards) // 2
    size = {"tensor_parallel_size": 8, "nodes_per_worker": 2} if wide and len(cards) % 2 == 0 else {"tensor_parallel_size": 4}
    prefill, decode = list(cards)[:half], list(cards)[half:]
    per = size.get("nodes_per_worker", 1)
    if any(len(group) % per for group in (prefill, decode)):
        size, per = {"tensor_parallel_size": 4}, 1
    options: Json = {**REAL, **size, "transfer_backend": backend, "discovered": found, "prefill": prefill, "decode": decode}
    ratio = f"{len(prefill) // per}p{len(decode) // per}d"
    before = plan(hosts, ratio, **options)
    masked = plan({**hosts, one: {**hosts[one], "rdma_devices_excluded": [device]}}, ratio, **options)
    changed = [name for name in hosts if units.rendered_files(before, name) != units.rendered_files(masked, name)]
    # With a device per GPU, one that is nearest to none was in no unit.
    assert changed == [one] or (per_gpu and not changed)
    assert before["router"] == masked["router"]
    assert before["pairs"] == masked["pairs"]
    for rank in (rank for worker in masked["workers"] for rank in worker["ranks"] if rank["host"] == one):
        named = json.dumps([rank["argv"], rank["env"]])
        assert f'{device}"' not in named
        assert f"{device}," not in named
        assert f"{device}:" not in named


def two(rdma_1: Json, rdma_2: Json, **options: Any) -> Json:
    hosts = {f"n{i}": host(i, rdma_fabric="auto") for i in (1, 2)}
    own = options.pop("own", {})
    hosts["n1"].update(own)
    found = {"n1": facts(1, rdma_1), "n2": facts(2, rdma_2)}
    return plan(hosts, "1p1d", discovered=found, prefill=["n1"], decode=["n2"], **REAL, **options)


@pytest.mark.parametrize(
    ("own", "options", "wanted"),
    [
        ({}, {}, []),
        ({"rdma_fabric": "infiniband"}, {}, ["n1", "n2"]),
        ({"rdma_fabric": "infiniband", "rdma_devices": ["mlx5_0"]}, {}, []),
        ({"rdma_fabric": "infiniband", "rdma_devices": ["mlx5_0"]}, {"transfer_backend": "nixl"}, ["n1", "n2"]),
        ({"rdma_fabric": "roce", "rdma_devices": ["mlx5_0"], "tcp_device": "eth0"}, {"transfer_backend": "nixl"}, []),
        ({"rdma_fabric": "auto", "rdma_devices_excluded": ["mlx5_2"]}, {"transfer_backend": "nixl"}, ["n1", "n2"]),
        ({"rdma_fabric": "infiniband"}, {"transfer_backend": "mooncake_tcp"}, []),
        ({"rdma_fabric": "infiniband"}, {"ratio": "2agg"}, []),
        ({"rdma_fabric": "infiniband"}, {"engine": "emulated"}, []),
    ],
)
def test_what_hangs_on_a_hosts_devices_is_left_for_the_deploy_that_asks_it(own: Json, options: Json, wanted: list[str]) -> None:
    hosts = {f"n{i}": host(i, **own) for i in (1, 2)}
    asked = inputs(hosts, prefill=["n1"], decode=["n2"], **{**REAL, **options})
    assert Planner(asked).left_to_discover() == wanted
    if wanted:
        with pytest.raises(UserError, match=r"host n1: .*(rdma_devices|tcp_device) is not declared"):
            make_plan(asked)
    else:
        make_plan(asked)


def told_by(made: Json) -> list[Json]:
    return [worker["ranks"][0]["env"] for worker in made["workers"]]


def test_nixl_finds_its_network_device_at_deploy() -> None:
    made = two({"mlx5_0": IB}, {"mlx5_4": ROCE})
    assert (made["transfer_backend"], made["pairs"][0]["expected_transport"]) == ("nixl", "tcp")
    assert [env["UCX_NET_DEVICES"] for env in told_by(made)] == ["mlx5_0:1,eth1", "mlx5_4:1,eth2"]
    text = tables.workers(made)
    for words in ("mlx5_0:1,eth1", "has address 127.0.0.1", "all active roce devices", "RDMA ports and the TCP device"):
        assert words in text


def test_mooncake_by_hand_where_no_rdma_path_is_common_uses_tcp_and_says_so() -> None:
    made = two({"mlx5_0": IB}, {"mlx5_4": ROCE}, transfer_backend="mooncake")
    assert [env.get("MC_FORCE_TCP") for env in told_by(made)] == ["1", "1"]
    assert not [rank for worker in made["workers"] for rank in worker["ranks"] if IB_DEVICE in rank["argv"]]
    assert {pair["expected_transport"] for pair in made["pairs"]} == {"tcp"}
    assert "a pair has no common RDMA path" in tables.workers(made)


def test_a_fabric_declared_none_keeps_every_library_off_the_cards() -> None:
    made = two({"mlx5_0": IB}, {"mlx5_0": IB}, own={"rdma_fabric": "none"})
    assert (made["transfer_backend"], made["pairs"][0]["expected_transport"]) == ("nixl", "tcp")
    assert told_by(made)[0]["UCX_NET_DEVICES"] == "eth1"


def test_hosts_of_one_kind_share_a_line_and_an_emulated_engine_has_none() -> None:
    made = two({"mlx5_0": IB}, {"mlx5_0": IB})
    lines = [line for line in tables.fabric(made).splitlines() if IB_DEVICE in line]
    assert len(lines) == 1
    assert lines[0].startswith("n1, n2 ")
    emulated = plan({"n1": host(1), "n2": host(2, rdma_fabric="roce", rdma_devices=["mlx5_0"])}, "1p1d")
    assert tables.fabric(emulated) == ""


def test_npus_move_their_kv_cache_over_their_own_fabric() -> None:
    hosts = {"n1": host(1), "n2": host(2)}
    npu = {"runtime": "existing", "engine_python": "/opt/sglang/bin/python"}
    for env, wanted in (({}, "hccs"), ({"ASCEND_MF_TRANSFER_PROTOCOL": "device_rdma"}, "rdma")):
        made = plan(hosts, "1p1d", prefill=["n1"], decode=["n2"], transfer_backend="ascend", engine_env=env, **REAL, **npu)
        assert {pair["expected_transport"] for pair in made["pairs"]} == {wanted}
    over = {"ENABLE_ASCEND_TRANSFER_WITH_MOONCAKE": "true"}
    made = plan(hosts, "1p1d", prefill=["n1"], decode=["n2"], transfer_backend="mooncake", engine_env=over, **REAL, **npu)
    assert {pair["expected_transport"] for pair in made["pairs"]} == {"hccs"}
    assert "MC_FORCE_TCP" not in json.dumps(told_by(made))
