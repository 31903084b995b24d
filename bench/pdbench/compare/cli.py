"""The `compare` verb."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from pdbench.compare import judge, match, say, sides
from pdbench.compare.judge import FIGURES, USUAL, Run, Verdict
from pdbench.compare.match import Match
from pdbench.gate.rundata import NotARun
from pdbench.verbs import ends_by_code

_REFUSED = 3
_HELP = """\
A and B: a run's folder, a folder that holds repeats, RUN,RUN,..., a sweep's folder, results.parquet or .csv; with a selector
such as results/sweeps/night:ratio=3p1d. Loads that both have are compared. A sweep alone is compared with its own aggregated
baseline on as many GPUs. What is claimed, and how it is decided: docs/compare.md."""


@dataclass(frozen=True)
class Outcome:
    """A verdict and what it is about; ``needs``: repeats by figure that would show the wanted effect (None: too many)."""

    match: Match
    verdict: Verdict
    needs: dict[str, int | None]
    requests: int


@ends_by_code
def main(argv: list[str]) -> int:
    """Return 0 when it was compared (whatever came of it), 3 when nothing valid is there, 1 no runs, 2 for bad usage."""
    parser = argparse.ArgumentParser(
        prog="pdbench compare",
        description="Say whether two configurations differ, by how much, and how sure that is.",
        epilog=_HELP,
    )
    parser.add_argument("a", metavar="A", help="the one that differences are relative to; or a sweep, alone")
    parser.add_argument("b", metavar="B", nargs="?", help="the other one")
    parser.add_argument("--metric", action="append", metavar="NAME", help="compare this figure only; may be given again")
    parser.add_argument(
        "--plan",
        nargs="?",
        type=_percent,
        const=0.05,
        metavar="PERCENT",
        help="how many repeats would show such a difference (5)",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    try:
        args = parser.parse_args(argv)
        figures = _figures(args.metric)
        left = sides.read(args.a)
        if args.b is None and args.plan and not _has_baseline(left):
            return _pilot(left, figures, args.plan, args.json)
        found = match.two(left, sides.read(args.b)) if args.b else match.with_baseline(left)
    except (NotARun, match.Unfit, match.Refused, ValueError) as why:
        print(f"pdbench compare: {why}", file=sys.stderr)
        return {NotARun: 1, match.Refused: _REFUSED}.get(type(why), 2)
    except OSError as why:
        print(f"pdbench compare: cannot read {why.filename or args.a}: {why.strerror or why}", file=sys.stderr)
        return 1
    outcomes = compared(found.found, figures or USUAL, args.plan or 0.05)
    remarks = [*found.remarks, *(why for one in outcomes for why in one.verdict.remarks)]
    _print(json.dumps(as_json(outcomes, remarks), indent=1) if args.json else say.page(outcomes, remarks, args.plan))
    return 0


def _print(text: str) -> None:
    """Print; who reads may stop before the end, as head does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def compared(matches: Sequence[Match], figures: Sequence[str], effect: float = 0.05) -> list[Outcome]:
    """Judge all matches together; ``effect``: the difference, as a share, that the recommended repeats would show."""
    verdicts = judge.correct([_judged(one, figures) for one in matches])
    together = judge.family(verdicts)
    return [
        Outcome(
            one,
            found,
            {d.figure: judge.recommend(d, together, effect) for d in found.differences if d.p is not None},
            _requests(one.a),
        )
        for one, found in zip(matches, verdicts, strict=True)
    ]


def _judged(one: Match, figures: Sequence[str]) -> Verdict:
    a, b = sides.runs(one.a, len(one.b)), sides.runs(one.b, len(one.a))
    wanted, remarks = list(figures), []
    # A figure that no run has, such as goodput without limits, is no line of the answer.
    wanted = [name for name in wanted if any(math.isfinite(run.figures[name]) for run in (*a, *b))]
    if "goodput_per_gpu" in wanted and len(sides.limits(one.a) | sides.limits(one.b)) > 1:
        wanted.remove("goodput_per_gpu")
        remarks.append("goodput is not compared: the runs have other limits (--slo-*)")
    if not sides.gpus_known([one.a, one.b]):
        wanted = [name for name in wanted if not name.endswith("_per_gpu")]
        remarks.append("nothing is compared per GPU: of some runs it is not known how many GPUs their deployment held")
    remarks += _cautions(one)
    for column, what in (
        ("emulated", "one side ran on an emulated engine"),
        ("on_cpu", "one side ran on a CPU"),
        ("truncated", "the model is not as whole on one side as on the other"),
        ("model", "the models differ"),
    ):
        if set(one.a[column].dropna()) != set(one.b[column].dropna()):
            remarks.append(f"{what}: this is no comparison of like with like")
    found = judge.judge(a, b, wanted)
    return replace(found, remarks=remarks)


