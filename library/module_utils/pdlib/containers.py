"""Containers of ours on a host, through the client of docker or podman."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Dict, Iterable, List, Sequence

from .errors import UserError
from .runtimes import container_name

#: In the state directory: the clients that its units use. Teardown asks these, and no others.
_CLIENTS = "containers"


def call(client: str, *args: str, timeout_s: float = 120) -> "subprocess.CompletedProcess[str]":
    """Run a client to its end."""
    try:
        return subprocess.run(
            [client, *args], capture_output=True, text=True, check=False, timeout=timeout_s, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise UserError(f"there is no {client} on the host: install it, or set another runtime") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{client} {args[0]} gave no answer within {timeout_s:.0f} s") from None


def note(state_dir: str, clients: Iterable[str]) -> None:
    """Remember which clients the units of ``state_dir`` use, before one of them starts a container."""
    path = Path(state_dir) / _CLIENTS
    wanted = sorted({*noted(state_dir), *clients})
    if wanted and wanted != noted(state_dir):
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        fresh.write_text("".join(f"{name}\n" for name in wanted))
        os.replace(fresh, path)


def noted(state_dir: str) -> List[str]:
    """Return the clients that units of ``state_dir`` were started with."""
    try:
        return (Path(state_dir) / _CLIENTS).read_text().split()
    except OSError:
        return []


def ours(state_dir: str) -> Dict[str, str]:
    """Return the containers of ``state_dir``, running or not: name -> client."""
    found: Dict[str, str] = {}
    for client in noted(state_dir):
        if not shutil.which(client):
            continue
        done = call(client, "ps", "--all", "--filter", f"label=pd={state_dir}", "--format", "{{.Names}}")
        if done.returncode:
            raise UserError(f"{client} does not say which containers of ours there are: {last_line(done.stderr)}")
        found.update({name: client for name in done.stdout.split()})
    return found


def remove(state_dir: str, units: Sequence[str]) -> List[str]:
    """End the containers of ``units``, whoever started them; return the names of those that were there."""
    if not noted(state_dir):
        return []
    wanted = {container_name(unit, state_dir) for unit in units}
    return end({name: client for name, client in ours(state_dir).items() if name in wanted})


def end(names: Dict[str, str]) -> List[str]:
    """End containers (name -> client) and forget them."""
    for name, client in names.items():
        done = call(client, "rm", "--force", name)
        # One that ends by itself at this moment is as good as gone.
        if done.returncode and "no such container" not in done.stderr.lower() and "already in progress" not in done.stderr:
            raise UserError(f"{client} rm {name}: {last_line(done.stderr)}")
    return sorted(names)


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "(it says nothing)"
