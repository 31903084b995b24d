"""How often `pdbench compare` is wrong, on seeded simulations: for tests/unit and docs/results/compare-level.md.

Runs come from a queue (compare_queue.py) and from the emulator's model of a deployment in virtual time (compare_cluster.py).
`python -m compare_level` (with tests in PYTHONPATH) writes the page.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from compare_cluster import Served
from compare_queue import SLOTS, World

from pdbench.compare.judge import USUAL, Run, Verdict, correct, family, judge, recommend

TRIALS = 200


def pairs(
    seed: int, world: World, trials: int, repeats: int, effect: float = 0.0, same: bool = True, single: bool = False
) -> list[tuple[list[Run], list[Run]]]:
    """Return for every trial the runs of A and of B, which is ``effect`` faster; not ``same``: other requests, other days."""
    rng = np.random.default_rng(seed)
    total = trials * repeats
    shared = rng.normal(0, world.shared if same else 0.0, total)
    names = list(range(total))
    a = world.configurations(rng, shared, names, repeats, single=single)
    others = names if same else [total + i for i in names]
    b = world.configurations(rng, shared, others, repeats, 1 + effect, single)
    return list(zip(a, b, strict=True))


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


#: (how they are compared, runs a side, whether requests are the same)
_WAYS = (
    ("one run a side, the same requests", 1, True),
    ("one run a side, other requests", 1, False),
    ("two runs a side, the same requests", 2, True),
    ("3 pairs of runs", 3, True),
    ("5 pairs of runs", 5, True),
    ("5 runs a side, other requests", 5, False),
)


def _level(worlds: Sequence[World], ways: Sequence[tuple[str, int, bool]] = _WAYS) -> str:
    """Return the rows of the table of false claims, a column a world."""
    rows = []
    for seed, (name, repeats, same) in enumerate(ways, 1):
        found = [false_claims(pairs(seed, world, TRIALS, repeats, same=same, single=repeats < 3)) for world in worlds]
        rows.append(f"| {name} | {' | '.join(map(str, found))} |")
    return "\n".join(rows)


def _power(cases: Sequence[tuple[str, World, int, Sequence[str]]]) -> str:
    """Return the rows of the table of what is found; a case: (its name, world, runs a side of the pilot, figures judged)."""
    rows = []
    for name, world, pilot, figures in cases:
        share, size = power(7, world, TRIALS, pilot, figures=figures)
        rows.append(f"| {name} | {size:.1f} | {share:.0%} |")
    return "\n".join(rows)


def page() -> str:
    """Return docs/results/compare-level.md."""
    began = time.process_time()
    queue, served = (World(), World(drift=0.03)), (Served(), Served(drift=0.03))
    alone = "5 pairs, drift 1 %, `--metric output_throughput_per_gpu`"
    found = {
        "queue_level": _level(queue),
        "queue_found": _power(
            [
                ("3 pairs, drift 1 %", queue[0], 3, USUAL),
                ("5 pairs, drift 1 %", queue[0], 5, USUAL),
                (alone, queue[0], 5, USUAL[:1]),
                ("5 pairs, drift 3 %", queue[1], 5, USUAL),
                ("one run a side, drift 3 %", queue[1], 1, USUAL),
            ]
        ),
        # The model in virtual time takes 14 ms of CPU a run: the most telling cases alone.
        "served_level": _level(served, [_WAYS[0], _WAYS[3]]),
        "served_found": _power([(alone, served[0], 5, USUAL[:1])]),
        "beyond": false_claims(pairs(8, World(drift=0.08), TRIALS, 1, single=True)),
    }
    return _PAGE.format(**found, requests=queue[0].requests, slots=SLOTS, few=served[0].requests, cpu=time.process_time() - began)


_PAGE = """# How often `pdbench compare` is wrong

    PYTHONPATH=tests .venv/bin/python -m compare_level > docs/results/compare-level.md

Two seeded simulations; both have drift between runs of 1 % or 3 %, and another 3 % that the two runs of a pair share. All nine
usual figures are judged together. {cpu:.0f} s of CPU.

- **A queue** (tests/compare_queue.py): a closed loop of {slots} slots and {requests} requests a run, queueing before prefill,
  decoding whose speed wanders within the run (correlation 0.95 from request to request, 3 %).
- **The emulator's model** in virtual time (tests/compare_cluster.py): 1p1d of the profile `h200-qwen2.5-3b`, {slots} slots and
  {few} requests a run, batches, KV transfers and front end as `pdbench emulate` schedules them; the time of every step
  wanders (0.95 from step to step, 3 %).

## A configuration compared with itself: false claims in 200 trials
A trial counts when *any* figure is claimed to differ. The level is 5 %: 10 expected at most, and 18 would still be luck.

| what is compared | queue, drift 1 % | queue, drift 3 % |
|---|---|---|
{queue_level}

| what is compared | emulator, drift 1 % | emulator, drift 3 % |
|---|---|---|
{served_level}

With one run a side, 5 % of drift is assumed. Where runs drift by 8 % instead, that makes {beyond} false claims in 200 (queue):
there, three repeats are the least.

## A true 5 %: how often it is found at the size that the tool recommends
Each of 200 trials has a pilot of its own, in which both sides are alike; its recommendation for
`output_throughput_per_gpu` is then carried out with B 5 % faster. Wanted: 80 %.

| pilot, queue | repeats recommended (mean) | found |
|---|---|---|
{queue_found}

| pilot, emulator | repeats recommended (mean) | found |
|---|---|---|
{served_found}

The assumed 5 % makes a pilot of one run a side ask for more repeats than these need.
"""


if __name__ == "__main__":
    print(page(), end="")
