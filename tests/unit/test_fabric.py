"""Transfer backends and expected transports."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit.gate_faults import expect
from unit.runfolder import good

from pdbench.gate.rundata import load
from pdbench.gate.transport import transport
from pdlib.errors import UserError
from pdlib.fabric import Link
from pdlib.fabric_ways import choose_backend, expected_transport, forces_tcp

ENGINE = ("nixl", "mooncake", "mooncake_tcp")
IB, IB2 = Link("infiniband", ("mlx5_0",)), Link("infiniband", ("mlx5_3",))
ROCE, NONE, AUTO = Link("roce", ("mlx5_4",)), Link("none", ()), Link("auto", ())
BARE = Link("infiniband", ())
AB, AA = [("a", "b")], [("a", "a")]


@pytest.mark.parametrize(
    ("pairs", "a", "b", "wanted", "reason"),
    [
        ([], IB, IB2, "none", "move no KV cache"),
        (AA, IB, IB2, "nixl", "NVLink (cuda_ipc)"),
        (AA, AUTO, AUTO, "nixl", "NVLink (cuda_ipc)"),
        (AB, IB, IB2, "mooncake", "one RDMA fabric (infiniband)"),
        (AB, ROCE, ROCE, "mooncake", "one RDMA fabric (roce)"),
        ([*AA, *AB], IB, IB2, "mooncake", "one RDMA fabric (infiniband)"),
        (AB, IB, ROCE, "nixl", "a is infiniband and b is roce: no common RDMA path"),
        (AB, IB, NONE, "nixl", "b is none"),
        (AB, NONE, NONE, "nixl", "no RDMA fabric: TCP"),
        (AB, IB, BARE, "nixl", "no usable RDMA device on b"),
        (AB, BARE, BARE, "nixl", "no usable RDMA device on a and b"),
    ],
)
def test_auto(pairs: list[tuple[str, str]], a: Link, b: Link, wanted: str, reason: str) -> None:
    backend, why = choose_backend("auto", ENGINE, pairs, {"a": a, "b": b})
    assert backend == wanted
    assert reason in why


def test_auto_does_not_guess_an_undeclared_fabric() -> None:
    with pytest.raises(UserError, match=r"rdma_fabric is not declared for b: .*infiniband, roce or none") as refused:
        choose_backend("auto", ENGINE, AB, {"a": IB, "b": AUTO})
    assert "transfer_backend" in str(refused.value)


@pytest.mark.parametrize("backend", ENGINE)
def test_explicit_values_win(backend: str) -> None:
    for pairs, links in ((AB, {"a": IB, "b": ROCE}), (AA, {"a": AUTO}), (AB, {"a": AUTO, "b": AUTO}), ([], {})):
        assert choose_backend(backend, ENGINE, pairs, links) == (backend, "set by transfer_backend")


def test_unknown_backend_says_what_there_is() -> None:
    with pytest.raises(UserError, match=r"transfer_backend='nixel': one of auto, nixl, .*did you mean nixl\?"):
        choose_backend("nixel", ENGINE, AB, {"a": IB, "b": IB})


@pytest.mark.parametrize(
    ("backend", "prefill", "decode", "a", "b", "on_cpu", "wanted"),
    [
        ("nixl", "a", "a", NONE, NONE, False, "cuda_ipc"),
        ("nixl", "a", "a", IB, IB, False, "cuda_ipc"),
        ("nixl", "a", "b", IB, IB2, False, "rdma"),
        ("nixl", "a", "b", IB, ROCE, False, "tcp"),
        ("nixl", "a", "b", NONE, NONE, False, "tcp"),
        ("nixl", "a", "b", IB, BARE, False, "tcp"),
        ("mooncake", "a", "b", ROCE, ROCE, False, "rdma"),
        ("mooncake", "a", "b", IB, ROCE, False, "tcp"),
        ("mooncake", "a", "a", IB, IB, False, "rdma"),
        ("mooncake", "a", "a", NONE, NONE, False, "tcp"),
        ("mooncake_tcp", "a", "b", IB, IB2, False, "tcp"),
        ("mooncake_tcp", "a", "a", IB, IB, False, "tcp"),
        ("nixl", "a", "a", NONE, NONE, True, "tcp"),
        ("mooncake", "a", "b", IB, IB2, True, "tcp"),
    ],
)
def test_expected_transport(backend: str, prefill: str, decode: str, a: Link, b: Link, on_cpu: bool, wanted: str) -> None:
    assert expected_transport(backend, prefill, decode, {"a": a, "b": b}, on_cpu) == wanted


@pytest.mark.parametrize("a", [IB, ROCE, NONE, BARE])
@pytest.mark.parametrize("b", [IB2, ROCE, NONE, BARE])
def test_auto_never_promises_what_it_does_not_expect(a: Link, b: Link) -> None:
    links = {"a": a, "b": b}
    backend, reason = choose_backend("auto", ENGINE, AB, links)
    transport = expected_transport(backend, "a", "b", links, on_cpu=False)
    assert ("TCP" in reason) == (transport == "tcp"), (reason, transport)
    assert (backend == "mooncake") == (transport == "rdma")


def test_mooncake_goes_over_nvlink_within_a_host_where_it_was_told_to() -> None:
    links = {"a": Link("none", ()), "b": Link("none", ())}
    env = {"MC_INTRANODE_NVLINK": "1"}
    assert expected_transport("mooncake", "a", "a", links, False, env) == "cuda_ipc"
    assert expected_transport("mooncake", "a", "b", links, False, env) == "tcp"
    assert expected_transport("mooncake", "a", "a", links, False, {}) == "tcp"
    assert expected_transport("mooncake_tcp", "a", "a", links, False, env) == "tcp"
    assert not forces_tcp("mooncake", [("a", "a")], links, [env])
    assert forces_tcp("mooncake", [("a", "a"), ("a", "b")], links, [env, env])
    assert forces_tcp("mooncake", [("a", "a")], links, [{}])


def test_the_gate_knows_the_fabric_between_npus(tmp_path: Path) -> None:
    run = good(concurrency=(4,))
    expect(run, "hccs")
    found = transport(load(run.write(tmp_path / "unseen")))
    assert found.ok
    assert "memfabric nowhere" in found.message
    run.logs["gh200-pd-prefill-0.log"] = "Using TCP transport (no HCA detected)"
    found = transport(load(run.write(tmp_path / "tcp")))
    assert not found.ok
    assert "prefill-0 to decode-0: tcp seen (log of prefill-0), hccs expected" in found.message
