"""The laws of the metrics, and one point reckoned by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.metrics import METRICS, Slo, goodput, itl_s, output_tokens, samples, stats, summarise, token_itl_s, tpot_s, ttft_s
from pdbench.records import Record

SAMPLES = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


def good(sent: float, *chunks: float, n: int | None = None, prompt: int = 10) -> Record:
    n = len(chunks) if n is None else n
    return Record(
        0, 0, "measure", prompt, n, sent, sent, chunks[0], chunks[-1], list(chunks), [], prompt, n, 0, 200, "length", True
    )


def failed(sent: float) -> Record:
    return Record(0, 0, "measure", 10, 3, sent, sent, status=503, error="HTTP 503")


@given(SAMPLES)
def test_percentiles_are_ordered_and_within_the_samples(samples: list[float]) -> None:
    s = {key: value for key, value in stats(samples).items() if value is not None}
    order = [s["min"], s["p50"], s["p90"], s["p95"], s["p99"], s["max"]]
    assert order == sorted(order)
    assert (s["min"], s["max"]) == (min(samples), max(samples))
    assert s["min"] - 1e-6 <= s["mean"] <= s["max"] + 1e-6


@given(SAMPLES)
def test_the_order_of_samples_does_not_matter(samples: list[float]) -> None:
    assert stats(samples)["p95"] == stats(sorted(samples))["p95"]


def test_percentiles_interpolate_linearly() -> None:
    s = stats([0.0, 10.0, 20.0, 30.0])
    assert s["p50"] == 15.0
    assert s["p90"] == pytest.approx(27.0)


def test_no_samples_no_figures() -> None:
    assert set(stats([]).values()) == {None}
    assert list(stats([])) == ["mean", "min", "max", "p50", "p90", "p95", "p99"]


def test_a_point_by_hand() -> None:
    records = [good(0.0, 1.0, 2.0, 4.0), good(1.0, 2.0, n=1), failed(0.5)]
    s = summarise(records, gpus=4)
    assert (s["completed"], s["failed"], s["duration_s"]) == (2, 1, 4.0)
    assert (s["request_throughput"], s["input_throughput"], s["output_throughput"]) == (0.5, 5.0, 1.0)
    assert (s["output_throughput_per_gpu"], s["total_throughput_per_gpu"]) == (0.25, 1.5)
    assert s["ttft_ms"] == stats([1000, 1000])
    assert s["itl_ms"] == stats([1000, 2000])
    assert s["tpot_ms"] == stats([1500])  # the one-token answer has none
    assert s["e2e_ms"] == stats([4000, 1000])
    assert s["request_output_throughput"] == stats([0.75, 1.0])
    assert s["mean_in_flight"] == 1.25
    assert s["goodput"] is None


def test_failures_never_touch_latency_or_throughput() -> None:
    alone, beside = summarise([good(0.0, 1.0, 2.0)]), summarise([good(0.0, 1.0, 2.0), failed(0.2), failed(0.3)])
    assert {k: v for k, v in alone.items() if k != "failed"} == {k: v for k, v in beside.items() if k != "failed"}
    assert beside["failed"] == 2


def test_all_failed_gives_nulls_not_zeros_or_nan() -> None:
    s = summarise([failed(0.0)], gpus=2)
    assert (s["completed"], s["failed"], s["request_throughput"]) == (0, 1, 0.0)
    assert set(s["ttft_ms"].values()) == {None}  # type: ignore[attr-defined]
    assert summarise([])["duration_s"] == 0.0


def test_per_gpu_is_null_without_a_plan() -> None:
    assert summarise([good(0.0, 1.0)])["output_throughput_per_gpu"] is None


def test_tokens_fall_back_on_events_not_on_what_was_asked() -> None:
    r = good(0.0, 1.0, 2.0)
    r.output_tokens, r.output_tokens_asked = -1, 99
    assert output_tokens(r) == 2


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=30))
def test_gaps_add_up(gaps: list[float]) -> None:
    times = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    r = good(0.0, *times)
    assert ttft_s(r) + sum(itl_s(r)) == pytest.approx(r.end_s - r.sent_s)
    tpot = tpot_s(r)
    assert (tpot is None) == (len(times) == 1)
    if tpot is not None:
        assert min(itl_s(r)) - 1e-9 <= tpot <= max(itl_s(r)) + 1e-9


def test_goodput_wants_every_limit_and_counts_failures_as_sent() -> None:
    records = [good(0.0, 0.1, 0.2, 0.3), good(0.0, 0.5, 0.6, 0.7), good(0.0, 0.1, 1.1, 2.1), failed(0.0)]
    g = goodput(records, Slo(ttft_ms=200, tpot_ms=500), 2.0)
    assert g is not None
    ends: Any = g.pop("attainment_interval")
    low, high = ends
    assert low < 0.25 < high
    assert g == {
        "slo": {"ttft_ms": 200, "tpot_ms": 500},
        **{"good": 1, "sent": 4, "attainment": 0.25, "met": {"ttft_ms": 0.5, "tpot_ms": 0.5}},
        **{"independent": 1, "request_throughput": 0.5, "request_throughput_per_gpu": None},
    }
    per_gpu = goodput(records, Slo(ttft_ms=200), 2.0, gpus=4)
    assert per_gpu is not None
    assert per_gpu["request_throughput_per_gpu"] == 0.25
    assert goodput(records, Slo(), 2.0) is None
    one = goodput([good(0.0, 0.1)], Slo(tpot_ms=1), 1.0)
    assert one is not None
    assert one["good"] == 1  # one token: TPOT counts as 0


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=20), st.floats(1, 5000), st.floats(1, 5000))
def test_a_looser_limit_is_never_met_less(ttfts: list[float], one: float, two: float) -> None:
    records = [good(0.0, t, t + 0.1) for t in ttfts]

    def count(limit: float) -> object:
        found = goodput(records, Slo(ttft_ms=limit), 1.0)
        assert found is not None
        return found["good"]

    assert count(min(one, two)) <= count(max(one, two))  # type: ignore[operator]


def test_nothing_here_is_nan() -> None:
    text = repr(summarise([good(0.0, 1.0), failed(math.nan)], gpus=1, slo=Slo(e2e_ms=1)))
    assert "nan" not in text


def batched(counts: list[int], gap: float, told: bool = True) -> Record:
    """An answer whose events hold so many tokens; tokens come ``gap`` seconds apart, and wait for the last of their event."""
    times = [0.5 + gap * sum(counts[: i + 1]) for i in range(len(counts))]
    r = good(0.0, *times, n=sum(counts))
    r.chunk_tokens = counts if told else []
    return r


@given(st.lists(st.integers(1, 9), min_size=2, max_size=30))
def test_the_gap_of_an_event_belongs_to_all_of_its_tokens(counts: list[int]) -> None:
    gaps = token_itl_s(batched(counts, 0.01))
    assert len(gaps) == sum(counts[1:])
    assert gaps == pytest.approx([0.01] * len(gaps))


def test_four_tokens_an_event_are_four_gaps_also_when_only_the_total_is_known() -> None:
    for told in (True, False):
        for counts in ([4] * 32, [1] + [4] * 31 + [3]):
            s = summarise([batched(counts, 0.010, told)])
            assert s["itl_token_ms"]["mean"] == pytest.approx(10.0)  # type: ignore[index]
            assert s["itl_token_ms"]["p99"] == pytest.approx(10.0)  # type: ignore[index]
        s = summarise([batched([4] * 32, 0.010, told)])
        assert s["itl_ms"]["mean"] == pytest.approx(40.0)  # type: ignore[index]


@given(st.integers(1, 500), st.integers(1, 60))
def test_a_total_is_spread_over_events_without_loss(tokens: int, events: int) -> None:
    events = min(events, tokens)
    r = good(0.0, *(0.1 * (i + 1) for i in range(events)), n=tokens)
    gaps = token_itl_s(r)
    assert all(gap > 0 for gap in gaps)
    if events > 1:
        assert len(gaps) >= events - 1


def test_an_event_without_a_new_token_ends_no_gap() -> None:
    r = good(0.0, 1.0, 1.5, 2.0, n=3)
    r.chunk_tokens = [1, 0, 2]
    assert token_itl_s(r) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("said", [0, 1, 2, 3])
def test_a_server_that_says_fewer_tokens_than_it_sent_is_taken_at_its_events(said: int) -> None:
    """One such answer of thousands once ended a whole run's summary: its gaps were infinite, or below nothing."""
    r = good(0.0, 0.1, 0.2, 0.3, 0.4, n=said)
    gaps = token_itl_s(r)
    assert gaps
    assert all(0 < gap < 0.31 for gap in gaps)
    json.dumps(summarise([r]), allow_nan=False)


