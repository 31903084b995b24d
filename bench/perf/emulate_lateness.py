"""How late are the emulator's tokens? `python bench/perf/emulate_lateness.py --streams 512 --rate 100 --seconds 20`.

Starts `pdbench emulate` with a constant decode step on one core, and on another core a reader that holds the streams
and throws away what comes. Lateness and CPU are the server's own exported figures over the window. Two schedules:

- even: due times lie evenly in the step, as behind a front end that passes token after token on (all real profiles);
- burst: all tokens of a step are due at the same moment, hence the last of N streams is at best N writes late.

The peer is a bare asyncio+uvloop server that writes as many bytes to as many sockets on the same schedule and does
nothing else: what this machine allows. It runs first, in the same way, and its lateness is taken at the same place,
after the `write(2)` of each token. On a machine with one core the reader shares it, and the output says so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import uvloop
import yaml

from pdbench.emulate.asks import read
from pdbench.emulate.metrics import WorkerMetrics
from pdbench.emulate.replies import Reply
from pdbench.emulate.stream import chunk

PROMPT = {"prompt": [1, 2, 3, 4], "stream": True, "model": "emulated"}
#: Seconds between the start of all streams and the window that is measured.
SETTLE_S = 2.0
_LATENESS = "pdbench_emulator_token_lateness_seconds"
_CPU = "pdbench_emulator_cpu_seconds_total"


@dataclass(frozen=True)
class Load:
    """So many streams, so many tokens a second on each, measured for so many seconds; `spread` over the step or not."""

    streams: int
    rate: float
    seconds: float
    spread: bool

    @property
    def gap_s(self) -> float:
        """The time between the due times of two streams' tokens. A tenth less than even, so that no queue builds up."""
        return 0.9 / (self.streams * self.rate) if self.spread else 0.0

    @property
    def tokens(self) -> int:
        """The length of a stream: it is still running when the window ends, with a wide margin."""
        return int(self.rate * (self.seconds + SETTLE_S + 30))


