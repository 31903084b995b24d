"""The formulas: by hand where a hand can, by their laws elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.model import profile
from pdbench.model.profile import Profile, ProfileError
from pdbench.model.rates import Rates

TINY = profile.load("tiny")
ALL = [profile.load(name) for name in profile.shipped()]
some_profile = st.sampled_from(ALL)
chunk = st.tuples(st.integers(1, 8192), st.integers(0, 20000))


def rates(one: Profile = TINY, tp_size: int = 1) -> Rates:
    return Rates(one, tp_size)


def test_tiny_by_hand() -> None:
    # 2 x 2.77e9 FLOP a token at 44.32 TFLOP/s: 125 us; 512 tokens 64 ms; attention 36 x 4 x 2048 x 512 x 256 FLOP: 0.87 ms
    assert rates().prefill_s([(512, 0)]) == pytest.approx(0.002 + 0.064 + 0.00087, rel=1e-3)
    # 6.18 GB of weights at 625 GB/s: 9.888 ms; 10 x 600 tokens of 36,864 bytes: 0.354 ms
    assert rates().decode_s(10, 6000) == pytest.approx(0.010 + 0.0001 + 0.009888 + 0.000354, rel=1e-3)
    assert rates().kv_bytes(512) == 18 * 2**20
    # 24 GB x 0.85 less the weights, 36,864 bytes a token
    assert rates().capacity_tokens() == int((20.4e9 - 6.18e9) / 36864)


def test_kv_of_mla_is_the_latent_and_every_gpu_holds_it() -> None:
    shape = replace(TINY.model, kv_lora_rank=512, rope_dim=64, layers=61)
    mla = replace(TINY, model=shape)
    assert rates(mla).kv_bytes(1) == 61 * (512 + 64) * 2
    # twice the GPUs hold the weights once, and the latent twice
    one, two = rates(mla).capacity_tokens(), rates(mla, 2).capacity_tokens()
    assert two == pytest.approx(one + 6.18e9 / (61 * 576 * 2) / 2, rel=1e-3)


def test_windowed_layers_send_their_window_only() -> None:
    oss = profile.load("h200-gpt-oss-120b")
    a_layer = 2 * 8 * 64 * 2
    assert rates(oss).kv_bytes(100) == 36 * 100 * a_layer
    assert rates(oss).kv_bytes(1000) == (18 * 1000 + 18 * 128) * a_layer


def test_a_mixture_reads_more_weights_as_the_batch_grows_up_to_all() -> None:
    oss = rates(profile.load("h200-gpt-oss-120b"))
    whole = 116.8e9 * 0.559
    # one token: its own weights and no others
    assert oss.weights_read(1) == pytest.approx(5.13e9 * 0.559, rel=1e-6)
    assert oss.weights_read(100000) == pytest.approx(whole, rel=1e-6)


def test_no_memory_left_is_said_with_the_figures() -> None:
    with pytest.raises(ProfileError, match=r"the weights are 6 GB, and there are 0.2 of 1 x 24 GB.*mem_fraction"):
        rates().capacity_tokens(0.2)


@given(some_profile, st.lists(chunk, min_size=1, max_size=6), st.integers(0, 5))
def test_more_prompt_never_takes_less_time(one: Profile, chunks: list[tuple[int, int]], place: int) -> None:
    spot = place % len(chunks)
    more = [(new + 1, before) if i == spot else (new, before) for i, (new, before) in enumerate(chunks)]
    further = [(new, before + 1) if i == spot else (new, before) for i, (new, before) in enumerate(chunks)]
    assert rates(one).prefill_s(more) > rates(one).prefill_s(chunks) or rates(one).prefill_s(more) == pytest.approx(
        rates(one).prefill_s(chunks)
    )
    assert rates(one).prefill_s(further) >= rates(one).prefill_s(chunks)


@given(some_profile, st.integers(1, 511), st.integers(1, 500000))
def test_a_larger_batch_or_context_never_makes_a_step_shorter(one: Profile, batch: int, context: int) -> None:
    assert rates(one).decode_s(batch + 1, context) >= rates(one).decode_s(batch, context)
    assert rates(one).decode_s(batch, context + 1) >= rates(one).decode_s(batch, context)


@given(some_profile, st.integers(1, 300), st.integers(1, 300000), chunk)
def test_a_better_gpu_is_never_slower(one: Profile, batch: int, context: int, new: tuple[int, int]) -> None:
    better = replace(one, gpu=replace(one.gpu, bandwidth_gb_per_s=one.gpu.bandwidth_gb_per_s * 1.5, tflops=one.gpu.tflops * 1.5))
    for fast in (rates(better), rates(one, 2)):
        assert fast.decode_s(batch, context) <= rates(one).decode_s(batch, context)
        assert fast.prefill_s([new]) <= rates(one).prefill_s([new])


@given(st.integers(0, 10**10), st.sampled_from(profile.TRANSPORTS))
def test_more_bytes_take_longer_in_proportion(size: int, way: str) -> None:
    assert rates().transfer_s(2 * size, way) == pytest.approx(2 * rates().transfer_s(size, way))
