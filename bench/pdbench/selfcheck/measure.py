"""One point of the selfcheck: the server, `pdbench run` beside it as anybody would call it, and what both wrote down."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from pdbench.records import MEASURE
from pdbench.selfcheck.judge import Answer, Asked, Finding, judge
from pdbench.selfcheck.truth import model_name

_COLUMNS = ["phase", "ok", "sent_s", "first_s", "end_s", "output_sha256"]
_PINGS = 20


class CannotCheckError(Exception):
    """The selfcheck could not be made; the message says why."""


@dataclass(frozen=True)
class Server:
    """A truth server: where it listens, and its process where it is ours."""

    url: str
    process: subprocess.Popen[str] | None = None

    def get(self, path: str) -> dict[str, Any]:
        """Return a JSON answer; raise CannotCheckError."""
        parts = urlsplit(self.url)
        try:
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=30)
            with contextlib.closing(connection):
                connection.request("GET", path)
                found = json.loads(connection.getresponse().read())
                return found if isinstance(found, dict) else {}
        except (OSError, ValueError, http.client.HTTPException) as why:
            raise CannotCheckError(f"{self.url} does not answer as a truth server: {why or type(why).__name__}") from None

    def check(self) -> None:
        """Raise CannotCheckError when something else answers there."""
        if self.get("/health").get("truth") != 1:
            raise CannotCheckError(f"{self.url} is no truth server: start `pdbench selfcheck --listen ADDRESS:PORT` there")

    def path_ms(self) -> float:
        """Return the shortest time there and back, ms."""
        parts, took = urlsplit(self.url), []
        with contextlib.closing(http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=30)) as connection:
            for _ in range(_PINGS):
                start = time.perf_counter()
                connection.request("GET", "/health")
                connection.getresponse().read()
                took.append(time.perf_counter() - start)
        return 1000 * min(took)


@contextlib.contextmanager
def own_server() -> Iterator[Server]:
    """Start the server on this machine, and stop it in the end. Raise CannotCheckError."""
    argv = [sys.executable, "-m", "pdbench.selfcheck.truth", "0"]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        word, _, port = process.stdout.readline().partition(" ")
        if word != "port":
            raise CannotCheckError("the truth server does not start (its message stands above)")
        with contextlib.suppress(OSError):
            # A server that waits for a core tells its own lateness; one that does not wait tells more about the client.
            os.setpriority(os.PRIO_PROCESS, process.pid, -10)
        yield Server(f"http://127.0.0.1:{int(port)}", process)
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _busy_s() -> float:
    """Return the CPU seconds of this machine since it started, 0 where it does not tell."""
    try:
        with Path("/proc/stat").open(encoding="ascii") as lines:
            ticks = [int(word) for word in lines.readline().split()[1:9]]
    except (OSError, ValueError):
        return 0.0
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def check_point(
    server: Server, asked: Asked, ttft_ms: float, isl: int, more: Sequence[str], folder: Path, path_ms: float
) -> Finding:
    """Run `pdbench run` once against the server and judge it; raise CannotCheckError."""
    before = server.get("/log?after=1000000000")
    argv = [sys.executable, "-m", "pdbench", "run", "--url", server.url, "--model", model_name(ttft_ms, asked.itl_ms)]
    argv += ["--concurrency", str(asked.concurrency), "--num-requests", str(asked.requests), "--warmup", "1"]
    argv += ["--isl", str(isl), "--osl", str(asked.tokens), "--output", str(folder), *more]
    busy, used, start = _busy_s(), _children_s(), time.monotonic()
    patience = 60 + 20 * asked.rounds * (ttft_ms + asked.tokens * asked.itl_ms) / 1000
    with (folder.parent / f"{folder.name}.log").open("w+", encoding="utf-8") as log:
        client = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            code = client.wait(patience)
        except subprocess.TimeoutExpired:
            raise CannotCheckError(f"`pdbench run` had not ended after {patience:.0f} s: this client does not keep up") from None
        finally:
            if client.poll() is None:
                client.kill()
                client.wait()
        wall = time.monotonic() - start
        log.seek(0)
        said = log.read().strip()
    after = server.get(f"/log?after={before['next']}")
    if code not in (0, 3):
        raise CannotCheckError(f"`pdbench run` ended with exit code {code}. The end of what it said:\n{said[-2000:]}")
    ours = _children_s() - used + (after["cpu_s"] - before["cpu_s"] if server.process else 0.0)
    others = max(0.0, _busy_s() - busy - ours) / wall
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    told = cast("dict[str, object]", summary.get("client") or {})
    return judge(asked, _answers(folder / "requests.parquet"), after["rows"], told, path_ms, others)


def _answers(path: Path) -> list[Answer]:
    import pyarrow.parquet as pq

    columns = pq.read_table(path, columns=_COLUMNS).to_pydict()
    rows = zip(*(columns[name] for name in _COLUMNS), strict=True)
    return [Answer(ok, sent, first, end, text) for phase, ok, sent, first, end, text in rows if phase == MEASURE]
