"""The KV path probe with the real NIXL and Mooncake, over TCP on loopback: what works, and what it makes of what does not."""

from __future__ import annotations

import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from probe_ends import ADDRESS, Ends, pair, task
from real import helpers

from pdlib import probe_verdict

Json = dict[str, Any]
#: UCX takes shared memory between two processes of one machine, and several network devices at once, unless told otherwise.
TCP = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
#: Lets every pair have an environment, changes of the program and parts of the task of its own: each is a process of its own.
OWN = """
did = tool.run_pair
def run_pair(task, pair, stages):
    import os
    os.environ.update(pair["env"])
    exec(pair["change"], globals())
    return did({**task, **pair["task"]}, pair, stages)
tool.run_pair = run_pair
"""
#: One byte of the sender's memory changes after its checksum was made.
LIES = """
digest = tool.HostMemory.digest
def lies(self, size):
    found = digest(self, size)
    self.map[size // 2] ^= 1
    return found
tool.HostMemory.digest = lies
"""


@pytest.fixture(scope="module")
def engine() -> tuple[str, dict[str, str]]:
    """The real engine's Python and environment; skips the tests where it has no transfer engine."""
    python, env = helpers.engine_python()
    asked = [python, "-c", "import importlib.util, mooncake.engine; assert importlib.util.find_spec('nixl'), 'no nixl'"]
    found = subprocess.run(asked, capture_output=True, text=True, env=env, check=False)
    if found.returncode:
        pytest.skip(f"{python} has no transfer engines: {found.stderr.strip().splitlines()[-1]}")
    return python, env


@pytest.fixture
def ends(engine: tuple[str, dict[str, str]], tmp_path: Path) -> Iterator[Ends]:
    made = Ends(tmp_path, *engine)
    yield made
    made.close()


def verdict(backend: str, result: Json, expected: str = "tcp", op: str = "write") -> Json:
    """What the deployment would say of a pair between two hosts."""

    def end(host: str) -> Json:
        return {"host": host, "address": ADDRESS, "python": "python", "gpu": None}

    work = {"backend": backend, "op": op, "ends": {"p": end("h1"), "d": end("h2")}}
    return probe_verdict.judge(work, {"from": "p", "to": "d", "expected": expected}, result)


def fine(said: Json, result: Json) -> None:
    assert said["ok"], said
    assert said["seen"] == "tcp"
    assert result["sha256_sent"] == result["sha256_received"]
    assert any(name.startswith(("nixl", "mooncake")) for name in said["versions"])
    print(f"{said['gb_s']:.2f} GB/s, {said['latency_us']:.0f} us, {said['bytes'] >> 20} MiB x {said['transfers']}")


# ---------------------------------------------------------------- NIXL


