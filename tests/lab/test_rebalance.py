"""The ratio changes while clients are served: no request fails, also none when a host dies half-way (docs/rebalance.md).

Half an hour, so with a target of its own: `make test-lab-rebalance` (docs/results/rebalance.md).
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from lab import hosts
from lab.common import REPO, address
from lab.controller import Controller, Play, asking, complete, counts, pids, router, sh, units, until

ALL = ("h1", "h2", "h3", "h4")
CHANGES = int(os.environ.get("PD_REBALANCE_CHANGES", "0"))
RATE = float(os.environ.get("PD_REBALANCE_RATE", "40"))
#: Seconds of load for each change at most; the load is stopped after the last one.
PACE_S = 120.0
#: Requests sent so long before the load was stopped have been answered, or are lost.
SETTLED_S = 3.0
at_length = pytest.mark.skipif(not CHANGES, reason="a quarter of an hour: make test-lab-rebalance (PD_REBALANCE_CHANGES=10)")
MODES = {
    "restart": [],
    "in place": ["-e", "transfer_backend=mooncake_tcp", "-e", json.dumps({"engine_args": {"enable-pd-role-switch": True}})],
}


@pytest.fixture(scope="module")
def four(pd: Controller) -> Iterator[Controller]:
    """The controller with the inventory of four hosts of one GPU; what other tests installed is not installed again."""
    usual, pd.inventory = pd.inventory, "tests/lab/inventory-rebalance"
    try:
        yield pd
    finally:
        try:
            pd.play("teardown.yml").good()
        finally:
            pd.inventory = usual


def roles() -> dict[str, int]:
    """Workers by role in the deployed plan, as the router's host has it."""
    found = [worker["role"] for worker in deployed()["workers"]]
    return {role: found.count(role) for role in set(found)}


def deployed() -> dict[str, Any]:
    """The deployed plan."""
    content: dict[str, Any] = json.loads(sh("h3", "cat /var/lib/pd/plan.json"))
    return content


class Live:
    """A verb that runs, whose lines are stamped as they come."""

    def __init__(self, pd: Controller, *words: str):
        self.started = time.perf_counter()
        self.process = pd.start("rebalance.yml", *words)
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append((time.perf_counter(), line.rstrip("\n")))

    def seen(self, text: str) -> float:
        """When a line with this text came, 0 while none did."""
        return next((stamp for stamp, line in list(self.lines) if text in line), 0.0)

    def end(self) -> Play:
        """Wait for its end."""
        try:
            code = self.process.wait(290)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            code = self.process.wait()
        self._reader.join(20)
        text = "\n".join(line for _, line in self.lines)
        play = Play(code, text, time.perf_counter() - self.started)
        print(f"rebalance.yml: {play.seconds:.1f} s, exit code {code}")
        return play

    def windows(self) -> list[tuple[float, float]]:
        """From what to what time each of its moves was made."""
        begun = [stamp for stamp, line in self.lines if line.startswith("move ") and "meanwhile" in line]
        made = [stamp for stamp, line in self.lines if line.startswith("move ") and " is made" in line]
        return list(zip(begun, made, strict=True))


