"""What `pdbench compare` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pdbench.compare import judge, student
from pdbench.compare.judge import Difference, Verdict

if TYPE_CHECKING:
    from pdbench.compare.cli import Outcome

_HEAD = ("metric", "A", "B", "B to A", "95 % interval", "verdict")


def page(outcomes: Sequence[Outcome], remarks: Sequence[str], plan: float | None) -> str:
    """Return the whole answer; ``plan``: the effect whose repeats stand in a column of their own, None for a sentence."""
    lines: list[str] = []
    for one in outcomes:
        found = one.verdict
        lines += [f"A: {one.match.a_name}    B: {one.match.b_name}", f"{one.match.load}: {_design(found)}", ""]
        rows: list[tuple[str, ...]] = [_HEAD if plan is None else (*_HEAD, f"to see {100 * plan:g} %")]
        for d in found.differences:
            row = _row(d)
            rows.append(row if plan is None else (*row, _needed(one.needs.get(d.figure)) if d.p is not None else "-"))
        lines += [*_columns(rows), "", *_sentences(one, plan), ""]
    together = judge.family([one.verdict for one in outcomes])
    lines += [f"note: {text}" for text in dict.fromkeys(remarks)]
    if together:
        lines.append(
            f"note: {together} figures are judged together by Holm's method: if nothing differed, any claim at all would "
            "appear in at most 5 % of such comparisons. Each interval stands for itself, so one can leave 0 out without a claim."
        )
    if any(one.verdict.assumed for one in outcomes):
        lines.append(
            f"note: with fewer than {judge.ENOUGH} repeats, how far runs differ by themselves is not known: it is taken to be "
            f"{judge.ASSUMED:.0%} (one standard deviation) a run."
        )
    return "\n".join(lines).rstrip()


def plan(name: str, needs: Mapping[str, int | None], requests: int, effect: float, runs: int) -> str:
    """Return how many repeats would show ``effect``, figure by figure, from a pilot of so many runs."""
    if not needs:
        return f"{name}: nothing to plan with: its runs have no requests, and fewer than {judge.ENOUGH} repeats"
    rows = [("metric", f"to see {100 * effect:g} %"), *((figure, _needed(count)) for figure, count in needs.items())]
    basis = (
        f"as far as {runs} runs show" if runs >= judge.ENOUGH else f"taking runs to differ by {judge.ASSUMED:.0%} by themselves"
    )
    tail = f"Repeats of {requests} requests a side, for 80 % power, {basis}; all figures judged together."
    return "\n".join([f"pilot: {name}", "", *_columns(rows), "", tail])


def _design(found: Verdict) -> str:
    a, b = found.runs
    if found.pairs:
        return (
            "a pair of runs that were sent the same requests"
            if found.pairs == 1
            else f"{found.pairs} pairs of runs of the same requests"
        )
    return f"{a} and {b} runs, not paired: {found.why_unpaired}"


def _row(d: Difference) -> tuple[str, ...]:
    if d.p is None:
        return (d.figure, _figure(d.a), _figure(d.b), "-", "-", f"not judged: {d.why}")
    words = f"{d.better} is better" if d.claimed else "no difference shown"
    return (d.figure, _figure(d.a), _figure(d.b), _percent(d.change), f"{_percent(d.low)} to {_percent(d.high)}", words)


def _sentences(one: Outcome, effect: float | None) -> list[str]:
    claimed = [d for d in one.verdict.differences if d.claimed]
    by_winner = {name: [d.figure for d in claimed if d.better == name] for name in ("A", "B")}
    said = [f"{name} is better in {', '.join(figures)}." for name, figures in by_winner.items() if figures]
    if not claimed and one.needs:
        said = ["No difference shown: what differs here can be noise."]
    first = next(iter(one.needs), None)
    if effect is None and first is not None and any(not d.claimed for d in one.verdict.differences):
        count = one.needs[first]
        size = f"{count} repeats" if count is not None else f"more than {student.MOST} repeats"
        said.append(f"To see 5 % in {first}, it takes {size} of {one.requests} requests on each side.")
    return said


def _needed(count: int | None) -> str:
    return f"{count} repeats" if count is not None else f"> {student.MOST} repeats"


def _figure(value: float) -> str:
    return "-" if not math.isfinite(value) else f"{value:.4g}" if abs(value) < 10000 else f"{value:.0f}"


def _percent(share: float) -> str:
    return "-" if not math.isfinite(share) else f"{100 * share:+.1f} %"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i in (0, 5) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
