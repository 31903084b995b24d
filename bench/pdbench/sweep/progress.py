"""One view of a sweep that runs: a line that is rewritten on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from pdbench.sweep.drive import Ended
from pdbench.sweep.estimate import Remaining
from pdbench.sweep.grid import Cell
from pdbench.sweep.journal import FINISHED
from pdlib.tables import duration

#: Between plain lines while a play goes on; between rewrites of the line on a terminal.
_PLAIN_S, _LIVE_S = 60.0, 0.5


class Progress:
    """Told by the sweep what begins and ends; `tick` comes several times a second while a play runs."""

    def __init__(
        self,
        left: Sequence[tuple[str, int]],
        of: int,
        remaining: Remaining,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """``left``: (cell, repeat) to measure; ``of``: all of the sweep, those of earlier sessions included."""
        self.left, self.of, self.remaining = list(left), of, remaining
        self.out, self.clock = out or sys.stdout, clock
        self.live = self.out.isatty()
        self.shown = self.began = clock()
        self.verb, self.now = "", ("", 0)
        self.bad = 0

    def doing(self, verb: str, cell: Cell, repeat: int, attempt: int) -> None:
        """A play begins."""
        self.left = self.left[self.left.index((cell.id, repeat)) :] if (cell.id, repeat) in self.left else self.left
        again = f", attempt {attempt}" if attempt > 1 else ""
        self.verb, self.now, self.began = f"{verb} {cell.id} (round {repeat}{again})", (cell.id, repeat), self.clock()
        if self.live:
            self._rewrite("")
        else:
            self._say(f"{self._head()}  {self.verb}")

    def tick(self, line: str) -> None:
        """Show the play's last line, now and then."""
        if self.clock() - self.shown < (_LIVE_S if self.live else _PLAIN_S):
            return
        if self.live:
            self._rewrite(line)
        else:
            self._say(f"{self._head()}  {self.verb}: {line}")

    def done(self, verb: str, cell: Cell, repeat: int, seconds: float, ended: Ended) -> None:
        """A play ended."""
        self.now = ("", 0)
        if ended.how == FINISHED:
            self.remaining.took(verb, cell.id, repeat, seconds)
            if verb == "bench":
                self.left = [one for one in self.left if one != (cell.id, repeat)]
            else:
                self.remaining.deploys[cell.id, repeat] = 0.0
        said = "valid" if verb == "bench" else "up"
        what = said if ended.how == FINISHED else f"{ended.how.upper()}: {ended.why}"
        if verb == "bench" or ended.how != FINISHED or not self.live:
            self._say(f"{self._head()}  {verb} {cell.id} (round {repeat}): {what}, {duration(seconds)}")

    def _head(self) -> str:
        done = self.of - len(self.left)
        left = self.remaining.seconds(self.left)
        if self.left and self.left[0] == self.now:
            left = max(0.0, left - (self.clock() - self.began))
        return f"[{done}/{self.of}  {duration(left)} left]"

    def _say(self, text: str) -> None:
        self.out.write(("\r\033[K" if self.live else "") + text + "\n")
        self.out.flush()
        self.shown = self.clock()

    def _rewrite(self, line: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        done = self.of - len(self.left)
        bar = "#" * (20 * done // self.of) if self.of else ""
        text = f"[{bar:<20}] {self._head()} {self.verb}" + (f"  {line}" if line else "")
        self.out.write("\r\033[K" + text[:width])
        self.out.flush()
        self.shown = self.clock()
