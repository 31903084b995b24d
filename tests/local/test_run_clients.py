"""Several clients make one load, as they would on hosts of their own; here all are on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from emulated_workers import Service, free_port, service

from pdbench.records import MEASURE, WARMUP, read_parquet

TESTS = Path(__file__).resolve().parents[1]
PATIENT = ("--max-loop-lag-ms", "5000", "--max-lateness-ms", "5000", "--min-delivered", "0")


@pytest.fixture(scope="module")
def server() -> Iterator[Service]:
    port = free_port()
    with service([sys.executable, str(TESTS / "truth_server.py"), str(port)], f"http://127.0.0.1:{port}", "/ready") as made:
        yield made


def together(url: str, folder: Path, *given: tuple[str, ...], end_first: int | None = None) -> list[tuple[int, str]]:
    """Run a client for each of ``given``, its own options, and return what became of each; ``end_first``: kill that one early."""
    folder.mkdir()
    (folder / "key").write_text("0123456789abcdef")
    meet = f"127.0.0.1:{free_port()}"
    common = ["--url", url, "--model", "good", "--isl", "16-32", "--osl", "8", *PATIENT]
    with ExitStack() as stack:
        started = []
        for number, options in enumerate(given, 1):
            own = ["--share", f"{number}/{len(given)}", "--meet", meet, "--meet-key", str(folder / "key")]
            argv = [sys.executable, "-m", "pdbench", "run", *common, *own, "--output", str(folder / f"c{number}"), *options]
            pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            process = stack.enter_context(subprocess.Popen(argv, text=True, **pipes))
            stack.callback(process.kill)
            started.append(process)
        if end_first is not None:
            journal = folder / f"c{end_first + 1}" / "requests.jsonl"
            while not journal.exists() or '"measure"' not in journal.read_text():
                assert started[end_first].poll() is None, started[end_first].communicate()
            started[end_first].kill()
        said = [process.communicate(timeout=90)[0] for process in started]
        return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def merged(folder: Path, *names: str) -> tuple[int, str, dict[str, Any]]:
    argv = [sys.executable, "-m", "pdbench", "merge", str(folder / "run"), *(str(folder / name) for name in names)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    path = folder / "run" / "summary.json"
    return done.returncode, done.stdout + done.stderr, json.loads(path.read_text()) if path.exists() else {}


def test_two_clients_make_one_run(server: Service, tmp_path: Path) -> None:
    load = ("--concurrency", "1,3", "--num-requests", "12", "--seed", "5")
    ends = together(server.url, tmp_path / "o", load, load)
    assert [code for code, _ in ends] == [3, 3], ends
    assert "the share of client 2 of 2 alone" in ends[1][1]
    code, text, summary = merged(tmp_path / "o", "c1", "c2")
    assert code == 0, text
    assert (summary["completed"], summary["failed"], summary["invalid_reasons"]) == (24, 0, [])
    records = read_parquet(tmp_path / "o" / "run" / "requests.parquet")
    for number, slots in enumerate((1, 3)):
        mine = [r for r in records if r.point == number and r.phase == MEASURE]
        assert [r.index for r in mine] == list(range(12)), "every request of the schedule once"
        assert sum(r.point == number and r.phase == WARMUP for r in records) == slots, "one client warms up"
        entries = summary["points"][number]["clients"]
        assert [e["name"] for e in entries] == ["c1", "c2"]
        assert [e["asked"] for e in entries] == ([12, 0] if slots == 1 else [8, 4])
        assert all(0 <= e["clock"]["error_s"] < 0.5 for e in entries)
        # One machine has one clock: what was found between the two is the error, and the bound must hold it.
        assert all(abs(e["clock"]["offset_s"]) <= e["clock"]["error_s"] + 1e-6 for e in entries)
        firsts = sorted(r.scheduled_s for r in mine)[:slots]
        bound = entries[1]["clock"]["error_s"] + 1e-4
        assert firsts[-1] - firsts[0] <= bound, "all slots of all clients begin at one moment"
        assert min(r.sent_s for r in mine) > max(r.end_s for r in records if r.point == number and r.phase == WARMUP)


def test_other_loads_and_keys_are_refused_and_a_killed_client_is_named(server: Service, tmp_path: Path) -> None:
    load = ("--concurrency", "2", "--num-requests", "4")
    (first, said), (second, text) = together(server.url, tmp_path / "a", load, (*load, "--seed", "2"))
    assert (first, second) == (1, 1)
    assert "client 2 of 2: it was given another load, seed or server than the first client" in said
    assert "it was given another load, seed or server" in text

    long = ("--request-rate", "20", "--num-requests", "400")
    (first, said), _ = together(server.url, tmp_path / "b", long, long, end_first=1)
    assert first == 3, said
    assert "client 2 of 2 is gone" in said
    code, text, summary = merged(tmp_path / "b", "c1", "c2")
    assert code == 3
    assert "client c2 has nothing to add: summary.json is missing" in text
    assert not summary["valid"]
    assert summary["completed"] > 0, "what the other one measured is kept"


def test_climbing_stops_where_the_servers_are_saturated(tmp_path: Path) -> None:
    port = free_port()
    argv = [
        sys.executable,
        "-m",
        "pdbench",
        "emulate",
        "--role",
        "aggregated",
        "--port",
        str(port),
        "--max-running-requests",
        "8",
    ]
    with service(argv, f"http://127.0.0.1:{port}", "/health") as slow:
        folder = tmp_path / "o"
        rates = ["--request-rate", "40,80", "--num-requests", "600", "--stop-saturated", "--arrival", "constant"]
        size = ["--isl", "64", "--osl", "20", *PATIENT]
        command = [sys.executable, "-m", "pdbench", "run", "--url", slow.url, "--model", "default", *size, *rates]
        done = subprocess.run([*command, "--output", str(folder)], capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    (point,) = summary["points"]
    assert point["saturation"]["oversaturated"] is True
    assert point["num_requests"] < 600
    assert point["ended_early"].startswith("over-saturated")
    assert [p["request_rate"] for p in summary["not_run"]] == [80]
    assert "not run: 80 req/s: 40 req/s was over-saturated (--stop-saturated)" in done.stdout
    assert json.loads((folder / "progress.json").read_text())["points"] == 1
