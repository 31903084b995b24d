"""What one benchmark run is made of."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from unit.plans import Json, host, inputs, make_plan

from pdbench.load.errors import LoadError
from pdbench.load.lengths import Lengths
from pdbench.run.load_options import Parser, add_arguments
from pdlib import bench_load, bench_spec
from pdlib.errors import UserError

BAD = ("0", "5-4", "normal:512", "lognormal:512:9", "512,4096", "512@0", "@1", "x")
NOW = 1_700_000_000.0


def spec(root: Path, clients: tuple[str, ...] = ("n1",), tls_ca: str = "", **options: Any) -> Json:
    given = inputs({"n1": host(1, state_dir="/s", install_dir="/i"), "n2": host(2)}, "2p1d", **options)
    given = replace(given, tls_ca=tls_ca)
    made = bench_spec.make(make_plan(given), given.cluster, clients, given.hosts, str(root), NOW, "127.0.0.1:8890", "k" * 32)
    return {**made, **next(iter(made["clients"].values()))}


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
    assert list(made["clients"]) == ["n1"]
    assert made["results_dir"] == str(tmp_path / "results")
    assert made["run_id"].endswith("-2p1d")


def test_the_command_of_an_open_loop(tmp_path: Path) -> None:
    made = spec(
        tmp_path, bench_request_rate="4,8.5", bench_arrival="constant", bench_warmup=0, api_key="k", admin_api_key="a",
        bench_slo_ttft_ms=200,
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
        "--admin-api-key-file": "/s/secrets/admin_api_key",
    }
    assert {flag: value(made["argv"], flag) for flag in wanted} == wanted
    assert "--concurrency" not in made["argv"]


def test_what_calibrates_the_client_is_as_heavy_as_the_load(tmp_path: Path) -> None:
    made = spec(tmp_path, bench_concurrency="8,64,16", bench_output_len="64-256")["selfcheck"]
    assert made[:4] == ["/i/pdbench/bin/python", "-m", "pdbench", "selfcheck"]
    assert (value(made, "--concurrency"), value(made, "--osl")) == ("64", "256")
    assert value(made, "--json") == "{dir}/selfcheck.json"
    # 10 a second, each 0.05 s and 100 times 0.02 s long, are 20.5 in flight
    made = spec(tmp_path, bench_request_rate="2,10", bench_output_len=100)["selfcheck"]
    assert value(made, "--concurrency") == "21"
    assert spec(tmp_path, bench_selfcheck=False)["selfcheck"] == []


def test_the_command_of_a_trace(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("{}\n")
    made = spec(tmp_path, bench_trace="t.jsonl", bench_length_scale=0.1, bench_max_input_len=400)
    assert made["files"] == {"trace.jsonl": str(tmp_path / "t.jsonl")}
    wanted = {"--trace": "{dir}/trace.jsonl", "--length-scale": "0.1", "--max-isl": "400"}
    assert {flag: value(made["argv"], flag) for flag in wanted} == wanted
    assert not {"--isl", "--osl", "--max-osl"} & set(made["argv"])
    absolute = spec(tmp_path, bench_trace=str(tmp_path / "t.jsonl"))
    assert absolute["files"] == made["files"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"clients": ()}, "bench_clients is empty"),
        ({"bench_trace": "absent.jsonl"}, "bench_trace=absent.jsonl: there is no such file on the controller"),
        ({"bench_dataset": "absent.jsonl"}, "bench_dataset=absent.jsonl: there is no such file"),
        ({"bench_tokenizer": "absent"}, "bench_tokenizer=absent: there is no such file"),
        ({"bench_input_len": "file:absent.txt"}, "bench_input_len=absent.txt: there is no such file"),
        ({"bench_arrival": "gauss", "bench_request_rate": 4}, "bench_arrival=gauss: expected poisson, constant, or gamma:B"),
        ({"bench_time_scale": 0.5}, "bench_time_scale goes with bench_trace"),
        ({"bench_share_prefixes": True}, "bench_share_prefixes goes with bench_trace"),
        ({"bench_duration": 5}, "a closed loop ends by bench_num_requests"),
        ({"bench_batch": 5, "bench_request_rate": 4}, "bench_request_rate and bench_batch are ways to say how much load"),
        ({"bench_load": {"stages": 5}}, "stages must be a list"),
        ({"bench_load": {"stages": [{"rate": 5}]}}, "say concurrency, request_rate or batch"),
        ({"bench_load": {"stages": [{"concurrency": "x"}]}}, "expected numbers"),
        ({"bench_load": {"osl": "0"}}, "bench_load: osl: '0' is no length"),
        ({"bench_load": {"conversations": {"turns": 3}}}, "did you mean conversation?"),
        ({"bench_load": {"trace": "t.jsonl"}}, "files have variables: bench_trace"),
        ({"bench_load": {"stages": [{"batch": 4}], "concurrency": 4}}, "bench_load: concurrency and bench_load: stages are ways"),
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


def test_the_command_of_other_loads(tmp_path: Path) -> None:
    batch = spec(tmp_path, bench_batch="8,64")["argv"]
    assert value(batch, "--batch") == "8,64"
    assert not {"--num-requests", "--concurrency", "--load"} & set(batch)
    (tmp_path / "t.jsonl").write_text("{}\n")
    replay = spec(tmp_path, bench_trace="t.jsonl", bench_time_scale=0.5, bench_share_prefixes=True, bench_duration=60)["argv"]
    wanted = {"--time-scale": "0.5", "--duration": "60.0", "--trace": "{dir}/trace.jsonl"}
    assert {flag: value(replay, flag) for flag in wanted} == wanted
    assert "--share-prefixes" in replay
    assert not {"--num-requests", "--concurrency", "--request-rate"} & set(replay)
    shared = spec(tmp_path, bench_prefix_len=100, bench_arrival="gamma:0.5", bench_request_rate=3, bench_max_input_len=900)[
        "argv"
    ]
    wanted = {"--prefix-len": "100", "--arrival": "gamma:0.5", "--max-isl": "900"}
    assert {flag: value(shared, flag) for flag in wanted} == wanted


def test_what_the_load_says_itself_comes_first(tmp_path: Path) -> None:
    load = {
        "stages": [{"concurrency": 4}, {"request_rate": 2, "to": 40, "duration": 10}],
        "isl": "32",
        "conversation": {"turns": 3},
    }
    made = spec(tmp_path, bench_load=load, bench_num_requests=50)
    assert made["load"] == load
    wanted = {"--load": "{dir}/load.yml", "--num-requests": "50", "--osl": "128"}
    assert {flag: value(made["argv"], flag) for flag in wanted} == wanted
    assert not {"--concurrency", "--request-rate", "--isl"} & set(made["argv"])
    # 40 requests a second, each 50 ms and 128 tokens of 20 ms long
    assert value(made["selfcheck"], "--concurrency") == "105"
    ended = spec(tmp_path, bench_load={"request_rate": 2, "duration": 10})["argv"]
    assert not {"--num-requests", "--duration", "--request-rate"} & set(ended)


def test_files_of_the_load_go_into_the_run(tmp_path: Path) -> None:
    for name in ("d.jsonl", "l.txt", "m.txt", "tokenizer.json"):
        (tmp_path / name).write_text("5\n")
    made = spec(tmp_path, bench_dataset="d.jsonl", bench_tokenizer=".")
    assert made["files"] == {"dataset.jsonl": str(tmp_path / "d.jsonl"), "tokenizer.json": str(tmp_path / "tokenizer.json")}
    assert not {"--isl", "--osl"} & set(made["argv"])
    assert made["install"][0]["requirements"][1:] == ["no-deps:requirements/tokenizer.txt", "pdbench"]
    made = spec(tmp_path, bench_input_len="file:l.txt@0.5,64@0.25,file:m.txt@0.25", bench_output_len="file:l.txt")
    assert value(made["argv"], "--isl") == "file:{dir}/bench_input_len-0.txt@0.5,64@0.25,file:{dir}/bench_input_len-1.txt@0.25"
    assert value(made["argv"], "--osl") == "file:{dir}/bench_output_len-0.txt"
    assert [Path(path).name for path in made["files"].values()] == ["l.txt", "m.txt", "l.txt"]
    (tmp_path / "d.jsonl").write_bytes(b" " * 64_000_001)
    with pytest.raises(UserError, match="more than 64 MB"):
        spec(tmp_path, bench_dataset="d.jsonl")


@pytest.mark.parametrize(
    "text", ["512", "256-512", "normal:512:64", "lognormal:512:0.4", "512@0.7,4096@0.3", "normal:512:64@2,16-32@1", *BAD]
)
def test_lengths_are_spelled_as_the_load_generator_spells_them(text: str) -> None:
    try:
        lengths = Lengths.parse(text)
    except LoadError:
        with pytest.raises(ValueError):  # noqa: PT011
            bench_load.longest(text)
    else:
        drawn = sorted(lengths.draw(random.Random(seed)) for seed in range(400))
        assert 0.5 * drawn[-1] <= bench_load.longest(text) <= 1.3 * drawn[-1]


def test_the_keys_of_a_load_are_those_of_the_load_generator() -> None:
    parser = Parser(add_help=False)
    add_arguments(parser)
    names = {action.dest for action in parser._actions} - {"load", "trace", "dataset", "tokenizer"}
    assert set(bench_load.LOAD_KEYS) == {*names, "stages", "conversation", "prefix_groups"}


def test_the_room_that_is_needed_grows_with_what_is_recorded(tmp_path: Path) -> None:
    def needed(**options: Any) -> int:
        return int(spec(tmp_path, **options)["needed_mb"])

    base = needed(bench_num_requests=10_000)
    assert base > 200
    assert needed(bench_num_requests=100_000) - 200 >= 9 * (base - 200)
    assert needed(bench_num_requests=10_000, bench_concurrency="8,16") > base
    assert needed(bench_num_requests=10_000, bench_output_len="64-1280") > base
    assert needed(bench_num_requests=10_000, bench_min_free_mb=1000) == base + 800


def test_whom_clients_trust_lies_beside_the_run(tmp_path: Path) -> None:
    secure: dict[str, Any] = {"router_tls_cert": "a.pem", "router_tls_key": "a.key"}
    assert "--ca-file" not in spec(tmp_path)["clients"]["n1"]["argv"]
    made = spec(tmp_path, tls_ca="PEM", **secure)
    assert value(made["clients"]["n1"]["argv"], "--ca-file") == "{dir}/router-ca.pem"
    with pytest.raises(UserError, match="bench_tool=vllm is not told whom to trust, and router_tls_cert is set"):
        spec(tmp_path, bench_tool="vllm", **secure)


def test_another_client_goes_after_ours_with_a_virtualenv_of_its_own(tmp_path: Path) -> None:
    made = spec(tmp_path)
    assert made["after"] == []
    assert [row["name"] for row in made["install"]] == ["pdbench"]
    (tmp_path / "tokenizer.json").write_text("{}")
    made = spec(tmp_path, bench_tool="sglang", bench_tokenizer=".", api_key="k", admin_api_key="a", model="a/b")
    wanted = {"--tool": "sglang", "--python": "/i/bench-sglang/bin/python", "--url": "http://127.0.0.1:8000", "--model": "a/b"}
    wanted |= {"--tokenizer": "{dir}/tokenizer.json", "--api-key-file": "/s/secrets/api_key"}
    assert made["after"][:5] == ["/i/pdbench/bin/python", "-m", "pdbench", "peer", "{dir}"]
    assert {flag: value(made["after"], flag) for flag in wanted} == wanted
    assert "--admin-api-key-file" not in made["after"], "it changes nothing"
    row = made["install"][1]
    assert row == {
        "name": "bench-sglang",
        "requirements": ["requirements/bench-sglang.txt", "no-deps:requirements/bench-sglang-no-deps.txt"],
    }
    emulated = spec(tmp_path, bench_tool="vllm", engine="emulated")
    assert "--tokenizer" not in emulated["after"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"bench_tool": "sglang", "engine": "sglang", "model": "a/b"},
            "bench_tool=sglang makes its prompts with .* give bench_tokenizer",
        ),
        ({"bench_tool": "vllm", "bench_api": "generate"}, "vLLM's bench client does not know bench_api=generate"),
        ({"bench_tool": "sglang", "bench_input_len": "64-128"}, "bench_input_len is 64-128: give a number"),
        ({"bench_tool": "vllm", "bench_output_len": "normal:512:64"}, "bench_output_len is normal:512:64"),
        ({"bench_tool": "sglang", "bench_prefix_len": 8, "bench_trace": "t"}, "the load of bench_trace and bench_prefix_len"),
        ({"bench_tool": "sglang", "bench_load": {"osl": 8}}, "the load of bench_load"),
        ({"bench_tool": "sglang", "bench_request_rate": "4", "bench_arrival": "gamma:2"}, "sends poisson arrivals"),
        ({"bench_tool": "vllm", "bench_request_rate": "4", "bench_arrival": "constant"}, "sends poisson or gamma:B arrivals"),
        ({"bench_tool": "sglagn"}, "bench_tool"),
    ],
)
def test_a_load_that_the_other_client_cannot_send_is_refused(given: Json, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        spec(tmp_path, **given)


def test_the_other_client_sends_from_one_host(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bench_tool=sglang sends from one host, and bench_clients has 2"):
        spec(tmp_path, clients=("n1", "n2"), bench_tool="sglang")


def test_several_clients_get_a_share_each_and_one_calibrates_for_its_share(tmp_path: Path) -> None:
    alone = spec(tmp_path, bench_concurrency="8,9")
    assert not {"--share", "--meet", "--meet-key"} & set(alone["argv"])
    both = spec(tmp_path, clients=("n1", "n2"), bench_concurrency="8,9")["clients"]
    assert [value(me["argv"], "--share") for me in both.values()] == ["1/2", "2/2"]
    for me in both.values():
        assert (value(me["argv"], "--meet"), value(me["argv"], "--meet-key")) == ("127.0.0.1:8890", "{dir}/meet.key")
        assert "k" * 32 not in str(me), "argv is there for all to see"
        assert value(me["argv"], "--concurrency") == "8,9", "all of them have the whole schedule"
        assert value(me["selfcheck"], "--concurrency") == "5"
    assert bench_spec.meet("::1", {"bench_meet_port": 1}) == "[::1]:1"


def test_stop_saturated_is_handed_on(tmp_path: Path) -> None:
    assert "--stop-saturated" not in spec(tmp_path, bench_request_rate="2,4")["argv"]
    assert "--stop-saturated" in spec(tmp_path, bench_request_rate="2,4", bench_stop_saturated=True)["argv"]
