"""How long a sweep takes: assumed before it starts, measured from then on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pdbench.sweep.order import Cost
from pdlib import bench_load

#: Assumed until something was measured: seconds for one output token of one request and for one token of its prompt, ...
TOKEN_S, PROMPT_TOKEN_S = 0.015, 0.0001
#: ... for what bench.yml does around the load (warm-up, selfcheck, fetching, report), for a deploy that restarts nothing, ...
BENCH_S, DEPLOY_S = 20.0, 8.0
#: ... for workers to come up, all of a deploy at the same time, and for a model that lies in no cache.
START_S, START_EMULATED_S, MODEL_S = 90.0, 3.0, 120.0


def load_s(load: Mapping[str, Any]) -> float:
    """Return how long a load may take, its points one after the other; ``load``: typed ``bench_*`` settings."""
    prompt, answer = bench_load.tokens(load)
    each = prompt * PROMPT_TOKEN_S + answer * TOKEN_S
    took = BENCH_S
    for point in bench_load.points(load):
        took += point.requests / point.rate if point.rate else each * -(-point.requests // (point.concurrency or 32))
    return took


def deploy_s(cost: Cost, emulated: bool) -> float:
    """Return how long a deploy may take."""
    if not cost.deploys:
        return 0.0
    start = START_EMULATED_S if emulated else START_S
    return DEPLOY_S + (start if cost.workers else 0.0) + (0.0 if emulated else MODEL_S * cost.models)


class Remaining:
    """Time left: what is assumed for cells and deploys yet to come, corrected by how long those done really took."""

    def __init__(self, cells: Mapping[str, float], deploys: Mapping[tuple[str, int], float]):
        """``cells``: assumed seconds of a cell's load; ``deploys``: (cell, repeat) -> assumed seconds of the deploy before it."""
        self.cells, self.deploys = dict(cells), dict(deploys)
        self.seen: dict[str, list[tuple[float, float]]] = {"bench": [], "deploy": []}
        self.own: dict[str, float] = {}
        self.installed: set[str] = set()

    def took(self, verb: str, cell: str, repeat: int, seconds: float) -> None:
        """Learn from a play that ended well."""
        assumed = self.cells[cell] if verb == "bench" else self.deploys.get((cell, repeat), 0.0)
        if verb not in self.installed:
            # A session's first deploy and first run may install things, which the others do not.
            self.installed.add(verb)
            return
        if assumed > 0:
            self.seen[verb].append((assumed, seconds))
        if verb == "bench":
            self.own[cell] = seconds

    def _factor(self, verb: str) -> float:
        assumed, measured = (sum(pair[i] for pair in self.seen[verb]) for i in (0, 1))
        return measured / assumed if assumed else 1.0

    def seconds(self, left: Iterable[tuple[str, int]]) -> float:
        """Return the time that ``left`` will take: a cell measured before takes as long again."""
        bench, deploy = self._factor("bench"), self._factor("deploy")
        return sum(
            self.own.get(cell, self.cells[cell] * bench) + self.deploys.get((cell, repeat), 0.0) * deploy for cell, repeat in left
        )