def test_latency_from_the_schedule_holds_what_was_sent_late() -> None:
    r = good(2.0, 3.0, 4.0)
    r.scheduled_s = 0.5
    s = summarise([r])
    assert (s["ttft_ms"]["mean"], s["ttft_scheduled_ms"]["mean"]) == (1000, 2500)  # type: ignore[index]
    assert (s["e2e_ms"]["mean"], s["e2e_scheduled_ms"]["mean"]) == (2000, 3500)  # type: ignore[index]


def test_normalised_latency_and_the_rate_of_one_user() -> None:
    s = summarise([good(0.0, 1.0, 2.0, 4.0), good(0.0, 1.0)])
    assert s["normalised_latency_ms"] == stats([4000 / 3, 1000])
    assert s["output_throughput_per_user"] == stats([1 / 1.5])  # (4 - 1) s for two tokens; one token has no rate


def test_every_metric_has_figures_and_intervals() -> None:
    s = summarise([good(t, t + 1, t + 2) for t in range(40)], gpus=2)
    assert set(METRICS) | {"level"} == set(s["intervals"])  # type: ignore[call-overload]
    for name in METRICS:
        assert s[name]["mean"] is not None  # type: ignore[index]
    assert (s["request_throughput_per_gpu"], s["input_throughput_per_gpu"]) == (20 / 41, 200 / 41)


