"""How far a cell of a sweep is to be trusted: one letter for one configuration under one load. Pure.

A cell has the letter of the worst thing that is known of it; every reason is kept. Whether the engine was emulated is no part
of it: a figure of an emulator can be measured well. Reports say it separately, in every figure.
"""

from __future__ import annotations

from dataclasses import dataclass

#: half the 95 % interval of output tokens/s per GPU, as a share of it, up to which a figure counts as narrow
NARROW = 0.05
#: repeats from which a spread between repeats is known at all
REPEATS = 2
#: completed requests in all, below which percentiles of latency are little more than single requests
REQUESTS = 20
#: letter -> its rule, for readers
RULES = {
    "A": f"valid in at least {REPEATS} repeats, 95 % interval within ±{100 * NARROW:g} % of the figure, the load generator was "
    "calibrated on its host before the load, and nothing was noted against it",
    "B": "valid in every repeat and nothing was noted, but the interval is wider than that, or the load generator was not "
    "calibrated",
    "C": f"valid, but with a note: fewer than {REPEATS} valid repeats, fewer than {REQUESTS} requests, an invalid repeat, a "
    "saturated or short run, or figures of another tool that no gate has checked",
    "X": "invalid in every repeat, or not measured: in no figure and in no comparison",
}


@dataclass(frozen=True)
class Facts:
    """What is known of one cell.

    ``valid`` and ``invalid`` count repeats; ``completed``: requests of the valid ones; ``half_width``: half the 95 % interval
    over the figure, None where no spread is known; ``notes``: what runs say of themselves, one sentence each.
    """

    valid: int
    invalid: int = 0
    completed: int = 0
    half_width: float | None = None
    calibrated: bool = False
    imported: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grade:
    """A letter of `RULES` and why it is not a better one."""

    letter: str
    why: tuple[str, ...] = ()


def grade(facts: Facts) -> Grade:
    """Return the grade of a cell; ``why`` is empty for an A only."""
    if not facts.valid:
        return Grade("X", ("no valid repeat",))
    serious = [*facts.notes]
    if facts.valid < REPEATS:
        serious.append("one valid repeat only")
    if facts.invalid:
        serious.append(f"{facts.invalid} invalid repeat{'' if facts.invalid == 1 else 's'} beside the valid ones")
    if facts.completed < REQUESTS:
        serious.append(f"{facts.completed} requests only")
    if facts.imported:
        serious.append("imported: no gate has checked it")
    mild = []
    if facts.half_width is None:
        mild.append("no interval is known")
    elif facts.half_width > NARROW:
        mild.append(f"interval ±{100 * facts.half_width:.1f} %")
    if not facts.calibrated:
        mild.append("load generator not calibrated")
    return Grade("C" if serious else "B" if mild else "A", (*serious, *mild))
