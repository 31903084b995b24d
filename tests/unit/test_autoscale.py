"""From workers' metrics to a window, and from a decision to a ratio; the rule itself: test_advise_study.py."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.autoscale.session import said
from pdbench.emulate.metrics import WorkerMetrics
from pdlib import autoscale
from pdlib import ratio as ratios
from pdlib.autoscale import Figures, Observed, Rule, next_ratio, observed, parted, pressures, read, wish
from pdlib.errors import UserError

NOTHING = Figures(0, 0, 0, 0, 0, 0, 0, 0, 0)
VLLM = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:request_queue_time_seconds_bucket{engine="0",le="0.3",model_name="m"} 3.0
vllm:request_queue_time_seconds_sum{engine="0",model_name="m"} 1.5
vllm:request_queue_time_seconds_count{engine="0",model_name="m"} 3.0
vllm:inter_token_latency_seconds_sum{engine="0",model_name="m"} 4e-1
vllm:inter_token_latency_seconds_count{engine="0",model_name="m"} 10.0
"""


LOAD = {
    **{"num_running_reqs": 8, "num_waiting_reqs": 12, "max_running_requests": 16, "token_usage": 0.4},
    "disaggregation": {
        **{"mode": "decode", "prefill_bootstrap_queue_reqs": 1, "prefill_inflight_queue_reqs": 0},
        **{"decode_prealloc_queue_reqs": 2, "decode_transfer_queue_reqs": 4},
    },
}


def loads(*each: dict[str, Any]) -> str:
    return json.dumps({"loads": each})


def metrics_page() -> str:
    metrics = WorkerMetrics("m", "decode")
    metrics.note_stage("decode_waiting", 0.5)
    metrics.note_stage("decode_waiting", 1.5)
    for gap in (0.01, 0.03):
        metrics.itl.observe(gap)
    # SGLang's gauges stand still while a worker computes nothing: they count for nothing here.
    metrics.running.set(99)
    return metrics.text()


def test_what_a_worker_of_sglang_says_is_read() -> None:
    found = read(metrics_page(), loads(LOAD))
    assert found is not None
    assert asdict(found) == pytest.approx(
        {
            **{"queue_s": 2.0, "queued": 2, "gap_s": 0.04, "gaps": 2, "waiting": 5, "prealloc": 2, "held": 4, "running": 8},
            **{"usage": 0.4, "most": 16, "answer_s": 0, "answers": 0},
        }
    )
    assert found.full == 0.5
    assert replace(found, most=0).full == pytest.approx(0.4 * 8 / 12)


def test_ranks_of_data_parallelism_add_up_and_no_others_do() -> None:
    one = metrics_page()
    names = ("sglang:queue_time_seconds_count", "sglang:inter_token_latency_seconds_count")
    plain = read(one, loads(LOAD))
    assert plain is not None
    for label in ('pp_rank="1"', 'tp_rank="3"'):
        again = "\n".join(line.replace(label[:8] + '"0"', label) for line in one.splitlines() if line.startswith(names[0]))
        assert label in again
        assert read(one + again + "\n", loads(LOAD)) == plain
    by_priority = "\n".join(line.replace("{", '{priority="7",') for line in one.splitlines() if line.startswith(names))
    assert read(one + by_priority + "\n", loads(LOAD)) == plain
    both = "\n".join(line.replace('tp_rank="0"', 'tp_rank="1",dp_rank="1"') for line in one.splitlines())
    two = read(one + both, loads(LOAD, LOAD))
    assert two is not None
    assert (two.queued, two.most, two.running, two.usage) == (4, 32, 16, 0.4)


def test_vllm_says_the_same_under_other_names() -> None:
    found = read(VLLM)
    assert found == Figures(1.5, 3, 0.4, 10, 2, 2, 0, 4, 0.25)


def test_engines_of_one_vllm_server_add_up() -> None:
    other = VLLM.replace('engine="0"', 'engine="1"').replace("} 0.25", "} 0.75")
    assert read(VLLM + other) == Figures(3.0, 6, 0.8, 20, 4, 4, 0, 8, 0.75)


