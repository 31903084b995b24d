"""The plan: ports, stickiness, command lines, and the words for what cannot be planned."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.plans import KEY, Json, h200, host, inputs, make_plan, plan, write_flag_tables

from pdlib import flags, tables, units
from pdlib.errors import UserError
from pdlib.plan import Planner, inventory_id, leaving
from pdlib.plan_inputs import GROUPS, check_group_names


@pytest.fixture(autouse=True, scope="module")
def _small_flag_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("flags")
    write_flag_tables(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "_FOLDER", folder)
        yield


TWO = {"n1": host(1), "n2": host(2)}
CHAIN = ("3p1d", "2p2d", "1p3d", "3p1d")


def workers(made: Json) -> dict[str, Json]:
    return {w["name"]: w for w in made["workers"]}


def bound(made: Json) -> Counter[tuple[str, int]]:
    """How often every (address, port) is bound."""
    found: Counter[tuple[str, int]] = Counter()
    for worker in made["workers"]:
        ports = {
            (rank["address"], rank[kind])
            for rank in worker["ranks"]
            for kind in ("port", "bootstrap_port", "dist_init_port")
            if kind in rank
        }
        kinds = {rank["port"] for rank in worker["ranks"]} | {rank.get("bootstrap_port") for rank in worker["ranks"]}
        assert len(kinds) == 2 or worker["role"] != "prefill", "HTTP and bootstrap port are two"
        found.update(ports)
    router = made["router"]
    found.update([(router["address"], router["port"]), (router["address"], router["prometheus_port"])])
    return found


# ---------------------------------------------------------------- laws


@given(st.randoms(use_true_random=True))
@settings(max_examples=80, deadline=None)
def test_ports_are_used_once_an_address_and_stick(rng: random.Random) -> None:
    count = rng.randint(1, 3)
    hosts = {f"n{i}": host(rng.randint(1, 2), gpus=rng.randint(1, 4)) for i in range(count)}
    near = [rng.randint(30000, 30004) for _ in range(5)]
    if near[3] == near[4]:
        near[4] += 1
    names = ("worker_port_base", "bootstrap_port_base", "dist_init_port_base", "router_port", "router_prometheus_port")
    options: Json = dict(zip(names, near, strict=True))
    if rng.random() < 0.2:
        options.update({"prefill_tensor_parallel_size": 2, "prefill_nodes_per_worker": 2})
    current: Json | None = None
    for _ in range(4):
        ratio = rng.choice([*CHAIN, "1p1d", "2agg", "4agg", "1p1d"])
        try:
            made = plan(hosts, ratio, current=current, **options)
        except UserError as error:
            refused = str(error)
        else:
            refused = ""
        if refused:
            assert "does not fit" in refused
            continue
        assert max(bound(made).values()) == 1, bound(made)
        assert made == plan(hosts, ratio, current=current, **options), "the same input gives the same plan"
        assert json.loads(json.dumps(made)) == made
        if current:
            before, after = workers(current), workers(made)
            for name in before.keys() & after.keys():
                if [r["gpus"] for r in before[name]["ranks"]] == [r["gpus"] for r in after[name]["ranks"]] and [
                    r["host"] for r in before[name]["ranks"]
                ] == [r["host"] for r in after[name]["ranks"]]:
                    assert before[name] == after[name], "who stays is untouched"
        assert plan(hosts, ratio, current=made, **options)["workers"] == made["workers"]
        current = made


def test_a_chain_of_ratios_restarts_only_the_workers_that_change() -> None:
    made = [plan(TWO, CHAIN[0], prefill=["n1", "n2"], decode=["n2", "n1"])]
    for ratio in CHAIN[1:]:
        made.append(plan(TWO, ratio, prefill=["n1", "n2"], decode=["n2", "n1"], current=made[-1]))
    for before, after, kept in zip(made, made[1:], (3, 3, 2), strict=False):
        same = [name for name, worker in workers(after).items() if workers(before).get(name) == worker]
        assert len(same) == kept, (before["ratio"], after["ratio"], same)
        argv = {r: made_["router"]["argv"] for r, made_ in (("b", before), ("a", after))}
        head = {r: argv[r][: len(argv[r]) - len(m["router"]["members"])] for r, m in (("b", before), ("a", after))}
        assert head["a"] == head["b"], "the router keeps running: only its members differ"
    assert workers(made[-1]).keys() == {"prefill-0", "prefill-1", "prefill-2", "decode-0"}


def test_an_address_that_two_inventory_hosts_share_has_every_port_once() -> None:
    shared = {"a": host(1), "b": host(1), "c": host(2)}
    made = plan(shared, "6p6d")
    assert max(bound(made).values()) == 1
    ports = [(r["address"], r["port"]) for w in made["workers"] for r in w["ranks"]]
    assert len(ports) == len(set(ports)) == 12


def test_a_kept_port_outside_the_base_is_given_up() -> None:
    before = plan(TWO, "1p1d")
    after = plan(TWO, "1p1d", current=before, worker_port_base=40000, bootstrap_port_base=41000)
    assert [w["ranks"][0]["port"] for w in after["workers"]] == [40000, 40001]
    assert after["workers"][0]["ranks"][0]["bootstrap_port"] == 41000


def test_a_kept_port_that_the_router_takes_now_is_given_up() -> None:
    before = plan(TWO, "1p1d")
    after = plan(TWO, "1p1d", current=before, router_port=30000)
    assert max(bound(after).values()) == 1


def test_ports_run_out() -> None:
    with pytest.raises(UserError, match="no port is left from 65535 on for prefill-1 on n1"):
        plan({"n1": host(1)}, "2p1d", worker_port_base=65535)


# ---------------------------------------------------------------- 8 GPUs, as the script it replaces


SCRIPT = {
    "3p1d": (
        [("0,1", 30000, 9000), ("2,3", 30001, 9001), ("4,5", 30002, 9002)],
        [("6,7", 30003)],
    ),
    "2p2d": ([("0,1", 30000, 9000), ("2,3", 30001, 9001)], [("4,5", 30002), ("6,7", 30003)]),
    "1p3d": ([("0,1", 30000, 9000)], [("2,3", 30001), ("4,5", 30002), ("6,7", 30003)]),
}


@pytest.mark.parametrize("ratio", SCRIPT)
def test_eight_gpus_are_used_as_by_hand(ratio: str) -> None:
    prefill, decode = SCRIPT[ratio]
    made = h200(ratio)
    assert made["transfer_backend"] == "nixl"
    assert {pair["expected_transport"] for pair in made["pairs"]} == {"cuda_ipc"}
    assert len(made["pairs"]) == len(prefill) * len(decode)
    members: list[str] = []
    rows = [("prefill", *row) for row in prefill] + [("decode", *row, None) for row in decode]
    assert len(rows) == len(made["workers"])
    for (role, gpus, port, bootstrap), worker in zip(rows, made["workers"], strict=True):
        (rank,) = worker["ranks"]
        url = f"http://127.0.0.1:{port}"
        assert (worker["role"], worker["url"]) == (role, url)
        assert rank["env"]["CUDA_VISIBLE_DEVICES"] == gpus
        assert rank["env"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID", "as nvidia-smi counts, whose indices these are"
        assert (rank["port"], rank.get("bootstrap_port")) == (port, bootstrap)
        wanted = {
            "--model-path": "openai/gpt-oss-120b",
            "--disaggregation-mode": role,
            "--disaggregation-transfer-backend": "nixl",
            "--tp-size": "2",
            "--port": str(port),
        }
        if bootstrap:
            wanted["--disaggregation-bootstrap-port"] = str(bootstrap)
        argv = rank["argv"]
        assert argv[1:3] == ["-m", "sglang.launch_server"]
        assert {flag: argv[argv.index(flag) + 1] for flag in wanted} == wanted
        assert ("--disaggregation-bootstrap-port" in argv) == bool(bootstrap)
        members += [f"--{role}", url, *([str(bootstrap)] if bootstrap else [])]
    router = made["router"]
    assert router["argv"][1:3] == ["-m", "sglang_router.launch_router"]
    assert router["argv"][-len(members) :] == router["members"] == members
    assert "--pd-disaggregation" in router["argv"]
    assert [router["argv"][router["argv"].index(f) + 1] for f in ("--policy", "--port")] == ["round_robin", "8000"]


def test_aggregated_workers_stand_behind_the_router_without_disaggregation() -> None:
    made = h200("4agg")
    assert [w["name"] for w in made["workers"]] == [f"aggregated-{i}" for i in range(4)]
    assert (made["pairs"], made["transfer_backend"]) == ([], "none")
    assert made["router"]["members"] == ["--worker-urls", *(f"http://127.0.0.1:{30000 + i}" for i in range(4))]
    assert "--pd-disaggregation" not in made["router"]["argv"]
    assert not any("disaggregation" in item for w in made["workers"] for item in w["ranks"][0]["argv"])


# ---------------------------------------------------------------- secrets and addresses


@pytest.mark.parametrize("engine", ["sglang", "emulated"])
@pytest.mark.parametrize("ratio", ["2p1d", "2agg"])
def test_the_hubs_token_is_told_of_where_the_engine_downloads(engine: str, ratio: str) -> None:
    options = {"engine": engine, "model": "Org/m", "hf_token": KEY}
    made = plan(TWO, ratio, **options)
    path = {"HF_TOKEN_PATH": "/var/lib/pd/secrets/hf_token"} if engine == "sglang" else {}
    assert made["hf_token"] is (engine == "sglang")
    for rank in (rank for worker in made["workers"] for rank in worker["ranks"]):
        assert {name: value for name, value in rank["env"].items() if "TOKEN" in name} == path
    everything = json.dumps(made) + "".join(text for name in made["hosts"] for text in units.rendered_files(made, name).values())
    assert KEY not in everything
    for others in ({"hf_token": None}, {"model": "/models/m"}, {"model_source": "hub"}):
        without = plan(TWO, ratio, **{**options, **others})
        assert without["hf_token"] is False
        assert "HF_TOKEN_PATH" not in json.dumps(without)


@pytest.mark.parametrize("engine", ["sglang", "emulated"])
@pytest.mark.parametrize("ratio", ["2p1d", "2agg"])
def test_the_keys_are_nowhere(engine: str, ratio: str) -> None:
    options = {"engine": engine, "model": "m", "api_key": KEY, "admin_api_key": f"{KEY}-too"}
    made = plan(TWO, ratio, **options)
    assert made["api_key"] is made["admin_api_key"] is True
    everything = json.dumps(made) + "".join(text for name in made["hosts"] for text in units.rendered_files(made, name).values())
    assert KEY not in everything
    assert KEY not in json.dumps(units.host_units(made, "n1")) + tables.workers(made)
    for entry in [*(r for w in made["workers"] for r in w["ranks"]), made["router"]]:
        assert "secrets/api_key" in " ".join(entry["argv"]), "but where it lies is told"
        assert ("secrets/admin_api_key" in " ".join(entry["argv"])) == (entry is not made["router"])
    without = plan(TWO, ratio, **{**options, "api_key": None, "admin_api_key": None})
    assert without["api_key"] is without["admin_api_key"] is False
    assert "secrets" not in json.dumps(without)
    with pytest.raises(UserError, match="admin_api_key is the same as api_key") as refused:
        plan(TWO, ratio, **{**options, "admin_api_key": KEY})
    assert KEY not in str(refused.value)


@pytest.mark.parametrize("engine", ["sglang", "emulated"])
def test_nothing_listens_everywhere_unasked(engine: str) -> None:
    made = plan(TWO, "2p1d", engine=engine, model="m")
    for name in made["hosts"]:
        assert not any("0.0.0.0" in text for text in units.rendered_files(made, name).values())
    assert "0.0.0.0" not in json.dumps(made)
    asked = plan({**TWO, "n2": host(2, listen_address="0.0.0.0")}, "2p1d", engine=engine, model="m", decode=["n2"])
    for worker in asked["workers"]:
        for rank in worker["ranks"]:
            argv, everywhere = rank["argv"], rank["host"] == "n2"
            assert argv[argv.index("--host") + 1] == ("0.0.0.0" if everywhere else "127.0.0.1")
            assert "0.0.0.0" not in worker["url"], "others use the address"


# ---------------------------------------------------------------- refusals


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as refused:
        plan(*args, **options)
    return str(refused.value)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"ratio": "3x1d"}, ["ratio='3x1d' is not a ratio", "NpMd"]),
        ({"router": ["n1", "n2"]}, ["the group router has 2 hosts (n1 and n2)", "exactly one"]),
        ({"router": []}, ["the group router has 0 hosts", "exactly one"]),
        ({"decode": []}, ["ratio 1p1d needs hosts in decode_nodes"]),
        ({"prefill": [], "decode": [], "ratio": "agg"}, ["prefill_nodes or decode_nodes"]),
        ({"engine": "sglan"}, ["engine='sglan'", "one of sglang, vllm, emulated", "did you mean sglang?"]),
        ({"engine": "sglang"}, ["model is not set", "-e model="]),
        ({"engine": "sglang", "model": "m", "engine_version": "0.5.2"}, ["engine_version='0.5.2'", "0.5.17, 0.5.23"]),
        ({"router_": "smgg"}, ["router='smgg'", "sglang-router"]),
        ({"transfer_backend": "nixel"}, ["transfer_backend='nixel'", "did you mean nixl?"]),
        ({"tensor_parallel_size": 3, "nodes_per_worker": 2}, ["tensor_parallel_size=3 does not divide", "nodes_per_worker=2"]),
        ({"tensor_parallel_size": 4, "decode_nodes_per_worker": 3}, ["does not divide", "(decode workers)"]),
        ({"engine": "sglang", "model": "m", "engine_args": {"page-sise": 1}}, ["engine_args (host n1)", "mean page-size?"]),
        (
            {"engine": "sglang", "model": "m", "decode_engine_args": {"port": 1}},
            ["decode_engine_args (host n", "port is set by the plan", "worker_port_base"],
        ),
        ({"engine": "sglang", "model": "m", "engine_args": {"enable-deepep-moe": True}}, ["any more", "moe-a2a-backend"]),
        ({"router_args": {"pd_disaggregation": True}}, ["router_args: pd_disaggregation is set by the plan", "ratio"]),
        ({"runtime": "existing"}, ["host n1: runtime is existing", "engine_python"]),
        ({"prefill_gpus": [0, 9]}, ["host n1: prefill_gpus=[0, 9]", "gpus=[0, 1, 2, 3]"]),
        ({"ratio": "7p2d"}, ["ratio 7p2d does not fit", "prefill_nodes: needs 7 x 1 GPU(s); GPUs by host: n1 4 and n2 4",
                             "decode_nodes: needs 2 x 1", "in both groups", "ratios that fit: 1p7d", "8agg"]),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_said(options: dict[str, Any], parts: list[str]) -> None:
    if "router_" in options:
        message = refusal({"n1": host(1, router="smgg"), "n2": host(2, router="smgg")}, **{})
    else:
        message = refusal(TWO, **options)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("own", "parts"),
    [
        ({"gpus": None}, ["gpus is not declared for host n2", "host_vars"]),
        ({"gpus": "auto"}, ["gpus is not declared for host n2", "deploy_pd.yml"]),
        ({"gpus": [0, 0]}, ["host n2: gpus lists an index twice"]),
        ({"address": None}, ["address is not declared for host n2"]),
        ({"rdma_devices": ["mlx5_0", "mlx5_1"], "rdma_devices_excluded": ["mlx5_1"]}, ["host n2: mlx5_1 stands in"]),
        ({"rdma_fabric": "auto"}, ["rdma_fabric is not declared for n2"]),
    ],
)
def test_what_a_host_must_declare(own: dict[str, Any], parts: list[str]) -> None:
    message = refusal({"n1": host(1), "n2": host(2, **own)}, "1p1d", prefill=["n1"], decode=["n2"])
    for part in parts:
        assert part in message, message


def test_an_absent_group_is_an_error_and_an_empty_one_is_not() -> None:
    check_group_names({name: [] for name in GROUPS})
    with pytest.raises(UserError, match="no group router and bench_clients: every inventory defines"):
        check_group_names({"prefill_nodes": [], "decode_nodes": []})
    plan(TWO, "2agg", decode=[])


# ---------------------------------------------------------------- --limit


def test_a_backend_is_checked_also_where_no_kv_cache_moves() -> None:
    made = plan({"n1": host(1)}, "2agg", transfer_backend="mooncake")
    assert (made["transfer_backend"], made["transfer_backend_reason"]) == ("none", "aggregated workers move no KV cache")
    with pytest.raises(UserError, match="did you mean mooncake"):
        plan({"n1": host(1)}, "2agg", transfer_backend="mooncke")


def test_a_role_may_count_its_ports_from_elsewhere() -> None:
    bases = {"worker_port_base": 9000, "prefill_worker_port_base": 8100, "decode_worker_port_base": 8200}
    hosts = {"n1": host(1, 8)}

    def found(made: Json) -> dict[str, int]:
        return {worker["name"]: worker["ranks"][0]["port"] for worker in made["workers"]}

    made = plan(hosts, "2p2d", **bases)
    assert found(made) == {"prefill-0": 8100, "prefill-1": 8101, "decode-0": 8200, "decode-1": 8201}
    assert found(plan(hosts, "2agg", **bases)) == {"aggregated-0": 9000, "aggregated-1": 9001}
    # a role without one of its own counts with all; a kept worker whose base moved away does not keep its port
    assert found(plan(hosts, "1p1d", decode_worker_port_base=31000)) == {"prefill-0": 30000, "decode-0": 31000}
    moved = {**bases, "decode_worker_port_base": 8300}
    assert found(plan(hosts, "2p2d", current=made, **moved)) == {
        "prefill-0": 8100, "prefill-1": 8101, "decode-0": 8300, "decode-1": 8301,
    }  # fmt: skip
    # bases that meet: no port twice
    close = {"prefill_worker_port_base": 8100, "decode_worker_port_base": 8101}
    assert sorted(found(plan(hosts, "2p2d", **close)).values()) == [8100, 8101, 8102, 8103]


def test_limit_without_the_router_says_what_to_type() -> None:
    assert "--limit leaves out n1, the router: type -l n1,n2" in refusal(TWO, limit=["n2"])
    planner = Planner(inputs(TWO, limit=["n1"], clients=["n2"]))
    with pytest.raises(UserError, match="leaves out n2, the bench client: type -l n1,n2"):
        planner.check_limit(["n2"])


def test_limit_without_a_needed_worker_host_names_it() -> None:
    message = refusal(TWO, "4p4d", limit=["n1"])
    assert "ratio 4p4d does not fit the hosts of --limit: it needs n2, too; type -l n1,n2" in message


def test_limit_that_cannot_help_says_what_fits() -> None:
    message = refusal(TWO, "7p7d", limit=["n1"])
    assert "does not fit" in message
    assert "n2 4 (outside the limit)" in message


def test_limit_without_a_host_that_is_not_needed_carries_on() -> None:
    made = plan(TWO, "2p2d", limit=["n1"])
    assert {rank["host"] for worker in made["workers"] for rank in worker["ranks"]} == {"n1"}
    assert list(made["hosts"]) == ["n1"]


def test_a_host_outside_the_limit_keeps_its_workers() -> None:
    before = plan(TWO, "4p4d", prefill=["n2", "n1"], decode=["n1", "n2"])
    after = plan(TWO, "4p2d", prefill=["n2", "n1"], decode=["n1", "n2"], limit=["n1"], current=before)
    out = [w for w in before["workers"] if w["ranks"][0]["host"] == "n2"]
    assert out
    assert [w for w in after["workers"] if w["ranks"][0]["host"] == "n2"] == out
    message = refusal(TWO, "1p4d", prefill=["n2", "n1"], decode=["n1", "n2"], limit=["n1"], current=before)
    assert "it needs n2, too" in message


def test_a_host_outside_the_limit_may_not_change_by_its_arguments_either() -> None:
    before = plan(TWO, "2p2d", prefill=["n1"], decode=["n2"])
    assert plan(TWO, "2p2d", prefill=["n1"], decode=["n2"], limit=["n1"], current=before)["workers"] == before["workers"]
    message = refusal(TWO, "2p2d", prefill=["n1"], decode=["n2"], limit=["n1"], current=before, engine_env={"A": "1"})
    assert "--limit leaves out n2, and decode-0 there would change: type -l n1,n2" in message


# ---------------------------------------------------------------- an inventory that changed


def test_a_host_that_left_the_inventory_with_workers_is_not_forgotten() -> None:
    before = plan(TWO, "2p2d", prefill=["n1"], decode=["n2"])
    message = refusal({"n1": host(1)}, "1p1d", current=before)
    assert "n2 left the inventory and still runs decode-" in message
    assert "teardown.yml -l n2" in message
    idle = plan(TWO, "1p1d", prefill=["n1"], decode=["n1"])
    plan({"n1": host(1)}, "1p1d", current=idle)


def test_the_router_does_not_move_by_itself() -> None:
    before = plan(TWO, "1p1d")
    message = refusal(TWO, "1p1d", router=["n2"], current=before)
    assert "the router of the deployment is on n1, and the inventory now has it on n2" in message


@pytest.mark.parametrize(
    ("own", "options", "wanted"),
    [
        ({}, {}, []),
        ({"gpus": "auto"}, {}, ["n2"]),
        ({"gpus": None}, {}, ["n2"]),
        ({"address": None}, {}, ["n2"]),
        ({"rdma_fabric": "auto"}, {}, ["n2"]),
        ({"rdma_fabric": "auto"}, {"transfer_backend": "nixl"}, []),
        ({"rdma_fabric": "auto"}, {"ratio": "2agg"}, []),
    ],
)
def test_what_is_left_to_discover(own: dict[str, Any], options: dict[str, Any], wanted: list[str]) -> None:
    hosts = {"n1": host(1), "n2": host(2, **own)}
    assert Planner(inputs(hosts, **options)).left_to_discover() == wanted
    if not wanted:
        plan(hosts, **options)


# ---------------------------------------------------------------- declared and discovered


def found(*gpus: int, **rdma: tuple[str, str]) -> Json:
    ports = {name: {"port": 1, "state": state, "fabric": fabric} for name, (state, fabric) in rdma.items()}
    return {"gpus": list(gpus), "rdma": ports, "addresses": ["127.0.0.1", "127.0.0.2"]}


REAL = {"engine": "sglang", "model": "m"}


def test_what_is_auto_is_filled_in() -> None:
    hosts = {f"n{i}": {"gpus": "auto", "rdma_devices_excluded": ["mlx5_2"]} for i in (1, 2)}
    seen = found(0, 1, mlx5_0=("ACTIVE", "infiniband"), mlx5_1=("DOWN", "infiniband"), mlx5_2=("ACTIVE", "infiniband"))
    discovered = {f"n{i}": {**seen, "default_address": f"127.0.0.{i}"} for i in (1, 2)}
    made = plan(hosts, "2p2d", discovered=discovered, decode=["n2"], prefill=["n1"], **REAL)
    assert made["hosts"]["n2"]["address"] == "127.0.0.2"
    assert made["hosts"]["n2"]["gpus"] == [0, 1]
    assert made["hosts"]["n2"]["rdma_devices"] == ["mlx5_0"]
    assert (made["transfer_backend"], made["hosts"]["n1"]["rdma_fabric"]) == ("mooncake", "infiniband")
    argv = made["workers"][0]["ranks"][0]["argv"]
    assert argv[argv.index("--disaggregation-ib-device") + 1] == "mlx5_0"


@pytest.mark.parametrize(
    ("own", "seen", "part"),
    [
        ({"gpus": 4}, found(0, 1), "gpus declares [0, 1, 2, 3], and the host has [0, 1]"),
        ({"gpus": 1}, found(), "gpus declares [0], and the host has none"),
        ({"address": "127.0.0.9"}, found(0, 1, 2, 3), None),
        ({"address": "192.0.2.9"}, found(0, 1, 2, 3), "address=192.0.2.9 is none of the host's own"),
        ({"rdma_fabric": "roce"}, found(0, 1, 2, 3, mlx5_0=("ACTIVE", "infiniband")), "rdma_fabric=roce, and its devices are on"),
        ({"rdma_fabric": "infiniband"}, found(0, 1, 2, 3), "rdma_fabric=infiniband"),
        (
            {"rdma_fabric": "infiniband", "rdma_devices": ["mlx5_1"]},
            found(0, 1, 2, 3, mlx5_0=("ACTIVE", "infiniband"), mlx5_1=("DOWN", "infiniband")),
            "rdma_devices names mlx5_1; the host has mlx5_0 (active, infiniband) and mlx5_1 (down, infiniband)",
        ),
        ({"rdma_fabric": "roce", "rdma_devices": ["mlx5_1"]}, found(0, 1, 2, 3), "the host has no RDMA device"),
    ],
)
def test_a_disagreement_is_refused_by_name(own: dict[str, Any], seen: Json, part: str | None) -> None:
    hosts = {"n1": host(1, **own)}
    if part is None:
        plan(hosts, discovered={"n1": seen}, **REAL)
        return
    message = refusal(hosts, discovered={"n1": seen}, **REAL)
    assert message.startswith("host n1: ")
    assert part in message


# ---------------------------------------------------------------- command lines


def test_general_arguments_are_overlaid_by_the_roles_and_both_by_spelling() -> None:
    made = plan(
        TWO, "1p1d", **REAL, engine_args={"schedule_conservativeness": 1.5, "device": "cuda"},
        decode_engine_args={"schedule-conservativeness": 2},
        engine_env={"A": 1, "B": "x"}, prefill_engine_env={"B": "y"},
    )  # fmt: skip
    prefill, decode = (w["ranks"][0] for w in made["workers"])
    flag = "--schedule-conservativeness"
    assert [r["argv"][r["argv"].index(flag) + 1] for r in (prefill, decode)] == ["1.5", "2"]
    assert [r["argv"].count(flag) for r in (prefill, decode)] == [1, 1]
    assert (prefill["env"]["A"], prefill["env"]["B"], decode["env"]["B"]) == ("1", "y", "x")


def test_a_mixed_fabric_gives_ucx_a_tcp_device_beside_the_hca() -> None:
    hosts = {
        "gh200": host(1, rdma_fabric="infiniband", rdma_devices=["mlx5_0"], tcp_device="eth0"),
        "a100": host(2, rdma_fabric="roce", rdma_devices=["mlx5_4"], tcp_device="bond0"),
    }
    made = plan(hosts, "1p1d", prefill=["gh200"], decode=["a100"], **REAL)
    assert made["transfer_backend"] == "nixl"
    assert "no common RDMA path" in made["transfer_backend_reason"]
    assert made["pairs"] == [{"prefill": "prefill-0", "decode": "decode-0", "expected_transport": "tcp"}]
    assert [w["ranks"][0]["env"]["UCX_NET_DEVICES"] for w in made["workers"]] == ["mlx5_0:1,eth0", "mlx5_4:1,bond0"]


def test_a_worker_over_several_hosts_meets_at_its_first() -> None:
    hosts = {f"n{i}": host(i, gpus=8) for i in (1, 2, 3, 4)}
    both = {"prefill_tensor_parallel_size": 24, "prefill_nodes_per_worker": 3, "decode_tensor_parallel_size": 8}
    made = plan(hosts, "1p1d", **REAL, **both)
    prefill = workers(made)["prefill-0"]["ranks"]
    assert [r["host"] for r in prefill] == ["n1", "n2", "n3"]
    for index, rank in enumerate(prefill):
        argv = rank["argv"]
        wanted = {"--nnodes": "3", "--node-rank": str(index), "--dist-init-addr": "127.0.0.1:5757", "--tp-size": "24"}
        assert {flag: argv[argv.index(flag) + 1] for flag in wanted} == wanted
        assert ("health_url" in rank) == (index == 0)
    assert [u["name"] for u in units.host_units(made, "n3")] == ["pd-prefill-0"]
    reverse = {"decode_tensor_parallel_size": 24, "decode_nodes_per_worker": 3, "prefill_tensor_parallel_size": 8}
    turned = plan(hosts, "1p1d", current=made, **REAL, **reverse)
    assert {name: len(w["ranks"]) for name, w in workers(turned).items()} == {"prefill-0": 1, "decode-0": 3}


def test_shared_gpus_need_a_memory_fraction() -> None:
    one = {"n1": host(1, gpus=1, gpus_shared=True)}
    for fraction in ({}, {"mem_fraction": 0.6}):
        assert "mem_fraction must be set to at most 0.5" in refusal(one, "1p1d", **REAL, **fraction)
    made = plan(one, "1p1d", **REAL, mem_fraction=0.45)
    assert [w["ranks"][0]["gpus"] for w in made["workers"]] == [[0], [0]]
    plan(one, "1p1d")


def test_the_router_may_stand_on_a_host_of_its_own() -> None:
    made = plan({"front": {"address": "127.0.0.9"}, **TWO}, "1p1d", prefill=["n1"], decode=["n2"])
    assert list(made["hosts"]) == ["n1", "n2", "front"]
    assert made["router"]["url"] == "http://127.0.0.9:8000"
    assert [row["name"] for row in made["hosts"]["front"]["installs"]] == ["supervisor", "sglang-router-0.3.2"]
    assert [row["name"] for row in made["hosts"]["n1"]["installs"]] == ["supervisor", "emulated-0.1.0"]


def test_health_paths_differ_by_version() -> None:
    urls = {v: h200("1p1d", engine_version=v)["workers"][0]["ranks"][0]["health_url"] for v in ("0.5.17", "0.5.23")}
    assert urls == {"0.5.17": "http://127.0.0.1:30000/health", "0.5.23": "http://127.0.0.1:30000/ready"}


def test_the_table_names_every_worker_and_the_router() -> None:
    made = plan(TWO, "2p1d")
    text = tables.workers(made)
    for word in ("prefill-0", "prefill-1", "decode-0", "router", "n1", "emulated: no GPU is used", "KV cache: nixl over"):
        assert word in text


def test_an_inventory_has_a_short_name_of_its_own(tmp_path: Path) -> None:
    one, other = inventory_id([f"{tmp_path}/a/local"]), inventory_id([f"{tmp_path}/b/local/"])
    assert one.startswith("local-")
    assert other.startswith("local-")
    assert one != other
    assert make_plan(inputs(TWO)) == make_plan(inputs(TWO))


def test_a_fabric_declared_none_leaves_the_hosts_cards_unused() -> None:
    found = {"mlx5_0": {"port": 1, "state": "ACTIVE", "fabric": "infiniband"}}
    asked = inputs({"n1": host(1, gpus=4, rdma_fabric="none")}, ratio="1p1d")
    seen = {"n1": {"gpus": [0, 1, 2, 3], "rdma": found, "addresses": [asked.hosts["n1"]["address"]]}}
    made = make_plan(replace(asked, discovered=seen))
    assert made["hosts"]["n1"]["rdma_devices"] == []


def test_a_host_outside_the_limit_is_as_it_was_deployed_where_nothing_is_declared() -> None:
    """No fact of it was gathered: its address, GPUs and fabric come from the deployed plan."""
    open_host = {"address": None, "gpus": "auto", "rdma_fabric": "auto"}
    hosts: dict[str, Json] = {"n1": host(1), "n2": open_host}
    seen = {"default_address": "10.0.0.2", "gpus": [0, 1], "rdma": {"mlx5_0": {"state": "ACTIVE", "fabric": "roce", "port": 1}}}
    roles: dict[str, Any] = {"prefill": ["n1"], "decode": ["n2"], "engine": "emulated"}
    before = plan(hosts, "1p1d", discovered={"n2": seen}, **roles)
    again = plan(hosts, "1p1d", limit=["n1"], current=before, **roles)
    assert again["workers"] == before["workers"]
    assert again["hosts"] == before["hosts"]
    with pytest.raises(UserError, match="n2"):
        plan(hosts, "1p1d", limit=["n1"], **roles)


def test_a_plan_that_is_deployed_again_leaves_no_worker_behind() -> None:
    """The deployed plan comes back from a file, where the keys of an environment have another order."""
    made = plan({"n1": host(1)}, "1p1d", engine="sglang", model="m", engine_env={"A": "1"})
    assert leaving(json.loads(json.dumps(made, sort_keys=True)), made) == {}
    changed = plan({"n1": host(1)}, "1p1d", engine="sglang", model="m", engine_env={"A": "1"}, decode_engine_env={"A": "2"})
    assert list(leaving(json.loads(json.dumps(changed, sort_keys=True)), made)) == ["decode-0"]
