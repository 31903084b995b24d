"""TTFT split by its stages, on pages that real engines showed and on pages made for a case.

`data/sglang_0_5_17_ttft.json` is what SGLang 0.5.17 workers on H200s showed before and after one load point: 1p1d over NIXL, 300
requests of 4096 tokens at 15/s (mean TTFT of the client 289.8 ms), and aggregated, 640 requests at concurrency 128 (376.1 ms).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pdbench.attribution import NAMES, attribute, in_words
from pdbench.records import MEASURE, WARMUP, Record

PAGES: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "sglang_0_5_17_ttft.json").read_text())


def answers(count: int, ttft_s: float, phase: str = MEASURE) -> list[Record]:
    times = [ttft_s, ttft_s + 0.1]
    return [
        Record(0, i, phase, 10, 2, 0.0, 0.0, times[0], times[1], times, [1, 1], 10, 2, 0, 200, "length", True)
        for i in range(count)
    ]


def split(found: dict[str, Any] | None) -> dict[str, float | None]:
    assert found is not None
    return {row["stage"]: row["ms"] for row in found["stages"]}


def moved(pages: dict[str, Any], worker: str, *words: str) -> float:
    """By how much all samples that hold every word moved: read without the code under test."""
    before: dict[str, float]
    after: dict[str, float]
    before, after = (pages[end]["workers"][worker]["metrics"] for end in ("before", "after"))
    return sum(value - before.get(key, 0.0) for key, value in after.items() if all(word in key for word in words))


def test_real_pages_of_prefill_and_decode_apart() -> None:
    pages = PAGES["nixl-1p1d"]
    found = attribute(pages, answers(300, 0.28977))
    parts = split(found)
    assert list(parts) == list(NAMES)

    def mean(worker: str, name: str, stage: str = "", unit_ms: float = 1000) -> float:
        """In ms; two requests for the worker's health are counted in some."""
        total, count = (moved(pages, worker, f"{name}_{end}", stage) for end in ("sum", "count"))
        return unit_ms * total / max(count, 300)

    stages = "sglang:per_stage_req_latency_seconds"
    answered, first = mean("prefill-0", "e2e_request_latency_seconds"), mean("decode-0", "time_to_first_token_seconds")
    landed = mean("prefill-0", stages, '"prefill_transfer_kv_cache"')
    waited = mean("decode-0", stages, '"decode_transferred"') + mean("decode-0", "kv_transfer_bootstrap_ms", unit_ms=1)
    expected = {
        "prefill_queue": mean("prefill-0", "queue_time_seconds"),
        "prefill_forward": mean("prefill-0", stages, '"prefill_forward"'),
        "kv_allocation": mean("decode-0", "kv_transfer_alloc_ms", unit_ms=1),
        "decode_queue": mean("decode-0", stages, '"decode_waiting"'),
        "first_step": mean("decode-0", stages, '"fake_output"'),
        # What of prefill's time is none of its stages, and of decode's wait for the KV cache is none of prefill's time.
        "kv_transfer": waited - (answered - landed),
        "prefill_answer": answered - first,
        "router": 289.77 - answered,
    }
    expected["bootstrap"] = answered - expected["prefill_queue"] - expected["prefill_forward"] - landed
    assert parts == pytest.approx(expected)
    # 144 MB over NVLink; prefill's own timer says 59 ms, as it looks only between two steps.
    assert parts["kv_transfer"] == pytest.approx(2.6, abs=0.1)
    assert landed == pytest.approx(59.5, abs=0.1)
    assert found is not None
    assert found["rest_ms"] == pytest.approx(289.77 - sum(expected.values()))
    assert 0 < found["rest_ms"] < 5
    assert in_words(found).startswith(
        "mean TTFT 289.8 ms: prefill 123.2, bootstrap 71.1, prefill's answer 50.3, prefill queue 30.7"
    )


def test_time_before_decode_has_the_request_is_the_routers_and_not_the_bootstraps() -> None:
    """A slow router sends to prefill first: prefill waits in its bootstrap queue, but decode's TTFT has not begun."""
    prefill = {
        **UP,
        **timer("sglang:e2e_request_latency_seconds", 5.9, 10),
        **timer("sglang:queue_time_seconds", 0.1, 10),
        **timer("sglang:per_stage_req_latency_seconds", 0.0, 10, '{stage="prefill_transfer_kv_cache"}'),
    }
    decode = {
        **UP,
        **timer("sglang:time_to_first_token_seconds", 1.0, 10),
        **timer("sglang:kv_transfer_bootstrap_ms", 20.0, 10),
        **timer("sglang:per_stage_req_latency_seconds", 0.5, 10, '{stage="decode_transferred"}'),
    }
    found = attribute(entry({"prefill-0": UP, "decode-0": UP}, {"prefill-0": prefill, "decode-0": decode}), answers(10, 0.6))
    parts = split(found)
    assert parts["router"] == pytest.approx(500.0)
    assert parts["bootstrap"] == pytest.approx(2 + 50 - 10)
    assert found is not None
    assert found["rest_ms"] == pytest.approx(600 - 500 - 42 - 10)


