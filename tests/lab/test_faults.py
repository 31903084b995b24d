"""What a user sees when a process, a host, a cable, a disk, a clock or the controller fails (docs/reliability.md)."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow.parquet
import pytest
from lab import hosts, network
from lab.common import leader
from lab.controller import LOAD, Controller, Play, complete, counts, pids, sh, units, until

FULL = {"prefill": 3, "decode": 1}
HOSTS = 4
#: An open loop, so that load goes on at its rate whatever fails: 15 requests a second, for so many seconds.
RATE = 15


def steady(seconds: int) -> tuple[str, ...]:
    """Return the words that make bench.yml send load for so long."""
    count = f"bench_num_requests={RATE * seconds}"
    return ("-e", f"bench_request_rate={RATE}", "-e", count, "-e", "bench_output_len=16", "-e", "bench_timeout=20")


def runs() -> dict[str, int]:
    """Runs on the client host, with how many requests each has recorded."""
    loop = "for run in */; do echo ${run%/} $(cat $run/requests.jsonl 2>/dev/null | wc -l); done"
    rows = sh("h4", f"cd /var/lib/pd/runs 2>/dev/null && {loop}", check=False).splitlines()
    return {row.split()[0]: int(row.split()[1]) for row in rows if row[:1].isdigit()}


@contextmanager
def benching(pd: Controller, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A bench.yml whose load is flowing, with its run id; it is killed when the block leaves it running."""
    process = pd.start("bench.yml", *words)
    try:
        until("load flows", lambda: process.poll() is not None or any(count > 10 for count in runs().values()), 150)
        if process.poll() is not None:
            pytest.fail(process.communicate()[0][-4000:])
        yield process, next(name for name, count in runs().items() if count > 10)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def finish(process: subprocess.Popen[str]) -> Play:
    """Wait for a verb that was started."""
    started = time.monotonic()
    text, _ = process.communicate(timeout=280)
    return Play(process.returncode, text, time.monotonic() - started)


def failed_checks(pd: Controller, run_id: str) -> set[str]:
    """Return the ids of the checks that a run failed; it must be marked invalid."""
    verdict = pd.result(run_id, "validity.json")
    assert verdict["valid"] is False
    return {check["id"] for check in verdict["checks"] if not check["ok"]}


def records(pd: Controller, run_id: str) -> list[dict[str, Any]]:
    """Return a run's measured requests."""
    table = pyarrow.parquet.read_table(pd.home / "results" / run_id / "requests.parquet")
    return [row for row in table.to_pylist() if row["phase"] == "measure"]


def seconds_until(what: str, call: Callable[[], Any], timeout_s: float = 90) -> float:
    """How long it takes until ``call`` answers true."""
    started = time.monotonic()
    until(what, call, timeout_s)
    return time.monotonic() - started


def started_anew(host: str, unit: str, restarts: int) -> bool:
    """Whether systemd has started a unit once more than so many times."""
    return int(units(host)[f"{unit}.service"]["NRestarts"]) == restarts + 1


def test_killed_processes_come_back_and_the_run_says_so(serving: Controller) -> None:
    """kill -9 of a prefill worker, a decode worker and the router, one after the other, under load."""
    pd = serving
    before = pids()
    with benching(pd, *steady(50)) as (process, run_id):
        for host, unit in (("h1", "pd-prefill-0"), ("h3", "pd-router"), ("h2", "pd-decode-0")):
            restarts = int(units(host)[f"{unit}.service"]["NRestarts"])
            sh(host, f"systemctl kill -s KILL {unit}")
            up = seconds_until(f"{unit} is started anew", partial(started_anew, host, unit, restarts))
            counted = up + seconds_until("the router counts all", lambda: counts() == FULL)
            served = counted + seconds_until("the router serves", complete, 100)
            print(f"kill -9 {unit}: started anew after {up:.1f} s, counted after {counted:.1f} s, serving after {served:.1f} s")
        play = finish(process)
    play.bad()
    after = pids()
    assert {name for name in before if before[name] != after[name]} == {
        "h1/pd-prefill-0.service", "h2/pd-decode-0.service", "h3/pd-router.service",
    }  # fmt: skip
    rows = records(pd, run_id)
    lost = [row for row in rows if not row["ok"]]
    summary = pd.result(run_id, "summary.json")["points"][0]
    assert (summary["completed"], summary["failed"]) == (len(rows) - len(lost), len(lost))
    assert len(rows) == 50 * RATE
    assert 0 < len(lost) < len(rows)
    assert all(row["error"] for row in lost)
    assert {"error-rate", "no-restart"} <= failed_checks(pd, run_id)
    failed = ", ".join(sorted(failed_checks(pd, run_id)))
    print(f"three kills in 50 s at {RATE}/s: {len(lost)} of {len(rows)} requests lost; the run is invalid: {failed}")


