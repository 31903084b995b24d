"""The list of requests of a load point: drawn in full, in order, before the first is sent."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pdbench.load.arrivals import schedule
from pdbench.load.lengths import Lengths
from pdbench.load.trace import Row


@dataclass(frozen=True)
class Request:
    """One request to send: its place in the list, lengths in tokens, and when (None: as soon as a slot is free)."""

    index: int
    isl: int
    osl: int
    due_s: float | None = None


@dataclass(frozen=True)
class Load:
    """What one load point sends.

    ``concurrency`` slots in a closed loop, or ``rate`` requests/s in an open one, or ``replay``: the trace's own
    arrival times multiplied by it. Exactly one of the three is set.
    """

    isl: Lengths | None
    osl: Lengths | None
    count: int
    seed: int
    rows: Sequence[Row] = ()
    concurrency: int | None = None
    rate: float | None = None
    arrival: str = "poisson"
    replay: float | None = None

    @property
    def open_loop(self) -> bool:
        """Tell whether requests go out on time whatever the server does."""
        return self.concurrency is None

    def measured(self) -> list[Request]:
        """Return the measured requests.

        Lengths depend on the seed alone, not on the load, so that points and deployments can be compared in pairs.
        """
        due: Sequence[float | None] = [None] * self.count
        if self.rate is not None:
            due = schedule(self.arrival, self.rate, self.count, random.Random(f"{self.seed}/arrivals"))
        elif self.replay is not None:
            due = [row.arrival_s * self.replay for row in self.rows[: self.count]]
        lengths = self._lengths(self.count, "lengths")
        return [Request(i, isl, osl, at) for i, ((isl, osl), at) in enumerate(zip(lengths, due, strict=True))]

    def warmup(self, count: int) -> list[Request]:
        """Return warm-up requests of the same kind, always for a closed loop."""
        return [Request(i, isl, osl) for i, (isl, osl) in enumerate(self._lengths(count, "warm-up lengths"))]

    def _lengths(self, count: int, stream: str) -> list[tuple[int, int]]:
        if self.rows:
            return [(row.isl, row.osl) for row in (self.rows[i % len(self.rows)] for i in range(count))]
        if self.isl is None or self.osl is None:
            raise ValueError("a load needs lengths or a trace")
        rng = random.Random(f"{self.seed}/{stream}")
        return [(self.isl.draw(rng), self.osl.draw(rng)) for _ in range(count)]
