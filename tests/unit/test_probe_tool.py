"""The program that moves bytes: what it says of ends that crash, hang, lie or are not there. Its engine here is a file."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from probe_ends import ADDRESS, FILES, TOKEN, Ends, pair, task

from pdlib import probe_tool


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    made = Ends(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("op", ["write", "read"])
def test_what_was_sent_has_arrived(ends: Ends, op: str) -> None:
    result = ends.run("nixl", FILES, FILES, op=op)
    assert (result["kind"], result["error"]) == ("", "")
    assert result["sha256_sent"] == result["sha256_received"]
    assert result["gb_s"] > 0
    assert result["latency_us"] > 0
    assert probe_tool.MEDIUM <= result["bytes"] <= probe_tool.LARGE


@pytest.mark.parametrize("op", ["write", "read"])
def test_a_transfer_that_moves_nothing_is_no_transfer(ends: Ends, op: str) -> None:
    """What lies there from before does not count."""
    lost = (
        FILES + "\nFiles.transfer = lambda self, op, size, did=Files.transfer: None if size > tool.SMALL else did(self, op, size)"
    )
    result = ends.run("nixl", lost, FILES, op=op)
    assert result["kind"] == ""
    assert result["sha256_sent"] != result["sha256_received"]


def test_one_wrong_byte_is_seen(ends: Ends) -> None:
    flips = FILES + (
        "\ndid = Files.transfer\ndef transfer(self, op, size):\n    did(self, op, size)\n    self.there.seek(size - 1)\n"
        "    self.there.write(bytes([self.mem.map[size - 1] ^ 1]))\n    self.there.flush()\nFiles.transfer = transfer"
    )
    result = ends.run("nixl", flips, FILES)
    assert result["sha256_sent"] != result["sha256_received"]


DIES = "\nimport os, signal\nFiles.transfer = lambda *_: os.kill(os.getpid(), signal.SIGSEGV)"
DIES_THERE = "\nimport os, signal\nFiles.__init__ = lambda *_: os.kill(os.getpid(), signal.SIGSEGV)"
HANGS = "\nimport time\ntool.PAIR_S = 1.0\nFiles.transfer = lambda *_: time.sleep(60)"
RAISES = "\nFiles.__init__ = lambda self, *_: 1 / 0"
LACKS = "\nFiles.__init__ = lambda *_: tool.importlib.import_module('no_such_engine')"


@pytest.mark.parametrize(
    ("change", "there", "kind", "error", "at_the_other_end"),
    [
        (DIES, "", "died", "signal 11", False),
        (HANGS, "", "timeout", "not done after 1 s", False),
        (RAISES, "", "engine", "ZeroDivisionError", False),
        ("", RAISES, "engine", "ZeroDivisionError", True),
        ("", DIES_THERE, "died", "signal 11", True),
        (LACKS, "", "import", "No module named 'no_such_engine'", False),
    ],
)  # fmt: skip
def test_an_end_that_breaks_is_named(ends: Ends, change: str, there: str, kind: str, error: str, at_the_other_end: bool) -> None:
    result = ends.run("nixl", FILES + change, FILES + there)
    assert (result["kind"], result["there"]) == (kind, at_the_other_end)
    assert error in result["error"]


def test_a_pair_that_breaks_leaves_the_others_alone(ends: Ends, tmp_path: Path) -> None:
    port = ends.waiting(task(tmp_path, "wait", "nixl"), FILES)
    once = FILES + "\ndid = tool.run_pair\ntool.run_pair = lambda t, p, s: (1 / 0) if p['id'] == '0' else did(t, p, s)"
    results = ends.moved(task(tmp_path, "move", "nixl", pairs=[pair(port), pair(port, id="1")]), once)
    assert [(row["pair"], row["kind"]) for row in results] == [("0", "engine"), ("1", "")]


def test_nobody_there_is_told_from_a_wrong_name(ends: Ends, tmp_path: Path) -> None:
    with socket.create_server((ADDRESS, 0)) as server:
        port = server.getsockname()[1]
    pairs = [pair(port), pair(port, id="1", address="no-such-host.invalid")]
    results = ends.moved(task(tmp_path, "move", "nixl", pairs=pairs), FILES)
    assert [row["kind"] for row in results] == ["refused", "name"]
    assert f"{ADDRESS} port {port}" in results[0]["error"]


def test_a_cut_path_is_told_from_a_refusal(ends: Ends, tmp_path: Path) -> None:
    """Packets that are dropped on the way: here by a socket whose queue is full."""
    with socket.socket() as server, socket.socket() as first, socket.socket() as second:
        server.bind((ADDRESS, 0))
        server.listen(0)
        for sock in (first, second):
            sock.setblocking(False)
            sock.connect_ex(server.getsockname())
        port = server.getsockname()[1]
        (result,) = ends.moved(task(tmp_path, "move", "nixl", pairs=[pair(port)], connect_s=0.5), FILES)
    assert (result["kind"], result["there"]) == ("silence", False)
    assert f"no answer from {ADDRESS} port {port}" in result["error"]


def test_who_has_no_token_gets_nothing(ends: Ends, tmp_path: Path) -> None:
    port = ends.waiting(task(tmp_path, "wait", "nixl"), FILES)
    with socket.create_connection((ADDRESS, port), timeout=20) as sock:
        sock.sendall(json.dumps({"token": TOKEN + "x", "pair": "0"}).encode() + b"\n")
        assert sock.recv(100) == b""
    results = ends.moved(task(tmp_path, "move", "nixl", pairs=[pair(port)]), FILES)
    assert results[0]["kind"] == ""


def test_a_host_serves_one_pair_at_a_time(ends: Ends, tmp_path: Path) -> None:
    """Two ends on one host share its turn, so that neither measures the other's traffic."""
    turn = tmp_path / "turn"
    slow = FILES + (
        "\ndid = tool.measure\ndef measure(*args):\n    import time\n    began = time.time()\n"
        "    found = did(*args)\n    time.sleep(0.4)\n"
        "    return {**found, 'from': began, 'to': time.time()}\ntool.measure = measure"
    )
    todo = []
    for number in (0, 1):
        wait = task(tmp_path, "wait", "nixl", id=f"decode-{number}", turn=str(turn), progress=str(tmp_path / f"w{number}.json"))
        port = ends.waiting(wait, FILES)
        more = {"id": f"prefill-{number}", "host": f"h{4 + number}", "turn": str(tmp_path / f"own-{number}")}
        todo.append(task(tmp_path, "move", "nixl", pairs=[pair(port)], progress=str(tmp_path / f"m{number}.json"), **more))
    started = [ends.start(row, slow) for row in todo]
    for process in started:
        process.wait(60)
    spans = sorted((row["from"], row["to"]) for t in todo for row in json.loads(Path(t["progress"]).read_text())["results"])
    assert len(spans) == 2
    assert spans[0][1] <= spans[1][0] + 0.01


