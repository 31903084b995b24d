"""What the client finds wrong with a point, what it measures of itself, and the table."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.metrics import Slo
from pdbench.records import Record
from pdbench.run.summary import Bounds, Setup, point_summary, whole_summary
from pdbench.run.table import ending, render
from pdbench.run.watch import UNKNOWN, Span, Watch, brief, delivered_closed, delivered_open

CALM: dict[str, Any] = {
    "cpu_s": 0.1,
    "loop_lag_ms": {"p50": 0.1, "p99": 1.0, "max": 2.0},
    "send_lateness_ms": {"p50": 0.1, "p99": 1.0, "max": 2.0},
    "tokens_per_event": 1.0,
    "events_per_read": 1.0,
    "delivered_load": 0.99,
}


def point(**more: object) -> dict[str, object]:
    fields = {"concurrency": 4, "request_rate": None, "arrival": None, "time_scale": None, "isl": "10", "osl": "3"}
    return {**fields, "num_requests": 2, **more}


def setup(*points: dict[str, object], **more: Any) -> Setup:
    fields: dict[str, Any] = {
        "api": "completions",
        "prompt": "tokens",
        "ratio": "3p1d",
        "gpus": 4,
        "slo": Slo(),
        "bounds": Bounds(),
    }
    return Setup(points=points or (point(),), **{**fields, **more})


def record(index: int = 0, number: int = 0, **more: Any) -> Record:
    fields: dict[str, Any] = {
        **{"scheduled_s": 0.0, "sent_s": 0.0, "first_s": 1.0, "end_s": 3.0, "chunk_s": [1.0, 2.0, 3.0]},
        **{"prompt_tokens": 10, "output_tokens": 3, "cached_tokens": 0, "status": 200, "finish_reason": "length", "ok": True},
    }
    return Record(number, index, "measure", 10, 3, **{**fields, **more})


def reasons(*records: Record, client: dict[str, Any] = CALM, made: Setup | None = None) -> list[str]:
    found: list[str] = point_summary(made or setup(), 0, records, client)["invalid_reasons"]  # type: ignore[assignment]
    return found


def test_a_good_point_is_valid() -> None:
    s = point_summary(setup(), 0, [record(0), record(1)], CALM)
    assert (s["valid"], s["invalid_reasons"], s["notes"]) == (True, [], [])
    assert (s["concurrency"], s["ratio"], s["gpus"], s["client"]) == (4, "3p1d", 4, CALM)
    assert s["output_throughput_per_gpu"] == 0.5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ok": False, "error": "HTTP 503"}, "1 of 2 requests failed, 1 of them with: HTTP 503"),
        ({"output_tokens": -1}, "no count of output tokens for 1 of 2"),
        ({"output_tokens": 2}, "not as long as forced, such as request 1: 2 tokens for 3"),
        ({"prompt_tokens": 11}, "such as request 1: 11 for 10"),
        ({"first_s": 0.0, "chunk_s": [0.0, 3.0]}, "1 of 2 requests have times out of order"),
        ({"chunk_s": [1.0, 3.0, 2.0]}, "times out of order"),
        ({"cached_tokens": 5}, "5 of 20 prompt tokens came out of a prefix cache"),
    ],
)
def test_each_fault_of_a_request_is_a_reason(change: dict[str, Any], expected: str) -> None:
    found = reasons(record(0), record(1, **change))
    assert len(found) == 1
    assert expected in found[0]


def test_a_missing_request_is_a_reason() -> None:
    assert reasons(record(0)) == ["1 of 2 requests are accounted for"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"loop_lag_ms": {"p50": 1, "p99": 101.0, "max": 200}}, "reading lagged behind what arrived by 101 ms"),
        ({"send_lateness_ms": {"p50": 1, "p99": 150.0, "max": 200}}, "sent late by 150 ms"),
        ({"delivered_load": 0.8}, "delivered 80% of the configured load"),
    ],
)
def test_a_slow_client_is_a_reason(change: dict[str, Any], expected: str) -> None:
    (found,) = reasons(record(0), record(1), client={**CALM, **change})
    assert expected in found


def test_a_few_shared_tokens_and_a_chat_template_are_no_contamination() -> None:
    assert reasons(record(0, cached_tokens=2), record(1, cached_tokens=2)) == []
    assert reasons(record(0, cached_tokens=9), record(1), made=setup(api="chat", prompt="text")) == []


def test_text_prompts_are_not_held_to_their_number_of_words() -> None:
    assert reasons(record(0, prompt_tokens=13), record(1), made=setup(prompt="text")) == []


def test_coalescing_is_noted_not_blamed() -> None:
    lumped = {**CALM, "tokens_per_event": 4.0, "events_per_read": 3.0}
    counted = record(1, chunk_tokens=[4, 4, 4])
    s = point_summary(setup(), 0, [record(0), counted], lumped)
    assert s["valid"]
    notes: Any = s["notes"]
    first, second, third = notes
    assert "4.0 output tokens on average (tokens per event > 1)" in first
    assert "3.0 events" in second
    assert third.startswith("of 1 answers the server counted no tokens by event")
    assert len(point_summary(setup(), 0, [counted], lumped)["notes"]) == 2  # type: ignore[arg-type]


def test_an_open_loop_that_asks_too_much_is_noted() -> None:
    late = [
        record(i, scheduled_s=i / 10, sent_s=i / 10, first_s=i / 5 + 1, end_s=i / 5 + 2, chunk_s=[i / 5 + 1, i / 5 + 2])
        for i in range(200)
    ]
    asked = point(concurrency=None, request_rate=10.0, num_requests=200)
    s = point_summary(setup(asked), 0, late, CALM)
    assert s["saturation"]["oversaturated"]  # type: ignore[index]
    assert s["notes"] == [
        "over-saturated: of 10.1 requests sent each second, 5 were left over, so latencies depend on how long it ran "
        "and say nothing of the servers; throughput is the most they give"
    ]
    assert point_summary(setup(), 0, late, CALM)["saturation"] is None  # a closed loop cannot
    assert "note, 10 req/s: over-saturated" in render([s])
    # with a trace or a ramp, more in flight may be what was asked for
    trace = point(concurrency=None, num_requests=200, time_scale=1.0)
    ramp = point(concurrency=None, num_requests=200, request_rate=10.0, request_rate_to=20.0)
    for uneven in (trace, ramp):
        assert point_summary(setup(uneven), 0, late, CALM)["saturation"]["oversaturated"] is None  # type: ignore[index]


def test_the_table_shows_the_steady_window_with_intervals() -> None:
    def at(i: int) -> Record:
        sent = i // 4 * 1.0 + i % 4 * 0.2
        return record(i, sent_s=sent, first_s=sent + 0.1, end_s=sent + 0.9, chunk_s=[sent + 0.1, sent + 0.5, sent + 0.9])

    records = [at(i) for i in range(200)]
    asked = point(num_requests=200)
    text = render([point_summary(setup(asked, slo=Slo(ttft_ms=150)), 0, records, CALM)])
    (row,) = [line for line in text.splitlines() if line.count("[") == 5]
    assert "100.0 [100.0, 100.0]" in row
    assert row.endswith("100.0% [98%, 100%]")
    short = render([point_summary(setup(), 0, records[:2], CALM)])
    assert short.endswith("no steady window, c=4: 2 requests never fill 4 slots and go on from there")


def test_one_point_stands_at_the_top_two_are_added_up() -> None:
    one = setup()
    single = point_summary(one, 0, [record(0), record(1)], CALM)
    top = whole_summary(one, [single], [])
    assert all(top[key] == single[key] for key in single)
    assert top["points"] == [single]
    two = setup(point(), point(concurrency=8))
    records = [record(0), record(1), record(0, number=1), record(1, number=1, ok=False, error="x")]
    top = whole_summary(two, [point_summary(two, n, records, CALM) for n in (0, 1)], [])
    assert (top["completed"], top["failed"], top["valid"]) == (3, 1, False)
    assert top["invalid_reasons"] == ["point 1: 1 of 2 requests failed, 1 of them with: x"]
    assert "ttft_ms" not in top


def test_a_recovered_or_empty_point_is_json_without_nan() -> None:
    s = whole_summary(
        setup(), [point_summary(setup(), 0, [record(first_s=math.nan, ok=False, error="e")], UNKNOWN)], ["recovered"]
    )
    json.dumps(s, allow_nan=False)
    assert s["valid"] is False
    assert render(s["points"])  # type: ignore[arg-type]


def spans(*triples: tuple[float, float, float]) -> list[Span]:
    return [Span(*t) for t in triples]


def test_delivered_load_of_a_closed_loop() -> None:
    full = spans((0, 0, 1), (0, 0, 2), (1, 1, 3), (2, 2, 4))
    assert delivered_closed(full, 2) == 1.0
    idle = spans((0, 0, 1), (0, 0, 1), (1, 2, 3), (1, 2, 3))
    assert delivered_closed(idle, 2) == 0.5
    assert delivered_closed(full[:2], 2) == 1.0
    assert delivered_closed([], 2) is None
    assert delivered_closed(spans((0, math.nan, 1)), 2) is None


def test_delivered_load_of_an_open_loop() -> None:
    assert delivered_open(spans((0, 0, 9), (1, 1, 9), (2, 2, 9))) == 1.0
    assert delivered_open(spans((0, 0, 9), (1, 3, 9), (2, 4, 9))) == 0.5
    assert delivered_open(spans((0, 0, 9))) == 1.0
    assert delivered_open([]) is None


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 5)), min_size=1, max_size=20), st.integers(1, 5))
def test_no_closed_loop_delivers_more_than_all(starts: list[tuple[float, float]], slots: int) -> None:
    free = [0.0] * slots
    made = []
    for gap, length in starts:
        slot = free.index(min(free))
        sent = free[slot] + gap / 100
        made.append(Span(free[slot], sent, sent + length))
        free[slot] = sent + length
    share = delivered_closed(made, slots)
    assert share is not None
    assert share <= 1.0 + 1e-6


def test_the_report_of_the_client_has_its_keys_also_when_nothing_is_known() -> None:
    lags = Counter({10: 99, 500: 1})
    watch = Watch(spans=spans((0, 0.002, 1), (0, math.nan, 1)), lags=lags, stamped=50, all_reads=100, reads=4)
    found = watch.report(tokens=8, events=8, delivered=1.0)
    assert list(found) == list(UNKNOWN)
    assert found["loop_lag_ms"] == {"p50": 1.1, "p99": 1.1, "max": 50.1}
    assert found["stamped_share"] == 0.5
    assert found["send_lateness_ms"] == {"p50": 2.0, "p99": 2.0, "max": 2.0}
    assert (found["tokens_per_event"], found["events_per_read"]) == (1.0, 2.0)
    assert brief([]) == {"p50": None, "p99": None, "max": None}


def test_a_run_ends_with_the_word_that_no_gpu_made_its_figures() -> None:
    said = setup(no_gpu="the engine was emulated", truncated="2 of 36 layers")
    s = whole_summary(said, [point_summary(said, 0, [record(0)], CALM)], [])
    assert (s["no_gpu"], s["truncated"]) == ("the engine was emulated", "2 of 36 layers")
    told = ending(s).splitlines()[-2:]
    assert told[0] == "the engine was emulated: no GPU was used, these figures say nothing about hardware"
    assert told[1] == "the model is not whole: 2 of 36 layers"
    assert "GPU was used" not in ending(whole_summary(setup(), [point_summary(setup(), 0, [record(0)], CALM)], []))
