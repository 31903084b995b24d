"""Placement: which worker runs on which host's GPUs.

Laws (tested by properties): no GPU is used twice (with ``gpus_shared``, at most once per role); a worker that may stay
stays, with its name, GPUs and ports; a change of ratio moves the fewest workers; the same input gives the same placement.

Method: per host, every possible (workers of each role) option is worth the workers it lets stay; a dynamic programme over
the hosts finds the options that add up to the ratio with the most workers kept, then with the hosts listed first in the
groups preferred, prefill filling ``prefill_nodes`` from the front and decode ``decode_nodes`` from the front.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Callable, Dict, FrozenSet, List, Mapping, Optional, Sequence, Set, Tuple

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
    used: Dict[str, Set[int]] = {role: set() for role in host.gpus}
    for worker in kept:
        used.setdefault(worker.role, set()).update(gpu for name, gpus in worker.ranks if name == host.name for gpu in gpus)
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


class _HostOptions:
    """All (count per role) options of one host for single-host workers, each with what it keeps."""

    def __init__(self, host: Host, shape: Mapping[str, RoleShape], current: Sequence[Placed]):
        self.host, self.shape, self.current = host, shape, current

    def option(self, counts: Mapping[str, int]) -> Optional[Tuple[List[Placed], Dict[str, List[Tuple[int, ...]]]]]:
        """Return (kept workers, GPU sets of the new ones) with the most workers kept, or None if it does not fit."""
        by_role = {role: [w for w in self.current if w.role == role] for role in counts}
        if self.host.frozen:
            exact = all(len(by_role[role]) == count for role, count in counts.items())
            return (list(self.current), {}) if exact else None
        most = sum(min(counts[role], len(by_role[role])) for role in counts)
        for size in range(most, -1, -1):
            for kept in combinations(sorted(self.current, key=lambda w: (w.role, _index(w))), size):
                held = {role: sum(w.role == role for w in kept) for role in counts}
                if any(held[role] > counts[role] for role in counts) or any(w.role not in counts for w in kept):
                    continue
                new = _fits(self.host, self.shape, kept, {role: counts[role] - held[role] for role in counts})
                if new is not None:
                    return list(kept), new
        return None

    def limits(self, roles: Sequence[str]) -> List[int]:
        """Return, per role, the most workers that the host could hold of it alone."""
        if self.host.frozen:
            return [sum(w.role == role for w in self.current) for role in roles]
        return [len(self.host.gpus.get(role, ())) // self.shape[role].gpus for role in roles]


def _index(worker: Placed) -> int:
    return int(worker.name.rsplit("-", 1)[1])


def _distribute(
    options: Sequence[_HostOptions], roles: Sequence[str], wanted: Sequence[int], rank: Mapping[str, Mapping[str, int]]
) -> Optional[List[Tuple[int, ...]]]:
    """Return how many workers of each role every host takes, or None when the ratio does not fit."""
    if not roles:
        return [() for _ in options]
    if len(roles) == 1:
        wanted, roles = (*wanted, 0), (roles[0], "")
    first, second = roles
    # state: workers placed so far -> (score, choices); score: most kept, then least rank sum
    states: Dict[Tuple[int, int], Tuple[Tuple[int, int], Tuple[Tuple[int, int], ...]]] = {(0, 0): ((0, 0), ())}
    for host in options:
        most_first, most_second = host.limits([role for role in roles if role]) + ([0] if not second else [])
        choices = []
        for a in range(min(most_first, wanted[0]) + 1):
            for b in range(min(most_second, wanted[1]) + 1):
                found = host.option({first: a, second: b} if second else {first: a})
                if found is None:
                    continue
                cost = a * rank[first].get(host.host.name, 0) + (b * rank[second].get(host.host.name, 0) if second else 0)
                choices.append((a, b, len(found[0]), cost))
        following: Dict[Tuple[int, int], Tuple[Tuple[int, int], Tuple[Tuple[int, int], ...]]] = {}
        for (done_a, done_b), ((kept, cost), path) in states.items():
            for a, b, more, dearer in choices:
                key = (done_a + a, done_b + b)
                if key[0] > wanted[0] or key[1] > wanted[1]:
                    continue
                score = (kept + more, cost - dearer)
                known = following.get(key)
                if known is None or score > known[0]:
                    following[key] = (score, (*path, (a, b)))
        states = following
    best = states.get((wanted[0], wanted[1]))
    if best is None:
        return None
    return [choice if second else choice[:1] for choice in best[1]]


def _multi_node(
    role: str, count: int, shape: RoleShape, hosts: Sequence[Host], current: Sequence[Placed]
) -> Optional[Tuple[List[Placed], List[Tuple[Tuple[str, Tuple[int, ...]], ...]]]]:
    """Place workers that span whole hosts: (kept workers, rank tuples of the new ones), or None."""
    room = {h.name: h for h in hosts if len(h.gpus.get(role, ())) == shape.per_node}
    kept = [w for w in current if all(name in room for name, _ in w.ranks)]
    kept = sorted(kept, key=lambda w: (not any(room[n].frozen for n, _ in w.ranks), _index(w)))[:count]
    taken = {name for worker in kept for name, _ in worker.ranks}
    free = [h for h in room.values() if h.name not in taken and not h.frozen]
    missing = count - len(kept)
    if len(free) < missing * shape.nodes:
        return None
    ranks = [
        tuple((h.name, tuple(sorted(h.gpus[role]))) for h in free[i * shape.nodes : (i + 1) * shape.nodes])
        for i in range(missing)
    ]
    return kept, ranks


def _names(role: str, kept: Sequence[Placed], count: int) -> List[str]:
    used = {_index(w) for w in kept}
    free = (i for i in range(len(used) + count + 1) if i not in used)
    return [f"{role}-{next(free)}" for _ in range(count)]


def _still_valid(worker: Placed, hosts: Mapping[str, Host], shape: Mapping[str, RoleShape]) -> bool:
    """Whether a running worker could have been placed as it is today."""
    wanted = shape.get(worker.role)
    if wanted is None or len(worker.ranks) != wanted.nodes:
        return False
    return all(
        name in hosts and len(gpus) == wanted.per_node and set(gpus) <= set(hosts[name].gpus.get(worker.role, ()))
        for name, gpus in worker.ranks
    )


def attempt(
    ratio: Ratio, shape: Mapping[str, RoleShape], hosts: Sequence[Host], current: Sequence[Placed]
) -> Optional[List[Placed]]:
    """Return the placement of ``ratio``, or None when it does not fit; see the module's laws.

    ``hosts``: in inventory order; ``current``: what runs today.
    """
    wanted = ratio.counts()
    known = {h.name: h for h in hosts}
    pinned = [w for w in current if any(name in known and known[name].frozen for name, _ in w.ranks)]
    current = [w for w in current if _still_valid(w, known, shape)]
    multi = sorted(role for role in wanted if shape[role].nodes > 1)
    single = sorted((role for role in wanted if shape[role].nodes == 1), key=lambda r: (r == "decode", r))
    result: List[Placed] = []
    busy: Set[str] = set()
    for role in multi:
        free = [h for h in hosts if h.name not in busy]
        # Hosts that only this role may use go first, so that other roles find room.
        free.sort(key=lambda h: (sum(other in h.gpus for other in wanted), h.order.get(role, 0)))
        placed = _multi_node(role, wanted[role], shape[role], free, [w for w in current if w.role == role])
        if placed is None:
            return None
        kept, ranks = placed
        result += kept
        result += [Placed(name, role, rank) for name, rank in zip(_names(role, kept, len(ranks)), ranks)]
        busy |= {name for w in result for name, _ in w.ranks}
    options = [
        _HostOptions(h, shape, [w for w in current if w.role in single and w.ranks[0][0] == h.name])
        for h in hosts
        if h.name not in busy
    ]
    rank = {role: {h.name: h.order.get(role, 0) for h in hosts} for role in single}
    chosen = _distribute(options, single, [wanted[role] for role in single], rank)
    if chosen is None:
        return None
    fresh: Dict[str, List[Tuple[int, str, Tuple[int, ...]]]] = {role: [] for role in single}
    kept_all: List[Placed] = []
    for option, counts in zip(options, chosen):
        found = option.option(dict(zip(single, counts)))
        assert found is not None
        kept_all += found[0]
        for role, sets in found[1].items():
            fresh[role] += [(rank[role].get(option.host.name, 0), option.host.name, gpus) for gpus in sets]
    result += kept_all
    for role in single:
        names = _names(role, [w for w in kept_all if w.role == role], len(fresh[role]))
        result += [Placed(name, role, ((host, gpus),)) for name, (_, host, gpus) in zip(names, sorted(fresh[role]))]
    if any(worker not in result for worker in pinned):
        return None
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


def fitting_ratios(shape: Mapping[str, RoleShape], hosts: Sequence[Host], current: Sequence[Placed]) -> List[str]:
    """Return the largest ratios that fit, at most nine: for some N the NpMd with the largest M, and the largest Nagg."""
    total = sum(len(h.all_gpus) for h in hosts)

    def largest(make: Callable[[int], Ratio]) -> int:
        """Return the largest n from 0 on for which ``make(n)`` fits (what fits still fits with a worker less)."""
        low, high = 0, total
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if attempt(make(middle), shape, hosts, current) is not None else (low, middle - 1)
        return low

    most = largest(lambda n: Ratio(prefill=n, decode=1))
    samples = 8 if total <= 64 else 3
    found: Dict[int, int] = {}
    for prefill in sorted({max(1, round(most * (i + 1) / samples)) for i in range(samples)}) if most else []:
        found[prefill] = largest(lambda n, p=prefill: Ratio(prefill=p, decode=n))  # type: ignore[misc]
    replicas = largest(lambda n: Ratio(aggregated=n))
    return [f"{p}p{d}d" for p, d in found.items()] + ([str(Ratio(aggregated=replicas))] if replicas else [])
