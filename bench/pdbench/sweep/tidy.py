"""The tidy table of a sweep, or of any runs: one row a (cell, repeat, load point), made from run folders alone.

``read(sweep folder)`` returns it, ``write(sweep folder)`` leaves it as results.parquet and results.csv. Of several attempts
at one repeat the newest valid one counts, else the newest that measured anything, else the newest. Column names and types
are `COLUMNS`; docs/compare.md says what they mean.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pandas as pd

from pdbench import shapes
from pdbench.gate.rundata import EVIDENCE, PLAN, PROGRESS, REQUESTS, SUMMARY, NotARun, Point, RunData, summary_points
from pdbench.reading import json_of
from pdbench.records import MEASURE, replacing
from pdbench.report.words import gpus as gpus_of
from pdbench.report.words import verdict
from pdbench.sweep import asked as asking

Json = dict[str, Any]
SWEEP, RUNS, PARQUET, CSV = "sweep.json", "runs", "results.parquet", "results.csv"
#: columns of ``source``: our own runs; imported ones begin with "import:"
OWN, IMPORTED = "pdbench", "import:"
STATISTICS = ("mean", "p50", "p90", "p95", "p99")
LATENCIES = ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms")
_FLOATS = ("request_throughput", "input_throughput", "output_throughput", "output_throughput_per_gpu", "tok_s_user")
_ATTEMPT = re.compile(r"r(\d+)a(\d+)")
_RUN_ID = re.compile(r"\d{8}-\d{6}")

#: column -> pandas type, in their order; times in ms, throughputs in 1/s, "boolean" and "Int64" may be missing
COLUMNS: dict[str, str] = {
    **{"sweep": "str", "cell": "str", "repeat": "Int64", "attempt": "Int64", "run": "str", "point": "Int64", "ratio": "str"},
    **{"prefill_workers": "Int64", "decode_workers": "Int64", "aggregated_workers": "Int64", "gpus": "Int64"},
    **dict.fromkeys(("engine", "engine_version", "model", "transfer_backend", "router", "router_policy"), "str"),
    **{"concurrency": "Int64", "request_rate": "float64", "isl": "float64", "osl": "float64", "seed": "Int64"},
    **{"emulated": "boolean", "valid": "boolean", "invalid_reasons": "str", "notes": "str"},
    **{"completed": "Int64", "failed": "Int64", "duration_s": "float64"},
    **dict.fromkeys(_FLOATS, "float64"),
    **{f"{metric}_{statistic}": "float64" for metric in LATENCIES for statistic in STATISTICS},
    **{"goodput": "float64", "begin": "datetime64[us, UTC]", "source": "str", "variables": "str"},
    **{"asked": "str", "on_cpu": "boolean", "truncated": "str"},
}
#: columns that tables of older checkouts lack
_ADDED = ("asked", "on_cpu", "truncated")


def is_sweep(folder: Path) -> bool:
    """Tell whether a folder is a sweep's, or an import's, which has the same shape."""
    return (folder / SWEEP).is_file()


def is_run(folder: Path) -> bool:
    """Tell whether a folder is a run's."""
    return any((folder / name).is_file() for name in (SUMMARY, PROGRESS, REQUESTS))


def read(sweep: Path) -> pd.DataFrame:
    """Return the tidy table of a sweep's folder, made anew from its runs; raise NotARun when it is no sweep.

    The folder of an import has no runs: its table is results.parquet, as `pdbench import` left it.
    """
    spec = _spec(sweep)
    if spec.get("source"):
        return table(sweep / PARQUET)
    variables = {str(cell["id"]): cell.get("variables") or {} for cell in spec.get("cells") or []}
    order = {cell: place for place, cell in enumerate(variables)}
    rows: list[Json] = []
    tries: dict[tuple[str, int], list[tuple[int, Path]]] = {}
    for folder in sorted((sweep / RUNS).glob("*/*")):
        if folder.is_dir() and (found := _ATTEMPT.fullmatch(folder.name)):
            tries.setdefault((folder.parent.name, int(found[1])), []).append((int(found[2]), folder))
    for (cell, repeat), attempts in sorted(tries.items(), key=lambda item: (order.get(item[0][0], len(order)), item[0])):
        made = [(attempt, folder, _rows(folder)) for attempt, folder in sorted(attempts)]
        attempt, folder, best = max(made, key=lambda one: (_rank(one[2]), one[0]))
        own = {"sweep": spec.get("name") or sweep.name, "cell": cell, "repeat": repeat, "attempt": attempt}
        text = json.dumps(variables.get(cell, {}), sort_keys=True)
        rows += [{**row, **own, "run": folder.relative_to(sweep).as_posix(), "variables": text} for row in best]
    return frame(rows)


