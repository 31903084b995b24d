"""A sweep in short: which cells, on which hosts, under which load; nothing of it can reach a host that is not this machine."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pdbench.sweep import grid, rehearsal, spec
from pdbench.sweep.planning import Planned
from pdlib.errors import UserError

Json = dict[str, Any]

#: What an inventory and its group_vars may say of a real host, as `playbooks/inputs.yml` resolves it.
IMAGE = f"lmsysorg/sglang:v0.5.23@sha256:{'0' * 64}"
REAL: Json = {
    "api_key": "set",
    **{"engine": "sglang", "model": "org/Big-120b", "ratio": "1p1d", "tensor_parallel_size": 2, "router_policy": "round_robin"},
    **{"gpus": 8, "address": "192.0.2.7", "rdma_fabric": "infiniband", "rdma_devices": ["mlx5_0"], "service_manager": "systemd"},
    **{
        "engine_args": {"page-size": 16},
        "engine_env": {"A": "1"},
        "runtime": "docker",
        "engine_image": IMAGE,
    },
    **{"router_port": 80, "worker_port_base": 9000, "model_source": "hub", "mem_fraction": 0.4, "bench_concurrency": [4, 8]},
    **{"state_dir": "/var/lib/pd", "install_dir": "/opt/pd", "served_model_name": "big", "cache_dir": "/scratch"},
}


def inputs(hosts: Sequence[str] = ("h1", "h2"), cases: int = 1, **more: Any) -> Json:
    groups = {"prefill_nodes": list(hosts), "decode_nodes": list(hosts)[::-1], "router": [hosts[0]], "bench_clients": [hosts[-1]]}
    return {"groups": groups, "limit": None, "cases": [{host: {**REAL, **more} for host in hosts} for _ in range(cases)]}


def resolve(real: Json) -> Any:
    """Resolve as the play does: real inventories as above, those of a rehearsal as they were written."""

    def of(where: str, deployments: Sequence[Json]) -> Json:
        if where.startswith("inventory/"):
            found = {host: {**given} for host, given in inputs(**real)["cases"][0].items()}
        else:
            found = yaml.safe_load(Path(where).read_text())["all"]["hosts"]
            found = {
                host: {k: v for k, v in given.items() if v is not None and not k.startswith("ansible_")}
                for host, given in found.items()
            }
        cases = [{host: {**given, **deployment} for host, given in found.items()} for deployment in deployments]
        return {**inputs(), "cases": cases}

    return of


def planned(tmp_path: Path, raw: Json, **real: Any) -> Planned:
    found = grid.cells(spec.parse(raw, "s", "s.yml"), "inventory/real")
    return rehearsal.plan(found, raw.get("baseline", True), resolve(real), tmp_path / "inventories")


SWEEP: Json = {
    "grid": {"ratio": ["3p1d", "1p3d"], "isl": [64, 512], "osl": [8, 32, 128], "concurrency": [1, 16]},
    "requests": 300,
}


def test_every_deployment_is_measured_under_its_heaviest_load(tmp_path: Path) -> None:
    made = planned(tmp_path, SWEEP)
    assert {cell.deploy["ratio"] for cell in made.cells} == {"3p1d", "1p3d", "4agg"}
    for ratio in ("3p1d", "1p3d", "4agg"):
        loads = [cell.load for cell in made.cells if cell.deploy["ratio"] == ratio]
        lengths = [(load["bench_input_len"], load["bench_output_len"], load["bench_concurrency"]) for load in loads]
        assert lengths == [(512, 128, 16)]
        assert {load["bench_num_requests"] for load in loads} == {rehearsal.REQUESTS}
    assert "3 of 36 cells" in made.notes[0]
    assert all(plan["emulated"] for plan in made.plans.values())


def test_what_is_wrong_with_the_real_sweep_is_said_by_its_rehearsal(tmp_path: Path) -> None:
    raw = {"grid": {"ratio": ["1p1d"]}, "fixed": {"engine_args": {"page-siez": 1}}}
    with pytest.raises(UserError, match="page-siez"):
        planned(tmp_path, raw)
    assert not (tmp_path / "inventories").exists()


def test_hosts_of_a_rehearsal_are_this_machine_and_nothing_of_the_real_ones_engine_is_left(tmp_path: Path) -> None:
    made = planned(tmp_path, SWEEP)
    (path,) = {cell.inventory for cell in made.cells}
    written = yaml.safe_load(Path(path).read_text())["all"]
    hosts = written["hosts"]
    assert list(hosts) == ["h1", "h2"]
    assert [list(group["hosts"]) for group in written["children"].values()] == [["h1", "h2"], ["h2", "h1"], ["h1"], ["h2"]]
    assert len({host["address"] for host in hosts.values()}) == len({host["state_dir"] for host in hosts.values()}) == 2
    for host in hosts.values():
        assert host["ansible_connection"] == "local"
        assert host["ansible_become"] is False
        assert ipaddress.ip_address(host["address"]).is_loopback
        assert {host[name] for name in ("engine", "service_manager", "model")} == {"emulated", "supervisord", "emulated/Big-120b"}
        assert (host["gpus"], host["tensor_parallel_size"], host["rdma_fabric"]) == (8, 2, "infiniband")
        # null, not left out: group_vars of the site would hold again
        gone = (
            "engine_args",
            "engine_env",
            "runtime",
            "engine_image",
            "api_key",
            "model_source",
            "served_model_name",
            "cache_dir",
        )
        assert [host[name] for name in gone] == [None] * len(gone)
        assert not {"router_port", "worker_port_base"} & set(host)
        assert not {"/var/lib/pd", "/opt/pd", "192.0.2.7"} & {str(value) for value in host.values()}


def test_what_is_left_to_be_found_on_real_hosts_is_assumed(tmp_path: Path) -> None:
    made = planned(tmp_path, {"grid": {"ratio": ["2p2d"]}}, gpus="auto", rdma_fabric="auto", rdma_devices=None, address=None)
    assert not any("unknown" in plan for plan in made.plans.values())
    assert made.gpus(made.cells[0]) == 8


def test_many_hosts_have_addresses_of_their_own() -> None:
    content = rehearsal.inventory(inputs([f"h{number}" for number in range(600)]), Path("/x"))
    addresses = {host["address"] for host in content["all"]["hosts"].values()}
    assert len(addresses) == 600
    assert all(ipaddress.ip_address(address).is_loopback for address in addresses)


@pytest.mark.parametrize(
    ("real", "swept", "kept"),
    [
        ({"engine": "vllm", "router": "vllm-router", "router_policy": "consistent_hash"}, {}, ("sglang-router", "round_robin")),
        ({"router": "smg", "router_policy": "prefix_hash"}, {}, ("smg", "prefix_hash")),
        ({}, {"router": ["smg"], "router_policy": ["least_load"]}, ("smg", "least_load")),
    ],
)
def test_routers_and_policies_are_kept_where_emulated_workers_can_stand_behind_them(
    tmp_path: Path, real: Json, swept: Json, kept: tuple[str, str]
) -> None:
    # vllm-router takes no key, and vLLM has no page-size
    made = planned(tmp_path, {"grid": {"ratio": ["1p1d"], **swept}, "baseline": False}, api_key=None, engine_args={}, **real)
    (plan,) = made.plans.values()
    argv = plan["router"]["argv"]
    assert (plan["router"]["name"], argv[argv.index("--policy") + 1]) == kept


def test_backends_that_the_emulator_has_are_kept_and_engine_flags_are_measured_once(tmp_path: Path) -> None:
    raw = {"grid": {"ratio": ["1p1d"], "transfer_backend": ["nixl", "mooncake"], "engine_args": [{}, {"page-size": 32}]}}
    made = planned(tmp_path, {**raw, "baseline": False})
    assert [cell.deploy for cell in made.cells] == [{"ratio": "1p1d", "transfer_backend": one} for one in ("nixl", "mooncake")]
    assert {plan["transfer_backend"] for plan in made.plans.values()} == {"nixl", "mooncake"}


def test_models_keep_apart_and_are_not_called_by_the_name_of_the_real_one(tmp_path: Path) -> None:
    made = planned(tmp_path, {"grid": {"ratio": ["1p1d"], "model": ["org/a", "org/b"]}, "baseline": False})
    assert [plan["model"] for plan in made.plans.values()] == ["emulated/a", "emulated/b"]
    assert [cell.variables["model"] for cell in made.cells] == ["org/a", "org/b"]


FULL: Json = {"bench_num_requests": 200, "bench_warmup": None, "bench_duration": None, "bench_load": {}}


@given(
    st.fixed_dictionaries({
        "bench_num_requests": st.integers(1, 10_000), "bench_warmup": st.none() | st.integers(0, 99),
        "bench_duration": st.none() | st.floats(0.01, 1e4),
    })
)  # fmt: skip
def test_no_load_is_made_heavier(full: Json) -> None:
    short = rehearsal.short_load({**full, "bench_load": {}}, {"bench_input_len": 7})
    assert short["bench_input_len"] == 7
    assert short["bench_num_requests"] == min(full["bench_num_requests"], rehearsal.REQUESTS)
    assert short["bench_warmup"] <= rehearsal.WARMUPS
    assert ("bench_duration" in short) == (full["bench_duration"] is not None)
    assert short.get("bench_duration", 0) <= rehearsal.SECONDS


def test_stages_of_a_load_file_are_cut_too() -> None:
    load = {
        "stages": [{"request_rate": 4, "to": 40, "duration": 600}, {"concurrency": 8, "num_requests": 500}, {"batch": 64}],
        **{"num_requests": "many", "prefix_len": 900},
    }
    short = rehearsal.short_load({**FULL, "bench_load": load}, {})["bench_load"]
    assert json.dumps(short["stages"]) == (
        '[{"request_rate": 4, "to": 40, "duration": 10.0}, {"concurrency": 8, "num_requests": 20}, {"batch": 64}]'
    )
    assert (short["num_requests"], short["prefix_len"]) == ("many", 900), "what is wrong is for pdbench run to say"