def test_power_loss_of_a_decode_host_and_its_return(serving: Controller) -> None:
    """h2 goes dark during a bench; a deploy names it and leaves the others alone; it comes back by itself."""
    pd = serving
    others = pids("h1", "h3")
    with benching(pd, *steady(25)) as (process, run_id):
        hosts.kill("h2")
        gone = seconds_until("the router counts no decode worker", lambda: "decode" not in counts())
        print(f"power loss of h2: the router leaves its worker out after {gone:.1f} s")
        run = finish(process)
    run.bad()
    assert "the run is INVALID" in run.words
    assert {"error-rate", "ratio"} <= failed_checks(pd, run_id)
    lost = [row for row in records(pd, run_id) if not row["ok"]]
    assert lost
    print(f"bench.yml ended {run.seconds:.1f} s later: fetched, judged, invalid; {len(lost)} of {25 * RATE} requests lost")

    # a deploy while it is dark: says who is missing, touches nobody
    dark = pd.play("deploy_pd.yml", timeout_s=120).bad()
    assert dark.recap["h2"]["unreachable"] == 1
    assert pids("h1", "h3") == others
    assert re.search(r"^h2 +UNREACHABLE", dark.text, re.M)
    print(f"deploy_pd.yml with h2 dark: says so after {dark.seconds:.1f} s")

    # its return needs nobody
    started = time.monotonic()
    hosts.up(HOSTS)
    until("the router counts all and serves", lambda: counts() == FULL and complete(), 90)
    print(f"h2 back: serving {time.monotonic() - started:.1f} s after power-on, without a deploy")
    after = pids()
    pd.play("deploy_pd.yml").good()
    assert pids() == after
    assert pids("h1", "h3") == others


def test_a_cut_between_a_prefill_and_a_decode_host_is_named(serving: Controller) -> None:
    """Every worker is healthy and the router counts all: only a request over the pair shows it."""
    pd = serving
    before = pids()
    network.partition("h1", "h2")
    assert counts() == FULL
    cut = pd.play("deploy_pd.yml", "-e", "ready_timeout=30", timeout_s=150).bad()
    print(f"cut h1-h2: deploy_pd.yml failed after {cut.seconds:.1f} s")
    assert "prefill-0" in cut.words
    assert "decode-0" in cut.words
    assert "prefill-2 -> decode-0" not in cut.words
    network.heal()
    pd.play("deploy_pd.yml").good()
    assert pids() == before


def test_a_controller_that_dies_half_way_is_run_again(pd: Controller) -> None:
    """kill -9 of ansible-playbook in the middle of a deploy, and in the middle of a bench."""
    pd.play("teardown.yml").good()
    process = pd.start("deploy_pd.yml")
    until("the first unit runs", lambda: process.poll() is not None or any(map(units, ("h1", "h2", "h3"))), 120)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    again = pd.play("deploy_pd.yml").good()
    assert counts() == FULL
    print(f"deploy after a deploy that was killed: {again.seconds:.1f} s")

    before = pids()
    with benching(pd, *steady(100)) as (process, run_id):
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    count = runs()[run_id]
    time.sleep(2)
    assert runs()[run_id] > count, "the load goes on without the controller"
    pd.play("bench.yml", *LOAD).good()
    assert "complete" in failed_checks(pd, run_id)
    assert len(records(pd, run_id)) > count
    assert runs() == {}
    assert pids() == before


