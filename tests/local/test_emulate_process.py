"""The command: its arguments, its key, its end, and what it costs."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from emulated_workers import call, free_port, profile_file, worker

COMMAND = [sys.executable, "-m", "pdbench", "emulate"]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=60)


def test_a_taken_port_is_named_and_exits_1(tmp_path: Path) -> None:
    profile = str(profile_file(tmp_path))
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        for options in (
            ["--role", "aggregated", "--port", port],
            ["--role", "prefill", "--port", str(free_port()), "--bootstrap-port", port],
        ):
            done = run(*options, "--profile", profile)
            assert done.returncode == 1
            assert f"127.0.0.1:{port} is taken" in done.stderr
            assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--role"),
        (["--role", "both", "--port", "1"], "invalid choice: 'both'"),
        (["--role", "decode", "--port", "0"], "'0' is not a port between 1 and 65535"),
        (["--role", "decode", "--port", "99999"], "not a port"),
        (["--role", "decode", "--port", "1", "--tp-size", "0"], "'0' is not a whole number above 0"),
        (["--role", "decode", "--port", "1", "--profile", "nope"], "no profile 'nope'"),
        (["--role", "decode", "--port", "1", "--rdma-fabric", "pigeon"], "invalid choice: 'pigeon'"),
        (["--role", "prefill", "--port", "9", "--bootstrap-port", "9"], "must differ"),
        (["--role", "decode", "--port", "1", "--api-key-file", "/nonexistent"], "No such file"),
    ],
)
def test_bad_arguments_exit_2_with_a_message(options: list[str], said: str) -> None:
    done = run(*options)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_profile_names_file_and_key(tmp_path: Path) -> None:
    path = str(profile_file(tmp_path, decode_overhead_ms=-1))
    done = run("--role", "decode", "--port", "1", "--profile", path)
    assert done.returncode == 2
    assert f"{path}: engine.decode_overhead_ms must be a number of 0 or more, not -1" in done.stderr


def test_an_address_that_is_not_ours_exits_1(tmp_path: Path) -> None:
    done = run("--role", "decode", "--port", str(free_port()), "--host", "no.such.host.invalid")
    assert done.returncode == 1
    assert "cannot listen on no.such.host.invalid" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_key(tmp_path: Path) -> None:
    secret, key = tmp_path / "key", "s3cret-of-this-test"
    secret.write_text(key + "\n")
    secret.chmod(0o644)
    options = ["--role", "decode", "--port", "1", "--api-key-file", str(secret)]
    done = run(*options)
    assert done.returncode == 2
    assert "chmod 600" in done.stderr
    assert key not in done.stderr
    secret.chmod(0o600)
    with worker("aggregated", profile_file(tmp_path), "--api-key-file", str(secret)) as made:
        for path in ("/ready", "/health", "/health_generate", "/metrics"):
            assert made.get(path)[0] == 200
        body = {"prompt": "a", "max_tokens": 1}
        for path in ("/server_info", "/v1/models", "/v1/loads", "/flush_cache"):
            assert made.get(path)[0] == made.get(path, "wrong")[0] == 401
            assert made.get(path, key)[0] == 200
        assert made.post("/v1/completions", body)[0] == 401
        assert made.post("/v1/completions", body, key)[0] == 200
        assert key not in made.log.read_text()
        # as SGLang does, so that tests notice who keeps what it says
        assert json.loads(made.get("/server_info", key)[1])["api_key"] == key
        assert key not in Path(f"/proc/{made.process.pid}/cmdline").read_text()
    secret.write_text(" \n")
    assert "the file is empty" in run(*options).stderr


def test_starting_is_not_ready(tmp_path: Path) -> None:
    port = free_port()
    options = ["--role", "aggregated", "--port", str(port), "--profile", str(profile_file(tmp_path, startup_s=60))]
    process = subprocess.Popen([*COMMAND, *options], stderr=subprocess.DEVNULL)
    try:
        seen: list[int] = []
        deadline = time.monotonic() + 30
        while not seen and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                seen += [call(f"http://127.0.0.1:{port}{path}", None)[0] for path in ("/ready", "/health")]
                seen.append(call(f"http://127.0.0.1:{port}/generate", {"text": "a"})[0])
        assert seen == [503, 503, 503]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_sigterm_ends_quickly_with_a_stream_running(tmp_path: Path) -> None:
    with worker("aggregated", profile_file(tmp_path)) as made:
        connection = http.client.HTTPConnection(made.url.removeprefix("http://"), timeout=60)
        body = json.dumps({"prompt": "a", "max_tokens": 30_000, "stream": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        stream = connection.getresponse()
        assert stream.readline()
        begun = time.monotonic()
        made.process.send_signal(signal.SIGTERM)
        assert made.process.wait(30) == 0
        # 2 s is the promise; twice that leaves room for a machine that does other things
        assert time.monotonic() - begun < 4
        with contextlib.suppress(OSError, http.client.HTTPException):
            assert b"[DONE]" not in stream.read()
        with pytest.raises(OSError):  # noqa: PT011 - refused or reset, both mean that nobody listens
            made.get("/ready")


def test_a_stream_costs_a_small_part_of_a_core(tmp_path: Path) -> None:
    """CPU time, not wall time: 64 streams of a 20 ms step must leave most of a core free (256 fit in one)."""
    streams, tokens, step_s = 64, 100, 0.020
    with worker("aggregated", profile_file(tmp_path, decode_overhead_ms=step_s * 1e3)) as made:
        connections = [http.client.HTTPConnection(made.url.removeprefix("http://"), timeout=60) for _ in range(streams)]
        before = made.cpu_s()
        for number, connection in enumerate(connections):
            body = json.dumps({"prompt": f"a {number}", "max_tokens": tokens, "stream": True})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        for connection in connections:
            assert connection.getresponse().read().count(b"data: ") == tokens + 1
            connection.close()
        used = made.cpu_s() - before
    print(f"{used / (streams * tokens) * 1e6:.0f} us of CPU a token")
    assert used < 0.6 * tokens * step_s
