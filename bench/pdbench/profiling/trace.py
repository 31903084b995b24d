"""One trace in Chrome's format, as torch's profiler writes it: its steps, what ran on the GPU, which kernels took the time."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

Event = Mapping[str, Any]

#: categories of what ran on a GPU (torch/csrc/autograd/profiler_kineto)
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_STEP = re.compile(r"step\[(?P<mode>\w+)(?: bs=(?P<requests>\d+))?(?: toks=(?P<tokens>\d+))?")
#: ranks as SGLang names them in its files: ID-TP-0[-DP-0][-PP-0][-EP-0][-EXTEND|-DECODE].trace.json.gz
_RANKS = re.compile(r"-(TP-\d+(?:-(?:DP|PP|EP)-\d+)*)(?:-\w+)?\.trace\.json(?:\.gz)?$")


class TraceError(ValueError):
    """A trace that does not open, or holds nothing; the message says which and why."""


@dataclass(frozen=True)
class Kernel:
    """What of one name ran: calls, and milliseconds in all (of a CPU operator without those that it calls)."""

    name: str
    calls: int
    total_ms: float


@dataclass(frozen=True)
class Trace:
    """What one rank's trace says.

    ``steps_ms``: how long each forward step took on the CPU's side, ``gaps_ms``: from the beginning of one to the next;
    ``batch``: requests in each step. ``gpu_ms``: when at least one kernel ran, of ``span_ms``; 0 without a GPU.
    """

    path: str
    rank: str
    events: int
    steps_ms: tuple[float, ...]
    gaps_ms: tuple[float, ...]
    batch: tuple[int, ...]
    span_ms: float
    gpu_ms: float
    kernels: tuple[Kernel, ...]
    on_gpu: bool
    emulated: bool

    def to_json(self) -> dict[str, object]:
        """Return the figures of a trace."""
        return {
            "file": self.path,
            "rank": self.rank,
            "events": self.events,
            "steps": len(self.steps_ms),
            "step_ms": {"mean": mean(self.steps_ms), "p50": median(self.steps_ms)} if self.steps_ms else None,
            "gap_ms": {"mean": mean(self.gaps_ms), "p50": median(self.gaps_ms)} if self.gaps_ms else None,
            "batch": {"min": min(self.batch), "max": max(self.batch)} if self.batch else None,
            "span_ms": self.span_ms,
            "gpu_busy": self.gpu_ms / self.span_ms if self.on_gpu and self.span_ms else None,
            "kernels_of": "gpu" if self.on_gpu else "cpu",
            "kernels": [{"name": k.name, "calls": k.calls, "total_ms": k.total_ms} for k in self.kernels],
            "emulated": self.emulated,
        }


def read(path: Path, name: str = "") -> Trace:
    """Read a trace; raise TraceError when it does not open, has no events, or one that is not as the profiler writes it."""
    try:
        return _read(path, name)
    except (KeyError, TypeError, ValueError, OverflowError) as why:
        if isinstance(why, TraceError):
            raise
        raise TraceError(f"{path} has an event that no profiler writes: {type(why).__name__} {why}") from None


def _read(path: Path, name: str) -> Trace:
    try:
        raw = path.read_bytes()
        told = json.loads(gzip.decompress(raw) if path.name.endswith(".gz") else raw)
        events = [event for event in told["traceEvents"] if isinstance(event, dict)]
    except OSError as why:
        raise TraceError(f"{path}: {why.strerror or why}") from None
    except (EOFError, zlib.error, RecursionError, ValueError, KeyError, TypeError) as why:
        raise TraceError(f"{path} does not open: {type(why).__name__} {why}") from None
    whole = [event for event in events if event.get("ph") == "X" and "ts" in event and "dur" in event]
    if not whole:
        raise TraceError(f"{path} holds no event")
    ranks = _RANKS.search(path.name)
    steps = _steps(whole)
    gpu = [event for event in whole if event.get("cat") in _ON_GPU]
    begin, end = min(float(e["ts"]) for e in gpu or whole), max(float(e["ts"]) + float(e["dur"]) for e in gpu or whole)
    return Trace(
        path=name or path.name,
        rank=ranks[1] if ranks else path.name,
        events=len(events),
        steps_ms=tuple(float(e["dur"]) / 1000 for e in steps),
        gaps_ms=tuple((float(b["ts"]) - float(a["ts"])) / 1000 for a, b in pairwise(steps)),
        batch=tuple(int(found["requests"]) for e in steps if (found := _STEP.match(str(e["name"]))) and found["requests"]),
        span_ms=(end - begin) / 1000,
        gpu_ms=covered((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in gpu) / 1000,
        kernels=tuple(_by_name((str(e["name"]), float(e["dur"])) for e in gpu) if gpu else own_times(whole)),
        on_gpu=bool(gpu),
        emulated=bool(told.get("emulated")) if isinstance(told, dict) else False,
    )


def _steps(events: Sequence[Event]) -> list[Event]:
    """Return the forward steps in order; annotations appear on the GPU's lines, too, which are left out."""
    found = [e for e in events if e.get("cat") == "user_annotation" and _STEP.match(str(e.get("name")))]
    return sorted(found, key=lambda e: float(e["ts"]))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return how long at least one of the spans (begin, end) lasts."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def own_times(events: Sequence[Event]) -> list[Kernel]:
    """Return the CPU's operators by their own time: without what the operators take that they call on the same thread."""
    threads: dict[tuple[object, object], list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            threads[event.get("pid"), event.get("tid")].append(event)
    own: list[tuple[str, float]] = []
    for line in threads.values():
        # Outer ones first where two begin together.
        line.sort(key=lambda e: (float(e["ts"]), -float(e["dur"])))
        above: list[tuple[float, str, list[float]]] = []
        for event in line:
            begin, lasts = float(event["ts"]), float(event["dur"])
            while above and above[-1][0] <= begin:
                _, name, rest = above.pop()
                own.append((name, rest[0]))
            if above:
                above[-1][2][0] -= lasts
            above.append((begin + lasts, str(event["name"]), [lasts]))
        own += [(name, rest[0]) for _, name, rest in above]
    return _by_name(own)


def _by_name(times: Iterable[tuple[str, float]]) -> list[Kernel]:
    """Add up microseconds by name, the longest first."""
    calls: dict[str, int] = defaultdict(int)
    total: dict[str, float] = defaultdict(float)
    for name, us in times:
        calls[name] += 1
        total[name] += us
    return [Kernel(name, calls[name], total[name] / 1000) for name in sorted(total, key=lambda name: -total[name])]
