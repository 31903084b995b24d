"""Real SGLang on this machine's CPU, deployed, compared, benchmarked and torn down by the verbs as a user types them."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from local.conftest import HELD_UP, REPO
from real import helpers
from real.deployment import ADMIN_KEY, KEY, Real, deployed, extra

from pdlib import autoscale

OUTPUT_TOKENS = 16
LENGTHS = (5, 17, 64, 128, 200, 333, 500, 700, 1000, 1500)


@pytest.fixture(scope="module")
def real() -> Iterator[Real]:
    """1p1d, deployed."""
    with deployed() as made:
        yield made


@pytest.fixture(scope="module")
def answers(real: Real) -> list[list[int]]:
    """What prefill and decode say together to the prompts of `prompts`."""
    return real.greedy(helpers.prompts(LENGTHS, seed=1), OUTPUT_TOKENS)


def showing(paths: Iterable[Path]) -> list[Path]:
    """Those files that hold a key."""
    return [path for path in paths if any(key.encode() in path.read_bytes() for key in (KEY, ADMIN_KEY))]


def test_it_is_the_real_engine_over_mooncake(real: Real) -> None:
    roles = {}
    for worker in real.plan()["workers"]:
        info = json.loads(helpers.get(worker["url"] + "/server_info", KEY))
        assert info["version"] == real.plan()["engine_version"]
        assert info["disaggregation_transfer_backend"] == "mooncake"
        roles[worker["name"]] = info["disaggregation_mode"]
    assert roles == {"prefill-0": "prefill", "decode-0": "decode"}


def test_every_prompt_s_kv_cache_is_moved_once(real: Real) -> None:
    urls = {worker["role"]: worker["url"] for worker in real.plan()["workers"]}
    before = {role: helpers.counters(url) for role, url in urls.items()}
    real.greedy(helpers.prompts(LENGTHS, seed=2), OUTPUT_TOKENS)
    after = {role: helpers.counters(url) for role, url in urls.items()}

    def moved(role: str, name: str) -> float:
        return helpers.counter(after[role], f"sglang:{name}") - helpers.counter(before[role], f"sglang:{name}")

    assert moved("prefill", "num_requests_total") == moved("decode", "num_requests_total") == len(LENGTHS)
    assert moved("prefill", "prompt_tokens_total") == sum(LENGTHS)
    assert moved("prefill", "cached_tokens_total") == 0
    assert moved("decode", "generation_tokens_total") == OUTPUT_TOKENS * len(LENGTHS)
    assert moved("prefill", "kv_transfer_total_mb_count") == len(LENGTHS)
    mebibytes = sum(LENGTHS) * helpers.KV_BYTES_PER_TOKEN / 2**20
    assert moved("prefill", "kv_transfer_total_mb_sum") == pytest.approx(mebibytes, rel=1e-6)
    assert moved("decode", "num_transfer_failed_reqs_total") == moved("prefill", "num_bootstrap_failed_reqs_total") == 0


def test_what_autoscale_looks_at_is_what_the_engine_says(real: Real) -> None:
    workers = {worker["name"]: worker for worker in real.plan()["workers"]}
    roles = {name: str(worker["role"]) for name, worker in workers.items()}

    def look() -> dict[str, autoscale.Figures]:
        found = {}
        for name, worker in workers.items():
            read = autoscale.read(
                helpers.get(worker["url"] + "/metrics", KEY), helpers.get(worker["url"] + "/v1/loads?include=core,disagg", KEY)
            )
            assert read is not None
            assert read.most > 0
            found[name] = read
        return found

    def streamed(prompt: list[int]) -> None:
        sampling = {"max_new_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
        body = json.dumps({"input_ids": prompt, "sampling_params": sampling, "stream": True}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        with urllib.request.urlopen(urllib.request.Request(f"{real.checkout.url}/generate", body, headers), timeout=60) as answer:
            assert b"[DONE]" in answer.read()

    before, began = look(), time.monotonic()
    for prompt in helpers.prompts(LENGTHS, seed=3):
        streamed(prompt)
    after = look()
    # A worker with nothing to do answers its router's question for its health by a token: a request that queued, too.
    router = real.plan()["router"]["argv"]
    checks = 2 + (time.monotonic() - began) // float(router[router.index("--health-check-interval-secs") + 1])
    for name in workers:
        assert 0 <= after[name].queued - before[name].queued - len(LENGTHS) <= checks
    assert after["decode-0"].gaps > before["decode-0"].gaps
    assert after["decode-0"].answers - before["decode-0"].answers == len(LENGTHS)
    seen = autoscale.observed(before, after, roles, 10)
    assert (seen.prefill, seen.decode) == (1, 1)
    assert 0 < seen.prefill_wait_s < 60
    assert 0 < seen.itl_s < 10
    assert 0 <= seen.decode_full < 1


def test_an_answer_depends_on_the_start_of_its_prompt(real: Real, answers: list[list[int]]) -> None:
    """Otherwise equal answers would not show that the KV cache of the whole prompt arrived."""
    changed = [
        [*other[: max(1, len(prompt) // 10)], *prompt[max(1, len(prompt) // 10) :]]
        for prompt, other in zip(helpers.prompts(LENGTHS, seed=1), helpers.prompts(LENGTHS, seed=3), strict=True)
    ]
    assert len(helpers.differences(answers, real.greedy(changed, OUTPUT_TOKENS))) >= len(LENGTHS) - 1


def bench(real: Real, load: dict[str, object]) -> Path:
    """The folder of a valid run."""
    real.measured("-e", "ratio=1p1d", *extra(load))
    return real.checkout.folder / "results" / "latest"


def test_a_bench_with_lengths_of_real_conversations_is_valid(real: Real) -> None:
    load: dict[str, object] = {
        "bench_api": "generate",
        "bench_trace": "tests/data/mooncake_excerpt.jsonl",
        "bench_length_scale": 0.03,
        "bench_max_input_len": 1500,
        "bench_max_output_len": 24,
        "bench_concurrency": "1,2",
        "bench_num_requests": 24,
        "bench_verify_outputs": 8,
    }
    run = bench(real, load)
    (pair,) = json.loads((run / "evidence.json").read_text())["verify"]["pairs"]
    assert (pair["error"], pair["prompts"], pair["wrong_prompts"], pair["wrong_tokens"]) == ("", 8, 0, 0)
    assert pair["worst_nats"] < 0.1
    points = json.loads((run / "summary.json").read_text())["points"]
    assert [(point["concurrency"], point["completed"], point["failed"]) for point in points] == [(1, 24, 0), (2, 24, 0)]
    requests = pd.read_parquet(run / "requests.parquet")
    assert requests.prompt_tokens.nunique() > 12
    assert (requests.cached_tokens == 0).all()
    for point in json.loads((run / "evidence.json").read_text())["points"]:
        sent = requests[requests.point == point["point"]]
        ends = [point[end]["workers"]["prefill-0"]["metrics"] for end in ("before", "after")]
        moved = [helpers.counter(metrics, "sglang:kv_transfer_total_mb_sum") for metrics in ends]
        mebibytes = int(sent.prompt_tokens.sum()) * helpers.KV_BYTES_PER_TOKEN / 2**20
        assert moved[1] - moved[0] == pytest.approx(mebibytes, rel=1e-6)
    assert not showing(path for path in run.rglob("*") if path.is_file())


def test_conversations_find_their_earlier_turns_in_the_prefix_cache(real: Real) -> None:
    """Turn by turn over the verbs: prompts grow by question and answer, prefill computes what is new, all of it is moved."""
    talk = {"isl": "40", "osl": "8", "conversation": {"turns": 3, "think": 0.1, "context": "full"}}
    run = bench(real, {"bench_api": "generate", "bench_load": talk, "bench_concurrency": "2", "bench_num_requests": 18})
    (point,) = json.loads((run / "summary.json").read_text())["points"]
    first, second, third = point["turns"]
    assert [turn["completed"] for turn in (first, second, third)] == [6, 6, 6]
    assert [turn["prompt_tokens"] for turn in (first, second, third)] == [40, 88, 136]
    assert [turn["kv_tokens"] for turn in (first, second, third)] == [48, 96, 144]
    assert first["cached_tokens"] == 0
    # the page of 1 token: everything that prefill itself computed before, the question; not the answer, which decode made
    assert second["cached_tokens"] >= 40
    assert third["cached_tokens"] >= 88
    assert third["cumulative_latency_ms"]["p50"] > second["cumulative_latency_ms"]["p50"] > first["cumulative_latency_ms"]["p50"]


@pytest.mark.parametrize(("role", "batch", "output_tokens", "steps"), [("decode", 6, 40, 5), ("prefill", 30, 4, 2)])
def test_a_role_is_profiled_by_torch_s_own_profiler(real: Real, role: str, batch: int, output_tokens: int, steps: int) -> None:
    """Prefill has five of these prompts in a step: the load is six steps long, and two are recorded while there is a queue."""
    load: dict[str, object] = {"role": role, "profile_steps": steps, "profile_slow_down": 0.5, "bench_api": "generate"}
    load |= {"bench_batch": str(batch), "bench_input_len": "400", "bench_output_len": str(output_tokens)}
    real.play("profile.yml", "-e", "ratio=1p1d", *extra(load)).good()
    (run,) = (real.checkout.folder / "results" / "profiles").glob(f"*-{role}")
    (name, worker) = next(iter(json.loads((run / "traces.json").read_text())["workers"].items()))
    assert name == f"{role}-0"
    (trace,) = worker["traces"]
    assert (trace["rank"], trace["kernels_of"], trace["emulated"]) == ("TP-0", "cpu", False)
    assert steps - 1 <= trace["steps"] <= steps + 1
    assert any(kernel["name"].startswith("aten::") for kernel in trace["kernels"])
    if role == "decode":
        # Slowed down, decode gathered the whole batch before it was released.
        assert worker["gathered"] == worker["wanted"] == batch
        assert trace["batch"] == {"min": batch, "max": batch}
    assert not showing(path for path in run.rglob("*") if path.is_file())
    assert not list(real.checkout.state("cpu").glob("run/*/profiles/*"))


def test_the_key_stands_nowhere(real: Real) -> None:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                text = (folder / name).read_bytes()
            except OSError:
                continue
            if any(key.encode() in text for key in (KEY, ADMIN_KEY)):
                found.append(f"{folder / name}")
    assert found == []
    worker = real.plan()["workers"][0]["url"]
    with pytest.raises(helpers.ServerError, match="HTTP 401"):
        helpers.ask(f"{worker}/slow_down", {"forward_sleep_time": None}, KEY)
    logs = list((real.checkout.state("cpu") / "log").iterdir())
    assert any("api_key': '***'" in path.read_text(errors="replace") for path in logs)
    assert not showing(logs)


def test_a_wrong_kv_cache_makes_a_run_invalid(real: Real) -> None:
    """Prefill sends wrong pages on purpose: only what was verified before the load shows it."""
    env = {"PYTHONPATH": str(REPO / "tests" / "real" / "corrupt"), "PD_TEST_CORRUPT_KV": "all"}
    real.play("deploy_pd.yml", "-e", json.dumps({"prefill_engine_env": env})).good()
    load = {"bench_api": "generate", "bench_input_len": "64", "bench_output_len": "8", "bench_num_requests": 8}
    load |= {"bench_concurrency": "1", "bench_verify_outputs": 4}
    play = real.play("bench.yml", "-e", "ratio=1p1d", *extra(load))
    assert play.code != 0
    verdict = json.loads((real.checkout.folder / "results" / "latest" / "validity.json").read_text())
    faults = {check["id"]: check["message"] for check in verdict["checks"] if not check["ok"]}
    # where other work keeps the client from its own, the gate says that, too
    assert "kv-correct" in faults
    assert faults.keys() <= {"kv-correct", *HELD_UP}
    assert faults["kv-correct"].startswith("prefill-0 to decode-0: the KV cache of 4 of 4 prompts arrived wrong")


def test_an_aggregated_server_gives_the_same_answers(real: Real, answers: list[list[int]]) -> None:
    real.play("deploy_pd.yml", "-e", "ratio=agg").good()
    assert [worker["role"] for worker in real.plan()["workers"]] == ["aggregated"]
    assert helpers.differences(answers, real.greedy(helpers.prompts(LENGTHS, seed=1), OUTPUT_TOKENS)) == []


def test_teardown_leaves_nothing(real: Real) -> None:
    real.play("teardown.yml").good()
    assert real.checkout.processes() == []
    assert real.checkout.bound() == set()
    assert not real.checkout.state("cpu").exists()
