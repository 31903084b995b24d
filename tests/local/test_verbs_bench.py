"""bench.yml as typed: the whole way from a ratio to a report, and what happens when it is cut."""

from __future__ import annotations

import json
import os
import signal
import time

from local.conftest import Checkout

from pdlib import processes

LOAD = ("-e", "bench_concurrency=4,8", "-e", "bench_num_requests=24", "-e", "bench_output_len=16")


def test_the_three_commands_and_no_residue(clean: Checkout) -> None:
    files = clean.files()
    clean.play("deploy_pd.yml", "-l", "gh200,a100").good()
    assert sorted(clean.pids()) == ["pd-decode-0", "pd-prefill-0", "pd-prefill-1", "pd-prefill-2", "pd-router"]
    done = clean.measured("-e", "ratio=3p1d", "-e", "bench_selfcheck=true", *LOAD)
    run = clean.folder / "results" / "latest"
    for name in ("manifest.json", "plan.json", "requests.parquet", "summary.json", "validity.json", "report.html", "logs"):
        assert (run / name).exists(), name
    assert list(run.glob("*.png"))
    assert list(run.glob("*.svg"))
    assert "emulated" in (run / "report.html").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert [point["concurrency"] for point in summary["points"]] == [4, 8]
    assert all(point["completed"] == 24 and point["failed"] == 0 for point in summary["points"])
    assert json.loads((run / "validity.json").read_text())["valid"] is True
    assert "report:" in done.text
    # the client was calibrated on its own host, under the heavier of both loads, before the first of them
    checked = json.loads((run / "selfcheck.json").read_text())
    assert [point["concurrency"] for point in checked["points"]] == [8]
    assert "client-calibrated" in (run / "report.html").read_text()
    assert "in flight" in (run / "run.log").read_text()
    # the same run again from its own manifest
    clean.measured("-e", f"@{run.resolve()}/manifest.json")
    again = json.loads((clean.folder / "results" / "latest" / "summary.json").read_text())
    assert [p["num_requests"] for p in again["points"]] == [p["num_requests"] for p in summary["points"]]
    clean.play("teardown.yml").good()
    assert clean.processes() == []
    assert clean.bound() == set()
    assert clean.files() - files <= {".pd", ".pd/deployed"}
    assert clean.play("teardown.yml").good().changed == {"gh200": 0, "a100": 0}


def test_an_interrupted_bench_is_fetched_by_the_next(clean: Checkout) -> None:
    clean.measured("-e", "bench_num_requests=8", "-e", "bench_output_len=4", "-e", "bench_concurrency=4")
    old = {path.name for path in (clean.folder / "results").iterdir()}
    process = clean.start("bench.yml", "-e", "bench_num_requests=4000", "-e", "bench_concurrency=4", "-e", "run_label=cut")
    runs = clean.state("a100") / "runs"
    end = time.monotonic() + 90
    while time.monotonic() < end and not [p for p in runs.glob("*cut/requests.jsonl") if p.stat().st_size > 0]:
        time.sleep(0.3)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    run_id = next(runs.glob("*cut")).name
    assert processes.ours(str(clean.state("a100")), f"bench-{run_id}"), "the load must go on without the controller"
    clean.measured("-e", "bench_num_requests=8", "-e", "bench_output_len=4", "-e", "bench_concurrency=4")
    new = {path.name for path in (clean.folder / "results").iterdir()} - old
    assert run_id in new
    verdict = json.loads((clean.folder / "results" / run_id / "validity.json").read_text())
    assert verdict["valid"] is False
    assert any(check["id"] == "complete" and not check["ok"] for check in verdict["checks"])
    assert (clean.folder / "results" / run_id / "requests.parquet").stat().st_size > 1000


def test_no_room_for_results_stops_before_the_load(clean: Checkout) -> None:
    failed = clean.play("bench.yml", "-e", "bench_min_free_mb=900000000")
    assert failed.code != 0
    assert "no room for results" in failed.text
