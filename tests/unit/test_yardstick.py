"""The comparison of load generators: its truth server, its figures, its page."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from yardstick import table
from yardstick.measure import Case, Meter, _truth
from yardstick.tools import HERE, TOOLS

META = {"date": "2026-01-01", "cpus": 2, "python": "Python 3.11", "repeats": 3, "ttft_ms": 50, "itl_ms": 10, "osl": 128}


def row(tool: str, case: str, repeat: int, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "tool": tool, "name": case, "repeat": repeat, "served": 1000, "cpu_s": 2.5 + 0.1 * repeat, "delivered": 0.99,
        "ttft_ms": 57.0, "true_ttft_ms": 50.0, "ttft_p99_ms": 90.0, "true_ttft_p99_ms": 60.0, "itl_ms": 10.0, "true_itl_ms": 10.0,
        "connections": 512, "other_cores": 0.1, "server_late_ms": 0.4, "core_taken": False, "meter": "cpuacct", "says": "",
    }  # fmt: skip
    return {**made, **more}


def rows(tool: str) -> list[dict[str, Any]]:
    start = [row(tool, table.START, n, served=2, cpu_s=0.3 + 0.1 * n) for n in range(3)]
    return start + [row(tool, "c512", n) for n in range(3)]


def test_cpu_is_net_of_starting_and_errors_are_against_the_truth() -> None:
    found = table.figures(rows("pdbench"), "pdbench", "c512")
    cpu, ttft, tail = (found[name] for name in ("cpu_ms", "ttft_wrong_by", "ttft_p99_wrong_by"))
    assert cpu is not None
    assert (cpu.median, cpu.least, cpu.most) == pytest.approx((2.2, 2.1, 2.3))
    assert ttft == table.Spread(7, 7, 7)
    assert tail == table.Spread(30, 30, 30)


def test_the_page_keeps_who_could_not_be_measured() -> None:
    broken = row("sglang-python", "c512", 0, problem="it left no figures (KeyError, exit code 1): boom")
    made = table.page(
        {**META, "absent": {"aiperf": "no wheel"}}, [*rows("pdbench"), broken], ["pdbench", "sglang-python", "aiperf"]
    )
    assert "| CPU a request, 512 in flight (ms) | ≤ 1.7 | 2.20 [2.10 .. 2.30] | - | - | **no** |" in made
    assert "| mean TTFT error, 512 in flight (ms) | ≤ 8 | 7.00 | - | - | yes |" in made
    assert "- aiperf was not measured: no wheel" in made
    assert "- sglang-python, 512 in flight: it left no figures (KeyError, exit code 1): boom" in made
    assert "| aiperf | - | - |" in made


def test_pdbench_names_tokens_that_share_an_event(tmp_path: Path) -> None:
    summary = {"completed": 4, "ttft_ms": {"mean": 51.0, "p99": 60.0}, "itl_ms": {"mean": 40.0}, "itl_token_ms": {"mean": 10.0}}
    notes = ["one event holds 4.0 output tokens on average: x", "something else"]
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "points": [{"notes": notes}]}))
    found = TOOLS["pdbench"].read(tmp_path)
    assert (found.completed, found.ttft_ms, found.itl_ms, found.says) == (4, 51.0, 10.0, notes[0])


def test_every_process_of_a_tool_is_charged() -> None:
    meter = Meter()
    try:
        spin = "import time\nwhile time.process_time() < 0.2: pass"
        argv = meter.wrap(["/bin/sh", "-c", 'python3 -c "$0" & python3 -c "$0"; wait', spin])
        subprocess.run(argv, check=True, timeout=60)
        assert meter.seconds() >= 0.4
    finally:
        meter.close()


@pytest.mark.parametrize(("per_event", "per_write", "events", "writes"), [(1, 1, 128, 128), (4, 1, 33, 33), (1, 4, 128, 33)])
def test_the_truth_server_keeps_its_schedule(tmp_path: Path, per_event: int, per_write: int, events: int, writes: int) -> None:
    if not shutil.which("gcc"):
        pytest.skip("gcc is not here")
    binary, log = tmp_path / "truthd", tmp_path / "log"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(binary), str(HERE / "truthd.c")], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [str(binary), str(port), str(log), "20", "2", str(per_event), str(per_write)], stderr=subprocess.PIPE
    )
    try:
        time.sleep(0.2)
        body = json.dumps({"model": "m", "prompt": "x", "max_tokens": 128, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            sent = time.monotonic()
            client.sendall(head + body)
            answer = b""
            while not answer.endswith(b"0\r\n\r\n"):
                answer += client.recv(65536)
            took = time.monotonic() - sent
    finally:
        server.terminate()
        server.wait(10)
    assert (answer.count(b"data: {"), answer.count(b" the"), answer.count(b"[DONE]")) == (events, 128, 1)
    assert took >= 0.02 + 127 * 0.002
    (line,) = log.read_text().splitlines()
    assert int(line.split(",")[6]) == writes
    truth = _truth(log, Case("x", 1, 1, per_event, per_write))
    assert truth["true_ttft_ms"] >= 20
    assert truth["true_itl_ms"] * 127 >= 127 * 2 - (truth["true_ttft_ms"] - 20) - 0.01
    assert truth["delivered"] == pytest.approx(1)
