"""The tool that makes the flag tables, and the tables that it made."""

from __future__ import annotations

import argparse
import enum
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdlib import flags
from pdlib.errors import UserError

REPO = Path(__file__).parents[2]
TOOL = REPO / "tools" / "flag_table.py"
spec = importlib.util.spec_from_file_location("flag_table", TOOL)
assert spec is not None
assert spec.loader is not None
flag_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flag_table)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Renamed(argparse.Action):
    new_flag = "--new-name"

    def __call__(self, *args: Any) -> None:
        """Never called: only described."""


def row(**options: Any) -> dict[str, Any]:
    """The row of a parser's only flag, --some-flag."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--some-flag", **options)
    found, refused = flag_table.rows(parser)
    assert (len(found), refused) == (1, {})
    result: dict[str, Any] = found[0]
    return result


@pytest.mark.parametrize(
    ("options", "kind", "nargs"),
    [
        ({}, "str", None),
        ({"type": int}, "int", None),
        ({"type": float, "nargs": "+"}, "float", "+"),
        ({"type": json.loads}, "json", None),
        ({"type": Path, "nargs": "?"}, "str", "?"),
        ({"action": "store_true"}, "bool", None),
    ],
)
def test_kinds_of_values(options: dict[str, Any], kind: str, nargs: str | None) -> None:
    found = row(**options)
    assert (found["type"], found["nargs"]) == (kind, nargs)


def test_choices_and_defaults_are_plain_and_sorted_where_they_have_no_order() -> None:
    assert row(choices={"b", "c", "a"})["choices"] == ["a", "b", "c"]
    assert row(choices=list(Colour), default=Colour.BLUE)["choices"] == ["red", "blue"]
    assert row(default=Colour.BLUE)["default"] == "blue"


def test_a_stand_in_never_reaches_a_table() -> None:
    with pytest.raises(TypeError, match="stand-in"):
        row(default=flag_table.stand_in("torch"))


def test_deprecation_names_what_to_use() -> None:
    assert row(action=Renamed)["deprecated"] == "use --new-name"
    assert row(help="[Deprecated] Gone soon.")["deprecated"] == "[Deprecated] Gone soon."
    assert row(help="Not deprecated at all.")["deprecated"] == ""


def test_the_spelling_of_the_field_is_the_flag_and_a_negation_is_one_of_its_own() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tensor-parallel-size", "--tp-size", "-t", dest="tp_size", type=int)
    parser.add_argument("--checks", action=argparse.BooleanOptionalAction)
    found, _ = flag_table.rows(parser)
    assert [(each["flag"], each["aliases"], each["type"]) for each in found] == [
        ("--checks", [], "bool"),
        ("--no-checks", [], "bool"),
        ("--tp-size", ["--tensor-parallel-size"], "int"),
    ]


def test_help_is_one_short_sentence() -> None:
    assert flag_table.short("First line,\n  e.g. this. Second sentence.") == "First line, e.g. this"
    assert len(flag_table.short("word " * 100)) <= 124


def test_an_engine_is_read_without_what_it_imports(tmp_path: Path) -> None:
    package = tmp_path / "sglang" / "srt"
    package.mkdir(parents=True)
    (tmp_path / "sglang" / "__init__.py").write_text("import transformers\n")
    (package / "broken.py").write_text("import torch\nraise RuntimeError('no GPU')\n")
    (package / "server_args.py").write_text(
        "import torch, triton.language as tl\n"
        "from sglang.srt.broken import anything\n"
        "class Layer(torch.nn.Module):\n    @torch.no_grad()\n    def run(self): ...\n"
        "class ServerArgs:\n    @staticmethod\n    def add_cli_args(parser):\n"
        "        parser.add_argument('--page-size', type=int, default=1, help='Pages.')\n"
    )
    done = subprocess.run(
        [sys.executable, str(TOOL), "sglang", str(tmp_path), "0.5.17"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert (table["engine"], table["version"]) == ("sglang", "0.5.17")
    assert [each["flag"] for each in table["flags"]] == ["--page-size"]
    assert "--enable-deepep-moe" in table["removed"]


@pytest.mark.parametrize(
    "arguments",
    [[], ["--all", "sglang", "folder", "1"], ["vllm", "folder"], ["sglang", "no-such-folder", "0.5.23"], ["trt", ".", "1"]],
)
def test_wrong_arguments(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("engine", "version"), [(engine, version) for engine, source in flag_table.SOURCES.items() for version in source.versions]
)
def test_tables_hold_each_spelling_once(engine: str, version: str) -> None:
    path = flag_table.TABLES / f"{engine}-{version}.json"
    raw = json.loads(path.read_text())
    assert (raw["engine"], raw["version"]) == (engine, version)
    spellings = [option for each in raw["flags"] for option in (each["flag"], *each["aliases"])]
    assert len(spellings) == len(set(spellings)) > 400
    assert not set(spellings) & set(raw["removed"])
    assert {each["type"] for each in raw["flags"]} <= {"bool", "int", "float", "str", "json"}
    assert path.read_text().count("\n{") == len(raw["flags"])


def test_a_switch_that_turns_off_is_no_alias_of_what_turns_on() -> None:
    for version, negation in (("0.33.0", "disable-prefix-caching"), ("0.32.0", "no-enable-prefix-caching")):
        table = flags.load("vllm", version)
        assert {"enable-prefix-caching", negation} <= set(table.flags)
        assert list(flags.canonical(table, {negation: True}, "engine_args", {})) == [negation]


@pytest.mark.parametrize(
    ("version", "flag", "known"),
    [
        ("0.5.17", "cuda-graph-bs", True),
        ("0.5.23", "cuda-graph-bs", False),
        ("0.5.23", "cuda-graph-bs-decode", True),
        ("0.5.23", "enable-deepep-moe", False),
        ("0.5.23", "moe-a2a-backend", True),
        ("0.5.17", "sleep-on-idle", True),
    ],
)
def test_what_each_version_has(version: str, flag: str, known: bool) -> None:
    table = flags.load("sglang", version)
    assert (flag in table.flags) is known
    assert (flag in table.removed) is not known


def test_the_plan_refuses_a_removed_flag_with_what_to_use() -> None:
    with pytest.raises(UserError, match=r"sglang 0\.5\.23 has no cuda-graph-bs any more: set cuda-graph-bs-decode"):
        flags.canonical(flags.load("sglang", "0.5.23"), {"cuda-graph-bs": 8}, "engine_args", {})


def test_the_real_engines_inventory_passes_its_table() -> None:
    values = yaml.safe_load((REPO / "inventory" / "local-sglang" / "hosts.yml").read_text())["all"]["vars"]
    table = flags.load("sglang", values["engine_version"])
    for name in ("engine_args", "decode_engine_args"):
        assert list(flags.canonical(table, values[name], name, {})) == list(values[name])


def test_the_emulators_table_is_that_of_its_parser() -> None:
    path, text = flag_table.emulated()
    assert path.read_text() == text, "run: .venv/bin/python tools/flag_table.py --emulated"
