"""The controller of the lab: a copy of the checkout, in which the verbs run over SSH as a user types them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from lab import hosts, network
from lab.common import REPO, STATE, SWITCH, LabError, address, run
from meanwhile import repeating

T = TypeVar("T")
ANSIBLE = Path(sys.executable).with_name("ansible-playbook")


def sh(host: str, command: str, check: bool = True) -> str:
    """Run a shell command as root in a host, without SSH; return what it prints."""
    return run(*hosts.on_host(host, ["bash", "-c", command]), check=check).stdout.strip()


def ssh(host: str, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command over SSH, as the controller's user would."""
    return run("ssh", "-F", STATE / "ssh_config.outside", "-o", "BatchMode=yes", host, command, check=False)


def reaches(host: str, other: str, port: int = 22) -> bool:
    """Whether a host can open a TCP connection to another within two seconds."""
    command = f"timeout 2 bash -c '</dev/tcp/{address(other)}/{port}' 2>/dev/null && echo yes || echo no"
    return sh(host, command) == "yes"


def until(what: str, call: Callable[[], T], timeout_s: float = 60) -> T:
    """Call until the answer is true and return it; what raises OSError is asked again."""
    end, last = time.monotonic() + timeout_s, ""
    while True:
        try:
            answer = call()
            if answer:
                return answer
            last = repr(answer)
        except (OSError, LabError, ValueError) as error:
            last = str(error)
        if time.monotonic() > end:
            pytest.fail(f"not within {timeout_s:.0f} s: {what} (last: {last})")
        time.sleep(0.2)


class Play:
    """The outcome of one ansible-playbook command: exit code, output, seconds, and the recap by host."""

    def __init__(self, code: int, text: str, seconds: float):
        self.code, self.text, self.seconds = code, text, seconds
        rows = re.finditer(r"^(\S+)\s+: (ok=.*)$", text, re.M)
        self.recap = {row[1]: {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row[2])} for row in rows}

    @property
    def changed(self) -> dict[str, int]:
        """Changed tasks by host."""
        return {host: row["changed"] for host, row in self.recap.items()}

    @property
    def words(self) -> str:
        """The output on one line, for messages that Ansible may wrap."""
        return " ".join(self.text.split())

    def good(self) -> Play:
        """Fail the test with the output unless the command succeeded."""
        assert self.code == 0, self.text[-6000:]
        return self

    def bad(self) -> Play:
        """Fail the test unless the command failed as it should: with a message, never a traceback."""
        assert self.code != 0, self.text[-6000:]
        assert "Traceback" not in self.text, self.text[-6000:]
        return self


