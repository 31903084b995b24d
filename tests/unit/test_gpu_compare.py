"""The arithmetic of the comparison with a deployment that was started by hand."""

from __future__ import annotations

import math
import random

import pytest
from gpu import compare


def test_flags_differ_where_they_differ() -> None:
    one = compare.flags(["py", "-m", "x", "--port", "1", "--prefill", "u", "8998", "--on", "--a=b"])
    assert one == {"--port": "1", "--prefill": "u 8998", "--on": "", "--a": "b"}
    other = compare.flags(["py", "-m", "x", "--port", "2", "--prefill", "u", "8998", "--a", "b"])
    assert compare.differences(one, other) == {"--port": ["1", "2"], "--on": ["", None]}
    assert compare.environment(b"A=1\0B=x=y\0garbage\0") == {"A": "1", "B": "x=y"}


def test_the_interval_is_student_s() -> None:
    # logs 0.1, 0.2, 0.3: mean 0.2, standard error 0.1/sqrt(3), t(2) = 4.303
    found = compare.ratio([(math.exp(x), 1.0) for x in (0.1, 0.2, 0.3)])
    assert math.log(found["ratio"]) == pytest.approx(0.2)
    assert math.log(found["high"]) == pytest.approx(0.2 + 4.303 * 0.1 / math.sqrt(3))
    assert math.log(found["low"]) == pytest.approx(0.2 - 4.303 * 0.1 / math.sqrt(3))
    assert compare.ratio([(2.0, 1.0)]) == {"pairs": 1, "ratio": pytest.approx(2.0), "low": None, "high": None}
    with pytest.raises(ValueError, match="no pairs"):
        compare.ratio([])


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(7)
    hits = 0
    for _ in range(2000):
        pairs = [(math.exp(rng.gauss(0.0, 0.05)), math.exp(rng.gauss(0.0, 0.05))) for _ in range(12)]
        found = compare.ratio(pairs)
        hits += found["low"] <= 1.0 <= found["high"]
    assert 0.93 <= hits / 2000 <= 0.97
