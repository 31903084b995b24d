"""The steady window, over-saturation and the end of a run, on queues whose truth is known."""

from __future__ import annotations

import asyncio
import heapq
import json
from pathlib import Path

import numpy as np
import pytest

from pdbench import steady
from pdbench.enough import Target, Verdict, enough, next_look, parse
from pdbench.load.errors import LoadError
from pdbench.load.requests import Load
from pdbench.records import Record
from pdbench.run import looks


def answer(index: int, sent: float, first: float, end: float) -> Record:
    times = [first, (first + end) / 2, end]
    return Record(0, index, "measure", 10, 3, sent, sent, first, end, times, [1, 1, 1], 10, 3, 0, 200, "length", True)


def queue(rate: float, count: int, seed: int, servers: int = 8) -> list[Record]:
    """An M/M/8 queue with 1 s of service: it can serve 8 a second."""
    rng, free, now, found = np.random.default_rng(seed), [0.0] * servers, 0.0, []
    for i in range(count):
        now += rng.exponential(1 / rate)
        begin = max(now, heapq.heappop(free))
        end = begin + rng.exponential(1.0)
        heapq.heappush(free, end)
        found.append(answer(i, now, begin + 0.01, end + 0.02))
    return found


def closed(slots: int, count: int, slow_first: int = 0, seed: int = 1) -> list[Record]:
    """A closed loop; the first ``slow_first`` requests take five times as long to their first token."""
    rng, free, found = np.random.default_rng(seed), [0.0] * slots, []
    for i in range(count):
        sent = heapq.heappop(free)
        first = sent + (0.5 if i < slow_first else 0.1) * rng.uniform(0.9, 1.1)
        end = first + rng.uniform(0.9, 1.1)
        heapq.heappush(free, end)
        found.append(answer(i, sent, first, end))
    return found


def test_mser5_drops_the_start_and_nothing_else() -> None:
    rng = np.random.default_rng(5)
    level = rng.normal(10, 1, 500)
    start = np.linspace(40, 10, 50) + rng.normal(0, 1, 50)
    drop = steady.mser5(np.concatenate((start, level)))
    assert drop is not None
    assert 35 <= drop <= 75
    assert steady.mser5(level) is not None
    assert steady.mser5(level[:49]) is None  # too few to tell
    assert steady.mser5(np.arange(500.0)) is None  # never settles


def test_the_window_of_a_closed_loop_leaves_out_start_and_end() -> None:
    records = closed(8, 400, slow_first=40)
    window = steady.find(records, 8)
    assert window.reason == ""
    slow = max(r.first_s for r in records if r.index < 40)
    assert slow - 1.5 <= window.begin_s <= slow + 8
    assert window.end_s == max(r.sent_s for r in records)
    s = steady.summarise(records, 8, 4)
    assert s["ttft_ms"]["mean"] == pytest.approx(100, rel=0.05)  # type: ignore[index]
    assert s["mean_in_flight"] == pytest.approx(8, rel=0.02)
    # 8 slots of 1.1 s, 3 tokens a request, over 4 GPUs
    assert s["output_throughput_per_gpu"] == pytest.approx(8 / 1.1 * 3 / 4, rel=0.05)
    json.dumps(s, allow_nan=False)


@pytest.mark.parametrize(
    ("records", "slots", "why"),
    [
        (closed(8, 8), 8, "never fill 8 slots"),
        (closed(8, 40), 8, "too few to find it"),
        ([], None, "no request succeeded"),
        (queue(16, 600, 1), None, "did not settle"),
    ],
)
def test_where_there_is_no_window_the_reason_is_said(records: list[Record], slots: int | None, why: str) -> None:
    found = steady.summarise(records, slots, None)
    assert found["found"] is False
    assert why in str(found["reason"])


def test_more_than_can_be_served_is_told_from_a_busy_queue() -> None:
    def told(rate: float) -> int:
        return sum(steady.saturation(queue(rate, 400, seed))["oversaturated"] is True for seed in range(20))

    assert told(4.0) == 0
    assert told(6.4) <= 1
    assert told(12.0) >= 18
    assert told(16.0) == 20


def test_how_fast_the_backlog_grows() -> None:
    found = steady.saturation(queue(12.0, 1500, 1))
    assert found["sent_rate"] == pytest.approx(12, rel=0.1)
    assert found["backlog_growth"] == pytest.approx(4, rel=0.25)


def test_saturation_is_not_guessed() -> None:
    assert steady.saturation(queue(4, 99, 1))["oversaturated"] is None
    burst = [answer(i, i / 1000, 5 + i / 1000, 6 + i / 1000) for i in range(200)]
    found = steady.saturation(burst)
    assert found["oversaturated"] is None
    assert "before the first requests were long answered" in str(found["reason"])


def test_what_to_wait_for_is_read() -> None:
    assert parse("ttft_p99:5%, itl_token_mean:2.5%") == (
        Target("ttft_ms", "p99", 0.05),
        Target("itl_token_ms", "mean", 0.025),
    )
    assert parse("request_output_throughput_p50:1%")[0].name == "request_output_throughput_p50"


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft_p99", "ttft_p99:5", "ttft_p42:5%", "speed_p99:5%", "ttft_p99:0%", "ttft_p99:100%"]
)
def test_what_cannot_be_waited_for_is_refused(text: str) -> None:
    with pytest.raises(LoadError, match="such as ttft_p99:5%"):
        parse(text)


def test_a_run_ends_when_it_knows_enough() -> None:
    targets = parse("ttft_mean:2%,e2e_p50:2%")
    early = enough(closed(8, 60), targets, 8)
    assert not early.done
    late = enough(closed(8, 800), targets, 8)
    assert late.done, late.message
    assert all(width is not None and width <= 0.02 for width in late.widths.values())
    assert "ttft_mean ± " in late.message
    tight = enough(closed(8, 800), parse("ttft_mean:0.01%"), 8)
    assert not tight.done


def test_a_percentile_that_the_requests_do_not_bound_is_not_known() -> None:
    verdict = enough(closed(4, 300), parse("ttft_p99:50%"), 4)
    assert not verdict.done
    assert verdict.widths == {"ttft_p99": None}
    assert "unbounded" in verdict.message


def test_figures_that_drift_are_never_enough() -> None:
    assert "did not settle" in enough(queue(16, 600, 1), parse("ttft_mean:90%")).message


def test_looks_become_rarer() -> None:
    looks = [0]
    while looks[-1] < 10_000:
        looks.append(next_look(looks[-1]))
    assert looks[1] == 100
    assert len(looks) < 30


def test_one_narrow_interval_is_luck_and_two_in_a_row_end_the_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = iter([True, False, True, True, True])
    ended, load = iter(range(100, 10_000, 100)), Load(None, None, 9_999, 1, concurrency=1)
    monkeypatch.setattr(looks, "_LOOK_S", 0.0)
    monkeypatch.setattr(looks, "measured", lambda journal, number: [])
    monkeypatch.setattr(looks, "enough", lambda *a: Verdict(next(told), {}, "narrow"))
    watched = looks.Looks(until=parse("ttft_mean:5%")).watch(tmp_path / "j", 0, load, lambda: next(ended))
    assert asyncio.run(watched) == "known well enough: narrow"
    assert list(told) == [True]