def apart(answer_s: float) -> dict[str, Any]:
    """Ten requests: prefill comes round to them in 20 ms, computes 30 ms, the transfer takes 5 ms, its answer ``answer_s``."""
    prefill = {
        **UP,
        **timer("sglang:e2e_request_latency_seconds", 10 * (0.05 + answer_s), 10),
        **timer("sglang:queue_time_seconds", 0.0, 10),
        **timer("sglang:per_stage_req_latency_seconds", 0.3, 10, '{stage="prefill_forward"}'),
        **timer("sglang:per_stage_req_latency_seconds", 10 * answer_s, 10, '{stage="prefill_transfer_kv_cache"}'),
    }
    decode = {
        **UP,
        **timer("sglang:time_to_first_token_seconds", 0.57, 10),
        **timer("sglang:kv_transfer_bootstrap_ms", 10.0, 10),
        **timer("sglang:per_stage_req_latency_seconds", 0.54, 10, '{stage="decode_transferred"}'),
    }
    return entry({"prefill-0": UP, "decode-0": UP}, {"prefill-0": prefill, "decode-0": decode})


def test_what_waits_for_prefills_answer_is_neither_the_routers_nor_the_transfers() -> None:
    parts = split(attribute(apart(0.090), answers(10, 0.144)))
    assert {name: ms and round(ms, 6) for name, ms in parts.items()} == {
        **{"router": 4.0, "bootstrap": 20.0, "prefill_queue": 0.0, "prefill_forward": 30.0, "kv_allocation": None},
        **{"kv_transfer": 5.0, "decode_queue": None, "first_step": None, "prefill_answer": 83.0},
    }


def test_without_prefills_own_time_nothing_is_reckoned_from_it() -> None:
    pages = apart(0.090)
    metrics = pages["after"]["workers"]["prefill-0"]["metrics"]
    pages["after"]["workers"]["prefill-0"]["metrics"] = {name: value for name, value in metrics.items() if "e2e_" not in name}
    parts = split(attribute(pages, answers(10, 0.144)))
    assert [parts[name] for name in ("bootstrap", "kv_transfer", "prefill_answer")] == [None, None, None]
    assert parts["prefill_forward"] == pytest.approx(30.0)


def test_a_router_that_does_not_wait_for_prefill_leaves_no_such_stage() -> None:
    parts = split(attribute(apart(0.090), answers(10, 0.061)))
    assert parts["prefill_answer"] == 0
    assert parts["router"] == pytest.approx(4.0)
    # Means of requests that are not quite the same: a millisecond does not turn the wait into the router's time.
    close = split(attribute(apart(0.090), answers(10, 0.1395)))
    assert close["prefill_answer"] == pytest.approx(82.5)
    assert close["router"] == pytest.approx(0.0)
    at_once = split(attribute(apart(0.006), answers(10, 0.061)))
    assert at_once["prefill_answer"] == 0
    assert at_once["kv_transfer"] == pytest.approx(5.0)


def test_real_pages_of_an_aggregated_worker() -> None:
    found = attribute(PAGES["aggregated"], answers(640, 0.3761))
    parts = split(found)
    assert list(parts) == ["router", "prefill_queue", "prefill_forward"]
    assert parts["prefill_queue"] == pytest.approx(133.0, abs=0.1)
    assert found is not None
    assert found["rest_ms"] > 0


def entry(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]], **more: Any) -> dict[str, Any]:
    def side(pages: dict[str, dict[str, float]]) -> dict[str, Any]:
        router = pages.get("router", {})
        return {
            "router": {"metrics": router},
            "workers": {name: {"metrics": page} for name, page in pages.items() if name != "router"},
        }

    return {"before": side(before), "after": side(after), **{name: side(pages) for name, pages in more.items()}}


def timer(name: str, seconds: float, count: float, labels: str = "") -> dict[str, float]:
    return {f"{name}_sum{labels}": seconds, f"{name}_count{labels}": count}


UP = {"sglang:prompt_tokens_total": 1.0}


def test_what_is_not_reported_is_not_zero() -> None:
    page = {**UP, **timer("sglang:time_to_first_token_seconds", 1.0, 10)}
    found = attribute(entry({"prefill-0": UP, "decode-0": UP}, {"prefill-0": UP, "decode-0": page}), answers(10, 0.15))
    parts = split(found)
    assert parts.pop("router") == pytest.approx(50.0)
    assert set(parts.values()) == {None}
    assert found is not None
    assert found["rest_ms"] == pytest.approx(100.0)
    assert "100.0 ms unexplained; not reported: bootstrap, prefill queue, prefill, KV" in in_words(found)


def test_a_histogram_that_did_not_move_in_the_window_is_not_reported() -> None:
    old = {**UP, **timer("sglang:queue_time_seconds", 5.0, 50)}
    new = {**old, **timer("sglang:time_to_first_token_seconds", 1.0, 10)}
    assert split(attribute(entry({"aggregated-0": old}, {"aggregated-0": new}), answers(10, 0.15)))["prefill_queue"] is None
    assert attribute(entry({"aggregated-0": old}, {"aggregated-0": old}), answers(10, 0.15)) is None


