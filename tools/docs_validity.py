"""Writes the tables of docs/validity.md from the faults that the tests inject; --check only says whether they are up to date."""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from unit.gate_faults import LIVE, SPOILT  # noqa: E402
from unit.runfolder import good  # noqa: E402

from pdbench.gate import POINT_CHECKS, RUN_CHECKS  # noqa: E402
from pdbench.gate.check import Check  # noqa: E402
from pdbench.gate.rundata import load  # noqa: E402

PAGE = ROOT / "docs" / "validity.md"
_BEGIN, _END = "<!-- tables: made by `make docs`, do not edit -->\n", "<!-- end of tables -->\n"


def _said(function: Callable[..., object]) -> str:
    """Return the first sentence of a docstring, without its full stop."""
    return " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split()).removesuffix(".")


def checks() -> dict[str, str]:
    """Return what each check wants, by id, in the gate's order."""
    with tempfile.TemporaryDirectory() as folder:
        run = load(good(concurrency=(4,)).write(Path(folder)))
        made: list[tuple[Check, Callable[..., Check]]] = [(check(run), check) for check in RUN_CHECKS]
        made += [(check(run, run.points[0]), check) for check in POINT_CHECKS]
    return {check.id: _said(function) for check, function in made}


def _begin_small(text: str) -> str:
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def tables() -> str:
    """Return both tables: every check with its faults, and every fault that real processes are given."""
    lines = [_row("check", "what must hold", "faults in a run's folder", "live faults"), _row("---", "---", "---", "---")]
    for id, wanted in checks().items():
        spoilt = [_begin_small(_said(spoil)) for ids, _, spoil in SPOILT if ids[0] == id]
        live = [fault.what for fault in LIVE if id in fault.checks]
        lines.append(_row(f"`{id}`", wanted, "; ".join(spoilt), "; ".join(live)))
    lines += ["", "## Live faults", "", _row("fault", "checks that fail", "repeats"), _row("---", "---", "---")]
    for fault in LIVE:
        outcome = ", ".join(f"`{id}`" for id in fault.checks) or f"nothing: {fault.says}"
        lines.append(_row(fault.what, outcome, fault.replays))
    return "\n".join(lines) + "\n"


def page(old: str) -> str:
    """Return the page with its tables as they are now; raise ValueError when it has no place for them."""
    head, begin, rest = old.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"it lacks the lines {_BEGIN.strip()} and {_END.strip()}")
    return f"{head}{_BEGIN}\n{tables()}\n{_END}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables, or with --check say whether they are up to date; return the exit code."""
    parser = argparse.ArgumentParser(
        usage="make docs     (.venv/bin/python tools/docs_validity.py [--check])", description=__doc__
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is not up to date")
    given = parser.parse_args(arguments)
    try:
        old = PAGE.read_text()
        new = page(old)
        if not given.check:
            PAGE.write_text(new)
    except (OSError, ValueError) as error:
        print(f"docs_validity.py: {PAGE}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 2
    if given.check and new != old:
        print(f"{PAGE} is not what the tests show: run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
