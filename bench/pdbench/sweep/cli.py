"""`pdbench sweep`: one file of cells in, measured in the order that restarts least, and resumed after whatever ended it."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from pdbench.sweep.checkout import ROOT, has_plays

VALID, FAILED, USAGE, INVALID, INTERRUPTED = 0, 1, 2, 3, 130
DEFAULT_INVENTORY = "inventory/local"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        prog="pdbench sweep",
        description="Deploy and measure every cell of a sweep (docs/sweeps.md). Exit code: 0 all cells valid, 3 some are not, "
        "2 bad usage (no host was touched), 1 could not, 130 interrupted (--resume goes on).",
    )
    made.add_argument("spec", type=Path, metavar="SPEC", help="the sweep's file, such as sweeps/local-demo.yml")
    made.add_argument("-i", "--inventory", help=f"of cells that name none (default: {DEFAULT_INVENTORY})")
    made.add_argument("-l", "--limit", metavar="PATTERN", help="only these hosts, as for ansible-playbook")
    made.add_argument("--output", type=Path, metavar="DIR", help="the sweep's folder (default: results/sweeps/NAME[-rehearsal])")
    made.add_argument("--resume", action="store_true", help="go on with the folder: what has no valid run is measured")
    made.add_argument(
        "--rehearse", action="store_true", help="in short and on emulated workers of this machine, before hosts are rented"
    )
    made.add_argument("--dry-run", action="store_true", help="check and plan all, print the order and its cost; contact no host")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep and return the exit code."""
    args = parser().parse_args(argv)
    if not has_plays():
        print(f"pdbench sweep drives the plays of a checkout, and {ROOT} is none: run .venv/bin/pdbench there", file=sys.stderr)
        return FAILED
    if importlib.util.find_spec("ansible_runner") is None:
        print("pdbench sweep needs ansible-runner: make setup, then .venv/bin/pdbench", file=sys.stderr)
        return FAILED
    # Not before the checks above: all of it reads pdlib.
    session = importlib.import_module("pdbench.sweep.session")
    errors = importlib.import_module("pdlib.errors")
    try:
        code: int = session.run(args)
    except errors.UserError as error:
        print(f"pdbench sweep: {error}", file=sys.stderr)
        return USAGE
    return code
