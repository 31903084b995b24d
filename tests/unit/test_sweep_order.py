"""The order of a sweep: every cell once a round, fewest restarts, and no cell favoured by drift."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pdbench.sweep import order

Json = dict[str, Any]


def plan(workers: dict[str, str], model: str = "m", inventory: str = "i", router: str = "pd") -> Json:
    """A plan as far as orders look at it: name -> what the worker runs as."""
    rows = [
        {"name": name, "role": name.split("-")[0], "url": name, "ranks": [{"host": "h", "argv": [run, model], "env": {}}]}
        for name, run in workers.items()
    ]
    return {
        "workers": rows, "model": model, "inventory": inventory, "emulated": True,
        "router": {"argv": [router, "http://p", "http://d"], "members": ["http://p", "http://d"], "host": "h"},
    }  # fmt: skip


def ratio(prefill: int, decode: int, **more: Any) -> Json:
    return plan({**{f"prefill-{i}": "p" for i in range(prefill)}, **{f"decode-{i}": "d" for i in range(decode)}}, **more)


def replanned(plans: list[Json]) -> order.Replan:
    return lambda number, running: plans[number]


RUNS = st.sampled_from(["a", "b"])
PLANS = st.builds(
    plan,
    st.dictionaries(st.sampled_from([f"{role}-{i}" for role in ("prefill", "decode") for i in range(3)]), RUNS, min_size=1),
    model=st.sampled_from(["m", "n"]),
    inventory=st.sampled_from(["i", "i", "j"]),
    router=st.sampled_from(["pd", "agg"]),
)


@given(st.lists(PLANS, min_size=1, max_size=8), st.data(), st.integers(1, 4))
def test_every_repeat_is_a_whole_round_and_restarts_are_never_more_than_naively(
    plans: list[Json], data: st.DataObject, repeats: int
) -> None:
    deployments = data.draw(st.lists(st.integers(0, len(plans) - 1), min_size=1, max_size=14))
    made, plain = order.arrange(deployments, repeats, replanned(plans))
    size = len(deployments)
    assert sorted(made.order) == [(cell, repeat) for cell in range(size) for repeat in range(1, repeats + 1)]
    for repeat in range(1, repeats + 1):
        assert {again for _, again in made.order[size * (repeat - 1) : size * repeat]} == {repeat}
    assert made.cost.workers <= plain.cost.workers
    assert made.cost.weight <= plain.cost.weight
    assert order.follow(made.order, deployments, replanned(plans)) == made, "the cost is that of the order"
    assert plain.order == [(cell, repeat) for repeat in range(1, repeats + 1) for cell in range(size)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 4))
def test_two_rounds_take_out_a_steady_drift(deployments: list[int], half: int) -> None:
    route = list(dict.fromkeys(deployments))
    places: Counter[int] = Counter()
    for place, (cell, _) in enumerate(order.rounds(route, deployments, 2 * half)):
        places[cell] += place
    assert len(set(places.values())) == 1, "the mean place of every cell is the same"


def test_cells_of_one_deployment_are_measured_together_and_the_turn_restarts_nothing() -> None:
    plans = [ratio(3, 1), ratio(1, 3), ratio(2, 2)]
    # the file has the load as its slowest axis: naively every cell is a deploy
    deployments = [0, 1, 2, 0, 1, 2]
    made, plain = order.arrange(deployments, 2, replanned(plans))
    assert plain.cost.deploys == 12
    assert made.cost.deploys == 5
    assert [deployments[cell] for cell, _ in made.order] in (
        [0, 0, 2, 2, 1, 1, 1, 1, 2, 2, 0, 0], [1, 1, 2, 2, 0, 0, 0, 0, 2, 2, 1, 1],
    )  # fmt: skip
    assert made.cost.workers == 4 + 1 + 1 + 1 + 1
    assert [bool(cost.deploys) for cost in made.costs].count(True) == 5


def test_models_are_switched_least() -> None:
    plans = [ratio(p, 2, model=model) for p in (1, 2) for model in ("m", "n")]
    made, plain = order.arrange([0, 1, 2, 3], 2, replanned(plans))
    assert (plain.cost.models, made.cost.models) == (7, 2)


def test_a_router_that_only_learns_other_members_is_not_restarted() -> None:
    before, after = ratio(1, 1), ratio(1, 2)
    after["router"] = {
        **after["router"],
        "argv": ["pd", "http://p", "http://d", "http://e"],
        "members": ["http://p", "http://d", "http://e"],
    }
    assert order.step(before, after) == order.Cost(workers=1, routers=0, models=0, deploys=1)
    assert order.step(None, after) == order.Cost(workers=3, routers=1, models=0, deploys=1)


def test_another_cluster_starts_from_nothing() -> None:
    made = order.follow([(0, 1), (1, 1), (0, 2)], [0, 1], replanned([ratio(1, 1), ratio(1, 1, inventory="j")]))
    assert [cost.workers for cost in made.costs] == [2, 2, 2]


@settings(max_examples=10)
@given(st.integers(7, 10), st.randoms(use_true_random=False))
def test_many_deployments_are_put_in_order_too(count: int, rng: Any) -> None:
    """A chain in which neighbours share all workers but one, shuffled: restarts stay near the chain's."""
    plans = [ratio(1 + i, 12 - i) for i in range(count)]
    rng.shuffle(plans)
    made, _ = order.arrange(list(range(count)), 1, replanned(plans))
    assert made.cost.workers == 13 + count - 1
