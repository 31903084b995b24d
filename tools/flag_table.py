"""Makes the table of an engine's flags that ``engine_args`` are checked against.

    flag_table.py --all                    every version below, downloaded without its dependencies
    flag_table.py --emulated               the emulator's, from the pdbench that is installed
    flag_table.py FOLDER VERSION           one version, from a folder that holds the package `sglang`, to stdout

The engine's own parser is asked: its argument module is imported, and what that needs and is not there (torch, CUDA
kernels, ...) is replaced by stand-ins, as no flag hangs on it. tests/real holds the tables against a real installation.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import importlib.abc
import importlib.machinery
import json
import re
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parents[1] / "library" / "module_utils" / "pdlib" / "flags"
#: version, oldest first -> the Python that its wheel is for
SGLANG = {"0.5.17": "3.11", "0.5.23": "3.11"}
#: what the argument module needs for real: its records are built on it
NEEDS = "msgspec==0.22.0"
#: these hold the flags, so a failure in them is one of this tool
ESSENTIAL = ("sglang.srt.server_args", "sglang.srt.arg_groups")

#: flags of older versions -> what to use; a table lists those which its version has not
REMOVED = {
    "--enable-deepep-moe": "set moe-a2a-backend: deepep",
    "--enable-ep-moe": "set ep-size",
    "--cuda-graph-bs": "set cuda-graph-bs-decode (a list) or cuda-graph-bs-prefill",
    "--cuda-graph-max-bs": "set cuda-graph-max-bs-decode or cuda-graph-max-bs-prefill",
    "--disaggregation-decode-tp": "leave it out: decode workers learn it from the bootstrap server",
    "--disaggregation-decode-dp": "leave it out: decode workers learn it from the bootstrap server",
    "--disaggregation-prefill-pp": "leave it out: decode workers learn it from the bootstrap server",
    "--prefill-round-robin-balance": "set load-balance-method: round_robin",
}


class StandIn(type):
    """A class that can be called, subclassed, indexed, used as a decorator, and whose attributes are like it."""

    def __getattr__(cls, name: str) -> StandIn:
        return stand_in(name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Give back what is decorated, else another stand-in."""
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else stand_in("value")

    def __getitem__(cls, key: object) -> StandIn:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __iter__(cls) -> Iterator[Any]:
        return iter(())

    def __contains__(cls, item: object) -> bool:
        return False

    def __bool__(cls) -> bool:
        return False

    def __lt__(cls, other: object) -> bool:
        return False

    __le__ = __gt__ = __ge__ = __lt__


def stand_in(name: str) -> StandIn:
    """One stand-in."""
    return StandIn(name, (), {})


class StandInModule(types.ModuleType):
    """A module of which every attribute is a stand-in."""

    __version__ = "0.0.0"
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(name)


class MissingModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last: what no other finder has is a module of stand-ins."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """Find everything but the engine."""
        if name.startswith("sglang."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Make the module."""
        return StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


class EngineModules(importlib.abc.MetaPathFinder):
    """Comes first: a module of the engine which fails beside stand-ins becomes one, unless flags are defined there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Find the engine's modules, and wrap their execution."""
        if not name.startswith("sglang."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_or_replace(module: types.ModuleType) -> None:
            try:
                execute(module)
            except Exception:
                if name.startswith(ESSENTIAL):
                    raise
                sys.modules[name] = StandInModule(name)

        spec.loader.exec_module = execute_or_replace  # type: ignore[method-assign]
        return spec


def parser_of(folder: Path) -> argparse.ArgumentParser:
    """The engine's own parser. It changes this process: call it once, in a process of its own."""
    package = types.ModuleType("sglang")
    # the package's own __init__ patches transformers, which may not be there
    package.__path__ = [str(folder / "sglang")]
    package.__dict__["__version__"] = "0"
    sys.modules["sglang"] = package
    sys.path.insert(0, str(folder))
    sys.meta_path.insert(0, EngineModules())
    sys.meta_path.append(MissingModules())
    parser = argparse.ArgumentParser()
    importlib.import_module("sglang.srt.server_args").ServerArgs.add_cli_args(parser)
    return parser


def plain(value: Any) -> Any:
    """JSON for a default or a choice; sets are sorted, so that the table does not change from run to run."""
    if isinstance(value, StandIn):
        raise TypeError("a stand-in found its way into a flag")
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, list | tuple) or hasattr(value, "__iter__"):
        return [plain(item) for item in value]
    return str(value)


def type_of(action: argparse.Action) -> str:
    """What a value must be: bool (a switch), int, float, json or str."""
    if action.nargs == 0:
        return "bool"
    name = getattr(action.type, "__name__", "str")
    name = {"_port": "int", "_count": "int", "_share": "float"}.get(name, name)  # pdbench's own
    if "json" in name or name == "loads":
        return "json"
    return name if name in ("int", "float") else "str"


def deprecation(action: argparse.Action) -> str:
    """Why not to use a flag, or ""."""
    replacement = getattr(action, "new_flag", None)
    if replacement:
        return f"use {replacement}"
    text = tidy(action.help)
    if type(action).__name__.startswith("Deprecated") or re.match(r"\W*(\[?deprecated|this flag is deprecated)", text, re.I):
        return text or "deprecated"
    return ""


def tidy(text: str | None) -> str:
    """Help on one line."""
    return " ".join((text or "").replace("%%", "%").split())


