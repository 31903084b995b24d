"""Check on the way that the KV cache took, pair by pair, as far as the engine lets it be seen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from pdbench.gate.check import Check, some
from pdbench.gate.counters import info, scrape
from pdbench.gate.rundata import Json, RunData

#: Counted by an emulated decode worker: transfers by prefill worker (its bootstrap address) and transport.
_COUNTER = "pdbench_emulator_kv_transfers_total"
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
#: UCX_TLS names what UCX may use: what each of its names allows; others (self, sm, cuda_copy) reach no other worker.
_UCX = {
    "tcp": "tcp",
    "cuda_ipc": "cuda_ipc",
    "cuda": "cuda_ipc",
    **dict.fromkeys(("rc", "rc_x", "rc_v", "rc_mlx5", "rc_verbs", "dc", "dc_x", "dc_mlx5", "ud", "ud_x", "ud_v", "ib"), "rdma"),
}
_UCX_LOCAL = {"self", "sm", "shm", "posix", "sysv", "cma", "xpmem", "mm", "cuda_copy", "gdr_copy"}
#: Between NPUs (``hccs``) nothing says it.
_HOW = "the engine does not say: UCX tells it in its log under UCX_PROTO_INFO=y, Mooncake when it starts, memfabric nowhere"


def transport(run: RunData) -> Check:
    """Every prefill-decode pair moved its KV cache as the plan expects; what cannot be seen is said, and is no failure."""
    if not run.disaggregated:
        return Check("transport", True, None, "aggregated workers move no KV cache", {})
    pairs = run.plan.get("pairs") or []
    if not pairs:
        return Check("transport", False, None, "plan.json names no prefill-decode pairs", {})
    workers = {worker["name"]: worker for worker in run.workers}
    faults, unseen, rows = [], [], {}
    for pair in pairs:
        name, expected = f"{pair['prefill']} to {pair['decode']}", str(pair.get("expected_transport"))
        seen = dict(_sightings(run, workers[pair["prefill"]], workers[pair["decode"]]))
        rows[name] = {"expected": expected, "seen": {source: sorted(ways) for source, ways in seen.items()}}
        # A log tells what a worker uses with all of its peers; a counter, what it used with this one.
        wrong = [(s, ways) for s, ways in seen.items() if (ways != {expected} if s == _COUNTER else expected not in ways)]
        faults += [f"{name}: {' and '.join(sorted(ways))} seen ({source}), {expected} expected" for source, ways in wrong]
        if not seen:
            unseen.append(name)
    evidence: dict[str, Any] = {"pairs": rows}
    message = some(faults, 3) or f"all {len(pairs)} pairs moved their KV cache as expected"
    if unseen:
        evidence["caution"] = f"how the KV cache moved was not seen for {some(unseen, 3)} ({_HOW})"
        message = some(faults, 3) or f"of {len(pairs)} pairs, {evidence['caution']}"
    return Check("transport", not faults, None, message, evidence)


def _sightings(run: RunData, prefill: Json, decode: Json) -> Iterator[tuple[str, set[str]]]:
    """Yield (source, transports): from what was counted, else what the worker says, then from logs and what was allowed."""
    counted: set[str] = set()
    said: set[str] = set()
    peer = f"{urlsplit(prefill['url']).hostname}:{prefill['ranks'][0].get('bootstrap_port')}"
    for point in run.points:
        before, after = (scrape(point.evidence, end, decode["name"]).samples for end in ("before", "after"))
        for key, value in after.items():
            labels = dict(_LABEL.findall(key))
            if key.startswith(_COUNTER) and labels.get("peer") == peer and value > before.get(key, 0.0):
                counted.add(labels.get("transport", "unknown"))
        ways = info(point.evidence, "after", decode["name"]).get("emulated_transport")
        if isinstance(ways, dict) and peer in ways:
            said.add(str(ways[peer]))
    if counted or said:
        yield (_COUNTER, counted) if counted else ("emulated_transport", said)
    for worker in (prefill, decode):
        text = run.log_of(worker)
        found = {way for pattern, way in run.engine.log_lines if pattern.search(text)}
        # Mooncake that was forced to TCP uses it whatever else it found.
        found = {"tcp"} if "tcp" in found else found | between_gpus(text)
        if found:
            yield f"log of {worker['name']}", found
        for rank in worker["ranks"]:
            possible = allowed((rank.get("env") or {}).get("UCX_TLS"))
            if possible:
                yield f"UCX_TLS of {worker['name']}", possible


def between_gpus(text: str) -> set[str]:
    """Return the transports by which UCX moves large messages from GPU memory to GPU memory, by its tables in a log.

    Each has a title (``remote memory write by ucp_put*(multi) from cuda/GPU0 to cuda/dev[1]``) and rows of sizes, what is done,
    and transports with devices (``0..inf | zero-copy | cuda_ipc/cuda``). Tables of host memory say nothing of a KV cache on GPUs.
    """
    found: set[str] = set()
    wanted = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 1:
            wanted = "remote memory" in cells[0] and cells[0].count("cuda") == 2
        elif wanted and len(cells) == 3 and cells[0].endswith("..inf"):
            # cuda_copy beside another one is no way of its own: GPU memory that goes by TCP is copied first.
            found |= {_UCX[name] for name in re.findall(r"(\w+)/", cells[2]) if name in _UCX}
    return found


def allowed(setting: object) -> set[str]:
    """Return what a UCX_TLS leaves possible between two workers; empty when it leaves everything or is not understood."""
    names = set(setting.split(",")) if isinstance(setting, str) else set()
    return {_UCX[name] for name in names & set(_UCX)} if names <= {*_UCX, *_UCX_LOCAL} else set()
