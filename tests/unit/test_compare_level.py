"""`pdbench compare` keeps its level, and finds what it says it would: 200 seeded trials each (docs/results/compare-level.md)."""

from __future__ import annotations

import compare_level
import compare_queue
import numpy as np
import pytest
from compare_cluster import Served
from compare_queue import World

from pdbench.compare import within
from pdbench.compare.judge import USUAL

TRIALS, MOST = 200, 18


@pytest.mark.parametrize(
    ("repeats", "same", "drift"), [(1, True, 0.03), (3, True, 0.01), (5, False, 0.03)], ids=["one run", "pairs", "no pairs"]
)
def test_a_configuration_beside_itself(repeats: int, same: bool, drift: float) -> None:
    trials = compare_level.pairs(11, World(drift=drift), TRIALS, repeats, same=same, single=repeats < 3)
    assert compare_level.false_claims(trials) <= MOST


def test_the_level_is_used_up_where_one_figure_is_judged() -> None:
    # A test that never claims anything would pass the one above.
    trials = compare_level.pairs(12, World(), 2 * TRIALS, 4)
    claims = sum(compare_level.verdict(a, b, USUAL[:1]).differences[0].claimed for a, b in trials)
    assert 8 <= claims <= 36


def test_a_true_five_percent_is_found_at_the_recommended_size() -> None:
    found, size = compare_level.power(13, World(), TRIALS, 5)
    assert found >= 0.8
    assert size < 20


def test_on_the_emulator_s_model_too() -> None:
    """A small part of what docs/results/compare-level.md has; of 20 trials, 4 or fewer are wrong in 997 of 1,000 worlds."""
    small = Served(requests=24, answer=8)
    assert compare_level.false_claims(compare_level.pairs(15, small, 20, 3)) <= 4
    trials = compare_level.pairs(16, small, 10, 8, effect=0.05)
    claims = [compare_level.verdict(a, b, USUAL[:1]).differences[0] for a, b in trials]
    assert sum(one.claimed and one.better == "B" for one in claims) >= 8


def test_the_variance_within_a_run_is_that_of_runs_alike() -> None:
    """The jackknife says of one run what the spread of many shows: no drift, no luck, other noise each time."""
    many = compare_queue.simulate(np.random.default_rng(14), World(drift=0.0), np.zeros(150), [0] * 150)
    for figure in ("output_throughput_per_gpu", "ttft_ms_mean", "ttft_ms_p50", "e2e_ms_mean", "itl_ms_mean"):
        true = float(np.log(many.figures()[figure]).std(ddof=1))
        said = np.sqrt([within.variance(*within.replicates(many.request_data(i), figure)) for i in range(0, 150, 5)])
        # Lengths differ within a run and not between these: what it says can be more, hardly less.
        assert float(np.median(said)) > 0.5 * true, figure
