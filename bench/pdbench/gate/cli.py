"""The `gate` verb: judge a run's folder, print the verdict, write validity.json."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from pdbench import shapes
from pdbench.gate import judge
from pdbench.gate.check import Check
from pdbench.gate.rundata import NotARun, RunData, load
from pdbench.records import write_json
from pdbench.verbs import ends_by_code

VALIDITY = "validity.json"


@ends_by_code
def main(argv: list[str]) -> int:
    """Return 0 when the run is valid, 3 when it is not, 1 when the folder is no run's, 2 for bad usage."""
    parser = argparse.ArgumentParser(
        prog="pdbench gate",
        description="Decide whether a run is to be believed: every check and its evidence go to validity.json.",
        epilog="Exit code: 0 valid, 3 invalid, 1 not a run's folder, 2 bad usage. docs/validity.md explains each check.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the run, such as results/latest")
    parser.add_argument(
        "--max-error-rate",
        type=_share,
        metavar="SHARE",
        help="share of failed requests that is allowed, 0 to 1 (default: bench_max_error_rate of manifest.json, else 0)",
    )
    args = parser.parse_args(argv)
    try:
        run = load(args.folder, args.max_error_rate)
        checks = judge(run)
        write_json(args.folder / VALIDITY, verdict(checks))
    except NotARun as why:
        print(f"pdbench gate: {why}", file=sys.stderr)
        return 1
    except OSError as why:
        print(f"pdbench gate: cannot write {args.folder / VALIDITY}: {why.strerror or why}", file=sys.stderr)
        return 1
    print("\n".join(table(run, checks)))
    return 0 if all(check.ok for check in checks) else 3


def verdict(checks: list[Check]) -> dict[str, object]:
    """Return the content of validity.json."""
    return {
        "schema": shapes.SCHEMA,
        "valid": all(check.ok for check in checks),
        "checks": [check.to_json() for check in checks],
    }


def table(run: RunData, checks: list[Check]) -> list[str]:
    """Return the lines that a user sees: one a check, with its message; points that agree share a line."""
    width = max(len(check.id) for check in checks)
    lines = []
    for name in dict.fromkeys(check.id for check in checks):
        same = [check for check in checks if check.id == name]
        bad = [check for check in same if not check.ok]
        if not bad:
            lines.append(f"  ok    {name:<{width}}  {same[0].message if len(same) == 1 else f'in all {len(same)} load points'}")
        for check in bad:
            where = f"{run.points[_place(run, check.point)].label}: " if check.point is not None else ""
            lines.append(f"  FAIL  {name:<{width}}  {where}{check.message}")
    failed = [check for check in checks if not check.ok]
    if run.no_gpu:
        lines.append(f"  note  {run.no_gpu}: no GPU was used")
    if run.truncated:
        lines.append(f"  note  the model is not whole: {run.truncated}")
    lines.append("VALID" if not failed else f"INVALID: {len(failed)} of {len(checks)} checks failed")
    return lines


def _place(run: RunData, index: int | None) -> int:
    return next(i for i, point in enumerate(run.points) if point.index == index)


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        value = float(text)
        if 0 <= value <= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
