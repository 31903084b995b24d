"""A profile fitted to rows of measured runs, for predictions of what was left out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from pdbench.fit.cases import Case, of_row, read, transport_of
from pdbench.fit.cli import simulator
from pdbench.fit.solve import fit
from pdbench.load.errors import LoadError
from pdbench.model.profile import Profile


def fitter(base: Profile) -> Callable[[pd.DataFrame], Profile]:
    """Return a function that fits ``base`` to rows of `check.read`; it raises LoadError."""

    def fitted(rows: pd.DataFrame) -> Profile:
        ratios = ", ".join(dict.fromkeys(map(str, rows["ratio"])))
        _say(f"fitting to {len(rows)} load points of {ratios}")
        with simulator() as simulated:
            return fit(base, cases(rows), simulated, _say).profile

    return fitted


def cases(rows: pd.DataFrame) -> list[Case]:
    """Return the load points of rows; of a table without runs, as far as it tells. Raise LoadError."""
    points = {folder: read(Path(folder)) for folder in dict.fromkeys(map(str, rows["folder"])) if folder}
    try:
        found = [
            points[str(row["folder"])][int(row["point"])] if row["folder"] else of_row(row) for row in rows.to_dict("records")
        ]
    except ValueError as why:
        raise LoadError(f"the table does not say enough to fit a profile to it: {why}") from None
    transport_of(found)
    return found


def _say(text: str) -> None:
    print(f"pdbench advise: {text}", file=sys.stderr, flush=True)