@contextmanager
def loaded(folder: Path, requests: int) -> Iterator[subprocess.Popen[str]]:
    """`pdbench run` at a constant rate through the router; it is ended with the block."""
    command = [str(Path(sys.executable).with_name("pdbench")), "run", "--url", f"http://{address('h3')}:8000"]
    command += ["--api", "completions", "--model", "emulated/qwen2.5-3b", "--request-rate", str(RATE), "--arrival", "constant"]
    command += ["--num-requests", str(requests), "--isl", "64", "--osl", "8", "--timeout", "60", "--output", str(folder)]
    process = subprocess.Popen(
        hosts.on_switch(command), cwd=REPO, text=True, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def beginning(folder: Path) -> float:
    """When the load began, on this machine's clock of perf_counter, as one of its first records tells."""
    journal = folder / "requests.jsonl"

    def first() -> float:
        for line in journal.read_text().splitlines() if journal.exists() else []:
            row = json.loads(line)
            if row["phase"] == "measure" and row["end_s"] is not None:
                return time.perf_counter() - float(row["end_s"])
        return 0.0

    return until("the first record", first, 60)


def milliseconds(rows: list[dict[str, Any]]) -> str:
    """TTFT of requests in words."""
    times = sorted((row["first_s"] - row["sent_s"]) * 1000 for row in rows)
    if not times:
        return "none"
    p99 = times[min(len(times) - 1, int(len(times) * 0.99))]
    return f"{len(times)} requests, TTFT p50 {statistics.median(times):.1f}, p99 {p99:.1f}, max {times[-1]:.1f} ms"


def stopped(load: subprocess.Popen[str], folder: Path) -> list[dict[str, Any]]:
    """Stop the load and return all that it sent, but for the last seconds before that."""
    assert load.poll() is None, "the load ended before the last change did"
    until("10,000 requests", lambda: CHANGES < 10 or len((folder / "requests.jsonl").read_text().splitlines()) > 10_400, 600)
    time.sleep(SETTLED_S)
    os.killpg(load.pid, signal.SIGTERM)
    text, _ = load.communicate(timeout=120)
    assert (folder / "requests.parquet").exists(), text[-3000:]
    rows = pyarrow.parquet.read_table(folder / "requests.parquet").to_pylist()
    rows = [row for row in rows if row["phase"] == "measure" and row["sent_s"] is not None]
    last = max(row["sent_s"] for row in rows)
    return [row for row in rows if row["sent_s"] < last - SETTLED_S]


def within(rows: list[dict[str, Any]], spans: list[tuple[float, float]]) -> list[dict[str, Any]]:
    """The requests that were sent within one of the spans."""
    return [row for row in rows if any(begin <= row["sent_s"] <= end for begin, end in spans)]


def test_a_host_that_dies_half_way_leaves_a_cluster_that_serves_and_the_same_command_completes_it(four: Controller) -> None:
    pd = four
    pd.play("deploy_pd.yml", "-e", "ratio=2p2d").good()
    assert counts() == {"prefill": 2, "decode": 2}
    with asking() as asked:
        change = Live(pd, "-e", "ratio=1p3d")
        until(
            "h2 is about to change", lambda: change.seen("becomes decode-2; meanwhile") or change.process.poll() is not None, 120
        )
        until("its last request is answered", lambda: move_begins_units(change) or change.process.poll() is not None, 60)
        hosts.kill("h2")
        stuck = change.end().bad()
    assert "prefill-1 (h2) becomes decode-2" in stuck.text, stuck.text[-4000:]
    assert stuck.recap["h2"]["unreachable"] == 1, stuck.text[-3000:]
    assert "it goes on from what is there" in stuck.words
    print(f"h2 dies in mid-change: said after {stuck.seconds:.1f} s; {asked.good} requests answered, {len(asked.lost)} lost")
    assert asked.lost == []
    assert asked.good > 10
    # what is left serves, and is written down
    assert counts() == {"prefill": 1, "decode": 2}
    others = pids("h1", "h3", "h4")
    if CHANGES:
        dark = pd.play("rebalance.yml", "-e", "ratio=1p3d", timeout_s=120).bad()
        assert dark.recap["h2"]["unreachable"] == 1
        assert pids("h1", "h3", "h4") == others
    assert complete()["usage"]["completion_tokens"] == 8
    hosts.up(len(ALL))
    with asking() as asked:
        again = pd.play("rebalance.yml", "-e", "ratio=1p3d").good()
    print(f"the same command once h2 is back: {again.seconds:.1f} s; {asked.good} requests answered, {len(asked.lost)} lost")
    assert asked.lost == []
    assert counts() == roles() == {"prefill": 1, "decode": 3}
    assert sorted(units("h2")) == ["pd-decode-2.service"]
    assert pids("h1", "h3", "h4") == others


def move_begins_units(change: Live) -> bool:
    """Whether the move's units change now: the worker has left the router, and has answered all."""
    begun = change.seen("becomes decode-2; meanwhile")
    return any(stamp > begun and line.startswith("TASK [rebalance : Units") for stamp, line in list(change.lines))


@at_length
def test_a_controller_that_dies_half_way_is_run_again(four: Controller) -> None:
    pd = four
    pd.play("deploy_pd.yml", "-e", "ratio=3p1d").good()
    with asking() as asked:
        change = Live(pd, "-e", "ratio=1p3d")
        until("the first move", lambda: change.seen("move 1 of 2") or change.process.poll() is not None, 120)
        until("its units change", lambda: any("rebalance : Units" in line for _, line in list(change.lines)[-3:]), 60)
        os.killpg(change.process.pid, signal.SIGKILL)
        change.end()
        assert counts().keys() == {"prefill", "decode"}
        pd.play("rebalance.yml", "-e", "ratio=1p3d").good()
    assert asked.lost == []
    assert counts() == roles() == {"prefill": 1, "decode": 3}
    assert {row["worker_type"] for row in router("/workers")["workers"]} == {"prefill", "decode"}


@at_length
@pytest.mark.parametrize("mode", MODES)
def test_no_request_fails_while_the_ratio_changes(four: Controller, mode: str, tmp_path: Path) -> None:
    pd, folder = four, tmp_path / "run"
    pd.play("deploy_pd.yml", "-e", "ratio=3p1d", *MODES[mode], timeout_s=600).good()
    lines = {f"h3/{name}" for name in units("h3") if "router" in name}
    before = pids(*ALL)
    changes: list[tuple[str, tuple[float, float], tuple[float, float]]] = []
    with loaded(folder, int(CHANGES * PACE_S * RATE)) as load:
        start = beginning(folder)
        for ratio in islice(cycle(("2p2d", "1p3d", "2p2d", "3p1d")), CHANGES):
            change = Live(pd, "-e", f"ratio={ratio}")
            play = change.end().good()
            ((begun, made),) = change.windows()
            moved = next(line for line in play.text.splitlines() if line.startswith("move 1 of 1") and "meanwhile" in line)
            command = (change.started - start, time.perf_counter() - start)
            changes.append((moved.split(": ")[1].split(";")[0], (begun - start - 0.5, made - start + 0.5), command))
            assert roles() == counts() == {"prefill": int(ratio[0]), "decode": int(ratio[2])}
        rows = stopped(load, folder)
    good = [row for row in rows if row["ok"]]
    lost = [row for row in rows if not row["ok"]]
    print(f"{mode}: {CHANGES} changes, {len(rows)} requests at {RATE:g}/s, {len(lost)} failed")
    for moved, move, _ in changes:
        print(f"  {moved} ({move[1] - move[0] - 1:.0f} s): {milliseconds(within(good, [move]))}")
    moves, commands = [move for _, move, _ in changes], [command for _, _, command in changes]
    ran = within(good, commands)
    calm = {id(row) for row in within(ran, moves)}
    print(f"  while moves were made: {milliseconds(within(good, moves))}")
    print(f"  else while a command ran: {milliseconds([row for row in ran if id(row) not in calm])}")
    assert lost == [], [row["error"] for row in lost[:5]]
    assert CHANGES < 10 or len(rows) >= 10_000
    after = pids(*ALL)
    # the router goes on running; so do all workers whose role is switched in place
    stays = set(before) if mode == "in place" else lines
    assert {name: after.get(name) for name in stays} == {name: before[name] for name in stays}
    # nothing is left to do, and a deploy of this ratio agrees
    again = pd.play("deploy_pd.yml", "-e", f"ratio={deployed()['ratio']}", *MODES[mode]).good()
    assert set(again.changed.values()) == {0}, again.text[-3000:]
    assert pids(*ALL) == after
    if mode == "in place":
        check_a_crash_keeps_the_role(deployed())


def check_a_crash_keeps_the_role(plan: dict[str, Any]) -> None:
    """A worker whose role was switched comes back in that role."""
    worker = next(w for w in plan["workers"] if w["role"] == "decode" and w["ranks"][0]["host"] != "h4")
    rank = worker["ranks"][0]
    first = pids(rank["host"])
    sh(rank["host"], f"systemctl kill -s KILL {rank['unit']}")
    until(
        "it is started anew", lambda: pids(rank["host"]).get(f"{rank['host']}/{rank['unit']}", 0) not in (0, *first.values()), 30
    )
    command = until("its command line", lambda: sh(rank["host"], f"systemctl show -p ExecStart {rank['unit']}"))
    assert "--role decode" in command
    until("the router counts all", lambda: counts() == roles() and complete(), 60)
