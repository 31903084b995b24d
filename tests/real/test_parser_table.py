"""The flag table against the parser of the engine that is installed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from real.helpers import engine_python

TABLES = Path(__file__).parents[2] / "library" / "module_utils" / "pdlib" / "flags"

ASK = """
import argparse, json, sglang
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
flags = {}
for action in parser._actions:
    switch = action.nargs == 0
    for option in action.option_strings:
        choices = None if action.choices is None else sorted(str(getattr(c, "value", c)) for c in action.choices)
        flags[option] = [switch, None if switch else action.nargs, choices, getattr(action.type, "__name__", "str")]
print(json.dumps({"version": sglang.__version__, "flags": flags}))
"""


@pytest.fixture(scope="module")
def engine() -> dict[str, Any]:
    """Version of the installed engine, and its options: switch, nargs, choices, type."""
    python, env = engine_python()
    done = subprocess.run([python, "-W", "ignore", "-c", ASK], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def table(engine: dict[str, Any]) -> dict[str, Any]:
    """The table of that version."""
    content: dict[str, Any] = json.loads((TABLES / f"sglang-{engine['version']}.json").read_text())
    return content


def test_same_spellings(engine: dict[str, Any], table: dict[str, Any]) -> None:
    ours = {option for row in table["flags"] for option in (row["flag"], *row["aliases"])}
    theirs = {option for option in engine["flags"] if option.startswith("--") and option != "--help"}
    assert ours == theirs


def test_same_values(engine: dict[str, Any], table: dict[str, Any]) -> None:
    wrong = []
    for row in table["flags"]:
        switch, nargs, choices, kind = engine["flags"][row["flag"]]
        ours = (row["type"] == "bool", row["nargs"], row["choices"] and sorted(map(str, row["choices"])))
        if ours != (switch, nargs, choices) or (kind in ("int", "float") and row["type"] != kind):
            wrong.append((row["flag"], ours, (switch, nargs, choices, kind)))
    assert wrong == []


def test_removed_flags_are_gone(engine: dict[str, Any], table: dict[str, Any]) -> None:
    assert table["removed"]
    assert not set(table["removed"]) & set(engine["flags"])
