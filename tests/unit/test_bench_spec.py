"""What one benchmark run is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from unit.plans import Json, host, inputs

from pdlib import bench_spec
from pdlib.errors import UserError
from pdlib.plan import make_plan

NOW = 1_700_000_000.0


def spec(root: Path, clients: tuple[str, ...] = ("n1",), **options: Any) -> Json:
    given = inputs({"n1": host(1, state_dir="/s", install_dir="/i"), "n2": host(2)}, "2p1d", **options)
    return bench_spec.make(make_plan(given), given.cluster, clients, given.hosts, str(root), NOW)


def value(argv: list[str], flag: str) -> str:
    assert argv.count(flag) == 1, (flag, argv)
    return argv[argv.index(flag) + 1]


def test_the_run_has_a_sortable_safe_name() -> None:
    plan = {"ratio": "3p1d"}
    assert bench_spec.run_id(plan, "", NOW) == "20231114-221320-3p1d"
    assert bench_spec.run_id(plan, "../a b/ü é?", NOW) == "20231114-221320-3p1d-..-a-b"
    assert bench_spec.run_id(plan, " / ", NOW) == "20231114-221320-3p1d"
    assert bench_spec.run_id(plan, "x", NOW) < bench_spec.run_id(plan, "a", NOW + 1)
    assert "/" not in bench_spec.run_id(plan, "a/b/../c", NOW)


def test_the_command_of_a_closed_loop(tmp_path: Path) -> None:
    made = spec(tmp_path, bench_concurrency="8,16", bench_input_len="64-128", bench_output_len=32, model="a/b")
    argv = made["argv"]
    assert argv[:4] == ["/i/pdbench/bin/python", "-m", "pdbench", "run"]
    wanted = {
        "--url": "http://127.0.0.1:8000",
        "--model": "a/b",
        "--api": "completions",
        "--concurrency": "8,16",
        "--num-requests": "200",
        "--isl": "64-128",
        "--osl": "32",
        "--seed": "1",
        "--timeout": "600",
        "--plan": "{dir}/plan.json",
        "--output": "{dir}",
    }
    assert {flag: value(argv, flag) for flag in wanted} == wanted
    for flag in ("--request-rate", "--trace", "--warmup", "--verify-outputs", "--api-key-file", "--slo-ttft-ms"):
        assert flag not in argv
    assert made["client"] == "n1"
    assert made["results_dir"] == str(tmp_path / "results")
    assert made["run_id"].endswith("-2p1d")


def test_the_command_of_an_open_loop(tmp_path: Path) -> None:
    made = spec(
        tmp_path, bench_request_rate="4,8.5", bench_arrival="constant", bench_warmup=0, api_key="k", bench_slo_ttft_ms=200,
        bench_verify_outputs=8, bench_slo_tpot_ms=30, bench_slo_e2e_ms=5000,
    )  # fmt: skip
    wanted = {
        "--request-rate": "4,8.5",
        "--arrival": "constant",
        "--warmup": "0",
        "--verify-outputs": "8",
        "--slo-ttft-ms": "200.0",
        "--slo-tpot-ms": "30.0",
        "--slo-e2e-ms": "5000.0",
        "--api-key-file": "/s/secrets/api_key",
    }
    assert {flag: value(made["argv"], flag) for flag in wanted} == wanted
    assert "--concurrency" not in made["argv"]


def test_the_command_of_a_trace(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("{}\n")
    made = spec(tmp_path, bench_trace="t.jsonl", bench_length_scale=0.1, bench_max_input_len=400)
    assert made["trace"] == str(tmp_path / "t.jsonl")
    wanted = {"--trace": "{dir}/trace.jsonl", "--length-scale": "0.1", "--max-isl": "400"}
    assert {flag: value(made["argv"], flag) for flag in wanted} == wanted
    assert not {"--isl", "--osl", "--max-osl"} & set(made["argv"])
    absolute = spec(tmp_path, bench_trace=str(tmp_path / "t.jsonl"))
    assert absolute["trace"] == made["trace"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"clients": ()}, "bench_clients is empty"),
        ({"bench_trace": "absent.jsonl"}, "bench_trace=absent.jsonl: there is no such file on the controller"),
        ({"bench_request_rate": "4,fast"}, "bench_request_rate='fast': expected numbers above 0"),
        ({"bench_request_rate": [0]}, "bench_request_rate=0: expected numbers above 0"),
        ({"bench_request_rate": "-1"}, "above 0"),
        ({"bench_request_rate": "nan"}, "above 0"),
        ({"bench_request_rate": "inf"}, "above 0"),
        ({"bench_concurrency": ""}, "bench_concurrency"),
    ],
)
def test_bad_loads_are_refused(tmp_path: Path, options: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as refused:
        spec(tmp_path, **options)
    assert part in str(refused.value)


def test_the_room_that_is_needed_grows_with_what_is_recorded(tmp_path: Path) -> None:
    def needed(**options: Any) -> int:
        return int(spec(tmp_path, **options)["needed_mb"])

    base = needed(bench_num_requests=10_000)
    assert base > 200
    assert needed(bench_num_requests=100_000) - 200 >= 9 * (base - 200)
    assert needed(bench_num_requests=10_000, bench_concurrency="8,16") > base
    assert needed(bench_num_requests=10_000, bench_output_len="64-1280") > base
    assert needed(bench_num_requests=10_000, bench_min_free_mb=1000) == base + 800
