"""Flags of engines and routers: what the user wrote, checked against the flag table of the pinned version.

The tables under ``flags/`` are made from the programs themselves by ``tools/flag_table.py``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping

from .errors import UserError, did_you_mean

_FOLDER = Path(__file__).with_name("flags")
_ROUTERS = _FOLDER / "routers"
#: Names a file of more flags on the host: what the plan sets, and what both ends must have alike, could not be checked.
_FILE_OF_FLAGS = "config"


@dataclass(frozen=True)
class FlagTable:
    """The flags of one engine's or router's version: long spelling (no dashes) -> its row; aliases; removed ones with what to use."""

    engine: str
    version: str
    flags: Mapping[str, Mapping[str, Any]]
    aliases: Mapping[str, str]
    removed: Mapping[str, str]


def versions(engine: str) -> List[str]:
    """Return the versions of ``engine`` that have a flag table."""
    return sorted(path.stem[len(engine) + 1 :] for path in _FOLDER.glob(f"{engine}-*.json"))


def load(engine: str, version: str) -> FlagTable:
    """Return the table of one engine version."""
    return _read(_FOLDER, engine, version)


def load_router(package: str, version: str) -> FlagTable:
    """Return the table of one router version."""
    return _read(_ROUTERS, package, version)


def _read(folder: Path, engine: str, version: str) -> FlagTable:
    raw = json.loads((folder / f"{engine}-{version}.json").read_text())
    flags = {row["flag"].lstrip("-"): row for row in raw["flags"]}
    aliases = {alias.lstrip("-"): name for name, row in flags.items() for alias in row["aliases"]}
    removed = {name.lstrip("-"): advice for name, advice in raw.get("removed", {}).items()}
    return FlagTable(engine, version, flags, aliases, removed)


def _check_value(name: str, value: Any, row: Mapping[str, Any], where: str) -> None:
    if row["type"] == "bool" and row.get("nargs") in (None, 0):
        if not isinstance(value, bool):
            raise UserError(f"{where}: {name} is a switch; give true or false, not {value!r}")
        return
    if isinstance(value, bool) and row["type"] != "bool":
        raise UserError(f"{where}: {name} takes a value ({row['type']}), not {str(value).lower()}")
    for item in value if isinstance(value, list) else [value]:
        if row["type"] in ("int", "float"):
            try:
                (int if row["type"] == "int" else float)(str(item))
            except ValueError:
                raise UserError(f"{where}: {name}={item!r}: expected {row['type']}") from None
        choices = [str(choice) for choice in row.get("choices") or []]
        if choices and str(item) not in choices:
            raise UserError(f"{where}: {name}={item!r}: one of {', '.join(choices)}{did_you_mean(str(item), choices)}")


def canonical(table: FlagTable, args: Mapping[str, Any], where: str, owned: Mapping[str, str]) -> Dict[str, Any]:
    """Return ``args`` under the engine's own long spelling; raise UserError for a flag or value that it has not.

    ``owned``: flags that the plan sets -> the variable to set instead. They come in the order of the alphabet: a mapping has
    none that lasts (the deployed plan is a file), and a worker restarts when its command line is another.
    """
    result: Dict[str, Any] = {}
    for given, value in sorted(args.items()):
        name = given.lstrip("-").replace("_", "-")
        name = table.aliases.get(name, name)
        if name in owned:
            raise UserError(f"{where}: {given} is set by the plan; set {owned[name]} instead")
        if name in table.removed:
            raise UserError(f"{where}: {table.engine} {table.version} has no {name} any more: {table.removed[name]}")
        if name not in table.flags:
            hint = _elsewhere(table, name) or did_you_mean(name, [*table.flags, *table.aliases])
            raise UserError(f"{where}: {table.engine} {table.version} has no flag {given}{hint}")
        if name == _FILE_OF_FLAGS:
            raise UserError(f"{where}: {given} names a file of flags, which is not checked; write its flags here instead")
        if value is not None:
            _check_value(name, value, table.flags[name], where)
        result[name] = value
    return result


def _elsewhere(table: FlagTable, name: str) -> str:
    """Say which other version of the engine has a flag, and which flag of ``table`` it took the place of there; "" for none."""
    for version in reversed(versions(table.engine)):
        other = load(table.engine, version)
        if name not in other.flags and name not in other.aliases:
            continue
        named = re.compile(rf"(?<![\w-])(?:--)?{re.escape(name)}(?![\w-])")
        said = [*other.removed.items(), *((old, row["deprecated"]) for old, row in other.flags.items() if row.get("deprecated"))]
        before = [f"{old} ({advice})" for old, advice in said if old in table.flags and named.search(advice)]
        instead = (
            f"in place of {' and '.join(before)}: write it as {table.version} does"
            if before
            else "and none does the same here: leave it out"
        )
        return f"; {version} has it, {instead}, or set engine_version={version}"
    return ""


def overlaid(ours: Mapping[str, Any], given: Mapping[str, Any]) -> Dict[str, Any]:
    """Return ``ours`` with ``given`` over it; where both have a mapping, key by key."""
    both = {name: {**ours[name], **value} for name, value in given.items() if _both_mappings(ours.get(name), value)}
    return {**ours, **given, **both}


def _both_mappings(one: Any, other: Any) -> bool:
    return isinstance(one, Mapping) and isinstance(other, Mapping)


def argv(args: Mapping[str, Any]) -> List[str]:
    """Return command-line items: ``--flag value``, a switch alone when true, nothing when false or null."""
    items: List[str] = []
    for name, value in args.items():
        if value is None or value is False:
            continue
        items.append(f"--{name}")
        if isinstance(value, bool):
            continue
        if isinstance(value, Mapping):
            items.append(json.dumps(_worded(value), separators=(",", ":"), sort_keys=True))
        elif isinstance(value, (list, tuple)):
            items += [str(item) for item in value]
        else:
            items.append(str(value))
    return items


def _worded(value: Any) -> Any:
    """Return a value with the keys of all its mappings as text, as JSON has them, so that they have one order."""
    if isinstance(value, Mapping):
        return {str(key): _worded(item) for key, item in value.items()}
    return [_worded(item) for item in value] if isinstance(value, (list, tuple)) else value
