"""The checklist of the setups (tests/scenario_coverage.yml): nothing of the texts is left out, and no row is empty."""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
FILE = REPO / "tests" / "scenario_coverage.yml"
#: A folder with the five texts, each named after its number; they are not part of this repository.
TEXTS = "PD_SCENARIO_TEXTS"
KINDS = {"command", "flag", "variable", "config", "figure", "metric", "troubleshooting", "step"}
ALWAYS = ("text", "lines", "kind", "item", "meaning", "here")
#: What can be found in a text without understanding it: flags, variables, scripts, metrics in backticks, two endpoints.
WORD = re.compile(
    r"(?<![\w-])(?:--|\u2013)[a-z][a-z0-9-]+|\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b|\b[\w/.-]+\.(?:sh|py)\b"
    r"|/start_profile|/slow_down|`[a-z0-9]+_[a-z0-9_]+`"
)

Json = dict[str, Any]


def numbers(spans: str) -> list[int]:
    """Return the line numbers of ``"3, 7-9"``, which must rise; raise ValueError otherwise."""
    found: list[int] = []
    for span in filter(None, spans.split(", ")):
        first, _, last = span.partition("-")
        found += range(int(first), int(last or first) + 1) or [0]
    if found != sorted(set(found)) or 0 in found:
        raise ValueError(f"lines {spans!r} do not rise")
    return found


@functools.cache
def names_in(path: str) -> frozenset[str]:
    """Return the names of the test functions of a file; none when there is no such file."""
    file = REPO / path
    if not path.startswith("tests/") or not file.is_file():
        return frozenset()
    tree = ast.parse(file.read_text())
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(node.name for node in functions if node.name.startswith("test_"))


def wrong_row(row: Json, texts: Json) -> list[str]:
    """Return what is wrong with one row by itself."""
    said = f"{row.get('text')} {row.get('item')!r}"
    outcome = {"test", "reason"} & row.keys()
    allowed = {*ALWAYS, *outcome}
    wrong = [f"{said}: {name} is empty" for name in (*ALWAYS, *allowed) if not row.get(name)]
    wrong += [f"{said}: {name} is not a key here" for name in row.keys() - allowed]
    words = [name for name in (*ALWAYS, "reason") if name in row]
    wrong += [
        f"{said}: {name} is no text" for name in words if not str(row[name] or "").strip() or not isinstance(row[name], str)
    ]
    if len(outcome) != 1:
        wrong.append(f"{said}: exactly one of test and reason")
    if row.get("text") not in texts:
        wrong.append(f"{said}: there is no such text")
    if row.get("kind") not in KINDS:
        wrong.append(f"{said}: kind is one of {sorted(KINDS)}")
    if "reason" in row and not re.fullmatch(r"not reproducible: .{20,}", str(row["reason"])):
        wrong.append(f"{said}: a reason is `not reproducible: ` and why")
    for name in row.get("test") or []:
        path, _, function = str(name).partition("::")
        if function not in names_in(path):
            wrong.append(f"{said}: there is no test {name}")
    return wrong


def problems(record: Json) -> list[str]:
    """Return everything that is wrong with the checklist, one sentence each."""
    texts, rows = record["texts"], record["rows"]
    wrong = [problem for row in rows for problem in wrong_row(row, texts)]
    seen: dict[str, dict[int, list[str]]] = {name: {} for name in texts}
    for row in rows:
        try:
            for line in numbers(str(row.get("lines") or "")):
                seen.setdefault(row["text"], {}).setdefault(line, []).append(row["item"])
        except ValueError as error:
            wrong.append(f"{row.get('text')} {row.get('item')!r}: {error}")
    for name, text in texts.items():
        empty = [line for spans in text["no_item_lines"].values() for line in numbers(spans)]
        wrong += [f"{name}: line {line} is in two lists of no_item_lines" for line in sorted(empty) if empty.count(line) > 1]
        wrong += [f"{name}: line {line} has no item and a row" for line in empty if line in seen[name]]
        everything = set(range(1, text["lines"] + 1))
        wrong += [f"{name}: line {line} is nowhere" for line in sorted(everything - {*empty, *seen[name]})]
        wrong += [f"{name}: there is no line {line}" for line in sorted({*empty, *seen[name]} - everything)]
        for word, spans in text["words"].items():
            # A flag is not one that merely begins so.
            whole = re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])")
            wrong += [
                f"{name}: {word} on line {line} is in no row's item"
                for line in numbers(spans)
                if not any(whole.search(item) for item in seen[name].get(line, []))
            ]
    return wrong


