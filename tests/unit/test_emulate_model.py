from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.emulate import profile
from pdbench.emulate.model import PerfModel, PrefillLine

TINY = profile.load("tiny")
models = st.builds(
    lambda rate, step, transport: PerfModel(dataclasses.replace(TINY, prefill_tokens_per_s=rate, decode_step_ms=step), transport),
    st.floats(1, 1e6),
    st.floats(0.01, 1e3),
    st.sampled_from(profile.TRANSPORTS),
)
sizes = st.integers(0, 2**40)


@given(models, sizes, sizes)
def test_more_bytes_never_take_less_time(model: PerfModel, one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert model.transfer_s(small) <= model.transfer_s(large)
    assert model.transfer_s(small) >= TINY.transports[model.transport].latency_ms / 1e3


@given(models, st.integers(1, 10**6))
def test_kv_bytes_are_proportional_to_the_prompt(model: PerfModel, tokens: int) -> None:
    assert model.kv_bytes(tokens) == tokens * model.kv_bytes(1)


@given(models, st.floats(0, 1e6), st.integers(0, 10**5))
def test_tokens_keep_their_schedule_without_drift(model: PerfModel, first: float, index: int) -> None:
    assert model.token_due(first, 0) == first
    assert model.token_due(first, index) - first == pytest.approx(index * model.profile.decode_step_ms / 1e3, abs=1e-6)


@given(models, st.lists(st.tuples(st.floats(0, 100), st.integers(1, 10**5)), min_size=1))
def test_the_line_serves_one_prompt_at_a_time_and_never_idles_with_work(
    model: PerfModel, prompts: list[tuple[float, int]]
) -> None:
    line, free_at = PrefillLine(model), 0.0
    for arrival, tokens in sorted(prompts):
        end = line.begin(arrival, tokens)
        assert end == pytest.approx(max(arrival, free_at) + model.prefill_s(tokens))
        free_at = end


def test_an_aborted_prompt_frees_the_line() -> None:
    model = PerfModel(TINY, "tcp")
    line = PrefillLine(model)
    assert line.begin(0.0, 8000) == pytest.approx(1.002)
    line.abort(0.25)
    assert line.begin(0.1, 8000) == pytest.approx(0.25 + 1.002)
    line.abort(99.0)  # later than its end: changes nothing
    assert line.begin(0.1, 8000) == pytest.approx(0.25 + 2 * 1.002)


def test_tiny_by_hand() -> None:
    model = PerfModel(TINY, "tcp")
    assert model.prefill_s(512) == pytest.approx(0.066)
    assert model.transfer_s(model.kv_bytes(512)) == pytest.approx(0.002 + 18 * 2**20 / 2e9)
