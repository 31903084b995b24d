"""`pdbench autoscale`: watch what workers say of their queues, and run `rebalance.yml` when another ratio serves better."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from pdbench.load.errors import LoadError
from pdbench.run.load_options import Parser, above_zero, at_least
from pdbench.sweep.checkout import ROOT, has_plays
from pdbench.sweep.cli import DEFAULT_INVENTORY

_EPILOG = """Prefill is pressed when prompts wait for more than half of the TTFT limit; decode when tokens come slower than the
TPOT limit, requests wait for memory as long as the TTFT limit, or workers are over 90 % full. The other role gives a worker
if it can do without one. Both must hold in --patience windows in a row. What it sees and what not: docs/rebalance.md.
exit codes: 0 ended by --for or Ctrl-C, 2 bad usage (nothing was changed), 1 could not go on."""


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = Parser(
        prog="pdbench autoscale",
        description="Watch a deployment under load and change its prefill:decode ratio while it serves (rebalance.yml).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("-i", "--inventory", default=DEFAULT_INVENTORY, help="default: %(default)s")
    p.add_argument("-l", "--limit", metavar="PATTERN", help="change only these hosts, as for ansible-playbook")
    p.add_argument(
        "-e", "--extra", action="append", default=[], metavar="NAME=VALUE", help="a variable, or @FILE, for every play"
    )
    p.add_argument("--dry-run", action="store_true", help="say what would be changed, and change nothing")
    promise = p.add_argument_group("what users are promised (default: the inventory's bench_slo_ttft_ms, bench_slo_tpot_ms)")
    promise.add_argument("--slo-ttft-ms", type=float, metavar="MS", help="limit for the time to first token")
    promise.add_argument("--slo-tpot-ms", type=float, metavar="MS", help="limit for the time per output token")
    pace = p.add_argument_group("pace")
    pace.add_argument("--every", type=float, default=10.0, metavar="S", help="a window, in seconds (default: %(default)g)")
    pace.add_argument(
        "--patience", type=int, default=2, metavar="N", help="windows in a row that must agree (default: %(default)s)"
    )
    pace.add_argument(
        "--rest",
        type=float,
        default=30.0,
        metavar="S",
        help="after a change, and never less than it took (default: %(default)g)",
    )
    pace.add_argument("--for", type=float, dest="seconds", metavar="S", help="end after so long (default: Ctrl-C ends it)")
    p.add_argument("--output", type=Path, metavar="DIR", help="default: results/autoscale-TIME")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code."""
    if not has_plays():
        print(
            f"pdbench autoscale drives the plays of a checkout, and {ROOT} is none: run .venv/bin/pdbench there", file=sys.stderr
        )
        return 1
    if importlib.util.find_spec("ansible_runner") is None:
        print("pdbench autoscale needs ansible-runner: make setup, then .venv/bin/pdbench", file=sys.stderr)
        return 1
    # Not before the checks above: all of it reads pdlib.
    session = importlib.import_module("pdbench.autoscale.session")
    errors = importlib.import_module("pdlib.errors")
    try:
        args = parser().parse_args(argv)
        at_least(args, 1, "patience")
        above_zero(args, "slo_ttft_ms", "slo_tpot_ms", "every", "rest", "seconds")
        code: int = session.run(args)
    except (LoadError, errors.UserError) as why:
        print(f"pdbench autoscale: {why}", file=sys.stderr)
        return 2
    except OSError as why:
        print(f"pdbench autoscale: {why}", file=sys.stderr)
        return 1
    return code
