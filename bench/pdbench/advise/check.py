"""How wrong the predictions are: measured runs beside what the model says of the same requests on the same deployment."""

from __future__ import annotations

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pdbench.advise.layout import Layout, Spot, of_plan
from pdbench.advise.rank import Spread
from pdbench.advise.simulate import Simulated, Work, simulate
from pdbench.compare import judge, sides
from pdbench.gate.rundata import PLAN, REQUESTS, SUMMARY, NotARun
from pdbench.load.arrivals import schedule
from pdbench.metrics import Slo
from pdbench.model.cluster import Prompt
from pdbench.model.profile import Profile
from pdbench.reading import json_of
from pdbench.records import MEASURE
from pdbench.sweep import asked as asking
from pdbench.sweep import checkout as checkout  # pdlib comes from there
from pdbench.sweep import tidy
from pdlib import ratio as ratios

Json = dict[str, Any]
Row = dict[Hashable, Any]
#: what is compared
THROUGHPUT, TTFT = "output_throughput", "ttft_ms_p50"
FIGURES = (THROUGHPUT, TTFT, "itl_ms_mean", "e2e_ms_mean")
#: what winners may be told by
GOODPUT = "goodput"


@dataclass(frozen=True)
class Checked:
    """One cell: a ratio at a load, the mean over its repeats. ``saturated``: requests wait in queues most of their TTFT."""

    load: str
    ratio: str
    gpus: int
    measured: dict[str, float]
    predicted: dict[str, float]
    saturated: bool
    runs: int

    def error(self, figure: str) -> float:
        """Return predicted over measured, less 1."""
        return self.predicted[figure] / self.measured[figure] - 1


@dataclass(frozen=True)
class Winners:
    """``all``: (load, highest measured ratio, highest predicted one) of every load with several ratios on as many GPUs.

    ``decided``: those of them whose highest is shown to beat every other.
    """

    all: list[tuple[str, str, str]]
    decided: list[tuple[str, str, str]]


def right(found: Sequence[tuple[str, str, str]]) -> int:
    """Return how many winners were predicted."""
    return sum(measured == predicted for _, measured, predicted in found)


def read(text: str) -> tuple[pd.DataFrame, list[str]]:
    """Return the measured rows of what `pdbench compare` takes as a side, and what was left out; raise NotARun, ValueError.

    A .csv may have some columns of the tidy table only.
    """
    if text.endswith(".csv"):
        try:
            rows = tidy.frame([{str(name): value for name, value in row.items()} for row in pd.read_csv(text).to_dict("records")])
        except OSError as why:
            raise NotARun(f"{text}: {why.strerror or why}") from None
        rows = rows.assign(folder="", side="A", point=rows["point"].fillna(0))
    else:
        rows = sides.read(text).rows
    used = [_usable(row) for row in rows.to_dict("records")]
    notes = (
        [f"{len(rows) - sum(used)} of {len(rows)} load points are invalid or measured nothing: left out"] if not all(used) else []
    )
    kept = rows[np.array(used, dtype=bool)].reset_index(drop=True)
    if kept.empty:
        raise NotARun(f"{text} has no valid load point")
    return kept, [*notes, *sides.cautions(kept)]


def _usable(row: Row) -> bool:
    return bool(pd.notna(row["completed"]) and row["completed"] > 0 and (pd.isna(row["valid"]) or row["valid"]))


