"""What `pdbench compare` compares: from the paths a user gives to the runs of two configurations at the same load.

A side is PATH or PATH:COLUMN=VALUE,... where PATH is a run's folder, a folder that holds runs, a sweep's (or import's) folder,
a results.parquet or results.csv, or several runs' folders with commas between. The selector keeps the rows of the tidy table
(`pdbench.sweep.tidy`) with these values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pdbench import engines
from pdbench.compare import within
from pdbench.compare.judge import ENOUGH, FIGURES, Run
from pdbench.gate.rundata import SUMMARY, NotARun, summary_points
from pdbench.reading import json_of
from pdbench.sweep import asked as asking
from pdbench.sweep import tidy

#: what makes a configuration, beside the variables that are no load
_SETUP = (
    *("ratio", "prefill_workers", "decode_workers", "aggregated_workers", "gpus", "engine", "engine_version", "model"),
    *("transfer_backend", "router", "router_policy", "emulated"),
)
_LOAD = ("concurrency", "request_rate", "isl", "osl")
#: mean lengths of rows that do not say what was asked for are the same load when they differ by less
_ALIKE = 0.03


@dataclass(frozen=True)
class Side:
    """Rows of the tidy table, with ``folder``, the run's folder ("" where there is none), and ``side``, which is "A"."""

    name: str
    rows: pd.DataFrame


def read(text: str) -> Side:
    """Read one side; raise NotARun when there is nothing, and ValueError for a selector that cannot be."""
    path, selector = text, ""
    if ":" in text and not Path(text).exists():
        path, selector = text.rsplit(":", 1)
    rows = _rows(path)
    for part in filter(None, selector.split(",")):
        name, equals, wanted = part.partition("=")
        if not equals or name not in tidy.COLUMNS:
            raise ValueError(f"{part!r} in {text!r}: write COLUMN=VALUE with a column of the tidy table, such as ratio=3p1d")
        kept = rows[[_same(value, wanted) for value in rows[name]]]
        if kept.empty:
            there = ", ".join(dict.fromkeys(_shown(value) for value in rows[name]))
            raise ValueError(f"{path} has no row with {part}; {name} is one of: {there}")
        rows = kept
    if rows.empty:
        raise NotARun(f"{path} holds no runs yet")
    return Side(text, rows.assign(side="A").reset_index(drop=True))


def _rows(text: str) -> pd.DataFrame:
    path = Path(text)
    if path.suffix in (".parquet", ".csv"):
        return _placed(tidy.table(path), path.parent)
    if tidy.is_sweep(path):
        return _placed(tidy.read(path), path)
    folders = [Path(part) for part in text.split(",")] if not path.exists() else [path]
    if len(folders) == 1 and path.is_dir() and not tidy.is_run(path):
        folders = sorted(one for one in path.iterdir() if one.is_dir() and not one.is_symlink() and tidy.is_run(one))
        if not folders:
            raise NotARun(f"{path} is no run, no sweep, and holds no run")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"{text}: a run is given twice, and its copy is no repeat")
    rows = tidy.read_runs(folders)
    # Runs of one side without a sweep are repeats of one another, in the order they were given.
    order = {str(folder): place for place, folder in enumerate(folders, 1)}
    return _placed(rows.assign(repeat=rows["run"].map(order).astype("Int64")), Path())


def _placed(rows: pd.DataFrame, base: Path) -> pd.DataFrame:
    folders = [str(base / run) if run and (base / run / SUMMARY).is_file() else "" for run in rows["run"]]
    return rows.assign(folder=folders)


def _same(value: object, wanted: str) -> bool:
    if _shown(value) == wanted:
        return True
    try:
        return not isinstance(value, (str, bool)) and float(wanted) == float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _shown(value: Any) -> str:
    if pd.isna(value):
        return "(none)"
    return f"{value:g}" if isinstance(value, float) else str(value)