def main() -> int:
    """Measure both and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--rate", type=float, default=100, help="tokens a second on each stream (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="length of the measured window (default: %(default)s)")
    parser.add_argument("--schedule", choices=("even", "burst", "both"), default="both")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    if options.streams < 1 or options.rate <= 0 or options.seconds <= 0:
        parser.error("--streams, --rate and --seconds must be above 0")
    cores = sorted(os.sched_getaffinity(0))
    server_core, reader_core = cores[0], cores[-1]
    shared = " (the only core: reader and server share it)" if server_core == reader_core else ""
    print(f"{options.streams} streams at {options.rate:g} tokens/s, {options.seconds:g} s; server on core {server_core}{shared}")
    figures: list[dict[str, float | str]] = []
    for schedule in ("even", "burst"):
        if options.schedule not in (schedule, "both"):
            continue
        load = Load(options.streams, options.rate, options.seconds, schedule == "even")
        for name, start in (("peer", _peer), ("emulator", _emulator)):
            with start(load, server_core) as port:
                found = _measure(load, port, server_core, reader_core)
            figures.append({"server": name, "schedule": schedule, **found})
            print(f"{schedule:6}{name:9}{_line(found)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"streams": options.streams, "rate": options.rate, "figures": figures}, indent=1))
    return 0


def _line(figures: dict[str, float]) -> str:
    return (
        f"{figures['tokens_per_s']:9.0f} tokens/s  {figures['cpu_us_per_token']:5.1f} us CPU/token  lateness "
        f"p50 {figures['p50_ms']:.2f} p99 {figures['p99_ms']:.2f} max {figures['max_ms']:.2f} ms  "
        f"load {figures['load_1m']:.1f}, others on the core {figures['others_share']:.0%}"
    )


# ---- what is measured


def _constant_profile(load: Load, folder: Path) -> Path:
    """Write the shipped tiny profile as a machine that computes everything at once but steps at the given rate."""
    data = yaml.safe_load((resources.files("pdbench.model") / "profiles" / "tiny.yml").read_text("utf-8"))
    changes: dict[tuple[str, str], float] = {
        ("gpu", "memory_gb"): 1e6,
        ("gpu", "bandwidth_gb_per_s"): 1e12,
        ("gpu", "tflops"): 1e9,
        ("engine", "prefill_overhead_ms"): 0.01,
        ("engine", "decode_overhead_ms"): 1e3 / load.rate,
        ("engine", "decode_us_per_request"): 0,
        ("engine", "frontend_us_per_token"): load.gap_s * 1e6,
        ("engine", "max_running_requests"): load.streams,
        ("engine", "startup_s"): 0,
        ("model", "context_length"): load.tokens + 100,
    }
    for (part, key), value in changes.items():
        data[part][key] = [value, "chosen: a constant step"]
    path = folder / "constant.yml"
    path.write_text(yaml.safe_dump(data))
    return path


@contextlib.contextmanager
def _emulator(load: Load, core: int) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "pdbench", "emulate", "--role", "aggregated", "--port", str(port)]
        argv += ["--profile", str(_constant_profile(load, Path(folder)))]
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(argv, stdout=log, stderr=log)
        try:
            os.sched_setaffinity(process.pid, {core})
            deadline = time.monotonic() + 60
            while not _ready(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("the emulator did not start:\n" + (Path(folder) / "log").read_text())
                time.sleep(0.1)
            yield port
        finally:
            process.kill()
            process.wait()


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextlib.contextmanager
def _peer(load: Load, core: int) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    process = multiprocessing.get_context("fork").Process(target=_serve_peer, args=(load, core, listener), daemon=True)
    process.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
        process.kill()
        process.join()


def _serve_peer(load: Load, core: int, listener: socket.socket) -> None:
    os.sched_setaffinity(0, {core})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_peer_loop(load, listener))


async def _peer_loop(load: Load, listener: socket.socket) -> None:
    ask = read("completions", PROMPT, "emulated", 1 << 20)
    event = Reply(ask, chunk).stream(0, ask.items[0].prompt.digest).token(0)
    metrics = WorkerMetrics("peer", "unified")
    sockets: list[int] = []

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport, self.descriptor = transport, 0

        def data_received(self, data: bytes) -> None:
            if b"GET /metrics" in data:
                self.transport.write(b"HTTP/1.0 200 OK\r\n\r\n" + metrics.text().encode())
                self.transport.close()
            elif b"POST " in data:
                self.descriptor = self.transport.get_extra_info("socket").fileno()
                os.write(self.descriptor, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                sockets.append(self.descriptor)

        def connection_lost(self, _: Exception | None) -> None:
            if self.descriptor:
                sockets.remove(self.descriptor)

    server = await asyncio.get_running_loop().create_server(Protocol, sock=listener)
    step = time.monotonic()
    while server.is_serving():
        step += 1 / load.rate
        for place, descriptor in enumerate([0, *sockets]):
            due = step + place * load.gap_s
            while (delay := due - time.monotonic()) > 0.0003:
                await asyncio.sleep(max(delay, 0.001))
            if place == 0:  # nobody's: the loop gets its turn in every step, however late
                await asyncio.sleep(0)
                continue
            with contextlib.suppress(BlockingIOError):
                os.write(descriptor, event)
            metrics.lateness.observe(max(0.0, time.monotonic() - due))


# ---- how it is measured


def _measure(load: Load, port: int, server_core: int, reader_core: int) -> dict[str, float]:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    reader = context.Process(target=_read_streams, args=(load, port, reader_core, started), daemon=True)
    reader.start()
    try:
        if not started.wait(60):
            raise SystemExit("the streams did not start within 60 s")
        time.sleep(SETTLE_S)
        before, busy_before, at = _scrape(port), _busy_s(server_core), time.monotonic()
        time.sleep(load.seconds)
        after, busy, took = _scrape(port), _busy_s(server_core) - busy_before, time.monotonic() - at
        if not reader.is_alive():
            raise SystemExit("the streams ended before the window did")
    finally:
        reader.kill()
        reader.join()
    moved = {name: value - before.get(name, 0) for name, value in after.items()}
    tokens = moved[f"{_LATENESS}_count"]
    return {
        "tokens_per_s": tokens / took,
        "cpu_us_per_token": moved[_CPU] / tokens * 1e6,
        **{f"p{share}_ms": _quantile(moved, share / 100) * 1e3 for share in (50, 99)},
        "max_ms": _quantile(moved, 1) * 1e3,
        "load_1m": os.getloadavg()[0],
        "others_share": max(0.0, busy - moved[_CPU]) / took,
    }


def _read_streams(load: Load, port: int, core: int, started: Any) -> None:
    os.sched_setaffinity(0, {core})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    body = json.dumps({**PROMPT, "max_tokens": load.tokens, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    poll = select.epoll()
    streams = {}
    for _ in range(load.streams):
        stream = socket.create_connection(("127.0.0.1", port))
        stream.sendall(head.encode() + body)
        streams[stream.fileno()] = stream
        poll.register(stream, select.EPOLLIN)
    waiting = set(streams)
    while True:
        for descriptor, _ in poll.poll():
            if not os.read(descriptor, 1 << 16):
                return
            if waiting:
                waiting.discard(descriptor)
                if not waiting:
                    started.set()


def _scrape(port: int) -> dict[str, float]:
    """Return the lateness histogram (`le` -> count) and the CPU seconds of a server."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        page = answer.read().decode()
    rows = re.findall(rf'^({_LATENESS}\w*|{_CPU}){{[^}}]*?(?:le="([^"]+)")?}} (\S+)$', page, re.MULTILINE)
    return {bound or name: float(value) for name, bound, value in rows}


def _quantile(buckets: dict[str, float], share: float) -> float:
    """Return the quantile in seconds, by linear interpolation within its bucket as Prometheus does."""
    rows = sorted((float(name), count) for name, count in buckets.items() if re.fullmatch(r"[\d.e+-]+|\+Inf", name))
    wanted = share * rows[-1][1]
    lower, below = 0.0, 0.0
    for bound, count in rows:
        if count >= wanted and count > below:
            return lower + (bound - lower) * (wanted - below) / (count - below) if bound != float("inf") else lower
        lower, below = bound, count
    return lower


def _busy_s(core: int) -> float:
    """Return the seconds that a core has been busy, whoever kept it so; stolen time counts."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name == f"cpu{core}":
            user, nice, system, _, _, irq, softirq, steal = map(int, ticks[:8])
            return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    raise SystemExit(f"/proc/stat knows no core {core}")


if __name__ == "__main__":
    sys.exit(main())
