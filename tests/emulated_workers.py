"""Emulated workers and the real router as processes of a test: free ports, and nothing outlives the `with`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from toolbox import router_python

#: Quick enough for tests, slow enough that order and waiting can be seen; `bandwidth_gb_per_s` leaves a step its overhead only.
QUICK = {
    **{"tflops": 2 * 2.77e9 * 50_000 / 1e12, "bandwidth_gb_per_s": 1e9, "decode_overhead_ms": 5, "decode_us_per_request": 0},
    **{"startup_s": 0, "bootstrap_interval_s": 0.05},
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def profile_file(folder: Path, **changes: object) -> Path:
    """Write the shipped tiny profile with QUICK's figures and these changes to model, gpu or engine; return the file."""
    figures = yaml.safe_load((resources.files("pdbench.model") / "profiles" / "tiny.yml").read_text("utf-8"))
    for name, value in {**QUICK, **changes}.items():
        (part,) = (part for part in ("model", "gpu", "engine") if name in figures[part])
        figures[part][name] = [value, "chosen: for this test"]
    path = folder / f"profile-{len(list(folder.iterdir()))}.yml"
    path.write_text(yaml.safe_dump(figures))
    return path


@dataclass
class Service:
    process: subprocess.Popen[bytes]
    url: str
    log: Path
    bootstrap_port: int = 0

    def get(self, path: str, key: str = "") -> tuple[int, bytes]:
        return call(self.url + path, None, key)

    def post(self, path: str, body: object, key: str = "") -> tuple[int, bytes]:
        return call(self.url + path, body, key)

    def json(self, path: str, body: object = None) -> Any:
        status, data = call(self.url + path, body)
        assert status == 200, (status, data)
        return json.loads(data)

    def metrics(self) -> dict[str, float]:
        """Return every sample, summed over its labels except `le`."""
        totals: dict[str, float] = {}
        for line in self.get("/metrics")[1].decode().splitlines():
            if not line.startswith("#") and "_bucket" not in line:
                name, value = line.split("{")[0].removeprefix("sglang:"), float(line.rsplit(" ", 1)[1])
                totals[name] = totals.get(name, 0) + value
        return totals

    def wait_until_idle(self) -> None:
        wait_for(lambda: self.metrics()["num_running_reqs"] == 0 and self.json("/get_load")[0]["num_reqs"] == 0, "idle")

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def call(url: str, body: object, key: str = "") -> tuple[int, bytes]:
    """POST a JSON body (None: GET); return status and body of the answer."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as failure:
        return failure.code, failure.read()


def wait_for(condition: Any, what: str, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if condition():
                return
        time.sleep(0.05)
    raise AssertionError(f"not {what} after {limit_s} s")


@contextlib.contextmanager
def service(argv: list[str], url: str, ready: str, env: dict[str, str] | None = None) -> Iterator[Service]:
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env={**os.environ, **(env or {})}, start_new_session=True)
        try:
            made = Service(process, url, Path(log.name))

            def is_ready() -> bool:
                assert process.poll() is None, made.log.read_text()
                return made.get(ready)[0] == 200

            wait_for(is_ready, f"ready: {argv}")
            yield made
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def worker(role: str, profile: Path | str, *options: str, env: dict[str, str] | None = None) -> Iterator[Service]:
    port, bootstrap = free_port(), free_port()
    argv = [sys.executable, "-m", "pdbench", "emulate", "--role", role, "--port", str(port), "--profile", str(profile)]
    argv += ["--bootstrap-port", str(bootstrap), *options]
    with service(argv, f"http://127.0.0.1:{port}", "/ready", env) as made:
        made.bootstrap_port = bootstrap
        yield made


@contextlib.contextmanager
def router(*options: str) -> Iterator[Service]:
    port = free_port()
    argv = [router_python(), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    argv += ["--worker-startup-check-interval", "1", "--policy", "round_robin", *options]
    with service(argv, f"http://127.0.0.1:{port}", "/readiness") as made:
        yield made


def pd_body(prefill: Service, room: int, body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "bootstrap_host": "127.0.0.1", "bootstrap_port": prefill.bootstrap_port, "bootstrap_room": room}


def pair(prefill: Service, decode: Service, path: str, body: object) -> tuple[tuple[int, bytes], tuple[int, bytes]]:
    """Send the same body to both, as a router does; return both answers."""
    with ThreadPoolExecutor(2) as both:
        first, second = both.submit(prefill.post, path, body), both.submit(decode.post, path, body)
        return first.result(), second.result()


def events(data: bytes) -> list[Any]:
    """Return the JSON events of a stream; its end must be there."""
    parts = data.decode().split("\n\n")
    assert parts[-1] == ""
    assert parts[-2] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]