def layout_of(row: Row, profile_of: Callable[[str], str]) -> Layout:
    """Return the deployment that a row was measured on: from its plan, else as far as the table tells."""
    folder = str(row["folder"])
    if folder:
        plan = json_of((Path(folder) / PLAN).read_text(encoding="utf-8"))
        return of_plan(plan, profile_of)
    if pd.isna(row["gpus"]):
        raise ValueError("how many GPUs served it is not known: pdbench import --gpus N")
    ratio = ratios.parse(str(row["ratio"]))
    workers = sum(ratio.counts().values())
    spot = Spot(profile_of(""), max(1, int(row["gpus"]) // workers))
    way = "tcp" if row["transfer_backend"] == "mooncake_tcp" else "cuda_ipc"
    ways = ((way,) * ratio.decode,) * ratio.prefill
    return Layout(str(ratio), (spot,) * ratio.prefill, (spot,) * ratio.decode, (spot,) * ratio.aggregated, ways)


def work_of(row: Row) -> Work:
    """Return the requests that a row was sent: from its records, else as many of the mean lengths. Raise ValueError."""
    closed: int | None = int(row["concurrency"]) if pd.notna(row["concurrency"]) else None
    limits = sides.slo_of(Path(str(row["folder"])), int(row["point"])) if row["folder"] else {}
    asked: list[tuple[int, int]]
    due: Sequence[float]
    if row["folder"]:
        points = json_of((Path(str(row["folder"])) / SUMMARY).read_text(encoding="utf-8"))["points"]
        if points[int(row["point"])].get("shared_prefix"):
            raise ValueError("its prompts share prefixes, and what prefix caches save is not simulated")
        columns = ["point", "phase", "index", "prompt_tokens_asked", "output_tokens_asked", "scheduled_s"]
        found = pd.read_parquet(Path(str(row["folder"])) / REQUESTS, columns=columns)
        mine = found[(found["phase"] == MEASURE) & (found["point"] == int(row["point"]))].sort_values("index")
        asked = [(int(isl), int(osl)) for isl, osl in zip(mine.iloc[:, 3], mine.iloc[:, 4], strict=True)]
        due = [float(at) for at in mine["scheduled_s"]]
    else:
        asked = [(round(row["isl"]), round(row["osl"]))] * int(
            row["completed"] + (row["failed"] if pd.notna(row["failed"]) else 0)
        )
        rate = row["request_rate"]
        if closed is None and pd.isna(rate):
            raise ValueError("without its records nobody knows when a trace's requests were due")
        said = asking.read(row.get("asked"))
        odd = [name.replace("_", " ") for name in ("shared_prefix", "conversation", "request_rate_to", "trace") if said.get(name)]
        if odd:
            raise ValueError(f"without its records its {odd[0]} cannot be simulated")
        arrival = said.get("arrival", "poisson")
        due = [0.0] * len(asked) if closed else schedule(arrival, float(rate), len(asked), random.Random(0))
    if closed is None and any(math.isnan(at) for at in due):
        raise ValueError("requests of conversations wait for answers, which is not simulated")
    first = min(due) if closed is None else 0.0
    prompts = [Prompt(isl, osl, at - first if closed is None else 0.0) for (isl, osl), at in zip(asked, due, strict=True)]
    return Work(tuple(sorted(prompts, key=lambda prompt: prompt.due)), closed, Slo(**limits))


def _simulated(shared: tuple[Sequence[tuple[Layout, Work]], dict[str, Profile]], place: int) -> Simulated:
    cells, profiles = shared
    return simulate(*cells[place], profiles)


def predicted(rows: pd.DataFrame, profile_of: Callable[[str], str], profiles: dict[str, Profile], begin: Any) -> list[Checked]:
    """Return every cell of the rows, measured and predicted; ``begin(shared)`` is a pool as `pdbench.advise.pool` gives it."""
    listed = rows.to_dict("records")
    cells = [(layout_of(row, profile_of), work_of(row)) for row in listed]
    with begin((cells, profiles)) as spread:
        runs: list[Simulated] = _spread(spread, len(cells))
    keys = list(zip(*(sides.keyed(rows)[name] for name in ("load", "setup")), strict=True))
    grouped: dict[Any, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        grouped[key].append(place)
    found = []
    for places in grouped.values():
        row = listed[places[0]]
        found.append(
            Checked(
                sides.load_in_words(row), cells[places[0]][0].ratio, cells[places[0]][0].gpus,
                {name: statistics.fmean(float(listed[place][name]) for place in places) for name in (*FIGURES, GOODPUT)},
                {name: statistics.fmean(runs[place].figures[name] for place in places) for name in (*FIGURES, GOODPUT)},
                statistics.fmean(runs[place].queued for place in places) > 0.5, len(places),
            )
        )  # fmt: skip
    return found


def _spread(spread: Spread, count: int) -> list[Simulated]:
    return list(spread(_simulated, range(count)))


def winners(rows: pd.DataFrame, found: Sequence[Checked], figure: str = THROUGHPUT) -> Winners:
    """Return the loads whose measured winner, by a throughput per GPU, is decided: `pdbench compare` judges all together."""
    keyed = sides.keyed(rows)
    guess = {(cell.load, cell.ratio): cell.predicted[figure] / cell.gpus for cell in found}
    contests = []
    for _, at_load in keyed.groupby([keyed["load"].astype(str), "gpus"], sort=False):
        parts = [part for _, part in at_load.groupby("setup", sort=False)]
        if len(parts) > 1:
            parts.sort(key=lambda part: -float((part[figure] / part["gpus"].astype(float)).mean()))
            contests.append(parts)
    verdicts = [
        judge.judge(sides.runs(first, len(other)), sides.runs(other, len(first)), [f"{figure}_per_gpu"])
        for first, *others in contests
        for other in others
    ]
    judged = iter(judge.correct(verdicts))
    every, decided = [], []
    for parts in contests:
        names = [str(ratios.parse(str(part.iloc[0]["ratio"]))) for part in parts]
        load = sides.load_in_words(parts[0].iloc[0])
        every.append((load, names[0], max(names, key=lambda name: guess[load, name])))
        if all([next(judged).differences[0].better == "A" for _ in parts[1:]]):
            decided.append(every[-1])
    return Winners(every, decided)


def leave_one_out(rows: pd.DataFrame, fit: Callable[[pd.DataFrame], Profile], begin: Any) -> list[Checked]:
    """Return every cell predicted by a profile that ``fit`` made from the rows of all other ratios."""
    found = []
    for ratio in dict.fromkeys(rows["ratio"]):
        mine = rows["ratio"] == ratio
        if mine.all():
            raise ValueError("all rows are of one ratio: none is left to fit")
        name = f"without {ratio}"
        found += predicted(rows[mine].reset_index(drop=True), lambda host, name=name: name, {name: fit(rows[~mine])}, begin)  # type: ignore[misc]
    return found


def goal(found: Sequence[Checked]) -> str:
    """Return what winners are told by: goodput where all runs had limits, else throughput."""
    return GOODPUT if found and all(math.isfinite(cell.measured[GOODPUT]) for cell in found) else THROUGHPUT


def mean_error(found: Sequence[Checked], figure: str) -> float:
    """Return the mean absolute error, as a share; NaN without cells."""
    return statistics.fmean(abs(cell.error(figure)) for cell in found) if found else math.nan


def words(found: Sequence[Checked], who: Winners | None) -> str:
    """Return the table of cells and the errors in short."""
    head = ["load", "ratio", "runs", "tok/s measured", "predicted", "error", "TTFT p50 ms", "predicted", "error"]
    good = goal(found) == GOODPUT
    head += ["good/s", "predicted"] if good else []
    lines = []
    for cell in found:
        row = [cell.load, cell.ratio, str(cell.runs)]
        for figure in (THROUGHPUT, TTFT):
            row += [f"{cell.measured[figure]:,.0f}", f"{cell.predicted[figure]:,.0f}", f"{cell.error(figure):+.1%}"]
        row += [f"{cell.measured[GOODPUT]:.1f}", f"{cell.predicted[GOODPUT]:.1f}"] if good else []
        lines.append([*row, "saturated" if cell.saturated else ""])
    head.append("")
    widths = [max(len(row[i]) for row in [head, *lines]) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *lines]]
    free = [cell for cell in found if not cell.saturated]
    text += ["", f"mean absolute error of throughput: {mean_error(found, THROUGHPUT):.1%} ({len(found)} cells)"]
    if free:
        text.append(f"mean absolute error of p50 TTFT outside saturation: {mean_error(free, TTFT):.1%} ({len(free)} cells)")
    if who is not None and who.all:
        by = " by requests/s within the limits, per GPU" if good else ""
        text.append(
            f"right winners{by}: {right(who.decided)} of {len(who.decided)} loads whose winner is decided by measurement; of all "
            f"{len(who.all)} with several ratios, the highest figure was predicted in {right(who.all)}"
        )
    return "\n".join(text)


def to_json(found: Sequence[Checked], who: Winners | None, notes: Sequence[str] = ()) -> Json:
    """Return the same for programs."""
    free = [cell for cell in found if not cell.saturated]
    made = {
        "schema": 1,
        "cells": [
            {
                "load": cell.load, "ratio": cell.ratio, "gpus": cell.gpus, "runs": cell.runs, "saturated": cell.saturated,
                "measured": cell.measured, "predicted": cell.predicted,
                "error": {name: cell.error(name) for name in FIGURES},
            }
            for cell in found
        ],
        "throughput_error": mean_error(found, THROUGHPUT),
        "ttft_p50_error": mean_error(free, TTFT) if free else None,
        "notes": list(notes),
        "winners": {"all": [list(one) for one in who.all], "decided": [list(one) for one in who.decided]} if who else None,
    }  # fmt: skip
    return dict(_finite(made))


def _finite(value: Any) -> Any:
    """Return the same with null for what is no number."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
