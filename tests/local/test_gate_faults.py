"""Faults in real processes: `pdbench run` and `pdbench gate` against emulated workers behind the real router.

What each fault is and which checks must catch it stands in `unit.gate_faults.LIVE`, from which docs/validity.md is made; here is
how it is injected.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from emulated_workers import Service, free_port, router, service, wait_for
from unit.gate_faults import LIVE, Live

from pdbench.load.prompts import Prompts
from pdbench.metrics import ttft_s
from pdbench.records import MEASURE, read_parquet
from pdbench.run.asks import ask

ISL, OSL, REQUESTS, SLOTS, SEED = 64, 16, 72, 12, 7
#: A machine that runs other tests too may be late; only one test here is about that.
PATIENT = ("--max-loop-lag-ms", "5000", "--max-lateness-ms", "5000", "--min-delivered", "0")
CLOSED = ("--concurrency", str(SLOTS), "--num-requests", str(REQUESTS))


@dataclass
class Cluster:
    """Two prefill workers and a decode worker behind the router, and what the plan says of them."""

    workers: dict[str, Service]
    front: Service
    plan: dict[str, Any]
    restart: Callable[[str], None]

    def fault(self, worker: str, **fault: object) -> None:
        status, answer = self.workers[worker].post("/emulated/fault", fault)
        assert status == 200, answer

    def busy(self, requests: int = 20) -> None:
        """Wait until a run is under way: so many requests were served since the call."""
        decode = self.workers["decode-0"]
        before = decode.metrics().get("num_requests_total", 0)
        wait_for(lambda: decode.metrics().get("num_requests_total", 0) >= before + requests, "under load")


@contextlib.contextmanager
def cluster(folder: Path, **options: tuple[str, ...]) -> Iterator[Cluster]:
    """Start 2p1d; ``options``: more arguments for the emulated workers of a role."""
    names = ("prefill-0", "prefill-1", "decode-0")
    ports = {name: (free_port(), free_port()) for name in names}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Service] = {}

        def start(name: str) -> None:
            role, (port, bootstrap) = name.partition("-")[0], ports[name]
            argv = [sys.executable, "-m", "pdbench", "emulate", "--role", role, "--port", str(port), "--allow-faults"]
            argv += ["--bootstrap-port", str(bootstrap), "--node", name, *options.get(role, ())]
            workers[name] = stack.enter_context(service(argv, f"http://127.0.0.1:{port}", "/ready"))

        for name in names:
            start(name)
        arguments = ["--pd-disaggregation", "--decode", workers["decode-0"].url]
        for name in names[:2]:
            arguments += ["--prefill", workers[name].url, str(ports[name][1])]
        front = stack.enter_context(router(*arguments))
        wait_for(lambda: front.json("/readiness")["healthy_workers"] == len(names), "ready with all workers")
        plan = {
            "schema": 1,
            "ratio": "2p1d",
            "engine": "emulated",
            "emulated": True,
            "router": {"url": front.url},
            "pairs": [{"prefill": name, "decode": "decode-0", "expected_transport": "tcp"} for name in names[:2]],
            "workers": [
                {
                    "name": name,
                    "role": name.partition("-")[0],
                    "url": workers[name].url,
                    "ranks": [{"host": "here", "gpus": [i], "unit": f"pd-{name}.service", "bootstrap_port": ports[name][1]}],
                }
                for i, name in enumerate(names)
            ],
        }
        yield Cluster(workers, front, plan, start)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
def clean(shared: Cluster) -> Iterator[Cluster]:
    """The shared cluster; what a test switched on is off again after it."""
    yield shared
    for worker in shared.workers.values():
        assert worker.post("/emulated/fault", {"kind": "clear"})[0] == 200
        assert worker.post("/slow_down", {"forward_sleep_time": None})[0] == 200
        if worker.json("/server_info")["profiling"]:
            assert worker.post("/stop_profile", {})[0] == 200


def measure(made: Cluster, folder: Path, *options: str, during: Callable[[int], None] | None = None) -> int:
    """Run `pdbench run`; ``during`` is called beside it with its process id. Return the exit code."""
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(made.plan))
    argv = [sys.executable, "-m", "pdbench", "run", "--url", made.front.url, "--api", "generate", "--plan"]
    argv += [str(folder / "plan.json"), "--output", str(folder), "--isl", str(ISL), "--osl", str(OSL), "--seed", str(SEED)]
    argv += ["--timeout", "20", *PATIENT, *(options or CLOSED)]
    with open(folder / "run.log", "w") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
        try:
            if during:
                during(process.pid)
            return process.wait(timeout=90)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def judge(folder: Path) -> dict[str, str]:
    """Run `pdbench gate`; return what each failed check says."""
    done = subprocess.run([sys.executable, "-m", "pdbench", "gate", str(folder)], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    checks = json.loads((folder / "validity.json").read_text())["checks"]
    failed = {check["id"]: check["message"] for check in checks if not check["ok"]}
    assert done.returncode == (3 if failed else 0), done.stdout + (folder / "run.log").read_text()
    return failed


def evidence(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evidence.json").read_text())["points"][0]
    return found


def caught(name: str, folder: Path) -> Live:
    """Judge the run: the checks that LIVE names fail and no other, and the first says it."""
    wanted = next(fault for fault in LIVE if fault.name == name)
    failed = judge(folder)
    assert set(wanted.checks) <= set(failed) <= {*wanted.checks, *wanted.also}, failed
    if wanted.checks:
        assert wanted.says in failed[wanted.checks[0]], failed
    return wanted


def test_without_a_fault_the_run_is_valid(clean: Cluster, tmp_path: Path) -> None:
    assert measure(clean, tmp_path / "o") == 0
    assert judge(tmp_path / "o") == {}
    found = {check["id"]: check for check in json.loads((tmp_path / "o" / "validity.json").read_text())["checks"]}
    assert found["transport"]["message"] == "all 2 pairs moved their KV cache as expected"
    assert found["kv-bytes"]["message"].endswith("the engine's own figure")
    assert found["no-leftovers"]["message"] == "slow_down is off on all 3 workers, and no profile runs"


@pytest.mark.parametrize(
    ("name", "worker", "kind"),
    [
        ("transfers_fail", "decode-0", "fail_transfer"),
        ("zero_tokens", "decode-0", "zero_tokens"),
    ],
)
def test_a_fault_from_the_middle_of_the_run_on(clean: Cluster, tmp_path: Path, name: str, worker: str, kind: str) -> None:
    def inject(_: int) -> None:
        clean.busy()
        clean.fault(worker, kind=kind)

    assert measure(clean, tmp_path / "o", during=inject) == 3
    caught(name, tmp_path / "o")
    failed = [record for record in read_parquet(tmp_path / "o" / "requests.parquet") if not record.ok]
    assert {record.status for record in failed} == {200}


def test_a_decode_worker_that_computes_prompts_itself(clean: Cluster, tmp_path: Path) -> None:
    clean.fault("decode-0", kind="recompute")
    assert measure(clean, tmp_path / "o") == 0  # the client cannot see it
    caught("decode_recomputes", tmp_path / "o")


def test_a_kv_cache_that_arrives_wrong(clean: Cluster, tmp_path: Path) -> None:
    options = (*CLOSED, "--verify-outputs", "2")
    assert measure(clean, tmp_path / "right", *options) == 0
    assert judge(tmp_path / "right") == {}
    rows = json.loads((tmp_path / "right" / "evidence.json").read_text())["verify"]["pairs"]
    assert [(row["prefill"], row["prompts"], row["worst_nats"]) for row in rows] == [("prefill-0", 2, 0.0), ("prefill-1", 2, 0.0)]
    clean.fault("decode-0", kind="corrupt")
    assert measure(clean, tmp_path / "o", *options) == 0  # the client cannot see it
    caught("wrong_kv", tmp_path / "o")


def test_an_empty_first_chunk_is_no_first_token(clean: Cluster, tmp_path: Path) -> None:
    assert measure(clean, tmp_path / "honest") == 0
    clean.fault("decode-0", kind="empty_first_chunk")
    assert measure(clean, tmp_path / "o") == 0
    caught("empty_first_chunk", tmp_path / "o")
    medians = []
    for folder in ("honest", "o"):
        times = sorted(ttft_s(r) for r in read_parquet(tmp_path / folder / "requests.parquet") if r.phase == MEASURE)
        medians.append(times[len(times) // 2])
    assert medians[1] > 0.5 * medians[0] > 0


def test_a_cache_that_somebody_else_warms(clean: Cluster, tmp_path: Path) -> None:
    """As a repeat with the same seed by another client would, after the caches were emptied."""
    warmups = 100

    def inject(_: int) -> None:
        clean.busy(10)
        for index in range(20):
            prompt = Prompts(SEED).tokens(f"0/measure/{index}", 1 + warmups + index, ISL)
            status, answer = clean.front.post("/generate", ask("generate", "tokens", "", prompt, 1))
            assert status == 200, answer

    options = (*CLOSED, "--warmup", str(warmups))
    measure(clean, tmp_path / "o", *options, during=inject)
    caught("warm_cache", tmp_path / "o")


def test_a_repeat_with_the_same_seed_is_valid(clean: Cluster, tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert measure(clean, tmp_path / name) == 0
        caught("repeat", tmp_path / name)
        assert {steps["flush"] for steps in evidence(tmp_path / name)["reset"].values()} == {"ok"}


def test_a_router_that_lost_a_worker(tmp_path: Path) -> None:
    with cluster(tmp_path) as made:
        rows = made.front.json("/workers")["workers"]
        (gone,) = [row["id"] for row in rows if row["url"] == made.workers["prefill-1"].url]
        subprocess.run(["curl", "-sf", "-X", "DELETE", f"{made.front.url}/workers/{gone}"], check=True, capture_output=True)
        wait_for(lambda: len(made.front.json("/workers")["workers"]) == 2, "without the worker")
        assert measure(made, tmp_path / "o") == 0
        caught("wrong_ratio", tmp_path / "o")


def test_a_worker_that_restarts_in_the_window(tmp_path: Path) -> None:
    with cluster(tmp_path) as made:

        def inject(_: int) -> None:
            made.busy()
            old = made.workers["decode-0"].process
            os.killpg(old.pid, signal.SIGKILL)
            old.wait()
            made.restart("decode-0")

        # Half of the requests are refused at once while it starts: slots would be through with all of them before it is back.
        pace = ("--request-rate", "6", "--arrival", "constant", "--num-requests", str(REQUESTS))
        measure(made, tmp_path / "o", *pace, during=inject)
        caught("restart", tmp_path / "o")


def test_a_worker_that_is_slowed_down(clean: Cluster, tmp_path: Path) -> None:
    def inject(_: int) -> None:
        clean.busy()
        assert clean.workers["decode-0"].post("/slow_down", {"forward_sleep_time": 0.002})[0] == 200

    assert measure(clean, tmp_path / "o", during=inject) == 0
    caught("slowed", tmp_path / "o")


def test_a_slow_down_that_is_left_over_is_released(clean: Cluster, tmp_path: Path) -> None:
    decode = clean.workers["decode-0"]
    assert decode.post("/slow_down", {"forward_sleep_time": 0.05})[0] == 200
    assert measure(clean, tmp_path / "o") == 0
    caught("slowed_before", tmp_path / "o")
    assert not decode.json("/server_info")["slow_down_s"]


def profile(made: Cluster, folder: Path) -> None:
    status, answer = made.workers["prefill-0"].post("/start_profile", {"output_dir": str(folder)})
    assert status == 200, answer


def test_a_profile_that_is_started(clean: Cluster, tmp_path: Path) -> None:
    def inject(_: int) -> None:
        clean.busy()
        profile(clean, tmp_path)

    assert measure(clean, tmp_path / "o", during=inject) == 0
    caught("profiled", tmp_path / "o")


def test_a_profile_that_is_left_over_is_stopped(clean: Cluster, tmp_path: Path) -> None:
    profile(clean, tmp_path)
    assert measure(clean, tmp_path / "o") == 0
    caught("profiled_before", tmp_path / "o")
    assert evidence(tmp_path / "o")["reset"]["prefill-0"]["profile"] == "stopped"


def test_a_worker_that_moves_kv_another_way(clean: Cluster, tmp_path: Path) -> None:
    """The plan of another deployment: TCP was measured, RDMA is what it says."""
    plan = json.loads(json.dumps(clean.plan))
    plan["pairs"][1]["expected_transport"] = "rdma"
    other = Cluster(clean.workers, clean.front, plan, clean.restart)
    assert measure(other, tmp_path / "o") == 0
    caught("other_transport", tmp_path / "o")


def test_a_client_that_is_held_up(clean: Cluster, tmp_path: Path) -> None:
    """Stopped for 0.2 s twice a second, as a busy machine would stop it; the open loop wants a request every 25 ms."""
    ended = threading.Event()

    def hold(pid: int) -> None:
        while not ended.wait(0.3):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGSTOP)  # its sending process, too
                time.sleep(0.2)
                os.killpg(pid, signal.SIGCONT)

    def inject(pid: int) -> None:
        clean.busy(5)
        threading.Thread(target=hold, args=(pid,), daemon=True).start()

    options = ("--request-rate", "40", "--arrival", "constant", "--num-requests", str(REQUESTS))
    try:
        measure(clean, tmp_path / "o", *options, "--max-loop-lag-ms", "100", "--max-lateness-ms", "100", during=inject)
    finally:
        ended.set()
    caught("late_client", tmp_path / "o")


def test_every_live_fault_is_injected_here() -> None:
    text = Path(__file__).read_text()
    assert [fault.name for fault in LIVE if f'"{fault.name}"' not in text] == []
