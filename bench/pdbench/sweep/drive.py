"""The sweep itself: cell after cell, whatever happens to one of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pdbench.sweep.grid import Cell
from pdbench.sweep.journal import FAILED, FINISHED, Journal


@dataclass(frozen=True)
class Ended:
    """How a play ended: ``how`` is one of the journal's ends, ``why`` the reason where it is not `finished`."""

    how: str = FINISHED
    why: str = ""


class Driver(Protocol):
    """What measures; in tests, something that plays it."""

    def deploy(self, cell: Cell, folder: Path) -> Ended:
        """Bring the cell's deployment up; ``folder``: the attempt's, for the log."""

    def measure(self, cell: Cell, repeat: int, folder: Path) -> Ended:
        """Load it; what was recorded lies in ``folder`` afterwards, also when it is not valid."""

    def fetch_ahead(self, cell: Cell) -> None:
        """Begin to fetch the cell's model; nothing waits for it but the cell's own deploy."""


class View(Protocol):
    """Who is told how far it is."""

    def doing(self, verb: str, cell: Cell, repeat: int, attempt: int) -> None:
        """A play begins."""

    def done(self, verb: str, cell: Cell, repeat: int, seconds: float, ended: Ended) -> None:
        """A play ended."""


def run_folder(cell: str, repeat: int, attempt: int) -> str:
    """Return where an attempt's run lies, relative to the sweep's folder."""
    return f"runs/{cell}/r{repeat}a{attempt}"


class Sweep:
    """One pass over what is not measured yet."""

    def __init__(
        self, folder: Path, cells: Sequence[Cell], order: Sequence[tuple[str, int]], journal: Journal, driver: Driver, view: View
    ):
        """``order``: (cell id, repeat) in turn."""
        self.folder, self.journal, self.driver, self.view = folder, journal, driver, view
        self.cells = {cell.id: cell for cell in cells}
        measured = journal.measured()
        self.left = [one for one in order if one not in measured]
        #: the deployment that is up; "" when that is not known
        self.at = ""
        #: the deployment that would not come up for the cell before; "" when it did
        self.broken = ""
        #: whether the last attempt failed to deploy
        self.undeployed = False

    def run(self, retries: int, fetch_ahead: bool = True) -> None:
        """Measure all that is left, each with up to ``retries`` more attempts; a cell that stays bad does not stop the rest."""
        for place, (name, repeat) in enumerate(self.left):
            cell = self.cells[name]
            if self.broken != cell.deployment:
                self.broken = ""
            following = self._next_model(place) if fetch_ahead else None
            for _ in range(retries + 1):
                if self._attempt(cell, repeat, following) == FINISHED or self.broken:
                    break
            else:
                self.broken = cell.deployment if self.undeployed else ""
        self.journal.write("ended")

    def _next_model(self, place: int) -> Cell | None:
        """Return the next cell of another deployment, if that has another model."""
        here = self.cells[self.left[place][0]]
        for name, _ in self.left[place + 1 :]:
            if self.cells[name].deployment != here.deployment:
                other = self.cells[name]
                same = other.deploy.get("model") == here.deploy.get("model") or other.inventory != here.inventory
                return None if same else other
        return None

    def _attempt(self, cell: Cell, repeat: int, following: Cell | None) -> str:
        attempt = self.journal.attempts(cell.id, repeat) + 1
        run = run_folder(cell.id, repeat, attempt)
        about = {"cell": cell.id, "repeat": repeat, "attempt": attempt, "run": run}
        if self.broken:
            why = "its deployment failed for the cell before (evidence in that one's folder)"
            self.journal.write(FAILED, **about, seconds=0.0, why=why)
            self.view.done("deploy", cell, repeat, 0.0, Ended(FAILED, why))
            return FAILED
        (self.folder / run).mkdir(parents=True, exist_ok=True)
        self.journal.write("started", **about)
        began = time.monotonic()
        ended = self._deployed(cell, repeat, attempt, run)
        if ended.how == FINISHED:
            if following is not None:
                self.driver.fetch_ahead(following)
            self.view.doing("bench", cell, repeat, attempt)
            start = time.monotonic()
            ended = self.driver.measure(cell, repeat, self.folder / run)
            self.view.done("bench", cell, repeat, time.monotonic() - start, ended)
            if ended.how != FINISHED:
                # The next attempt deploys again: that starts what died.
                self.at = ""
        self.journal.write(ended.how, **about, seconds=round(time.monotonic() - began, 1), why=ended.why)
        return ended.how

    def _deployed(self, cell: Cell, repeat: int, attempt: int, run: str) -> Ended:
        if self.at == cell.deployment:
            return Ended()
        self.at = ""
        self.undeployed = True
        self.view.doing("deploy", cell, repeat, attempt)
        start = time.monotonic()
        ended = self.driver.deploy(cell, self.folder / run)
        seconds = time.monotonic() - start
        self.view.done("deploy", cell, repeat, seconds, ended)
        if ended.how == FINISHED:
            self.journal.write("deployed", cell=cell.id, repeat=repeat, attempt=attempt, seconds=round(seconds, 1))
            self.at, self.undeployed = cell.deployment, False
            return ended
        return Ended(FAILED, f"deploy: {ended.why}")
