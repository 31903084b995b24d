"""Processes and ports of a Linux host, read from /proc: who holds a port, and which processes are ours."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Sequence, Tuple

_LISTEN = "0A"


@dataclass(frozen=True)
class Process:
    """One process: its command line and, where we may read it, its working directory."""

    pid: int
    command: str
    cwd: str


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def all_processes() -> Iterator[Process]:
    """Yield every process that is not a zombie (``cwd`` is empty for processes of other users)."""
    for folder in Path("/proc").glob("[0-9]*"):
        stat = _read(folder / "stat")
        if not stat or stat.rpartition(b")")[2].split()[:1] == [b"Z"]:
            continue
        command = _read(folder / "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
        try:
            cwd = os.readlink(folder / "cwd").replace(" (deleted)", "")
        except OSError:
            cwd = ""
        yield Process(int(folder.name), command, cwd)


def place() -> str:
    """Return what tells this machine, and the PID namespace that we are in, from others of its name; a reboot makes it another."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{_read(Path('/proc/sys/kernel/random/boot_id')).decode().strip()} {namespace}".strip()


def sees_all() -> bool:
    """Whether /proc shows us other users' processes (the mount option hidepid hides them)."""
    return bool(_read(Path("/proc/1/stat")))


def work_dir(state_dir: str, unit: str) -> str:
    """Return the working directory of a unit; it marks the unit's processes.

    Engines and routers overwrite their command line and environment with a title; the working directory stays.
    """
    return f"{state_dir}/run/{unit}"


def ours(state_dir: str, unit: str = "") -> List[Process]:
    """Return the processes of ``state_dir`` (of one unit, where named), whoever their parent is now."""
    mark = work_dir(os.path.realpath(state_dir), unit)
    return [p for p in all_processes() if p.pid != os.getpid() and (p.cwd == mark or p.cwd.startswith(mark.rstrip("/") + "/"))]


def kill(pids: Iterable[int], grace_s: float) -> None:
    """End processes: SIGTERM, and SIGKILL to those still there after ``grace_s`` seconds."""
    left = list(pids)
    for number, wait in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        for pid in left:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
        end = time.monotonic() + wait
        while left and time.monotonic() < end:
            left = [pid for pid in left if alive(pid)]
            time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether the process is there and not a zombie."""
    stat = _read(Path(f"/proc/{pid}/stat"))
    return bool(stat) and stat.rpartition(b")")[2].split()[:1] != [b"Z"]


def _address(text: str) -> str:
    raw = bytes.fromhex(text)
    words = struct.unpack(f"<{len(raw) // 4}I", raw)
    packed = struct.pack(f">{len(words)}I", *words)
    address = socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)
    return address[len("::ffff:") :] if address.startswith("::ffff:") else address


def listeners() -> List[Tuple[str, int, int]]:
    """Return (address, port, socket inode) of every listening TCP socket."""
    found: List[Tuple[str, int, int]] = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in _read(Path(table)).decode().splitlines()[1:]:
            columns = line.split()
            if columns[3] == _LISTEN:
                address, port = columns[1].split(":")
                found.append((_address(address), int(port, 16), int(columns[9])))
    return found


def sockets(pids: Iterable[int]) -> Dict[int, int]:
    """Return the sockets (inode -> process) of processes, as far as we may look."""
    found: Dict[int, int] = {}
    for pid in pids:
        try:
            for entry in os.scandir(f"/proc/{pid}/fd"):
                name = os.readlink(entry.path)
                if name.startswith("socket:["):
                    found[int(name[8:-1])] = pid
        except OSError:
            continue
    return found


def _owner(inode: int) -> str:
    wanted = f"socket:[{inode}]"
    for process in all_processes():
        try:
            for entry in os.scandir(f"/proc/{process.pid}/fd"):
                if os.readlink(entry.path) == wanted:
                    return f"process {process.pid} ({process.command[:120]})"
        except OSError:
            continue
    return "a process of another user (run ss -ltnp as root to see it)"


def taken_ports(wanted: Sequence[Tuple[str, int]]) -> Dict[Tuple[str, int], str]:
    """Return, for each (address, port) that cannot be bound, who holds it."""
    everywhere = {"0.0.0.0", "::"}
    result: Dict[Tuple[str, int], str] = {}
    for address, port, inode in listeners():
        for want in wanted:
            if want[1] == port and (want[0] == address or address in everywhere or want[0] in everywhere):
                result[want] = _owner(inode)
    return result
