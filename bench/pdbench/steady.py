"""The steady part of a load point, and whether an open loop asked for more than the servers can do.

**Window.** It begins when the load is full (closed loop: every slot has had a request) *and* the start-up transient is
over, and ends when the last request is sent: after that the load falls. The transient's end is found by MSER-5 (White,
Cobb and Spratt, "A comparison of five steady-state truncation heuristics for simulation", Winter Simulation Conference
2000), on TTFT and on E2E in the order in which they were complete; the later of the two holds. MSER-5 takes means of five
values, and drops as many of the first as make the squared standard error of the rest least; when that is more than half,
there is no steady state. Samples belong to the window when they were complete in it (`pdbench.metrics.samples`).

**Over-saturation.** When more requests come than are served, those that wait grow by a straight line: its slope is what
is left over each second (Kleinrock, "Queueing Systems", vol. 2, section 2.7: the fluid approximation). Tested is the slope
of the requests in flight, in 20 pieces of the time of sending after its first quarter, against 2 % of the rate of sending;
neighbouring pieces are alike, so its standard error is widened by their correlation (Bayley and Hammersley, JRSS
Supplement 8, 1946). At 1.3 times what can be served, 150 requests show it three times in four.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdbench import intervals, metrics
from pdbench.intervals import Floats
from pdbench.records import Record

_BATCH = 5
#: MSER-5 needs at least so many means; of the last ones, as few as 5 or a quarter, the error is luck
_LEAST_MEANS, _LAST_MEANS = 10, 5
#: requests that must have ended in a window to speak of it
_LEAST_ENDED = 20
_PIECES, _LOOKS = 20, 16
#: Student's t, one-sided 97.5 %, for the slope of 20 pieces
_T_SLOPE = 2.101
#: requests sent, at least; share of the rate that must be left over
LEAST_SENT, _LEFT_OVER = 100, 0.02
#: ends of the middle part of sending and of ending, and how much longer the latter may last
_MIDDLE, _LATER = (0.1, 0.9), 1.1


@dataclass(frozen=True)
class Window:
    """Seconds in the load point; ``reason`` says why there is none ("" when there is one)."""

    begin_s: float = math.nan
    end_s: float = math.nan
    reason: str = ""


def mser5(values: Floats) -> int | None:
    """Return how many of the first values are start-up; None when the rest is no steady state, or there are too few."""
    count = len(values) // _BATCH
    if count < _LEAST_MEANS:
        return None
    means = values[: count * _BATCH].reshape(count, _BATCH).mean(axis=1)
    size = abs(float(means.mean()))
    means = means - means.mean()  # against cancellation below
    left = np.arange(count, 0, -1)
    sums, squares = np.cumsum(means[::-1])[::-1], np.cumsum((means**2)[::-1])[::-1]
    errors = (squares - sums**2 / left) / left**2
    errors = errors[: count - max(_LAST_MEANS, count // 4)]
    # Of values that are all alike, the first.
    drop = int(np.argmax(errors <= errors.min() + (1e-9 * size) ** 2))
    return None if drop > count // 2 else drop * _BATCH


def find(records: Sequence[Record], slots: int | None) -> Window:
    """Return the steady window of a point's measured records; ``slots`` is a closed loop's concurrency, else None."""
    sent = np.sort([r.sent_s for r in records if r.sent_s == r.sent_s])
    good = [r for r in records if r.ok]
    if slots is not None and len(sent) <= slots:
        return Window(reason=f"{len(sent)} requests never fill {slots} slots and go on from there")
    if not good:
        return Window(reason="no request succeeded")
    begin, end = float(sent[slots - 1] if slots else sent[0]), float(sent[-1])
    starts = [begin]
    for name, values, when in (
        ("TTFT", [metrics.ttft_s(r) for r in good], [r.first_s for r in good]),
        ("E2E", [metrics.e2e_s(r) for r in good], [r.end_s for r in good]),
    ):
        times, taken = np.array(when), np.array(values)
        order = np.argsort(times, kind="stable")
        order = order[(times[order] > begin) & (times[order] <= end)]
        if len(order) < _BATCH * _LEAST_MEANS:
            return Window(
                reason=f"{len(order)} requests under full load are too few to find it (at least {_BATCH * _LEAST_MEANS})"
            )
        drop = mser5(taken[order])
        if drop is None:
            return Window(reason=f"{name} did not settle in the first half of the time under full load")
        if drop:
            starts.append(float(times[order[drop - 1]]))
    window = Window(max(starts), end)
    ended = sum(window.begin_s < r.end_s <= window.end_s for r in good)
    if ended < _LEAST_ENDED:
        return Window(reason=f"only {ended} requests ended in it (at least {_LEAST_ENDED})")
    return window


def summarise(records: Sequence[Record], slots: int | None, gpus: int | None) -> dict[str, object]:
    """Return ``steady`` of a load point: where the window lies and the figures in it, or why there is none."""
    window = find(records, slots)
    if window.reason:
        return {"found": False, "reason": window.reason}
    begin, end = window.begin_s, window.end_s
    good = [r for r in records if r.ok]
    ended = [r for r in good if begin < r.end_s <= end]
    n_in = sum(metrics.input_tokens(r) for r in good if begin < r.first_s <= end)
    n_out = sum(_tokens(r, begin, end) for r in good)
    busy = sum(max(0.0, min(r.end_s, end) - max(r.sent_s, begin)) for r in good)
    found = metrics.samples(good, begin, end)
    return {
        "found": True,
        "reason": "",
        "start_s": begin,
        "end_s": end,
        "duration_s": end - begin,
        "completed": len(ended),
        **metrics.rates(len(ended), n_in, n_out, busy, end - begin, gpus),
        **{name: sample.stats() for name, sample in found.items()},
        "intervals": {"level": intervals.LEVEL, **{name: sample.intervals() for name, sample in found.items()}},
    }


def _tokens(record: Record, begin_s: float, end_s: float) -> float:
    """Return the output tokens that arrived within (begin_s, end_s]."""
    first, last = (int(np.searchsorted(record.chunk_s, moment, side="right")) for moment in (begin_s, end_s))
    if len(record.chunk_tokens) == len(record.chunk_s):
        return sum(record.chunk_tokens[first:last])
    return metrics.output_tokens(record) * (last - first) / max(1, len(record.chunk_s))


def saturation(records: Sequence[Record]) -> dict[str, object]:
    """Return ``saturation`` of an open loop: does what is in flight grow without end?

    ``oversaturated`` is None where it cannot be told, and ``reason`` says why. ``backlog_growth`` is the slope in requests/s
    with its 95 % interval, ``sent_rate`` the rate of sending over the same time. ``kept_up`` tells in any case whether
    answers ended about as fast as requests were sent. Failed requests are left out.
    """
    good = [r for r in records if r.ok]
    sent, ended = np.sort([r.sent_s for r in good]), np.sort([r.end_s for r in good])

    def unknown(reason: str) -> dict[str, object]:
        return {"oversaturated": None, "reason": reason, "kept_up": _kept_up(sent, ended)}

    if len(sent) < LEAST_SENT:
        return unknown(f"{len(sent)} requests are too few to tell (at least {LEAST_SENT})")
    # While the first ones are still being answered, what is in flight grows in any case.
    fill = float(np.median([metrics.e2e_s(r) for r in sorted(good, key=lambda r: r.sent_s)[: len(good) // 10]]))
    span = float(sent[-1] - sent[0])
    begin = float(sent[0]) + max(fill, span / 4)
    if begin > sent[0] + span / 2:
        return unknown(f"it ended before the first requests were long answered ({span:.1f} s of sending, {fill:.1f} s an answer)")
    looks = np.linspace(begin, float(sent[-1]), _PIECES * _LOOKS + 1)[:-1]
    flying = np.searchsorted(sent, looks, side="right") - np.searchsorted(ended, looks, side="right")
    pieces = flying.reshape(_PIECES, _LOOKS).mean(axis=1)
    times = looks.reshape(_PIECES, _LOOKS).mean(axis=1)
    slope, half = _slope(times - times.mean(), pieces)
    rate = float(np.count_nonzero(sent > begin)) / (float(sent[-1]) - begin)
    return {
        "oversaturated": bool(slope - half > _LEFT_OVER * rate),
        "reason": "",
        "backlog_growth": slope,
        "backlog_growth_interval": [slope - half, slope + half],
        "sent_rate": rate,
        "kept_up": _kept_up(sent, ended),
    }


def _kept_up(sent: Floats, ended: Floats) -> bool:
    """Tell whether the middle four fifths of the answers ended within little more time than they were sent in."""
    if len(sent) < _LEAST_ENDED:
        return False
    sending, ending = (float(np.diff(np.quantile(times, _MIDDLE))[0]) for times in (sent, ended))
    return ending <= _LATER * sending


def _slope(times: Floats, values: Floats) -> tuple[float, float]:
    """Return the slope of a least-squares line and half of its 95 % interval; ``times`` have mean 0."""
    across = float(times @ times)
    slope = float(times @ values) / across
    rest = values - values.mean() - slope * times
    square = float(rest @ rest)
    alike = float(np.clip(rest[1:] @ rest[:-1] / square, 0.0, 0.9)) if square > 0 else 0.0
    error = math.sqrt(square / (len(values) - 2) / across * (1 + alike) / (1 - alike))
    return slope, _T_SLOPE * error
