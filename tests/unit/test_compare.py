"""`pdbench compare`: what is matched, what is refused, what is said. How often it is wrong: test_compare_level.py."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.runfolder import good

from pdbench.cli import main
from pdbench.compare import student
from pdbench.compare.judge import FIGURES, Run, correct, judge
from pdbench.metrics import Slo
from pdbench.sweep import tidy

Json = dict[str, Any]


def run(
    folder: Path,
    ratio: str = "3p1d",
    seed: int = 1,
    concurrency: tuple[int, ...] = (4,),
    slow: float = 1.0,
    slo: Slo | None = None,
) -> Path:
    """A valid run of 24 requests a load point, ``slow`` times as slow as another."""
    made = good(concurrency=concurrency, ratio=ratio)
    made.slo = slo or Slo()
    for asked in made.asked:
        asked["seed"] = seed
    for r in made.records:
        for name in ("scheduled_s", "sent_s", "first_s", "end_s"):
            setattr(r, name, getattr(r, name) * slow)
        r.chunk_s = [t * slow for t in r.chunk_s]
    made.write(folder)
    assert main(["gate", str(folder)]) == 0
    return folder


def asked(folder: Path, prompt_tokens: int = 64, **said: Any) -> Path:
    """A run that nobody judged, whose summary says that this was asked for."""
    good(concurrency=(4,), isl=prompt_tokens).write(folder)
    summary = json.loads((folder / "summary.json").read_text())
    summary["points"] = [{**point, **said} for point in summary["points"]]
    (folder / "summary.json").write_text(json.dumps({**summary, **said}))
    return folder


def sweep(folder: Path, cells: dict[str, list[float]], concurrency: tuple[int, ...] = (4,)) -> Path:
    """A sweep: cell ids are ratios, with one repeat for each slowness."""
    listed = [{"id": name, "variables": {"ratio": name}, "deploy": {}, "load": {}} for name in cells]
    for name, repeats in cells.items():
        for place, slow in enumerate(repeats, 1):
            run(folder / f"runs/{name}/r{place}a1", name, place, concurrency, slow)
    (folder / "sweep.json").write_text(json.dumps({"schema": 1, "name": "s", "cells": listed, "order": []}))
    return folder


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> Json:
    capsys.readouterr()
    assert main(["compare", *map(str, arguments), "--json"]) == 0
    found: Json = json.loads(capsys.readouterr().out)
    return found


def shown(found: Json, at: int = 0) -> dict[str, Any]:
    return {d["metric"]: d["better"] for d in found["comparisons"][at]["differences"]}


def test_a_run_beside_itself_shows_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "a")
    found = answer(capsys, folder, folder)
    (one,) = found["comparisons"]
    assert one["paired"]
    assert not any(d["difference_shown"] for d in one["differences"])
    assert main(["compare", str(folder), str(folder)]) == 0
    said = capsys.readouterr().out
    assert "No difference shown: what differs here can be noise." in said
    assert "To see 5 % in output_throughput_per_gpu, it takes" in said


def deployed(folder: Path, **said: Any) -> Path:
    """A run whose plan says this, which nobody judged."""
    made = good(concurrency=(4,))
    made.plan |= said
    made.write(folder)
    return folder


NO_GPU = "no GPU was used, these figures say nothing about hardware"


def test_it_is_said_when_no_gpu_made_the_figures_or_a_model_is_not_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, cut = deployed(tmp_path / "r"), deployed(tmp_path / "cut", truncated="2 of 36 layers")
    emulated, other = (deployed(tmp_path / name, emulated=True) for name in ("e", "f"))
    cpu = deployed(tmp_path / "c", on_cpu=True)
    assert not any(NO_GPU in remark for remark in answer(capsys, real, cut)["remarks"])
    assert f"the engine was emulated: {NO_GPU}" in answer(capsys, emulated, other)["remarks"]
    assert main(["compare", str(emulated), str(other)]) == 0
    assert f"note: the engine was emulated: {NO_GPU}" in capsys.readouterr().out
    said = answer(capsys, real, cpu)["remarks"]
    assert f"the engine ran on a CPU (B): {NO_GPU}" in said
    assert "one side ran on a CPU: this is no comparison of like with like" in said
    said = answer(capsys, cut, real)["remarks"]
    assert "the model is not whole (A): 2 of 36 layers" in said
    assert any(remark.startswith("the model is not as whole on one side") for remark in said)
    assert main(["compare", str(emulated), "--plan"]) == 0
    assert f"note: the engine was emulated: {NO_GPU}" in capsys.readouterr().out


RATE = {"concurrency": None, "request_rate": 4.0}
TRACE = {"concurrency": None, "trace": "t.jsonl", "isl": None, "osl": None}


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ({**RATE, "arrival": "constant"}, {**RATE, "arrival": "gamma:0.1"}, "arrival gamma:0.1"),
        ({**RATE, "arrival": "poisson"}, {**RATE, "arrival": "poisson", "request_rate_to": 8.0}, "request rate to 8.0"),
        ({**TRACE, "time_scale": 1.0}, {**TRACE, "time_scale": 0.25}, "time scale 0.25"),
        ({**TRACE, "time_scale": 1.0}, {**TRACE, "time_scale": 1.0, "trace": "u.jsonl"}, "trace u.jsonl"),
        ({}, {"batch": True}, "all at once"),
        ({}, {"num_requests": 25}, "25 requests"),
        ({}, {"prefix_len": 32, "prefix_groups": 2}, "prefix len 32, prefix groups 2"),
        ({}, {"conversation": {"turns": "2-6"}}, 'conversation {"turns": "2-6"}'),
        ({}, {"api": "chat"}, "api chat"),
    ],
)
def test_what_is_sent_in_another_way_is_another_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one: Json, other: Json, told: str
) -> None:
    a, b = asked(tmp_path / "a", **one), asked(tmp_path / "b", **other)
    assert main(["compare", str(a), str(b)]) == 2
    said = capsys.readouterr().err
    assert "no load is on both sides" in said
    assert told in said.split("only B has")[1]


def test_repeats_of_drawn_lengths_are_one_load_whatever_their_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    means = {1: 60, 2: 64, 3: 70}
    a, b = (
        ",".join(str(asked(tmp_path / f"{side}{n}", mean, isl="lognormal:64:0.4", seed=n)) for n, mean in means.items())
        for side in "ab"
    )
    (one,) = answer(capsys, a, b)["comparisons"]
    assert (one["runs"], one["load"]) == ([3, 3], "concurrency 4, lognormal:64:0.4 in, 6 out, 24 requests")


def test_a_table_that_does_not_say_what_was_asked_for_is_the_load_like_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of an import; where two loads are like it, it is neither."""
    ours, other = asked(tmp_path / "a"), asked(tmp_path / "b", api="chat", batch=True)
    tidy.read_runs([ours]).drop(columns="asked").to_csv(tmp_path / "theirs.csv", index=False)
    (one,) = answer(capsys, ours, tmp_path / "theirs.csv")["comparisons"]
    assert one["load"] == "concurrency 4, 64 in, 6 out, 24 requests"
    assert main(["compare", f"{ours},{other}", str(tmp_path / "theirs.csv")]) == 2
    assert "no load is on both sides" in capsys.readouterr().err


