"""A host's units under the real supervisord, without root and without Ansible."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toolbox

from pdlib import processes
from pdlib.errors import UserError
from pdlib.folders import claim
from pdlib.managers import Supervisord
from pdlib.reconcile import Reconciler
from pdlib.steps import Outcome
from pdlib.teardown import remove_everything
from pdlib.units import socket_path

#: Serves its process id on 127.0.0.1; whatever follows the port is for the test to look at.
SERVER = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str(os.getpid()).encode())
print("serving", sys.argv[1:], flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def server(name: str, port: int, *args: str, members: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "title": name,
        "argv": [sys.executable, "-c", SERVER, str(port), *args, *members],
        "env": {"PD_NOTE": "it's 100% $HOME"},
        "listen": "127.0.0.1",
        "ports": [port],
        "health_url": f"http://127.0.0.1:{port}/",
        "members": list(members),
        **more,
    }


class Box:
    """One host: its state directory, and the steps that Ansible would make."""

    def __init__(self, home: Path, install: Path):
        self.home, self.install = home, install

    def step(self, *units: dict[str, Any], resumed: bool = False, check: bool = False) -> Outcome:
        return Reconciler(str(self.home), str(self.install), "supervisord", "1p1d", units, check).step(resumed)

    def converge(self, *units: dict[str, Any]) -> list[str]:
        """Step until done; return all that was changed."""
        changed: list[str] = []
        for number in range(10):
            outcome = self.step(*units, resumed=number > 0)
            changed += [line for line in outcome.changed if line not in changed]
            if outcome.done:
                return changed
        pytest.fail(outcome.message)

    def pid(self, unit: dict[str, Any]) -> int:
        with urllib.request.urlopen(unit["health_url"], timeout=10) as answer:
            return int(answer.read())

    def daemon(self) -> int:
        return int((self.home / "supervisord.pid").read_text())

    def teardown(self, check: bool = False) -> list[str]:
        changed: list[str] = []
        for _ in range(10):
            outcome = remove_everything(str(self.home), str(self.home.parent / "none"), ["supervisord"], False, check)
            changed += outcome.changed
            if outcome.done:
                return changed
        pytest.fail(outcome.message)

    def files(self) -> dict[str, tuple[str, int]]:
        """Everything but what changes by itself."""
        found = {str(p.relative_to(self.home)): p for p in self.home.rglob("*") if p.is_file()}
        return {n: (p.read_text(errors="replace"), p.stat().st_mtime_ns) for n, p in found.items() if not n.startswith("log/")}


@pytest.fixture(scope="session")
def install() -> Path:
    return Path(toolbox.supervisor_python()).parents[2]


@pytest.fixture
def box(tmp_path: Path, install: Path) -> Iterator[Box]:
    home = tmp_path / "it's a state"
    claim(str(home))
    yield Box(home, install)
    processes.kill([p.pid for p in processes.ours(str(home))], 5)
    Path(socket_path(str(home))).unlink(missing_ok=True)


def test_a_second_step_changes_nothing_and_a_change_restarts_one(box: Box) -> None:
    one, two = server("pd-prefill-0", free_port()), server("pd-decode-0", free_port())
    router = server("pd-router", free_port(), "--flag", members=("--decode", "a"))
    changed = box.converge(one, two, router)
    assert {now.state for now in Supervisord(str(box.home), "", "").status().values()} == {"running"}
    assert {f"started {u['name']}" for u in (one, two, router)} <= set(changed)
    pids, files = [box.pid(u) for u in (one, two, router)], box.files()
    assert Path(f"/proc/{pids[0]}/cwd").resolve() == Path(processes.work_dir(str(box.home), "pd-prefill-0")).resolve()
    assert b"PD_NOTE=it's 100% $HOME\0" in Path(f"/proc/{pids[0]}/environ").read_bytes()

    assert box.converge(one, two, router) == []
    assert [box.pid(u) for u in (one, two, router)] == pids
    assert {n: text for n, (text, _) in box.files().items()} == {n: text for n, (text, _) in files.items()}

    turned = server("pd-prefill-0", one["ports"][0], "--other")
    assert box.converge(turned, two, router) == ["restarted pd-prefill-0", "wrote pd-prefill-0.sh"]
    now = [box.pid(u) for u in (turned, two, router)]
    assert now[0] != pids[0]
    assert now[1:] == pids[1:]

    wider = server("pd-router", router["ports"][0], "--flag", members=("--decode", "a", "--decode", "b"))
    assert box.converge(turned, two, wider) == ["wrote pd-router.sh"]
    assert box.pid(wider) == pids[2], "the router keeps running"
    os.kill(pids[2], signal.SIGKILL)
    end = time.monotonic() + 20
    while not (found := [p for p in processes.ours(str(box.home), "pd-router") if p.pid != pids[2]]):
        assert time.monotonic() < end, "supervisord starts a router that was killed"
        time.sleep(0.1)
    while not found[0].command.endswith("--flag --decode a --decode b"):
        assert time.monotonic() < end, "and it comes back with the new members"
        time.sleep(0.1)
        found = processes.ours(str(box.home), "pd-router")
    box.converge(turned, two, wider)

    assert box.converge(turned, wider) == ["stopped pd-decode-0"]
    assert processes.taken_ports([("127.0.0.1", two["ports"][0])]) == {}
    assert not [name for name in box.files() if "decode" in name]
    assert box.pid(turned) == now[0]


def test_check_mode_changes_nothing(box: Box) -> None:
    one, two = server("pd-prefill-0", free_port()), server("pd-decode-0", free_port())
    before = box.files()
    assert "would start pd-prefill-0" in box.step(one, check=True).changed
    assert box.files() == before
    assert processes.ours(str(box.home)) == []
    box.converge(one, two)
    before, pid = box.files(), box.pid(one)
    outcome = box.step(server("pd-prefill-0", one["ports"][0], "--other"), check=True)
    assert outcome.done
    assert {"would restart pd-prefill-0", "would stop pd-decode-0", "would write pd-prefill-0.sh"} == set(outcome.changed)
    assert any("stopped" in line for line in box.teardown(check=True))
    assert box.files() == before
    assert box.pid(one) == pid
    assert box.step(one, two, check=True).changed == []


def test_a_unit_that_dies_fails_at_once_with_its_log_and_can_be_put_right(box: Box) -> None:
    port, good = free_port(), server("pd-decode-0", free_port())
    words = 'import sys; print("no such model: m", flush=True); sys.exit(7)'
    dying = {**server("pd-prefill-0", port), "argv": [sys.executable, "-c", words]}
    with pytest.raises(UserError) as refused:
        box.converge(dying, good)
    assert "pd-prefill-0 died before it was ready" in str(refused.value)
    assert "no such model: m" in str(refused.value)
    right = server("pd-prefill-0", port)
    changed = box.converge(right, good)
    assert "wrote pd-prefill-0.sh" in changed
    assert box.pid(right)
    assert box.converge(right, good) == []


def test_surplus_that_dies_again_and_again_is_gone(box: Box) -> None:
    good, name = server("pd-decode-0", free_port()), "pd-prefill-0"
    dying = {**server(name, free_port()), "argv": ["/bin/sh", "-c", "exit 7"]}
    with pytest.raises(UserError, match=f"{name} died before it was ready"):
        box.converge(dying, good)
    manager = Supervisord(str(box.home), "", "")
    assert manager.status()[name].state == "dead"
    assert f"stopped {name}" in box.converge(good)
    assert set(manager.status()) == {"pd-decode-0"}


def test_a_unit_that_always_dies_is_given_up_after_five_starts(box: Box) -> None:
    """It lives for longer than supervisord's own idea of a start that failed, as an engine does that loads its model first."""
    dying = {**server("pd-prefill-0", free_port()), "argv": ["/bin/sh", "-c", "sleep 2; exit 7"]}
    with pytest.raises(UserError, match="died before it was ready"):
        box.converge(dying)
    log, end = box.home / "log" / "supervisord.log", time.monotonic() + 60
    while "gave up: pd-prefill-0" not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.2)
    assert log.read_text().count("spawned: 'pd-prefill-0'") == 5
    assert Supervisord(str(box.home), "", "").status()["pd-prefill-0"].state == "dead"


