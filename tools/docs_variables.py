"""Writes docs/variables.md from the table that variables are checked against; --check only says whether it is up to date."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "library" / "module_utils"))

from pdlib.engines import ENGINES  # noqa: E402
from pdlib.routers import ROUTERS  # noqa: E402
from pdlib.variables import SCOPES, VARIABLES, Variable  # noqa: E402

PAGE = ROOT / "docs" / "variables.md"
#: choices that are known by the facts of each engine and router, not by the table of variables
_KNOWN = {
    "engine": tuple(ENGINES),
    "router": tuple(ROUTERS),
    "transfer_backend": ("auto", *dict.fromkeys(name for engine in ENGINES.values() for name in engine.transfer_backends)),
}
_TYPES = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "list": "list, or words with commas",
    "dict": "mapping",
    "ints": "whole numbers, `32,64`",
    "gpus": "count, list of indices, or `auto`",
    "span": "length (docs/load.md)",
    "networks": "IP addresses and networks",
    "ports": "ports and ranges",
}
_SECRET = " Secret: never in a plan, a service's command line or a log."
_HEAD = """\
# Variables

Made by `make docs` from `library/module_utils/pdlib/variables.py`; do not edit.

A value comes from, strongest first: `-e`, the inventory (`host_vars/`, groups, `all: vars:`), `group_vars/all.yml`, the default
below ("not set: 300" is what the engine then does by itself). A misspelt name or a value of the wrong kind is refused before a
host is touched.
"""


def _default(variable: Variable) -> str:
    if variable.otherwise:
        return f"not set: {variable.otherwise}"
    if variable.default is None:
        return "not set"
    return f"`{variable.default if isinstance(variable.default, str) and variable.default else json.dumps(variable.default)}`"


def _allowed(variable: Variable) -> str:
    choices = variable.choices or _KNOWN.get(variable.name, ())
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    if variable.minimum is not None and variable.maximum is not None:
        return f"{variable.minimum} to {variable.maximum}"
    return "" if variable.minimum is None else f"at least {variable.minimum}"


def page() -> str:
    """Return the page's text: a table for every scope, variables in the order of :data:`pdlib.variables.VARIABLES`."""
    lines = [_HEAD]
    for scope, what in SCOPES.items():
        lines += [f"## {scope.capitalize()}", what, ""]
        lines += ["| name | type | default | unit | choices | meaning |", "|---|---|---|---|---|---|"]
        for variable in VARIABLES.values():
            if variable.scope == scope:
                meaning = variable.doc + (f" `{variable.env}`" if variable.env else "") + (_SECRET if variable.secret else "")
                name, kind = f"`{variable.name}`", _TYPES[variable.type]
                cells = [name, kind, _default(variable), variable.unit, _allowed(variable), meaning]
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or with --check say whether it is up to date; return the exit code."""
    parser = argparse.ArgumentParser(
        usage="make docs     (.venv/bin/python tools/docs_variables.py [--check] [--page FILE])", description=__doc__
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is not up to date")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="the page (default: docs/variables.md)")
    given = parser.parse_args(arguments)
    text = page()
    if not given.check:
        try:
            given.page.write_text(text)
        except OSError as error:
            print(f"docs_variables.py: {given.page}: {error.strerror}", file=sys.stderr)
            return 2
        return 0
    if given.page.is_file() and given.page.read_text() == text:
        return 0
    print(f"{given.page} is not what the variables say: run `make docs`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
