"""What a sweep's file says, checked name by name and value by value before anything else happens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdbench.reading import yaml_of
from pdbench.sweep import checkout as checkout  # pdlib comes from there
from pdlib import ratio as ratios
from pdlib import settings
from pdlib.errors import UserError, did_you_mean
from pdlib.variables import VARIABLES

Json = dict[str, Any]

#: Short names for the load, as `pdbench run` has them.
ALIASES = {
    "concurrency": "bench_concurrency",
    "request_rate": "bench_request_rate",
    "isl": "bench_input_len",
    "osl": "bench_output_len",
    "requests": "bench_num_requests",
}
#: What a cell may name beside variables: the cluster that it runs on.
INVENTORY = "inventory"
_KEYS = ("name", "fixed", "grid", "cells", "repeats", "retries", "requests", "baseline", "fetch_ahead")
#: Arguments of single commands, which the sweep gives itself or which make no sense in it.
_NOT_SWEPT = ("run_label", "results_dir", "plan_dir", "current_plan", "purge", "steal_lock", "manifest", "advise_profile")


@dataclass(frozen=True)
class Spec:
    """A sweep's file, typed.

    ``fixed``: variables of every cell. ``axes``: of the grid, name -> values, dicts of variables. ``listed``: cells of their own.
    ``repeats``: rounds over all cells. ``retries``: more attempts of a cell that failed or was invalid. ``baseline``:
    whether aggregated workers on as many GPUs are added. ``fetch_ahead``: whether the next model is fetched during measurements.
    ``raw``: the file as read.
    """

    name: str
    fixed: Json
    axes: dict[str, list[Json]]
    listed: list[Json]
    repeats: int
    retries: int
    baseline: bool
    fetch_ahead: bool
    raw: Json


def read(path: Path) -> Spec:
    """Return the sweep that ``path`` describes; raise UserError naming the key that is wrong and what would be right."""
    try:
        raw = yaml_of(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    return parse(raw, path.stem, str(path))


def parse(raw: Any, name: str, where: str) -> Spec:
    """Return the sweep in ``raw``; ``name``: where it has none of its own; ``where``: the file, for messages."""
    if not isinstance(raw, Mapping) or not raw:
        raise UserError(f"{where}: expected a mapping with grid: or cells: (docs/sweeps.md)")
    for key in raw:
        if key not in _KEYS:
            raise UserError(f"{where}: there is no key {key}{did_you_mean(str(key), _KEYS)}; keys: {', '.join(_KEYS)}")
    fixed = _variables(raw.get("fixed", {}), f"{where}, fixed")
    if "requests" in raw:
        fixed.update(_variables({"requests": raw["requests"]}, where))
    grid = raw.get("grid", {})
    if not isinstance(grid, Mapping):
        raise UserError(f"{where}: grid: expected a mapping of axes, such as {{ratio: [3p1d, 2p2d]}}")
    axes = {str(axis): _axis(str(axis), values, where) for axis, values in grid.items()}
    _check_once(axes, fixed, where)
    listed = raw.get("cells", [])
    if not isinstance(listed, list):
        raise UserError(f"{where}: cells: expected a list of mappings, such as [{{ratio: agg}}]")
    cells = [_variables(cell, f"{where}, cell {place} of cells") for place, cell in enumerate(listed, 1)]
    if not axes and not cells:
        raise UserError(f"{where}: neither grid: nor cells: says what to measure")
    named = str(raw.get("name", name))
    if not named or not all(c.isalnum() or c in "._-" for c in named) or named.startswith("."):
        raise UserError(f"{where}: name: {named!r} names a folder: letters, digits, '.', '_' and '-' only")
    return Spec(
        name=named, fixed=fixed, axes=axes, listed=cells,
        repeats=_count(raw, "repeats", 1, 1, where), retries=_count(raw, "retries", 1, 0, where),
        baseline=_flag(raw, "baseline", where), fetch_ahead=_flag(raw, "fetch_ahead", where), raw=dict(raw),
    )  # fmt: skip


def _count(raw: Mapping[str, Any], key: str, default: int, least: int, where: str) -> int:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{where}: {key}: {value!r}: expected a whole number, at least {least}")
    return value


def _flag(raw: Mapping[str, Any], key: str, where: str) -> bool:
    value = raw.get(key, True)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key}: {value!r}: expected true or false")
    return value


def _axis(axis: str, values: Any, where: str) -> list[Json]:
    if not isinstance(values, list) or not values:
        raise UserError(
            f"{where}: grid: {axis}: expected a list of values, such as [{'3p1d, 2p2d' if axis == 'ratio' else '...'}]"
        )
    place = f"{where}, grid"
    if ALIASES.get(axis, axis) in VARIABLES or axis == INVENTORY:
        found = [_variables({axis: value}, place) for value in values]
    elif all(isinstance(value, Mapping) and value for value in values):
        found = [_variables(value, f"{place}, axis {axis}") for value in values]
    else:
        hint = did_you_mean(axis, [*VARIABLES, *ALIASES]) or "; docs/variables.md lists them"
        raise UserError(
            f"{place}: there is no variable {axis}{hint} (an axis of any name may have mappings of variables as its values)"
        )
    if any(value in found[:i] for i, value in enumerate(found)):
        raise UserError(f"{place}: {axis} has a value twice")
    return found


def _check_once(axes: Mapping[str, list[Json]], fixed: Mapping[str, Any], where: str) -> None:
    owner = dict.fromkeys(fixed, "fixed")
    for axis, values in axes.items():
        for name in {name for value in values for name in value}:
            if name in owner:
                raise UserError(f"{where}: {name} is set by {owner[name]} and by the axis {axis}: keep one")
            owner[name] = f"the axis {axis}"


def _variables(given: Any, where: str) -> Json:
    """Return variables by their full names, their values as written; raise UserError for what is none, or has a wrong value."""
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: expected a mapping of variables, and it is {given!r}")
    found: Json = {}
    for key, value in given.items():
        name = ALIASES.get(str(key), str(key))
        if name == INVENTORY:
            if not isinstance(value, str):
                raise UserError(f"{where}: inventory: {value!r}: expected a path, such as inventory/local")
        elif name not in VARIABLES:
            hint = did_you_mean(name, [*VARIABLES, *ALIASES]) or "; docs/variables.md lists them"
            raise UserError(f"{where}: there is no variable {name}{hint}")
        elif VARIABLES[name].secret:
            raise UserError(f"{where}: {name} is a secret: it belongs in the inventory's vault, and a sweep keeps its file")
        elif name in _NOT_SWEPT:
            raise UserError(f"{where}: {name} is set by the sweep itself: leave it out")
        elif value is None:
            raise UserError(f"{where}: {name} has no value; leave it out to have the inventory's")
        else:
            if "{{" in str(value):
                raise UserError(f"{where}: {name}={value!r}: a template belongs in the inventory or group_vars")
            settings.convert(VARIABLES[name], value, where)
            if name == "ratio":
                try:
                    value = str(ratios.parse(value))
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None
        if name in found:
            raise UserError(f"{where}: {name} is set twice, by a short name and by its own")
        found[name] = value
    return found
