"""How far a figure can be trusted: 95 % confidence intervals of means, percentiles and shares.

Requests of one run are not independent: they share batches, queues and bursts, and the gaps of one answer share its
request. Intervals that take them for independent are too narrow, so those below measure the dependence instead, from
the same 20 *batches*: runs of requests that were sent one after the other.

- **Means: batch means** (Schmeiser, "Batch size effects in the analysis of simulation output", Operations Research 30,
  1982: 10 to 30 batches suffice; Law, "Simulation Modeling and Analysis", 5th ed., section 9.5.3). Not a block bootstrap,
  which needs the same choice of blocks, costs a thousand resamplings of millions of gaps, and gives no narrower truth.
  Batches of unequal size enter as a ratio (Cochran, "Sampling Techniques", 3rd ed., section 2.11). Where a run is short for
  its queues, neighbouring batches are alike: the variance is widened by their correlation (Bayley and Hammersley, JRSS
  Supplement 8, 1946; so does Skart: Tafazzoli et al., INFORMS Journal on Computing 23, 2011), with fewer degrees of freedom.
  Fewer and longer batches hold the truth less often, and leaving out the runs whose batches are alike leaves the lucky ones.
- **Percentiles: order statistics** whose ranks come from the binomial distribution (David and Nagaraja, "Order Statistics",
  3rd ed., section 7.1), for the *effective* number of samples: as many independent ones as would tell the share of "is at
  most the percentile" as well (Woodruff, JASA 47, 1952). An end that the samples do not bound is None.
- **Shares: Wilson's score interval** (JASA 22, 1927; Brown, Cai and DasGupta, Statistical Science 16, 2001).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: the same for a reader of figures
IN_SHORT = (
    "Means: batch means over 20 runs of requests that were sent one after the other, widened where neighbouring ones are "
    "alike. Percentiles: order statistics by the "
    "binomial distribution, for as many samples as those batches show to be independent; … is an end that the samples "
    "do not bound. Shares: Wilson's score interval."
)
LEVEL = 0.95
BATCHES = 20
#: (low, high), each None where the samples do not bound it
Interval = tuple[float | None, float | None]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_Z = 1.959963984540054
#: Student's t at 97.5 % for 1 to 19 degrees of freedom
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)
#: standard deviations beyond which a binomial distribution has nothing left
_FAR = 9.0
_TAIL = (1 - LEVEL) / 2
#: correlation of neighbouring batches, at most: from there on, a run is one piece of luck
_ALIKE = 0.9
#: log of the factor to each side from which a mean counts as not bounded above
_MOST = math.log(10)
#: values that are apart by so much of themselves are the same but for rounding
_SAME = 1e-9


def wilson(good: float, sent: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, ``good`` of ``sent`` independent ones; (0, 1) when nothing was sent."""
    if sent <= 0:
        return 0.0, 1.0
    share, weight = good / sent, _Z * _Z / sent
    middle = (share + weight / 2) / (1 + weight)
    half = _Z * math.sqrt(share * (1 - share) / sent + weight / (4 * sent)) / (1 + weight)
    return (0.0 if good == 0 else middle - half), (1.0 if good == sent else middle + half)


def batches(requests: int) -> Ints:
    """Return the batch of each of so many requests, in the order of sending: 20 batches as equal as can be."""
    count = min(BATCHES, requests)
    return np.arange(requests, dtype=np.int64) * count // max(1, requests)


def widening(batches: Floats) -> float:
    """Return by how much the variance of the mean of batches in a row exceeds that of independent ones: 1 to 19.

    (1 + r) / (1 - r) of the correlation r of neighbours, which is corrected for its bias (Kendall, Biometrika 41, 1954).
    """
    off = batches - batches.mean()
    square = float(off @ off)
    if not square > 0:
        return 1.0
    found = float(off[1:] @ off[:-1]) / square
    same: float = min(max(0.0, found + (1 + 4 * found) / off.size), _ALIKE)
    return (1 + same) / (1 - same)


