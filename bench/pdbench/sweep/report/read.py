"""A sweep's folder, read for its report: the tidy table, and of the run folders what no table holds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from pdbench.compare import within
from pdbench.compare.judge import Run
from pdbench.compare.sides import slo_of
from pdbench.gate import calibrated
from pdbench.gate.rundata import RunData, summary_points
from pdbench.reading import json_in
from pdbench.sweep import tidy
from pdbench.sweep.report.choose import Decision, decisions, interval
from pdbench.sweep.report.data import GOODPUT, RATE, Cell, Config, Load, Row, Table, table
from pdbench.sweep.trust import Facts, Grade, grade

Json = dict[str, Any]

_NO_FIGURE = "no output tokens/s per GPU is known (imported without its number of GPUs?)"


@dataclass(frozen=True, eq=False)
class Sweep:
    """Everything that the report shows: ``about`` is sweep.json."""

    folder: Path
    about: Json
    rows: list[Row]
    table: Table
    decisions: list[Decision] = field(default_factory=list)
    grades: dict[tuple[Config, Load], Grade] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the sweep's name."""
        return str(self.about.get("name") or self.folder.resolve().name)

    def grade(self, cell: Cell) -> Grade:
        """Return how far a cell is to be trusted."""
        return self.grades[cell.config, cell.load]

    def run(self, row: Row) -> Path:
        """Return the folder of a row's run."""
        return self.folder / str(row.get("run") or "")

    @cached_property
    def plans(self) -> dict[Config, Json]:
        """Return a plan of each configuration, as far as its runs have one."""
        found: dict[Config, Json] = {}
        for cell in self.table.cells:
            for row in (*cell.rows, *cell.bad):
                if cell.config not in found and (plan := json_in(self.run(row) / "plan.json")).get("workers"):
                    found[cell.config] = plan
        return found

    @cached_property
    def cautions(self) -> list[str]:
        """Return what stands below every figure: that no GPU was used, or that a model is not whole."""
        runs = {config.label: RunData(self.folder, plan) for config, plan in self.plans.items()}
        emulated = {cell.config.label for cell in self.table.cells for row in cell.rows if row.get("emulated") is True}
        lines = ["this is a rehearsal, a sweep in short: it shows that the sweep runs, and measures nothing"] * bool(
            self.about.get("rehearsal")
        )
        for why, named in (
            ("the engine was emulated", emulated | {label for label, run in runs.items() if run.emulated}),
            ("the engine ran on a CPU", {label for label, run in runs.items() if run.no_gpu and not run.emulated}),
        ):
            if named:
                which = "" if named >= {config.label for config in self.table.configs} else f" ({', '.join(sorted(named))})"
                lines.append(f"{why}{which}: no GPU was used, these figures say nothing about hardware")
        cut = sorted({run.truncated for run in runs.values() if run.truncated})
        return [*lines, *(f"the model is not whole: {why}" for why in cut)]

    def manifests(self) -> Iterator[tuple[Row, Json]]:
        """Yield the manifest of every run, once."""
        seen = set()
        for row in self.rows:
            if row.get("run") and row["run"] not in seen:
                seen.add(row["run"])
                if found := json_in(self.run(row) / "manifest.json"):
                    yield row, found


def load(folder: Path) -> Sweep:
    """Read a sweep's folder; raise NotARun with what is wrong."""
    rows = plain(tidy.read(folder))
    cells = table(rows)
    sweep = Sweep(folder, json_in(folder / tidy.SWEEP), rows, cells)
    sweep.decisions.extend(decisions(cells, lambda cell: [_run(sweep, row) for row in cell.rows]))
    for cell in cells.cells:
        found = grade(_facts(sweep, cell))
        if cell.rows and cell not in cells.measured:
            found = Grade(found.letter, (_NO_FIGURE,))
        sweep.grades[cell.config, cell.load] = found
    return sweep


def plain(frame: pd.DataFrame) -> list[Row]:
    """Return the rows of a tidy table as plain values: None for whatever is missing."""
    return [
        {str(name): None if pd.isna(value) else value for name, value in row.items()}
        for row in frame.astype(object).to_dict("records")
    ]


def _run(sweep: Sweep, row: Row) -> Run:
    """Return a row as `pdbench compare` takes it, with its requests where its run has them."""
    requests = None
    with contextlib.suppress(OSError, ValueError):
        point = int(row["point"])
        requests = within.read(sweep.run(row), point, slo_of(sweep.run(row), point))
    told = requests.asked.tobytes() + str(row["asked"]).encode() if requests is not None else None
    seed = row.get("seed")
    return Run(
        int(row["repeat"]),
        {name: math.nan if row.get(name) is None else float(row[name]) for name in (RATE, GOODPUT)},
        None if seed is None else int(seed),
        told,
        requests,
    )


def _facts(sweep: Sweep, cell: Cell) -> Facts:
    measured = cell in sweep.table.measured
    notes = dict.fromkeys(note for row in cell.rows for note in str(row.get("notes") or "").split("; ") if note)
    return Facts(
        valid=len(cell.rows) if measured else 0,
        invalid=len(cell.bad),
        completed=sum(int(row.get("completed") or 0) for row in cell.rows),
        half_width=interval(cell, sweep.table.under(cell.load), sweep.table.goal).half_width if measured else None,
        calibrated=bool(cell.rows) and all(_calibrated(sweep, row) for row in cell.rows),
        imported=any(str(row.get("source")).startswith(tidy.IMPORTED) for row in cell.rows),
        notes=tuple(notes),
    )


def _calibrated(sweep: Sweep, row: Row) -> bool:
    """Tell whether the run's load generator was found good beside a server of known timing (the gate's check says)."""
    checks = json_in(sweep.run(row) / "validity.json").get("checks") or []
    mine = [check for check in checks if check.get("id") == calibrated.ID and check.get("point") in (None, row.get("point"))]
    return bool(mine) and all(check.get("ok") and "selfcheck" in (check.get("evidence") or {}) for check in mine)


def attribution(sweep: Sweep, cell: Cell) -> Json | None:
    """Return how the TTFT of the cell's first valid repeat splits into stages; None where its run does not say."""
    for row in cell.rows:
        points = summary_points(json_in(sweep.run(row) / "summary.json"))
        found = next((p.get("attribution") for i, p in enumerate(points) if p.get("point", i) == row.get("point")), None)
        if isinstance(found, dict):
            return found
    return None
