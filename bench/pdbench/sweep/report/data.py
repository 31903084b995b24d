"""The tidy table as configurations, loads and cells. Pure: a frame in, figures out.

A *configuration* is what is deployed, a *load* what is sent to it (model and lengths belong to it: figures of two models, or of
two lengths, do not compete). A *cell* is one configuration under one load, over its repeats; its figures are means over the
valid repeats. Invalid ones are counted and named, and never enter a figure.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from pdbench.reading import json_of
from pdbench.sweep import asked as asking

Row = Mapping[str, Any]
#: what a configuration is made of, and how a reader is told of it where it differs within the sweep
_PARTS = ("ratio", "engine", "engine_version", "transfer_backend", "router", "router_policy")
_DEPLOYED = (*_PARTS, "gpus", "model")
_COLUMNS = (*_PARTS, "model")
#: what makes lengths what they are; drawn ones differ by a little from seed to seed, and are one length
_LENGTHS = ("isl", "osl", "trace", "dataset", "length_scale", "max_isl", "max_osl", "conversation")
#: mean lengths that are this close are one, in rows that do not say what was asked for
_SAME = 0.1
RATE, GOODPUT = "output_throughput_per_gpu", "goodput_per_gpu"
#: what configurations are chosen by
GOALS = {RATE: "output tokens/s per GPU", GOODPUT: "requests/s within the limits, per GPU"}


@dataclass(frozen=True)
class Load:
    """What is sent: ``concurrency`` of a closed loop or ``rate`` (requests/s) of an open one, lengths in tokens."""

    model: str
    isl: float
    osl: float
    concurrency: int | None
    rate: float | None
    other: str = ""

    @property
    def label(self) -> str:
        """Name how much is sent."""
        if self.concurrency is not None:
            return f"concurrency {self.concurrency}"
        return "own pace" if self.rate is None else f"{self.rate:g} req/s"

    @property
    def size(self) -> float:
        """Return where the load stands on a load axis."""
        return float(self.concurrency if self.concurrency is not None else self.rate or 0.0)

    @property
    def shape(self) -> tuple[str, float, float, str, bool]:
        """Return what loads on one line share: all but how much is sent; the last is whether the loop is closed."""
        return self.model, self.isl, self.osl, self.other, self.concurrency is not None

    @property
    def order(self) -> tuple[object, ...]:
        """Return the sort key: by shape, then by size."""
        return (*self.shape, self.size)


@dataclass(frozen=True)
class Config:
    """What is deployed: ``label`` tells it from the others of the sweep; ``key`` is all that it consists of."""

    label: str
    key: tuple[tuple[str, str], ...]


@dataclass
class Cell:
    """One configuration under one load; ``rows`` are the rows of its valid repeats, ``bad`` of the invalid ones."""

    config: Config
    load: Load
    rows: list[Row] = field(default_factory=list)
    bad: list[Row] = field(default_factory=list)

    def values(self, metric: str) -> list[float]:
        """Return a column of the valid repeats, those without the figure left out."""
        return [float(row[metric]) for row in self.rows if number(row.get(metric))]

    def mean(self, metric: str) -> float:
        """Return the mean over the valid repeats; NaN without a figure."""
        found = self.values(metric)
        return sum(found) / len(found) if found else math.nan

    @property
    def gpus(self) -> int:
        """Return how many GPUs the configuration holds."""
        return int((self.rows or self.bad)[0].get("gpus") or 0)


@dataclass(frozen=True)
class Table:
    """Every cell of a sweep; ``nothing``: rows of runs that measured nothing, so that not even their load is known."""

    configs: list[Config]
    loads: list[Load]
    cells: list[Cell]
    nothing: list[Row] = field(default_factory=list)

    @cached_property
    def measured(self) -> list[Cell]:
        """Return the cells that have a valid repeat with output: the only ones that figures may show."""
        return [cell for cell in self.cells if cell.mean(RATE) > 0]

    @cached_property
    def goal(self) -> str:
        """Return what configurations are chosen by: goodput where every run had limits, else throughput."""
        rows = [row for cell in self.measured for row in cell.rows]
        limited = bool(rows) and all(number(row.get(GOODPUT)) for row in rows)
        return GOODPUT if limited and any(cell.mean(GOODPUT) > 0 for cell in self.measured) else RATE

    @cached_property
    def shapes(self) -> list[tuple[str, float, float, str, bool]]:
        """Return the shapes of the measured loads, in order."""
        return list(dict.fromkeys(cell.load.shape for cell in sorted(self.measured, key=lambda c: c.load.order)))

    def shape_label(self, shape: tuple[str, float, float, str, bool]) -> str:
        """Name a shape; the model only where the sweep has several."""
        model, isl, osl, other, _ = shape
        several = len({load.model for load in self.loads}) > 1
        return ", ".join(filter(None, (model if several else "", f"{isl:g} in / {osl:g} out", other)))

    def load_label(self, load: Load) -> str:
        """Name a load in full."""
        return f"{load.label}, {self.shape_label(load.shape)}"

    def under(self, load: Load) -> list[Cell]:
        """Return the measured cells of a load."""
        return [cell for cell in self.measured if cell.load == load]

    def line(self, config: Config, shape: tuple[str, float, float, str, bool]) -> list[Cell]:
        """Return the measured cells of a configuration over the loads of one shape, the lightest first."""
        found = [cell for cell in self.measured if cell.config == config and cell.load.shape == shape]
        return sorted(found, key=lambda cell: cell.load.size)


def number(value: object) -> bool:
    """Tell whether a cell of the frame holds a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def table(rows: Sequence[Row]) -> Table:
    """Return the cells of the tidy table's rows (docs/sweeps.md has the columns)."""
    known: list[Row] = [{**whole, GOODPUT: _per_gpu(whole)} for whole in (_whole(row, rows) for row in rows)]
    listed = _same_lengths(row for row in known if _is_load(row))
    others = _others(listed)
    keys = [_key(row) for row in listed]
    labels = _labels(keys)
    nothing = [row for row in known if not _is_load(row)]
    cells: dict[tuple[Config, Load], Cell] = {}
    for row, key, other in zip(listed, keys, others, strict=True):
        config, load = Config(labels[key], key), _load(row, other)
        cell = cells.setdefault((config, load), Cell(config, load))
        (cell.rows if _good(row) else cell.bad).append(row)
    configs = sorted({config for config, _ in cells}, key=_config_order)
    place = {config: number for number, config in enumerate(configs)}
    ordered = sorted(cells.values(), key=lambda cell: (cell.load.order, place[cell.config]))
    return Table(configs, list(dict.fromkeys(cell.load for cell in ordered)), ordered, nothing)


