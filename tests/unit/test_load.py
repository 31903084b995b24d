"""What is sent and when: lengths, prompts, schedules, traces."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import random
from bisect import bisect
from collections import Counter
from pathlib import Path
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdbench.load.arrivals import Rate, schedule, schedule_for
from pdbench.load.errors import LoadError
from pdbench.load.lengths import Lengths
from pdbench.load.prompts import Prompts, TokenRange
from pdbench.load.requests import Load
from pdbench.load.trace import Scaling

BAD_LENGTHS = [
    *("", "0", "-5", "5-", "5-4", "0-4", "a", "1.5", "1-2-3", "١", "99999999999", "normal:512", "normal:0:5", "normal:a:5"),
    *("lognormal:512:9", "lognormal:-5:1", "uniform:1:2", "512@0.5,", "512,4096", "512@0", "512@", "@0.5", "512@-1", "512@nan"),
]


@pytest.mark.parametrize("text", BAD_LENGTHS)
def test_bad_lengths_are_refused_with_the_right_spelling(text: str) -> None:
    with pytest.raises(LoadError, match=r"256-512|512@0.7"):
        Lengths.parse(text)


def draws(text: str, count: int = 4000) -> list[int]:
    lengths, rng = Lengths.parse(text), random.Random(5)
    assert str(lengths) == text
    assert pickle.loads(pickle.dumps(lengths)).draw(random.Random(1)) == lengths.draw(random.Random(1))
    return [lengths.draw(rng) for _ in range(count)]


@given(st.integers(1, 1000), st.integers(0, 1000), st.integers())
def test_lengths_stay_in_their_range_and_spell_themselves(low: int, more: int, seed: int) -> None:
    lengths = Lengths.parse(f"{low}-{low + more}")
    assert low <= lengths.draw(random.Random(seed)) <= low + more
    assert Lengths.parse(str(low)).draw(random.Random(seed)) == low


def test_uniform_lengths_reach_both_ends() -> None:
    assert set(draws("1-4", 200)) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("text", "mean", "deviation"),
    [
        ("512", 512, 0),
        ("256-768", 512, 148),
        ("normal:512:64", 512, 64),
        ("lognormal:512:0.4", 512, 512 * (math.exp(0.16) - 1) ** 0.5),
        ("100@0.75,normal:900:50@0.25", 300, math.sqrt(0.75 * 200**2 + 0.25 * (600**2 + 50**2))),
        ("100@3,900@1", 300, 346.4),
    ],
)
def test_lengths_have_their_mean_and_spread(text: str, mean: float, deviation: float) -> None:
    """Within five standard errors of the mean, 4000 draws; log-normal deviations spread more."""
    found = draws(text)
    assert fmean(found) == pytest.approx(mean, abs=5 * deviation / 4000**0.5 + 0.1)
    assert pstdev(found) == pytest.approx(deviation, rel=0.12, abs=0.1)


@given(st.floats(1, 5), st.floats(0, 1e9), st.integers())
def test_no_draw_is_below_one(mean: float, deviation: float, seed: int) -> None:
    rng = random.Random(seed)
    lengths = Lengths.parse(f"normal:{mean:f}:{deviation:f}")
    assert all(lengths.draw(rng) >= 1 for _ in range(20))


def test_lengths_of_a_file_are_drawn_from_its_lines(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("5\n\n7\n7\n")
    found = draws(f"file:{tmp_path}/l.txt", 600)
    assert set(found) == {5, 7}
    assert found.count(7) / 600 == pytest.approx(2 / 3, abs=0.1)


@pytest.mark.parametrize(
    ("text", "expected"), [("5\nx\n", "line 2: 'x' is no length"), ("0\n", "line 1: '0'"), ("\n", "holds no length")]
)
def test_a_bad_file_of_lengths_is_named_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "l.txt").write_text(text)
    with pytest.raises(LoadError, match=expected):
        Lengths.parse(f"file:{tmp_path}/l.txt")
    with pytest.raises(LoadError, match="cannot read lengths"):
        Lengths.parse("file:/nonexistent")


@settings(deadline=None)
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
    assert Prompts(seed).tokens(name, None, length)[1:] == ids[1:]
    assert json.loads(b"[" + prompts.raw_tokens(name, 5, length)[:-1] + b"]") == ids
    assert Prompts(seed + 1).tokens(name, None, 400) != Prompts(seed).tokens(name, None, 400)


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(0, 500))
def test_fewer_tokens_of_a_name_are_the_beginning_of_more(few: int, more: int) -> None:
    prompts = Prompts(9)
    assert prompts.tokens("block/1", None, few + more)[:few] == prompts.tokens("block/1", None, few)
    assert prompts.raw_text("block/1", None, few + more).startswith(prompts.raw_text("block/1", None, few))


def test_tokens_are_spread_evenly() -> None:
    counts = Counter(Prompts(2, TokenRange(0, 10)).tokens("x", None, 20_000))
    # 2000 each on average, standard deviation 42
    assert all(abs(counts[i] - 2000) < 5 * 42 for i in range(10))


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


KINDS = ["poisson", "constant", "gamma:0.25", "gamma:1", "gamma:4"]


@given(st.sampled_from(KINDS), st.floats(0.1, 1000), st.floats(0.1, 1000), st.integers(1, 200), st.integers())
def test_schedules_start_at_once_rise_and_repeat(arrival: str, rate: float, to: float, count: int, seed: int) -> None:
    for pace in (rate, Rate(rate, to, 3.0)):
        due = schedule(arrival, pace, count, random.Random(seed))
        assert len(due) == count
        assert due[0] == 0.0
        assert due == sorted(due)
        assert due == schedule(arrival, pace, count, random.Random(seed))
        within = schedule_for(arrival, pace, due[-1], random.Random(seed))
        assert within == [at for at in due if at < due[-1]]


def gaps(arrival: str, seed: int = 1) -> list[float]:
    return [b - a for a, b in itertools.pairwise(schedule(arrival, 4.0, 20001, random.Random(seed)))]


@pytest.mark.parametrize(("arrival", "variation"), [("poisson", 1), ("gamma:1", 1), ("gamma:0.25", 2), ("gamma:4", 0.5)])
def test_gaps_have_the_mean_of_the_rate_and_the_variation_of_the_burstiness(arrival: str, variation: float) -> None:
    found = gaps(arrival)
    assert fmean(found) == pytest.approx(0.25, rel=0.05)
    assert pstdev(found) / fmean(found) == pytest.approx(variation, rel=0.06)
    assert schedule("constant", 4.0, 3, random.Random(1)) == [0.0, 0.25, 0.5]


def test_gamma_of_burstiness_1_is_poisson() -> None:
    """The Kolmogorov-Smirnov distance of two samples of one distribution is below 1.95 sqrt(2 / n) in 99.9 % of cases."""
    one, two = sorted(gaps("poisson", 1)), sorted(gaps("gamma:1", 2))
    n = len(one)
    distance = max(abs(bisect(one, x) - bisect(two, x)) / n for x in one[::20])
    assert distance < 1.95 * (2 / n) ** 0.5
    bursty = sorted(gaps("gamma:0.5", 2))
    assert max(abs(bisect(one, x) - bisect(bursty, x)) / n for x in one[::20]) > 0.1


@given(st.floats(0.5, 50), st.floats(0.5, 50), st.floats(1, 100))
def test_a_ramp_sends_what_its_rate_adds_up_to(rate: float, to: float, seconds: float) -> None:
    due = schedule_for("constant", Rate(rate, to, seconds), seconds, random.Random(0))
    assert abs(len(due) - (rate + to) / 2 * seconds) <= 1
    half = sum(at < seconds / 2 for at in due)
    assert abs(half - (rate + (rate + to) / 2) / 2 * seconds / 2) <= 1
    later = schedule("constant", Rate(rate, to, seconds), len(due) + 10, random.Random(0))[-2:]
    assert later[1] - later[0] == pytest.approx(1 / to)


@pytest.mark.parametrize("arrival", ["gauss", "gamma", "gamma:0", "gamma:-1", "gamma:x", "gamma:nan", "poisson:2"])
def test_unknown_arrivals_are_refused(arrival: str) -> None:
    with pytest.raises(LoadError, match="poisson, constant, or gamma:B"):
        schedule(arrival, 1.0, 1, random.Random(0))


def test_a_rate_of_nothing_is_refused() -> None:
    for rate in (0.0, Rate(1.0, 0.0, 5.0)):
        with pytest.raises(LoadError, match="above 0"):
            schedule("poisson", rate, 1, random.Random(0))


def load(**changes: object) -> Load:
    fields: dict[str, object] = {
        "isl": Lengths.parse("64-128"),
        "osl": Lengths.parse("8"),
        "count": 30,
        "seed": 7,
        "concurrency": 4,
    }
    return Load(**{**fields, **changes})  # type: ignore[arg-type]


def test_every_point_of_a_run_has_the_same_lengths_in_the_same_order() -> None:
    one, two, paced = load(concurrency=4), load(concurrency=64), load(concurrency=None, rate=3.0)
    lengths = [(r.isl, r.osl) for r in one.measured()]
    assert lengths == [(r.isl, r.osl) for r in two.measured()] == [(r.isl, r.osl) for r in paced.measured()]
    assert lengths != [(r.isl, r.osl) for r in load(seed=8).measured()]
    assert all(r.due_s is None for r in one.measured())
    assert paced.measured()[0].due_s == 0.0
    assert len(one.warmup(5)) == 5


def test_drawn_lengths_are_cut_where_that_is_asked() -> None:
    free = load().measured()
    cut = load(scaling=Scaling(max_isl=100, max_osl=5)).measured()
    assert [(min(r.isl, 100), min(r.osl, 5)) for r in free] == [(r.isl, r.osl) for r in cut]
    assert max(r.isl for r in free) > 100
