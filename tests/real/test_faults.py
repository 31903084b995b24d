"""Faults of real SGLang under load: what clients get, and what readiness, gate and doctor say (docs/reliability.md).

PD_TEST_FAULTS=1 (`make test-faults`): engines that start anew take minutes, more than `make test-real` has. Prefill computes
a prompt in chunks of 64 tokens and sends each while the next one computes: whenever
it is killed under these prompts of 1500, a KV cache is under way.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pandas as pd
import pytest
from local.conftest import Play
from real import helpers
from real.deployment import KEY, Real, deployed, extra

from pdlib import processes
from pdlib.gateway import Gateway

pytestmark = pytest.mark.skipif(
    not os.environ.get("PD_TEST_FAULTS"), reason="some minutes of engines that start anew: make test-faults"
)

#: One request a second, each of which may take so many seconds; prefill takes 24 passes for a prompt.
PROMPT, CHUNK, LIMIT_S = 1500, 64, 40
#: An engine starts in 20 s on a machine of its own, and in minutes on a busy one.
START_S = 400


@pytest.fixture(scope="module")
def real() -> Iterator[Real]:
    with deployed(*extra({"prefill_engine_args": {"chunked-prefill-size": CHUNK}})) as made:
        yield made


def until(what: str, holds: Callable[[], object], limit_s: float = START_S, every_s: float = 0.3) -> float:
    """Wait; return for how many seconds."""
    started = time.monotonic()
    while time.monotonic() < started + limit_s:
        with contextlib.suppress(helpers.ServerError):
            if holds():
                return time.monotonic() - started
        time.sleep(every_s)
    pytest.fail(f"not {what} after {limit_s} s")


def url(real: Real, name: str) -> str:
    return str(next(worker["url"] for worker in real.plan()["workers"] if worker["name"] == name))


def pid(real: Real, unit: str) -> int:
    """The process that supervisord runs for a unit; the engine's others are its children, and end with it."""
    return min((process.pid for process in processes.ours(str(real.checkout.state("cpu")), unit)), default=0)


def log(real: Real, unit: str) -> str:
    return (real.checkout.state("cpu") / "log" / f"{unit}.log").read_text(errors="replace")


def served(real: Real) -> float:
    return helpers.counter(helpers.counters(url(real, "decode-0")), "sglang:num_requests_total")


def counted(real: Real) -> dict[str, bool]:
    """What the router's /workers says: role -> whether it counts the worker as healthy."""
    rows = json.loads(helpers.get(f"{real.checkout.url}/workers", KEY))["workers"]
    return {row["worker_type"]: row["is_healthy"] is True for row in rows}


def complete(real: Real) -> bool:
    return counted(real) == {"prefill": True, "decode": True}


def ready(real: Real, name: str) -> bool:
    """Whether a worker says so: HTTP 200, and nothing in it."""
    return helpers.get(url(real, name) + "/ready") == ""


def answers(real: Real) -> bool:
    """Whether a request through the router is answered."""
    return len(real.greedy(helpers.prompts([40], seed=time.time_ns()), 4)[0]) == 4