@pytest.fixture(scope="module")
def nixl(engine: tuple[str, dict[str, str]]) -> Iterator[dict[str, Json]]:
    """What became of pairs of all sorts. The import of NIXL brings torch along, so that they share their programs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = Ends(folder, *engine)
        wrong = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "nonexistent0"}
        try:
            good = made.waiting(task(folder, "wait", "nixl"), env=TCP)
            other = task(folder, "wait", "nixl", id="decode-1", progress=str(folder / "decode-1.json"))
            bad = made.waiting(other, env=wrong)
            with socket.create_server((ADDRESS, 0)) as server:
                closed = server.getsockname()[1]
            cases: dict[str, Json] = {
                "write": {"port": good},
                "read": {"port": good, "task": {"op": "read"}},
                "lies": {"port": good, "change": LIES},
                "wrong device": {"port": bad},
                "wrong device here": {"port": good, "env": wrong},
                "one device too many": {"port": good, "env": {"UCX_NET_DEVICES": "lo,mlx5_9:1"}},
                "closed": {"port": closed},
            }
            pairs = [pair(id=name, **{"env": {}, "change": "", "task": {}, **case}) for name, case in cases.items()]
            results = made.moved(task(folder, "move", "nixl", pairs=pairs), OWN, TCP)
            yield {row["pair"]: row for row in results}
        finally:
            made.close()


@pytest.mark.parametrize("op", ["write", "read"])
def test_nixl_moves_bytes(nixl: dict[str, Json], op: str) -> None:
    said = verdict("nixl", nixl[op], op=op)
    fine(said, nixl[op])
    assert said["devices"] == "lo"


def test_wrong_contents_are_caught(nixl: dict[str, Json]) -> None:
    said = verdict("nixl", nixl["lies"])
    assert not said["ok"]
    assert said["finding"].startswith("the contents differ: sha256 ")


@pytest.mark.parametrize(("case", "host"), [("wrong device", "h2"), ("wrong device here", "h1")])
def test_a_device_that_is_not_there_is_named(nixl: dict[str, Json], case: str, host: str) -> None:
    said = verdict("nixl", nixl[case])
    assert not said["ok"]
    assert said["cause"] == f"there is no device nonexistent0 on {host}"
    assert f"tcp_device of {host}" in said["fix"]


def test_one_device_too_many_is_named_though_the_others_work(nixl: dict[str, Json]) -> None:
    result = nixl["one device too many"]
    assert result["sha256_sent"] == result["sha256_received"]
    said = verdict("nixl", result)
    assert not said["ok"]
    assert "the device mlx5_9:1 is not there" in said["finding"]


def test_tcp_where_rdma_was_expected_is_a_finding(nixl: dict[str, Json]) -> None:
    said = verdict("nixl", nixl["write"], expected="rdma")
    assert said["finding"] == "the bytes went by TCP (lo), and RDMA was expected"


def test_a_closed_port_is_named(nixl: dict[str, Json]) -> None:
    said = verdict("nixl", nixl["closed"])
    assert "refuses connections" in said["finding"]
    assert said["cause"].startswith("h2 rejects what comes from h1")


# ---------------------------------------------------------------- Mooncake

FORCED = {"MC_FORCE_TCP": "1"}


@pytest.mark.parametrize("op", ["write", "read"])
def test_mooncake_moves_bytes(ends: Ends, op: str) -> None:
    result = ends.run("mooncake_tcp", op=op, env=FORCED, env_there=FORCED)
    fine(verdict("mooncake_tcp", result, op=op), result)


def test_wrong_contents_of_mooncake_are_caught(ends: Ends) -> None:
    said = verdict("mooncake_tcp", ends.run("mooncake_tcp", LIES, env=FORCED, env_there=FORCED))
    assert said["finding"].startswith("the contents differ: sha256 ")


def test_mooncake_that_falls_back_to_tcp_is_a_finding(ends: Ends) -> None:
    """It has no HCA here, and says nothing that anybody would read."""
    said = verdict("mooncake", ends.run("mooncake", ib_device="mlx5_0"), expected="rdma")
    assert (said["ok"], said["seen"]) == (False, "tcp")
    assert said["finding"] == "the bytes went by TCP, and RDMA was expected"
    assert "falls back to TCP" in said["cause"]
    assert said["gb_s"] > 0


def test_a_closed_port_of_the_engine_s_own_is_named(ends: Ends) -> None:
    """The control connection works, and Mooncake's does not: what a firewall does that lets some ports through."""
    elsewhere = "\nmeta = tool.Mooncake.meta\ntool.Mooncake.meta = lambda self: {**meta(self), 'port': 1}"
    said = verdict("mooncake_tcp", ends.run("mooncake_tcp", "", elsewhere, env=FORCED, env_there=FORCED))
    assert not said["ok"]
    assert said["cause"].startswith("the control connection works and Mooncake's own do not")
    assert "h1 and h2" in said["fix"]


def test_a_library_that_is_not_there_is_named(ends: Ends, tmp_path: Path) -> None:
    (tmp_path / "empty" / "mooncake").mkdir(parents=True)
    (tmp_path / "empty" / "mooncake" / "__init__.py").touch()
    said = verdict("mooncake", ends.run("mooncake", env_there={"PYTHONPATH": str(tmp_path / "empty")}))
    assert said["cause"] == "python on h2 has no Mooncake"
