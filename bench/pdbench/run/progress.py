"""progress.json for whoever watches the folder, and a line on stderr for whoever watches the terminal."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from pdbench.records import write_json

_FILE_S = 1.0
_LINE_EVERY = 5


@dataclass
class Progress:
    """Where a run stands.

    ``point`` counts from 1, ``label`` names its load; done and failed count within the phase that runs. ``message`` is the
    reason of a failure; while it is empty, the file shows the terminal's line in its place.
    """

    path: Path
    points: int
    state: str = "warmup"
    point: int = 1
    done: int = 0
    total: int = 0
    failed: int = 0
    label: str = ""
    message: str = ""
    last_due_s: float | None = None

    def __post_init__(self) -> None:
        """Start the clocks."""
        self._start = self._phase_start = perf_counter()

    def phase(self, state: str, point: int, total: int, label: str, last_due_s: float | None = None) -> None:
        """Begin a phase of ``total`` requests; ``last_due_s`` is when an open loop sends its last one."""
        self.state, self.point, self.total, self.label = state, point, total, label
        self.done = self.failed = 0
        self.last_due_s = last_due_s
        self._phase_start = perf_counter()

    def eta_s(self) -> float | None:
        """Return the seconds left in the phase that runs, None while nothing is known."""
        if self.state not in ("warmup", "running"):
            return 0.0
        spent = perf_counter() - self._phase_start
        by_count = spent / self.done * (self.total - self.done) if self.done else None
        if self.last_due_s is None:
            return by_count
        return max(0.0, self.last_due_s - spent)

    def snapshot(self) -> dict[str, object]:
        """Return progress.json."""
        eta = self.eta_s()
        return {
            "state": self.state,
            "point": self.point,
            "points": self.points,
            "done": self.done,
            "total": self.total,
            "failed": self.failed,
            "elapsed_s": round(perf_counter() - self._start, 3),
            "eta_s": None if eta is None else round(eta, 1),
            "message": self.message or self.line(),
        }

    def line(self) -> str:
        """Return the line for the terminal."""
        eta = self.eta_s()
        left = "" if not eta else f", {eta:.0f} s left"
        bad = f", {self.failed} failed" if self.failed else ""
        where = f"point {self.point}/{self.points} {self.label}: " if self.label else ""
        return f"{where}{self.state} {self.done}/{self.total}{bad}{left}"

    def write(self) -> None:
        """Replace progress.json; raise OSError."""
        write_json(self.path, self.snapshot())

    async def keep(self) -> None:
        """Write the file every second and the line every 5 s, until cancelled; raise OSError (disk full)."""
        beats = 0
        while True:
            # In a thread: a slow disk must not hold up the stamps of the hot path.
            await asyncio.to_thread(self.write)
            await asyncio.sleep(_FILE_S)
            beats += 1
            if beats % _LINE_EVERY == 0:
                print(f"pdbench: {self.line()}", file=sys.stderr, flush=True)