@contextlib.contextmanager
def benching(real: Real, seconds: int) -> Iterator[subprocess.Popen[str]]:
    """A bench.yml whose load flows."""
    load = {"bench_request_rate": 1, "bench_num_requests": seconds, "bench_timeout": LIMIT_S, "bench_api": "generate"}
    load |= {"bench_input_len": str(PROMPT), "bench_output_len": "16", "bench_warmup": 1, "ratio": "1p1d"}
    before = served(real)
    process = real.checkout.start(*real.words("bench.yml", *extra(load)))
    try:
        until("under load", lambda: process.poll() is not None or served(real) >= before + 4, 200)
        assert process.poll() is None, process.communicate()[0][-4000:]
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def verdict(real: Real, process: subprocess.Popen[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """Wait for bench.yml; return the measured requests that were lost, and what each check of the gate that failed says."""
    text, _ = process.communicate(timeout=400)
    play = Play(subprocess.CompletedProcess([], process.returncode, text, ""))
    assert "the run is INVALID" in " ".join(play.text.split()), play.text[-4000:]
    assert play.code != 0
    run = real.checkout.folder / "results" / "latest"
    failed = {c["id"]: c["message"] for c in json.loads((run / "validity.json").read_text())["checks"] if not c["ok"]}
    rows = pd.read_parquet(run / "requests.parquet")
    rows = rows[rows.phase == "measure"]
    lost = rows[~rows.ok]
    print(f"{len(lost)} of {len(rows)} lost")
    for row in lost[["sent_s", "status", "error"]].to_dict("records"):
        print(f"  sent {row['sent_s']:.1f} s, status {row['status']}: {row['error'][:160]}")
    print("\n".join(f"  gate {name}: {message[:160]}" for name, message in failed.items()))
    assert "error-rate" in failed
    assert (lost.error != "").all()
    return lost, failed


def timed_out(lost: pd.DataFrame) -> pd.Series[bool]:
    """Which of the lost requests came to the client's own limit."""
    return lost.error.str.contains(f"after {LIMIT_S} s")


def doctor(real: Real) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """Run doctor.yml; return its exit code and its findings of severity error and warning by check."""
    play = real.play("doctor.yml")
    found: dict[str, list[dict[str, str]]] = {}
    for row in json.loads((real.checkout.folder / "results" / "doctor.json").read_text())["findings"]:
        if row["severity"] in ("error", "warning"):
            found.setdefault(row["id"], []).append(row)
            print(f"  doctor {row['severity']} {row['id']} {row['host']}: {row['evidence'][:200]}")
    return play.code, found


def errors(found: dict[str, list[dict[str, str]]]) -> set[str]:
    return {check for check, rows in found.items() if any(row["severity"] == "error" for row in rows)}


def under_way(real: Real) -> bool:
    """Whether prefill has sent a part of a prompt's KV cache, and computes the next one: its log has a line for each pass."""
    passes = re.findall(r"Prefill batch,.*#new-token: (\d+),.*#pending-token: (\d+)", log(real, "pd-prefill-0")[-4000:])
    return bool(passes) and int(passes[-1][0]) == CHUNK and CHUNK * 6 < int(passes[-1][1]) < PROMPT - CHUNK * 3


def kill(real: Real, unit: str) -> int:
    old = pid(real, unit)
    os.kill(old, signal.SIGKILL)
    return old


def again(real: Real, since: float) -> None:
    """Wait until the deployment serves as before, and say how long that took."""
    until("complete", lambda: complete(real))
    healthy = time.monotonic() - since
    until("serving", lambda: answers(real), 120)
    print(f"counted as healthy {healthy:.1f} s after the fault, serving after {time.monotonic() - since:.1f} s")


@pytest.fixture(autouse=True)
def serving(real: Real) -> None:
    """Every test finds the deployment whole; one that failed may have left it otherwise."""
    until("complete", lambda: complete(real))
    until("serving", lambda: answers(real), 120)


def test_prefill_is_killed_while_a_kv_cache_is_under_way(real: Real) -> None:
    seen = len(log(real, "pd-decode-0"))
    with benching(real, 16) as bench:
        until("in a transfer", lambda: under_way(real), 60, every_s=0.01)
        old, fault = kill(real, "pd-prefill-0"), time.monotonic()
        lost, _ = verdict(real, bench)
    said = log(real, "pd-decode-0")[seen:]
    # decode gives the prefill worker up after two heartbeats that fail; the router hands its 500 on, or has nobody to try
    assert "Decode transfer failed for request" in said
    assert "KVTransferError" in said
    assert "Lost connection with prefill instance" in said
    assert set(lost.status) <= {200, 500, 502, 503}
    assert not timed_out(lost).any()
    # a stream that had begun: HTTP 200, and an event with an error
    begun = lost[lost.status == 200]
    assert begun.error.str.contains("Lost connection with|Decode transfer failed for request|Decode handshake failed").all()
    again(real, fault)
    assert pid(real, "pd-prefill-0") not in (0, old)
    code, found = doctor(real)
    assert (code, errors(found)) == (0, set())
    assert {"restarts", "kv-failures", "kv-log"} <= set(found)
    assert {row["host"] for row in found["kv-log"]} == {"decode-0"}


def test_the_router_is_killed(real: Real) -> None:
    workers = [pid(real, unit) for unit in ("pd-prefill-0", "pd-decode-0")]
    with benching(real, 12) as bench:
        kill(real, "pd-router")
        fault = time.monotonic()
        lost, failed = verdict(real, bench)
    # no connection, then 503 until it has found its workers; who waited loses the connection at once
    assert set(lost.status) <= {0, 200, 503}
    assert not timed_out(lost).any()
    assert "no-restart" not in failed
    again(real, fault)
    assert [pid(real, unit) for unit in ("pd-prefill-0", "pd-decode-0")] == workers
    code, found = doctor(real)
    assert (code, errors(found)) == (0, set())


def test_decode_is_killed(real: Real) -> None:
    with benching(real, 24) as bench:
        kill(real, "pd-decode-0")
        fault = time.monotonic()
        # what is not streamed waits: prefill for a decode worker that does not come, the router for prefill
        with pytest.raises(helpers.ServerError, match="timed out"):
            helpers.ask(f"{real.checkout.url}/generate", {"input_ids": [300] * 40}, KEY, 8)
        code, found = doctor(real)
        assert code != 0
        assert {"worker-health", "router"} <= errors(found)
        lost, _ = verdict(real, bench)
    # a stream of /generate has HTTP 200 from prefill at once, so the router hears of decode's end
    assert set(lost.status) <= {200, 500, 502, 503}
    assert not timed_out(lost).any()
    assert "Prefill bootstrap failed for request" in log(real, "pd-prefill-0")
    again(real, fault)
    code, found = doctor(real)
    assert (code, errors(found)) == (0, set())


def by_hand(real: Real, unit: str, change: Callable[[str], str]) -> None:
    """Start a worker anew with another command line, as a person would who edits what the deploy wrote."""
    script = real.checkout.state("cpu") / "units" / f"{unit}.sh"
    text = script.read_text()
    assert change(text) != text
    script.write_text(change(text))
    old = kill(real, unit)
    until("started anew", lambda: pid(real, unit) not in (0, old), 60)
    until("ready", lambda: ready(real, unit.removeprefix("pd-")))
    until("complete", lambda: complete(real))
    assert helpers.get(f"{real.checkout.url}/readiness", KEY), "neither the router nor /ready sees it"


def probed(real: Real) -> str:
    """What readiness says: the request over the pair, to both ends, that ends a deploy."""
    plan = real.plan()
    (pair,) = Gateway(plan["router"]["url"], KEY, plan["router"]).probe_pairs(plan, 60)
    print(f"readiness after {pair['seconds']} s: {pair['error'][:300]}")
    return str(pair["error"])


def right_again(real: Real, unit: str) -> None:
    """The next deploy undoes what was done by hand, and starts anew what ran from it."""
    old = pid(real, unit)
    play = real.play("deploy_pd.yml").good()
    assert f"wrote {unit}.sh" in " ".join(play.text.split())
    assert pid(real, unit) not in (0, old)
    assert answers(real)


def test_a_wrong_bootstrap_port(real: Real) -> None:
    planned = real.plan()["workers"][0]["ranks"][0]["bootstrap_port"]
    refused = real.play(
        "plan.yml", "-e", f"plan_dir={real.checkout.folder}/p", *extra({"engine_args": {"disaggregation-bootstrap-port": 9}})
    )
    assert refused.code != 0
    assert "set bootstrap_port_base instead" in " ".join(refused.text.split())

    by_hand(real, "pd-prefill-0", lambda text: text.replace(str(planned), str(planned + 7)))
    with pytest.raises(helpers.ServerError, match="timed out"):
        helpers.ask(f"{real.checkout.url}/generate", {"input_ids": [300] * 40}, KEY, 30)
    # decode asks 15 times, a second apart
    assert "decode-0: HTTP 500" in probed(real)
    assert f"Could not fetch prefill parallel info from 127.0.0.1:{planned} after 15 attempts" in log(real, "pd-decode-0")
    code, found = doctor(real)
    assert code != 0
    assert {"bootstrap-port", "pair"} <= errors(found)
    assert f"its bootstrap port at {planned + 7}, and the plan at {planned}" in found["bootstrap-port"][0]["evidence"]
    assert any("Could not fetch prefill parallel info" in row["evidence"] for row in found["kv-log"])
    right_again(real, "pd-prefill-0")


def test_page_sizes_that_differ(real: Real) -> None:
    refused = real.play("plan.yml", "-e", f"plan_dir={real.checkout.folder}/p", *extra({"decode_engine_args": {"page-size": 16}}))
    assert refused.code != 0
    assert "page-size is not set for prefill-0" in " ".join(refused.text.split())

    by_hand(real, "pd-decode-0", lambda text: text.rstrip("\n") + " --page-size 16\n")
    code, found = doctor(real)
    assert code != 0
    assert {"kv-layout", "pair"} <= errors(found)
    assert "page_size is 1 on prefill-0, 16 on decode-0" in found["kv-layout"][0]["evidence"]
    # the first request over the pair ends the decode worker, and so does the next one once it is back
    assert "Page size mismatch: prefill server has page_size=1, but decode server has page_size=16" in log(real, "pd-decode-0")
    until("complete", lambda: complete(real) and ready(real, "decode-0"))
    assert "decode-0: no answer" in probed(real)
    right_again(real, "pd-decode-0")