def keyed(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with ``load`` and ``setup``: equal where the load, and where everything else, is the same.

    ``side`` names the side of each row.
    """
    loads = _loads(rows)
    setups = [
        (*(_shown(row[name]) for name in _SETUP), json.dumps(own_variables(row["variables"]), sort_keys=True))
        for row in rows.to_dict("records")
    ]
    found = rows.assign(
        load=pd.Series(loads, index=rows.index, dtype=object), setup=pd.Series(setups, index=rows.index, dtype=object)
    )
    # Two points of one run may ask for the same, such as a trace at two speeds: they are told apart by their order.
    nth = found.groupby(["side", "run", "cell", "repeat", "load"], sort=False, dropna=False).cumcount()
    found["load"] = pd.Series([(*load, n) for load, n in zip(loads, nth, strict=True)], index=rows.index, dtype=object)
    return found


def _loads(rows: pd.DataFrame) -> list[tuple[object, ...]]:
    """Return what was asked for; of rows that do not say it, the one load that is like theirs, else pace and mean lengths."""
    paces = list(zip(*(_key(rows[name]) for name in ("concurrency", "request_rate")), strict=True))
    lengths = zip(*(_together(rows[name]) for name in ("isl", "osl")), strict=True)
    alike = [(*pace, *each) for pace, each in zip(paces, lengths, strict=True)]
    others = [json.dumps(_others(row), sort_keys=True) for row in rows.to_dict("records")]
    whole = [(*pace, asked, more) if asked else () for pace, asked, more in zip(paces, rows["asked"], others, strict=True)]
    known = {key: {load for load, one in zip(whole, alike, strict=True) if load and one == key} for key in set(alike)}
    return [
        load or (next(iter(known[key])) if len(known[key]) == 1 else (*key, more))
        for load, key, more in zip(whole, alike, others, strict=True)
    ]


def _others(row: Any) -> dict[str, Any]:
    return asking.others(json_of(row["variables"] or "{}"), row["asked"])


def own_variables(text: str) -> dict[str, Any]:
    """Return the swept variables that are no load."""
    found = json_of(text or "{}")
    return {name: value for name, value in found.items() if not name.startswith("bench_") and name not in _LOAD}


def _key(column: pd.Series[Any]) -> list[float | None]:
    return [None if pd.isna(value) else float(value) for value in column]


def _together(column: pd.Series[Any]) -> list[float | None]:
    """Return for each length the least one that is alike."""
    names: dict[float, float] = {}
    start = -math.inf
    for value in sorted({float(v) for v in column if pd.notna(v)}):
        if value > start * (1 + _ALIKE) or start < 0:
            start = value
        names[value] = start
    return [None if pd.isna(v) else names[float(v)] for v in column]


def load_in_words(row: Any) -> str:
    """Name a row's load."""
    pace = (
        f"concurrency {row['concurrency']}"
        if pd.notna(row["concurrency"])
        else f"{row['request_rate']:g} req/s"
        if pd.notna(row["request_rate"])
        else "a trace's own times"
    )
    asked = asking.read(row["asked"])
    sizes = {name: asked.get(name) or f"{row[name]:.0f}" for name in ("isl", "osl") if pd.notna(row[name]) or asked.get(name)}
    said = [f"{sizes[name]} {way}" for name, way in (("isl", "in"), ("osl", "out")) if name in sizes]
    said += asking.words(asked, ("num_requests",), ("isl", "osl"))
    said += [f"{name.removeprefix('bench_')} {value}" for name, value in _others(row).items()]
    return ", ".join([pace, *said])


def setup_in_words(row: Any) -> str:
    """Name a row's configuration: ratio, GPUs, and what else was swept."""
    others = {name: value for name, value in own_variables(row["variables"]).items() if name != "ratio"}
    gpus = "GPUs unknown" if pd.isna(row["gpus"]) else f"{row['gpus']} GPU{'' if row['gpus'] == 1 else 's'}"
    return ", ".join([row["ratio"] or "unknown ratio", gpus, *(f"{name} {value}" for name, value in others.items())])


def runs(rows: pd.DataFrame, other: int) -> list[Run]:
    """Return a configuration's runs at one load; ``other``: how many the other side has (with few, requests are read)."""
    few = min(len(rows), other) < ENOUGH
    return [_run(row, few, place) for place, row in enumerate(rows.to_dict("records"), 1)]


def _run(row: dict[Hashable, Any], few: bool, place: int) -> Run:
    folder, point = Path(row["folder"]) if row["folder"] else None, int(row["point"])
    requests = told = None
    if folder is not None:
        try:
            requests = within.read(folder, point, slo_of(folder, point)) if few else None
            sent = requests.asked if requests is not None else within.asked(folder, point)
            told = sent.tobytes() + str(row["asked"]).encode()
        except (OSError, ValueError):  # pyarrow's errors are ValueErrors
            requests = told = None
    figures = {name: _figure(row, name) for name in FIGURES}
    seed = None if pd.isna(row["seed"]) else int(row["seed"])
    repeat = place if pd.isna(row["repeat"]) else int(row["repeat"])
    return Run(repeat, figures, seed, told, requests)


def _figure(row: dict[Hashable, Any], name: str) -> float:
    if not name.endswith("_per_gpu"):
        return float(row[name]) if pd.notna(row[name]) else math.nan
    whole, gpus = row[name.removesuffix("_per_gpu")], row["gpus"]
    return float(whole) / int(gpus) if pd.notna(whole) and pd.notna(gpus) and gpus else math.nan


def _point(folder: Path, point: int) -> dict[str, Any]:
    entries = summary_points(json_of((folder / SUMMARY).read_text(encoding="utf-8")))
    return next((entry for i, entry in enumerate(entries) if entry.get("point", i) == point), {})


def slo_of(folder: Path, point: int) -> dict[str, float]:
    """Return the goodput limits of a run's load point, {} without any."""
    found = _point(folder, point).get("goodput")
    return dict(found["slo"]) if isinstance(found, dict) else {}


def limits(rows: pd.DataFrame) -> set[str]:
    """Return the goodput limits that the rows' runs had, as texts."""
    return {
        json.dumps(slo_of(Path(folder), int(point)), sort_keys=True)
        for folder, point in zip(rows["folder"], rows["point"], strict=True)
        if folder
    }


def cautions(rows: pd.DataFrame, whose: str = "") -> list[str]:
    """Return that no GPU made figures of these rows, or that their model is not whole; ``whose`` says which rows they are."""
    found = [
        caution
        for name, why in (("emulated", engines.no_gpu(True, False)), ("on_cpu", engines.no_gpu(False, True)))
        if rows[name].eq(True).any()
        for caution in engines.cautions(why, "", whose)
    ]
    return found + [text for cut in sorted({*rows["truncated"]} - {""}) for text in engines.cautions("", str(cut), whose)]


def gpus_known(rows: Sequence[pd.DataFrame]) -> bool:
    """Tell whether it is known of all rows how many GPUs their deployment held."""
    return all(bool(np.all(part["gpus"].notna())) for part in rows)