@given(st.lists(st.floats(0, 50), min_size=1, max_size=20), st.floats(0, 60))
def test_two_windows_have_the_samples_of_the_whole(sends: list[float], cut: float) -> None:
    records = [good(t, t + 1, t + 1.5, t + 4) for t in sends]
    whole, before, after = samples(records), samples(records, end_s=cut), samples(records, begin_s=cut)
    for name in METRICS:
        parts = sorted([*before[name].values, *after[name].values])
        assert parts == pytest.approx(sorted(whole[name].values)), name


def test_the_interval_of_attainment_holds_the_truth_though_requests_share_a_queue() -> None:
    rng, runs, n, load = np.random.default_rng(3), 80, 300, 0.8
    came = rng.exponential(1 / load, (2000 + n, runs))
    waits, kept = np.zeros(runs), np.empty((n, runs))
    for i, gap in enumerate(came):
        waits = np.maximum(0.0, waits + 1 - gap)
        if i >= 2000:
            kept[i - 2000] = waits
    # 90 % wait for at most 4.96 s; with requests taken for independent, 27 % of the intervals hold that
    hits = 0
    for run in kept.T:
        g: Any = goodput([replace(good(0.0, wait + 0.1), index=i) for i, wait in enumerate(run.tolist())], Slo(ttft_ms=5060), 1.0)
        low, high = g["attainment_interval"]
        assert 1 <= g["independent"] <= n
        hits += low <= 0.9 <= high
    assert hits >= 0.9 * runs
    all_failed: Any = goodput([failed(0.0)] * 50, Slo(ttft_ms=1), 1.0)
    assert all_failed["independent"] == 50
