"""The rule that changes ratios, deployments whose ratio changes, and the study of them."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.advise import study
from pdbench.advise.elastic import Elastic, Fixed, Queueing, Schedule
from pdbench.advise.study_words import gain, highest, words
from pdbench.advise.workloads import HOURS, Day, Trace, gpu_seconds, windows
from pdbench.load.trace import Row
from pdbench.metrics import Slo
from pdbench.model import profile
from pdbench.model.cluster import Prompt, Simulation, deployment
from pdbench.model.rates import Rates
from pdbench.model.requests import Limits
from pdbench.model.scheduler import Worker
from pdlib.autoscale import Controller, Move, Observed, Rule, pressures, wish

TINY = profile.load("tiny")
RULE = Rule(ttft_s=1.0, itl_s=0.05, patience=2, rest_s=30)
CALM = Observed(prefill=4, decode=4, prefill_wait_s=0.0, decode_wait_s=0.0, itl_s=0.01, decode_full=0.2)
HUNGRY = replace(CALM, prefill_wait_s=3.0)
SLOW = replace(CALM, itl_s=0.08)
waits = st.floats(0, 10)


@given(st.integers(1, 9), st.integers(1, 9), waits, waits, st.floats(0, 1), st.floats(0, 1))
def test_the_last_worker_of_a_role_is_never_asked_for(
    prefill: int, decode: int, a: float, b: float, itl: float, full: float
) -> None:
    seen = Observed(prefill, decode, a, b, itl, full)
    if wish(RULE, seen) == "prefill":
        assert decode > 1
    if wish(RULE, seen) == "decode":
        assert prefill > 1


@given(st.integers(2, 9), st.integers(2, 9), waits, waits, st.floats(0, 1), st.floats(0, 1), st.floats(1, 5))
def test_who_wants_a_worker_wants_it_more_when_more_pressed(
    prefill: int, decode: int, a: float, b: float, itl: float, full: float, times: float
) -> None:
    seen = Observed(prefill, decode, a, b, itl, full)
    if wish(RULE, seen) == "prefill":
        assert wish(RULE, replace(seen, prefill_wait_s=a * times)) == "prefill"
    if wish(RULE, seen) == "decode":
        assert wish(RULE, replace(seen, itl_s=itl * times)) == "decode"


def test_pressures_are_shares_of_the_promise() -> None:
    assert pressures(RULE, replace(CALM, prefill_wait_s=0.5, itl_s=0.025)) == (0.5, 0.5)
    assert pressures(RULE, replace(CALM, decode_full=0.9))[1] == pytest.approx(1)
    assert pressures(RULE, replace(CALM, decode_wait_s=2.0))[1] == 2.0


def test_nobody_gives_what_he_needs_himself() -> None:
    assert wish(RULE, replace(HUNGRY, itl_s=0.08)) is None
    assert wish(RULE, HUNGRY) == "prefill"
    assert wish(RULE, SLOW) == "decode"
    assert wish(RULE, replace(HUNGRY, itl_s=0.03)) is None, "three decode workers would not keep the promise"


def test_a_change_takes_two_looks_and_then_rests() -> None:
    one = Controller(RULE)
    assert one.decide(0, HUNGRY) is None
    assert one.decide(10, CALM) is None
    assert one.decide(20, HUNGRY) is None
    assert one.decide(30, HUNGRY) == "prefill"
    assert [one.decide(at, HUNGRY) for at in (40, 50, 60)] == [None, None, None], "one change at a time"
    one.done(65)
    assert [one.decide(at, HUNGRY) for at in (70, 80, 94)] == [None, None, None]
    assert one.decide(95, HUNGRY) == "prefill"


def prompts(count: int, rate: float, isl: int = 900, osl: int = 30) -> list[Prompt]:
    rng, at, found = random.Random(3), 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        found.append(Prompt(rng.randint(isl // 2, isl * 3 // 2), rng.randint(2, osl), at))
    return found


class Script:
    """Moves workers to and fro, whatever is seen."""

    every_s = 2.0

    def __init__(self) -> None:
        self.seen: list[Observed] = []
        self.busy = False

    def decide(self, now: float, observed: Observed) -> Move | None:
        self.seen.append(observed)
        if self.busy:
            return None
        move: Move | None = (
            "prefill" if observed.decode > 1 and len(self.seen) % 2 else "decode" if observed.prefill > 1 else None
        )
        self.busy = move is not None
        return move

    def done(self, now: float) -> None:
        self.busy = False


def test_every_request_is_served_while_workers_change_roles() -> None:
    script = Script()
    made = Elastic(TINY, 2, 2, script)
    sent = prompts(400, 12.0)
    outcomes = made.open_loop(sent)
    assert len(made.changes) > 5
    for prompt, outcome in zip(sent, outcomes, strict=True):
        assert len(outcome.tokens) == 2
        assert outcome.tokens[0] > prompt.due
    for _, prefill, decode, took in made.changes:
        assert prefill + decode == 4
        assert took >= TINY.engine.startup_s
    assert all(seen.prefill >= 1 and seen.decode >= 1 and 3 <= seen.prefill + seen.decode <= 4 for seen in script.seen)


def test_without_a_policy_it_is_a_fixed_ratio() -> None:
    sent = prompts(120, 10.0)
    ends = [
        [one.end for one in run.open_loop(sent)]
        for run in (Elastic(TINY, 2, 1, Fixed()), Simulation(deployment(Rates(TINY), 2, 1)))
    ]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("ratio", [(1, 1, 0), (2, 1, 0), (0, 0, 2)])
@pytest.mark.parametrize("cost", [0.0, 300.0])
def test_first_and_last_tokens_are_the_same_without_those_between(ratio: tuple[int, int, int], cost: float) -> None:
    figures = replace(TINY, engine=replace(TINY.engine, frontend_us_per_token=cost))
    ends = []
    for every in (True, False):
        made = deployment(Rates(figures), *ratio)
        for pool in (made.prefill, made.decode, made.aggregated):
            pool[:] = [Worker(Rates(figures), Limits(9000, 16, 512, 16, prefix_cache=False)) for _ in pool]
        found = Simulation(made, every_token=every).open_loop(prompts(80, 30.0))
        ends.append([(one.tokens[0], one.end, one.retractions) for one in found])
    assert ends[0] == ends[1]


def test_a_queue_before_prefill_is_seen_and_answered() -> None:
    made = Elastic(TINY, 1, 5, Queueing(Rule(ttft_s=1.0, itl_s=0.2)))
    sent = prompts(900, 6.0, isl=2000, osl=6)
    outcomes = made.open_loop(sent)
    stayed = Elastic(TINY, 1, 5, Fixed()).open_loop(sent)
    assert made.changes
    assert made.changes[-1][1] > 1
    late = [sum(one.ttft > 1.0 for one in each) for each in (outcomes, stayed)]
    assert late[0] < late[1] / 2


def test_an_oracle_is_where_it_wants_to_be_in_time() -> None:
    made = Elastic(TINY, 3, 1, Schedule([(0.0, 3), (20.0, 1), (40.0, 2)], lead_s=8.0, every_s=1.0))
    made.open_loop(prompts(500, 10.0))
    assert [(prefill, decode) for _, prefill, decode, _ in made.changes[-3:]] == [(2, 2), (1, 3), (2, 2)]
    assert made.changes[1][0] + made.changes[1][3] < 20
    assert 30 < made.changes[2][0] < 40


def test_the_day_turns_and_is_as_heavy_as_asked() -> None:
    day, rates = Day(10.0), Rates(TINY)
    assert day.share(0) == pytest.approx(0)
    assert day.share(HOURS / 2 * 10) == pytest.approx(1)
    found = day.prompts(rates, 4, 0.6, 0.05, 1)
    assert [one.due for one in found] == sorted(one.due for one in found)
    used = sum(sum(gpu_seconds(rates, one.prompt_tokens, one.output_tokens, 0.05)) for one in found)
    assert used / (4 * 240) == pytest.approx(0.6, rel=0.15)
    hours = windows(found, day.window_s)
    mean = [sum(one.prompt_tokens for one in hour) / len(hour) for hour in (hours[0], hours[12])]
    assert mean[1] > 3 * mean[0]
    assert sum(map(len, hours)) == len(found)


def test_a_trace_is_as_heavy_as_asked() -> None:
    rng, rates = random.Random(1), Rates(TINY)
    rows = tuple(Row(at, rng.randint(500, 9000), rng.randint(20, 400)) for at in sorted(rng.uniform(0, 300) for _ in range(150)))
    found = Trace(rows).prompts(rates, 8, 0.7, 0.05, 2)
    used = sum(sum(gpu_seconds(rates, one.prompt_tokens, one.output_tokens, 0.05)) for one in found)
    assert used / (8 * 300) == pytest.approx(0.7, rel=0.25)


def made_run(load: float, policy: str, seed: int, met: float) -> study.Run:
    return study.Run("day", load, seed, policy, met, 100.0, 200.0, 10.0, 3, 31.0)


def test_words_name_the_best_fixed_ratio_and_the_difference_to_it() -> None:
    shares = {
        "1p2d": (0.99, 0.7),
        "2p1d": (0.95, 0.8),
        "aggregated": (0.9, 0.5),
        "controller": (0.97, 0.86),
        "oracle": (1.0, 0.92),
    }
    found = [
        made_run(load, policy, seed, met + 0.01 * seed)
        for policy, each in shares.items()
        for load, met in zip((0.5, 0.9), each, strict=True)
        for seed in (0, 1)
    ]
    text = words(found)
    assert "| 0.9 | 2p1d | +6.0 ±0.0 | +12.0 ±0.0 |" in text
    assert "| 0.5 | 1p2d | -2.0 ±0.0 |" in text
    assert gain(found, "day", 0.9, "controller", "2p1d").mean == pytest.approx(0.06)
    assert highest(found, "day", "2p1d") == pytest.approx(0.5 + 0.4 * 0.055 / 0.15)
    assert math.isinf(highest(found, "day", "oracle"))


def test_the_study_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    rng = random.Random(4)
    trace.write_text(
        "\n".join(
            json.dumps({"timestamp": at * 400, "input_length": rng.randint(300, 4000), "output_length": rng.randint(5, 60)})
            for at in range(25)
        )
    )
    args = ["--profile", "tiny", "--workers", "3", "--day", "0.3", "--loads", "0.6", "--seeds", "2", "--processes", "1"]
    assert study.main([*args, "--trace", str(trace), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "### day" in said
    assert "### trace" in said
    found = json.loads((tmp_path / "out" / "study.json").read_text())["runs"]
    assert {run["policy"] for run in found} == {"1p2d", "2p1d", "aggregated", "controller", "oracle"}
    assert len(found) == 2 * 2 * 5
    assert (tmp_path / "out" / "study.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--day", "0"], "nothing to study"),
        (["--workers", "1"], "--workers must be at least 2"),
        (["--profile", "tinny"], "did you mean tiny"),
        (["--trace", "nowhere"], "cannot read the trace"),
        (["--loads", "0.5,x"], "--loads"),
        (["--gpus", "0"], "--gpus must be at least 1"),
    ],
)
def test_a_mistake_in_the_study_is_one_message(
    args: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main([*args, "--output", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_limits_are_both_kept_or_missed() -> None:
    outcomes = Simulation(deployment(Rates(TINY), 1, 1)).open_loop([Prompt(500, 20, 0.0), Prompt(500, 1, 5.0)])
    ttft, tpot = outcomes[0].ttft * 1e3, (outcomes[0].end - outcomes[0].tokens[0]) / 19 * 1e3
    assert study.good(outcomes, Slo(ttft_ms=ttft + 1, tpot_ms=tpot + 1)).tolist() == [True, True]
    assert study.good(outcomes, Slo(ttft_ms=ttft + 1, tpot_ms=tpot - 1)).tolist() == [False, True]
    assert study.good(outcomes, Slo(ttft_ms=1, tpot_ms=tpot + 1)).tolist() == [False, False]