@pytest.mark.parametrize("page", ["", "<html>", "up 1\n", VLLM.replace("} 4.0", "} NaN"), "vllm:num_requests_running 1e999\n"])
def test_another_page_is_no_figure(page: str) -> None:
    assert read(page) is None


@pytest.mark.parametrize(
    "page",
    ["", "[]", "{}", '{"loads": 3}', '{"loads": [{}]}', '{"loads": [7]}', loads({**LOAD, "num_running_reqs": "x"}), "[" * 9999],
)
def test_loads_that_say_nothing(page: str) -> None:
    assert read(VLLM, page) is None


@given(st.text())
def test_no_page_is_too_odd(page: str) -> None:
    read(page)
    read(VLLM + page, page)


ROLES = {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode"}
counts = st.integers(0, 1000)
spans = st.floats(0, 1e4)


@st.composite
def looks(draw: st.DrawFn) -> tuple[dict[str, Figures], dict[str, Figures]]:
    """Two looks at workers that live on."""
    before = {
        name: replace(
            NOTHING, queue_s=draw(spans), queued=draw(counts), gap_s=draw(spans), gaps=draw(counts), waiting=draw(counts)
        )
        for name in ROLES
    }
    after = {
        name: Figures(
            own.queue_s + draw(spans), own.queued + draw(counts), own.gap_s + draw(spans), own.gaps + draw(counts),
            draw(counts), draw(counts), draw(counts), draw(counts), draw(st.floats(0, 1)),
        )
        for name, own in before.items()
    }  # fmt: skip
    return before, after


@given(looks(), st.floats(0.1, 60))
def test_a_window_holds_what_was_added_in_it(both: tuple[dict[str, Figures], dict[str, Figures]], window: float) -> None:
    before, after = both
    seen = observed(before, after, ROLES, window)
    assert (seen.prefill, seen.decode) == (2, 1)
    since = {name: {k: v - asdict(before[name])[k] for k, v in asdict(after[name]).items()} for name in ROLES}
    started = sum(since[name]["queued"] for name in ("prefill-0", "prefill-1"))
    mean = sum(since[name]["queue_s"] for name in ("prefill-0", "prefill-1")) / started if started else 0
    assert seen.prefill_wait_s >= mean - 1e-6
    # Little: who waits at both ends, waits as long as it takes to start as many.
    still = sum(min(before[name].waiting, after[name].waiting) for name in ("prefill-0", "prefill-1"))
    assert seen.prefill_wait_s >= still / max(started, 1) * window - 1e-6
    if since["decode-0"]["gaps"]:
        assert seen.itl_s == pytest.approx(since["decode-0"]["gap_s"] / since["decode-0"]["gaps"], abs=1e-9)
    assert seen.decode_full == after["decode-0"].full <= after["decode-0"].usage


@given(looks())
def test_shifting_all_counters_changes_nothing(both: tuple[dict[str, Figures], dict[str, Figures]]) -> None:
    before, after = both
    moved = [
        {name: replace(own, queue_s=own.queue_s + 64, queued=own.queued + 64, gaps=own.gaps + 64) for name, own in look.items()}
        for look in both
    ]
    there, here = observed(moved[0], moved[1], ROLES, 10), observed(before, after, ROLES, 10)
    assert asdict(there) == pytest.approx(asdict(here), rel=1e-6, abs=1e-6)


def test_answers_that_are_not_streamed_have_a_pace_too() -> None:
    before = dict.fromkeys(ROLES, NOTHING)
    whole = {**before, "decode-0": replace(NOTHING, answer_s=0.09, answers=3)}
    assert observed(before, whole, ROLES, 10).itl_s == pytest.approx(0.03)
    mixed = {**before, "decode-0": replace(NOTHING, answer_s=0.09, answers=3, gap_s=0.2, gaps=4)}
    assert observed(before, mixed, ROLES, 10).itl_s == 0.05


def test_a_worker_that_began_anew_counts_from_nothing() -> None:
    before = {name: Figures(100, 100, 100, 100, 0, 0, 0, 0, 0) for name in ROLES}
    after = {name: Figures(4, 2, 0.2, 10, 0, 0, 0, 0, 0) for name in ROLES}
    seen = observed(before, after, ROLES, 10)
    assert seen.prefill_wait_s == 2.0
    assert seen.itl_s == pytest.approx(0.02)


def test_a_queue_that_nobody_leaves_is_as_long_as_the_window_and_longer() -> None:
    idle = dict.fromkeys(ROLES, NOTHING)
    stuck = {**idle, "prefill-0": replace(NOTHING, waiting=3)}
    assert observed(stuck, stuck, ROLES, 10).prefill_wait_s == 30
    assert observed(idle, stuck, ROLES, 10).prefill_wait_s == 0, "one that just came is no queue"
    assert observed(idle, idle, ROLES, 10) == Observed(2, 1, 0, 0, 0, 0)


@given(st.floats(0, 100), st.integers(0, 300), st.integers(0, 300))
def test_a_wait_for_memory_is_shared_out_whole(wait: float, running: int, held: int) -> None:
    decode, prefill = parted(wait, running, held)
    assert decode + prefill == pytest.approx(wait)
    assert min(decode, prefill) >= 0
    assert prefill == 0 or held


def test_memory_held_by_who_waits_for_prefill_is_prefill_s_pressure() -> None:
    # 16 places a worker, one decodes, 15 wait for their prompt, and behind them a queue for places: prefill is what lacks.
    rule = Rule(1.0, 0.1)
    before = dict.fromkeys(("decode-0", "decode-1"), replace(NOTHING, prealloc=30)) | {"prefill-0": replace(NOTHING, waiting=2)}
    roles = {name: name.split("-")[0] for name in before}
    stuck = replace(NOTHING, queued=5, gap_s=0.4, gaps=20, prealloc=30, held=15, running=1, usage=0.9, most=16)
    seen = observed(before, {"prefill-0": replace(NOTHING, queued=10, waiting=2), "decode-0": stuck, "decode-1": stuck}, roles, 5)
    assert seen.decode_full < 0.1
    assert seen.decode_wait_s < 2 < seen.prefill_wait_s
    decoding = replace(stuck, held=0, running=16)
    full = observed(before, {"prefill-0": replace(NOTHING, queued=10), "decode-0": decoding, "decode-1": decoding}, roles, 5)
    assert full.prefill_wait_s == 0
    assert full.decode_wait_s == 30
    assert pressures(rule, full)[1] > 1
    quick = {name: replace(own, prealloc=2) for name, own in (("decode-0", stuck), ("decode-1", stuck))}
    assert wish(rule, observed(before, {"prefill-0": replace(NOTHING, queued=10, waiting=2), **quick}, roles, 5)) == "prefill"


def plan(prefill: int, decode: int, prefill_gpus: int = 1, decode_gpus: int = 1, **more: Any) -> dict[str, Any]:
    gpus = {"prefill": prefill_gpus, "decode": decode_gpus}
    workers = [
        {"role": role, "name": f"{role}-{i}", "url": "u", "ranks": [{"gpus": list(range(gpus[role]))}]}
        for role, count in (("prefill", prefill), ("decode", decode))
        for i in range(count)
    ]
    whole = {"ratio": f"{prefill}p{decode}d", "workers": workers, "router": {"name": "sglang", "membership": "workers", "x": 1}}
    return autoscale.slim({**whole, **more})


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_the_next_ratio_takes_no_more_gpus_and_no_more_workers_than_it_must(
    prefill: int, decode: int, p: int, d: int, up: bool
) -> None:
    move: autoscale.Move = "prefill" if up else "decode"
    found = next_ratio(plan(prefill, decode, p, d), move)
    source = decode if up else prefill
    leave = -(-(p if up else d) // (d if up else p))
    if found is None:
        assert source <= leave
        return
    made = ratios.parse(found)
    assert made.prefill * p + made.decode * d <= prefill * p + decode * d
    assert (made.prefill > prefill, made.decode > decode) == (up, not up)
    assert (decode - made.decode if up else prefill - made.prefill) == leave


def test_one_worker_goes_where_they_are_alike() -> None:
    assert next_ratio(plan(3, 1), "decode") == "2p2d"
    assert next_ratio(plan(3, 1), "prefill") is None
    assert next_ratio(plan(4, 1, 2, 4), "decode") == "2p2d"
    assert next_ratio(plan(2, 2, 2, 4), "prefill") == "4p1d"


@pytest.mark.parametrize(
    ("deployed", "why"),
    [
        ({}, "nothing is deployed: ansible-playbook deploy_pd.yml"),
        ({**plan(0, 0), "workers": [{"role": "aggregated", "ranks": []}], "ratio": "agg"}, "agg runs"),
        (
            {**plan(1, 2), "router": {"name": "mini-lb", "membership": "restart"}},
            "router=mini-lb learns its workers only at its start",
        ),
    ],
)
def test_what_cannot_be_changed_is_refused(deployed: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        autoscale.check(deployed)
    autoscale.check(plan(1, 2))


def test_lines_say_what_was_seen_and_what_follows() -> None:
    rule, rng = Rule(1.0, 0.05), random.Random(1)
    seen = Observed(1, 2, 0.8, 0.0, 0.02, 0.3)
    window = {"at": rng.random(), "kind": "window", "ratio": "1p2d", "says": autoscale.words(rule, seen), "wish": "prefill"}
    line = said({**window, "to": "2p1d"})
    assert "1p2d  prefill waits 0.80 s (0.80 of its limit), decode 20 ms a token, 30 % full (0.40)" in line
    assert line.endswith(": prefill wants a worker, so 2p1d")
    assert said({**window, "to": "2p1d"}, dry_run=True).endswith("so 2p1d it would be")
    assert said({**window, "to": None, "wish": None}).endswith("(0.40)")
    assert "0.25 s for memory" in autoscale.words(rule, replace(seen, decode_wait_s=0.25))
    silent = said({"at": 0, "kind": "window", "ratio": "1p2d", "silent": {"decode-0": "Connection refused"}})
    assert silent.endswith("not judged: decode-0: Connection refused")
    change = {"at": 0, "kind": "change", "ratio": "1p2d", "to": "2p1d", "took_s": 12.5, "ok": True, "why": ""}
    assert said(change).endswith("1p2d -> 2p1d: done, 12 s")
    assert said({**change, "ok": False, "why": "h2 is gone"}).endswith("1p2d -> 2p1d: FAILED: h2 is gone, 12 s")


@given(
    st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]),
    st.floats(0, 4), st.floats(0, 4), st.floats(0.001, 1),
)  # fmt: skip
def test_a_step_is_never_one_that_its_own_outcome_would_take_back(
    prefill: int, decode: int, p: int, d: int, wait: float, itl: float, full: float
) -> None:
    rule, deployed = Rule(1.0, 1.0), plan(prefill, decode, p, d)
    seen = Observed(prefill, decode, wait, 0.0, itl, full)
    move = wish(rule, seen, autoscale.step(deployed))
    if move is None:
        return
    after = next_ratio(deployed, move)
    assert after is not None, "what is wished for can be had"
    made = ratios.parse(after)
    # What the giver has to bear then; the taker has nothing any more that presses it.
    then = Observed(made.prefill, made.decode, 0.0, 0.0, itl * decode / made.decode, full * decode / made.decode)
    if move == "decode":
        then = Observed(made.prefill, made.decode, wait * prefill / made.prefill, 0.0, 0.0, 0.0)
    assert wish(rule, then, autoscale.step(plan(made.prefill, made.decode, p, d))) is None


def test_a_missing_window_breaks_the_row() -> None:
    rule = autoscale.Controller(Rule(1.0, 0.05))
    hungry = Observed(2, 2, 3.0, 0.0, 0.01, 0.1)
    assert rule.decide(0, hungry) is None
    rule.forget()
    assert rule.decide(20, hungry) is None
    assert rule.decide(30, hungry) == "prefill"
