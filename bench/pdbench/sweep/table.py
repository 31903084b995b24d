"""What a sweep says at its end and before it begins, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdbench.reading import json_of
from pdbench.sweep import estimate
from pdbench.sweep.grid import Cell
from pdbench.sweep.journal import Journal
from pdbench.sweep.order import Arrangement
from pdbench.sweep.planning import Planned, load_of
from pdlib import bench_load
from pdlib.tables import duration, table

Json = dict[str, Any]


def load_words(load: Mapping[str, Any]) -> str:
    """Return a load in a few words; raise UserError for what cannot be right."""
    own, points = load["bench_load"], bench_load.points(load)
    prompt, answer = (own.get(key) or load[name] for key, name in (("isl", "bench_input_len"), ("osl", "bench_output_len")))
    if load["bench_trace"] or load["bench_dataset"]:
        lengths = Path(str(load["bench_trace"] or load["bench_dataset"])).name
    else:
        lengths = f"{prompt}/{answer}"
    if all(one.rate is not None for one in points):
        return f"{lengths} at {','.join(f'{one.rate:g}' for one in points)}/s"
    if any(one.rate is None and one.concurrency is None for one in points):
        return f"{lengths} at its own times x {own.get('time_scale') or load['bench_time_scale']}"
    paces = [f"{one.rate:g}/s" if one.rate is not None else _slots(one.concurrency, one.requests) for one in points]
    return f"{lengths} x {','.join(paces)}"


def _slots(concurrency: int | None, requests: int) -> str:
    return f"{concurrency}{' at once' if concurrency == requests else ''}"


def seconds(made: Arrangement, planned: Planned) -> list[tuple[float, float]]:
    """Return (deploy, load) seconds assumed for every entry of an order."""
    found = []
    for (place, _), cost in zip(made.order, made.costs, strict=True):
        cell = planned.cells[place]
        emulated = bool(planned.plans[cell.deployment]["emulated"])
        found.append((estimate.deploy_s(cost, emulated), estimate.load_s(load_of(cell, planned.clusters[cell.deployment]))))
    return found


def order(planned: Planned, made: Arrangement, plain: Arrangement | None) -> str:
    """Return the order to measure in, visit by visit, with what it restarts, beside the order of the file if given."""
    rows: list[list[Any]] = []
    before = ""
    for (place, repeat), cost in zip(made.order, made.costs, strict=True):
        cell = planned.cells[place]
        words = load_words(load_of(cell, planned.clusters[cell.deployment]))
        if rows and before == cell.deployment and rows[-1][0] == repeat:
            rows[-1][3] += 1
            rows[-1][4] = rows[-1][4] if len(rows[-1][4]) > 60 else f"{rows[-1][4]}; {words}"
        else:
            name = f"{cell.deployment_words() or planned.plans[cell.deployment]['ratio']}{' (baseline)' if cell.baseline else ''}"
            restarts = f"{cost.workers} workers{', router' if cost.routers else ''}{', model' if cost.models else ''}"
            rows.append([repeat, name, planned.gpus(cell), 1, words, restarts if cost.deploys else "none"])
        before = cell.deployment
    head = ["round", "deployment", "GPUs", "cells", "loads (prompt/answer x in flight)", "restarts"]
    lines = [table(head, rows), ""]
    sums = []
    for name, one in (("this order", made), *([("the file's order", plain)] if plain else [])):
        time_s = sum(a + b for a, b in seconds(one, planned))
        sums.append([name, one.cost.workers, one.cost.routers, one.cost.models, one.cost.deploys, duration(time_s)])
    lines.append(table(["", "workers started", "router starts", "model switches", "deploys", "time (assumed)"], sums))
    return "\n".join([*lines, *(f"note: {note}" for note in planned.notes)])


def results(folder: Path, cells: Sequence[Cell], repeats: int, journal: Journal) -> tuple[str, bool]:
    """Return the table of what was measured, and whether every cell is valid in every repeat."""
    ends, rows, good = journal.last(), [], True
    for cell in cells:
        for repeat in range(1, repeats + 1):
            end = ends.get((cell.id, repeat))
            how = end["event"] if end else "not measured"
            good = good and how == "finished"
            said = "valid" if how == "finished" else how
            points = _points(folder / end["run"]) if end and how != "failed" else []
            rows += [[cell.id, repeat, *point[:2], said, *point[2:]] for point in points] or [
                [cell.id, repeat, "-", "-", said, "-", "-"]
            ]
    return table(["cell", "round", "ratio", "load", "validity", "tok/s/GPU", "TTFT p50 ms"], rows), good


def _points(run: Path) -> list[list[str]]:
    try:
        summary, plan = (json_of((run / name).read_text()) for name in ("summary.json", "plan.json"))
    except (OSError, ValueError):
        return []
    gpus = len({(rank["host"], gpu) for worker in plan["workers"] for rank in worker["ranks"] for gpu in rank["gpus"]})
    found = []
    for place, point in enumerate(summary.get("points") or [summary]):
        load = _sent(point) or f"point {place}"
        throughput = point.get("output_throughput")
        ttft = (point.get("ttft_ms") or {}).get("p50")
        each = "-" if throughput is None else f"{throughput / max(1, gpus):.1f}"
        found.append([plan["ratio"], load, each, "-" if ttft is None else f"{ttft:.1f}"])
    return found


def _sent(point: Json) -> str:
    """Return the pace of a point of summary.json, "" where it does not say it."""
    slots, rate, scale = (point.get(name) for name in ("concurrency", "request_rate", "time_scale"))
    if slots is not None:
        return f"{slots} {'at once' if point.get('batch') else 'in flight'}"
    if rate is not None:
        to = point.get("request_rate_to")
        return f"{rate:g}{'' if to is None else f'-{to:g}'}/s"
    return "" if scale is None else f"its own times x {scale:g}"
