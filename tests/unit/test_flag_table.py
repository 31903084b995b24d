"""The tool that makes the flag tables, and the tables that it made."""

from __future__ import annotations

import argparse
import enum
import importlib.util
import json
import re
import subprocess
import sys
import zipfile
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


def wheel(path: Path, files: dict[str, str]) -> None:
    """Write a wheel with these files, and one that is no text."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, "kernels/huge.so": "\x7fELF"}.items():
            archive.writestr(name, text)


#: What vLLM's parser is made of, in small: its argument module needs a device, and is found under its old name up to 0.32.
VLLM = {
    "vllm/__init__.py": "raise RuntimeError('not without a GPU')\n",
    "vllm/platforms.py": "current_platform = None\n",
    "vllm/utils/__init__.py": "",
    "vllm/utils/argparse_utils.py": "import argparse\nclass FlexibleArgumentParser(argparse.ArgumentParser): ...\n",
    "vllm/entrypoints/__init__.py": "import torch\n",
    "vllm/entrypoints/{}/__init__.py": "",
    "vllm/entrypoints/{}/cli_args.py": "import torch, sys\n"
    "from vllm.platforms import current_platform\n"
    "def make_arg_parser(parser):\n"
    "    parser.add_argument('--device', default=current_platform.device_type)\n"
    "    if '--help' in sys.argv:\n"
    "        parser.add_argument('--max-model-len', type=int, help='Longest context.')\n",
}


@pytest.mark.parametrize(("version", "folder"), [("0.33.0", "common"), ("0.32.0", "launchers")])
def test_a_version_is_downloaded_unpacked_and_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, folder: str
) -> None:
    asked: list[tuple[str, ...]] = []
    unpacked: set[str] = set()

    def pip(*arguments: str) -> None:
        """Put the wheel where pip would, and nothing where records of its own would go."""
        asked.append(arguments)
        place = Path(arguments[arguments.index("-d" if arguments[0] == "download" else "--target") + 1])
        if arguments[0] == "download":
            name = arguments[-1].replace("-", "_").replace("==", "-")
            wheel(place / f"{name}-cp311-abi3-linux_x86_64.whl", {file.format(folder): text for file, text in VLLM.items()})
        else:
            unpacked.update(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())

    monkeypatch.setattr(flag_table, "pip", pip)
    monkeypatch.setattr(flag_table, "TABLES", tmp_path)
    flag_table.make("vllm", version)
    download, install = asked
    assert download[-1] == flag_table.SOURCES["vllm"].versions[version]
    assert "--no-deps" in download
    assert set(install[3:]) == set(flag_table.SOURCES["vllm"].needs)
    assert unpacked == {name.format(folder) for name in VLLM}, "kernels are left in the wheel, and the wheel goes"
    made = json.loads((tmp_path / f"vllm-{version}.json").read_text())
    assert (made["engine"], made["version"]) == ("vllm", version)
    assert made["source"] == f"wheel {download[-1].replace('==', ' ')}"
    assert [(row["flag"], row["type"], row["default"]) for row in made["flags"]] == [
        ("--device", "str", "cuda"),
        ("--max-model-len", "int", None),
    ]


def test_a_parser_that_could_not_be_read_makes_no_empty_table(tmp_path: Path) -> None:
    package = tmp_path / "smg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "router_args.py").write_text(
        "class RouterArgs:\n    @staticmethod\n    def add_cli_args(parser, use_router_prefix): ...\n"
    )
    done = subprocess.run([sys.executable, str(TOOL), "smg", str(tmp_path), "1"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "smg 1 tells of no flag" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_download_that_fails_is_told_by_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pip(*arguments: str) -> None:
        raise subprocess.CalledProcessError(1, ["pip", *arguments])

    monkeypatch.setattr(flag_table, "pip", pip)
    monkeypatch.setattr(flag_table, "write", lambda path, made: None)
    assert flag_table.main(["--all"]) == 1
    assert re.search(r"^flag_table: pip download .*: exit status 1$", capsys.readouterr().err, re.M)


def test_a_router_is_asked_with_its_own_library_for_choices(tmp_path: Path) -> None:
    package = tmp_path / "sglang_router"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('not needed')\n")
    (package / "sglang_router_rs.py").write_text("def parsers():\n    return ['qwen', 'json']\n")
    (package / "router_args.py").write_text(
        "from sglang_router.sglang_router_rs import parsers\n"
        "class RouterArgs:\n    @staticmethod\n    def add_cli_args(parser, use_router_prefix):\n"
        "        parser.add_argument('--policy', choices=['random', 'manual'])\n"
        "        parser.add_argument('--tool-call-parser', choices=parsers())\n"
    )
    command = [sys.executable, str(TOOL), "sglang-router", str(tmp_path), "0.3.2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = {row["flag"]: row["choices"] for row in json.loads(done.stdout)["flags"]}
    assert rows == {"--policy": ["random", "manual"], "--tool-call-parser": ["json", "qwen"]}


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
    path, least = flag_table.path_of(engine, version), 60 if flag_table.SOURCES[engine].router else 400
    raw = json.loads(path.read_text())
    assert (raw["engine"], raw["version"]) == (engine, version)
    spellings = [option for each in raw["flags"] for option in (each["flag"], *each["aliases"])]
    assert len(spellings) == len(set(spellings)) > least
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
        assert list(flags.canonical(table, values[name], name, {})) == sorted(values[name])


def test_the_emulators_table_is_that_of_its_parser() -> None:
    path, text = flag_table.emulated()
    assert path.read_text() == text, "run: .venv/bin/python tools/flag_table.py --emulated"
