"""The loads of the study of changing ratios: a trace, and a synthetic day, both as heavy as is asked for."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from pdbench.advise.simulate import redrawn
from pdbench.load.lengths import Lengths
from pdbench.load.trace import Row
from pdbench.model.cluster import Prompt
from pdbench.model.rates import Rates

#: the two kinds of the day: (prompt, answer) in tokens
PREFILL_HEAVY = ("lognormal:6000:0.6", "lognormal:80:0.5")
DECODE_HEAVY = ("lognormal:500:0.6", "lognormal:500:0.5")
HOURS = 24


def gpu_seconds(rates: Rates, isl: int, osl: int, itl_s: float) -> tuple[float, float]:
    """Return the seconds of a prefill worker and of a decode worker that a request takes.

    A decode step is shared by as many requests as keep it within 80 % of the promised ``itl_s``, at this request's mean context;
    the front-end process may take longer than its share of the step.
    """
    context, engine = isl + osl // 2, rates.profile.engine
    room = min(engine.max_running_requests, rates.capacity_tokens() // context)
    # Steps take longer with every request: the largest batch in time is found by halving.
    most = max(1, bisect_right(range(1, room + 1), 0.8 * itl_s, key=lambda batch: rates.decode_s(batch, batch * context)))
    step = rates.decode_s(most, most * context) / most
    return rates.prefill_s([(isl, 0)]), osl * max(step, engine.frontend_us_per_token / 1e6)


@dataclass(frozen=True)
class Trace:
    """A trace's minutes, redrawn for every seed, as many times over as the load needs."""

    rows: tuple[Row, ...]
    window_s: float = 300.0
    name: str = "trace"

    def prompts(self, rates: Rates, workers: int, load: float, itl_s: float, seed: int) -> list[Prompt]:
        """Return requests that take ``load`` of the time of so many workers, on average."""
        lasts = self.rows[-1].arrival_s
        costs = {size: sum(gpu_seconds(rates, *size, itl_s)) for size in {_rounded(row) for row in self.rows}}
        need = sum(costs[_rounded(row)] for row in self.rows)
        times = load * workers * lasts / need
        rows = redrawn(self.rows, random.Random(f"trace/{seed}"), times)
        return [Prompt(row.isl, row.osl, row.arrival_s) for row in rows]


def _rounded(row: Row) -> tuple[int, int]:
    """Return a row's lengths, roughly: costs of 12,000 different ones need not be known."""
    return max(500, round(row.isl, -3)), max(50, round(row.osl, -2))


@dataclass(frozen=True)
class Day:
    """Twenty-four hours of ``hour_s`` seconds: from decode-heavy at night to prefill-heavy at noon and back, always as heavy."""

    hour_s: float = 120.0
    name: str = "day"

    @property
    def window_s(self) -> float:
        """Return how long the load stays about the same."""
        return self.hour_s

    def share(self, at: float) -> float:
        """Return the share of the workers' time that goes to prefill-heavy requests: 0 to 1, steep at 6 and 18 o'clock."""
        phase = math.sin(2 * math.pi * (at / (HOURS * self.hour_s) - 0.25))
        return 0.5 + 0.5 * math.tanh(2.5 * phase) / math.tanh(2.5)

    def prompts(self, rates: Rates, workers: int, load: float, itl_s: float, seed: int) -> list[Prompt]:
        """Return requests that take ``load`` of the time of so many workers, on average."""
        rng = random.Random(f"day/{seed}")
        kinds = []
        for isl, osl in (PREFILL_HEAVY, DECODE_HEAVY):
            sample = random.Random("costs")
            drawn = [(Lengths.parse(isl).draw(sample), Lengths.parse(osl).draw(sample)) for _ in range(200)]
            cost = sum(sum(gpu_seconds(rates, *size, itl_s)) for size in drawn) / len(drawn)
            kinds.append((Lengths.parse(isl), Lengths.parse(osl), load * workers / cost))
        found = []
        ends = HOURS * self.hour_s
        for number, (isl_drawn, osl_drawn, rate) in enumerate(kinds):
            at = 0.0
            while (at := at + rng.expovariate(rate)) < ends:  # thinned: Lewis and Shedler 1979
                share = self.share(at)
                if rng.random() < (share if number == 0 else 1 - share):
                    found.append(Prompt(isl_drawn.draw(rng), osl_drawn.draw(rng), at))
        return sorted(found, key=lambda prompt: prompt.due)


def windows(prompts: Sequence[Prompt], length_s: float) -> list[list[Prompt]]:
    """Return the requests of each window, by when they are due."""
    found: list[list[Prompt]] = [[] for _ in range(int(prompts[-1].due // length_s) + 1)]
    for prompt in prompts:
        found[int(prompt.due // length_s)].append(prompt)
    return found