def test_who_waits_goes_when_nobody_comes(ends: Ends, tmp_path: Path) -> None:
    todo = task(tmp_path, "wait", "nixl", idle_s=0.2)
    process = ends.start(todo, FILES)
    assert process.wait(60) == 0


def test_an_address_that_cannot_be_bound_is_said(ends: Ends, tmp_path: Path) -> None:
    todo = task(tmp_path, "wait", "nixl", listen="192.0.2.1")
    assert ends.start(todo, FILES).wait(60) == 1
    said = json.loads(Path(todo["progress"]).read_text())
    assert said["state"] == "error"
    assert "annot assign requested address" in said["message"]


@pytest.mark.parametrize(
    ("flag", "gpu", "devices"),
    [
        ("", None, ""),
        ("mlx5_0,mlx5_1", 3, "mlx5_0,mlx5_1"),
        ('{"0": "mlx5_0", "1": "mlx5_3"}', 1, "mlx5_3"),
        ('{"0": "mlx5_0"}', None, "mlx5_0"),
    ],
)
def test_which_devices_a_gpu_has(flag: str, gpu: int | None, devices: str) -> None:
    assert probe_tool.ib_devices({"ib_device": flag, "gpu": gpu}) == devices


def test_a_map_without_the_gpu_is_refused() -> None:
    with pytest.raises(probe_tool.Failed, match="no device for GPU 2"):
        probe_tool.ib_devices({"ib_device": '{"0": "mlx5_0"}', "gpu": 2})


def test_a_map_may_lie_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text('{"0": "mlx5_4"}')
    assert probe_tool.ib_devices({"ib_device": str(file), "gpu": 0}) == "mlx5_4"


def test_ucx_tables_become_lines(tmp_path: Path) -> None:
    log = tmp_path / "ucx"
    stamp = "[1795257183.034753] [vm:4990 :0]   "
    log.write_text(
        f"{stamp}| src inter-node cfg#1                                     |\n"
        f"{stamp}| active message by ucp_am_send* from host memory |\n{stamp}| 0..8 | short | tcp/eth1 |\n"
        f"{stamp}| 9..inf | zero-copy | tcp/eth1 |\n"
        f"{stamp}+--------+-------------+---+\n"
        f"{stamp}| src inter-node cfg#1                                     |\n"
        f"{stamp}| remote memory write by ucp_put* from cuda/GPU0 memory to cuda/GPU1 |\n"
        f"{stamp}|  Range |  Description |  Config  |\n{stamp}| 0..inf | zero-copy   | rc_mlx5/mlx5_0:1     |\n"
        "[1.1] [vm:1:0] ucp_context.c:1508 UCX WARN network device 'x' is not available, please use one or more of: 'lo'(tcp)\n"
        "nothing of interest\n"
    )
    found = probe_tool.evidence([log, tmp_path / "not there"])
    assert found[:2] == [
        "UCX inter-node: active message by ucp_am_send* from host memory: 9..inf: zero-copy: tcp/eth1",
        "UCX inter-node: remote memory write by ucp_put* from cuda/GPU0 memory to cuda/GPU1: 0..inf: zero-copy: rc_mlx5/mlx5_0:1",
    ]
    assert len(found) == 3
    assert "'x' is not available" in found[2]


def test_the_pair_s_time_starts_with_its_turn(ends: Ends, tmp_path: Path) -> None:
    """A pair that has to wait for others is not one that hangs."""
    turn = tmp_path / "turn-wait"
    port = ends.waiting(task(tmp_path, "wait", "nixl"), FILES)
    held = probe_tool.lock(str(turn))
    process = ends.start(task(tmp_path, "move", "nixl", pairs=[pair(port)]), FILES + "\ntool.PAIR_S = 3.0")
    time.sleep(4)
    held.close()
    process.wait(60)
    said = json.loads((tmp_path / "prefill-0-move.json").read_text())
    assert said["results"][0]["kind"] == ""
