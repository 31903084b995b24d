"""The laws of a soak: its schedule, its account of requests, and the slope of what a process holds."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab import soak, soak_report

WORKERS, HOSTS = ("h1/a.service", "h2/b.service"), ("h1", "h2", "h3")
Json = dict[str, Any]


def made(seed: int, seconds: float) -> list[soak.Fault]:
    return soak.schedule(seed, seconds, WORKERS, HOSTS, ("h1", "h2"))


@given(st.integers(0, 10**6), st.floats(0, 4000))
def test_faults_come_one_at_a_time_within_the_time_and_each_kind_in_turn(seed: int, seconds: float) -> None:
    faults = made(seed, seconds)
    assert faults == made(seed, seconds)
    for one, after in itertools.pairwise(faults):
        assert after.at_s >= one.at_s + one.lasts_s + soak.GAP_S - 0.2
    for fault in faults:
        assert fault.at_s >= soak.CALM_S
        assert fault.at_s + fault.lasts_s <= seconds - soak.TAIL_S + 0.1
        assert set(fault.where) <= {"kill": set(WORKERS), "clock": {"h1", "h2"}}.get(fault.kind, set(HOSTS))
        assert len(set(fault.where)) == (2 if fault.kind == "partition" else 1)
        assert fault.kind != "slow" or any(soak.SLOW[int(fault.how)])
    for start in range(0, len(faults) - len(soak.KINDS) + 1, len(soak.KINDS)):
        assert {fault.kind for fault in faults[start : start + len(soak.KINDS)]} == set(soak.KINDS)


def test_three_minutes_have_faults_and_a_longer_soak_begins_like_a_shorter_one() -> None:
    for seed in range(50):
        short, long = made(seed, 180), made(seed, 2700)
        assert len(short) >= 3
        assert len(long) > 50
        assert long[: len(short)] == short


TIMEOUT = 20.0
rows = st.lists(
    st.fixed_dictionaries(
        {
            "scheduled_s": st.floats(0, 300),
            "sent_s": st.one_of(st.none(), st.just(math.nan), st.floats(0, 300)),
            "took": st.one_of(st.none(), st.floats(0, TIMEOUT)),
            "ok": st.booleans(),
            "error": st.sampled_from(["timed out", "HTTP 503 http://h1:3000/x", ""]),
        }
    ),
    max_size=40,
)


def window(kind: str, begin: float, lasts: float | None) -> soak.Window:
    return soak.Window(soak.Fault(kind, ("h1",), begin, 1.0), begin, None if lasts is None else begin + lasts)


spans = st.builds(window, st.sampled_from(soak.KINDS), st.floats(0, 300), st.one_of(st.none(), st.floats(0, 60)))
windows = st.lists(spans, max_size=4)


def never(row: Json) -> bool:
    return row["sent_s"] is None or math.isnan(row["sent_s"])


def recorded(drawn: list[Json]) -> list[Json]:
    """Rows as a run has them: what was never sent has no end, and was not answered."""
    return [
        {
            **row,
            "index": index,
            "ok": row["ok"] and not never(row),
            "end_s": None if row["took"] is None or never(row) else row["sent_s"] + row["took"],
        }
        for index, row in enumerate(drawn)
    ]


@given(rows, windows, st.integers(0, 5))
def test_every_request_is_counted_once(drawn: list[Json], faults: list[soak.Window], more: int) -> None:
    records = recorded(drawn)
    found = soak.account(records, len(records) + more, faults, TIMEOUT)
    assert found.recorded == len(records) == found.answered + found.failed.total() + len(found.unexplained)
    assert found.lost == more
    assert found.answered == sum(row["ok"] for row in records)
    assert found.unsent == sum(map(never, records))
    assert found.closed == (not more and not found.unexplained)
    # a record that comes again is told, and counted nowhere
    again = soak.account([*records, *records], len(records), faults, TIMEOUT)
    assert (again.twice, again.recorded, again.failed) == (len(records), found.recorded, found.failed)
    assert again.closed == (not records)


@given(rows, windows)
def test_a_failure_is_explained_exactly_where_it_met_a_fault(drawn: list[Json], faults: list[soak.Window]) -> None:
    for row in recorded(drawn):
        if row["ok"]:
            continue
        begin = row["scheduled_s"] if never(row) else row["sent_s"]
        end = begin + TIMEOUT if row["end_s"] is None else row["end_s"]
        meets = {w.fault.kind for w in faults if w.begin_s <= end and (w.healed_s is None or w.healed_s >= begin)}
        found = soak.account([row], 1, faults, TIMEOUT)
        if meets:
            (((cause, error), count),) = found.failed.items()
            assert (set(cause.split(" and ")), count) == (meets, 1)
            assert "3000" not in error
        else:
            assert [at for at, _ in found.unexplained] == [begin]


@given(st.floats(-50, 50), st.lists(st.floats(10, 500), min_size=1, max_size=4), st.integers(20, 60))
def test_a_straight_line_has_its_slope_however_often_the_process_was_started(
    slope: float, levels: list[float], many: int
) -> None:
    lives = [life for life, _ in enumerate(levels) for _ in range(many)]
    times = [5.0 * place for place in range(len(lives))]
    begins = [5.0 * many * life for life in lives]
    # what it takes to warm up is not growth
    values = [
        levels[life] + slope * (t - begin) / 3600 - (100 if t < begin + 30 else 0)
        for life, t, begin in zip(lives, times, begins, strict=True)
    ]
    found = soak.growth(times, values, lives, 30)
    assert found
    assert found.per_hour == pytest.approx(slope, abs=1e-3)
    assert found.low == pytest.approx(found.high, abs=1e-2)
    assert found.leaks == (found.low > 0 and found.low * 24 > found.level)


def wander(rng: random.Random, slope: float, keep: float) -> soak.Growth:
    """The growth that is seen of samples whose noise remembers itself."""
    noise, values, times = 0.0, [], [5.0 * place for place in range(540)]
    for t in times:
        noise = keep * noise + rng.gauss(0, 1)
        values.append(100 + slope * t / 3600 + noise)
    found = soak.growth(times, values, [0] * len(times), 120)
    assert found
    return found


@pytest.mark.parametrize("keep", [0.0, 0.6, 0.9])
def test_the_interval_holds_the_true_slope_nineteen_times_of_twenty(keep: float) -> None:
    rng = random.Random(3)
    held = sum((found := wander(rng, 7.0, keep)).low <= 7.0 <= found.high for _ in range(200))
    assert held >= 180


def test_a_leak_is_seen_and_noise_is_none() -> None:
    rng = random.Random(5)
    assert wander(rng, 60.0, 0.6).leaks
    assert not any(wander(rng, 0.0, 0.9).leaks for _ in range(50))


def test_too_few_samples_say_nothing() -> None:
    assert soak.growth([0, 5, 10], [1, 2, 3], [0, 0, 0], 0) is None
    assert soak.growth([0, 5, 10, 15, 20], [1, 2, 3, 4, 5], [0, 0, 0, 0, 1], 10) is None


# -- the page


def told(failed_at: float, grows: float = 0.0, healed: bool = True) -> soak_report.Soak:
    """A soak of 20 minutes with one kill from 100 to 110 s, and one request that failed."""
    windows = [soak.Window(soak.Fault("kill", ("h1/a.service",), 100.0, 0.0), 100.0, 110.0 if healed else None)]
    rows = [
        {
            "index": i,
            "scheduled_s": float(i),
            "sent_s": float(i),
            "end_s": i + 0.1,
            "ok": i != failed_at,
            "error": "HTTP 503 busy",
        }
        for i in range(1200)
    ]
    samples = [soak_report.Sample(5.0 * i, "client", 7, 50 + grows * i, 40, 3) for i in range(240)]
    served = [(float(i), i != failed_at) for i in range(1200)]
    return soak_report.Soak(1, 20, 1, 1, windows, soak.account(rows, 1200, windows, 20), samples, served, 60, "2026-01-01")


def test_the_page_says_whether_anything_is_lost_or_leaks(tmp_path: Path) -> None:
    good = soak_report.page(told(105))
    assert "**Nothing is lost, and nothing leaks.**" in good
    assert "| kill | `HTTP # busy` | 1 |" in good
    assert "| on record | 1200 |" in good
    assert "1 failed outside of any fault" in soak_report.page(told(500))
    assert "| none known | `HTTP # busy` at 500.0 s | 1 |" in soak_report.page(told(500))
    assert "leaks: memory of client" in soak_report.page(told(105, grows=1.0))
    assert "not served again after: kill" in soak_report.page(told(105, healed=False))
    soak_report.write(told(105), tmp_path)
    assert json.loads((tmp_path / "soak.json").read_text())["account"]["failed"] == [["kill", "HTTP # busy", 1]]
    assert (tmp_path / "soak.png").stat().st_size > 20_000
