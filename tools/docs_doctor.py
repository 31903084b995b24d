"""Writes the table of docs/doctor.md from the checks and the faults that tests inject; --check only says whether it is new."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "library" / "module_utils")]

from unit.doctor_faults import SPOILT  # noqa: E402

from pdlib.doctor import CHECKS  # noqa: E402

PAGE = ROOT / "docs" / "doctor.md"
_BEGIN, _END = "<!-- table: made by `make docs`, do not edit -->\n", "<!-- end of table -->\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table() -> str:
    """Return a row a check: what must hold, what a person would type for it, and the faults that it finds."""
    lines = [_row("check", "what holds", "instead of", "found in the tests"), _row("---", "---", "---", "---")]
    for check in CHECKS.values():
        faults = []
        for ids, severity, _, _, spoil in SPOILT:
            if ids[0] == check.id:
                faults.append(f"{severity}: {' '.join((spoil.__doc__ or '').split()).rstrip('.')}")
        lines.append(_row(f"`{check.id}`", check.holds, check.instead, "; ".join(faults)))
    return "\n".join(lines) + "\n"


def page(old: str) -> str:
    """Return the page with its table as it is now; raise ValueError when it has no place for it."""
    head, begin, rest = old.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"it lacks the lines {_BEGIN.strip()} and {_END.strip()}")
    return f"{head}{_BEGIN}\n{table()}\n{_END}{tail}"


def main(argv: Sequence[str]) -> int:
    """Write the page, or compare it; return 1 when it is out of date or has no place for the table."""
    parser = argparse.ArgumentParser(
        usage="make docs     (.venv/bin/python tools/docs_doctor.py [--check] [--page FILE])", description=__doc__
    )
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page (default: docs/doctor.md)")
    options = parser.parse_args(argv)
    old = options.page.read_text(encoding="utf-8")
    try:
        new = page(old)
    except ValueError as problem:
        print(f"{options.page}: {problem}", file=sys.stderr)
        return 1
    if options.check and new != old:
        print(f"{options.page} is out of date: run `make docs`", file=sys.stderr)
        return 1
    if not options.check:
        options.page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