def test_a_taken_port_is_named_with_its_holder(box: Box) -> None:
    port = free_port()
    with subprocess.Popen([sys.executable, "-c", SERVER, str(port)], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout
            holder.stdout.readline()
            end = time.monotonic() + 20
            while not processes.taken_ports([("127.0.0.1", port)]):
                assert time.monotonic() < end
                time.sleep(0.05)
            with pytest.raises(UserError, match=rf"port {port} of 127\.0\.0\.1, which pd-prefill-0 needs, is held by") as refused:
                box.converge(server("pd-prefill-0", port))
            assert f"process {holder.pid} (" in str(refused.value)
            assert processes.ours(str(box.home), "pd-prefill-0") == []
        finally:
            holder.kill()
    box.converge(server("pd-prefill-0", port))


def test_a_killed_supervisord_is_recovered_from(box: Box) -> None:
    one, two, gone = (server(f"pd-{name}", free_port()) for name in ("prefill-0", "decode-0", "decode-1"))
    box.converge(one, two, gone)
    pids, daemon = [box.pid(u) for u in (one, two, gone)], box.daemon()
    os.kill(daemon, signal.SIGKILL)
    changed = box.converge(one, two)
    assert {"started pd-prefill-0", "started pd-decode-0", "stopped pd-decode-1"} <= set(changed)
    assert box.daemon() != daemon
    assert not [p for p in processes.ours(str(box.home)) if p.pid in pids], "the orphans are gone"
    assert processes.taken_ports([("127.0.0.1", gone["ports"][0])]) == {}
    assert box.pid(one) not in pids
    assert box.converge(one, two) == []


def test_teardown_leaves_nothing_and_works_twice_and_after_a_kill(box: Box) -> None:
    parent = 'import subprocess, sys; subprocess.run([sys.executable, "-c", *sys.argv[1:]])'
    one = server("pd-prefill-0", free_port())
    one["argv"] = [sys.executable, "-c", parent, *one["argv"][2:]]
    sock = Path(socket_path(str(box.home)))
    box.converge(one)
    assert sock.exists()
    changed = box.teardown()
    assert f"removed {box.home}" in changed
    assert "stopped pd-prefill-0" in changed
    for _ in range(2):
        assert not box.home.exists()
        assert not sock.exists()
        assert processes.ours(str(box.home)) == []
        assert processes.taken_ports([("127.0.0.1", one["ports"][0])]) == {}
        assert box.teardown() == []
    claim(str(box.home))
    box.converge(one)
    os.kill(box.daemon(), signal.SIGKILL)
    (box.home / "units.json").unlink()
    changed = box.teardown()
    assert any(line.startswith("ended process") for line in changed)
    assert not box.home.exists()
    assert not sock.exists()
    assert processes.ours(str(box.home)) == []
    assert list(box.home.parent.iterdir()) == []
