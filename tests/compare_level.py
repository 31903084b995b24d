"""How often `pdbench compare` is wrong: a seeded simulation of a served queue, for tests/unit and docs/results/compare-level.md.

A closed loop of 8 slots before one prefill server, which takes one prompt after the other, and decoding, whose speed falls as
more answers are written. Decoding's speed wanders within a run (an autoregression: neighbours and batches last a while), each
run has its own luck (drift between runs), and the two runs of a pair share another part (time of day). Lengths are log-normal
and, as in a sweep, the same for both runs of a pair. `python -m compare_level` (with tests in PYTHONPATH) writes the page.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdbench.compare.judge import USUAL, Run, Verdict, correct, family, judge, recommend
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


def simulate(rng: np.random.Generator, world: World, luck: Floats, seeds: Sequence[int], speed: float = 1.0) -> Many:
    """Return one run for each value of ``luck`` (log speed that a pair shares) and seed, ``speed`` times as fast."""
    count, n = len(luck), world.requests
    lengths = {seed: np.random.default_rng(seed).lognormal(0, 0.4, (2, n)) for seed in set(seeds)}
    scale = np.array([lengths[seed] for seed in seeds])
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


def pairs(
    seed: int, world: World, trials: int, repeats: int, effect: float = 0.0, same: bool = True, single: bool = False
) -> list[tuple[list[Run], list[Run]]]:
    """Return for every trial the runs of A and of B, which is ``effect`` faster; not ``same``: other requests, other days."""
    rng = np.random.default_rng(seed)
    total = trials * repeats
    shared = rng.normal(0, world.shared if same else 0.0, total)
    names = list(range(total))
    a = simulate(rng, world, shared, names)
    b = simulate(rng, world, shared, names if same else [total + i for i in names], 1 + effect)
    return list(zip(a.runs(repeats, single), b.runs(repeats, single), strict=True))


def verdict(a: list[Run], b: list[Run], figures: Sequence[str] = USUAL) -> Verdict:
    """Return what `pdbench compare` would say."""
    return correct([judge(a, b, figures)])[0]


def false_claims(trials: Sequence[tuple[list[Run], list[Run]]]) -> int:
    """Return in how many trials any difference at all is claimed."""
    return sum(any(d.claimed for d in verdict(a, b).differences) for a, b in trials)


def power(
    seed: int, world: World, trials: int, pilot: int, figure: str = USUAL[0], figures: Sequence[str] = USUAL
) -> tuple[float, float]:
    """Return how often a true 5 % in ``figure`` is found at the size that a pilot's comparison recommends, and that size.

    Each trial has a pilot of its own; one whose recommendation is "more than can be said" counts as not found.
    """
    sizes = []
    for a, b in pairs(seed, world, trials, pilot, single=pilot < 3):
        whole = verdict(a, b, figures)
        (found,) = [d for d in whole.differences if d.figure == figure]
        sizes.append(recommend(found, family([whole]), 0.05))
    known = [size for size in sizes if size is not None]
    if not known:
        return 0.0, float("nan")
    right = 0
    for size in sorted(set(known)):
        for a, b in pairs(seed + size, world, known.count(size), size, effect=0.05):
            (found,) = [d for d in verdict(a, b, figures).differences if d.figure == figure]
            right += found.claimed and found.better == "B"
    return right / trials, float(np.mean(known))


def page() -> str:
    """Return docs/results/compare-level.md."""
    began = time.process_time()
    calm, rough = World(), World(drift=0.03)
    level = [
        ("one run a side, the same requests", [pairs(1, w, 200, 1, single=True) for w in (calm, rough)]),
        ("one run a side, other requests", [pairs(2, w, 200, 1, same=False, single=True) for w in (calm, rough)]),
        ("two runs a side, the same requests", [pairs(3, w, 200, 2, single=True) for w in (calm, rough)]),
        ("3 pairs of runs", [pairs(4, w, 200, 3) for w in (calm, rough)]),
        ("5 pairs of runs", [pairs(5, w, 200, 5) for w in (calm, rough)]),
        ("5 runs a side, other requests", [pairs(6, w, 200, 5, same=False) for w in (calm, rough)]),
    ]
    rows = [f"| {name} | {false_claims(one)} | {false_claims(other)} |" for name, (one, other) in level]
    found = []
    for name, world, pilot, figures in (
        ("3 pairs, drift 1 %", calm, 3, USUAL),
        ("5 pairs, drift 1 %", calm, 5, USUAL),
        ("5 pairs, drift 1 %, `--metric output_throughput_per_gpu`", calm, 5, USUAL[:1]),
        ("5 pairs, drift 3 %", rough, 5, USUAL),
        ("one run a side, drift 3 %", rough, 1, USUAL),
    ):
        share, size = power(7, world, 200, pilot, figures=figures)
        found.append(f"| {name} | {size:.1f} | {share:.0%} |")
    beyond = false_claims(pairs(8, World(drift=0.08), 200, 1, single=True))
    return _PAGE.format(
        beyond=beyond,
        rows="\n".join(rows),
        found="\n".join(found),
        requests=calm.requests,
        slots=SLOTS,
        cpu=time.process_time() - began,
    )


_PAGE = """# How often `pdbench compare` is wrong

    PYTHONPATH=tests .venv/bin/python -m compare_level > docs/results/compare-level.md

Simulated (tests/compare_level.py, seeded): a closed loop of {slots} slots and {requests} requests a run, queueing before prefill,
decoding whose speed wanders within the run (correlation 0.95 from request to request, 3 %), drift between runs of 1 % or
3 %, and another 3 % that the two runs of a pair share. All nine usual figures are judged together. {cpu:.0f} s of CPU.

## A configuration compared with itself: false claims in 200 trials
A trial counts when *any* figure is claimed to differ. The level is 5 %: 10 expected at most, and 18 would still be luck.

| what is compared | drift 1 % | drift 3 % |
|---|---|---|
{rows}

With one run a side, 5 % of drift is assumed. Where runs drift by 8 % instead, that makes {beyond} false claims in 200: there,
three repeats are the least.

## A true 5 %: how often it is found at the size that the tool recommends
Each of 200 trials has a pilot of its own, in which both sides are alike; its recommendation for
`output_throughput_per_gpu` is then carried out with B 5 % faster. Wanted: 80 %.

| pilot | repeats recommended (mean) | found |
|---|---|---|
{found}

The assumed 5 % makes a pilot of one run a side ask for more repeats than this queue needs.
"""


if __name__ == "__main__":
    print(page(), end="")
