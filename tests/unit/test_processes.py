"""Who holds a port, and which processes are ours, with real children."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdlib import processes

LISTEN = """
import socket, sys, time
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family) as s:
    s.bind((sys.argv[1], 0)); s.listen(); print(s.getsockname()[1], flush=True); time.sleep(60)
"""
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start children that are gone after the test."""
    children: list[subprocess.Popen[str]] = []

    def start(argv: list[str], **options: object) -> subprocess.Popen[str]:
        children.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, **options))  # type: ignore[call-overload]
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.wait()
        assert child.stdout
        child.stdout.close()


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout
    return child.stdout.readline().strip()


def wait_for(what: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_holder_of_a_port_is_named(spawn: Spawn) -> None:
    child = spawn([sys.executable, "-c", LISTEN, "127.0.0.1"])
    port = int(said(child))
    assert ("127.0.0.1", port) in {(address, number) for address, number, _ in processes.listeners()}
    taken = processes.taken_ports([("127.0.0.1", port), ("127.0.0.2", port), ("127.0.0.1", 1)])
    assert list(taken) == [("127.0.0.1", port)]
    assert f"process {child.pid} (" in taken["127.0.0.1", port]
    assert "import socket" in taken["127.0.0.1", port]
    assert processes.taken_ports([("0.0.0.0", port)]), "binding everywhere meets any address"


def test_a_port_held_everywhere_is_held_on_every_address(spawn: Spawn) -> None:
    port = int(said(spawn([sys.executable, "-c", LISTEN, "0.0.0.0"])))
    assert set(processes.taken_ports([("127.0.0.1", port), ("127.0.0.7", port)])) == {("127.0.0.1", port), ("127.0.0.7", port)}


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists() or not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6_listeners_are_read(spawn: Spawn) -> None:
    child = spawn([sys.executable, "-c", LISTEN, "::1"])
    try:
        port = int(said(child))
    except ValueError:
        pytest.skip("no IPv6 loopback")
    assert ("::1", port) in {(address, number) for address, number, _ in processes.listeners()}


def test_a_free_port_is_free() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        assert processes.taken_ports([("127.0.0.1", port)]) == {}, "bound, but not listening"


def test_ours_are_known_by_their_folder_whatever_they_call_themselves(tmp_path: Path, spawn: Spawn) -> None:
    folder = Path(processes.work_dir(str(tmp_path), "pd-prefill-1"))
    (folder / "deeper").mkdir(parents=True)
    Path(processes.work_dir(str(tmp_path), "pd-prefill-10")).mkdir()
    sleep = str(shutil.which("sleep"))
    titled = spawn(["sglang::router", "60"], executable=sleep, cwd=folder)
    deeper = spawn([sleep, "60"], cwd=folder / "deeper")
    other = spawn([sleep, "60"], cwd=processes.work_dir(str(tmp_path), "pd-prefill-10"))
    outside = spawn([sleep, "60"], cwd=tmp_path)
    wait_for(lambda: [p for p in processes.ours(str(tmp_path)) if p.pid == titled.pid and p.command == "sglang::router 60"])
    wait_for(lambda: len(processes.ours(str(tmp_path))) == 3)
    assert {p.pid for p in processes.ours(str(tmp_path), "pd-prefill-1")} == {titled.pid, deeper.pid}
    assert {p.pid for p in processes.ours(str(tmp_path))} == {titled.pid, deeper.pid, other.pid}
    assert outside.poll() is None
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert {p.pid for p in processes.ours(str(link), "pd-prefill-1")} == {titled.pid, deeper.pid}
    shutil.rmtree(tmp_path / "run")
    assert {p.pid for p in processes.ours(str(tmp_path), "pd-prefill-1")} == {titled.pid, deeper.pid}, "the folder is gone"
    assert processes.ours(str(tmp_path / "elsewhere")) == []


def test_we_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "x")
    assert processes.ours(str(tmp_path)) == []


def test_kill_ends_the_willing_at_once_and_the_deaf_after_the_grace(spawn: Spawn) -> None:
    willing = spawn([str(shutil.which("sleep")), "60"])
    started = time.monotonic()
    processes.kill([willing.pid], 30.0)
    assert time.monotonic() - started < 20
    assert willing.wait() == -signal.SIGTERM
    deaf = spawn([sys.executable, "-c", STUBBORN])
    assert said(deaf) == "deaf"
    started = time.monotonic()
    processes.kill([deaf.pid], 0.3)
    assert time.monotonic() - started >= 0.3
    assert deaf.wait() == -signal.SIGKILL


def test_kill_takes_the_dead_as_they_are(spawn: Spawn) -> None:
    dead = spawn([str(shutil.which("true"))])
    wait_for(lambda: not any(p.pid == dead.pid for p in processes.all_processes()))
    processes.kill([dead.pid], 0.1)
    dead.wait()
    processes.kill([dead.pid, 2**22 + 1], 0.1)
    processes.kill([], 10)


def test_every_process_is_listed_but_zombies(spawn: Spawn) -> None:
    listed = {p.pid: p for p in processes.all_processes()}
    assert listed[os.getpid()].cwd == os.getcwd()
    assert "pytest" in listed[os.getpid()].command or "python" in listed[os.getpid()].command


def test_this_machine_and_its_process_numbers_have_one_name() -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert processes.place() == f"{boot} {os.readlink('/proc/self/ns/pid')}"
    assert processes.sees_all() is Path("/proc/1/stat").exists()
