"""A load that several clients make: its shares, their clocks, one run made of them, and what the gate says of it."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench import merge
from pdbench.cli import main
from pdbench.gate.clients import MOST_CLOCK_MS, clients
from pdbench.gate.rundata import Point, RunData
from pdbench.load.errors import LoadError
from pdbench.load.lengths import Lengths
from pdbench.load.requests import Conversation, Load
from pdbench.metrics import Slo
from pdbench.records import MEASURE, Record
from pdbench.run import share_options
from pdbench.run.looks import oversaturated, unbroken
from pdbench.run.schedule import share
from pdbench.run.share import offset
from pdbench.run.summary import Bounds, Setup
from pdbench.run.watch import UNKNOWN

ISL, OSL = Lengths.parse("8-64"), Lengths.parse("4")


@given(
    st.integers(1, 80),
    st.one_of(st.none(), st.integers(1, 20)),
    st.integers(2, 7),
    st.sampled_from([None, "1", "1-4"]),
    st.integers(),
)
def test_the_shares_are_the_schedule(count: int, slots: int | None, of: int, turns: str | None, seed: int) -> None:
    talk = Conversation.parse(turns) if turns else None
    load = Load(ISL, OSL, count, seed, concurrency=slots, rate=None if slots else 5.0, conversation=talk)
    shares = [share(load.measured(), load.concurrency, number, of) for number in range(1, of + 1)]
    assert sorted((r for own, _ in shares for r in own), key=lambda r: r.index) == load.measured()
    if slots is None:
        assert {own for _, own in shares} == {None}
    else:
        assert sum(own or 0 for _, own in shares) == slots
        assert all(own or not requests for requests, own in shares)
    for requests, _ in shares:
        own = {r.index for r in requests}
        assert all(r.after is None or r.after in own for r in requests), "a conversation is one client's"
    if turns is None and slots is None:
        assert [r.index for r in shares[1][0]] == list(range(1, count, of)), "interleaved"


@given(st.integers(1, 200), st.integers(1, 40), st.integers(2, 7))
def test_who_has_more_slots_has_more_requests(rounds: int, slots: int, of: int) -> None:
    load = Load(ISL, OSL, rounds * slots, 1, concurrency=slots)
    for number in range(1, of + 1):
        requests, own = share(load.measured(), slots, number, of)
        assert len(requests) == rounds * (own or 0)


@given(
    st.floats(-1e6, 1e6),
    st.lists(st.tuples(st.floats(0, 1e6), st.floats(1e-6, 5), st.floats(1e-6, 5)), min_size=1, max_size=40),
)
def test_the_clocks_lie_within_the_bound(ahead: float, ways: list[tuple[float, float, float]]) -> None:
    samples = [(at, at + there + ahead, at + there + back) for at, there, back in ways]
    found, error = offset(samples)
    assert abs(found - ahead) <= error + 1e-6
    assert error <= min(there + back for _, there, back in ways) / 2 + 1e-6


def record(index: int, point: int = 0, **more: Any) -> Record:
    at = float(index)
    made = Record(point, index, MEASURE, 8, 2, at, at + 0.001, at + 0.1, at + 0.2, [at + 0.1, at + 0.2], [1, 1], 8, 2, 0, 200)
    return replace(made, finish_reason="length", ok=True, **more)


CALM = {"p50": 0.1, "p99": 1.0, "max": 2.0}
CLIENT = {
    "cpu_s": 1.0,
    "processes": 1,
    "busy": 0.5,
    "loop_lag_ms": CALM,
    "stamped_share": 1.0,
    "send_lateness_ms": CALM,
    "tokens_per_event": 1.0,
    "events_per_read": 2.0,
    "delivered_load": 0.99,
}
SETUP = Setup("completions", "tokens", [{"concurrency": 2, "num_requests": 4}], "1p1d", 2, Slo(), Bounds())
EXACT = {"shift_s": 0.0, "offset_s": 0.0, "error_s": 0.0, "drift_s": 0.0, "asked": 2}


def part(number: int, shift: float = 0.0, **more: Any) -> merge.Part:
    made = merge.Part(
        f"c{number}",
        Path(f"c{number}"),
        number,
        2,
        SETUP,
        [record(i) for i in range(number - 1, 4, 2)],
        {0: {**EXACT, "point": 0, "shift_s": shift}},
        {0: dict(CLIENT)},
        {},
        "",
        {"state": "done"},
    )
    return replace(made, **more)


@given(st.floats(-1e5, 1e5))
def test_all_times_become_the_first_ones(shift: float) -> None:
    never = record(3, sent_s=math.nan, first_s=math.nan, end_s=math.nan, chunk_s=[])
    parts = [part(1), part(2, shift)]
    parts[1].records[1] = never
    merged = merge.in_one_clock(parts)
    assert sorted(r.index for r in merged) == [0, 1, 2, 3]
    assert merged[:2] == parts[0].records
    moved, before = merged[2], parts[1].records[0]
    for name in ("scheduled_s", "sent_s", "first_s", "end_s"):
        assert getattr(moved, name) - getattr(before, name) == pytest.approx(shift)
    assert moved.end_s - moved.sent_s == pytest.approx(before.end_s - before.sent_s, abs=1e-9), "a latency is nobody's clock's"
    assert [a - b for a, b in zip(moved.chunk_s, before.chunk_s, strict=True)] == pytest.approx([shift] * 2)
    assert math.isnan(merged[3].sent_s)


def test_the_whole_is_as_bad_as_the_worst_client_and_costs_what_all_cost() -> None:
    slow = {**CLIENT, "loop_lag_ms": {**CALM, "p99": 50.0}, "delivered_load": 0.8, "busy": 0.9, "events_per_read": 1.0}
    found = merge.together([part(1), part(2, clients={0: slow})], 0)
    assert (found["cpu_s"], found["processes"], found["busy"], found["delivered_load"]) == (2.0, 2, 0.9, 0.8)
    assert found["loop_lag_ms"] == {"p50": 0.1, "p99": 50.0, "max": 2.0}
    assert (found["tokens_per_event"], found["events_per_read"]) == (1.0, pytest.approx(8 / 6))


def test_a_client_that_is_not_known_makes_the_whole_unknown_and_an_idle_one_does_not() -> None:
    assert merge.together([part(1), part(2, clients={})], 0) == UNKNOWN
    idle = part(2, points={0: {**EXACT, "point": 0, "asked": 0}}, clients={}, records=[])
    assert merge.together([part(1), idle], 0)["cpu_s"] == 1.0


def test_the_selfcheck_is_that_of_the_client_furthest_from_the_truth() -> None:
    def check(mean: float, *reasons: str) -> dict[str, Any]:
        return {"points": [{"reasons": list(reasons), "ttft_wrong_by": {"mean": mean}, "most_tokens_per_s": 100.0}]}

    def worst(*found: dict[str, Any]) -> dict[str, Any]:
        (point,) = merge.worst_selfcheck([part(1, selfcheck=found[0]), part(2, selfcheck=found[1])])["points"]
        assert point["most_tokens_per_s"] == 200.0, "both of them"
        return {"points": [{**point, "most_tokens_per_s": 100.0}]}

    good, bad = check(0.2), check(-3.0)
    assert worst(good, bad) == bad
    slow = check(0.1, "too slow")
    assert worst(slow, bad) == slow
    assert merge.worst_selfcheck([part(1, selfcheck=good), part(2)])["error"] == "client c2: selfcheck.json is missing"


def options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"share": None, "meet": None, "meet_key": None, "until": None, **given})


def test_a_share_is_read(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("0123456789abcdef\n")
    assert share_options.read(options()).of == 1
    found = share_options.read(options(share="2/3", meet="[::1]:99", meet_key=key))
    assert (found.number, found.of, found.host, found.port, found.key) == (2, 3, "::1", 99, "0123456789abcdef")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"share": "3/2"}, "--share '3/2': write which client of how many"),
        ({"share": "0/2"}, "--share '0/2'"),
        ({"share": "1/1"}, "--share '1/1'"),
        ({"share": "one"}, "such as 1/2 and 2/2"),
        ({"meet": None}, "go together"),
        ({"meet": "127.0.0.1"}, "--meet '127.0.0.1': write an address"),
        ({"meet": "127.0.0.1:70000"}, "and a port"),
        ({"meet": "0.0.0.0:99"}, "not all of them"),
        ({"meet_key": Path("nowhere")}, "cannot read --meet-key nowhere: No such file"),
        ({"meet_key": "short"}, "16 characters or more"),
        ({"until": "ttft_p99:5%"}, "--until does not go with --share"),
    ],
)
def test_a_bad_share_is_refused(tmp_path: Path, given: dict[str, Any], says: str) -> None:
    for name, text in (("good", "0123456789abcdef"), ("short", "x")):
        (tmp_path / name).write_text(text)
    if given.get("meet_key") == "short":
        given = {"meet_key": tmp_path / "short"}
    with pytest.raises(LoadError, match=says):
        share_options.read(options(**{"share": "1/2", "meet": "127.0.0.1:99", "meet_key": tmp_path / "good", **given}))


def judged(*entries: dict[str, Any], **gone: dict[str, str]) -> list[tuple[bool, str]]:
    point = Point(0, {"clients": list(entries)}, {}, [])
    told = {"clients": [e["name"] for e in entries], **gone}
    return [(check.ok, check.message) for check in clients(RunData(Path(), points=[point], clients=told))]


def entry(name: str, error_s: float = 0.0001, **client: Any) -> dict[str, Any]:
    return {"name": name, "asked": 2, "clock": {**EXACT, "error_s": error_s}, "client": {**CLIENT, **client}}


def test_the_gate_judges_every_client_by_itself() -> None:
    assert clients(RunData(Path(), points=[Point(0, {}, {}, [])])) == [], "a run of one client has no such check"
    assert [ok for ok, _ in judged(entry("a"), entry("b"))] == [True, True]
    assert judged(entry("a"), entry("b", MOST_CLOCK_MS / 1000 * 1.01))[1] == (
        False,
        "b: its clock is known to 10.1 ms only (bound 10 ms)",
    )
    late = judged(entry("a"), entry("b", send_lateness_ms={**CALM, "p99": 101.0}))[1]
    assert late == (False, "b: sending after a request was due p99 101 ms (bound 100 ms)")
    assert judged(entry("a"), entry("b", loop_lag_ms={**CALM, "p99": None}))[1][0] is False
    assert judged(entry("a"), lost={"b": "it left no run behind"})[0] == (False, "b: it left no run behind")
    assert judged(entry("a"), unfinished={"a": "killed"})[0] == (False, "a: killed")
    assert judged()[1] == (False, "no client says when it began")
    assert judged({"name": "a"})[1][0] is False


def test_over_saturation_is_judged_up_to_the_first_request_that_is_not_answered() -> None:
    done = [record(i) for i in (2, 0, 1, 5, 4)]
    assert [r.index for r in unbroken(done)] == [0, 1, 2]
    assert unbroken([record(1)]) == []
    load = Load(ISL, OSL, 300, 1, rate=10.0)
    late = [replace(record(i), sent_s=i / 10, first_s=i / 8, end_s=i / 8 + 1) for i in range(300)]
    calm = [replace(record(i), sent_s=i / 10, first_s=i / 10 + 0.5, end_s=i / 10 + 1) for i in range(300)]
    assert oversaturated(late, load)
    assert not oversaturated(calm, load)
    assert not oversaturated(late, replace(load, rate=None, concurrency=4))
    assert not oversaturated(late, replace(load, rate_to=20.0, ramp_s=10.0)), "a ramp grows by itself"


@pytest.mark.parametrize("pace", [("--concurrency", "2,4"), ("--request-rate", "8,4")])
def test_climbing_needs_rates_that_climb(pace: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    where = ["run", "--url", "http://127.0.0.1:9", "--model", "m", "--output", str(tmp_path / "o"), "--num-requests", "4"]
    assert main([*where, "--isl", "8", "--osl", "4", "--stop-saturated", *pace]) == 2
    assert "--stop-saturated climbs: give rates in ascending order" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
