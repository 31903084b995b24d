"""deploy_pd.yml and teardown.yml as typed, against the real router and real supervisord."""

from __future__ import annotations

import json
import os
import signal
import socket
import time

from local.conftest import Checkout

from pdlib import processes


def test_second_deploy_changes_nothing_and_a_ratio_moves_the_fewest(clean: Checkout) -> None:
    clean.play("deploy_pd.yml").good()
    before = clean.pids()
    again = clean.play("deploy_pd.yml").good()
    assert again.changed == {"gh200": 0, "a100": 0}
    assert clean.pids() == before
    clean.play("deploy_pd.yml", "-e", "ratio=2p2d").good()
    after = clean.pids()
    assert sorted(after) == ["pd-decode-0", "pd-decode-1", "pd-prefill-0", "pd-prefill-1", "pd-router"]
    assert {unit: pid for unit, pid in before.items() if unit in after} == {
        unit: pid for unit, pid in after.items() if unit in before
    }
    members = clean.members()
    assert sorted(role for role, _ in members) == ["decode", "decode", "prefill", "prefill"]
    # after a crash the router comes back by itself, with the new set
    os.kill(after["pd-router"], signal.SIGKILL)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if clean.pids().get("pd-router") != after["pd-router"] and clean.members() == members:
                break
        except (OSError, KeyError):
            pass
        time.sleep(0.5)
    assert clean.pids()["pd-router"] != after["pd-router"]
    assert clean.members() == members
    # bench without a ratio measures what is deployed
    clean.measured("-e", "bench_num_requests=16", "-e", "bench_output_len=8", "-e", "bench_concurrency=4")
    assert json.loads((clean.folder / "results" / "latest" / "plan.json").read_text())["ratio"] == "2p2d"


def test_a_taken_port_is_named_with_its_holder(clean: Checkout) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.2", clean.worker_port + 1))
        sock.listen()
        failed = clean.play("deploy_pd.yml")
    assert failed.code != 0
    assert f"port {clean.worker_port + 1} of 127.0.0.2, which pd-prefill-1 needs, is held by process {os.getpid()}" in failed.text
    clean.play("deploy_pd.yml").good()


def test_a_worker_that_dies_fails_the_deploy_with_its_log(clean: Checkout) -> None:
    broken = clean.folder / "broken.yml"
    broken.write_text("prefill_tokens_per_s: nonsense\n")
    started = time.monotonic()
    failed = clean.play("deploy_pd.yml", "-e", f"emulated_profile={broken}")
    assert failed.code != 0
    assert "died before it was ready" in failed.text
    assert "broken.yml" in failed.text
    assert time.monotonic() - started < 100  # ready_timeout of the inventory is 120 s, and it is not waited for
    broken.unlink()
    clean.play("deploy_pd.yml").good()


def test_teardown_after_a_deploy_killed_half_way(clean: Checkout) -> None:
    process = clean.start("deploy_pd.yml")
    end = time.monotonic() + 90
    while time.monotonic() < end and "pd-prefill-0" not in clean.pids():
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    # and a supervisord that was killed leaves its units without a master
    for entry in processes.ours(str(clean.state("gh200")), "supervisord"):
        os.kill(entry.pid, signal.SIGKILL)
    clean.play("teardown.yml").good()
    assert clean.processes() == []
    assert clean.bound() == set()