def test_a_full_disk_is_said_and_stops_nothing_else(serving: Controller) -> None:
    """No room on the client before the load, none in the middle of it, and none on a host that is deployed to."""
    pd = serving
    before = pids()
    sh("h4", "mkdir -p /var/lib/pd && mount -t tmpfs -o size=64m,mode=755 tmpfs /var/lib/pd")
    try:
        refused = pd.play("bench.yml", *LOAD).bad()
        assert "no room for the run's records" in refused.words
        assert runs() == {}
        with benching(pd, *steady(40), "-e", "bench_min_free_mb=1") as (process, _):
            sh("h4", "head -c 64M /dev/zero > /var/lib/pd/filler", check=False)
            full = finish(process).bad()
        assert "No space left on device" in full.words
        print(f"disk full in the middle of a bench: bench.yml ended {full.seconds:.1f} s later")
    finally:
        sh("h4", "systemctl stop 'pd-bench-*'; umount -l /var/lib/pd")
    assert pids() == before
    pd.play("bench.yml", *LOAD).good()

    # a host that cannot take its units is named with the reason, and has them once there is room
    pd.play("teardown.yml").good()
    sh("h2", "mkdir -p /var/lib/pd && mount -t tmpfs -o size=4k,mode=755 tmpfs /var/lib/pd")
    try:
        stuck = pd.play("deploy_pd.yml").bad()
        assert "No space left on device" in stuck.words
        assert stuck.recap["h2"]["failed"] == 1
    finally:
        sh("h2", "umount -l /var/lib/pd")
    pd.play("deploy_pd.yml").good()
    assert counts() == FULL


def test_clocks_that_disagree_make_no_latency_wrong(serving: Controller) -> None:
    """Prefill an hour behind, decode an hour ahead of the client: records rest on the client's monotonic clock alone."""
    pd = serving
    library = sh("h1", "ls /usr/lib/*/faketime/libfaketime.so.1")
    drop, again = "/etc/systemd/system/pd-.service.d", "systemctl daemon-reload && systemctl restart 'pd-*.service'"
    try:
        for host, skew in (("h1", "-1h"), ("h2", "+1h")):
            text = f"[Service]\nEnvironment=LD_PRELOAD={library} FAKETIME={skew} DONT_FAKE_MONOTONIC=1\n"
            sh(host, f"mkdir -p {drop} && printf '{text}' > {drop}/skew.conf && {again}")
        until("the router counts all and serves", lambda: counts() == FULL and complete(), 90)
        skew = complete()["created"] - time.time()
        assert abs(abs(skew) - 3600) < 60, skew
        pd.play("bench.yml", *LOAD).good()
    finally:
        for host in ("h1", "h2"):
            sh(host, f"rm -rf {drop} && {again}")
    run_id = (pd.home / "results" / "latest").resolve().name
    rows = records(pd, run_id)
    ttft = [row["first_s"] - row["sent_s"] for row in rows]
    print(f"clocks of h1 and h2 two hours apart: TTFT {min(ttft) * 1000:.1f} to {max(ttft) * 1000:.1f} ms, run valid")
    for row in rows:
        times = [row["scheduled_s"], row["sent_s"], row["first_s"], *row["chunk_s"][1:], row["end_s"]]
        assert all(math.isfinite(value) for value in times)
        assert times == sorted(times)
    assert 0 < min(ttft) <= max(ttft) < 60
    assert json.loads((pd.home / "results/latest/validity.json").read_text())["valid"] is True
    assert leader("h1")
    until("the router counts all and serves", lambda: counts() == FULL and complete(), 90)
