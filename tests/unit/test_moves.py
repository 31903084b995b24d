"""The laws of a change of ratio while serving, against brute force on small deployments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from unit.plans import Json, host, plan

from pdlib import moves
from pdlib import plan as plans
from pdlib.errors import UserError
from pdlib.moves import Move

ROLES = ("prefill", "decode")


# ---------------------------------------------------------------- small deployments of our own


def worker(role: str, gpus: Sequence[int]) -> Json:
    """A worker whose name tells its place, so that one of the same name is the same."""
    rank = {"host": "n1", "gpus": list(gpus), "address": "127.0.0.1", "port": 30000 + gpus[0], "argv": [role], "env": {}}
    rank["unit"] = f"pd-{role}-{gpus[0]}{len(gpus)}.service"
    return {"name": f"{role}-{gpus[0]}{len(gpus)}", "role": role, "url": f"http://127.0.0.1:{rank['port']}", "ranks": [rank]}


@st.composite
def deployments(draw: st.DrawFn) -> Json:
    """Workers of one or two GPUs on a host of five, none of them on GPUs of another, both roles among them."""
    workers, gpu = [], 0
    while gpu < 5:
        size, role = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([*ROLES, None]))
        if role and gpu + size <= 5:
            workers.append(worker(role, range(gpu, gpu + size)))
        gpu += size
    assume({w["role"] for w in workers} == set(ROLES))
    return {"ratio": "2p2d", "workers": workers}


def needs(one: Json) -> set[int]:
    return set(one["ranks"][0]["gpus"])


def by_name(found: Json) -> dict[str, Json]:
    return {w["name"]: w for w in found["workers"]}


def walked(current: Json, target: Json, found: Sequence[Move]) -> Iterator[list[Json]]:
    """What runs after every removal and after every start."""
    old, new = by_name(current), by_name(target)
    running = list(current["workers"])
    for move in found:
        running = [w for w in running if w["name"] not in move.leave or w is not old[w["name"]]]
        yield running
        running = [*running, *(new[name] for name in move.arrive)]
        yield running


def possible(current: Json, target: Json) -> bool:
    """Whether any order of removals, with starts as soon as they are possible, keeps both roles."""
    old, new = by_name(current), by_name(target)
    staying = set(old) & set(new)
    gone, come = sorted(set(old) - staying), sorted(set(new) - staying)
    for order in permutations(gone):
        running = {name: old[name] for name in old}
        started: set[str] = set()
        good = True
        for name in [None, *order]:
            if name:
                del running[name]
                good = good and {w["role"] for w in running.values()} == set(ROLES)
            for other in come:
                if other not in started and not any(needs(new[other]) & needs(w) for w in running.values()):
                    started.add(other)
                    running[other] = new[other]
        if good:
            return True
    return False


@given(deployments(), deployments())
def test_every_step_serves_and_nothing_is_in_two_hands(current: Json, target: Json) -> None:
    try:
        found = moves.moves(current, target)
    except UserError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert "keeps a" in said
        assert not possible(current, target)
        return
    old, new = by_name(current), by_name(target)
    for running in walked(current, target, found):
        assert {w["role"] for w in running} == set(ROLES), "a role without a worker"
        gpus = [gpu for w in running for gpu in needs(w)]
        assert len(gpus) == len(set(gpus)), "two workers on a GPU"
    # the fewest change, each of them once
    assert sorted(name for move in found for name in move.leave) == sorted(set(old) - set(new))
    assert sorted(name for move in found for name in move.arrive) == sorted(set(new) - set(old))
    assert sorted(w["name"] for w in running) == sorted(new) if found else set(old) == set(new)


@given(deployments())
def test_what_is_as_it_should_be_has_no_moves(current: Json) -> None:
    assert moves.moves(current, current) == []


# ---------------------------------------------------------------- plans as the planner makes them


COUNTS = st.integers(1, 4)


@given(COUNTS, COUNTS, COUNTS, COUNTS, st.sampled_from([(8,), (4, 4), (2, 3, 3)]))
def test_a_ratio_changes_by_the_fewest_workers_over_plans_that_can_stand(
    p: int, d: int, p2: int, d2: int, gpus: tuple[int, ...]
) -> None:
    hosts = {f"n{i}": host(i + 1, count) for i, count in enumerate(gpus)}
    current = plan(hosts, f"{p}p{d}d")
    target = plan(hosts, f"{p2}p{d2}d", current=current)
    moves.check(current, target)
    found = moves.moves(current, target)
    assert sum(len(move.leave) for move in found) == max(0, p - p2) + max(0, d - d2)
    assert sum(len(move.arrive) for move in found) == max(0, p2 - p) + max(0, d2 - d)
    before = current
    for number in range(1, len(found) + 1):
        step = moves.step(current, target, number)
        now = step["plan"]
        assert step["before"] == before
        roles = [w["role"] for w in now["workers"]]
        assert now["ratio"] == f"{roles.count('prefill')}p{roles.count('decode')}d"
        assert {(pair["prefill"], pair["decode"]) for pair in now["pairs"]} == {
            (a["name"], b["name"]) for a in now["workers"] for b in now["workers"] if (a["role"], b["role"]) == ROLES
        }
        # the router's command line names who is there, so that it comes back with them
        for w in now["workers"]:
            assert w["url"] in now["router"]["members"]
        assert now["router"]["argv"][-len(now["router"]["members"]) :] == now["router"]["members"]
        taken = [(r["host"], gpu) for w in now["workers"] for r in w["ranks"] for gpu in r["gpus"]]
        taken += [
            (r["address"], r[kind])
            for w in now["workers"]
            for r in w["ranks"]
            for kind in ("port", "bootstrap_port")
            if kind in r
        ]
        assert len(taken) == len(set(taken))
        # a step is a plan from which the rest is what it was
        again = plan(hosts, f"{p2}p{d2}d", current=now)
        assert sum(len(move.leave) for move in moves.moves(now, again)) == sum(len(m.leave) for m in found[number:])
        before = now
    assert before == (target if found else current)


def test_a_change_of_role_is_one_move_and_is_said_so() -> None:
    hosts = {f"n{i}": host(i, 1) for i in (1, 2, 3, 4)}
    current = plan(hosts, "3p1d")
    target = plan(hosts, "1p3d", current=current)
    rows = moves.summary(current, target)
    assert [row["number"] for row in rows["moves"]] == [1, 2]
    for row in rows["moves"]:
        assert " becomes decode-" in row["says"]
    assert rows["fresh"] == []
    step = moves.step(current, target, 1)
    assert (step["meanwhile"], step["plan"]["ratio"]) == ("2p1d", "2p2d")
    (left,) = step["leaving"]
    where = by_name(current)[left]["ranks"][0]
    # the GPU and the port go from one to the other
    arrived = by_name(step["plan"])[step["arriving"][0]]["ranks"][0]
    assert (arrived["host"], arrived["gpus"], arrived["port"]) == (where["host"], where["gpus"], where["port"])
    assert set(step["hosts"]) == {where["host"], "n1"}
    assert moves.step(current, target, 2)["hosts"] is None, "the last one renames all units"
    nothing = moves.step(current, target, 0)
    assert (nothing["plan"], nothing["leaving"], nothing["arriving"]) == (current, [], [])


def test_what_is_free_starts_first_and_what_nobody_needs_stops_last() -> None:
    hosts = {"n1": host(1, 4)}
    current = plan(hosts, "2p1d")
    assert moves.moves(current, plan(hosts, "2p2d", current=current)) == [Move((), ("decode-1",))]
    target = plan(hosts, "1p1d", current=current)
    (move,) = moves.moves(current, target)
    assert (len(move.leave), move.arrive) == (1, ())
    fresh = plan({"n1": host(1, 1), "n2": host(2, 1), "n3": host(3, 1)}, "1p1d")
    more = plan({"n1": host(1, 1), "n2": host(2, 1), "n3": host(3, 1)}, "2p1d", current=fresh)
    assert moves.summary(fresh, more)["fresh"] == ["n3"]


def refusal(current: Json | None, target: Json) -> str:
    with pytest.raises(UserError) as caught:
        moves.check(current, target)
    return str(caught.value)


def test_what_cannot_be_live_is_refused_with_what_does_it() -> None:
    hosts = {"n1": host(1, 4)}
    current = plan(hosts, "2p1d")
    for text in (refusal(current, plan(hosts, "2agg", current=current)), refusal(plan(hosts, "2agg"), current)):
        assert "its mode is fixed at its start" in text
        assert "ansible-playbook deploy_pd.yml -e ratio=" in text
    assert "nothing is deployed" in refusal({}, current)
    assert "no decode worker" in refusal({**current, "workers": current["workers"][:2]}, current)
    other = plan(hosts, "1p2d", current=current, engine_args={"context-length": 99})
    # the worker that stays would be started anew
    assert "prefill-0 would restart for another reason than the ratio (new: --context-length 99)" in refusal(current, other)
    assert "engine_env" not in refusal(current, plan(hosts, "1p2d", current=current, engine_env={"X": "1"}))
    assert "model is " in refusal(current, plan(hosts, "1p2d", current=current, model="another"))
    assert "the router would restart for another reason" in refusal(
        current, plan(hosts, "1p2d", current=current, router_policy="random")
    )
    assert "router=mini-lb learns its workers only at its start" in refusal(
        None, plan(hosts, "1p2d", router="mini-lb", router_policy="random")
    )


def test_aggregated_replicas_come_and_go_one_ratio_to_another() -> None:
    hosts = {"n1": host(1, 4)}
    current = plan(hosts, "2agg")
    target = plan(hosts, "4agg", current=current)
    moves.check(current, target)
    assert moves.moves(current, target) == [Move((), ("aggregated-2", "aggregated-3"))]
    assert moves.moves(target, plan(hosts, "agg", current=target)) == [Move(("aggregated-1", "aggregated-2", "aggregated-3"), ())]


# ---------------------------------------------------------------- roles that are switched


SWITCH: dict[str, Any] = {"engine_args": {"enable-pd-role-switch": True}, "transfer_backend": "mooncake_tcp"}


def test_a_role_that_can_be_switched_stays_in_its_unit() -> None:
    hosts = {"n1": host(1, 4)}
    current = plan(hosts, "3p1d", **SWITCH)
    target = plan(hosts, "2p2d", current=current, **SWITCH)
    (row,) = moves.summary(current, target)["moves"]
    assert row["says"].endswith(" without a restart")
    (move,) = moves.moves(current, target)
    old, new = by_name(current)[move.leave[0]], by_name(target)[move.arrive[0]]
    assert old["url"] == new["url"]
    assert old["ranks"][0]["unit"] == new["ranks"][0]["unit"] == f"pd-worker-{new['ranks'][0]['port']}.service"
    assert new["ranks"][0]["bootstrap_port"] == old["ranks"][0]["bootstrap_port"], "decode listens for bootstraps, too"
    assert new["ranks"][0]["switch"] == {"flag": "--role", "role": "decode"}
    # deploy_pd.yml, too, takes it out of the router first
    assert plans.leaving(current, target) == {old["name"]: old["url"]}


def test_a_role_is_not_switched_where_more_than_the_role_is_another() -> None:
    hosts = {"n1": host(1, 4)}
    own = {**SWITCH, "decode_engine_args": {"max-running-requests": 7}}
    current = plan(hosts, "3p1d", **own)
    target = plan(hosts, "2p2d", current=current, **own)
    assert "without a restart" not in moves.summary(current, target)["moves"][0]["says"]
    over_nixl = plan(hosts, "3p1d", engine_args=SWITCH["engine_args"], transfer_backend="nixl")
    assert all("switch" not in w["ranks"][0] for w in over_nixl["workers"])