def read_runs(folders: Iterable[Path]) -> pd.DataFrame:
    """Return the tidy table of run folders without a sweep: each is a cell of its own name; ``run`` is its path.

    Raise NotARun when a folder is no run's.
    """
    rows: list[Json] = []
    for folder in folders:
        if not is_run(folder):
            raise NotARun(f"{folder} is not the folder of a run: it has none of {SUMMARY}, {PROGRESS} and {REQUESTS}")
        own = {"sweep": "", "cell": folder.resolve().name, "repeat": 1, "attempt": 1, "run": str(folder), "variables": "{}"}
        rows += [{**row, **own} for row in _rows(folder)]
    return frame(rows)


def write(sweep: Path, runs: Sequence[Path] | None = None) -> pd.DataFrame:
    """Write results.parquet and results.csv into a folder, each at once, and return the table.

    ``runs``: the table of these run folders; without them, of the sweep that lies in the folder. Raise NotARun, OSError.
    """
    found = read(sweep) if runs is None else read_runs(runs)
    save(sweep, found)
    return found


def save(folder: Path, found: pd.DataFrame) -> None:
    """Write a tidy table as results.parquet and results.csv, each at once. Raise OSError."""
    with replacing(folder / PARQUET) as temporary:
        found.to_parquet(temporary, index=False)
    with replacing(folder / CSV) as temporary:
        found.to_csv(temporary, index=False)


def table(path: Path) -> pd.DataFrame:
    """Read a tidy table from a .parquet or .csv file; raise NotARun, which says what is wrong with it."""
    try:
        found = (
            pd.read_csv(path, dtype=object, keep_default_na=False, na_values=[""])
            if path.suffix == ".csv"
            else pd.read_parquet(path)
        )
    except FileNotFoundError:
        raise NotARun(f"{path} is missing") from None
    except (OSError, ValueError) as why:  # pyarrow's and the parser's errors are ValueErrors
        raise NotARun(f"{path} cannot be read as a tidy table: {str(why).splitlines()[0]}") from None
    lacking = [name for name in COLUMNS if name not in found and name not in _ADDED]
    if lacking:
        raise NotARun(f"{path} is no tidy table: it lacks the column {lacking[0]}")
    try:
        return _typed(found.reindex(columns=list(COLUMNS)))
    except (TypeError, ValueError) as why:
        raise NotARun(f"{path} is no tidy table: {str(why).splitlines()[0]}") from None


def frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return rows as a tidy table; what a row lacks is missing there. Raise ValueError for a column that does not exist."""
    odd = {name for row in rows for name in row} - COLUMNS.keys()
    if odd:
        raise ValueError(f"not columns of the tidy table: {', '.join(sorted(odd))}")
    return _typed(pd.DataFrame([dict(row) for row in rows], columns=list(COLUMNS), dtype=object))


def _typed(found: pd.DataFrame) -> pd.DataFrame:
    columns: dict[str, pd.Series[Any]] = {}
    for name, kind in COLUMNS.items():
        column = found[name]
        if kind == "str":
            columns[name] = column.astype(object).where(column.notna(), "").astype("str")
        elif kind == "boolean":
            truth = {"True": True, "False": False, True: True, False: False}
            columns[name] = column.astype(object).map(truth).astype("boolean")
        elif kind.startswith("datetime"):
            columns[name] = pd.to_datetime(column, utc=True, format="ISO8601").astype(cast(Any, kind))
        else:
            columns[name] = pd.to_numeric(column.astype(object)).astype(cast(Any, kind))
    return pd.DataFrame(columns)


def _spec(sweep: Path) -> Json:
    try:
        spec = json_of((sweep / SWEEP).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotARun(f"{sweep} is not the folder of a sweep: it has no {SWEEP}") from None
    except (OSError, ValueError) as why:
        raise NotARun(f"{sweep / SWEEP} cannot be read: {why}") from None
    if later := shapes.newer(spec):
        raise NotARun(f"{sweep / SWEEP}: {later}")
    if fault := shapes.wrong(spec, shapes.SWEEP):
        raise NotARun(f"{sweep / SWEEP} is not what `pdbench sweep` writes: {fault}")
    return dict(spec)


def _rank(rows: Sequence[Json]) -> int:
    """Return how much an attempt is worth: 2 when every point of it is valid, 1 when it measured, else 0."""
    if all(row["valid"] is True for row in rows):
        return 2
    return int(any(row.get("completed") for row in rows))


def _rows(folder: Path) -> list[Json]:
    """Return a row for every load point of a run; one without figures when it measured nothing."""
    problems: list[str] = []
    summary = _json(folder / SUMMARY, problems, shapes.SUMMARY)
    plan, manifest = _json(folder / PLAN, problems, shapes.PLAN), _json(folder / "manifest.json", problems)
    points = summary_points(summary)
    plan = plan if _sound(plan) else {}
    run = RunData(folder, plan, points=[Point(i, entry, {}, []) for i, entry in enumerate(points)])
    about = {"source": OWN, "begin": _begin(folder, manifest), **_deployment(run, manifest)}
    if not points:
        why = problems[0] if problems and problems[0].startswith(SUMMARY) else f"{SUMMARY} has no load point"
        return [{**about, "point": 0, "valid": False, "invalid_reasons": f"nothing was measured: {why}"}]
    means = _means(folder)
    return [
        {**about, **_figures(entry), **_trust(run, i, entry), **means.get(i, {}), "asked": asking.of(entry, summary, manifest)}
        for i, entry in enumerate(points)
    ]


def _sound(plan: Json) -> bool:
    """Tell whether a plan has what is read of it here."""
    try:
        gpus_of(plan)
        return all(isinstance(worker["role"], str) for worker in plan["workers"]) and isinstance(plan.get("router") or {}, dict)
    except (KeyError, TypeError):
        return False


def _trust(run: RunData, index: int, entry: Json) -> Json:
    """Return ``valid`` and why not: as the gate judged; without it False where the client found something, else missing."""
    found = verdict(run)
    if found.valid is not None:
        # The client cannot know how many requests may fail, or what else is allowed: its own reasons are the gate's checks, too.
        reasons = [str(check["message"]) for check in found.checks if not check["ok"] and check["point"] in (None, index)]
        return {"valid": not reasons, "invalid_reasons": "; ".join(reasons)}
    reasons = [str(why) for why in entry.get("invalid_reasons") or []]
    return {"valid": False if reasons else None, "invalid_reasons": "; ".join(reasons or found.reasons)}


def _deployment(run: RunData, manifest: Json) -> Json:
    plan = run.plan
    workers = run.workers
    roles = [worker.get("role") for worker in workers]
    router = plan.get("router") or {}
    counted = {f"{role}_workers": roles.count(role) if plan else None for role in ("prefill", "decode", "aggregated")}
    return {
        **{name: plan.get(name) for name in ("ratio", "engine", "engine_version", "model")},
        "transfer_backend": plan.get("transfer_backend") if run.disaggregated else None,
        "gpus": gpus_of(plan) if plan else None,
        **counted,
        "router": router.get("name"),
        "router_policy": manifest.get("router_policy") or _after(router.get("argv") or [], "--policy"),
        "emulated": run.emulated if plan else None,
        "on_cpu": plan.get("on_cpu") is True if plan else None,
        "truncated": run.truncated,
    }


def _after(argv: Sequence[str], flag: str) -> str | None:
    return argv[argv.index(flag) + 1] if flag in argv[:-1] else None


def _figures(entry: Json) -> Json:
    row: Json = {name: entry.get(name) for name in ("concurrency", "request_rate", "seed", "completed", "failed", "duration_s")}
    row["point"] = entry.get("point", 0)
    for name in ("isl", "osl"):
        with contextlib.suppress(TypeError, ValueError):  # a distribution: its mean comes from the requests
            row[name] = float(entry[name])
    row |= {name: entry.get(name) for name in _FLOATS[:-1]}
    row["tok_s_user"] = (entry.get("request_output_throughput") or {}).get("mean")
    for metric in LATENCIES:
        row |= {f"{metric}_{statistic}": (entry.get(metric) or {}).get(statistic) for statistic in STATISTICS}
    row["goodput"] = (entry.get("goodput") or {}).get("request_throughput")
    row["notes"] = "; ".join(map(str, entry.get("notes") or []))
    # Without a plan, the run itself says what it was told.
    return row | {name: entry[name] for name in ("ratio", "gpus") if entry.get(name) is not None}


def _means(folder: Path) -> dict[int, Json]:
    """Return the mean lengths that were asked for, by load point."""
    names = ["point", "phase", "prompt_tokens_asked", "output_tokens_asked"]
    try:
        asked = pd.read_parquet(folder / REQUESTS, columns=names)
    except (OSError, ValueError):
        return {}
    means = asked[asked["phase"] == MEASURE].groupby("point")[names[2:]].mean()
    return {int(cast(int, point)): {"isl": float(row.iloc[0]), "osl": float(row.iloc[1])} for point, row in means.iterrows()}


def _begin(folder: Path, manifest: Json) -> datetime | None:
    """Return when the run began: its id says it in UTC; else the time of the file that it writes first."""
    about = manifest.get("manifest")
    run_id = str(about.get("run_id")) if isinstance(about, dict) else ""
    if _RUN_ID.match(run_id):
        return datetime.strptime(run_id[:15], "%Y%m%d-%H%M%S").replace(tzinfo=UTC)
    for name in ("run.json", EVIDENCE, SUMMARY, PROGRESS):
        with contextlib.suppress(OSError):
            return datetime.fromtimestamp((folder / name).stat().st_mtime, UTC)
    return None


def _json(path: Path, problems: list[str], shape: Json | None = None) -> Json:
    try:
        value = json_of(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
    except (OSError, ValueError) as why:
        problems.append(f"{path.name} is unreadable ({type(why).__name__})")
    else:
        if later := shapes.newer(value):
            raise NotARun(f"{path}: {later}")
        fault = "no JSON object" if not isinstance(value, dict) else shapes.wrong(value, shape or {})
        if not fault:
            return dict(value)
        problems.append(f"{path.name} is unreadable: {fault}")
    return {}
