"""Two deployments of the same thing: how their processes differ, and the ratio of their figures with its interval. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

Json = dict[str, Any]

#: Student's t, two-sided 95 %, by degrees of freedom from 1 on (any table of statistics).
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
_NORMAL95 = 1.960


def flags(argv: Sequence[str]) -> dict[str, str]:
    """Return flag -> its values (several with a blank between, a switch "") of a command line; what comes before is left out."""
    found: dict[str, list[str]] = {}
    flag = ""
    for word in argv:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            found[flag] = [value] if value else []
        elif flag:
            found[flag].append(word)
    return {flag: " ".join(values) for flag, values in found.items()}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return key -> [value in one, value in the other] where they differ; None stands for a key that is not there."""
    return {key: [one.get(key), other.get(key)] for key in sorted({*one, *other}) if one.get(key) != other.get(key)}


def environment(raw: bytes) -> dict[str, str]:
    """Return the variables of a /proc/PID/environ."""
    rows = (row.partition("=") for row in raw.decode(errors="replace").split("\0"))
    return {name: value for name, equals, value in rows if equals}


def ratio(pairs: Iterable[tuple[float, float]]) -> Json:
    """Return the geometric mean of first/second over pairs, and its 95 % interval (Student's t on the logarithms).

    ``pairs``: positive figures of runs that were made one after the other. ``low`` and ``high`` are None for a single pair.
    """
    logs = [math.log(one / other) for one, other in pairs]
    if not logs:
        raise ValueError("no pairs")
    middle = fmean(logs)
    found: Json = {"pairs": len(logs), "ratio": math.exp(middle), "low": None, "high": None}
    if len(logs) > 1:
        freedom = len(logs) - 1
        t = _T95[freedom - 1] if freedom <= len(_T95) else _NORMAL95 + (_NORMAL95**3 + _NORMAL95) / (4 * freedom)
        half = t * stdev(logs) / math.sqrt(len(logs))
        found.update(low=math.exp(middle - half), high=math.exp(middle + half))
    return found
