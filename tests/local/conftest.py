"""A copy of the checkout with ports of its own, in which the verbs run as a user types them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdlib import processes

REPO = Path(__file__).resolve().parents[2]
ANSIBLE = Path(sys.executable).with_name("ansible-playbook")
ADDRESSES = ("127.0.0.1", "127.0.0.2")
#: what the gate finds where other work of this machine keeps the load generator from its own
HELD_UP = {"client-loop", "client-on-time", "client-load"}


def free_base(count: int, start: int) -> int:
    """A port from which ``count`` are free on both of the default inventory's addresses."""
    # A pytest without workers may run beside one with some (make test-real): it has ports between those of the first two.
    worker = float(os.environ.get("PYTEST_XDIST_WORKER", "gw0.5").removeprefix("gw"))
    base = start + int(3000 * worker) + (os.getpid() * 37) % 1000
    while True:
        ports = range(base, base + count)
        if not processes.taken_ports([(address, port) for address in ADDRESSES for port in ports]):
            return base
        base += count


class Play:
    """The outcome of one ansible-playbook command."""

    def __init__(self, done: subprocess.CompletedProcess[str]):
        self.code, self.text = done.returncode, done.stdout + done.stderr
        rows = re.findall(r"^(\S+)\s+: ok=\d+\s+changed=(\d+).*failed=(\d+)", self.text, re.M)
        self.changed = {host: int(changed) for host, changed, _ in rows}

    def good(self) -> Play:
        assert self.code == 0, self.text[-3000:]
        return self


class Checkout:
    """A copy of the working tree; ``play`` runs a verb in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        names = subprocess.run(
            ["git", "-C", str(REPO), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
        ).stdout.split("\n")
        for name in filter(None, names):
            source, target = REPO / name, folder / name
            if not source.exists() and not source.is_symlink():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
        # Installs are shared by all copies, and kept: what is tested is that a deploy finds or makes them.
        hosts = folder / "inventory" / "local" / "hosts.yml"
        own = '"{{ inventory_dir | dirname | dirname }}/.pd/install"'
        assert own in hosts.read_text()
        hosts.write_text(hosts.read_text().replace(own, str(REPO / ".pd" / "test" / "verbs")))
        base = free_base(40, 20000)
        self.router_port, self.worker_port = base, base + 2
        with open(folder / "group_vars" / "all.yml", "a") as file:
            file.write(f"router_port: {base}\nrouter_prometheus_port: {base + 1}\n")
            # One test asks for it: the others need not pay for it.
            file.write("bench_selfcheck: false\n")
            file.write(f"worker_port_base: {base + 2}\nbootstrap_port_base: {base + 20}\n")
        self.url = f"http://127.0.0.1:{base}"

    def start(self, *args: str) -> subprocess.Popen[str]:
        env = {**os.environ, "ANSIBLE_NOCOLOR": "1", "PATH": f"{ANSIBLE.parent}:{os.environ['PATH']}"}
        return subprocess.Popen(
            ["ansible-playbook", *args], cwd=self.folder, env=env, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def play(self, *args: str, timeout: float = 280) -> Play:
        process = self.start(*args)
        try:
            out, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            out, _ = process.communicate()
            pytest.fail(f"{args} took over {timeout} s:\n{out[-4000:]}")
        return Play(subprocess.CompletedProcess(args, process.returncode, out, ""))

    def measured(self, *args: str, timeout: float = 280) -> Play:
        """A bench.yml whose run, results/latest, is valid.

        Load generator, workers and other tests share the cores of this machine. A run in which the generator was kept from its
        work is rightly refused by the gate: that, and nothing else, is tried again.
        """
        for _ in range(3):
            done = self.play("bench.yml", *args, timeout=timeout)
            path = self.folder / "results" / "latest" / "validity.json"
            if not path.exists():
                break
            verdict = json.loads(path.read_text())
            if done.code == 0:
                assert verdict["valid"] is True
                break
            faults = {check["id"]: check["message"] for check in verdict["checks"] if not check["ok"]}
            print("not valid:", faults)
            if not faults.keys() <= HELD_UP:
                break
        return done.good()

    def state(self, host: str) -> Path:
        return self.folder / ".pd" / f"state-{host}"

    def pids(self) -> dict[str, int]:
        """The process that supervisord runs for each unit."""
        found: dict[str, int] = {}
        for host in ("gh200", "a100"):
            for process in processes.ours(str(self.state(host))):
                unit = Path(process.cwd).name
                if unit != "supervisord":
                    found[unit] = min(process.pid, found.get(unit, process.pid))
        return found

    def processes(self) -> list[str]:
        """Every process that belongs to this checkout in any way."""
        mark = str(self.folder)
        return [f"{p.pid} {p.command}" for p in processes.all_processes() if mark in p.cwd or mark in p.command]

    def ask(self, path: str, body: dict[str, Any] | None = None, key: str = "") -> Any:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        data = json.dumps(body).encode() if body is not None else None
        call = urllib.request.Request(self.url + path, data=data, headers=headers)
        with urllib.request.urlopen(call, timeout=30) as answer:
            return json.loads(answer.read())

    def members(self) -> set[tuple[str, str]]:
        return {(w["worker_type"], w["url"]) for w in self.ask("/workers")["workers"]}

    def files(self) -> set[str]:
        """Every file of the checkout that no install or result put there."""
        skip = (".pd/install", ".pd/dist", "results/", "__pycache__", ".ansible")
        found = (str(p.relative_to(self.folder)) for p in self.folder.rglob("*"))
        return {name for name in found if not any(part in name + "/" for part in skip)}

    def bound(self) -> set[tuple[str, int]]:
        ports = range(self.router_port, self.router_port + 40)
        return {(address, port) for address, port, _ in processes.listeners() if port in ports}


@pytest.fixture(scope="session")
def checkout() -> Iterator[Checkout]:
    folder = Path(tempfile.mkdtemp(prefix="pd-"))
    made = Checkout(folder)
    yield made
    made.play("teardown.yml")
    processes.kill([int(line.split()[0]) for line in made.processes()], 5)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def clean(checkout: Checkout) -> Iterator[Checkout]:
    """The checkout with nothing deployed, before and after."""
    yield checkout
    checkout.play("teardown.yml").good()