def test_what_arrives_in_a_time_is_drawn_and_no_other_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (
        asked(tmp_path / name, concurrency=None, request_rate=4.0, duration=60.0, num_requests=count)
        for name, count in (("a", 240), ("b", 251))
    )
    assert answer(capsys, a, b)["comparisons"][0]["load"] == "4 req/s, 64 in, 6 out, duration 60.0"


def test_runs_of_another_arrival_are_no_repeats_of_one_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep over bench_arrival, in a table of an older checkout, too."""
    folder, cells = tmp_path / "s", [(ratio, way) for ratio in ("4agg", "3p1d") for way in ("constant", "gamma:0.1")]
    listed = []
    for ratio, way in cells:
        name = f"{ratio}-{way.partition(':')[0]}"
        listed.append({"id": name, "variables": {"ratio": ratio, "bench_arrival": way}, "deploy": {}, "load": {}})
        for n in (1, 2, 3):
            made = good(concurrency=(4,), ratio=ratio)
            made.asked = [{**entry, **RATE, "arrival": way, "seed": n} for entry in made.asked]
            made.write(folder / f"runs/{name}/r{n}a1")
    (folder / "sweep.json").write_text(json.dumps({"schema": 1, "name": "s", "cells": listed, "order": []}))
    tidy.read(folder).drop(columns="asked").to_csv(tmp_path / "old.csv", index=False)
    for side in (folder, tmp_path / "old.csv"):
        assert [c["runs"] for c in answer(capsys, side)["comparisons"]] == [[3, 3], [3, 3]]


def test_a_run_half_as_fast_is_worse_in_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = Slo(ttft_ms=1000)
    a, b = run(tmp_path / "a", slo=slow), run(tmp_path / "b", slow=2.0, slo=slow)
    found = answer(capsys, a, b)
    assert {d["better"] for d in found["comparisons"][0]["differences"] if not d["metric"].endswith("_p99")} == {"A"}
    mean = next(d for d in found["comparisons"][0]["differences"] if d["metric"] == "ttft_ms_mean")
    assert mean["change"] == pytest.approx(1.0)
    assert mean["low"] < 1.0 < mean["high"]


def test_other_prompts_are_not_paired_and_it_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run(tmp_path / "a"), run(tmp_path / "b", seed=2)
    (one,) = answer(capsys, a, b)["comparisons"]
    assert not one["paired"]
    assert one["unpaired_because"] == "the prompts are not the same: seed 1 and seed 2"


def test_repeats_are_the_unit_where_there_are_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = ",".join(str(run(tmp_path / f"a{i}", seed=i, slow=1 + i / 100)) for i in range(3))
    b = ",".join(str(run(tmp_path / f"b{i}", seed=i, slow=1.1 * (1 + i / 100))) for i in range(3))
    found = answer(capsys, a, b, "--metric", "e2e_ms_mean")
    (one,) = found["comparisons"]
    assert (one["runs"], one["paired"], one["assumed_spread"]) == ([3, 3], True, None)
    (difference,) = one["differences"]
    assert difference["better"] == "A"
    assert difference["change"] == pytest.approx(0.1)
    assert difference["high"] - difference["low"] < 0.01  # drift that a pair shares is no noise


def test_throughput_is_per_all_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run(tmp_path / "a", "3p1d"), run(tmp_path / "b", "1p1d")
    found = answer(capsys, a, b, "--metric", "output_throughput_per_gpu")
    (difference,) = found["comparisons"][0]["differences"]
    assert difference["b"] == pytest.approx(2 * difference["a"])
    assert difference["better"] == "B"


def test_a_sweep_is_compared_with_its_aggregated_baseline_at_the_same_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sweep(tmp_path / "s", {"4agg": [1.0, 1.01, 1.02], "3p1d": [2.0, 2.02, 2.04], "1p1d": [1.0]}, (4, 8))
    found = answer(capsys, folder)
    assert [(c["a"], c["b"], c["load"].split(",")[0]) for c in found["comparisons"]] == [
        ("4agg, 4 GPUs", "3p1d, 4 GPUs", "concurrency 4"),
        ("4agg, 4 GPUs", "3p1d, 4 GPUs", "concurrency 8"),
    ]
    assert shown(found)["e2e_ms_mean"] == shown(found, 1)["e2e_ms_mean"] == "A"
    assert "no aggregated baseline on 2 GPUs for 1p1d, 2 GPUs at concurrency 4, 64 in, 6 out, 24 requests" in found["remarks"]
    assert found["family"] == 16


def test_two_sweeps_are_matched_by_configuration_or_one_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = sweep(tmp_path / "one", {"4agg": [1.0], "3p1d": [1.0]})
    other = sweep(tmp_path / "two", {"4agg": [1.0], "3p1d": [1.0]})
    assert [(c["a"], c["b"]) for c in answer(capsys, one, other)["comparisons"]] == [
        ("4agg, 4 GPUs", "4agg, 4 GPUs"),
        ("3p1d, 4 GPUs", "3p1d, 4 GPUs"),
    ]
    found = answer(capsys, f"{one}:ratio=4agg", f"{other}:ratio=3p1d,concurrency=4")
    assert [(c["a"], c["b"]) for c in found["comparisons"]] == [("4agg, 4 GPUs", "3p1d, 4 GPUs")]
    assert main(["compare", str(one), str(run(tmp_path / "r", "1p1d"))]) == 2
    assert "holds several configurations (4agg, 4 GPUs; 3p1d, 4 GPUs): choose one" in capsys.readouterr().err


def test_invalid_runs_are_refused_with_their_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run(tmp_path / "a"), run(tmp_path / "b")
    path = b / "validity.json"
    verdict = json.loads(path.read_text())
    verdict["checks"].append({"id": "kv", "ok": False, "point": None, "message": "KV did not move", "evidence": {}})
    path.write_text(json.dumps({**verdict, "valid": False}))
    assert main(["compare", str(a), str(b)]) == 3
    shown = capsys.readouterr()
    assert "is invalid: KV did not move" in shown.err
    assert not shown.out.strip().startswith("A:")
    (b / "validity.json").unlink()
    assert "`pdbench gate` was not run on them" in answer(capsys, a, b)["remarks"][0]


def test_an_import_stands_beside_our_own_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = run(tmp_path / "r")
    assert main(["export", str(own), "--format", "sglang"]) == 0
    assert main(["import", str(own / "sglang.jsonl"), "--output", str(tmp_path / "i"), "--ratio", "3p1d", "--gpus", "4"]) == 0
    found = answer(capsys, tmp_path / "i", own)
    assert "because they were imported: sglang.jsonl:1" in found["remarks"][0]
    (one,) = found["comparisons"]
    assert {d["not_judged_because"] for d in one["differences"]} == {"without its requests, it takes 3 repeats to judge"}
    assert one["differences"][0]["a"] == pytest.approx(one["differences"][0]["b"])


def test_goodput_with_other_limits_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run(tmp_path / "a", slo=Slo(ttft_ms=1000)), run(tmp_path / "b", slo=Slo(ttft_ms=500))
    found = answer(capsys, a, b)
    assert "goodput_per_gpu" not in shown(found)
    assert "other limits" in found["remarks"][0]


def test_a_plan_from_one_side_says_how_many_repeats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = ",".join(str(run(tmp_path / f"a{i}", seed=i, slow=1 + i / 100)) for i in range(3))
    five, twenty = (answer(capsys, a, "--plan", size)["repeats"] for size in ("5", "20%"))
    assert five.keys() == twenty.keys()
    assert all(3 <= twenty[name] <= five[name] for name in five)
    assert any(twenty[name] < five[name] for name in five)
    assert main(["compare", a, "--plan"]) == 0
    assert "as far as 3 runs show" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere", "nowhere"], 1, "not the folder of a run"),
        (["a,a", "b"], 2, "a run is given twice"),
        (["a", "b:ratio"], 2, "write COLUMN=VALUE"),
        (["a", "b:ratio=9p9d"], 2, "ratio is one of: 3p1d"),
        (["a", "b", "--metric", "speed"], 2, "--metric speed: not a figure that can be compared; one of output_throughput"),
        (["a", "b", "--plan", "0"], 2, "no percentage from 0.1 to 100"),
        (["a", "c"], 2, "no load is on both sides"),
        (["a"], 2, "nothing to compare with an aggregated baseline"),
        (["empty", "a"], 1, "is no run, no sweep, and holds no run"),
    ],
)
def test_bad_usage_is_one_message(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    run(Path("a"))
    shutil.copytree("a", "b")
    run(Path("c"), concurrency=(8,))
    Path("empty").mkdir()
    capsys.readouterr()
    assert main(["compare", *arguments]) == code
    assert said in capsys.readouterr().err


def test_student_against_tables() -> None:
    # Table of the t distribution (97.5 %), and Cohen's power of t-tests: n = 34, d = 0.5, 0.80
    for df, value in ((1, 12.706), (2, 4.303), (4, 2.776), (19, 2.093)):
        assert student.quantile(0.025, df) == pytest.approx(value, abs=6e-4)
    assert student.above(1000, 1) == pytest.approx(math.atan(1 / 1000) / math.pi, rel=1e-3)
    assert student.repeats(0.5, 1.0, 1, 3) == 34
    assert student.repeats(0.01, 1.0, 1, 3) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(values: list[float]) -> None:
    adjusted = student.holm(values)
    assert all(1 >= new >= old for old, new in zip(values, adjusted, strict=True))
    assert min(adjusted) == min(1.0, len(values) * min(values))
    pairs = sorted(zip(values, adjusted, strict=True))
    assert [new for _, new in pairs] == sorted(adjusted)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), min_size=3, max_size=6), st.booleans())
def test_turning_the_sides_around_turns_the_answer_around(figures: list[tuple[float, float]], paired: bool) -> None:
    def side(which: int) -> list[Run]:
        values = [dict.fromkeys(FIGURES, pair[which]) for pair in figures]
        return [Run(i, value, i if paired else None, b"") for i, value in enumerate(values)]

    (ab,), (ba,) = (correct([judge(*ends, ["e2e_ms_mean"])])[0].differences for ends in ((side(0), side(1)), (side(1), side(0))))
    assert ab.p == pytest.approx(ba.p)
    assert ab.claimed == ba.claimed
    assert {"A": "B", "B": "A", "": ""}[ab.better] == ba.better
    assert ab.low <= ab.change <= ab.high
