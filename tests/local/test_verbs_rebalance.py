"""rebalance.yml as typed, against the real router and real supervisord, on emulated workers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from local.conftest import Checkout
from meanwhile import repeating


@contextmanager
def asking(checkout: Checkout) -> Iterator[list[str]]:
    """Send requests through the router for as long as the block lasts; yields "" for each answer, else why there was none."""
    told = list[str]()
    model = json.loads((checkout.state("a100") / "plan.json").read_text())["served_model_name"]
    body = {"model": model, "prompt": "once upon a time", "max_tokens": 8, "ignore_eos": True}

    def one() -> None:
        try:
            answer = checkout.ask("/v1/completions", body)
            told.append("" if answer["usage"]["completion_tokens"] == 8 else f"not all tokens: {answer}")
        except OSError as error:
            told.append(str(error))

    with repeating(one, 0.02):
        yield told


def roles(checkout: Checkout) -> list[str]:
    return sorted(role for role, _ in checkout.members())


REFUSED = {
    "no ratio": ([], "rebalance.yml takes the ratio to change to: ansible-playbook rebalance.yml -e ratio=2p2d"),
    "no such ratio": (["-e", "ratio=3x1d"], "ratio='3x1d' is not a ratio"),
    "does not fit": (["-e", "ratio=7p2d"], "ratio 7p2d does not fit"),
    "mistyped": (["-e", "ratio=2p2d", "-e", "drain_timeot=5"], "did you mean drain_timeout?"),
    "a router that cannot": (
        ["-e", "ratio=2p2d", "-e", "router=mini-lb", "-e", "router_policy=random"],
        "router=mini-lb learns its workers only at its start",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_host_is_touched(checkout: Checkout, name: str) -> None:
    words, said = REFUSED[name]
    failed = checkout.play("rebalance.yml", *words)
    assert failed.code != 0
    assert said in " ".join(failed.text.split()), failed.text
    assert "Traceback" not in failed.text
    assert "preflight" not in failed.text
    assert checkout.processes() == []


def test_the_ratio_changes_while_clients_are_served(clean: Checkout) -> None:
    # nothing is there to change
    nothing = clean.play("rebalance.yml", "-e", "ratio=2p2d")
    assert nothing.code != 0
    assert "nothing is deployed" in nothing.text
    clean.play("deploy_pd.yml", "-e", "ratio=3p1d").good()
    before = clean.pids()

    foretold = clean.play("rebalance.yml", "-e", "ratio=1p2d", "--check").good()
    assert "move 1 of 2: decode-1 (" in foretold.text
    assert foretold.changed == {"gh200": 0, "a100": 0}
    for words, why in (
        (["-e", "ratio=2agg"], "its mode is fixed at its start"),
        (["-e", "ratio=2p2d", "-e", '{"engine_env": {"X": "1"}}'], "would restart for another reason"),
    ):
        refused = clean.play("rebalance.yml", *words)
        assert refused.code != 0
        assert why in " ".join(refused.text.split())
        assert "ansible-playbook deploy_pd.yml -e ratio=" in " ".join(refused.text.split())
    assert clean.pids() == before

    with asking(clean) as told:
        play = clean.play("rebalance.yml", "-e", "ratio=1p2d").good()
    assert "drained in" in play.text
    assert len(told) > 20
    assert set(told) == {""}
    assert roles(clean) == ["decode", "decode", "prefill"]
    after = clean.pids()
    assert set(after) & set(before) >= {"pd-router", "pd-decode-0"}
    assert {name: pid for name, pid in after.items() if name in before} == {n: p for n, p in before.items() if n in after}
    assert clean.play("rebalance.yml", "-e", "ratio=1p2d").good().changed == {"gh200": 0, "a100": 0}
    assert clean.play("deploy_pd.yml", "-e", "ratio=1p2d").good().changed == {"gh200": 0, "a100": 0}
    assert clean.pids() == after