def test_many_workers_are_one_mean_and_ranks_are_not_counted_twice() -> None:
    stage = "sglang:per_stage_req_latency_seconds"
    forward = {**timer(stage, 0.3, 3, '{stage="prefill_forward",tp_rank="0"}'), **timer(stage, 9.0, 3, '{stage="other"}')}
    ranks = {**forward, **timer(stage, 0.3, 3, '{stage="prefill_forward",tp_rank="1"}')}
    before = {"aggregated-0": UP, "aggregated-1": UP}
    one = attribute(entry(before, {"aggregated-0": {**UP, **forward}, "aggregated-1": {**UP, **forward}}), answers(6, 0.5))
    two = attribute(entry(before, {"aggregated-0": {**UP, **ranks}, "aggregated-1": {**UP, **ranks}}), answers(6, 0.5))
    assert split(one)["prefill_forward"] == split(two)["prefill_forward"] == pytest.approx(100.0)


def test_a_stage_of_some_requests_counts_for_its_share() -> None:
    page = {**UP, **timer("sglang:queue_time_seconds", 1.0, 2)}
    assert split(attribute(entry({"aggregated-0": UP}, {"aggregated-0": page}), answers(10, 0.5)))["prefill_queue"] == 100.0


def test_the_routers_own_ttft_is_preferred() -> None:
    worker = {**UP, **timer("sglang:time_to_first_token_seconds", 1.0, 10)}
    router = timer("smg_pd_ttft_seconds", 1.2, 10)
    found = attribute(entry({"router": {}, "aggregated-0": UP}, {"router": router, "aggregated-0": worker}), answers(10, 0.2))
    assert split(found)["router"] == pytest.approx(20.0)
    assert found is not None
    assert found["stages"][0]["source"] == "smg_pd_ttft_seconds less sglang:time_to_first_token_seconds"
    assert found["rest_ms"] == pytest.approx(180.0)


def test_vllm_goes_from_one_role_to_the_other() -> None:
    prefill = {
        "vllm:prompt_tokens_total": 1.0,
        **timer("vllm:e2e_request_latency_seconds", 1.0, 10),
        **timer("vllm:request_queue_time_seconds", 0.1, 10),
        **timer("vllm:request_prefill_time_seconds", 0.8, 10),
    }
    decode = {
        "vllm:prompt_tokens_total": 1.0,
        **timer("vllm:time_to_first_token_seconds", 0.5, 10),
        **timer("vllm:request_queue_time_seconds", 0.3, 10),  # the wait for the KV cache is part of it
        **timer("vllm:nixl_xfer_time_seconds", 0.2, 10),
        **timer("vllm:request_prefill_time_seconds", 0.05, 10),
    }
    found = attribute(
        entry({"prefill-0": {"up": 1}, "decode-0": {"up": 1}}, {"prefill-0": prefill, "decode-0": decode}), answers(10, 0.2)
    )
    assert split(found) == pytest.approx(
        {
            **{"router": 50.0, "bootstrap": None, "prefill_queue": 10.0, "prefill_forward": 80.0, "kv_allocation": None},
            **{"kv_transfer": 20.0, "decode_queue": 10.0, "first_step": 5.0},
        }
    )


def test_the_window_begins_after_the_warm_up_where_a_snapshot_was_taken_there() -> None:
    def page(seconds: float, count: float) -> dict[str, dict[str, float]]:
        return {"aggregated-0": {**UP, **timer("sglang:queue_time_seconds", seconds, count)}}

    records = [*answers(5, 1.0, WARMUP), *answers(10, 0.5)]
    whole = attribute(entry(page(0, 0), page(8, 15)), records)
    assert whole is not None
    assert (whole["requests"], whole["warmup"]) == (15, True)
    assert whole["ttft_ms"] == pytest.approx(1000 * 10 / 15)
    later = attribute(entry(page(0, 0), page(8, 15), begin=page(3, 5)), records)
    assert later is not None
    assert (later["requests"], later["warmup"], later["ttft_ms"]) == (10, False, pytest.approx(500.0))
    assert split(later)["prefill_queue"] == pytest.approx(500.0)


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"before": None, "after": None},
        entry({"prefill-0": UP}, {}),
        entry({"prefill-0": {}}, {"prefill-0": {}}),
        entry({"prefill-0": {"other:engine": 1}}, {"prefill-0": {"other:engine": 2}}),
        entry({"prefill-0": {}, "decode-0": UP}, {"prefill-0": UP, "decode-0": UP}),
    ],
)
def test_without_whole_evidence_nothing_is_said(broken: dict[str, Any]) -> None:
    assert attribute(broken, answers(3, 0.1)) is None


def test_failed_requests_are_no_part_of_the_mean() -> None:
    bad = Record(0, 9, MEASURE, 10, 2, 0.0, 0.0, status=503, error="HTTP 503")
    assert math.isnan(bad.first_s)
    found = attribute(PAGES["aggregated"], [*answers(640, 0.3761), bad])
    assert found is not None
    assert (found["requests"], found["ttft_ms"]) == (640, pytest.approx(376.1))
    assert attribute(PAGES["aggregated"], [bad]) is None
