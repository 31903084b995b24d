"""What is sent and when: lengths, prompts, schedules, traces."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.load.arrivals import schedule
from pdbench.load.errors import LoadError
from pdbench.load.lengths import Lengths
from pdbench.load.prompts import Prompts, TokenRange
from pdbench.load.requests import Load
from pdbench.load.trace import Scaling, read_trace

EXCERPT = Path(__file__).resolve().parents[1] / "data" / "mooncake_excerpt.jsonl"


@pytest.mark.parametrize("text", ["", "0", "-5", "5-", "5-4", "0-4", "a", "1.5", "1-2-3", "١"])
def test_bad_lengths_are_refused_with_the_right_spelling(text: str) -> None:
    with pytest.raises(LoadError, match="256-512"):
        Lengths.parse(text)


@given(st.integers(1, 1000), st.integers(0, 1000), st.integers())
def test_lengths_stay_in_their_range_and_spell_themselves(low: int, more: int, seed: int) -> None:
    lengths = Lengths(low, low + more)
    assert low <= lengths.draw(random.Random(seed)) <= low + more
    assert Lengths.parse(str(lengths)) == lengths


def test_uniform_lengths_reach_both_ends() -> None:
    rng = random.Random(0)
    assert {Lengths(1, 4).draw(rng) for _ in range(200)} == {1, 2, 3, 4}


@given(st.integers(), st.integers(1, 400), st.sampled_from(["0/measure/0", "1/warmup/3"]))
def test_prompts_have_their_length_and_range_and_repeat(seed: int, length: int, name: str) -> None:
    prompts = Prompts(seed)
    ids = prompts.tokens(name, 5, length)
    assert len(ids) == length
    assert all(300 <= i < 3800 for i in ids)
    assert ids == Prompts(seed).tokens(name, 5, length)
    text = prompts.text(name, 5, length)
    assert len(text.split()) == length
    assert text == Prompts(seed).text(name, 5, length)


def test_no_two_prompts_of_a_run_share_a_first_token_until_the_ids_run_out() -> None:
    prompts = Prompts(1, TokenRange(10, 60))
    names = [(f"{point}/measure/{i}", point * 25 + i) for point in range(2) for i in range(25)]
    assert len({prompts.tokens(name, serial, 8)[0] for name, serial in names}) == 50
    assert prompts.tokens("2/measure/0", 50, 8)[0] == prompts.tokens("0/measure/0", 0, 8)[0]
    assert prompts.tokens("2/measure/0", 50, 8) != prompts.tokens("0/measure/0", 0, 8)


def test_no_two_texts_share_their_first_two_words() -> None:
    prompts = Prompts(3)
    assert len({tuple(prompts.text(f"0/measure/{i}", i, 6).split()[:2]) for i in range(3000)}) == 3000


@pytest.mark.parametrize("text", ["", "5", "5-6", "9-3", "a-b", "-1-4"])
def test_bad_token_ranges_are_refused(text: str) -> None:
    with pytest.raises(LoadError, match="300-3800"):
        TokenRange.parse(text)


@given(st.sampled_from(["poisson", "constant"]), st.floats(0.1, 1000), st.integers(1, 200), st.integers())
def test_schedules_start_at_once_rise_and_repeat(arrival: str, rate: float, count: int, seed: int) -> None:
    due = schedule(arrival, rate, count, random.Random(seed))
    assert len(due) == count
    assert due[0] == 0.0
    assert due == sorted(due)
    assert due == schedule(arrival, rate, count, random.Random(seed))


def test_poisson_has_the_mean_and_the_spread_of_its_rate() -> None:
    due = schedule("poisson", 4.0, 20001, random.Random(1))
    gaps = [b - a for a, b in itertools.pairwise(due)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.25, rel=0.03)
    assert spread == pytest.approx(mean, rel=0.05)
    assert schedule("constant", 4.0, 3, random.Random(1)) == [0.0, 0.25, 0.5]


def test_unknown_arrivals_and_rates_are_refused() -> None:
    with pytest.raises(LoadError, match="poisson"):
        schedule("gauss", 1.0, 1, random.Random(0))
    with pytest.raises(LoadError, match="above 0"):
        schedule("poisson", 0.0, 1, random.Random(0))


def load(**changes: object) -> Load:
    fields: dict[str, object] = {"isl": Lengths(64, 128), "osl": Lengths(8, 8), "count": 30, "seed": 7, "concurrency": 4}
    return Load(**{**fields, **changes})  # type: ignore[arg-type]


def test_every_point_of_a_run_has_the_same_lengths_in_the_same_order() -> None:
    one, two, paced = load(concurrency=4), load(concurrency=64), load(concurrency=None, rate=3.0)
    lengths = [(r.isl, r.osl) for r in one.measured()]
    assert lengths == [(r.isl, r.osl) for r in two.measured()] == [(r.isl, r.osl) for r in paced.measured()]
    assert lengths != [(r.isl, r.osl) for r in load(seed=8).measured()]
    assert all(r.due_s is None for r in one.measured())
    assert paced.measured()[0].due_s == 0.0
    assert len(one.warmup(5)) == 5


def test_the_excerpt_reads_as_a_trace() -> None:
    rows = read_trace(EXCERPT, Scaling())
    assert len(rows) == 200
    assert (rows[0].arrival_s, rows[0].isl, rows[0].osl) == (0.0, 6758, 500)
    assert rows[-1].arrival_s == 72.0
    assert [r.arrival_s for r in rows] == sorted(r.arrival_s for r in rows)


def test_scaling_cuts_and_never_reaches_zero() -> None:
    small = read_trace(EXCERPT, Scaling(0.001, max_isl=50, max_osl=4), 20)
    assert len(small) == 20
    assert all(1 <= r.isl <= 50 and 1 <= r.osl <= 4 for r in small)
    assert small[0].isl == 7


def test_replay_multiplies_the_times() -> None:
    rows = read_trace(EXCERPT, Scaling())
    half = Load(None, None, 200, 0, rows, replay=0.5).measured()
    assert half[-1].due_s == 36.0
    assert [(r.isl, r.osl) for r in half] == [(r.isl, r.osl) for r in rows]


LINE = {"timestamp": 5, "input_length": 10, "output_length": 2, "hash_ids": []}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no request"),
        ("hello\n", "line 1: not a line of a Mooncake trace"),
        ("[1]\n", "line 1: not a line"),
        (json.dumps({**LINE, "input_length": "10"}), "whole numbers"),
        (json.dumps({**LINE, "output_length": -1}), "whole numbers"),
        (json.dumps({**LINE, "timestamp": None}), "number of ms"),
        (json.dumps(LINE) + "\n" + json.dumps({**LINE, "timestamp": 1}), "line 2: its timestamp is before"),
        (json.dumps(LINE), "fewer than --num-requests 2"),
    ],
)
def test_a_bad_trace_is_named_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(LoadError, match=expected):
        read_trace(path, Scaling(), 2)


def test_a_missing_or_binary_trace_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="cannot read the trace"):
        read_trace(tmp_path / "none", Scaling())
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoadError, match="no text file"):
        read_trace(tmp_path / "b", Scaling())
