"""`pdbench selfcheck` as a user types it: a client that keeps up, one that is held up on purpose, a server elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pdlib.processes import all_processes

SELFCHECK = [sys.executable, "-m", "pdbench", "selfcheck"]


def check(*options: str) -> tuple[int, str]:
    done = subprocess.run([*SELFCHECK, *options], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def found(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def family(pid: int) -> set[int]:
    """The process and all that came of it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    known = {pid}
    while more := {child for child, parent in parents.items() if parent in known} - known:
        known |= more
    return known


def test_what_it_finds_is_what_the_server_did(tmp_path: Path) -> None:
    code, text = check("--concurrency", "4", "--osl", "16", "--seconds", "1", "--json", str(tmp_path / "s.json"))
    # A machine that runs other tests, too, may make the client slow: what is tested is that the figures are whole.
    assert code in (0, 3), text
    report = found(tmp_path / "s.json")
    (point,) = report["points"]
    assert (point["concurrency"], point["requests"], point["tokens"]) == (4, 8, 16)
    assert point["true_ttft_ms"]["min"] >= 50
    assert point["true_itl_ms"]["min"] > 19
    assert not [reason for reason in point["reasons"] if "did not keep up" not in reason]
    assert point["ttft_wrong_by"]["min"] > -1, "a client cannot see a token before it was sent"
    assert point["client_cores"] > 0
    assert (code == 0) is report["keeps_up"] is (report["grade"] != "F")
    assert re.search(r"\b4 +16 +20\.0 ", text)


def test_a_client_that_is_held_up_is_caught(tmp_path: Path) -> None:
    """Its processes stand still for 0.4 s of every 0.5 s; the server does not."""
    command = [*SELFCHECK, "--concurrency", "8", "--osl", "8", "--seconds", "3", "--json", str(tmp_path / "s.json")]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    checking = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    try:
        end = time.monotonic() + 100
        while checking.poll() is None and time.monotonic() < end:
            ours = family(checking.pid)
            runs = [p.pid for p in all_processes() if p.pid in ours and "pdbench run " in p.command]
            begun = any(tmp_path.glob("pdbench-selfcheck-*/*/requests.jsonl"))
            held = family(runs[0]) if runs and begun else set()
            for number, pause in ((signal.SIGSTOP, 0.4), (signal.SIGCONT, 0.1)):
                for pid in held:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                time.sleep(pause)
        text = checking.communicate(timeout=10)[0]
    finally:
        checking.kill()
        checking.wait()
    assert checking.returncode == 3, text
    report = found(tmp_path / "s.json")
    assert (report["grade"], report["keeps_up"]) == ("F", False)
    assert "the client did not keep up" in report["points"][0]["reasons"][0]
    assert "the client did not keep up" in text


def test_a_server_elsewhere_and_nothing_left_behind(tmp_path: Path) -> None:
    # Tests that a shell started in the background have Ctrl-C ignored, and so would the server.
    server = subprocess.Popen(
        [*SELFCHECK, "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert server.stdout is not None
        port = re.match(r"port (\d+)", server.stdout.readline())
        assert port
        options = ("--concurrency", "2", "--osl", "8", "--seconds", "1", "--json", str(tmp_path / "s.json"))
        code, text = check("--against", f"http://127.0.0.1:{port[1]}", *options, "--", "--api", "chat")
        assert code in (0, 3), text
        report = found(tmp_path / "s.json")
        assert report["path_ms"] > 0
        assert report["run_options"] == ["--api", "chat"]
        assert report["points"][0]["requests"] == 8
        assert not [reason for reason in report["points"][0]["reasons"] if "did not keep up" not in reason]
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 0
    assert not [p for p in all_processes() if "pdbench.selfcheck.truth" in p.command and p.pid in family(os.getpid())]
