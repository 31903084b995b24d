"""Student's t, central and not, and what is built on it: p-values, intervals, Holm's correction, the size of an experiment.

scipy is not needed for that: with S the scaled chi of ``df`` degrees of freedom, P(T > t) = E[ Phi(delta - t S) ], one
integral for every use here (Johnson, Kotz and Balakrishnan, "Continuous Univariate Distributions", vol. 2, chapter 31).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from pdbench.intervals import Floats

LEVEL = 0.95
POWER = 0.8
#: repeats beyond which a recommendation is no help any more
MOST = 200
_HALF = math.sqrt(0.5)


@functools.lru_cache(maxsize=512)
def _chi(df: float) -> tuple[Floats, Floats]:
    """Return places of S = sqrt(chi2 / df) and their probabilities (trapezoids in log S, far into both tails)."""
    logs = np.linspace(-18.0, math.log(1 + 12 / math.sqrt(df)) + 0.5, 400)
    squares = np.exp(2 * logs)
    density = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2) + df * logs - df / 2 * squares
    weights = np.exp(density) * (logs[1] - logs[0])
    return np.sqrt(squares), weights / weights.sum()


def above(t: float, df: float, shift: float = 0.0) -> float:
    """Return P(T > t) of Student's t with ``df`` > 0 degrees of freedom and non-centrality ``shift``."""
    places, weights = _chi(df)
    tail = np.fromiter(map(math.erfc, ((t * places - shift) * _HALF).tolist()), dtype=np.float64, count=len(places))
    return min(1.0, float(tail @ weights) / 2)


def p_value(estimate: float, error: float, df: float) -> float:
    """Return the two-sided p-value of an estimate with a standard error; 1 when both are 0."""
    if error == 0:
        return 1.0 if estimate == 0 else 0.0
    return min(1.0, 2 * above(abs(estimate) / error, df))


@functools.lru_cache(maxsize=512)
def quantile(tail: float, df: float) -> float:
    """Return the t that is exceeded with probability ``tail`` (below 1/2)."""
    low, high = 0.0, 2.0
    while above(high, df) > tail:
        low, high = high, high * 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle, df) > tail else (low, middle)
    return (low + high) / 2


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's method, in their order (Scandinavian Journal of Statistics 6, 1979).

    Claiming what is at most 0.05 makes a false claim among all of them in at most 5 % of cases, however they depend.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, least = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = least
    return adjusted


def largest_spread(spread: float, df: float) -> float:
    """Return the upper 80 % limit of a standard deviation that was estimated with ``df`` degrees of freedom.

    A pilot's own estimate is too small half of the time, and the experiment planned with it too small then (Browne,
    Statistics in Medicine 14, 1995).
    """
    places, weights = _chi(df)
    return spread / float(places[int(np.searchsorted(np.cumsum(weights), 1 - POWER))])


def repeats(effect: float, spread: float, family: int, least: int) -> int | None:
    """Return how many pairs of runs show a difference of ``effect`` with 80 % power; None: more than `MOST`.

    ``spread``: standard deviation of the difference between two runs of a pair, in the unit of ``effect``; ``family``: how
    many figures Holm's method judges together (as if it divided the level by all of them, which it does at worst);
    ``least``: where to begin.
    """
    if spread == 0:
        return least

    def power(count: int) -> float:
        bar = quantile((1 - LEVEL) / 2 / family, count - 1)
        return above(bar, count - 1, effect / spread * math.sqrt(count))

    if power(MOST) < POWER:
        return None
    low, high = least, MOST
    while low < high:  # more runs, more power
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle + 1, high)
    return low
