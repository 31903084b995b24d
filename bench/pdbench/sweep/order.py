"""The order of a sweep: fewest restarts of workers, and repeats that drift cannot favour. Pure.

Cells that share a deployment are measured together. A round visits every deployment once and measures every cell once; every
repeat is one round, and each goes through the cells the other way round than the one before: what drifts steadily (heat, a
neighbour's load) hits all cells alike in two rounds, and the deployment at the turn stays up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import Any, NamedTuple

from pdlib.plan import leaving

Json = dict[str, Any]
#: (deployment, the plan that runs or None) -> the plan that the deploy will make.
Replan = Callable[[int, Json | None], Json]

#: Up to so many deployments all orders are tried; above, the best found by swapping.
_ALL = 6
#: What a restart of the router, of a worker, and the load of another model weigh against each other.
_ROUTER, _WORKER, _MODEL = 1, 10, 10_000


class Cost(NamedTuple):
    """What deploys do: ``workers`` started or restarted, ``routers`` started anew, ``models`` switched, ``deploys`` at all."""

    workers: int = 0
    routers: int = 0
    models: int = 0
    deploys: int = 0

    @property
    def weight(self) -> int:
        """One figure to compare orders by."""
        return self.workers * _WORKER + self.routers * _ROUTER + self.models * _MODEL

    def plus(self, other: Cost) -> Cost:
        """Return both together."""
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


def total(costs: Iterable[Cost]) -> Cost:
    """Return all costs together."""
    result = Cost()
    for cost in costs:
        result = result.plus(cost)
    return result


def step(before: Json | None, after: Json) -> Cost:
    """Return what a deploy of ``after`` costs where ``before`` runs."""
    if before is None:
        return Cost(len(after["workers"]), 1, 0, 1)
    # The other way round, `leaving` names the workers of the new plan that do not run as they should.
    fresh = leaving(after, before)
    same_router = _without_members(before["router"]) == _without_members(after["router"])
    return Cost(len(fresh), int(not same_router), int(before["model"] != after["model"]), 1)


def _without_members(router: Json) -> Json:
    members = router["members"]
    argv = router["argv"][: len(router["argv"]) - len(members)] if members else router["argv"]
    return {"argv": argv, "host": router["host"]}


@dataclass(frozen=True)
class Arrangement:
    """``order``: (cell, repeat from 1) in turn; ``costs``: of the deploy before each, all 0 where none is needed."""

    order: list[tuple[int, int]]
    costs: list[Cost]

    @property
    def cost(self) -> Cost:
        """What the whole order costs."""
        return total(self.costs)


def follow(order: Sequence[tuple[int, int]], deployments: Sequence[int], replan: Replan) -> Arrangement:
    """Return ``order`` with what it costs, deploy by deploy, from hosts that run nothing.

    ``deployments``: of every cell. Placement is sticky, so what a deploy restarts depends on all before it.
    """
    running: Json | None = None
    at: int | None = None
    costs = []
    for cell, _ in order:
        if deployments[cell] == at:
            costs.append(Cost())
            continue
        at = deployments[cell]
        made = replan(at, running)
        costs.append(step(running if running is None or _one_cluster(running, made) else None, made))
        running = made
    return Arrangement(list(order), costs)


def _one_cluster(before: Json, after: Json) -> bool:
    return bool(before.get("inventory") == after.get("inventory"))


def naive(deployments: Sequence[int], repeats: int, replan: Replan) -> Arrangement:
    """Return the order of the file, round after round."""
    return follow([(cell, repeat) for repeat in range(1, repeats + 1) for cell in range(len(deployments))], deployments, replan)


def rounds(route: Sequence[int], deployments: Sequence[int], repeats: int) -> list[tuple[int, int]]:
    """Return every cell once a repeat, deployment by deployment along ``route``, every second round backwards."""
    there = [cell for deployment in route for cell, own in enumerate(deployments) if own == deployment]
    return [(cell, repeat) for repeat in range(1, repeats + 1) for cell in (there if repeat % 2 else there[::-1])]


def arrange(deployments: Sequence[int], repeats: int, replan: Replan) -> tuple[Arrangement, Arrangement]:
    """Return (the order to measure in, the naive order); the first never restarts more workers than the second.

    ``deployments``: of every cell, in the order of the file, numbered from 0. ``repeats``: rounds.
    """
    plain = naive(deployments, repeats, replan)
    known = list(dict.fromkeys(deployments))
    table = _table(known, replan)
    found = [follow(rounds(route, deployments, repeats), deployments, replan) for route in _routes(known, table, repeats)]
    good = [one for one in found if one.cost.workers <= plain.cost.workers and one.cost.weight <= plain.cost.weight]
    # Stickiness may fool the table; the naive order is a whole number of rounds, too.
    return min([*good, plain], key=lambda one: (one.cost.weight, one.cost.deploys)), plain


def _table(known: Sequence[int], replan: Replan) -> dict[tuple[int, int], int]:
    fresh = {one: replan(one, None) for one in known}
    found = {}
    for one in known:
        for other in known:
            after = replan(other, fresh[one])
            found[one, other] = step(fresh[one] if _one_cluster(fresh[one], after) else None, after).weight
    return found


def _routes(known: Sequence[int], table: dict[tuple[int, int], int], repeats: int) -> list[list[int]]:
    """Return the most promising ways through all deployments: by the table of pairs, and in the order of the file."""
    there, back = (repeats + 1) // 2, repeats // 2

    def weight(route: Sequence[int]) -> int:
        return sum(there * table[a, b] + back * table[b, a] for a, b in pairwise(route))

    if len(known) <= _ALL:
        best = sorted((list(route) for route in permutations(known)), key=weight)[:8]
        return [*best, list(known)]
    found = [_swapped(_nearest(start, known, table), weight) for start in known]
    return [*sorted(found, key=weight)[:8], list(known)]


def _nearest(start: int, known: Sequence[int], table: dict[tuple[int, int], int]) -> list[int]:
    route, left = [start], [one for one in known if one != start]
    while left:
        route.append(min(left, key=lambda one: (table[route[-1], one], known.index(one))))
        left.remove(route[-1])
    return route


def _swapped(route: list[int], weight: Callable[[Sequence[int]], int]) -> list[int]:
    """Return the route after reversing parts of it for as long as that helps (2-opt)."""
    best, better = weight(route), True
    while better:
        better = False
        for i in range(len(route) - 1):
            for j in range(i + 1, len(route)):
                tried = [*route[:i], *route[i : j + 1][::-1], *route[j + 1 :]]
                if weight(tried) < best:
                    route, best, better = tried, weight(tried), True
    return route
