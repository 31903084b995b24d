"""Every host has cgroups of its own, under those of the process that boots it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lab.common import PREFIX, load

#: "" is the unified hierarchy; the others are there on machines that still mount them apart.
KINDS = ("", "name=systemd", "memory", "cpu", "cpuacct", "pids", "blkio", "freezer", "devices")


def _own() -> dict[str, Path]:
    """Return the folder of the cgroup that we are in, per hierarchy."""
    mounts: dict[str, tuple[str, str]] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ")
        kind, _, options = right.split(" ", 2)
        root, point = left.split()[3:5]
        names = [""] if kind == "cgroup2" else options.split(",") if kind == "cgroup" else []
        for name in names:
            mounts.setdefault(name, (root, point))
    found = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names_text, path = line.split(":", 2)
        for name in names_text.split(","):
            if name in mounts:
                root, point = mounts[name]
                inside = os.path.relpath(path, root) if path.startswith(root) else "."
                found[name] = Path(os.path.normpath(f"{point}/{inside}"))
    return found


def folders(host: str) -> dict[str, Path]:
    """Return the host's cgroups: those it was booted in, or those it would be."""
    recorded = load(host).get("cgroups")
    if recorded:
        return {name: Path(path) for name, path in recorded.items()}
    own = _own()
    return {name: own[name] / PREFIX / host for name in KINDS if name in own}


def remove(host: str) -> None:
    """Remove the cgroups of a host that is off; what still ends in them is waited for."""
    for folder in folders(host).values():
        for root, _, _ in os.walk(folder, topdown=False):
            end = time.monotonic() + 3
            while time.monotonic() < end:
                try:
                    os.rmdir(root)
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.05)
                else:
                    break
        try:
            folder.parent.rmdir()
        except OSError:
            continue  # other hosts are still there


def freeze(host: str, frozen: bool) -> None:
    """Hang a host, or let it go on: it keeps its address and answers ping, but runs nothing."""
    for name, file, words in (("", "cgroup.freeze", ("0", "1")), ("freezer", "freezer.state", ("THAWED", "FROZEN"))):
        path = folders(host).get(name, Path("/nowhere")) / file
        if path.exists():
            path.write_text(words[frozen])
            return
