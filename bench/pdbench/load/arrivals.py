"""When requests are sent in an open loop: a schedule fixed before the first one goes out."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pdbench.load.errors import LoadError

#: the spellings of an arrival process, for help and for messages
ARRIVALS = "poisson, constant, or gamma:B (burstiness B: 1 is poisson, below 1 comes in bursts, above 1 is more even)"


def check_arrival(text: str) -> None:
    """Raise LoadError unless ``text`` spells an arrival process."""
    _gaps(text, random.Random(0))


@dataclass(frozen=True)
class Rate:
    """``rate`` requests/s; with ``to``, a ramp: it changes linearly from ``rate`` to ``to`` within ``ramp_s`` seconds."""

    rate: float
    to: float | None = None
    ramp_s: float = 0.0

    def when(self, expected: float) -> float:
        """Return the second at which ``expected`` requests are due on average: the rate's integral, inverted.

        With r(t) = a + (b - a) t / T the integral is a t + (b - a) t^2 / 2T; after T the rate stays b.
        """
        a, b = self.rate, self.rate if self.to is None else self.to
        on_ramp = (a + b) / 2 * self.ramp_s
        if expected >= on_ramp:
            return self.ramp_s + (expected - on_ramp) / b
        slope = (b - a) / self.ramp_s
        # The form without cancellation of a^2 against its own root, which would lose digits at small slopes.
        return 2 * expected / (a + math.sqrt(a * a + 2 * slope * expected))


def schedule(arrival: str, rate: float | Rate, count: int, rng: random.Random) -> list[float]:
    """Return ``count`` due times in seconds, the first at 0, ascending.

    Gaps are independent, of mean 1/rate (rate in requests/s): ``constant``: all the same; ``poisson``: exponential;
    ``gamma:B``: of a gamma distribution with shape B, whose coefficient of variation is 1/sqrt(B). On a ramp the same
    gaps are stretched by the rate of the moment, which keeps a Poisson process one.
    """
    pace = _pace(rate)
    return [pace.when(at) for at in itertools.islice(_arrivals(arrival, rng), count)]


def schedule_for(arrival: str, rate: float | Rate, seconds: float, rng: random.Random) -> list[float]:
    """Return the due times below ``seconds`` of the schedule that `schedule` returns."""
    pace = _pace(rate)
    return list(itertools.takewhile(lambda due: due < seconds, map(pace.when, _arrivals(arrival, rng))))


def _pace(rate: float | Rate) -> Rate:
    pace = rate if isinstance(rate, Rate) else Rate(rate)
    for value in (pace.rate, pace.rate if pace.to is None else pace.to):
        if not 0 < value < math.inf:
            raise LoadError(f"a request rate must be above 0, not {value:g}")
    return pace


def _arrivals(arrival: str, rng: random.Random) -> Iterator[float]:
    return itertools.accumulate(_gaps(arrival, rng), initial=0.0)


def _gaps(arrival: str, rng: random.Random) -> Iterator[float]:
    """Return gaps of mean 1, without end."""
    if arrival == "constant":
        return itertools.repeat(1.0)
    if arrival == "poisson":
        return iter(lambda: rng.expovariate(1.0), None)
    match = re.fullmatch(r"gamma:(\d+(?:\.\d+)?)", arrival, re.ASCII)
    shape = float(match[1]) if match else 0.0
    if not 0.001 <= shape <= 1e6:
        raise LoadError(f"{arrival!r} is no arrival process; write {ARRIVALS}")
    return iter(lambda: rng.gammavariate(shape, 1 / shape), None)
