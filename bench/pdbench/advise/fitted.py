"""A profile fitted to rows of measured runs, for predictions of what was left out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from pdbench.fit.cases import Case, read
from pdbench.fit.cli import simulator
from pdbench.fit.solve import fit
from pdbench.load.errors import LoadError
from pdbench.model.profile import Profile


def fitter(base: Profile) -> Callable[[pd.DataFrame], Profile]:
    """Return a function that fits ``base`` to rows of `check.read`; it raises LoadError where a row has no run's folder."""

    def fitted(rows: pd.DataFrame) -> Profile:
        ratios = ", ".join(dict.fromkeys(map(str, rows["ratio"])))
        _say(f"fitting to {len(rows)} load points of {ratios}")
        with simulator() as simulated:
            return fit(base, cases(rows), simulated, _say).profile

    return fitted


def cases(rows: pd.DataFrame) -> list[Case]:
    """Return the load points of rows, those that moved KV caches first: the latency that is fitted is that of their transport."""
    if not all(rows["folder"]):
        raise LoadError("a profile is fitted to runs, and a .csv has none: give --check the sweep's folder")
    points = {folder: read(Path(folder)) for folder in dict.fromkeys(map(str, rows["folder"]))}
    found = [points[str(folder)][int(point)] for folder, point in zip(rows["folder"], rows["point"], strict=True)]
    if len({case.transport for case in found if case.decode}) > 1:
        raise LoadError("the runs' KV caches went over different transports: check those of one way at a time")
    return sorted(found, key=lambda case: not case.decode)


def _say(text: str) -> None:
    print(f"pdbench advise: {text}", file=sys.stderr, flush=True)
