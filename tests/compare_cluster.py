"""Runs of the emulator's own model in virtual time (`pdbench.model.cluster`), for what measures `pdbench compare`.

One prefill and one decode worker of the profile that was made from measurements, as `pdbench emulate` schedules them: batches,
chunks, KV transfers and the front end are its own. What real runs have and the model lacks is put in: every step's time
wanders (an autoregression), and each run has its luck, of which the two runs of a pair share a part. Lengths are log-normal
and the same for both runs of a pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from compare_queue import GPUS, World, lengths

from pdbench.compare.judge import Run
from pdbench.compare.within import Requests
from pdbench.intervals import Floats, Ints, batches
from pdbench.model import profile
from pdbench.model.cluster import Deployment, Outcome, Prompt, Simulation, limits
from pdbench.model.profile import Profile
from pdbench.model.rates import Rates
from pdbench.model.scheduler import Worker

PROFILE = profile.load("h200-qwen2.5-3b")
#: a good request's longest TTFT
SLO = {"ttft_ms": 50.0}
#: of step times within a run: how alike neighbours are, and the standard deviation of their log
_ALIKE, _WANDER = 0.95, 0.03
_FEW = 256


class Unsteady(Rates):
    """A worker's rates whose steps take now more, now less time."""

    def __init__(self, figures: Profile, rng: np.random.Generator):
        super().__init__(figures)
        self._rng, self._off = rng, 0.0
        self._steps: list[float] = []

    def _factor(self) -> float:
        if not self._steps:
            self._steps = self._rng.normal(0, _WANDER * (1 - _ALIKE**2) ** 0.5, _FEW).tolist()
        self._off = _ALIKE * self._off + self._steps.pop()
        return float(np.exp(self._off))

    def prefill_s(self, chunks: Iterable[tuple[int, int]]) -> float:
        """Return the seconds of a prefill pass, this time."""
        return super().prefill_s(chunks) * self._factor()

    def decode_s(self, batch: int, context_tokens: int) -> float:
        """Return the seconds of a decode step, this time."""
        return super().decode_s(batch, context_tokens) * self._factor()


def slowed(figures: Profile, factor: float) -> Profile:
    """Return a profile all of whose times are ``factor`` times as long."""
    engine, gpu = figures.engine, figures.gpu
    return replace(
        figures,
        gpu=replace(gpu, bandwidth_gb_per_s=gpu.bandwidth_gb_per_s / factor, tflops=gpu.tflops / factor),
        engine=replace(
            engine,
            prefill_overhead_ms=engine.prefill_overhead_ms * factor,
            decode_overhead_ms=engine.decode_overhead_ms * factor,
            decode_us_per_request=engine.decode_us_per_request * factor,
            frontend_us_per_token=engine.frontend_us_per_token * factor,
            frontend_us_per_request=engine.frontend_us_per_request * factor,
            request_ms=engine.request_ms * factor,
        ),
        transports={
            name: replace(way, bandwidth_gb_per_s=way.bandwidth_gb_per_s / factor, latency_ms=way.latency_ms * factor)
            for name, way in figures.transports.items()
        },
    )


@dataclass(frozen=True)
class Served(World):
    """Runs of ``requests`` each on 1p1d, ``slots`` in flight; ``answer``: the median answer, in tokens."""

    requests: int = 40
    slots: int = 8
    answer: int = 16

    def configurations(
        self, rng: np.random.Generator, luck: Floats, seeds: Sequence[int], each: int, speed: float = 1.0, single: bool = False
    ) -> list[list[Run]]:
        """Return configurations of ``each`` repeats, as `World.configurations` does."""
        slow = np.exp(-luck + rng.normal(0, self.drift, len(luck))) / speed
        runs = [self.run(rng, float(slow[i]), seed, i % each, single) for i, seed in enumerate(seeds)]
        return [runs[i : i + each] for i in range(0, len(runs), each)]

    def run(self, rng: np.random.Generator, slow: float, seed: int, repeat: int, single: bool) -> Run:
        """Return one run whose every time is ``slow`` times as long."""
        asked = lengths(seed, self.requests)
        inputs, outputs = np.ceil(512 * asked[0]).astype(int), np.ceil(self.answer * asked[1]).astype(int) + 1
        figures = slowed(PROFILE, slow)
        prefill, decode = (Worker(rates, limits(rates)) for rates in (Unsteady(figures, rng), Unsteady(figures, rng)))
        prompts = [Prompt(int(i), int(o)) for i, o in zip(inputs, outputs, strict=True)]
        outcomes = Simulation(Deployment([prefill], [decode])).closed_loop(prompts, self.slots)
        told = np.stack([inputs, outputs]).tobytes()
        return Run(repeat, _figures(outcomes, outputs), seed, told, _requests(outcomes, inputs, outputs) if single else None)


def _times(outcomes: Sequence[Outcome]) -> tuple[Floats, Floats, Floats]:
    """Return when requests were sent, and their first and last token, in s."""
    return (
        np.array([one.sent for one in outcomes]),
        np.array([one.tokens[0] for one in outcomes]),
        np.array([one.end for one in outcomes]),
    )


def _gaps(outcomes: Sequence[Outcome]) -> Floats:
    return np.concatenate([np.diff(one.tokens) for one in outcomes])


def _figures(outcomes: Sequence[Outcome], outputs: Ints) -> dict[str, float]:
    sent, first, end = _times(outcomes)
    span = float(end.max() - sent.min())
    ttft, e2e, gaps = 1000 * (first - sent), 1000 * (end - sent), 1000 * _gaps(outcomes)
    return {
        "output_throughput_per_gpu": float(outputs.sum()) / span / GPUS,
        "goodput_per_gpu": float((ttft <= SLO["ttft_ms"]).sum()) / span / GPUS,
        "ttft_ms_mean": float(ttft.mean()),
        "ttft_ms_p50": float(np.quantile(ttft, 0.5)),
        "ttft_ms_p99": float(np.quantile(ttft, 0.99)),
        "itl_ms_mean": float(gaps.mean()),
        "itl_ms_p99": float(np.quantile(gaps, 0.99)),
        "e2e_ms_mean": float(e2e.mean()),
        "e2e_ms_p99": float(np.quantile(e2e, 0.99)),
    }


def _requests(outcomes: Sequence[Outcome], inputs: Ints, outputs: Ints) -> Requests:
    batch = batches(len(outcomes))
    asked = np.stack([inputs, outputs], axis=1).astype(np.int64)
    lengths_of = (inputs.astype(np.float64), outputs.astype(np.float64))
    return Requests(asked, batch, *_times(outcomes), *lengths_of, _gaps(outcomes), np.repeat(batch, outputs - 1), SLO)