def short(text: str | None, limit: int = 120) -> str:
    """The first sentence of the help, cut at a word."""
    sentence = re.split(r"(?<=[a-z)])(?<!e\.g)(?<!i\.e)\. ", tidy(text))[0]
    return sentence if len(sentence) <= limit else sentence[:limit].rpartition(" ")[0] + " ..."


def rows(parser: argparse.ArgumentParser) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The flags, by name; and those which the parser has only to refuse them, with what it says."""
    found: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    for action in parser._actions:
        long = [option for option in action.option_strings if option.startswith("--")]
        if not long or action.dest == "help":
            continue
        if getattr(action, "error_message", None):
            refused |= dict.fromkeys(long, tidy(getattr(action, "error_message", "")))
            continue
        own = "--" + action.dest.replace("_", "-")
        name = own if own in long else long[0]
        negatable = isinstance(action, argparse.BooleanOptionalAction)
        negations = [option for option in long if negatable and option.startswith("--no-")]
        row = {
            "flag": name,
            "aliases": [option for option in long if option not in (name, *negations)],
            "type": type_of(action),
            "nargs": None if action.nargs == 0 else action.nargs,
            "choices": None if action.choices is None else plain(action.choices),
            "default": plain(action.default),
            "deprecated": deprecation(action),
            "help": short(action.help),
        }
        found.append(row)
        found += [{**row, "flag": option, "aliases": [], "default": None} for option in negations]
    return sorted(found, key=lambda row: str(row["flag"])), refused


def options(flags: Sequence[Mapping[str, Any]]) -> set[str]:
    """Every spelling of the flags."""
    return {option for row in flags for option in (row["flag"], *row["aliases"])}


def gone(version: str) -> dict[str, str]:
    """Flags of the older tables, with what these say to use instead."""
    result: dict[str, str] = {}
    for older in (v for v in SGLANG if numbers(v) < numbers(version)):
        flags = json.loads((TABLES / f"sglang-{older}.json").read_text())["flags"]
        for row in flags:
            result |= dict.fromkeys(options([row]), row["deprecated"] or f"{older} was the last version that we know to have it")
    return result


def numbers(version: str) -> list[int]:
    """0.5.9 is older than 0.5.10."""
    return [int(part) for part in re.findall(r"\d+", version)]


def table(folder: Path, version: str) -> str:
    """The table as text: JSON, one flag a line."""
    flags, refused = rows(parser_of(folder))
    known = options(flags)
    removed = {flag: text for flag, text in sorted({**gone(version), **refused, **REMOVED}.items()) if flag not in known}
    return text("sglang", version, f"wheel sglang {version}", removed, flags)


def emulated() -> tuple[Path, str]:
    """The emulator's table: its file and its text."""
    from pdbench import __version__
    from pdbench.emulate.cli import parser

    return TABLES / f"emulated-{__version__}.json", text("emulated", __version__, "pdbench emulate", {}, rows(parser())[0])


def text(engine: str, version: str, source: str, removed: Mapping[str, str], flags: Sequence[Mapping[str, Any]]) -> str:
    """A table as it is written."""
    head = {"engine": engine, "version": version, "source": source, "made_by": "tools/flag_table.py"}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    lines.append(f'"removed": {json.dumps(removed, indent=0)},')
    lines.append('"flags": [\n' + ",\n".join(json.dumps(row) for row in flags) + "\n]")
    return "{\n" + "\n".join(lines) + "\n}\n"


def pip(*arguments: str) -> None:
    """Run this Python's pip."""
    subprocess.run([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments], check=True)


def make(version: str, python: str) -> None:
    """Download one version and write its table."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pip("download", "--no-deps", "--only-binary=:all:", "--python-version", python, "-d", place, f"sglang=={version}")
        (wheel,) = folder.glob("sglang-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        pip("install", "--no-deps", "--target", place, NEEDS)
        made = subprocess.run([sys.executable, __file__, place, version], check=True, stdout=subprocess.PIPE, text=True).stdout
    path = TABLES / f"sglang-{version}.json"
    write(path, made)


def write(path: Path, made: str) -> None:
    """Write one table, and say so."""
    path.write_text(made)
    print(f"{path.name}: {len(json.loads(made)['flags'])} flags")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the table of an engine's flags.")
    parser.add_argument("--all", action="store_true", help="make every table anew (downloads the engines)")
    parser.add_argument("--emulated", action="store_true", help="make the emulator's table anew")
    parser.add_argument("folder", nargs="?", type=Path, help="folder that holds the package `sglang`")
    parser.add_argument("version", nargs="?", help="its version")
    given = parser.parse_args(arguments)
    if [given.all, given.emulated, bool(given.folder and given.version)].count(True) != 1:
        parser.error("give either --all, --emulated, or FOLDER and VERSION")
    if given.folder:
        if not (given.folder / "sglang" / "srt" / "server_args.py").is_file():
            parser.error(f"{given.folder} holds no sglang/srt/server_args.py")
        sys.stdout.write(table(given.folder.resolve(), given.version))
        return 0
    write(*emulated())
    try:
        for version, python in SGLANG.items() if given.all else ():
            make(version, python)
    except subprocess.CalledProcessError as error:
        print(f"flag_table: {' '.join(error.cmd)}: exit status {error.returncode}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
