"""The laws of placement, against brute force on small clusters."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlib.errors import UserError
from pdlib.ratio import Ratio, parse
from pdlib.topology import Host, Placed, RoleShape, attempt, fitting_ratios, fullest_ratios, place

ROLES = ("prefill", "decode", "aggregated")
Counts = tuple[int, ...]

# ---------------------------------------------------------------- brute force


def subsets(items: Sequence[Placed]) -> Iterator[tuple[Placed, ...]]:
    return chain.from_iterable(combinations(items, size) for size in range(len(items) + 1))


def on(worker: Placed, host: str) -> set[int]:
    return {gpu for name, gpus in worker.ranks if name == host for gpu in gpus}


def valid(worker: Placed, hosts: Mapping[str, Host], shape: Mapping[str, RoleShape], roles: Sequence[str]) -> bool:
    """Whether a running worker is one that today's settings allow."""
    if worker.role not in roles or len(worker.ranks) != shape[worker.role].nodes:
        return False
    for name, gpus in worker.ranks:
        pool = set(hosts[name].gpus.get(worker.role, ())) if name in hosts else set()
        if len(gpus) != shape[worker.role].per_node or not set(gpus) <= pool:
            return False
        if shape[worker.role].nodes > 1 and set(gpus) != pool:
            return False
    return True


def overlap(workers: Sequence[Placed], hosts: Mapping[str, Host], shape: Mapping[str, RoleShape]) -> bool:
    for one, other in combinations(workers, 2):
        for name in {n for n, _ in one.ranks} & {n for n, _ in other.ranks}:
            if max(shape[one.role].nodes, shape[other.role].nodes) > 1:
                return True
            if on(one, name) & on(other, name) and (not hosts[name].shared or one.role == other.role):
                return True
    return False


