"""Least squares on the logarithms of a profile's figures, with the profile that one starts from as the prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pdbench.fit.cases import FIGURES, Case, transport_of
from pdbench.model.profile import Profile

Vector = npt.NDArray[np.float64]
Simulate = Callable[[Sequence[tuple[Profile, Case]]], Sequence[Mapping[str, float]]]

#: what of a profile's engine is fitted, and how far (as a factor) it may lie from the start before that costs as much as a figure
#: that is off by its own scatter
FITTED = {
    "compute_efficiency": 2.0,
    "bandwidth_efficiency": 1.5,
    "prefill_overhead_ms": 3.0,
    "decode_overhead_ms": 3.0,
    "decode_us_per_request": 3.0,
    "frontend_us_per_token": 2.0,
    "frontend_us_per_request": 3.0,
    "request_ms": 3.0,
    "latency_ms": 3.0,
}
#: shares of a peak end at 1
_MOST = {"compute_efficiency": 1.0, "bandwidth_efficiency": 1.0}
#: how exact a measured figure is taken to be: means of some hundred requests, one run each
_SCATTER = {"output_throughput": 0.03, "ttft_ms": 0.10, "itl_ms": 0.05, "e2e_ms": 0.04}
_ROUNDS, _STEP, _GOOD_ENOUGH = 12, 0.05, 1e-3


@dataclass(frozen=True)
class Fit:
    """A fitted profile.

    ``errors``: standard error of each figure, as a factor's logarithm; ``known``: whether the runs say more of it than the start.
    """

    profile: Profile
    values: Mapping[str, float]
    errors: Mapping[str, float]
    known: Mapping[str, bool]
    rounds: int
    cost: float


def values_of(profile: Profile, transport: str) -> dict[str, float]:
    """Return the figures that are fitted; the latency is that of a transport."""
    engine = profile.engine
    return {
        name: profile.transports[transport].latency_ms if name == "latency_ms" else float(getattr(engine, name))
        for name in FITTED
    }


def with_values(profile: Profile, values: Mapping[str, float], transport: str) -> Profile:
    """Return the profile with these figures."""
    figures: dict[str, Any] = {name: value for name, value in values.items() if name != "latency_ms"}
    engine = replace(profile.engine, **figures)
    ways = dict(profile.transports)
    ways[transport] = replace(ways[transport], latency_ms=values["latency_ms"])
    return replace(profile, engine=engine, transports=ways)


def fit(base: Profile, cases: Sequence[Case], simulate: Simulate, say: Callable[[str], None] = lambda text: None) -> Fit:
    """Fit a profile to load points by Levenberg's method (Levenberg 1944, Marquardt 1963).

    A residual is log(model / measured) / scatter, and one a figure log(value / start) / log(factor) holds the figures that the
    runs say nothing of where they were. ``simulate`` computes many (profile, case) at once. Raises ValueError without cases.
    """
    if not cases:
        raise ValueError("no load point to fit to")
    transport = transport_of(cases)
    start = values_of(base, transport)
    names = [name for name, value in start.items() if value > 0]
    at = np.log([start[name] for name in names])
    prior, width = at.copy(), np.log([FITTED[name] for name in names])
    most = np.log([_MOST.get(name, math.inf) for name in names])
    wanted = np.array([math.log(value) for case in cases for value in _scored(case.measured)])
    scatter = np.array([_SCATTER[name] for case in cases for name in _names(case.measured)])

    def profile_at(point: Vector) -> Profile:
        return with_values(base, {**start, **{n: float(v) for n, v in zip(names, np.exp(point), strict=True)}}, transport)

    def residuals(points: Sequence[Vector]) -> list[Vector]:
        asked = [(profile_at(point), case) for point in points for case in cases]
        told = simulate(asked)
        found = []
        for number, point in enumerate(points):
            mine = told[number * len(cases) : (number + 1) * len(cases)]
            here = [
                math.log(max(figures[name], 1e-6))
                for figures, case in zip(mine, cases, strict=True)
                for name in _names(case.measured)
            ]
            found.append(np.concatenate([(np.array(here) - wanted) / scatter, (point - prior) / width]))
        return found

    damping = 1e-2
    now = residuals([at])[0]
    cost, rounds = float(now @ now), 0
    jacobian: Vector = np.zeros((len(now), len(names)))
    for rounds in range(1, _ROUNDS + 1):
        # At the upper bound of a share a step goes down.
        steps = np.where(at + _STEP > most, -_STEP, _STEP)
        moved = residuals([at + step * unit for step, unit in zip(steps, np.eye(len(names)), strict=True)])
        jacobian = np.stack([(there - now) / step for there, step in zip(moved, steps, strict=True)], axis=1)
        normal, slope = jacobian.T @ jacobian, jacobian.T @ now
        tries = [damping * factor for factor in (0.1, 1.0, 10.0, 100.0)]
        points = [np.minimum(at - np.linalg.solve(normal + amount * np.diag(np.diag(normal)), slope), most) for amount in tries]
        results = residuals(points)
        costs = [float(result @ result) for result in results]
        best = int(np.argmin(costs))
        say(f"round {rounds}: misfit {cost:.1f}, then {min(costs):.1f}")
        if costs[best] >= cost * (1 - _GOOD_ENOUGH):
            if costs[best] < cost:
                at, now, cost = points[best], results[best], costs[best]
            break
        at, now, cost, damping = points[best], results[best], costs[best], tries[best]
    # What the runs alone say, and with the prior; the scatter is taken as given unless the fit is worse than it.
    worse = max(1.0, cost / max(1, len(wanted)))
    spread = np.sqrt(np.diag(np.linalg.inv(jacobian.T @ jacobian)) * worse)
    errors = {name: float(error) for name, error in zip(names, spread, strict=True)}
    known = {name: errors[name] < 0.5 * math.log(FITTED[name]) for name in names}
    values = {**start, **{n: float(v) for n, v in zip(names, np.exp(at), strict=True)}}
    return Fit(profile_at(at), values, errors, known, rounds, cost)


def _names(measured: Mapping[str, float]) -> list[str]:
    return [name for name in FIGURES if measured[name] > 0]


def _scored(measured: Mapping[str, float]) -> Iterable[float]:
    return (measured[name] for name in _names(measured))
