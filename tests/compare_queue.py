"""Simulated runs of a served queue, many at once, for what measures `pdbench compare` (compare_level.py).

A closed loop of 8 slots before one prefill server, which takes one prompt after the other, and decoding, whose speed falls as
more answers are written. Decoding's speed wanders within a run (an autoregression: neighbours and batches last a while), each
run has its own luck (drift between runs), and the two runs of a pair share another part (time of day). Lengths are log-normal
and, as in a sweep, the same for both runs of a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdbench.compare.judge import Run
from pdbench.compare.within import Requests
from pdbench.intervals import Floats, batches

SLO = {"ttft_ms": 600.0}
SLOTS, GPUS = 8, 4
_GAPS = 4


@dataclass(frozen=True)
class World:
    """Runs of ``requests`` each; ``drift`` between runs and ``shared`` by a pair, as standard deviations of log speed."""

    requests: int = 240
    drift: float = 0.01
    shared: float = 0.03

    def configurations(
        self, rng: np.random.Generator, luck: Floats, seeds: Sequence[int], each: int, speed: float = 1.0, single: bool = False
    ) -> list[list[Run]]:
        """Return configurations of ``each`` repeats, ``speed`` times as fast.

        ``luck``: of every run, the log speed that a pair shares; ``seeds``: of its requests; ``single``: give the requests, too.
        """
        return simulate(rng, self, luck, seeds, speed).runs(each, single)


@dataclass
class Many:
    """Many runs at once: arrays of shape (runs, requests), times in s; ``gaps`` has one axis more."""

    sent: Floats
    first: Floats
    end: Floats
    inputs: Floats
    outputs: Floats
    gaps: Floats
    seeds: list[int]

    def figures(self) -> dict[str, Floats]:
        """Return every usual figure of every run."""
        span = self.end.max(axis=1) - self.sent.min(axis=1)
        ttft, e2e = 1000 * (self.first - self.sent), 1000 * (self.end - self.sent)
        gaps = 1000 * self.gaps.reshape(len(self.gaps), -1)
        return {
            "output_throughput_per_gpu": self.outputs.sum(axis=1) / span / GPUS,
            "goodput_per_gpu": (ttft <= SLO["ttft_ms"]).sum(axis=1) / span / GPUS,
            "ttft_ms_mean": ttft.mean(axis=1),
            "ttft_ms_p50": np.quantile(ttft, 0.5, axis=1),
            "ttft_ms_p99": np.quantile(ttft, 0.99, axis=1),
            "itl_ms_mean": gaps.mean(axis=1),
            "itl_ms_p99": np.quantile(gaps, 0.99, axis=1),
            "e2e_ms_mean": e2e.mean(axis=1),
            "e2e_ms_p99": np.quantile(e2e, 0.99, axis=1),
        }

    def runs(self, each: int, with_requests: bool = False) -> list[list[Run]]:
        """Return them as configurations of ``each`` repeats."""
        figures = self.figures()
        made = []
        for i, seed in enumerate(self.seeds):
            own = {name: float(values[i]) for name, values in figures.items()}
            told = np.stack([self.inputs[i], self.outputs[i]]).tobytes()
            made.append(Run(i % each, own, seed, told, self.request_data(i) if with_requests else None))
        return [made[i : i + each] for i in range(0, len(made), each)]

    def request_data(self, i: int) -> Requests:
        """Return the requests of one run."""
        batch = batches(self.sent.shape[1])
        asked = np.stack([self.inputs[i], self.outputs[i]], axis=1).astype(np.int64)
        rows = (self.sent[i], self.first[i], self.end[i], self.inputs[i], self.outputs[i])
        return Requests(asked, batch, *rows, self.gaps[i].ravel(), np.repeat(batch, _GAPS), SLO)


def lengths(seed: int, count: int) -> Floats:
    """Return lengths of prompts and of answers over their median, (2, ``count``): the same for every run of a seed."""
    return np.random.default_rng(seed).lognormal(0, 0.4, (2, count))


def simulate(rng: np.random.Generator, world: World, luck: Floats, seeds: Sequence[int], speed: float = 1.0) -> Many:
    """Return one run for each value of ``luck`` (log speed that a pair shares) and seed, ``speed`` times as fast."""
    count, n = len(luck), world.requests
    known = {seed: lengths(seed, n) for seed in set(seeds)}
    scale = np.array([known[seed] for seed in seeds])
    inputs, outputs = np.ceil(512 * scale[:, 0]), np.ceil(100 * scale[:, 1]) + 1
    slow = np.exp(-luck + rng.normal(0, world.drift, count)) / speed
    wander = np.zeros((count, n))
    steps = rng.normal(0, 0.03 * np.sqrt(1 - 0.95**2), (count, n))
    for i in range(1, n):
        wander[:, i] = 0.95 * wander[:, i - 1] + steps[:, i]
    free, prefill, rows = np.zeros((count, SLOTS)), np.zeros(count), np.arange(count)
    sent, first, end = (np.zeros((count, n)) for _ in range(3))
    for i in range(n):
        slot = free.argmin(axis=1)
        sent[:, i] = free[rows, slot]
        start = np.maximum(sent[:, i], prefill)
        prefill = first[:, i] = start + slow * 2e-4 * inputs[:, i]
        writing = (free > first[:, i, None]).sum(axis=1)
        end[:, i] = first[:, i] + slow * (outputs[:, i] - 1) * 0.008 * (1 + 0.05 * writing) * np.exp(wander[:, i])
        free[rows, slot] = end[:, i]
    share = rng.dirichlet(np.full(_GAPS, 50.0), (count, n))
    gaps = share * ((end - first) / (outputs - 1) * _GAPS)[:, :, None]
    return Many(sent, first, end, inputs, outputs, gaps, list(seeds))