def _cautions(one: Match) -> list[str]:
    """Return what makes figures say nothing of hardware, or of the model: of both sides, or of the one that it holds for."""
    a, b = sides.cautions(one.a), sides.cautions(one.b)
    if set(a) == set(b):
        return a
    return [*sides.cautions(one.a, " (A)"), *sides.cautions(one.b, " (B)")]


def _requests(rows: pd.DataFrame) -> int:
    known = rows["completed"].dropna()
    return int(known.median()) if len(known) else 0


def _pilot(side: sides.Side, figures: Sequence[str], effect: float, as_text: bool) -> int:
    """Say how many repeats would show a difference, from the runs of one configuration alone."""
    rows = sides.keyed(match.believed(side))
    if rows.groupby("load", sort=False).ngroups > 1 or rows["setup"].nunique() > 1:
        raise ValueError(f"{side.name} holds several loads or configurations: choose one, such as {side.name}:concurrency=32")
    alone = [replace(run, seed=None) for run in sides.runs(rows, len(rows))]
    wanted = [name for name in figures or USUAL if any(math.isfinite(run.figures[name]) for run in alone)]
    found = [_halved(d, alone) for d in judge.judge(alone, alone, wanted).differences]
    together, remarks = sum(d.p is not None for d in found), sides.cautions(rows)
    needs = {d.figure: judge.recommend(d, together, effect) for d in found if d.p is not None}
    _print(
        json.dumps({"schema": 1, "effect": effect, "requests": _requests(rows), "repeats": needs, "remarks": remarks})
        if as_text
        else "\n".join([say.plan(side.name, needs, _requests(rows), effect, len(alone)), *(f"note: {text}" for text in remarks)])
    )
    return 0


def _halved(found: judge.Difference, runs: Sequence[Run]) -> judge.Difference:
    """Return it with the degrees of freedom of one side's runs: both sides are the same ones here."""
    return found if math.isinf(found.df) else replace(found, df=len(runs) - 1.0)


def _has_baseline(side: sides.Side) -> bool:
    split = side.rows["prefill_workers"] > 0
    return bool((side.rows["aggregated_workers"] > 0).any() and split.any())


def _figures(asked: list[str] | None) -> tuple[str, ...]:
    for name in asked or ():
        if name not in FIGURES:
            raise ValueError(f"--metric {name}: not a figure that can be compared; one of {', '.join(FIGURES)}")
    return tuple(dict.fromkeys(asked or ()))


def _percent(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not 0.001 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage from 0.1 to 100, such as 5")
    return share


def as_json(outcomes: Sequence[Outcome], remarks: Sequence[str]) -> dict[str, Any]:
    """Return the outcomes as `--json` prints them; numbers that do not exist are null."""
    return {
        "schema": 1,
        "level": 0.95,
        "family": judge.family([one.verdict for one in outcomes]),
        "comparisons": [
            {
                "load": one.match.load,
                "a": one.match.a_name,
                "b": one.match.b_name,
                "runs": list(one.verdict.runs),
                "paired": one.verdict.pairs > 0,
                "pairs": one.verdict.pairs,
                "unpaired_because": one.verdict.why_unpaired,
                "assumed_spread": judge.ASSUMED if one.verdict.assumed else None,
                "requests": one.requests,
                "differences": [
                    {
                        "metric": d.figure,
                        **{name: _number(getattr(d, name)) for name in ("a", "b", "change", "low", "high", "p", "adjusted")},
                        "difference_shown": d.claimed,
                        "better": d.better or None,
                        "not_judged_because": d.why or None,
                        "repeats_needed": one.needs.get(d.figure),
                    }
                    for d in one.verdict.differences
                ],
            }
            for one in outcomes
        ],
        "remarks": list(dict.fromkeys(remarks)),
    }


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
