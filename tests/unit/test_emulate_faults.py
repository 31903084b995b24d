from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.emulate.faults import KINDS, BadFaultError, Faults


class Died(Exception):
    pass


def faults(*bodies: dict[str, Any]) -> Faults:
    def die() -> None:
        raise Died

    made = Faults(die)
    for body in bodies:
        made.add(body)
    return made


def test_nothing_happens_unless_it_was_asked_for() -> None:
    made = faults()
    assert made.active == []
    assert made.quiet
    assert not any((made.recompute, made.zero_tokens, made.empty_first_chunk, made.hanging, made.corrupts(), made.fails("p:1")))
    assert made.link_factor("p:1") == 1
    made.tokens_sent(1_000_000)


@given(st.integers(1, 20), st.integers(0, 30))
def test_a_count_is_used_up_exactly(count: int, tries: int) -> None:
    made = faults({"kind": "corrupt", "count": count}, {"kind": "fail_transfer", "peer": "p:1", "count": count})
    assert [made.corrupts() for _ in range(tries)] == [turn < count for turn in range(tries)]
    assert not made.fails("other:1")
    assert [made.fails("p:1") for _ in range(tries)] == [turn < count for turn in range(tries)]
    assert len(made.active) == (0 if tries >= count else 2)


def test_without_a_count_it_goes_on_until_it_is_cleared() -> None:
    made = faults({"kind": "fail_transfer"})
    assert all(made.fails(f"p:{turn}") for turn in range(50))
    made.add({"kind": "clear"})
    assert not made.fails("p:1")
    assert made.active == []


def test_a_named_link_wins_over_all_links() -> None:
    made = faults({"kind": "slow_link", "factor": 3}, {"kind": "slow_link", "peer": "p:1", "factor": 10})
    assert (made.link_factor("p:1"), made.link_factor("q:1")) == (10, 3)
    made.add({"kind": "slow_link", "peer": "p:1", "factor": 20})
    assert made.link_factor("p:1") == 20
    assert made.active == [
        {"kind": "slow_link", "peer": "*", "factor": 3},
        {"kind": "slow_link", "peer": "p:1", "factor": 20},
    ]


@pytest.mark.parametrize("kind", ["recompute", "zero_tokens", "empty_first_chunk"])
def test_switches(kind: str) -> None:
    made = faults({"kind": kind})
    assert getattr(made, kind)
    assert made.quiet
    made.add({"kind": "clear"})
    assert not getattr(made, kind)


def test_hang_and_die_are_looked_for_at_every_token() -> None:
    assert not faults({"kind": "hang"}).quiet
    assert not faults({"kind": "die", "after_tokens": 1}).quiet
    made = faults({"kind": "die", "after_tokens": 3})
    made.tokens_sent(2)
    assert made.active == [{"kind": "die", "after_tokens": 1}]
    with pytest.raises(Died):
        made.tokens_sent(1)
    with pytest.raises(Died):
        faults({"kind": "die"}).tokens_sent(0)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (None, 'a fault is a JSON object like {"kind": "corrupt"}; kinds: die, hang'),
        ([], "a fault is a JSON object"),
        ({}, "a fault is a JSON object"),
        ({"kind": "corupt"}, "did you mean corrupt?"),
        ({"kind": 5}, "there is no fault 5"),
        ({"kind": "hang", "count": 1}, "hang has no 'count'; it takes nothing else"),
        ({"kind": "corrupt", "peers": "x"}, "corrupt has no 'peers'; it takes count"),
        ({"kind": "slow_link"}, "slow_link needs factor"),
        ({"kind": "slow_link", "factor": 0}, "factor must be a number above 0"),
        ({"kind": "slow_link", "factor": float("inf")}, "factor must be a number above 0"),
        ({"kind": "slow_link", "factor": True}, "factor must be a number above 0"),
        ({"kind": "fail_transfer", "peer": ""}, "peer must be an address"),
        ({"kind": "fail_transfer", "peer": 8998}, "peer must be an address"),
        ({"kind": "fail_transfer", "count": 0}, "count must be a whole number above 0, not 0; leave it out"),
        ({"kind": "corrupt", "count": 1.5}, "count must be a whole number above 0"),
        ({"kind": "die", "after_tokens": -1}, "after_tokens must be a whole number above 0"),
    ],
)
def test_bad_faults_say_what_would_be_right_and_change_nothing(body: object, said: str) -> None:
    made = faults({"kind": "corrupt", "count": 2})
    with pytest.raises(BadFaultError) as caught:
        made.add(body)
    assert said in str(caught.value)
    assert made.active == [{"kind": "corrupt", "count": 2}]


@given(st.lists(st.sampled_from(sorted(KINDS)), max_size=8))
def test_what_is_shown_sets_the_same_faults_again(kinds: list[str]) -> None:
    made = faults(*({"kind": kind, **({"factor": 2} if kind == "slow_link" else {})} for kind in kinds))
    assert faults(*made.active).active == made.active
