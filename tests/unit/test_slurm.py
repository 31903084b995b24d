"""Slurm's node lists, and the inventory of an allocation."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlib import slurm
from pdlib.errors import UserError


@pytest.mark.parametrize(
    ("nodelist", "nodes"),
    [
        ("gpu7", ["gpu7"]),
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("r[1-2]n[09-10]-ib", ["r1n09-ib", "r1n10-ib", "r2n09-ib", "r2n10-ib"]),
        ("a.b-c[8-11]", ["a.b-c8", "a.b-c9", "a.b-c10", "a.b-c11"]),
        ("n1,n1,n[1-2]", ["n1", "n2"]),
    ],
)
def test_a_list_is_expanded_as_scontrol_does(nodelist: str, nodes: list[str]) -> None:
    assert slurm.expand(nodelist) == nodes


@given(first=st.integers(0, 300), more=st.integers(0, 60), width=st.integers(1, 5))
def test_a_range_has_every_number_once_with_its_zeros(first: int, more: int, width: int) -> None:
    nodes = slurm.expand(f"n[{first:0{width}}-{first + more:0{width}}]")
    assert nodes == [f"n{number:0{max(width, len(f'{first:0{width}}'))}}" for number in range(first, first + more + 1)]


@settings(max_examples=300)
@given(st.text(alphabet="ab1209[],- ", max_size=14))
def test_what_is_no_list_is_refused_and_what_is_one_has_whole_names(nodelist: str) -> None:
    try:
        nodes = slurm.expand(nodelist)
    except UserError:
        return
    assert nodes
    assert all(name and not set(name) & set("[], ") for name in nodes)


def test_every_node_may_have_workers_and_the_first_the_rest() -> None:
    said = {slurm.NODES: "n[1-2]", slurm.GPUS: "8"}
    found: dict[str, Any] = slurm.inventory(said, {"n1": "10.0.0.1", "n2": "10.0.0.2"}.__getitem__)
    assert found["prefill_nodes"]["hosts"] == found["decode_nodes"]["hosts"] == ["n1", "n2"]
    assert found["router"]["hosts"] == found["bench_clients"]["hosts"] == ["n1"]
    assert found["_meta"]["hostvars"]["n2"] == {"address": "10.0.0.2", "gpus": 8}
    del said[slurm.GPUS]
    for text, gpus in (("4", 4), ("h200:4", 4), ("h200:4,a100:4", "auto"), ("0", "auto"), ("", "auto")):
        made: Any = slurm.inventory({**said, slurm.ASKED: text}, lambda node: node)
        assert made["_meta"]["hostvars"]["n1"]["gpus"] == gpus
    assert slurm.inventory(said, lambda node: node)["_meta"]["hostvars"]["n1"]["gpus"] == "auto"  # type: ignore[index]
    with pytest.raises(UserError, match="salloc"):
        slurm.inventory({}, lambda node: node)