def _good(row: Row) -> bool:
    """Tell whether a row may be shown: judged valid, or another tool's, which no gate of ours has judged."""
    return row.get("valid") is True or (row.get("valid") is not False and str(row.get("source")).startswith("import:"))


def _per_gpu(row: Row) -> float | None:
    good, gpus = row.get("goodput"), row.get("gpus")
    return _float(good) / _float(gpus) if number(good) and number(gpus) and gpus else None


def _is_load(row: Row) -> bool:
    return number(row.get("isl")) or number(row.get("concurrency")) or number(row.get("request_rate"))


def _whole(row: Row, rows: Sequence[Row]) -> Row:
    """Fill in what a failed run does not say of its deployment from the other repeats of its cell."""
    lacks = [part for part in _DEPLOYED if _text(row.get(part)) == ""]
    if not lacks or not row.get("cell") or _good(row):
        return row
    same = next((one for one in rows if one.get("cell") == row["cell"] and _good(one)), {})
    swept = _variables(row)
    return {**row, **{part: same.get(part) or swept.get(part) for part in lacks}}


def _same_lengths(rows: Iterable[Row]) -> list[Row]:
    """Give lengths that were drawn one value: their means differ by a little from seed to seed, which makes no other load."""
    listed: list[Row] = [dict(row) for row in rows]
    for column in ("isl", "osl"):
        ways = [_way(row, column) for row in listed]
        means: dict[str, list[float]] = {}
        for row, way in zip(listed, ways, strict=True):
            if isinstance(way, str):
                means.setdefault(way, []).append(_float(row.get(column)))
        named: dict[str | float | None, float] = {way: sum(found) / len(found) for way, found in means.items()}
        first = 0.0
        for value in sorted({way for way in ways if isinstance(way, float) and not way.is_integer()}):
            first = value if not first or value > (1 + _SAME) * first else first
            named[value] = first
        listed = [
            {**row, column: float(f"{named[way]:.2g}")} if way in named else row for row, way in zip(listed, ways, strict=True)
        ]
    return listed


