"""From one ratio to another while serving: which workers change, in which order, and the plan after each change. Pure.

A *move* lets some workers leave and others take their place. Laws (tested by properties): after every removal each role still
has a worker that runs; nothing is started whose GPUs or ports are still in use; no worker changes that need not; equal plans
have no moves; the last move's plan is the new one.

Order: what needs nothing that is in use starts first; then every new worker in turn, after those that must make room for it,
the one that needs fewest first; what nobody needs stops last. Where all workers of a role change, the first of these that can
be replaced without the last one stopping goes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any, Dict, FrozenSet, List, Mapping, Optional, Sequence, Set, Tuple

from . import routers, units
from .errors import UserError, listing
from .fabric import Link
from .fabric_ways import expected_transport
from .plan import started_as
from .ratio import Ratio

Json = Dict[str, Any]
_PORTS = ("port", "bootstrap_port", "side_channel_port", "dist_init_port")
#: what all workers of a deployment must have in common
_ONE = ("engine", "engine_version", "model", "served_model_name", "transfer_backend", "api_key", "admin_api_key")
_DEPLOY = "ansible-playbook deploy_pd.yml -e ratio={} does, with an interruption of the service"


@dataclass(frozen=True)
class Move:
    """``leave``: names of workers of the plan before; ``arrive``: names of workers of the new plan (a name may be in both)."""

    leave: Tuple[str, ...]
    arrive: Tuple[str, ...]


def _roles(workers: Sequence[Json]) -> Set[str]:
    return {worker["role"] for worker in workers}


def _place(worker: Json) -> List[Any]:
    return [[rank["host"], rank["gpus"]] for rank in worker["ranks"]]


def check(current: Optional[Json], target: Json) -> None:
    """Refuse a change that cannot be made while serving; raise UserError saying why and what makes it instead."""
    ratio, instead = target["ratio"], _DEPLOY.format(target["ratio"])
    if target["router"]["membership"] != "workers":
        name = target["router"]["name"]
        raise UserError(f"router={name} learns its workers only at its start, so it cannot change them while serving: {instead}")
    if current is None:
        return
    if not current.get("workers"):
        raise UserError(f"nothing is deployed, so there is nothing to rebalance: ansible-playbook deploy_pd.yml -e ratio={ratio}")
    before, after = _roles(current["workers"]), _roles(target["workers"])
    if ("aggregated" in before) != ("aggregated" in after):
        raise UserError(
            f"{current['ratio']} runs, and a router that serves it cannot serve {ratio} without a restart: its mode is fixed at its "
            f"start. rebalance.yml cannot do that while serving; {instead}"
        )
    if after - before:
        raise UserError(
            f"the deployment has no {listing(sorted(after - before))} worker, so nothing serves that could go on: {instead}"
        )
    for name in _ONE:
        # A plan from before there was an admin key says nothing of it.
        if (current.get(name) or False) != (target[name] or False):
            raise UserError(
                f"{name} is {current.get(name)} in what is deployed and would be {target[name]}: prefill and decode must agree on it, "
                f"so it cannot change worker by worker; {instead}"
            )
    if _router_alone(current) != _router_alone(target):
        raise UserError(f"the router would restart for another reason than the ratio ({_differs(current, target)}): {instead}")
    old = {worker["name"]: worker for worker in current["workers"]}
    for worker in target["workers"]:
        was = old.get(worker["name"])
        if was and _place(was) == _place(worker) and started_as(was) != started_as(worker):
            raise UserError(
                f"{worker['name']} would restart for another reason than the ratio ({_new_words(was, worker)}), and rebalance.yml "
                f"changes nothing else: {instead}"
            )


def _router_alone(plan: Json) -> List[Any]:
    router = plan["router"]
    argv = router["argv"][: len(router["argv"]) - len(router["members"])]
    return [router["host"], argv, router["env"], router["registration"], router["membership"]]


def _differs(current: Json, target: Json) -> str:
    before, after = ([str(item) for item in part[1]] for part in (_router_alone(current), _router_alone(target)))
    return listing([item for item in after if item not in before][:4]) or "fewer arguments"


def _new_words(was: Json, now: Json) -> str:
    """Say what is new in how a worker is started."""
    if was.get("meeting") != now.get("meeting"):
        return "one of its ranks was started, or ended, alone, and they meet only at their start"
    found: List[str] = []
    for old, new in zip(was["ranks"], now["ranks"]):
        had = {*old["argv"], *(f"{name}={value}" for name, value in old["env"].items())}
        have = [*new["argv"], *(f"{name}={value}" for name, value in new["env"].items())]
        found += [item for item in have if item not in had]
    return f"new: {' '.join(found[:4])}" if found else "some of its arguments are gone"


def _needs(worker: Json) -> Set[Tuple[str, str, Any]]:
    """What no two workers may have at once."""
    found: Set[Tuple[str, str, Any]] = {("name", "", worker["name"])}
    for rank in worker["ranks"]:
        found |= {("gpu", rank["host"], gpu) for gpu in rank["gpus"]}
        found |= {("port", rank["address"], rank[kind]) for kind in _PORTS if kind in rank}
        found.add(("unit", rank["host"], rank["unit"]))
    return found


def moves(current: Json, target: Json) -> List[Move]:
    """Return the moves from one plan to another; raise UserError when no order of them keeps every role served."""
    staying = {started_as(worker) for worker in current["workers"]} & {started_as(worker) for worker in target["workers"]}
    old = [worker for worker in current["workers"] if started_as(worker) not in staying]
    new = [worker for worker in target["workers"] if started_as(worker) not in staying]
    # of a new worker: who must have left before it starts
    room = {worker["name"]: frozenset(other["name"] for other in old if _needs(other) & _needs(worker)) for worker in new}
    found: List[Move] = []
    free = tuple(worker["name"] for worker in new if not room[worker["name"]])
    if free:
        found.append(Move((), free))
    kept = [worker for worker in current["workers"] if started_as(worker) in staying]
    safe = _roles(kept) | {worker["role"] for worker in new if worker["name"] in free}
    todo = _anchors(old, new, room, safe, target["ratio"])
    left: Set[str] = set()
    waiting = [worker["name"] for worker in new if worker["name"] not in free]
    while waiting:
        # Those that keep a role alive first, then the one that costs fewest.
        chosen = todo.pop(0) if todo else min(waiting, key=lambda name: len(room[name] - left))
        if chosen not in waiting:
            continue
        leave = tuple(worker["name"] for worker in old if worker["name"] in room[chosen] - left)
        left |= set(leave)
        arrive = tuple(name for name in waiting if room[name] <= left)
        waiting = [name for name in waiting if name not in arrive]
        found.append(Move(leave, arrive))
    rest = tuple(worker["name"] for worker in old if worker["name"] not in left)
    return [*found, Move(rest, ())] if rest else found


def _anchors(
    old: Sequence[Json], new: Sequence[Json], room: Mapping[str, FrozenSet[str]], safe: Set[str], ratio: str
) -> List[str]:
    """Return new workers that must come first, so that a role of which no worker stays is never without one."""
    open_roles = sorted(_roles(old) - safe)
    own = {role: {worker["name"] for worker in old if worker["role"] == role} for role in open_roles}

    def first(order: Sequence[str], gone: FrozenSet[str]) -> Optional[List[str]]:
        if not order:
            return []
        for worker in sorted((w for w in new if w["role"] == order[0]), key=lambda w: len(room[w["name"]] - gone)):
            without = gone | room[worker["name"]]
            following = None if any(own[role] <= without for role in order) else first(order[1:], without)
            if following is not None:
                return [worker["name"], *following]
        return None

    for order in permutations(open_roles):
        found = first(order, frozenset())
        if found is not None:
            return found
    raise UserError(
        f"no order of changes keeps a {' and a '.join(open_roles)} worker serving all the time (each would have to stop before the "
        f"next can start): {_DEPLOY.format(ratio)}; or go by way of a ratio that leaves GPUs free"
    )


# -- the plan after a move


def after(current: Json, target: Json, made: Sequence[Move]) -> Json:
    """Return the plan once these moves, the first ones of :func:`moves`, are made: an ordinary plan, of the ratio that then runs."""
    if not made:
        return current
    if len(made) == len(moves(current, target)):
        return target
    gone = {name for move in made for name in move.leave}
    come = {name for move in made for name in move.arrive}
    staying = {started_as(worker) for worker in current["workers"]} & {started_as(worker) for worker in target["workers"]}
    workers = [w for w in target["workers"] if started_as(w) in staying or w["name"] in come]
    workers += [w for w in current["workers"] if started_as(w) not in staying and w["name"] not in gone]
    workers.sort(key=lambda w: (w["role"] != "prefill", w["role"], int(w["name"].rsplit("-", 1)[1])))
    counts = {role: sum(w["role"] == role for w in workers) for role in ("prefill", "decode", "aggregated")}
    ratio = str(Ratio(**counts))
    hosts = {rank["host"] for worker in workers for rank in worker["ranks"]} | {target["router"]["host"]}
    entries = {**current["hosts"], **target["hosts"]}
    return {
        **target,
        "ratio": ratio,
        "workers": workers,
        "pairs": _pairs(current, target, workers),
        "router": _router(target, workers),
        "hosts": {name: entry for name, entry in entries.items() if name in hosts},
        "overrides": {**target.get("overrides", {}), "ratio": ratio},
    }


def _router(target: Json, workers: Sequence[Json]) -> Json:
    router = target["router"]
    if not router["members"]:
        return dict(router)
    members = routers.member_items([(w["role"], w["url"], w["ranks"][0].get("bootstrap_port")) for w in workers])
    return {**router, "argv": [*router["argv"][: -len(router["members"])], *members], "members": members}


def _pairs(current: Json, target: Json, workers: Sequence[Json]) -> List[Json]:
    """Return the pairs of these workers, with how the KV cache of each should travel: as it does elsewhere between the hosts."""
    hosts = {(i, w["name"]): w["ranks"][0]["host"] for i, plan in enumerate((current, target)) for w in plan["workers"]}
    known = {
        (hosts[i, pair["prefill"]], hosts[i, pair["decode"]]): pair["expected_transport"]
        for i, plan in enumerate((current, target))
        for pair in plan["pairs"]
    }
    entries = {**current["hosts"], **target["hosts"]}
    rows = []
    for prefill in workers:
        for decode in workers:
            if (prefill["role"], decode["role"]) == ("prefill", "decode"):
                ends = prefill["ranks"][0]["host"], decode["ranks"][0]["host"]
                if ends not in known:
                    links = {name: Link.of_json(entries[name]["link"]) for name in ends}
                    env = prefill["ranks"][0]["env"]
                    known[ends] = expected_transport(target["transfer_backend"], *ends, links, bool(target["on_cpu"]), env)
                rows.append({"prefill": prefill["name"], "decode": decode["name"], "expected_transport": known[ends]})
    return rows


# -- in words, and for the plays


def in_place(old: Json, new: Json) -> bool:
    """Whether a worker becomes the other without a restart: one unit, nothing but the role is another."""
    one, other = old["ranks"][0], new["ranks"][0]
    if "switch" not in one or "switch" not in other or one["unit"] != other["unit"] or _place(old) != _place(new):
        return False
    alike = [(units.any_role(rank["argv"], rank["switch"]["flag"]), rank["env"]) for rank in (one, other)]
    return alike[0] == alike[1]


def says(current: Json, target: Json, move: Move) -> str:
    """Return a move in words: ``prefill-2 (h3) becomes decode-1; prefill-1 (h2) stops``."""
    old, new = ({worker["name"]: worker for worker in plan["workers"]} for plan in (current, target))
    left, words = list(move.leave), []
    for name in move.arrive:
        where = listing(dict.fromkeys(rank["host"] for rank in new[name]["ranks"]))
        before = next((was for was in left if _place(old[was]) == _place(new[name])), None)
        if before is None:
            words.append(f"{name} ({where}) starts")
            continue
        left.remove(before)
        how = " without a restart" if in_place(old[before], new[name]) else ""
        words.append(f"{before} ({where}) becomes {name}{how}")
    for name in left:
        where = listing(dict.fromkeys(rank["host"] for rank in old[name]["ranks"]))
        words.append(f"{name} ({where}) stops")
    return "; ".join(words)


def summary(current: Json, target: Json) -> Json:
    """Return ``moves`` (``number`` from 1, ``says``) and ``fresh``: hosts that get a worker and have none, so that they need an engine."""
    found = moves(current, target)
    busy = {rank["host"] for worker in current["workers"] for rank in worker["ranks"]}
    wanted = {rank["host"] for worker in target["workers"] for rank in worker["ranks"]}
    rows = [{"number": i + 1, "says": says(current, target, move)} for i, move in enumerate(found)]
    return {"moves": rows, "fresh": sorted(wanted - busy)}


def step(current: Json, target: Json, number: int) -> Json:
    """Return all that the plays need for one move; 0 is what an interrupted command left of the deployed plan.

    ``plan`` and ``units`` (by host): after the move; ``before``: the plan until then; ``leaving``, ``arriving``: names;
    ``hosts``: whose units change, None for all; ``says``; ``meanwhile``: the ratio that serves while it is made.
    """
    found = moves(current, target)
    if number == 0:
        now = current
        move, before = Move((), ()), current
    else:
        move = found[number - 1]
        before, now = after(current, target, found[: number - 1]), after(current, target, found[:number])
    old, new = ({w["name"]: w for w in plan["workers"]} for plan in (before, now))
    serving = [w for w in before["workers"] if w["name"] not in move.leave]
    ends = [*(old[name] for name in move.leave), *(new[name] for name in move.arrive)]
    changed = {rank["host"] for worker in ends for rank in worker["ranks"]} | {now["router"]["host"]}
    # Titles of units name the ratio, so the last move writes all of them.
    last = number in (0, len(found))
    counts = {role: sum(w["role"] == role for w in serving) for role in ("prefill", "decode", "aggregated")}
    return {
        "number": number,
        "of": len(found),
        "says": says(current, target, move) if number else "what is deployed runs",
        "meanwhile": str(Ratio(**counts)),
        "before": before,
        "plan": now,
        "units": {host: units.host_units(now, host) for host in now["hosts"]},
        "leaving": list(move.leave),
        "arriving": list(move.arrive),
        "hosts": None if last else sorted(changed),
    }
