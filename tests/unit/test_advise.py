"""Laws of `pdbench advise`: its simulations, its ranking, its check against what was measured."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdbench.advise import check, cli, fitted, rank, say, simulate
from pdbench.advise.draw import picture
from pdbench.advise.layout import STAGES, Layout, alike, of_plan, rates_of
from pdbench.advise.pool import pool
from pdbench.advise.simulate import Work, redrawn
from pdbench.fit.cases import Case, transport_of
from pdbench.load.errors import LoadError
from pdbench.load.lengths import Lengths
from pdbench.load.requests import Load
from pdbench.load.trace import Row
from pdbench.metrics import Slo
from pdbench.model import profile
from pdbench.model.cluster import Prompt
from pdbench.model.profile import Profile
from pdbench.sweep import tidy
from pdlib import ratio as ratios

TINY, H200 = profile.load("tiny"), profile.load("h200-qwen2.5-3b")
LIMITS = Slo(ttft_ms=1500, tpot_ms=40)


def load(isl: str, osl: str, count: int = 150, **pace: Any) -> Load:
    return Load(Lengths.parse(isl), Lengths.parse(osl), count, 7, **pace)


def works(one: Load, seeds: int, slo: Slo | None = None) -> list[Work]:
    return [simulate.work(one, slo or Slo(), seed) for seed in range(seeds)]


def advised(
    layouts: Sequence[Layout], given_works: Sequence[Work], profiles: dict[str, Profile], moved: int = 0
) -> list[rank.Ranked]:
    with pool((layouts, profiles, given_works), 1) as spread:
        return rank.advise(layouts, len(given_works), rank.goal_of(given_works[0]), spread, moved)


def split(workers: int) -> list[Layout]:
    return [alike(p, workers - p, 0, "tiny") for p in range(1, workers)]


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from(["prefill", "decode"]), st.integers(1, 99))
def test_more_gpus_never_lower_goodput_beyond_noise(prefill: int, decode: int, role: str, seed: int) -> None:
    sent = simulate.work(load("200-1200", "10-60", 100, rate=15.0), LIMITS, seed)
    more = alike(prefill + (role == "prefill"), decode + (role == "decode"), 0, "tiny")
    small, large = (
        simulate.simulate(one, sent, {"tiny": TINY}).figures["goodput"] for one in (alike(prefill, decode, 0, "tiny"), more)
    )
    # Two requests of the hundred more or less are noise: at 15 a second, each is 0.15/s.
    assert large >= 0.95 * small - 2 * 0.15


def test_a_faster_prefill_moves_the_best_ratio_towards_decode() -> None:
    fast = replace(TINY, gpu=replace(TINY.gpu, tflops=4 * TINY.gpu.tflops))
    sent = works(load("800-1200", "30-50", 100, concurrency=48), 3)
    before, after = (advised(split(6), sent, {"tiny": one})[0].layout for one in (TINY, fast))
    assert len(after.decode) > len(before.decode)


def test_the_ranking_does_not_depend_on_the_order_of_the_seeds() -> None:
    layouts, sent = split(5), works(load("300-900", "10-30", 80, concurrency=24), 4)
    runs = {p: [simulate.simulate(one, each, {"tiny": TINY}) for each in sent] for p, one in enumerate(layouts)}
    goal = rank.goal_of(sent[0])
    first = [(each.layout.ratio, each.rank) for each in rank.ranked(layouts, runs, goal)]
    for order in ([3, 1, 0, 2], [1, 2, 3, 0]):
        shuffled = {place: [own[seed] for seed in order] for place, own in runs.items()}
        assert [(each.layout.ratio, each.rank) for each in rank.ranked(layouts, shuffled, goal)] == first


def test_equals_share_the_first_rank_and_the_worse_do_not() -> None:
    twin = replace(alike(2, 2, 0, "tiny"), ratio="twin")
    order = advised(
        [alike(2, 2, 0, "tiny"), twin, alike(1, 3, 0, "tiny")],
        works(load("2000-3000", "5-9", 80, concurrency=32), 4),
        {"tiny": TINY},
    )
    assert [(each.layout.ratio, each.rank) for each in order] == [("2p2d", 1), ("twin", 1), ("1p3d", 3)]
    assert say.verdict(order, "output_throughput_per_gpu").startswith("predicted equal")


def test_what_limits_is_found_by_making_it_faster() -> None:
    long_prompts, long_answers = works(load("3000", "4", 24, concurrency=16), 3), works(load("10", "60", 64, concurrency=64), 3)
    cases = [(long_prompts, "prefill"), (long_answers, "decode")]
    for sent, stage in cases:
        (only,) = advised([alike(1, 1, 0, "tiny")], sent, {"tiny": TINY}, 1)
        assert only.limit == stage
        assert f"limited by: {stage}" in say.verdict([only], "output_throughput_per_gpu")
    slow = replace(H200, engine=replace(H200.engine, frontend_us_per_token=500.0))
    (only,) = advised([alike(1, 1, 0, "h")], works(load("20", "40", 80, concurrency=40), 3), {"h": slow}, 1)
    assert only.limit == "front end"
    thin = replace(TINY, transports={**TINY.transports, "tcp": replace(TINY.transports["tcp"], bandwidth_gb_per_s=0.02)})
    (only,) = advised([alike(1, 1, 0, "tiny", way="tcp")], works(load("1000", "4", 24, concurrency=8), 3), {"tiny": thin}, 1)
    assert only.limit == "KV link"
    full = replace(
        alike(2, 1, 0, "tiny"), decode=(replace(alike(1, 1, 0, "tiny").decode[0], flags=(("max-total-tokens", 6000.0),)),)
    )
    (only,) = advised([full], works(load("1000", "40", 40, concurrency=16), 3), {"tiny": TINY}, 1)
    assert only.limit == "KV memory"
    assert only.stage("KV memory").wait_ms > 0


def test_a_load_that_is_served_anyway_has_no_limit() -> None:
    (only,) = advised([alike(2, 2, 0, "tiny")], works(load("100", "10", 60, rate=2.0), 3, LIMITS), {"tiny": TINY}, 1)
    assert only.limit == ""
    assert "No stage of 2p2d holds it back" in say.verdict([only], "goodput_per_gpu")


def test_figures_are_those_of_the_definitions() -> None:
    work = Work((Prompt(100, 3, 0.0), Prompt(50, 1, 0.5)), None, Slo(ttft_ms=1e6))
    found = simulate.simulate(alike(0, 0, 1, "tiny"), work, {"tiny": TINY})
    rates, _ = rates_of(alike(0, 0, 1, "tiny").aggregated[0], {"tiny": TINY}, {})
    first, second = rates.prefill_s([(100, 0)]), rates.prefill_s([(50, 0)])
    steps = rates.decode_s(1, 101) + rates.decode_s(1, 102)
    assert found.figures["ttft_ms_mean"] == pytest.approx((first + second) / 2 * 1e3)
    assert found.figures["duration_s"] == pytest.approx(0.5 + second)
    assert found.figures["itl_ms_mean"] == pytest.approx(steps / 2 * 1e3)
    assert found.figures["output_throughput"] == pytest.approx(4 / (0.5 + second))
    assert found.figures["goodput_per_gpu"] == pytest.approx(2 / (0.5 + second))
    assert found.stages["prefill"].busy == pytest.approx((first + second) / (0.5 + second))


def test_a_ratio_that_cannot_serve_a_prompt_is_not_ranked() -> None:
    tight = replace(
        alike(1, 1, 0, "tiny"), decode=(replace(alike(1, 1, 0, "tiny").decode[0], flags=(("max-total-tokens", 900.0),)),)
    )
    order = advised([tight, alike(2, 1, 0, "tiny")], works(load("1000", "5", 20, concurrency=4), 3), {"tiny": TINY})
    assert [(each.layout.ratio, each.rank) for each in order] == [("2p1d", 1), ("1p1d", 0)]
    text = say.table(order, "output_throughput_per_gpu")
    assert "1p1d" in text.splitlines()[-1]
    assert "900" in text.splitlines()[-1]
    assert say.verdict(order[1:], "output_throughput_per_gpu").startswith("no ratio can serve")


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_that_is_faster_makes_anything_slower(stage: str) -> None:
    sent = works(load("500-900", "20-40", 100, concurrency=32), 1)[0]
    for one in (alike(1, 2, 0, "h", way="tcp"), alike(0, 0, 2, "h")):
        plain, faster = (simulate.simulate(one, sent, {"h": H200}, given) for given in (None, {stage: 1.5}))
        assert faster.figures["output_throughput"] >= 0.99 * plain.figures["output_throughput"]


def test_a_redrawn_trace_keeps_its_minutes_and_its_lengths() -> None:
    rng = random.Random(1)
    rows = [Row(at, rng.randint(100, 200) + 1000 * (at >= 60), 5) for at in sorted(rng.uniform(0, 120) for _ in range(2000))]
    again = redrawn(rows, random.Random(2))
    assert again != rows
    assert [row.arrival_s for row in again] == sorted(row.arrival_s for row in again)
    for begin in (0, 60):
        before, after = (sorted(r.isl for r in each if begin <= r.arrival_s < begin + 60) for each in (rows, again))
        assert set(after) <= set(before)
        assert abs(len(after) - len(before)) < 5 * math.sqrt(len(before))
    assert abs(len(redrawn(rows, random.Random(3), 2.5)) - 5000) < 5 * math.sqrt(5000)


def test_a_plan_gives_workers_flags_and_ways() -> None:
    def worker(name: str, gpus: list[int], argv: list[str]) -> dict[str, Any]:
        return {"name": name, "role": name.split("-")[0], "ranks": [{"host": "h", "gpus": gpus, "argv": argv}]}

    plan = {
        "ratio": "2p1d",
        "workers": [
            worker("prefill-0", [0], ["--chunked-prefill-size", "4096"]),
            worker("prefill-1", [1], []),
            worker("decode-0", [2, 3], []),
        ],
        "pairs": [
            {"prefill": f"prefill-{i}", "decode": "decode-0", "expected_transport": way} for i, way in enumerate(("rdma", "tcp"))
        ],
    }
    found = of_plan(plan, lambda host: f"profile of {host}")
    assert found.gpus == 4
    assert found.ways == (("rdma",), ("tcp",))
    assert found.prefill[0].flags == (("chunked-prefill-size", 4096.0),)
    assert found.decode[0].gpus == 2
    assert {spot.profile for spot in found.prefill} == {"profile of h"}


def test_pictures_and_json_of_a_ranking() -> None:
    sent = works(load("300", "10", 40, concurrency=8), 3, LIMITS)
    order = advised(split(3), sent, {"tiny": TINY}, 1)
    assert picture(order, "goodput_per_gpu", "title").startswith(b"\x89PNG")
    made = say.to_json(order, "goodput_per_gpu", {}, {"tiny": TINY}, LIMITS)
    assert json.loads(json.dumps(made, allow_nan=False))["ratios"][0]["gains"].keys() == set(STAGES)
    plain = advised(split(3), works(load("300", "10", 20, concurrency=4), 3), {"tiny": TINY}, 1)
    without = say.to_json(plain, "output_throughput_per_gpu", {}, {"tiny": TINY}, Slo())
    assert json.loads(json.dumps(without, allow_nan=False))["ratios"][0]["figures"]["goodput_per_gpu"]["mean"] is None
    assert "chosen" in say.grounds(TINY)
    assert "goodput/s/GPU" in say.table(order, "goodput_per_gpu")


# ---------------------------------------------------------------- predicted beside measured


def measured(figures: Profile, loads: Sequence[int] = (4, 24), repeats: int = 3, noise: float = 0.0) -> pd.DataFrame:
    """A tidy table that the model itself made: every prediction by the same profile must agree."""
    rng, rows = random.Random(5), []
    for one in (alike(1, 3, 0, "p"), alike(2, 2, 0, "p"), alike(3, 1, 0, "p"), alike(0, 0, 4, "p")):
        for concurrency in loads:
            sent = Work((Prompt(600, 20),) * 48, concurrency)
            made = simulate.simulate(one, sent, {"p": figures}).figures
            for repeat in range(1, repeats + 1):
                off = rng.lognormvariate(0, noise)
                rows.append(
                    {"cell": f"{one.ratio}-{concurrency}", "repeat": repeat, "run": "", "point": 0, "ratio": one.ratio, "gpus": 4,
                     "engine": "sglang", "transfer_backend": "nixl", "concurrency": concurrency, "isl": 600.0, "osl": 20.0,
                     "valid": True, "completed": 48, "failed": 0, "seed": repeat, "variables": "{}",
                     **{name: made[name] * off for name in check.FIGURES}}
                )  # fmt: skip
    return tidy.frame(rows).assign(folder="", side="A")


def test_the_models_own_output_is_predicted_without_error() -> None:
    rows = measured(TINY)
    found = check.predicted(rows, lambda host: "p", {"p": TINY}, lambda shared: pool(shared, 1))
    assert len(found) == 8
    for cell in found:
        assert all(cell.error(figure) == pytest.approx(0, abs=1e-12) for figure in check.FIGURES)
    who = check.winners(rows, found)
    assert check.right(who.all) == len(who.all) == 2
    assert check.right(who.decided) == len(who.decided) > 0


def test_winners_are_told_by_goodput_where_all_runs_had_limits() -> None:
    rows = measured(TINY, loads=(4,)).assign(goodput=lambda made: [9.0 if ratio == "1p3d" else 1.0 for ratio in made["ratio"]])
    found = check.predicted(rows, lambda host: "p", {"p": TINY}, lambda shared: pool(shared, 1))
    assert check.goal(found) == check.GOODPUT
    who = check.winners(rows, found, check.goal(found))
    assert [one[1] for one in who.decided] == ["1p3d"]
    said = check.words(found, who)
    assert "good/s" in said
    assert "right winners by requests/s within the limits, per GPU: " in said
    without = check.predicted(measured(TINY, loads=(4,)), lambda host: "p", {"p": TINY}, lambda shared: pool(shared, 1))
    assert check.goal(without) == check.goal([]) == check.THROUGHPUT
    assert "good/s" not in check.words(without, None)


def test_a_wrong_profile_is_off_and_noise_decides_no_winner() -> None:
    rows = measured(TINY)
    slow = replace(TINY, gpu=replace(TINY.gpu, tflops=TINY.gpu.tflops / 2))
    found = check.predicted(rows, lambda host: "p", {"p": slow}, lambda shared: pool(shared, 1))
    assert check.mean_error(found, check.TTFT) > 0.2
    noisy = measured(TINY, loads=(4,), noise=0.5)
    assert (
        check.winners(noisy, check.predicted(noisy, lambda host: "p", {"p": TINY}, lambda shared: pool(shared, 1))).decided == []
    )
    single = measured(TINY, repeats=1)
    assert check.winners(single, found).decided == []  # one run a side, and its requests are not at hand


def test_leave_one_out_fits_without_the_ratio_that_it_predicts() -> None:
    rows, seen = measured(TINY, loads=(4,), repeats=1), []

    def fit(others: pd.DataFrame) -> Profile:
        seen.append(set(others["ratio"]))
        return TINY

    found = check.leave_one_out(rows, fit, lambda shared: pool(shared, 1))
    assert [cell.ratio for cell in found] == ["1p3d", "2p2d", "3p1d", "4agg"]
    assert [{"1p3d", "2p2d", "3p1d", "4agg"} - each for each in seen] == [{"1p3d"}, {"2p2d"}, {"3p1d"}, {"4agg"}]
    assert check.mean_error(found, check.THROUGHPUT) < 1e-9
    with pytest.raises(ValueError, match="one ratio"):
        check.leave_one_out(rows[rows["ratio"] == "2p2d"], fit, lambda shared: pool(shared, 1))


def test_profiles_are_fitted_to_runs_and_to_the_way_of_those_that_moved_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    def case(ratio: str, transport: str) -> Case:
        decode = ratios.parse(ratio).decode
        return Case(ratio, ratio, decode, decode, 1 - decode, 1, transport, ((1, 1),), 1, (), 0, 0, False, {})

    runs = {"a": [case("agg", "cuda_ipc"), case("agg", "cuda_ipc")], "b": [case("1p1d", "tcp")], "c": [case("1p1d", "rdma")]}
    monkeypatch.setattr(fitted, "read", lambda folder: runs[folder.name])
    rows = pd.DataFrame({"folder": ["a", "b"], "point": [1, 0], "ratio": ["agg", "1p1d"]})
    found = fitted.cases(rows)
    assert [one.transport for one in found] == ["cuda_ipc", "tcp"]
    assert transport_of(found) == "tcp", "aggregated servers move nothing, whatever way they name"
    with pytest.raises(LoadError, match="went over rdma and tcp"):
        fitted.cases(rows.assign(folder=["b", "c"], point=[0, 0]))
    with pytest.raises(LoadError, match="pdbench import --gpus N"):
        fitted.cases(rows.assign(folder="", gpus=float("nan")))


def test_check_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = measured(H200, loads=(4,), repeats=1).drop(columns=["folder", "side"]).assign(emulated=True)
    # what a published table has: not every column
    rows[
        ["ratio", "gpus", "transfer_backend", "concurrency", "isl", "osl", "valid", "completed", "emulated", *check.FIGURES]
    ].to_csv(tmp_path / "t.csv", index=False)
    args = [
        "--check",
        str(tmp_path / "t.csv"),
        "--profile",
        "h200-qwen2.5-3b",
        "--processes",
        "1",
        "--output",
        str(tmp_path / "out"),
    ]
    assert cli.main(args) == 0
    said = capsys.readouterr().out
    assert "mean absolute error of throughput: 0.0% (4 cells)" in said
    emulated = "the engine was emulated: no GPU was used, these figures say nothing about hardware"
    assert f"note: {emulated}" in said
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert found["throughput_error"] == pytest.approx(0, abs=1e-6)
    assert found["notes"] == [emulated]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--check", "nowhere.csv", "--profile", "tiny"], 1, "nowhere.csv: No such file"),
        (["--check", "nowhere", "--profile", "tiny"], 1, "nowhere"),
        (["--check", "x.csv"], 2, "--check needs --profile"),
        (["--check", "x.csv", "--profile", "tinny"], 2, "did you mean tiny"),
        (["--leave-one-out"], 2, "goes with --check PATH"),
        (["--check", "x.csv", "--leave-one-out", "--profile", "n1=tiny"], 1, "x.csv: No such file"),
        (["--seeds", "0"], 2, "--seeds must be at least 1"),
        (["-e", "ratoi=1p1d"], 2, "did you mean ratio"),
        (["-e", "ratio"], 2, "NAME=VALUE"),
        (["-i", "inventory/nowhere"], 2, "no such file or folder"),
        (["--slo-ttft-ms", "-1"], 2, "must be above 0"),
        (["--concurency", "3"], 2, "--concurency"),
    ],
)
def test_a_mistake_is_one_message(args: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == code
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("pdbench advise: ")
    assert len(said.strip().splitlines()) == 1


def test_two_processes_give_what_one_gives() -> None:
    layouts, sent = split(3), works(load("300", "10", 30, concurrency=8), 3)
    results = []
    for processes in (1, 2):
        with pool((layouts, {"tiny": TINY}, sent), processes) as spread:
            results.append(spread(rank.one, [(place, seed, "") for place in range(2) for seed in range(3)]))
    assert repr(results[0]) == repr(results[1])  # figures that do not exist are NaN
