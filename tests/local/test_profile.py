"""`pdbench profile` against emulated workers behind the real router: the batch, the steps, and that everybody is let go again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from emulated_workers import Service, profile_file, router, wait_for, worker

from pdbench.profiling.read import digest

STEPS, BATCH = 5, 24


class Cluster:
    """1p1d behind a router, its plan, and `pdbench profile` on it."""

    def __init__(self, folder: Path, prefill: Service, decode: Service, front: Service):
        self.prefill, self.decode, self.front, self.folder = prefill, decode, front, folder
        ranks = {name: [{"host": "here", "gpus": [0], "unit": f"pd-{name}.service"}] for name in ("prefill-0", "decode-0")}
        self.plan = {
            "ratio": "1p1d",
            "engine": "emulated",
            "emulated": True,
            "hosts": {"here": {"state_dir": str(folder / "state")}},
            "router": {"url": front.url},
            "workers": [
                {"name": "prefill-0", "role": "prefill", "url": prefill.url, "ranks": ranks["prefill-0"]},
                {"name": "decode-0", "role": "decode", "url": decode.url, "ranks": ranks["decode-0"]},
            ],
        }

    def start(self, out: Path, role: str, *more: str, osl: int = 30) -> subprocess.Popen[str]:
        out.mkdir()
        (out / "plan.json").write_text(json.dumps(self.plan))
        argv = [sys.executable, "-m", "pdbench", "profile", "--url", self.front.url, "--api", "generate", "--role", role]
        argv += ["--plan", str(out / "plan.json"), "--output", str(out), "--id", out.name, "--steps", str(STEPS)]
        argv += ["--isl", "64", "--osl", str(osl), "--batch", str(BATCH), "--warmup", "2", "--slow-down", "0.3", *more]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def profile(self, out: Path, role: str, *more: str, osl: int = 30) -> tuple[int, str]:
        """Run to the end; return exit code and output."""
        process = self.start(out, role, *more, osl=osl)
        text, _ = process.communicate(timeout=90)
        return process.returncode, text

    def read(self, out: Path) -> tuple[dict[str, Any], list[str]]:
        """Bring the traces to the folder, as profile.yml does, and read them."""
        for place in (self.folder / "state" / "run").glob(f"pd-*/profiles/{out.name}"):
            there = out / "traces" / place.parent.parent.name.removeprefix("pd-")
            there.parent.mkdir(exist_ok=True)
            place.rename(there)
        return digest(out)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("profile")
    speed = profile_file(folder, decode_overhead_ms=20)
    with worker("prefill", speed) as prefill, worker("decode", speed) as decode:
        pd = ["--pd-disaggregation", "--prefill", prefill.url, str(prefill.bootstrap_port), "--decode", decode.url]
        with router(*pd) as front:
            wait_for(lambda: front.json("/readiness")["healthy_workers"] == 2, "ready with both workers")
            yield Cluster(folder, prefill, decode, front)


@pytest.fixture
def cluster(made: Cluster) -> Iterator[Cluster]:
    yield made
    with contextlib.suppress(AssertionError):
        made.decode.json("/slow_down", {"forward_sleep_time": None})


def untouched(service: Service) -> bool:
    info = service.json("/server_info")
    return info["slow_down_s"] is None and not info["profiling"]


def test_decode_gathers_the_batch_and_is_let_go(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "one"
    code, text = cluster.profile(out, "decode")
    assert code == 0, text
    assert untouched(cluster.decode)
    told, problems = cluster.read(out)
    assert problems == []
    (trace,) = told["workers"]["decode-0"]["traces"]
    assert trace["steps"] == STEPS
    # Slowed down, decode had the whole batch before the first of these steps.
    assert trace["batch"] == {"min": BATCH, "max": BATCH}
    assert trace["emulated"]
    assert 15 < trace["gap_ms"]["p50"] < 200
    summary = json.loads((out / "summary.json").read_text())
    assert summary["completed"] == BATCH
    assert not summary["valid"]
    assert any("profiled" in reason for reason in summary["invalid_reasons"])


def test_prefill_is_recorded_while_it_has_a_queue(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "two"
    code, text = cluster.profile(out, "prefill", "--steps", "2", "--isl", "3000", osl=2)
    assert code == 0, text
    told, problems = cluster.read(out)
    assert problems == []
    (trace,) = told["workers"]["prefill-0"]["traces"]
    assert trace["steps"] == 2
    assert untouched(cluster.decode)


def slowed(process: subprocess.Popen[str], decode: Service) -> None:
    """Wait until the worker is slowed down; a run that has ended by then tells what it said."""

    def now() -> bool:
        assert process.poll() is None, process.communicate()[0]
        return bool(decode.json("/server_info")["slow_down_s"])

    wait_for(now, "slowed down")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_whatever_ends_it_nobody_stays_slow(cluster: Cluster, tmp_path: Path, number: int) -> None:
    # A batch that never comes together: it would wait for ten minutes.
    process = cluster.start(tmp_path / "out", "decode", "--decode-batch", str(2 * BATCH), "--slow-down", "1", osl=200)
    try:
        slowed(process, cluster.decode)
        os.killpg(process.pid, number)
        wait_for(lambda: untouched(cluster.decode), "at full speed again", 20)
        assert process.wait(timeout=60) != 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    wait_for(lambda: cluster.decode.metrics()["num_running_reqs"] == 0, "idle")


def test_a_batch_that_does_not_come_is_named(cluster: Cluster, tmp_path: Path) -> None:
    code, text = cluster.profile(tmp_path / "out", "decode", "--decode-batch", str(2 * BATCH), "--batch-timeout", "1.5")
    assert code == 3, text
    assert f"decode-0 has {BATCH} of {2 * BATCH}" in text
    assert untouched(cluster.decode)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--osl", "5"), "so decode never has 5 steps"),
        (("--batch", "2,4"), "this load has 2"),
        (("--activities", "CPU,GPUS"), "'GPUS'"),
        (("--steps", "0"), "--steps must be above 0"),
    ],
)
def test_bad_usage_sends_nothing(cluster: Cluster, tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    before = cluster.decode.metrics().get("num_requests_total", 0)
    code, text = cluster.profile(tmp_path / "out", "decode", *more)
    assert code == 2, text
    assert said in text
    assert cluster.decode.metrics().get("num_requests_total", 0) == before