@pytest.fixture(scope="module")
def record() -> Json:
    loaded: Json = yaml.safe_load(FILE.read_text())
    return loaded


def test_the_checklist_is_complete_and_no_row_is_empty(record: Json) -> None:
    assert problems(record) == []


def _first(record: Json, outcome: str) -> Json:
    row: Json = next(row for row in record["rows"] if outcome in row)
    return row


def _set(outcome: str, **values: Any) -> Callable[[Json], None]:
    return lambda record: _first(record, outcome).update(values)


def _drop(outcome: str, key: str) -> Callable[[Json], None]:
    return lambda record: _first(record, outcome).pop(key) and None


def _forget_a_flag(record: Json) -> None:
    """The lines stay covered by other rows; only the flag's own row is gone."""
    record["rows"] = [row for row in record["rows"] if (row["text"], row["item"]) != ("003", "--page-size 1")]


def _call_it_prose(record: Json) -> None:
    row = next(row for row in record["rows"] if (row["text"], row["item"]) == ("000", "BENCH_INPUT_LEN 512"))
    record["rows"].remove(row)
    lists = record["texts"]["000"]["no_item_lines"]
    lists["more"] = row["lines"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_drop("test", "test"), "exactly one of"),
        (_set("test", test=[]), "test is empty"),
        (_set("test", test=["tests/unit/test_scenarios.py::test_that_nobody_wrote"]), "there is no test"),
        (_set("test", test=["tests/unit/no_such_file.py::test_a"]), "there is no test"),
        (_set("test", reason="not reproducible: because we say so, twice"), "exactly one of"),
        (_set("test", meaning=" "), "meaning is no text"),
        (_set("test", here=None), "here is empty"),
        (_set("test", text="005"), "there is no such text"),
        (_set("test", kind="prose"), "kind is one of"),
        (_set("test", lines="9-7"), "do not rise"),
        (_set("test", lines="5 and 6"), "invalid literal"),
        (_set("test", lines="5, 3"), "do not rise"),
        (_set("test", note="more"), "note is not a key here"),
        (_set("reason", reason="not reproducible: no"), "and why"),
        (_set("test", issue=5), "issue is not a key here"),
        (lambda record: record["rows"].pop() and None, "is nowhere|in no row's item"),
        (lambda record: record["texts"]["001"].update(lines=238), "line 238 is nowhere"),
        (lambda record: record["texts"]["001"].update(lines=236), "there is no line 237"),
        (_forget_a_flag, "--page-size on line 26"),
        (_call_it_prose, "BENCH_INPUT_LEN on line 226"),
    ],
)
def test_what_is_missing_or_made_up_is_noticed(record: Json, spoil: Callable[[Json], None], said: str) -> None:
    spoilt = copy.deepcopy(record)
    spoil(spoilt)
    assert [problem for problem in problems(spoilt) if re.search(said, problem)]


@pytest.mark.skipif(TEXTS not in os.environ, reason=f"{TEXTS} names no folder with the texts")
def test_the_record_is_that_of_the_texts(record: Json) -> None:
    for name, text in record["texts"].items():
        raw = next(Path(os.environ[TEXTS]).glob(f"{name}_*.txt")).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == text["sha256"], name
        lines = raw.decode().splitlines()
        assert len(lines) == text["lines"]
        found: dict[str, list[int]] = {}
        for number, line in enumerate(lines, 1):
            for word in {each.strip("`") for each in WORD.findall(line)}:
                found.setdefault(word, []).append(number)
        assert {word: numbers(spans) for word, spans in text["words"].items()} == found
        assert not [line for line in numbers(text["no_item_lines"]["blank"]) if lines[line - 1].strip()]
