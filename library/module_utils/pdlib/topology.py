"""Placement: which worker runs on which host's GPUs.

Laws (tested by properties): no GPU is used twice (with ``gpus_shared``, at most once per role); a worker that may stay
stays, with its name, GPUs and ports; a change of ratio moves the fewest workers; the same input gives the same placement.

Method: every host has a list of things that it can do (so many workers of each role, or one of the hosts of a worker that
spans several), each worth the running workers that it lets stay; a dynamic programme over the hosts finds the choices that
add up to the ratio with the most workers kept, then with the hosts listed first in the groups preferred.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Dict, FrozenSet, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from .errors import UserError, listing
from .ratio import Ratio


@dataclass(frozen=True)
class Host:
    """What placement needs to know of a host.

    ``gpus``: lent indices by role (roles that the host's groups do not allow are absent). ``order``: the host's place in
    each role's group. ``shared``: a prefill and a decode worker may use the same GPU. ``frozen``: outside ``--limit``;
    keeps what it runs and takes nothing new.
    """

    name: str
    gpus: Mapping[str, Tuple[int, ...]]
    order: Mapping[str, int]
    shared: bool = False
    frozen: bool = False

    @property
    def all_gpus(self) -> FrozenSet[int]:
        """Every GPU that any role may use."""
        return frozenset(gpu for pool in self.gpus.values() for gpu in pool)


@dataclass(frozen=True)
class RoleShape:
    """``gpus``: GPUs of one worker over all its hosts; ``nodes``: hosts of one worker (more than 1: whole hosts)."""

    gpus: int
    nodes: int = 1

    @property
    def per_node(self) -> int:
        """GPUs of one rank's host."""
        return self.gpus // self.nodes


@dataclass(frozen=True)
class Placed:
    """One worker: ``name`` (``prefill-0``), ``role``, and ``ranks``: (host, GPU indices) in rank order."""

    name: str
    role: str
    ranks: Tuple[Tuple[str, Tuple[int, ...]], ...]


def _fits(
    host: Host, shape: Mapping[str, RoleShape], kept: Sequence[Placed], new: Mapping[str, int]
) -> Optional[Dict[str, List[Tuple[int, ...]]]]:
    """Return GPU sets per role for ``new`` workers beside the ``kept`` ones, or None when they do not fit."""
    if not host.shared and sum(shape[role].gpus * count for role, count in new.items()) > len(host.all_gpus):
        return None
    used: Dict[str, Set[int]] = {role: set() for role in host.gpus}
    for worker in kept:
        gpus = {gpu for name, own in worker.ranks if name == host.name for gpu in own}
        # Workers that shared GPUs while gpus_shared was set cannot both stay.
        if any(gpus & others for role, others in used.items() if role == worker.role or not host.shared):
            return None
        used.setdefault(worker.role, set()).update(gpus)
    placed: Dict[str, List[Tuple[int, ...]]] = {}
    for role in sorted(new, key=lambda r: (r == "decode", r)):
        others = {gpu for other, gpus in used.items() if other != role and not host.shared for gpu in gpus}
        free = [gpu for gpu in host.gpus.get(role, ()) if gpu not in used.get(role, set()) and gpu not in others]
        if not host.shared:
            # GPUs that only this role may use go first, so that the other role finds room.
            rivals = {gpu for other in new if other != role and new[other] for gpu in host.gpus.get(other, ())}
            free.sort(key=lambda gpu: (gpu in rivals, gpu))
        need = shape[role].gpus
        if len(free) < need * new[role]:
            return None
        chosen = sorted(free[: need * new[role]])
        placed[role] = [tuple(chosen[i * need : (i + 1) * need]) for i in range(new[role])]
        used.setdefault(role, set()).update(chosen)
    return placed


@dataclass(frozen=True)
class _Choice:
    """One thing that a host can do.

    ``takes``: per role of the ratio its workers here (1 where it is a host of a worker that spans several); ``kept``: running
    workers that stay; ``new``: (role, host, GPUs); ``cost``: the lower, the nearer the front of the groups.
    """

    takes: Tuple[int, ...]
    kept: Tuple[Placed, ...] = ()
    new: Tuple[Tuple[str, str, Tuple[int, ...]], ...] = ()
    cost: int = 0


def _index(worker: Placed) -> int:
    return int(worker.name.rsplit("-", 1)[1])


def _keep_most(
    host: Host, shape: Mapping[str, RoleShape], running: Sequence[Placed], counts: Mapping[str, int]
) -> Optional[Tuple[Tuple[Placed, ...], Dict[str, List[Tuple[int, ...]]]]]:
    """Return (kept workers, GPU sets of the new ones) with the most workers kept, or None if ``counts`` do not fit."""
    fresh = _fits(host, shape, [], counts)
    if fresh is None:
        return None
    most = sum(min(count, sum(w.role == role for w in running)) for role, count in counts.items())
    for size in range(most, 0, -1):
        for kept in combinations(running, size):
            missing = {role: count - sum(w.role == role for w in kept) for role, count in counts.items()}
            if min(missing.values()) < 0:
                continue
            new = _fits(host, shape, kept, missing)
            if new is not None:
                return kept, new
    return (), fresh


def _choices(
    host: Host, roles: Sequence[str], shape: Mapping[str, RoleShape], most: Sequence[int], running: Sequence[Placed]
) -> List[_Choice]:
    """Return all that a host can do; ``most``: the workers wanted per role; ``running``: single-host workers on it."""
    if host.frozen:
        return [_Choice(tuple(sum(w.role == role for w in running) for role in roles), tuple(running))]
    found: List[_Choice] = []
    running = sorted((w for w in running if w.role in roles), key=lambda w: (w.role, _index(w)))
    room = [
        min(wanted, len(host.gpus.get(role, ())) // shape[role].gpus) if shape[role].nodes == 1 else 0
        for role, wanted in zip(roles, most)
    ]
    for counts in product(*(range(count + 1) for count in room)):
        option = _keep_most(host, shape, running, {r: n for r, n in zip(roles, counts) if shape[r].nodes == 1})
        if option is not None:
            new = tuple((role, host.name, gpus) for role, sets in option[1].items() for gpus in sets)
            cost = sum(host.order.get(role, 0) * count for role, count in zip(roles, counts))
            found.append(_Choice(counts, option[0], new, cost))
    for i, role in enumerate(roles):
        gpus = tuple(sorted(host.gpus.get(role, ())))
        if shape[role].nodes > 1 and len(gpus) == shape[role].per_node:
            one = tuple(int(i == j) for j in range(len(roles)))
            found.append(_Choice(one, (), ((role, host.name, gpus),), host.order.get(role, 0)))
    # Of equally good placements the one found first wins: prefill at the front.
    return sorted(found, key=lambda choice: choice.takes, reverse=True)


def _blocks(hosts: Sequence[Host], spans: Sequence[Placed]) -> Iterator[Tuple[Optional[Placed], List[Host]]]:
    """Yield every host once: alone, or together with the others of the running worker that spans them."""
    by_host = {name: worker for worker in spans for name, _ in worker.ranks}
    for host in hosts:
        worker = by_host.get(host.name)
        if worker is None:
            yield None, [host]
        elif worker.ranks[0][0] == host.name:
            yield worker, [h for h in hosts if by_host.get(h.name) == worker]


#: per role the workers (or hosts) placed so far -> ((kept, -cost), (what came before, the choice) or ())
_States = Dict[Tuple[int, ...], Tuple[Tuple[int, int], Any]]


def _fold(states: _States, choices: Sequence[_Choice], targets: Sequence[int]) -> _States:
    """Return the states after one of ``choices``, each with its best way there."""
    following: _States = {}
    for done, ((kept, cheap), path) in states.items():
        for choice in choices:
            key = tuple([a + b for a, b in zip(done, choice.takes)])
            if any([a > b for a, b in zip(key, targets)]):
                continue
            score = (kept + len(choice.kept), cheap - choice.cost)
            if key not in following or score > following[key][0]:
                following[key] = (score, (path, choice))
    return following


def _names(role: str, kept: Sequence[Placed], count: int) -> List[str]:
    used = {_index(w) for w in kept}
    free = (i for i in range(len(used) + count + 1) if i not in used)
    return [f"{role}-{next(free)}" for _ in range(count)]


def _still_valid(worker: Placed, hosts: Mapping[str, Host], shape: Mapping[str, RoleShape], roles: Sequence[str]) -> bool:
    """Whether a running worker could have been placed as it is today."""
    wanted = shape.get(worker.role)
    if wanted is None or worker.role not in roles or len(worker.ranks) != wanted.nodes:
        return False
    for name, gpus in worker.ranks:
        pool = set(hosts[name].gpus.get(worker.role, ())) if name in hosts else set()
        if len(gpus) != wanted.per_node or not set(gpus) <= pool or (wanted.nodes > 1 and len(pool) != len(gpus)):
            return False
    return True


class _Today:
    """What runs today, as far as it could stay: pinned workers (on frozen hosts) must, or nothing is possible."""

    def __init__(self, roles: Sequence[str], shape: Mapping[str, RoleShape], hosts: Sequence[Host], current: Sequence[Placed]):
        known = {h.name: h for h in hosts}
        valid = sorted((w for w in current if _still_valid(w, known, shape, roles)), key=lambda w: (w.role, _index(w)))
        pinned = [w for w in current if any(name in known and known[name].frozen for name, _ in w.ranks)]
        self.possible = all(w in valid for w in pinned)
        self.pinned = set(pinned)
        self.spans: List[Placed] = []
        for worker in sorted((w for w in valid if len(w.ranks) > 1), key=lambda w: w not in self.pinned):
            names = {name for name, _ in worker.ranks}
            if not any(name in names for other in self.spans for name, _ in other.ranks):
                self.spans.append(worker)
        self.on: Dict[str, List[Placed]] = {h.name: [] for h in hosts}
        for worker in valid:
            if len(worker.ranks) == 1:
                self.on[worker.ranks[0][0]].append(worker)


def attempt(
    ratio: Ratio, shape: Mapping[str, RoleShape], hosts: Sequence[Host], current: Sequence[Placed]
) -> Optional[List[Placed]]:
    """Return the placement of ``ratio``, or None when it does not fit; see the module's laws.

    ``hosts``: in inventory order; ``current``: what runs today.
    """
    wanted = ratio.counts()
    roles = list(wanted)
    targets = [count * shape[role].nodes for role, count in wanted.items()]
    today = _Today(roles, shape, hosts, current)
    if not today.possible:
        return None
    states: _States = {tuple(0 for _ in roles): ((0, 0), ())}
    for span, members in _blocks(hosts, today.spans):
        stays: _States = {}
        if span is not None:
            takes = tuple(shape[role].nodes * (role == span.role) for role in roles)
            cost = sum(h.order.get(span.role, 0) for h in members)
            stays = _fold(states, [_Choice(takes, (span,), (), cost)], targets)
        if span is None or span not in today.pinned:
            for host in members:
                states = _fold(states, _choices(host, roles, shape, list(wanted.values()), today.on[host.name]), targets)
        else:
            states = {}
        for key, reached in stays.items():
            if key not in states or reached[0] > states[key][0]:
                states[key] = reached
    if tuple(targets) not in states:
        return None
    path = states[tuple(targets)][1]
    kept: List[Placed] = []
    fresh: Dict[str, List[Tuple[int, str, Tuple[int, ...]]]] = {role: [] for role in roles}
    order = {h.name: h.order for h in hosts}
    while path:
        path, choice = path
        kept += choice.kept
        for role, host_name, gpus in choice.new:
            fresh[role].append((order[host_name].get(role, 0), host_name, gpus))
    result = list(kept)
    for role, rows in fresh.items():
        ranks = [(host_name, gpus) for _, host_name, gpus in sorted(rows)]
        workers = [tuple(ranks[i : i + shape[role].nodes]) for i in range(0, len(ranks), shape[role].nodes)]
        names = _names(role, [w for w in kept if w.role == role], len(workers))
        result += [Placed(name, role, worker) for name, worker in zip(names, workers)]
    return sorted(result, key=lambda w: (w.role != "prefill", w.role, _index(w)))


def place(ratio: Ratio, shape: Mapping[str, RoleShape], hosts: Sequence[Host], current: Sequence[Placed]) -> List[Placed]:
    """Return the placement of ``ratio``; raise UserError saying what the groups have and which ratios would fit."""
    found = attempt(ratio, shape, hosts, current)
    if found is not None:
        return found
    lines = [f"ratio {ratio} does not fit."]
    for role, count in ratio.counts().items():
        able = [h for h in hosts if role in h.gpus]
        has = listing(f"{h.name} {len(h.gpus[role])}" + (" (outside the limit)" if h.frozen else "") for h in able)
        each = f"{shape[role].gpus} GPU(s)" if shape[role].nodes == 1 else f"{shape[role].nodes} whole hosts"
        group = {"prefill": "prefill_nodes", "decode": "decode_nodes"}.get(role, "prefill_nodes and decode_nodes")
        lines.append(f"  {group}: needs {count} x {each}; GPUs by host: {has or 'none'}")
    both = [h.name for h in hosts if "prefill" in h.gpus and "decode" in h.gpus]
    if ratio.disaggregated and both:
        lines.append(f"  in both groups, so lent to one or the other: {listing(both)}")
    fitting = fitting_ratios(shape, hosts, current)
    lines.append(f"  ratios that fit: {', '.join(fitting) if fitting else 'none'}")
    raise UserError("\n".join(lines))


def _frontier(
    roles: Sequence[str], shape: Mapping[str, RoleShape], hosts: Sequence[Host], current: Sequence[Placed]
) -> Dict[int, int]:
    """Return workers of the first role -> the most of the second that fit beside them (0 where there is no second)."""
    today = _Today(roles, shape, hosts, current)
    if not today.possible:
        return {}
    best: Dict[int, int] = {0: 0}
    for span, members in _blocks(hosts, [w for w in today.spans if w in today.pinned]):
        if span is not None:
            rows = [[_Choice(tuple(shape[role].nodes * (role == span.role) for role in roles))]]
        else:
            rows = [
                _choices(h, roles, shape, [len(h.all_gpus)] * len(roles), today.on[h.name] if h.frozen else []) for h in members
            ]
        for choices in rows:
            following: Dict[int, int] = {}
            for first, second in best.items():
                for choice in choices:
                    key, more = first + choice.takes[0], second + sum(choice.takes[1:])
                    following[key] = max(more, following.get(key, 0))
            best = following
    nodes = [shape[role].nodes for role in roles]
    return {first // nodes[0]: second // nodes[-1] for first, second in sorted(best.items()) if first % nodes[0] == 0}


def fullest_ratios(shape: Mapping[str, RoleShape], hosts: Sequence[Host]) -> List[Ratio]:
    """Return every NpMd to which no decode worker can be added, and aggregated workers on as many GPUs as these have."""
    best = _frontier(("prefill", "decode"), shape, hosts, [])
    pairs = [Ratio(p, d) for p, d in best.items() if p and d and best.get(p + 1, 0) < d]
    most = max(_frontier(("aggregated",), shape, hosts, []), default=0)
    sizes = {(one.prefill * shape["prefill"].gpus + one.decode * shape["decode"].gpus) for one in pairs}
    each = shape["aggregated"].gpus
    replicas = {size // each for size in sizes if size % each == 0 and size // each <= most} or {most} - {0}
    return pairs + [Ratio(aggregated=count) for count in sorted(replicas)]


def fitting_ratios(shape: Mapping[str, RoleShape], hosts: Sequence[Host], current: Sequence[Placed]) -> List[str]:
    """Return the largest ratios that fit, at most nine: for some N the NpMd with the largest M, and the largest Nagg."""
    pairs = [(p, d) for p, d in _frontier(("prefill", "decode"), shape, hosts, current).items() if p and d]
    some = sorted({max(0, round(len(pairs) * (i + 1) / 8) - 1) for i in range(8)}) if pairs else []
    replicas = max(_frontier(("aggregated",), shape, hosts, current), default=0)
    return [f"{pairs[i][0]}p{pairs[i][1]}d" for i in some] + ([str(Ratio(aggregated=replicas))] if replicas else [])