def room(host: Host, kept: Sequence[Placed], roles: Sequence[str], shape: Mapping[str, RoleShape]) -> set[Counts]:
    """Every tuple of new workers per role that the host can take beside the kept ones, by trying each use of each GPU."""
    if host.frozen or any(shape[w.role].nodes > 1 for w in kept if any(n == host.name for n, _ in w.ranks)):
        return {tuple(0 for _ in roles)}
    held = {role: set().union(*(on(w, host.name) for w in kept if w.role == role)) for role in roles}
    gpus = sorted(host.all_gpus)
    if host.shared:
        most = [tuple(len(set(host.gpus.get(r, ())) - held[r]) // shape[r].gpus for r in roles)]
    else:
        free = [gpu for gpu in gpus if not any(gpu in used for used in held.values())]
        uses = [[None, *(r for r in roles if gpu in host.gpus.get(r, ()))] for gpu in free]
        most = [tuple(use.count(r) // shape[r].gpus for r in roles) for use in product(*uses)]
    return {counts for top in set(most) for counts in product(*(range(n + 1) for n in top))}


def best_kept(
    wanted: Mapping[str, int], shape: Mapping[str, RoleShape], hosts: Sequence[Host], current: Sequence[Placed]
) -> int | None:
    """The most workers that any placement of ``wanted`` keeps, None when there is no placement."""
    known, roles = {h.name: h for h in hosts}, [r for r in ROLES if r in wanted]
    single = [r for r in roles if shape[r].nodes == 1]
    pinned = [w for w in current if any(n in known and known[n].frozen for n, _ in w.ranks)]
    able = [w for w in current if valid(w, known, shape, roles)]
    if any(w not in able for w in pinned):
        return None
    best: int | None = None
    for kept in subsets(able):
        counts = Counter(w.role for w in kept)
        if (best is not None and len(kept) <= best) or any(counts[r] > wanted[r] for r in roles):
            continue
        if any(w not in kept for w in pinned) or overlap(kept, known, shape):
            continue
        missing = {r: wanted[r] - counts[r] for r in roles}
        if any(
            fits_single({r: missing[r] for r in single}, single, shape, [h for h in hosts if h.name not in taken], kept)
            for taken in multi_choices(missing, shape, hosts, kept)
        ):
            best = len(kept)
    return best


def multi_choices(
    missing: Mapping[str, int], shape: Mapping[str, RoleShape], hosts: Sequence[Host], kept: Sequence[Placed]
) -> Iterator[set[str]]:
    """Every set of hosts that the new multi-node workers may take."""
    busy = {name for w in kept for name, _ in w.ranks}
    roles = [r for r in missing if shape[r].nodes > 1]
    per_role = [
        combinations(
            [h.name for h in hosts if h.name not in busy and not h.frozen and len(h.gpus.get(r, ())) == shape[r].per_node],
            missing[r] * shape[r].nodes,
        )
        for r in roles
    ]
    for choice in product(*map(list, per_role)):
        names = [name for part in choice for name in part]
        if len(set(names)) == len(names):
            yield set(names)


def fits_single(
    missing: Mapping[str, int],
    roles: Sequence[str],
    shape: Mapping[str, RoleShape],
    hosts: Sequence[Host],
    kept: Sequence[Placed],
) -> bool:
    reachable: set[Counts] = {tuple(0 for _ in roles)}
    for host in hosts:
        options = room(host, kept, roles, shape)
        reachable = {
            tuple(a + b for a, b in zip(done, more, strict=True))
            for done in reachable
            for more in options
            if all(a + b <= missing[r] for a, b, r in zip(done, more, roles, strict=True))
        }
    return tuple(missing[r] for r in roles) in reachable


# ---------------------------------------------------------------- random clusters


def clusters(rng: random.Random, frozen: bool = True, gpus: int = 4, most_hosts: int = 3) -> list[Host]:
    """Hosts of random groups, GPUs, pools and places in the groups, some of them outside the limit."""
    count = rng.randint(1, most_hosts)
    ranks = {role: rng.sample(range(count), count) for role in ROLES}
    hosts = []
    for i in range(count):
        lent = list(range(rng.choice([*range(gpus + 1), gpus, gpus])))
        groups = rng.choice([("prefill",), ("decode",), ("prefill", "decode"), ("prefill", "decode")])
        pools = {}
        for role in (*groups, "aggregated"):
            part = role != "aggregated" and rng.random() < 0.25
            pools[role] = tuple(rng.sample(lent, rng.randint(0, len(lent))) if part else lent)
        order = {role: ranks[role][i] for role in pools}
        hosts.append(Host(f"h{i}", pools, order, rng.random() < 0.15, frozen and rng.random() < 0.2))
    return hosts


def running(rng: random.Random, hosts: Sequence[Host], shape: Mapping[str, RoleShape]) -> list[Placed]:
    """Workers that some earlier settings left: of any role and size, on any GPU, most of them valid today."""
    workers: list[Placed] = []
    used: dict[tuple[str, str], set[int]] = {}
    shared_before = {h.name: h.shared or (not h.frozen and rng.random() < 0.3) for h in hosts}
    numbers = {role: iter(rng.sample(range(6), 6)) for role in ROLES}
    roles = ROLES[:2] if rng.random() < 0.8 else ROLES
    for _ in range(rng.randint(0, 6)):
        host, role = rng.choice(list(hosts)), rng.choice(roles)
        odd = rng.random() < (0.02 if host.frozen else 0.1)
        pool = range(4) if odd else host.gpus.get(role, ())
        others = (role,) if shared_before[host.name] else ROLES
        free = [gpu for gpu in pool if not any(gpu in used.get((host.name, r), ()) for r in others)]
        size = rng.randint(1, 3) if odd else shape[role].gpus
        if len(free) >= size:
            gpus = tuple(sorted(rng.sample(free, size)))
            used.setdefault((host.name, role), set()).update(gpus)
            workers.append(Placed(f"{role}-{next(numbers[role])}", role, ((host.name, gpus),)))
    return workers


def likely(rng: random.Random, shape: Mapping[str, RoleShape], hosts: Sequence[Host]) -> Ratio:
    """A ratio that may or may not fit: near the edge more often than not."""

    def some(role: str) -> int:
        per, lent = shape[role].per_node, [len(h.gpus.get(role, ())) for h in hosts]
        able = sum(n // per for n in lent) if shape[role].nodes == 1 else sum(n == per for n in lent) // shape[role].nodes
        return rng.randint(1, max(1, min(4, able)))

    return Ratio(aggregated=some("aggregated")) if rng.random() < 0.2 else Ratio(prefill=some("prefill"), decode=some("decode"))


def sizes(rng: random.Random) -> dict[str, RoleShape]:
    return {role: RoleShape(rng.choice([1, 1, 1, 2, 2, 3])) for role in ROLES}


RANDOM = st.randoms(use_true_random=True)


def check_laws(
    ratio: Ratio, shape: Mapping[str, RoleShape], hosts: Sequence[Host], current: Sequence[Placed], made: Sequence[Placed]
) -> None:
    """What holds for every placement, whatever ran before."""
    known = {h.name: h for h in hosts}
    assert Counter(w.role for w in made) == ratio.counts()
    assert len({w.name for w in made}) == len(made)
    users: Counter[tuple[str, int, str]] = Counter()
    for worker in made:
        assert worker.name.rsplit("-", 1)[0] == worker.role
        assert int(worker.name.rsplit("-", 1)[1]) >= 0
        assert len(worker.ranks) == shape[worker.role].nodes
        assert len({name for name, _ in worker.ranks}) == len(worker.ranks)
        for name, gpus in worker.ranks:
            host = known[name]
            assert worker.role in host.gpus, "a host that the worker's groups do not allow"
            assert set(gpus) <= set(host.gpus[worker.role])
            assert len(set(gpus)) == len(gpus) == shape[worker.role].per_node
            for gpu in gpus:
                users[name, gpu, worker.role if host.shared else ""] += 1
            if shape[worker.role].nodes > 1:
                assert [w.name for w in made if any(n == name for n, _ in w.ranks)] == [worker.name], "a whole host"
    assert all(times == 1 for times in users.values()), "a GPU is used twice"
    for host in hosts:
        if host.frozen:
            assert {w for w in made if on_host(w, host)} == {w for w in current if on_host(w, host)}


def on_host(worker: Placed, host: Host) -> bool:
    return any(name == host.name for name, _ in worker.ranks)


def check(ratio: Ratio, shape: Mapping[str, RoleShape], hosts: Sequence[Host], current: Sequence[Placed]) -> list[Placed] | None:
    """Place and compare with brute force."""
    made = attempt(ratio, shape, hosts, current)
    best = best_kept(ratio.counts(), shape, hosts, current)
    assert (made is None) == (best is None), f"brute force keeps {best}, attempt gives {made}"
    if made is None:
        return None
    check_laws(ratio, shape, hosts, current, made)
    assert len(set(made) & set(current)) == best, "not the most workers kept"
    again = attempt(ratio, shape, hosts, list(reversed(current)))
    assert again == made, "the order in which running workers are listed changes the placement"
    return made


@given(RANDOM)
@settings(max_examples=400, deadline=None)
def test_single_host_workers(rng: random.Random) -> None:
    hosts, shape = clusters(rng), sizes(rng)
    check(likely(rng, shape, hosts), shape, hosts, running(rng, hosts, shape))


@given(RANDOM)
@settings(max_examples=100, deadline=None)
def test_a_chain_of_ratios_moves_the_fewest_workers(rng: random.Random) -> None:
    hosts, shape = clusters(rng, frozen=False), sizes(rng)
    current: list[Placed] = []
    for _ in range(4):
        ratio = likely(rng, shape, hosts)
        made = check(ratio, shape, hosts, current)
        if made is not None:
            assert attempt(ratio, shape, hosts, made) == made, "what is there stays as it is"
            current = made


def mixed(rng: random.Random) -> tuple[list[Host], dict[str, RoleShape], list[Placed]]:
    """Hosts with 1 or 2 GPUs, of which some roles' workers take whole ones, and what ran there before."""
    gpus = rng.choice([1, 1, 2])
    hosts = clusters(rng, gpus=gpus, most_hosts=rng.choice([3, 4, 4, 5]))
    if rng.random() < 0.7:
        whole = tuple(range(gpus))
        hosts = [Host(h.name, dict.fromkeys(h.gpus, whole), h.order, h.shared, h.frozen and rng.random() < 0.5) for h in hosts]
    shape = {}
    for role in ROLES:
        nodes = rng.choice([1, 1, 2, 2, 3])
        shape[role] = RoleShape(gpus=nodes * rng.choice([1, gpus]), nodes=nodes)
    current: list[Placed] = []
    for _ in range(rng.randint(0, 3)):
        before = {role: RoleShape(1) if rng.random() < 0.2 else shape[role] for role in ROLES}
        # Other places in the groups, and now and then a host that had only one GPU then.
        earlier = [
            Host(
                h.name,
                {role: pool[:1] if rng.random() < 0.1 else pool for role, pool in h.gpus.items()},
                {role: rng.randint(0, 9) for role in h.order},
                h.shared,
            )
            for h in hosts
        ]
        current = attempt(likely(rng, before, earlier), before, earlier, current) or current
    return hosts, shape, current


@given(RANDOM)
@settings(max_examples=800, deadline=None)
def test_workers_over_whole_hosts(rng: random.Random) -> None:
    hosts, shape, current = mixed(rng)
    check(likely(rng, shape, hosts), shape, hosts, current)


@given(RANDOM)
@settings(max_examples=100, deadline=None)
def test_fitting_ratios_fit_and_cannot_grow(rng: random.Random) -> None:
    if rng.random() < 0.5:
        hosts, shape, current = mixed(rng)
    else:
        hosts, shape = clusters(rng), sizes(rng)
        current = running(rng, hosts, shape)
    fitting = fitting_ratios(shape, hosts, current)
    assert len(fitting) == len(set(fitting)) <= 9

    def fits(**counts: int) -> bool:
        return best_kept({r: n for r, n in counts.items() if n}, shape, hosts, current) is not None

    total = sum(len(h.all_gpus) for h in hosts)
    for word in fitting:
        ratio = parse(word)
        assert fits(**ratio.counts()), word
        grown = "decode" if ratio.disaggregated else "aggregated"
        larger = [{**ratio.counts(), grown: n} for n in range(ratio.counts()[grown] + 1, 2 * total + 2)]
        assert not any(fits(**counts) for counts in larger), f"{word} can grow"
    if not any("agg" in word for word in fitting):
        assert not any(fits(aggregated=n) for n in range(1, total + 1))
    if not any("p" in word for word in fitting):
        assert not any(fits(prefill=p, decode=d) for p in range(1, total + 1) for d in range(1, total + 1))


# ---------------------------------------------------------------- tables


def hosts_of(*gpus: int, roles: Sequence[str] = ROLES) -> list[Host]:
    return [Host(f"n{i}", {r: tuple(range(n)) for r in roles}, {r: i for r in roles}) for i, n in enumerate(gpus)]


def one_each(gpus: int = 1, nodes: int = 1) -> dict[str, RoleShape]:
    return {role: RoleShape(gpus, nodes) for role in ROLES}


def test_prefill_fills_its_group_from_the_front_and_decode_its_own() -> None:
    hosts = [
        Host("a", {r: (0, 1, 2, 3) for r in ROLES}, {"prefill": 0, "decode": 1, "aggregated": 0}),
        Host("b", {r: (0, 1, 2, 3) for r in ROLES}, {"prefill": 1, "decode": 0, "aggregated": 1}),
    ]
    made = place(Ratio(3, 1), one_each(), hosts, [])
    assert [(w.name, w.ranks) for w in made] == [
        ("prefill-0", (("a", (0,)),)),
        ("prefill-1", (("a", (1,)),)),
        ("prefill-2", (("a", (2,)),)),
        ("decode-0", (("b", (0,)),)),
    ]


def test_of_equals_prefill_stands_at_the_front() -> None:
    made = place(Ratio(2, 2), one_each(), hosts_of(2, 2), [])
    assert [w.ranks[0] for w in made] == [("n0", (0,)), ("n0", (1,)), ("n1", (0,)), ("n1", (1,))]


def test_deepseek_one_prefill_over_three_hosts_and_one_decode_and_the_reverse() -> None:
    hosts = hosts_of(8, 8, 8, 8)
    forth = {"prefill": RoleShape(24, 3), "decode": RoleShape(8), "aggregated": RoleShape(8)}
    back = {"prefill": RoleShape(8), "decode": RoleShape(24, 3), "aggregated": RoleShape(8)}
    whole = tuple(range(8))
    first = place(Ratio(1, 1), forth, hosts, [])
    assert [[name for name, _ in w.ranks] for w in first] == [["n0", "n1", "n2"], ["n3"]]
    assert all(gpus == whole for w in first for _, gpus in w.ranks)
    reverse = place(Ratio(1, 1), back, hosts, [])
    assert [[name for name, _ in w.ranks] for w in reverse] == [["n0"], ["n1", "n2", "n3"]]
    assert place(Ratio(1, 1), back, hosts, first) == reverse
    assert place(Ratio(1, 1), forth, hosts, first) == first


def test_deepseek_with_groups_that_meet_in_one_host() -> None:
    both = [
        Host(f"n{i}", {r: tuple(range(8)) for r in roles}, {r: i for r in roles})
        for i, roles in enumerate([("prefill", "decode"), ("prefill",), ("prefill",), ("prefill",)])
    ]
    made = place(Ratio(1, 1), {**one_each(8), "prefill": RoleShape(24, 3)}, both, [])
    assert [[name for name, _ in w.ranks] for w in made] == [["n1", "n2", "n3"], ["n0"]]


def test_a_new_worker_over_whole_hosts_spares_the_hosts_that_run_something() -> None:
    hosts = hosts_of(2, 2, 2)
    shape = {**one_each(), "prefill": RoleShape(4, 2)}
    current = [Placed("decode-0", "decode", (("n0", (0,)),))]
    made = place(Ratio(1, 1), shape, hosts, current)
    assert current[0] in made
    assert [name for name, _ in made[0].ranks] == ["n1", "n2"]


def test_a_worker_with_one_host_outside_the_limit_stays_on_all_of_them() -> None:
    def hosts(frozen: bool) -> list[Host]:
        groups = [("prefill",), ("prefill", "decode"), ("prefill",), ("prefill",)]
        return [Host(f"n{i}", {r: (0,) for r in g}, dict.fromkeys(g, i), frozen=frozen and i == 0) for i, g in enumerate(groups)]

    shape = {**one_each(), "prefill": RoleShape(2, 2)}
    current = [Placed("prefill-0", "prefill", (("n0", (0,)), ("n1", (0,))))]
    moved = place(Ratio(1, 1), shape, hosts(frozen=False), current)
    assert [[name for name, _ in w.ranks] for w in moved] == [["n0", "n2"], ["n1"]]
    assert attempt(Ratio(1, 1), shape, hosts(frozen=True), current) is None


def test_names_of_stopped_workers_are_taken_again() -> None:
    hosts = hosts_of(4)
    current = place(Ratio(3, 1), one_each(), hosts, [])
    kept = [w for w in current if w.name != "prefill-1"]
    again = place(Ratio(3, 1), one_each(), hosts, kept)
    assert {w.name for w in again} == {"prefill-0", "prefill-1", "prefill-2", "decode-0"}
    assert set(kept) <= set(again)


def test_sharing_that_was_turned_off_ends_the_sharing() -> None:
    shared = [Host("n0", {r: (0,) for r in ROLES}, dict.fromkeys(ROLES, 0), shared=True)]
    current = place(Ratio(1, 1), one_each(), shared, [])
    assert [w.ranks for w in current] == [(("n0", (0,)),), (("n0", (0,)),)]
    apart = [Host("n0", {r: (0, 1) for r in ROLES}, dict.fromkeys(ROLES, 0))]
    made = place(Ratio(1, 1), one_each(), apart, current)
    assert sorted(gpus for w in made for _, gpus in w.ranks) == [(0,), (1,)]
    assert len(set(made) & set(current)) == 1
    with pytest.raises(UserError):
        place(Ratio(1, 1), one_each(), [Host("n0", {r: (0,) for r in ROLES}, dict.fromkeys(ROLES, 0))], current)


def test_too_few_gpus_says_what_there_is_what_is_needed_and_what_fits() -> None:
    hosts = [
        Host("gh200", {"prefill": (0, 1, 2, 3), "aggregated": (0, 1, 2, 3)}, {"prefill": 0, "aggregated": 0}),
        Host("a100", {r: (0, 1, 2, 3) for r in ROLES}, {"prefill": 1, "decode": 0, "aggregated": 1}),
    ]
    with pytest.raises(UserError) as refused:
        place(Ratio(5, 2), one_each(2), hosts, [])
    message = str(refused.value)
    for part in (
        "ratio 5p2d does not fit",
        "prefill_nodes: needs 5 x 2 GPU(s); GPUs by host: gh200 4 and a100 4",
        "decode_nodes: needs 2 x 2 GPU(s); GPUs by host: a100 4",
        "in both groups, so lent to one or the other: a100",
        "ratios that fit: ",
    ):
        assert part in message
    fitting = message.rpartition("ratios that fit: ")[2].split(", ")
    assert fitting == fitting_ratios(one_each(2), hosts, [])
    assert {"2p2d", "3p1d", "4agg"} <= set(fitting)


def test_nothing_fits_says_none_and_frozen_hosts_are_named() -> None:
    hosts = [Host("n0", {r: () for r in ROLES}, dict.fromkeys(ROLES, 0), frozen=True)]
    with pytest.raises(UserError, match=r"n0 0 \(outside the limit\)(.|\n)*ratios that fit: none"):
        place(Ratio(1, 1), one_each(), hosts, [])
    with pytest.raises(UserError, match="needs 1 x 3 whole hosts"):
        place(Ratio(1, 1), {**one_each(8), "prefill": RoleShape(24, 3)}, hosts_of(8, 8, 8), [])


def test_a_large_cluster_is_placed_and_the_message_made_in_reasonable_time() -> None:
    rng = random.Random(1)
    hosts = hosts_of(*[8] * 32)
    current = place(Ratio(40, 24), one_each(4), hosts, [])
    made = place(Ratio(32, 32), one_each(4), hosts, rng.sample(current, len(current)))
    assert len(set(made) & set(current)) == 56
    with pytest.raises(UserError, match=r"ratios that fit: 8p56d, .*, 64agg"):
        place(Ratio(50, 16), one_each(4), hosts, current)


@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_fullest_ratios_fit_cannot_grow_and_are_all(rng: random.Random) -> None:
    groups = (("prefill", "aggregated"), ("decode", "aggregated"), ROLES)
    hosts = [
        Host(f"h{i}", {role: tuple(range(rng.randint(1, 3))) for role in rng.choice(groups)}, dict.fromkeys(ROLES, i))
        for i in range(rng.randint(1, 3))
    ]
    shape = {role: RoleShape(rng.randint(1, 2)) for role in ROLES}
    found = fullest_ratios(shape, hosts)
    pairs = {(one.prefill, one.decode) for one in found if one.disaggregated}
    for one in found:
        assert attempt(one, shape, hosts, []) is not None
    fits = {(p, d) for p in range(1, 10) for d in range(1, 10) if attempt(Ratio(p, d), shape, hosts, []) is not None}
    assert pairs == {(p, d) for p, d in fits if not fits & {(p + 1, d), (p, d + 1)}}
    sizes = {p * shape["prefill"].gpus + d * shape["decode"].gpus for p, d in pairs}
    for one in found:
        if not one.disaggregated and pairs:
            assert one.aggregated * shape["aggregated"].gpus in sizes or one == found[-1]
