"""When requests are sent in an open loop: a schedule fixed before the first one goes out."""

from __future__ import annotations

import random

from pdbench.load.errors import LoadError

ARRIVALS = ("poisson", "constant")


def schedule(arrival: str, rate: float, count: int, rng: random.Random) -> list[float]:
    """Return ``count`` due times in seconds, the first at 0, ascending.

    ``poisson``: independent exponential gaps of mean 1/rate; ``constant``: every gap is 1/rate (rate in requests/s).
    """
    if arrival not in ARRIVALS:
        raise LoadError(f"unknown arrival process {arrival!r}; one of: {', '.join(ARRIVALS)}")
    if not rate > 0:
        raise LoadError(f"a request rate must be above 0, not {rate:g}")
    if arrival == "constant":
        return [i / rate for i in range(count)]
    due, now = [], 0.0
    for _ in range(count):
        due.append(now)
        now += rng.expovariate(rate)
    return due