class Controller:
    """A copy of the working tree that deploys to the lab; its SSH connections are its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        listed = run("git", "-C", REPO, "ls-files", "-co", "--exclude-standard").stdout.splitlines()
        for name in listed:
            source, target = REPO / name, folder / "pd" / name
            if source.exists() or source.is_symlink():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)
        self.home = folder / "pd"
        self.inventory = "tests/lab/inventory"
        # Wheels are fetched from a registry once for all runs of the tests.
        wheels = REPO / ".pd" / "wheelhouse"
        wheels.mkdir(parents=True, exist_ok=True)
        (self.home / ".pd").mkdir()
        (self.home / ".pd" / "wheelhouse").symlink_to(wheels)
        self.ssh_config = STATE / "ssh_config.outside"
        self.env = {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_SSH_CONTROL_PATH_DIR": str(folder / "cp")}

    def start(self, verb: str, *words: str) -> subprocess.Popen[str]:
        """Start a verb on the lab, in a process group of its own."""
        env = {**os.environ, **self.env, "PATH": f"{ANSIBLE.parent}:{os.environ['PATH']}"}
        env["ANSIBLE_SSH_COMMON_ARGS"] = f"-F {self.ssh_config}"
        return subprocess.Popen(
            ["ansible-playbook", verb, "-i", self.inventory, *words], cwd=self.home, env=env, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def play(self, verb: str, *words: str, timeout_s: float = 280) -> Play:
        """Run a verb to its end."""
        started = time.monotonic()
        process = self.start(verb, *words)
        try:
            text, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            pytest.fail(f"{verb} {words} took over {timeout_s} s:\n{text[-4000:]}")
        play = Play(process.returncode, text, time.monotonic() - started)
        print(f"{verb} {' '.join(words)}: {play.seconds:.1f} s, exit code {play.code}")
        return play

    def result(self, run_id: str, name: str) -> Any:
        """Return a JSON file of a run's folder on the controller."""
        return json.loads((self.home / "results" / run_id / name).read_text())

    def close(self) -> None:
        """End the SSH connections that stay open between commands, and remove the copy."""
        for path in (self.folder / "cp").rglob("*"):
            run("ssh", "-S", path, "-O", "exit", "lab", check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def controller() -> Iterator[Controller]:
    """A controller for as long as it is needed."""
    made = Controller(Path(tempfile.mkdtemp(prefix="pd-lab-")))
    try:
        yield made
    finally:
        made.close()


# -- the deployment, seen from outside Ansible


def router(path: str, body: dict[str, Any] | None = None) -> Any:
    """Ask the router on h3, from the controller's end of the bridge; OSError when nothing comes within five seconds."""
    data = json.dumps(body).encode() if body is not None else None
    call = urllib.request.Request(f"http://{address('h3')}:8000{path}", data=data, headers={"Content-Type": "application/json"})

    def ask() -> Any:
        with urllib.request.urlopen(call, timeout=5) as answer:
            return json.loads(answer.read())

    return network.inside(SWITCH, ask)


def complete(tokens: int = 8) -> dict[str, Any]:
    """One request through the router."""
    body = {"model": "emulated/qwen2.5-3b", "prompt": "once upon a time", "max_tokens": tokens, "ignore_eos": True}
    return dict(router("/v1/completions", body))


def counts() -> dict[str, int]:
    """Healthy workers by role, as the router sees them."""
    found: dict[str, int] = {}
    for worker in router("/workers")["workers"]:
        if worker["is_healthy"]:
            found[worker["worker_type"]] = found.get(worker["worker_type"], 0) + 1
    return found


def units(host: str) -> dict[str, dict[str, str]]:
    """What systemd says of every unit of ours on a host, by name (pd-prefill-0.service)."""
    names = sh(host, "systemctl list-units --all --plain --no-legend 'pd-*.service' | cut -d' ' -f1").split()
    wanted = "Id,ActiveState,SubState,MainPID,NRestarts,UnitFileState,ExecStart"
    found = {}
    for name in names:
        text = sh(host, f"systemctl show -p {wanted} {name}")
        found[name] = dict(line.split("=", 1) for line in text.splitlines())
    return found


def pids(*names: str) -> dict[str, int]:
    """The main process of every active unit on the hosts: h1/pd-prefill-0.service -> pid in the host."""
    return {
        f"{host}/{name}": int(row["MainPID"])
        for host in names or ("h1", "h2", "h3")
        for name, row in units(host).items()
        if row["ActiveState"] == "active"
    }


#: A short run of the load generator.
LOAD = ("-e", "bench_concurrency=4", "-e", "bench_num_requests=24", "-e", "bench_output_len=16")


class Asked:
    """What became of requests that were sent one after the other: how many were answered, and why others were not."""

    def __init__(self) -> None:
        self.good, self.lost = 0, list[str]()


@contextmanager
def asking() -> Iterator[Asked]:
    """Send requests through the router, one after the other, for as long as the block lasts."""
    result = Asked()

    def one() -> None:
        try:
            complete()
            result.good += 1
        except (OSError, LabError, ValueError) as error:
            result.lost.append(str(error))

    with repeating(one, 0.05):
        yield result


def forget(pd: Controller) -> None:
    """Make the hosts as they were before anything was deployed, and the controller forget that there was."""
    if any(sh(host, "ls -d /opt/pd /var/lib/pd /etc/systemd/system/pd* 2>/dev/null; true") for host in ("h1", "h2", "h3", "h4")):
        pd.play("teardown.yml", "-e", "purge=true").good()
