"""`pdbench autoscale` as typed, on emulated workers behind the real router: ratios follow a load that turns, no request fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from local.conftest import Checkout

from pdbench.records import read_parquet

#: s, of a test
pytestmark = pytest.mark.timeout(900)
#: Sixteen places a decode worker, so that few requests fill one.
SIXTEEN = ["-e", '{"engine_args": {"max-running-requests": 16}}']
PROMISED = ["--slo-ttft-ms", "1000", "--slo-tpot-ms", "100"]
PACE = ["--every", "3", "--rest", "5"]
#: One emulated prefill worker computes 8,000 prompt tokens a second; one decode worker makes 800 tokens a second with 16 places.
PROMPTS = ["--request-rate", "3", "--isl", "4000", "--osl", "4"]
ANSWERS = ["--request-rate", "11", "--isl", "32", "--osl", "100"]


def begin(checkout: Checkout, *words: str) -> subprocess.Popen[str]:
    """Start `pdbench VERB ...` of the copied checkout."""
    env = {**os.environ, "PYTHONPATH": str(checkout.folder / "bench"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "pdbench", *words]
    return subprocess.Popen(
        command, cwd=checkout.folder, env=env, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@contextmanager
def loaded(checkout: Checkout, folder: Path, *load: str) -> Iterator[None]:
    """Send a load through the router for as long as the block lasts; none of it fails but what is cut off at the end."""
    words = ["run", "--url", checkout.url, "--model", "emulated/qwen2.5-3b", "--output", str(folder), "--warmup", "0"]
    client = begin(checkout, *words, "--duration", "240", *load)
    try:
        yield
    finally:
        client.send_signal(signal.SIGINT)
        said, _ = client.communicate(timeout=120)
    records = read_parquet(folder / "requests.parquet")
    assert [record.error for record in records if not record.ok and not record.error.startswith("stopped")] == [], said
    assert sum(record.ok for record in records) > 20


def roles(checkout: Checkout) -> list[str]:
    return sorted(role for role, _ in checkout.members())


def becomes(checkout: Checkout, wanted: list[str], timeout_s: float = 150) -> None:
    end = time.monotonic() + timeout_s
    while roles(checkout) != wanted:
        assert time.monotonic() < end, f"{roles(checkout)} after {timeout_s:.0f} s"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def deployed(checkout: Checkout) -> Iterator[Checkout]:
    checkout.play("deploy_pd.yml", "-e", "ratio=1p2d", *SIXTEEN).good()
    yield checkout
    checkout.play("teardown.yml").good()


def test_nothing_can_be_watched_where_nothing_is_deployed(checkout: Checkout, tmp_path: Path) -> None:
    done = begin(checkout, "autoscale", *PROMISED, "--for", "5", "--output", str(tmp_path / "o"))
    said, _ = done.communicate(timeout=60)
    assert done.returncode == 2, said
    assert "nothing is deployed: ansible-playbook deploy_pd.yml -e ratio=1p1d" in said
    unsaid = begin(checkout, "autoscale", "--slo-ttft-ms", "1000", "--output", str(tmp_path / "o"))
    said, _ = unsaid.communicate(timeout=60)
    assert unsaid.returncode == 2
    assert "--slo-tpot-ms MS" in said


def test_a_dry_run_changes_nothing(deployed: Checkout, tmp_path: Path) -> None:
    before = deployed.pids()
    with loaded(deployed, tmp_path / "load", *PROMPTS):
        time.sleep(3)
        done = begin(deployed, "autoscale", *PROMISED, *PACE, "--dry-run", "--for", "20", "--output", str(tmp_path / "o"))
        said, _ = done.communicate(timeout=90)
        assert done.returncode == 0, said
        assert "prefill wants a worker, so 2p1d it would be" in said
        assert "1p2d -> 2p1d: it fits (rebalance.yml --check)" in said
        # What rebalance.yml refuses is no change to wish for.
        limited = [*PROMISED, *PACE, "--dry-run", "-l", "gh200", "--for", "30", "--output", str(tmp_path / "limited")]
        said, _ = begin(deployed, "autoscale", *limited).communicate(timeout=90)
        assert "1p2d -> 2p1d: not possible: " in said, said
        assert "--limit leaves out" in said
        assert "prefill wants a worker, but 2p1d is not possible" in said
    assert deployed.pids() == before


def test_the_ratio_follows_a_load_that_turns(deployed: Checkout, tmp_path: Path) -> None:
    scaler = begin(deployed, "autoscale", *PROMISED, *PACE, "--output", str(tmp_path / "o"))
    try:
        with loaded(deployed, tmp_path / "prompts", *PROMPTS):
            becomes(deployed, ["decode", "prefill", "prefill"])
        with loaded(deployed, tmp_path / "answers", *ANSWERS):
            becomes(deployed, ["decode", "decode", "prefill"])
        scaler.send_signal(signal.SIGTERM)
        said, _ = scaler.communicate(timeout=90)
    finally:
        scaler.kill()
    assert scaler.returncode == 0, said
    assert "Traceback" not in said
    entries = [json.loads(line) for line in (tmp_path / "o" / "autoscale.jsonl").read_text().splitlines()]
    changes = [(e["ratio"], e["to"], e["ok"]) for e in entries if e["kind"] == "change"]
    assert changes == [("1p2d", "2p1d", True), ("2p1d", "1p2d", True)], said
    assert "2 changes" in said
    assert (tmp_path / "o" / "autoscale.png").stat().st_size > 10_000
    # A human who stops it in mid-change gets the change.
    with loaded(deployed, tmp_path / "again", *PROMPTS):
        scaler = begin(deployed, "autoscale", *PROMISED, *PACE, "--output", str(tmp_path / "stopped"))
        assert scaler.stdout
        while "rebalance.yml -e ratio=2p1d" not in scaler.stdout.readline():
            assert scaler.poll() is None
        time.sleep(2)
        scaler.send_signal(signal.SIGTERM)
        said, _ = scaler.communicate(timeout=120)
    assert scaler.returncode == 0, said
    assert "brought to its end first" in said
    assert "1p2d -> 2p1d: done" in said
    assert roles(deployed) == ["decode", "prefill", "prefill"]
    # An idle deployment is left as it is.
    idle = begin(deployed, "autoscale", *PROMISED, *PACE, "--for", "12", "--output", str(tmp_path / "idle"))
    said, _ = idle.communicate(timeout=90)
    assert idle.returncode == 0, said
    assert "0 changes" in said
    assert deployed.processes() != []
