"""What all of the lab shares: names, folders, commands, and what is known of a host."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
LAB = os.environ.get("LAB_NAME", "lab")
DIR = REPO / ".pd" / "lab"
#: This lab's own folder; the base root beside it serves every lab of the checkout.
STATE = DIR / LAB
HOSTS = STATE / "hosts"
KEY = STATE / "id_ed25519"
#: The lab's addresses: they exist in its own network namespaces only.
NET = "10.77.0"
CONTROLLER = f"{NET}.1"
#: Names of namespaces and cgroups, so that checkouts do not meet.
PREFIX = f"{LAB}-{hashlib.sha256(str(STATE).encode()).hexdigest()[:6]}"
SWITCH = f"{PREFIX}-switch"
BRIDGE = "br0"
MAX_HOSTS = 200


class LabError(Exception):
    """Something that ends the command; the message is for a person."""


@contextmanager
def locked() -> Iterator[None]:
    """Hold the lab, so that one command at a time changes it; LabError while another does."""
    DIR.mkdir(parents=True, exist_ok=True)
    with open(DIR / f".lock-{LAB}", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LabError("another command is using the lab: wait for it, or set LAB_NAME for a lab of its own") from None
        yield


def run(*command: str | Path, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command with its output kept; LabError with that output when it fails and ``check`` is set."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    if check and done.returncode:
        raise LabError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}".rstrip())
    return done


def ip(*words: str, ns: str = "", check: bool = True) -> None:
    """Run ``ip``, in a network namespace when one is given."""
    run("ip", *(["-n", ns] if ns else []), *words, check=check)


def log(text: str) -> None:
    """Say what is being done."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


def itself(*words: str) -> list[str]:
    """Return the command line that runs this lab again, from anywhere."""
    return ["env", f"PYTHONPATH={REPO / 'tests'}", f"LAB_NAME={LAB}", sys.executable, "-m", "lab", *words]


# -- a host: h7 has the address NET.17, the port p7 on the bridge, and the namespace PREFIX-h7


def number(host: str) -> int:
    """Return 7 for h7; LabError for what is not a host's name."""
    if host[:1] == "h" and host[1:].isdigit() and 1 <= int(host[1:]) <= MAX_HOSTS:
        return int(host[1:])
    raise LabError(f"not a host: {host} (h1 to h{MAX_HOSTS})")


def address(host: str) -> str:
    """Return the host's address; ``controller`` is the machine's end of the bridge."""
    return CONTROLLER if host == "controller" else f"{NET}.{number(host) + 10}"


def port(host: str) -> str:
    """Return the host's end on the bridge."""
    return f"p{number(host)}"


def namespace(host: str) -> str:
    """Return the host's network namespace."""
    return f"{PREFIX}-{host}"


def load(host: str) -> dict[str, Any]:
    """Return what is recorded of a host ({}: it does not exist)."""
    try:
        return dict(json.loads((HOSTS / host / "state.json").read_text()))
    except FileNotFoundError:
        return {}


def save(host: str, **values: Any) -> None:
    """Record more of a host."""
    file = HOSTS / host / "state.json"
    file.with_suffix(".tmp").write_text(json.dumps({**load(host), **values}))
    file.with_suffix(".tmp").rename(file)


def known() -> list[str]:
    """Return the hosts that exist, on or off."""
    return sorted((path.parent.name for path in HOSTS.glob("*/state.json")), key=number)


# -- processes


def start_time(pid: int) -> str | None:
    """Return when a process began; None when it is gone, or a zombie that nobody has reaped yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


def children(pid: int) -> list[int]:
    """Return a process's children."""
    try:
        return [int(kid) for kid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def supervisor(host: str) -> int | None:
    """Return the process that runs the host's nspawn, None while the host is off."""
    state = load(host)
    pid = state.get("pid")
    return pid if pid and start_time(pid) == state.get("started") else None


def leader(host: str) -> int | None:
    """Return the host's PID 1 as this machine sees it, None while the host is off."""
    here = os.readlink("/proc/self/ns/pid")
    for nspawn in children(supervisor(host) or 0):
        for kid in children(nspawn):
            try:
                if os.readlink(f"/proc/{kid}/ns/pid") != here:
                    return kid
            except OSError:
                continue
    return None
