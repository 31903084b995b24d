"""The best two of a prediction, measured: `pdbench advise --verify`, and with it `bench.yml -e ratio=auto`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pdbench.advise import check
from pdbench.advise.pool import pool
from pdbench.advise.rank import Ranked
from pdbench.model.profile import Profile
from pdbench.records import write_json
from pdbench.sweep import cli as sweep
from pdlib.errors import UserError

Json = dict[str, Any]
#: measured runs of each of the two
REPEATS = 3
SPEC, SWEEP = "sweep.yml", "sweep"
#: what a sweep sets itself, or what says nothing about a run
_NOT_SWEPT = ("ratio", "run_label", "results_dir", "plan_dir", "advise_profile")


def best_two(orders: Sequence[Sequence[Ranked]], goal: str) -> list[str]:
    """Return the two ratios that come out best over all load points: by the geometric mean of their share of the best.

    Raise UserError when fewer than two serve every point.
    """
    shares: dict[str, list[float]] = {}
    for order in orders:
        top = max((each.figure(goal).mean for each in order if each.rank), default=0.0)
        for place, each in enumerate(order):
            if each.rank and top > 0:
                # Of equals the one that answers sooner stands first.
                mean = max(each.figure(goal).mean / top, 1e-9)
                shares.setdefault(each.layout.ratio, []).append(math.log(mean if each.rank > 1 else 1.0) - 1e-6 * place)
    whole = {ratio: sum(own) for ratio, own in shares.items() if len(own) == len(orders)}
    if len(whole) < 2:
        raise UserError(f"{len(whole)} ratio of the inventory serves this load: there are no two to measure")
    return sorted(whole, key=lambda ratio: -whole[ratio])[:2]


def spec(two: Sequence[str], given: Mapping[str, Any]) -> Json:
    """Return the sweep that measures them; ``given``: the user's own variables."""
    fixed = {name: value for name, value in given.items() if name not in _NOT_SWEPT}
    made: Json = {"name": "auto", "grid": {"ratio": list(two)}, "repeats": REPEATS, "baseline": False}
    return {**made, "fixed": fixed} if fixed else made


def verify(
    two: Sequence[str],
    given: Mapping[str, Any],
    where: Sequence[str],
    folder: Path,
    profile_of: Callable[[str], str],
    profiles: dict[str, Profile],
    processes: int | None,
    goal: str,
) -> int:
    """Measure both, say which won and how far off the prediction was; return the sweep's exit code.

    ``where``: the sweep's options that name the cluster; ``profile_of``: the profile of a host; ``goal``: output_throughput or
    goodput, which decides.
    """
    (folder / SPEC).write_text(yaml.safe_dump(spec(two, given), sort_keys=False), encoding="utf-8")
    print(f"\nmeasuring {' and '.join(two)}, {REPEATS} runs each: pdbench sweep {folder / SPEC}\n", flush=True)
    code = sweep.main([str(folder / SPEC), *where, "--output", str(folder / SWEEP)])
    if code not in (sweep.VALID, sweep.INVALID):
        return code
    rows, notes = check.read(str(folder / SWEEP))
    found = check.predicted(rows, profile_of, profiles, partial(pool, processes=processes))
    who = check.winners(rows, found, goal)
    write_json(folder / "check.json", check.to_json(found, who))
    for note in notes:
        print(f"note: {note}")
    print(f"\npredicted and measured\n{check.words(found, who)}\n\n{outcome(two, found, who, goal)}", flush=True)
    return code


def outcome(two: Sequence[str], found: Sequence[check.Checked], who: check.Winners, goal: str) -> str:
    """Say which won, by measurement, at every load."""
    decided = {load: (measured, guess) for load, measured, guess in who.decided}
    lines = []
    for load in dict.fromkeys(cell.load for cell in found):
        if load in decided:
            measured, guess = decided[load]
            agreed = "as predicted" if measured == guess else f"the prediction was {guess}"
            lines.append(f"{load}: measured best by {goal} per GPU: {measured} ({agreed})")
        else:
            lines.append(f"{load}: no difference of {goal} between {' and '.join(two)} was shown: take either")
    return "\n".join(lines)