def _half(values: Floats, batch: Ints) -> float | None:
    """Return half of the mean's 95 % interval by batch means (a ratio estimate); None with fewer than two batches."""
    sizes, sums = np.bincount(batch), np.bincount(batch, weights=values)
    off = (sums - values.mean() * sizes)[sizes > 0]
    count = off.size
    if count < 2:
        return None
    wider = widening(off)
    df = max(1, math.floor(count / wider) - 1)
    total = math.sqrt(count / (count - 1) * float(off @ off) * wider)
    return _T[min(df, len(_T)) - 1] * total / values.size


def of_mean(values: Floats, batch: Ints) -> Interval | None:
    """Return the interval of the mean; None with fewer than two batches. ``batch`` names the batch of each value.

    Of values that are never below 0 it is symmetric on the log scale: queues are seen short more often than long.
    """
    half = _half(values, batch) if values.size else None
    if half is None:
        return None
    mean = float(values.mean())
    if values.min() < 0 or mean == 0:
        return mean - half, mean + half
    factor = math.exp(min(half / mean, _MOST))
    return mean / factor, mean * factor if half / mean < _MOST else None


def independent(values: Floats, batch: Ints) -> float:
    """Return how many independent values would tell the mean as well as these do, from 1 to their number.

    Degrees of freedom enter as in Korn and Graubard, Survey Methodology 24, 1998.
    """
    half = _half(values, batch) if values.size else None
    if not half or half <= _SAME * abs(float(values.mean())):
        return float(values.size)
    return min(float(values.size), max(1.0, float(values.var()) * (_Z / half) ** 2))


def between(shares: Sequence[float]) -> float:
    """Return how many independent requests would tell a share as well as runs that found these do; at least one.

    Infinite where they are all the same.
    """
    found = np.array(shares)
    half = _T[min(found.size - 1, len(_T)) - 1] * float(found.std(ddof=1)) / math.sqrt(found.size) if found.size > 1 else 0.0
    mean = float(found.mean()) if found.size else 0.0
    return max(1.0, mean * (1 - mean) * (_Z / half) ** 2) if half > 0 else math.inf


def of_percentile(ordered: Floats, values: Floats, batch: Ints, share: float) -> Interval | None:
    """Return the interval of the percentile ``share`` (0.99 for p99); None with fewer than two batches.

    ``ordered`` are the same values, sorted; ``values`` and ``batch`` stand in one order.
    """
    if not values.size:
        return None
    figure = float(np.quantile(ordered, share))
    if np.unique(batch).size < 2:
        return None
    effective = int(independent((values <= figure + _SAME * abs(figure)).astype(np.float64), batch))
    low, high = ranks(effective, share)
    # The same place among all samples: rank r of n is the order statistic at r / n of the way.
    first = math.ceil(low / effective * values.size) if low else 0
    last = math.ceil(high / effective * values.size)
    # The figure itself is interpolated: of very few values it can lie beyond an end.
    return (
        min(figure, float(ordered[first - 1])) if first else None,
        max(figure, float(ordered[last - 1])) if high <= effective else None,
    )


def ranks(n: int, share: float) -> tuple[int, int]:
    """Return ranks l < u, counted from 1, with P(X_(l) <= percentile < X_(u)) >= 95 %; l = 0 or u = n + 1: unbounded.

    P(X_(r) > percentile) = P(Bin(n, share) < r), so l is the largest rank for which that is at most 2.5 % and u the least
    for which it is at least 97.5 %.
    """
    middle, sd = n * share, math.sqrt(n * share * (1 - share))
    start = max(0, math.floor(middle - _FAR * sd - 2))
    k = np.arange(start, min(n, math.ceil(middle + _FAR * sd + 2)) + 1)
    gamma = np.array([math.lgamma(i + 1) + math.lgamma(n - i + 1) for i in k.tolist()])
    logs = math.lgamma(n + 1) - gamma + k * math.log(share) + (n - k) * math.log1p(-share)
    below = np.concatenate(([0.0], np.cumsum(np.exp(logs))))  # below[i] = P(Bin < start + i)
    low = start + int(np.searchsorted(below, _TAIL, side="right")) - 1
    place = int(np.searchsorted(below, 1 - _TAIL, side="left"))
    return low, (start + place if place < below.size else n + 1)
