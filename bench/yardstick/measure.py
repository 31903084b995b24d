"""One measurement: the truth server, one tool in a cgroup of its own, and what became of it."""

from __future__ import annotations

import contextlib
import csv
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yardstick.tools import HOME, OSL, Tool

TTFT_MS, ITL_MS = 50, 10
_PATIENCE_S = 240


@dataclass(frozen=True)
class Case:
    """One load: requests in flight, requests, tokens an event, events a write, whether a core is taken away."""

    name: str
    concurrency: int
    requests: int
    per_event: int = 1
    per_write: int = 1
    core_taken: bool = False


class Meter:
    """CPU seconds of a command and all that comes of it: cpuacct or cgroup v2 where we may make a group, else RUSAGE_CHILDREN."""

    def __init__(self) -> None:
        """Find what there is."""
        self.kind, self._group, self._before = "RUSAGE_CHILDREN", Path(), 0.0
        name = f"yardstick-{os.getpid()}"
        for kind, root, file in (("cpuacct", "cpuacct", "cpuacct.usage"), ("cgroup2", "", "cpu.stat")):
            group = Path("/sys/fs/cgroup") / root / name
            with contextlib.suppress(OSError):
                group.mkdir(exist_ok=True)
                if (group / file).exists() and os.access(group / "cgroup.procs", os.W_OK):
                    self.kind, self._group = kind, group
                    return

    def wrap(self, argv: list[str]) -> list[str]:
        """Return the command that joins the group, then becomes ``argv``."""
        self._before = self._used()
        if self.kind == "RUSAGE_CHILDREN":
            return argv
        return ["/bin/sh", "-c", f'echo $$ >{self._group}/cgroup.procs; exec "$@"', "client", *argv]

    def seconds(self) -> float:
        """Return what was used since `wrap`."""
        return self._used() - self._before

    def _used(self) -> float:
        if self.kind == "cpuacct":
            return int((self._group / "cpuacct.usage").read_text()) / 1e9
        if self.kind == "cgroup2":
            return int((self._group / "cpu.stat").read_text().split()[1]) / 1e6
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def end(self) -> None:
        """Kill what is left of the command."""
        if self.kind != "RUSAGE_CHILDREN":
            for pid in map(int, (self._group / "cgroup.procs").read_text().split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Remove the group."""
        if self.kind != "RUSAGE_CHILDREN":
            with contextlib.suppress(OSError):
                self._group.rmdir()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _spent(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _busy() -> float:
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _server(case: Case, port: int, log: Path) -> Iterator[subprocess.Popen[str]]:
    argv = [str(HOME / "truthd"), str(port), str(log), str(TTFT_MS), str(ITL_MS), str(case.per_event), str(case.per_write)]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    try:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, -15)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _taken(core: bool) -> Iterator[list[int]]:
    """Keep the last core busy, where that is asked for."""
    if not core:
        yield []
        return
    last = max(os.sched_getaffinity(0))
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(spinning.pid, {last})
        yield [spinning.pid]
    finally:
        spinning.kill()
        spinning.wait()


def measure(tool: Tool, case: Case, meter: Meter, folder: Path) -> dict[str, Any]:
    """Run the tool once; return a row: the case, the tool's figures, the server's, the cost. ``problem``: why there are none."""
    row: dict[str, Any] = {"tool": tool.name, **asdict(case), "meter": meter.kind}
    out, log, said = folder / f"{tool.name}.out", folder / "truth.csv", folder / f"{tool.name}.log"
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(HOME / "hub")}
    port = _free_port()
    with _server(case, port, log) as server, _taken(case.core_taken) as spinning:
        before, start = _busy(), time.monotonic()
        argv = meter.wrap(tool.command(f"http://127.0.0.1:{port}", case.concurrency, case.requests, out))
        with said.open("w") as text:
            quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": text, "stderr": text}
            client = subprocess.Popen(argv, env=env, cwd=folder, start_new_session=True, **quiet)
            try:
                row["exit_code"] = client.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                os.killpg(client.pid, signal.SIGKILL)
                client.wait()
                meter.end()
                return {**row, "problem": f"it had not ended after {_PATIENCE_S} s"}
        wall, cpu = time.monotonic() - start, meter.seconds()
        meter.end()
        ours = cpu + _spent(server.pid) + sum(map(_spent, spinning))
        row |= {
            "wall_s": wall,
            "cpu_s": cpu,
            "server_cpu_s": _spent(server.pid),
            "other_cores": max(0.0, _busy() - before - ours) / wall,
        }
        server.send_signal(signal.SIGTERM)
        row["connections"] = int(server.communicate(timeout=10)[1].split("connections=")[1].split()[0])
    row |= _truth(log, case)
    try:
        row |= asdict(tool.read(out))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as why:
        tail = " ".join(said.read_text(errors="replace").split())[-300:]
        return {**row, "problem": f"it left no figures ({type(why).__name__}, exit code {row['exit_code']}): {tail}"}
    if row["completed"] != case.requests:
        row["problem"] = f"{row['completed']} of {case.requests} requests were answered"
    return row


def _truth(log: Path, case: Case) -> dict[str, Any]:
    """Return what the server knows of the measured answers: those of full length, not a tool's own test request."""
    with log.open() as text:
        rows = [values for line in csv.reader(text) if (values := list(map(int, line)))[3] == OSL]
    if not rows:
        return {"served": 0}
    ttft = sorted((row[1] - row[0]) / 1e6 for row in rows)
    span = (max(row[2] for row in rows) - min(row[0] for row in rows)) / 1e9
    busy = sum(row[2] - row[0] for row in rows) / 1e9
    return {
        "served": len(rows),
        "true_ttft_ms": statistics.mean(ttft),
        "true_ttft_p99_ms": ttft[min(len(ttft) - 1, int(0.99 * len(ttft)))],
        "true_itl_ms": statistics.mean((row[2] - row[1]) / 1e6 / (row[3] - 1) for row in rows),
        "server_late_ms": max(row[4] for row in rows) / 1e3,
        # Slots that were in use, of those there were: 1 when a request follows at once on each that ends
        "delivered": busy / (case.concurrency * span) if span else None,
    }