def _way(row: Row, column: str) -> str | float | None:
    """Return what a row's lengths were drawn from, None for a plain number, or their mean where the row does not say it."""
    asked = asking.read(row.get("asked"))
    if not asked:
        return _float(row.get(column))
    return None if asking.plain(asked.get(column)) else json.dumps([asked.get(name) for name in _LENGTHS])


def _others(rows: Sequence[Row]) -> list[str]:
    """Return what tells the load of each row from others of its pace and lengths, in words."""
    asked = [asking.read(row.get("asked")) for row in rows]
    swept = [asking.others(_variables(row), row.get("asked")) for row in rows]
    paces = [_load(row, json.dumps(more)) for row, more in zip(rows, swept, strict=True)]
    like: dict[Load, list[dict[str, Any]]] = {}
    for pace, one in zip(paces, asked, strict=True):
        if one:
            like.setdefault(pace, []).append(one)
    found = []
    for pace, one, more in zip(paces, asked, swept, strict=True):
        differ = {name for other in like.get(pace, []) for name in one | other if one.get(name) != other.get(name)}
        said = asking.words(one, differ, {"api", "prompt"} - differ)
        found.append(", ".join([*said, *(f"{name.removeprefix('bench_')} {_text(value)}" for name, value in more.items())]))
    return found


def _variables(row: Row) -> dict[str, Any]:
    try:
        found = json_of(row.get("variables") or "{}")
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _key(row: Row) -> tuple[tuple[str, str], ...]:
    extra = {k: _text(v) for k, v in _variables(row).items() if k not in _COLUMNS and not k.startswith("bench_")}
    source = str(row.get("source") or "pdbench")
    imported = {"source": source} if source != "pdbench" else {}
    gpus = row.get("gpus")
    held = {"gpus": f"{gpus} GPU{'' if gpus == 1 else 's'}" if number(gpus) else ""}
    return tuple({**{part: _text(row.get(part)) for part in _PARTS}, **extra, **imported, **held}.items())


def _labels(keys: Sequence[tuple[tuple[str, str], ...]]) -> dict[tuple[tuple[str, str], ...], str]:
    """Name each configuration by its ratio and by whatever else differs within the sweep."""
    distinct = list(dict.fromkeys(keys))
    names = list(dict.fromkeys(name for key in distinct for name, _ in key))
    # An aggregated deployment has no transfer backend: that it differs there says nothing new. Of sizes, the odd ones are told.
    sizes = Counter(dict(key).get("gpus", "") for key in distinct)
    silent = {name: {"", "none"} if name == "transfer_backend" else {""} for name in names}
    differ = [name for name in names if len({dict(key).get(name, "") for key in distinct} - silent[name]) > 1]
    silent["gpus"] = {max(sizes, key=lambda size: sizes[size])}
    places = _places({dict(key).get("inventory", "") for key in distinct} - {""})
    found: dict[tuple[tuple[str, str], ...], str] = {}
    for key in distinct:
        parts = dict(key)
        shown = [parts.get("ratio") or "unknown ratio"]
        shown += [
            parts[name]
            if name in (*_PARTS, "source", "gpus")
            else f"on {places[parts[name]]}"
            if name == "inventory"
            else f"{name}={parts[name]}"
            for name in differ
            if name != "ratio" and parts.get(name) and parts[name] not in silent[name]
        ]
        found[key] = " · ".join(shown)
    return found


def _places(inventories: Set[str]) -> dict[str, str]:
    """Name each inventory by its last folder or file, where that tells all of them apart."""
    short = {path: PurePosixPath(path).name.removesuffix(".yml") for path in inventories}
    return short if len(set(short.values())) == len(short) else {path: path for path in inventories}


def _config_order(config: Config) -> tuple[object, ...]:
    ratio = dict(config.key).get("ratio", "")
    prefill, _, decode = ratio.removesuffix("d").partition("p")
    if prefill.isdigit() and decode.isdigit():
        return 1, -int(prefill) / max(int(decode), 1), ratio, config.label
    return 0, 0.0, ratio, config.label


def _load(row: Row, other: str) -> Load:
    concurrency, rate = row.get("concurrency"), row.get("request_rate")
    return Load(
        model=str(row.get("model") or "unknown model"),
        isl=_float(row.get("isl")),
        osl=_float(row.get("osl")),
        concurrency=int(concurrency) if number(concurrency) and concurrency is not None else None,
        rate=float(rate) if number(rate) and rate is not None else None,
        other=other,
    )


def _float(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0
